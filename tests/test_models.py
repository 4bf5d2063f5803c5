"""The networks against the reference implementations' stored numbers, and at their edges."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medsketch.models.layers import MinibatchStd, PixelNorm, conv
from medsketch.models.patchgan import PatchDiscriminator
from medsketch.models.pggan import PGDiscriminator, PGGenerator, widths
from medsketch.models.unet import UNetRenderer
from medsketch.train.losses import GAN_LOSSES, l1, logistic_g

REFS = Path(__file__).parent / 'refs'
LODS = {
    0.0: (32, 1.0),
    0.5: (32, 0.5),
    1.0: (16, 1.0),
    1.3: (16, 0.7),
    3.0: (4, 1.0),
}  # level of detail: resolution, alpha


def close(a, b, tol=1e-4):
    "Equal to `tol`, relative to the largest value"
    a, b = (torch.as_tensor(np.asarray(t.detach() if torch.is_tensor(t) else t), dtype=torch.float64) for t in (a, b))
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol * b.abs().max().clamp(min=1e-12), f"off by {(a - b).abs().max():.1e}"


def load(net, pairs):
    "Copy arrays into a network's parameters, all of them, in float64"
    net = net.double()
    params = dict(net.named_parameters())
    with torch.no_grad():
        for name, value in pairs.items():
            params.pop(name).copy_(torch.from_numpy(value))
    assert not params, f"nothing was loaded into {list(params)}"
    return net


# ---- the official progressive GAN ------------------------------------------------------------


class CentredStd(MinibatchStd):
    """Minibatch statistics as they were when the reference numbers were stored.

    There the group mean was subtracted in place, so the network saw features centred on their group. The published
    code and the paper leave the features alone, and so does the library; the extra channel is the same either way."""

    def forward(self, x):
        y = x.reshape(self.group, -1, *x.shape[1:])
        return torch.cat([(y - y.mean(0)).reshape(x.shape), super().forward(x)[:, -1:]], 1)


@pytest.fixture(scope='module')
def tf():
    "The stored arrays"
    return dict(np.load(REFS / 'pggan_official.npz'))


def block_names(*layers):
    "Two layers in every block above 4 x 4"
    return {f'blocks.{i}.{j}': f'{r}x{r}/{n}' for i, r in enumerate((8, 16, 32)) for j, n in enumerate(layers)}


G_NAMES = {
    'conv': '4x4/Conv',
    **{f'to_image.{i}': f'ToRGB_lod{3 - i}' for i in range(4)},
    **block_names('Conv0_up', 'Conv1'),
}
D_NAMES = {
    'conv': '4x4/Conv',
    'dense': '4x4/Dense0',
    'logit': '4x4/Dense1',
    **{f'from_image.{i}': f'FromRGB_lod{3 - i}' for i in range(4)},
    **block_names('Conv0', 'Conv1_down'),
}


def pairs(tf, scope, names):
    "TensorFlow's HWIO (HWOI where a convolution is transposed) and IO to ours: OHWI (IHWO) and OI"
    both = [(f'{ours}.{k}', tf[f'{scope}/{theirs}/{k}']) for ours, theirs in names.items() for k in ('weight', 'bias')]
    return {k: v.transpose(3, 0, 1, 2).copy() if v.ndim == 4 else v.T.copy() for k, v in both}


def tf_generator(tf):
    dense = {'dense.weight': tf['var:G/4x4/Dense/weight'].T.copy(), 'dense_bias': tf['var:G/4x4/Dense/bias']}
    return load(PGGenerator(32, 3, 32, fmap_base=256, fmap_max=32), dense | pairs(tf, 'var:G', G_NAMES))


def tf_discriminator(tf, scope='var:D'):
    D = load(PGDiscriminator(32, 3, fmap_base=256, fmap_max=32), pairs(tf, scope, D_NAMES))
    D.std = CentredStd()
    return D


def test_pixel_norm_and_minibatch_std(tf):
    x, out = torch.from_numpy(tf['mbstd_in']), torch.from_numpy(tf['mbstd_out'])
    close(PixelNorm()(x[:2]), tf['pixelnorm_out'])
    close(MinibatchStd()(x)[:, -1], out[:, -1])
    assert torch.equal(MinibatchStd()(x)[:, :-1], x)
    close(CentredStd()(x), out)


@pytest.mark.parametrize('lod', LODS)
def test_pggan_levels_of_detail(tf, lod):
    size, alpha = LODS[lod]
    z, real = (torch.from_numpy(tf[k]) for k in ('z', 'real'))
    close(F.interpolate(tf_generator(tf)(z[:2], size, alpha), size=32), tf[f'G_lod{lod}'])
    close(tf_discriminator(tf)(F.avg_pool2d(real, 32 // size), alpha), tf[f'D_lod{lod}'])


def test_pggan_wgan_gp(tf):
    "Losses and gradient norms. The reference gave its penalty a discriminator with weights of its own"
    z, real, mix = (torch.from_numpy(tf[k]) for k in ('z', 'real', 'mix'))
    G, D, D_gp = tf_generator(tf), tf_discriminator(tf), tf_discriminator(tf, 'var:GradientPenalty/D')
    fake = G(z).detach()
    close(-D(fake), tf['g_loss'])
    mixed = real.lerp(fake, mix[:, None, None, None]).requires_grad_()
    (grad,) = torch.autograd.grad(D_gp(mixed).sum(), mixed, create_graph=True)
    penalty = 10 * (grad.flatten(1).norm(dim=1) - 1).square()
    logits = D(real)
    loss = D(fake) - logits + 0.001 * logits.square() + penalty  # (N, 1) + (N,): the official (N, N)
    close(loss, tf['d_loss'])
    loss.mean().backward()
    ours = {f'D/{b}/{k}': D.get_submodule(a).get_parameter(k) for a, b in D_NAMES.items() for k in ('weight', 'bias')}
    norms = [0.0 if ours[n].grad is None else ours[n].grad.norm().item() for n in tf['d_grad_names']]
    np.testing.assert_allclose(norms, tf['d_grad_norms'], rtol=1e-4)


# ---- pix2pix ---------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def p2p():
    "The stored arrays"
    return dict(np.load(REFS / 'pix2pix.npz'))


def p2p_names():
    "The reference nests its levels: model.1 is the outermost's inside, model.1.model.3 that one's, and so on"
    levels = ['model.model.'] + ['model.model.1.model.' + '3.model.' * i for i in range(5)]
    names = {'down.0': 'model.model.0', 'up.5': 'model.model.3'}
    for i in range(1, 6):
        names |= {f'down.{i}': levels[i] + '1', f'up.{5 - i}': levels[i] + ('5' if i < 5 else '3')}
    for i in range(1, 5):
        names[f'down_norm.{i}'] = levels[i] + '2'
    for i in range(1, 6):
        names[f'up_norm.{5 - i}'] = levels[i] + ('6' if i < 5 else '4')
    return names


def p2p_pairs(p2p, scope, names):
    pairs = {f'{a}.{k}': f'{scope}:{b}.{k}' for a, b in names.items() for k in ('weight', 'bias')}
    both = {ours: p2p[theirs] for ours, theirs in pairs.items() if theirs in p2p}
    return {k: v.transpose(0, 2, 3, 1).copy() if v.ndim == 4 else v for k, v in both.items()}


def p2p_generator(p2p):
    return load(UNetRenderer(64, 3, 3, ngf=4), p2p_pairs(p2p, 'G', p2p_names()))


def p2p_discriminator(p2p):
    return load(PatchDiscriminator(6, ndf=8), p2p_pairs(p2p, 'D', {f'layers.{i}': f'model.{i}' for i in range(12)}))


def test_pix2pix(p2p):
    "Output, logits, losses and the gradient of every generator weight, with batch norm in training mode"
    A, B = (torch.from_numpy(p2p[k]) for k in 'AB')
    G, D = p2p_generator(p2p), p2p_discriminator(p2p)
    y = G(A)
    fake, real = D(y, A), D(B, A)
    close(y, p2p['y']), close(fake, p2p['fake']), close(real, p2p['real'])
    for ours, theirs in (('logistic', 'vanilla'), ('lsgan', 'lsgan')):
        d_loss, g_loss = GAN_LOSSES[ours]
        close(d_loss(real, fake) / 2, p2p[f'd_{theirs}'])  # the reference halves the discriminator's loss
        close(g_loss(fake), p2p[f'g_{theirs}'])
    close(l1(y, B), p2p['l1'])
    (logistic_g(fake) + 100 * l1(y, B)).backward()
    grads = {k: v.grad.norm().item() for k, v in G.named_parameters()}
    back = {b: a for a, b in p2p_names().items()}
    order = [k[2:] for k in p2p if k.startswith('G:')]
    norms = [grads[f"{back[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}"] for k in order]
    np.testing.assert_allclose(norms, p2p['g_grad_norm'], rtol=1e-4)


# ---- edges -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'stride, k, padding, transposed',
    [(1, 3, 1, False), (1, 1, 0, False), (2, 3, 0, False), (2, 3, 0, True), (2, 4, 1, False), (2, 4, 1, True)],
)
def test_conv_derivatives(stride, k, padding, transposed):
    "First and second derivatives, against finite differences"
    h = 5 if stride == 2 and k == 3 and not transposed else 4
    x = torch.randn(2, 2, h, h, dtype=torch.double, requires_grad=True)
    w = torch.randn(*((2, 3) if transposed else (3, 2)), k, k, dtype=torch.double, requires_grad=True)
    b = torch.randn(3, dtype=torch.double, requires_grad=True)
    fn = lambda x, w, b: conv(x, w, b, stride, padding, transposed)
    assert torch.autograd.gradcheck(fn, (x, w, b)) and torch.autograd.gradgradcheck(fn, (x, w, b))


@pytest.mark.parametrize(
    'k, stride, padding, transposed',
    [(3, 2, 0, False), (3, 2, 0, True), (4, 2, 1, False), (4, 2, 1, True), (3, 1, 1, False)],
)
@pytest.mark.parametrize('dtype, side, tol', [(torch.float32, 128, 1e-4), (torch.bfloat16, 16, 0.02)])
def test_weight_gradients_on_a_cpu(dtype, side, tol, k, stride, padding, transposed):
    "float32, large and strided: by phases; bfloat16, small: by a matrix product. Against float64"
    torch.manual_seed(0)
    odd = side + (k == 3 and stride == 2)  # every pixel is used
    x = torch.randn(2, 12, odd, odd)
    w = (torch.randn(*((12, 14) if transposed else (14, 12)), k, k) * 0.1).requires_grad_()
    out = conv(x.to(dtype), w.to(dtype), None, stride, padding, transposed)
    grad = torch.randn_like(out)
    (mine,) = torch.autograd.grad(out, w, grad)
    theirs = (F.conv_transpose2d if transposed else F.conv2d)(x.to(dtype).double(), w.double(), None, stride, padding)
    close(mine, torch.autograd.grad(theirs, w, grad.double())[0], tol)


def test_gradient_penalty_computes_no_unused_weight_gradients(monkeypatch):
    "The first of its two backward passes asks for the image's gradient only"
    from medsketch.models import layers

    calls, real = [], layers._weight_grad
    monkeypatch.setattr(layers, '_weight_grad', lambda *a: calls.append(a) or real(*a))
    D, x = PGDiscriminator(8, fmap_base=32, fmap_max=8), torch.randn(2, 3, 8, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    assert not calls
    slope.square().sum().backward()
    assert calls


NETS = {
    'generator': lambda: (PGGenerator(16, fmap_base=64, fmap_max=16), (torch.randn(3, 512),)),
    'discriminator': lambda: (PGDiscriminator(16, fmap_base=64, fmap_max=16), (torch.randn(3, 3, 16, 16),)),
    'renderer': lambda: (UNetRenderer(16, ngf=4), (torch.rand(3, 1, 16, 16),)),
    'patches': lambda: (
        PatchDiscriminator(4, ndf=4, receptive_field=34),
        (torch.randn(3, 3, 32, 32), torch.rand(3, 1, 32, 32)),
    ),
}


@pytest.mark.parametrize('name', NETS)
def test_precisions_and_layouts_agree(name):
    "float64, bfloat16 autocast and channels-last input give what float32 gives"
    torch.manual_seed(0)
    net, inputs = NETS[name]()
    net.eval()
    with torch.no_grad():
        y = net(*inputs)
        close(net(*[x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]), y)
        with torch.autocast('cpu', torch.bfloat16):
            close(net(*inputs).float(), y, 0.1)
        close(net.double()(*[x.double() for x in inputs]), y)


@pytest.mark.parametrize('name', NETS)
def test_weights_survive_safetensors(name, tmp_path):
    "Every parameter is contiguous, as the format wants it"
    from safetensors.torch import load_file, save_file

    net = NETS[name]()[0]
    save_file(net.state_dict(), tmp_path / 'w.safetensors')
    for k, v in load_file(tmp_path / 'w.safetensors').items():
        assert torch.equal(v, net.state_dict()[k])


@pytest.mark.parametrize('scale', [1e-4, 1.0, 300.0, 3e4])
@pytest.mark.parametrize('layer', [PixelNorm(), MinibatchStd()])
def test_half_precision_squares_neither_overflow_nor_vanish(layer, scale):
    "float16: the square of 300 is infinite, that of 1e-4 and the constant 1e-8 are zero"
    x = (torch.randn(8, 32, 4, 4, generator=torch.Generator().manual_seed(0)) * scale).clamp(-6e4, 6e4).half()
    inputs = [t.requires_grad_() for t in (x.clone(), x.double())]
    half, exact = (layer(t) for t in inputs)
    assert half.dtype == torch.float16
    close(half, exact, 2e-3)
    for y in (half, exact):
        (y[:, -1] / max(1, y[:, -1].abs().max().item())).sum().backward()
    half, exact = (t.grad.double() for t in inputs)
    assert (half - exact).abs().max() <= 5e-3 * exact.abs().max() + 6e-8  # float16's smallest number


def test_blank_features_in_half_precision():
    "Zeros and equal images: 0 / 0 is what the constants prevent"
    x = torch.zeros(4, 8, 4, 4, dtype=torch.float16)
    for layer in (PixelNorm(), MinibatchStd()):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.sum().backward()
        assert y.isfinite().all() and leaf.grad.isfinite().all()
    assert torch.equal(PixelNorm()(x), x)
    assert MinibatchStd()(x + 5)[:, -1].max() < 1e-3


def test_autocast_leaves_pixel_norm_its_range():
    "Autocast runs dot products in half precision, whatever comes in"
    x = torch.randn(2, 16, 4, 4) * 1e4
    with torch.autocast('cpu', torch.float16):
        y = PixelNorm()(x)
    close(y, PixelNorm()(x), 1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_the_growing_pair_in_half_precision(dtype):
    "Logits and gradients through both networks, from features far from unit scale"
    torch.manual_seed(0)
    G, D = PGGenerator(16, 1, 32, fmap_base=128, fmap_max=32), PGDiscriminator(16, 1, fmap_base=128, fmap_max=32)
    z = torch.randn(8, 32)
    with torch.no_grad():
        G.dense_bias.fill_(500.0)
    exact = D(G(z, alpha=0.5), alpha=0.5)
    with torch.autocast('cpu', dtype):
        y = D(G(z, alpha=0.5).float(), alpha=0.5)
    close(y.float(), exact, 0.1)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for net in (G, D) for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize('n', [1, 2, 3, 5, 6, 7, 8])
def test_any_batch_size(n):
    D = PGDiscriminator(8, fmap_base=32, fmap_max=8)
    x = torch.randn(n, 3, 8, 8)
    D(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in D.parameters() if p.grad is not None)
    assert MinibatchStd()(x).isfinite().all()


def test_fade_ends_are_exact():
    torch.manual_seed(0)
    G, D = PGGenerator(16, fmap_base=64, fmap_max=16), PGDiscriminator(16, fmap_base=64, fmap_max=16)
    z = torch.randn(4, 512)
    with torch.no_grad():
        assert torch.equal(G(z, 16, alpha=0), F.interpolate(G(z, 8), scale_factor=2))
        assert torch.equal(G(z, 4, alpha=0), G(z, 4))  # nothing smaller to fade from
        assert torch.equal(D(G(z), alpha=0), D(F.avg_pool2d(G(z), 2)))
        assert not torch.equal(D(G(z), alpha=0.5), D(G(z)))


def test_growth_reaches_1024():
    "At toy width: the sizes come out right, from the smallest to the largest"
    G, D = PGGenerator(1024, fmap_base=8, fmap_max=4, latent_dim=8), PGDiscriminator(1024, fmap_base=8, fmap_max=4)
    with torch.no_grad():
        for size in (4, 8, 1024):
            x = G(torch.randn(1, 8), size)
            assert x.shape == (1, 3, size, size) and D(x).shape == (1, 1)


MEDICAL = {4: 128, 8: 128, 16: 128, 32: 128, 64: 128, 128: 128, 256: 64, 512: 16}  # Beers et al. 2018


@pytest.mark.parametrize('fmaps', [MEDICAL, json.loads(json.dumps(MEDICAL)), list(MEDICAL.values())])
def test_widths_by_a_table(fmaps):
    "The medical progressive GAN: 128 below 256 px, 64 at 256, 16 at 512; keys as JSON writes them; a list"
    assert widths(512, fmaps=fmaps) == [128] * 6 + [64, 16]
    with torch.device('meta'):
        G, D = PGGenerator(512, 1, 128, fmaps=fmaps), PGDiscriminator(512, 1, fmaps=fmaps)
    assert [layer.weight.shape[-1] for layer in G.to_image] == [128] * 6 + [64, 16]
    assert [layer.weight.shape[0] for layer in D.from_image] == [128] * 6 + [64, 16]
    assert [b[0].weight.shape[3] for b in G.blocks] == [128] * 5 + [64, 16]  # what a block makes


def test_a_larger_table_serves_a_smaller_network():
    "The paper's gliomas stop at 256 px; without a table the numbers are what they were"
    assert widths(256, fmaps=MEDICAL) == [128] * 6 + [64]
    assert widths(256, 4096, 256) == widths(256, 4096, 256, None) == [256] * 4 + [128, 64, 32]
    G, D = PGGenerator(16, 1, 8, fmaps={4: 6, 8: 5, 16: 3}), PGDiscriminator(16, 1, fmaps={4: 6, 8: 5, 16: 3})
    for size in (4, 8, 16):
        assert D(G(torch.randn(2, 8), size, 0.5), 0.5).shape == (2, 1)


@pytest.mark.parametrize('norm, dropout', [('batch', 0.0), ('batch', 0.5), ('instance', 0.0), ('none', 0.0)])
def test_renderer_in_evaluation_mode(norm, dropout):
    "One image alone equals the same image in company, and equals what the folded copy renders"
    torch.manual_seed(0)
    net, x = UNetRenderer(32, ngf=4, norm=norm, dropout=dropout), torch.rand(6, 1, 32, 32)
    for _ in range(5):
        net(x)
    net.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        y = net(x)
        close(net(x[2:3])[0], y[2])
        fast = net.for_inference()
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fast.modules())
        close(fast(x), y)
        close(net.for_inference(torch.bfloat16)(x), y, 0.05)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # the original is as it was


def test_a_shallow_renderer_answers_nearby_only_and_knows_its_place():
    torch.manual_seed(0)
    plain, placed = (UNetRenderer(128, ngf=4, ngf_max=8, depth=3, position=p).eval() for p in (False, True))
    assert max(m.weight.shape[0] for m in plain.down) == 8
    placed.load_state_dict(plain.state_dict() | {'place': placed.place})
    x = torch.zeros(1, 1, 128, 128)
    y = x.clone()
    y[..., 60:68, 60:68] = 1
    with torch.no_grad():
        assert torch.equal(plain(x), placed(x))  # a new map is blank
        change = (placed(y) - placed(x)).abs().amax((0, 1))
        assert change[64, 64] > 0 and change[:30].max() == 0 and change[:, 100:].max() == 0
        placed.place[..., :8] += 1.0
        moved = (placed(x) - plain(x)).abs().amax((0, 1, 2))
        assert moved[:56].min() > 0 and moved[100:].max() == 0  # the map's left half, the image's
        close(placed.for_inference()(y), placed(y))
        assert placed(torch.zeros(1, 1, 64, 64)).shape == (1, 3, 64, 64)
    earlier = UNetRenderer(128, ngf=4, ngf_max=8, depth=3, place=True)  # the argument's earlier name
    earlier.load_state_dict(placed.state_dict())


@pytest.mark.parametrize(
    'wrong, message',
    [
        (lambda: UNetRenderer(64, depth=1), 'use 2 to 6'),
        (lambda: UNetRenderer(64, norm='layer'), "'instance'"),
        (lambda: UNetRenderer(64, ngf=2)(torch.zeros(1, 3, 64, 64)), 'wants (N, 1, H, W)'),
        (lambda: UNetRenderer(64, ngf=2)(torch.zeros(1, 1, 96, 96)), 'multiples of 64'),
        (lambda: PatchDiscriminator(receptive_field=71), 'not one of 1, 16, 34, 70, 142, 286'),
        (lambda: PatchDiscriminator()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)), 'at least 24 pixels'),
        (lambda: PGGenerator(16, fmap_max=8)(torch.zeros(1, 512), 32), 'from 4 to 16'),
        (lambda: PGGenerator(16, fmap_max=8)(torch.zeros(1, 512), alpha=2), 'alpha is 2'),
        (lambda: PGDiscriminator(16, fmap_max=8)(torch.zeros(1, 3, 32, 32)), 'from 4 to 16'),
        (lambda: PGDiscriminator(100), 'nearest is 128'),
        (lambda: PGGenerator(16, fmaps={4: 8, 16: 4}), 'no entry for resolution 8'),
        (lambda: PGDiscriminator(16, fmaps=[8, 8]), '3 resolutions'),
        (lambda: widths(16, fmaps=[8, 8, 8, 8]), '3 resolutions'),
        (lambda: widths(8, fmaps={4: 8, 8: 0}), '0 feature maps at resolution 8'),
        (lambda: widths(8, fmaps={4: 8, 8: 4.5}), 'whole numbers'),
        (lambda: widths(8, fmaps={4: 8, 8: 4, 12: 3}), 'whole numbers'),
        (lambda: widths(8, fmaps={'small': 8}), 'whole numbers'),
        (lambda: widths(8, fmaps=128), 'whole numbers'),
    ],
)
def test_errors_are_one_line(wrong, message):
    with pytest.raises(ValueError) as e:
        wrong()
    assert message in str(e.value) and '\n' not in str(e.value)
