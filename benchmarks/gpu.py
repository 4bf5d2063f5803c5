"""What the `gpu` scale costs on the machine at hand: `python -m benchmarks.gpu`, alone on its card.

For the stages of each system: seconds a step and memory, in fp32 (TF32 off and on) and bf16, and how long the preset
takes at that pace. Then single images: a renderer at 256 px, eager and compiled, and PGSgan at 512 px.
"""

import os
import time

import torch

from medsketch.data import phantom_data
from medsketch.recipes import recipe_class
from medsketch.train.trainer import Callback

STEPS, WARM = 12, 4
CASES = [  # recipe, its stage, phantoms, arguments beside the preset's
    ('skrgan', 'sketch', 'fundus', {'start': 256, 'diffaugment': 'translate,cutout'}),
    ('skrgan', 'render', 'fundus', {}),
    ('skrgan', 'joint', 'fundus', {}),
    ('pggan', 'gan', 'fundus', {'start': 256}),
    ('stylegan2', 'gan', 'fundus', {}),
    ('pgsgan', 'base', 'ultrasound', {'start': 256, 'channels': 1}),
    ('pix2pix', 'gan', 'fundus', {}),
    ('cyclegan', 'gan', 'fundus', {}),
    ('sketch2medi', 'encoder', 'pharynx', {}),
    ('sketch2medi', 'refine', 'pharynx', {}),
]
PRECISIONS = [('no', False), ('no', True), ('bf16', True)]


class Enough(Exception):
    "The steps wanted were made"


class Timing(Callback):
    "Times steps after the first few"

    def __init__(self, steps, warm):
        self.steps, self.warm, self.seconds = steps, warm, float('nan')

    def after_step(self, trainer):
        if trainer.step == self.warm:
            wait()
            self.begun = time.perf_counter()
        if trainer.step == self.warm + self.steps:
            wait()
            self.seconds = (time.perf_counter() - self.begun) / self.steps
            raise Enough


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def measure(name, stage, kind, changes, precision, scale, n):
    "Seconds a step, GiB, and how many steps the preset has"
    r = recipe_class(name).preset(scale, **changes)
    data = phantom_data(kind, n, r.config['size'])
    ready = r.prepare(data, data if r.name == 'sketch2medi' else None)
    found = {s.name: s for s in r.stages(*ready[:2])}
    stage = stage if stage in found else next(iter(found))
    timing = Timing(STEPS, WARM)
    r.learned = set(r.nets)  # later stages are timed without the ones before
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    more = {'more': data} if r.name == 'sketch2medi' else {}
    try:
        r.fit(data, stages=[stage], progress=False, every=10**9, callbacks=[timing], mixed_precision=precision, **more)
    except Enough:
        pass
    held = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float('nan')
    return timing.seconds, held, found[stage].steps, stage


def per_call(f, repeats=20):
    "Seconds a call, after three that warm up"
    for _ in range(3):
        f()
    wait()
    begun = time.perf_counter()
    for _ in range(repeats):
        f()
    wait()
    return (time.perf_counter() - begun) / repeats


@torch.no_grad()
def single_images(scale):
    "One sketch at a time, as the studio sends them"
    net = recipe_class('skrgan').preset(scale).nets['G_P']
    x = torch.randn(1, 1, 256, 256, device=next(net.parameters()).device)
    print(f'render 256 px: {1000 * per_call(lambda: net(x)):.2f} ms')
    with torch.autocast(x.device.type, torch.bfloat16):
        print(f'render 256 px, bf16: {1000 * per_call(lambda: net(x)):.2f} ms')
    fast = torch.compile(net)
    print(f'render 256 px, compiled: {1000 * per_call(lambda: fast(x)):.2f} ms', flush=True)
    p = recipe_class('pgsgan').preset('paper', channels=1, classes=3)
    x = torch.rand(1, p.planes, 512, 512, device=x.device)
    print(f'PGSgan 512 px: {1000 * per_call(lambda: p.nets["G_P"](x, 0.5)):.1f} ms', flush=True)


def main(scale='gpu', n=32):
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    print(f'{where}, torch {torch.__version__}; {STEPS} steps after {WARM}')
    for name, stage, kind, changes in CASES:
        for precision, fast in PRECISIONS:
            tf32(fast)
            try:
                s, held, steps, at = measure(name, stage, kind, changes, precision, scale, n)
            except (RuntimeError, ValueError) as e:  # out of memory, say: the others are still wanted
                print(f'{name} {stage} {precision}: {type(e).__name__} {str(e)[:200]}', flush=True)
                continue
            how = 'bf16' if precision == 'bf16' else 'fp32, TF32' if fast else 'fp32'
            print(
                f'{name} {at}, {how}: {1000 * s:.1f} ms a step, {held:.1f} GiB; '
                f'{steps} steps take {steps * s / 3600:.2f} h',
                flush=True,
            )
    single_images(scale)


if __name__ == '__main__':
    main(os.environ.get('MEDSKETCH_SCALE', 'gpu'))
