"Sketches: one image against the bare OpenCV calls it is made of, and a batch against image after image."

import time

import cv2
import numpy as np
import torch

from benchmarks.common import Row
from medsketch.core import from_uint8, to_uint8
from medsketch.phantoms import phantom
from medsketch.sketch import (
    STYLES,
    sobel_sketch,
    sobel_sketch_batch,
    sobel_sketch_torch,
)

REPEATS = 25
STYLE = STYLES['fundus']


def timed(*calls):
    "Least wall time of each call, ms; the calls take turns, so that a busy machine slows all of them alike"
    best = [float('inf')] * len(calls)
    for turn in range(REPEATS + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return [b * 1e3 for b in best]


def plain_chain(green):
    "The paper's five steps on a grey float image, nothing else"
    edge = cv2.magnitude(cv2.Sobel(green, cv2.CV_32F, 1, 0), cv2.Sobel(green, cv2.CV_32F, 0, 1))
    strokes = cv2.compare(cv2.GaussianBlur(edge, (5, 5), 0.8), 0.5, cv2.CMP_GT)
    opened = cv2.morphologyEx(strokes, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    return cv2.morphologyEx(opened, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))


def bare_calls(image, table, lines):
    "Every OpenCV call that `sobel_sketch` makes for a fundus image of 512 pixels, and nothing between them"

    def thumb(x):
        return cv2.resize(x, (64, 64), interpolation=cv2.INTER_AREA)

    def wide(x):
        return cv2.resize(x, image.shape[:2], interpolation=cv2.INTER_LINEAR)

    def blur(x, k, s):
        return cv2.GaussianBlur(x, (k, k), s, borderType=cv2.BORDER_REFLECT_101)

    a = cv2.LUT(image, table)
    grey = cv2.transform(a, np.array([STYLE.channels], np.float32))
    field = cv2.erode(cv2.extractChannel(thumb(a), 0), np.ones((5, 5), np.uint8))
    grey = blur(grey, 9, 1.3)
    edge = cv2.magnitude(cv2.Sobel(grey, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(grey, cv2.CV_32F, 0, 1, scale=1 / 8))
    blur(field, 11, 2), blur(thumb(edge), 11, 2)
    strength = cv2.multiply(blur(edge, 9, 1.6), wide(field))
    offset = cv2.subtract(wide(blur(thumb(grey), 11, 2)), grey)
    strokes = cv2.min(cv2.compare(strength, 0.01, cv2.CMP_GT), cv2.compare(offset, 0.008, cv2.CMP_GT))
    opened = [cv2.morphologyEx(strokes, cv2.MORPH_OPEN, k) for k in lines]
    for o in opened[1:]:
        opened[0] = cv2.max(opened[0], o)
    strokes = cv2.morphologyEx(opened[0], cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    share = wide(blur(thumb(strokes.astype(np.float32)), 9, 1.25))
    return cv2.min(strokes, cv2.compare(share, 25.0, cv2.CMP_GT)).astype(np.float32)


def rows(peak: float) -> list[Row]:
    "Ratios need no scaling; the one time that has a target is scaled by the machine's peak like the others"
    large = to_uint8(phantom('fundus', 512, seed=1)['image'])
    slope = np.eye(9, dtype=np.uint8)
    lines = [np.ones((1, 9), np.uint8), np.ones((9, 1), np.uint8), slope, np.ascontiguousarray(slope[::-1])]
    table = (np.arange(256) / 255).astype(np.float32)
    ours, bare = timed(lambda: sobel_sketch(large, STYLE), lambda: bare_calls(large, table, lines))

    eyes = [to_uint8(phantom('fundus', 256, seed=s)['image']) for s in range(8)]
    batch = torch.stack([from_uint8(e) for e in eyes])
    green = eyes[0][..., 1].astype(np.float32) / 255
    plain, one, many, by_torch = timed(
        lambda: plain_chain(green),
        lambda: [sobel_sketch(e, STYLE) for e in eyes],
        lambda: sobel_sketch_batch(batch, STYLE),
        lambda: sobel_sketch_torch(batch, STYLE),
    )
    return [
        Row('sketch 512 px / bare OpenCV calls', ours / bare, 'x', 1.5, f'{ours:.2f} ms against {bare:.2f} ms'),
        Row('plain chain 256 px', plain, 'ms', None, "the paper's five steps alone"),
        Row('sketch 256 px', one / 8, 'ms', None, 'all the cures included'),
        Row(
            'sketch batch of 8 / one by one, 256 px',
            one / many,
            'x',
            1.0,
            f'images/s: {8e3 / many:.0f} against {8e3 / one:.0f}',
            more=True,
        ),
        Row(
            'sketch batch of 8 by PyTorch / one by one, 256 px',
            one / by_torch,
            'x',
            None,
            f'images/s on this CPU: {8e3 / by_torch:.0f}; the path for GPUs',
        ),
    ]
