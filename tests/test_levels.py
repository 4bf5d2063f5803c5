"Scores against the level of free-hand distortion"

import math
from urllib.error import URLError

import numpy as np
import pytest
import torch

from medsketch.evaluate import levels, paired
from medsketch.evaluate.levels import LEVELS, LevelScores, drawn_by, score_levels, table_scores
from medsketch.recipes import Sketch2MedI
from medsketch.sketch.freehand import freehand


def sketches(n=3):
    s = torch.zeros(n, 1, 32, 32)
    for i in range(n):
        s[i, 0, 6 + i : 26, 6], s[i, 0, 25, 6:26], s[i, 0, 6 + i, 6:26] = 1, 1, 1
    return s


def test_everybody_draws_every_image_and_systems_get_the_same_drawings():
    seen = {'a': [], 'b': []}
    systems = {k: lambda s, k=k: seen[k].append(s) or s for k in seen}
    found = score_levels(systems, sketches(), sketches(), {'mean': lambda made, real: made.mean().item()})
    assert all(torch.equal(x, y) for x, y in zip(seen['a'], seen['b']))
    assert len(seen['a']) == 1 + 3 * 4 and torch.equal(seen['a'][0], sketches())
    for level, person, made in zip((0.25,) * 3 + (1.0,) * 3, (0, 1, 2) * 2, seen['a'][1:4] + seen['a'][-3:]):
        want = np.stack([freehand(s[0], level, person, seed=i) for i, s in enumerate(sketches())])
        assert np.array_equal(made[:, 0], want)
    assert {k[1] for k in found.values} == set(LEVELS)
    assert [len(v) for k, v in found.values.items() if k[0] == 'a'] == [1, 3, 3, 3, 3]
    assert found.values['a', 1.0, 'mean'] == [s.mean().item() for s in seen['a'][-3:]]


def test_the_interval_is_students():
    found = LevelScores({('a', 0.5, 'L1'): [1.0, 2.0, 3.0], ('a', 0.0, 'L1'): [4.0]})
    mean, half = found.summary('a', 0.5, 'L1')
    assert mean == 2 and math.isclose(half, 4.302653 / 3**0.5, rel_tol=1e-5)
    assert found.lines('L1') == [['L1 (lower is better)', 'level 0.5', 'level 0'], ['a', '2.000 ± 2.484', '4.000']]


def test_what_cannot_be_had_is_named():
    def missing(made, real):
        raise ImportError('no torchvision\nhere')

    found = score_levels({'a': lambda s: s}, sketches(), sketches(), {'X': missing, 'Y': lambda made, real: 1.0})
    assert found.absent == {'X': 'no torchvision here'} and {k[2] for k in found.values} == {'Y'}
    with pytest.raises(ValueError, match='X is absent: no torchvision here'):
        found.lines('X')


def test_a_fault_is_no_absence(monkeypatch):
    "Without weights a score is absent; any other error of a score, and a damaged file of weights, are seen"

    def load(error):
        def make():
            raise error

        return lambda made, real: paired._backbone(make, 'LPIPS')

    def score(f):
        return score_levels({'a': lambda s: s}, sketches(), sketches(), {'X': f}, levels=(0,))

    assert 'offline' in score(load(URLError('offline'))).absent['X']
    assert 'nms' in score(load(RuntimeError('operator torchvision::nms does not exist'))).absent['X']
    with pytest.raises(RuntimeError, match='failed finding central directory'):
        score(load(RuntimeError('PytorchStreamReader failed finding central directory')))
    with pytest.raises(RuntimeError, match='size of tensor'):
        score(lambda made, real: torch.zeros(2) + torch.zeros(3))


def test_scores_by_hand():
    made, real = torch.zeros(4, 3, 8, 8), torch.full((4, 3, 8, 8), 0.5)
    seen = []
    scores = table_scores(lambda a, b: seen.append((a, b)) or 0.25, lambda x: x.flatten(1)[:, :2] + torch.eye(4)[:, :2])
    assert scores['L1'](made, real) == 0.5 and scores['Dice'](made, real) == 0.25
    assert seen[0][0] is real and seen[0][1] is made  # agreement(real, made)
    assert math.isclose(scores['FID'](made, real), 0.5, rel_tol=1e-3)
    assert set(table_scores()) == {'L1', 'LPIPS', 'DISTS', 'ST-LPIPS', 'TReS', 'CLIP-IQA'}


def test_quality_is_of_the_image_alone_and_likeness_of_the_pair(monkeypatch):
    monkeypatch.setattr(levels, 'iqa', lambda name, x, y=None: torch.tensor([float(x.mean()), 0 if y is None else 8]))
    made, real = torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    got = {k: table_scores()[k](made, real) for k in ('TReS', 'CLIP-IQA', 'ST-LPIPS')}
    assert got == {'TReS': 0.5, 'CLIP-IQA': 0.5, 'ST-LPIPS': 4.5}
    found = LevelScores({('a', 0.0, k): [v] for k, v in got.items()})
    assert found.lines('TReS')[0][0] == 'TReS (higher is better)'
    assert found.lines('ST-LPIPS')[0][0] == 'ST-LPIPS (lower is better)'


def test_what_does_not_pair_is_refused():
    with pytest.raises(ValueError, match='3 sketches and 2 images'):
        score_levels({'a': lambda s: s}, sketches(3), sketches(2), {})
    with pytest.raises(ValueError, match='at least one'):
        score_levels({}, sketches(), sketches(), {})
    with pytest.raises(ValueError):
        score_levels({'a': lambda s: s[..., :4]}, sketches(), sketches(), {'L1': lambda made, real: 0.0})


def test_sketch2medi_with_and_without_h():
    "An untrained one, tiny: the driver takes its methods as they are"
    r = Sketch2MedI(
        size=16, latent_dim=8, w_dim=8, mapping_layers=2, fmap_base=32, fmap_max=8, resnet=18, net_width=0.125,
        convs=1, rank=4, batch_size=2, ada=None, diffaugment=None,
    )  # fmt: skip
    systems = {'Sketch2MedI': r.render, 'without H': lambda s: r.render(s, steps=0)[0]}
    s = sketches(2)[..., ::2, ::2]
    scores = table_scores(r.agreement)
    found = score_levels(
        systems, s, torch.zeros(2, 3, 16, 16), {k: scores[k] for k in ('L1', 'Dice')}, (0.0, 1.0), (0, 1)
    )
    assert len(found.lines('L1')) == 3 and len(found.values['without H', 1.0, 'Dice']) == 2


def test_a_drawing_has_the_sketchs_shape():
    assert drawn_by(sketches(), 0.5, 1).shape == (3, 1, 32, 32)
