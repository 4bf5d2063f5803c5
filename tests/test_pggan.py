"The medical progressive GAN: image and map in one tensor, an encoder back, runs that resume, the latent space"

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import one_line, same_runs

from medsketch.cli import main
from medsketch.data import ImageData, phantom_data
from medsketch.evaluate.agreement import segmentation_ablation, vessel_agreement
from medsketch.evaluate.latent import (
    column,
    directions,
    encode_set,
    frames,
    latent_map,
    linear_accuracy,
    nearest_real,
    reconstruction_scores,
    reconstructions,
    slerp,
    which_eye,
    write_walk,
)
from medsketch.export import export_dataset
from medsketch.models.pggan import PGEncoder
from medsketch.recipes import PGGAN, load_recipe
from medsketch.recipes.pggan import Latents, on_sphere
from medsketch.studio.explorer import Explorer, LatentPlace
from medsketch.train.trainer import Callback

os.environ['ACCELERATE_USE_CPU'] = 'true'  # "to the last bit" is a promise for the CPU

SMALL = {'size': 16, 'latent_dim': 8, 'fmap_base': 32, 'fmap_max': 8, 'batch_size': 2, 'batches': 3}


def tiny(**changes):
    return PGGAN(**{**SMALL, 'seg': ['disc', 'vessel'], 'encoder_steps': 4, **changes})


@pytest.fixture(scope='module')
def data():
    return phantom_data('fundus', 7, 16)


@pytest.fixture(scope='module')
def through(tmp_path_factory, data):
    "An uninterrupted run"
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('runs') / 'run'
    return SimpleNamespace(out=out, recipe=tiny().fit(data, out, every=2, progress=False))


# --- channels ---


def test_image_and_mask_survive_the_round_trip(data, through):
    batch, r = data.batch(range(7)), through.recipe
    x = r.stack(batch['image'], batch['mask'])
    assert x.shape == (7, 5, 16, 16) and set(x[:, 3:].unique().tolist()) <= {-1.0, 1.0}
    back = r.split(x, soft=True)
    assert torch.equal(back['image'], batch['image'])
    wanted = torch.where((batch['mask'] == 2) | (batch['mask'] == 3), batch['mask'], 0)  # the macula is not asked for
    assert torch.equal(back['mask'], wanted)
    assert torch.equal(back['seg'][:, 1], (batch['mask'] == 3).float())


def test_every_class_and_one_by_name_or_number(data):
    assert tiny(seg='mask').fit(data, progress=False, stages=['gan']).labels == [1, 2, 3]
    for seg in ('vessel', 3, ['vessel']):
        r = tiny(seg=seg, encoder_steps=0).fit(data, progress=False)
        assert r.labels == [3] and r.nets['G'].channels == 4
        assert set(r.sample(4)['mask'].unique().tolist()) <= {0, 3}


def test_the_critic_sees_the_mask(data):
    "A map that changes alone changes what the discriminator says"
    r = tiny(encoder_steps=0)
    r._know(data)
    batch = data.batch(range(4))
    real = r.real(batch)
    other = r.real(batch | {'mask': torch.zeros_like(batch['mask'])})
    assert torch.equal(real[:, :3], other[:, :3]) and not torch.equal(real[:, 3:], other[:, 3:])
    assert not torch.equal(r.judge(r.nets['D'], real), r.judge(r.nets['D'], other))


def test_the_critic_cannot_tell_maps_by_their_exact_values(data):
    r, batch = tiny(seg='vessel'), data.batch(range(4))
    r._know(data)
    seen = lambda r, x: r.judge(lambda x, alpha: x, x)
    x = r.stack(batch['image'], batch['mask'])
    image, maps = seen(r, x).split([3, 1], 1)
    assert torch.equal(image, x[:, :3]) and set(x[:, 3:].unique().tolist()) == {-1, 1}
    middle = x[:, 3:].unfold(2, 3, 1).unfold(3, 3, 1).mean((4, 5))
    torch.testing.assert_close(maps[:, :, 1:-1, 1:-1], middle)
    edge = x[:, 3, 0].unfold(1, 3, 1).mean(-1) / 2 + x[:, 3, 1].unfold(1, 3, 1).mean(-1) / 2
    torch.testing.assert_close(maps[:, 0, 0, 1:-1], edge)  # nothing is made up outside
    assert torch.equal(seen(tiny(seg=None), x[:, :3]), x[:, :3])


def test_while_it_grows_masks_are_averaged_like_images(data):
    r = tiny(encoder_steps=0)
    r._know(data)
    batch = data.batch(range(4))
    r.fade.size, r.fade.alpha = 8, 1.0
    vessels = (batch['mask'] == 3).float().reshape(4, 8, 2, 8, 2).mean((2, 4))
    torch.testing.assert_close(r.real(batch)[:, 4], vessels * 2 - 1)


def test_without_maps_it_is_the_plain_one(data):
    "Same networks from the same seed, same arguments as earlier versions wrote down, same samples"
    plain, other = PGGAN(**SMALL), PGGAN(**SMALL, seg=None, encoder_steps=0)
    assert plain.config.keys().isdisjoint({'seg', 'classes', 'encoder_steps', 'encoder_sees'})
    assert list(plain.config)[-1] == 'seed' and plain.config == other.config
    assert list(plain.nets) == ['G', 'D'] and list(plain.sample(2)) == ['image']
    bare = ImageData(data.images, paths=data.paths)
    a, b = (PGGAN(**SMALL).fit(d, progress=False).sample(2)['image'] for d in (data, bare))
    assert torch.equal(a, b)  # masks are no matter to it


def test_four_contrasts_with_labels():
    brains = phantom_data('brain_mri', 5, 16)
    s = tiny(channels=4, seg='mask', encoder_steps=0).fit(brains, progress=False).sample(3)
    assert s['image'].shape == (3, 4, 16, 16) and s['mask'].shape == (3, 16, 16) and s['mask'].dtype == torch.int64


def test_the_paper_s_numbers():
    r = PGGAN.preset('paper', seg='vessel')
    last = r.growth.stages[-1]
    assert [s.size for s in r.growth.stages] == [4, 8, 16, 32, 64, 128, 256, 512]
    assert all((s.steps, s.batch_size) == (40_000, 16) for s in r.growth.stages[:-1])
    assert r.growth.stages[1].fade == 20_000
    assert (last.steps, last.fade, last.batch_size) == (40_000, 20_000, 8)
    assert r.config['latent_dim'] == 128 and r.config['encoder_steps'] == 20_000
    assert [len(c.bias) for c in r.nets['D'].from_image] == [128] * 6 + [64, 16]


# --- the encoder ---


def test_an_image_is_encoded_for_itself():
    torch.manual_seed(0)
    E, x = PGEncoder(16, 5, 8, 32, 8), torch.randn(4, 5, 16, 16)
    torch.testing.assert_close(E(x)[1:2], E(x[1:2]))
    assert E(x).shape == (4, 8)


def test_latents_begin_again_where_they_stopped():
    a = Latents(3, 4, seed=5)
    first, second = next(a)['z'], next(a)['z']
    b = Latents(3, 4, seed=5)
    b.position = 3
    assert torch.equal(next(b)['z'], second) and not torch.equal(first, second)
    two = [Latents(3, 4, seed=5) for _ in range(2)]
    for rank, p in enumerate(two):
        p.rank, p.world = rank, 2
    assert torch.equal(next(two[1])['z'], second) and two[1].position == 6


def test_the_encoder_beats_random(data):
    "Even of a generator that was hardly trained: what it draws is found again; a search is better yet"
    r = tiny(latent_dim=4, fmap_max=16, fmap_base=64, batch_size=8, batches=1, lr=3e-3, encoder_steps=250)
    r.fit(data, progress=False)
    made = r.sample(32, seed=9)
    z = r.encode(made['image'], made['mask'])
    error = lambda z: (r.decode(z)['image'] - made['image']).square().mean().item()
    near = r.invert(made['image'], made['mask'], steps=15)
    assert error(z) < 0.6 * error(on_sphere(r.noise(32, 77)))
    assert error(near) < error(z)
    torch.testing.assert_close(z.square().mean(1), torch.ones(32), atol=1e-3, rtol=0)


def test_the_generator_stays_frozen_and_says_so(through):
    config = json.loads((through.out / 'config.json').read_text())
    assert list(config['frozen']['encoder']) == ['G']
    again = load_recipe(through.out, 'cpu')
    assert {'G', 'E'} == set(again.shared) and 'D' not in again.shared


def test_an_encoder_of_the_image_alone(data):
    r = tiny(encoder_sees='image').fit(data, progress=False)
    image = data.batch(range(3))['image']
    assert r.encode(image).shape == (3, 8) and r.invert(image, steps=1).shape == (3, 8)


# --- resumed runs ---


class StopAt(Callback):
    "Somebody pulls the plug"

    def __init__(self, step):
        self.step = step

    def after_step(self, trainer):
        if trainer.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize('stages, step', [(['gan'], 4), (['encoder'], 2)])
def test_resumed_is_uninterrupted(through, data, tmp_path, stages, step):
    "In the middle of a fade, and in the middle of the encoder stage"
    if stages == ['encoder']:
        tiny().fit(data, tmp_path / 'run', every=2, progress=False, stages=['gan'])
    with pytest.raises(KeyboardInterrupt):
        tiny().fit(data, tmp_path / 'run', every=2, progress=False, stages=stages, callbacks=[StopAt(step)])
    r = tiny().fit(data, tmp_path / 'run', every=2, progress=False)
    same_runs(through.out, tmp_path / 'run')
    assert torch.equal(r.sample(3, seed=1)['mask'], through.recipe.sample(3, seed=1)['mask'])
    z = [x.encode(data) for x in (r, through.recipe)]
    assert torch.equal(*z)


def test_minutes_leave_the_encoder_that_was_asked_for(tmp_path):
    "The schedule of a budget has no encoder; who names its steps gets it on top"
    line = 'train pggan --data phantoms:fundus:8 --scale tour --size 16 --minutes 0.01 --set encoder_steps=3'
    with pytest.raises(SystemExit) as e:
        main(f'{line} --set latent_dim=8 --set fmap_base=32 --set fmap_max=8 --out {tmp_path}/run'.split())
    assert e.value.code == 0
    assert json.loads((tmp_path / 'run/config.json').read_text())['config']['encoder_steps'] == 3


# --- bad input ---


def test_what_does_not_fit_is_refused_in_a_line(through, data):
    r, image = through.recipe, data.batch([0])['image']
    odd = data.with_planes(mask=data.masks + 4 * (data.masks == 3))
    cases = [
        (lambda: tiny(seg='artery').fit(data, progress=False), 'no class of the masks'),
        (lambda: tiny(seg=9).fit(data, progress=False), 'no class of the masks'),
        (lambda: tiny().fit(data.with_planes(mask=None), progress=False), 'has no masks'),
        (lambda: tiny().fit(odd, progress=False), 'holds class 7'),
        (lambda: tiny(encoder_sees='mask'), 'encoder_sees'),
        (lambda: tiny(diffaugment='colour'), 'changes colours'),
        (lambda: r.encode(image), 'pass the masks'),
        (lambda: r.encode(image[..., :8], data.batch([0])['mask']), 'this recipe takes'),
        (lambda: r.encode(image, torch.zeros(1, 8, 8).long()), 'masks are'),
        (lambda: r.decode(torch.zeros(2, 5)), 'has 8 numbers each'),
        (lambda: PGGAN(**SMALL).encode(image), 'no encoder'),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=text) as e:
            call()
        assert one_line(e)


def test_pairs_are_exported(through, tmp_path):
    "Image and mask files of the same number, and the names of the classes"
    export_dataset(through.recipe, 3, tmp_path / 'set', progress=False)
    lines = [json.loads(x) for x in (tmp_path / 'set' / 'metadata.jsonl').read_text().splitlines()]
    assert len(lines) == 3 and lines[0]['classes'] == ['background', 'macula', 'disc', 'vessel']
    assert all((tmp_path / 'set' / x[k]).is_file() for x in lines for k in ('file_name', 'mask_file_name'))


# --- the latent space ---


def test_columns_of_a_table(tmp_path):
    (tmp_path / 't.csv').write_text('image,eye\na.png,left\nv.nii,right\n')
    paths = [str(tmp_path / 'a.png'), f'{tmp_path}/v.nii#0', f'{tmp_path}/v.nii#12']
    ds = ImageData(np.zeros((3, 1, 16, 16), np.uint8), paths=paths)
    assert column(ds, tmp_path / 't.csv', 'eye') == ['left', 'right', 'right']
    assert column(ds, tmp_path / 't.csv', 'slice') == [0, 0, 12]
    with pytest.raises(ValueError, match="no column 'side'"):
        column(ds, tmp_path / 't.csv', 'side')
    other = ImageData(np.zeros((1, 1, 16, 16), np.uint8), paths=['elsewhere.png'])
    with pytest.raises(ValueError, match='no row for'):
        column(other, tmp_path / 't.csv', 'eye')


def test_nobody_is_trained_on_and_tested():
    "Vectors that only name their subject say nothing of a label"
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(40), 5)
    z = rng.normal(size=(40, 12))[who] + 0.01 * rng.normal(size=(200, 12))
    label = np.where(rng.permutation(40) < 20, 'a', 'b')[who]
    honest = linear_accuracy(z, label, who)
    leaking = linear_accuracy(z, label, np.arange(200))
    assert abs(honest['balanced'] - 0.5) < 0.25 and leaking['accuracy'] > honest['accuracy'] + 0.1
    z[:, 3] += 4 * (label == 'a')
    assert linear_accuracy(z, label, who)['balanced'] > 0.8
    assert directions(z, label)['a'].abs().argmax() == 3 and directions(z, label)['a'][3] > 0


def test_slerp_keeps_to_the_sphere_and_ends_where_it_should():
    a, b = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    a, b = a / a.norm(), b / b.norm()
    s = slerp(a, b, 9)
    torch.testing.assert_close(s.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(s[[0, -1]], torch.stack([a, b]))
    assert torch.equal(slerp(a, a, 3), a.expand(3, -1)) or (slerp(a, a, 3) - a).abs().max() < 1e-6
    which, angle = nearest_real(s[1:2], torch.stack([b, a]), 2)
    assert which.tolist() == [[1, 0]] and angle[0, 0] < angle[0, 1]


def test_eyes_by_their_discs():
    mask = np.zeros((3, 16, 16), np.uint8)
    mask[:2, 8, 4] = 1
    mask[0, 8, 12] = mask[1, 8, 1] = 2
    ds = ImageData(np.zeros((3, 3, 16, 16), np.uint8), mask, classes=('background', 'macula', 'disc'))
    assert which_eye(ds) == ['right', 'left', '']


def test_reconstructions_and_walks(through, data, tmp_path):
    r = through.recipe
    made = reconstructions(r, data, search=2)
    scores = reconstruction_scores(made, data, 'vessel')
    assert list(scores) == ['encoder', 'search', 'random'] and scores['search']['l1'].shape == (7,)
    true = {'itself': {k: v for k, v in data.batch(range(7)).items() if k in ('image', 'mask')}}
    perfect = reconstruction_scores(true, data, 'vessel')['itself']
    assert (perfect['dice'] == 1).all() and (perfect['l1'] == 0).all()
    pictures = frames(r, slerp(*r.noise(2, 0), 5), 32)
    assert pictures.shape == (5, 32, 64, 3)
    write_walk(tmp_path / 'w.gif', pictures)
    assert (tmp_path / 'w.gif').stat().st_size > 100 and not list(tmp_path.glob('.*'))
    assert encode_set(r, data, chunk=3).shape == (7, 8)
    torch.testing.assert_close(encode_set(r, data, chunk=3), encode_set(r, data, chunk=64))


# --- agreement ---


class Threshold:
    "A segmenter that marks what is dark"

    def segment(self, x):
        return (x[:, 1] < 0).long()


def test_maps_that_agree_and_maps_of_others():
    g = torch.Generator().manual_seed(0)
    vessels = (torch.rand(6, 32, 32, generator=g) < 0.2).float()
    x = (1 - 2 * vessels)[:, None].expand(-1, 3, -1, -1) * 0.5
    right = vessel_agreement(Threshold(), x, vessels, field=None)
    assert right['auc'] == 1 and abs(right['others'] - 0.5) < 0.1
    assert vessel_agreement(Threshold(), x, 1 - vessels, field=None)['auc'] == 0


def test_gaps_show_in_the_ablation():
    x = torch.ones(3, 3, 32, 32) * 0.5
    x[:, :, 16] = -0.5
    gaps = x.clone()
    gaps[..., 10:12] = gaps[..., 20:22] = 0.5
    found = segmentation_ablation(Threshold(), field=None, whole=x, gaps=gaps)
    assert found['whole']['components'][0] == 1 and found['gaps']['components'][0] == 3
    assert found['gaps']['length'][0] < found['whole']['length'][0]
    assert found['whole']['longest'][0] == 1 and found['gaps']['longest'][0] < 0.5


# --- the explorer ---


def test_a_place_moves_along_its_ways():
    p = LatentPlace(torch.zeros(3), {'x': torch.tensor([1.0, 0, 0])}, {'x': 2.0})
    p.moved['x'] = 1.5
    assert p.vector.tolist() == [3, 0, 0]
    p.anchor('A')
    p.go(torch.tensor([0.0, 4, 0]))
    assert p.vector.tolist() == [0, 4, 0] and p.moved == {'x': 0}
    with pytest.raises(ValueError, match='anchor B'):
        p.walk()
    p.anchor('B')
    assert p.walk(3)[0].tolist() == [3, 0, 0] and p.walk(3).shape == (3, 3)


def test_explorer_by_hand(through, data):
    eyes = ['left', 'right'] * 3 + ['left']
    e = Explorer(through.recipe, data, {'eye': eyes}, method='pca')
    assert list(e.sliders) == ['principal 1', 'principal 2', 'principal 3', 'principal 4', 'eye: right']
    before = e.image.value
    e.sliders['principal 1'].value = 3.0
    want = e.codes[0] + 3 * e.place.spread['principal 1'] * e.place.ways['principal 1']
    torch.testing.assert_close(e.place.vector, want)
    assert e.image.value != before
    x, y = e.map.at[4]
    e.map.canvas[-1]._handle_frontend_event(None, {'event': 'mouse_down', 'x': x, 'y': y}, [])
    assert e.map.chosen == 4 and torch.equal(e.place.vector, e.codes[4]) and e.sliders['principal 1'].value == 0
    assert 'image 4' in e.text.value
    e.buttons['walk'].click()
    assert 'anchor A is not set' in e.text.value
    e.buttons['set A'].click()
    e.buttons['random'].click()
    e.buttons['set B'].click()
    e.buttons['walk'].click()
    assert e.frames.shape[0] == 16 and not e.step.disabled
    first = e.image.value
    e.step.value = 15
    assert e.image.value != first


@pytest.mark.parametrize('method', ['tsne', 'pca'])
def test_a_map_of_one_image_again_and_again_is_refused(method):
    "scikit-learn's t-SNE ends the process where all vectors are equal"
    for z in (torch.ones(6, 8), torch.eye(8)[[0, 1, 2, 0, 1, 2]], torch.full((6, 8), torch.nan)):
        with pytest.raises(ValueError, match='different vectors; a map needs at least 4|not finite'):
            latent_map(z, method)
    assert np.isfinite(latent_map(torch.eye(8)[[0, 1, 2, 3, 0, 1]], method)).all()
