"""The dual GAN: masks as planes and back, specks, pairs that belong together, runs that resume to the last bit."""

import inspect
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import contents, die, half_written, killed, one_line, rows, same, same_runs
from PIL import Image

from medsketch.cli import main
from medsketch.core import to_uint8
from medsketch.data import ImageData, load_images, phantom_data
from medsketch.recipes import DualGAN, load_recipe
from medsketch.recipes.dualgan import mask_game
from medsketch.sketch.masks import clean_masks, mask_planes, plane_masks, soften

os.environ['ACCELERATE_USE_CPU'] = 'true'  # "to the last bit" is a promise for the CPU

SMALL = {
    'size': 16,
    'latent_dim': 8,
    'ngf': 4,
    'ndf': 4,
    'receptive_field': 1,
    'batch_size': 4,
    'mask_steps': 9,
    'render_steps': 9,
}


def tiny(**changes):
    return DualGAN(**{**SMALL, **changes})


def some_data(n=7, channels=3, size=16, seed=0, classes=2, **kwargs):
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), np.uint8)
    for m in masks:
        for k in range(1, classes):
            y, x = rng.integers(0, size - 6, 2)
            m[y : y + 6, x : x + 6] = k
    return ImageData(rng.integers(0, 256, (n, channels, size, size), np.uint8), masks, **kwargs)


@pytest.fixture(scope='module')
def data():
    return some_data()


@pytest.fixture(scope='module')
def extra():
    return some_data(3, seed=5)


@pytest.fixture(scope='module')
def through(tmp_path_factory, data, extra):
    "An uninterrupted run of both stages"
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('runs') / 'run'
    return SimpleNamespace(out=out, recipe=tiny().fit(data, out, more=extra, every=4, progress=False))


# --- planes, specks ---


@pytest.mark.parametrize('classes', [2, 3, 5])
def test_planes_and_back(classes):
    m = torch.randint(classes, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    p = mask_planes(m, classes)
    assert p.shape == (3, 1 if classes == 2 else classes, 8, 8) and set(p.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(plane_masks(p * 2 - 1), m)


def test_two_classes_take_any_foreground():
    m = torch.tensor([[[0, 1], [7, 255]]])
    assert torch.equal(plane_masks(mask_planes(m, 2) * 2 - 1), (m > 0).long())
    with pytest.raises(ValueError, match='class 255.*0 to 2') as e:
        mask_planes(m, 3)
    assert one_line(e)


@pytest.mark.parametrize('draw', [lambda i: (8, i), lambda i: (i, i), lambda i: (i, 15 - i)])
def test_the_thinnest_line_survives_the_blur(draw):
    "One pixel wide, straight or slanting: after blur and threshold it is what it was; with twice the blur it is not"
    m = torch.zeros(1, 16, 16, dtype=torch.long)
    for i in range(16):
        m[(0, *draw(i))] = 1
    assert torch.equal(plane_masks(soften(mask_planes(m)) * 2 - 1), m)
    assert plane_masks(soften(mask_planes(m), 1.0) * 2 - 1)[:, 2:-2, 2:-2].sum() == 0
    assert torch.equal(soften(mask_planes(m), 0), mask_planes(m))
    torch.testing.assert_close(soften(mask_planes(m)).mean(), mask_planes(m).mean(), rtol=0.1, atol=0)


def test_specks_go_where_they_lie():
    m = torch.zeros(2, 16, 16, dtype=torch.long)
    m[0, 10:] = 2
    m[0, 12, 3] = 1  # in class 2
    m[0, 3, 14] = m[0, 4, 15] = 1  # in the background, joined over a corner
    m[0, 2, 1:6] = 1  # five pixels: large enough
    c = clean_masks(m, 5)
    assert c[0, 12, 3] == 2 and c[0, 3, 14] == c[0, 4, 15] == 0 and (c == 1).sum() == 5
    assert torch.equal(c[1], m[1]) and c.dtype == torch.int64
    assert torch.equal(clean_masks(m, 0), m) and torch.equal(clean_masks(c, 5), c)
    assert clean_masks(torch.ones(1, 4, 4, dtype=torch.long), 99).min() == 1  # no shore
    assert m[0, 12, 3] == 1  # the caller's mask stays


# --- the losses ---


def test_the_generator_goes_where_the_discriminator_points():
    "Against a D that tells full masks from empty ones and stays as it is, G draws fuller ones"
    r = tiny(lr=1e-2, r1=0.0)
    nets = SimpleNamespace(**{k: n.train() for k, n in r.nets.items()})
    g, d = mask_game(8, r1=0.0).phases(r._adam('G_M'), r._adam('D_M'))
    full, empty = torch.ones(8, 1, 16, 16), -torch.ones(8, 1, 16, 16)
    noisy = lambda x: x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(30):
        d.loss(nets, {'sketch': noisy(full), 'fake': noisy(empty)}).backward()
        d.opt.step(), d.opt.zero_grad()
    nets.D_M.eval()
    torch.manual_seed(0)
    means = []
    for _ in range(20):
        batch = {'sketch': full}
        g.loss(nets, batch).backward()
        g.opt.step(), g.opt.zero_grad()
        means.append(batch['fake'].mean().item())
    assert means[-1] > means[0] + 0.3


def test_r1_is_a_phase_only_if_it_weighs_something():
    r = tiny()
    opts = r._adam('G_M'), r._adam('D_M')
    assert [p.name for p in mask_game(8, r1=0.0).phases(*opts)] == ['G_M', 'D_M']
    assert [p.name for p in mask_game(8, r1=1.0).phases(*opts)] == ['G_M', 'D_M', 'R1']
    y = {'sketch': torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))}
    nets = SimpleNamespace(**{k: n.train() for k, n in r.nets.items()})
    a, b = (mask_game(8, r1=g).penalty(nets, y) for g in (1.0, 3.0))
    assert a > 0
    torch.testing.assert_close(b, 3 * a)


# --- runs ---


@pytest.mark.parametrize('stage', ['mask', 'render'])
def test_a_killed_run_resumes_to_the_last_bit(through, data, extra, tmp_path, stage):
    "Killed while it writes the checkpoint of step 8 of either stage"
    fit = lambda: tiny().fit(data, tmp_path / 'run', more=extra, every=4, progress=False)

    def run():
        with half_written(lambda s: s['step'] == 8 and ('G_M' in s['nets']) == (stage == 'mask'), die):
            fit()

    killed(run)
    assert [p.name for p in (tmp_path / 'run' / stage / 'checkpoints').glob('[0-9]*.pt')] == ['000004.pt']
    torch.manual_seed(123)
    fit()
    same_runs(through.out, tmp_path / 'run')
    before = contents(tmp_path / 'run')
    fit()  # finished: left as it is
    assert contents(tmp_path / 'run') == before


def test_stage_by_stage_is_the_same(through, data, extra, tmp_path):
    "The masks first, later the renderer, with photographs that got their masks in between; stage II alone works too"
    first = tiny().fit(data, tmp_path / 'run', stages=['mask'], every=4, progress=False)
    assert set(first.sample(2)) == {'mask'} and first.shared.keys() == {'G_M'}
    with pytest.raises(ValueError, match='no G_P'):
        first.render(torch.zeros(16, 16))
    tiny().fit(data, tmp_path / 'run', stages=['render'], more=extra, every=4, progress=False)
    same_runs(through.out, tmp_path / 'run')
    again = tiny().fit(data, tmp_path / 'run', stages=['mask'], progress=False)  # what there is of the other is loaded
    same(again.sample(3, seed=2), through.recipe.sample(3, seed=2))
    alone = tiny().fit(data, tmp_path / 'alone', stages=['render'], more=extra, every=4, progress=False)
    same(alone.nets['G_P'].state_dict(), through.recipe.nets['G_P'].state_dict())
    with pytest.raises(ValueError, match='no G_M'):
        alone.sample(1)


def test_what_a_run_leaves(through, data, extra):
    out, r = through.out, through.recipe
    for stage in ('mask', 'render'):
        assert sorted(p.name for p in (out / stage / 'samples').iterdir()) == ['000004.png', '000008.png', '000009.png']
        log = rows(out / stage / 'log.csv')
        assert int(log[-1]['step']) == 9 and all(np.isfinite(float(v)) for row in log for v in row.values())
    back = load_recipe(out, 'cpu')
    assert (
        type(back) is DualGAN
        and back.config == json.loads((out / 'config.json').read_text())['config']
        and back.config['classes'] == 2
    )
    same(back.sample(3, seed=2), r.sample(3, seed=2))
    same(
        tiny().fit(data, more=extra, progress=False).sample(3, seed=2), r.sample(3, seed=2)
    )  # with or without a folder
    assert not any(n.training for n in r.nets.values()) and r.shared.keys() == {'G_M', 'G_P'}


def test_more_is_for_stage_two_alone(through, data, extra):
    without = tiny().fit(data, progress=False)
    same(without.nets['G_M'].state_dict(), through.recipe.nets['G_M'].state_dict())
    assert not torch.equal(without.render(data.masks[0]), through.recipe.render(data.masks[0]))
    with pytest.raises(ValueError, match='more=') as e:
        tiny().fit(data, through.out, progress=False)
    assert one_line(e)


# --- samples ---


@pytest.mark.parametrize('classes', [2, 4])
def test_a_sample_does_not_depend_on_its_company(classes):
    r = tiny(classes=classes, speck=0, mask_steps=20).fit(some_data(classes=classes), progress=False)
    whole = r.sample(8, seed=4)
    assert (
        list(whole) == ['image', 'mask'] and whole['image'].shape == (8, 3, 16, 16) and whole['image'].abs().max() <= 1
    )
    assert (
        whole['mask'].shape == (8, 16, 16)
        and whole['mask'].dtype == torch.int64
        and 0 <= whole['mask'].min()
        and whole['mask'].max() < classes
    )
    for other in (r.sample(3, seed=4), r.sample(8, seed=4, batch_size=3)):
        assert torch.equal(other['mask'], whole['mask'][: len(other['mask'])])
        torch.testing.assert_close(other['image'], whole['image'][: len(other['image'])], rtol=0, atol=1e-5)
    assert not torch.equal(r.sample(8, seed=5)['mask'], whole['mask'])
    torch.testing.assert_close(r.render(whole['mask']), whole['image'], rtol=0, atol=1e-5)  # the mask is the image's
    with pytest.raises(ValueError, match='n=0'):
        r.sample(0)


def test_no_speck_in_any_sample():
    import cv2

    noisy, clean = (
        tiny(speck=s).sample(8)['mask'].numpy().astype(np.uint8) for s in (0, 9)
    )  # untrained: crumbs all over
    small = lambda m: sum(
        (cv2.connectedComponentsWithStats(x, connectivity=8)[2][1:, cv2.CC_STAT_AREA] < 9).sum() for x in m
    )
    assert small(noisy) > 8 and small(clean) == 0


def test_render_takes_ids_and_planes(through):
    r = through.recipe
    m = torch.zeros(2, 16, 16, dtype=torch.long)
    m[:, 4:9] = 1
    want = r.render(m)
    for same_thing in (m.numpy().astype(np.uint8), m.bool(), m * 255, m[:, None].float(), m.float()):
        assert torch.equal(r.render(same_thing), want)
    torch.testing.assert_close(r.render(m[0]), want[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(r.render(m[0].float()), want[:1], rtol=0, atol=1e-5)
    assert not torch.equal(r.render(torch.zeros_like(m)), want)
    torch.testing.assert_close(r.for_drawing().render(m), want, rtol=0, atol=1e-4)
    three = tiny(classes=3)
    for wrong, x, text in (
        (r, torch.zeros(8, 8), 'renders 16 × 16'),
        (three, m + 2, '0 to 2'),
        (three, torch.zeros(1, 16, 16), 'has 3 per mask'),
    ):
        with pytest.raises(ValueError, match=text) as e:
            wrong.render(x)
        assert one_line(e)


def test_classes_come_from_the_data(tmp_path):
    r = tiny(mask_steps=2, render_steps=2).fit(some_data(classes=4), tmp_path / 'run', progress=False)
    assert r.config['classes'] == 4 and r.nets['G_M'](r.noise(1, 0)).shape[1] == 4
    assert load_recipe(tmp_path / 'run', 'cpu').sample(2)['mask'].max() <= 3
    named = ImageData(
        some_data().images, some_data().masks, classes=('none', 'a', 'b')
    )  # a class that no mask happens to show
    assert tiny(mask_steps=1, render_steps=1).fit(named, progress=False).config['classes'] == 3
    joined = tiny(mask_steps=1, render_steps=1, classes=2).fit(some_data(classes=4), progress=False)
    assert joined.config['classes'] == 2 and joined.sample(2)['mask'].max() <= 1
    with pytest.raises(ValueError, match='4 classes, the recipe 3.*classes=4') as e:
        tiny(classes=3).fit(some_data(classes=4), progress=False)
    assert one_line(e)


def test_it_learns_where_things_are():
    "Squares on the left, bright where the mask is: new masks keep to the left, new images are bright there"
    rng = np.random.default_rng(0)
    masks = np.zeros((24, 16, 16), np.uint8)
    for m in masks:
        y = rng.integers(2, 9)
        m[y : y + 5, 1:7] = 1
    images = (40 + 170 * masks[:, None] + rng.integers(0, 20, (24, 1, 16, 16))).astype(np.uint8)
    r = tiny(channels=1, ngf=8, ndf=8, lr=2e-3, batch_size=8, mask_steps=250, render_steps=120, augment='none').fit(
        ImageData(images, masks), progress=False
    )
    s = r.sample(16)
    left, right = s['mask'][..., :8].float().mean(), s['mask'][..., 8:].float().mean()
    assert 0.05 < left < 0.7 and right < 0.1 * left
    inside, outside = (s['image'][:, 0][s['mask'] == k].mean() for k in (1, 0))
    assert inside > outside + 0.8


@pytest.mark.parametrize('classes', [2, 3])
def test_bf16(classes):
    r = tiny(mask_steps=3, render_steps=3).fit(some_data(classes=classes), progress=False, mixed_precision='bf16')
    assert {p.dtype for n in r.nets.values() for p in n.parameters()} == {torch.float32} and r.sample(2)[
        'image'
    ].isfinite().all()


# --- what does not fit ---


@pytest.mark.parametrize(
    'changes, text',
    [
        ({'size': 100}, '128'),
        ({'size': 8}, '16'),
        ({'mask_steps': 0}, 'mask_steps=0'),
        ({'batch_size': 0}, 'batch_size=0'),
        ({'augment': 'mixup'}, 'flip'),
        ({'classes': 1}, 'classes=1'),
        ({'receptive_field': 70}, 'use a smaller one'),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, text):
    with pytest.raises(ValueError, match=text) as e:
        tiny(**changes)
    assert one_line(e)


def test_data_that_does_not_fit(data, tmp_path):
    blank = lambda v: ImageData(data.images, np.full_like(data.masks, v))
    for d, text in (
        (ImageData(data.images), 'no masks'),
        (blank(0), 'empty'),
        (blank(1), 'of one class'),
        (some_data(channels=1), '1 channels'),
        (some_data(size=32), '32 px'),
    ):
        for call in (
            lambda d=d: tiny().fit(d, tmp_path / 'run', progress=False),
            lambda d=d: tiny().fit(data, tmp_path / 'run', more=d, progress=False),
        ):
            with pytest.raises(ValueError, match=text) as e:
                call()
            assert one_line(e) and not (tmp_path / 'run').exists()
    with pytest.raises(ValueError, match="'sketch'.*mask, render"):
        tiny().fit(data, stages=['sketch'])


@pytest.mark.parametrize('augment', ['none', 'flip', 'turn', 'all'])
def test_every_augmentation_moves_mask_and_image_together(augment):
    "Images that are bright exactly where the mask is stay so"
    d = some_data(8, channels=1)
    r = tiny(channels=1, augment=augment, classes=2)
    for stage in ('mask', 'render'):
        b = next(r._batches(ImageData(255 * d.masks[:, None], d.masks), 0, stage))
        assert b['sketch'].shape == (4, 1, 16, 16) and ('image' in b) == (stage == 'render')
        if 'image' in b:
            assert ((b['image'] > 0) == (b['sketch'] > 0.5)).float().mean() > 0.97
        else:
            assert torch.equal(b['sketch'], soften(mask_planes(b['mask'])))


def test_one_empty_mask_among_others_is_fine(data):
    masks = data.masks.copy()
    masks[0] = 0
    assert (
        tiny(mask_steps=2, render_steps=2)
        .fit(ImageData(data.images, masks), progress=False)
        .sample(2)['image']
        .isfinite()
        .all()
    )


def test_folders_that_do_not_fit(through, data, tmp_path):
    before = contents(through.out)
    for r, d, text in (
        (tiny(lam=10.0), data, 'lam: 100.0 there, 10.0 now'),
        (tiny(), some_data(seed=1), 'another data'),
    ):
        with pytest.raises(ValueError, match=text) as e:
            r.fit(d, through.out, progress=False)
        assert one_line(e)
    assert contents(through.out) == before


def test_presets():
    known = {k: v.default for k, v in inspect.signature(DualGAN).parameters.items()}
    assert all(DualGAN.presets[s].keys() <= known.keys() for s in ('tour', 'gpu', 'paper'))
    assert (known | DualGAN.presets['paper'])['size'] == 512 and known['lam'] == 100.0 and known['lr'] == 2e-4
    assert DualGAN.steps_each(7, 64) == {'mask_steps': 7, 'render_steps': 7}
    with pytest.raises(ValueError, match='at least 1'):
        DualGAN.steps_each(0, 64)


# --- from a folder, and the command line ---


def test_a_folder_with_masks(tmp_path):
    ds = phantom_data('lung_ct', 4, 32)
    for i in range(4):
        for kind, a in (('images', ds.images[i][0]), ('masks', (ds.masks[i] == 2).astype(np.uint8) * 255)):
            (tmp_path / 'set' / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(a).save(tmp_path / 'set' / kind / f'{i}.png')
    assert load_images(tmp_path / 'set', 16).masks is not None
    r = tiny(channels=1, mask_steps=2, render_steps=2).fit(tmp_path / 'set', progress=False)
    assert r.config['classes'] == 2 and r.sample(2)['image'].shape == (2, 1, 16, 16)


def test_command_line(tmp_path, capsys):
    def run(line, code=0):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        out = capsys.readouterr()
        assert stop.value.code == code, out.err
        return out.err if code else out.out

    small = '--scale tour --size 16 --steps 3 --set batch_size=2 --set ngf=4 --set ndf=4 --set receptive_field=1'
    run(f'train dualgan --data phantoms:lung_ct:6 --out {tmp_path}/run {small}')
    run(f'sample {tmp_path}/run --n 3 --out {tmp_path}/new --seed 2')
    r = load_recipe(tmp_path / 'run', 'cpu')
    assert r.config['classes'] == 8 and (r.config['mask_steps'], r.config['render_steps']) == (3, 3)
    want = to_uint8(r.sample(3, seed=2)['image'][1])[..., 0]
    assert np.abs(np.asarray(Image.open(tmp_path / 'new' / 'images' / '000001.png')).astype(int) - want).max() <= 1
    (tmp_path / 'plain').mkdir()
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(tmp_path / 'plain' / f'{i}.png')
    err = run(f'train dualgan --data {tmp_path}/plain --out {tmp_path}/other {small}', 1)
    assert 'no masks' in err and err.count('\n') == 1 and not (tmp_path / 'other').exists()
