"Sketch2MedI: which network learns when, refinement, resumed runs, and what is refused."

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medsketch.data import ImageData
from medsketch.models.hyper import bent_synthesis, layers_of, shape_of
from medsketch.recipes import Sketch2MedI, SketchSynth, StyleGAN2, load_recipe
from medsketch.recipes.sketch2medi import GAN_ARGUMENTS, EncoderLosses, RefineLosses, Similarity, perceptual, refine

TINY = {
    'size': 16,
    'latent_dim': 8,
    'w_dim': 8,
    'mapping_layers': 2,
    'fmap_base': 32,
    'fmap_max': 8,
    'resnet': 18,
    'net_width': 0.125,
    'convs': 1,
    'rank': 4,
    'batch_size': 2,
    'ada': None,
    'diffaugment': None,
}
STAGES = ('segment', 'gan', 'moco', 'encoder', 'refine')


@pytest.fixture(scope='module')
def data():
    "Discs and bars of two classes"
    rng = np.random.default_rng(0)
    images, masks = np.full((6, 3, 16, 16), 40, np.uint8), np.zeros((6, 16, 16), np.uint8)
    for x, m in zip(images, masks):
        i, j = rng.integers(0, 6, 2)
        x[0, i : i + 6, j : j + 6], m[i : i + 6, j : j + 6] = 220, 1
        x[1, 12:15, j : j + 8], m[12:15, j : j + 8] = 220, 2
    return ImageData(images, masks, classes=('background', 'disc', 'bar'))


def make(steps=2, **changes):
    return Sketch2MedI(**(TINY | Sketch2MedI.steps_each(steps, 16) | changes))


def train(r, data, out=None, **how):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return r.fit(data, out, progress=False, **how)


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('s2m') / 'run'
    return train(make(), data, out, every=1), out


def test_a_resumed_run_is_the_uninterrupted_one(trained, data, tmp_path):
    for stage in STAGES:
        train(make(), data, tmp_path / 'run', every=1, stages=[stage])
    a, b = (load_recipe(p) for p in (trained[1], tmp_path / 'run'))
    for k in a.nets:
        for x, y in zip(a.nets[k].state_dict().values(), b.nets[k].state_dict().values()):
            assert torch.equal(x, y), k


def test_it_renders_every_step_and_is_read_back(trained, data):
    r, out = trained
    sketch = torch.zeros(3, 1, 16, 16)
    sketch[:, :, 4:12, 4] = 1
    steps = r.render(sketch, steps=3)
    assert len(steps) == 4 and steps[0].shape == (3, 3, 16, 16)
    assert torch.equal(r.render(sketch), steps[-1])
    assert torch.equal(load_recipe(out).render(sketch), steps[-1])
    assert torch.equal(r.render(sketch[0, 0].numpy()), r.render(sketch[:1]))
    assert set(r.sample(2)) == {'image', 'sketch'}
    with pytest.raises(ValueError, match='renders 16'):
        r.render(torch.zeros(8, 8))


def test_what_is_frozen_stays_and_what_learns_moves(data):
    r = make(1)
    r.prepare(data)
    before = {k: {n: t.clone() for n, t in net.state_dict().items()} for k, net in r.nets.items()}
    learns = {'segment': {'S'}, 'gan': {'G', 'D'}, 'moco': {'C', 'K'}, 'encoder': {'E', 'D_W'}, 'refine': {'H'}}
    for stage in r.stages(data, data):
        train(r, data, stages=[stage.name])
        same = lambda k, before=before: all(torch.equal(t, before[k][n]) for n, t in r.nets[k].state_dict().items())
        moved = {k for k in r.nets if not same(k)}
        assert moved == learns[stage.name], stage.name
        before = {k: {n: t.clone() for n, t in net.state_dict().items()} for k, net in r.nets.items()}


def test_refinement_adds_offsets_up():
    "Eq. 6: with a hyper-network that always says the same, step t has t times the offset"
    r = make()
    G = r.nets['G']
    shapes = [shape_of(layer) for layer, _ in layers_of(G.synthesis)]
    delta = [0.2 * torch.randn(1, *s) for s in shapes]
    r.nets['H'] = torch.nn.Module()
    r.nets['H'].forward = lambda sketch, image: delta
    sketch = torch.zeros(1, 1, 16, 16)
    made = list(refine(SimpleNamespace(**r.nets), sketch, 3))
    w = r.nets['E'](sketch)
    for t in (1, 2, 3):
        want = bent_synthesis(G.synthesis, w, [t * d for d in delta])
        assert torch.allclose(made[t], want, atol=1e-5)


def test_losses_are_zero_for_the_same_image_and_weighted():
    C = make().nets['C']
    x, y = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    assert all(v.abs() < 1e-6 for v in Similarity()(C, x, x).values())
    one, two = Similarity(1, 1, 1)(C, x, y), Similarity(2, 3, 4)(C, x, y)
    assert all(torch.isclose(two[k], f * one[k]) for k, f in (('l2', 2), ('lpips', 3), ('cos', 4)))
    assert perceptual([x], [2 * x]) < 1e-6 < perceptual([x], [y])


def test_the_penalty_of_the_images_discriminator_is_not_that_of_the_styles():
    from_size, given = make(r1=10.0), make(r1=10.0, r1_gan=2.0)
    assert from_size.gan.game().r1 == StyleGAN2(**{k: v for k, v in TINY.items() if k in GAN_ARGUMENTS}).game().r1 < 1
    assert given.gan.game().r1 == 2 and given.config['r1'] == 10


def test_the_latent_loss_pulls_to_known_styles():
    "D_W learns on styles; E's loss has no gradient for G, and the adversarial weight counts"
    r = make()
    nets, batch = SimpleNamespace(**r.nets), {'image': torch.zeros(2, 3, 16, 16), 'sketch': torch.zeros(2, 1, 16, 16)}
    none, some = (EncoderLosses(Similarity(), 8, adv).e(nets, batch)['adv'] for adv in (0, 0.5))
    assert none == 0 and some > 0.2
    h = RefineLosses(Similarity(), 3).h(nets, batch)
    assert set(h) == {'l2', 'lpips', 'cos'}


def test_it_says_what_is_missing(data):
    with pytest.raises(ValueError, match='no S is trained'):
        train(make(segment_steps=0, gan_steps=1), data, stages=['gan', 'encoder'])
    with pytest.raises(ValueError, match='no masks'):
        SketchSynth(**{k: TINY[k] for k in ('size', 'resnet', 'net_width', 'convs', 'batch_size')}).fit(
            data.with_planes(mask=None)
        )
    with pytest.raises(ValueError, match="'w' or 'w\\+'"):
        make(space='z')


# ---- the parts, by hand ------------------------------------------------------------------------------


def test_perceptual_distance_by_hand():
    a, b = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    a[0, 0], b[0, 0, 0, 0], b[0, 1, 0, 1] = 3, 1, 5  # the same direction at one place, a right angle at the other
    assert torch.isclose(perceptual([a, a], [b, a]), torch.tensor(1.0))


def test_features_of_the_real_image_are_what_is_wanted():
    "Gradients reach what was made, and no cosine is left where it is the same image"
    C = make().nets['C']
    real, made = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    made.requires_grad_(), real.requires_grad_()
    found = Similarity()(C, real, made)
    for k in ('lpips', 'cos'):
        g = torch.autograd.grad(found[k], (real, made), retain_graph=True, allow_unused=True)
        assert g[0] is None and g[1].abs().sum() > 0, k
    assert found['lpips'] > 1e-3 and 0 < found['cos'] <= 1


def latent(r, adv=0.5):
    nets = SimpleNamespace(**r.nets)
    torch.manual_seed(0)
    batch = {'image': torch.rand(2, 3, 16, 16) * 2 - 1, 'sketch': torch.rand(2, 1, 16, 16)}
    return nets, batch, EncoderLosses(Similarity(), 8, adv, 4.0)


def test_the_latent_game_by_hand(monkeypatch):
    "D_W is the sum of a style: known styles are ones, codes of sketches are what E says"
    r = make()
    nets, batch, losses = latent(r)
    nets.D_W = lambda w: w.sum(1, keepdim=True)
    nets.E.whole.last.weight.data.zero_(), nets.E.whole.last.bias.data.fill_(0.25), nets.E.centre.fill_(0.5)
    monkeypatch.setattr(losses, 'real', lambda nets, n, device: torch.ones(n, 8))
    g = losses.e(nets, batch)
    assert torch.isclose(g['adv'], 0.5 * F.softplus(torch.tensor(-6.0)))  # codes are 0.75, eight of them
    found = torch.autograd.grad(g['adv'], nets.E.whole.last.bias, retain_graph=True)[0]
    assert (found < 0).all()  # towards what D_W calls known
    assert batch['w'].shape == (2, 8)
    assert torch.isclose(losses.d(nets, batch), F.softplus(torch.tensor(-8.0)) + F.softplus(torch.tensor(6.0)))
    assert torch.isclose(losses.penalty(nets, batch), torch.tensor(4.0 / 2 * 8))  # a slope of 1 in eight directions


def test_every_style_is_seen_in_w_plus_and_one_in_w():
    for space, seen in (('w', 2), ('w+', 2 * make(space='w+').nets['G'].synthesis.styles)):
        nets, batch, losses = latent(make(space=space))
        losses.e(nets, batch)
        assert batch['w'].shape == (seen, 8), space


def test_w_plus_are_offsets_from_w():
    torch.manual_seed(0)
    E = make(space='w+').nets['E']
    sketch = torch.rand(2, 1, 16, 16)
    for f in E.own:
        f.last.weight.data.zero_(), f.last.bias.data.zero_()
    with torch.no_grad():
        w, centre = E(sketch), E.whole(E.backbone(sketch * 2 - 1)[3])
    assert torch.allclose(w, centre[:, None].expand_as(w), atol=1e-6)
    assert not torch.allclose(w[0], w[1])  # the sketch is seen


def test_refinement_losses_count_every_step():
    r = make()
    nets, batch, _ = latent(r)
    similarity = lambda C, real, made: {'l2': made.detach().sum() * 0 + 1}
    assert RefineLosses(similarity, 3).h(nets, batch) == {'l2': 3}


def test_each_step_sees_the_sketch_and_the_image_before_it_and_learns_alone():
    r, seen = make(), []
    G = r.nets['G']
    shapes = [shape_of(layer) for layer, _ in layers_of(G.synthesis)]
    weight = torch.ones(3, requires_grad=True)

    class Fake(torch.nn.Module):
        def forward(self, sketch, image):
            seen.append((sketch, image))
            return [0.1 * weight[len(seen) - 1] * torch.ones(1, *s) for s in shapes]

    nets, sketch = SimpleNamespace(**r.nets | {'H': Fake()}), torch.rand(1, 1, 16, 16)
    made = list(refine(nets, sketch, 3))
    assert all(torch.equal(s, sketch) and torch.equal(x, m) for (s, x), m in zip(seen, made))
    found = torch.autograd.grad(made[3].square().sum(), weight)[0]
    assert found[2] != 0 and (found[:2] == 0).all()


def test_the_hyper_network_sees_sketch_and_image():
    torch.manual_seed(0)
    H = make().nets['H']
    for w in H.writers.values():
        torch.nn.init.normal_(w.second.weight)
    sketch, image = torch.rand(2, 1, 1, 16, 16), torch.rand(2, 1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        base = H(sketch[0], image[0])
        for other in (H(sketch[1], image[0]), H(sketch[0], image[1])):
            assert all(not torch.allclose(a, b) for a, b in zip(base, other))


def test_bent_weights_that_grow_like_the_layers_own():
    "Weights (1 + Δ) are those of a generator whose own weights were changed so, layers that double the size too"
    import copy

    torch.manual_seed(0)
    G = make().nets['G']
    w = torch.randn(1, G.synthesis.styles, 8)
    offsets = [0.3 * torch.randn(1, *shape_of(layer)) for layer, _ in layers_of(G.synthesis)]
    other = copy.deepcopy(G.synthesis)
    for (layer, _), d in zip(layers_of(other), offsets):
        d = d[0].T if layer.up else d[0]
        layer.weight.data *= (1 + d)[:, None, None]
    with torch.no_grad():
        assert torch.allclose(bent_synthesis(G.synthesis, w, offsets), other(w, noise='constant'), atol=1e-4)


def test_the_search_begins_at_the_generators_mean_style(trained):
    r, _ = trained
    assert torch.equal(r.nets['E'].centre, r.nets['G'].mapping.w_avg) and r.nets['E'].centre.abs().sum() > 0


def test_sketches_that_the_data_brings_are_used(data, trained, monkeypatch):
    r, _ = trained
    sketches = np.zeros((6, 16, 16), np.uint8)
    sketches[:, 3] = 255
    monkeypatch.setattr(r, 'sketch_all', lambda d: pytest.fail('S was asked'))
    assert np.array_equal(r.paired(data.with_sketches(sketches)).sketches, sketches)


def test_the_slow_copy_follows_and_the_averages_draw(data):
    r = make(1)
    r.prepare(data)
    stages = {s.name: s for s in r.stages(data, data)}
    assert stages['encoder'].average == ('E',) and stages['refine'].average == ('H',)
    assert stages['encoder'].frozen == ('G', 'C') and stages['refine'].frozen == ('G', 'C', 'E')
    rates = {p.name: p.opt.param_groups[0]['lr'] for p in stages['encoder'].phases}
    assert rates['E'] == 1e-4 and rates['D_W'] == 2e-5
    before = [p.clone() for p in r.nets['K'].encoder.parameters()]
    train(r, data, stages=['moco'])
    assert any(not torch.equal(a, b) for a, b in zip(before, r.nets['K'].encoder.parameters()))


def test_without_h_nothing_is_refined(data):
    r = train(make(1), data, stages=['segment', 'gan', 'moco', 'encoder'])
    sketch = torch.rand(1, 1, 16, 16)
    assert torch.equal(r.render(sketch), r.render(sketch, steps=0)[0])
    with pytest.raises(ValueError, match='hold no H'):
        r.render(sketch, steps=1)


def test_agreement_compares_what_s_finds_in_both(trained, monkeypatch):
    r, _ = trained
    box = torch.zeros(1, 16, 16, dtype=torch.bool)
    box[:, :4] = True

    def find(images):
        return [{'masks': box if x.mean() > 0 else box.flip(1), 'classes': torch.tensor([1])} for x in images]

    monkeypatch.setattr(r, 'find', find)
    real, other = torch.ones(2, 3, 16, 16), -torch.ones(2, 3, 16, 16)
    assert r.agreement(real, real) == 1 and r.agreement(real, other) == 0
    assert r.agreement(real, torch.cat([real[:1], other[:1]])) == 0.5


def test_the_number_of_classes_comes_with_s(trained, data, tmp_path):
    "S of three classes, for images without masks; the second call goes on with what the run kept"
    plain = data.with_planes(mask=None)
    new = lambda: make(segment_steps=0, gan_steps=1, moco_steps=1, encoder_steps=1, refine_steps=1)
    for _ in range(2):
        r = train(new(), plain, tmp_path / 'run', init={'S': trained[1]})
    assert r.config['classes'] == 3 and r.nets['S'].classes == 2
    assert train(new(), plain, tmp_path / 'run').config['classes'] == 3


def test_without_sketches_no_stage_begins(data, tmp_path):
    "E would find none, hours later"
    with pytest.raises(ValueError, match='no S is trained'):
        train(make(segment_steps=0), data.with_planes(mask=None), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_sketches_of_the_data_are_enough_to_begin(data):
    "Without masks, and without S"
    plain = data.with_planes(mask=None)
    sketches = np.zeros((len(data), data.size, data.size), np.uint8)
    make(segment_steps=0).check_ready({'encoder', 'refine'}, plain.with_sketches(sketches))
    for stage in ('encoder', 'refine'):
        with pytest.raises(ValueError, match='no S is trained'):
            make(segment_steps=0).check_ready({stage}, plain)
    make(segment_steps=0).check_ready({'gan', 'moco'}, plain)


def test_a_number_of_classes_that_was_given_stays(trained):
    "S may know more classes than are wanted: it is said when its weights do not fit, and never changed silently"
    r = make(classes=5)
    r.shape_like({'S': trained[1]})
    assert r.config['classes'] == 5
