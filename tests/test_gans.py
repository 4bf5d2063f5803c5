"""The baselines: networks, losses that push the right way, labels, and runs that resume to the last bit."""

import inspect
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import contents, die, half_written, killed, one_line, rows, same, same_runs
from PIL import Image

from medsketch.cli import main
from medsketch.core import to_uint8
from medsketch.data import ImageData, load_images, phantom_data
from medsketch.data.batches import Batches
from medsketch.models.dcgan import DCDiscriminator, DCGenerator, dc_widths
from medsketch.recipes import (
    ACGAN,
    DCGAN,
    PGGAN,
    WGAN,
    WGANGP,
    load_recipe,
    recipe_class,
)
from medsketch.recipes.baselines import Clip, folder_classes, pseudo_classes
from medsketch.sketch import add_sketches

os.environ['ACCELERATE_USE_CPU'] = 'true'  # "to the last bit" is a promise for the CPU

NAMES = ('dcgan', 'acgan', 'wgan', 'wgan_gp', 'pggan')
PAIR = {'ngf': 4, 'ndf': 4, 'steps': 9}
OWN = {
    'dcgan': PAIR,
    'acgan': PAIR | {'pseudo': 2},
    'wgan': PAIR,
    'wgan_gp': PAIR,
    'pggan': {'fmap_base': 32, 'fmap_max': 8, 'batches': 3},
}


def tiny(name, **changes):
    return recipe_class(name)(**{'size': 16, 'latent_dim': 8, 'batch_size': 4, **OWN[name], **changes})


def some_data(n=7, channels=3, size=16, seed=0, **kwargs):
    return ImageData(np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), np.uint8), **kwargs)


@pytest.fixture(scope='module')
def data():
    return some_data()


@pytest.fixture(scope='module')
def through(tmp_path_factory, data):
    "An uninterrupted run of each recipe"
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('runs')
    return {n: SimpleNamespace(out=out / n, recipe=tiny(n).fit(data, out / n, every=4, progress=False)) for n in NAMES}


# --- the networks ---


def test_shapes_are_those_of_the_paper():
    "Fig. 1 of the DCGAN paper; the counts are those of the authors' Torch code"
    G, shapes = DCGenerator(64, ngf=128), []
    for up in G.up:
        up.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[1:])))
    G(torch.randn(2, 100))
    assert shapes == [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (3, 64, 64)]
    fig1 = sum(a * b for a, b in zip((1024, 512, 256, 128), (512, 256, 128, 3))) * 25 + 100 * 1024 * 16  # 5 x 5 kernels
    weights = sum(u.weight.numel() * (25 / 16 if i else 1) for i, u in enumerate(G.up))
    assert weights == fig1
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert (count(DCGenerator()), count(DCDiscriminator())) == (3_576_704, 2_765_568)


def test_weights_start_from_the_papers_distribution():
    for net in (DCGenerator(32), DCDiscriminator(32)):
        for k, p in net.named_parameters():
            if p.ndim == 4:
                assert abs(p.std() - 0.02) < 0.002 and abs(p.mean()) < 0.002, k
        gains = torch.cat([n.weight for n in net.norms if hasattr(n, 'weight')])
        assert abs(gains.mean() - 1) < 0.01 and abs(gains.std() - 0.02) < 0.005


@pytest.mark.parametrize('size', [16, 32, 128])
@pytest.mark.parametrize('norm', ['batch', 'layer', 'instance', 'none'])
def test_shapes_and_gradients(size, norm):
    G, D = DCGenerator(size, 2, 8, ngf=4, classes=3, norm=norm), DCDiscriminator(size, 2, ndf=4, classes=3, norm=norm)
    x = G(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    assert x.shape == (4, 2, size, size) and x.abs().max() <= 1
    y = D(x)
    assert y.shape == (4, 4)
    y.square().sum().backward()
    for net in (G, D):
        for k, p in net.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, k


def test_widths_and_wrong_arguments():
    assert dc_widths(512, 64) == [512, 512, 512, 512, 256, 128, 64] and dc_widths(32, 16, 20) == [20, 20, 16]
    for wrong, text in (
        (lambda: DCGenerator(48), '64'),
        (lambda: DCDiscriminator(8), '16'),
        (lambda: DCGenerator(norm='spectral'), 'layer'),
        (lambda: DCGenerator(16)(torch.zeros(1, 8)), '100'),
        (lambda: DCGenerator(16, classes=2)(torch.zeros(1, 100)), '2 classes'),
        (lambda: DCGenerator(16)(torch.zeros(1, 100), torch.zeros(1, dtype=torch.long)), 'no labels'),
        (lambda: DCDiscriminator(16)(torch.zeros(1, 3, 32, 32)), '16, 16'),
    ):
        with pytest.raises(ValueError, match=text) as e:
            wrong()
        assert one_line(e)


def test_a_critic_without_batch_norm_judges_images_one_by_one():
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    D = tiny('wgan_gp').nets['D'].train()
    torch.testing.assert_close(D(x)[:1], D(x[:1]))


# --- the losses ---


def nets(r):
    return SimpleNamespace(**{k: n.train() for k, n in r.nets.items()})


def phases(r):
    return r.stages(None)[0].phases


def judge(r, n):
    return lambda x: r.judge(n.D, x)


def learn(r, real, fake, steps, label=None):
    "Only D's phase, against images that stay as they are; what it minimised at the end"
    phase = phases(r)[1]
    for _ in range(steps):
        batch = {'image': real, 'fake': fake} | ({} if label is None else {'label': label})
        loss = phase.loss(nets(r), batch)
        sum(loss.values() if isinstance(loss, dict) else [loss]).backward()
        phase.opt.step()
        phase.opt.zero_grad()
        for c in r.callbacks():
            if isinstance(c, Clip):
                c.after_step(None)
    return loss


def grey(level, n=8, seed=0):
    return (
        torch.full((n, 3, 16, 16), level)
        + 0.05 * torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    ).clamp(-1, 1)


@pytest.mark.parametrize('name', NAMES)
def test_discriminators_learn_the_right_way_round(name):
    r = tiny(name, lr=1e-3)
    label = torch.arange(8) % 2 if name == 'acgan' else None
    learn(r, grey(0.4), grey(-0.4, seed=1), 40, label)
    D = judge(r, nets(r))
    with torch.no_grad():
        assert D(grey(0.4, seed=2))[:, 0].mean() > D(grey(-0.4, seed=3))[:, 0].mean()


@pytest.mark.parametrize('name, steps', [('wgan_gp', 120), ('pggan', 40)])
def test_critics_measure_distance(name, steps):
    "Sets of grey images d apart at every pixel: the estimate grows with d; the settled one is near the true distance"
    gaps = (0.05, 0.2, 0.6)
    found = [-learn(tiny(name, lr=1e-3), grey(d), grey(0.0, seed=1), steps)['w'].item() for d in gaps]
    assert found[0] < found[1] < found[2]
    if name == 'wgan_gp':
        assert all(0.5 * d * 768**0.5 < f < 1.5 * d * 768**0.5 for f, d in zip(found, gaps)), found


def clipped(norm, d):
    "What a clipped critic makes of the same noise, d brighter in the left half"
    r, real = tiny('wgan', lr=1e-3, clip=0.05), grey(0.0)
    real[..., :8] += d
    r.nets['D'] = DCDiscriminator(16, ndf=4, norm=norm)
    found = -learn(r, real, grey(0.0), 40).item()
    assert all(p.abs().max() <= 0.05 for p in r.nets['D'].parameters())
    return found


def test_a_clipped_critic_tells_far_from_near():
    "With the paper's batch norm, which rescales what it is given, it tells different from equal only"
    torch.manual_seed(0)
    same_set, near, far = (clipped('none', d) for d in (0.0, 0.1, 0.6))
    assert abs(same_set) < 1e-4 and near > 0.1 and far > 3 * near
    same_set, near, far = (clipped('batch', d) for d in (0.0, 0.1, 0.6))
    assert abs(same_set) < 1e-4 and near > 0.1 and far > 0.1


@pytest.mark.parametrize('name', NAMES)
def test_the_generator_goes_where_the_discriminator_points(name, data):
    "Against a D that stays as it is, G's loss falls and D's verdict rises"
    r = tiny(name, lr=1e-3)
    label = {'label': torch.arange(8) % 2} if name == 'acgan' else {}
    learn(r, grey(0.4), grey(-0.4, seed=1), 20, label.get('label'))
    phase = phases(r)[0]
    n, verdict = nets(r), []
    for _ in range(25):
        batch = {'image': grey(0.4)} | label
        loss = phase.loss(n, batch)
        sum(loss.values() if isinstance(loss, dict) else [loss]).backward()
        phase.opt.step()
        phase.opt.zero_grad()
        with torch.no_grad():
            verdict.append(judge(r, n)(batch['fake'])[:, 0].mean().item())
    assert verdict[-1] > verdict[0]


def test_the_penalty_weighs_what_it_should(data):
    "With lambda 0 there is none; its gradient is part of D's"
    real, fake = grey(0.4), grey(-0.4, seed=1)
    a, b = (tiny('wgan_gp', lam=lam).loss_d(tiny('wgan_gp').nets['D'], real, fake, {}) for lam in (0.0, 10.0))
    assert a['gp'] == 0 and b['gp'] > 1 and torch.equal(a['w'], b['w'])
    assert {'w', 'gp', 'drift'} == set(tiny('pggan').loss_d(tiny('pggan').nets['D'], real, fake, {}))


def test_acgan_learns_to_draw_what_it_is_asked_for():
    "Bright and dark images in two classes: samples of each class are like that class"
    images = np.stack(
        [np.full((3, 16, 16), 200 if i % 2 else 60, np.uint8) for i in range(16)]
    ) + np.random.default_rng(0).integers(0, 20, (16, 3, 16, 16), np.uint8)
    ds = ImageData(images, paths=[f'd/{"bright" if i % 2 else "dark"}/{i}.png' for i in range(16)])
    r = ACGAN(size=16, latent_dim=8, ngf=8, ndf=8, lr=1e-3, steps=200, batch_size=8, augment='none').fit(
        ds, progress=False
    )
    assert r.config['classes'] == {'bright': 8, 'dark': 8}
    bright, dark = (r.sample(16, label=c) for c in ('bright', 'dark'))
    assert set(bright['label'].tolist()) == {0} and set(dark['label'].tolist()) == {1}
    assert bright['image'].mean() > dark['image'].mean() + 0.25
    assert set(r.sample(32)['label'].tolist()) == {0, 1}


# --- classes ---


def test_folders_are_classes_unless_they_are_subjects(tmp_path):
    for i, x in enumerate(phantom_data('fundus', 8, 32).batch(range(8))['image']):
        folder = tmp_path / 'set' / ('ill' if i % 4 == 0 else 'well')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(x)).save(folder / f'{i}.png')
    labels, names = folder_classes(load_images(tmp_path / 'set', 16))
    assert names == ['ill', 'well'] and labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    r = tiny('acgan', steps=2)
    r.fit(tmp_path / 'set', tmp_path / 'run', progress=False)
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['labels'] == 'folder names'
    back = load_recipe(tmp_path / 'run', 'cpu')
    assert back.config['classes'] == {'ill': 2, 'well': 6}
    same(back.sample(5, seed=1), r.sample(5, seed=1))
    with pytest.raises(ValueError, match="'cured'.*ill, well") as e:
        back.sample(1, label='cured')
    assert one_line(e)
    with pytest.raises(ValueError, match='knows the classes ill, well.*group 1') as e:
        back.fit(some_data(), progress=False)
    assert one_line(e)
    flat, scans = [f'{i}.png' for i in range(6)], [f'p{i // 2}/{i}.png' for i in range(6)]
    assert folder_classes(some_data(6, paths=flat)) is None
    assert folder_classes(some_data(6, paths=scans, subjects=[f'p{i // 2}' for i in range(6)])) is None


def test_pseudo_classes_find_groups_that_are_there():
    level = np.array([20, 90, 160, 230] * 10)
    images = (level[:, None, None, None] + np.random.default_rng(0).integers(-9, 10, (40, 1, 32, 32))).astype(np.uint8)
    labels = pseudo_classes(images, 4)
    assert all(len(set(labels[level == v].tolist())) == 1 for v in level) and len(set(labels.tolist())) == 4
    assert torch.equal(labels, pseudo_classes(images, 4))
    assert pseudo_classes(np.zeros((5, 3, 16, 16), np.uint8), 4).tolist() == [0] * 5  # no four groups there
    assert sorted(set(pseudo_classes(images[:2], 4).tolist())) == [0, 1]


def test_one_class_is_enough(tmp_path):
    r = tiny('acgan', steps=2).fit(ImageData(np.full((4, 3, 16, 16), 9, np.uint8)), tmp_path / 'run', progress=False)
    assert r.config['classes'] == {'group 1': 4} and load_recipe(tmp_path / 'run', 'cpu').sample(2)[
        'label'
    ].tolist() == [0, 0]
    assert 'k-means' in json.loads((tmp_path / 'run' / 'config.json').read_text())['labels']


# --- runs ---


@pytest.mark.parametrize('name', NAMES)
def test_a_finished_run_taken_up_again_draws_the_same(through, data, name):
    "There is no step left to make, and nothing may depend on one"
    r = tiny(name).fit(data, through[name].out, progress=False)
    assert torch.equal(r.sample(3)['image'], through[name].recipe.sample(3)['image'])


@pytest.mark.parametrize('name', NAMES)
def test_a_killed_run_resumes_to_the_last_bit(through, data, tmp_path, name):
    "Killed while it writes the checkpoint of step 8: between two of WGAN's updates of G, and in the middle of a fade"

    def run():
        with half_written(lambda s: s['step'] == 8, die):
            tiny(name).fit(data, tmp_path / 'run', every=4, progress=False)

    killed(run)
    assert [p.name for p in (tmp_path / 'run' / 'gan' / 'checkpoints').glob('[0-9]*.pt')] == ['000004.pt']
    torch.manual_seed(123)
    tiny(name).fit(data, tmp_path / 'run', every=4, progress=False)
    same_runs(through[name].out, tmp_path / 'run')
    before = contents(tmp_path / 'run')
    tiny(name).fit(data, tmp_path / 'run', every=4, progress=False)  # finished: left as it is
    assert contents(tmp_path / 'run') == before


@pytest.mark.parametrize('name', NAMES)
def test_what_a_run_leaves(through, data, name):
    out, r = through[name].out, through[name].recipe
    steps = 9
    assert sorted(p.name for p in (out / 'gan' / 'samples').iterdir()) == ['000004.png', '000008.png', '000009.png']
    log = rows(out / 'gan' / 'log.csv')
    assert int(log[-1]['step']) == steps and all(np.isfinite(float(v)) for row in log for v in row.values())
    back = load_recipe(out, 'cpu')
    assert (
        type(back) is recipe_class(name)
        and json.loads(json.dumps(back.config)) == json.loads((out / 'config.json').read_text())['config']
    )
    same(back.sample(3, seed=2), r.sample(3, seed=2))
    same(tiny(name).fit(data, progress=False).sample(3, seed=2), r.sample(3, seed=2))  # with or without a folder
    assert not any(n.training for n in r.nets.values()) and all(
        p.requires_grad for n in r.nets.values() for p in n.parameters()
    )
    same(r.nets['G'].state_dict(), r.ema.nets['G'].state_dict())


@pytest.mark.parametrize('name', NAMES)
def test_a_sample_does_not_depend_on_its_company(through, name):
    r = through[name].recipe
    whole = r.sample(8, seed=4)
    assert (
        whole['image'].shape == (8, 3, 16, 16)
        and whole['image'].abs().max() <= 1
        and ('label' in whole) == (name == 'acgan')
    )
    assert len({x.numpy().tobytes() for x in whole['image']}) == 8
    for other in (r.sample(3, seed=4), r.sample(8, seed=4, batch_size=3)):
        for k, v in other.items():
            torch.testing.assert_close(v, whole[k][: len(v)], rtol=0, atol=1e-5)
    assert not torch.equal(r.sample(8, seed=5)['image'], whole['image'])
    with pytest.raises(ValueError, match='n=0'):
        r.sample(0)
    assert not hasattr(r, 'render')


def test_the_critic_learns_more_often(data, tmp_path):
    "Twelve steps of WGAN: G has learned at steps 1, 6 and 11 only"
    r = tiny('wgan', steps=12, critic=5)
    made, real = [], WGAN.loss_g
    WGAN.loss_g = lambda self, *args: made.append(0) or real(self, *args)
    try:
        r.fit(data, progress=False)
    finally:
        WGAN.loss_g = real
    assert len(made) == 3


def test_sketches_and_masks_change_nothing(data):
    full = add_sketches(phantom_data('fundus', 4, 16))
    plain = ImageData(full.images, paths=full.paths)
    same(
        tiny('dcgan', steps=2).fit(full, progress=False).sample(2),
        tiny('dcgan', steps=2).fit(plain, progress=False).sample(2),
    )


def test_interrupted_while_it_grows(data, monkeypatch):
    "In a notebook: stop the cell, look at samples. They are of the resolution reached, as coarse pixels"
    r, real, calls = tiny('pggan'), PGGAN.loss_d, []

    def loss(self, *args):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(PGGAN, 'loss_d', loss)
    with pytest.raises(KeyboardInterrupt):
        r.fit(data, progress=False)
    x = r.sample(2)['image']
    assert x.shape == (2, 3, 16, 16) and torch.equal(x[..., ::2, ::2], x[..., 1::2, 1::2]) and not r.nets['G'].training


@pytest.mark.parametrize('name', NAMES)
def test_bf16(data, name):
    r = tiny(name, **({'batches': 1} if name == 'pggan' else {'steps': 3})).fit(
        data, progress=False, mixed_precision='bf16'
    )
    assert {p.dtype for p in r.nets['G'].parameters()} == {torch.float32} and r.sample(2)['image'].isfinite().all()


# --- arguments ---


@pytest.mark.parametrize(
    'name, changes, text',
    [
        ('dcgan', {'size': 100}, '128'),
        ('dcgan', {'size': 8}, '16'),
        ('dcgan', {'steps': 0}, 'steps=0'),
        ('wgan', {'critic': 0}, 'critic=0'),
        ('acgan', {'pseudo': 0}, 'pseudo=0'),
        ('wgan_gp', {'augment': 'mixup'}, 'flip'),
        ('pggan', {'size': 20}, '16'),
        ('pggan', {'batches': {4: 1}}, 'resolution 8'),
        ('dcgan', {'batch_size': 0}, 'batch_size=0'),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name, changes, text):
    with pytest.raises(ValueError, match=text) as e:
        tiny(name, **changes)
    assert one_line(e)


def test_data_and_folders_that_do_not_fit(through, data, tmp_path):
    for d, text in ((some_data(channels=1), '1 channels'), (some_data(size=32), '32 px')):
        with pytest.raises(ValueError, match=text) as e:
            tiny('dcgan').fit(d, tmp_path / 'run', progress=False)
        assert one_line(e) and not (tmp_path / 'run').exists()
    before = contents(through['wgan'].out)
    for r, d, text in (
        (tiny('wgan', clip=0.1), data, 'clip: 0.01 there, 0.1 now'),
        (tiny('wgan'), some_data(seed=1), 'another data'),
        (tiny('wgan_gp'), data, 'another recipe'),
    ):
        with pytest.raises(ValueError, match=text) as e:
            r.fit(d, through['wgan'].out, progress=False)
        assert one_line(e)
    assert contents(through['wgan'].out) == before
    with pytest.raises(ValueError, match='of recipe acgan, not dcgan'):
        DCGAN.load(through['acgan'].out, 'cpu')


def test_presets_are_the_papers():
    full = {
        c.name: {k: v.default for k, v in inspect.signature(c).parameters.items()} | c.presets['paper']
        for c in (DCGAN, ACGAN, WGAN, WGANGP, PGGAN)
    }
    assert all(f['size'] == 512 and f['batch_size'] == 16 for n, f in full.items() if n != 'pggan')  # SkrGAN's
    assert full['pggan']['size'] == 512
    assert [full[n]['lr'] for n in NAMES] == [2e-4, 2e-4, 5e-5, 1e-4, 1e-3]
    assert (
        full['wgan']['clip'],
        full['wgan']['critic'],
        full['wgan_gp']['critic'],
        full['wgan_gp']['lam'],
        full['pggan']['lam'],
    ) == (0.01, 5, 5, 10, 10)
    opt = {n: phases(tiny(n))[1].opt for n in NAMES}
    assert isinstance(opt['wgan'], torch.optim.RMSprop)
    assert [opt[n].param_groups[0]['betas'] for n in ('dcgan', 'acgan', 'wgan_gp', 'pggan')] == [
        (0.5, 0.999),
        (0.5, 0.999),
        (0.0, 0.9),
        (0.0, 0.99),
    ]
    for n in NAMES:
        for s in ('tour', 'gpu', 'paper'):
            assert recipe_class(n).presets[s].keys() <= full[n].keys()


@pytest.mark.parametrize('name', NAMES)
def test_steps_each(name):
    cls = recipe_class(name)
    for n in (5, 63, 64, 1000):
        assert tiny(name, **cls.steps_each(n, 16)).steps == n
    with pytest.raises(ValueError, match='at least 1'):
        cls.steps_each(0, 16)


def test_the_stream_has_labels_beside_images(data):
    batch = next(Batches(tiny('acgan').prepare(data)[0], 5, augment=None))
    assert batch['image'].shape[0] == batch['label'].shape[0] == 5


# --- the command line ---


@pytest.mark.parametrize('name', NAMES)
def test_command_line(name, tmp_path, capsys):
    def run(line):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        out = capsys.readouterr()
        assert stop.value.code == 0 and out.err == '', out.err
        return out.out

    small = '--set fmap_max=8' if name == 'pggan' else '--set ngf=4 --set ndf=4'
    run(
        f'train {name} --data phantoms:fundus:8 --out {tmp_path}/run --scale tour --size 16 --steps 6 '
        f'--set batch_size=2 {small}'
    )
    run(f'sample {tmp_path}/run --n 3 --out {tmp_path}/new --seed 2')
    lines = [json.loads(x) for x in (tmp_path / 'new' / 'metadata.jsonl').read_text().splitlines()]
    assert [x['recipe'] for x in lines] == [name] * 3 and not any('sketch' in x for x in lines)
    want = to_uint8(load_recipe(tmp_path / 'run', 'cpu').sample(3, seed=2)['image'][1])
    assert np.abs(np.asarray(Image.open(tmp_path / 'new' / 'images' / '000001.png')).astype(int) - want).max() <= 1
    assert (tmp_path / 'new' / 'grid.png').exists() and not Path(tmp_path / 'new' / 'sketches').exists()
