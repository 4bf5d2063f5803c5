"Sketches: both paths agree, vessels are found on real photographs, rims are not drawn, files and bad input"

import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from medsketch.core import from_uint8, to_uint8, torch_rng
from medsketch.data import ImageData, phantom_data
from medsketch.data.readers import image_to_square
from medsketch.phantoms import PHANTOMS, phantom
from medsketch.sketch import (
    METHODS,
    STYLES,
    SketchStyle,
    add_sketches,
    canny_sketch,
    contour_sketch,
    edges,
    get_style,
    sketch_file,
    sobel_sketch,
    sobel_sketch_batch,
    sobel_sketch_torch,
    variants,
)

DATA = Path(os.environ.get('MEDSKETCH_DATA', Path(__file__).parents[2] / 'shared/data'))
CHASE = DATA / 'retina/chasedb1'
REAL = {
    'fundus': 'retina/hrf',
    'chest_xray': 'chest_xray/mhh_covid',
    'lung_ct': 'ct/lung_pet_ct_dx',
    'brain_mri': 'brain_mri/brisc2025',
    'ultrasound': 'ultrasound/busi',
    'foetal_head': 'ultrasound/busi',
    'generic': 'endoscopy/kvasir_seg',
    'pharynx': 'endoscopy/kvasir_seg',
}
needs_data = pytest.mark.skipif(
    not CHASE.exists(), reason=f"no real images at {DATA} (MEDSKETCH_DATA names another place)"
)
near = lambda a: cv2.dilate(a.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
read = lambda path, size: image_to_square(np.asarray(Image.open(path).convert('RGB')), size, 'letterbox')


def gaps(images, style):
    "Largest difference of the soft, share of differing pixels of the binary sketches"
    out = []
    for binary in (False, True):
        s = replace(STYLES[style], binary=binary)
        a = np.stack([sobel_sketch(i, s) for i in images])
        b = sobel_sketch_torch(torch.stack([torch.as_tensor(i) for i in images]), s)
        d = np.abs(a - b[:, 0].numpy())
        assert 0.005 < a.mean() < 0.4, (style, a.mean())  # something is drawn, and not everything
        out.append(d.mean() if binary else d.max())
    return out


@pytest.mark.parametrize('style', list(STYLES))
@pytest.mark.parametrize('size', [32, 64, 256, 512])
def test_paths_agree_on_phantoms(style, size):
    kind = style if style in PHANTOMS else 'fundus'
    soft, binary = gaps([phantom(kind, size, seed=s)['image'] for s in range(2)], style)
    assert soft <= 1e-3 and binary <= 1e-3


@needs_data
@pytest.mark.parametrize('style', list(STYLES))
@pytest.mark.parametrize('size', [128, 256])
def test_paths_agree_on_real_images(style, size):
    files = sorted((DATA / REAL[style] / 'images').iterdir())[::6][:4]
    soft, binary = gaps([from_uint8(read(f, size)) for f in files], style)
    assert soft <= 1e-3 and binary <= 1e-3


def chase_scores(size, cover=0.5):
    "Mean recall and precision over CHASE_DB1; a pixel is vessel if `cover` of its area is"
    recall, precision = [], []
    for f in sorted((CHASE / 'images').iterdir()):
        mask = np.asarray(Image.open(CHASE / 'masks' / f'{f.stem}.png').convert('L'))
        vessel = image_to_square(mask, size, 'letterbox') >= cover * 255
        drawn = sobel_sketch(read(f, size), 'fundus') > 0
        recall.append((vessel & near(drawn)).sum() / vessel.sum())
        precision.append((drawn & near(vessel)).sum() / drawn.sum())
    assert len(recall) == 20
    return np.mean(recall), np.mean(precision)


@needs_data
@pytest.mark.parametrize(
    'size,cover,least',
    [(256, 0.5, (0.80, 0.80)), (256, 0.25, (0.75, 0.80)), (128, 0.5, (0.80, 0.75)), (512, 0.5, (0.68, 0.66))],
)
def test_vessels_of_chase_are_found(size, cover, least):
    recall, precision = chase_scores(size, cover)
    assert recall >= least[0] and precision >= least[1], (recall, precision)


@needs_data
def test_strokes_hold_together():
    drawn = [(sobel_sketch(read(f, 256), 'fundus') > 0).astype(np.uint8) for f in sorted((CHASE / 'images').iterdir())]
    areas = [cv2.connectedComponentsWithStats(d)[2][1:, cv2.CC_STAT_AREA] for d in drawn]
    assert np.mean([len(a) for a in areas]) < 45
    assert np.mean([a[a < 8].sum() / a.sum() for a in areas]) < 0.02  # ink in specks


@pytest.mark.parametrize('size', [64, 256, 512])
def test_rim_of_the_field_is_not_drawn(size):
    yy, xx = np.mgrid[:size, :size] / size - 0.5
    disc = (np.hypot(yy, xx) < 0.45)[..., None] * np.array([200, 110, 40], np.uint8)
    disc = disc + (np.abs(yy) < 3 / 256)[..., None] * (disc > 0) * np.array([-40, -60, 0])
    s = sobel_sketch(disc.astype(np.uint8), 'fundus')
    assert s[np.abs(yy) > 0.05].max() == 0  # nothing but the vessel in the middle
    assert s[size // 2, int(size * 0.15) : int(size * 0.85)].mean() > 0.95
    unmasked = sobel_sketch(disc.astype(np.uint8), replace(STYLES['fundus'], field=None))
    assert unmasked[np.abs(yy) > 0.05].max() == 1


def test_sizes_draw_the_same_structures():
    small = [sobel_sketch(phantom('fundus', n, seed=1)['image'], 'fundus') for n in (128, 256, 512)]
    small = [cv2.resize(s, (64, 64), interpolation=cv2.INTER_AREA).ravel() for s in small]
    assert min(np.corrcoef(small)[np.triu_indices(3, 1)]) > 0.7


def test_batch_is_the_single_path_on_cpu_and_deterministic():
    x = torch.stack([phantom('fundus', 64, seed=s)['image'] for s in range(3)])
    out = sobel_sketch_batch(x, 'fundus')
    assert out.shape == (3, 1, 64, 64) and out.dtype == torch.float32
    assert torch.equal(out, sobel_sketch_batch(x, 'fundus'))
    assert np.array_equal(out[1, 0].numpy(), sobel_sketch(x[1], 'fundus'))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize('style', list(STYLES))
def test_paths_agree_on_the_gpu(style):
    kind = style if style in PHANTOMS else 'fundus'
    x = torch.stack([phantom(kind, 256, seed=s)['image'] for s in range(4)])
    out = sobel_sketch_batch(x.cuda(), style)
    assert out.is_cuda
    assert (out.cpu() - sobel_sketch_batch(x, style)).abs().mean() <= 1e-3


@pytest.mark.parametrize(
    'image', [np.zeros((64, 64), np.uint8), np.full((64, 64, 3), 255, np.uint8), torch.zeros(4, 32, 32)]
)
@pytest.mark.parametrize('style', list(STYLES))
def test_empty_images_give_empty_sketches(image, style):
    assert sobel_sketch(image, style).max() == 0


@pytest.mark.parametrize(
    'call,message',
    [
        (lambda: sobel_sketch(np.zeros((100, 100), np.uint8)), 'nearest is 128'),
        (lambda: sobel_sketch(np.zeros((64, 32), np.uint8)), 'square'),
        (lambda: sobel_sketch(np.zeros((64, 64))), 'uint8'),
        (lambda: sobel_sketch_batch(torch.zeros(3, 64, 64)), 'N, C, H, W'),
        (lambda: sobel_sketch_torch(torch.zeros(1, 3, 100, 100)), 'nearest is 128'),
        (lambda: get_style('retina'), 'use one of'),
        (lambda: get_style(SketchStyle(side='left')), "'dark'"),
        (lambda: get_style(SketchStyle(softness=0)), 'softness'),
        (lambda: canny_sketch(np.zeros((64, 64), np.uint8), 9, 3), 'above high'),
        (lambda: contour_sketch(np.zeros((64, 64), np.float32)), 'class ids'),
        (lambda: contour_sketch(np.zeros((64, 64), np.uint8), 0), 'width'),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_contours_stand_where_classes_meet():
    m = np.zeros((32, 32), np.int64)
    m[8:24, 8:16], m[8:24, 16:24] = 1, 300
    c = contour_sketch(m)
    assert c[12, 8] == c[12, 16] == c[12, 24] == 1 and c[12, 12] == 0
    assert np.array_equal(c, contour_sketch(torch.from_numpy(m)))
    assert contour_sketch(m, 3).sum() > 2 * c.sum()
    assert contour_sketch(np.full((16, 16), 3)).sum() == 0


def test_canny_finds_an_edge():
    a = np.zeros((64, 64), np.uint8)
    a[:, 32:] = 120
    assert canny_sketch(a)[:, 29:35].any(1).all()
    assert canny_sketch(a)[:, :24].max() == 0


@pytest.mark.parametrize('method', METHODS)
def test_files_become_dark_strokes_on_white(tmp_path, method):
    p = phantom('fundus', 256, seed=3)
    pixels = p['mask'].numpy().astype(np.uint8) if method == 'contour' else to_uint8(p['image'])
    Image.fromarray(pixels[:200]).save(tmp_path / 'in.png')
    sketch_file(tmp_path / 'in.png', tmp_path / 'deep/out.png', method, 'fundus', size=128)
    s = np.asarray(Image.open(tmp_path / 'deep/out.png'))
    assert s.shape == (128, 128) and s.dtype == np.uint8
    assert np.median(s) == 255 and s.min() == 0
    assert (s[:8] == 255).all()  # the padding is paper


def test_a_data_set_is_drawn_once_and_left_as_it_was():
    ds = phantom_data('fundus', 3, 64)
    out = add_sketches(ds, style='fundus', soft=False)
    assert ds.sketches is None and out.sketches.shape == (3, 64, 64)
    assert set(np.unique(out.sketches)) == {0, 255}
    soft = add_sketches(ds, style='fundus').sketches
    assert len(np.unique(soft)) > 20 and np.corrcoef(soft.ravel(), out.sketches.ravel())[0, 1] > 0.8
    bare = ImageData(ds.images)
    with pytest.raises(ValueError, match='need masks'):
        add_sketches(bare, method='contour')
    with pytest.raises(ValueError, match='unknown sketch method'):
        add_sketches(ds, method='pencil')


@pytest.mark.parametrize('sigma', [0.2, 0.3, 0.8, 1.25, 2.0, 8.0])
@pytest.mark.parametrize('shape', [(64, 64), (48, 96)])
def test_the_blur_of_a_batch_is_that_of_opencv(sigma, shape):
    x = torch.randn(2, 3, *shape, generator=torch_rng(1))
    ours = edges._blur_batch(x, sigma)
    theirs = [edges._blur(image.movedim(0, -1).contiguous().numpy(), sigma) for image in x]
    assert torch.allclose(ours, torch.from_numpy(np.stack(theirs)).movedim(-1, 1), atol=2e-6)


def test_variants_of_a_sketch_differ_and_keep_their_image():
    ds = phantom_data('fundus', 2, 128)
    many = variants.add_variants(ds, 'fundus')
    assert len(many) == len(variants.VARIANTS) * 2 == len({s.tobytes() for s in many.sketches})
    assert (many.images[:6] == ds.images[0]).all() and (many.images[6:] == ds.images[1]).all()
    batch = {"sketch": torch.from_numpy(many.sketches[:, None]).float() / 255, "image": torch.zeros(12, 3, 128, 128)}
    a, b = (variants.jitter(batch, torch_rng(3), p=1.0)['sketch'] for _ in range(2))
    assert torch.equal(a, b) and (a != batch['sketch']).flatten(1).any(1).all() and a.min() >= 0 and a.max() <= 1
    assert torch.equal(variants.jitter(batch, torch_rng(3), p=0.0)['sketch'], batch['sketch'])


def test_aligned_strokes_change_their_width_alone():
    "Within two pixels of where they were, and none is lost"
    ds = phantom_data('fundus', 2, 256)
    s = torch.from_numpy(variants.add_variants(ds, 'fundus').sketches[:, None]).float() / 255
    s = (s > 0.5).float()
    moved = variants.jitter({'sketch': s}, torch_rng(3), p=1.0, displace=0, omit=0)['sketch']
    wide = lambda x: torch.nn.functional.max_pool2d(x, 5, 1, 2)
    assert (moved != s).flatten(1).any(1).sum() >= 8
    assert (moved <= wide(s)).all()
    lost = (s > wide(moved)).float().sum((1, 2, 3)) / s.sum((1, 2, 3))
    assert (lost < 0.5).all()  # strokes of one pixel that would vanish stay, unless most of the sketch is wider
    displaced = variants.jitter({'sketch': s}, torch_rng(3), p=1.0)['sketch']
    assert (displaced > wide(s)).any()


def test_exchanged_patches_stay_outside_of_what_is_to_be_kept():
    s = (torch.rand(6, 1, 64, 64, generator=torch_rng(0)) < 0.1).float()
    new, stays = variants.exchange_patches(s, rng=torch_rng(1))
    assert (new != s).flatten(1).any(1).all() and 0.2 < stays.mean() < 1
    assert ((new - s).abs() * stays).max() == 0
