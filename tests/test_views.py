"""Several windows on one picture: whatever channels it has, with a mask or without one."""

import numpy as np
import pytest

from medsketch.data import phantom_data
from medsketch.data.planes import ImageData
from medsketch.data.views import views

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
