"""Copies of training images are found, honest images are left alone, and odd input is refused."""

import json
import math
import random
import warnings

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medsketch.core import from_uint8, to_uint8
from medsketch.data import ImageData, phantom_data
from medsketch.evaluate.features import Extractor, thumbnails
from medsketch.evaluate.privacy import (
    MIRROR,
    Privacy,
    View,
    _limit,
    _severity,
    binomial_interval,
    chance,
    nearest,
    pixel_features,
    privacy_check,
    shrink,
    tail_chance,
)


def bodies(n, seed=0, c=1, size=32):
    "Smooth random images: cheap, and no two alike"
    g = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(n, c, 6, 6, generator=g), (size, size), mode='bicubic')
    fine = F.interpolate(torch.randn(n, c, 14, 14, generator=g), (size, size), mode='bicubic')
    return (0.35 * coarse + 0.12 * fine).clamp(-1, 1)


@pytest.fixture(scope='module')
def sets():
    return bodies(40, 0), bodies(40, 1), bodies(40, 2)  # training, held back, fresh


def per_image(f, x):
    return torch.stack([from_uint8(f(to_uint8(i))) for i in x])


def noisy(x):
    return (x + 0.15 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))).clamp(-1, 1)


COPIES = {
    'exact': lambda x: x,
    'blur': lambda x: per_image(lambda a: cv2.GaussianBlur(a, (0, 0), 1), x),
    'noise': noisy,
    'jpeg': lambda x: per_image(
        lambda a: cv2.imdecode(cv2.imencode('.jpg', a, [cv2.IMWRITE_JPEG_QUALITY, 20])[1], cv2.IMREAD_UNCHANGED), x
    ),
    'brighter': lambda x: (x + 0.2).clamp(-1, 1),
    'faint': lambda x: x * 0.4,
    'mirrored': lambda x: x.flip(-1),
    'shifted': lambda x: F.pad(x, (3, 0, 1, 0), mode='replicate')[..., :32, :32],
    'mirrored, darker, noisy': lambda x: noisy((x.flip(-1) - 0.2).clamp(-1, 1)),
}


@pytest.mark.parametrize('kind', COPIES)
def test_planted_copies_are_all_found_with_their_originals(sets, kind):
    train, held, fresh = sets
    fake = torch.cat([COPIES[kind](train[5:11]), fresh[:12]])
    got = privacy_check(fake, train, held, shift=3)
    assert got.verdicts[:6] == ['copy'] * 6 and 'copy' not in got.verdicts[6:] and got.alarm
    worst = got.worst(6)
    assert {(r['image'], r['train']) for r in worst} == {(i, i + 5) for i in range(6)}
    assert all(r['aligned'].startswith('mirrored' if 'mirrored' in kind else 'as it is') for r in worst)
    assert max(r['ratio'] for r in worst) < 0.7 and max(r['second'] for r in worst) < 0.7


def test_without_mirrors_a_mirrored_copy_is_missed(sets):
    train, held, _ = sets
    got = privacy_check(train[:6].flip(-1), train, held, moves={'as it is': MIRROR['as it is']}, shift=0)
    assert 'copy' not in got.verdicts
    turned = {'as it is': MIRROR['as it is'], 'turned': lambda x: x.rot90(1, (-2, -1))}
    got = privacy_check(train[:6].rot90(-1, (-2, -1)), train, held, moves=turned, shift=0)
    assert set(got.verdicts) == {'copy'} and got.worst(1)[0]['aligned'] == 'turned'


@pytest.mark.parametrize('leave_one_out', [False, True])
def test_honest_images_are_flagged_at_most_as_often_as_promised(leave_one_out):
    flagged, copies, alarms, promised = [], 0, 0, []
    for s in range(12):
        train, held, fresh = (bodies(30, 10 * s + i, size=16) for i in range(100, 103))
        got = privacy_check(fresh, train, None if leave_one_out else held, shift=0, candidates=2)
        flagged.append(sum(v != 'as far as real' for v in got.verdicts) / 30)
        promised.append(got.expected)
        copies += got.verdicts.count('copy')
        alarms += got.alarm
    # an alarm has p < .01: one in 12 sets happens, two (p = .006) should not
    assert copies == 0 and alarms <= 1
    assert sum(flagged) / 12 <= sum(promised) / 12 * 1.3 and sum(promised) / 12 < 0.15


def cloud_check(dim, held=40, n=1000, train=40, seed=0, copies=()):
    "Gaussian points instead of images: their nearest distances as a `Privacy`; without `held`, leave one out"
    g = torch.Generator().manual_seed(1000 * seed + dim)
    a, b, c = (torch.randn(k, dim, generator=g) for k in (train, held or 1, n))
    first = lambda q, groups=None: nearest([q[None]], a, 1, groups=groups)[0][:, 0]
    ref = first(b) if held else first(a, torch.arange(train))
    d = first(c)
    d[: len(copies)] = torch.tensor(copies) * ref.median()
    limit, k, m = _limit(ref.tolist(), 0.01, not held)
    none = [1.0] * n
    return Privacy([View('points', d.tolist(), none, none, none, ref.tolist(), none, limit, k, m)], '', train, 0.01)


@pytest.mark.parametrize(
    ('dim', 'held', 'n'),
    [
        (2, 40, 1000),
        (2, 0, 400),
        (2, 200, 50),
        (4, 40, 1000),
        (8, 200, 1000),
        (16, 40, 100),
        (32, 0, 400),
        (64, 40, 1000),
    ],
)
def test_false_alarms_keep_the_level_whatever_the_number_of_images(dim, held, n):
    "At a level of 10 %, so that 60 sets can tell: 13 or more alarms among them happen once in 100 times"
    alarms = copies = 0
    for s in range(60):
        got = cloud_check(dim, held, n, seed=s)
        alarms += got.p < 0.1
        copies += 'copy' in got.verdicts
    assert alarms <= 12 and copies <= 3  # a copy is at a level of 1 %


def test_the_earlier_rule_would_have_raised_the_alarm():
    "One image below half the limit is the rule, not the exception, among 1,000 honest ones in the plane"
    early = [min(_severity(v, i) for i in range(1000)) <= 0.5 for s in range(30) for v in cloud_check(2, seed=s).views]
    assert sum(early) > 20


@pytest.mark.parametrize(('dim', 'distance'), [(2, 0.0), (2, 1e-6), (8, 0.01), (32, 0.15), (64, 0.2)])
def test_one_copy_among_a_thousand_is_found(dim, distance):
    found = [cloud_check(dim, seed=s, copies=[distance]) for s in range(10)]
    assert sum(got.alarm for got in found) >= 9
    assert sum(got.verdicts[0] == 'copy' for got in found) >= 9


def test_many_slightly_near_images_are_found_by_their_number():
    got = cloud_check(16, seed=1, copies=[0.6] * 100)
    assert got.alarm and got.views[0].p_many < 0.005


def test_the_verdict_states_its_level(sets):
    train, held, fresh = sets
    for fake, word in ((fresh, 'no alarm'), (train, 'ALARM')):
        last = privacy_check(fake[:12], train, held, shift=0, level=0.02).table().splitlines()[-1]
        assert word in last and 'level 2.0%' in last and '12 images' in last and '4 tests' in last
    with pytest.raises(ValueError, match='level is 1'):
        privacy_check(fresh, train, held, level=1)


def test_the_tail_is_exact_for_a_power_law():
    "Distances of a power law: the predicted chance of a new one is uniform, though its exponent is estimated"
    rng = np.random.default_rng(0)
    p = []
    for _ in range(2000):
        r = rng.random(60) ** (1 / 7)
        p.append(tail_chance(r[20:], r[:20]))
    for level in (0.3, 0.1, 0.03, 0.01):
        assert (np.stack(p) < level).mean() == pytest.approx(level, rel=0.2)
    assert tail_chance([0.0], [0.0, 0.0, 1.0])[0] == 0 and tail_chance([0.5], [0.0, 0.0, 1.0])[0] == 1


def test_phantoms():
    train, held, fresh = (phantom_data('fundus', 14, 32, seed=s).batch(range(14))['image'] for s in range(3))
    fake = torch.cat([train[2:4].flip(-1), noisy(train[6:7]), fresh[:9]])
    got = privacy_check(fake, train, held, thumbnails(6))
    assert (
        got.verdicts[:2] == ['copy'] * 2
        and got.verdicts[2] != 'as far as real'
        and 'copy' not in got.verdicts[3:]
        and got.alarm
    )
    assert [r['train'] for r in sorted(got.worst(3), key=lambda r: r['image'])] == [2, 3, 6]
    honest = privacy_check(fresh, train, held, thumbnails(6))
    assert not honest.alarm and honest.verdicts.count('as far as real') >= 11


def test_identical_sets_raise_the_alarm(sets):
    train, held, _ = sets
    for fake in (train, train.flip(-1)):
        for real in (held, None):
            got = privacy_check(fake, train, real, shift=0)
            assert got.verdicts == ['copy'] * 40 and got.alarm and got.p < 1e-6
            assert 'ALARM' in got.table() and '40 copy' in got.table()
            assert [r['train'] for r in got.worst(40)] == [r['image'] for r in got.worst(40)]


def test_many_near_images_alarm_even_where_none_is_a_copy(sets):
    train, held, fresh = sets
    near = 0.62 * train + 0.38 * fresh
    got = privacy_check(near, train, held, shift=0)
    assert got.verdicts.count('suspiciously near') > 20 and got.p < 0.01 and got.alarm


def test_order_does_not_matter(sets):
    train, held, fresh = sets
    fake, g = torch.cat([noisy(train[:4]), fresh[:8]]), torch.Generator().manual_seed(0)
    p, q, r = (torch.randperm(len(x), generator=g) for x in (fake, train, held))
    a, b = (
        privacy_check(fake, train, held, thumbnails(4), shift=1),
        privacy_check(fake[p], train[q], held[r], thumbnails(4), shift=1),
    )
    assert b.verdicts == [a.verdicts[i] for i in p]
    for u, v in zip(a.views, b.views):
        assert v.distance == pytest.approx([u.distance[i] for i in p], abs=1e-5) and v.limit == pytest.approx(
            u.limit, abs=1e-5
        )
        assert [q[j].item() for j in v.nearest] == [u.nearest[i] for i in p]


def test_chunks_and_streams_give_the_same(sets):
    train, held, fresh = sets
    fake = torch.cat([train[:2], fresh[:9]])
    a = privacy_check(fake, train, held, thumbnails(4), shift=1)
    b = privacy_check(
        (x for x in fake.split(4)),
        [{'image': x} for x in train.split(9)],
        iter(held.split(7)),
        thumbnails(4),
        shift=1,
        chunk=3,
    )
    assert a.verdicts == b.verdicts
    for u, v in zip(a.views, b.views):
        assert (
            u.nearest == v.nearest
            and u.aligned == v.aligned
            and u.distance == pytest.approx(v.distance, abs=1e-6)
            and u.real == pytest.approx(v.real, abs=1e-6)
        )


def test_nearest_agrees_with_all_distances_whatever_the_blocks():
    g = torch.Generator().manual_seed(0)
    q, keys = torch.randn(2, 23, 9, generator=g) + 50, torch.randn(31, 9, generator=g) + 50
    keys[7] = keys[3] = q[1, 4]  # exact, twice: far from the origin, and a tie
    every = torch.stack(
        [torch.cdist(x.double(), keys.double(), compute_mode='donot_use_mm_for_euclid_dist') for x in q]
    ).amin(0)
    want = every.sort(dim=1, stable=True)
    for size, block in ((23, 31), (5, 4), (1, 1)):
        d, j, _ = nearest(q.split(size, 1), keys, 3, block=block)
        assert (
            torch.allclose(d.double(), want.values[:, :3], atol=1e-4)
            and torch.equal(j[4, :2], torch.tensor([3, 7]))
            and (d[4, :2] == 0).all()
        )
        assert torch.equal(j[:4], want.indices[:4, :3])
    d, j, _ = nearest([keys[None]], keys, 31, groups=torch.arange(31) // 2)
    assert d[:, 29:].isinf()[:30].all() and (j[:30, :29] // 2 != torch.arange(30)[:, None] // 2).all()


def test_memory_is_not_n_times_m(monkeypatch):
    largest, real = [0], torch.Tensor.topk

    def topk(self, *a, **k):
        largest[0] = max(largest[0], self.numel())
        return real(self, *a, **k)

    monkeypatch.setattr(torch.Tensor, 'topk', topk)
    x = torch.randn(1, 3000, 4)
    nearest(x.split(100, 1), x[0], 2, block=500)
    assert 100 * 500 <= largest[0] <= 100 * 520


def test_a_persons_own_images_are_no_reference():
    people = bodies(24, 7)
    twice = torch.cat([people, noisy(people)])
    names = [f'person {i % 24}' for i in range(48)]
    order = list(range(48))
    random.Random(0).shuffle(order)
    train, subjects = twice[order], [names[i] for i in order]
    fake = torch.cat([COPIES['blur'](people[:5]), bodies(8, 8)])
    blind, told = privacy_check(fake, train, shift=0), privacy_check(fake, train, subjects=subjects, shift=0)
    assert told.verdicts[:5] == ['copy'] * 5 and blind.views[0].limit < 0.6 * told.views[0].limit
    data = ImageData(to_uint8(train).transpose(0, 3, 1, 2).copy(), subjects=subjects)
    assert privacy_check(fake, data, shift=0).views[0].limit == pytest.approx(told.views[0].limit, rel=0.05)
    with pytest.raises(ValueError, match='3 subjects for 48'):
        privacy_check(fake, train, subjects=names[:3])
    with pytest.raises(ValueError, match='show 2 subjects'):
        privacy_check(fake, train, subjects=['a', 'b'] * 24)


def test_doubles_in_the_training_set_are_told(sets):
    train = torch.cat([sets[0][:20]] * 2)
    with pytest.warns(UserWarning, match='come as near as 0'):
        got = privacy_check(torch.cat([train[:3], sets[2][:3]]), train, shift=0)
    assert got.verdicts == ['copy'] * 3 + ['as far as real'] * 3 and got.alarm
    json.dumps(got.as_dict())


def test_images_without_contrast(sets):
    flat = torch.zeros(3, 1, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        got = privacy_check(flat, sets[0], sets[1], shift=0)
    assert all(math.isfinite(d) for v in got.views for d in v.distance) and 'copy' not in got.verdicts
    assert pixel_features(flat).abs().max() == 0


def test_json_table_and_pictures(sets):
    train, held, fresh = sets
    got = privacy_check(
        torch.cat([train[:1], fresh[:5]]), train, held, [thumbnails(4), lambda x: x.mean((2, 3))], shift=0
    )
    d = json.loads(json.dumps(got.as_dict(), allow_nan=False))
    assert (
        d['counts']['copy'] == 1
        and d['alarm'] is True
        and d['n'] == len(got) == 6
        and d['n_train'] == 40
        and len(d['views']) == 4
    )
    assert (
        'medsketch' in d['version']
        and d['views'][2]['name'] == thumbnails(4).name
        and len(d['views'][0]['distance']) == 6
    )
    text = got.table()
    assert '6 synthetic · 40 training · 40 held-back' in text and thumbnails(4).name in text and '1 copy' in text
    assert len(got.worst(100)) == 6 and got.worst(1)[0]['image'] == 0
    assert got.figure(4, cols=2).shape == (2 * 34 - 2, 6 * 34 - 2, 3)
    assert got.figure(1)[:, 68:].max() == 0  # an exact copy: no difference


def test_colour_and_oblong_images():
    train = bodies(12, 0, 3, 64)[..., :48]
    fake = torch.cat([train[3:4].flip(-1), bodies(3, 9, 3, 64)[..., :48]])
    got = privacy_check(fake, train, bodies(12, 5, 3, 64)[..., :48], shift=0)
    assert got.verdicts[0] == 'copy' and got.worst(1)[0]['train'] == 3 and got.verdicts.count('copy') == 1
    assert shrink(torch.zeros(1, 4, 200, 100), 64).shape == (1, 4, 64, 32)


def test_refusals(sets):
    train, held, fresh = sets
    broken = fresh.clone()
    broken[3, 0, 2, 2] = float('nan')
    nan = Extractor(lambda x: x.flatten(1) / 0, 'broken', device='cpu')
    for args, says in (
        ((fresh, train[:9]), '9 training images'),
        ((fresh, train, held[:9]), '9 held-back images'),
        ((fresh, train[:2], held), '2 training images'),
        ((broken, train), 'NaN'),
        ((fresh, broken), 'NaN'),
        ((fresh, train, broken), 'NaN'),
        (([], train), 'no synthetic'),
        ((fresh, [], held), 'no training'),
        ((fresh[..., :16], train), 'bring them to one size'),
        ((fresh.repeat(1, 3, 1, 1), train), 'bring them to one size'),
        ((fresh, train, held[..., :20, :20]), 'bring them to one size'),
        (([fresh, fresh[..., :16]], train), 'one set holds'),
        ((fresh * 200, train), 'run from -1 to 1'),
        ((fresh[..., :8, :8], train[..., :8, :8]), 'at least 16 px'),
        ((fresh, train, held, nan), 'not finite'),
        ((fresh, train, held, lambda x: x), 'pass features'),
    ):
        with pytest.raises(ValueError, match=says):
            privacy_check(*args)
    with pytest.raises(ValueError, match='alpha is 1'):
        privacy_check(fresh, train, alpha=1)


def test_few_images_are_enough_for_a_verdict(sets):
    got = privacy_check(sets[0][:1], sets[0][:10], shift=0)
    assert got.verdicts == ['copy'] and got.reference == 'leave-one-out'
    assert privacy_check(sets[2][:1], sets[0][:3], sets[1][:10], shift=0).expected == pytest.approx(2 / 11)


def test_chance_is_the_share_of_orderings():
    rng = random.Random(0)
    m, n, k, s = 6, 9, 2, 3
    hits = 0
    for _ in range(20000):
        ranks = rng.sample(range(m + n), m + n)
        hits += sum(r <= sorted(ranks[m:])[k - 1] for r in ranks[:m]) >= s
    assert chance(s, m, k, n) == pytest.approx(hits / 20000, abs=0.012)
    assert chance(0, m, k, n) == 1 and chance(5000, 5000, 3, 4000) < 1e-6


def test_interval_of_a_share_covers():
    covered = 0
    rng = random.Random(1)
    for _ in range(400):
        low, high = binomial_interval(sum(rng.random() < 0.1 for _ in range(30)), 30)
        covered += low <= 0.1 <= high
    assert covered / 400 > 0.93
    low, high = binomial_interval(5000, 5000)
    assert high == 1 and 0.999 < low < 1
