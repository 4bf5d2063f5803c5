"Training: what a SkrGAN step spends outside forward, backward and optimiser; whether memory grows over 1,000 steps."

import time
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from benchmarks.common import Row, alone
from medsketch.data import phantom_data
from medsketch.recipes import SkrGAN
from medsketch.sketch import add_sketches
from medsketch.train.trainer import Callback, Trainer

STEPS, WARMUP = 24, 6


class Clock(Callback):
    "Wall time of the steps after the first few"

    def before_step(self, trainer):
        if trainer.step == WARMUP:
            self.inside, self.start = 0.0, time.perf_counter()

    def after_fit(self, trainer):
        self.total = time.perf_counter() - self.start


def timed(clock, fn):
    "`fn`, its time added to `clock.inside`"

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        out = fn(*args, **kwargs)
        clock.inside = getattr(clock, 'inside', 0.0) + time.perf_counter() - start
        return out

    return wrapper


def share_outside(stage):
    "Part of a stage's time that is neither loss, backward nor optimiser, and milliseconds per step"
    clock, init = Clock(), Trainer.__init__

    def watched(self, nets, phases, data, callbacks=(), **kwargs):
        init(self, nets, [replace(p, loss=timed(clock, p.loss)) for p in phases], data, [*callbacks, clock], **kwargs)

    for cls, name in ((Accelerator, 'backward'), (AcceleratedOptimizer, 'step'), (AcceleratedOptimizer, 'zero_grad')):
        setattr(cls, name, timed(clock, getattr(cls, name)))
    Trainer.__init__ = watched
    data = add_sketches(phantom_data('fundus', 16, 64), style='fundus')
    r = SkrGAN(
        size=64,
        fmap_base=1024,
        ngf=16,
        ndf=16,
        receptive_field=34,
        batch_size=8,
        batches={4: 1, 8: 1, 16: 1, 32: 1, 64: STEPS - 4},
        render_steps=STEPS,
        joint_steps=STEPS,
    )
    r.fit(data, stages=[stage], progress=False)
    return 1 - clock.inside / clock.total, clock.total / (STEPS - WARMUP) * 1e3


def resident():
    "Resident size of this process, MB"
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096 / 1e6


def growth_of_memory():
    "Resident size after 100 and after 1,000 render steps at 32 px, MB"
    seen = {}

    class Watch(Callback):
        def after_step(self, trainer):
            if trainer.step in (100, 1000):
                seen[trainer.step] = resident()

    init = Trainer.__init__

    def watched(self, nets, phases, data, callbacks=(), **kwargs):
        init(self, nets, phases, data, [*callbacks, Watch()], **kwargs)

    Trainer.__init__ = watched
    data = add_sketches(phantom_data('fundus', 16, 32), style='fundus')
    r = SkrGAN(size=32, latent_dim=8, fmap_max=8, ngf=8, ndf=8, receptive_field=16, batch_size=4, render_steps=1000)
    r.fit(data, stages=['render'], progress=False)
    return seen


def rows(peak):
    out = []
    for stage in ('sketch', 'render', 'joint'):
        share, ms = alone(share_outside, stage)
        note = f'64 px, batch 8, {ms:.0f} ms a step, flips and turns included'
        out.append(Row(f'{stage} step, share outside forward, backward, optimiser', share, 'of the time', 0.1, note))
    seen = alone(growth_of_memory)
    note = f'{seen[100]:.0f} MB, then {seen[1000]:.0f} MB'
    out.append(Row('memory after 1,000 steps over after 100', seen[1000] / seen[100], 'times', 1.02, note))
    return out
