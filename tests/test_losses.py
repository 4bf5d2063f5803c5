"""Losses: parity with pix2pix's stored numbers, gradients against finite differences, half precision."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medsketch.train.losses import (
    GAN_LOSSES,
    adversarial,
    gradient_penalty,
    l1,
    logistic_d,
    logistic_g,
    r1_penalty,
    relativistic_d,
    relativistic_g,
    wgan_drift,
)

REFS = Path(__file__).parent / 'refs'


@pytest.fixture(scope='module')
def p2p():
    names = ('fake', 'real', 'y', 'B', 'd_vanilla', 'g_vanilla', 'd_lsgan', 'g_lsgan', 'l1')
    with np.load(REFS / 'pix2pix.npz') as f:
        return {k: torch.from_numpy(f[k]) for k in names}


@pytest.mark.parametrize('ours, theirs', [('logistic', 'vanilla'), ('lsgan', 'lsgan')])
def test_pix2pix_parity(p2p, ours, theirs):
    d_loss, g_loss = GAN_LOSSES[ours]
    half = d_loss(p2p['real'], p2p['fake']) / 2  # pix2pix halves D's loss
    torch.testing.assert_close(half, p2p[f'd_{theirs}'], rtol=1e-6, atol=0)
    torch.testing.assert_close(g_loss(p2p['fake']), p2p[f'g_{theirs}'], rtol=1e-6, atol=0)


def test_l1_parity_and_refusal(p2p):
    torch.testing.assert_close(l1(p2p['y'], p2p['B']), p2p['l1'], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r'\(2, 1, 64, 64\)'):
        l1(p2p['y'][:, :1], p2p['B'])


PAIRS = [*GAN_LOSSES, 'relativistic']


@pytest.mark.parametrize('name', PAIRS)
def test_loss_gradients(name):
    d_loss, g_loss = adversarial(name)
    g = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(5, 1, 3, 3, dtype=torch.float64, generator=g).mul(2).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(d_loss, (real, fake))
    assert torch.autograd.gradcheck(lambda fake: g_loss(real.detach(), fake), (fake,))


@pytest.mark.parametrize('name', PAIRS)
def test_who_is_pushed_where(name):
    d_loss, g_loss = adversarial(name)
    real, fake = (torch.full((4, 1), v, requires_grad=True) for v in (0.2, 0.3))
    on_real, on_fake = torch.autograd.grad(d_loss(real, fake), (real, fake))
    assert (on_real < 0).all() and (on_fake > 0).all()  # downhill: D lifts real logits and lowers fake ones
    assert (torch.autograd.grad(g_loss(real.detach(), fake), fake)[0] < 0).all()  # G lifts its own


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(name, dtype):
    d_loss, g_loss = adversarial(name)
    real, fake = (torch.linspace(-9, 9, 5000).roll(k).to(dtype) for k in (0, 7))
    assert d_loss(real, fake).dtype == g_loss(real, fake).dtype == torch.float32
    torch.testing.assert_close(d_loss(real, fake), d_loss(real.float(), fake.float()))
    torch.testing.assert_close(g_loss(real, fake), g_loss(real.float(), fake.float()))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_it_is_subtracted_or_squared(dtype):
    "256.5 - 0.25 has more digits than bfloat16, 60,000 + 60,000 and 300 squared more range than float16"
    wide = lambda *v: torch.tensor(v, dtype=dtype)
    real, fake = wide(300.0, -60000.0), wide(0.25, 60000.0)
    for loss in (relativistic_d, relativistic_g):
        assert torch.isfinite(loss(real, fake))
        torch.testing.assert_close(loss(real, fake), loss(real.float(), fake.float()))
    assert wgan_drift(wide(300.0)).item() == pytest.approx(0.001 * wide(300.0).float().item() ** 2)
    assert l1(wide(300.0, 1.0), wide(0.25, 0.0)).item() == pytest.approx((wide(300.0).float().item() - 0.25 + 1) / 2)


def test_relativistic_pairs_by_hand():
    "Differences of 2 and -1: softplus(-2) = 0.126928, softplus(1) = 1.313262; and with sides exchanged"
    real, fake = torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0], [1.0]])
    assert relativistic_d(real, fake).item() == pytest.approx((0.126928 + 1.313262) / 2, abs=1e-5)
    assert relativistic_g(real, fake).item() == pytest.approx((2.126928 + 0.313262) / 2, abs=1e-5)
    assert relativistic_d(real + 50, fake + 50).item() == pytest.approx(relativistic_d(real, fake).item(), rel=1e-6)
    swapped = relativistic_d(real, fake.flip(0).sub(torch.tensor([[0.0], [4.0]])))
    assert swapped.item() != pytest.approx(relativistic_d(real, fake).item())  # who meets whom counts


def test_relativistic_push_depends_on_the_partner():
    fake = torch.zeros(2, requires_grad=True)
    push = -torch.autograd.grad(relativistic_g(torch.tensor([2.0, -2.0]), fake), fake)[0]
    want = torch.sigmoid(torch.tensor([2.0, -2.0])) / 2
    torch.testing.assert_close(push, want)


def test_relativistic_refuses_batches_that_do_not_pair():
    for loss in (relativistic_d, relativistic_g):
        with pytest.raises(ValueError, match='one to one'):
            loss(torch.zeros(3, 1), torch.zeros(2, 1))
        with pytest.raises(ValueError, match='one to one'):
            loss(torch.zeros(3, 1), torch.zeros(3))  # would broadcast


def test_losses_by_name():
    real, fake = torch.tensor([0.5, -1.0]), torch.tensor([0.25, 2.0])
    d_loss, g_loss = adversarial('logistic')
    assert d_loss(real, fake) == logistic_d(real, fake) and g_loss(real, fake) == logistic_g(fake)
    with pytest.raises(ValueError, match="'ns'; there are: logistic, wgan, lsgan, relativistic"):
        adversarial('ns')


@pytest.mark.parametrize('name', GAN_LOSSES)
def test_real_and_fake_are_averaged_apart(name):
    d_loss, _ = GAN_LOSSES[name]
    real, fake = torch.tensor([[0.3], [-0.2]]), torch.tensor([[0.1], [0.7], [-0.4]])
    torch.testing.assert_close(d_loss(real, fake), d_loss(real.repeat(3, 1), fake.repeat(2, 1)))


def test_no_overflow_and_known_values():
    big = torch.tensor([3e38])
    assert torch.isfinite(logistic_d(-big / 2, big / 2)) and logistic_g(big).item() == 0
    assert logistic_d(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(2 * np.log(2))
    assert wgan_drift(torch.tensor([3.0, -4.0])).item() == pytest.approx(0.0125)


class Small(torch.nn.Module):
    "A conditional discriminator, smooth and with two patch logits, in float64"

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = torch.nn.Conv2d(3, 4, 3, padding=1).double(), torch.nn.Conv2d(4, 1, (4, 2)).double()

    def forward(self, x, condition):
        return self.b(torch.tanh(self.a(torch.cat([condition, x], 1))))


@pytest.fixture
def conditional():
    g = torch.Generator().manual_seed(2)
    real, fake = (torch.randn(3, 2, 4, 3, dtype=torch.float64, generator=g) for _ in range(2))
    sketch = torch.rand(3, 1, 4, 3, dtype=torch.float64, generator=g)
    return Small(), real, fake, sketch


def slope_sq(D, x, h=1e-5):
    "Squared input gradient per image by central differences"
    out = torch.zeros(len(x), dtype=x.dtype)
    for i in range(x[0].numel()):
        e = torch.zeros_like(x).flatten(1)
        e[:, i] = h
        e = e.view_as(x)
        out += ((D(x + e) - D(x - e)).flatten(1).sum(1).detach() / (2 * h)) ** 2
    return out


def test_penalties_by_finite_differences(conditional):
    D, real, fake, sketch = conditional
    given = lambda x: D(x, sketch)
    torch.testing.assert_close(r1_penalty(given, real).detach(), slope_sq(given, real).mean(), rtol=1e-6, atol=0)
    mix = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    between = torch.stack([real[0], 0.7 * real[1] + 0.3 * fake[1], fake[2]])
    want = (slope_sq(given, between).sqrt() - 1).square().mean()
    torch.testing.assert_close(gradient_penalty(given, real, fake, mix).detach(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize('kind', ['r1', 'gp'])
def test_penalties_differentiate_twice(conditional, kind):
    D, real, fake, sketch = conditional
    mix = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    given = lambda x: D(x, sketch)
    value = lambda: r1_penalty(given, real) if kind == 'r1' else gradient_penalty(given, real, fake, mix, target=0.5)
    value().backward()
    w, h = D.a.weight, 1e-5
    got = w.grad[1, 2, 0, 1].item()
    with torch.no_grad():
        w[1, 2, 0, 1] += h
    up = value().item()
    with torch.no_grad():
        w[1, 2, 0, 1] -= 2 * h
    assert got == pytest.approx((up - value().item()) / (2 * h), rel=1e-5) and got != 0


def test_flat_critic_gives_no_nan():
    w = torch.zeros(1, 2, 4, 4, requires_grad=True)
    penalty = gradient_penalty(lambda x: (x * w).sum((1, 2, 3)), torch.ones(2, 2, 4, 4), torch.zeros(2, 2, 4, 4))
    penalty.backward()
    assert penalty.item() == pytest.approx(1, abs=1e-5) and torch.isfinite(w.grad).all()


def test_gradient_penalty_leaves_the_generator_alone():
    torch.manual_seed(0)
    D = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    real = torch.randn(2, 2, 4, 4)
    for penalty in (lambda fake: gradient_penalty(D, real, fake), lambda fake: r1_penalty(D, fake)):  # R2 as well
        fake = torch.randn(2, 2, 4, 4, requires_grad=True)
        D.zero_grad()
        penalty(fake * 1.0).backward()
        assert fake.grad is None and D[1].weight.grad.abs().sum() > 0


def test_r1_and_r2_are_of_the_images_given():
    "D(x) = |x|² / 2 has the gradient x: the penalty is the mean squared length of the images, nothing more"
    D = lambda x: x.square().sum((1, 2, 3)) / 2
    real, fake = torch.full((2, 1, 2, 2), 0.5), torch.full((3, 1, 2, 2), -2.0)
    assert r1_penalty(D, real).item() == pytest.approx(4 * 0.25) and r1_penalty(D, fake).item() == pytest.approx(4 * 4)


def test_gradient_penalty_looks_between_the_images_at_a_place_of_its_own_for_each():
    "D(x) = |x|² / 2 again: between 0 and 1 the slope is the mixing factor times the length 2"
    D = lambda x: x.square().sum((1, 2, 3)) / 2
    real, fake = torch.zeros(64, 1, 2, 2), torch.ones(64, 1, 2, 2)
    assert gradient_penalty(D, real, fake, torch.full((64,), 0.5)).item() == pytest.approx(0, abs=1e-6)  # slope 1 there
    assert gradient_penalty(D, real, fake, torch.ones(64)).item() == pytest.approx(1, rel=1e-4)  # slope 2
    assert gradient_penalty(D, real, fake, torch.ones(64), target=2.0).item() == pytest.approx(0, abs=1e-6)
    seen = []
    torch.manual_seed(0)
    gradient_penalty(lambda x: (seen.append(x.detach()), D(x))[1], real, fake)
    factors = seen[0][:, 0, 0, 0]
    assert factors.unique().numel() > 60 and factors.min() < 0.2 and factors.max() > 0.8


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_gradient_penalty_mixes_half_precision_in_float32(dtype):
    "In 16 bits .999 × 1 rounds on the way; and images of one type stay of that type for D"
    seen = []
    D = lambda x: (seen.append(x.detach()), x.float().square().sum((1, 2, 3)))[1]
    real, fake = (torch.linspace(a, b, 128, dtype=dtype).reshape(1, 2, 8, 8) for a, b in ((-1, 1), (1, 0.3)))
    gradient_penalty(D, real, fake, torch.tensor([0.123]))
    want = (real.float() + (fake.float() - real.float()) * 0.123).to(dtype)
    assert seen[0].dtype == dtype and torch.equal(seen[0], want)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_penalty_under_autocast(dtype):
    torch.manual_seed(0)
    D = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.Linear(32, 1))
    x = torch.randn(4, 2, 4, 4)
    exact = r1_penalty(D, x)
    with torch.autocast('cpu', dtype):
        half = r1_penalty(D, x)
    half.backward()
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=0.05)
    assert torch.isfinite(D[0].weight.grad).all()


def test_gradient_penalty_refuses_what_does_not_pair():
    x = torch.zeros(3, 1, 4, 4)
    with pytest.raises(ValueError, match='one to one'):
        gradient_penalty(None, x, x[:2])
    with pytest.raises(ValueError, match='mix has 2 factors for 3 images'):
        gradient_penalty(None, x, x, torch.zeros(2))
