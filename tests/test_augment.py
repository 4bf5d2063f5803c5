"""Differentiable augmentation: what moves together, gradients of every order, chance, resume, adaptive p."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from medsketch.models.pggan import PGDiscriminator
from medsketch.train.augment import (
    OPERATIONS,
    POLICIES,
    Adapt,
    Augmented,
    DiffAugment,
    holes,
    look_up,
    policy_by_name,
    recolour,
)
from medsketch.train.augment import _Sample as Sample
from medsketch.train.bgc import Dice, blit, geometry, recolour_by, tone
from medsketch.train.callbacks import Checkpoint
from medsketch.train.losses import r1_penalty
from medsketch.train.trainer import Phase, Trainer


def points(n, side, seed=0):
    "Random shifts, turns and zooms, in float64"
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(n, *shape, generator=g, dtype=torch.float64) * 2 - 1
    return look_up(side, 3 * rand(2), 0.5 * rand(), 1 + 0.2 * rand())


def test_look_up_shifts_turns_and_zooms():
    x = torch.zeros(1, 1, 8, 8)
    x[..., 2, 5] = 1.0
    put = lambda *how: F.grid_sample(x, look_up((8, 8), *map(torch.tensor, how)), align_corners=False)[0, 0]
    shifted = put([[3.0, -4.0]], [0.0], [1.0])
    assert shifted[5, 1] == 1 and shifted.count_nonzero() == 1  # down and left, to the bit
    turned = put([[0.0, 0.0]], [torch.pi / 2], [1.0])
    assert turned[5, 5] == pytest.approx(1, abs=1e-5)  # a quarter clockwise about the middle
    x = x.roll((1, -1), (2, 3))
    zoomed = put([[0.0, 0.0]], [0.0], [2.0])
    assert zoomed.sum() == pytest.approx(4, rel=1e-5)  # twice the side, four times the ink


def test_look_up_of_an_oblong_image():
    x = torch.rand(2, 1, 4, 16)
    at = look_up((4, 16), torch.tensor([[1.0, 0.0], [0.0, 5.0]]), torch.zeros(2), torch.ones(2))
    moved = F.grid_sample(x, at, align_corners=False)
    assert torch.equal(moved[0, :, 1:], x[0, :, :-1]) and torch.equal(moved[1, ..., 5:], x[1, ..., :-5])


@pytest.mark.parametrize('mirror', [False, True])
@pytest.mark.parametrize('mode', ['bilinear', 'nearest'])
def test_sampling_differentiates_twice(mode, mirror):
    x, at = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True), points(2, (6, 6))
    look = lambda x: Sample.apply(x, at, mode, mirror, False)
    outside = 'reflection' if mirror else 'zeros'
    torch.testing.assert_close(look(x), F.grid_sample(x, at, mode, outside, align_corners=False))
    assert torch.autograd.gradcheck(look, x)
    assert torch.autograd.gradgradcheck(lambda x: look(x) ** 2, x)


def test_penalty_through_augmentation_equals_finite_differences():
    "R1 of D behind the augmentation, and its gradient for D's weights"
    torch.manual_seed(0)
    D = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 1))
    x, aug = torch.rand(2, 3, 8, 8) * 2 - 1, DiffAugment('all')

    def value():
        torch.manual_seed(5)  # the same draw each time
        return r1_penalty(Augmented(D, aug), x)

    value().backward()
    w = D[0].weight
    got, h = w.grad[1, 2, 0, 1].item(), 1e-2
    with torch.no_grad():
        w[1, 2, 0, 1] += h
    up = value().item()
    with torch.no_grad():
        w[1, 2, 0, 1] -= 2 * h
    assert got == pytest.approx((up - value().item()) / (2 * h), rel=0.02) and got != 0
    torch.manual_seed(5)
    plain = r1_penalty(D, aug(x))
    assert value().item() != pytest.approx(plain.item(), rel=1e-3)  # flat before T, not after it


@pytest.mark.parametrize('name', OPERATIONS)
def test_every_operation_lets_the_gradient_of_g_through(name):
    torch.manual_seed(0)
    x = torch.rand(6, 3, 16, 16, requires_grad=True)
    y = DiffAugment(name)(x)
    assert not torch.equal(y, x)
    y.square().sum().backward()
    touched = (x.grad != 0).flatten(1).float().mean(1)
    assert x.grad.isfinite().all() and (touched > 0.6).all()


@pytest.mark.parametrize('name', [o for o in OPERATIONS if o not in POLICIES['bgc']])
def test_p_is_the_share_of_samples_and_drawn_for_each_operation(name):
    torch.manual_seed(0)
    x = torch.rand(400, 3, 16, 16)
    moved = (DiffAugment(name, p=0.3, shift=0.5)(x) != x).flatten(1).any(1).float().mean().item()
    assert 0.2 < moved < 0.4
    assert torch.equal(DiffAugment(name, p=0)(x), x)
    assert torch.equal(DiffAugment('none')(x), x)


def test_operations_are_chosen_apart():
    "With p = 1/2 about a quarter of the samples stay whole under two operations"
    torch.manual_seed(0)
    x = torch.rand(600, 1, 16, 16)
    whole = (DiffAugment('colour,cutout', p=0.5)(x) == x).flatten(1).all(1).float().mean().item()
    assert 0.18 < whole < 0.32


def test_a_sample_that_is_not_chosen_stays_to_the_bit():
    torch.manual_seed(0)
    x = torch.rand(200, 3, 16, 16)
    same = (DiffAugment('all', p=0.2)(x) == x).flatten(1).all(1)
    assert 0.25 < same.float().mean() < 0.6


def test_translation_is_whole_pixels_within_its_limit_and_fills():
    torch.manual_seed(0)
    x = torch.zeros(500, 1, 16, 16)
    x[:, :, 8, 8] = 1.0
    at = (DiffAugment('translate', fill=0.0)(x) == 1).nonzero()[:, 2:] - 8
    assert len(at) == 500 and at.abs().max() == 2 and sorted(at.unique().tolist()) == [-2, -1, 0, 1, 2]
    assert at.float().mean().abs() < 0.2
    edge = DiffAugment('translate', fill=-1.0)(torch.ones(100, 1, 16, 16))
    assert sorted(edge.unique().tolist()) == [-1, 1]


def test_turn_and_zoom_stay_within_their_limits():
    "A blob to the right of the middle: its angle is the turn, its weight the square of the zoom"
    torch.manual_seed(0)
    x, at = torch.zeros(400, 1, 32, 32), torch.arange(32) - 15.5
    x[:, :, 13:19, 22:28] = 1.0
    moved = DiffAugment('affine')(x)[:, 0]
    weight = moved.sum((1, 2))
    down, right = ((moved.sum(d) * at).sum(1) / weight for d in (2, 1))
    angle, zoom = torch.atan2(down, right).rad2deg(), (weight / 36).sqrt()
    assert 9 < angle.max() < 10.5 and -10.5 < angle.min() < -9
    assert 1.08 < zoom.max() < 1.12 and 0.89 < zoom.min() < 0.93
    still = DiffAugment('affine', degrees=0.0, zoom=0.0)(x)
    assert torch.equal(still, x)


def test_cutout_is_a_square_of_a_quarter_of_the_side_anywhere():
    torch.manual_seed(0)
    gone = DiffAugment('cutout', fill=7.0)(torch.zeros(300, 2, 16, 16)) == 7
    area = gone[:, 0].sum((1, 2))
    assert area.max() == 16 and area.min() >= 4 and torch.equal(gone[:, 0], gone[:, 1])
    assert gone[:, 0].any(0).all()  # no pixel is safe
    assert holes((16, 8), torch.tensor([[0.5, 0.5]]), 0.25)[0].sum() == 4 * 2


def test_colour_by_hand():
    x = torch.tensor([1.0, 0.0, -0.4]).reshape(1, 3, 1, 1).repeat(1, 1, 2, 2)
    one, none = torch.ones(1), torch.zeros(1)
    torch.testing.assert_close(recolour(x, none + 0.25, one, one), x + 0.25)
    torch.testing.assert_close(recolour(x, none, none, one), torch.full_like(x, 0.2))
    torch.testing.assert_close(recolour(x, none, one, one * 2), 0.2 + 2 * (x - 0.2))
    four = torch.rand(1, 4, 2, 2)
    torch.testing.assert_close(recolour(four, none, none, one), four)  # modalities are no colours


def test_planes_of_a_sample_move_together():
    "A picture, a sketch in [-1, 1] and labels, all with the same square in them"
    torch.manual_seed(0)
    labels = torch.zeros(40, 32, 32, dtype=torch.int64)
    labels[:, 10:20, 12:18] = 3
    square = (labels[:, None] > 0).float()
    aug = DiffAugment('translate,affine,cutout', kinds=('picture', 'sketch', 'labels'), fill=(0.0, -1.0, 0))
    picture, sketch, mask = aug(square, square * 2 - 1, labels)
    torch.testing.assert_close(sketch, picture * 2 - 1)
    assert mask.dtype == torch.int64 and set(mask.unique().tolist()) == {0, 3}
    assert ((mask > 0) == (picture[:, 0] > 0.5)).float().mean() > 0.99
    assert not torch.equal(mask, labels)


def test_only_pictures_are_recoloured():
    torch.manual_seed(0)
    x = torch.rand(8, 1, 16, 16)
    aug = DiffAugment('colour', kinds=('picture', 'sketch', 'picture'))
    first, sketch, second = aug(x, x, x)
    assert torch.equal(sketch, x) and not torch.equal(first, x) and torch.equal(first, second)


def test_two_calls_draw_anew_and_a_restored_generator_draws_the_same():
    x, aug = torch.rand(4, 3, 16, 16), DiffAugment('all')
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = aug(x), aug(x)
    torch.set_rng_state(state)
    assert torch.equal(aug(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('name', [*OPERATIONS, 'all'])
def test_type_and_memory_layout_stay(dtype, name):
    x = torch.rand(4, 3, 16, 16, dtype=torch.float32).to(dtype)
    torch.manual_seed(0)
    want = DiffAugment(name)(x.float())
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        y = DiffAugment(name)(x.contiguous(memory_format=layout))
        assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y.float(), want, atol=0.01, rtol=0.01)


def test_half_precision_means_do_not_overflow():
    "Contrast takes a mean over a whole picture: 512 × 512 × 3 values of 1 are more than float16 holds"
    x = torch.ones(1, 3, 512, 512, dtype=torch.float16)
    assert recolour(x, torch.zeros(1), torch.ones(1), torch.full((1,), 0.5)).isfinite().all()


def test_under_autocast():
    torch.manual_seed(0)
    D, x = PGDiscriminator(16, 3, 64, 8), torch.rand(4, 3, 16, 16)
    with torch.autocast('cpu', torch.bfloat16):
        loss = r1_penalty(Augmented(D, DiffAugment('all')), x)
    loss.backward()
    assert loss.dtype == torch.float32 and D.logit.weight.grad.isfinite().all()


def test_augmented_hands_on_what_is_no_plane():
    calls = []
    D = lambda *planes, **options: calls.append((planes, options)) or torch.zeros(2, 1)
    x, s = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    aug = DiffAugment('cutout', kinds=('picture', 'sketch'), fill=(5.0, 9.0))
    Augmented(D, aug)(x, s, 0.5, alpha=0.25)
    (image, sketch, fade), options = calls[0]
    assert fade == 0.5 and options == {'alpha': 0.25}
    assert torch.equal(image[:, :1] == 5, sketch == 9) and (sketch == 9).any()
    Augmented(D, None)(x, 0.5)
    assert calls[1][0][0] is x


def test_policies_by_name():
    assert policy_by_name('cutout,translate') == policy_by_name(['translate', 'cutout']) == ('translate', 'cutout')
    assert policy_by_name('sketch') == ('translate', 'cutout')
    assert policy_by_name('sketch, affine') == ('translate', 'affine', 'cutout')
    assert policy_by_name(None) == policy_by_name('') == policy_by_name('none') == ()
    assert all(policy_by_name(n) == tuple(o for o in OPERATIONS if o in ops) for n, ops in POLICIES.items())


@pytest.mark.parametrize(
    'bad, says',
    [
        ({'policy': 'rotate'}, "no augmentation is called 'rotate'; use one of none, sketch"),
        ({'p': 1.2}, 'p=1.2'),
        ({'p': -0.1}, 'p=-0.1'),
        ({'target': 1.0}, 'target=1.0'),
    ],
)
def test_refusals(bad, says):
    with pytest.raises(ValueError, match=says) as e:
        DiffAugment(**bad)
    assert '\n' not in str(e.value)


def test_planes_that_do_not_fit_are_refused():
    x, aug = torch.rand(2, 3, 8, 8), DiffAugment(kinds=('picture', 'sketch'))
    with pytest.raises(ValueError, match='kinds has 2 entries for 1 planes'):
        aug(x)
    with pytest.raises(ValueError, match='not of the same samples'):
        aug(x, torch.rand(2, 1, 16, 16))
    with pytest.raises(ValueError, match='not of the same samples'):
        aug(x, torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match='pass'):
        DiffAugment()(torch.rand(8, 8))
    with pytest.raises(ValueError, match="kind 'mask'"):
        aug(x, x, kinds=('picture', 'mask'))
    with pytest.raises(ValueError, match='fill has 1 entries for 2'):
        aug(x, x, fill=[0.0])


# --- adaptive ---


def judged(aug, share, n=100):
    "D takes this share of the reals for real"
    right = round(n * share)
    aug.see(torch.cat([torch.full((right, 1), 3.0), torch.full((n - right, 1), -0.1)]))


def test_p_follows_the_sign_of_d_on_reals():
    aug = DiffAugment(target=0.6)
    assert float(aug.p) == 0
    judged(aug, 0.85)  # r = .7: overfitting
    aug.adapt(0.1)
    assert float(aug.p) == pytest.approx(0.1)
    judged(aug, 0.75)  # r = .5
    aug.adapt(0.03)
    assert float(aug.p) == pytest.approx(0.07)
    aug.adapt(0.5)  # nothing was seen since
    assert float(aug.p) == pytest.approx(0.07)
    judged(aug, 0.85), judged(aug, 0.1)  # together r = -.05
    aug.adapt(0.5)
    assert float(aug.p) == 0  # and not below
    for _ in range(3):
        judged(aug, 1), aug.adapt(0.6)
    assert float(aug.p) == 1  # nor above


def test_signs_are_counted_in_float32():
    "2,048 + 1 is 2,048 in float16, 256 + 1 is 256 in bfloat16"
    aug = DiffAugment(target=0.6)
    for _ in range(3):
        aug.see(torch.ones(2049, 1, dtype=torch.bfloat16))
    assert aug.signs.tolist() == [6147, 6147]


def stand_in(step, images):
    "What `Adapt` looks at of a trainer"
    return SimpleNamespace(step=step, images=images, accelerator=SimpleNamespace(num_processes=1))


def test_adapt_takes_kimg_thousand_images_for_the_way():
    aug = DiffAugment(target=0.6)
    adapt = Adapt(aug, every=4, kimg=0.8)
    for step in range(1, 51):  # 50 steps of 16 images: 800
        judged(aug, 1)
        before = float(aug.p)
        adapt.after_step(stand_in(step, 16 * step))
        assert (float(aug.p) != before) == (step % 4 == 0)
    assert float(aug.p) == pytest.approx(48 * 16 / 800)
    with pytest.raises(ValueError, match='give it a target'):
        Adapt(DiffAugment())


def test_adaptive_state_survives():
    aug = DiffAugment(target=0.6)
    adapt = Adapt(aug, kimg=1.0)
    for step in range(1, 7):
        judged(aug, 1), adapt.after_step(stand_in(step, 16 * step))
    state = copy.deepcopy(adapt.state_dict())
    other = Adapt(DiffAugment(target=0.6), kimg=1.0)
    other.load_state_dict(state)
    for a in (adapt, other):
        for step in range(7, 9):
            judged(a.aug, 0.7), a.after_step(stand_in(step, 16 * step))  # all four: r = .7
    assert float(adapt.aug.p) == float(other.aug.p) == pytest.approx(8 * 16 / 1000)


def small_training(folder, steps, seed=0):
    "A tiny D behind an adaptive augmentation, trained to tell ones from zeros"
    torch.manual_seed(0)
    D, aug = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1)),
        DiffAugment('translate,cutout', target=0.2),
    )

    def loss(nets, batch):
        seen = Augmented(nets.D, aug)
        real = seen(batch['image'])
        aug.see(real)
        return F.softplus(-real).mean() + F.softplus(seen(torch.randn(4, 1, 8, 8))).mean()

    class Data:
        position = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.position += 4
            return {'image': torch.ones(4, 1, 8, 8)}

    trainer = Trainer(
        {'D': D},
        [Phase('D', loss, torch.optim.Adam(D.parameters(), 0.01))],
        Data(),
        [Adapt(aug, every=3, kimg=0.1), Checkpoint(folder, every=100)],
        seed=seed,
    )
    trainer.fit(steps)
    return D, aug


def test_resumed_adaptive_training_equals_one_in_a_piece(tmp_path):
    whole, aug = small_training(tmp_path / 'whole', 14)
    small_training(tmp_path / 'halves', 7)  # in the middle between two moves of p
    again, later = small_training(tmp_path / 'halves', 14)
    assert 0 < float(aug.p) < 1 and float(aug.p) == float(later.p) and torch.equal(aug.signs, later.signs)
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)


# ---- the operations of StyleGAN2-ADA ---------------------------------------------------------


def chosen(values, neutral):
    return (values != neutral).float().mean().item()


def test_bgc_draws_each_operation_with_its_own_probability():
    torch.manual_seed(0)
    n, p, side = 20_000, 0.3, (64, 32)
    m, t = blit(Dice(n, p), side), tone(Dice(n, p))
    whole = (m[:, :2, :2].abs() == torch.eye(2)).flatten(1).all(1) | (m[:, :2, :2].abs() == 0).any(2).all(1)
    assert whole.all() and (m[:, :2, 2] == m[:, :2, 2].round()).all()  # pixels only, none blended
    assert chosen(torch.linalg.det(m), 1.0) == pytest.approx(p / 2, abs=0.02)  # half of the mirrorings mirror
    upright = (m[:, :2, :2].abs() == torch.eye(2)).flatten(1).all(1)
    assert chosen(upright, True) == pytest.approx(p / 2, abs=0.02)  # two of four quarter turns
    assert m[upright][:, 0, 2].abs().max() == 4 and m[upright][:, 1, 2].abs().max() == 8  # an eighth of each side
    g = geometry(Dice(n, p), side)
    turned = (g[:, 0, 1] != 0).float().mean().item()
    assert turned == pytest.approx(p, abs=0.02)  # both turns together
    assert torch.linalg.det(g[:, :2, :2]).log2().std() == pytest.approx(0.4 * p**0.5, rel=0.05)
    assert chosen(torch.linalg.det(t[:, :3, :3]) < 0, False) == pytest.approx(p / 2, abs=0.02)  # luma flips


def test_bgc_leaves_the_rest_to_the_bit_and_the_mean_in_place():
    torch.manual_seed(0)
    x = torch.rand(300, 3, 16, 16)
    same = (DiffAugment('bgc', p=0.1)(x) == x).flatten(1).all(1).float().mean().item()
    assert 0.2 < same < 0.45
    assert torch.equal(DiffAugment('bgc', p=0)(x), x)
    last = DiffAugment('bgc', p=1.0)(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_bgc_moves_masks_along_and_takes_any_channels(channels):
    torch.manual_seed(0)
    mask = torch.zeros(8, 16, 16, dtype=torch.long)
    mask[:, 4:12, 2:8] = 1
    picture = mask[:, None].float().expand(-1, channels, -1, -1).contiguous()
    x, y = DiffAugment('blit', p=1.0)(picture, mask, kinds=('picture', 'labels'))
    assert torch.equal(x[:, 0].round().long(), y) and not torch.equal(y, mask)
    z = DiffAugment('bgc', p=1.0)(picture)
    assert z.shape == picture.shape and z.isfinite().all()


def test_grey_pictures_change_as_grey_rgb_does():
    torch.manual_seed(0)
    m, grey = tone(Dice(6, 1.0)), torch.rand(6, 1, 4, 4)
    torch.testing.assert_close(recolour_by(grey.expand(-1, 3, -1, -1), m).mean(1, keepdim=True), recolour_by(grey, m))
