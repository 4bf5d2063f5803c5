"""Frozen networks, lazy phases, interrupts, best and odd checkpoints, logs that widen, trackers, averages."""

import copy
import os
import signal
import subprocess
import sys
import threading
import types
import warnings
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from faults import contents, exit_codes, one_line, rows, same
from test_train import Points, gan, mlp, run_folder, weights
from torch import nn
from torch.utils.data import DataLoader

from medsketch.cli import main
from medsketch.train import callbacks
from medsketch.train import checkpoints as files
from medsketch.train.callbacks import (
    CsvLog,
    Ema,
    Fade,
    Progress,
    SampleGrid,
    Track,
    refresh_batchnorm,
)
from medsketch.train.checkpoints import (
    Checkpoint,
    StopOnNan,
    TrainingDiverged,
    checkpoints,
    read_checkpoint,
    sweep,
)
from medsketch.train.growth import Growth
from medsketch.train.losses import logistic_d, r1_penalty
from medsketch.train.trainer import (
    Callback,
    Interrupts,
    Phase,
    Trainer,
    batch_length,
    keyed,
    rng_state,
    to_device,
)


def at(step, do):
    "A callback that does something after one step"

    class At(Callback):
        def after_step(self, t):
            if t.step == step:
                do(t)

    return At()


class Scores(Callback):
    "Writes a score after some steps"

    scores = ('fid',)

    def __init__(self, at):
        self.at = at

    def after_step(self, t):
        if t.step in self.at:
            t.scores['fid'] = self.at[t.step]


# --- callback states ---


def two_averages(nets):
    return [Ema(G=nets['G'], halflife=h, rampup=1.0) for h in (5, 500)]


def test_two_callbacks_of_a_class_keep_their_own_state():
    t, again = gan(two_averages), gan(two_averages, init=3)
    t.fit(6)
    again.load_state_dict(t.state_dict())
    for a, b in zip(t.callbacks, again.callbacks):
        same(a.state_dict(), b.state_dict())
    assert not torch.equal(t.callbacks[0].nets['G'][0].weight, t.callbacks[1].nets['G'][0].weight)
    assert [k for k, _ in keyed([*t.callbacks, Fade(Growth(8)), *t.callbacks])] == [
        'Ema',
        'Ema.2',
        'Fade',
        'Ema.3',
        'Ema.4',
    ]


def test_checkpoints_of_earlier_versions_load(tmp_path):
    "Keyed by class, no scores, Adam not corrected"
    t = gan(run_folder(tmp_path))
    t.fit(6)
    path = checkpoints(tmp_path / 'ck')[-1]
    state = torch.load(path, weights_only=True)
    del state['scores'], state['callbacks']['Checkpoint']['score']
    group = state['opts'][1]['param_groups'][0]
    assert group.pop('lazy') == 0.8
    group |= {'lr': 0.01, 'betas': (0.0, 0.99)}
    torch.save(state, path)
    again = gan(run_folder(tmp_path), init=4)
    again.fit(6)
    same(weights(again), weights(t))
    same(again.callbacks[1].state_dict(), t.callbacks[1].state_dict())
    assert again.opts[1].param_groups[0]['lr'] == pytest.approx(0.008) and again.scores == {}
    old_two = gan(two_averages, init=5)
    old_two.load_state_dict(state | {'callbacks': {'Ema': state['callbacks']['Ema']}})  # the last one had written it
    same(old_two.callbacks[1].state_dict(), t.callbacks[1].state_dict())


# --- frozen networks ---


def undo(**kwargs):
    "U learns to undo F, which has a batch norm and dropout, and is frozen"
    torch.manual_seed(2)
    fixed = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    fixed[0].bias.requires_grad_(False)
    learns = mlp(2, 2)

    def loss(n, b):
        assert not any(p.requires_grad for p in n.F.parameters())
        return (n.F(n.U(b['x'])) - b['x']).square().mean()

    phase = Phase('U', loss, torch.optim.Adam(learns.parameters(), 0.01))
    return Trainer({'U': learns}, [phase], Points(8), frozen={'F': fixed}, **kwargs), fixed


def test_frozen_networks_are_frozen():
    toggle = at(3, lambda t: t.nets.F.train())  # as a careless sample grid would leave it
    t, fixed = undo(callbacks=[toggle])
    before, learned = copy.deepcopy(fixed.state_dict()), weights(t)
    assert not t.nets.F.training
    t.fit(10), t.fit(20)
    same(dict(fixed.state_dict()), dict(before))
    assert not fixed.training and t.nets.U.training
    assert [p.requires_grad for p in fixed.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in fixed.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(learned, t.params))  # the gradient passed through
    assert list(t.state_dict()['nets']) == ['U']
    other, _ = undo()
    other.load_state_dict(t.state_dict())


def test_a_frozen_network_costs_no_gradient_of_its_weights():
    t, fixed = undo()
    seen = []
    loss = t.phases[0].loss

    def watched(n, b):
        out = loss(n, b)

        def walk(f):
            if f is None:
                return
            if hasattr(f, 'variable'):
                seen.append(f.variable)
            for g, _ in f.next_functions:
                walk(g)

        walk(out.grad_fn)
        return out

    t.phases[0].loss = watched
    t.fit(1)
    assert seen and not {id(v) for v in seen} & {id(p) for p in fixed.parameters()}


def test_what_learns_cannot_be_frozen():
    net = mlp(2, 1)
    phase = Phase('D', lambda n, b: n.D(b['x']).mean(), torch.optim.SGD(net.parameters(), 0.1))
    for nets, frozen in [({'D': net}, {'D': net}), ({}, {'D': net})]:
        with pytest.raises(ValueError, match='frozen') as e:
            Trainer(nets, [phase], Points(4), frozen=frozen)
        assert one_line(e)


# --- lazy phases ---


def by_hand(steps, every, lr=0.01, betas=(0.5, 0.99)):
    "D and its lazy R1 in a plain loop, Adam corrected as in StyleGAN2, appendix B"
    torch.manual_seed(0)
    net, data, c = mlp(2, 1).double(), iter(Points(8, dtype=torch.float64)), every / (every + 1)
    opt = torch.optim.Adam(net.parameters(), lr * c, [b**c for b in betas])
    for i in range(steps):
        b = next(data)
        losses = [logistic_d(net(b['x']), net(b['x'] + 3))]
        if i % every == 0:
            losses.append(None)
        for loss in losses:
            (every * r1_penalty(net, b['x']) if loss is None else loss).backward()
            opt.step(), opt.zero_grad()
    return list(net.parameters())


def lazy_d(every, opt=None, **kwargs):
    torch.manual_seed(0)
    net = mlp(2, 1).double()
    opt = torch.optim.Adam(net.parameters(), 0.01, (0.5, 0.99)) if opt is None else opt

    def d(n, b):
        return logistic_d(n.D(b['x']), n.D(b['x'] + 3))

    phases = [Phase('D', d, opt), Phase('R1', lambda n, b: r1_penalty(n.D, b['x']), opt, every, **kwargs)]
    return Trainer({'D': net}, phases, Points(8, dtype=torch.float64))


@pytest.mark.parametrize('every', [3, 4])
def test_a_lazy_phase_is_as_a_loop_by_hand(every):
    t = lazy_d(every)
    t.fit(11)
    for a, b in zip(t.params, by_hand(11, every)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_adam_is_corrected_once():
    t = lazy_d(4)
    again = Trainer(dict(vars(t.nets)), t.phases, t.data)  # a second trainer over the same optimisers
    assert again.opts[0].param_groups[0]['lr'] == pytest.approx(0.008, rel=1e-12)
    t.fit(5)
    resumed = lazy_d(4)
    for _ in range(2):
        resumed.load_state_dict(copy.deepcopy(t.state_dict()))
    t.fit(9), resumed.fit(9)
    same(weights(resumed), weights(t))
    group = resumed.opts[0].param_groups[0]
    assert group['lr'] == pytest.approx(0.008, rel=1e-12) and group['betas'][1] == pytest.approx(0.99**0.8, rel=1e-12)


def test_what_is_not_corrected():
    net = mlp(2, 1)

    def trainer(opt, *phases):
        return Trainer({'D': net}, [Phase(str(i), None, opt, **p) for i, p in enumerate(phases)], Points(8))

    alone = torch.optim.Adam(net.parameters(), 0.01)
    before = copy.deepcopy(alone.state_dict())
    trainer(alone, {'every': 5})
    same(alone.state_dict(), before)
    sgd = torch.optim.SGD(net.parameters(), 0.01)
    trainer(sgd, {}, {'every': 4})
    assert sgd.param_groups[0]['lr'] == 0.01
    three = torch.optim.Adam(net.parameters(), 0.01)
    trainer(three, {}, {'every': 4}, {'every': 2})
    assert three.param_groups[0]['lr'] == pytest.approx(0.01 / 1.75)


@pytest.mark.parametrize('lazy, factor', [(True, 5), (False, 1)])
def test_the_factor_is_in_the_gradient_and_not_in_the_log(lazy, factor):
    net = nn.Linear(2, 1, bias=False)
    start = net.weight.detach().clone()
    phase = Phase('L', lambda n, b: n.N.weight.sum(), torch.optim.SGD(net.parameters(), 0.1), every=5, lazy=lazy)
    t = Trainer({'N': net}, [phase], Points(4))
    t.fit(5)
    torch.testing.assert_close(net.weight, start - 0.1 * factor)
    torch.testing.assert_close(t.losses['L'], start.sum())


# --- batches ---

Pair = namedtuple('Pair', 'a b')


def test_lists_and_nested_tensors_reach_the_losses():
    batch = {
        'path': ['a', 'b', 'c'],
        'classes': torch.arange(7),
        'n': 3,
        'image': torch.zeros(3, 1, 4, 4),
        'more': {'boxes': [torch.ones(2, 4), torch.ones(1, 4)], 'pair': Pair(torch.ones(3), 'x')},
    }
    seen = []
    net = nn.Linear(1, 1)

    def loss(n, b):
        seen.append(b)
        return n.N.weight.sum()

    Trainer({'N': net}, [Phase('N', loss, torch.optim.SGD(net.parameters(), 0.1))], [batch]).fit(2)
    same(seen[0], batch)
    assert seen[0] is not batch and seen[0]['image'].is_contiguous(memory_format=torch.channels_last)
    meta = to_device(batch, 'meta')
    assert meta['more']['boxes'][1].is_meta and meta['more']['pair'].a.is_meta and meta['path'] == batch['path']


@pytest.mark.parametrize(
    'batch, n',
    [
        ({'path': ['a'] * 9, 'image': torch.zeros(3, 1, 4, 4)}, 3),
        ({'table': torch.zeros(9, 4), 'image': torch.zeros(3, 1, 4, 4)}, 3),
        ({'scale': torch.tensor(2.0), 'x': torch.zeros(4, 2)}, 4),
        ({'planes': {'mask': torch.zeros(5, 4, 4)}}, 5),
        ({'path': ['a']}, 0),
    ],
)
def test_images_are_counted_by_their_tensors(batch, n):
    assert batch_length(batch) == n


def test_data_that_end_begin_again():
    def trainer(data):
        net = nn.Linear(1, 1)
        phase = Phase('N', lambda n, b: n.N(b['x']).square().mean(), torch.optim.SGD(net.parameters(), 0.1))
        return Trainer({'N': net}, [phase], data)

    t = trainer(DataLoader([{'x': torch.ones(1)}] * 6, batch_size=4))
    t.fit(5)
    assert t.images == 4 + 2 + 4 + 2 + 4
    with pytest.raises(ValueError, match='no batch') as e:
        trainer([]).fit(1)
    assert one_line(e)
    endless = ({'x': torch.ones(2, 1)} for _ in iter(int, 1))
    t = trainer(endless)
    t.fit(1), t.fit(3)  # the first fit has not closed it
    assert t.step == 3


# --- interrupts ---


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_step_end(tmp_path, number):
    "In the middle of a step, between two phases"
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    through = gan(run_folder(tmp_path / 'through', every=100))
    through.fit(9)

    def strike(t):
        if t.step == 4:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt, match=rf'{number.name}.*step 5 of 9.*000005\.pt.*--resume') as e:
        gan(run_folder(tmp_path, every=100), fail=strike).fit(9)
    assert one_line(e) and [p.name for p in checkpoints(tmp_path / 'ck')] == ['000005.pt']
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    again = gan(run_folder(tmp_path, every=100), init=3)
    again.fit(9)
    same(again.state_dict(), through.state_dict())
    assert rows(tmp_path / 'log.csv') == rows(tmp_path / 'through' / 'log.csv')


def test_a_signal_in_the_last_step_is_heeded_too():
    seen = []

    class Watch(Callback):
        def interrupt(self, t):
            seen.append(('interrupt', t.step))

        def after_fit(self, t):
            seen.append('after_fit')

    with pytest.raises(KeyboardInterrupt, match='step 3 of 3'):
        gan([Watch(), at(3, lambda t: signal.raise_signal(signal.SIGTERM))]).fit(3)
    assert seen == [('interrupt', 3)]


def test_a_second_signal_stops_at_once():
    steps, before = [], signal.getsignal(signal.SIGINT)

    def strike(t):
        steps.append(t.step)
        signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)
        steps.append('not reached')

    with pytest.raises(KeyboardInterrupt, match='second'):
        gan(fail=strike).fit(3)
    assert steps == [0] and signal.getsignal(signal.SIGINT) is before


def test_interrupted_with_nothing_to_keep(tmp_path):
    with pytest.raises(KeyboardInterrupt, match='step 2 of 9; nothing was saved'):
        gan([at(2, lambda t: signal.raise_signal(signal.SIGTERM))]).fit(9)

    class First(Callback):
        def before_fit(self, t):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match='step 0 of 9; nothing'):
        gan([First(), Checkpoint(tmp_path)]).fit(9)

    class Last(Callback):
        def after_fit(self, t):
            signal.raise_signal(signal.SIGINT)

    t = gan([Last()])
    with pytest.raises(KeyboardInterrupt, match='complete'):
        t.fit(2)
    assert t.step == 2


def test_interrupted_weights_that_broke_are_not_saved(tmp_path):
    def strike(t):
        t.nets.D[0].weight.data.fill_(float('nan'))
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingDiverged, match='000003.pt'):
        gan(lambda nets: [*run_folder(tmp_path)(nets), at(4, strike)]).fit(9)
    assert [p.name for p in checkpoints(tmp_path / 'ck')] == ['000003.pt']


def test_no_handlers_outside_the_main_thread():
    seen = []

    def train():
        gan([at(1, lambda t: seen.append(signal.getsignal(signal.SIGTERM)))]).fit(2)

    thread = threading.Thread(target=train)
    thread.start(), thread.join()
    assert seen == [signal.SIG_DFL]


def test_a_child_process_dies_as_ever():
    def child():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with Interrupts():
            assert exit_codes(lambda: os.kill(os.getpid(), signal.SIGTERM)) == [-signal.SIGTERM]

    assert exit_codes(child) == [0]


SCRIPT = '''
import signal, sys, time
sys.path.insert(0, {tests!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
from test_train import gan, run_folder
def slow(t):
    print(t.step, flush=True)
    if t.step > 3: time.sleep(.2)
gan(run_folder({folder!r}, every=1000), fail=slow).fit(200)
'''


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_from_outside(tmp_path, number):
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    p = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if line.strip() == '4':
            break
    p.send_signal(number)
    _, err = p.communicate(timeout=60)
    assert p.returncode != 0 and 'KeyboardInterrupt' in err and number.name in err.splitlines()[-1]
    (kept,) = checkpoints(tmp_path / 'ck')
    assert 4 < torch.load(kept, weights_only=True)['step'] == int(kept.stem) < 20 and str(kept) in err


# --- when a checkpoint is written ---


def test_the_first_checkpoint_comes_early(tmp_path):
    gan([Checkpoint(tmp_path / 'a', every=1000, keep=99, early=0.0)]).fit(7)
    assert [p.stem for p in checkpoints(tmp_path / 'a')] == ['000001', '000007']  # then no more before ten minutes
    gan([Checkpoint(tmp_path / 'b', every=1000, keep=99, early=0.0, minutes=0.0)]).fit(4)
    assert [p.stem for p in checkpoints(tmp_path / 'b')] == ['000001', '000002', '000003', '000004']
    gan([Checkpoint(tmp_path / 'c', every=1000, keep=99)]).fit(4)
    assert [p.stem for p in checkpoints(tmp_path / 'c')] == ['000004']
    assert (Checkpoint('x').early, Checkpoint('x').minutes) == (30.0, 10.0)


@pytest.mark.parametrize('given', [{'every': 2}, {}])
def test_nothing_waits_for_the_device_between_looks(tmp_path, monkeypatch, given):
    every = given.get('every', 50)
    waits = []
    for name in ('item', 'tolist', '__bool__', '__float__'):
        before = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, before=before: (waits.append(t.step), before(self, *a))[1]
        )

    class Forget(Callback):
        def before_step(self, t):
            self.n = len(waits)

        def after_step(self, t):
            waits[self.n :] = []  # what the step itself did

    t = gan([Forget(), StopOnNan(**given), Checkpoint(tmp_path, every=1000, best='G')])
    t.fit(120)
    waits = [w for w in waits if w]
    assert set(waits) <= {s for s in range(1, 121) if s % 50 == 0 or s % every == 0 or s == 120}
    assert {50, 100, 120} <= set(waits)


@pytest.mark.parametrize('value', [float('nan'), float('-inf')])
def test_one_bad_loss_among_fifty_is_noticed(tmp_path, value):
    t = gan(lambda nets: [StopOnNan(tmp_path), Checkpoint(tmp_path, every=10, keep=9)])
    loss = t.phases[0].loss

    def once(n, b):
        out = loss(n, b)
        # finite again afterwards, and no gradient
        return {'fine': out, 'odd': out.detach() * (value if t.step == 32 else 0)}

    t.phases[0].loss = once
    (tmp_path / '000031.pt').write_bytes(b'gone')
    with (
        warnings.catch_warnings(),
        pytest.raises(TrainingDiverged, match=r'G_odd is not finite at step 33; .*000030\.pt') as e,
    ):
        warnings.simplefilter('ignore')
        t.fit(60)
    assert one_line(e) and t.step == 40


# --- the best ---


def test_the_best_by_score_is_read_back(tmp_path):
    marks = {}

    def run(d, steps, init=0):
        t = gan(
            lambda nets: [
                Ema(G=nets['G'], halflife=50),
                Scores({3: 5.0, 7: 2.0, 11: 3.0, 14: 1.0}),
                at(7, lambda t: marks.update(G=weights(t), E=copy.deepcopy(t.callbacks[0].nets['G'].state_dict()))),
                Checkpoint(d, every=5, best='fid'),
            ],
            init=init,
        )
        t.fit(steps)
        return t

    t = run(tmp_path, 12)
    same(weights(t), marks['G']), same(dict(t.callbacks[0].nets['G'].state_dict()), dict(marks['E']))
    assert (
        t.step == 12 and t.scores == {'fid': 3.0} and torch.load(tmp_path / 'best.pt', weights_only=True)['step'] == 7
    )
    assert not torch.equal(
        torch.load(tmp_path / '000012.pt', weights_only=True)['nets']['G']['0.weight'], t.nets.G[0].weight
    )
    before = contents(tmp_path)
    again = run(tmp_path, 12, init=4)  # a finished run that is taken up again
    same(weights(again), weights(t)), same(again.callbacks[0].state_dict()['nets'], t.callbacks[0].state_dict()['nets'])
    assert contents(tmp_path) == before and again.scores == t.scores
    longer, through = run(tmp_path, 13, init=4), run(tmp_path / 'through', 13)
    same(longer.state_dict(), through.state_dict())
    # went on from the last, not the best
    longer, through = run(tmp_path, 20, init=4), run(tmp_path / 'through2', 20)
    same(longer.state_dict(), through.state_dict())
    assert torch.load(tmp_path / 'best.pt', weights_only=True)['step'] == 14


def test_the_best_by_a_loss_is_read_back(tmp_path):
    def trainer():
        t = gan(lambda nets: [Checkpoint(tmp_path, every=1, keep=99, best='G')])
        loss = t.phases[0].loss
        t.phases[0].loss = lambda n, b: loss(n, b) * 0 + (abs(t.step - 5) + 1.0)
        return t

    t = trainer()
    t.fit(12)
    mean, means = None, []
    for step in range(1, 13):
        v = abs(step - 1 - 5) + 1.0
        mean = v if mean is None else 0.95 * mean + 0.05 * v
        means.append(mean)
    best = torch.load(tmp_path / 'best.pt', weights_only=True)
    assert best['step'] == int(np.argmin(means)) + 1 < 12 and t.callbacks[0].lowest == pytest.approx(min(means))
    same({k: dict(v) for k, v in best['nets'].items()}, {k: dict(n.state_dict()) for k, n in vars(t.nets).items()})


def test_best_does_not_count_while_a_network_grows(tmp_path):
    "Nor does a score of that time count after a resume"
    growth = Growth(8, batches=4, fade=0.5)

    def run(d, steps):
        t = gan(
            lambda nets: [Fade(growth), Scores({2: 1.0, 5: 2.0, 7: 4.0, 8: 3.0}), Checkpoint(d, every=3, best='fid')]
        )
        t.fit(steps)
        return t

    run(tmp_path / 'b', 5)
    assert run(tmp_path / 'b', 6).callbacks[2].lowest == float('inf')
    for d in (tmp_path / 'a', tmp_path / 'b'):
        assert run(d, 9).callbacks[2].lowest == 3.0 and torch.load(d / 'best.pt', weights_only=True)['step'] == 8


def test_a_best_of_later_steps_is_not_read_back(tmp_path):
    "Of a run whose last checkpoints are gone"

    def trainer():
        return gan([Scores({3: 5.0, 7: 2.0}), Checkpoint(tmp_path, every=5, keep=9, best='fid')])

    trainer().fit(10)
    (tmp_path / '000010.pt').unlink()
    t = trainer()
    with pytest.warns(UserWarning, match='best.pt cannot be read back .*step 7'):
        t.fit(6)
    last = torch.load(tmp_path / '000006.pt', weights_only=True)
    same({k: dict(v) for k, v in last['nets'].items()}, {k: dict(n.state_dict()) for k, n in vars(t.nets).items()})


def test_an_unknown_best_is_refused(tmp_path):
    with pytest.raises(ValueError, match="best='g'.*D_adv.*G") as e:
        gan([Checkpoint(tmp_path, best='g')]).fit(60)
    assert one_line(e)
    t = gan([Scores({55: 1.0}), Checkpoint(tmp_path / 'b', best='fid')])  # a score that comes late is none
    t.fit(60)
    assert t.callbacks[1].lowest == 1.0


def test_a_best_that_cannot_be_read_leaves_the_last(tmp_path):
    t = gan([Checkpoint(tmp_path, every=2, best='G'), at(6, lambda t: (tmp_path / 'best.pt').write_bytes(b'gone'))])
    with pytest.warns(UserWarning, match='best.pt cannot be read back'):
        t.fit(6)
    last = torch.load(tmp_path / '000006.pt', weights_only=True)
    same({k: dict(v) for k, v in last['nets'].items()}, {k: dict(n.state_dict()) for k, n in vars(t.nets).items()})


# --- damaged and odd checkpoints ---

ODD = {
    'step': 'x',
    'nets': None,
    'meta': None,
    'images': None,
    'losses': {'G': 'x'},
    'rng': {'torch': 3},
    'opts': 'abc',
    'callbacks': None,
    'position': 'x',
}


@pytest.mark.parametrize(
    'change',
    [
        *({k: v} for k, v in ODD.items()),
        {'callbacks': {'Ema': None}},
        {'opts': [None, None]},
        {'callbacks': {'Ema': {'seen': 'x', 'nets': {}}}},
        {'step': 8},
        {'rng': None},
        {'callbacks': {'Checkpoint': {'mean': 'x', 'lowest': 'y'}}},
        {'nets': {'G': None, 'D': None}},
        {'scores': {'fid': 'x'}},
    ],
    ids=str,
)
def test_odd_contents_fall_back_to_the_one_before(tmp_path, change):
    whole = gan(run_folder(tmp_path / 'whole'))
    whole.fit(11)
    gan(run_folder(tmp_path)).fit(9)
    state = torch.load(tmp_path / 'ck/000009.pt', weights_only=True) | change
    if change.get('callbacks') and 'Ema' in change['callbacks'] and change['callbacks']['Ema']:
        state['callbacks']['Ema']['nets'] = torch.load(tmp_path / 'ck/000006.pt', weights_only=True)['callbacks'][
            'Ema'
        ]['nets']
    torch.save(state, tmp_path / 'ck/000009.pt')
    t = gan(run_folder(tmp_path), init=3)
    with pytest.warns(UserWarning, match='000009.pt cannot be read.*before it'):
        t.fit(11)
    same(t.state_dict(), whole.state_dict())


def put_in(*path, to):
    "Change one entry of a nested state"

    def change(state):
        for k in path[:-1]:
            state = state[k]
        state[path[-1]] = to(state[path[-1]]) if callable(to) else to

    return change


HUGE = torch.zeros(1).expand(10**13)  # takes four bytes in the file
HARM = {
    'a count below zero': put_in('images', to=-3),
    'a loss of two numbers': put_in('losses', 'G', to=torch.zeros(2)),
    'a loss of terabytes': put_in('losses', 'G', to=HUGE),
    'a score of terabytes': put_in('callbacks', 'Checkpoint', 'mean', to=HUGE),
    'averages of terabytes': put_in('opts', 0, 'state', 0, 'exp_avg', to=HUGE),
    'averages of another shape': put_in('opts', 0, 'state', 0, 'exp_avg', to=torch.zeros(3)),
    'averages of one number': put_in('opts', 0, 'state', 0, 'exp_avg_sq', to=torch.zeros(1)),
    'averages that end outside': put_in(
        'opts', 0, 'state', 0, 'exp_avg', to=lambda t: torch.zeros(t.numel() + 1)[-1:].expand(t.numel()).view(t.shape)
    ),
    'averages in words': put_in('opts', 0, 'state', 0, 'exp_avg', to='x'),
    'many steps': put_in('opts', 0, 'state', 0, 'step', to=torch.zeros(2)),
    'a rate in words': put_in('opts', 0, 'param_groups', 0, 'lr', to='x'),
    'a rate that is a truth': put_in('opts', 0, 'param_groups', 0, 'lr', to=True),
    'one beta': put_in('opts', 0, 'param_groups', 0, 'betas', to=(0.5,)),
    'betas in words': put_in('opts', 0, 'param_groups', 0, 'betas', to=('x', 'y')),
    'no betas': put_in('opts', 0, 'param_groups', 0, 'betas', to=3),
}


@pytest.mark.parametrize('harm', HARM)
def test_what_would_harm_a_process_falls_back_to_the_one_before(tmp_path, harm):
    "A fused step writes beyond averages that are too small, which ends the process"
    whole = gan(run_folder(tmp_path / 'whole'))
    whole.fit(11)
    gan(run_folder(tmp_path)).fit(9)
    state = torch.load(tmp_path / 'ck/000009.pt', weights_only=True)
    HARM[harm](state)
    torch.save(state, tmp_path / 'ck/000009.pt')

    def resumed():
        t = gan(run_folder(tmp_path), init=3)
        with pytest.warns(UserWarning, match='000009.pt cannot be read.*before it'):
            t.fit(11)
        same(t.state_dict(), whole.state_dict())

    assert exit_codes(resumed) == [0]


def test_a_packed_checkpoint_is_not_unpacked(tmp_path):
    "It could be thousands of times as large as its file"
    with zipfile.ZipFile(tmp_path / '000001.pt', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('archive/data.pkl', bytes(1 << 20))
    with pytest.raises(TypeError, match='packed'):
        read_checkpoint(tmp_path / '000001.pt')


def test_odd_contents_and_nothing_before_begin_anew(tmp_path):
    whole = gan(run_folder(tmp_path / 'whole'))
    whole.fit(5)
    gan(run_folder(tmp_path)).fit(3)
    # found out after the networks were loaded
    state = torch.load(tmp_path / 'ck/000003.pt', weights_only=True) | {'position': 'x'}
    torch.save(state, tmp_path / 'ck/000003.pt')
    t = gan(run_folder(tmp_path))
    with pytest.warns(UserWarning, match='000003.pt'):
        t.fit(5)
    same(t.state_dict(), whole.state_dict())


def test_flipped_bytes_are_seen(tmp_path):
    gan(run_folder(tmp_path)).fit(6)
    path = tmp_path / 'ck/000006.pt'
    data = path.read_bytes()
    where = data.index(torch.load(path, weights_only=True)['nets']['G']['0.weight'].numpy().tobytes())
    path.write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
    assert torch.load(path, weights_only=True)['step'] == 6  # torch itself does not notice
    t = gan(run_folder(tmp_path), init=3)
    with pytest.warns(UserWarning, match='000006.pt cannot be read'):
        t.fit(7)
    whole = gan(run_folder(tmp_path / 'whole'))
    whole.fit(7)
    same(t.state_dict(), whole.state_dict())


def test_a_refused_checkpoint_leaves_the_trainer_alone(tmp_path):
    t = gan([Checkpoint(tmp_path)])
    t.fit(3)
    other = gan([Checkpoint(tmp_path)], init=5)
    other.nets.D = mlp(5, 2)
    before = weights(other)
    with pytest.raises(ValueError, match='other networks'):
        other.fit(4)
    same(weights(other), before)
    assert other.step == 0


def test_left_over_files_are_swept(tmp_path):
    names = [
        '.000003.pt.abc.tmp',
        '.best.pt.abc.tmp',
        '.log.csv.abc.tmp',
        '.000003.png.abc.tmp',
        '.config.json.abc.tmp',
        '.weights.safetensors.abc.tmp',
    ]
    keep = ['notes.tmp', '.hidden', '000001.png']
    for d in (tmp_path, tmp_path / 'ck', tmp_path / 'samples'):
        d.mkdir(exist_ok=True)
        for n in names + keep:
            (d / n).write_text('x')
    grid = SampleGrid(lambda: np.zeros((4, 4, 3), np.uint8), tmp_path / 'samples', every=2)
    gan(lambda nets: [grid, *run_folder(tmp_path)(nets)]).fit(3)
    for d in (tmp_path / 'ck', tmp_path / 'samples'):
        assert not [n for n in names if (d / n).exists()] and all((d / n).exists() for n in keep)
    assert not (tmp_path / '.log.csv.abc.tmp').exists()
    sweep(tmp_path)
    assert not [n for n in names if (tmp_path / n).exists()]


def test_the_lock_of_windows(tmp_path, monkeypatch):
    taken = []

    def locking(fd, mode, n):
        if taken:
            raise PermissionError(13, 'Permission denied')
        taken.append(fd)

    monkeypatch.setattr(files, 'fcntl', None)
    monkeypatch.setattr(files, 'msvcrt', types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    gan([Checkpoint(tmp_path)]).fit(2)
    with pytest.raises(ValueError, match='another training') as e:
        gan([Checkpoint(tmp_path)]).fit(3)
    assert one_line(e) and len(taken) == 1


# --- the log ---


def test_columns_that_appear_later(tmp_path):
    def run(d, steps, stop=None):
        late = at(5, lambda t: late.more.update(alpha=0.5))
        late.more = {}
        t = gan(
            [
                Scores({7: 12.5, 11: 8.0}),
                late,
                CsvLog(d / 'log.csv', every=2, extra=lambda: dict(late.more)),
                Checkpoint(d, every=4),
            ]
        )
        t.fit(steps)

    run(tmp_path / 'a', 12)
    log = rows(tmp_path / 'a/log.csv')
    assert [r['step'] for r in log] == ['2', '4', '6', '8', '10', '12']
    assert [r['fid'] for r in log] == ['', '', '', '12.5', '12.5', '8']
    assert [r['alpha'] for r in log] == ['', '', *['0.5'] * 4]
    assert all(float(r['G']) for r in log)
    run(tmp_path / 'b', 8), run(tmp_path / 'b', 12)
    assert rows(tmp_path / 'b/log.csv')[-1]['fid'] == '8'
    assert [r['step'] for r in rows(tmp_path / 'b/log.csv')] == [r['step'] for r in log]


FOREIGN = {
    'binary': b'\xff\xfe\x00garbage',
    'other': b'epoch;loss\n1;2\n',
    'zeros': b'\0' * 100,
    'header cut': b'step,ima',
    'text': b'hello',
    'bad middle': None,
}


@pytest.mark.parametrize('kind', FOREIGN)
def test_a_log_that_is_none_never_blocks(tmp_path, kind):
    gan(run_folder(tmp_path)).fit(6)
    log = tmp_path / 'log.csv'
    whole = log.read_text()
    odd = FOREIGN[kind] or whole.replace('\n4,', '\nx,').encode()
    log.write_bytes(odd)
    (tmp_path / 'log.old.csv').write_text('there before')
    with pytest.warns(UserWarning, match='log.csv.*log.old1.csv'):
        gan(run_folder(tmp_path)).fit(9)
    assert (tmp_path / 'log.old1.csv').read_bytes() == odd and (tmp_path / 'log.old.csv').read_text() == 'there before'
    assert [r['step'] for r in rows(log)] == (['2', '6', '8', '9'] if kind == 'bad middle' else ['8', '9'])


@pytest.mark.filterwarnings('error')
def test_a_last_line_cut_anywhere_is_no_damage(tmp_path):
    gan(run_folder(tmp_path)).fit(6)
    log = tmp_path / 'log.csv'
    whole = log.read_text()
    for cut in range(1, len(whole) - whole[:-1].rindex('\n')):
        log.write_text(whole[:-cut])
        c = CsvLog(log)
        assert [r['step'] for r in c._earlier(6)] == ['2', '4']


def test_a_folder_where_the_log_should_be(tmp_path):
    (tmp_path / 'log.csv').mkdir()
    with pytest.warns(UserWarning, match='log.old.csv'):
        gan([CsvLog(tmp_path / 'log.csv', every=1)]).fit(2)
    assert len(rows(tmp_path / 'log.csv')) == 2


# --- trackers ---


class Memory(GeneralTracker):
    name, requires_logging_directory, tracker = 'memory', False, None

    def __init__(self):
        super().__init__()
        self.seen, self.pictures, self.config, self.ends = [], [], None, 0

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **kwargs):
        self.seen.append((step, values))

    def log_images(self, values, step, **kwargs):
        self.pictures.append((step, values['samples'].shape))

    def finish(self):
        self.ends += 1


def test_trackers_see_losses_scores_and_samples():
    net, memory = mlp(2, 1), Memory()
    phase = Phase('N', lambda n, b: n.N(b['x']).square().mean(), torch.optim.SGD(net.parameters(), 0.01))
    made = [
        Scores({3: 7.0}),
        SampleGrid(lambda: np.zeros((4, 6, 3), np.uint8), every=4),
        Track(every=2, config={'size': 8}),
    ]
    t = Trainer({'N': net}, [phase], Points(4), made, log_with=memory)
    t.fit(5), t.fit(8)
    assert [s for s, _ in memory.seen] == [2, 4, 5, 6, 8] and memory.config == {'size': 8} and memory.ends == 2
    assert set(memory.seen[0][1]) == {'N'} and memory.seen[1][1]['fid'] == 7.0
    assert all(isinstance(v, float) for v in memory.seen[1][1].values())
    assert memory.pictures == [(4, (1, 4, 6, 3)), (5, (1, 4, 6, 3)), (8, (1, 4, 6, 3))]


def test_a_tracker_that_is_installed_is_found_and_given_a_folder(monkeypatch, tmp_path):
    "With a stand-in for TensorBoard's writer; accelerate's list and its tracker are the real ones"
    written = []

    class Writer:
        def __init__(self, folder, **_):
            written.append(str(folder))

        def __getattr__(self, name):
            return lambda *a, **_: written.append((name, a))

    writers = types.ModuleType('torch.utils.tensorboard')
    writers.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', writers)
    monkeypatch.setattr('accelerate.tracking._available_trackers', [LoggerType.TENSORBOARD])
    line = f'train dcgan --data phantoms:fundus:6 --size 16 --out {tmp_path}/run --steps 2 --scale tour'
    with pytest.raises(SystemExit) as stop:
        main([*line.split(), '--set', 'ngf=4', '--set', 'ndf=4', '--log-with', 'tensorboard'])
    assert stop.value.code == 0 and str(tmp_path / 'run') in written[0]
    assert {'G', 'D'} <= {k for name, a in written[1:] if name == 'add_scalars' or name == 'add_scalar' for k in a[:1]}


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr('medsketch.train.trainer.get_available_trackers', list)
    for name in ('tensorboard', 'wandb'):
        with pytest.raises(ValueError, match=f'pip install {name}') as e:
            gan(log_with=name)
        assert one_line(e)
    with pytest.raises(ValueError, match='nonsense'):
        gan(log_with='nonsense')


# --- averages, growth, progress ---


def normed(callbacks=(), seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    phase = Phase(
        'N',
        lambda n, b: n.N(b['x']).square().mean() + n.N(b['x'] + torch.randn(8, 2)).mean(),
        torch.optim.SGD(net.parameters(), 0.1),
    )
    return Trainer({'N': net}, [phase], Points(8), callbacks(net) if callbacks else ())


def draws(net):
    g = torch.Generator().manual_seed(9)
    for _ in range(20):
        net(torch.randn(16, 2, generator=g) + 3)
    torch.rand(3)  # a careless one


def test_batch_norm_of_an_average_is_estimated_anew(tmp_path):
    def run(d, *stops, **kw):
        for steps in stops:
            t = normed(lambda net: [Ema(N=net, halflife=40, refresh=draws), Checkpoint(d, every=4, **kw)], seed=steps)
            t.fit(steps)
        return t

    t = run(tmp_path / 'a', 10)
    noise = rng_state()
    avg = t.callbacks[0].nets['N']
    g = torch.Generator().manual_seed(9)
    h = torch.stack([avg[0](torch.randn(16, 2, generator=g) + 3) for _ in range(20)])
    torch.testing.assert_close(avg[1].running_mean, h.mean((0, 1)))
    torch.testing.assert_close(avg[1].running_var, h.var(1).mean(0))
    assert avg[1].momentum == 0.1 and not any(m.training for m in avg.modules())
    plain = normed(lambda net: [Ema(N=net, halflife=40)], seed=10)
    plain.fit(10)
    same(noise, rng_state())
    assert not torch.equal(plain.callbacks[0].nets['N'][1].running_mean, avg[1].running_mean)
    again = run(tmp_path / 'a', 10)  # a finished run
    same(again.callbacks[0].state_dict(), t.callbacks[0].state_dict())
    longer, _through = run(tmp_path / 'b', 6, 11), run(tmp_path / 'c', 11)
    # two seeds of the first weights: compare what a resumed run ends with to one that ran on in one go
    first = normed(lambda net: [Ema(N=net, halflife=40, refresh=draws), Checkpoint(tmp_path / 'd', every=4)], seed=6)
    first.fit(11)
    same(longer.callbacks[0].state_dict(), first.callbacks[0].state_dict())
    best = run(tmp_path / 'e', 10, best='N').callbacks[0].nets['N']  # read back, then estimated for what was read
    h = torch.stack([best[0](torch.randn(16, 2, generator=g.manual_seed(9) if i == 0 else g) + 3) for i in range(20)])
    torch.testing.assert_close(best[1].running_mean, h.mean((0, 1)))


def test_a_refresh_for_each_network_and_layers_nothing_passes_through():
    net = nn.ModuleDict({'a': nn.BatchNorm1d(2), 'b': nn.BatchNorm1d(2)})
    net.eval()
    net['b'].running_mean += 7
    refresh_batchnorm(net, lambda n: n['a'](torch.ones(4, 2) * 2))
    assert net['a'].running_mean.tolist() == [2, 2] and net['b'].running_mean.tolist() == [7, 7]
    assert not net['b'].training
    x, y = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    ema = Ema(x=x, y=y, refresh={'x': lambda n: n(torch.ones(4, 2))})
    ema.after_fit(None)
    assert ema.nets['x'].running_mean.tolist() == [1, 1] and ema.nets['y'].running_mean.tolist() == [0, 0]


def test_a_fade_for_each_network():
    Where = namedtuple('Where', 'size alpha batch_size alphas')
    growth = types.SimpleNamespace(
        at=lambda step: Where(8, min(1.0, step / 4), 4 if step > 2 else None, {'G': 0.5} if step < 9 else {})
    )
    fade, seen = Fade(growth), []

    class Look(Callback):
        def after_step(self, t):
            seen.append((fade.alpha, fade.of('G'), fade.of('D'), fade.grown, t.data.batch_size))

    gan([fade, Look()]).fit(11)
    assert seen[1] == (0.25, 0.5, 0.25, False, 8) and seen[3] == (0.75, 0.5, 0.75, False, 4)
    assert seen[10] == (1.0, 1.0, 1.0, True, 4)
    plain = Fade(Growth(8, batches=4))
    assert plain.alphas == {} and plain.of('G') == plain.alpha == 1.0 and not plain.grown


def test_progress_in_a_file_is_a_plain_line(capsys, monkeypatch):
    monkeypatch.setattr(callbacks, 'interactive', lambda: False)
    gan([Progress(label='render', line_every=0.0)]).fit(3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith('render: step 2 of 3, G ') and lines[1].endswith(' s left')
    assert 'D_adv' in lines[1]
    gan([Progress()]).fit(3)
    assert capsys.readouterr().out == ''  # not a minute yet


def test_progress_names_the_stage(monkeypatch):
    monkeypatch.setattr(callbacks, 'interactive', lambda: True)
    progress, said = Progress(every=1, label='render'), []
    gan([progress, at(2, lambda t: said.append(progress.bar.comment))]).fit(2)
    assert said[0].startswith('render G ')


def test_matplotlib_is_imported_when_it_draws():
    assert not hasattr(callbacks, 'plt') and not hasattr(files, 'plt')
