"""Run the benchmarks named, or all of them: `python -m benchmarks models`."""

import importlib
import os
import pkgutil
import sys

import torch

import benchmarks
from benchmarks.common import REFERENCE, measure_peak, table
from medsketch.core import keep_memory

ALONE = ('small_data', 'diffusion', 'gpu', 'latent', 'freehand', 'tumours', 'heads', 'table1', 'table2')  # alone


def main(wanted):
    names = {m.name for m in pkgutil.iter_modules(benchmarks.__path__)} - {'common', '__main__', *ALONE}
    names = sorted(names)
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(names)}")
    keep_memory()
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())))
    missed = 0
    for name in wanted or names:
        peak = measure_peak()  # before each, since a shared machine's speed drifts
        rows = importlib.import_module(f'benchmarks.{name}').rows(peak)
        peak = (peak + measure_peak()) / 2
        print(
            f'\n{name}: peak {peak:.0f} GFLOP/s with {torch.get_num_threads()} threads; '
            f'times scaled by {peak / REFERENCE:.2f}\n'
        )
        print(table(rows, peak), flush=True)
        missed += sum(r.ok(peak) is False for r in rows)
    print(f"\n{missed} target{'s' * (missed != 1)} missed")


if __name__ == '__main__':
    main(sys.argv[1:])
