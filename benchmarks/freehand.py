"""Table I of Cap and Fukuda 2024 on drawn throats of 64 pixels: Sketch2MedI and four other systems, roughly drawn.

    python -m benchmarks.freehand segment OUT     # S, on 400 annotated throats
    python -m benchmarks.freehand train OUT NAME  # sketch2medi, pix2pix, cyclegan, unit or ugatit, on 2,000 others
    python -m benchmarks.freehand table OUT       # scores at five levels of distortion, by three drawers
    python -m benchmarks.freehand retrieval OUT   # what the encoder's codes find

Runs lie in OUT and go on where they stopped. What is found goes into nbs/images/freehand.json, pictures lie beside it.
With `--size 128 --small RUN` images have 128 pixels. S and the four others learn from the beginning, for minutes on a
GPU; G, E and H go on from what they were at 64, whose run of sketch2medi is RUN.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from medsketch.core import atomic_write, grid, to_pixels
from medsketch.data import ImageData, phantom_data
from medsketch.evaluate.levels import LEVELS, drawn_by, score_levels, table_scores
from medsketch.evaluate.moco import load_moco, train_moco
from medsketch.evaluate.retrieve import (
    chance_at,
    edge_histograms,
    hits,
    index_sketches,
    recall_at,
    sketch_pixels,
    style_codes,
)
from medsketch.pretrained import LARGER, THROATS
from medsketch.recipes import load_recipe, recipe_class
from medsketch.recipes.sketch_synth import objects_dice
from medsketch.train.losses import logistic_d, r1_penalty
from medsketch.train.weights import read_run, write_weights

IMAGES = Path(__file__).parents[1] / 'nbs/images'
throats = lambda n, seed, size: phantom_data('pharynx', n, size, seed=seed)
annotated, learned, held = partial(throats, 400, 5000), partial(throats, 2000, 0), partial(throats, 100, 9000)
BATCHES = {'batch_size': 16, 'lr': 5e-4}
SYSTEMS = {  # beside the scale `cpu`; at 64 px batches are what nine minutes of one core came to
    64: {
        'sketch2medi': THROATS,
        'pix2pix': {'receptive_field': 34, 'batch_size': 8, 'lr': 5e-4, 'steps': 1237},
        'cyclegan': {'receptive_field': 34, 'steps': 495},
        'unit': {'receptive_field': 34, 'steps': 240},
        'ugatit': {'steps': 158},
    },
    128: {
        'sketch2medi': LARGER | {'gan_steps': 600, 'encoder_steps': 8000, 'refine_steps': 1500},
        'pix2pix': {'receptive_field': 70, 'ngf': 24, 'steps': 3571} | BATCHES,
        'cyclegan': {'receptive_field': 34, 'steps': 2683} | BATCHES,
        'unit': {'receptive_field': 34, 'steps': 1535} | BATCHES,
        'ugatit': {'steps': 728} | BATCHES,
    },
}
NAMES = {'pix2pix': 'pix2pix', 'cyclegan': 'CycleGAN', 'unit': 'UNIT', 'ugatit': 'U-GAT-IT'}


def make(a, name, **more):
    "A recipe with the settings of this table"
    return recipe_class(name).preset('cpu', **SYSTEMS[a.size][name] | {'size': a.size} | more)


def segment(a):
    "Train S on annotated throats"
    r = make(a, 'sketch2medi', **({} if a.size == 64 else {'batch_size': 16}))
    r.fit(learned_images(a), a.out / 'segment', stages=('segment',), more=annotated(a.size), every=100)


def learned_images(a):
    "Images without a mask: what S does not draw, nobody knows"
    return ImageData(learned(a.size).images)


def sketched(a, data):
    "The same images with the sketches that S draws"
    return load_recipe(a.out / 'segment').sketch_all(ImageData(data.images))


def train(a):
    "Train one system"
    run = a.out / a.name
    if a.name != 'sketch2medi':
        return make(a, a.name).fit(sketched(a, learned(a.size)), run, every=50)
    recipe, init = make(a, a.name, segment_steps=0), {'S': a.out / 'segment'}
    if a.size > 64:
        init |= grown(a, recipe)
        hold(recipe.nets['G'])
    recipe.fit(learned_images(a), run, init=init, every=100)


def grown(a, recipe):
    "{network: file}: what fits of networks of half the size. G's new block adds nothing at first"
    path, names = a.out / 'start.safetensors', ('G', 'E', 'H')
    if not path.exists():
        old = read_run(a.small)
        for k in names:
            for n, t in recipe.nets[k].state_dict().items():
                if (found := old[k].get(n)) is not None and found.shape == t.shape:
                    t.copy_(found)
        torch.nn.init.zeros_(recipe.nets['G'].synthesis.to_image[-1].weight)
        warm(recipe, learned(a.size))
        start = {k: recipe.nets[k] for k in (*names, 'D')}
        write_weights(path, start, {'recipe': recipe.name, 'config': recipe.config})
    return dict.fromkeys((*names, 'D'), path)


def hold(G):
    "Let only the last block learn: what the others know is what the smaller system draws"
    last = f'synthesis.blocks.{len(G.synthesis.blocks) - 1}.', f'synthesis.to_image.{len(G.synthesis.to_image) - 1}.'
    for n, p in G.named_parameters():
        if not n.startswith(last):
            p.register_hook(torch.zeros_like)


def warm(recipe, data, steps=400, lr=2e-3):
    "Let a new discriminator catch up with a trained generator before the two play on"
    G, D, n = recipe.nets['G'], recipe.nets['D'], recipe.config['batch_size']
    opt, rng = torch.optim.Adam(D.parameters(), lr=lr, betas=(0.0, 0.99)), np.random.default_rng(0)
    for i in range(steps):
        real = data.batch(rng.choice(len(data), n))['image']
        with torch.no_grad():
            made = G(recipe.noise(n, 1, i * n))
        loss = logistic_d(D(real), D(made)) + (recipe.config['r1_gan'] / 2 * r1_penalty(D, real) if i % 4 == 0 else 0)
        opt.zero_grad(), loss.backward(), opt.step()
        if i % 20 == 0:
            print(f'D catches up, {i}: {loss.item():.3f}', flush=True)


def features(a):
    "An extractor that no system has learned from: not the one in the losses of E and H"
    if not (a.out / 'moco/weights.safetensors').exists():
        train_moco(learned_images(a), a.out / 'moco', steps=300, width=0.25, seed=1)
    return load_moco(a.out / 'moco')


def systems(a):
    "{name: sketches -> images}; the last does not look at its sketch"
    ours, mean = load_recipe(a.out / 'sketch2medi'), learned(a.size).batch(range(0, 2000, 4))['image'].mean(0)
    out = {NAMES[n]: load_recipe(a.out / n).render for n in NAMES if (a.out / n / 'weights.safetensors').exists()}
    out |= {'Sketch2MedI without H': lambda s: ours.render(s, steps=0)[0], 'Sketch2MedI': ours.render}
    return ours, out | {'the mean throat': lambda s: mean.expand(len(s), -1, -1, -1)}


def agreement(ours, real):
    "Dice of what S finds in images and in the real ones, which it looks at once"
    pair = lambda o: (o['masks'], o['classes'])
    true = list(map(pair, ours.find(real)))
    return lambda made: float(np.nanmean([objects_dice(pair(o), t) for o, t in zip(ours.find(made), true)]))


def called(a):
    "What results and pictures are called"
    return 'freehand' if a.size == 64 else f'freehand_{a.size}'


def note(a, key, value):
    "One section of the results"
    path = IMAGES / f'{called(a)}.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    with atomic_write(path) as f:
        f.write(json.dumps(known | {key: value}, indent=1).encode())


def table(a):
    "Scores and pictures"
    ours, made = systems(a)
    data = held(a.size)
    real, drawn = data.batch(range(len(data)))['image'], sketched(a, data)
    sketches = drawn.batch(range(len(drawn)))['sketch']
    dice = agreement(ours, real)
    found = score_levels(made, sketches, real, table_scores(lambda _, x: dice(x), features(a)))
    scores = {f'{s}|{v:g}|{k}': found.summary(s, v, k) for s, v, k in found.values}
    note(
        a,
        'table',
        {'scores': scores, 'absent': found.absent, 'systems': list(made), 'levels': LEVELS, 'images': len(data)},
    )
    budget = lambda c: {k: v for k, v in c.items() if k.endswith('steps') or k == 'batch_size'}
    note(a, 'trained', {n: budget(make(a, n).config) for n in SYSTEMS[a.size]})
    for level in (0.0, 0.5, 1.0):
        picture(f'{called(a)}_{level:g}', drawn_by(sketches[:8], level, 0), real[:8], made)
    steps = torch.stack(ours.render(drawn_by(sketches[:6], 0.5, 0), steps=3))
    note(a, 'steps', [dice(x) for x in ours.render(sketches, steps=3)])
    save(IMAGES / f'{called(a)}_steps.jpg', grid([to_pixels(x) for row in steps for x in row], 6))


def picture(name, sketches, real, made):
    "Rows: sketches, what each system makes of them, the images they were drawn of"
    rows = [
        [to_pixels(s, 'sketch') for s in sketches],
        *(list(map(to_pixels, f(sketches).cpu())) for f in made.values()),
    ]
    save(IMAGES / f'{name}.jpg', grid([p for r in [*rows, map(to_pixels, real)] for p in r], len(sketches)))


def save(path, pixels):
    "A JPEG of at least 1,000 pixels"
    k = -(-1000 // pixels.shape[1])
    big = cv2.resize(pixels, None, fx=k, fy=k, interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(path), big[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])


def retrieval(a):
    "Recall among 100 others, for sketches as computed and drawn"
    data = held(a.size)
    whole = data.with_sketches(sketched(a, data).sketches)
    wanted, drawn = hits(data, data, 0.85), whole.batch(range(len(whole)))['sketch']
    ways = {
        'W codes': style_codes(load_recipe(a.out / 'sketch2medi')),
        'HOG': edge_histograms(),
        'pixels': sketch_pixels(),
    }
    out = {'chance': chance_at(wanted)}
    for name, extractor in ways.items():
        index = index_sketches(whole, extractor)
        out[name] = {f'{v:g}': recall_at(index, drawn_by(drawn, v, 0), wanted) for v in LEVELS}
    note(a, 'retrieval', out)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('what', choices=('segment', 'train', 'table', 'retrieval'))
    p.add_argument('out', type=Path, help='folder of the runs')
    p.add_argument('name', nargs='?', choices=SYSTEMS[64])
    p.add_argument('--size', type=int, choices=SYSTEMS, default=64, help='pixels')
    p.add_argument('--small', type=Path, help='the run of sketch2medi at 64 pixels, for training it at 128')
    a = p.parse_args()
    globals()[a.what](a)


if __name__ == '__main__':
    torch.set_num_threads(1)
    main()
