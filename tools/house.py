"""The house rules, measured: `python tools/house.py` prints what breaks them; tests/test_project.py holds them."""
import ast
import base64
import json
import re
import struct
from functools import cache
from pathlib import Path

root = Path(__file__).resolve().parents[1]
WIDTH, CELL, FUNCTION, MODULE, PICTURE = 120, 40, 40, 400, 800

# What a package or module may import from: those before it. A page never looks up.
ORDER = ["core", "diagrams", "phantoms", "data", "sketch", "models", "train", "recipes", "evaluate",
         "diffusion", "pretrained", "studio", "datasheet", "synthetic_dicom", "processes", "export", "share", "cli"]
FACE = "recipes.base"  # all that `evaluate` may know of recipes

# Words that meant something of our own here, for which the field has its words
HOUSE_WORDS = {
    r"told(?! (?:apart|from))": "given, trained on",
    r"mud(?:dy)?": "blurred",
    r"wobbl\w*": "jitter",
    r"judg\w*": "score, evaluate, discriminate",
    r"floors?": "real-vs-real baseline",
    r"held(?![- ](?:out|back|fixed|constant|in))": "kept, compared; held-out stays",
}
TEACHING = ("03_sketch", "04_models", "05_train", "06_recipes", "07_evaluate")


def notebooks() -> list:
    "Every notebook of the project"
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def modules() -> list:
    "Every module of the package but nbdev's index"
    return sorted(p for p in (root / "medsketch").rglob("*.py") if p.name != "_modidx.py")


def name(path: Path) -> str:
    "A file's path inside the project"
    return path.relative_to(root).as_posix()


@cache
def read(path: Path) -> list:
    "A notebook's cells"
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@cache
def parse(path: Path) -> ast.Module:
    "A module's syntax tree"
    return ast.parse(path.read_text(encoding="utf-8"))


def cells(path: Path, kind: str = "code") -> list:
    "(number, source) of a notebook's cells of one kind"
    return [(i, "".join(c["source"])) for i, c in enumerate(read(path)) if c["cell_type"] == kind]


def long_lines() -> list:
    "Lines over 120 columns: in notebooks' code, and in modules below what nbdev writes at the top"
    found = [(f"{name(p)} cell {i}", s.splitlines()) for p in notebooks() for i, s in cells(p)]
    for p in modules():
        top, mark, rest = p.read_text(encoding="utf-8").partition("\n# %% ../")
        found.append((name(p), (rest if mark else top).splitlines()))
    return [f"{where}: {line.strip()[:60]}" for where, lines in found for line in lines if len(line) > WIDTH]


def long_cells(most: int = CELL) -> list:
    "Exported cells of more than 40 lines, directives, empty lines and documented arguments aside"
    argument = re.compile(r"\s+\w+:[^()]*(\(.*\))?,? # \S")
    found = []
    for p in notebooks():
        for i, s in cells(p):
            if re.match(r"#\|\s*exports?\b", s):
                lines = [line for line in s.splitlines() if line.strip() and not line.startswith("#|")]
                n = sum(1 for line in lines if not argument.match(line))
                found += [f"{name(p)} cell {i}: {n} lines"] * (n > most)
    return found


def long_functions(most: int = FUNCTION) -> list:
    "Functions whose body (without the signature and its docments) has more than 40 lines"
    found = []
    for p in modules():
        for f in ast.walk(parse(p)):
            if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n = f.end_lineno - f.body[0].lineno + 1
                found += [f"{name(p)} {f.name}: {n} lines"] * (n > most)
    return found


def long_modules(most: int = MODULE) -> list:
    "Modules of more than 400 lines"
    sizes = {name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in modules()}
    return [f"{k}: {n} lines" for k, n in sizes.items() if n > most]


def imports(path: Path) -> list:
    "What a module takes from the package, anywhere in it: `data.readers.fit`, `recipes.base.recipe_class`, …"
    package = path.relative_to(root).parent.parts
    found = []
    for n in ast.walk(parse(path)):
        if isinstance(n, ast.Import):
            found += [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            above = package[:len(package) + 1 - n.level] if n.level else ()
            found += [".".join([*above, *filter(None, [n.module]), a.name]) for a in n.names]
    return [x.removeprefix("medsketch.") for x in found if x.startswith("medsketch.")]


def upward_imports() -> list:
    "Imports against the order of the layers; of recipes, `evaluate` may know their face alone"
    found = []
    for p in modules():
        inside = p.relative_to(root / "medsketch").with_suffix("").parts
        if inside[0] not in ORDER:
            continue
        for target in imports(p):
            layer = target.split(".")[0]
            if layer not in ORDER:
                continue
            up = ORDER.index(layer) > ORDER.index(inside[0])
            behind = inside[0] == "evaluate" and layer == "recipes" and not target.startswith(FACE)
            found += [f"{name(p)} imports {target}"] * (up or behind)
    return found


def prose(text: str) -> str:
    "Markdown without code, mathematics, addresses and headings' marks"
    text = re.sub(r"```.*?```|\$\$.*?\$\$", " ", text, flags=re.DOTALL)
    return re.sub(r"`[^`]*`|\$[^$\n]*\$|\]\([^)]*\)|https?://\S+", " ", text)


def house_words() -> list:
    "Words of our own in the pages' prose, and what the field says"
    found = []
    for p in notebooks():
        for i, s in cells(p, "markdown"):
            for word, instead in HOUSE_WORDS.items():
                hits = re.findall(rf"\b{word}\b", prose(s), flags=re.IGNORECASE)
                found += [f"{name(p)} cell {i}: {h!r} ({instead})" for h in hits]
    return found


def badges() -> list:
    "Pages whose Colab badge opens another page, or that have none"
    here = "https://colab.research.google.com/github/medsketch/medsketch/blob/main/"
    pages = [p for p in notebooks() if p.name != "index.ipynb"]
    return [name(p) for p in pages if f"({here}{name(p)})" not in "\n".join(s for _, s in cells(p, "markdown"))]


def code_hidden() -> list:
    "Pages that teach and show none of their exported code on the website"
    pages = [p for p in notebooks() if p.relative_to(root / "nbs").parts[0] in TEACHING]
    return [name(p) for p in pages if not any(re.match(r"#\|\s*exports\b", s) for _, s in cells(p))]


def narrow_pictures() -> list:
    "Pictures among the outputs that are less than 800 px wide"
    found = []
    for p in notebooks():
        for i, c in enumerate(read(p)):
            for png in [o["data"]["image/png"] for o in c.get("outputs", []) if "image/png" in o.get("data", {})]:
                wide = struct.unpack(">I", base64.b64decode("".join(png)[:64])[16:20])[0]
                found += [f"{name(p)} cell {i}: {wide} px"] * (wide < PICTURE)
    return found


def names_in(tree: ast.AST) -> set:
    "Names that code reads"
    names = [n for n in ast.walk(tree) if isinstance(n, (ast.Name, ast.Attribute)) and isinstance(n.ctx, ast.Load)]
    return {n.id if isinstance(n, ast.Name) else n.attr for n in names}


def callers() -> dict:
    "Name -> where the package uses it: modules with the definitions that do"
    found = {}
    for p in [p for p in modules() if p.name != "__init__.py"]:
        for part in parse(p).body:
            for n in names_in(part):
                found.setdefault(n, set()).add((p, getattr(part, "name", None)))
    return found


@cache
def shown(path: Path) -> set:
    "Names that the cells of a page use which a reader sees and which are not exported"
    found = set()
    for _, s in cells(path):
        if not re.search(r"^#\|\s*(exports?|hide|default_exp)\b", s, re.MULTILINE):
            plain = "\n".join("pass" if line.lstrip().startswith(("!", "%")) else line for line in s.splitlines())
            found |= names_in(ast.parse(plain))
    return found


def public(path: Path) -> list:
    "Functions in a module's `__all__`"
    tops, listed = parse(path).body, set()
    for n in tops:
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__":
            listed = {x.value for x in n.value.elts}
    return [n.name for n in tops if isinstance(n, ast.FunctionDef) and n.name in listed]


def offered() -> set:
    "Functions that a package offers under its own name: `medsketch.sketch.read_sketch`"
    found = set()
    for p in (root / "medsketch").rglob("__init__.py"):
        for n in [n for n in parse(p).body if isinstance(n, ast.ImportFrom)]:
            every = n.names[0].name == "*"
            found |= set(public(p.parent / f"{n.module}.py")) if every else {a.name for a in n.names}
    return found


def without_example() -> list:
    """Functions for users that no visible cell of their page or of a tutorial uses.
    For users is what a package offers, and what no other code of the package calls; commands are shown as commands"""
    tutorials = set().union(*(shown(p) for p in notebooks() if p.parent.name == "tutorials"))
    entries, used, found = offered(), callers(), []
    for p in [p for p in modules() if p.parent.name != "commands" and p.name != "cli.py"]:
        page = re.search(r"^# %% (\S+\.ipynb)", p.read_text(encoding="utf-8"), re.MULTILINE)
        for f in public(p) if page else []:
            entry = f in entries or not used.get(f, set()) - {(p, f)}
            if entry and f not in tutorials | shown((p.parent / page[1]).resolve()):
                found.append(f"{name(p)}: {f}")
    return found


RULES = [long_lines, long_cells, long_functions, long_modules, upward_imports, house_words, badges, code_hidden,
         without_example]


def main():
    "Every rule with what breaks it, then what is only worth a look"
    looks = [("exported cells of 31 to 40 lines", [c for c in long_cells(30) if c not in long_cells()]),
             ("pictures under 800 px", narrow_pictures())]
    for title, found in [(r.__doc__, r()) for r in RULES] + looks:
        print(f"\n{len(found):4d}  {title}", *found, sep="\n      ")


if __name__ == "__main__":
    main()
