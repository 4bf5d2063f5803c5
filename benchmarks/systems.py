"""Steps of the medical PGGAN and PGSgan at the papers' widths, and what Sketch2MedI costs, in float32."""

from functools import partial
from types import SimpleNamespace

import torch

from benchmarks.common import Flops, Row, alone, best, peak_memory
from benchmarks.models import pggan_step, row, update
from medsketch.core import keep_memory, seed_everything
from medsketch.recipes import PGSgan, Sketch2MedI
from medsketch.recipes.pggan import MEDICAL

SIZE, BATCH = 256, 2
SHARES = {'PGGAN': 50, 'PGSgan': 60}  # % of the convolution peak, at least
ORIGINAL = {'E': 0.48, 'H': 0.51}  # s a pass, with 209 M and 313 M weights
RENDER = {0: 0.6, 3: 1.5}  # s for one sketch at 256 px: {refinement steps: at most}


def start(threads):
    keep_memory(), torch.set_num_threads(threads), seed_everything(0)


def learning(r):
    "The recipe's networks as they are while they learn, with their names"
    return SimpleNamespace(**{k: n.to(memory_format=torch.channels_last).train() for k, n in r.nets.items()})


def one_step(phases, nets, batch, learners):
    "What the trainer does in a step: each phase's loss, backwards, and its optimiser"

    def step():
        for p in phases:
            for name in learners:
                getattr(nets, name).requires_grad_(name == p.name)
            loss = p.loss(nets, batch)
            update(sum(loss.values()) if isinstance(loss, dict) else loss, p.opt)

    return step


def pgsgan_step(size, batch):
    "One update of both networks, in the phase before anything grows"
    r = PGSgan(size=size, start=size, channels=1, classes=3)
    nets, mask = learning(r), torch.randint(3, (batch, size, size))
    made = {'image': torch.rand(batch, 1, size, size) * 2 - 1, 'mask': mask}
    made['condition'] = r.condition(mask, torch.rand(batch, 1, size, size))
    return one_step(r.stages(None)[0].phases, nets, made, ('G_P', 'D_P')), (nets.G_P, nets.D_P)


def medical_step(size, batch):
    "Beers et al.'s networks on RGB and a map of vessels"
    return pggan_step(size, batch, False, channels=4, latent=128, fmaps=MEDICAL)


def stage_step(name):
    "A step of Sketch2MedI's encoder or hyper-network"

    def make(size, batch):
        r = Sketch2MedI(size=size, batch_size=batch)
        (stage,) = (s for s in (r.encoder_stage(None, 1), r.refine_stage(None, 1)) if s.name == name)
        nets = learning(r)
        for other in set(r.nets) - set(stage.learns):
            getattr(nets, other).eval().requires_grad_(False)
        batch = {'image': torch.rand(batch, 3, size, size) * 2 - 1, 'sketch': torch.rand(batch, 1, size, size)}
        phases = [p for p in stage.phases if p.every == 1]
        return one_step(phases, nets, batch, stage.learns), [getattr(nets, stage.learns[0])]

    return make


MAKERS = {'PGGAN': medical_step, 'PGSgan': pgsgan_step, 'E': stage_step('encoder'), 'H': stage_step('refine')}


def measure_step(name, threads):
    "(seconds, FLOPs, parameters, GB) of a step"
    start(threads)
    step, nets = MAKERS[name](SIZE, BATCH)
    with Flops() as flops:
        step()
    seconds = best(step, repeats=3, warmup=0)
    return seconds, flops.total, [sum(p.numel() for p in net.parameters()) for net in nets], peak_memory()


@torch.inference_mode()
def measure_ultrasound(threads):
    "Seconds for one image of 512 px, ready to draw"
    start(threads)
    G = PGSgan(size=512, channels=1, classes=3).nets['G_P'].eval().to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, 512, 512)
    return best(lambda: G(x, 0.5))


@torch.inference_mode()
def measure_sketch2medi(threads):
    "Seconds of a pass of E and of H, and of rendering one sketch with each number of steps"
    start(threads)
    r = Sketch2MedI(size=SIZE)
    nets = {k: r.nets[k].eval().to(memory_format=torch.channels_last) for k in r.inference}
    sketch, image = torch.rand(1, 1, SIZE, SIZE), torch.rand(1, 3, SIZE, SIZE)
    r.learned = set(nets)
    passes = {'E': best(lambda: nets['E'](sketch)), 'H': best(lambda: nets['H'](sketch, image))}
    weights = {k: sum(p.numel() for p in nets[k].parameters()) for k in passes}
    return passes, weights, {t: best(partial(r.render, sketch, t), repeats=3) for t in RENDER}


def rows(peak):
    threads = torch.get_num_threads()
    out = []
    for name in MAKERS:
        seconds, flops, *more = alone(measure_step, name, threads)
        out.append(row(f'{name} step {SIZE} px', 's/image', None, BATCH, False, peak, seconds, flops, *more))
        if name in SHARES:
            share = 100 * flops / seconds / 1e9 / peak
            out.append(Row(f'{name}: share of the convolution peak', share, '%', SHARES[name], more=True))
    out.append(Row('PGSgan image 512 px', alone(measure_ultrasound, threads), 's', 0.6))
    passes, weights, render = alone(measure_sketch2medi, threads)
    for name, seconds in passes.items():
        note = f'{weights[name] / 1e6:.0f} M parameters'
        out.append(Row(f'Sketch2MedI: pass of {name}, {SIZE} px', seconds, 's', ORIGINAL[name], note))
    for t, most in RENDER.items():
        out.append(Row(f'Sketch2MedI: one sketch, {SIZE} px, {t} steps', render[t], 's', most))
    return out
