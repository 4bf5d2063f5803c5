"""Table 2 of Zhang et al. 2019 on real photographs: does pretraining on pairs of the packaged generators help?

    python -m benchmarks.table2 OUT --data DIR --size 128

The pairs are drawn by `fundus` (SkrGAN; its sketch is the label, as in the paper), by `eyes` (medical PGGAN; it
draws the vessel map itself) and by a dual GAN of this size, which is trained first: for minutes on a GPU. Two more rows
render real masks, which takes its Stage I out of the loop, and train Stage I as its paper has it. The segmenter learns
from the 22 people of CHASE_DB1 and HRF that `fundus` and the dual GAN learned from (`eyes` saw 17 of them), and is
tested on the four that none of them saw.
Trainings lie in OUT and go on where they stopped; rows that are known stay. What is found goes into
nbs/images/table2.json, pictures lie beside it.
"""

import argparse
import json
import re
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.latent import picture
from medsketch.core import atomic_write, to_uint8
from medsketch.data import ImageData, load_images, split_by_subject
from medsketch.data.views import round_field, same_light, views
from medsketch.evaluate.downstream import downstream
from medsketch.evaluate.pairs import synthetic_pairs
from medsketch.evaluate.segment import Segmenter, field_of_view, with_masks
from medsketch.pretrained import ROUND, fundus_views, load
from medsketch.recipes import DualGAN, load_recipe

SCORES, IMAGES = ('sensitivity', 'accuracy', 'auc', 'f1'), Path(__file__).parents[1] / 'nbs/images'
SEEDS, PAIRS = (0, 1, 2), 600
PLANS = (  # data, the generator, its protocols, share of the steps
    ('real', None, ('real',), 1),
    ('real, longer', None, ('real',), 1.5),
    ('fundus', 'fundus', ('synthetic', 'pretrain', 'pretrain_added'), 1),
    ('eyes', 'eyes', ('synthetic', 'pretrain', 'pretrain_added'), 1),
    ('dual GAN', 'dual GAN', ('synthetic', 'pretrain', 'pretrain_added'), 1),
    ('dual GAN, real masks', 'real masks', ('synthetic',), 1),
    ('dual GAN, plain', 'plain', ('synthetic',), 1),
)
PLAIN = {'loss': 'logistic', 'diffaugment': None}
SEGMENTER = {'patch': 48, 'lr': 2e-3, 'batch_size': 2}
DUAL = {  # beside the scale `cpu`
    'classes': 2,
    'loss': 'relativistic',
    'diffaugment': 'translate,cutout',
    'batch_size': 16,
    'augment': 'mirror',
    'mask_steps': 11_000,
    'render_steps': 6000,
}


def smaller(pairs, size):
    "Drawn pairs at another size; a vessel stays where it covers a third of a pixel"
    if pairs.size == size:
        return pairs
    down = lambda x: cv2.resize(x, (size, size), interpolation=cv2.INTER_AREA)
    images = np.stack([down(x.transpose(1, 2, 0)).transpose(2, 0, 1) for x in pairs.images])
    masks = np.stack([down(m.astype(np.float32)) > 1 / 3 for m in pairs.masks]).astype(np.uint8)
    return ImageData(images, masks, paths=pairs.paths, subjects=pairs.subjects, classes=pairs.classes)


def seen(pairs):
    "Strokes outside the field of view are no vessels"
    inside = field_of_view(pairs.batch(range(len(pairs)))['image']).numpy()
    return pairs.with_planes(mask=pairs.masks * inside)


def outlined(a, train):
    "Photographs of FIVES, each seen through five windows, with vessels that a segmenter drew: for Stage II (§IV)"
    photos = load_images(a.data / 'retina/fives', 2 * a.size, fit='letterbox', manifest=a.data / 'manifest.csv')
    photos = same_light(round_field(views(photos, ROUND, a.size)))
    photos.masks = None
    helper = Segmenter(a.size, 3, **SEGMENTER, steps=a.steps)
    return with_masks(photos, helper.fit(train, progress=False))


def dual_gan(a, train, plain=False):
    "The dual GAN of this size; `plain` with the paper's loss in Stage I, no augmentation, and the same Stage II"
    both = a.out / f'dualgan-{a.size}'
    run = a.out / f'dualgan-plain-{a.size}' if plain else both
    if not (run / 'weights.safetensors').exists():
        r = DualGAN.preset('cpu', size=a.size, **DUAL | (PLAIN if plain else {}))
        only = {'stages': ['mask'], 'init': {'G_P': both}} if plain else {'more': outlined(a, train)}
        r.fit(train, run, every=1000, **only)
    return load_recipe(run)


def draw(a, generator, train):
    "Pairs, all of the size wanted"
    if generator == 'real masks':
        made = dual_gan(a, train).render(torch.from_numpy(train.masks).long())
        pixels = np.moveaxis(to_uint8(made), -1, 1)
        return ImageData(pixels, train.masks, paths=[f'rendered {p}' for p in train.paths], classes=train.classes)
    ours = generator in ('dual GAN', 'plain')
    recipe = dual_gan(a, train, generator == 'plain') if ours else load(generator)
    folder = f'{generator}-{a.size}-pairs' if ours else f'{generator}-pairs'
    return seen(smaller(synthetic_pairs(recipe, PAIRS, out=a.out / folder), a.size))


def pairs_of(data):
    "Eight images, and their labels"
    b = data.batch(np.linspace(0, len(data) - 1, 8).astype(int))
    return b['image'], (b['mask'] > 0).float()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path)
    p.add_argument('--data', required=True, type=Path)
    p.add_argument('--size', default=128, type=int)
    p.add_argument('--steps', default=600, type=int)
    a = p.parse_args()
    torch.set_num_threads(1)
    train, test = split_by_subject(fundus_views(a.data, a.size), (0.85, 0.15), seed=0)
    kept, found = IMAGES / 'table2.json', {}
    if kept.exists():
        found = json.loads(kept.read_text())
    rows = found.setdefault(str(a.size), {'images': len(train), 'test': len(test), 'pairs': PAIRS, 'rows': {}})
    for name, generator, protocols, more in PLANS:
        if all(f'{name}: {k}' in rows['rows'] for k in protocols):
            continue
        pairs = generator and draw(a, generator, train)
        if pairs:
            file = re.sub(r'\W+', '_', name).lower()
            picture(IMAGES / f'table2_{file}_{a.size}.jpg', pairs_of(pairs), 8)
        how = {'seeds': SEEDS, 'steps': int(a.steps * more), 'segmenter': SEGMENTER}
        r = downstream(train, pairs, test, protocols, out=a.out / f'{name}-{a.size}', progress=False, **how)
        for k in protocols:
            rows['rows'][f'{name}: {k}'] = {'steps': r.steps[k], **{s: r.scores[k][s] for s in SCORES}}
        with atomic_write(kept, 'w') as f:
            f.write(json.dumps(found, indent=1))
        print(r.table(), flush=True)


if __name__ == '__main__':
    main()
