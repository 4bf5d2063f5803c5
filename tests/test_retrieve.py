"Finding images by a sketch: exact search, the index and what it refuses, recall, and the command"

import csv
import json
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_sketch2medi import TINY as SMALLEST

from medsketch.core import save_png, sketch_to_uint8
from medsketch.data import ImageData, phantom_data
from medsketch.evaluate import retrieve
from medsketch.evaluate.features import Extractor
from medsketch.evaluate.levels import drawn_by
from medsketch.evaluate.retrieve import (
    SketchIndex,
    chance_at,
    edge_histograms,
    hits,
    index_header,
    index_sketches,
    load_index,
    mask_overlap,
    recall_at,
    save_index,
    sheet,
    sketch_pixels,
    style_codes,
)
from medsketch.recipes import CycleGAN, Sketch2MedI
from medsketch.sketch import add_sketches

TINY = SMALLEST | {'size': 32}
FLAT = Extractor(lambda x: x.flatten(1), 'flat', 64, 'cpu')


def one_line(e):
    return '\n' not in str(e.value)


@pytest.fixture(scope='module')
def throats():
    return add_sketches(phantom_data('pharynx', 24, 32), method='contour')


@pytest.fixture(scope='module')
def recipe():
    return Sketch2MedI(**TINY, confidence=0.01)


def test_exact_search_is_brute_force():
    x, q = torch.randn(5000, 7) + 100, torch.randn(300, 7) + 100
    index = SketchIndex(FLAT, x, [''] * 5000, [''] * 5000, 32)
    d, which = index.near(q, 6)
    want = (q.double()[:, None] - x.double()).norm(dim=-1)
    near = want.topk(6, largest=False)
    assert torch.equal(which, near.indices)
    assert torch.allclose(d.double(), near.values, atol=1e-5)


@pytest.mark.parametrize('by', ['w', 'w+', 'hog', 'pixels'])
def test_a_sketch_of_the_set_finds_itself(by, throats):
    f = {'hog': edge_histograms(), 'pixels': sketch_pixels()}.get(by)
    f = f or style_codes(Sketch2MedI(**TINY, space=by))
    index, s = index_sketches(throats, f), throats.batch(range(24))['sketch']
    d, which = index.search(s, 3)
    assert which[:, 0].tolist() == list(range(24)) and d[:, 0].max() < 1e-4
    assert (d.diff(dim=1) >= 0).all() and (d[:, 1] > 1e-3).all()
    assert index.search(s[3, 0].numpy(), 1)[1].tolist() == [[3]]


def test_w_is_what_the_encoder_says(throats, recipe):
    s = throats.batch(range(3))['sketch']
    with torch.no_grad():
        w = recipe.nets['E'](s)
        assert torch.equal(style_codes(recipe)(s), w[:, 0])
        plus = Sketch2MedI(**TINY, space='w+')
        assert torch.equal(style_codes(plus)(s), plus.nets['E'](s).flatten(1))


def test_an_index_is_read_back(throats, recipe, tmp_path):
    f, path = style_codes(recipe), tmp_path / 'a.safetensors'
    data = throats.subset(range(24))
    data.paths = [str(tmp_path / f'photos/{i}.png') for i in range(24)]
    data.subjects = ['a', 'ß\n"'] * 12
    index = index_sketches(data, f, root=tmp_path / 'photos')
    save_index(path, index)
    again = load_index(path, style_codes(recipe))
    assert torch.equal(again.codes, index.codes) and again.size == 32
    assert again.paths == [f'{i}.png' for i in range(24)] and again.subjects == data.subjects
    assert str(tmp_path).encode() not in path.read_bytes() and again.root == str(tmp_path / 'photos')
    first = path.read_bytes()
    save_index(path, again)
    assert path.read_bytes() == first
    assert index_header(path) == {'by': f.name, 'size': 32}


def test_an_index_of_another_model_is_refused(throats, recipe, tmp_path):
    save_index(tmp_path / 'a.safetensors', index_sketches(throats, style_codes(recipe)))
    other = style_codes(Sketch2MedI(**TINY, seed=1))
    assert other.name != style_codes(recipe).name == style_codes(Sketch2MedI(**TINY)).name
    for f in (other, edge_histograms()):
        with pytest.raises(ValueError, match='was made by W codes of E') as e:
            load_index(tmp_path / 'a.safetensors', f)
        assert one_line(e) and f.name in str(e.value)


def test_a_file_that_is_no_index(throats, recipe, tmp_path):
    path, f = tmp_path / 'a.safetensors', sketch_pixels()
    save_index(path, index_sketches(throats, f))
    whole = path.read_bytes()
    for broken in (b'', whole[:9], whole[:-1], b'{}', whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match='no index|damaged') as e:
            load_index(path, f)
        assert one_line(e)
    about = {'medsketch_index': f'{{"by": "{f.name}", "size": 32}}'}
    names = lambda text: torch.tensor(list(text.encode()), dtype=torch.uint8)
    for codes, text in (
        (torch.zeros(2, 3), '{"paths": ["a"], "subjects": ["a"]}'),
        (torch.zeros(0, 3), '{"paths": [], "subjects": []}'),
        (torch.zeros(1, 3), '{"paths": [1], "subjects": ["a"]}'),
        (torch.zeros(1, 3, dtype=torch.int64), '{"paths": ["a"], "subjects": ["a"]}'),
        (torch.zeros(1, 3), '{"paths": "a"}'),
        (torch.zeros(1, 3), 'null'),
        (torch.zeros(1, 3), '[' * 100_000),
        (torch.full((1, 3), torch.nan), '{"paths": ["a"], "subjects": ["a"]}'),
    ):
        save_file({'codes': codes, 'names': names(text)}, path, about)
        with pytest.raises(ValueError, match='damaged'):
            load_index(path, f)
    recipe.save(path)
    for p in (path, tmp_path / 'none', tmp_path):
        with pytest.raises(ValueError, match='no index'):
            load_index(p, f)


def stranger(path, codes=None, size=32, **names):
    "An index as somebody else may have written it"
    names = {'paths': ['a.png'], 'subjects': ['a'], 'root': '.'} | names
    about = {'medsketch_index': json.dumps({'by': sketch_pixels().name, 'size': size})}
    text = torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8)
    save_file({'codes': torch.ones(1, 256) if codes is None else codes, 'names': text}, path, about)
    return path


HOSTILE = {
    'an absolute root': {'root': '/etc'},
    'an absolute image': {'paths': ['/etc/passwd']},
    'an image outside': {'paths': ['../../a.png']},
    'outside by a detour': {'paths': ['b/../../a.png']},
    'a NUL in a name': {'paths': ['a\0.png']},
    'a NUL in the root': {'root': 'a\0'},
    'a list for a root': {'root': ['.']},
    'a size that is none': {'size': 10**9},
    'a size of true': {'size': True},
    'negative size': {'size': -32},
    'no numbers': {'codes': torch.ones(1, 0)},
    'three dimensions': {'codes': torch.ones(1, 256, 1)},
}


@pytest.mark.parametrize('harm', HOSTILE)
def test_an_index_of_a_stranger_leads_nowhere_else(tmp_path, harm):
    path = stranger(tmp_path / 'a.safetensors', **HOSTILE[harm])
    with pytest.raises(ValueError, match='damaged') as e:
        load_index(path, sketch_pixels()).near(torch.ones(1, 256), 1)
    assert one_line(e)


def test_an_index_is_measured_before_it_is_read(tmp_path, monkeypatch):
    path = stranger(tmp_path / 'a.safetensors', paths=['a' * 200])
    assert load_index(path, sketch_pixels()).root == str(tmp_path)
    for most in (1000, 2047, 4000):  # bytes: too few for the codes, and for the names
        monkeypatch.setattr('medsketch.data.files.MOST_BYTES', most)
        with pytest.raises(ValueError, match='memory'):
            load_index(path, sketch_pixels())
    monkeypatch.setattr('medsketch.data.files.MOST_BYTES', 20_000)
    assert len(load_index(path, sketch_pixels())) == 1


def test_vectors_of_another_length_are_said(tmp_path):
    index = load_index(stranger(tmp_path / 'a.safetensors', torch.ones(1, 3)), sketch_pixels())
    with pytest.raises(ValueError, match='vectors of 256 numbers, the index holds 3: index anew'):
        index.search(torch.ones(1, 32, 32), 1)


def test_images_below_a_linked_folder_stay_below_it(tmp_path, throats):
    (tmp_path / 'real').mkdir(), (tmp_path / 'link').symlink_to('real')
    some = throats.subset([0])
    some.paths = [str((tmp_path / 'real/a.png').resolve())]
    assert index_sketches(some, sketch_pixels(), tmp_path / 'link').paths == ['a.png']


def test_what_cannot_be_searched_is_one_line(throats, recipe):
    index, s = index_sketches(throats, style_codes(recipe)), throats.batch([0])['sketch']
    for call, text in (
        (lambda: index.search(s, 25), '24 images; 25'),
        (lambda: index.search(s, 0), '24 images; 0'),
        (lambda: index.search(s[..., ::2, ::2]), r'\(16, 16\) pixels'),
        (lambda: index.search(torch.cat([s, s * 0])), 'sketch 1 has no stroke'),
        (lambda: index.search(s.expand(-1, 3, -1, -1)), 'shape'),
        (lambda: index_sketches(throats.subset([]), style_codes(recipe)), 'no images'),
        (lambda: index_sketches(phantom_data('pharynx', 1, 32), style_codes(recipe)), 'no sketches'),
        (lambda: style_codes(recipe)(s[..., ::2, ::2]), r'\(16, 16\) pixels'),
        (lambda: style_codes(CycleGAN(size=32, ngf=4, ndf=4)), 'no encoder of sketches'),
        (lambda: edge_histograms()(s[..., :8, :8]), '8 px have no 8 cells'),
    ):
        with pytest.raises(ValueError, match=text) as e:
            call()
        assert one_line(e)
    half = Sketch2MedI(**TINY)
    half.learned = {'S'}
    with pytest.raises(ValueError, match='hold no E'):
        style_codes(half)


def test_overlap_by_hand():
    a = np.array([[[0, 0, 1, 1]], [[0, 2, 1, 1]], [[0, 0, 0, 0]]])
    got = mask_overlap(a, a)
    want = torch.tensor([[1, 0.5, 0], [0.5, 1, 0], [0, 0, torch.nan]])
    assert torch.allclose(got, want, equal_nan=True)
    with pytest.raises(ValueError, match='differ in size'):
        mask_overlap(a, a[..., :2])


def twins():
    "Four sketches, each with a twin of another subject, whose mask is the same"
    s = np.zeros((8, 32, 32), np.uint8)
    for i in range(4):
        s[2 * i : 2 * i + 2, 3 + 4 * i : 20, 5 + 3 * i] = s[2 * i : 2 * i + 2, 3 + 4 * i, 5 + 3 * i : 28] = 255
    masks = (np.cumsum(np.cumsum(s > 0, 1), 2) > 0).astype(np.uint8)
    return ImageData(np.zeros((8, 3, 32, 32), np.uint8), masks, s, subjects=[f'{i}' for i in range(8)])


@pytest.mark.parametrize('f', [edge_histograms(), sketch_pixels()], ids=['hog', 'pixels'])
def test_identical_sketches_are_always_found(f):
    data = twins()
    wanted = hits(data, data, 0.999)
    assert (wanted == 1).sum(1).tolist() == [1] * 8 and wanted.isnan().diagonal().all()
    assert recall_at(index_sketches(data, f), data.batch(range(8))['sketch'], wanted, (1, 3)) == {1: 1.0, 3: 1.0}
    assert chance_at(wanted, (1, 7)) == pytest.approx({1: 1 / 7, 7: 1})


def test_nobody_finds_their_own_images():
    "Twins of one subject do not count, and take no place among the k nearest"
    data = twins()
    data.subjects = ['a', 'a', *'bcdefg']
    wanted = hits(data, data, 0.999)
    assert wanted[:2, :2].isnan().all() and not (wanted[:2] == 1).any()
    index = index_sketches(data, sketch_pixels())
    assert recall_at(index, data.batch(range(8))['sketch'], wanted, (1,)) == {1: 1.0}  # of the six others
    data.subjects = list('aabbccde')
    wanted = hits(data, data, 0.999)
    assert (wanted == 1).any(1).tolist() == [False] * 6 + [True] * 2
    assert chance_at(wanted, (1,))[1] == pytest.approx(1 / 7)
    far = torch.full_like(wanted, 0.0).masked_fill(wanted.isnan(), torch.nan)
    order = index.near(index.codes[:1], 8)[1][0].tolist()  # itself and its sibling, then the others
    assert set(order[:2]) == {0, 1}
    far[0, order[2]] = 1
    assert recall_at(index, data.batch(range(8))['sketch'], far, (1,)) == {1: 1.0}


def test_recall_falls_with_distortion(throats):
    wanted, s = hits(throats, throats, 0.75), throats.batch(range(24))['sketch']
    for f in (edge_histograms(), sketch_pixels()):
        index = index_sketches(throats, f)
        r = [np.mean([recall_at(index, drawn_by(s, v, p), wanted, (1,))[1] for p in (0, 1, 2)]) for v in (0, 0.5, 1)]
        assert r[0] > r[1] > r[2] and r[0] > 0.7, r


def test_a_held_out_set_may_search(throats):
    data, queries = throats.subset(range(16)), throats.subset(range(16, 24))
    wanted = hits(queries, data, 0.7)
    assert wanted.shape == (8, 16) and not wanted.isnan().any()
    r = recall_at(index_sketches(data, sketch_pixels()), queries.batch(range(8))['sketch'], wanted, (1, 16))
    assert r[16] == 1 and r[1] <= 1


def test_what_cannot_be_scored_is_one_line(throats):
    index, s = index_sketches(throats, sketch_pixels()), throats.batch(range(24))['sketch']
    wanted = hits(throats, throats, 0.7)
    for call, text in (
        (lambda: recall_at(index, s, wanted, (24,)), 'k=24, and there are 23'),
        (lambda: recall_at(index, s[:3], wanted), '3 sketches'),
        (lambda: hits(throats, throats, 1.0), 'the largest overlap is 0.'),
        (lambda: hits(throats, throats, 0.0), 'least=0'),
        (lambda: hits(throats, throats.with_planes(mask=None)), 'has none'),
    ):
        with pytest.raises(ValueError, match=text) as e:
            call()
        assert one_line(e)


def test_a_sheet_has_a_row_for_each_query(throats):
    b = throats.batch(range(6))
    pixels = sheet(b['sketch'][:2], [b['image'][:5], b['image'][1:6]])
    assert pixels.shape[1] >= 800 and 0.3 < pixels.shape[0] / pixels.shape[1] < 0.45


class FakeGraph:
    "Answers as faiss does"

    def __init__(self, d, m):
        self.hnsw, self.codes = types.SimpleNamespace(), None

    def add(self, x):
        self.codes = x

    def search(self, q, k):
        d = ((q[:, None] - self.codes) ** 2).sum(-1)
        which = d.argsort(1)[:, :k]
        return np.take_along_axis(d, which, 1), which


@pytest.mark.parametrize('real', [False, True])
def test_large_sets_are_searched_with_faiss(real, monkeypatch):
    if real:
        pytest.importorskip('faiss')
    else:
        monkeypatch.setitem(sys.modules, 'faiss', types.SimpleNamespace(IndexHNSWFlat=FakeGraph))
    torch.manual_seed(0)
    x = torch.randn(500, 8)
    names = ['a'] * 500
    exact = SketchIndex(FLAT, x, names, names, 32).near(x[:9] + 0.1, 4)
    monkeypatch.setattr(retrieve, 'LARGE', 100)
    graph = SketchIndex(FLAT, x, names, names, 32)
    d, which = graph.near(x[:9] + 0.1, 4)
    assert graph._graph is not None and torch.equal(which, exact[1]) and torch.allclose(d, exact[0], atol=1e-4)


def test_without_faiss_large_sets_are_searched_exactly(monkeypatch):
    monkeypatch.setitem(sys.modules, 'faiss', None)
    monkeypatch.setattr(retrieve, 'LARGE', 10)
    x = torch.randn(50, 8)
    index = SketchIndex(FLAT, x, ['a'] * 50, ['a'] * 50, 32)
    assert index.near(x, 1)[1][:, 0].tolist() == list(range(50)) and index._graph is None


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_set(folder, n=6):
    "Photographs, and drawings of the first two on paper of another size"
    from medsketch.core import to_uint8

    b = add_sketches(phantom_data('pharynx', n, 64), style='pharynx').batch(range(n))
    for i in range(n):
        save_png(folder / f'photos/{i}.png', to_uint8(b['image'][i]))
    for i in range(2):
        save_png(folder / f'drawn/of{i}.png', np.kron(sketch_to_uint8(b['sketch'][i]), np.ones((3, 3), np.uint8)))


def table(folder):
    with open(f'{folder}/found.csv', newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def test_the_command_finds_the_photograph(medsketch, tmp_path):
    write_set(tmp_path)
    save_png(tmp_path / 'drawn/blank.png', np.full((40, 40), 255, np.uint8))
    (tmp_path / 'drawn/bad.png').write_bytes(b'no picture')
    line = 'retrieve edges --data photos --sketches drawn --out found --size 64 --k 2 --style pharynx'
    status, out, err = medsketch(line)
    assert status == 0 and '2 images for each of 2 drawings' in out
    assert err.count('skipped') == 2 and 'no stroke' in err and 'bad.png' in err
    rows = table('found')
    assert [(r['sketch'], r['rank']) for r in rows] == [(f'of{i}.png', str(n)) for i in (0, 1) for n in (1, 2)]
    assert [r['image'] for r in rows if r['rank'] == '1'] == ['0.png', '1.png']
    assert (tmp_path / 'found/found.png').is_file()
    (tmp_path / 'photos').rename(tmp_path / 'elsewhere')
    status, out, err = medsketch(
        'retrieve found/index.safetensors --data elsewhere --sketches drawn/of1.png --out b --k 1'
    )
    assert status == 0 and [r['image'] for r in table('b')] == ['1.png']
    assert not (tmp_path / 'b/index.safetensors').exists()


def test_the_command_with_a_run(medsketch, tmp_path, recipe):
    write_set(tmp_path)
    recipe.save('run.safetensors')
    Sketch2MedI(**TINY, seed=1).save('other.safetensors')
    rest = '--data photos --sketches drawn --k 1'
    assert medsketch(f'retrieve run.safetensors {rest} --out a')[0] == 0
    assert medsketch(f'retrieve a/index.safetensors --model run.safetensors {rest} --out b')[0] == 0
    assert table('a') == table('b')
    for wrong, text in (
        (f'a/index.safetensors {rest} --out c', 'name its run with --model'),
        (f'a/index.safetensors --model other.safetensors {rest} --out c', 'was made by'),
        (f'run.safetensors --model run.safetensors {rest} --out c', '--model goes with an index'),
        (f'run.safetensors {rest} --out a', 'is there already'),
        (f'run.safetensors {rest} --out photos/c', 'lies inside'),
        ('run.safetensors --data photos --sketches drawn --out c --k 7', '--k 7: there are 6'),
        ('run.safetensors --data photos --sketches drawn --out c --k 101', '100 at most'),
        ('run.safetensors --data photos --sketches none --out c', 'no sketches in none'),
        ('run.safetensors --data none --sketches drawn --out c', 'none'),
        (f'edges {rest} --out c --size 100', 'power of two'),
        (f'edges {rest} --out c --style van-gogh', 'van-gogh'),
        ('a/index.safetensors --model run.safetensors --data drawn --sketches drawn --out c --k 1', 'folder that was'),
    ):
        status, _, err = medsketch(f'retrieve {wrong}')
        assert status == 1 and err.count('\n') == 1 and text in err, (wrong, err)
        assert not (tmp_path / 'c').exists()
