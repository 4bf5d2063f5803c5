"PGSgan: fade-in blocks that begin as nothing, four phases, conditions that keep out of the object, runs that resume."

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faults import die, half_written, killed, one_line, rows, same, same_runs

from medsketch.cli import main
from medsketch.core import to_uint8
from medsketch.data import ImageData, phantom_data
from medsketch.evaluate.compare import compare_sizes
from medsketch.models.fib import FadeDown, FadeUp, GrowingDiscriminator, GrowingGenerator, ResidualGenerator, double
from medsketch.models.patchgan import PatchDiscriminator
from medsketch.recipes import PGSgan, load_recipe
from medsketch.recipes.pgsgan import GrowingLosses, Phases, ablation, four_phases
from medsketch.sketch.conditions import (
    add_background_sketches,
    background_sketch,
    condition_picture,
    condition_planes,
)
from medsketch.train.losses import l1
from medsketch.train.trainer import Callback

os.environ['ACCELERATE_USE_CPU'] = 'true'  # "to the last bit" is a promise for the CPU

SMALL = {
    'size': 32,
    'ngf': 4,
    'blocks': 1,
    'ndf': 4,
    'receptive_field': 1,
    'fade_maps': 4,
    'base_steps': 3,
    'grow_steps': 4,
    'full_steps': 2,
}
STEPS = 13


def tiny(**changes):
    return PGSgan(**{**SMALL, **changes})


@pytest.fixture(scope='module')
def data():
    return phantom_data('ultrasound', 7, 32)


@pytest.fixture(scope='module')
def through(tmp_path_factory, data):
    "An uninterrupted run"
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('runs') / 'run'
    return SimpleNamespace(out=out, recipe=tiny().fit(data, out, every=2, progress=False))


def networks(start=16, size=64, **kwargs):
    torch.manual_seed(0)
    base, patch = ResidualGenerator(3, 1, 4, 1).eval(), PatchDiscriminator(4, 4, 1).eval()
    return GrowingGenerator(base, start, size, 3, 1, 4, **kwargs), GrowingDiscriminator(patch, start, size, 3, 1, 4)


# --- fade-in blocks ---


@pytest.mark.parametrize('block, resize', [(FadeDown, lambda x: F.avg_pool2d(x, 2)), (FadeUp, double)])
def test_a_block_mixes_resize_and_new_layers(block, resize):
    b, x = block(3, 4), torch.rand(2, 3, 8, 8)
    assert torch.equal(b(x, 0.0), resize(x))
    torch.testing.assert_close(b(x, 0.3), 0.7 * resize(x) + 0.3 * b(x, 1.0))
    before = b(x, 1.0)
    with torch.no_grad():
        for p in b.parameters():
            p.zero_()
    assert not torch.equal(b(x, 1.0), before) and b(x, 1.0).abs().max() == 0  # at 1 nothing of the input is left
    torch.testing.assert_close(b(x, 0.25), 0.75 * resize(x))


def test_at_alpha_0_the_grown_networks_are_the_small_ones():
    G, D = networks()
    x, y = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64)
    half = lambda v: F.avg_pool2d(v, 2)
    with torch.no_grad():
        assert torch.equal(G(half(x), 0.0), double(G.base(half(half(x)))))
        assert torch.equal(D(half(y), half(x), 0.0), D.base(half(half(y)), half(half(x))))
        assert torch.equal(G(x, 0.0), double(G(half(x))))  # the second doubling begins where the first one rests
        assert torch.equal(D(y, x, 0.0), D(half(y), half(x)))
        assert torch.equal(G(half(x)), G(half(x), 0.5)) and torch.equal(D(y, x), D(y, x, 1.0))
        assert not torch.equal(G(half(x), 0.1), G(half(x), 0.0))


def test_growing_keeps_weights_and_shapes():
    G, _ = networks()
    same(dict(G.base.state_dict()), {k[5:]: v for k, v in G.state_dict().items() if k.startswith('base.')})
    assert PatchDiscriminator(4, 4)(torch.zeros(1, 1, 256, 256), torch.zeros(1, 3, 256, 256)).shape[2:] == (30, 30)


def test_networks_say_which_sizes_they_take():
    G, D = networks()
    for call in (
        lambda: G(torch.zeros(1, 3, 24, 24)),
        lambda: G(torch.zeros(1, 3, 128, 128)),
        lambda: G(torch.zeros(1, 3, 32, 16)),
        lambda: D(torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8)),
    ):
        with pytest.raises(ValueError, match='squares of 16, 32, 64') as e:
            call()
        assert one_line(e)
    with pytest.raises(ValueError, match='16 pixels do not grow to 48'):
        networks(size=48)


# --- phases ---


def test_alpha_rises_in_steps_of_a_thirtieth_and_stops_at_a_half():
    growth = four_phases(64, 128, 100, 90, 50)
    points = [growth.at(i) for i in range(330)]
    alphas = {n: np.array([p.alpha_of(n) for p in points]) for n in ('G_P', 'D_P')}
    d, g = alphas['D_P'], alphas['G_P']
    assert (d[:100] == 0).all() and (g[:190] == 0).all()  # G grows after D has
    assert (np.diff(d) >= -1e-9).all() and (np.diff(g) >= -1e-9).all()
    for a in (d, g):
        np.testing.assert_allclose(30 * a, np.round(30 * a), atol=1e-6)
    assert len(set(d[100:190])) == 31 and (d[189:] == 1).all()
    assert (g[235:] == 0.5).all() and g.max() == 0.5  # as fast as D's, and cut off half way
    assert [p.size for p in points] == [64] * 100 + [128] * 230


def test_two_doublings_and_none():
    growth = four_phases(16, 64, 5, 3, 2)
    assert [(s.size, s.steps) for s in growth.stages] == [(16, 5), (32, 3), (32, 3), (64, 3), (64, 3), (64, 2)]
    fade, seen = Phases(growth), []
    for step in range(growth.steps + 1):
        fade.jump(step)
        seen.append(fade.phase)
    assert seen == ['base'] * 5 + (['D grows'] * 3 + ['G grows'] * 3) * 2 + ['full'] * 3
    assert four_phases(64, 64, 5, 3, 2).steps == 13 == four_phases(32, 64, 5, 3, 2).steps  # ablations get equal budgets
    fade = Phases(four_phases(64, 64, 5, 3, 2))
    assert fade.phase == 'full' and fade.of('G_P') == 1


def test_steps_are_shared_out():
    for n in (1, 4, 10, 999):
        c = PGSgan.steps_each(n, 128)
        assert c['base_steps'] + 2 * c['grow_steps'] + c['full_steps'] == max(n, 4)


# --- losses, and who learns ---


def game(step, lam=100.0):
    "Networks, losses and a batch, as they are at a step"
    r = tiny(lam=lam, classes=3, base_steps=10, grow_steps=10, full_steps=10)
    r.fade.jump(step)
    nets = SimpleNamespace(**{k: n.train() for k, n in r.nets.items()})
    rng = torch.Generator().manual_seed(0)
    batch = {'condition': torch.rand(4, 3, 32, 32, generator=rng), 'image': torch.rand(4, 1, 32, 32, generator=rng)}
    return r, nets, GrowingLosses(r.fade, lam), batch


def learns(net):
    return {k for k, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize(
    'step, d_grows, g_grows', [(0, False, False), (15, True, False), (25, True, True), (35, True, True)]
)
def test_who_learns_in_which_phase(step, d_grows, g_grows):
    "Old layers always, new ones once their alpha is above 0; a phase moves its own network only"
    _, nets, losses, batch = game(step)
    for p in nets.D_P.parameters():
        p.requires_grad_(False)  # as the trainer does
    sum(losses.g(nets, batch).values()).backward()
    fresh = {k.split('.')[0] for k in learns(nets.G_P)}
    assert fresh == ({'base', 'down', 'up'} if g_grows else {'base'})
    assert all(p.grad is None for k, p in nets.G_P.named_parameters() if not g_grows and not k.startswith('base'))
    assert not learns(nets.D_P)
    nets.G_P.zero_grad()
    for p in nets.D_P.parameters():
        p.requires_grad_(True)
    losses.d(nets, batch).backward()
    assert {k.split('.')[0] for k in learns(nets.D_P)} == ({'base', 'down'} if d_grows else {'base'})
    assert not learns(nets.G_P)


def test_losses_are_those_of_the_paper():
    r, nets, losses, batch = game(0)
    for n in vars(nets).values():
        n.eval()
    terms = losses.g(nets, batch)
    x, y = (F.avg_pool2d(batch[k], 2) for k in ('condition', 'image'))
    fake = nets.G_P(x)
    torch.testing.assert_close(terms['l1'], 100 * l1(fake, y))  # Eq. 2
    torch.testing.assert_close(terms['adv'], -torch.log(torch.sigmoid(nets.D_P(fake, x))).mean())
    real, made = torch.sigmoid(nets.D_P(y, x)), torch.sigmoid(nets.D_P(batch['fake'], x))
    torch.testing.assert_close(losses.d(nets, batch), -(real.log() + (1 - made).log()).mean())  # Eq. 1
    torch.testing.assert_close(GrowingLosses(r.fade, 7.0).g(nets, batch)['l1'], terms['l1'] * 7 / 100)
    assert batch['fake'].shape[-1] == 16 and not batch['fake'].requires_grad


def test_optimisers_are_the_papers_and_live_through_all_phases(data):
    r = tiny()
    seen = []

    class Watch(Callback):
        def after_step(self, trainer):
            opt = trainer.phases[0].opt
            names = {id(p): k for k, p in r.nets['G_P'].named_parameters()}
            seen.append({names[id(p)]: int(s['step']) for p, s in opt.state.items()})

    r.fit(data, progress=False, callbacks=[Watch()])
    base = [k for k in seen[0] if k.startswith('base')]
    assert all(s[k] == i + 1 for i, s in enumerate(seen) for k in base)  # never begun again
    assert not any(k.startswith(('up', 'down')) for k in seen[6]) and any(k.startswith('up') for k in seen[-1])
    opts = [p.opt for p in tiny(classes=3).stages(None)[0].phases]
    assert [o.param_groups[0]['lr'] for o in opts] == [1e-3, 1e-4] and tiny().config['batch_size'] == 4


# --- conditions ---


def test_the_sketch_keeps_out_of_the_object(data):
    b = add_background_sketches(data).batch(range(7))
    assert (b['sketch'][:, 0][b['mask'] > 0] == 0).all() and 0.01 < b['sketch'].mean() < 0.4
    c = condition_planes(b['mask'], torch.ones_like(b['sketch']))
    assert torch.equal(c[:, 2] > 0, b['mask'] == 0) and c.sum(1).max() == 1
    for k in (1, 2):
        assert torch.equal(c[:, k - 1] > 0, b['mask'] == k)
    one = condition_planes((b['mask'] > 0).long(), None, 2)
    assert torch.equal(one[:, 0] > 0, b['mask'] > 0)
    shown = condition_picture(c)
    assert (shown[b['mask'].numpy() == 0] == 255).all() and len(np.unique(shown.reshape(-1, 3), axis=0)) == 3


@pytest.mark.parametrize(
    'call, text',
    [
        (lambda m, s: condition_planes(m + 1, s), 'class 3, and the classes are 0 to 2'),
        (lambda m, s: condition_planes(m - 1, s), 'class -1'),
        (lambda m, s: condition_planes(m.float(), s), 'integers'),
        (lambda m, s: condition_planes(m, s[..., ::2, ::2]), r'sketch must be \(2, 1, 32, 32\)'),
        (lambda m, s: tiny(classes=3).condition(m + 1, s), 'class 3'),
        (lambda m, s: tiny(classes=3).condition(m, s[..., ::2, ::2]), r'the sketch is \(16, 16\) pixels'),
        (lambda m, s: tiny(classes=3).condition(m[..., ::2, ::2], s), 'renders 32 × 32'),
        (lambda m, s: tiny(classes=3).render(s), 'condition.mask, sketch'),
        (lambda m, s: tiny(classes=3).render(torch.zeros(2, 3, 16, 16)), '3, 32, 32'),
        (lambda m, s: tiny(classes=3).sample(2), 'draw_from'),
        (lambda m, s: background_sketch(torch.zeros(1, 64, 64), m[0]), 'one size'),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(data, call, text):
    b = add_background_sketches(data).batch([0, 1])
    with pytest.raises(ValueError, match=text) as e:
        call(b['mask'].clamp(max=2), b['sketch'])
    assert one_line(e)


@pytest.mark.parametrize(
    'changes, text',
    [
        ({'size': 48}, 'power of two'),
        ({'start': 4}, '8'),
        ({'start': 64}, '32'),
        ({'receptive_field': 70}, 'use a smaller one'),
        ({'alpha_most': 1.5}, 'alpha_most'),
        ({'lr_g': 0}, 'lr_g'),
        ({'grow_steps': 0}, 'grow_steps'),
        ({'classes': 1}, 'classes=1'),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, text):
    with pytest.raises(ValueError, match=text) as e:
        tiny(**changes)
    assert one_line(e)


def test_data_without_masks_or_with_more_classes_is_refused(data):
    bare = ImageData(data.images)
    with pytest.raises(ValueError, match='no masks'):
        tiny().fit(bare, progress=False)
    with pytest.raises(ValueError, match='pass classes=5'):
        tiny(classes=3).fit(phantom_data('foetal_head', 4, 32), progress=False)
    with pytest.raises(ValueError, match='takes no further data'):
        tiny().fit(data, more=data, progress=False)


# --- runs ---


@pytest.mark.parametrize('at', [4, 8, 12])
def test_a_killed_run_resumes_to_the_last_bit(through, data, tmp_path, at):
    "Killed while it writes a checkpoint: D fading, G fading, and at full size"
    fit = lambda: tiny().fit(data, tmp_path / 'run', every=2, progress=False)

    def run():
        with half_written(lambda s: s['step'] == at, die):
            fit()

    killed(run)
    torch.manual_seed(123)
    fit()
    same_runs(through.out, tmp_path / 'run')


def test_checkpoints_and_log_say_where_training_stands(through):
    log = rows(through.out / 'render' / 'log.csv')
    assert [(row['step'], row['phase'], row['alpha_D'], row['alpha_G']) for row in log] == [
        ('10', 'G grows', '1.000', '0.500'),
        ('13', 'full', '1.000', '0.500'),
    ]
    newest = max((through.out / 'render' / 'checkpoints').glob('[0-9]*.pt'))
    state = torch.load(newest, weights_only=True)['callbacks']['Phases']
    assert state['phase'] == 'full' and state['alphas'] == {'D_P': 1.0, 'G_P': 0.5}


def test_save_and_load(through, data, tmp_path):
    r = through.recipe
    back = load_recipe(through.out, 'cpu').draw_from(data)
    assert type(back) is PGSgan and back.shared.keys() == {'G_P'}
    same(back.sample(3, seed=2), r.sample(3, seed=2))
    b = add_background_sketches(data).batch([2])
    x = r.condition(b['mask'], b['sketch'])
    torch.testing.assert_close(r.render(x), r.render(x[0]), rtol=0, atol=1e-6)
    assert r.render(x).shape == (1, 1, 32, 32) and r.render(x).abs().max() <= 1


def test_weights_of_the_middle_of_a_run_know_how_far_they_are(data, tmp_path):
    class Stop(Callback):
        def after_step(self, trainer):
            if trainer.step == 2:
                raise KeyboardInterrupt

    r = tiny()
    with pytest.raises(KeyboardInterrupt):
        r.fit(data, progress=False, callbacks=[Stop()])
    r.save(tmp_path / 'w.safetensors')
    back = load_recipe(tmp_path / 'w.safetensors', 'cpu').draw_from(data)
    assert r.fade.size == back.fade.size == 16
    same(back.sample(2), r.sample(2))
    assert back.sample(2)['image'].shape[-1] == 32  # enlarged


def test_samples_take_conditions_in_a_seeds_order(through, data):
    r = through.recipe
    s = r.sample(5, seed=1)
    assert set(s) == {'image', 'mask', 'sketch'}
    same(r.sample(2, seed=1, first=3)['mask'], s['mask'][3:])
    assert not torch.equal(r.sample(5, seed=2)['mask'], s['mask'])
    assert len(r.sample(9)['image']) == 9  # more than there are images
    torch.testing.assert_close(r.render(r.condition(s['mask'], s['sketch'])), s['image'], rtol=0, atol=1e-6)
    other = phantom_data('ultrasound', 3, 32, seed=5)
    assert not torch.equal(load_recipe(through.out, 'cpu').draw_from(other).sample(3)['mask'], s['mask'][:3])


def test_an_edit_stays_near_where_it_was_made():
    r = tiny(size=128, start=64, classes=3)
    m = torch.zeros(1, 128, 128, dtype=torch.long)
    edited = m.clone()
    edited[:, :8, :8] = 2
    a, b = (r.render(r.condition(v)) for v in (m, edited))
    change = (a - b).abs()[0, 0]
    assert change[:16, :16].max() > 0 and change[96:, 96:].max() == 0


def test_it_learns_what_a_class_looks_like():
    "Bright where the mask is, dark elsewhere"
    rng = np.random.default_rng(0)
    masks = np.zeros((24, 32, 32), np.uint8)
    for m in masks:
        y, x = rng.integers(2, 20, 2)
        m[y : y + 9, x : x + 9] = 1
    images = (40 + 170 * masks[:, None] + rng.integers(0, 20, (24, 1, 32, 32))).astype(np.uint8)
    r = tiny(ngf=8, base_steps=60, grow_steps=30, full_steps=30).fit(ImageData(images, masks), progress=False)
    s = r.sample(16)
    inside, outside = (s['image'][:, 0][s['mask'] == k].mean() for k in (1, 0))
    assert r.config['classes'] == 2 and inside > outside + 0.6


# --- ablations, command line ---


def test_ablations_differ_in_one_thing_each(data, tmp_path):
    small = {k: SMALL[k] for k in SMALL if k != 'size'}
    systems = {16: ablation(16, grows=False, **small), 32: ablation(32, **small)}
    assert list(systems[16]) == ['cGAN', 'Sgan'] and list(systems[32]) == ['cGAN', 'Sgan', 'PGSgan']
    assert {r.growth.steps for found in systems.values() for r in found.values()} == {STEPS}
    planes = {k: tiny(**{**r.config, 'classes': 3}).planes for k, r in systems[32].items()}
    assert planes == {'cGAN': 2, 'Sgan': 3, 'PGSgan': 3}
    sets = {n: phantom_data('ultrasound', 12, n) for n in systems}
    how = {'metrics': ('fid', 'kid', 'ms_ssim'), 'features': 'thumbnails', 'resamples': 0, 'progress': False}
    tables = compare_sizes(sets, systems, tmp_path, n=12, say=lambda _: None, **how)
    assert [list(t.rows) for t in tables.values()] == [['cGAN', 'Sgan'], ['cGAN', 'Sgan', 'PGSgan']]
    assert all(len(runs[0]) == 3 for t in tables.values() for runs in t.rows.values())
    with pytest.raises(ValueError, match='recipes for 16'):
        compare_sizes(sets, {16: systems[16]}, tmp_path)


def run(*args):
    "The command line's exit code"
    try:
        return main([str(a) for a in args]) or 0
    except SystemExit as e:
        return e.code or 0


def test_command_line(tmp_path, capsys):
    changes = [f'{k}={v}' for k, v in SMALL.items() if k != 'size' and not k.endswith('steps')]
    line = ['train', 'pgsgan', '--data', 'phantoms:ultrasound:8', '--scale', 'tour', '--size', 32, '--steps', 6]
    assert run(*line, '--out', tmp_path / 'r', *(v for c in changes for v in ('--set', c))) == 0
    assert run('train', '--resume', tmp_path / 'r') == 0
    assert run('sample', tmp_path / 'r', '--n', 3, '--out', tmp_path / 's') == 0
    assert sorted(p.name for p in (tmp_path / 's').iterdir() if p.is_dir()) == ['images', 'masks', 'sketches']
    capsys.readouterr()
    assert run('render', tmp_path / 'r', '--sketches', tmp_path / 's/sketches', '--out', tmp_path / 'x') == 1
    assert 'does not render sketches' in capsys.readouterr().err


def test_pictures_of_a_run_are_whole(through):
    pixels = through.recipe.rendered(add_background_sketches(phantom_data('ultrasound', 4, 32)))
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.shape[1] == 4 * 34 - 2
    assert to_uint8(torch.zeros(1, 4, 4)).shape == (4, 4, 1)
