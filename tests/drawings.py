"""Twelve drawings by hand, four organs × three, and what renderers make of them.

`python tests/drawings.py SHEET.png` writes all of them as one picture.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from medsketch.core import save_png, to_uint8
from medsketch.pretrained import load
from medsketch.studio.strokes import Drawing, Stroke


def line(*points, width=0.012, n=24):
    "A smooth stroke through points in [0, 1], by Catmull and Rom's spline"
    p = np.array([points[0], *points, points[-1]], float)
    t = np.linspace(0, 1, n, endpoint=False)[:, None]
    parts = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:])
    ]
    return Stroke('pen', tuple(map(tuple, np.concatenate([*parts, p[-1:]]))), width)


def ring(x, y, rx, ry=None, width=0.012, turn=0.0, start=0.0, end=1.0):
    "An ellipse, or a part of one"
    a = 2 * np.pi * np.linspace(start, end, 40)
    u, v = rx * np.cos(a), (ry or rx) * np.sin(a)
    c, s = np.cos(turn), np.sin(turn)
    return Stroke('pen', tuple(zip(x + c * u - s * v, y + s * u + c * v)), width)


def mirrored(*strokes):
    "Strokes, and the same on the other side"
    flip = lambda s: Stroke(s.tool, tuple((1 - x, y) for x, y in s.points), s.width)
    return [*strokes, *map(flip, strokes)]


def arcade(x, y, side, up, width):
    "The large vessel from the disc around the macula"
    return line((x, y), (x + 0.06 * side, y - 0.17 * up), (x + 0.25 * side, y - 0.27 * up),
                (x + 0.45 * side, y - 0.2 * up), (x + 0.58 * side, y - 0.08 * up), width=width)  # fmt: skip


def eye(x, y, side):
    "Disc, four large vessels, two to the near rim"
    far = [arcade(x, y, side, up, w) for up, w in ((1, 0.018), (-1, 0.018), (1.25, 0.01), (-1.2, 0.01))]
    near = [line((x, y), (x - 0.06 * side, y - 0.12 * up), (x - 0.12 * side, y - 0.25 * up)) for up in (1, -1)]
    return [ring(x, y, 0.06), *far, *near]


RIBS = [line((0.44, y + 0.05), (0.3, y), (0.17, y + 0.08), width=0.008) for y in (0.22, 0.32, 0.42, 0.52)]
LUNG = line((0.44, 0.2), (0.36, 0.14), (0.24, 0.24), (0.16, 0.5), (0.15, 0.76), (0.3, 0.72), (0.42, 0.68), (0.45, 0.45),
            (0.44, 0.2))  # fmt: skip
HEART = line((0.45, 0.42), (0.5, 0.5), (0.62, 0.62), (0.66, 0.74))
BODY = ring(0.5, 0.5, 0.44, 0.32)
CT_LUNG = line((0.44, 0.36), (0.33, 0.27), (0.2, 0.34), (0.15, 0.52), (0.22, 0.68), (0.36, 0.66), (0.42, 0.55),
               (0.44, 0.36))  # fmt: skip
TREE = [line((0.41, 0.5), (0.33, 0.48), (0.24, 0.42)), line((0.36, 0.49), (0.3, 0.56), (0.24, 0.6), width=0.008)]
HEAD = ring(0.5, 0.5, 0.37, 0.44)
VENTRICLE = line((0.48, 0.38), (0.44, 0.36), (0.43, 0.46), (0.47, 0.53), (0.48, 0.38))
FOLDS = [line((0.5, y), (0.5 - dx, y + 0.03), (0.5 - dx - 0.08, y + dy), width=0.008)
         for y, dx, dy in ((0.16, 0.08, 0.05), (0.3, 0.18, -0.02), (0.62, 0.17, 0.06), (0.74, 0.1, 0.04))]  # fmt: skip

DRAWINGS = {
    'fundus': [
        eye(0.35, 0.5, 1)[:3],
        eye(0.62, 0.47, -1),
        [*eye(0.4, 0.52, 1), line((0.55, 0.3), (0.68, 0.33), (0.8, 0.3)), line((0.6, 0.74), (0.72, 0.7), (0.82, 0.72)),
         line((0.4, 0.52), (0.55, 0.47), (0.66, 0.49), width=0.008), line((0.3, 0.3), (0.2, 0.26), (0.14, 0.3))],
    ],
    'chest_xray': [
        mirrored(LUNG),
        [*mirrored(LUNG), HEART, line((0.5, 0.05), (0.5, 0.25))],
        [*mirrored(LUNG, *RIBS, line((0.42, 0.16), (0.28, 0.1), (0.12, 0.14))), HEART],
    ],
    'lung_ct': [
        [BODY, *mirrored(CT_LUNG)],
        [BODY, *mirrored(CT_LUNG), ring(0.5, 0.68, 0.05)],
        [BODY, *mirrored(CT_LUNG, *TREE), ring(0.5, 0.68, 0.05), ring(0.3, 0.42, 0.03), ring(0.55, 0.45, 0.08, 0.1)],
    ],
    'brain_mri': [
        [HEAD, line((0.5, 0.08), (0.5, 0.92))],
        [HEAD, *mirrored(VENTRICLE), line((0.5, 0.08), (0.5, 0.3))],
        [HEAD, ring(0.5, 0.5, 0.32, 0.39), *mirrored(VENTRICLE, *FOLDS), ring(0.66, 0.6, 0.07)],
    ],
}  # fmt: skip


def sketches(name, size):
    "The drawings of an organ as a renderer takes them, (3, 1, size, size) in [0, 1]"
    out = []
    for strokes in DRAWINGS[name]:
        d = Drawing(size)
        for s in strokes:
            d.add(s)
        out.append(torch.from_numpy(d.sketch()))
    return torch.stack(out)


def sheet(weights=()):
    "All drawings above their images, 256 px each; `weights` are {organ: name or path} other than the packaged"
    rows = []
    for name in DRAWINGS:
        r = load(dict(weights).get(name, name))
        drawn = sketches(name, r.config['size'])
        made = r.render(drawn).cpu()
        made = made if made.shape[1] == 3 else made[:, :1].repeat(1, 3, 1, 1)
        pair = torch.cat([1 - 2 * drawn.repeat(1, 3, 1, 1), made], 2)
        rows.append(torch.cat([torch.nn.functional.interpolate(pair, (512, 256))[i] for i in range(3)], 2))
    return to_uint8(torch.cat([torch.cat(rows[:2], 2), torch.cat(rows[2:], 2)], 1))


if __name__ == '__main__':
    save_png(Path(sys.argv[1]), sheet(a.split('=', 1) for a in sys.argv[2:]))
