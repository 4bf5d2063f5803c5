"""Reader studies from folders: nothing gives an image away, nothing that was said is lost."""

import json

import numpy as np
import pytest
from PIL import Image

from medsketch.cli import main
from medsketch.core import save_png
from medsketch.evaluate.study import (
    answer,
    answers_of,
    images_left,
    make_study,
    open_study,
    study_scores,
)


@pytest.fixture
def folders(tmp_path):
    "Real images: grey, 96 px, with a text chunk; synthetic ones: colour, 128 x 80 px JPEG"
    rng = np.random.default_rng(0)
    for i in range(6):
        save_png(tmp_path / f'clinic/patient_{i}.png', rng.integers(0, 255, (96, 96), np.uint8))
        (tmp_path / 'drawn').mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 128, 3), np.uint8)).save(tmp_path / f'drawn/fake{i}.jpg')
    return {'real': tmp_path / 'clinic', 'ours': tmp_path / 'drawn'}


def test_nothing_but_the_picture_differs(folders, tmp_path):
    s = make_study(tmp_path / 'study', folders, n=5, size=64, seed=3)
    assert sorted(s.sources.values()) == ['ours'] * 5 + ['real'] * 5
    seen = [Image.open(s.image(n)) for n in s.sources]
    assert {(x.size, x.mode, x.format, tuple(x.info)) for x in seen} == {((64, 64), 'RGB', 'PNG', ())}
    times = [s.image(n).stat().st_mtime for n in sorted(s.sources)]
    assert times == sorted(times)  # written in the blinded order: dates say nothing
    assert list(s.sources.values()) not in (['real'] * 5 + ['ours'] * 5, ['ours'] * 5 + ['real'] * 5)
    again = make_study(tmp_path / 'again', folders, n=5, size=64, seed=3)
    assert (again.id, again.sources) == (s.id, s.sources)
    assert make_study(tmp_path / 'other', folders, n=5, size=64, seed=4).id != s.id


def test_a_study_that_was_broken_is_one_line(folders, tmp_path):
    s = make_study(tmp_path / 'study', folders, n=3, size=64)
    s.image('0002').unlink()
    with pytest.raises(ValueError, match='lost 1 of its images, e.g. 0002'):
        open_study(s.folder)
    (s.folder / 'study.json').write_text('{"id": 3')
    with pytest.raises(ValueError, match='holds no reader study'):
        open_study(s.folder)
    (s.folder / 'study.json').write_text(json.dumps({'id': 'a', 'question': 'why', 'sources': {}}))
    with pytest.raises(ValueError, match="no question is called 'why'"):
        open_study(s.folder)


@pytest.mark.parametrize('cut', [1, 5, 40])
def test_an_answer_survives_whatever_was_torn_after_it(folders, tmp_path, cut):
    s = make_study(tmp_path / 'study', folders, n=3, size=64)
    first, second, *_ = images_left(s, 'Ada')
    answer(s, 'Ada', first, 'real'), answer(s, 'Ada', second, 'real')
    file = s.folder / 'answers/Ada.csv'
    file.write_bytes(file.read_bytes()[:-cut])
    assert answers_of(s, 'Ada') == {first: 'real'} and images_left(s, 'Ada')[0] == second
    answer(s, 'Ada', second, 'synthetic')
    assert answers_of(s, 'Ada') == {first: 'real', second: 'synthetic'}


def test_the_table_counts_each_reader_and_each_source(folders, tmp_path, capsys):
    s = make_study(tmp_path / 'study', folders, n=4, size=64)
    for image, source in s.sources.items():
        answer(s, 'Ada', image, 'real' if source == 'real' else 'synthetic')  # always right
        answer(s, 'Ben', image, 'synthetic')  # calls everything synthetic
    rows = {k: v[0] for k, v in study_scores(s).rows.items()}
    assert rows == {
        ('Ada', 'real'): 1,
        ('Ada', 'ours'): 1,
        ('Ben', 'real'): 0,
        ('Ben', 'ours'): 1,
        ('all', 'real'): 0.5,
        ('all', 'ours'): 1,
    }
    assert study_scores(s).common == 8
    with pytest.raises(SystemExit, match='0'):
        main(['study', str(s.folder), '--scores'])
    assert '| Ben' in capsys.readouterr().out
