"""A step of nbdev's documentation (`procs` in settings.ini): code that teaches stands once, below its names.

nbdev shows the code of `#| exports` cells folded, and beside it a signature and a docstring for each name: the same
lines three times, some above and some below. Here the names come first, as headings that links lead to, then the code.
"""
import re

from nbdev.process import Processor

FOLD = re.compile(r'#\| code-(?:fold|summary): .*\n')


def is_doc(cell, names) -> bool:
    "Whether a cell is the documentation that nbdev made for one of some names"
    found = re.search(r"^show_doc\((\w+)\)$", cell.source, re.MULTILINE)
    return bool(found) and found[1] in names and bool(cell.get("outputs"))


def heading(cell, first):
    "What is left of a name's documentation: its link and its heading, below a line if it is the first"
    for output in cell.outputs:
        text = "".join(output["data"].get("text/markdown", ""))
        top = re.match(r"-*\s*(.*?^#+ [^\n]*)", text, re.DOTALL | re.MULTILINE)
        if top:
            output["data"] = {"text/markdown": ("---\n\n" if first else "") + top[1] + "\n"}
    return cell


class ShowCode(Processor):
    "Headings before the code of an exported cell, and no second copy of what the code says"

    def begin(self):
        cells = self.nb.cells
        for code in [c for c in cells if c.cell_type == "code" and 'code-summary: "Exported source"' in c.source]:
            code.source = FOLD.sub("", code.source)
            names = re.findall(r"^(?:class|def) (\w+)", code.source, re.MULTILINE)
            docs = [c for c in cells if c.cell_type == "code" and is_doc(c, names)]
            docs.sort(key=lambda c: names.index(re.search(r"show_doc\((\w+)\)", c.source)[1]))
            for c in docs:
                cells.remove(c)
            at = next(i for i, c in enumerate(cells) if c is code)
            cells[at:at] = [heading(c, i == 0) for i, c in enumerate(docs)]
