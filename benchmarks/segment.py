"Segmentation: a step of `Segmenter.fit` against the same MONAI network in a bare loop, both on the same batches."

import time

import torch
from monai.losses import DiceCELoss

from benchmarks.common import Row, alone
from medsketch.core import keep_memory
from medsketch.data import phantom_data
from medsketch.data.batches import Batches, flip_rotate
from medsketch.evaluate.segment import Segmenter, segmentation_unet
from medsketch.train.trainer import Callback, Trainer

SIZE, BATCH, STEPS, WARMUP = 64, 8, 16, 3


class Interleave(Callback):
    "Times every step of the fit, and makes a step of the bare loop in between"

    def __init__(self, other):
        self.other, self.ours, self.theirs = other, [], []

    def before_step(self, trainer):
        self.start = time.perf_counter()

    def after_step(self, trainer):
        now = time.perf_counter()
        self.ours.append(now - self.start)
        self.other()
        self.theirs.append(time.perf_counter() - now)


def bare_loop(data, memory_format):
    "A step as one would write it by hand: network, loss and optimiser, nothing around them"
    net = segmentation_unet(3, 2).to(memory_format=memory_format).train()
    loss, opt = (
        DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True),
        torch.optim.Adam(net.parameters(), 1e-3),
    )
    batches = Batches(data, BATCH, augment=flip_rotate)

    def step():
        b = next(batches)
        value = loss(net(b['image'].contiguous(memory_format=memory_format)), b['mask'][:, None])
        opt.zero_grad()
        value.backward()
        opt.step()
        return value.item()

    return step


def interleaved(memory_format):
    "Seconds per step of our fit and of the bare loop, each the best of its steps"
    memory_format = getattr(torch, memory_format)
    keep_memory()  # what the fit sets for its process holds for both
    data = phantom_data('fundus', 16, SIZE)
    data.masks = (data.masks > 0).astype('uint8')
    clock, init = Interleave(bare_loop(data, memory_format)), Trainer.__init__
    Trainer.__init__ = lambda self, nets, phases, data, callbacks=(), **kw: init(
        self, nets, phases, data, [*callbacks, clock], **kw
    )
    Segmenter(SIZE, batch_size=BATCH, steps=STEPS).fit(data, progress=False)
    return min(clock.ours[WARMUP:]), min(clock.theirs[WARMUP:])


def rows(peak):
    out = []
    for name, memory_format, target in (
        ('as written by hand', 'contiguous_format', 1.0),
        ('channels last, too', 'channels_last', 1.05),
    ):
        ours, theirs = alone(interleaved, memory_format)
        out.append(
            Row(
                f'segmentation step over a bare loop, {name}',
                ours / theirs,
                'times',
                target,
                f'{SIZE} px, batch {BATCH}: {ours * 1e3:.0f} ms and {theirs * 1e3:.0f} ms, step by step in turn',
            )
        )
    return out
