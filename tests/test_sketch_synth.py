"Sketches from a segmentation: objects, outlines, Dice, and what the recipe takes, keeps and refuses."

import numpy as np
import pytest
import torch

from medsketch.data import ImageData
from medsketch.recipes import SketchSynth, load_recipe
from medsketch.recipes.sketch_synth import annotated, objects_dice, objects_of, outlines

TINY = {'size': 16, 'resnet': 18, 'net_width': 0.125, 'convs': 1, 'batch_size': 2, 'steps': 2}


@pytest.fixture
def data():
    images, masks = np.full((4, 3, 16, 16), 40, np.uint8), np.zeros((4, 16, 16), np.uint8)
    masks[:, 2:8, 2:8], masks[:, 10:14, 3:13] = 1, 2
    images[:, 0][masks == 1] = 220
    images[:, 1][masks == 2] = 220
    return ImageData(images, masks, classes=('background', 'disc', 'bar'))


def mask_of(*boxes, side=16):
    m = torch.zeros(side, side, dtype=torch.long)
    for k, y, x, h, w in boxes:
        m[y : y + h, x : x + w] = k
    return m


def test_every_connected_piece_is_an_object_and_specks_are_none():
    m = mask_of((1, 0, 0, 4, 4), (1, 8, 8, 4, 4), (2, 0, 8, 2, 2), (2, 14, 0, 1, 3))
    masks, classes = objects_of(m)
    assert sorted(zip(classes.tolist(), masks.sum((1, 2)).tolist())) == [(1, 16), (1, 16), (2, 4)]
    assert len(objects_of(m, least=3)[1]) == 4 and objects_of(m * 0)[0].shape == (0, 16, 16)
    touching = mask_of((1, 0, 0, 4, 4), (2, 0, 4, 4, 4))
    assert objects_of(touching)[1].tolist() == [1, 2]


def test_given_instances_are_the_objects():
    "Two touching objects of one class stay apart; an instance on the background is none"
    m = mask_of((1, 0, 0, 4, 8), (0, 8, 8, 4, 4))
    ids = mask_of((5, 0, 0, 4, 4), (9, 0, 4, 4, 4), (3, 8, 8, 4, 4))
    masks, classes = objects_of(m, ids)
    assert classes.tolist() == [1, 1] and masks.sum((1, 2)).tolist() == [16, 16]


def test_outlines_lie_inside_and_end_at_the_border():
    inside = mask_of((1, 4, 4, 8, 8)).bool()[None]
    drawn = outlines(inside)
    assert set(np.unique(drawn)) == {0, 255} and (drawn == 255).sum() == 64 - 36
    assert not (drawn[~inside[0].numpy()]).any()
    half = mask_of((1, 0, 0, 8, 16)).bool()[None]
    assert (outlines(half) == 255).sum() == 16 and (outlines(half)[7] == 255).all()
    assert (outlines(mask_of((1, 64, 64, 128, 128), side=256).bool()[None]) == 255).sum() == 128**2 - 124**2
    both = torch.stack([mask_of((1, 4, 4, 8, 8)), mask_of((1, 0, 0, 8, 16))]).bool()
    assert np.array_equal(outlines(both), np.maximum(outlines(both[:1]), outlines(both[1:])))
    assert outlines(both[:0]).shape == (16, 16) and not outlines(both[:0]).any()


def test_dice_by_hand():
    box = lambda *b: mask_of(b).bool()
    found = torch.stack([box(1, 0, 0, 4, 4), box(1, 8, 0, 4, 4)]), torch.tensor([1, 2])
    wanted = torch.stack([box(1, 0, 2, 4, 4), box(1, 8, 8, 2, 2)]), torch.tensor([1, 3])
    assert objects_dice(found, wanted) == pytest.approx((0.5 + 0 + 0) / 3)  # of classes 1, 2 and 3
    assert objects_dice(wanted, found) == pytest.approx((0.5 + 0 + 0) / 3)
    assert objects_dice(found, found) == 1
    none = torch.zeros(0, 16, 16, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    assert np.isnan(objects_dice(none, none)) and objects_dice(none, found) == 0
    halves = torch.stack([box(1, 0, 0, 2, 4), box(1, 2, 0, 2, 4)]), torch.tensor([1, 1])
    whole = box(1, 0, 0, 4, 4)[None], torch.tensor([1])
    assert objects_dice(halves, whole) == 1  # the objects of a class are taken together


def test_instances_come_along_and_other_planes_do_not(data):
    ids = np.where(data.masks > 0, 7, 0).astype(np.int64)
    some = data.with_planes(instances=ids).with_sketches(np.zeros((4, 16, 16), np.uint8))
    kept = annotated(some, 16, 3)
    assert set(kept.planes) >= {'instances'} and 'sketch' not in kept.planes
    assert kept.classes == data.classes and np.array_equal(kept.planes['instances'][0], ids[0])


def test_a_plane_of_instances_is_what_s_learns_from(data, monkeypatch):
    seen = []
    from medsketch.recipes import sketch_synth

    def loss(out, objects):
        seen.extend(len(k) for _, k in objects)
        return {'score': sum(s.sum() * 0 for s in out[0])}

    monkeypatch.setattr(sketch_synth, 'solo_loss', loss)
    ids = np.where(data.masks > 0, 1, 0).astype(np.int64)  # one object of both classes
    SketchSynth(**TINY).fit(data.with_planes(instances=ids), progress=False)
    assert set(seen) == {1}
    seen.clear()
    SketchSynth(**TINY).fit(data, progress=False)
    assert set(seen) == {2}


def test_classes_are_found_and_too_few_are_refused(data):
    r = SketchSynth(**TINY).fit(data, progress=False)
    assert r.config['classes'] == 3 and r.nets['S'].classes == 2
    with pytest.raises(ValueError, match='pass classes=3'):
        SketchSynth(**TINY, classes=2).fit(data, progress=False)
    with pytest.raises(ValueError, match='takes no further data'):
        SketchSynth(**TINY).fit(data, more=data, progress=False)
    with pytest.raises(ValueError, match='all masks of the data are empty'):
        SketchSynth(**TINY).fit(data.with_planes(mask=data.masks * 0), progress=False)


def test_the_average_draws_and_is_what_is_kept(data, tmp_path):
    r = SketchSynth(**TINY).fit(data, tmp_path / 'run', progress=False)
    assert set(r.ema.nets) == {'S'}
    x = data.batch(range(4))['image']
    assert torch.equal(load_recipe(tmp_path / 'run').sketch(x), r.sketch(x))


def stub(r, monkeypatch, found):
    "Whatever S finds: fixed objects with their scores"
    from medsketch.recipes import sketch_synth

    seen = []

    def find(net, images, delta):
        seen.append((len(images), delta))
        return [found(x) for x in images]

    monkeypatch.setattr(sketch_synth, 'find_objects', find)
    return seen


def test_confidence_is_the_recipes_unless_one_is_given(data, monkeypatch):
    r = SketchSynth(**TINY, confidence=0.5)
    seen = stub(r, monkeypatch, lambda x: {})
    r.find(data.batch([0])['image']), r.find(data.batch([0])['image'], 0.0)
    assert [d for _, d in seen] == [0.5, 0.0]
    r.find(data.batch(range(4))['image'].repeat(10, 1, 1, 1))
    assert [n for n, _ in seen[2:]] == [16, 16, 8]
    with pytest.raises(ValueError, match='wants'):
        r.find(torch.zeros(1, 1, 16, 16))


def test_sketches_of_a_whole_set_stay_with_their_images(monkeypatch):
    "More images than are drawn at a time: image i holds a square whose place says i"
    images = np.zeros((70, 1, 16, 16), np.uint8)
    for i in range(70):
        images[i, 0, i // 8 : i // 8 + 5, i % 8 : i % 8 + 5] = 255
    r = SketchSynth(**TINY | {'channels': 1})
    stub(r, monkeypatch, lambda x: {'masks': x > 0, 'classes': torch.tensor([1])})
    ds = r.sketch_all(ImageData(images))
    for i in range(70):
        assert np.array_equal(ds.sketches[i], outlines(images[i] > 0))


def test_the_score_is_the_mean_over_images_with_objects(data, monkeypatch):
    r = SketchSynth(**TINY)
    masks = data.masks.copy()
    masks[3] = 0
    bar = torch.from_numpy(data.masks[0] == 2)[None]
    full = lambda x: {'masks': bar, 'classes': torch.tensor([2]), 'scores': torch.ones(1)}
    stub(r, monkeypatch, full)
    assert r.score(data) == pytest.approx(0.5)  # the bar of two objects
    stub(r, monkeypatch, lambda x: {'masks': bar[:0], 'classes': torch.zeros(0, dtype=torch.long)})
    assert r.score(data.with_planes(mask=masks)) == 0  # the empty image is left out, not counted as right
