"""Simulated drawings: the same person draws the same way, rougher with the level, and nothing comes from nothing."""

import numpy as np
import pytest

from medsketch.data import phantom_data
from medsketch.phantoms import PHANTOMS
from medsketch.sketch.freehand import chamfer, drawer, freehand, redraw, trace_strokes
from medsketch.sketch.variants import mask_strokes


@pytest.fixture(scope='module')
def sketch():
    return mask_strokes(phantom_data('fundus', 1, 128).masks[0])


def test_level_zero_is_the_sketch_and_chance_is_repeatable(sketch):
    assert (freehand(sketch, 0, person=3, seed=9) == sketch).all()
    a, b = (freehand(sketch, 0.7, person=3, seed=9) for _ in range(2))
    assert (a == b).all() and a.shape == sketch.shape and 0 <= a.min() <= a.max() <= 1
    assert (a != freehand(sketch, 0.7, person=4, seed=9)).any() and (a != freehand(sketch, 0.7, person=3)).any()


@pytest.mark.parametrize('person', range(6))
def test_rougher_is_further_away(sketch, person):
    off = [np.mean([chamfer(sketch, freehand(sketch, l, person, s)) for s in range(4)]) for l in (0, 0.3, 0.6, 1)]
    assert off[0] == 0 and (np.diff(off) > 0).all() and off[-1] < 0.12, off


@pytest.mark.parametrize('kind', sorted(PHANTOMS))
def test_every_kind_of_sketch_can_be_redrawn(kind):
    drawn = mask_strokes(phantom_data(kind, 1, 64).masks[0])
    rough = freehand(drawn, 0.5, person=1)
    assert np.isfinite(rough).all() and rough.any() == drawn.any()


def test_strokes_cover_the_lines_once():
    "A cross is two strokes or more, and every point of the thin lines is on one of them"
    cross = np.zeros((64, 64), np.float32)
    cross[31:34, 6:58] = 1
    cross[6:58, 31:34] = 1
    points = np.concatenate(trace_strokes(cross))
    assert 2 <= len(trace_strokes(cross)) <= 4 and 98 <= len(points) <= 104
    assert len(np.unique(np.floor(points * 64), axis=0)) == len(points)


def test_a_person_keeps_to_the_habits():
    "Without trembling, shooting and smoothing a stroke stays what it was"
    from dataclasses import replace

    calm = replace(drawer(0), shake=0.0, smooth=0.0, shoot=0.0)
    line = np.linspace((0.1, 0.2), (0.8, 0.4), 60)
    np.testing.assert_allclose(redraw(line, calm, 1.0, np.random.default_rng(0)), line)
    shaky = redraw(line, replace(calm, shake=0.02), 1.0, np.random.default_rng(0))
    assert 0.005 < np.abs(shaky - line).std() < 0.04


@pytest.mark.parametrize('level', [-0.1, 1.1, float('nan')])
def test_levels_outside_are_refused(sketch, level):
    with pytest.raises(ValueError, match='level'):
        freehand(sketch, level)


@pytest.mark.parametrize('dots', [0, 1, 2])
def test_specks_and_blank_paper_stay_quiet(dots):
    paper = np.zeros((32, 32), np.float32)
    paper[5, 5 : 5 + dots] = 1
    assert freehand(paper, 1.0).sum() == 0 and np.isnan(chamfer(paper * 0, paper))
