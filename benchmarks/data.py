"Data: how fast warm batches come, flips and turns included, on one core; and what the cache saves."

import os
import tempfile
import time

import numpy as np
import torch
from PIL import Image

from benchmarks.common import Row
from medsketch.core import keep_memory, to_uint8
from medsketch.data import ImageData, load_images
from medsketch.data.batches import Batches, flip_rotate
from medsketch.phantoms import phantom

BATCH, REPEATS = 16, 40


def per_image(size, augment):
    "Median time of one image with its mask and sketch out of a warm set, s"
    rng = np.random.default_rng(0)
    ds = ImageData(*(rng.integers(0, 255, (64, *depth, size, size), np.uint8) for depth in ((3,), (), ())))
    batches, times = Batches(ds, BATCH, augment=augment), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / BATCH


def cold_and_warm():
    "Times to load sixteen photographs of 1024 pixels from their files and from the cache on disk, s"
    kept = os.environ.get('MEDSKETCH_CACHE')
    with tempfile.TemporaryDirectory() as d:
        photo = Image.fromarray(to_uint8(phantom('fundus', 1024, seed=0)['image']))
        for i in range(16):
            photo.save(f'{d}/{i}.jpg', quality=95)
        os.environ['MEDSKETCH_CACHE'] = f'{d}/.cache'
        try:
            times = [timed_load(d) for _ in range(2)]
        finally:
            if kept is None:
                del os.environ['MEDSKETCH_CACHE']
            else:
                os.environ['MEDSKETCH_CACHE'] = kept
    return times


def timed_load(folder):
    "Time to load a folder at 256 pixels and touch every pixel, s"
    start = time.perf_counter()
    np.asarray(load_images(folder, 256, cache='disk').images).sum()
    return time.perf_counter() - start


def rows(peak: float) -> list[Row]:
    "Times are scaled by the machine's peak, like all others"
    keep_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        took = {(s, f): per_image(s, f) * peak / 500 for s in (128, 256) for f in (None, flip_rotate)}
    finally:
        torch.set_num_threads(threads)
    cold, warm = cold_and_warm()
    return [
        *(
            Row(
                f'batches of {BATCH} at {s} px{", flipped and turned" if f else ""}',
                1 / t,
                'images/s',
                None,
                'one core, with mask and sketch',
            )
            for (s, f), t in took.items()
        ),
        Row(
            'one image of such a batch, 256 px',
            took[256, flip_rotate] * 1e3,
            'ms',
            8.0,
            'at most: a fifth of the 40 ms in which the fastest step renders one',
        ),
        Row(
            'decode 16 photographs / read them from the cache',
            cold / max(warm, 1e-6),
            'x',
            None,
            f'{cold * 1e3:.0f} ms against {warm * 1e3:.1f} ms',
        ),
    ]
