"""The frame of all recipes: stages, frozen networks, weights from elsewhere, losses and augmentation, growth."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import one_line, same
from safetensors.torch import load_file, save_file
from torch import nn

from medsketch.data import ImageData, phantom_data
from medsketch.recipes import DCGAN, PGGAN, RECIPES, DualGAN, Recipe, SkrGAN, load_recipe, recipe_class
from medsketch.recipes.skrgan import JointLosses
from medsketch.train.adversarial import Adversarial, RenderLosses
from medsketch.train.callbacks import Callback
from medsketch.train.stages import Stage, read_config
from medsketch.train.trainer import Phase, make_accelerator
from medsketch.train.weights import start_from, write_weights

os.environ['ACCELERATE_USE_CPU'] = 'true'  # "to the last bit" is a promise for the CPU

PAIR = {'size': 16, 'latent_dim': 8, 'ngf': 4, 'ndf': 4, 'batch_size': 4, 'steps': 6}
GROWING = {'size': 16, 'latent_dim': 8, 'fmap_base': 32, 'fmap_max': 8, 'batch_size': 4}
SKR = GROWING | {'ngf': 4, 'ndf': 4, 'receptive_field': 16, 'batches': 3, 'render_steps': 4}
DUAL = {
    'size': 16,
    'latent_dim': 8,
    'ngf': 4,
    'ndf': 4,
    'receptive_field': 1,
    'batch_size': 4,
    'mask_steps': 4,
    'render_steps': 4,
}


@pytest.fixture(scope='module')
def data():
    return phantom_data('fundus', 6, 16)


class TwoStages(Recipe):
    "A generator, then an encoder in front of it, frozen"

    name, inference = 'two-stages-of-a-test', ('G', 'E')

    def __init__(self, size=8, channels=3, batch_size=4, augment='none', seed=0):
        super().__init__(size=size, channels=channels, batch_size=batch_size, augment=augment, seed=seed)
        self.build()

    def networks(self):
        G = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
        return {'G': G, 'E': nn.Conv2d(3, 3, 1)}

    def stages(self, data, more=None):
        def g(nets, batch):
            return (nets.G(batch['image']) - batch['image']).square().mean()

        def e(nets, batch):
            return (nets.G(nets.E(batch['image'])) - batch['image']).square().mean()

        adam = {n: torch.optim.Adam(self.nets[n].parameters(), 0.01) for n in 'GE'}
        stream = lambda: self.stream(data, 0)
        return [
            Stage('generator', ('G',), [Phase('G', g, adam['G'])], 5, stream, average=('G',)),
            Stage('encoder', ('E',), [Phase('E', e, adam['E'])], 5, stream, frozen=('G',), average=('E',)),
        ]


del RECIPES[TwoStages.name]  # other files' tests go through all of them


@pytest.fixture(autouse=True)
def known_recipes(monkeypatch):
    monkeypatch.setitem(RECIPES, TwoStages.name, TwoStages)


def small():
    return phantom_data('fundus', 6, 8)


def test_a_frozen_network_does_not_move_and_is_not_in_the_checkpoint(tmp_path):
    r = TwoStages().fit(small(), tmp_path / 'run', stages=['generator'], progress=False)
    before = {k: v.clone() for k, v in r.nets['G'].state_dict().items()}
    r = TwoStages().fit(small(), tmp_path / 'run', progress=False)
    same(before, dict(r.nets['G'].state_dict()))
    state = torch.load(tmp_path / 'run/encoder/checkpoints/000005.pt', weights_only=True)
    assert set(state['nets']) == {'E'}
    assert all(p.requires_grad for p in r.nets['G'].parameters())
    noted = read_config(tmp_path / 'run')['frozen']
    assert set(noted) == {'encoder'} and set(noted['encoder']) == {'G'}


def test_a_stage_that_began_with_other_frozen_weights_is_refused(tmp_path):
    TwoStages().fit(small(), tmp_path / 'run', progress=False)
    config = read_config(tmp_path / 'run')
    config['frozen']['encoder']['G'] = '0' * 16
    (tmp_path / 'run/config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='stage encoder .* other weights of G') as e:
        TwoStages().fit(small(), tmp_path / 'run', progress=False)
    assert one_line(e)


def test_a_finished_run_is_not_written_again_and_a_lost_file_comes_back(tmp_path):
    TwoStages().fit(small(), tmp_path / 'run', progress=False)
    file = tmp_path / 'run/weights.safetensors'
    whole, when = file.read_bytes(), file.stat().st_mtime_ns
    TwoStages().fit(small(), tmp_path / 'run', progress=False)
    assert file.stat().st_mtime_ns == when
    file.unlink()
    TwoStages().fit(small(), tmp_path / 'run', progress=False)
    assert file.read_bytes() == whole


# --- weights from elsewhere ---


def test_init_takes_networks_up_and_says_so(tmp_path, data):
    a = SkrGAN(**SKR).fit(data, tmp_path / 'a', progress=False)
    b = SkrGAN(**SKR, seed=1)
    b.fit(data, tmp_path / 'b', init=tmp_path / 'a', stages=['render'], progress=False, every=100)
    same(dict(b.nets['G_S'].state_dict()), dict(a.nets['G_S'].state_dict()))
    noted = read_config(tmp_path / 'b')['init']
    assert noted['from'] == str(tmp_path / 'a') and {'G_S', 'G_P', 'D_S', 'D_P'} <= set(noted['weights'])
    again = SkrGAN(**SKR, seed=1).fit(
        data, tmp_path / 'b', stages=['render'], progress=False
    )  # without saying it again
    same(again.sample(2), b.sample(2))


def test_init_by_network(tmp_path, data):
    a = SkrGAN(**SKR).fit(data, tmp_path / 'a', progress=False)
    b = SkrGAN(**SKR, seed=1)
    fresh = {k: v.clone() for k, v in b.nets['D_P'].state_dict().items()}
    b.fit(data, init={'G_P': tmp_path / 'a'}, stages=['sketch'], progress=False)
    same(dict(b.nets['G_P'].state_dict()), dict(a.nets['G_P'].state_dict()))
    same(dict(b.nets['D_P'].state_dict()), fresh)


@pytest.mark.parametrize(
    'init, text',
    [
        ('a', r'G_P\.\S+ is .*, this recipe needs .*; .* and \d+ more'),
        ({'G': 'a'}, "no network is called 'G'; there are: G_S"),
        ('nowhere', 'nowhere does not exist'),
        ({'D_X': 'a'}, 'no network is called'),
        ('text', 'not a file that medsketch saved'),
        ('other', 'no network in common'),
    ],
)
def test_init_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, data, init, text):
    a = SkrGAN(**SKR).fit(data, tmp_path / 'a', progress=False)
    (tmp_path / 'text').write_text('not weights')
    a.nets = {'X': nn.Linear(1, 1)}
    a.inference, a.learned = ('X',), {'X'}
    a.save(tmp_path / 'other')
    at = lambda v: str(tmp_path / v)
    init = {k: at(v) for k, v in init.items()} if isinstance(init, dict) else at(init)
    with pytest.raises(ValueError, match=text) as e:
        SkrGAN(**SKR | {'ngf': 8}).fit(data, tmp_path / 'b', init=init, progress=False)
    assert one_line(e) and not (tmp_path / 'b').exists()


def test_arguments_of_earlier_versions_are_understood(tmp_path):
    r = SkrGAN(**SKR, variants=True, position=True, consistency=20.0)
    r.save(tmp_path / 'new.safetensors')
    new = {'variants': 'hand', 'position': 'place', 'consistency': 'local'}
    config = {
        new.get(k, k): v for k, v in r.config.items() if k not in ('loss', 'ada', 'diffaugment', 'widths', 'start')
    }
    weights = load_file(tmp_path / 'new.safetensors')
    save_file(weights, tmp_path / 'old.safetensors', {'medsketch': json.dumps({'recipe': 'skrgan', 'config': config})})
    back = load_recipe(tmp_path / 'old.safetensors', 'cpu')
    assert back.config == r.config
    same(back.sample(2), r.sample(2))


def test_a_run_goes_on_from_its_own_copy_of_init(tmp_path, data):
    "What it started from may be gone, or be something else by now"
    SkrGAN(**SKR).fit(data, tmp_path / 'a', progress=False)

    class Stop(Callback):
        def after_step(self, trainer):
            if trainer.step == 2:
                raise KeyboardInterrupt

    through = SkrGAN(**SKR, seed=1).fit(data, tmp_path / 'b', init=tmp_path / 'a', progress=False)
    with pytest.raises(KeyboardInterrupt):
        SkrGAN(**SKR, seed=1).fit(data, tmp_path / 'c', init=tmp_path / 'a', progress=False, callbacks=[Stop()])
    shutil.rmtree(tmp_path / 'a')
    again = SkrGAN(**SKR, seed=1).fit(data, tmp_path / 'c', progress=False)
    same(again.sample(3), through.sample(3))
    same(dict(again.nets['D_P'].state_dict()), dict(through.nets['D_P'].state_dict()))
    with pytest.raises(ValueError, match='another init .*from: ') as e:
        SkrGAN(**SKR, seed=1).fit(data, tmp_path / 'c', init=tmp_path / 'elsewhere', progress=False)
    assert one_line(e)


def test_a_damaged_checkpoint_of_an_unfinished_run_is_passed_over_as_init(tmp_path, data):
    SkrGAN(**SKR | {'batches': 4}).fit(data, tmp_path / 'a', stages=['sketch'], every=4, progress=False)
    (tmp_path / 'a/weights.safetensors').unlink()
    newest, before = sorted((tmp_path / 'a/sketch/checkpoints').glob('[0-9]*.pt'))[::-1][:2]
    want = torch.load(before, weights_only=True)['nets']['D_S']
    newest.write_bytes(newest.read_bytes()[:-200])
    b = SkrGAN(**SKR | {'batches': 4}, seed=1)
    with pytest.warns(UserWarning, match=f'{newest.name} cannot be read'):
        b.fit(data, init={'D_S': tmp_path / 'a'}, stages=['render'], progress=False)
    same(dict(b.nets['D_S'].state_dict()), dict(want))


@pytest.mark.parametrize('make', [lambda: DCGAN(**PAIR), lambda: SkrGAN(**SKR), lambda: DualGAN(**DUAL)])
def test_a_part_of_a_row_is_that_part(make):
    r = make()
    whole, part = r.sample(7, seed=3), r.sample(3, seed=3, first=4)
    for k in whole:
        torch.testing.assert_close(part[k], whole[k][4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize('cls, config', [(SkrGAN, SKR), (DualGAN, DUAL)], ids=['skrgan', 'dualgan'])
def test_threads_that_prepare_batches_change_nothing(data, cls, config):
    alone, helped = (cls(**config).fit(data, workers=k, progress=False) for k in (0, 3))
    same(helped.sample(3), alone.sample(3))


# --- losses ---


def fixed(value):
    return lambda *a, **k: value


def test_the_renderers_loss_has_lambda_and_half_a_discriminator():
    "λ = 100 times L1; D's loss is the mean, not the sum, of real and fake"
    y, x = torch.rand(2, 1, 8, 8), torch.zeros(2, 3, 8, 8)
    nets = SimpleNamespace(G_P=lambda s: s.repeat(1, 3, 1, 1) * 0 + 0.5, D_P=fixed(torch.zeros(2, 1)))
    batch = {'sketch': y, 'image': x}
    g = RenderLosses().g(nets, batch)
    torch.testing.assert_close(g['l1'], torch.tensor(50.0))
    torch.testing.assert_close(RenderLosses().d(nets, batch), torch.tensor(2.0).log())
    torch.testing.assert_close(RenderLosses(lam=20.0).g(nets, batch)['l1'], torch.tensor(10.0))


def test_strokes_and_feature_matching_reach_the_renderer(data):
    r = SkrGAN(**SKR, lam=1.0, matching=5.0, strokes=4.0)
    drawn, *_ = r.prepare(data)
    g, batch = r.stages(drawn)[1].phases[0], next(r.pairs_of(drawn))
    losses = g.loss(SimpleNamespace(**r.nets), batch)
    plain = RenderLosses(lam=1.0).g(SimpleNamespace(**r.nets), batch)
    assert set(losses) == {'adv', 'l1', 'matching'}
    assert plain['l1'] < losses['l1'] <= 5 * plain['l1']
    losses['matching'].backward()
    assert all(p.grad.abs().sum() > 0 for p in r.nets['G_P'].down.parameters() if p.ndim > 1)


def test_a_round_field_is_black_outside_and_comes_back_from_the_file(data, tmp_path):
    r = SkrGAN(**SKR, field=0.3).fit(data, stages=('render',), progress=False)
    r.save(tmp_path / 'r.safetensors')
    for x in (
        r.render(torch.rand(2, 1, 16, 16)),
        load_recipe(tmp_path / 'r.safetensors').render(torch.rand(2, 1, 16, 16)),
    ):
        assert (x[..., :3, :] == -1).all() and (x[..., 8, 8] > -1).all()


def test_the_joint_loss_has_lambda_and_a_quarter_of_each_pair():
    y, x = torch.rand(2, 1, 8, 8), torch.zeros(2, 3, 8, 8)
    zero = fixed(torch.zeros(2, 1))
    nets = SimpleNamespace(G_S=lambda z: y, G_P=lambda s: s.repeat(1, 3, 1, 1) * 0 + 0.5, D_P=zero, D_S=zero)
    batch, losses = {'sketch': y, 'image': x}, JointLosses(4)
    torch.testing.assert_close(losses.g(nets, batch)['l1'], torch.tensor(50.0))
    torch.testing.assert_close(losses.d_p(nets, batch), torch.tensor(2.0).log())


def test_the_joint_stage_learns_at_a_tenth_of_the_rates(data):
    r = SkrGAN(**SKR, joint_steps=1)
    phases = r.stages(data)[2].phases
    rates = [[g['lr'] for g in p.opt.param_groups] for p in phases]
    np.testing.assert_allclose(rates[0], [1e-4, 2e-5])
    np.testing.assert_allclose([rates[1][0], rates[2][0]], [1e-4, 2e-5])


@pytest.mark.parametrize(
    'make', [lambda d: SkrGAN(**SKR, r1=2.0).stages(d)[0], lambda d: DualGAN(**DUAL, r1=2.0).stages(d)[0]]
)
def test_r1_is_lazy_and_as_much_stronger(data, make, monkeypatch):
    "Every 16th step, γ/2 times the penalty; the trainer multiplies by 16"
    phase = make(data).phases[2]
    assert phase.every == 16
    monkeypatch.setattr('medsketch.train.adversarial.r1_penalty', lambda D, x: torch.tensor(3.0))
    game = phase.loss.__self__
    monkeypatch.setattr(game, 'see', lambda *a, **k: (torch.zeros(1), None))
    assert phase.loss(None, {}).item() == pytest.approx(3.0)  # 2 / 2 * 3
    from medsketch.train.trainer import Trainer

    net = nn.Linear(1, 1, bias=False)
    opt = torch.optim.SGD(net.parameters(), 1.0)
    before = net.weight.item()
    constant = lambda nets, batch: nets.G.weight.sum()
    Trainer({'G': net}, [Phase('R1', constant, opt, every=16)], iter([{'image': torch.zeros(1, 1)}] * 3)).fit(1)
    assert before - net.weight.item() == pytest.approx(16.0)


def test_relativistic_penalises_both_sides(data):
    game = Adversarial('G', 'D', lambda G, b: b['image'] * 0.5, lambda b: b['image'], 'relativistic', r1=2.0)
    nets = SimpleNamespace(G=None, D=lambda x: x.square().sum((1, 2, 3))[:, None])
    batch = {'image': torch.ones(2, 1, 4, 4), 'fake': torch.full((2, 1, 4, 4), 0.5)}
    want = (2 * torch.ones(16)).square().sum() + torch.ones(16).square().sum()  # |∇D|² at 1 and at 0.5
    torch.testing.assert_close(game.penalty(nets, batch), want)
    one = Adversarial('G', 'D', lambda G, b: b['image'] * 0.5, lambda b: b['image'], r1=2.0)
    torch.testing.assert_close(one.penalty(nets, batch), (2 * torch.ones(16)).square().sum())


HOW = [
    {'loss': 'relativistic'},
    {'diffaugment': 'translate,cutout'},
    {'ada': 0.6},
    {'loss': 'relativistic', 'ada': 0.6},
]
WHO = [(DCGAN, PAIR), (PGGAN, GROWING | {'batches': 3}), (SkrGAN, SKR), (DualGAN, DUAL)]


@pytest.mark.parametrize('how', HOW, ids=str)
@pytest.mark.parametrize('cls, config', WHO, ids=lambda v: getattr(v, 'name', ''))
def test_losses_and_augmentation_by_name_train_and_resume_to_the_last_bit(tmp_path, data, cls, config, how):
    class Stop(Callback):
        def after_step(self, trainer):
            if trainer.step == 2:
                raise KeyboardInterrupt

    through = cls(**config, **how).fit(data, tmp_path / 'a', every=2, progress=False)
    with pytest.raises(KeyboardInterrupt):
        cls(**config, **how).fit(data, tmp_path / 'b', every=1, progress=False, callbacks=[Stop()])
    torch.manual_seed(9)
    again = cls(**config, **how).fit(data, tmp_path / 'b', every=2, progress=False)
    same(again.sample(3), through.sample(3))
    plain = cls(**config).fit(data, every=2, progress=False)
    assert any(
        not torch.equal(p, q)
        for p, q in zip(plain.nets[plain.inference[0]].parameters(), through.nets[plain.inference[0]].parameters())
    )


@pytest.mark.parametrize('cls, config', WHO, ids=lambda v: getattr(v, 'name', ''))
@pytest.mark.parametrize(
    'bad, text',
    [
        ({'loss': 'hinge'}, "'hinge'.*relativistic"),
        ({'diffaugment': 'rotate90'}, 'rotate90'),
        ({'ada': 7.0}, '7'),
        ({'augment': 'mixup'}, 'mirror'),
    ],
)
def test_unknown_names_are_refused(data, cls, config, bad, text):
    with pytest.raises(ValueError, match=text) as e:
        cls(**config, **bad).stages(data)
    assert one_line(e)


# --- growth ---


def stopped(cls, config, data, at):
    class Stop(Callback):
        def after_step(self, trainer):
            if trainer.step == at:
                raise KeyboardInterrupt

    r = cls(**config)
    with pytest.raises(KeyboardInterrupt):
        r.fit(data, callbacks=[Stop()], progress=False)
    return r


@pytest.mark.parametrize('cls, config', [(SkrGAN, SKR | {'batches': 4}), (PGGAN, GROWING | {'batches': 4})])
def test_stopped_while_it_grows_it_draws_at_the_size_grown_to(tmp_path, data, cls, config):
    "Also after saving and loading: nothing is drawn through blocks that never learned"
    r = stopped(cls, config, data, 6)
    for q in (r, (r.save(tmp_path / 'r.safetensors'), load_recipe(tmp_path / 'r.safetensors', 'cpu'))[1]):
        x = q.sample(2)['sketch' if cls is SkrGAN else 'image']
        assert x.shape[-1] == 16 and q.fade.size == 8
        assert torch.equal(x[..., ::2, ::2], x[..., 1::2, 1::2])  # coarse pixels
    same(r.sample(2), load_recipe(tmp_path / 'r.safetensors', 'cpu').sample(2))


def test_no_growth_batch_sizes_and_widths_by_resolution(data):
    sizes = []

    class Watch(Callback):
        def after_step(self, trainer):
            sizes.append(trainer.images)

    r = PGGAN(
        **GROWING
        | {'batches': {'4': 2, '8': 2, '16': 2}, 'batch_size': {4: 4, 8: 4, 16: 2}, 'widths': {'4': 8, '8': 6, '16': 3}}
    )
    r.fit(data, callbacks=[Watch()], progress=False)
    assert np.diff([0, *sizes]).tolist() == [4, 4, 4, 4, 2, 2]
    assert r.nets['G'].blocks[1][0].bias.shape == (3,)
    flat = PGGAN(**GROWING | {'batches': 2, 'start': 16})
    assert flat.steps == 2 and flat.fade.growth.sizes == [16]


# --- data ---


@pytest.mark.parametrize('name', ['dcgan', 'skrgan', 'dualgan'])
def test_a_map_style_dataset_of_dictionaries_is_training_data(name, data):
    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, i):
            return {k: data[i][k] for k in ('image', 'mask')}

    config = {'dcgan': PAIR, 'skrgan': SKR, 'dualgan': DUAL}[name]
    r = RECIPES[name](**config).fit(Own(), progress=False)
    assert r.sample(2)['image'].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    'bad', [[1, 2], 3, {'image': 1}, iter([]), torch.utils.data.DataLoader([1, 2])], ids=lambda v: type(v).__name__
)
def test_what_is_no_data_is_refused_in_a_line(bad, tmp_path):
    with pytest.raises((ValueError, TypeError)) as e:
        DCGAN(**PAIR).fit(bad, tmp_path / 'run', progress=False)
    assert one_line(e) and not (tmp_path / 'run').exists()


def test_the_default_moves_nothing():
    for name, cls in RECIPES.items():
        if name in ('skrgan', 'dualgan', 'dcgan', 'acgan', 'wgan', 'wgan_gp', 'pggan', 'stylegan2'):
            for scale in cls.presets:
                assert cls.presets[scale].get('augment', 'none') == 'none'
    assert DCGAN(**PAIR).config['augment'] == 'none' and SkrGAN(**SKR).config['augment'] == 'none'


def test_imagedata_of_floats_is_what_it_says():
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    made = DCGAN(**PAIR).fit(ImageData(x.numpy()), progress=False).sample(2)['image']
    assert made.isfinite().all()


def test_networks_of_other_stages_go_where_training_happens_too(data, monkeypatch):
    "A sketch generator that stays behind on the CPU would say that the renderer's batches belong there"
    moved = []
    to = Recipe.to
    monkeypatch.setattr(Recipe, 'to', lambda self, device: moved.append(device) or to(self, device))
    SkrGAN(**SKR).fit(data, stages=['render'], progress=False)
    assert moved == [make_accelerator().device]


@pytest.mark.parametrize('name', sorted(RECIPES))
def test_every_recipe_starts_from_all_networks_of_its_own_kind(tmp_path, name):
    make = lambda seed: recipe_class(name).preset('tour', seed=seed)
    a, b = make(0), make(1)
    write_weights(tmp_path / 'a.safetensors', a.nets, {'recipe': name, 'config': a.config})
    taken = start_from(b.nets, tmp_path / 'a.safetensors')
    assert taken.keys() == {k for k, n in a.nets.items() if n.state_dict()}
    for k in taken:
        assert all((t == b.nets[k].state_dict()[n]).all() for n, t in a.nets[k].state_dict().items())
