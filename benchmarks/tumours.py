"""Beers et al. 2018 on brains: four MR contrasts and the labels of a tumour from one vector, on phantoms of 64 pixels.

    python -m benchmarks.tumours train OUT   # the generator and its encoder, on 2,000 phantoms
    python -m benchmarks.tumours score OUT   # do labels fit images, what comes back of others, what do codes know?

What is found goes into nbs/images/tumours.json, pictures lie beside it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.freehand import save
from medsketch.core import PALETTE, atomic_write, grid, mask_to_rgb, to_pixels
from medsketch.data import phantom_data
from medsketch.evaluate.agreement import vessel_agreement
from medsketch.evaluate.distances import fid
from medsketch.evaluate.features import thumbnails
from medsketch.evaluate.latent import encode_set, latent_map, linear_accuracy, reconstructions
from medsketch.evaluate.segment import Segmenter
from medsketch.evaluate.variety import over_halves, real_halves, sameness
from medsketch.recipes import PGGAN, load_recipe

SIZE, N, IMAGES = 64, 256, Path(__file__).parents[1] / 'nbs/images'
LEAST = 10  # pixels of a tumour
LABELS = ['oedema', 'enhancing', 'necrosis']
WIDTHS = {4: 96, 8: 96, 16: 64, 32: 32, 64: 16}
SETTINGS = {'size': SIZE, 'start': SIZE, 'channels': 4, 'latent_dim': 64, 'widths': WIDTHS, 'lr': 2e-3}
SETTINGS |= {'loss': 'relativistic', 'r1': 1.0, 'augment': 'mirror', 'batches': 2600, 'batch_size': 12, 'seg': LABELS}
brains = lambda n, seed: phantom_data('brain_mri', n, SIZE, seed=seed)


def train(a):
    "Generator and encoder"
    PGGAN(**SETTINGS, encoder_steps=2000).fit(brains(2000, 0), a.out, every=200)


def tumours(data, classes=LABELS):
    "The same set with the tumour alone on its masks, as one class"
    data = data.subset(range(len(data)))
    data.masks = np.isin(data.masks, [data.classes.index(c) for c in classes]).astype('uint8')
    data.classes, data.colours = ['background', 'tumour'], None
    return data


def dice(a, b):
    "Overlap of two boolean sets, all images in one pot"
    return (2 * (a & b).sum() / (a.sum() + b.sum()).clamp(min=1)).item()


def agreement(r, held):
    "A segmenter that has seen phantoms alone, on others and on the generator's images"
    how = {'size': SIZE, 'channels': 4, 'steps': 400, 'batch_size': 8, 'lr': 2e-3}
    s = Segmenter(**how).fit(tumours(brains(400, 20_000)), progress=False)
    made, real = r.decode(r.noise(N, 0), soft=True), tumours(held).batch(range(len(held)))
    fits = vessel_agreement(s, made['image'], made['seg'].amax(1), field=None)
    found, labels, true = s.segment(made['image']) > 0, made['mask'] > 0, real['mask'] > 0
    rows = [y for x in (made['image'], labels.long(), found.long()) for y in x[:16]]
    save(IMAGES / 'tumours_pairs.jpg', grid([shown(x) for x in rows], 16))
    share = lambda m: ((m.flatten(1).sum(1) >= LEAST).float().mean().item(), m.float().mean().item())
    out = {'dice': dice(found, labels), 'with labels of others': dice(found, labels.roll(1, 0))}
    out |= {'on phantoms': dice(s.segment(real['image']) > 0, true), 'drawn': share(labels), 'phantoms': share(true)}
    return {k: v.item() for k, v in fits.items()} | out


def shown(x):
    "The first contrast, or a mask, as pixels"
    if x.ndim == 2:
        return mask_to_rgb(x.numpy(), PALETTE)
    return to_pixels(x[:1])


def side(mask):
    "Where most of a tumour lies, as one looks at the picture"
    half = mask.shape[-1] // 2
    return 'left' if mask[:, :half].sum() > mask[:, half:].sum() else 'right'


def space(r, held):
    "What comes back through the encoder, and what codes know"
    truth = tumours(held).batch(range(len(held)))['mask'] > 0
    batch = held.batch(range(len(held)))
    made = reconstructions(r, held)
    near = lambda m: {'dice': dice(m['mask'] > 0, truth), 'l1': (m['image'] - batch['image']).abs().mean().item()}
    some = [i for i, m in enumerate(truth) if m.any()]
    codes, where = encode_set(r, held.subset(some)), [side(truth[i]) for i in some]
    small = F.adaptive_avg_pool2d(batch['image'][some], 8).flatten(1)
    read = {'codes': codes, 'thumbnails of 8 × 8': small, 'random numbers': torch.randn(codes.shape)}
    knows = {k: linear_accuracy(z, where, [str(i) for i in some]) for k, z in read.items()}
    places = np.round(latent_map(codes, 'tsne'), 2).tolist()
    rows = [batch, *made.values()]
    save(IMAGES / 'tumours_back.jpg', grid([shown(x) for m in rows for k in ('image', 'mask') for x in m[k][:16]], 16))
    return {'back': {k: near(m) for k, m in made.items()}, 'side': knows, 'map': {'at': places, 'where': where}}


def score(a):
    "All figures and pictures"
    r, held = load_recipe(a.out), brains(200, 9000)
    some = r.sample(128, seed=0)
    contrasts = [some['image'][:16, [i]] for i in range(4)]
    save(IMAGES / 'tumours.jpg', grid([shown(x) for c in (*contrasts, some['mask'][:16]) for x in c], 16))
    real = held.batch(range(128))
    vary = {'sameness': (sameness(some['image']), sameness(real['image']))}
    vary |= {'fid': over_halves(partial_fid, some['image'], real['image'], real_halves(range(128)))}
    with atomic_write(IMAGES / 'tumours.json') as f:
        f.write(json.dumps(vary | {'pairs': agreement(r, held)} | space(r, held), indent=1).encode())


def partial_fid(a, b):
    "FID of thumbnails"
    return fid(thumbnails(8)(a), thumbnails(8)(b))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('what', choices=('train', 'score'))
    p.add_argument('out', type=Path, help='folder of the run')
    a = p.parse_args()
    globals()[a.what](a)


if __name__ == '__main__':
    torch.set_num_threads(1)
    main()
