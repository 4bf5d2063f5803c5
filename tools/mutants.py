"""Breaks the library on purpose, one small change at a time, and counts the changes that a test notices.

    python tools/mutants.py                                  the modules of `TARGETS`
    python tools/mutants.py train/losses --most 40           forty changes of one module
    python tools/mutants.py recipes/skrgan --tests tests/test_skrgan.py --minutes 20
    python tools/mutants.py recipes/skrgan --list            the changes, without running anything

A mutant that survives the tests and the tests on the module's own page is printed: it is either harmless or a test
that is missing. Slow, so not part of `make test`. Common mutation testers know neither lost factors, cut gradients,
dropped keywords nor exchanged networks, which are what goes wrong in a training step. Linux and macOS only (fork).
"""
import argparse
import ast
import copy
import importlib.util
import json
import os
import random
import re
import shlex
import signal
import sys
import time
from importlib.abc import SourceLoader
from pathlib import Path

root = Path(__file__).resolve().parents[1]
TARGETS = {
    "train/losses": "tests/test_losses.py",
    "train/growth": "tests/test_train.py -k 'schedule or grow or fade'",
    "train/callbacks": "tests/test_train.py -k 'not two_processes and not second_training'",
    "evaluate/images": "tests/test_metrics.py tests/test_bad_input.py",
    "evaluate/metrics": "tests/test_metrics.py",
}
# imported once, before the forks
PACKAGES = ["torch", "torch._dynamo", "sympy", "numpy", "cv2", "matplotlib.pyplot", "matplotlib.backends.backend_agg",
            "torchmetrics", "accelerate", "pytest", "fastcore.test"]
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
         ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
         ast.And: ast.Or, ast.Or: ast.And}
NETWORK = re.compile(r"(?:\w+\.)*[A-Z](?:_[A-Z])?(?:\.encoder)?")  # D, nets.G_P, nets.K.encoder


def changed(node, **fields):
    "A copy of a node with other fields"
    new = copy.copy(node)
    for k, v in fields.items():
        setattr(new, k, v)
    return new


def of_operator(n):
    "An operator exchanged, an operand lost, a sign or a `not` dropped"
    if isinstance(n, ast.BinOp):
        yield n.left
        if isinstance(n.op, (ast.Add, ast.Mult)):
            yield n.right
    if isinstance(n, (ast.BinOp, ast.BoolOp)) and type(n.op) in SWAPS:
        yield changed(n, op=SWAPS[type(n.op)]())
    if isinstance(n, ast.Compare) and type(n.ops[0]) in SWAPS:
        yield changed(n, ops=[SWAPS[type(n.ops[0])](), *n.ops[1:]])
    if isinstance(n, ast.UnaryOp) and isinstance(n.op, (ast.USub, ast.Not)):
        yield n.operand
    if isinstance(n, ast.IfExp):
        yield from (n.body, n.orelse)


def of_constant(n):
    "Another number, ten times as large; the other truth value"
    if isinstance(n, ast.Constant) and isinstance(n.value, bool):
        yield ast.Constant(not n.value)
    elif isinstance(n, ast.Constant) and isinstance(n.value, (int, float)):
        yield ast.Constant(n.value * 10 or 1)


def of_call(n, others):
    "A keyword dropped, two arguments exchanged, a method not called, a gradient cut, another network asked"
    if not isinstance(n, ast.Call):
        return
    for k in n.keywords:
        yield changed(n, keywords=[x for x in n.keywords if x is not k])
        if k.arg in ("lr", "rate"):
            tenfold = ast.BinOp(ast.Constant(10), ast.Mult(), k.value)
            yield changed(n, keywords=[changed(x, value=tenfold) if x is k else x for x in n.keywords])
    if len(n.args) > 1 and not any(isinstance(a, ast.Starred) for a in n.args[:2]):
        yield changed(n, args=[n.args[1], n.args[0], *n.args[2:]])
    if isinstance(n.func, ast.Attribute) and not n.args and not n.keywords:
        yield n.func.value
    if n.args and NETWORK.fullmatch(ast.unparse(n.func)):
        if "batch[" not in ast.unparse(n.args[0]):  # a batch has no gradient to cut
            cut = ast.Call(ast.Attribute(n.args[0], "detach", ast.Load()), [], [])
            yield changed(n, args=[cut, *n.args[1:]])
        yield from (changed(n, func=f) for f in others if ast.unparse(f) != ast.unparse(n.func))


def of_statement(n):
    "A block, a call or an update left out; an entry of a list left out"
    if isinstance(n, ast.If):
        yield from [ast.If(ast.Constant(True), n.orelse, [])] if n.orelse else [ast.Pass()]
    if isinstance(n, ast.AugAssign) or (isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)):
        yield ast.Pass()
    if isinstance(n, ast.List):
        calls = [e for e in n.elts if isinstance(e, (ast.Call, ast.Starred))]
        yield from (changed(n, elts=[e for e in n.elts if e is not c]) for c in calls)


UNTOUCHED = (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr)


def slots(node, inside=None):
    "(where a node hangs, the node, its function), messages, annotations and imports aside"
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        inside = node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, UNTOUCHED):
                yield (node, field, i), child, inside
                yield from slots(child, inside)


def put(where, new):
    "Hang a node where another one hung"
    parent, field, i = where
    if i is None:
        setattr(parent, field, new)
    else:
        getattr(parent, field)[i] = new


def networks(function) -> list:
    "What a function calls as a network, each once"
    calls = [n.func for n in ast.walk(function) if isinstance(n, ast.Call)] if function else []
    return list({ast.unparse(f): f for f in calls if NETWORK.fullmatch(ast.unparse(f))}.values())


def mutants(source: str) -> list:
    "(line, what became of it, the whole module) for every change of a module's source"
    tree, found = ast.parse(source), []
    for where, node, function in slots(tree):
        for new in (*of_operator(node), *of_constant(node), *of_call(node, networks(function)), *of_statement(node)):
            put(where, new)
            text = ast.unparse(ast.fix_missing_locations(tree))
            put(where, node)
            short = [" ".join(ast.unparse(x).split())[:100] for x in (node, ast.fix_missing_locations(new))]
            found.append((getattr(node, "lineno", 0), " → ".join(short), text))
    return found


class Broken(SourceLoader):
    "Finds one module of the package in a text in place of its file"

    def __init__(self, module, text):
        self.module, self.text = module, text

    def find_spec(self, module, path=None, target=None):
        if module == self.module:
            return importlib.util.spec_from_loader(module, self, origin=self.get_filename(module))
        return None

    def get_filename(self, module):
        return str(root / f"{module.replace('.', '/')}.py")

    def get_data(self, path):
        return self.text.encode()


def page(module: str) -> list:
    "The code of the page that exports a module: (source, whether it is exported)"
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        code = [("".join(c["source"]), c["cell_type"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        if any(re.search(rf"^#\|\s*default_exp {re.escape(module)}$", s, re.MULTILINE) for s, _ in code):
            return [(s, bool(re.match(r"#\|\s*exports?\b", s))) for s, kind in code if kind == "code"]
    return []


def run_page(module: str):
    "Run a page's own tests: its cells, with the module's names where the page would define them"
    space = {"__name__": "__main__"}
    for source, exported in page(module.removeprefix("medsketch.")):
        if exported:
            space.update(vars(importlib.import_module(module)))
        elif not re.search(r"^\s*[!%]|^#\| *(?:eval: *false|slow|cuda)", source, re.MULTILINE):
            exec(compile(source, "page", "exec"), space)  # noqa: S102  the project's own pages


def child(module, text, tests):
    "In a forked process: exit 0 if every test passes with this text of the module"
    import pytest
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    sys.meta_path.insert(0, Broken(module, text))
    status = 1
    try:
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:anyio", *shlex.split(tests)]))
        if status == 0:
            run_page(module)
    except BaseException:  # noqa: BLE001  whatever a broken library does, it has been noticed
        status = 1
    os._exit(status)


def survives(module, text, tests, seconds) -> bool:
    "Whether all tests pass; one that hangs has noticed"
    pid = os.fork()
    if pid == 0:
        child(module, text, tests)
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(.02)


def source_of(target: str) -> str:
    "A module's text"
    return (root / f"medsketch/{target}.py").read_text(encoding="utf-8")


def score(target, tests, most, minutes, seed) -> tuple:
    "(killed, run, all) mutants of one module, the survivors printed"
    module, source = f"medsketch.{target.replace('/', '.')}", source_of(target)
    start = time.monotonic()
    if not survives(module, source, tests, 600):
        sys.exit(f"{target}: its tests fail without any change, so they can tell nothing: pytest {tests}")
    seconds = 10 + 3 * (time.monotonic() - start)
    every = mutants(source)
    chosen = sorted(random.Random(seed).sample(every, min(most or len(every), len(every))))
    end, killed, n = time.monotonic() + 60 * minutes, 0, 0
    random.Random(seed).shuffle(chosen)
    for n, (line, what, text) in enumerate(chosen, 1):
        if survives(module, text, tests, seconds):
            print(f"  {target}.py:{line}: {what}", flush=True)
        else:
            killed += 1
        if time.monotonic() > end:
            break
    print(f"{target}: {killed} of {n} noticed ({killed / max(n, 1):.0%}; {len(every)} are possible)", flush=True)
    return killed, n, len(every)


def main():
    "Score the modules asked for"
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("modules", nargs="*", default=list(TARGETS), help="such as train/losses")
    ask.add_argument("--tests", help="what to give to pytest; needed for modules that have no entry in TARGETS")
    ask.add_argument("--most", type=int, help="changes per module, drawn at random; all if left out")
    ask.add_argument("--minutes", type=float, default=10, help="per module, after which it stops")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--list", action="store_true", help="print the changes and stop")
    a = ask.parse_args()
    os.chdir(root)
    os.environ |= {"OMP_NUM_THREADS": "1", "MEDSKETCH_SCALE": "tour", "MPLBACKEND": "agg"}
    sys.path.insert(0, str(root))
    for m in a.modules:
        if a.list:
            print(*(f"{m}.py:{line}: {what}" for line, what, _ in mutants(source_of(m))), sep="\n")
        elif not (a.tests or m in TARGETS):
            sys.exit(f"{m}: say with --tests which tests are its own")
        else:
            for package in PACKAGES:
                importlib.import_module(package)
            score(m, a.tests or TARGETS[m], a.most, a.minutes, a.seed)


if __name__ == "__main__":
    main()
