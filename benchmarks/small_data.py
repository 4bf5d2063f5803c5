"""What pays on small data: one sketch generator and one DCGAN on 29 and 155 real views, 64 px, the same steps each.

    python benchmarks/small_data.py train --data DIR                      # every cell without a result, on one thread
    python benchmarks/small_data.py train --data DIR --only skrgan/155/   # only the cells whose name begins so
    python benchmarks/small_data.py report                                # table.json and strips of samples

DIR holds retina/chasedb1 and retina/hrf (CHASE_DB1, Fraz et al. 2012; HRF, Budai et al. 2013), as `medsketch pretrain`
wants them. Each cell writes NAME.json, NAME.png (64 samples) and NAME.pt (128 samples) under --out; what is there is
not made again.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from medsketch.core import (
    atomic_write,
    grid,
    keep_memory,
    save_png,
    seed_everything,
    torch_rng,
)
from medsketch.data import phantom_data
from medsketch.evaluate.distances import fid
from medsketch.evaluate.features import thumbnails
from medsketch.evaluate.metrics import swd
from medsketch.models.dcgan import DCDiscriminator, DCGenerator
from medsketch.models.pggan import PGDiscriminator, PGGenerator
from medsketch.pretrained import pretraining_data
from medsketch.sketch import add_sketches
from medsketch.train.augment import Augmented, DiffAugment
from medsketch.train.losses import adversarial, r1_penalty

SIZE, SAMPLES = 64, 128
SKRGAN = {
    'system': 'skrgan',
    'images': 155,
    'steps': 600,
    'batch': 12,
    'latent': 64,
    'base': 256,
    'most': 64,
    'lr': 3e-3,
    'betas': (0.0, 0.99),
    'loss': 'logistic',
    'r1': 1.0,
    'r2': 0.0,
    'every': 8,
    'policy': None,
    'ada': None,
    'start': None,
    'growth': False,
    'norm': 'batch',
    'seed': 1,
}
DCGAN = SKRGAN | {
    'system': 'dcgan',
    'steps': 500,
    'base': 16,
    'most': 128,
    'lr': 1e-3,
    'betas': (0.5, 0.999),
    'r1': 0.0,
}

MOVES, PAIRED = {'policy': 'translate,cutout'}, {'loss': 'relativistic', 'r1': 1.0, 'r2': 1.0}
CONDITIONS = {
    'plain': {},
    'diffaug': MOVES,
    'ada': MOVES | {'ada': 0.6},
    'relativistic': PAIRED,
    'relativistic_diffaug': PAIRED | MOVES,
    'relativistic_ada': PAIRED | MOVES | {'ada': 0.6},
    'phantoms': {'start': 'phantoms'},
}
SETTINGS = {
    'growth': {'growth': True},
    'lr_1e3': {'lr': 1e-3},
    'wide': {'base': 512, 'most': 96},
    'r1_every_16': {'every': 16},
}


def cells():
    "{name: settings}, in the order in which they are trained"
    out = {}
    for base in (SKRGAN, DCGAN):
        for n in (155, 29):
            for name, changes in CONDITIONS.items():
                out[f"{base['system']}/{n}/{name}"] = base | changes | {'images': n}
    for name, changes in SETTINGS.items():
        out[f'skrgan/155/{name}'] = SKRGAN | changes
    for name, changes in (CONDITIONS | SETTINGS).items():  # a second seed: how much is chance?
        out[f'skrgan/155/{name}_again'] = SKRGAN | changes | {'seed': 2}
    return out | {
        'dcgan/155/no_norm': DCGAN | {'norm': 'none', 'r1': 1.0},
        'dcgan/155/relativistic_no_norm': DCGAN | PAIRED | {'norm': 'none'},
    }


# --- data ---


def views(folder):
    "Real views to train on and to hold back (no subject on both sides), with sketches; and the 29 of the small set"
    train, held = (add_sketches(d, style='fundus') for d in pretraining_data('fundus', folder, SIZE))
    rng, photographs = np.random.default_rng(0), sorted(set(train.paths))
    of = {p: [i for i, q in enumerate(train.paths) if q == p] for p in photographs}
    small = sorted(int(rng.choice(of[p])) for p in rng.permutation(photographs)[:29])  # one view of each
    return train, held, small


def planes(data, system):
    "(N, C, H, W) in [-1, 1]: what this system draws"
    batch = data.batch(range(len(data)))
    return batch['sketch'] * 2 - 1 if system == 'skrgan' else batch['image']


def phantoms(system):
    "The same plane of 400 phantoms"
    data = phantom_data('fundus', 400, SIZE)
    return planes(add_sketches(data, style='fundus') if system == 'skrgan' else data, system)


# --- training ---


def networks(c):
    "G and D of a cell"
    torch.manual_seed(c['seed'] - 1)
    if c['system'] == 'dcgan':
        return (
            DCGenerator(SIZE, 3, c['latent'], c['base'], c['most']),
            DCDiscriminator(SIZE, 3, c['base'], c['most'], norm=c['norm']),
        )
    G, D = PGGenerator(SIZE, 1, c['latent'], c['base'], c['most']), PGDiscriminator(SIZE, 1, c['base'], c['most'])
    for layer in G.to_image:
        torch.nn.init.constant_(layer.bias, -1.0)  # starts from white paper
    return G, D


def stage(c, step):
    "Size and fade of a step: all at the last size, or 4 to 32 px in the first 30 % of the steps, each fading in"
    if not c['growth']:
        return SIZE, 1.0
    at, ends = step / c['steps'], (0, 0.02, 0.06, 0.14, 0.3, 1.0)
    i = max(k for k in range(5) if at >= ends[k])
    fade = 1.0 if i == 0 else min(1.0, (at - ends[i]) / min(0.08, (ends[i + 1] - ends[i]) / 2))
    return 4 << i, fade


def shrink(x, size, alpha):
    "Real planes at the size grown to"
    if size < SIZE:
        x = F.avg_pool2d(x, SIZE // size)
    return x if alpha == 1 else torch.lerp(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), x, alpha)


def d_loss(c, D, seen, aug, real, fake, step):
    "D's loss with what the cell adds to it"
    r, f = seen(real), seen(fake)
    if c['ada']:
        aug.see(r - f if c['loss'] == 'relativistic' else r)
    loss = adversarial(c['loss'])[0](r, f)
    if step % c['every']:
        return loss
    for weight, x in ((c['r1'], real), (c['r2'], fake)):
        if weight:
            loss = loss + weight / 2 * c['every'] * r1_penalty(seen, x)
    return loss


def train(c, x, start=None):
    "Train a cell on planes `x`; gives G's running mean, both networks' weights, p at the end, seconds a step"
    seed_everything(c['seed'])
    G, D = networks(c)
    if start:
        G.load_state_dict(start['G']), D.load_state_dict(start['D'])
    ema = {k: v.clone() for k, v in G.state_dict().items()}
    opt_g, opt_d = (torch.optim.Adam(n.parameters(), c['lr'], c['betas'], fused=True) for n in (G, D))
    picture = {'kinds': 'picture'} if c['system'] == 'dcgan' else {'kinds': 'sketch', 'fill': -1}
    aug = DiffAugment(c['policy'], target=c['ada'], **picture) if c['policy'] else None
    began = time.process_time()
    for step in range(c['steps']):
        size, alpha = stage(c, step)
        fade = {} if c['system'] == 'dcgan' else {'alpha': alpha}
        seen = lambda y, fade=fade: Augmented(D, aug)(y, **fade)
        real = x[torch.randint(len(x), (c['batch'],))]
        real = shrink(torch.where(torch.rand(c['batch'], 1, 1, 1) < 0.5, real, real.flip(-1)), size, alpha)
        z = torch.randn(c['batch'], c['latent'])
        fake = G(z) if c['system'] == 'dcgan' else G(z, size, alpha)
        D.requires_grad_(False)
        logits = seen(real).detach() if c['loss'] == 'relativistic' else None
        adversarial(c['loss'])[1](logits, seen(fake)).backward()
        opt_g.step(), opt_g.zero_grad(), D.requires_grad_(True)
        d_loss(c, D, seen, aug, real, fake.detach(), step).backward()
        opt_d.step(), opt_d.zero_grad()
        if c['ada'] and step % 4 == 3:
            aug.adapt(4 / (c['steps'] / 4))  # p may go from 0 to 1 in a quarter of the steps
        weight = max(0.004, 1 / (step / 10 + 1))
        for k, v in G.state_dict().items():
            ema[k].lerp_(v, weight) if v.is_floating_point() else ema[k].copy_(v)
    return {
        'ema': ema,
        'G': G.state_dict(),
        'D': D.state_dict(),
        'p': float(aug.p) if aug else 0.0,
        'seconds': (time.process_time() - began) / c['steps'],
    }


@torch.no_grad()
def draw(c, weights):
    "Samples of the averaged generator, from fixed noise; batch norm uses the statistics of the batch"
    G, _ = networks(c)
    G.load_state_dict(weights)
    z = torch.randn(SAMPLES, c['latent'], generator=torch_rng(7))
    return torch.cat([G(part) for part in z.split(32)]).clamp(-1, 1)


# --- measures ---


def sameness(x):
    "Mean correlation of the pixels of two different samples"
    v = x[:SAMPLES].flatten(1)
    c = torch.corrcoef(v.double())
    return ((c.sum() - c.trace()) / (c.numel() - len(c))).item()


def nearest(x, to):
    "Distance of each to the nearest of `to` or its mirror image, on 16 px thumbnails"
    small = lambda y: F.adaptive_avg_pool2d(y, 16).flatten(1)
    return torch.cdist(small(x), small(torch.cat([to, to.flip(-1)]))).amin(1)


def halves(subjects, n=10):
    "Random halves of the images, no subject in both"
    names, rng = sorted(set(subjects)), np.random.default_rng(0)
    for _ in range(n):
        order = {s: k for k, s in enumerate(rng.permutation(names))}
        left = [i for i, s in enumerate(subjects) if order[s] < len(names) / 2]
        yield left, [i for i in range(len(subjects)) if i not in set(left)]


def scores(made, real, subjects):
    "FID (thumbnails) and SWD of halves of the real set to as many samples; to the other half if `made` is None"
    out, features = [], thumbnails()
    for left, right in halves(subjects):
        n = min(len(left), len(right))
        a, b = real[left[:n]], real[right[:n]] if made is None else made[:n]
        out.append((fid(features(a), features(b)), swd(a, b)['mean']))
    return [float(v) for v in np.mean(out, 0)]


def measure(made, trained, real, held, subjects):
    "What the table shows of one cell"
    f, s = scores(made, real, subjects)
    limit = nearest(held, trained).quantile(0.05)
    copies = (nearest(made, trained) < limit).float().mean().item()
    return {'fid': f, 'swd': s, 'sameness': sameness(made), 'copies': copies}


# --- the run ---


def run(folder, out, only):
    keep_memory(), torch.set_num_threads(1)
    data, held, small = views(folder)
    pick = {155: list(range(len(data))), 29: small}
    for system in ('skrgan', 'dcgan'):
        real = planes(data, system)
        f, s = scores(None, real, data.subjects)
        base = {'fid': f, 'swd': s, 'sameness': sameness(real), 'copies': 0.05}
        save(out / f'{system}/real', base, real[torch.randperm(len(real), generator=torch_rng(3))[:SAMPLES]])
    for name, c in ((n, c) for begins in only for n, c in cells().items() if n.startswith(begins)):
        path = out / name
        if path.with_suffix('.json').exists():
            continue
        real, spare = planes(data, c['system']), planes(held, c['system'])
        done = train(c, real[pick[c['images']]], pretrained(c, out))
        made = draw(c, done['ema'])
        row = measure(made, real[pick[c['images']]], real, spare, data.subjects)
        save(path, row | {'p': done['p'], 'seconds': done['seconds'], 'settings': c}, made)
        print(name, {k: round(v, 3) for k, v in row.items()}, f"{done['seconds'] * 1e3:.0f} ms a step", flush=True)


def pretrained(c, out):
    "The networks after the same number of steps on phantoms, trained once for each system"
    if c['start'] != 'phantoms':
        return None
    path = out / f"{c['system']}/phantom_weights.pt"
    if not path.exists():
        plain = (SKRGAN if c['system'] == 'skrgan' else DCGAN) | {'steps': c['steps']}
        done = train(plain, phantoms(c['system']))
        with atomic_write(path) as f:
            torch.save({k: done[k] for k in 'GD'}, f)
    return torch.load(path, weights_only=True)


def save(path, row, samples):
    "Samples, their picture, and then the numbers, so that numbers mean that all is there"
    kind = {'kind': 'sketch'} if samples.shape[1] == 1 else {}
    shown = (samples + 1) / 2 if kind else samples
    with atomic_write(path.with_suffix('.pt')) as f:
        torch.save(samples.half(), f)
    save_png(path.with_suffix('.png'), grid(shown[:64], 16, **kind))
    with atomic_write(path.with_suffix('.json'), 'w') as f:
        json.dump(row, f, indent=1)


def report(out):
    "table.json with every result, and one strip of samples for each cell"
    names = [f'{s}/real' for s in ('skrgan', 'dcgan')] + list(cells())
    rows = {n: json.loads((out / f'{n}.json').read_text()) for n in names if (out / f'{n}.json').exists()}
    with atomic_write(out / 'table.json', 'w') as f:
        json.dump(rows, f, indent=1)
    for part in sorted({'/'.join(n.split('/')[:-1]) for n in rows if n.count('/') == 2}):
        of = [f"{part.split('/')[0]}/real"] + [n for n in rows if n.startswith(part + '/') and not n.endswith('_again')]
        of = [n for m in of for n in (m, f'{m}_again') if n in rows]  # both seeds one below the other
        strips = [strip(out, n) for n in of]
        with atomic_write(out / f"{part.replace('/', '_')}.jpg") as f:
            Image.fromarray(np.concatenate(strips)).save(f, 'JPEG', quality=80)


def strip(out, name, n=16):
    "One row of samples under its name"
    x = torch.load(out / f'{name}.pt', weights_only=True).float()[:n]
    row = grid(((x + 1) / 2) if x.shape[1] == 1 else x, n, **({'kind': 'sketch'} if x.shape[1] == 1 else {}))
    label = Image.new('RGB', (row.shape[1], 16), 'white')
    words = name.split('/')
    shown = words[-1].replace('_again', ' (second seed)').replace('_', ' ')
    if len(words) == 3:
        shown = f'{words[0]} · {words[1]} views · {shown}'
    ImageDraw.Draw(label).text((2, 2), shown, fill='black', font=ImageFont.load_default(12))
    return np.concatenate([np.asarray(label), row, np.full((4, row.shape[1], 3), 255, np.uint8)])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('train', 'report'))
    p.add_argument('--data', type=Path, help='folder with retina/chasedb1 and retina/hrf')
    p.add_argument('--out', type=Path, default=Path('runs/small_data'))
    p.add_argument('--only', nargs='*', default=[''], help='cells whose name begins so, in this order')
    a = p.parse_args()
    if a.what == 'train' and a.data is None:
        p.error('train needs --data')
    if a.what == 'train':
        run(a.data, a.out, a.only)
    report(a.out)


if __name__ == '__main__':
    main()
