"SOLOv2: parity with the reference's matrix NMS, points NMS and Dice loss; grid cells; learning."

import pytest
import torch
from references import arrays, close

from medsketch.models.solov2 import SOLOv2, dice_loss, find_objects, matrix_nms, peaks, responsible, solo_loss


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
