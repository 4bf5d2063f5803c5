"""Training steps of the two network pairs, and rendering, in float32 and bfloat16."""

import torch

from benchmarks.common import Flops, Row, alone, best, peak_memory
from medsketch.core import keep_memory, seed_everything
from medsketch.models.patchgan import PatchDiscriminator
from medsketch.models.pggan import PGDiscriminator, PGGenerator
from medsketch.models.unet import UNetRenderer
from medsketch.train.losses import (
    gradient_penalty,
    l1,
    logistic_d,
    logistic_g,
    wgan_d,
    wgan_drift,
    wgan_g,
)


def adam(net, lr, betas):
    return torch.optim.Adam(net.parameters(), lr, betas, fused=True)


def autocast(bf16):
    return torch.autocast('cpu', torch.bfloat16, enabled=bf16)


def update(loss, opt):
    loss.backward()
    opt.step()
    opt.zero_grad()


def pggan_step(size, batch, bf16, channels=3, latent=512, fmaps=None):
    "One discriminator and one generator update, WGAN-GP"
    G = PGGenerator(size, channels, latent, fmaps=fmaps)
    D = PGDiscriminator(size, channels, fmaps=fmaps)
    opt_g, opt_d = (adam(net, 1e-3, (0.0, 0.99)) for net in (G, D))
    real = torch.rand(batch, channels, size, size) * 2 - 1

    def step():
        with autocast(bf16):
            with torch.no_grad():
                fake = G(torch.randn(batch, G.latent_dim)).float()
            logits = D(real)
            loss = wgan_d(logits, D(fake)) + wgan_drift(logits) + 10 * gradient_penalty(D, real, fake)
        update(loss, opt_d)
        D.requires_grad_(False)
        with autocast(bf16):
            loss = wgan_g(D(G(torch.randn(batch, G.latent_dim))))
        update(loss, opt_g)
        D.requires_grad_(True)

    return step, (G, D)


def renderer_step(size, batch, bf16):
    "One discriminator and one generator update, logistic loss and L1"
    G, D = UNetRenderer(size, 3, 3), PatchDiscriminator(6)
    opt_g, opt_d = (adam(net, 2e-4, (0.5, 0.999)) for net in (G, D))
    a, b = (torch.rand(batch, 3, size, size) * 2 - 1 for _ in range(2))

    def step():
        with autocast(bf16):
            y = G(a)
            loss = logistic_d(D(b, a), D(y.detach(), a))
        update(loss, opt_d)
        D.requires_grad_(False)
        with autocast(bf16):
            loss = logistic_g(D(y, a)) + 100 * l1(y, b)
        update(loss, opt_g)
        D.requires_grad_(True)

    return step, (G, D)


def measure_step(make, size, batch, bf16, threads):
    "(seconds, FLOPs, parameters, GB) of one step"
    keep_memory(), torch.set_num_threads(threads), seed_everything(0)
    step, nets = make(size, batch, bf16)
    with Flops() as flops:
        step()
    seconds = best(step, repeats=3, warmup=0)  # the counted step warmed up
    return seconds, flops.total, [sum(p.numel() for p in net.parameters()) for net in nets], peak_memory()


def measure_render(bf16, threads):
    "(seconds, FLOPs, parameters, GB) of rendering one 256 px image"
    keep_memory(), torch.set_num_threads(threads), seed_everything(0)
    net, dtype = UNetRenderer(256, 3, 3), torch.bfloat16 if bf16 else torch.float32
    fast, x = net.for_inference(dtype), torch.rand(1, 3, 256, 256)
    with torch.inference_mode():
        with Flops() as flops:
            fast(x)
        return best(lambda: fast(x), repeats=30), flops.total, [sum(p.numel() for p in net.parameters())], peak_memory()


STEPS = [  # name, step, size, batch, target s/image in float32 and in bfloat16
    ('PGGAN step 64 px', pggan_step, 64, 8, 0.80, 0.45),
    ('PGGAN step 256 px', pggan_step, 256, 2, 1.8, 1.0),
    ('renderer step 256 px', renderer_step, 256, 2, 0.26, 0.18),
]


def row(name, unit, target, per, bf16, peak, seconds, flops, params, memory):
    value = seconds / per * (1000 if unit == 'ms' else 1)
    size = ' + '.join(f'{p / 1e6:.1f} M' for p in params)
    note = (
        f"{size} parameters, {flops / per / 1e9:.0f} GFLOP and {per / seconds:.1f} images/s, "
        f"{flops / seconds / 1e9 / peak:.0%} of peak, {memory:.1f} GB"
    )
    return Row(f"{name}, {'bf16' if bf16 else 'fp32'}", value, unit, target, note)


def rows(peak):
    threads = torch.get_num_threads()
    step = lambda *args: alone(measure_step, *args, threads)
    out = [
        row(name, 's/image', targets[bf16], batch, bf16, peak, *step(make, size, batch, bf16))
        for name, make, size, batch, *targets in STEPS
        for bf16 in (False, True)
    ]
    # float32 is for comparison: bfloat16 renders the same pixels to about one 8-bit level (nbs/04_models/03_unet.ipynb)
    return out + [
        row('render 256 px', 'ms', 40 if bf16 else None, 1, bf16, peak, *alone(measure_render, bf16, threads))
        for bf16 in (False, True)
    ]
