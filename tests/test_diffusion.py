"""The conditional diffusion model: it learns, it draws the same again, and it looks at the sketch."""

import os
from types import SimpleNamespace

import pytest
import torch

from medsketch.core import torch_rng
from medsketch.data import phantom_data
from medsketch.diffusion import NOISE, Diffusion, ddim_step, denoise, velocity_loss
from medsketch.sketch import add_sketches
from medsketch.train.trainer import Callback

pytest.importorskip('einops', reason="pip install 'medsketch[diffusion]'")
os.environ['ACCELERATE_USE_CPU'] = 'true'  # "to the last bit" is a promise for the CPU


def tiny(**changes):
    return Diffusion(**{'size': 16, 'width': 8, 'lr': 5e-3, 'batch_size': 8, 'steps': 60, 'style': 'fundus'} | changes)


def loss_of(recipe, data):
    torch.manual_seed(0)
    with torch.no_grad():
        nets = SimpleNamespace(**recipe.nets)
        return sum(velocity_loss(nets, data.batch(range(len(data)))).item() for _ in range(4)) / 4


@pytest.fixture(scope='module')
def eyes():
    return [add_sketches(phantom_data('fundus', n, 16, seed), style='fundus') for n, seed in ((40, 0), (16, 1))]


@pytest.fixture(scope='module')
def trained(eyes):
    return tiny().fit(eyes[0], progress=False)


def test_training_lowers_the_loss_on_images_that_it_has_not_seen(trained, eyes):
    before, after = loss_of(tiny(), eyes[1]), loss_of(trained, eyes[1])
    assert after < 0.5 * before


def test_it_draws_the_same_again_whatever_is_drawn_beside_it(trained, eyes):
    s = eyes[1].batch(range(6))['sketch']
    made = trained.render(s, steps=6)
    assert torch.equal(made, trained.render(s, steps=6)) and made.min() >= -1 and made.max() <= 1
    assert torch.allclose(made[:2], trained.render(s[:2], steps=6), atol=1e-4)
    assert (made - trained.render(s, seed=1, steps=6)).abs().mean() > 0.05


def test_the_sketch_reaches_the_image_from_the_first_steps_of_training(trained, eyes):
    s = eyes[1].batch(range(8))['sketch']
    assert (trained.render(s, steps=6) - trained.render(s.roll(1, 0), steps=6)).abs().mean() > 0.01
    x, t = torch.randn(8, 3, 16, 16, generator=torch_rng(0)), torch.full((8,), 500)
    y = (s * 2 - 1).requires_grad_()
    trained.nets['U'](torch.cat([x, y], 1), t).square().mean().backward()
    assert y.grad.abs().sum() > 0


def test_the_loss_shows_the_network_image_noise_and_sketch_where_they_belong(eyes):
    batch, seen = eyes[1].batch(range(4)), {}

    def U(xy, t):
        seen.update(xy=xy, t=t)
        return torch.zeros_like(xy[:, :3])

    torch.manual_seed(3)
    loss = velocity_loss(SimpleNamespace(U=U), batch)
    torch.manual_seed(3)
    x = batch['image']
    t, noise = torch.randint(1000, (4,)), torch.randn_like(x)
    a = NOISE.alphas_cumprod[t].view(4, 1, 1, 1)
    assert torch.equal(seen['t'], t) and loss == pytest.approx(
        (a.sqrt() * noise - (1 - a).sqrt() * x).square().mean().item(), rel=1e-5
    )
    assert torch.allclose(seen['xy'][:, :3], a.sqrt() * x + (1 - a).sqrt() * noise, atol=1e-5)
    assert torch.equal(seen['xy'][:, 3:], batch['sketch'] * 2 - 1)


@pytest.mark.parametrize('steps', [1, 2, 7, 1000])
def test_a_network_that_knows_the_image_leads_back_to_the_image(steps):
    image = torch.rand(2, 1, 4, 4, generator=torch_rng(0)) * 1.8 - 0.9
    asked = []

    def knows(xy, t):
        asked.append(int(t[0]))
        a = NOISE.alphas_cumprod[t[0]]
        return (a.sqrt() * xy[:, :1] - image) / (1 - a).sqrt()

    path = list(denoise(knows, torch.zeros(2, 1, 4, 4), torch.randn(2, 1, 4, 4, generator=torch_rng(1)), steps))
    assert torch.allclose(path[-1], image, atol=1e-3)
    assert len(path) == steps and asked[0] == 999 and asked == sorted(set(asked), reverse=True)


def test_a_step_ends_at_the_noise_that_the_next_one_begins_with():
    "MONAI's scheduler denoises from 999 to 899 with 10 steps, and goes on at 888"
    image, noise = torch.zeros(1, 1, 4, 4) + 0.5, torch.randn(1, 1, 4, 4, generator=torch_rng(0))
    a = NOISE.alphas_cumprod[[999, 888]]
    at = [a[k].sqrt() * image + (1 - a[k]).sqrt() * noise for k in (0, 1)]
    v = a[0].sqrt() * noise - (1 - a[0]).sqrt() * image
    assert torch.allclose(ddim_step(at[0], v, *a), at[1], atol=1e-3)


def test_images_stay_in_range_and_the_noise_is_what_remains():
    x, v = torch.full((1, 1, 2, 2), 3.0), torch.zeros(1, 1, 2, 2)
    a = torch.tensor(0.25)
    assert torch.equal(ddim_step(x, v, a, torch.tensor(1.0)), torch.ones(1, 1, 2, 2))
    assert torch.allclose(ddim_step(x, v, a, a), x)  # a step of no length


def test_weights_are_kept(eyes, trained, tmp_path):
    trained.save(tmp_path / 'w.safetensors')
    again, s = tiny(seed=1).load_weights(tmp_path / 'w.safetensors'), eyes[1].batch(range(2))['sketch']
    assert torch.allclose(again.render(s, steps=3), trained.render(s, steps=3), atol=1e-3)


def test_a_training_goes_on_as_if_it_had_never_stopped(eyes, tmp_path):
    class Stop(Callback):
        def after_step(self, trainer):
            if trainer.step == 4:
                raise KeyboardInterrupt

    whole, part = tiny(steps=6).fit(eyes[0], progress=False), tmp_path / 'part'
    with pytest.raises(KeyboardInterrupt):
        tiny(steps=6).fit(eyes[0], part, every=3, callbacks=[Stop()], progress=False)
    again = tiny(steps=6).fit(eyes[0], part, every=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.nets['U'].parameters(), again.nets['U'].parameters()))


def test_it_refuses_a_sketch_of_another_size():
    with pytest.raises(ValueError, match='16'):
        tiny().render(torch.zeros(32, 32))


def test_it_is_in_no_list_of_the_papers_systems():
    from medsketch.recipes import RECIPES

    assert Diffusion not in RECIPES.values()
