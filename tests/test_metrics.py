"""MS-SSIM and SWD against the stored reference values, on odd input, and in bounded memory."""

import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from medsketch.core import from_uint8, to_uint8
from medsketch.data import phantom_data
from medsketch.evaluate import metrics
from medsketch.evaluate.distances import bootstrap
from medsketch.evaluate.metrics import (
    SwdRows,
    cut_patches,
    laplacian_pyramid,
    ms_ssim,
    ms_ssim_pairs,
    ms_ssim_sets,
    sliced_distance,
    standardise,
    swd,
)
from medsketch.evaluate.table import score_images

REFS = Path(__file__).parent / 'refs'


def load(name):
    with np.load(REFS / f'{name}.npz') as f:
        return {k: f[k] for k in f.files}


@pytest.fixture(scope='module')
def mref():
    return load('msssim')


@pytest.fixture(scope='module')
def sref():
    return load('swd')


def batch(a):
    return from_uint8(a.transpose(0, 2, 3, 1))


def noise(n=6, c=3, size=32, seed=0):
    return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- MS-SSIM ---------------------------------------------------------------------------------


def test_ms_ssim_parity(mref):
    a, b = batch(mref['a']), batch(mref['b'])
    for i, want in enumerate(mref['tm_msssim']):
        assert ms_ssim(a[i : i + 1], b[i : i + 1]) == pytest.approx(want, rel=1e-4)
    assert ms_ssim(a, b) == pytest.approx(mref['tm_msssim'].mean(), rel=1e-4)


def test_ms_ssim_parity_of_a_side_that_is_no_power_of_two(mref):
    a, b = batch(mref['a'])[..., :251, :237], batch(mref['b'])[..., :251, :237]
    assert ms_ssim(a, b) == pytest.approx(mref['tm_msssim_odd'].mean(), rel=1e-4)


def test_score_of_a_pair_does_not_depend_on_the_batch(mref):
    a, b = batch(mref['a']), batch(mref['b'])
    flat = a * 0.1  # a batch's own range would differ for these
    mixed = ms_ssim(torch.cat([a[:1], flat]), torch.cat([b[:1], b * 0.1]))
    apart = [ms_ssim(x, y) for x, y in ((a[:1], b[:1]), (flat[:1], b[:1] * 0.1), (flat[1:], b[1:] * 0.1))]
    assert mixed == pytest.approx(np.mean(apart), rel=1e-5)


@pytest.mark.parametrize('channels, size', [(1, 128), (3, 128), (5, 176)])
def test_the_libraries_give_the_same_numbers(channels, size):
    x, y = noise(4, channels, size), noise(4, channels, size, seed=1) * 0.3
    y = (x * 0.7 + y).clamp(-1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ours = ms_ssim(x, y)
    n = 5 if size > 160 else 4
    weights = tuple(w / sum(metrics._WEIGHTS[:n]) for w in metrics._WEIGHTS[:n])
    exact = ((v.double() + 1) / 2 for v in (x, y))
    theirs = multiscale_structural_similarity_index_measure(*exact, data_range=1.0, betas=weights)
    assert ours == pytest.approx(theirs.item(), rel=1e-5)


def test_pairs_are_looked_at_one_by_one(monkeypatch):
    inner, seen = metrics._ms_ssim_of_pair, []
    monkeypatch.setattr(metrics, '_ms_ssim_of_pair', lambda a, b, w: (seen.append(a.shape), inner(a, b, w))[1])
    with pytest.warns(UserWarning, match='4 of its 5 scales'):
        ms_ssim(noise(6, 3, 128), noise(6, 3, 128, seed=1))
    assert seen == [(128, 128, 3)] * 6


@pytest.mark.parametrize('size, scales', [(16, 1), (32, 2), (64, 3), (128, 4)])
def test_small_images_use_fewer_scales_and_say_so(size, scales):
    x = noise(2, 1, size)
    with pytest.warns(UserWarning, match=f'{scales} of its 5 scales') as w:
        assert ms_ssim(x, x) == pytest.approx(1, abs=1e-5)
    assert w[0].filename == __file__  # the warning points at the caller
    with pytest.raises(ValueError, match='at least 16 px'):
        ms_ssim(x[..., :8], x[..., :8])


def test_large_images_warn_of_nothing():
    x = noise(1, 1, 256)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert ms_ssim(x, -x) == 0  # anticorrelated


def test_pairs_and_sets():
    x = noise(5, 1, 32)
    same = x[:1].repeat(5, 1, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert ms_ssim_pairs(same, 7) == pytest.approx(1, abs=1e-5)
        assert ms_ssim_pairs(x, 50) < 0.5  # never an image with itself
        assert (
            ms_ssim_sets(x, x[:3], 8, seed=1) == ms_ssim_sets(x, x[:3], 8, seed=1) != ms_ssim_sets(x, x[:3], 8, seed=2)
        )
        assert ms_ssim_sets(same, same[:2], 9) == pytest.approx(1, abs=1e-5)


def test_pairs_never_join_an_image_with_itself_and_use_all(monkeypatch):
    drawn = {}
    monkeypatch.setattr(metrics, 'ms_ssim_rows', lambda x, i, y, j: drawn.update(i=i, j=j) or [0.0])
    ms_ssim_pairs(noise(7), 70)
    assert (drawn['i'] != drawn['j']).all() and (drawn['i'].bincount() == 10).all() and drawn['j'].max() == 6
    ms_ssim_sets(noise(7), noise(3), 21)
    assert (drawn['i'].bincount() == 3).all() and (drawn['j'].bincount() == 7).all()


# ---- SWD -------------------------------------------------------------------------------------


def test_pyramid_and_patches(sref):
    for n in range(2):
        levels = laplacian_pyramid(sref['pyr_in'][n].transpose(1, 2, 0))
        assert [v.shape for v in levels] == [(64, 64, 3), (32, 32, 3), (16, 16, 3)]
        for i, v in enumerate(levels):
            np.testing.assert_allclose(v.transpose(2, 0, 1), sref[f'pyr{i}'][n], rtol=1e-4, atol=1e-3)
        here = slice(8 * n, 8 * n + 8)
        patches = cut_patches(levels[0], sref['desc_y'][here], sref['desc_x'][here])
        # the reference stores columns first
        np.testing.assert_allclose(patches.transpose(0, 1, 3, 2), sref['desc'][here], rtol=1e-4, atol=1e-3)


def test_sliced_distance(sref):
    a, b = standardise(sref['patches_a']), standardise(sref['patches_b'])
    assert sliced_distance(a, b, np.random.RandomState(3), repeats=1) == pytest.approx(
        sref['swd_first_repeat'], rel=1e-4
    )
    assert sliced_distance(a, b, np.random.RandomState(3)) == pytest.approx(sref['swd_given_dirs'], rel=1e-4)


@pytest.mark.parametrize('seed', [0, 1])
def test_whole_metric(sref, seed):
    got = swd(batch(sref['real']), batch(sref['fake']), seed)
    assert list(got) == ['64', '32', '16', 'mean']
    assert (np.abs(np.array(list(got.values())) - sref['seeds_mean']) < 4 * sref['seeds_std']).all(), (
        got,
        sref['seeds_mean'],
    )


def test_floor(sref):
    got = swd(batch(sref['real']), batch(sref['real']))
    np.testing.assert_allclose(list(got.values()), sref['self_mean'], rtol=0.2)


def test_swd_is_repeatable_and_changes_nothing(sref):
    real, fake = batch(sref['real'][:4]), batch(sref['fake'][:4])
    kept = real.clone()
    assert swd(real, fake, 5) == swd(real, fake, 5) != swd(real, fake, 6)
    assert torch.equal(real, kept)


def test_swd_sees_8_bit_pixels(sref):
    real, fake = batch(sref['real'][:4]), batch(sref['fake'][:4])
    assert (to_uint8(real + 0.001) == to_uint8(real)).all()
    assert swd(real, fake) == swd((real + 0.001).clamp(-1, 1), fake)


@pytest.mark.parametrize('channels', [1, 4])
def test_any_number_of_channels(channels):
    got = swd(noise(3, channels), noise(3, channels, seed=1))
    assert list(got) == ['32', '16', 'mean'] and 0 < got['mean'] < 200


def test_constant_images_score_badly_but_finitely():
    flat = torch.full((3, 3, 32, 32), 0.5)
    got = swd(noise(3), flat)
    assert all(np.isfinite(v) for v in got.values()) and got['mean'] > 500
    assert swd(flat, flat)['mean'] == 0


# ---- refusals --------------------------------------------------------------------------------

good = noise(4)


@pytest.mark.parametrize('metric', [swd, ms_ssim, ms_ssim_sets])
@pytest.mark.parametrize(
    'bad, says',
    [
        (good * 255, 'images run from -1 to 1'),
        (torch.full_like(good, float('inf')), 'images run from -1 to 1'),
        (good.where(good < 0.9, float('nan')), 'contains NaN'),
        (good[:0], 'has 0 images'),
        (good[0], r'float image batch'),
        (good.byte(), 'uint8'),
        (good[:, :1], 'one size and number of channels'),
        (good[..., :16, :16], 'one size and number of channels'),
    ],
)
def test_refusals(metric, bad, says):
    for args in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match=says) as e:
            metric(*args)
        assert '\n' not in str(e.value)


def test_refusals_of_one_metric():
    with pytest.raises(ValueError, match='y has 3 images and x more'):
        ms_ssim(good, good[:3])
    with pytest.raises(ValueError, match='take 3 of each'):
        swd(good, good[:3])
    with pytest.raises(ValueError, match='square'):
        swd(good[..., :16], good[..., :16])
    with pytest.raises(ValueError, match='nearest is 32'):
        swd(good[..., :24, :24], good[..., :24, :24])
    with pytest.raises(ValueError, match='16'):
        swd(good[..., :8, :8], good[..., :8, :8])
    with pytest.raises(ValueError, match='at least 2'):
        ms_ssim_pairs(good[:1])
    with pytest.raises(ValueError, match='n_pairs'):
        ms_ssim_sets(good, good, 0)


# ---- streams ---------------------------------------------------------------------------------


def test_scores_of_a_stream_are_those_of_a_batch():
    x, y, data = noise(9, 3, 32), noise(9, 3, 32, seed=1), phantom_data('fundus', 9, 32)
    pixels = data.batch(range(9))['image']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert swd(iter(x.split(4)), (b for b in y.split(2))) == swd(x, y)
        assert swd(data, [{'image': y}]) == swd(pixels, y)
        assert ms_ssim(iter(x.split(4)), (b for b in y.split(2))) == ms_ssim(x, y)
        assert ms_ssim_sets(data, y) == ms_ssim_sets(pixels, y) and ms_ssim_pairs(data) == ms_ssim_pairs(pixels)


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda x: swd(iter(x.split(2)), iter(x[:5].split(2))), 'real has 6 images and fake 5'),
        (lambda x: swd(iter(x.split(2)), iter([])), 'fake has no images'),
        (lambda x: swd([x, x[..., :16, :16]], x), 'one set holds images'),
        (lambda x: swd(x, [x[..., :16, :16]]), r'real images are \(3, 32, 32\) and fake images \(3, 16, 16\)'),
        (lambda x: swd(x, x, most=0), 'at least one patch'),
        (lambda x: ms_ssim(iter(x.split(2)), x[:5]), 'y has 5 images and x more'),
        (lambda x: ms_ssim([], []), 'no images'),
        (lambda x: ms_ssim_sets(phantom_data('fundus', 2, 64), x), 'bring them to one size'),
        (lambda x: ms_ssim_pairs(phantom_data('fundus', 1, 32)), 'x has 1 images; at least 2'),
    ],
)
def test_bad_streams(call, words):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=words):
        warnings.simplefilter('ignore')
        call(noise(6, 3, 32))


def smooth(n, c=1, seed=0):
    "Images with blobs of random strength: sets of them differ, and images do"
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.randn(n, c, 8, 8, generator=g), (32, 32), mode='bicubic')
    return (x * torch.rand(n, 1, 1, 1, generator=g)).clamp(-1, 1)


@pytest.mark.parametrize('channels', [1, 3])
def test_rows_of_swd_are_swd(channels):
    "With all directions and patches, and standardised after the projection, it is the same distance"
    a, b = smooth(24, channels), smooth(24, channels, 1) * 0.7
    whole, rows = swd(a, b)['mean'], SwdRows(a, b, directions=512, each=128)
    everything = torch.arange(24)
    assert rows(everything, everything) == pytest.approx(whole, rel=0.05)
    half = torch.arange(0, 24, 2)
    assert rows(half, half) == pytest.approx(swd(a[half], b[half])['mean'], rel=0.25)
    assert rows(half, half) == rows(half, half) and rows(half.flip(0), half) == pytest.approx(rows(half, half))


def test_intervals_of_pixel_scores_are_those_of_scoring_every_half_anew():
    a, b = smooth(24), smooth(24, seed=1) * 0.7
    rows = torch.arange(24)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for metric, score in (('swd', lambda x, y: swd(x, y)['mean']), ('ms_ssim', ms_ssim_sets)):
            [got] = score_images(a, b, (metric,), resamples=60)
            low, high = bootstrap(lambda i, j, score=score: score(a[i], b[j]), rows, rows, resamples=60)
            assert got.value == pytest.approx(score(a, b)) and got.low < got.value < got.high
            assert 0.6 < (got.high - got.low) / (high - low) < 1.6


def test_no_image_is_read_again_for_a_resample(monkeypatch):
    read, batches = [], metrics.image_batches
    monkeypatch.setattr(metrics, 'image_batches', lambda *a, **k: read.append(1) or batches(*a, **k))
    counts = []
    for resamples in (2, 40):
        read.clear()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            score_images(smooth(8), smooth(8, seed=1), ('swd', 'ms_ssim', 'diversity'), resamples=resamples)
        counts.append(len(read))
    assert counts[0] == counts[1]


def test_memory_of_swd_has_a_limit():
    batch = noise(32, 1, 16)

    def peak(n):
        tracemalloc.start()
        try:
            swd((batch for _ in range(n // 32)), (batch for _ in range(n // 32)), most=2**12)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(32)
    assert peak(512) < 1.1 * peak(64)


def test_fewer_patches_of_each_image_say_the_same():
    x, y = (phantom_data('fundus', 64, 32, seed=s).batch(range(64))['image'] for s in (0, 1))
    full, few = swd(x, y)['mean'], swd(x, y, most=2**12)['mean']
    assert few == pytest.approx(full, rel=0.25) and few != full
