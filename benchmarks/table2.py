"""Table 2 of Zhang et al. 2019 on real photographs: does pretraining on pairs of the packaged generators help?

    python -m benchmarks.table2 OUT --data DIR --size 128

The pairs are drawn by `fundus` (SkrGAN; its sketch is the label, as in the paper) and by `eyes` (medical PGGAN; it
draws the vessel map itself). The segmenter learns from the 22 people of CHASE_DB1 and HRF that `fundus` learned from
(`eyes` saw 17 of them) and is tested on the four that neither saw. Trainings lie in OUT and go on where they stopped.
What is found goes into nbs/images/table2.json, pictures lie beside it.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.latent import picture
from medsketch.core import atomic_write
from medsketch.data import ImageData
from medsketch.evaluate.downstream import downstream
from medsketch.evaluate.pairs import synthetic_pairs
from medsketch.evaluate.segment import field_of_view
from medsketch.pretrained import load, pretraining_data

SCORES, IMAGES = ('sensitivity', 'accuracy', 'auc', 'f1'), Path(__file__).parents[1] / 'nbs/images'
SEEDS, PAIRS = (0, 1, 2), 600
PLANS = (  # data, the generator, its protocols, share of the steps
    ('real', None, ('real',), 1),
    ('real, longer', None, ('real',), 1.5),
    ('fundus', 'fundus', ('synthetic', 'pretrain', 'pretrain_added'), 1),
    ('eyes', 'eyes', ('synthetic', 'pretrain', 'pretrain_added'), 1),
)


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
    train, test = pretraining_data('fundus', a.data, a.size)
    kept, found = IMAGES / 'table2.json', {}
    if kept.exists():
        found = json.loads(kept.read_text())
    rows = found[str(a.size)] = {'images': len(train), 'test': len(test), 'pairs': PAIRS, 'rows': {}}
    for name, generator, protocols, more in PLANS:
        pairs = None
        if generator:
            drawn = synthetic_pairs(load(generator), PAIRS, out=a.out / f'{generator}-pairs')
            pairs = seen(smaller(drawn, a.size))
            picture(IMAGES / f'table2_{generator}_{a.size}.jpg', pairs_of(pairs), 8)
        how = {'seeds': SEEDS, 'steps': int(a.steps * more), 'segmenter': {'patch': 48, 'lr': 2e-3, 'batch_size': 2}}
        r = downstream(train, pairs, test, protocols, out=a.out / f'{name}-{a.size}', progress=False, **how)
        for k in protocols:
            rows['rows'][f'{name}: {k}'] = {'steps': r.steps[k], **{s: r.scores[k][s] for s in SCORES}}
        print(r.table(), flush=True)
    with atomic_write(kept, 'w') as f:
        f.write(json.dumps(found, indent=1))


if __name__ == '__main__':
    main()
