"""StyleGAN2: a step with its lazy penalties spread over the steps between them, and drawing images."""

from types import SimpleNamespace

import torch

from benchmarks.common import Flops, Row, alone, best, peak_memory
from medsketch.core import keep_memory, seed_everything
from medsketch.recipes import StyleGAN2

STEPS = [  # size, batch, target s/image in float32
    (64, 8, 0.70),
    (256, 2, 1.7),
]
DRAW = 0.15  # s/image at 256 px, batch 8


def update(phase, nets, batch, own, other):
    "Loss, backward and optimiser of one phase"
    own.requires_grad_(True), other.requires_grad_(False)
    loss = phase.loss(nets, batch)
    (loss * phase.factor).backward()
    phase.opt.step()
    phase.opt.zero_grad()


def measure_step(size, batch, threads):
    "({phase: seconds}, FLOPs of a step with its share of lazy phases, parameters, GB)"
    keep_memory(), torch.set_num_threads(threads), seed_everything(0)
    r = StyleGAN2(size=size, batch_size=batch)
    nets = SimpleNamespace(**{k: n.to(memory_format=torch.channels_last).train() for k, n in r.nets.items()})
    phases = r.game().phases(*(r.optimiser(r.nets[n].parameters()) for n in 'GD'))
    images = (torch.rand(batch, 3, size, size) * 2 - 1).contiguous(memory_format=torch.channels_last)
    seconds, total, made = {}, 0.0, {'image': images}
    for p in phases:
        own, other = (nets.G, nets.D) if p.name in ('G', 'PL') else (nets.D, nets.G)
        run = lambda: update(p, nets, made, own, other)  # noqa: B023 (called at once)
        with Flops() as flops:
            run()
        total += flops.total / p.every
        seconds[p.name] = best(run, repeats=3, warmup=0) / p.every
    return seconds, total, sum(w.numel() for n in r.nets.values() for w in n.parameters()), peak_memory()


def measure_draw(size, batch, threads):
    "(seconds, FLOPs) of a forward pass of the generator"
    keep_memory(), torch.set_num_threads(threads), seed_everything(0)
    G, z = StyleGAN2(size=size).nets['G'].to(memory_format=torch.channels_last), torch.randn(batch, 512)
    with torch.inference_mode():
        with Flops() as flops:
            G(z)
        return best(lambda: G(z), repeats=3), flops.total


def rows(peak):
    out, threads = [], torch.get_num_threads()
    for size, batch, target in STEPS:
        seconds, flops, params, memory = alone(measure_step, size, batch, threads)
        total, parts = sum(seconds.values()), ', '.join(f'{k} {v / batch:.2f}' for k, v in seconds.items())
        note = (
            f'{params / 1e6:.1f} M parameters, {flops / batch / 1e9:.0f} GFLOP an image, '
            f'{flops / total / 1e9 / peak:.0%} of peak, {memory:.1f} GB; s/image: {parts}'
        )
        out.append(Row(f'StyleGAN2 step {size} px, batch {batch}', total / batch, 's/image', target, note))
    seconds, flops = alone(measure_draw, 256, 8, threads)
    note = f'{flops / 8 / 1e9:.0f} GFLOP an image, {flops / seconds / 1e9 / peak:.0%} of peak'
    return [*out, Row('StyleGAN2 forward 256 px, batch 8', seconds / 8, 's/image', DRAW, note)]
