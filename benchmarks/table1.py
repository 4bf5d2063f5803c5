"""Table 1 of Zhang et al. 2019 on real photographs of 64 pixels: SkrGAN and four others, one budget for all.

    python -m benchmarks.table1 fundus OUT --data DIR   # eyes of CHASE_DB1 and HRF
    python -m benchmarks.table1 chest_xray OUT --data DIR   # films of the COVID-19 Image Repository

Two trainings of each system, on one thread. Runs lie in OUT and go on where they stopped. What is found goes into
nbs/images/table1.json, the pictures lie beside it. The packaged generator, which was trained for longer and at a larger
size, is scored as well.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import cv2
import torch
import torch.nn.functional as F

from medsketch.core import atomic_write
from medsketch.data import ImageData
from medsketch.evaluate.compare import compare
from medsketch.evaluate.moco import load_moco
from medsketch.evaluate.segment import Segmenter
from medsketch.evaluate.table import score_images
from medsketch.pretrained import PRETRAINED, load
from medsketch.recipes import recipe_class

SIZE, BATCHES, SEEDS, IMAGES = 64, 2000, (0, 1), Path(__file__).parents[1] / 'nbs/images'
PAPERS = 'skrgan', 'dcgan', 'acgan', 'wgan', 'pggan'
SYSTEMS = {'fundus': (*PAPERS, 'stylegan2'), 'chest_xray': PAPERS}
WIDTHS = {4: 96, 8: 96, 16: 64, 32: 32, 64: 16}
SKETCHES = 'style', 'loss', 'diffaugment', 'r1', 'r1_every', 'lr_sketch'  # as the packaged weights have them
SKRGAN = {
    'latent_dim': 64,
    'widths': WIDTHS,
    'start': SIZE,
    'batches': {SIZE: 1500},
    'render_steps': BATCHES - 1500,
    'depth': 4,
    'receptive_field': 34,
    'lam': 20.0,
    'strokes': 10.0,
    'matching': 10.0,
}
STYLEGAN2 = {
    'fmap_base': 1024,
    'fmap_max': 64,
    'latent_dim': 64,
    'w_dim': 64,
    'mapping_layers': 2,
    'lr': 3e-3,
    'r1': 2.0,
    'path_length': 0.5,
    'mixing': 0.5,
}


def images(name, folder):
    "The images that the packaged weights of this name saw, smaller"
    return PRETRAINED[name].data(folder, SIZE)


def settings(name):
    "Arguments that differ from the scale `cpu`: not tuned, but for SkrGAN's sketches and StyleGAN2's rates"
    packaged = recipe_class('skrgan')(**PRETRAINED[name].config).config
    own = SKRGAN | {k: packaged[k] for k in SKETCHES}
    both = {'batch_size': 12, 'augment': 'mirror', 'pggan.widths': WIDTHS, 'pggan.latent_dim': 64}
    tuned = {'skrgan': own, 'stylegan2': STYLEGAN2}
    return both | {f'{r}.{k}': v for r in SYSTEMS[name] for k, v in tuned.get(r, {}).items()}


def vessels(data, out):
    "A segmenter for the continuity of vessels, kept"
    path = out / 'vessels.safetensors'
    if not path.exists():
        Segmenter(size=SIZE, channels=3, steps=400).fit(data).save(path)
    return Segmenter.load(path)


def row(scores):
    "{heading: (value, low, high)} of one training"
    return {s['name']: (s['value'], s['low'], s['high']) for s in map(asdict, scores)}


def packaged(name, real, **how):
    "Scores of the packaged generator, its images made smaller"
    made = F.interpolate(load(name).sample(100, seed=0)['image'].cpu(), SIZE, mode='area')
    return row(score_images(real, made, train=real, resamples=50, **how))


def picture(path, to):
    "Samples, as a JPEG on white"
    cv2.imwrite(str(to), cv2.imread(str(path)), [cv2.IMWRITE_JPEG_QUALITY, 88])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('set', choices=('fundus', 'chest_xray'))
    p.add_argument('out', type=Path)
    p.add_argument('--data', type=Path, required=True)
    a = p.parse_args()
    torch.set_num_threads(1)
    data, out = images(a.set, a.data), a.out / a.set
    out.mkdir(parents=True, exist_ok=True)
    metrics = ['swd', 'ms_ssim', 'diversity', 'fid', 'kid', 'copies'] + ['continuity'] * (a.set == 'fundus')
    segmenter = vessels(data, out) if a.set == 'fundus' else None
    seen = ImageData(data.images, paths=data.paths, subjects=data.subjects)
    how = {'steps': BATCHES, 'scale': 'cpu', 'settings': settings(a.set), 'seeds': SEEDS, 'segmenter': segmenter}
    table = compare(seen, SYSTEMS[a.set], out, **how, metrics=metrics, every=250, progress=False)
    kept = IMAGES / 'table1.json'
    found = json.loads(kept.read_text()) if kept.exists() else {}
    found[a.set] = {
        'images': len(data),
        'people': len(set(data.subjects)),
        'batches': BATCHES,
        'scores': {k: [row(s) for s in v] for k, v in table.rows.items()},
        'halves': row(table.baseline),
        'packaged': packaged(a.set, seen, metrics=metrics, segmenter=segmenter, extractor=load_moco(out / 'features')),
        'costs': table.notes_below,
    }
    with atomic_write(kept, 'w') as f:
        f.write(json.dumps(found, indent=1))
    picture(out / 'samples.png', IMAGES / f'table1_{a.set}.jpg')
    print(table.text())


if __name__ == '__main__':
    main()
