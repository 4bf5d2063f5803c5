"""nbs/sidebar.yml lists every notebook: `python tools/sidebar.py` writes it, `--check` says whether it is in step."""
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]

# section -> what stands in it, in this order: a notebook, or a folder with all of its notebooks in file order
SECTIONS = {
    "Start": ["index.ipynb", "gallery.ipynb", "glossary.ipynb", "numbers.ipynb"],
    "Tutorials": ["tutorials/draw.ipynb", "tutorials/skrgan.ipynb", "tutorials/dualgan.ipynb", "tutorials"],
    "Data": ["01_phantoms", "02_data"],
    "Sketch": ["03_sketch"],
    "Models": ["04_models"],
    "Training": ["05_train"],
    "Systems": ["06_recipes", "09_pretrained.ipynb", "09_cards.ipynb"],
    "Evaluation": ["07_evaluate"],
    "Studio": ["08_studio"],
    "Reference": ["00_core.ipynb", "00_diagrams.ipynb", "10_datasheet.ipynb", "10_dicom.ipynb", "10_processes.ipynb",
                  "10_export.ipynb", "12_share.ipynb", "11_cli"],
}


def pages(base: Path) -> list:
    "Every notebook below `base`, relative to it, in reading order"
    found = (p.relative_to(base) for p in base.rglob("*.ipynb"))
    return sorted(p.as_posix() for p in found if not any(part[0] in "._" for part in p.parts))


def contents(base: Path) -> dict:
    "Section -> its pages. Raises `ValueError` naming a notebook that no section lists, or an entry without notebooks"
    left, sections = pages(base), {}
    for name, entries in SECTIONS.items():
        sections[name] = []
        for entry in entries:
            of_entry = [p for p in left if p == entry or p.startswith(f"{entry}/")]
            if entry.endswith(".ipynb") and not of_entry:
                raise ValueError(f"tools/sidebar.py lists {entry} under {name}, which is not there")
            sections[name] += of_entry
            left = [p for p in left if p not in of_entry]
    if left:
        raise ValueError(f"no section of tools/sidebar.py lists {', '.join(left)}: add the notebook or its folder")
    return {k: v for k, v in sections.items() if v}


def sidebar(base: Path) -> str:
    "The sidebar of the website. Quarto takes each page's name from its title"
    lines = ["# written by tools/sidebar.py", "website:", "  sidebar:", "    contents:"]
    for name, entries in contents(base).items():
        lines += [f"    - section: {name}", "      contents:", *(f"      - {p}" for p in entries)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path, text = root / "nbs/sidebar.yml", sidebar(root / "nbs")
    if "--check" not in sys.argv:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        sys.exit("nbs/sidebar.yml does not list the notebooks as they are: run `python tools/sidebar.py`")
