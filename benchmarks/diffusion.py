"""A conditional diffusion model and SkrGAN's renderer: the same sketches, the same minutes, the same scores.

    python -m benchmarks.diffusion --out FOLDER --minutes 4 --device cuda --data phantoms:fundus:2000

Both train for so many minutes, one after the other, and save once a minute. The same command goes on where it was
stopped, and makes nothing again that is there. FOLDER gets diffusion.safetensors, skrgan.safetensors (averaged weights,
16 bits), table.json and strip.png.
"""

import argparse
import json
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from medsketch.core import add_labels, atomic_write, default_device, enlarge, grid, save_png, sketch_to_uint8
from medsketch.data import join, phantom_data
from medsketch.diffusion import Diffusion
from medsketch.evaluate.distances import fid
from medsketch.evaluate.features import thumbnails
from medsketch.evaluate.metrics import ms_ssim, swd
from medsketch.evaluate.rendering import render_scores
from medsketch.recipes import SkrGAN
from medsketch.sketch import add_sketches
from medsketch.train.trainer import Callback

FOREVER = 10**9  # steps; the clock ends the training
DDIM_STEPS = (5, 10, 25, 50)


def systems(a, channels):
    "{name: recipe}, both with about as many weights to draw with"
    same = {'size': a.size, 'channels': channels}
    w = a.width
    return {
        'diffusion': Diffusion(**same, width=w, steps=FOREVER, batch_size=a.batch, lr=a.lr),
        'skrgan': SkrGAN(
            **same,
            ngf=3 * w // 4,
            ngf_max=3 * w,
            ndf=w,
            depth=5,
            receptive_field=34,
            render_steps=FOREVER,
            batch_size=16,
        ),
    }


# --- data ---


def phantoms(kind, n, size, seed):
    "Phantoms with sketches"
    return add_sketches(phantom_data(kind, n, size, seed), style=kind)


def drawn(pool, kind, n, size, first):
    "Many of them, a hundred at a time on each core"
    parts = [(kind, min(100, n - i), size, first + i) for i in range(0, n, 100)]
    return join(*pool.map(phantoms, *zip(*parts)))


# --- training by the clock ---


class Clock(Callback):
    "Counts seconds of training, over several runs too; saves once a minute, and stops as a signal would"

    def __init__(self, minutes):
        self.most, self.spent, self.over = 60 * minutes, 0.0, False

    def before_fit(self, trainer):
        self.last = self.saved = time.monotonic()

    def after_step(self, trainer):
        now = time.monotonic()
        self.spent, self.last, self.step, self.losses = self.spent + now - self.last, now, trainer.step, trainer.losses
        self.over = self.spent >= self.most
        if self.over:
            trainer.stop.first = 'the clock'
        elif now - self.saved >= 60:
            self.saved = now
            saved = [s for c in trainer.callbacks if c is not self and (s := c.interrupt(trainer))]
            losses = ', '.join(f'{k} {v.item():.3f}' for k, v in self.losses.items())
            print(f'{self.spent:.0f} s, step {self.step}: {losses}; saved {saved[0]}', flush=True)
            self.last = time.monotonic()

    def state_dict(self):
        return {'spent': self.spent}

    def load_state_dict(self, state):
        self.spent = state['spent']


def train(name, recipe, data, a):
    "Fit until the clock stops it, or take up what is there; what it took"
    weights, note = a.out / f'{name}.safetensors', a.out / f'{name}.json'
    if note.exists():
        recipe.load_weights(weights).to(default_device())
        return json.loads(note.read_text())
    clock, only = Clock(a.minutes), {'skrgan': ['render']}.get(name)
    half = {'mixed_precision': 'bf16'} if default_device().type == 'cuda' else {}
    try:
        recipe.fit(data, a.out / name, stages=only, callbacks=[clock], every=FOREVER, progress=False, **half)
    except KeyboardInterrupt:
        if not clock.over:
            raise
    recipe.ema.reestimate()  # batch norm, which a training that ends by itself does at its end
    for n, average in recipe.ema.nets.items():
        recipe.nets[n].load_state_dict(average.state_dict())
    recipe.save(weights, half=True)
    count = lambda nets: sum(p.numel() for n in nets for p in n.parameters())
    took = {
        'parameters': count(recipe.shared.values()),
        'parameters_in_training': count(recipe.nets[n] for n in recipe.learned),
        'steps': clock.step,
        'batch': recipe.config['batch_size'],
        'seconds': round(clock.spent),
        'device': device_name(),
        'torch': torch.__version__,
        'weights_mb': round(weights.stat().st_size / 1e6, 1),
        'loss': {k: round(v.item(), 4) for k, v in clock.losses.items()},
    }
    write(note, took)
    return took


def device_name():
    if default_device().type == 'cuda':
        return torch.cuda.get_device_name()
    return f'CPU, {torch.get_num_threads()} thread' + 's' * (torch.get_num_threads() > 1)


def write(path, what):
    with atomic_write(path, 'w') as f:
        f.write(json.dumps(what, indent=1) + '\n')


# --- scores ---


def best_of_three(draw, sketch):
    "Seconds for one image"
    times = []
    for _ in range(3):
        begun = time.monotonic()
        draw(sketch)
        times.append(time.monotonic() - begun)
    return min(times)


def score(draw, test):
    "The package's scores of rendered images, beside those that were meant"
    batch, eyes = test.batch(range(len(test))), thumbnails()
    sketches, real = batch['sketch'], batch['image']
    vessels = test.masks == test.classes.index('vessel') if 'vessel' in test.classes else None
    begun = time.monotonic()
    made = draw(sketches)
    took = time.monotonic() - begun
    found = {'ms_ssim': ms_ssim(real, made), 'swd': swd(real, made)['mean'], 'fid': fid(eyes(real), eyes(made))}
    found |= render_scores(draw, sketches, real, vessels)
    found |= {'seconds_an_image': took / len(test), 'seconds_for_one': best_of_three(draw, sketches[:1])}
    return {k: round(float(v), 5) for k, v in found.items()}


def draws(recipes):
    "{row of the table: sketches -> images}"
    out = {'SkrGAN': lambda s: recipes['skrgan'].render(s).cpu()}
    for k in DDIM_STEPS:
        out[f'diffusion, {k} steps'] = lambda s, k=k: recipes['diffusion'].render(s, steps=k).cpu()
    return out


def table(recipes, took, test, other, a):
    "Everything that the page shows; `other` are further real images, which set what a score can reach"
    real, more = (d.batch(range(len(d)))['image'] for d in (test, other))
    eyes, sketches = thumbnails(), test.batch(range(len(test)))['sketch']
    rows = {name: score(draw, test) for name, draw in draws(recipes).items()}
    twice = [recipes['diffusion'].render(sketches, seed=k).cpu() for k in (0, 1)]
    return {
        'data': a.data,
        'test': len(test),
        'size': a.size,
        'minutes': a.minutes,
        'scored_on': device_name(),
        'systems': took,
        'rows': rows,
        'real': {'swd': swd(real, more)['mean'], 'fid': fid(eyes(real), eyes(more))},
        'two_noises': (twice[0] - twice[1]).abs().mean().item(),
    }


def strip(recipes, test, n=8):
    "Sketches, what becomes of them, and the images that were meant"
    batch = test.batch(range(n))
    s, (slow, skrgan) = batch['sketch'], (recipes[k] for k in ('diffusion', 'skrgan'))
    rows = {
        'sketch': [*map(sketch_to_uint8, s)],
        'SkrGAN': skrgan.render(s).cpu(),
        'diffusion': slow.render(s).cpu(),
        'other noise': slow.render(s, seed=1).cpu(),
        'real': batch['image'],
    }
    return add_labels(enlarge(grid([x for row in rows.values() for x in row], n), 1000), list(rows))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder for all that is made')
    p.add_argument('--minutes', type=float, default=4, help='of training, for each of the two')
    p.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    p.add_argument('--data', default='phantoms:fundus:2000', help='phantoms:KIND:N')
    p.add_argument('--size', type=int, default=64, help='pixels')
    p.add_argument('--width', type=int, default=64, help='feature maps of the diffusion U-Net')
    p.add_argument('--batch', type=int, default=64, help='pairs in a batch of the diffusion model')
    p.add_argument('--lr', type=float, default=5e-4, help='learning rate of the diffusion model')
    p.add_argument('--test', type=int, default=200, help='images to score with, which nothing was trained on')
    p.add_argument('--only', choices=('diffusion', 'skrgan'), help='train this one, and score nothing')
    run(p.parse_args())


def run(a):
    if a.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    elif not torch.cuda.is_available():
        raise SystemExit('no GPU here: --device cpu')
    warnings.filterwarnings('ignore', 'MS-SSIM at')  # three of five scales at 64 px
    a.out.mkdir(parents=True, exist_ok=True)
    _, kind, n = a.data.split(':')
    with ProcessPoolExecutor() as pool:  # forked before anything is on the GPU
        data, test, other = (
            drawn(pool, kind, k, a.size, first) for k, first in ((int(n), 10**6), (a.test, 0), (a.test, 10**5))
        )
    recipes, took = systems(a, data.channels), {}
    for name in [a.only] if a.only else recipes:
        took[name] = train(name, recipes[name], data, a)
        print(name, took[name], flush=True)
    if a.only:
        return
    save_png(a.out / 'strip.png', strip(recipes, test))
    found = table(recipes, took, test, other, a)
    write(a.out / 'table.json', found)
    for name, row in found['rows'].items():
        print(name, row)


if __name__ == '__main__':
    main()
