"""Growing: schedules of stages, alpha for each network, every plane reduced, and blocks that rest until their stage."""

import itertools
import json
from dataclasses import asdict

import pytest
import torch
from faults import one_line

from medsketch.models.pggan import PGDiscriminator, PGGenerator
from medsketch.train.callbacks import Checkpoint, Fade
from medsketch.train.growth import Growth, GrowthStage, Ramp, doubling, grow_reals
from medsketch.train.losses import logistic_d, logistic_g
from medsketch.train.trainer import Callback, Phase, Trainer

PGSGAN = [
    {'size': 16, 'steps': 10, 'batch_size': 16},
    {'size': 32, 'steps': 60, 'fade': 60, 'alphas': {'D': (0, 1, 1 / 30), 'G': 0}, 'batch_size': 8},
    {'size': 32, 'steps': 60, 'fade': 60, 'alphas': {'D': 1, 'G': (0, 0.5, 1 / 30)}, 'batch_size': 8},
    {'size': 32, 'steps': 10, 'alphas': {'D': 1, 'G': 0.5}, 'batch_size': 8},
]  # the paper's four phases (section 2.3)


# ---- schedules -------------------------------------------------------------------------------


def test_pgsgan_grows_one_network_after_the_other():
    g = Growth(PGSGAN)
    assert (g.steps, g.sizes, g.size, g.start) == (140, [16, 32], 32, 16)
    walk = [g.at(i) for i in range(g.steps)]
    D, G = ([p.alpha_of(name) for p in walk] for name in 'DG')
    assert D[10:70] == sorted(D[10:70]) and G[10:70] == [0.0] * 60 and D[70:] == [1.0] * 70
    assert G[70:130] == sorted(G[70:130]) and max(G[70:]) == 0.5 == G[129] and set(G[130:]) == {0.5}
    for alphas, levels in ((D[10:70], 30), (G[70:130], 15)):
        assert {round(a * 30) for a in alphas} == set(range(levels + 1))  # every multiple of 1/30
        assert all(abs(a * 30 - round(a * 30)) < 1e-9 for a in alphas)
    assert [p.batch_size for p in walk] == [16] * 10 + [8] * 130
    assert g.at(10**9) == g.at(139)  # the last stage goes on


def test_a_list_of_doubling_stages_is_the_usual_schedule():
    usual, given = Growth(32, 20, fade=0.3), Growth(doubling(32, 20, fade=0.3))
    assert [usual.at(i) for i in range(90)] == [given.at(i) for i in range(90)]
    assert usual.at(25)[:2] == (8, 1.0) and usual.at(22).alpha == 0.5  # 6 of 20 batches fade: 1/6, 2/6, 3/6
    assert usual.at(22).alphas == {} and usual.at(22).alpha_of('G') == 0.5


@pytest.mark.parametrize('growth', [Growth(PGSGAN), Growth(16, {4: 3, 8: 5, 16: 9}, batch_size={4: 9, 8: 5, 16: 2})])
def test_a_schedule_survives_json(growth):
    again = Growth(json.loads(json.dumps([asdict(s) for s in growth.stages])))
    assert [again.at(i) for i in range(growth.steps)] == [growth.at(i) for i in range(growth.steps)]


def test_tables_take_the_keys_json_writes():
    steps, images = (json.loads(json.dumps(table)) for table in ({4: 1, 8: 2, 16: 3}, {4: 32, 8: 16, 16: 8}))
    g = Growth(16, steps, batch_size=images)
    assert [g.at(i)[::2] for i in range(6)] == [(4, 32), (8, 16), (8, 16), (16, 8), (16, 8), (16, 8)]
    assert g.batches == {4: 1, 8: 2, 16: 3}


@pytest.mark.parametrize(
    'ramp', [(0, 1, 1 / 30), (0, 0.5, 1 / 30), (0.2, 0.9, 0.3), (1, 0, 0.25), (0.5, 0.5, 0.1), (0, 1, 1 / 49)]
)
def test_quanta(ramp):
    ramp = Ramp(*ramp)
    walk = [ramp.at(i / 1000) for i in range(1001)]
    low, high = sorted(ramp[:2])
    assert walk[0] == ramp.start and walk[-1] == ramp.end and low <= min(walk) and max(walk) <= high
    assert walk == sorted(walk, reverse=ramp.start > ramp.end)
    assert all(abs(b - a) < 1e-9 or abs(b - a) <= ramp.quantum + 1e-9 for a, b in itertools.pairwise(walk))
    assert len(set(walk)) <= (high - low) / ramp.quantum + 2


WRONG = {
    'at least one stage': lambda: Growth([]),
    'goes back from 16 to 8': lambda: Growth([GrowthStage(16, 1), GrowthStage(8, 1)]),
    'pass nothing else': lambda: Growth([GrowthStage(16, 1)], batches=5),
    'stage 1 is': lambda: Growth([{'size': 8, 'stps': 3}]),
    'stage 2 is': lambda: Growth([GrowthStage(16, 1), 16]),
    'size 12': lambda: GrowthStage(12, 5),
    'steps is 0': lambda: GrowthStage(8, 0),
    'steps is 2.5': lambda: GrowthStage(8, 2.5),
    '0 to 5': lambda: GrowthStage(8, 5, fade=6),
    'fade is nan': lambda: GrowthStage(8, 5, fade=float('nan')),
    'alpha is 1.5': lambda: GrowthStage(8, 5, alpha=1.5),
    "alpha is 'fast'": lambda: GrowthStage(8, 5, alpha='fast'),
    'alpha is (0, 2)': lambda: GrowthStage(8, 5, alphas={'G': (0, 2)}),
    'alpha is (0, 1, -1)': lambda: GrowthStage(8, 5, alpha=(0, 1, -1)),
    'batch_size is 0': lambda: GrowthStage(8, 5, batch_size=0),
    'resolution 16': lambda: Growth(16, batch_size={4: 8, 8: 4}),
    'must be resolutions': lambda: Growth(8, {'four': 3, 'eight': 4}),
    'batches is 0': lambda: Growth(8, 0),
}


@pytest.mark.parametrize('text', WRONG)
def test_impossible_schedules_are_refused_in_a_line(text):
    with pytest.raises(ValueError) as e:
        WRONG[text]()
    assert text in str(e.value) and one_line(e)


# ---- planes ----------------------------------------------------------------------------------


def a_batch(n=3, size=32):
    g = torch.Generator().manual_seed(0)
    return {
        'image': torch.randn(n, 3, size, size, generator=g),
        'sketch': torch.rand(n, 1, size, size, generator=g),
        'mask': torch.randint(0, 4, (n, size, size), generator=g) * 50,
        'instances': torch.randint(0, 2**40, (n, size, size), generator=g),
        'fov': torch.randint(0, 2, (n, size, size), generator=g).bool(),
        'label': torch.arange(n),
        'noise': torch.randn(n, 8),
        'path': ['a.png'] * n,
    }


@pytest.mark.parametrize('size, alpha', [(8, 1.0), (16, 0.3), (32, 0.0), (32, 0.5)])
@pytest.mark.parametrize('named', [False, True])
def test_every_plane_follows_the_growth(size, alpha, named):
    batch, k = a_batch(), 32 // size
    kinds = {'image': 'picture', 'sketch': 'sketch', 'mask': 'labels', 'instances': 'instance ids', 'fov': 'labels'}
    out = grow_reals(batch, size, alpha, kinds if named else None)
    for name in ('image', 'sketch'):
        assert torch.equal(out[name], grow_reals(batch[name], size, alpha)) and out[name].shape[-1] == size
    for name in ('mask', 'instances', 'fov'):
        assert out[name].shape == (3, size, size) and out[name].dtype == batch[name].dtype
        squares = batch[name].unfold(1, k, k).unfold(2, k, k).flatten(3)
        assert (out[name][..., None] == squares).any(-1).all()  # every id stood in the square it now stands for
    for name in ('label', 'noise', 'path'):
        assert out[name] is batch[name]
    assert list(out) == list(batch) and batch['image'].shape[-1] == 32


def test_planes_without_a_kind_are_left_alone():
    batch = a_batch()
    out = grow_reals(batch, 8, 1.0, {'image': 'picture'})
    assert out['image'].shape[-1] == 8 and out['sketch'] is batch['sketch'] and out['mask'] is batch['mask']


@pytest.mark.parametrize('shape, size', [((1, 3, 16, 16), 32), ((1, 3, 48, 48), 32), ((1, 3, 32, 16), 16)])
def test_reals_that_do_not_fit(shape, size):
    with pytest.raises(ValueError, match=str(size)) as e:
        grow_reals(torch.zeros(shape), size)
    assert one_line(e)


# ---- networks that grow ----------------------------------------------------------------------


class Noise:
    "A resumable stream of fixed images and codes"

    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.image, self.z = torch.randn(16, 1, 16, 16, generator=g), torch.randn(16, 4, generator=g)
        self.batch_size, self.position, self.rank, self.world = 4, 0, 0, 1

    def __iter__(self):
        return self

    def __next__(self):
        i = (torch.arange(self.batch_size) + self.position) % 16
        self.position += self.batch_size
        return {'image': self.image[i], 'z': self.z[i]}


GROWTH = [
    {'size': 4, 'steps': 2},
    {'size': 8, 'steps': 4, 'fade': 4, 'alphas': {'G': 0, 'D': (0, 1, 1 / 2)}, 'batch_size': 3},
    {'size': 8, 'steps': 4, 'fade': 3, 'alphas': {'G': (0, 0.5), 'D': 1}, 'batch_size': 2},
    {'size': 16, 'steps': 4, 'fade': 2},
]


def a_training(folder=None, look=None):
    "A pair of networks of some thousand weights, growing by `GROWTH`, each with its alpha"
    torch.manual_seed(0)
    nets = {'G': PGGenerator(16, 1, 4, fmap_base=32, fmap_max=8), 'D': PGDiscriminator(16, 1, fmap_base=32, fmap_max=8)}
    fade = Fade(Growth(GROWTH))

    def point():
        return fade.growth.at(trainer.step)

    def fake(n, b):
        return n.G(b['z'], point().size, point().alpha_of('G'))

    def g(n, b):
        return logistic_g(n.D(fake(n, b), point().alpha_of('D')))

    def d(n, b):
        p = point()
        real = grow_reals(b['image'], p.size, p.alpha_of('D'))
        with torch.no_grad():
            y = fake(n, b)
        return logistic_d(n.D(real, p.alpha_of('D')), n.D(y, p.alpha_of('D')))

    opts = [torch.optim.Adam(n.parameters(), lr=0.01, betas=(0.0, 0.99)) for n in nets.values()]
    callbacks = [fade, *([Checkpoint(folder, every=1)] if folder else []), *([look] if look else [])]
    trainer = Trainer(nets, [Phase('D', d, opts[1]), Phase('G', g, opts[0])], Noise(), callbacks)
    return trainer, nets


def weights(nets):
    return {f'{n}.{k}': v.clone() for n, net in nets.items() for k, v in net.state_dict().items()}


def of_block(name):
    "The resolution a parameter belongs to: it has nothing to do before"
    part = name.split('.')
    return 4 << int(part[2]) + (part[1] == 'blocks') if part[1] in ('blocks', 'to_image', 'from_image') else 4


def test_blocks_rest_until_their_stage():
    trainer, nets = a_training()
    start = weights(nets)
    growth = Growth(GROWTH)
    for step in range(1, growth.steps + 1):
        trainer.fit(step)
        size = growth.at(step - 1).size
        for k, v in weights(nets).items():
            if of_block(k) > size:
                assert torch.equal(v, start[k]), f"{k} moved at {size} px"
        waits = [k for k in start if k.startswith(('G.blocks.0', 'G.to_image.1'))]
        if step <= 6:
            assert all(torch.equal(weights(nets)[k], start[k]) for k in waits)  # G's own alpha is still 0
    moved = weights(nets)
    assert not [k for k in start if k.endswith('weight') and torch.equal(moved[k], start[k])]


def test_a_new_layer_of_d_learns_from_d_alone():
    "In G's phase D is fixed, grown or growing: no gradient is left in it"
    left = []

    class Look(Callback):
        def after_step(self, t):
            left.append([k for k, p in t.nets.D.named_parameters() if p.grad is not None and p.grad.any()])

    trainer, _ = a_training(look=Look())
    trainer.fit(Growth(GROWTH).steps)
    assert left == [[]] * Growth(GROWTH).steps


@pytest.mark.parametrize('stop', [1, 4, 8, 11])
def test_growing_goes_on_bit_for_bit(tmp_path, stop):
    "Stopped at the first size, in D's fade, in G's fade and in a common fade, and resumed by another process's objects"
    whole, nets = a_training()
    whole.fit(14)
    a_training(tmp_path)[0].fit(stop)
    resumed, again = a_training(tmp_path)
    resumed.fit(14)
    a, b = weights(nets), weights(again)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert resumed.images == whole.images == 2 * 4 + 4 * 3 + 4 * 2 + 4 * 2  # no batch size named: the last stage's
