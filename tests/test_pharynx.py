"The pharynx phantom: objects, classes, light."

import cv2
import numpy as np
import torch

from medsketch.data import phantom_data
from medsketch.phantoms import PHANTOMS, phantom
from medsketch.phantoms.pharynx import OBJECTS, highlights, pharynx_anatomy

SEEDS = range(8)


def test_objects_have_the_classes_of_the_paper():
    assert set(PHANTOMS['pharynx'].classes[1:]) == {'wall', 'tonsil', 'tongue', 'uvula'}
    assert len(OBJECTS) == 6 and OBJECTS.count(PHANTOMS['pharynx'].classes.index('tonsil')) == 2


def test_mask_follows_the_objects():
    for size in (32, 256):
        s = phantom('pharynx', size, 3)
        assert torch.equal(torch.tensor(OBJECTS)[s['instances']], s['mask'])
        assert set(s['instances'].unique().tolist()) == set(range(6))


def test_a_tonsil_is_one_piece_on_its_side():
    for seed in SEEDS:
        ids = phantom('pharynx', 256, seed)['instances'].numpy()
        for k, side in ((2, -1), (3, 1)):
            _, _, stats, centre = cv2.connectedComponentsWithStats((ids == k).astype(np.uint8))
            assert stats[1:, 4].max() > 0.95 * (ids == k).sum(), seed
            assert side * (centre[1:, 0].mean() - 128) > 10, seed


def test_other_kinds_have_no_instances():
    assert 'instances' not in phantom('fundus', 32, 0)
    assert 'instances' in phantom_data('pharynx', 2, 32).planes
    assert 'instances' not in phantom_data('fundus', 2, 32).planes


def test_highlights_follow_the_surface():
    "A plane before the lens mirrors the lamp, a steep slope mirrors nothing"
    x = np.mgrid[:128, :128][1].astype(np.float32) / 128 - 0.5
    wet = lambda h: highlights(np.random.default_rng(0), h.astype(np.float32), (0.5, 0.5))
    assert wet(0 * x).max() > 0.3 and wet(2 * x)[16:-16, 16:-16].max() < 0.05


def test_people_differ_and_teeth_are_optional():
    teeth = [len(pharynx_anatomy(np.random.default_rng(s))['teeth']) for s in range(20)]
    assert set(teeth) == {0, 8}
