"pix2pix, CycleGAN, UNIT and U-GAT-IT: losses by hand, gradients, buffers, learning, resumed runs, what is refused."

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import same_runs
from torch import nn

from medsketch.data import Batches, ImageData
from medsketch.data.unpaired import Unpaired
from medsketch.models.adalin import (
    AdaptiveBlock,
    Attention,
    AttentionDiscriminator,
    AttentionGenerator,
    LayerInstanceNorm,
    clip_shares,
)
from medsketch.models.patchgan import PatchDiscriminator
from medsketch.recipes import RECIPES, load_recipe
from medsketch.recipes.cyclegan import CycleLosses, ImageBuffer
from medsketch.recipes.ugatit import AttentionLosses, knows
from medsketch.recipes.unit import UnitLosses, decode, encode
from medsketch.sketch import add_sketches
from medsketch.train.trainer import Callback

NAMES = ('pix2pix', 'cyclegan', 'unit', 'ugatit')
UNPAIRED = NAMES[1:]
TINY = {'size': 16, 'ngf': 4, 'ndf': 4, 'receptive_field': 16, 'batch_size': 2}


def make(name, steps=3, **changes):
    own = {'dropout': 0.5} if name == 'pix2pix' else {'blocks': 1}
    return RECIPES[name](**(TINY | own | {'steps': steps} | changes))


@pytest.fixture(scope='module')
def data():
    "Squares of two colours, and their outlines"
    rng = np.random.default_rng(0)
    images, sketches = np.full((6, 3, 16, 16), 40, np.uint8), np.zeros((6, 16, 16), np.uint8)
    for x, s in zip(images, sketches):
        i, j = rng.integers(1, 7, 2)
        x[0, i : i + 8, j : j + 8] = 220
        s[i : i + 8, j : j + 8], s[i + 1 : i + 7, j + 1 : j + 7] = 255, 0
    return ImageData(images).with_sketches(sketches)


def nets_of(**functions):
    return SimpleNamespace(**functions)


BATCH = {'sketch': torch.full((2, 1, 4, 4), 0.75), 'image': torch.full((2, 3, 4, 4), -0.5)}  # s = 0.5, p = -0.5


# ---- unpaired batches --------------------------------------------------------------------------------


def numbers(n, seed, key, size=3):
    ds = ImageData(np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(4, 2).repeat(4, 3))
    return Batches(ds, size, seed=seed, augment=lambda batch, rng: {key: batch['image']})


def test_both_streams_go_through_their_sets_in_orders_of_their_own():
    both = Unpaired(numbers(6, 0, 'a'), numbers(6, 1, 'b'))
    seen = [next(both) for _ in range(2)]
    a, b = (torch.cat([v[k] for v in seen])[:, 0, 0, 0].tolist() for k in 'ab')
    assert sorted(a) == sorted(b) and a != b and both.position == 6


def test_position_rank_and_world_are_those_of_both():
    one, two = (Unpaired(numbers(9, 0, 'a'), numbers(7, 1, 'b')) for _ in range(2))
    for s in (one, two):
        s.world = 2
    two.rank = 1
    first, second = next(one), next(two)
    assert one.position == two.position == 6
    assert all(not torch.equal(first[k], second[k]) for k in 'ab')
    whole = Unpaired(numbers(9, 0, 'a', 6), numbers(7, 1, 'b', 6))
    both = next(whole)
    assert all(torch.equal(torch.cat([first[k], second[k]]), both[k]) for k in 'ab')


def test_unpaired_recipes_see_no_pairs_and_pix2pix_does(data):
    def together(r):
        r.prepare(data)
        batch = next(r.stages(data)[0].batches())
        all_images, all_sketches = (data.batch(range(6))[k] for k in ('image', 'sketch'))
        which = lambda x, all_x: [int((all_x == v).flatten(1).all(1).nonzero()[0]) for v in x]
        return which(batch['image'], all_images) == which(batch['sketch'], all_sketches)

    assert together(make('pix2pix', batch_size=6))
    assert not any(together(make(n, batch_size=6)) for n in UNPAIRED)


# ---- losses by hand ----------------------------------------------------------------------------------


def test_cyclegan_by_hand():
    G_P = lambda s: s.expand(-1, 3, -1, -1) * 0.5  # 0.25 of s = 0.5
    G_S = lambda p: p.mean(1, keepdim=True) + 0.1  # -0.4 of p = -0.5, 0.35 of the rendered
    nets, batch = nets_of(G_P=G_P, G_S=G_S, D_P=lambda x: x[:, :1], D_S=lambda x: 2 * x), dict(BATCH)
    g = CycleLosses(7.0).g(nets, batch)
    near = lambda a, b: math.isclose(float(a), b, abs_tol=1e-6)
    assert near(g['adv_P'], (0.25 - 1) ** 2) and near(g['adv_S'], (-0.8 - 1) ** 2)
    assert near(g['cycle_S'], 7 * abs(0.35 - 0.5)) and near(g['cycle_P'], 7 * abs(-0.2 + 0.5))
    d = CycleLosses(7.0).d(nets, batch)
    assert near(d['P'], ((-0.5 - 1) ** 2 + 0.25**2) / 2) and near(d['S'], ((1.0 - 1) ** 2 + 0.8**2) / 2)
    there_and_back = nets_of(G_P=lambda s: s.expand(-1, 3, -1, -1), G_S=lambda p: p[:, :1], D_P=abs, D_S=abs)
    some = {'sketch': torch.rand(2, 1, 4, 4), 'image': torch.rand(2, 1, 4, 4).expand(-1, 3, -1, -1)}
    g = CycleLosses(7.0).g(there_and_back, some)
    assert near(g['cycle_S'], 0) and near(g['cycle_P'], 0)


def test_unit_by_hand(monkeypatch):
    monkeypatch.setattr(torch, 'randn_like', lambda x: torch.full_like(x, 0.1))
    nets = nets_of(
        E_S=lambda x: x, E_P=lambda x: x[:, :1], E=lambda x: 2 * x, R=lambda z: z / 2,
        R_S=lambda z: z, R_P=lambda z: z.expand(-1, 3, -1, -1), D_P=lambda x: x, D_S=lambda x: x,
    )  # fmt: skip
    g = UnitLosses(7.0, 3.0).g(nets, batch := dict(BATCH))
    near = lambda a, b: math.isclose(float(a), b, abs_tol=1e-5)
    # S: mean 1, z 1.1, rendered and decoded 0.55, encoded again 1.1, back (1.2) 0.6; P: -1, -0.9, -0.45, -0.9, -0.4
    soft = lambda x: math.log1p(math.exp(-x))
    assert near(g['adv'], soft(0.55) + soft(-0.45)) and near(g['rec'], 7 * (0.05 + 0.05))
    assert near(g['kl'], 3 * (1 + 1)) and near(g['kl_cycle'], 3 * (1.1**2 + 0.9**2))
    assert near(g['cycle'], 7 * (0.1 + 0.1))
    d = UnitLosses().d(nets, batch)
    assert near(d['P'], soft(-0.5) + math.log1p(math.exp(0.55))) and near(
        d['S'], soft(0.5) + math.log1p(math.exp(-0.45))
    )


def test_ugatit_by_hand():
    class Way:
        def __init__(self, factor, logit):
            self.factor, self.logit = factor, logit

        def translate(self, x):
            return x * self.factor, x.mean((1, 2, 3))[:, None].expand(-1, 2) * self.logit

        def __call__(self, x):
            return x * self.factor

    two = lambda x: [x, 3 * x]
    nets, batch = nets_of(G_P=Way(0.5, 4), G_S=Way(0.2, 2), D_P=two, D_S=two), dict(BATCH)
    g = AttentionLosses(3, 7.0, 5.0).g(nets, batch)
    near = lambda a, b: math.isclose(float(a), b, abs_tol=1e-5)
    ls = lambda *v: sum((x - 1) ** 2 for x in v)
    assert near(g['adv'], ls(0.25, 0.75) + ls(-0.1, -0.3))
    assert near(g['cycle'], 7 * (abs(0.05 - 0.5) + abs(-0.05 + 0.5)))
    assert near(g['identity'], 7 * (abs(-0.25 + 0.5) + abs(0.1 - 0.5)))
    soft = lambda x: math.log1p(math.exp(x))
    assert near(g['cam'], 5 * (soft(-2) + soft(-2) + soft(1) + soft(1)))
    d = AttentionLosses(3).d(nets, batch)
    assert near(d['P'], ls(-0.5, -1.5) + 0.25**2 + 0.75**2) and near(d['S'], ls(0.5, 1.5) + 0.1**2 + 0.3**2)
    assert near(knows(torch.zeros(1, 2), torch.zeros(1, 2)), 2 * math.log(2))


@pytest.mark.parametrize('name', UNPAIRED)
def test_the_cycle_reaches_both_generators(name):
    "The gradient of each domain's way there and back; a detached translation would leave the first generator without"
    r = make(name)
    nets = SimpleNamespace(**r.nets)
    batch = {'sketch': torch.rand(2, 1, 16, 16), 'image': torch.rand(2, 3, 16, 16) * 2 - 1}
    losses = {'cyclegan': CycleLosses(), 'unit': UnitLosses(), 'ugatit': AttentionLosses(3)}[name]
    g = losses.g(nets, batch)
    for key in [k for k in g if k.startswith('cycle')]:
        reached = {}
        for k, n in r.nets.items():
            found = torch.autograd.grad(g[key], list(n.parameters()), retain_graph=True, allow_unused=True)
            reached[k] = sum(float(v.abs().sum()) for v in found if v is not None)
        assert all((reached[k] > 0) == (not k.startswith('D')) for k in reached), (key, reached)


@pytest.mark.parametrize('name', UNPAIRED)
def test_the_discriminators_see_images_without_a_way_back(name):
    r = make(name)
    nets = SimpleNamespace(**r.nets)
    batch = {'sketch': torch.rand(2, 1, 16, 16), 'image': torch.rand(2, 3, 16, 16) * 2 - 1}
    losses = {'cyclegan': CycleLosses(), 'unit': UnitLosses(), 'ugatit': AttentionLosses(3)}[name]
    losses.g(nets, batch)
    sum(losses.d(nets, batch).values()).backward()
    assert all((p.grad is None) == (not k.startswith('D')) for k, n in r.nets.items() for p in n.parameters())


# ---- the buffer of Shrivastava et al. ----------------------------------------------------------------


def test_a_buffer_fills_first_and_then_shows_half_old_ones():
    torch.manual_seed(0)
    buffer, shown = ImageBuffer(20), []
    for i in range(0, 2000, 4):
        x = torch.arange(i, i + 4.0).view(4, 1, 1, 1)
        shown += buffer(x).flatten().tolist()
    assert shown[:20] == list(range(20)) and len(buffer.kept) == 20
    new = [i == s for i, s in enumerate(shown)][20:]
    assert 0.45 < sum(new) / len(new) < 0.55
    assert set(shown) | {float(x) for x in buffer.kept} == set(map(float, range(2000)))  # nothing is lost
    old = [s for i, s in enumerate(shown) if i >= 20 and s != i]
    assert len(old) > 900 and max(map(old.count, old)) <= 2  # an old one leaves when it is shown


def test_a_buffer_keeps_copies_and_comes_back_from_a_checkpoint():
    buffer, x = ImageBuffer(2), torch.ones(2, 3, 2, 2)
    buffer(x)
    x.zero_()
    assert torch.stack(buffer.kept).min() == 1
    other = ImageBuffer(2)
    other.load_state_dict(buffer.state_dict())
    y = torch.rand(4, 3, 2, 2)
    torch.manual_seed(1)
    want = buffer(y)
    torch.manual_seed(1)
    assert torch.equal(other(y), want)
    assert ImageBuffer().state_dict() == {} and torch.equal(ImageBuffer(0)(y), y)


# ---- networks ----------------------------------------------------------------------------------------


def test_a_patch_discriminator_without_a_condition():
    D, x = PatchDiscriminator(3, 4, 16, norm='none'), torch.rand(2, 3, 16, 16)
    assert torch.equal(D(x), D(x, x[:, :0])) and D.features(x)[0].shape[0] == 2
    assert torch.equal(PatchDiscriminator(3, 4, 16)(x[:1]).isfinite().all(), torch.tensor(True))


def test_adalin_is_the_papers_mix():
    torch.manual_seed(0)
    x, gamma, beta = torch.randn(2, 3, 5, 5) * 3 + 1, torch.rand(2, 3, 1, 1), torch.rand(2, 3, 1, 1)
    own = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    layer = (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    want = gamma * (0.3 * own + 0.7 * layer) + beta
    norm = LayerInstanceNorm(3, 0.3)
    assert torch.allclose(norm(x, gamma, beta), want, atol=1e-5)
    with torch.no_grad():
        norm.rho.copy_(torch.tensor([-0.2, 0.4, 1.3]).view(1, 3, 1, 1))
    clip_shares(nn.Sequential(norm))
    assert norm.rho.flatten().tolist() == pytest.approx([0, 0.4, 1])


def test_attention_is_a_classifiers_weights_times_the_maps():
    torch.manual_seed(0)
    a, x = Attention(4), torch.rand(2, 4, 6, 6)
    features, logits = a(x)
    want = torch.cat([(x.mean((2, 3)) @ a.mean.weight.T), (x.flatten(2).max(2).values @ a.peak.weight.T)], 1)
    assert torch.allclose(logits, want, atol=1e-6)
    maps = torch.cat([x * a.mean.weight.view(1, 4, 1, 1), x * a.peak.weight.view(1, 4, 1, 1)], 1)
    assert torch.allclose(features, a.mix(maps), atol=1e-6)


def test_attention_networks_fit_their_images():
    G = AttentionGenerator(3, 4, 1)
    one, three = torch.rand(2, 1, 16, 16), None
    three = one.expand(-1, 3, -1, -1)
    assert torch.equal(G(one), G(three)) and G(one).shape == (2, 3, 16, 16) and G(one).abs().max() <= 1
    assert G.translate(one)[1].shape == (2, 2)
    fine, coarse = AttentionDiscriminator(256, 3, 4).views
    assert (len(fine.layers), len(coarse.layers)) == (1 + 1 + 3 * 3, 1 + 1 + 5 * 3)
    assert len(AttentionDiscriminator(16, 3, 4, 16).views[1].layers) == len(fine.layers) - 3
    with pytest.raises(ValueError, match='is not one of 16'):
        AttentionDiscriminator(64, receptive_field=1)


# ---- the recipes -------------------------------------------------------------------------------------


class StopAt(Callback):
    "As if the machine stopped after a step"

    def __init__(self, step):
        self.step = step

    def after_step(self, trainer):
        if trainer.step == self.step:
            raise OSError('stopped')


def resume(recipe, data, folder, every, at):
    "Train without interruption, and with one: both folders are equal to the last bit"
    how = {'progress': False, 'every': every}
    recipe().fit(data, folder / 'whole', **how)
    with pytest.raises(OSError, match='stopped'):
        recipe().fit(data, folder / 'parts', callbacks=[StopAt(at)], **how)
    recipe().fit(data, folder / 'parts', **how)
    same_runs(folder / 'whole', folder / 'parts')


@pytest.mark.parametrize('name', NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(name, data, tmp_path):
    resume(lambda: make(name, 6), data, tmp_path, 3, 5)


def test_a_buffer_that_is_full_is_resumed(data, tmp_path):
    "Begun again after 30 batches, when half of what D sees comes from the buffer"
    resume(lambda: make('cyclegan', 34), data, tmp_path, 30, 31)


@pytest.mark.parametrize('name', NAMES)
def test_it_renders_samples_and_is_read_back(name, data, tmp_path):
    r = make(name).fit(data, tmp_path / 'run', progress=False)
    sketches = data.batch(range(6))['sketch']
    made = r.render(sketches)
    assert made.shape == (6, 3, 16, 16) and made.abs().max() <= 1
    assert torch.allclose(r.render(sketches[0, 0].numpy()), made[:1], atol=1e-5)
    back = load_recipe(tmp_path / 'run')
    assert torch.equal(back.render(sketches), made) and type(back) is RECIPES[name]
    assert torch.allclose(back.for_drawing().render(sketches), made, atol=1e-4)
    with pytest.raises(ValueError, match='draw_from'):
        back.sample(1)
    batch = back.draw_from(data).sample(5, seed=3)
    assert torch.equal(batch['image'], r.sample(5, seed=3)['image']) and batch['sketch'].shape == (5, 1, 16, 16)
    assert torch.allclose(r.sample(3, seed=3, first=2)['image'], batch['image'][2:], atol=1e-5)
    assert not torch.equal(r.sample(5, seed=4)['sketch'], batch['sketch'])
    if name != 'pix2pix':
        drawn = back.sketch(made)
        assert drawn.shape == (6, 1, 16, 16) and 0 <= drawn.min() <= drawn.max() <= 1


@pytest.mark.parametrize('name', NAMES)
def test_who_learns_and_who_is_averaged(name, data):
    r = make(name, 1)
    before = {k: {n: t.clone() for n, t in net.state_dict().items()} for k, net in r.nets.items()}
    r.fit(data, progress=False)
    moved = {
        k for k, net in r.nets.items() if any(not torch.equal(t, before[k][n]) for n, t in net.state_dict().items())
    }
    assert moved == set(r.nets) and set(r.ema.nets) == {k for k in r.nets if not k.startswith('D')}


def distance(r, data):
    batch = data.batch(range(6))
    return (r.render(batch['sketch']) - batch['image']).abs().mean().item()


def test_the_arguments_of_the_recipes_reach_the_losses(data):
    "Each weight, twice as large, makes its terms twice as large and leaves the others"
    weights = {
        'pix2pix': {'lam': {'l1'}},
        'cyclegan': {'cycle': {'cycle_S', 'cycle_P'}},
        'unit': {'cycle': {'rec', 'cycle'}, 'kl': {'kl', 'kl_cycle'}},
        'ugatit': {'cycle': {'cycle', 'identity'}, 'cam': {'cam'}},
    }

    def terms(name, **changes):
        torch.manual_seed(0)
        r = make(name, **changes)
        batch = {k: data.batch(range(2))[k] for k in ('image', 'sketch')}
        phase = r.stages(*r.prepare(data)[:2])[0].phases[0]
        return {k: v.item() for k, v in phase.loss(SimpleNamespace(**r.nets), batch).items()}

    for name, arguments in weights.items():
        for argument, own in arguments.items():
            one, two = (terms(name, **{argument: f}) for f in (3.0, 6.0))
            for k in one:
                assert math.isclose(two[k], one[k] * (2 if k in own else 1), rel_tol=1e-4), (name, argument, k)
                assert one[k] > 0


def test_pix2pix_drops_out_while_it_trains_and_knows_its_statistics(data):
    dropped = lambda **kw: {
        m.p for m in make('pix2pix', size=64, **kw).nets['G_P'].modules() if isinstance(m, nn.Dropout)
    }
    assert dropped(dropout=0.5) == {0.0, 0.5} and dropped(dropout=0.0) == {0.0}
    r = make('pix2pix')
    stage = r.stages(data)[0]
    assert set(stage.refresh) == {'G_P'}
    norm = next(m for m in r.nets['G_P'].modules() if isinstance(m, nn.BatchNorm2d))
    norm.train()
    before = norm.running_mean.clone()
    with torch.no_grad():
        stage.refresh['G_P'](r.nets['G_P'])
    assert norm.num_batches_tracked == 20 and not torch.equal(norm.running_mean, before)


class Then(Callback):
    "What is seen after a step"

    def __init__(self, look):
        self.look = look

    def after_step(self, trainer):
        Then.seen = self.look()


def test_ugatit_decays_weights_and_clips_shares(data):
    r = make('ugatit', 1)
    stage = r.stages(data)[0]
    assert all(p.opt.param_groups[0]['weight_decay'] == 1e-4 for p in stage.phases)
    norms = [m for n in ('G_P', 'G_S') for m in r.nets[n].modules() if isinstance(m, LayerInstanceNorm)]
    assert {round(m.rho.mean().item(), 3) for m in norms} == {0.9, 0.0}
    with torch.no_grad():
        for m in norms:
            m.rho.fill_(1.5)
    r.fit(data, progress=False, callbacks=[Then(lambda: [m.rho.max().item() for m in norms])])
    assert Then.seen == [1.0] * len(norms)
    looked = r.attention(data.batch(range(2))['sketch'])
    assert looked.shape == (2, 1, 16, 16) and looked.min() >= 0 and looked.max() <= 1
    want = r.nets['G_P'].attend(data.batch(range(2))['sketch'] * 2 - 1)[0].sum(1, keepdim=True)
    low, high = want.amin((1, 2, 3), keepdim=True), want.amax((1, 2, 3), keepdim=True)
    want = nn.functional.interpolate((want - low) / (high - low), 16, mode='bilinear')
    assert torch.allclose(looked, want, atol=1e-5)


def test_sketches_of_ugatit_are_the_mean_of_its_channels(data):
    r, x = make('ugatit'), data.batch(range(2))['image']
    with torch.no_grad():
        want = r.nets['G_S'](x).mean(1, keepdim=True) / 2 + 0.5
    assert torch.allclose(r.sketch(x), want, atol=1e-6)


def test_spectral_norm_bounds_every_layer_of_ugatits_discriminators():
    D = AttentionDiscriminator(16, 3, 4, 16)
    convs = [m for v in D.views for m in (*v.layers, v.last) if hasattr(m, 'weight')]
    assert convs and all(nn.utils.parametrize.is_parametrized(m, 'weight') for m in convs)


def test_an_adaptive_block_adds_to_what_came_in():
    block, x = AdaptiveBlock(4), torch.rand(2, 4, 6, 6)
    assert torch.equal(block(x, torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)), x)


def test_pix2pix_overfits_a_few_pairs(data):
    r = make('pix2pix', 120, ngf=8, lr=2e-3, dropout=0.0, batch_size=6)
    before = distance(r, data)
    assert distance(r.fit(data, progress=False), data) < before / 4


@pytest.mark.parametrize(
    ('name', 'terms'),
    [
        ('cyclegan', ('G_cycle_S', 'G_cycle_P')),
        ('unit', ('G_rec', 'G_cycle')),
        ('ugatit', ('G_cycle', 'G_identity', 'G_cam')),
    ],
)
def test_the_unpaired_objective_falls(name, terms, data):
    seen = []

    class Note(Callback):
        def after_step(self, trainer):
            seen.append({k: v.item() for k, v in trainer.losses.items()})

    r = make(name, 40, lr=3e-3, ngf=6, batch_size=4)
    r.fit(data, progress=False, callbacks=[Note()])
    for k in terms:
        first, last = (np.mean([s[k] for s in part]) for part in (seen[:5], seen[-5:]))
        assert last < 0.7 * first, (k, first, last)


@pytest.mark.parametrize('name', UNPAIRED)
def test_sketches_of_another_set(name, data, tmp_path):
    images, sketches = data.with_planes(sketch=None), data.subset([0, 2, 4])
    r = make(name).fit(images, tmp_path / 'run', more=sketches, progress=False)
    assert torch.equal(r.sample(3)['sketch'].sort(0).values, sketches.batch(range(3))['sketch'].sort(0).values)
    stream = r.stages(*r.prepare(images, sketches)[:2])[0].batches()
    known = sketches.batch(range(3))['sketch']
    for _ in range(4):
        assert all((known == s).flatten(1).all(1).any() for s in next(stream)['sketch'])
    with pytest.raises(ValueError, match='more'):
        make(name).fit(images, tmp_path / 'run', more=data.subset([1, 3, 5]), progress=False)


REFUSED = [
    ('cyclegan', {'cycle': -1.0}),
    ('cyclegan', {'receptive_field': 70}),
    ('unit', {'kl': -1.0}),
    ('unit', {'lr': 0.0}),
    ('unit', {'size': 20}),
    ('ugatit', {'cam': -1.0}),
    ('ugatit', {'blocks': 101}),
    ('ugatit', {'receptive_field': 1}),
    ('pix2pix', {'dropout': 1.0}),
    ('pix2pix', {'style': 'x'}),
]


def test_what_does_not_fit_is_refused(data):
    with pytest.raises(ValueError, match='takes no further data'):
        make('pix2pix').fit(data, more=data, progress=False)
    with pytest.raises(ValueError, match='px with'):
        make('cyclegan', size=32).fit(data, progress=False)
    for name, bad in REFUSED:
        k, v = next(iter(bad.items()))
        with pytest.raises(ValueError, match=f"{k}|'{v}'"):
            make(name, **bad)
    for name in NAMES:
        with pytest.raises(ValueError, match='renders 16'):
            make(name).render(torch.zeros(1, 1, 32, 32))
        with pytest.raises(ValueError, match='pass \\(H, W\\)'):
            make(name).render(torch.zeros(2, 3, 16, 16))
        with pytest.raises(ValueError, match='at least 1'):
            RECIPES[name].steps_each(0, 16)
        assert RECIPES[name].steps_each(5, 16) == {'steps': 5}


def test_data_without_sketches_get_the_styles(data):
    r = make('cyclegan', style='fundus')
    found = r.prepare(data.with_planes(sketch=None))[0]
    assert np.array_equal(found.sketches, add_sketches(data.with_planes(sketch=None), style='fundus').sketches)


@pytest.mark.parametrize('name', NAMES)
def test_it_draws_without_chance(name, data):
    r = make(name)
    assert torch.equal(r.render(data.batch([0])['sketch']), r.render(data.batch([0])['sketch']))
    assert r.inference == tuple(k for k in r.nets if not k.startswith('D')) or set(r.inference) == set(r.shared)


def test_unit_translates_through_its_code(data):
    r = make('unit')
    nets, s = SimpleNamespace(**r.nets), data.batch([0, 1])['sketch']
    with torch.no_grad():
        z = nets.E(nets.E_S(s * 2 - 1))
        assert torch.allclose(r.render(s), nets.R_P(nets.R(z)), atol=1e-5)
        assert torch.equal(encode(nets, 'S', s * 2 - 1), z) and torch.equal(decode(nets, 'S', z), nets.R_S(nets.R(z)))


def test_a_part_without_weights_trains_and_is_read_back(data, tmp_path):
    "An identity in place of the shared encoder, for an ablation"

    def without(part):
        r = make('unit')
        r.nets[part] = nn.Identity()
        r.nets = {part: r.nets[part], **r.nets}  # it stands first, too
        return r

    whole = without('E').fit(data, tmp_path / 'whole', progress=False)
    for _ in range(2):
        again = without('E').fit(data, tmp_path / 'run', every=1, progress=False)
    read = without('E').load_weights(tmp_path / 'run/weights.safetensors')
    x = data.batch([0, 1])['sketch']
    assert torch.equal(again.render(x), whole.render(x))
    torch.testing.assert_close(read.render(x), whole.render(x), atol=1e-5, rtol=0)
    assert read.learned == set(read.nets) - {'D_P', 'D_S'}
