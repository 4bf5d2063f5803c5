"""Several windows on one picture: whatever channels it has, with a mask or without one."""

import numpy as np
import pytest

from medsketch.data import phantom_data
from medsketch.data.planes import ImageData
from medsketch.data.views import same_light, views
from medsketch.sketch import add_sketches

WINDOWS = [(0, 0, 1), (0.25, 0.25, 0.5)]


@pytest.mark.parametrize('kind, channels', [('lung_ct', 1), ('fundus', 3), ('brain_mri', 4)])
def test_any_number_of_channels(kind, channels):
    ds = phantom_data(kind, 2, 64)
    seen = views(ds, WINDOWS, 32)
    assert seen.images.shape == (4, channels, 32, 32) and seen.masks.shape == (4, 32, 32)
    part = np.asarray(ds.images[1])[:, 16:48, 16:48]  # a window of the size wanted is copied
    assert np.array_equal(seen.images[3], part) and seen.subjects == [s for s in ds.subjects for _ in WINDOWS]


def test_pictures_without_masks():
    ds = phantom_data('lung_ct', 2, 64)
    bare = ImageData(ds.images, None, None, ds.paths, ds.subjects)
    seen = views(bare, WINDOWS, 32)
    assert seen.masks is None and np.array_equal(seen.images, views(ds, WINDOWS, 32).images)


def test_whatever_lies_on_a_picture_is_seen_through_the_window():
    ds = add_sketches(phantom_data('fundus', 2, 64), style='fundus')
    ds = ds.with_planes(age=np.array([[40.0], [50.0]], np.float32), kinds={'age': 'table'})
    seen = views(ds, WINDOWS, 32)
    assert set(seen.planes) == set(ds.planes) and seen.kinds == ds.kinds
    assert np.array_equal(seen.planes['sketch'][3], np.asarray(ds.planes['sketch'][1])[16:48, 16:48])
    assert seen.planes['age'][:, 0].tolist() == [40, 40, 50, 50]


@pytest.mark.parametrize('box', [(0.6, 0, 0.6), (1.2, 0, 0.5), (-0.2, 0, 0.6), (0, 0, 0), (0, 0, float('nan'))])
def test_a_window_that_is_not_inside_is_refused(box):
    with pytest.raises(ValueError, match='window'):
        views(phantom_data('lung_ct', 2, 64), [(0, 0, 1), box], 32)


def test_no_window_is_refused():
    with pytest.raises(ValueError, match='no windows'):
        views(phantom_data('lung_ct', 2, 64), [], 32)


def test_thirds_of_any_size_are_square_windows():
    ds = phantom_data('lung_ct', 1, 64)
    for side in (1 / 3, 2 / 3):
        seen = views(ds, [(1 - side, 1 - side, side)], round(64 * side))
        part = np.asarray(ds.images[0])[:, 64 - round(64 * side) :, 64 - round(64 * side) :]
        assert np.array_equal(seen.images[0], part)


@pytest.mark.parametrize('value', [0, 100])
def test_a_black_or_flat_picture_leaves_the_light_of_the_others(value):
    ds = phantom_data('fundus', 4, 64)
    images = np.array(ds.images)
    images[3] = value
    even = same_light(ds.with_planes(image=images))
    three = same_light(ds.subset(range(3)))
    assert np.array_equal(even.images[:3], three.images) and (even.images[3] == value).all()
    assert (same_light(ds.subset([0]).with_planes(image=images[3:])).images == value).all()
