"Phantoms: seeded, sized, and anatomically what they say they are."

from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch

from medsketch.phantoms import PHANTOMS, phantom, shrink_mask
from medsketch.phantoms.brain_mri import draw_brain_mri
from medsketch.phantoms.fundus import fundus_anatomy, fundus_vessels
from medsketch.phantoms.scanner import make_probe, scan, speckle

KINDS = list(PHANTOMS)
SEEDS = range(6)


def ids(kind):
    return {name: i for i, name in enumerate(PHANTOMS[kind].classes)}


def draw(kind, seed, size=256):
    s = phantom(kind, size, seed)
    return s['image'].numpy(), s['mask'].numpy(), ids(kind)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', [4, 32, 128, 256, 512])
def test_contract(kind, size):
    s = phantom(kind, size, seed=3)
    spec = PHANTOMS[kind]
    assert s['image'].shape == (spec.channels, size, size) and s['image'].dtype == torch.float32
    assert s['mask'].shape == (size, size) and s['mask'].dtype == torch.int64
    assert s['image'].min() >= -1 and s['image'].max() <= 1 and torch.isfinite(s['image']).all()
    assert s['mask'].min() >= 0 and s['mask'].max() < len(spec.classes)
    assert s['image'].std() > 0.1
    assert spec.classes[0] == 'background' and len(spec.colours) == len(spec.classes)
    assert len(np.unique(spec.colours, axis=0)) == len(spec.classes)


@pytest.mark.parametrize('kind', KINDS)
def test_largest_size(kind):
    s = phantom(kind, 1024, seed=0)
    assert s['image'].shape[-2:] == s['mask'].shape == (1024, 1024)


@pytest.mark.parametrize('kind', KINDS)
def test_same_seed_same_bits(kind):
    a = phantom(kind, 64, seed=5)
    np.random.seed(1)
    torch.manual_seed(1)
    phantom(kind, 128, seed=6)
    b = phantom(kind, 64, seed=5)
    assert torch.equal(a['image'], b['image']) and torch.equal(a['mask'], b['mask'])


@pytest.mark.parametrize('kind', KINDS)
def test_one_core_or_many_same_bits(kind):
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        a = phantom(kind, 128, seed=2)
        cv2.setNumThreads(4)
        b = phantom(kind, 128, seed=2)
    finally:
        cv2.setNumThreads(threads)
    assert torch.equal(a['image'], b['image']) and torch.equal(a['mask'], b['mask'])


@pytest.mark.parametrize('kind', KINDS)
def test_leaves_global_generators_alone(kind):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    phantom(kind, 32, seed=9)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize('kind', KINDS)
def test_same_anatomy_at_every_size(kind):
    at = {size: phantom(kind, size, seed=7) for size in (64, 256, 1024)}

    def shrink(s):
        return torch.nn.functional.interpolate(s['image'][None], 64, mode='area')[0]

    other = phantom(kind, 64, seed=8)['image']
    same = max((shrink(at[size]) - at[64]['image']).abs().mean() for size in (256, 1024))
    assert same < 0.03 and same < 0.3 * (other - at[64]['image']).abs().mean()
    large = torch.as_tensor(shrink_mask(at[1024]['mask'].numpy(), 64, len(PHANTOMS[kind].classes)).astype(int))
    assert (large == at[64]['mask']).float().mean() > 0.93


@pytest.mark.parametrize('kind', KINDS)
def test_seeds_differ(kind):
    drawn = [phantom(kind, 64, seed=s) for s in range(8)]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (a['image'] - b['image']).abs().mean() > 0.03
            assert (a['mask'] != b['mask']).float().mean() > 0.02


def test_any_integer_is_a_seed_of_its_own():
    seeds = (5, -5, 2**32 + 5, 2**63 - 5, 2**63 + 5, -(2**63) + 5, 2**64 + 5, 10**40)
    assert len({phantom('fundus', 32, s)['image'].numpy().tobytes() for s in seeds}) == len(seeds)


@pytest.mark.parametrize('kind', KINDS)
def test_most_classes_present_in_a_few(kind):
    found = set().union(*(np.unique(draw(kind, s)[1]) for s in SEEDS))
    assert found == set(range(len(PHANTOMS[kind].classes)))


def test_vessels_reach_the_disc():
    for seed in SEEDS:
        _, mask, k = draw('fundus', seed)
        vessel, disc = mask == k['vessel'], mask == k['disc']
        _, parts = cv2.connectedComponents((vessel | disc).astype(np.uint8), connectivity=8)
        main = np.bincount(parts[disc]).argmax()
        assert ((parts == main) & vessel).sum() > 0.85 * vessel.sum(), seed
        assert 0.05 < vessel.mean() < 0.2


def test_vessels_thin_out_with_order_and_start_at_the_disc():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        eye = fundus_anatomy(rng)
        tree, _vein = fundus_vessels(rng, eye)
        shown = tree.width[:, 0] > 0
        width = [tree.width[shown & (tree.order == o)].mean() for o in range(4)]
        assert all(a > 1.1 * b for a, b in pairwise(width)), width
        trunk = tree.order == 0
        assert np.linalg.norm(tree.points[trunk, 0] - eye['disc'], axis=1).max() < eye['radius']
        assert tree.width[trunk][:8][1::2].mean() > tree.width[trunk][:8][::2].mean()  # veins are wider than arteries


def test_arcades_arch_above_and_below_the_macula():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        eye = fundus_anatomy(rng)
        tree, _ = fundus_vessels(rng, eye)
        up, down = tree.points[:2, :, 1], tree.points[4:6, :, 1]
        assert (up.min(1) < eye['fovea'][1] - 0.3 * eye['unit']).all()
        assert (down.max(1) > eye['fovea'][1] + 0.3 * eye['unit']).all()


def test_fovea_dark_disc_bright():
    for seed in SEEDS:
        image, mask, k = draw('fundus', seed)
        green = image[1]
        assert green[mask == k['disc']].mean() > green[(mask == 0) & (image[0] > -0.6)].mean() + 0.2
        ys, xs = np.nonzero(mask == k['macula'])
        y, x = int(ys.mean()), int(xs.mean())
        ring = np.hypot(*(np.mgrid[:256, :256] - np.array([y, x])[:, None, None]))
        clean = (mask == 0) | (mask == k['macula'])
        assert green[(ring < 5) & clean].mean() < green[(ring > 26) & (ring < 32) & clean].mean()


@pytest.mark.parametrize('kind', ['chest_xray', 'lung_ct'])
def test_two_lungs(kind):
    for seed in SEEDS:
        image, mask, k = draw(kind, seed)
        middle = np.nonzero(mask == k['spine' if kind == 'chest_xray' else 'vertebra'])[1].mean()
        xs = np.nonzero(mask == k['lung'])[1]
        assert 0.3 < (xs < middle).mean() < 0.7
        assert image[0][mask == k['lung']].mean() < image[0][mask == k['body']].mean() - 0.2


def test_heart_leans_left_and_lies_between_the_lungs():
    for seed in SEEDS:
        _, mask, k = draw('chest_xray', seed)
        x = {name: np.nonzero(mask == i)[1] for name, i in k.items()}
        assert x['lung'].min() < x['heart'].min() < x['spine'].mean() < x['heart'].mean() < x['lung'].max()
        assert 0.35 < (x['rib'] < x['spine'].mean()).mean() < 0.65


def test_ct_order_from_front_to_back():
    for seed in SEEDS:
        _, mask, k = draw('lung_ct', seed)
        y = {name: np.nonzero(mask == k[name])[0].mean() for name in ('mediastinum', 'vertebra')}
        assert y['mediastinum'] < y['vertebra']  # the spine is below: the patient lies on it
        body = cv2.morphologyEx((mask > 0).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
        assert cv2.connectedComponents(body)[0] == 2  # everything lies in one body
        assert (mask == k['vessel']).sum() > 150


def test_mr_contrasts_have_the_right_order():
    for seed in SEEDS:
        image, mask, k = draw('brain_mri', seed)
        deep = cv2.erode((mask == k['ventricle']).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        white, grey, fluid = mask == k['white'], mask == k['grey'], deep if deep.any() else mask == k['csf']
        t1, t1ce, t2, flair = ([image[c][m].mean() for m in (white, grey, fluid)] for c in range(4))
        assert t1[0] > t1[1] > t1[2] and t1ce[0] > t1ce[1] > t1ce[2]
        assert t2[0] < t2[1] < t2[2]
        assert flair[2] < flair[0] < flair[1]
        assert (image[:, mask == 0] == -1).all()  # skull-stripped: nothing but black outside the brain


def test_tumour_parts():
    names = ids('brain_mri')
    oedema, rim, core = (names[n] for n in ('oedema', 'enhancing', 'necrosis'))
    for seed in SEEDS:
        image, mask = draw_brain_mri(np.random.default_rng(seed), 256, tumour=True)
        grown = cv2.dilate((mask == core).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert set(np.unique(mask[grown])) == {rim, core}
        t1, t1ce, t2, flair = image.transpose(2, 0, 1)
        assert t1ce[mask == rim].mean() > t1[mask == rim].mean() + 0.3
        healthy = mask == names['white']
        assert flair[mask == oedema].mean() > flair[healthy].mean() + 0.15
        assert t2[mask == oedema].mean() > t2[healthy].mean() and t1[mask == oedema].mean() < t1[healthy].mean()
        _, healthy_mask = draw_brain_mri(np.random.default_rng(seed), 256, tumour=False)
        assert healthy_mask.max() < oedema


def test_follicles_lie_in_the_ovary_and_are_dark():
    for seed in SEEDS:
        image, mask, k = draw('ultrasound', seed)
        follicle, ovary = mask == k['follicle'], mask == k['ovary']
        shore = cv2.dilate(follicle.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert set(np.unique(mask[shore])) == {k['ovary'], k['follicle']}
        core = cv2.erode(follicle.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        assert image[0][core].mean() < image[0][ovary].mean() - 0.3
        assert 0.03 < follicle.sum() / ovary.sum() < 1
        assert (cv2.connectedComponents(follicle.astype(np.uint8))[0] - 1) in range(1, 9)


def test_nothing_is_seen_outside_the_field():
    for kind in ('ultrasound', 'foetal_head'):
        image, mask, _ = draw(kind, 0)
        dark = (image[0] == -1) & (mask > 0)
        assert (image[0, 0] == -1).all() and (image[0, :, :2] == -1).mean() > 0.3 and dark.mean() < 0.02


def test_fluid_enhances_and_bone_shadows():
    body, left, right = np.full((256, 256), -18.0, np.float32), np.zeros((256, 256)), np.zeros((256, 256))
    cv2.circle(left, (90, 100), 24, 1, -1)
    cv2.circle(right, (165, 100), 8, 1, -1)
    probe = make_probe(np.random.default_rng(0), linear=True)
    loss = 60 - 45 * left + 840 * right
    image = scan(np.random.default_rng(0), body - 42 * left, loss, 0 * left, probe, 256)
    behind = {x: image[150:200, x - 5 : x + 5].mean() for x in (90, 128, 165)}
    assert behind[90] > behind[128] + 0.05 and behind[165] < 0.5 * behind[128]


def test_speckle_is_rayleigh():
    amplitude = np.sqrt(np.concatenate([speckle(np.random.default_rng(s), 0.4) for s in range(12)]))
    assert abs((amplitude**2).mean() - 1) < 0.05
    assert abs(amplitude.mean() / amplitude.std() - 1.913) < 0.08
    near = np.corrcoef(amplitude[:, 1:].ravel(), amplitude[:, :-1].ravel())[0, 1]
    assert near > 0.4  # neighbouring beams share scatterers


def test_skull_is_a_closed_ring():
    for seed in SEEDS:
        image, mask, k = draw('foetal_head', seed, 512)
        inside = np.isin(mask, [k['brain'], k['midline'], k['cavum']])
        assert image[0][mask == k['skull']].mean() > image[0][mask == k['brain']].mean() + 0.3
        rim = (cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0) & ~inside
        assert (mask[rim] == k['skull']).mean() > 0.9  # but where the field cuts it off
        assert (mask == k['cavum']).sum() > 100


def test_small_mask_keeps_thin_structures():
    mask = np.zeros((8, 8), int)
    mask[5] = 1
    mask[:, 3] = 2
    small = shrink_mask(mask, 4, 3)
    assert (small[:, 1] == 2).all() and (small[2, [0, 2, 3]] == 1).all()


def test_errors():
    with pytest.raises(ValueError, match='fundus, chest_xray, lung_ct, brain_mri'):
        phantom('knee')
    with pytest.raises(ValueError, match='nearest is 128'):
        phantom('fundus', 100)
    with pytest.raises(ValueError, match='power of two'):
        phantom('fundus', 2048)
