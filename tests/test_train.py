"""Growth, trainer and callbacks: schedules, freezing, accumulation, several processes, killed runs, full disks, NaN."""

import contextlib
import errno
import os
import pickle
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from faults import (
    contents,
    die,
    disk_full,
    exit_codes,
    half_written,
    killed,
    one_line,
    rows,
    same,
)
from torch import nn

from medsketch.train import callbacks
from medsketch.train import checkpoints as checkpoints_module
from medsketch.train.callbacks import (
    Checkpoint,
    CsvLog,
    Ema,
    Fade,
    SampleGrid,
    StopOnNan,
    TrainingDiverged,
    checkpoints,
)
from medsketch.train.growth import Growth, grow_reals
from medsketch.train.losses import logistic_d, logistic_g, r1_penalty
from medsketch.train.trainer import Callback, Phase, Trainer

os.environ['ACCELERATE_USE_CPU'] = 'true'  # "to the last bit" is a promise for the CPU


# --- growth ---


def random_growth(rng):
    size, start = 2 ** rng.randint(2, 9), 4
    while start < size and rng.random() < 0.3:
        start *= 2
    sizes = [s for s in (2**i for i in range(2, 11)) if start <= s <= size]
    batches = {s: rng.randint(1, 9) for s in sizes} if rng.random() < 0.7 else rng.randint(1, 9)
    return Growth(size, batches, start=start, fade=rng.choice([0.0, 1.0, rng.random()]))


@pytest.mark.parametrize('seed', range(40))
def test_any_schedule_visits_every_resolution_for_its_share(seed):
    g = random_growth(random.Random(seed))
    share = lambda s: g.batches[s] if isinstance(g.batches, dict) else g.batches
    walk = [g.at(t)[:2] for t in range(g.steps)]
    assert [s for s, _ in walk] == [s for s in g.sizes for _ in range(share(s))]
    for s in g.sizes:
        alphas = [a for r, a in walk if r == s]
        assert all(0 < a <= 1 for a in alphas) and alphas == sorted(alphas)
        assert alphas[-1] == 1 or s != g.start
        settled = sum(a == 1 for a in alphas)
        assert settled >= int((1 - g.fade) * share(s))
        assert settled == share(s) if s == g.start or g.fade == 0 else True
        if s != g.start and g.fade * share(s) > 2:
            assert alphas[0] < 1
    assert g.at(g.steps)[:2] == g.at(10**9)[:2] == (g.size, 1.0)


@pytest.mark.parametrize(
    'kwargs, text',
    [
        ({'size': 100}, '100'),
        ({'size': 32, 'fade': 1.5}, 'fade'),
        ({'size': 16, 'start': 32}, '32'),
        ({'size': 16, 'batches': {4: 1, 8: 1}}, '16'),
        ({'size': 8, 'batch_size': {8: 4}}, '4'),
    ],
)
def test_impossible_schedules(kwargs, text):
    with pytest.raises(ValueError, match=text) as e:
        Growth(**kwargs)
    assert one_line(e)


@pytest.mark.parametrize('size', [4, 8, 16, 32])
@pytest.mark.parametrize('alpha', [0.0, 0.3, 1.0])
def test_grown_reals(size, alpha):
    x = torch.randn(3, 2, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    y = grow_reals(x, size, alpha)
    blocks = lambda s: x.unflatten(3, (s, -1)).unflatten(2, (s, -1)).mean((3, 5))
    assert y.shape == (3, 2, size, size)
    torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)))  # no light is lost at any resolution or fade
    sharp = blocks(size)
    low = sharp if size == 4 else blocks(size // 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(y, low + alpha * (sharp - low))


# --- trainer ---


class Points:
    "A resumable stream over fixed points and fixed noise"

    def __init__(self, batch_size, n=64, dtype=torch.float32):
        g = torch.Generator().manual_seed(1)
        self.x, self.z = (torch.randn(n, k, generator=g, dtype=dtype) for k in (2, 3))
        self.batch_size, self.position, self.rank, self.world = batch_size, 0, 0, 1

    def __iter__(self):
        return self

    def __next__(self):
        i = (torch.arange(self.batch_size) + self.position + self.rank * self.batch_size) % len(self.x)
        self.position += self.batch_size * self.world
        return {'x': self.x[i], 'z': self.z[i]}


def mlp(i, o):
    return nn.Sequential(nn.Linear(i, 8), nn.LeakyReLU(0.2), nn.Linear(8, o))


def gan(callbacks=(), batch_size=8, dtype=torch.float32, noise=True, init=0, fail=None, **kwargs):
    "A G and a D of a hundred weights; R1 is lazy and shares D's optimiser"
    torch.manual_seed(init)
    nets = {'G': mlp(3, 2).to(dtype), 'D': mlp(2, 1).to(dtype)}

    def g(n, b):
        b['fake'] = n.G(b['z'] + (torch.randn_like(b['z']) + random.random() + np.random.rand() if noise else 0))
        return logistic_g(n.D(b['fake']))

    def d(n, b):
        if fail:
            fail(t)
        return {'adv': logistic_d(n.D(b['x']), n.D(b['fake'].detach())), 'small': 0.001 * n.D(b['x']).square().mean()}

    def r1(n, b):
        return r1_penalty(n.D, b['x'])

    og, od = (torch.optim.Adam(n.parameters(), lr=0.01, betas=(0.0, 0.99)) for n in nets.values())
    made = callbacks(nets) if callable(callbacks) else callbacks
    t = Trainer(
        nets,
        [Phase('G', g, og), Phase('D', d, od), Phase('R1', r1, od, every=4)],
        Points(batch_size, dtype=dtype),
        made,
        **kwargs,
    )
    return t


def run_folder(d, every=3, **kwargs):
    "The callbacks of a real run, in the order of one"
    return lambda nets: [
        StopOnNan(f'{d}/ck'),
        Ema(G=nets['G'], halflife=50),
        CsvLog(f'{d}/log.csv', every=2),
        Checkpoint(f'{d}/ck', every, **kwargs),
    ]


def weights(t):
    return [p.detach().clone() for p in t.params]


def test_resumes_bit_for_bit_after_any_step():
    whole = gan()
    states = []
    for n in range(1, 10):
        whole.fit(n), states.append(whole.state_dict())
    whole.fit(12)
    for n in (1, 4, 6, 9):
        t = gan()
        t.fit(n)
        state = t.state_dict()
        again = gan(init=7, seed=7)
        again.load_state_dict(state)
        again.fit(12)
        same(again.state_dict(), whole.state_dict())


def test_each_phase_moves_its_own_network_only():
    for i, moved in enumerate(['G', 'D', 'D']):
        t = gan()
        loss = t.phases[1].loss
        t.phases[1].loss = lambda n, b, loss=loss: loss(n, b | {'fake': b['x'] + 1})
        t.phases = t.phases[i : i + 1]
        before = {k: [p.detach().clone() for p in n.parameters()] for k, n in vars(t.nets).items()}
        t.fit(1)
        for k, n in vars(t.nets).items():
            assert all(torch.equal(a, b) for a, b in zip(before[k], n.parameters())) == (k != moved), (i, k)
            assert all(p.grad is None for p in n.parameters())


def test_what_was_frozen_before_training_is_frozen_after_it():
    def stop(t):
        if t.step == 2:
            raise KeyboardInterrupt

    for fail in (None, stop):
        t = gan(fail=fail)
        # say, a pretrained network in nobody's optimiser
        t.nets.H = mlp(2, 2).requires_grad_(False)
        t.params += t.nets.H.parameters()
        learns = [p.requires_grad for p in t.params]
        try:
            t.fit(4)
        except KeyboardInterrupt:
            assert fail
        assert [p.requires_grad for p in t.params] == learns and not all(learns)


def test_what_a_user_freezes_by_hand_stays_as_it_is():
    "The first layer of G; what stands behind it learns. A phase in which nothing can learn is refused"
    t = gan()
    first, last = t.nets.G[0], t.nets.G[2]
    first.requires_grad_(False)
    before = [p.detach().clone() for p in (first.weight, last.weight)]
    t.fit(3)
    assert torch.equal(first.weight, before[0]) and not torch.equal(last.weight, before[1])
    assert not any(p.requires_grad for p in first.parameters()) and last.weight.requires_grad
    t.nets.G.requires_grad_(False)
    with pytest.raises(ValueError, match='phase G has nothing to learn'):
        t.fit(4)


def test_gradients_left_behind_do_not_count():
    clean, dirty = gan(noise=False), gan(noise=False)
    for p in dirty.params:
        p.grad = torch.full_like(p, 9.0)
    clean.fit(2), dirty.fit(2)
    same(weights(clean), weights(dirty))


@pytest.mark.parametrize('parts', [2, 4])
def test_accumulation_equals_a_large_batch(parts):
    "Also where two phases share an optimiser"
    large = gan(batch_size=8, dtype=torch.float64, noise=False)
    small = gan(batch_size=8 // parts, dtype=torch.float64, noise=False, accumulate=parts)
    large.fit(9), small.fit(9)
    for a, b in zip(large.params, small.params):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert (small.step, small.images, small.data.position) == (large.step, large.images, large.data.position)
    for k in large.losses:
        torch.testing.assert_close(large.losses[k], small.losses[k])


def test_accumulation_belongs_to_its_trainer():
    t = gan(batch_size=4, dtype=torch.float64, noise=False, accumulate=2)
    gan(accumulate=1)  # a second trainer in the same process
    whole = gan(batch_size=8, dtype=torch.float64, noise=False)
    t.fit(3), whole.fit(3)
    for a, b in zip(whole.params, t.params):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_bf16_computes_in_half_and_keeps_weights_whole():
    seen = set()
    t = gan(mixed_precision='bf16')
    loss = t.phases[0].loss

    def watched(n, b):
        out = loss(n, b)
        seen.add(b['fake'].dtype)
        return out

    t.phases[0].loss = watched
    t.fit(6)
    assert seen == {torch.bfloat16} and {p.dtype for p in t.params} == {torch.float32}
    assert all(v.isfinite() for v in t.losses.values())


def test_data_learns_its_share_of_the_stream():
    t = gan()
    assert (t.data.rank, t.data.world) == (0, 1)
    t.fit(3)
    assert t.data.position == t.images == 24


class Noise(Callback):
    "Remembers one random number per step, drawn from a copy of the generator"

    def __init__(self):
        self.seen = []

    def after_step(self, t):
        self.seen.append(torch.rand(1, generator=torch.Generator().set_state(torch.get_rng_state())).item())


def rank(i, port, d):
    os.environ.update(
        RANK=str(i),
        LOCAL_RANK=str(i),
        WORLD_SIZE='2',
        LOCAL_WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    t = gan(batch_size=4, dtype=torch.float64, noise=False, init=i)  # other weights in the second process
    t.fit(5)
    noise = Noise()
    logged = gan(lambda nets: [*run_folder(d)(nets), noise], batch_size=4)
    logged.fit(3)
    again = Noise()
    resumed = gan(lambda nets: [*run_folder(d)(nets), again], batch_size=4, init=5)
    resumed.fit(6)
    torch.save(
        {
            'weights': weights(t),
            'logged': weights(resumed),
            'images': t.images,
            'share': (t.data.rank, t.data.world),
            'position': t.data.position,
            'noise': noise.seen + again.seen,
        },
        f'{d}/rank{i}.out',
    )
    torch.distributed.destroy_process_group()


def test_two_processes_learn_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    assert exit_codes(lambda: rank(0, port, tmp_path), lambda: rank(1, port, tmp_path)) == [0, 0]
    a, b = (torch.load(tmp_path / f'rank{i}.out') for i in range(2))
    same(a['weights'], b['weights']), same(a['logged'], b['logged'])
    assert (a['share'], b['share']) == ((0, 2), (1, 2))
    assert a['images'] == b['images'] == a['position'] == 40
    # each process has noise of its own, after a resume too
    assert not set(a['noise']) & set(b['noise'])
    alone = gan(batch_size=8, dtype=torch.float64, noise=False)
    alone.fit(5)
    for x, y in zip(alone.params, a['weights']):
        torch.testing.assert_close(x.detach(), y, rtol=1e-8, atol=1e-10)
    assert [r['step'] for r in rows(tmp_path / 'log.csv')] == ['2', '3', '4', '6']


# --- killed runs ---


def finished(d, **kwargs):
    t = gan(run_folder(d), **kwargs)
    t.fit(11)
    return t


def same_run(a, b):
    same(a.state_dict(), b.state_dict())
    (da, db) = (Path(t.callbacks[-1].folder).parent for t in (a, b))
    assert [p.name for p in checkpoints(da / 'ck')] == [p.name for p in checkpoints(db / 'ck')]
    for p in checkpoints(da / 'ck'):
        same(torch.load(p, weights_only=True), torch.load(db / 'ck' / p.name, weights_only=True))
    assert not [p for p in db.rglob('*') if p.suffix == '.tmp']


@pytest.fixture(scope='module')
def through(tmp_path_factory):
    torch.set_num_threads(1)
    return finished(tmp_path_factory.mktemp('through'))


def test_a_second_training_is_kept_out(through, tmp_path):
    "And the first ends as if nobody had tried"

    def second():
        with pytest.raises(ValueError, match='another training'):
            finished(tmp_path)

    def try_it(t):
        if t.step == 5:
            assert exit_codes(second) == [0]

    same_run(through, finished(tmp_path, fail=try_it))
    assert rows(tmp_path / 'log.csv') == rows(through.callbacks[2].path)
    finished(tmp_path)  # it has let go


def test_a_folder_that_cannot_be_locked_or_written(through, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checkpoints_module, 'lock_file', refuse)
    with pytest.warns(UserWarning, match='cannot be locked .*second training'):
        same_run(through, finished(tmp_path / 'a'))
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b/ck').write_text('in the way')
    seen = []
    with pytest.raises(RuntimeError, match='could not write checkpoints') as e:
        finished(tmp_path / 'b', fail=seen.append)
    # before the first step, not at the first checkpoint
    assert one_line(e) and not seen


@pytest.mark.parametrize('step', [0, 4, 8])
def test_killed_between_two_phases(through, tmp_path, step):
    def kill(t):
        if t.step == step:
            die()

    killed(lambda: finished(tmp_path, fail=kill))
    # other weights at first, once there is a checkpoint
    same_run(through, finished(tmp_path, init=3 if step > 3 else 0))
    log = rows(tmp_path / 'log.csv')
    assert [r['step'] for r in log] == ['2', '4', '6', '8', '10', '11']
    assert log == rows(through.callbacks[2].path)


@pytest.mark.parametrize('step', [3, 9, 11])
def test_killed_in_the_middle_of_a_checkpoint(through, tmp_path, step):
    def run():
        with half_written(lambda s: s['step'] == step, die):
            finished(tmp_path)

    killed(run)
    left = [p for p in (tmp_path / 'ck').iterdir() if p.suffix == '.tmp']
    assert len(left) == 1 and left[0].stat().st_size > 0  # the half that was written ...
    assert max([0, *(int(p.stem) for p in checkpoints(tmp_path / 'ck'))]) < step  # ... is no checkpoint
    same_run(through, finished(tmp_path, init=3 if step > 3 else 0))
    assert rows(tmp_path / 'log.csv') == rows(through.callbacks[2].path)


def test_log_cut_in_the_middle_of_a_row(through, tmp_path):
    killed(lambda: finished(tmp_path, fail=lambda t: t.step == 8 and die()))
    log = tmp_path / 'log.csv'
    log.write_text(log.read_text()[:-25])
    finished(tmp_path, init=3)
    assert rows(log) == rows(through.callbacks[2].path)


@pytest.mark.filterwarnings('error')
def test_best_checkpoint(tmp_path):
    t = gan(lambda nets: [Checkpoint(tmp_path, every=1, keep=3, best='G')])
    t.fit(9)
    best, saver = torch.load(tmp_path / 'best.pt', weights_only=True), t.callbacks[0]
    state = best['callbacks']['Checkpoint']
    assert state['lowest'] == state['mean'] == saver.lowest <= saver.mean
    assert [p.name for p in checkpoints(tmp_path)] == ['000007.pt', '000008.pt', '000009.pt']
    again = gan(lambda nets: [Checkpoint(tmp_path, every=1, keep=3, best='G')])
    again.fit(9)
    assert (again.callbacks[0].lowest, again.callbacks[0].mean) == (saver.lowest, saver.mean)


# --- broken and foreign checkpoints ---


@pytest.mark.parametrize('left', [0, 100, 0.5, 0.99])
def test_truncated_checkpoint_falls_back_to_the_one_before(through, tmp_path, left):
    gan(run_folder(tmp_path)).fit(7)
    newest = checkpoints(tmp_path / 'ck')[-1]
    data = newest.read_bytes()
    newest.write_bytes(data[: int(left * len(data)) if isinstance(left, float) else left])
    with pytest.warns(UserWarning, match='000007.pt cannot be read.*before it'):
        t = finished(tmp_path, init=3)
    same_run(through, t)
    assert rows(tmp_path / 'log.csv') == rows(through.callbacks[2].path)


def test_no_readable_checkpoint_at_all(through, tmp_path):
    gan(run_folder(tmp_path, keep=2)).fit(11)
    for p in checkpoints(tmp_path / 'ck'):
        p.write_bytes(b'gone')
    with pytest.warns(UserWarning, match='cannot be read'):
        gan(run_folder(tmp_path, keep=2)).fit(6)
    names = [p.name for p in checkpoints(tmp_path / 'ck')]
    # new checkpoints are not pruned in favour of broken later ones
    assert {'000003.pt', '000006.pt'} <= set(names), names
    with pytest.warns(UserWarning, match='cannot be read'):
        same_run(through, finished(tmp_path, init=3))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_among_the_checkpoints_is_not_executed(through, tmp_path):
    gan(run_folder(tmp_path)).fit(6)
    for write in (
        lambda p, o: p.write_bytes(pickle.dumps(o, 2)),
        lambda p, o: torch.save({'step': 9, 'meta': {}, 'nets': o}, p),
    ):
        write(tmp_path / 'ck' / '000009.pt', Payload(tmp_path / 'executed'))
        with pytest.warns(UserWarning, match='000009.pt cannot be read'):
            gan(run_folder(tmp_path)).fit(7)
        assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('what', ['meta', 'shape', 'names', 'optimisers'])
def test_checkpoint_of_something_else(tmp_path, what):
    gan(run_folder(tmp_path, meta={'recipe': 'a', 'size': 16})).fit(4)
    before = contents(tmp_path)
    other = run_folder(tmp_path, meta={'recipe': 'a', 'size': 32 if what == 'meta' else 16})
    with pytest.raises(ValueError, match='000004.pt.*another output folder') as e:
        t = gan(other)
        if what == 'shape':
            t.nets.G = mlp(5, 2)
        if what == 'names':
            t.nets.H = mlp(5, 2)
        if what == 'optimisers':
            t.opts.pop()
        t.fit(8)
    assert one_line(e) and contents(tmp_path) == before
    if what == 'meta':
        assert 'size=16' in str(e.value) and '32' in str(e.value)


# --- disks ---


def test_disk_full_while_saving(through, tmp_path):
    def full(state):
        return state['step'] == 6

    with half_written(full, disk_full), pytest.raises(RuntimeError, match='000006.pt.*No space') as e:
        finished(tmp_path)
    assert one_line(e) and {p.name for p in (tmp_path / 'ck').iterdir()} == {'000003.pt', '.lock'}
    same_run(through, finished(tmp_path, init=3))  # after making room it goes on
    assert rows(tmp_path / 'log.csv') == rows(through.callbacks[2].path)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device of Linux')
def test_a_full_disk_is_named_though_pytorchs_writer_speaks_of_positions():
    f = open('/dev/full', 'wb')  # noqa: SIM115  closing it fails, too, and that would be the error that is seen
    with (
        pytest.raises(RuntimeError, match='checkpoint x.pt: No space left') as e,
        checkpoints_module.writing('checkpoint', 'x.pt'),
    ):
        torch.save({'w': torch.zeros(100_000)}, f)
    assert one_line(e)
    with contextlib.suppress(OSError):
        f.close()


class FullFile:
    def __init__(self, f):
        self.f = f

    def write(self, s):
        return self.f.write(s)

    def flush(self):
        disk_full()

    close = flush


def test_disk_full_while_logging_and_drawing(tmp_path, monkeypatch):
    t = gan(run_folder(tmp_path))
    before = t.callbacks[2].before_step

    def full(trainer):
        before(trainer)
        if trainer.step == 5:
            t.callbacks[2].file = FullFile(t.callbacks[2].file)

    t.callbacks[2].before_step = full
    with pytest.raises(RuntimeError, match='log.csv.*No space') as e:
        t.fit(9)
    assert one_line(e) and torch.load(tmp_path / 'ck' / '000003.pt', weights_only=True)['step'] == 3
    monkeypatch.setattr(callbacks, 'save_png', disk_full)
    with pytest.raises(RuntimeError, match='000002.png.*No space') as e:
        gan([SampleGrid(lambda: np.zeros((4, 4, 3), np.uint8), tmp_path / 'samples', every=2)]).fit(4)
    assert one_line(e)


def test_unwritable_folder(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    grid = SampleGrid(lambda: np.zeros((4, 4, 3), np.uint8), tmp_path / 'file' / 'samples', every=1)
    for cb in (Checkpoint(tmp_path / 'file' / 'ck', every=1), CsvLog(tmp_path / 'file' / 'log.csv'), grid):
        with pytest.raises(RuntimeError, match='could not write.*file') as e:
            gan([cb]).fit(2)
        assert one_line(e)
    assert (tmp_path / 'file').read_text() == 'not a folder'


# --- NaN ---


def broken_at(step, value=float('nan')):
    "Callbacks of a run whose batches become NaN"

    class Break(Callback):
        def before_step(self, t):
            if t.step == step:
                t.data.x = torch.full_like(t.data.x, value)

    return Break()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_diverged_training_stops_and_keeps_the_last_good_checkpoint(tmp_path, value):
    t = gan(lambda nets: [broken_at(7, value), *run_folder(tmp_path)(nets)])
    with pytest.raises(TrainingDiverged, match=r'D_adv.* step 8; the last good checkpoint is .*000006\.pt') as e:
        t.fit(20)
    assert one_line(e) and 'G,' not in str(e.value) and isinstance(e.value, RuntimeError)
    good = torch.load(tmp_path / 'ck' / '000006.pt', weights_only=True)
    assert all(w.isfinite().all() for n in good['nets'].values() for w in n.values())
    assert all(w.isfinite().all() for w in good['callbacks']['Ema']['nets']['G'].values())
    same_run(finished(tmp_path / 'a'), finished(tmp_path, init=3))


def test_diverged_before_any_checkpoint(tmp_path):
    with pytest.raises(TrainingDiverged, match='no checkpoint'):
        gan(lambda nets: [broken_at(1), *run_folder(tmp_path)(nets)]).fit(5)
    assert not checkpoints(tmp_path / 'ck')


def test_the_message_names_no_unreadable_checkpoint(tmp_path):
    gan(run_folder(tmp_path)).fit(9)
    (tmp_path / 'ck' / '000009.pt').write_bytes(b'gone')
    with pytest.warns(UserWarning), pytest.raises(TrainingDiverged, match=r'000006\.pt'):
        gan(lambda nets: [broken_at(7), *run_folder(tmp_path)(nets)]).fit(20)


def test_weights_that_broke_behind_finite_losses_are_not_saved(tmp_path):
    t = gan(run_folder(tmp_path))

    def poison(t):  # the losses of step 6 are finite, the gradient is not
        if t.step == 5:
            t.nets.D[0].weight.register_hook(lambda g: g * float('inf'))

    t.phases[1].loss = lambda n, b, d=t.phases[1].loss: (poison(t), d(n, b))[1]
    with pytest.raises(TrainingDiverged, match=r'network D.* step 6; the last good checkpoint is .*000003\.pt') as e:
        t.fit(20)
    assert one_line(e) and [p.name for p in checkpoints(tmp_path / 'ck')] == ['000003.pt']


def test_nan_in_any_part_of_a_batch_is_seen():
    t = gan([StopOnNan()], batch_size=4, accumulate=2)
    t.data.x[:4] = float('nan')  # the first part; the second is fine
    with pytest.raises(TrainingDiverged, match='D_adv'):
        t.fit(1)


# --- other callbacks ---


def test_ema_follows_its_definition():
    class Record(Callback):
        def __init__(self):
            self.seen = []

        def after_step(self, t):
            self.seen.append((t.images, t.nets.G[0].weight.detach().double().clone()))

    t = gan(lambda nets: [Ema(G=nets['G'], halflife=60, rampup=0.5), Record()])
    want, last = t.callbacks[0].nets['G'][0].weight.double(), 0
    t.fit(30)
    for images, w in t.callbacks[1].seen:
        half = min(60, 0.5 * images)
        want, last = want + (w - want) * (1 - 0.5 ** ((images - last) / half)), images
    torch.testing.assert_close(t.callbacks[0].nets['G'][0].weight.double(), want, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in t.callbacks[0].nets['G'].parameters())


def test_ema_copies_buffers():
    net = nn.Sequential(nn.BatchNorm1d(2))
    phase = Phase('N', lambda n, b: n.N(b['x'] + 5).square().mean(), torch.optim.SGD(net.parameters(), lr=0.1))
    ema = Ema(N=net)
    Trainer({'N': net}, [phase], Points(8), [ema]).fit(5)
    assert torch.equal(ema.nets['N'][0].running_mean, net[0].running_mean) and net[0].running_mean.mean() > 1
    assert ema.nets['N'][0].num_batches_tracked == 5 and not ema.nets['N'].training


def test_fade_sets_the_batch_size_of_the_coming_step():
    growth, seen = Growth(8, batches=4, batch_size={4: 8, 8: 2}), []

    class Look(Callback):
        def after_step(self, t):
            seen.append((fade.size, fade.alpha, t.images))

    fade = Fade(growth)
    t = gan([fade, Look()])
    t.fit(8)
    assert [s[:2] for s in seen] == [growth.at(i)[:2] for i in range(8)]
    assert [s[2] for s in seen] == [8, 16, 24, 32, 34, 36, 38, 40]


def test_sample_grids_leave_the_noise_alone(tmp_path):
    grid = SampleGrid(lambda: np.zeros((4, 4, 3), np.uint8), tmp_path, every=3)
    a = gan([grid])
    a.fit(7)
    b = gan()
    b.fit(7)
    same(weights(a), weights(b))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['000003.png', '000006.png', '000007.png']


def test_callbacks_are_closed_whatever_happens():
    closed = []

    class Close(Callback):
        def close(self, t):
            closed.append(t.step)

    def stop(t):
        if t.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gan([Close()], fail=stop).fit(5)
    gan([Close()]).fit(3)
    assert closed == [2, 3]
