"""The figures of Beers et al. 2018 for runs of `pggan` on real photographs of the retina, held-out subjects apart.

    python -m benchmarks.latent vessels VESSELS --size 128 --data DIR    # a segmenter, trained on real ones alone
    python -m benchmarks.latent pairs RUN VESSELS --data DIR             # its AUC on synthetic pairs
    python -m benchmarks.latent ablation RUN PLAIN VESSELS --data DIR    # with maps and without
    python -m benchmarks.latent space RUN --data DIR                     # reconstructions, left and right, a map

DIR holds retina/chasedb1 and retina/hrf (CHASE_DB1, Fraz et al. 2012; HRF, Budai et al. 2013), as `medsketch pretrain`
wants them. What is found goes into OUT/latent.json, pictures lie beside it.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch

from medsketch.core import atomic_write, grid, to_pixels
from medsketch.data import join
from medsketch.evaluate.agreement import segmentation_ablation, vessel_agreement
from medsketch.evaluate.latent import encode_set, latent_map, linear_accuracy, reconstruction_scores, reconstructions
from medsketch.evaluate.segment import Segmenter, score_segmenter
from medsketch.pretrained import find_weights, pretraining_data
from medsketch.recipes import load_recipe

# HRF does not say which eye a photograph shows: the side of the optic disc, as we see it
LEFT = {'hrf_01_dr', 'hrf_02_g', 'hrf_02_h', 'hrf_03_dr', 'hrf_04_g', 'hrf_04_h', 'hrf_06_g', 'hrf_07_dr'}
N = 256  # synthetic images


def which(path):
    "The eye of a photograph; CHASE_DB1 says it in the file's name"
    name = Path(path).stem
    return 'left' if name in LEFT or name.startswith('chase') and name.endswith('L') else 'right'


def means(scores):
    "{name: mean over images}"
    return {k: round(float(np.nanmean(np.asarray(v))), 4) for k, v in scores.items()}


def picture(path, rows, cols):
    "Rows of images and masks, as a JPEG"
    both = [grid(list(map(shown, r)), cols) for r in rows]
    side = np.concatenate(both)
    side = cv2.resize(side, None, fx=(k := max(1, 1024 // side.shape[1])), fy=k, interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(path), side[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


def shown(x):
    "An image (C, H, W) in [-1, 1], or a map (H, W) of 0 and 1, as pixels"
    x = x[None] * 2.0 - 1 if x.ndim == 2 else x
    return to_pixels(x.float().expand(3, -1, -1))


def vessels(a):
    "Train the segmenter"
    train, held = pretraining_data('eyes', a.data, a.size)
    s = Segmenter(size=a.size, patch=48, steps=a.steps, lr=2e-3, batch_size=4).fit(train)
    s.save(a.vessels)
    return {'vessels': {'size': a.size} | means(score_segmenter(s, held, pooled=True))}


def pairs(a):
    "AUC: do the generator's maps say what the segmenter finds in its photographs? And in pairs of other samples?"
    s, r = Segmenter.load(a.vessels), load_recipe(find_weights(a.run))
    _, held = pretraining_data('eyes', a.data, r.config['size'])
    made = r.decode(r.noise(N, 0), soft=True)
    found = {k: round(v.item(), 4) for k, v in vessel_agreement(s, made['image'], made['seg'][:, 0]).items()}
    real = means(score_segmenter(s, held, pooled=True))
    x, p = made['image'][:32], s.segment(made['image'][:32])
    rows = [y[i : i + 16] for i in (0, 16) for y in (x, made['mask'][:32], p)]
    picture(a.out / 'latent_pairs.jpg', rows, 16)
    return {'pairs': found | {'photographs held back': real['auc'], 'dice there': real['dice'], 'samples': N}}


def ablation(a):
    "Vessels that the segmenter finds in photographs, and in samples of a generator with maps and of one without"
    s = Segmenter.load(a.vessels)
    size = s.config['size']
    both = pretraining_data('eyes', a.data, size)
    sets = {k: d.batch(range(len(d)))['image'] for k, d in zip(('trained on', 'held back'), both)}
    sets |= {k: load_recipe(v).sample(N, seed=0)['image'] for k, v in (('with maps', a.run), ('without', a.plain))}
    rows = [y for x in list(sets.values())[1:] for y in (x[:16], s.segment(x[:16]))]
    picture(a.out / 'latent_ablation.jpg', rows, 16)
    return {'ablation': segmentation_ablation(s, **sets), 'ablation at': size}


def space(a):
    "What comes back through the encoder, how well the eye is read from codes, and where the codes lie"
    r = load_recipe(find_weights(a.run))
    train, held = pretraining_data('eyes', a.data, r.config['size'])
    made = reconstructions(r, held, search=a.search)
    back = {k: means(v) for k, v in reconstruction_scores(made, held, 1).items()}
    pick, real = np.linspace(0, len(held) - 1, 12).astype(int), held.batch(range(len(held)))
    rows = [m[k][pick] for m in (real, *(made[n] for n in ('encoder', 'search', 'random'))) for k in ('image', 'mask')]
    picture(a.out / 'latent_back.jpg', rows, 12)
    everyone = join(train, held)
    codes, side = encode_set(r, everyone), [which(p) for p in everyone.paths]
    small = torch.nn.functional.adaptive_avg_pool2d(everyone.batch(range(len(everyone)))['image'], 8).flatten(1)
    read = {'codes': codes, 'thumbnails of 8 × 8': small, 'random numbers': torch.randn(codes.shape)}
    knows = {k: linear_accuracy(z, side, everyone.subjects) for k, z in read.items()}
    where = {m: np.round(latent_map(codes, m), 2).tolist() for m in ('tsne', 'pca')}
    cameras = [Path(p).parts[-3] for p in everyone.paths]
    return {'back': back, 'eye': knows, 'map': where | {'eye': side, 'set': cameras}}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='what', required=True)
    for f, names in ((vessels, 'vessels'), (pairs, 'run vessels'), (ablation, 'run plain vessels'), (space, 'run')):
        q = sub.add_parser(f.__name__, help=f.__doc__)
        q.set_defaults(do=f)
        for n in names.split():
            q.add_argument(n)
        q.add_argument('--data', required=True, type=Path)
        q.add_argument('--out', default=Path('nbs/images'), type=Path)
        q.add_argument('--size', default=128, type=int)
        q.add_argument('--steps', default=500, type=int)
        q.add_argument('--search', default=200, type=int)
    a = p.parse_args()
    path = a.out / 'latent.json'
    found = a.do(a)
    known = json.loads(path.read_text()) if path.exists() else {}
    with atomic_write(path, 'w') as f:
        json.dump(known | found, f, indent=1, ensure_ascii=False)


if __name__ == '__main__':
    main()
