"""StyleGAN2's networks against the authors' stored numbers, and at their edges."""

import pytest
import torch
import torch.nn.functional as F
from references import arrays, close

from medsketch.models.layers import MinibatchStd, conv
from medsketch.models.resample import blur, double, halve
from medsketch.models.stylegan2 import StyleGenerator, demodulation, mix_styles, modulated_conv
from medsketch.models.stylegan2_d import FilteredConv2d, ResidualDiscriminator
from medsketch.train.losses import path_lengths, path_penalty, r1_penalty


@pytest.fixture(scope='module')
def refs():
    "The stored arrays"
    return arrays('stylegan2_ada')


def tiny(size=16, channels=3, **kwargs):
    "A small pair"
    width = {'fmap_base': 64, 'fmap_max': 8}
    G = StyleGenerator(size, channels, latent_dim=8, w_dim=8, **width, **kwargs)
    return G, ResidualDiscriminator(size, channels, **width)


# ---- one operation at a time -----------------------------------------------------------------


def test_resampling(refs):
    q = refs['q']
    close(double(q), refs['uf_up'])
    close(halve(q), refs['uf_down'])
    close(blur(q, 2)[..., :8, :8], refs['uf_blur'])  # the authors pad two before and one after


def test_modulated_convolution(refs):
    q, w, s = refs['q'], refs['W'], refs['s']
    d = demodulation(w, s)[:, :, None, None]
    close(modulated_conv(q, w, s) * d, refs['mc_plain'])
    close(modulated_conv(q, w, s), refs['mc_nodemod'])
    up = w.transpose(0, 1)
    close(demodulation(up, s, transposed=True)[:, :, None, None], d)
    close(modulated_conv(q, up, s, up=True) * d, refs['mc_up'])
    close(conv(blur(q * s[:, :, None, None], 2), w, stride=2) * d, refs['mc_down'])


def test_activation_and_minibatch_std(refs):
    q = refs['q']
    layer = FilteredConv2d(3, 3, 1).double()
    with torch.no_grad():
        layer.weight.copy_((torch.eye(3) / layer.scale)[:, None, None])
        layer.bias.copy_(torch.arange(3))
    close(layer(q), refs['ba'])
    assert torch.equal(MinibatchStd()(refs['x'])[:, :3], refs['x'])
    close(MinibatchStd()(refs['x']), refs['mbstd'])


# ---- at the edges ----------------------------------------------------------------------------


@pytest.mark.parametrize('size', [4, 8, 32])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_shapes_and_gradients(size, channels):
    G, D = tiny(size, channels)
    z = torch.randn(3, 8)
    x = G(z, noise='random')
    assert x.shape == (3, channels, size, size) and D(x).shape == (3, 1)
    D(x).sum().backward()
    assert not [n for n, p in [*G.named_parameters(), *D.named_parameters()] if p.grad is None]


def test_a_sample_does_not_depend_on_its_company():
    G, _ = tiny()
    z = torch.randn(4, 8)
    with torch.no_grad():
        close(G(z)[2:3], G(z[2:3]), 1e-5)
        assert torch.equal(G(z), G(z))
        G.synthesis.first.strength.fill_(1.0)
        assert not torch.equal(G(z, noise='random'), G(z, noise='random'))
        assert not torch.equal(G(z, noise='none'), G(z))


def test_truncation_and_mixing():
    G, _ = tiny()
    z = torch.randn(64, 8)
    with torch.no_grad():
        w = G.mapping(z)
        G.mapping.track(w, keep=0.5)
        close(G.mapping.w_avg, w.mean(0) / 2)
        close(G.styles(z, 0.3)[:, 0], G.mapping.w_avg + 0.3 * (w - G.mapping.w_avg))
        assert torch.equal(G.styles(z), w[:, None].expand(-1, 6, -1))
    a, b = torch.zeros(3, 6, 8), torch.ones(3, 6, 8)
    assert mix_styles(a, b, 4)[:, :, 0].tolist() == [[0, 0, 0, 0, 1, 1]] * 3
    assert mix_styles(a, b, torch.tensor([0, 2, 6]))[:, :, 0].sum(1).tolist() == [6, 4, 0]


def test_penalties_reach_every_weight_that_they_should():
    "R1 differentiates D twice, the path length G; float64 finite differences agree"
    G, D = tiny(8)
    D, G = D.double(), G.double()
    x, w = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 4, 8).double().requires_grad_()
    y = torch.randn(2, 3, 8, 8).double()
    with torch.no_grad():
        for p in [*D.parameters(), *G.parameters()]:
            p.add_(0.1 * torch.randn_like(p))
    values = {
        D.blocks[0].layers[1].weight: lambda: r1_penalty(D, x),
        G.synthesis.blocks[0][0].weight: lambda: path_penalty(path_lengths(G.synthesis(w, 'none'), w, y), 0.1),
        G.synthesis.first.style.weight: lambda: path_penalty(path_lengths(G.synthesis(w, 'none'), w, y), 0.1),
    }
    for p, f in values.items():
        (grad,) = torch.autograd.grad(f(), p)
        v = torch.randn_like(p)
        with torch.no_grad():
            p.add_(v, alpha=1e-6)
        more = f().detach()
        with torch.no_grad():
            p.sub_(v, alpha=2e-6)
        slope = (more - f().detach()) / 2e-6
        with torch.no_grad():
            p.add_(v, alpha=1e-6)
        close((grad * v).sum(), slope, 1e-4)


def test_halves_the_batch_it_is_given():
    "Minibatch statistics of a batch that four does not divide"
    _, D = tiny()
    assert all(D(torch.randn(n, 3, 16, 16)).shape == (n, 1) for n in (1, 2, 3, 5, 6))


def test_bf16_stays_near_float32():
    G, D = tiny(32)
    z = torch.randn(4, 8)
    with torch.no_grad():
        x = G(z)
        with torch.autocast('cpu', torch.bfloat16):
            y = G(z)
            logits = D(y)
    assert y.dtype == torch.float32 and (x - y).abs().mean() < 0.05 * x.abs().mean()
    assert F.l1_loss(logits.float(), D(x)) < 0.2


@pytest.mark.parametrize(
    'wrong, text',
    [
        (lambda: StyleGenerator(100), 'power of two'),
        (lambda: tiny()[0](torch.zeros(2, 7)), r'\(N, 8\)'),
        (lambda: tiny()[0].synthesis(torch.zeros(2, 5, 8)), r'\(N, 6, 8\)'),
        (lambda: tiny()[0](torch.zeros(2, 8), noise='white'), "'random', 'constant' or 'none'"),
        (lambda: tiny()[1](torch.zeros(2, 3, 8, 8)), r'\(N, 3, 16, 16\)'),
        (lambda: ResidualDiscriminator(12), 'power of two'),
    ],
)
def test_wrong_arguments_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        wrong()
