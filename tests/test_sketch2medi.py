"Sketch2MedI: which network learns when, refinement, resumed runs, and what is refused."

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medsketch.data import ImageData
from medsketch.models.hyper import bent_synthesis, layers_of, shape_of
from medsketch.recipes import Sketch2MedI, SketchSynth, load_recipe
from medsketch.recipes.sketch2medi import EncoderLosses, RefineLosses, Similarity, perceptual

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
    from medsketch.recipes.sketch2medi import refine

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


def test_the_latent_loss_pulls_to_known_styles():
    "D_W learns on styles; E's loss has no gradient for G, and the adversarial weight counts"
    r = make()
    nets, batch = SimpleNamespace(**r.nets), {'image': torch.zeros(2, 3, 16, 16), 'sketch': torch.zeros(2, 1, 16, 16)}
    none, some = (EncoderLosses(Similarity(), 8, adv).e(nets, batch)['adv'] for adv in (0, 0.5))
    assert none == 0 and some > 0.2
    h = RefineLosses(Similarity(), 3).h(nets, batch)
    assert set(h) == {'l2', 'lpips', 'cos'}


def test_it_says_what_is_missing(data):
    with pytest.raises(ValueError, match='wants|no masks|holds no|was not trained'):
        train(make(segment_steps=0, gan_steps=1), data, stages=['gan', 'encoder'])
    with pytest.raises(ValueError, match='no masks'):
        SketchSynth(**{k: TINY[k] for k in ('size', 'resnet', 'net_width', 'convs', 'batch_size')}).fit(
            data.with_planes(mask=None)
        )
    with pytest.raises(ValueError, match="'w' or 'w\\+'"):
        make(space='z')
