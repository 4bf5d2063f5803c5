"Metrics: 200 real against 200 synthetic images of 256 px in RGB, distances of features, and memory of large sets."

import time
import tracemalloc
from itertools import pairwise

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.image.fid import _compute_fid

from benchmarks.common import Row
from medsketch.evaluate.distances import fid, kid
from medsketch.evaluate.features import FeatureStats
from medsketch.evaluate.metrics import ms_ssim, swd

# Seconds at 500 GFLOP/s: the fastest public code measured, and half of the progressive GAN's 5.2 s for SWD.
MS_SSIM_TARGET, SWD_TARGET, KID_TARGET = 3.2, 5.2 / 2, 1.0
COUNT, SIZE, DIM = 200, 256, 2048


def seconds(f, times=2):
    "The quickest of a few runs"
    best = float('inf')
    for _ in range(times):
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - start)
    return best


def torch_ms_ssim(x, y):
    "MS-SSIM in chunks of 8 with separable depthwise convolutions, the usual PyTorch way"
    g = torch.from_numpy(cv2.getGaussianKernel(11, 1.5, cv2.CV_32F))[:, 0].expand(3, 1, 1, 11)
    blur = lambda v: F.conv2d(F.conv2d(v, g, groups=3), g.transpose(2, 3), groups=3)
    for a, b in zip(x.split(8), y.split(8)):
        for _ in range(5):
            ma, mb = blur(a), blur(b)
            va, vb, vab = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
            cs = (2 * vab + 9e-4) / (va + vb + 9e-4)
            (cs * (2 * ma * mb + 1e-4) / (ma * ma + mb * mb + 1e-4)).mean((1, 2, 3)), cs.mean((1, 2, 3))
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)


def plain_swd(real, fake, rng):
    """SWD the usual way, as in the progressive-GAN paper, pyramids by depthwise convolutions: whole batches, slices
    sorted along the first axis"""
    row = torch.tensor([1, 4, 6, 4, 1.0]) / 16
    kernel = torch.outer(row, row).expand(3, 1, 5, 5)
    blur = lambda x: F.conv2d(F.pad(x, (2, 2, 2, 2), mode='reflect'), kernel, groups=3)
    down = lambda x: blur(x)[:, :, ::2, ::2]

    def up(x):
        wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        wide[:, :, ::2, ::2] = 4 * x
        return blur(wide)

    def patches(images):
        out = []
        for batch in images.split(8):
            levels = [batch]
            while levels[-1].shape[-1] > 16:
                levels.append(down(levels[-1]))
            bands = [a - up(b) for a, b in pairwise(levels)] + levels[-1:]
            at = np.arange(7) - 3
            for i, band in enumerate(b.numpy() for b in bands):
                n, side = np.repeat(np.arange(len(batch)), 128), band.shape[-1]
                y, x = rng.integers(3, side - 3, (2, len(n)))
                found = band[
                    n[:, None, None, None],
                    np.arange(3)[:, None, None],
                    y[:, None, None, None] + at[:, None],
                    x[:, None, None, None] + at,
                ]
                out[i : i + 1] = [np.concatenate([*out[i : i + 1], found])]
        return [
            ((p - p.mean((0, 2, 3), keepdims=True)) / p.std((0, 2, 3), keepdims=True)).reshape(len(p), -1) for p in out
        ]

    a, b = (patches((v + 1) * 127.5) for v in (real, fake))
    for x, y in zip(a, b):
        for _ in range(4):
            d = rng.normal(size=(x.shape[1], 128)).astype(np.float32)
            d /= np.linalg.norm(d, axis=0)
            np.abs(np.sort(x @ d, 0) - np.sort(y @ d, 0)).mean()


def images(real, fake):
    "Both scores of two sets; random pixels cost what images cost"
    note = f'{COUNT} RGB images, {SIZE} px'
    unit = (real + 1) / 2, (fake + 1) / 2
    ours, theirs = seconds(lambda: ms_ssim(real, fake)), seconds(lambda: torch_ms_ssim(*unit), 1)
    chunks = list(zip(unit[0].split(8), unit[1].split(8)))[:10]
    library = (
        seconds(lambda: [multiscale_structural_similarity_index_measure(a, b, data_range=1.0) for a, b in chunks], 1)
        * 2.5
    )
    own = seconds(lambda: swd(real, fake))
    return [
        Row('ms_ssim', ours, 's', MS_SSIM_TARGET, note),
        Row('ms_ssim, torch code', theirs / ours, 'x', 1, 'time of separable convolutions over ours', more=True),
        Row('ms_ssim, torchmetrics', library / ours, 'x', 1, 'its time over ours', more=True),
        Row('swd', own, 's', SWD_TARGET, note),
        Row(
            'swd, the usual way',
            seconds(lambda: plain_swd(real, fake, np.random.default_rng(0)), 1) / own,
            'x',
            2,
            'time of the progressive-GAN pipeline, with quicker pyramids than its own, over ours',
            more=True,
        ),
    ]


def distances(g):
    "FID from statistics against torchmetrics, and KID of as many images as a subset has"
    basis = torch.randn(DIM, DIM, generator=g) * torch.logspace(0, -2, DIM)
    real, fake = ((torch.randn(4000, DIM, generator=g) @ basis).relu() * s for s in (0.02, 0.022))
    stats = [FeatureStats().add(x) for x in (real, fake)]
    (m1, c1), (m2, c2) = ((s.mean, s.cov) for s in stats)
    theirs = []
    library = seconds(lambda: theirs.append(_compute_fid(m1, c1, m2, c2).item()), 1)
    ours = seconds(lambda: fid(*stats))
    assert abs(fid(*stats) / theirs[0] - 1) < 1e-4
    return [
        Row('fid', ours, 's', None, f'{DIM} dimensions, from statistics'),
        Row('fid, torchmetrics', library / ours, 'x', 2, 'its time over ours', more=True),
        Row(
            'kid',
            seconds(lambda: kid(real[:1000], fake[:1000])),
            's',
            KID_TARGET,
            f'1,000 images, {DIM} dimensions, 100 subsets',
        ),
    ]


def memory(n):
    "Most bytes that `swd` held at once, on n images that come one batch at a time"
    batch = torch.rand(64, 3, 64, 64) * 2 - 1
    tracemalloc.start()
    swd((batch for _ in range(n // 64)), (batch for _ in range(n // 64)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def rows(peak: float) -> list[Row]:
    "Scores of images, of features, and memory"
    g = torch.Generator().manual_seed(0)
    real = torch.rand(COUNT, 3, SIZE, SIZE, generator=g) * 2 - 1
    fake = (real + 0.1 * torch.randn(real.shape, generator=g)).clamp(-1, 1)
    out = images(real, fake) + distances(g)
    few, many = memory(1024), memory(4096)
    return [
        *out,
        Row(
            'swd memory, 4,096 over 1,024 images', many / few, 'times', 1.1, f'64 px, in a stream; {many / 1e6:.0f} MB'
        ),
    ]
