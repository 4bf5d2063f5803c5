"""Fails if cleaning the notebooks or exporting them again would change any file."""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def snapshot(base: Path) -> dict:
    "Contents of every notebook and generated module below `base`"
    files = [*base.glob("nbs/**/*.ipynb"), *base.glob("medsketch/**/*.py")]
    return {p.relative_to(base): p.read_bytes() for p in files if ".ipynb_checkpoints" not in p.parts}


def main():
    "Clean and export in a copy, so that a failing check leaves the working tree as it was"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "medsketch"
        copy.mkdir()
        passing = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        for name in ("nbs", "medsketch"):
            shutil.copytree(root / name, copy / name, ignore=passing)
        for name in ("settings.ini", "setup.py", "pyproject.toml"):
            shutil.copy(root / name, copy)
        before = snapshot(copy)
        for command in ("nbdev_clean", "nbdev_export"):
            subprocess.run([command], cwd=copy, check=True)
        after = snapshot(copy)
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed:
        sys.exit("not clean, or not in step (run nbdev_clean, nbdev_export): " + ", ".join(changed))
    for tool in ("readme", "sidebar"):
        subprocess.run([sys.executable, root / f"tools/{tool}.py", "--check"], check=True)
    print(f"{len(before)} notebooks and modules are clean and in step; README.md and the sidebar too")


if __name__ == "__main__":
    main()
