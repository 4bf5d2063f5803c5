"""What every benchmark shares: the machine's peak, timing, memory, and the table of results."""

import dataclasses
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

REFERENCE = 500  # GFLOP/s of the machine the targets are stated for
TIMES = ('s', 'ms', 's/image', 'ms/image', 's/step')


@dataclasses.dataclass
class Row:
    """One measured figure. Times are scaled to the reference machine before they are held against the target."""

    name: str
    value: float
    unit: str
    target: float = None  # at most this; at least, with `more`
    note: str = ''
    more: bool = False  # larger is better

    def scaled(self, peak):
        return self.value * peak / REFERENCE if self.unit in TIMES else self.value

    def ratio(self, peak):
        return None if self.target is None else self.scaled(peak) / self.target

    def ok(self, peak):
        r = self.ratio(peak)
        return None if r is None else (r >= 1 if self.more else r <= 1)


def best(fn, repeats=5, warmup=1):
    "Shortest of several runs, seconds: the one that other work on the machine disturbed least"
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_peak():
    "GFLOP/s of a channels-last 3 x 3 convolution, 256 channels, 64 x 64 pixels, float32"
    x = torch.randn(8, 256, 64, 64).contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        seconds = best(lambda: F.conv2d(x, w, padding=1), repeats=20, warmup=3)
    return 2 * 9 * 256 * 256 * 64 * 64 * 8 / seconds / 1e9


class Flops(TorchDispatchMode):
    "Counts the floating-point operations of convolutions and matrix products, forward and backward, in `total`"

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def peak_memory():
    "Largest resident size of this process so far, GB"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def alone(fn, *args):
    "Call `fn(*args)` in a fresh process, so that its memory is its own"
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(fn, *args).result()


def table(rows, peak):
    "The rows as text, one line each"
    number = lambda v: '' if v is None else f'{v:.3g}' if abs(v) < 1000 else f'{v:,.0f}'
    verdict = {True: 'ok', False: 'MISSED', None: ''}
    lines = [('', 'measured', 'scaled', 'target', 'ratio', '', '')]
    for r in rows:
        target = '' if r.target is None else f"{'≥' if r.more else '≤'} {number(r.target)}"
        lines.append(
            (
                r.name,
                f'{number(r.value)} {r.unit}',
                number(r.scaled(peak)),
                target,
                number(r.ratio(peak)),
                verdict[r.ok(peak)],
                r.note,
            )
        )
    wide = [max(len(line[i]) for line in lines) for i in range(6)]
    return '\n'.join(
        '  '.join([line[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(line[1:6], wide[1:])), line[6]]).rstrip()
        for line in lines
    )
