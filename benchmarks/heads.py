"""PGSgan's Table 1 on real ultrasound: foetal heads of HC18 (van den Heuvel et al. 2018), from phantoms' weights.

    python -m benchmarks.heads phantoms OUT            # cGAN, Sgan and PGSgan learn 2,000 drawn heads
    python -m benchmarks.heads real OUT --data DIR     # each goes on with half of the photographs, and with the other
    python -m benchmarks.heads score OUT --data DIR    # all photographs, each drawn by the network that did not see it

DIR holds images and masks, as `medsketch data hc18 --to DIR` lays them out. What is found goes into
nbs/images/heads.json, a picture lies beside it.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.freehand import save
from medsketch.core import atomic_write, grid, to_pixels
from medsketch.data import load_images, phantom_data
from medsketch.evaluate.distances import kid
from medsketch.evaluate.metrics import ms_ssim
from medsketch.evaluate.moco import train_moco
from medsketch.recipes import load_recipe
from medsketch.recipes.pgsgan import ablation

SIZE, IMAGES = 128, Path(__file__).parents[1] / 'nbs/images'
SMALL = {'ngf': 16, 'ndf': 16, 'fade_maps': 16, 'classes': 2, 'augment': 'mirror'}
STEPS = {'phantoms': (200, 50, 200), 'real': (1, 1, 148)}  # base, each growth, full
NAMES = ('cGAN', 'Sgan', 'PGSgan')


def systems(where):
    "The three systems, with the budget of phantoms or of photographs"
    base, grow, full = STEPS[where]
    return ablation(SIZE, **SMALL, base_steps=base, grow_steps=grow, full_steps=full)


def heads(data):
    "Images whose masks say head or not"
    data.masks, data.classes, data.colours = (data.masks > 0).astype('uint8'), ['background', 'head'], None
    return data


def drawn(n, seed):
    return heads(phantom_data('foetal_head', n, SIZE, seed=seed))


def halves(data):
    "The set's two halves, by subject if there are any; each is drawn by networks that learned from the other"
    return [data.subset(range(k, len(data), 2)) for k in (0, 1)]


def phantoms(a):
    data = drawn(2000, 0)
    for name, r in systems('phantoms').items():
        r.fit(data, a.out / 'phantoms' / name, every=100)


def real(a):
    for k, half in enumerate(halves(heads(load_images(a.data, SIZE, channels=1)))):
        for name, r in systems('real').items():
            r.fit(half, a.out / f'real{1 - k}' / name, every=100, init=a.out / 'phantoms' / name)


def made_by(r, data):
    "Their conditions rendered"
    return r.draw_from(data).sample(len(data), seed=0)


def sharpness(images):
    "Variance of the Laplacian, mean over images of grey levels"
    return float(np.mean([cv2.Laplacian(to_pixels(x), cv2.CV_64F).var() for x in images]))


def rendered(out, k, half):
    "{name: images} of one half's conditions, and what they belong to"
    made = {}
    for name in NAMES:
        for when, folder in (('phantoms alone', 'phantoms'), ('', f'real{k}')):
            r = load_recipe(out / folder / name).draw_from(half)
            seen = r.source.batch(range(len(half)))
            made[f'{name} {when}'.strip()] = r.render(r.condition(seen['mask'], seen.get('sketch'))).cpu()
    return {'real': seen['image'], 'sketch': seen['sketch'] * 2 - 1} | made


def closeness(x, y):
    "Mean and 95 % interval over images of MS-SSIM and L1"
    each = torch.tensor([ms_ssim(x[[i]], y[[i]]) for i in range(len(x))])
    found = {'ms_ssim': each, 'l1': (x - y).abs().flatten(1).mean(1)}
    wide = lambda v: 1.96 * v.std().item() / len(v) ** 0.5
    return {k: (v.mean().item(), wide(v)) for k, v in found.items()}


def score(a):
    parts = [rendered(a.out, k, h) for k, h in enumerate(halves(heads(load_images(a.data, SIZE, channels=1))))]
    made = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    truth, features = made['real'], train_moco(drawn(600, 40_000), steps=200, batch_size=16, width=0.25, seed=7)
    found = {}
    for name, x in made.items():
        if name not in ('real', 'sketch'):
            distance = kid(features(x), features(truth))
            found[name] = closeness(x, truth) | {'kid': distance, 'sharpness': sharpness(x) / sharpness(truth)}
    rows = [made[k] for k in ('real', 'sketch', *NAMES)]
    save(IMAGES / 'hc18_heads.jpg', grid([to_pixels(x) for r in rows for x in r[:8]], 8))
    with atomic_write(IMAGES / 'heads.json') as f:
        f.write(json.dumps({'images': len(truth), 'systems': found}, indent=1).encode())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('what', choices=('phantoms', 'real', 'score'))
    p.add_argument('out', type=Path, help='folder of the runs')
    p.add_argument('--data', type=Path, help='images and masks of HC18')
    a = p.parse_args()
    globals()[a.what](a)


if __name__ == '__main__':
    torch.set_num_threads(1)
    main()
