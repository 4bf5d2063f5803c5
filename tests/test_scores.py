"""Features, distances, paired scores: against stored reference values, on odd input, in bounded memory."""

import math
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medsketch.data import phantom_data
from medsketch.evaluate import features, paired
from medsketch.evaluate.distances import (
    Score,
    bootstrap,
    feature_scores,
    fid,
    fid_score,
    grey_histograms,
    kid,
    kl_divergence,
    orientation_histograms,
    prdc,
    score_table,
    width_histograms,
)
from medsketch.evaluate.features import (
    Extractor,
    FeatureStats,
    feature_stats,
    inception,
    thumbnails,
)
from medsketch.evaluate.moco import (
    KeyEncoder,
    MocoEncoder,
    MocoLoss,
    Views,
    info_nce,
    load_moco,
    save_moco,
    train_moco,
)
from medsketch.evaluate.paired import class_scores, dists, iqa, lpips, segmentation_scores

REFS = Path(__file__).parent / 'refs'


def load(name):
    with np.load(REFS / f'{name}.npz') as f:
        return {k: f[k] for k in f.files}


@pytest.fixture(scope='module')
def ref():
    return load('fidkid')


@pytest.fixture(scope='module')
def pair(ref):
    return torch.from_numpy(ref['f1']), torch.from_numpy(ref['f2'])


def points(n, d=16, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def pictures(n=8, c=3, size=16, seed=0):
    return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- FID -------------------------------------------------------------------------------------


@pytest.mark.parametrize('who', ['torchmetrics', 'pytorch_fid', 'torch_fidelity', 'ada'])
def test_fid_parity(ref, pair, who):
    assert fid(*pair) == pytest.approx(ref[f'fid_{who}'].item(), rel=1e-4)


def test_fid_of_fewer_images_than_dimensions(ref, pair):
    few = [x[:40] for x in pair]
    assert fid(*few) == pytest.approx(ref['fid_40_rank_deficient'].item(), rel=1e-4)
    stats = [FeatureStats().add(x) for x in few]  # streamed: the covariance has no Cholesky factor
    assert fid(*stats) == pytest.approx(ref['fid_40_rank_deficient'].item(), rel=1e-4)
    assert fid(stats[0], few[1]) == pytest.approx(ref['fid_40_rank_deficient'].item(), rel=1e-4)


def test_fid_streamed(ref, pair):
    stats = []
    for x in pair:
        stats.append(FeatureStats('same'))
        for part in x.split(17):
            stats[-1].add(part)
    np.testing.assert_allclose(stats[0].mean, ref['mu1'], rtol=1e-4)
    np.testing.assert_allclose(stats[0].cov.reshape(-1)[:64], ref['cov1_first'], rtol=1e-4, atol=1e-7)
    assert fid(*stats) == pytest.approx(ref['fid_torchmetrics'].item(), rel=1e-4)
    score = fid_score(*stats)
    assert (score.extractor, score.n_real, score.n_fake) == ('same', 400, 400) and 'medsketch' in score.version


@pytest.mark.parametrize('n, d', [(40, 2048), (300, 16)])
def test_fid_of_identical_sets_is_zero(n, d):
    x = points(n, d)
    assert 0 <= fid(x, x) < 1e-5 * x.var(0).sum()
    if d < 100:
        assert fid(FeatureStats().add(x), FeatureStats().add(x)) < 1e-6
    assert fid(x, x.flip(0)) < 1e-5 * x.var(0).sum()


def test_fid_of_constant_features():
    assert fid(torch.ones(5, 3), torch.ones(6, 3)) == 0
    assert fid(torch.ones(5, 3), torch.zeros(6, 3)) == pytest.approx(3)


def test_statistics_keep_their_digits():
    x = points(500, 4).double() + 1e6
    stats = FeatureStats()
    for part in x.split([1, 99, 400]):
        stats.add(part)
    np.testing.assert_allclose(stats.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-6, atol=1e-8)


def test_fid_refusals():
    x = points(10)
    for args, says in (
        ((x[:1], x), 'real has 1 images; at least 2'),
        ((x, x[:, :3]), 'one extractor'),
        ((x.where(x < 1, float('nan')), x), 'NaN'),
        ((x[None], x), r'floats \(N, d\)'),
        ((FeatureStats().add(x[:1]), x), 'at least 2'),
        ((x, FeatureStats()), 'are none'),
    ):
        with pytest.raises(ValueError, match=says):
            fid(*args)
    with pytest.raises(ValueError, match='different extractors'):
        fid(FeatureStats('a').add(x), FeatureStats('b').add(x))
    with pytest.raises(ValueError, match='cannot be labelled'):
        fid_score(FeatureStats().add(x), FeatureStats('b').add(x))


# ---- KID -------------------------------------------------------------------------------------


def test_kid_parity(ref, pair):
    got = kid(*pair, subsets=20, size=200, rng=np.random.RandomState(2020))
    assert got['kid'] == pytest.approx(100 * ref['kid_mean'].item(), rel=1e-4)
    assert got['sd'] == pytest.approx(100 * ref['kid_std'].item(), rel=1e-4)


def test_kid_of_one_subset_and_of_all(ref, pair):
    a, b = pair
    one = kid(a[ref['kid_subset0_i1']], b[ref['kid_subset0_i2']], 1, 200)
    assert one['kid'] == pytest.approx(100 * ref['kid_subset0'].item(), rel=1e-4) and one['sd'] == 0
    assert kid(a, b, 1, 400)['kid'] == pytest.approx(100 * ref['mmd2_unbiased'].item(), rel=1e-4)


def test_kid_in_blocks_is_the_same(monkeypatch, pair):
    from medsketch.evaluate import distances

    whole, inner = kid(*pair, 10, 50), distances._kernel_sums
    monkeypatch.setattr(distances, '_kernel_sums', lambda *a, **k: inner(*a, **k, rows=37))
    assert kid(*pair, 10, 50) == pytest.approx(whole)


def test_kid_is_unbiased_and_says_its_subsets():
    many = [kid(points(30, 4, s), points(30, 4, 1000 + s), 1, 30)['kid'] for s in range(300)]
    assert abs(np.mean(many)) < 3 * np.std(many) / 300**0.5
    assert kid(points(100), points(60))['size'] == 30
    assert kid(points(2500, 2), points(2500, 2), 3)['size'] == 1000
    with pytest.raises(ValueError, match='from 2 to 8'):
        kid(points(10), points(8), size=9)
    with pytest.raises(ValueError, match='at least 4'):
        kid(points(10), points(3))


# ---- precision and its like ------------------------------------------------------------------


def test_precision_and_recall_parity(ref, pair):
    "The reference calls the first set the generated one"
    got = [prdc(*p, k=3) for p in (pair, pair[::-1])]
    want = (ref['prc_precision'].item(), ref['prc_recall'].item())
    assert any((g['precision'], g['recall']) == pytest.approx(want, rel=1e-4) for g in got)


def test_density_and_coverage_by_the_definition():
    x, y, k = points(40, 3), points(30, 3, 1, 0.4), 4
    d = torch.cdist(x.double(), x.double())
    radius = d.sort(1).values[:, k]
    cross = torch.cdist(x.double(), y.double())
    got = prdc(x, y, k)
    assert got['density'] == pytest.approx((cross <= radius[:, None]).sum().item() / (k * 30))
    assert got['coverage'] == pytest.approx((cross.min(1).values <= radius).double().mean().item())
    assert got['precision'] == pytest.approx((cross <= radius[:, None]).any(0).double().mean().item())


def test_prdc_of_equal_far_and_collapsed_sets():
    x = points(60)
    assert [prdc(x, x)[k] for k in ('precision', 'recall', 'coverage')] == [1, 1, 1]
    assert set(prdc(x, x + 1e3).values()) == {0}
    one = prdc(x, x[:1].repeat(60, 1))
    assert one['precision'] == 1 and one['recall'] < 0.05 and one['coverage'] < 0.2
    with pytest.raises(ValueError, match='at least 6'):
        prdc(x, x[:5])
    with pytest.raises(ValueError, match='k is 0'):
        prdc(x, x, k=0)


# ---- histograms ------------------------------------------------------------------------------


def test_kl_by_hand_and_its_cap():
    p, q = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
    assert kl_divergence(p, q, even=0) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)
    assert kl_divergence(p, p) == 0
    apart = kl_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert math.isfinite(apart) and apart <= math.log(2 / 1e-4)


def test_histograms_know_their_images():
    dark, bright = torch.full((2, 3, 16, 16), -0.9), torch.full((2, 3, 16, 16), 0.9)
    assert grey_histograms(dark).argmax(1).tolist() == [3, 3] and grey_histograms(bright).argmax(1).tolist() == [60, 60]
    assert grey_histograms(torch.ones(1, 1, 8, 8))[0, -1] == 1
    stripes = torch.tensor([-1.0, -1, 1, 1]).repeat(8)
    across = orientation_histograms(stripes.expand(1, 1, 32, 32))[0]
    along = orientation_histograms(stripes[:, None].expand(1, 1, 32, 32))[0]
    assert across[0] + across[-1] > 0.99 and along[17:19].sum() > 0.99


def test_widths_see_the_thickness_of_masks():
    thin, thick = torch.zeros(1, 64, 64, dtype=torch.uint8), torch.zeros(1, 64, 64, dtype=torch.uint8)
    thin[0, 30:32], thick[0, 10:50] = 1, 1
    a, b = width_histograms(thin), width_histograms(thick)
    place = torch.arange(16.0).double()
    assert (b * place).sum() > (a * place).sum() + 3
    assert kl_divergence(a, b) > 1 and kl_divergence(b, width_histograms(thick * 3)) == 0


def test_nothing_in_a_histogram():
    empty = torch.zeros(3, 16, 16, dtype=torch.int64)
    full = torch.ones(3, 16, 16, dtype=torch.int64)
    assert width_histograms(empty).sum() == 0
    with pytest.raises(ValueError, match='empty masks'):
        kl_divergence(width_histograms(full), width_histograms(empty))
    mixed = torch.cat([width_histograms(full), width_histograms(empty)])
    assert kl_divergence(width_histograms(full), mixed) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match='no masks'):
        width_histograms(empty[:0])
    with pytest.raises(ValueError, match='integers'):
        width_histograms(empty.float())
    with pytest.raises(ValueError, match='bins'):
        kl_divergence(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match='NaN'):
        kl_divergence(torch.tensor([float('nan'), 1]), torch.ones(2))


# ---- intervals, labels, tables ---------------------------------------------------------------


def test_interval_of_a_mean_is_the_textbook_one():
    x = points(400, 1)
    low, high = bootstrap(lambda v: v.mean().item(), x, resamples=2000)
    assert (low + high) / 2 == pytest.approx(x.mean().item(), abs=0.01)
    assert high - low == pytest.approx(2 * 1.96 * x.std().item() / 20, rel=0.1)
    assert bootstrap(lambda v: v.mean().item(), x, seed=1) == bootstrap(lambda v: v.mean().item(), x, seed=1)
    with pytest.raises(ValueError, match='at least 4'):
        bootstrap(lambda v: 0.0, x[:3])


def test_scores_name_what_they_are():
    small = thumbnails(2)
    scores = feature_scores(pictures(20), pictures(24, seed=1), small, resamples=20)
    assert [s.name.split(' (')[0] for s in scores] == ['FID', 'KID × 100', 'precision', 'recall', 'density', 'coverage']
    for s in scores:
        assert (s.extractor, s.n_real, s.n_fake) == (
            f"{small.name} on {pictures(1).shape[-1]} px",
            20,
            24,
        ) and s.low <= s.value <= s.high
        assert 'medsketch' in s.version and small.name in str(s) and '20 real' in str(s)
    assert 'subsets of 10' in scores[1].note and scores[1].sd > 0
    assert all(0 <= s.low and s.high <= 1 for s in scores if s.name.startswith(('precision', 'recall', 'coverage')))
    bare = feature_scores(pictures(20), pictures(24, seed=1), small, resamples=0)
    assert (
        [s.value for s in bare] == pytest.approx([s.value for s in scores])
        and math.isnan(bare[0].low)
        and '[' not in bare[0].text
    )
    with pytest.raises(ValueError, match='fake has 10 images; at least 12'):
        feature_scores(pictures(20), pictures(10), small)


def test_scores_of_identical_sets():
    x = pictures(16)
    got = {s.name: s.value for s in feature_scores(x, x, thumbnails(2), resamples=0)}
    assert got['FID'] < 1e-4 and got['precision (k = 5)'] == got['coverage (k = 5)'] == 1


def test_a_table_never_mixes_extractors_or_versions():
    score = lambda **k: Score(**({'value': 1.0, 'name': 'FID', 'extractor': 'A 1.0', 'n_real': 9, 'n_fake': 9} | k))
    text = score_table({'one': [score(), score(name='KID')], 'two': [score(value=2.5)]})
    assert (
        'A 1.0' in text
        and '9 real, 9 synthetic' in text
        and '2.5' in text
        and text.splitlines()[0].split() == ['FID', 'KID']
    )
    for odd in ({'extractor': 'B'}, {'extractor': 'A 1.1'}, {'version': 'medsketch 0.0.0'}):
        with pytest.raises(ValueError, match='do not belong in one column'):
            score_table({'one': [score()], 'two': [score(**odd)]})
    assert '(n = 9, 8)' in score_table({'one': [score()], 'two': [score(n_fake=8)]})  # legal, and visible


# ---- features --------------------------------------------------------------------------------


def test_any_source_gives_the_same_features():
    data = phantom_data('fundus', 10, 32)
    x, small = data.batch(range(10))['image'], thumbnails(4, chunk=3)
    for source in (data, [x[:7], x[7:]], [{'image': x}], (part for part in x.split(4))):
        assert torch.equal(small(source), small(x))
    assert small(x).shape == (10, 48) and small(x).dtype == torch.float32


def test_images_are_let_go_of():
    alive = [0, 0]  # now, at most

    def gone():
        alive[0] -= 1

    def stream():
        for s in range(40):
            x = pictures(4, seed=s)
            weakref.finalize(x, gone)
            alive[0] += 1
            alive[1] = max(alive)
            yield x
            del x

    stats = feature_stats(thumbnails(2), stream())
    assert stats.n == 160 and alive[1] <= 3 and stats.cov.shape == (12, 12)


def test_refusals_of_images():
    x, small = pictures(), thumbnails(2)
    for bad, says in (
        ([x, x[..., :8, :8]], 'one set holds'),
        ([x, x[:, :1]], 'number of channels'),
        (x * 200, 'run from -1 to 1'),
        ([], 'no images'),
        (x.where(x < 0.9, float('nan')), 'NaN'),
        (x[:0], 'at least 1'),
    ):
        with pytest.raises(ValueError, match=says):
            small(bad)
    with pytest.raises(ValueError, match='not finite'):
        Extractor(lambda v: v.flatten(1) / 0, 'broken', device='cpu')(x)
    with pytest.raises(ValueError, match='needs a name'):
        Extractor(nn.Identity(), '')


def test_networks_are_put_into_evaluation_mode():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 16 * 16), nn.Dropout())
    e = Extractor(net, 'bn', device='cpu')
    x = pictures()
    assert torch.equal(e(x)[:2], e(x[:2]))


FAKE_FIDELITY = '''
import torch
URL_INCEPTION_V3 = 'http://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth'
class FeatureExtractorInceptionV3(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ['2048']
        self.scale = torch.nn.Parameter(torch.load(feature_extractor_weights_path)['scale'])
    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return (x.float().mean((2, 3)) * self.scale,)
'''


@pytest.fixture
def fidelity(tmp_path, monkeypatch):
    "A stand-in for torch-fidelity: its interface, another network"
    package, info = tmp_path / 'torch_fidelity', tmp_path / 'torch_fidelity-9.8.dist-info'
    package.mkdir(), info.mkdir()
    (package / '__init__.py').write_text('')
    (package / 'feature_extractor_inceptionv3.py').write_text(FAKE_FIDELITY)
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: torch-fidelity\nVersion: 9.8\n')
    for name in ('torch_fidelity', 'torch_fidelity.feature_extractor_inceptionv3'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    yield tmp_path
    for name in ('torch_fidelity', 'torch_fidelity.feature_extractor_inceptionv3'):
        sys.modules.pop(name, None)


def test_inception_gets_8_bit_rgb_and_a_full_name(fidelity, monkeypatch):
    weights = fidelity / 'own.pth'
    torch.save({'scale': torch.tensor(2.0)}, weights)
    e = inception(weights, device='cpu', chunk=2)
    assert 'torch-fidelity 9.8' in e.name and 'own weights' in e.name
    grey = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 1, 8, 8)
    assert e(grey).tolist() == [[0.0] * 3, [256.0] * 3, [510.0] * 3]  # 2 x the pixel; 127.5 rounds to 128
    with pytest.raises(ValueError, match='4 channels'):
        e(pictures(2, 4))
    monkeypatch.setattr(features, 'INCEPTION_HASH', e.name.split('weights ')[1][:8])
    assert inception(weights, device='cpu').name.startswith('inception-v3 FID (torch-fidelity 9.8)')


def test_inception_offline_says_what_to_fetch_and_where_to_put_it(fidelity):
    with pytest.raises(RuntimeError, match='could not be downloaded') as e:
        inception()
    where = fidelity / 'hub/checkpoints/weights-inception-2015-12-05-6726825d.pth'
    assert (
        'fetch http' in str(e.value)
        and str(where) in str(e.value)
        and 'train_moco' in str(e.value)
        and '\n' not in str(e.value)
    )
    torch.save({'scale': torch.tensor(1.0)}, where)  # done as told
    assert inception(device='cpu')(pictures(2)).shape == (2, 3)
    with pytest.raises(RuntimeError, match='nowhere.pth does not exist: fetch http'):
        inception('nowhere.pth')
    where.write_bytes(b'half a file')
    with pytest.raises(RuntimeError, match='is not the Inception'):
        inception()


def test_inception_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    with pytest.raises(ImportError, match=r"pip install 'medsketch\[iqa\]'"):
        inception()


# ---- MoCo ------------------------------------------------------------------------------------


def test_info_nce_is_a_cross_entropy():
    q, k, queue = (F.normalize(points(n, 8, s), dim=1) for n, s in ((5, 0), (5, 1), (7, 2)))
    want = 0.0
    for a, b in zip(q.tolist(), k.tolist()):
        dot = lambda u, v: sum(x * y for x, y in zip(u, v)) / 0.1
        right = math.exp(dot(a, b))
        want += -math.log(right / (right + sum(math.exp(dot(a, w)) for w in queue.tolist()))) / 5
    assert info_nce(q, k, queue, 0.1).item() == pytest.approx(want, rel=1e-5)
    same = torch.ones(1, 1).expand(3, 1)
    assert info_nce(same, same, torch.ones(6, 1)).item() == pytest.approx(math.log(7), rel=1e-6)  # guessing


def test_queue_keeps_the_newest():
    K = KeyEncoder(MocoEncoder(1, 18, 0.125, dim=4), queue=5)
    for i in range(4):
        K.push(torch.full((2, 4), float(i)))
    assert sorted(K.queue[:, 0].tolist()) == [1, 2, 2, 3, 3]


def test_the_queue_is_fed_by_the_key_network():
    torch.manual_seed(0)
    E = MocoEncoder(1, 18, 0.125, dim=4)
    nets = SimpleNamespace(E=E, K=KeyEncoder(E, queue=6))
    with torch.no_grad():
        for p in nets.K.encoder.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    x = pictures(3, 1, 32)
    MocoLoss(lambda x: x)(nets, {'image': x}).backward()
    with torch.no_grad():
        keys, queries = nets.K.encoder(x), E(x)
    assert (keys - queries).abs().max() > 0.01 and torch.allclose(nets.K.queue[:3], keys, atol=1e-5)
    assert all(p.grad is None for p in nets.K.parameters()) and any(p.grad is not None for p in E.parameters())


def test_views_stay_images_and_mirror_only_if_asked():
    x = pictures(64, 1, 32) * 0.8
    torch.manual_seed(0)
    v = Views()(x)
    assert v.shape == x.shape and v.abs().max() <= 1 and v.isfinite().all()
    left = torch.ones(64, 1, 32, 32)
    left[..., 16:] = -1
    side = lambda v: v[..., :8].mean((1, 2, 3)) - v[..., 24:].mean((1, 2, 3))
    assert (side(Views(least=0.9)(left)) > 0).all()
    mirrored = (side(Views(least=0.9, flip=True)(left)) < 0).float().mean()
    assert 0.2 < mirrored < 0.8


def test_training_resumes_exactly_and_loads_under_its_name(tmp_path):
    data = phantom_data('brain_mri', 8, 32)
    small = {'batch_size': 4, 'width': 0.125, 'progress': False}
    straight = train_moco(data, None, 2, **small)
    train_moco(data, tmp_path, 1, **small)
    resumed = train_moco(data, tmp_path, 2, **small)
    assert resumed.name == straight.name and data.fingerprint() in straight.name and 'medsketch' in straight.name
    x = data.batch(range(5))['image']
    loaded = load_moco(tmp_path, device='cpu')
    assert loaded.name == straight.name and torch.allclose(loaded(x), straight(x).cpu(), atol=1e-5)
    assert loaded(F.interpolate(x, 64)).shape == loaded(x).shape == (5, 64)
    assert train_moco(data, None, 1, seed=1, **small).name != straight.name
    with pytest.raises(ValueError, match='channels, not'):
        loaded(x.repeat(1, 2, 1, 1))


def test_moco_refusals(tmp_path):
    with pytest.raises(ValueError, match='at least 8'):
        train_moco(phantom_data('fundus', 5, 32), progress=False)
    with pytest.raises(ValueError, match='no ResNet-101'):
        MocoEncoder(3, 101)
    with pytest.raises(ValueError, match='cannot be saved'):
        save_moco(thumbnails(), tmp_path / 'x.safetensors')
    for path in (tmp_path, tmp_path / 'none.safetensors'):
        with pytest.raises(ValueError, match='holds no features'):
            load_moco(path)


# ---- segmentations ---------------------------------------------------------------------------


def test_segmentation_scores_by_counting():
    g = torch.Generator().manual_seed(0)
    prob, mask, field = (
        torch.rand(3, 16, 16, generator=g),
        torch.randint(2, (3, 16, 16), generator=g),
        torch.rand(3, 16, 16, generator=g) > 0.3,
    )
    got = segmentation_scores(prob, mask, field)
    for i in range(3):
        p, t = prob[i][field[i]].numpy(), mask[i][field[i]].numpy().astype(bool)
        on = p > 0.5
        tp, fp, fn, tn = (on & t).sum(), (on & ~t).sum(), (~on & t).sum(), (~on & ~t).sum()
        auc = (p[t][:, None] > p[~t][None]).mean()
        want = {
            'sensitivity': tp / (tp + fn),
            'specificity': tn / (tn + fp),
            'accuracy': (tp + tn) / len(t),
            'precision': tp / (tp + fp),
            'f1': 2 * tp / (2 * tp + fp + fn),
            'dice': 2 * tp / (2 * tp + fp + fn),
            'iou': tp / (tp + fp + fn),
            'auc': auc,
        }
        assert {k: v[i].item() for k, v in got.items()} == pytest.approx(want, rel=1e-4)


def test_pooled_scores_are_those_of_one_large_image():
    g = torch.Generator().manual_seed(1)
    prob, mask = torch.rand(4, 8, 8, generator=g), torch.randint(2, (4, 8, 8), generator=g)
    pooled = segmentation_scores(prob[:, None], mask, pooled=True)
    large = segmentation_scores(prob.reshape(1, 32, 8), mask.reshape(1, 32, 8))
    assert all(pooled[k].tolist() == pytest.approx(large[k].tolist()) for k in large)


def test_outside_the_field_nothing_counts():
    prob, mask, field = torch.rand(1, 8, 8), torch.randint(2, (1, 8, 8)), torch.zeros(1, 8, 8)
    mask[0, 0, :2] = torch.tensor([0, 1])
    field[:, :4] = 255
    other = prob.clone()
    other[:, 4:] = 1 - other[:, 4:]
    a, b = (segmentation_scores(p, mask, field) for p in (prob, other))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_empty_and_full_masks_have_defined_scores():
    zero, one = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    got = segmentation_scores(torch.cat([zero, one, zero, one]), torch.cat([zero, zero, one, one]).long())
    assert got['dice'].tolist() == [1, 0, 0, 1] == got['iou'].tolist() and got['accuracy'].tolist() == [1, 0, 0, 1]
    assert got['sensitivity'].isnan().tolist() == [True, True, False, False] and got[
        'specificity'
    ].isnan().tolist() == [False, False, True, True]
    assert got['auc'].isnan().all() and got['precision'].isnan().tolist() == [True, False, True, False]


def test_segmentation_refusals():
    p, t = torch.rand(2, 4, 4), torch.randint(2, (2, 4, 4))
    for args, says in (
        ((p * 9, t), 'from 0 to 1'),
        ((p, t * 2 + 1), '0 and 1'),
        ((p, t.float()), '0 and 1'),
        ((p, t[:1]), r'mask is \(1'),
        ((p[:0], t[:0]), 'no segm'),
        ((p * float('nan'), t), 'NaN'),
        ((p, t, t * 0), 'field of view of an image is empty'),
        ((p, t, t[:1]), 'field is'),
        ((p[0], t[0]), 'pass probabilities'),
    ):
        with pytest.raises(ValueError, match=says):
            segmentation_scores(*args)


def test_class_scores():
    pred, mask = torch.tensor([[[0, 0, 1, 2]], [[0, 0, 0, 0]]]), torch.tensor([[[0, 1, 1, 1]], [[0, 0, 0, 0]]])
    got = class_scores(pred, mask, 3)
    np.testing.assert_allclose(got['dice'], [[2 / 3, 0.5, 0], [1, np.nan, np.nan]], rtol=1e-6)
    np.testing.assert_allclose(got['iou'], [[0.5, 1 / 3, 0], [1, np.nan, np.nan]], rtol=1e-6)
    with pytest.raises(ValueError, match='class 2'):
        class_scores(pred, mask, 2)
    with pytest.raises(ValueError, match='both must be'):
        class_scores(pred, mask[:1], 3)


# ---- LPIPS and DISTS: the libraries' heads on stored feature maps --------------------------------


def test_lpips_parity(monkeypatch):
    from torchmetrics.functional.image import lpips as module

    ref = load('lpips')
    maps = iter([[torch.from_numpy(ref[f'{s}{i}']) for i in range(5)] for s in 'xy'])

    class Backbone(nn.Module):
        def __init__(self, **_):
            super().__init__()

        def forward(self, x):
            assert x.shape == (2, 3, 64, 64)  # grey was made RGB
            return next(maps)

    monkeypatch.setattr(module, 'Alexnet', Backbone)
    got = lpips(pictures(2, 1, 64), pictures(2, 1, 64, 1))
    np.testing.assert_allclose(got, ref['lpips_alex'], rtol=1e-4)


def test_dists_parity(monkeypatch):
    from torchmetrics.functional.image import dists as module

    ref = load('dists')
    fake_vgg = lambda weights: SimpleNamespace(features=nn.Sequential(*[nn.Identity() for _ in range(31)]))
    for name, value in {
        '_TORCHVISION_AVAILABLE': True,
        'vgg16': fake_vgg,
        'VGG16_Weights': SimpleNamespace(DEFAULT=None),
    }.items():
        monkeypatch.setattr(module, name, value, raising=False)
    seen = []

    def maps(self, x):
        seen.append(x)
        return [torch.from_numpy(ref[f'dists_{"xy"[len(seen) - 1]}{i}']) for i in range(6)]

    monkeypatch.setattr(module.DISTSNetwork, 'forward_once', maps)
    got = dists(pictures(2, 3, 16), pictures(2, 3, 16, 1))
    np.testing.assert_allclose(got, ref['dists'], rtol=1e-4)
    assert min(s.min() for s in seen) >= 0 and max(s.max() for s in seen) <= 1  # DISTS takes 0 ... 1
    pool = module.L2pooling(channels=4)
    np.testing.assert_allclose(pool(torch.from_numpy(ref['l2pool_in'])), ref['l2pool_out'], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('score', [lpips, dists])
def test_perceptual_scores_say_what_is_missing(score, monkeypatch):
    x = pictures(2, 3, 32)
    with pytest.raises(ValueError, match='one to one'):
        score(x, x[:1])
    with pytest.raises(ValueError, match='one size'):
        score(x, x[..., :16, :16])
    from torchmetrics.functional.image import dists as d
    from torchmetrics.functional.image import lpips as a

    for m in (a, d):
        monkeypatch.setattr(m, '_TORCHVISION_AVAILABLE', False)
    with pytest.raises(ImportError, match=r'medsketch\[iqa\]'):
        score(x, x)


def test_scores_of_pyiqa(monkeypatch):
    "Images go in as RGB in [0, 1], with their partners only where they have any"

    class Metric(nn.Linear):
        def forward(self, *images):
            assert all(x.shape[1] == 3 and x.min() >= 0 and x.max() <= 1 for x in images)
            return torch.stack([x.mean((1, 2, 3)) for x in images]).sum(0)[:, None] * 10 ** len(images)

    asked = []
    make = lambda name: asked.append(name) or Metric(1, 1)
    monkeypatch.setitem(sys.modules, 'pyiqa', SimpleNamespace(create_metric=make))
    x = torch.linspace(-1, 1, 10)[:, None, None, None].expand(10, 1, 8, 8)
    torch.testing.assert_close(iqa('TReS', x, chunk=4), (x[:, 0, 0, 0] + 1) * 5)
    torch.testing.assert_close(iqa('ST-LPIPS', x, -x), torch.full([10], 100.0))
    assert asked == ['tres', 'stlpips']
    with pytest.raises(ValueError, match="no score called 'tres'.*TReS"):
        iqa('tres', x)
    with pytest.raises(ValueError, match='one to one'):
        iqa('ST-LPIPS', x, x[:1])
    monkeypatch.setitem(sys.modules, 'pyiqa', None)
    with pytest.raises(ImportError, match=r'TReS needs.*medsketch\[iqa\]'):
        iqa('TReS', x)


def test_a_network_that_cannot_be_downloaded():
    def offline():
        raise OSError('<urlopen error no route>')

    with pytest.raises(RuntimeError, match='no route.*checkpoints'):
        paired._backbone(offline, 'LPIPS')
