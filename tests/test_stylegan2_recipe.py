"""The StyleGAN2 recipe: who learns from what, what drawing is given, and runs that resume to the last bit."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import contents, die, half_written, killed, rows, same, same_runs
from PIL import Image

from medsketch.cli import main
from medsketch.core import to_uint8
from medsketch.data import ImageData, phantom_data
from medsketch.recipes import StyleGAN2, load_recipe
from medsketch.recipes.stylegan2 import pyramid_distance, ramp
from medsketch.train.checkpoints import newest_checkpoint
from medsketch.train.trainer import correct_adam

os.environ['ACCELERATE_USE_CPU'] = 'true'  # "to the last bit" is a promise for the CPU
SMALL = {'size': 16, 'latent_dim': 8, 'w_dim': 8, 'mapping_layers': 2, 'fmap_base': 32, 'fmap_max': 8, 'batch_size': 4}


def tiny(**changes):
    return StyleGAN2(**SMALL | {'steps': 9} | changes)


@pytest.fixture(scope='module')
def data():
    return ImageData(np.random.default_rng(0).integers(0, 256, (7, 3, 16, 16), np.uint8))


@pytest.fixture(scope='module')
def through(tmp_path_factory, data):
    "An uninterrupted run"
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('runs') / 'run'
    return SimpleNamespace(out=out, recipe=tiny().fit(data, out, every=4, progress=False))


# --- what is trained ---


def phases(r, data):
    return {p.name: p for p in r.stages(data)[0].phases}


def test_lazy_phases_and_adams_correction(data):
    r = tiny()
    found = phases(r, data)
    assert {n: p.every for n, p in found.items()} == {'G': 1, 'PL': 4, 'D': 1, 'R1': 16}
    assert found['G'].opt is found['PL'].opt and found['D'].opt is found['R1'].opt
    correct_adam(found['G'].opt, [found['G'], found['PL']])
    assert found['G'].opt.param_groups[0]['lr'] == pytest.approx(2e-3 * 4 / 5)
    assert found['G'].opt.param_groups[0]['betas'] == (0.0, pytest.approx(0.99**0.8))
    assert 'PL' not in phases(tiny(path_length=0.0), data) and 'R1' not in phases(tiny(r1=0.0), data)


def test_each_phase_moves_its_own_network_only(data):
    r = tiny()
    nets = SimpleNamespace(**r.nets)
    batch = {'image': torch.rand(4, 3, 16, 16) * 2 - 1}
    for name, phase in phases(r, data).items():
        own, other = (nets.G, nets.D) if name in ('G', 'PL') else (nets.D, nets.G)
        own.requires_grad_(True), other.requires_grad_(False)
        loss = phase.loss(nets, batch)
        loss.backward()
        reached = {n for n, p in own.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert any('weight' in n for n in reached) and all(p.grad is None for p in other.parameters())
        if name in ('G', 'PL'):
            assert any(n.startswith('mapping') for n in reached) and any(n.startswith('synthesis') for n in reached)
        own.zero_grad()


def test_the_penalty_weighs_what_it_should():
    assert tiny().game().r1 == pytest.approx(2e-4 * 256 / 4)
    assert tiny(r1=3.0).game().r1 == 3 and tiny(path_length=5.0).game().path.weight == 5


def test_the_mean_of_the_path_lengths_is_followed():
    r = tiny()
    path, nets = r.game().path, SimpleNamespace(**r.nets)
    path.keep = 0.0
    value = path.penalty(nets, {'image': torch.zeros(8, 3, 16, 16)})
    assert path.mean > 0 and value >= 0 and not path.mean.requires_grad
    path.keep = 1.0
    before = path.mean.clone()
    path.penalty(nets, {'image': torch.zeros(8, 3, 16, 16)})
    assert path.mean == before


def test_styles_are_mixed_as_often_as_asked():
    r = tiny(mixing=0.5)
    torch.manual_seed(0)
    w = r.random_styles(r.nets['G'], 2000)
    mixed = (w[:, 0] != w[:, -1]).any(1)
    assert 0.45 < mixed.float().mean() < 0.55
    changes = (w[mixed][:, 1:] != w[mixed][:, :-1]).any(2).float()
    assert (changes.sum(1) == 1).all() and (changes.mean(0) > 0.1).all()  # one change, at any layer
    w = tiny(mixing=0.0).random_styles(r.nets['G'], 4)
    assert torch.equal(w, w[:, :1].expand_as(w))


# --- runs ---


def test_a_killed_run_resumes_to_the_last_bit(through, data, tmp_path):
    "Killed while it writes the checkpoint of step 8; p, the path lengths' mean and the mean style go on"

    def run():
        with half_written(lambda s: s['step'] == 8, die):
            tiny().fit(data, tmp_path / 'run', every=4, progress=False)

    killed(run)
    assert [p.name for p in (tmp_path / 'run' / 'gan' / 'checkpoints').glob('[0-9]*.pt')] == ['000004.pt']
    torch.manual_seed(123)
    tiny().fit(data, tmp_path / 'run', every=4, progress=False)
    same_runs(through.out, tmp_path / 'run')
    before = contents(tmp_path / 'run')
    tiny().fit(data, tmp_path / 'run', every=4, progress=False)  # finished: left as it is
    assert contents(tmp_path / 'run') == before


def test_the_checkpoint_holds_p_and_the_mean_of_the_path_lengths(through):
    state = newest_checkpoint(through.out / 'gan' / 'checkpoints')
    kept = state['callbacks']
    assert kept['PathLength']['mean'] > 0 and 0 <= kept['Adapt']['p'] <= 1
    assert state['nets']['G']['mapping.w_avg'].abs().sum() > 0
    same(through.recipe.nets['G'].mapping.w_avg, state['nets']['G']['mapping.w_avg'])


def test_what_a_run_leaves(through, data):
    r = through.recipe
    log = rows(through.out / 'gan' / 'log.csv')
    assert int(log[-1]['step']) == 9 and {'G', 'D', 'R1', 'PL', 'p'} <= log[-1].keys()
    back = load_recipe(through.out, 'cpu')
    assert type(back) is StyleGAN2
    same(back.sample(3, seed=2, truncation=0.5), r.sample(3, seed=2, truncation=0.5))
    same(tiny().fit(data, progress=False).sample(3), r.sample(3))  # with or without a folder


def test_p_rises_when_d_is_sure(data):
    r = tiny(steps=20, ada=0.0)
    stage = r.stages(data)[0]
    adapt = next(c for c in stage.callbacks if type(c).__name__ == 'Adapt')
    r.nets['D'].logit.bias.data.fill_(50.0)  # takes all for real
    r._train(stage, None, None, meta={}, seed=0, progress=False)
    assert adapt.aug.p > 0.1


@pytest.mark.parametrize('changes', [{'channels': 1}, {'channels': 4}, {'ada': None, 'diffaugment': None}])
def test_other_channels_and_no_augmentation(changes):
    rng = np.random.default_rng(0)
    data = ImageData(rng.integers(0, 256, (5, changes.get('channels', 3), 16, 16), np.uint8))
    x = tiny(steps=2, **changes).fit(data, progress=False).sample(2)['image']
    assert x.shape == (2, changes.get('channels', 3), 16, 16) and x.isfinite().all()


def test_bf16(data):
    r = tiny(steps=3).fit(data, progress=False, mixed_precision='bf16')
    assert all(p.isfinite().all() and p.dtype == torch.float32 for n in r.nets.values() for p in n.parameters())


# --- drawing ---


def test_a_sample_does_not_depend_on_its_company(through):
    r = through.recipe
    whole = r.sample(8, seed=4)['image']
    torch.testing.assert_close(r.sample(3, seed=4, first=5)['image'], whole[5:], atol=1e-5, rtol=0)
    torch.testing.assert_close(r.sample(8, seed=4, batch_size=3)['image'], whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(r.sample(1, seed=4)['image'], whole[:1], atol=1e-5, rtol=0)


def test_truncation_seeds_and_mixing(through):
    r = through.recipe
    near = lambda a, b: torch.testing.assert_close(a['image'], b['image'], atol=1e-5, rtol=0)
    mean = r.sample(3, truncation=0.0)['image']
    torch.testing.assert_close(mean[0], mean[1], atol=1e-5, rtol=0)
    three = r.sample(3, seeds=(5, 5, 9))['image']
    torch.testing.assert_close(three[0], three[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(three[2:], r.sample(1, seed=9)['image'], atol=1e-5, rtol=0)
    near(r.sample(1, mix=7, start=0), r.sample(1, seed=7))
    near(r.sample(2, mix=7, start=6), r.sample(2))
    assert not torch.equal(r.sample(1, mix=7)['image'], r.sample(1)['image'])
    for wrong in ({'seeds': (1,)}, {'start': 7, 'mix': 1}, {'start': -1}):
        with pytest.raises(ValueError, match='seeds|styles'):
            r.sample(2, **wrong)


def test_inversion_finds_what_the_generator_made(through):
    r = through.recipe
    made = r.sample(2, seed=3, truncation=0.7)['image']
    start = pyramid_distance(r.sample(2, truncation=0.0)['image'], made)
    found = {space: r.invert(made, space, steps=60) for space in ('w', 'w+')}
    for f in found.values():
        assert f['w'].shape == (2, 6, 8) and (f['distance'] < start).all()
        with torch.no_grad():
            torch.testing.assert_close(r.nets['G'].synthesis(f['w']).clamp(-1, 1), f['image'])
    assert (found['w']['w'] == found['w']['w'][:, :1]).all()
    same(r.invert(made, 'w', steps=5), r.invert(made, 'w', steps=5))
    assert all(p.requires_grad and p.grad is None for p in r.nets['G'].parameters())
    for wrong in ((made, 'z'), (made[:, :1], 'w')):
        with pytest.raises(ValueError, match='space|shape'):
            r.invert(*wrong)
    assert ramp(0) < 0.1 and ramp(0.5) == pytest.approx(1) and ramp(0.999) < 1e-3


# --- the frame ---


def test_presets_are_the_papers():
    paper = StyleGAN2.presets['paper']
    assert paper['steps'] * paper['batch_size'] == 100 * 60_000 and paper['ada'] is None
    with torch.device('meta'):
        from medsketch.models.stylegan2 import StyleGenerator

        assert sum(p.numel() for p in StyleGenerator(256).parameters()) == 24_767_458
    r = tiny()
    opt = {n: r.optimiser(r.nets[n].parameters()) for n in 'GD'}
    assert all(o.param_groups[0]['betas'] == (0.0, 0.99) and o.param_groups[0]['lr'] == 2e-3 for o in opt.values())


def test_command_line(tmp_path, capsys):
    def run(line):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        out = capsys.readouterr()
        assert stop.value.code == 0 and out.err == '', out.err

    sets = ' '.join(f'--set {k}={v}' for k, v in SMALL.items() if k != 'size')
    run(f'train stylegan2 --data phantoms:fundus:8 --out {tmp_path}/run --scale tour --size 16 --steps 2 {sets}')
    run(f'sample {tmp_path}/run --n 3 --out {tmp_path}/new --seed 2')
    want = to_uint8(load_recipe(tmp_path / 'run', 'cpu').sample(3, seed=2)['image'][1])
    assert np.abs(np.asarray(Image.open(tmp_path / 'new' / 'images' / '000001.png')).astype(int) - want).max() <= 1


def test_it_learns_the_mean_colour():
    "A bright set: after a few steps the samples are brighter than before"
    data = ImageData(np.full((8, 3, 16, 16), 220, np.uint8))
    r = tiny(steps=150, lr=5e-3, ada=None, diffaugment=None, r1=0.1)
    before = r.sample(8)['image'].mean()
    after = r.fit(data, progress=False).sample(8)['image'].mean()
    assert after > before + 0.2 and phantom_data('fundus', 1, 16).size == 16
