"""Every protocol gets what it should and no more, nobody is on two sides, and a killed run ends like any other."""

import csv
import io
import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from faults import die, killed

from medsketch.data import ImageData
from medsketch.evaluate import downstream as module
from medsketch.evaluate.downstream import (
    PROTOCOLS,
    Downstream,
    check_sides,
    downstream,
    dualgan_f1,
    half_divergences,
    mix,
    paired_difference,
    protocol_steps,
    skrgan_table2,
    synthetic_pairs,
)
from medsketch.evaluate.segment import Segmenter
from medsketch.train.trainer import Trainer

TINY = {'width': 4, 'batch_size': 2}


def eyes(n, name, size=16, seed=0, each=1):
    "Bright lines on noise, with the lines as masks"
    rng = np.random.default_rng([seed, len(name), *map(ord, name)])
    masks = np.zeros((n, size, size), np.uint8)
    for m in masks:
        m[:, rng.integers(2, size - 2)] = m[rng.integers(2, size - 2)] = 1
    images = (rng.integers(60, 120, (n, 3, size, size)) + 100 * masks[:, None]).astype(np.uint8)
    names = [f'{name} {i // each}' for i in range(n)]
    return ImageData(
        images, masks, paths=[f'{name}/{i}.png' for i in range(n)], subjects=names, classes=('background', 'vessel')
    )


class Drawer:
    "A recipe without networks; `calls` are the sizes of what it was asked for"

    def __init__(self, size=16, seed=0, key='mask', level=0.0):
        self.size, self.seed, self.key, self.level, self.calls = size, seed, key, level, []

    def sample(self, n, seed=0):
        self.calls.append(n)
        eye = [eyes(1, f'drawn {i}', self.size, self.seed * 1000 + seed).batch([0]) for i in range(n)]
        b = {k: torch.cat([e[k] for e in eye]) for k in ('image', 'mask')}
        made = {'image': (b['image'] + self.level).clamp(-1, 1), 'mask': b['mask']}
        return made if self.key == 'mask' else {'image': made['image'], 'sketch': made['mask'][:, None] * 0.75}


class Recorder:
    "Stands in for the segmenter: remembers what it was shown, finds nothing, or everything"

    seen, answer = [], 0.3

    def __init__(self, **config):
        self.config, self.trained = config, []

    def fit(self, data, out=None, steps=None, resume=True, progress=True):
        self.trained.append((data, steps))

    def predict(self, data):
        Recorder.seen.append((self.config, self.trained))
        p = torch.full((len(data), data.size, data.size), Recorder.answer)
        return torch.stack([1 - p, p], 1)

    def save(self, path):
        path.write_bytes(b'')


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(module, 'Segmenter', Recorder)
    Recorder.seen, Recorder.answer = [], 0.3
    return Recorder


@pytest.fixture(scope='module')
def sets():
    return eyes(3, 'train'), eyes(6, 'synthetic'), eyes(4, 'test')


def test_pairs_are_bytes_drawn_a_few_at_a_time_and_nobodys_twice():
    d = Drawer()
    a = synthetic_pairs(d, 130, seed=3)
    assert a.images.dtype == a.masks.dtype == np.uint8 and a.images.shape == (130, 3, 16, 16)
    assert max(d.calls) <= 50 and sum(d.calls) == 130
    assert len(set(a.subjects)) == 130 and not set(a.subjects) & set(synthetic_pairs(Drawer(), 130, seed=4).subjects)
    assert len({i.tobytes() for i in a.images}) == 130, 'the chunks repeat each other'
    assert a.fingerprint() == synthetic_pairs(Drawer(), 130, seed=3).fingerprint()
    assert a.fingerprint() != synthetic_pairs(Drawer(), 130, seed=4).fingerprint()


def test_a_sketch_becomes_a_label_at_the_threshold():
    mask, sketch = synthetic_pairs(Drawer(), 4), synthetic_pairs(Drawer(key='sketch'), 4, threshold=0.7)
    assert np.array_equal(mask.masks, sketch.masks) and sketch.masks.max() == 1
    with pytest.raises(ValueError, match='all 4 masks are empty.*0.8'):
        synthetic_pairs(Drawer(key='sketch'), 4, threshold=0.8)
    with pytest.raises(ValueError, match='in between'):
        synthetic_pairs(Drawer(), 4, threshold=0)


@pytest.mark.parametrize(
    'drawn, says',
    [
        ({'mask': torch.ones(2, 8, 8).long()}, 'no image'),
        ({'image': torch.zeros(2, 3, 8, 8)}, 'images alone'),
        ({'image': torch.full((2, 3, 8, 8), math.nan), 'mask': torch.ones(2, 8, 8).long()}, 'NaN'),
    ],
)
def test_what_is_no_pair_is_refused(drawn, says):
    class Odd:
        def sample(self, n, seed=0):
            return drawn

    with pytest.raises(ValueError, match=says):
        synthetic_pairs(Odd(), 2)


def test_pairs_on_disk_are_taken_up_again(tmp_path):
    whole = synthetic_pairs(Drawer(), 25, chunk=10)
    synthetic_pairs(Drawer(), 10, chunk=10, out=tmp_path)
    (tmp_path / '000010.npz').write_bytes(b'half a chunk')
    d = Drawer()
    assert synthetic_pairs(d, 25, chunk=10, out=tmp_path).fingerprint() == whole.fingerprint()
    d = Drawer()
    assert synthetic_pairs(d, 25, chunk=10, out=tmp_path).fingerprint() == whole.fingerprint()
    assert d.calls == [10], 'only the first chunk is drawn again, to see whose they are'
    with pytest.raises(ValueError, match='another recipe'):
        synthetic_pairs(Drawer(seed=1), 25, chunk=10, out=tmp_path)
    with pytest.raises(ValueError, match='another recipe'):
        synthetic_pairs(Drawer(seed=1), 3, chunk=10, out=tmp_path)
    assert synthetic_pairs(Drawer(), 7, chunk=10, out=tmp_path).images.tobytes() == whole.images[:7].tobytes()
    with pytest.raises(ValueError, match='another recipe'):
        synthetic_pairs(Drawer(size=32), 25, chunk=10, out=tmp_path)
    with pytest.raises(ValueError, match='another chunk'):
        synthetic_pairs(Drawer(), 25, chunk=5, out=tmp_path)
    with pytest.raises(ValueError, match='another seed'):
        synthetic_pairs(Drawer(), 25, seed=1, chunk=10, out=tmp_path)


@pytest.mark.parametrize('steps, share', [(2, 0.5), (101, 0.5), (100, 0.2), (7, 0.9)])
def test_all_protocols_but_one_have_the_same_budget(steps, share):
    spent = {p: sum(n for _, n in protocol_steps(p, steps, share)) for p in PROTOCOLS}
    assert spent.pop('pretrain_added') == steps + round(share * steps)
    assert set(spent.values()) == {steps}
    with pytest.raises(ValueError, match="no protocol is called 'reel'.*mixed"):
        protocol_steps('reel', 10)


@pytest.mark.parametrize(
    'n_real, n_fake, share', [(3, 200, 0.5), (200, 3, 0.5), (3, 200, 0.1), (1, 1, 0.5), (7, 50, 0.9)]
)
def test_a_mixture_shows_everybody_in_the_right_shares(n_real, n_fake, share):
    real, fake = eyes(n_real, 'real'), eyes(n_fake, 'fake')
    m = mix(real, fake, share)
    assert np.mean([s.startswith('fake') for s in m.subjects]) == pytest.approx(share, abs=0.02 if len(m) > 2 else 0.5)
    assert set(m.subjects) == {*real.subjects, *fake.subjects}
    for i in (0, len(m) - 1):
        d = real if m.paths[i] in real.paths else fake
        k = d.paths.index(m.paths[i])
        assert np.array_equal(m[i]['image'], d[k]['image']) and np.array_equal(m[i]['mask'], d[k]['mask'])


def test_a_mixture_copies_no_pixels():
    real, fake = eyes(2, 'real', 64), eyes(400, 'fake', 64)
    tracemalloc.start()
    m = mix(real, fake)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(m) == 800 and peak < fake.images.nbytes / 4


def test_nobody_is_on_two_sides(sets, recorder):
    real, fake, test = sets
    check_sides(test, real=real, synthetic=fake)
    with pytest.raises(ValueError, match='1 subjects are in both real and test, e.g. test 2.*split_by_subject'):
        downstream(test.subset([2]), fake, test.subset([1, 2]))
    copied = ImageData(np.concatenate([fake.images, test.images[1:2]]), np.concatenate([fake.masks, test.masks[1:2]]))
    with pytest.raises(ValueError, match='1 pictures are in both synthetic and test.*image 6 and test/1.png'):
        downstream(real, copied, test)
    unnamed = [ImageData(d.images, d.masks) for d in (real, test)]
    with pytest.raises(ValueError, match='need subjects='):
        downstream(unnamed[0], fake, unnamed[1])
    drawer = Drawer()
    with pytest.raises(ValueError, match='both real and test'):
        skrgan_table2(drawer, test, test, n=2)
    assert not recorder.seen and not drawer.calls, 'something was drawn or trained before the check'


def test_sets_that_cannot_be_used_are_refused(sets):
    real, fake, test = sets
    for change, says in [
        ({'real': ImageData(real.images)}, 'real has no masks'),
        ({'real': ImageData(real.images, real.masks * 0)}, 'masks of real are empty'),
        ({'test': ImageData(test.images, test.masks * 0)}, 'masks of test are empty'),
        ({'synthetic': eyes(2, 'x', 32)}, 'synthetic is 32 px'),
        ({'synthetic': None}, 'need synthetic'),
        ({'real': 'folder'}, 'real is str'),
        ({'test': 'folder'}, 'test is str'),
        ({'test': test.subset([])}, 'test holds no images'),
    ]:
        with pytest.raises(ValueError, match=says):
            downstream(**({'real': real, 'synthetic': fake, 'test': test} | change))
    for plan, says in [
        ({'seeds': ()}, 'nothing to train'),
        ({'protocols': ()}, 'nothing to train'),
        ({'seeds': (1, 1)}, 'named twice'),
        ({'steps': 1}, 'at least 2'),
        ({'share': 1.0}, 'between 0 and 1'),
        ({'segmenter': {'seed': 3}}, 'seeds='),
        ({'protocols': ('reel',)}, 'there are: real'),
        ({'inside': 'circle'}, "'auto'"),
        ({'inside': torch.ones(1, 16, 16)}, 'inside is'),
    ]:
        with pytest.raises(ValueError, match=says):
            downstream(real, fake, test, **plan)


def test_each_protocol_learns_from_what_it_says(sets, recorder):
    real, fake, test = sets
    r = downstream(
        real, fake, test, protocols=tuple(PROTOCOLS), seeds=(5, 7), steps=10, share=0.3, segmenter={'width': 3}
    )
    assert [c['seed'] for c, _ in recorder.seen] == [5] * 5 + [7] * 5 and all(
        c['width'] == 3 and c['size'] == 16 for c, _ in recorder.seen
    )
    trained = dict(zip(PROTOCOLS, (t for _, t in recorder.seen)))
    what = lambda d: 'real' if d is real else 'synthetic' if d is fake else 'mixed'
    assert {p: [(what(d), n) for d, n in t] for p, t in trained.items()} == {
        'real': [('real', 10)],
        'synthetic': [('synthetic', 10)],
        'pretrain': [('synthetic', 3), ('real', 7)],
        'mixed': [('mixed', 10)],
        'pretrain_added': [('synthetic', 3), ('real', 10)],
    }
    assert r.counts == {'real': 3, 'synthetic': 6, 'test': 4} and r.seeds == [5, 7]
    assert 'trained for longer' in r.table()


def test_only_the_field_of_view_is_scored(sets, recorder):
    real, _, test = sets
    inside = torch.from_numpy(test.masks > 0)
    recorder.answer = 0.9
    score = lambda where: downstream(real, None, test, ('real',), (0,), inside=where).scores['real']['accuracy'][0]
    assert score(inside) == 1.0 and score(None) == pytest.approx(test.masks.mean())


def test_undefined_scores_are_null_on_disk_and_nan_in_the_table(sets, recorder, tmp_path):
    real, _, test = sets
    r = downstream(real, None, test, ('real',), (0, 1), out=tmp_path, shown=['precision', 'f1'])
    strict = lambda p: json.loads(p.read_text(), parse_constant=lambda c: pytest.fail(f'{c} is no JSON'))
    assert strict(tmp_path / 'real/seed-0/result.json')['scores']['precision'] is None and strict(
        tmp_path / 'downstream.json'
    )
    again = Downstream.load(tmp_path)
    assert (
        again.scores['real']['precision'][1] is None
        and math.isnan(again.values('real', 'precision')[1])
        and again.scores['real']['f1'] == [0.0, 0.0]
    )
    assert 'nan' in r.table() and again.table() == r.table()
    with pytest.raises(ValueError, match='no finished result'):
        Downstream.load(tmp_path / 'real')


def test_finished_trainings_are_reused_only_if_everything_agrees(sets, tmp_path, monkeypatch):
    real, fake, test = sets
    plan = {'seeds': (0,), 'out': tmp_path, 'steps': 2, 'segmenter': TINY}
    first = downstream(real, fake, test, ('real', 'pretrain', 'mixed'), **plan)
    for change, says in [
        ({'steps': 4}, 'another steps'),
        ({'segmenter': TINY | {'lr': 0.5}}, 'another segmenter'),
        ({'share': 0.4}, 'another'),
        ({'inside': None}, 'another field'),
    ]:
        with pytest.raises(ValueError, match=says):
            downstream(real, fake, test, ('pretrain', 'mixed'), **(plan | change))
    relabelled = ImageData(
        test.images, np.roll(test.masks, 1, 1), paths=test.paths, subjects=test.subjects, classes=test.classes
    )
    with pytest.raises(ValueError, match='another data'):
        downstream(real, fake, relabelled, ('real',), **plan)
    with pytest.raises(ValueError, match='another data'):
        downstream(real, eyes(6, 'other'), test, ('mixed',), **plan)
    monkeypatch.setattr(module, 'Segmenter', lambda **k: pytest.fail('it was trained already'))
    assert downstream(real, fake, test, ('real', 'pretrain', 'mixed'), **plan).scores == first.scores
    assert downstream(real, eyes(6, 'other'), test, ('real',), **plan).scores['real'] == first.scores['real'], (
        'real does not look at the synthetic images'
    )
    assert Segmenter.load(tmp_path / 'real/seed-0/segmenter.safetensors').config['width'] == 4


def test_a_killed_run_ends_as_if_it_had_not_been_killed(sets, tmp_path, monkeypatch):
    real, fake, test = sets
    plan = {'protocols': ('real', 'pretrain'), 'seeds': (0,), 'steps': 8, 'segmenter': TINY}
    whole = downstream(real, fake, test, out=tmp_path / 'whole', **plan)
    fit, step = Segmenter.fit, Trainer._step
    monkeypatch.setattr(Segmenter, 'fit', lambda self, *a, **k: fit(self, *a, every=2, **k))

    def dies(source, at):
        def run():
            def _step(self, batches):
                folder = next(str(c.folder) for c in self.callbacks if type(c).__name__ == 'Checkpoint')
                if self.step == at and source in folder:
                    die()
                step(self, batches)

            Trainer._step = _step
            downstream(real, fake, test, out=tmp_path / 'killed', **plan)

        return run

    for source, at in (('real/seed-0/0-real', 5), ('0-synthetic', 3), ('1-real', 3)):
        killed(dies(source, at))
    assert (tmp_path / 'killed/real/seed-0/result.json').exists() and not (
        tmp_path / 'killed/pretrain/seed-0/result.json'
    ).exists()
    assert downstream(real, fake, test, out=tmp_path / 'killed', **plan).scores == whole.scores


def test_a_broken_result_is_made_again(sets, recorder, tmp_path):
    real, _, test = sets
    run = lambda: downstream(real, None, test, ('real',), (0,), out=tmp_path).scores
    recorder.answer = 0.9
    first = run()
    (tmp_path / 'real/seed-0/result.json').write_text('{"scores": ')
    assert run() == first and len(recorder.seen) == 2
    (tmp_path / 'real/seed-0/config.json').write_text('[')
    with pytest.raises(ValueError, match='cannot be read'):
        run()


def test_students_interval():
    for n, t in {2: 12.7062, 3: 4.30265, 10: 2.26216}.items():
        d = np.arange(n) - (n - 1) / 2
        assert paired_difference(d, 0 * d)[2] == pytest.approx(t * d.std(ddof=1) / n**0.5, rel=1e-4)
    mean, low, high = paired_difference([3, 5, 4], [1, 2, 3])
    assert mean == 2 and [high - mean, mean - low] == pytest.approx([4.30265 / 3**0.5] * 2, rel=1e-4)
    assert math.isnan(paired_difference([1.0], [0.0])[1])


def made_up(**more):
    score = lambda *v: {'sensitivity': list(v), 'accuracy': [0.9] * len(v), 'auc': [0.8] * len(v), 'f1': list(v)}
    return Downstream(
        {'real': score(0.5, 0.6, 0.7), 'pretrain': score(0.6, 0.7, 0.8)},
        [0, 1, 2],
        {'real': [('real', 9)], 'pretrain': [('synthetic', 4), ('real', 5)]},
        {'real': 1, 'synthetic': 2, 'test': 3},
        {'field': None},
        **more,
    )


def test_the_table_says_spread_differences_budget_and_what_the_paper_says():
    r = made_up(paper={'real': {'sensitivity': 0.7781}})
    text = r.table()
    for part in (
        '0.6000 ± 0.1000',
        '+0.1000 [+0.1000, +0.1000]',
        '4 synthetic + 5 real',
        '0.7781',
        '3 seeds (0, 1, 2)',
        'the whole image',
        'without a spread',
    ):
        assert part in text
    rows = [line for line in r.table('markdown').splitlines() if line.startswith('|')]
    assert len({line.count('|') for line in rows}) == 1 and len(rows) == 6
    lines = list(csv.DictReader(io.StringIO(r.table('csv'))))
    assert len(lines) == 8 and float(
        next(x for x in lines if (x['protocol'], x['score']) == ('pretrain', 'f1'))['difference']
    ) == pytest.approx(0.1)
    with pytest.raises(ValueError, match='markdown'):
        r.table('latex')


def test_one_seed_has_no_spread(sets, recorder):
    text = downstream(sets[0], sets[1], sets[2], ('real', 'synthetic'), (0,)).table()
    assert 'its spread is unknown' in text and '±' not in text and '[' not in text


def test_divergence_of_halves_never_parts_a_subject():
    real = eyes(12, 'twins', each=6)
    dark = ImageData(real.images // 2, real.masks)
    d = half_divergences(real, dark, splits=6)
    grey = d['KL grey levels']
    assert len({round(v, 9) for v in grey['real']}) <= 2, 'two subjects can only be parted in one way'
    assert min(grey['synthetic']) > 10 * max(grey['real'])
    assert np.mean(d['KL vessel widths']['synthetic']) < 0.1, 'the masks are the same'
    with pytest.raises(ValueError, match='one subject'):
        half_divergences(eyes(3, 'me', each=3), dark)


def test_the_two_papers_tables(sets, recorder, tmp_path):
    real, _, test = sets
    two = skrgan_table2(Drawer(key='sketch'), real, test, n=20, seeds=(0, 1), out=tmp_path)
    assert list(two.scores) == ['real', 'pretrain'] and two.counts['synthetic'] == 20
    for part in ('sensitivity', 'paper: pretrain', '0.8464', '0.9705'):
        assert part in two.table()
    one = dualgan_f1(Drawer(key='sketch', level=-0.3), real, test, n=20, seeds=(0, 1), out=tmp_path / 'dual')
    header, *lines = one.table().splitlines()
    assert header.split()[:2] == ['synthetic', '-'] and any(
        line.startswith('F1') and '0.8877' in line for line in lines
    )
    assert any(line.startswith('KL grey levels') for line in lines) and np.mean(
        one.divergence['KL grey levels']['synthetic']
    ) > np.mean(one.divergence['KL grey levels']['real'])
    assert {p.name for p in tmp_path.glob('*.*')} == {f'skrgan_table2.{e}' for e in ('json', 'txt', 'md', 'csv')}
    assert Downstream.load(tmp_path / 'dual', 'dualgan_f1').table() == one.table()
    with pytest.raises(ValueError, match='both real and test'):
        dualgan_f1(Drawer(), test, test, n=2)
