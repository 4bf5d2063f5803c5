"""SkrGAN and what all recipes share: killed runs, foreign folders, files, seeds, gradients, and that it learns."""

import copy
import inspect
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from faults import (
    contents,
    die,
    disk_full,
    exit_codes,
    half_written,
    killed,
    one_line,
    rows,
    same,
    same_runs,
)
from safetensors.torch import load_file, save_file
from torch import nn

from medsketch.core import torch_rng
from medsketch.data import ImageData, phantom_data
from medsketch.data.batches import Batches, flip_rotate
from medsketch.recipes import RECIPES, Recipe, SkrGAN, base, load_recipe, skrgan
from medsketch.sketch import add_sketches
from medsketch.train import adversarial, weights
from medsketch.train.callbacks import TrainingDiverged, checkpoints
from medsketch.train.trainer import Trainer, to_device

os.environ['ACCELERATE_USE_CPU'] = 'true'  # "to the last bit" is a promise for the CPU

TINY = {
    'size': 16,
    'latent_dim': 8,
    'fmap_base': 32,
    'fmap_max': 8,
    'ngf': 4,
    'ndf': 4,
    'receptive_field': 16,
    'batch_size': 4,
    'batches': 6,
    'render_steps': 9,
    'joint_steps': 7,
}


def tiny(**changes):
    return SkrGAN(**TINY | changes)


def some_data(n=6, channels=3, size=16, seed=0):
    rng = np.random.default_rng(seed)
    return ImageData(
        rng.integers(0, 256, (n, channels, size, size), np.uint8),
        sketches=rng.choice(np.array([0, 255], np.uint8), (n, size, size), p=(0.8, 0.2)),
    )


@pytest.fixture(scope='module')
def data():
    return some_data()


def fit(out, data, **changes):
    return tiny(**changes).fit(data, out, every=4, progress=False)


@pytest.fixture(scope='module')
def through(tmp_path_factory, data):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('runs') / 'through'
    return SimpleNamespace(out=out, recipe=fit(out, data))


# --- killed runs ---


def dying_in(monkeypatch, losses, name, k):
    "The k-th call of a loss kills the process"
    owner = getattr(skrgan if losses == 'JointLosses' else adversarial, losses)
    real, calls = getattr(owner, name), []

    def loss(self, nets, batch):
        calls.append(0)
        if len(calls) == k:
            die()
        return real(self, nets, batch)

    monkeypatch.setattr(owner, name, loss)


def stage_of(state):
    return 'joint' if len(state['nets']) == 4 else 'sketch' if 'G_S' in state['nets'] else 'render'


STEPS = [
    ('Adversarial', 'd', 2),
    ('Adversarial', 'd', 8),
    ('Adversarial', 'penalty', 2),
    ('RenderLosses', 'd', 6),
    ('JointLosses', 'd_s', 3),
    ('JointLosses', 'd_p', 6),
]
WRITES = [
    ('sketch', 4),
    ('sketch', 8),
    ('sketch', 16),
    ('sketch', 18),
    ('render', 8),
    ('render', 9),
    ('joint', 4),
    ('joint', 7),
]


@pytest.mark.parametrize('losses, name, k', STEPS)
def test_killed_in_the_middle_of_a_step(through, data, tmp_path, monkeypatch, losses, name, k):
    "Between one phase and the next, in every stage; the second step of R1 is in the middle of a fade"
    with monkeypatch.context() as m:
        dying_in(m, losses, name, k)
        killed(lambda: fit(tmp_path / 'run', data))
    assert not (tmp_path / 'run' / 'joint' / 'checkpoints' / '000007.pt').exists()
    same_runs(through.out, Path(fit_again(tmp_path / 'run', data)))


def fit_again(out, data):
    torch.manual_seed(123)  # whatever the new process has drawn before
    tiny().fit(data, out, resume=True, every=4, progress=False)
    return out


@pytest.mark.parametrize('stage, step', WRITES)
def test_killed_in_the_middle_of_a_checkpoint(through, data, tmp_path, stage, step):
    def run():
        with half_written(lambda s: (stage_of(s), s['step']) == (stage, step), die):
            fit(tmp_path / 'run', data)

    killed(run)
    folder = tmp_path / 'run' / stage / 'checkpoints'
    assert [p for p in folder.iterdir() if p.suffix == '.tmp'] and f'{step:06d}.pt' not in [
        p.name for p in folder.iterdir()
    ]
    same_runs(through.out, fit_again(tmp_path / 'run', data))


def test_killed_again_and_again(through, data, tmp_path, monkeypatch):
    for losses, name, k in [
        ('Adversarial', 'd', 7),
        ('Adversarial', 'd', 6),
        ('Adversarial', 'g', 8),
        ('RenderLosses', 'd', 5),
        ('RenderLosses', 'd', 5),
        ('JointLosses', 'd_p', 5),
    ]:
        with monkeypatch.context() as m:
            dying_in(m, losses, name, k)
            killed(lambda: fit(tmp_path / 'run', data))
    same_runs(through.out, fit_again(tmp_path / 'run', data))


def test_killed_while_another_interpreter_began_it(through, data, tmp_path):
    "The run that dies is a fresh Python, as on a real machine"
    np.savez(tmp_path / 'data.npz', images=data.images, sketches=data.sketches)
    script = f'''
import sys, torch, numpy as np
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads(1)
from faults import die, half_written
from medsketch.data import ImageData
from medsketch.recipes import SkrGAN
with half_written(lambda s: s['step'] == 12 and 'G_S' in s['nets'], die):
    SkrGAN(**{TINY!r}).fit(ImageData(**np.load({str(tmp_path / 'data.npz')!r})), {str(tmp_path / 'run')!r}, every=4)
'''
    done = subprocess.run(
        [sys.executable, '-c', script],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == -9, done.stderr
    assert [p.name for p in checkpoints(tmp_path / 'run' / 'sketch' / 'checkpoints')] == ['000004.pt', '000008.pt']
    same_runs(through.out, fit_again(tmp_path / 'run', data))


@pytest.mark.parametrize('stage, last', [('sketch', 18), ('render', 9), ('joint', 7)])
def test_truncated_newest_checkpoint(through, data, tmp_path, stage, last):
    fit(tmp_path / 'run', data)
    newest = tmp_path / 'run' / stage / 'checkpoints' / f'{last:06d}.pt'
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=f'{newest.name} cannot be read'):
        fit_again(tmp_path / 'run', data)
    same_runs(through.out, tmp_path / 'run')


def test_logs_have_every_step_once(through):
    for stage, last in (('sketch', 18), ('render', 9), ('joint', 7)):
        log = rows(through.out / stage / 'log.csv')
        assert [int(r['step']) for r in log] == sorted({s for s in range(10, last, 10)} | {last})
        assert all(np.isfinite(float(v)) for r in log for v in r.values())
    assert [(r['size'], r['alpha']) for r in rows(through.out / 'sketch' / 'log.csv')] == [
        ('8', '1.000'),
        ('16', '1.000'),
    ]


def test_a_finished_run_is_left_as_it_is(through, data):
    before = contents(through.out)
    fit_again(through.out, data)
    assert contents(through.out) == before


def test_stages_one_by_one(through, data, tmp_path):
    "Each in a process of its own: what the others left in the folder is taken up, discriminators too"
    for stage in ('sketch', 'render', 'joint'):
        tiny().fit(data, tmp_path / 'run', stages=[stage], every=4, progress=False)
    same_runs(through.out, tmp_path / 'run')
    r = tiny().fit(data, tmp_path / 'run', stages=['render'], every=4, progress=False)
    same(r.sample(2), through.recipe.sample(2))
    same_runs(through.out, tmp_path / 'run')


# --- folders that do not fit ---


@pytest.mark.parametrize(
    'what, text',
    [
        ('config', 'ngf: 4 there, 8 now'),
        ('seed', 'seed: 0 there, 1 now'),
        ('data', 'another data'),
        ('recipe', 'another recipe'),
        ('resume', 'already'),
        ('json', 'config.json'),
    ],
)
def test_a_folder_of_another_run_is_left_alone(through, data, tmp_path, what, text):
    r, out, kwargs = tiny(), tmp_path / 'run', {}
    fit(out, data)
    if what == 'config':
        r = tiny(ngf=8)
    if what == 'seed':
        r = tiny(seed=1)
    if what == 'data':
        data = some_data(seed=1)
    if what == 'resume':
        kwargs['resume'] = False
    if what == 'recipe':
        (out / 'config.json').write_text((out / 'config.json').read_text().replace('"skrgan"', '"pggan"'))
    if what == 'json':
        (out / 'config.json').write_text('{"recipe": ')
    before = contents(out)
    with pytest.raises(ValueError, match=text) as e:
        r.fit(data, out, progress=False, **kwargs)
    assert one_line(e) and contents(out) == before


def test_checkpoints_of_another_run_in_the_folder(data, tmp_path):
    fit(tmp_path / 'a', data)
    for name, changes, d in (('b', {'ngf': 8}, data), ('c', {}, some_data(seed=1))):
        (tmp_path / 'a').rename(tmp_path / name)
        (tmp_path / name / 'config.json').unlink()
        before = contents(tmp_path / name / 'sketch')
        with pytest.raises(ValueError, match='000018.pt has .*another output folder') as e:
            fit(tmp_path / name, d, **changes)
        assert one_line(e) and contents(tmp_path / name / 'sketch') == before
        (tmp_path / name).rename(tmp_path / 'a')


def test_unwritable_folder(data, tmp_path, through):
    (tmp_path / 'file').write_text('not a folder')
    for out in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        with pytest.raises(ValueError, match='cannot write to .*file') as e:
            fit(out, data)
        assert one_line(e)
        with pytest.raises((ValueError, RuntimeError), match='could not write.*file') as e:
            through.recipe.save(tmp_path / 'file' / 'x.safetensors')
        assert one_line(e)
    assert contents(tmp_path) == {Path('file'): b'not a folder'}


def test_disk_full(through, data, tmp_path, monkeypatch):
    with (
        half_written(lambda s: (stage_of(s), s['step']) == ('render', 8), disk_full),
        pytest.raises(RuntimeError, match='best.pt|000008.pt.*No space') as e,
    ):
        fit(tmp_path / 'run', data)
    assert one_line(e)
    assert torch.load(tmp_path / 'run' / 'render' / 'checkpoints' / '000004.pt', weights_only=True)['step'] == 4
    same_runs(through.out, fit_again(tmp_path / 'run', data))
    saved = (tmp_path / 'run' / 'weights.safetensors').read_bytes()
    monkeypatch.setattr(weights, 'to_bytes', disk_full)
    with pytest.raises(RuntimeError, match='weights.safetensors.*No space') as e:
        through.recipe.save(tmp_path / 'run' / 'weights.safetensors')
    assert one_line(e) and (tmp_path / 'run' / 'weights.safetensors').read_bytes() == saved


def test_nan_stops_and_leaves_good_weights(data, tmp_path, monkeypatch):
    real, calls = adversarial.RenderLosses.g, []

    def g(self, nets, batch):
        calls.append(0)
        if len(calls) == 7:
            batch['image'] = batch['image'] * float('nan')
        return real(self, nets, batch)

    monkeypatch.setattr(adversarial.RenderLosses, 'g', g)
    r = tiny()
    with pytest.raises(
        TrainingDiverged, match=r'G_P_l1.* step 7; the last good checkpoint is .*render.*000004\.pt'
    ) as e:
        r.fit(data, tmp_path / 'run', every=4, progress=False)
    assert one_line(e)
    state = torch.load(tmp_path / 'run' / 'render' / 'checkpoints' / '000004.pt', weights_only=True)
    assert all(t.isfinite().all() for n in state['nets'].values() for t in n.values())
    assert r.sample(2)['image'].isfinite().all() and not any(n.training for n in r.nets.values())


def test_interrupted_by_hand(data, monkeypatch):
    "In a notebook: stop the cell, look at samples. They come from the averages, with batch norm at rest"
    real, calls = adversarial.RenderLosses.d, []

    def d(self, nets, batch):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, nets, batch)

    monkeypatch.setattr(adversarial.RenderLosses, 'd', d)
    r = tiny()
    with pytest.raises(KeyboardInterrupt):
        r.fit(data, stages=['render'], progress=False)
    assert not any(n.training for n in r.nets.values()) and all(
        p.requires_grad for n in r.nets.values() for p in n.parameters()
    )
    s = torch.rand(4, 1, 16, 16)
    torch.testing.assert_close(r.render(s)[:1], r.render(s[:1]))
    same(r.nets['G_P'].state_dict(), r.ema.nets['G_P'].state_dict())


# --- arguments ---


@pytest.mark.parametrize(
    'changes, text',
    [
        ({'size': 100}, '128'),
        ({'size': 8}, '8'),
        ({'augment': 'mixup'}, 'flip'),
        ({'batches': {4: 1}}, 'resolution 8'),
        ({'receptive_field': 70}, 'receptive_field=70.*16'),
        ({'receptive_field': 33}, '33'),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_training(changes, text):
    with pytest.raises(ValueError, match=text) as e:
        tiny(**changes)
    assert one_line(e)


def test_data_that_does_not_fit_is_refused(data, tmp_path):
    for d, kwargs, text in (
        (some_data(channels=1), {}, '1 channels'),
        (some_data(size=32), {}, '32 px'),
        (data, {'stages': ['sketch', 'color']}, 'color'),
    ):
        with pytest.raises(ValueError, match=text) as e:
            tiny().fit(d, tmp_path / 'run', **kwargs)
        assert one_line(e) and not (tmp_path / 'run').exists()


def test_presets_are_the_papers():
    p = SkrGAN.presets['paper']
    full = {k: v.default for k, v in inspect.signature(SkrGAN.__init__).parameters.items()} | p
    assert (full['size'], full['channels'], full['batch_size'], full['lam'], full['joint_steps'] > 0) == (
        512,
        3,
        16,
        100.0,
        True,
    )
    r = tiny()
    assert [g['lr'] for g in r._adam('G_S', 'G_P').param_groups] == [1e-3, 2e-4]
    for s in SkrGAN.presets:
        assert SkrGAN.presets[s].keys() <= full.keys()


# --- files ---


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_save_and_load(tmp_path, channels):
    r = tiny(channels=channels, batches={4: 1, 8: 2, 16: 3}, seed=5)
    for n in r.nets.values():
        for t in n.state_dict().values():
            t.add_(0.01) if t.is_floating_point() else t.add_(1)
    r.save(tmp_path / 'r.safetensors')
    state = torch.get_rng_state()
    for back in (load_recipe(tmp_path / 'r.safetensors', 'cpu'), SkrGAN.load(str(tmp_path / 'r.safetensors'), 'cpu')):
        assert type(back) is SkrGAN and back.config == r.config
        same(r.sample(5, seed=3), back.sample(5, seed=3))
        same(r.nets['G_P'].state_dict(), back.nets['G_P'].state_dict())
    assert torch.equal(state, torch.get_rng_state())


def refused(path, text=''):
    with pytest.raises(ValueError, match=text) as e:
        load_recipe(path, 'cpu')
    assert one_line(e) and str(path) in str(e.value)


@pytest.mark.parametrize('left', [0, 4, 200, 0.5, -1])
def test_truncated_file(through, tmp_path, left):
    whole = (through.out / 'weights.safetensors').read_bytes()
    (tmp_path / 't.safetensors').write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    refused(tmp_path / 't.safetensors', 'not a file that medsketch saved')
    r = tiny()
    before = r.sample(1)
    with pytest.raises(ValueError, match='t.safetensors'):
        r.load_weights(tmp_path / 't.safetensors')
    same(before, r.sample(1))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_by_another_name_is_not_executed(tmp_path):
    payload = Payload(tmp_path / 'executed')
    (tmp_path / 'a.safetensors').write_bytes(pickle.dumps(payload))
    torch.save(payload, tmp_path / 'b.safetensors')
    for name in 'ab':
        refused(tmp_path / f'{name}.safetensors', 'not a file that medsketch saved')
    assert not (tmp_path / 'executed').exists()


def test_files_that_are_something_else(through, tmp_path):
    weights = load_file(through.out / 'weights.safetensors')
    about = lambda **changes: {'medsketch': json.dumps({'recipe': 'skrgan', 'config': through.recipe.config} | changes)}
    for meta, text in (
        (None, 'not a file'),
        ({'medsketch': '[1]'}, 'not a file'),
        ({'medsketch': '{'}, 'not a file'),
        (about(config=None), 'not a file'),
        (about(config={'size': 16, 'colour': 'red'}), 'colour'),
        (about(config=through.recipe.config | {'ngf': 8}), 'this recipe needs'),
    ):
        save_file(weights, tmp_path / 'w.safetensors', metadata=meta)
        refused(tmp_path / 'w.safetensors', text)
    save_file(weights, tmp_path / 'w.safetensors', metadata=about(recipe='stargan'))
    with pytest.raises(ValueError, match="'stargan'.*skrgan") as e:
        load_recipe(tmp_path / 'w.safetensors')
    assert one_line(e)
    refused(tmp_path / 'nowhere.safetensors', 'does not exist')
    refused(tmp_path, 'does not exist')


def test_weights_are_taken_up_whole_or_not_at_all(through, tmp_path):
    weights = load_file(through.out / 'weights.safetensors')
    names = sorted(weights)
    for changed in (
        weights | {names[-1]: torch.zeros(3, 3)},
        {k: weights[k] for k in names[:-1]},
        weights | {'G_P.more': torch.zeros(1)},
        weights | {'H.more': torch.zeros(1)},
    ):
        save_file(changed, tmp_path / 'w.safetensors')
        r = tiny(seed=1)
        before = r.sample(1)
        with pytest.raises(ValueError, match=f'({names[-1]}|more)'):
            r.load_weights(tmp_path / 'w.safetensors')
        same(before, r.sample(1))


def test_load_through_the_wrong_class(through, monkeypatch):
    monkeypatch.setattr(base, 'RECIPES', dict(RECIPES))

    class Other(Recipe):
        name = 'other'

    with pytest.raises(ValueError, match='skrgan, not other'):
        Other.load(through.out, 'cpu')


def test_a_run_folder_is_its_recipe(through):
    same(load_recipe(through.out, 'cpu').sample(3), through.recipe.sample(3))
    config = json.loads((through.out / 'config.json').read_text())
    assert (
        config['recipe'] == 'skrgan'
        and config['config']['ngf'] == 4
        and {'medsketch', 'torch', 'python'} <= config['versions'].keys()
    )
    assert not any(
        k.startswith('D_') for k in load_file(through.out / 'weights.safetensors')
    )  # discriminators are not shared


# --- seeds ---


def test_seeds(data):
    state = torch.get_rng_state()
    a, b, c = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(state, torch.get_rng_state())  # building a recipe leaves the caller's generator alone
    for k in a.nets:
        same(a.nets[k].state_dict(), b.nets[k].state_dict())
        assert any(not torch.equal(p, q) for p, q in zip(a.nets[k].parameters(), c.nets[k].parameters()))
    same(a.sample(4, seed=2), b.sample(4, seed=2))
    x, y = a.sample(4, seed=2)['sketch'], a.sample(4, seed=3)['sketch']
    assert not any(torch.equal(p, q) for p in x for q in y)
    assert len({s.numpy().tobytes() for s in x}) == 4
    a.sample(3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('threads', [1, 2])
def test_a_sample_does_not_depend_on_its_company(through, threads):
    torch.set_num_threads(threads)
    r = through.recipe
    whole = r.sample(8, seed=4)
    for other in (r.sample(3, seed=4), {k: v[:3] for k, v in r.sample(8, seed=4, batch_size=3).items()}):
        for k in whole:
            torch.testing.assert_close(other[k], whole[k][:3], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='n=0'):
        r.sample(0)


def test_training_follows_its_seed(data, through):
    again = fit(None, data)
    same(again.sample(2), through.recipe.sample(2))  # with or without a folder
    other = fit(None, data, seed=1)
    assert not torch.equal(other.sample(2)['image'], again.sample(2)['image'])


# --- drawing ---


def test_render(through):
    r = through.recipe
    s = torch.rand(20, 1, 16, 16, generator=torch_rng(0))
    state = copy.deepcopy(r.nets['G_P'].state_dict())
    whole = r.render(s)
    assert whole.shape == (20, 3, 16, 16) and whole.abs().max() <= 1 and not whole.requires_grad
    torch.testing.assert_close(torch.cat([r.render(x) for x in s]), whole, rtol=0, atol=1e-5)
    for x in (s[3], s[3, 0], s[3, 0].numpy(), s[3].double(), s[3, 0].tolist()):
        torch.testing.assert_close(r.render(x), whole[3:4], rtol=0, atol=1e-5)
    for bad in (torch.zeros(8, 8), torch.zeros(1, 1, 16, 32)):
        with pytest.raises(ValueError, match='16 × 16') as e:
            r.render(bad)
        assert one_line(e)
    same(r.nets['G_P'].state_dict(), state)


@pytest.mark.parametrize('training', [True, False])
def test_drawing_leaves_the_mode_alone(training):
    r = tiny()
    for n in r.nets.values():
        n.train(training)
    r.sample(2), r.render(torch.zeros(2, 1, 16, 16))
    assert all(m.training == training for n in r.nets.values() for m in n.modules())
    assert torch.is_grad_enabled() and all(p.requires_grad for n in r.nets.values() for p in n.parameters())


def test_what_was_drawn_can_be_learned_from(through):
    made = through.recipe.sample(2)
    segmenter = nn.Conv2d(3, 1, 3)
    segmenter(made['image']).square().mean().backward()
    assert segmenter.weight.grad.abs().sum() > 0


# --- gradients ---


def stage_trainer(r, stage, data, monkeypatch):
    "A stage's trainer, stopped before its first step"
    made = []

    def stop(self, steps):
        made.append(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Trainer, 'fit', stop)
        with pytest.raises(KeyboardInterrupt):
            r.fit(data, stages=[stage], progress=False)
    for n in r.nets.values():
        n.train()
    return made[0]


@pytest.mark.parametrize(
    'stage, phases',
    [('sketch', ['G_S', 'D_S', 'D_S']), ('render', ['G_P', 'D_P']), ('joint', ['G_S G_P', 'D_S', 'D_P', 'D_S'])],
)
def test_each_phase_moves_its_networks_only(data, monkeypatch, stage, phases):
    r = tiny()
    t = stage_trainer(r, stage, data, monkeypatch)
    assert len(t.phases) == len(phases)
    batch = to_device(next(t.data), t.device)
    for phase, moved in zip(t.phases, phases):
        before = {k: [p.detach().clone() for p in n.parameters()] for k, n in r.nets.items()}
        t._run(phase, [batch])
        for k, n in r.nets.items():
            assert all(torch.equal(a, b) for a, b in zip(before[k], n.parameters())) == (k not in moved.split()), (
                phase.name,
                k,
            )
            assert all(p.grad is None for p in n.parameters())


def test_the_rendered_image_teaches_the_sketch_generator():
    "With a D_P that looks at nothing but the image, and a D_S that looks at nothing, G_S still gets a gradient"
    r = tiny()
    nets = SimpleNamespace(**r.nets)
    nets.D_P = lambda image, sketch: image.mean((1, 2, 3))
    nets.D_S = lambda sketch, alpha=1.0: sketch.new_zeros(len(sketch), 1)
    batch = {'sketch': torch.rand(4, 1, 16, 16), 'image': torch.rand(4, 3, 16, 16)}
    losses = skrgan.JointLosses(8).g(nets, batch)
    (grad,) = torch.autograd.grad(losses['pair'], r.nets['G_S'].code)
    assert grad.abs().sum() > 0


def test_eq_3_has_all_its_terms(data, monkeypatch):
    r = tiny()
    t = stage_trainer(r, 'joint', data, monkeypatch)
    t._run(t.phases[0], [b := to_device(next(t.data), t.device)])
    assert set(t.losses) == {'G_sketch', 'G_pair', 'G_adv', 'G_l1'}
    want = 100 * (b['rendered'] - b['image']).abs().mean()
    torch.testing.assert_close(t.losses['G_l1'], want)


def test_discriminators_learn_the_right_way_round(data, monkeypatch):
    "Eq. 1 as printed has real and fake exchanged; here real sketches and pairs get the larger logits"
    for stage, d in (('sketch', 'D_S'), ('render', 'D_P')):
        r = tiny(augment='none', batches=1, r1=0.0)
        t = stage_trainer(r, stage, data, monkeypatch)
        if stage == 'sketch':
            t.callbacks[0].size = 16
        batch = to_device(data.batch(range(6)), t.device)
        t._run(t.phases[0], [batch])
        for _ in range(60):
            t._run(t.phases[1], [batch])
        with torch.no_grad():
            y = batch['sketch']
            real, fake = (
                (r.nets[d](y * 2 - 1), r.nets[d](batch['fake']))
                if d == 'D_S'
                else (r.nets[d](batch['image'], y), r.nets[d](batch['fake'], y))
            )
        assert real.mean() > fake.mean() + 0.2, stage


# --- learning ---


@pytest.fixture(scope='module')
def phantoms():
    return {kind: add_sketches(phantom_data(kind, 4, 32), style=kind) for kind in ('fundus', 'chest_xray')}


def test_the_renderer_learns_four_images_by_heart(phantoms):
    chests = phantoms['chest_xray']
    r = SkrGAN(
        size=32,
        channels=1,
        latent_dim=8,
        fmap_base=32,
        fmap_max=8,
        ngf=24,
        ndf=4,
        receptive_field=34,
        render_steps=220,
        batch_size=4,
        augment='none',
    )
    r.fit(chests, stages=['render'], progress=False)
    b = chests.batch(range(4))
    mean_image = (b['image'] - b['image'].mean(0)).abs().mean()
    assert (r.render(b['sketch']) - b['image']).abs().mean() < 0.35 * mean_image


def test_generated_sketches_are_as_dark_as_real_ones(phantoms):
    r = SkrGAN(
        size=16, latent_dim=16, fmap_base=256, fmap_max=32, ngf=4, ndf=4, receptive_field=16, batches=70, batch_size=8
    )
    eyes = phantoms['fundus']
    small = nn.functional.avg_pool2d(eyes.batch(range(4))['sketch'], 2)
    data = ImageData(np.zeros((4, 3, 16, 16), np.uint8), sketches=(small[:, 0] * 255).round().to(torch.uint8).numpy())
    real, untrained = small.mean(), r.sample(64)['sketch'].mean()
    r.fit(data, stages=['sketch'], progress=False)
    made = r.sample(64, seed=1)['sketch']
    assert abs(untrained - real) > 0.2  # grey at first
    assert abs(made.mean() - real) < 0.06, (made.mean(), real)
    ink = made.mean((0, 1)), small.mean((0, 1))  # and the ink is where it is in the real ones
    assert torch.corrcoef(torch.stack([x.flatten() for x in ink]))[0, 1] > 0.5


# --- kinds of runs ---


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_channels(channels, tmp_path):
    r = fit(tmp_path / 'run', some_data(channels=channels), channels=channels, batches=2, render_steps=2, joint_steps=2)
    assert r.sample(2)['image'].shape == (2, channels, 16, 16)
    assert len(list((tmp_path / 'run').rglob('samples/*.png'))) == 4


def test_bf16(data, tmp_path):
    r = tiny().fit(data, tmp_path / 'run', every=4, progress=False, mixed_precision='bf16')
    assert {p.dtype for n in r.nets.values() for p in n.parameters()} == {torch.float32}
    assert r.sample(2)['image'].isfinite().all() and r.sample(2)['image'].dtype == torch.float32
    for log in (tmp_path / 'run').rglob('log.csv'):
        assert all(np.isfinite(float(v)) for row in rows(log) for v in row.values())
    assert not torch.equal(r.sample(2)['image'], fit(None, data).sample(2)['image'])


def test_batches_are_the_same_for_one_seed(data):
    "A stage's stream is a function of seed and position"
    a, b = (Batches(data, 4, seed=1, augment=flip_rotate) for _ in range(2))
    first = [next(a) for _ in range(3)]
    b.position = 8
    same(first[2], next(b))


def rank(i, port, out, data):
    os.environ.update(
        RANK=str(i),
        LOCAL_RANK=str(i),
        WORLD_SIZE='2',
        LOCAL_WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    if not torch.cuda.is_available():
        del os.environ['ACCELERATE_USE_CPU']  # as a launcher would leave it
    AcceleratorState._reset_state(reset_partial_state=True)
    r = tiny(batch_size=2).fit(data, out / 'run', resume=False, every=4, progress=False)
    r.save(out / f'{i}.safetensors')
    torch.distributed.destroy_process_group()


def test_two_processes(data, tmp_path):
    "They share one new folder and the batches, and end with the same generators"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    assert exit_codes(lambda: rank(0, port, tmp_path, data), lambda: rank(1, port, tmp_path, data)) == [0, 0]
    a, b = (load_file(tmp_path / f'{i}.safetensors') for i in range(2))
    params = {f'{k}.{n}' for k, net in tiny().nets.items() for n, _ in net.named_parameters()}
    for k in a.keys() & params:
        assert torch.equal(a[k], b[k]), k
    logged = [(int(r['images']), int(r['step'])) for log in (tmp_path / 'run').rglob('log.csv') for r in rows(log)]
    assert len(logged) >= 3 and all(images == step * 2 * 2 for images, step in logged)
    assert (tmp_path / 'run' / 'joint' / 'checkpoints' / '000007.pt').exists()
    assert not list(tmp_path.rglob('*.tmp'))
