"""What the training tests share: processes that die on purpose, and comparing what two runs left behind."""

import contextlib
import csv
import errno
import io
import multiprocessing
import os
import signal

import torch


def exit_codes(*calls):
    "Run functions in forked processes side by side; their exit codes, negative for the signal that ended one"
    processes = [multiprocessing.get_context("fork").Process(target=f) for f in calls]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    hung = [p.name for p in processes if p.is_alive()]
    for p in processes:
        p.kill(), p.join()
    assert not hung, f"{hung} hung"  # a kill from here must not pass for the one that was asked for
    return [p.exitcode for p in processes]


def killed(f):
    assert exit_codes(f) == [-signal.SIGKILL], "the process ended before it could be killed"


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def half_written(when, then):
    "Inside, the first `torch.save` of a state with `when(state)` writes half of its bytes, and `then()` happens"
    save = torch.save

    def half(state, f):
        if not when(state):
            return save(state, f)
        whole = io.BytesIO()
        save(state, whole)
        f.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        f.flush()
        then()

    torch.save = half
    try:
        yield
    finally:
        torch.save = save


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def same(a, b, where="state"):
    "Assert that two nested states are equal to the last bit"
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a:
            same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def rows(path):
    "The rows of a log, without the seconds"
    with open(path, newline="") as f:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in csv.DictReader(f)]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def one_line(e):
    return "\n" not in str(e.value)


def names(folder):
    "Everything below a folder"
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


def same_runs(a, b):
    "Configuration, weights, logs, grids and everything in the checkpoints"
    assert names(a) == names(b)  # so no temporary file is left either
    for name in names(a):
        x, y = a / name, b / name
        if x.suffix == '.pt':
            same(*(torch.load(p, weights_only=True) for p in (x, y)), name)
        elif x.suffix == '.csv':
            assert rows(x) == rows(y), name
        elif x.is_file():
            assert x.read_bytes() == y.read_bytes(), name
