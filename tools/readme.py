"""README.md is nbs/index.ipynb: `python tools/readme.py` writes it, `--check` says whether it is in step."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
# whole addresses, since the same text stands on the package index
PAGES = "https://github.com/medsketch/medsketch/blob/main"
FILES = "https://raw.githubusercontent.com/medsketch/medsketch/main"
ON_PAGE_ONLY = ("#| hide", "#| export")


def readme_text() -> str:
    "The index notebook as Markdown that reads well on a repository's front page"
    nb = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and c.source.startswith(ON_PAGE_ONLY))]
    for c in nb.cells:
        if c.cell_type == "code":
            c.outputs = [o for o in c.outputs if not {"image/png", "image/jpeg"} & set(o.get("data", {}))]
    nb.metadata.language_info = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\((?!https?:)([^)]+\.ipynb)", rf"]({PAGES}/nbs/\1", text)
    return re.sub(r"\]\((?!https?:)([^)]+\.(?:png|jpg|gif)\))", rf"]({FILES}/nbs/\1", text).strip() + "\n"


if __name__ == "__main__":
    path = root / "README.md"
    if "--check" in sys.argv:
        if path.read_text(encoding="utf-8") != readme_text():
            sys.exit("README.md is not in step with nbs/index.ipynb: run `make readme`")
    else:
        path.write_text(readme_text(), encoding="utf-8")
