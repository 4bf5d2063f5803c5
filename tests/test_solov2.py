"SOLOv2: parity with the reference's matrix NMS, points NMS and Dice loss; grid cells; learning."

import pytest
import torch
from references import arrays, close

from medsketch.models.solov2 import (
    MaskFeatures,
    Pyramid,
    SOLOv2,
    dice_loss,
    find_objects,
    focal_loss,
    matrix_nms,
    peaks,
    responsible,
    solo_loss,
    with_coordinates,
)


def test_matrix_nms_is_the_reference():
    z = arrays('solo')
    for kernel in ('gaussian', 'linear'):
        close(matrix_nms(z['masks'], z['labels'], z['scores'], kernel), z[f'nms_{kernel}'], 1e-6)


def test_points_nms_is_the_reference():
    z = arrays('solo')
    close(peaks(z['heat']), z['heat_nms'], 1e-12)


def test_dice_loss_is_the_reference():
    z = arrays('solo')
    close(dice_loss(z['dice_p'], z['dice_t']), z['dice'], 1e-6)


def square(side, *boxes):
    masks = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for m, (y, x, h, w) in zip(masks, boxes):
        m[y : y + h, x : x + w] = True
    return masks


def test_large_objects_are_for_coarse_grids_small_ones_for_fine_grids():
    grids = (16, 12, 8, 6, 4)
    large, small = square(64, (2, 2, 60, 60)), square(64, (30, 30, 4, 4))
    used = lambda masks: [i for i, cells in enumerate(responsible(masks, grids)) if cells]
    assert used(large) == [3, 4] and used(small) == [0, 1]


def test_where_two_objects_want_a_cell_the_smaller_one_has_it():
    masks = square(64, (12, 12, 40, 40), (20, 20, 24, 24))
    cells = responsible(masks, (8, 8, 8, 8, 8))
    assert set(cells[2].values()) == {1} and set(cells[3].values()) >= {1}


def test_the_loss_falls_only_towards_the_truth():
    "Scores and masks that say what is there cost less than those that say something else"
    torch.manual_seed(0)
    masks, classes = square(32, (4, 4, 10, 10)), torch.tensor([2])
    (row, column) = next(iter(responsible(masks, (8, 8, 8, 8, 8))[2]))
    features = torch.where(masks[0], 10.0, -10.0)[None, None]
    scores = lambda k: [torch.full((1, 3, 8, 8), -6.0).index_fill(1, torch.tensor([k]), -6.0) for _ in range(5)]

    def cost(cell, klass, sign):
        s = scores(0)
        for level in s:
            level[0, klass, cell[0], cell[1]] = 6
        f = [sign * torch.ones(1, 1, 8, 8)] * 5
        return sum(v.item() for v in solo_loss((s, f, features), [(masks, classes)]).values())

    right = cost((row, column), 1, 1)
    assert right < cost((row, column), 0, 1) and right < cost((7, 7), 1, 1) and right + 2 < cost((row, column), 1, -1)


def test_it_learns_two_objects_of_one_class_apart():
    "Overfits four pictures with two discs of one class and a bar of another"
    torch.manual_seed(0)
    masks = [square(32, (6, 2 + i, 10, 8), (6, 20, 10, 8 + i), (24, 4, 5, 24)) for i in range(3)]
    classes = torch.tensor([1, 1, 2])
    colour = torch.tensor([[1.0, -1, -1], [1, -1, -1], [-1, 1, -1]])
    images = torch.stack([(m[:, None] * colour[:, :, None, None]).sum(0) for m in masks])
    net = SOLOv2(3, 2, resnet=18, width=0.125, grids=(10, 8, 6, 4, 3), stem=1, depth=1)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        loss = sum(solo_loss(net(images), [(m, classes) for m in masks]).values())
        opt.zero_grad()
        loss.backward()
        opt.step()
    for found, wanted in zip(find_objects(net.eval(), images), masks):
        assert sorted(found['classes'].tolist()) == [1, 1, 2]
        for m in wanted:
            ious = [(m & f).sum() / (m | f).sum() for f in found['masks']]
            assert max(ious) > 0.7


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match='ResNet-7'):
        SOLOv2(3, 2, resnet=7)
    with pytest.raises(ValueError, match='gaussian'):
        matrix_nms(torch.ones(1, 2, 2).bool(), torch.ones(1), torch.ones(1), 'none')


# ---- the parts, by hand ------------------------------------------------------------------------------


def test_focal_loss_by_hand():
    x, t = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1, 0, 1])
    p = x.sigmoid()
    ce = torch.stack([-p[0].log(), -(1 - p[1]).log(), -p[2].log()])
    want = (torch.tensor([0.25, 0.75, 0.25]) * torch.stack([1 - p[0], p[1], 1 - p[2]]) ** 2 * ce).sum()
    assert torch.allclose(focal_loss(x, t), want)


def test_coordinates_are_x_then_y():
    y = with_coordinates(torch.zeros(2, 1, 3, 5))
    assert torch.equal(y[0, 1, 0], torch.linspace(-1, 1, 5)) and torch.equal(y[1, 2, :, 0], torch.linspace(-1, 1, 3))
    assert (y[:, 1].std(1) == 0).all() and with_coordinates(torch.zeros(1, 1, 1, 1))[0, 1:].abs().sum() == 0


def test_every_level_of_the_pyramid_knows_the_coarser_ones():
    torch.manual_seed(0)
    net = Pyramid([3, 4, 5], 8)
    stages = [torch.rand(1, c, s, s, requires_grad=True) for c, s in ((3, 8), (4, 4), (5, 2))]
    levels = net(stages)
    assert [v.shape[-1] for v in levels] == [8, 4, 2, 1]
    for i, level in enumerate(levels[:3]):
        found = torch.autograd.grad(level.sum(), stages, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.abs().sum() > 0) for g in found] == [j >= i for j in range(3)]


def test_mask_features_read_four_levels():
    torch.manual_seed(0)
    net = MaskFeatures(8, 8, 8)
    levels = [torch.rand(1, 8, s, s) for s in (16, 8, 4, 2, 1)]
    base = net(levels)
    assert base.shape == (1, 8, 16, 16)
    for i in range(5):
        other = net([v + (k == i) * torch.randn_like(v) for k, v in enumerate(levels)])
        assert torch.equal(other, base) == (i == 4)


def test_an_object_between_two_sizes_has_cells_of_both_grids_and_no_others():
    grids = (16, 12, 8, 6, 4)
    used = lambda side: [i for i, c in enumerate(responsible(square(100, (20, 20, side, side)), grids)) if c]
    assert [used(s) for s in (5, 10, 20, 40, 80)] == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]
    assert responsible(square(100, (0, 0, 0, 0)), grids) == [{}] * 5


def test_the_middle_of_an_object_says_which_cell_it_is():
    "An object whose pixels' mean lies just beyond a border between cells"
    cells = responsible(square(64, (14, 14, 20, 20)), (8, 8, 8, 8, 8))
    assert (3, 3) in cells[2] and (2, 2) in cells[2] and (5, 5) not in cells[2]
    exact = responsible(square(64, (31, 31, 2, 2)), (64,) * 5)  # the mean of pixels 31 and 32 is the border at 32
    assert set(exact[0]) == {(i, j) for i in (31, 32) for j in (31, 32)}


def fake_out(side=8, at=(3, 3), klass=1):
    "Scores of one cell, whose filter cuts a square out of the features"
    scores = [torch.full((1, 3, side, side), -9.0) for _ in range(5)]
    filters = [torch.zeros(1, 1, side, side) for _ in range(5)]
    scores[2][0, klass, at[0], at[1]], filters[2][0, 0, at[0], at[1]] = 2.0, 1.0
    features = torch.full((1, 1, 16, 16), -3.0)
    features[..., 4:10, 4:10] = 3
    return scores, filters, features


def test_the_losses_are_weighted_and_counted():
    scores, filters, features = fake_out()
    masks = square(16, (4, 4, 6, 6))
    cells = {(i, j) for level in responsible(masks, (8,) * 5) for i, j in level}
    assert (3, 3) in cells
    one = solo_loss((scores, filters, features), [(masks, torch.tensor([2]))], weight=1.0)
    three = solo_loss((scores, filters, features), [(masks, torch.tensor([2]))])
    assert torch.isclose(three['mask'], 3 * one['mask']) and torch.equal(three['score'], one['score'])
    targets = [torch.zeros_like(s) for s in scores]
    for t, level in zip(targets, responsible(masks, (8,) * 5)):
        for i, j in level:
            t[0, 1, i, j] = 1
    want = sum(focal_loss(s, t) for s, t in zip(scores, targets)) / (sum(t.sum() for t in targets) + 1)
    assert torch.isclose(three['score'], want)
    nothing = solo_loss((scores, filters, features), [(masks[:0], torch.zeros(0, dtype=torch.long))])
    assert nothing['mask'] == 0 and nothing['score'] > 0


def test_a_mask_is_wanted_where_it_covers_more_than_half_of_a_pixel():
    "At half the size, a border that covers a quarter of its pixels is outside"
    scores, filters, features = fake_out()
    exact, wider = square(32, (8, 8, 12, 12)), square(32, (7, 7, 13, 13))
    cost = lambda m: solo_loss((scores, filters, features), [(m, torch.tensor([2]))])['mask']
    assert torch.isclose(cost(exact), cost(wider))


def test_what_is_found_is_scored_by_cell_and_mask(monkeypatch):
    out = fake_out()
    net = lambda images: out
    (found,) = find_objects(net, torch.zeros(1, 3, 32, 32))
    sure = torch.tensor(3.0).sigmoid() * torch.tensor(2.0).sigmoid()
    assert found['classes'].tolist() == [2] and torch.isclose(found['scores'][0], sure)
    assert (
        found['masks'].shape == (1, 32, 32) and found['masks'][0, 9:19, 9:19].all() and not found['masks'][0, :6].any()
    )
    assert len(find_objects(net, torch.zeros(1, 3, 32, 32), confidence=float(sure) + 0.01)[0]['scores']) == 0
    assert len(find_objects(net, torch.zeros(1, 3, 32, 32), confidence=float(sure) - 0.01)[0]['scores']) == 1
