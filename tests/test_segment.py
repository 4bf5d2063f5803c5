"Segmentation and vessel continuity: training, resuming, folds, fields, thinning, bad input."

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from medsketch.data import ImageData, load_images, phantom_data
from medsketch.evaluate.continuity import (
    continuity,
    continuity_scores,
    piece_lengths,
    thin,
    vessel_continuity,
)
from medsketch.evaluate.paired import SEGMENTATION_SCORES, segmentation_scores
from medsketch.evaluate.segment import (
    Patches,
    Segmenter,
    cross_validate,
    field_of_view,
    score_segmenter,
    subject_folds,
    vessel_channel,
    with_masks,
)
from medsketch.train.callbacks import CsvLog

DATA = Path(os.environ.get('MEDSKETCH_DATA', Path(__file__).parents[2] / 'shared/data'))
TINY = {'width': 4, 'batch_size': 2, 'lr': 5e-3}


def stripes(n=6, size=32, channels=3, subjects=None, seed=0):
    "Bright bars on dark noise: easy to segment"
    rng = np.random.default_rng(seed)
    images, masks = (
        rng.integers(40, 90, (n, channels, size, size)).astype(np.uint8),
        np.zeros((n, size, size), np.uint8),
    )
    for i in range(n):
        y, x = rng.integers(2, size - 8, 2)
        masks[i, y : y + 6], masks[i, :, x : x + 4] = 1, 1
        images[i] += np.uint8(120) * masks[i]
    return ImageData(images, masks, subjects=subjects)


def quiet(**kw):
    return Segmenter(**{'size': 32, 'steps': 4} | TINY | kw)


def weights(s):
    return torch.cat([t.float().flatten() for t in s.net.state_dict().values()])


@pytest.mark.parametrize('kw', [{'steps': 40}, {'steps': 50, 'patch': 16}])
def test_learns_what_is_easy(kw):
    s = quiet(**kw).fit(stripes(8), progress=False)
    held = stripes(4, seed=1)
    scores = score_segmenter(s, held, field=None, pooled=True)
    assert set(scores) == set(SEGMENTATION_SCORES) and scores['auc'] > 0.95 and scores['f1'] > 0.8, scores
    p = s.predict(held)
    assert p.shape == (4, 2, 32, 32) and p.dtype == torch.float32 and (p.sum(1) - 1).abs().max() < 1e-5
    assert torch.equal(s.segment(held), p.argmax(1)) and s.segment(held).dtype == torch.int64
    marked = with_masks(ImageData(held.images, paths=held.paths, subjects=held.subjects), s)
    assert marked.masks.dtype == np.uint8 and (marked.masks == held.masks).mean() > 0.85 and marked.paths == held.paths


def test_the_learning_rate_of_a_fit_falls_to_nothing():
    rates = []
    hook = register_optimizer_step_pre_hook(lambda opt, args, kwargs: rates.append(opt.param_groups[0]['lr']))
    try:
        quiet(steps=10, lr=0.01).fit(stripes(), progress=False)
    finally:
        hook.remove()
    assert rates == pytest.approx([0.01 * (1 - i / 10) ** 0.9 for i in range(10)])


def test_prediction_is_image_by_image():
    "Neither the chunk nor the company changes an answer; networks in training mode would let it"
    s, x = quiet(patch=16).fit(stripes(), progress=False), stripes(5).batch(range(5))['image']
    assert torch.allclose(s.predict(x, chunk=2), s.predict(x), atol=1e-5)
    assert torch.allclose(s.predict(x[3:4])[0], s.predict(x)[3], atol=1e-5)


def test_same_seed_same_bits_and_other_seed_not():
    a, b, c = (weights(quiet(seed=k).fit(stripes(), progress=False)) for k in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_callers_random_numbers_are_left_alone_by_the_constructor():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    quiet()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize('patch', [None, 16])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, monkeypatch, patch):
    make = lambda: quiet(steps=6, patch=patch)
    whole = make().fit(stripes(), progress=False)
    after = CsvLog.after_step

    def stop(self, trainer):
        after(self, trainer)
        if trainer.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(CsvLog, 'after_step', stop)
        s = make()
        with pytest.raises(KeyboardInterrupt):
            s.fit(stripes(), tmp_path / 'a', every=2, progress=False)
    again = make().fit(stripes(), tmp_path / 'a', every=2, progress=False)
    assert torch.equal(weights(again), weights(whole))
    # the interrupted object itself
    assert torch.equal(weights(s.fit(stripes(), tmp_path / 'a', every=2, progress=False)), weights(whole))
    assert torch.equal(weights(Segmenter.load(tmp_path / 'a')), weights(whole))


def test_fine_tuning_goes_on_from_the_present_weights(tmp_path):
    first, second = stripes(), stripes(seed=5)
    s = quiet().fit(first, tmp_path / 'a', progress=False)
    learned = weights(s)
    tuned = weights(s.fit(second, tmp_path / 'b', steps=1, progress=False))
    assert not torch.equal(tuned, learned)
    assert (tuned - learned).abs().max() < (weights(quiet()) - learned).abs().max()
    # all of it found on disk
    again = quiet().fit(first, tmp_path / 'a', progress=False).fit(second, tmp_path / 'b', steps=1, progress=False)
    assert torch.equal(weights(again), tuned)
    with pytest.raises(ValueError, match='start'):
        quiet(seed=0).fit(second, tmp_path / 'b', steps=1, progress=False)


def test_a_folder_belongs_to_one_run(tmp_path):
    quiet(steps=1).fit(stripes(), tmp_path, progress=False)
    with pytest.raises(ValueError, match='another data'):
        quiet(steps=1).fit(stripes(seed=2), tmp_path, progress=False)
    with pytest.raises(ValueError, match='lr'):
        quiet(steps=1, lr=0.1).fit(stripes(), tmp_path, progress=False)
    with pytest.raises(ValueError, match='holds a run already'):
        quiet(steps=1).fit(stripes(), tmp_path, resume=False, progress=False)


def test_mixed_precision_learns_too():
    s = quiet(steps=25).fit(stripes(8), progress=False, mixed_precision='bf16')
    assert score_segmenter(s, stripes(4, seed=1), field=None, pooled=True)['auc'] > 0.9
    assert all(p.dtype == torch.float32 for p in s.net.parameters())


def test_save_and_load(tmp_path):
    s = quiet(patch=16, steps=1).fit(stripes(), progress=False)
    s.save(tmp_path / 's.safetensors')
    r = Segmenter.load(tmp_path / 's.safetensors')
    assert r.config == s.config and r.name == s.name and torch.equal(r.predict(stripes()), s.predict(stripes()))
    (tmp_path / 'x.safetensors').write_bytes(b'not one')
    for p in ('x.safetensors', 'absent.safetensors'):
        with pytest.raises(ValueError, match='holds no segmenter'):
            Segmenter.load(tmp_path / p)


def test_several_classes():
    d = phantom_data('lung_ct', 4, 32)
    k = len(d.classes)
    s = quiet(channels=1, classes=k).fit(d, progress=False)
    assert s.predict(d).shape == (4, k, 32, 32)
    one, rest = score_segmenter(s, d, of=1), score_segmenter(s, d)
    assert one['dice'].shape == (4,) and not torch.equal(one['dice'], rest['dice'])
    with pytest.raises(ValueError, match='classes run from'):
        score_segmenter(s, d, of=k)
    with pytest.raises(ValueError, match='they run from 0 to'):
        quiet(channels=1, classes=k - 1).fit(d, progress=False)


@pytest.mark.parametrize(
    'kw, what',
    [
        ({'size': 48}, 'power of two'),
        ({'patch': 20}, 'multiple of 8'),
        ({'patch': 64}, 'multiple of 8'),
        ({'classes': 1}, 'at least 2'),
        ({'augment': 'spin'}, 'use one of'),
        ({'channels': 4, 'patch': 16}, 'RGB or grey'),
    ],
)
def test_arguments_that_cannot_be(kw, what):
    with pytest.raises(ValueError, match=what):
        quiet(**kw)


def test_data_that_cannot_be_learned():
    d = stripes()
    for bad, what in (
        (ImageData(d.images), 'no masks'),
        (ImageData(d.images, d.masks * 0), 'all 6 masks are empty'),
        (d.subset([]), 'empty'),
        (stripes(size=64), 'the segmenter takes'),
        (stripes(channels=1), 'the segmenter takes'),
    ):
        with pytest.raises(ValueError, match=what):
            quiet().fit(bad, progress=False)
    with pytest.raises(ValueError, match='at least 1'):
        quiet().fit(d, steps=0, progress=False)


def test_images_that_cannot_be_segmented():
    s, x = quiet(), torch.zeros(2, 3, 32, 32)
    nan = x.clone()
    nan[1, 0, 0, 0] = float('nan')
    with pytest.raises(ValueError, match='NaN'):
        s.predict(nan)
    with pytest.raises(ValueError, match='the segmenter takes'):
        s.predict(x[:, :1])
    with pytest.raises(ValueError, match='the segmenter takes'):
        s.predict(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match='one size'):
        s.predict([x, torch.zeros(2, 3, 64, 64)])
    with pytest.raises(ValueError):
        s.predict(x[:0])


def test_an_empty_mask_among_others_has_defined_scores():
    d = stripes()
    d.masks[2] = 0
    scores = score_segmenter(quiet().fit(d, progress=False), d, field=None)
    assert (
        scores['sensitivity'][2].isnan()
        and scores['auc'][2].isnan()
        and not scores['sensitivity'][[0, 1, 3, 4, 5]].isnan().any()
    )


def test_folds_keep_subjects_together():
    subjects = [f's{i // 2}' for i in range(11)]
    fold = subject_folds(stripes(11, subjects=subjects), 3, seed=1)
    assert all(len({int(f) for f, s in zip(fold, subjects) if s == name}) == 1 for name in set(subjects))
    assert sorted(fold.bincount().tolist()) == [3, 4, 4]
    with pytest.raises(ValueError, match='folds=2 or fewer'):
        subject_folds(stripes(4, subjects=list('aabb')), 3)
    with pytest.raises(ValueError, match='one subject'):
        subject_folds(stripes(4, subjects=list('aaaa')), 2)
    with pytest.raises(ValueError, match='at least 2'):
        subject_folds(stripes(4), 1)


def test_cross_validation_scores_every_image_with_a_network_that_has_not_seen_it(tmp_path):
    d = stripes(6, subjects=list('aabbcc'))
    r = cross_validate(d, 3, out=tmp_path, field=None, progress=False, **TINY, steps=3)
    for k in range(3):
        s, held = Segmenter.load(tmp_path / f'fold{k}'), (r['fold'] == k).numpy()
        assert torch.equal(score_segmenter(s, d.subset(held), None)['f1'], r['f1'][held])
    assert cross_validate(d, 3, out=tmp_path, field=None, pooled=True, progress=False, **TINY, steps=3)[
        'auc'
    ].shape == (3,)


def test_a_class_that_only_one_fold_has():
    d = stripes(6, subjects=list('aabbcc'))
    d.masks[:2][d.masks[:2] > 0] = 2
    with pytest.raises(ValueError, match='class 2 occurs only in fold'):
        cross_validate(d, 3, classes=3, **TINY, steps=1, progress=False)
    d.masks[2:] = 0
    with pytest.raises(ValueError, match='class 1 occurs only in fold'):
        cross_validate(d, 3, **TINY, steps=1, progress=False)


def test_patches_are_cut_from_image_and_mask_alike():
    y = torch.arange(2 * 32 * 32).view(2, 32, 32)
    out = Patches(16, 5)({'image': torch.stack([y, -y], 1), 'mask': y}, torch.Generator().manual_seed(0))
    assert (
        out['mask'].shape == (10, 16, 16)
        and torch.equal(out['image'][:, 0], out['mask'])
        and torch.equal(out['image'][:, 1], -out['mask'])
    )
    assert (
        (out['mask'][:5] < 1024).all()
        and (out['mask'][5:] >= 1024).all()
        and len(set(out['mask'][:, 0, 0].tolist())) > 8
    )
    assert (out['mask'][:, 0, 1] - out['mask'][:, 0, 0] == 1).all() and (
        out['mask'][:, 1, 0] - out['mask'][:, 0, 0] == 32
    ).all()


def test_the_vessel_channel_is_the_green_one():
    d = stripes()
    rest = d.images.copy()
    rest[:, [0, 2]] = 7
    assert np.array_equal(vessel_channel(d.images), vessel_channel(rest)) and vessel_channel(d.images).shape == (
        6,
        1,
        32,
        32,
    )
    faint = (d.images // 8 + 60).astype(np.uint8)
    assert vessel_channel(faint)[:, 0].std() > 1.5 * faint[:, 1].std()


def test_the_field_masks_the_scores():
    prob, mask = torch.full((1, 8, 8), 0.9), torch.zeros(1, 8, 8, dtype=torch.long)
    mask[:, :4] = 1
    assert segmentation_scores(prob, mask, mask)['accuracy'] == 1 and segmentation_scores(prob, mask)['accuracy'] == 0.5
    d = stripes()
    s, inside = quiet(), torch.zeros(6, 32, 32, dtype=torch.bool)
    inside[:, 4:20] = True
    other = s.predict(d)[:, 1][inside], torch.from_numpy(d.masks).long()[inside]
    assert score_segmenter(s, d, inside, pooled=True)['auc'].isclose(
        segmentation_scores(*(v.view(6, 16, 32) for v in other), pooled=True)['auc']
    )
    with pytest.raises(ValueError, match="pass 'auto'"):
        score_segmenter(s, d, 'round')
    with pytest.raises(ValueError, match='empty'):
        score_segmenter(s, d, inside & False)


def test_field_of_view():
    x = torch.full((1, 3, 64, 64), -1.0)
    at = torch.arange(64) - 31.5
    disc = at[:, None] ** 2 + at**2 < 28**2
    x[0, 0, disc] = 0.2
    x[0, :, 30:36, 30:36] = -1  # a dark spot inside is inside
    x[0, :, 1:3, 1:3] = 1  # a mark in the corner is outside
    assert (field_of_view(x)[0] ^ disc).float().mean() < 0.01
    assert field_of_view(torch.full((1, 3, 16, 16), -1.0)).all()  # nothing to see: everything counts


@pytest.mark.skipif(not (DATA / 'retina/chasedb1').exists(), reason=f'no real images in {DATA}: set MEDSKETCH_DATA')
def test_field_of_view_of_real_photographs():
    d = load_images(DATA / 'retina/chasedb1', 128, fit='letterbox')
    known = {
        p.stem.split('_fov')[0]: p
        for p in (DATA / 'retina/chasedb1').rglob('*')
        if 'fov' in str(p.parent) or '_fov' in p.stem
    }
    for i in range(0, len(d), 5):
        truth = cv2.imread(str(known[Path(d.paths[i]).stem]), 0) > 127
        found = field_of_view(d.batch([i])['image'])[0]
        assert abs(found.float().mean().item() * max(truth.shape) / min(truth.shape) - truth.mean()) < 0.03


# continuity


def pieces(m):
    return cv2.connectedComponents(np.uint8(m), connectivity=8)[0]


def holes(m):
    return cv2.connectedComponents(1 - np.pad(np.uint8(m), 1), connectivity=4)[0]


def test_thinning_keeps_every_piece_and_hole():
    rng = np.random.default_rng(1)
    for code in range(512):  # all masks of 3 × 3
        m = np.pad(np.array([code >> k & 1 for k in range(9)], np.uint8).reshape(3, 3), 1)
        assert pieces(thin(m)) == pieces(m) and holes(thin(m)) == holes(m)
    for _ in range(60):
        m = cv2.GaussianBlur(rng.normal(size=(40, 56)), (0, 0), rng.uniform(0.4, 3)) > rng.normal() * 0.02
        line = thin(m)
        assert (
            pieces(line) == pieces(m)
            and holes(line) == holes(m)
            and (line <= m).all()
            and np.array_equal(thin(line), line)
        )


@pytest.mark.parametrize('width', [1, 3, 6])
def test_length_does_not_depend_on_the_width(width):
    m = cv2.line(np.zeros((128, 128), np.uint8), (20, 64), (108, 64), 1, width)
    assert piece_lengths(m) * 128 == pytest.approx([89], abs=width)
    slant = cv2.line(np.zeros((128, 128), np.uint8), (20, 20), (100, 100), 1, width)
    assert piece_lengths(slant) * 128 == pytest.approx([80 * 2**0.5], rel=0.08)


def test_continuity_of_a_line_cut_in_two():
    m = torch.zeros(2, 64, 64, dtype=torch.long)
    m[:, 30:33, 4:60] = 1
    m[1, :, 30:34] = 0
    c = continuity(m)
    assert c['components'].tolist() == [1, 2] and c['longest'][0] == 1 and 0.45 < c['longest'][1] < 0.6
    assert c['length'][1] / c['length'][0] > 0.85 and 0.4 < c['mean_length'][1] / c['mean_length'][0] < 0.55
    field = torch.zeros_like(m)
    field[:, :, :30] = 1
    inside = continuity(m, field)
    assert inside['components'].tolist() == [1, 1] and torch.equal(inside['length'][:1], inside['length'][1:])


def test_broken_vessels_are_farther_from_real_than_other_real_ones():
    vessel = lambda seed: torch.from_numpy(np.uint8(phantom_data('fundus', 10, 64, seed=seed).masks == 3))
    real, other = vessel(0), vessel(1)
    broken = other.clone()
    for m in broken.numpy():
        for y, x in np.random.default_rng(0).permutation(np.argwhere(m))[:25]:
            cv2.circle(m, (int(x), int(y)), 1, 0, -1)
    near, far = (continuity_scores(real, m, 'the phantom') for m in (other, broken))
    assert near[0].value < far[0].value and far[0].low > near[0].value
    assert far[3].value < near[3].value and far[0].extractor == 'vessels marked by the phantom' and far[0].n_real == 10


def test_continuity_of_nothing_and_of_nonsense():
    some, none = torch.ones(4, 16, 16, dtype=torch.long), torch.zeros(4, 16, 16, dtype=torch.long)
    assert all(v.tolist() == [0.0] * 4 for v in continuity(none).values())
    empty = continuity_scores(some, none, 'x')
    assert [s.value for s in empty[1:]] == [0.0, 0.0, 0.0] and empty[0].value > 3 and np.isfinite(empty[0].value)
    with pytest.raises(ValueError, match='no vessels in the real'):
        continuity_scores(none, some, 'x')
    with pytest.raises(ValueError, match='at least 4'):
        continuity_scores(some[:2], some, 'x')
    with pytest.raises(ValueError, match='one size'):
        continuity_scores(some, some[:, ::2], 'x')
    with pytest.raises(ValueError, match='integers'):
        continuity(some * float('nan'))
    with pytest.raises(ValueError, match='NaN'):
        vessel_continuity(torch.full((4, 3, 32, 32), float('nan')), torch.zeros(4, 3, 32, 32), quiet())


def test_vessel_continuity_names_its_segmenter():
    d, s = stripes(5), quiet(steps=20).fit(stripes(8), progress=False)
    scores = vessel_continuity(d, stripes(5, seed=1), s, field=None, resamples=20)
    assert s.name in scores[0].extractor and scores[0].n_fake == 5 and scores[0].low <= scores[0].value
    with pytest.raises(ValueError, match="'auto' or None"):
        vessel_continuity(d, d, s, field='round')
