"Comparing systems: one budget, killed and resumed, kept scores, and the table"

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from medsketch.data import ImageData, phantom_data
from medsketch.evaluate import table
from medsketch.evaluate.compare import _train_and_score, compare, make_recipe, settings_for
from medsketch.evaluate.distances import Score
from medsketch.evaluate.features import thumbnails
from medsketch.evaluate.table import METRICS, Table, baseline_scores, score_images

SMALL = {
    'ngf': 8,
    'ndf': 8,
    'batch_size': 4,
    'latent_dim': 16,
    'fmap_base': 64,
    'fmap_max': 16,
    'skrgan.receptive_field': 16,
    'augment': 'flip',
}
PLAIN = {k: SMALL[k] for k in ('ngf', 'ndf', 'batch_size', 'latent_dim', 'augment')}  # what every GAN knows
BUDGET = {
    "steps": 6,
    "n": 12,
    "settings": PLAIN,
    "features": 'thumbnails',
    "metrics": ('swd', 'fid'),
    "resamples": 4,
    "progress": False,
    "say": lambda s: None,
}


@pytest.fixture(scope='module', autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


@pytest.fixture(scope='module')
def eyes():
    return phantom_data('fundus', 20, 32)


def test_all_systems_of_the_paper_under_one_budget(eyes, tmp_path):
    names = ['skrgan', 'dcgan', 'acgan', 'wgan', 'wgan_gp', 'pggan']
    table = compare(eyes, names, tmp_path, **BUDGET | {'settings': SMALL})
    assert list(table.rows) == names
    assert all(
        np.isfinite(s.value) and s.n_fake == 12 for runs in table.rows.values() for scores in runs for s in scores
    )
    assert {p.name for p in tmp_path.iterdir()} == {
        'runs',
        'baseline.json',
        'table.txt',
        'table.md',
        'table.csv',
        'samples.png',
    }
    assert 'parameters' in (tmp_path / 'table.txt').read_text()


def test_the_budget_is_what_the_recipes_train_for(eyes):
    total = {
        "skrgan": lambda r: r.growth.steps + r.config['render_steps'] + r.config['joint_steps'],
        "dcgan": lambda r: r.steps,
        "pggan": lambda r: r.steps,
    }
    for name, steps in total.items():
        assert 90 <= steps(make_recipe(name, eyes, 100, settings=SMALL)) <= 100


def test_killed_and_resumed_gives_the_table_of_an_uninterrupted_comparison(tmp_path):
    code = (
        "import sys; from medsketch.data import phantom_data; from medsketch.evaluate.compare import compare; from "
        "tests.test_compare import BUDGET;"
        "compare(phantom_data('fundus', 20, 32), ['dcgan', 'wgan'], sys.argv[1], **BUDGET | dict(steps=40, "
        "every=5))"
    )
    start = lambda out: subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', code, str(out)],
        env=os.environ | {"OMP_NUM_THREADS": '1', "PYTHONPATH": os.getcwd()},
    )
    victim = start(tmp_path / 'killed')
    deadline = time.monotonic() + 120
    while not list((tmp_path / 'killed').glob('runs/*/gan/checkpoints/*.pt')):
        assert time.monotonic() < deadline and victim.poll() is None, 'it never got to a checkpoint'
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / 'killed/table.csv').exists()
    both = [start(tmp_path / k) for k in ('killed', 'whole')]
    assert [p.wait() for p in both] == [0, 0]
    assert (tmp_path / 'killed/table.csv').read_text() == (tmp_path / 'whole/table.csv').read_text()


def test_scores_are_kept_only_for_what_they_were_computed_from(eyes, tmp_path):
    first = compare(eyes, ['dcgan'], tmp_path, **BUDGET)
    file = tmp_path / 'runs/dcgan-0/scores.json'
    found = json.loads(file.read_text())
    found['scores'][0]['value'] = 123.0
    file.write_text(json.dumps(found))
    assert compare(eyes, ['dcgan'], tmp_path, **BUDGET).rows['dcgan'][0][0].value == 123.0  # taken from the file
    again = compare(eyes, ['dcgan'], tmp_path, **BUDGET | {"n": 13})
    assert again.rows['dcgan'][0][0].n_fake == 13 and again.rows['dcgan'][0][0].value != 123.0
    file.write_text('{ not json')
    assert compare(eyes, ['dcgan'], tmp_path, **BUDGET).csv() == first.csv()


def test_another_budget_in_the_same_folder_is_refused_and_nothing_is_lost(eyes, tmp_path):
    compare(eyes, ['dcgan'], tmp_path, **BUDGET)
    before = (tmp_path / 'table.csv').read_bytes()
    with pytest.raises(ValueError, match='another config'):
        compare(eyes, ['dcgan'], tmp_path, **BUDGET | {"steps": 8})
    with pytest.raises(ValueError, match='another data'):
        compare(phantom_data('fundus', 20, 32, seed=1), ['dcgan'], tmp_path, **BUDGET)
    assert (tmp_path / 'table.csv').read_bytes() == before


def test_several_seeds_give_mean_and_spread(eyes, tmp_path):
    table = compare(eyes, ['dcgan'], tmp_path, **BUDGET | {"seeds": (0, 1)})
    a, b = (scores[0].value for scores in table.rows['dcgan'])
    assert a != b and table.mean('dcgan', METRICS['swd']) == pytest.approx((a + b) / 2)
    assert '±' in table.text() and 'trainings: 2' in table.text()


def test_grey_images_several_contrasts_and_moco(tmp_path):
    brains = phantom_data('brain_mri', 24, 32)
    table = compare(brains, ['dcgan'], tmp_path, **BUDGET | {"features": 'moco', "moco_steps": 3})
    assert 'moco' in table.text().lower() and (tmp_path / 'features/weights.safetensors').exists()
    with pytest.raises(ValueError, match='channels'):
        compare(brains, ['dcgan'], tmp_path, **BUDGET | {"reference": phantom_data('fundus', 8, 32)})


@pytest.mark.parametrize(
    ('change', 'message'),
    {
        'unknown recipe': ({"recipes": ['gan']}, 'no recipe is called'),
        'no recipe': ({"recipes": []}, 'at least one recipe'),
        'no seed': ({"seeds": ()}, 'one seed'),
        'few samples': ({"n": 3}, 'at least 12'),
        'unknown score': ({"metrics": ['beauty']}, 'no score is called'),
        'no segmenter': ({"metrics": ['continuity']}, 'segmenter'),
        'unknown features': ({"features": 'eyes'}, 'no features are called'),
        'no steps': ({"steps": 0}, 'at least'),
        'argument of nobody': ({"settings": {'dcgan.beauty': 1}}, 'no argument'),
    }.values(),
)
def test_mistakes_are_said_before_anything_is_trained(eyes, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        compare(**{"data": eyes, "recipes": ['dcgan'], "out": tmp_path} | BUDGET | change)
    assert not (tmp_path / 'runs').exists()


class Copyist:
    "Knows the face of a recipe and gives back the images it was trained on"

    name, nets, config = 'copyist', {}, {'seed': 0}

    def fit(self, data, out, **kwargs):
        self.data = data

    def sample(self, n, seed=0):
        return {'image': self.data.batch(range(n))['image']}


def test_copies_are_counted_against_the_images_trained_on(eyes, tmp_path):
    "Not against the reference, where a copyist would pass for honest"
    budget = BUDGET | {'settings': None, 'metrics': ('copies',), 'reference': phantom_data('fundus', 20, 32, seed=9)}
    [[found]] = compare(eyes, {'mine': Copyist()}, tmp_path, **budget).rows['mine']
    assert found.value == 1.0 and found.n_fake == 12


def test_a_comparison_knows_recipes_by_their_face(eyes, tmp_path):
    "Classes, a lookup or names: the same recipe; and whoever passes classes needs none of ours"
    from medsketch.recipes import DCGAN

    a = compare(eyes, ['dcgan'], tmp_path / 'a', **BUDGET)
    b = compare(eyes, {'dcgan': DCGAN}, tmp_path / 'b', **BUDGET)
    c = compare(eyes, ['some'], tmp_path / 'c', lookup={'some': DCGAN}.__getitem__, **BUDGET)
    first = lambda t, name: [s.value for s in t.rows[name][0]]
    assert first(a, 'dcgan') == first(b, 'dcgan') == first(c, 'some')
    code = (
        "import sys, medsketch.evaluate.compare; print([m for m in sys.modules if m.startswith('medsketch.recipes')])"
    )
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    )


def test_too_few_images(tmp_path):
    with pytest.raises(ValueError, match='at least 12'):
        compare(phantom_data('fundus', 3, 32), ['dcgan'], tmp_path, **BUDGET)


def test_settings_reach_those_who_know_them():
    assert settings_for('skrgan', {'ngf': 8, 'skrgan.ngf': 16, 'clip': 0.1}) == {"ngf": 16}


@pytest.mark.parametrize(
    ('odd', 'words'),
    [
        ('nfg', "none of dcgan, wgan has an argument 'nfg'"),
        ('fmap_base', "none of dcgan, wgan has"),
        ('skrgan.ngf', "'skrgan' is not compared"),
        ('.ngf', "'' is not compared"),
        ('dcgan.clip', "has no argument 'clip'"),
    ],
)
def test_a_setting_that_reaches_nobody_is_refused(eyes, tmp_path, odd, words):
    "Before anything is trained or written"
    with pytest.raises(ValueError, match=words):
        compare(eyes, ['dcgan', 'wgan'], tmp_path / 'out', **BUDGET | {'settings': PLAIN | {odd: 1, 'clip': 0.1}})
    assert not (tmp_path / 'out').exists()


def score(name='SWD × 10³ ↓', value=1.0, **kw):
    return Score(value, name, 'x', 10, 10, **kw)


def test_best_of_a_line_follows_the_arrow():
    t = Table(
        {
            "a": [[score(value=1.0), score('MS-SSIM ↑', 0.1), score('density (1 is best)', 1.0)]],
            "b": [[score(value=2.0), score('MS-SSIM ↑', 0.2), score('density (1 is best)', 3.0)]],
        }
    )
    assert [t.best(n) for n in t.names] == ['a', 'b', None]
    assert Table({"a": [[score()]], "b": [[score()]]}).best('SWD × 10³ ↓') is None


def test_a_line_of_two_extractors_is_an_error():
    with pytest.raises(ValueError, match='different extractors'):
        Table({"a": [[score()]], "b": [[Score(1.0, 'SWD × 10³ ↓', 'y', 10, 10)]]})
    with pytest.raises(ValueError, match='different versions'):
        Table({"a": [[score()]], "b": [[score(version='medsketch 0')]]})


def test_a_system_without_a_score_leaves_a_gap():
    t = Table({"a": [[score(), score('FID ↓')]], "b": [[score()]]})
    assert t.cells()[2][2] == '' and t.best('FID ↓') is None  # nobody to be better than
    assert [len(line) for line in t.cells()] == [3] * 3 and t.markdown().count('|:--') == 1 + 2


def test_identical_sets_and_copies(eyes):
    real = eyes.batch(range(20))['image']
    found = {
        s.name: s.value for s in score_images(real, real, ('fid', 'copies'), thumbnails(), train=eyes, resamples=0)
    }
    assert found['FID ↓'] < 1e-6 and found[METRICS['copies']] == 1.0


def test_halves_of_the_real_images_share_nobody():
    "Four people, eight equal pictures of each: halves that shared people would be nearer"
    one = phantom_data('fundus', 4, 32)
    rows = np.repeat(np.arange(4), 8)
    people = ImageData(one.images[rows], subjects=[f's{r}' for r in rows])
    alone = ImageData(one.images[rows])
    fid = lambda d: baseline_scores(d, ('fid',), thumbnails(), resamples=0)[0].value
    assert fid(people) > 2 * fid(alone)


def test_nan_and_mixed_sizes_are_refused(eyes):
    real = eyes.batch(range(12))['image']
    bad = real.clone()
    bad[3, 0, 4, 4] = torch.nan
    for m in ('swd', 'ms_ssim', 'fid'):
        with pytest.raises(ValueError, match='NaN'):
            score_images(real, bad, (m,), thumbnails(), resamples=0)
        with pytest.raises(ValueError, match='size'):
            score_images(real, real[..., :16, :16], (m,), thumbnails(4), resamples=0)


def test_the_baseline_of_a_folder_sorted_by_class_has_both_classes(monkeypatch):
    sick = np.repeat([0, 255], 60).astype(np.uint8)
    ds, seen = ImageData(np.broadcast_to(sick[:, None, None, None], (120, 1, 16, 16)).copy()), []
    monkeypatch.setattr(table, 'score_images', lambda a, b, *args, **kwargs: seen.extend((a, b)) or [])
    baseline_scores(ds, ('swd',), most=20)
    for half in seen:
        assert len(half) == 20 and 3 < (half.images[:, 0, 0, 0] == 255).sum() < 17
    assert not set(seen[0].subjects) & set(seen[1].subjects)


def test_a_training_of_no_time_at_all_is_one(tmp_path):
    class Quick:
        "Trains four steps faster than the log counts"

        def __init__(self):
            self.config = {'seed': 0}

        def fit(self, data, run, resume):
            (run / 'gan').mkdir(parents=True, exist_ok=True)
            (run / 'gan/log.csv').write_text('step,images,seconds\n4,48,0.0\n')

        def sample(self, n, seed):
            return {'image': torch.zeros(n, 1, 8, 8)}

    said = []
    for _ in range(2):
        _train_and_score(Quick(), tmp_path / 'quick-0', None, 2, {}, lambda images: [], said.append)
    assert said == ['quick-0: trained, scored in 0 s', 'quick-0: trained before, scores kept in 0 s']
