"""The package as a whole: it imports cleanly, its notebooks are fit to be read, its README is in step."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "medsketch").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def cells(path, kind=None):
    return [c for c in json.loads(path.read_text())["cells"] if kind in (None, c["cell_type"])]


def test_every_module_imports_in_a_fresh_process_without_development_packages():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES]
    code = (
        "import sys, importlib\n"
        f"for n in {names!r}: importlib.import_module(n)\n"
        "bad = {m.split('.')[0] for m in sys.modules} & {'fastcore', 'nbdev', 'execnb', 'torchvision', 'pytest', 'jupyterlab'}\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_fit_to_be_read(path):
    first = "".join(cells(path)[0]["source"])
    assert re.match(r"# .+\n\n> .+", first), "a title and one line that says what it is about"
    code = cells(path, "code")
    assert any(c["outputs"] for c in code), "committed without outputs"
    assert not any(o["output_type"] == "error" for c in code for o in c["outputs"])
    text = "".join("".join(c["source"]) for c in cells(path))
    assert "pip install" in text, "no set-up cell for Colab"
    assert path.name == "index.ipynb" or "colab-badge.svg" in text
    assert path.stat().st_size < 650_000, "shrink the pictures"


def test_relative_links_lead_somewhere():
    pages = [(p, "".join("".join(c["source"]) for c in cells(p, "markdown"))) for p in NOTEBOOKS]
    pages.append((ROOT / "README.md", (ROOT / "README.md").read_text()))
    missing = [
        f"{page.name}: {target}"
        for page, text in pages
        for target in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text)
        if not (page.parent / target.split("#")[0]).exists()
    ]
    assert not missing, missing


def test_readme_is_the_index_notebook():
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_documentation_is_processed_without_quarto(tmp_path):
    "nbdev's own processing of every page, with a stand-in for Quarto"
    stub = tmp_path / "bin/quarto"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(0o755)
    copy = tmp_path / "medsketch"
    copy.mkdir()
    for name in ("nbs", "medsketch", "settings.ini", "setup.py", "_quarto.yml"):
        subprocess.run(["cp", "-r", ROOT / name, copy], check=True)
    env = os.environ | {"PATH": f"{stub.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["nbdev_proc_nbs"], check=False, cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((copy / "_proc").rglob("*.ipynb"))) == len(NOTEBOOKS)
