"Scores while training: the training does not notice, resumed is uninterrupted, and what cannot be scored is refused"

import subprocess
import sys

import pytest
import torch
from torch import nn

from medsketch.core import to_uint8
from medsketch.data import ImageData
from medsketch.data.batches import Batches
from medsketch.evaluate.callback import Evaluate, evaluate_during
from medsketch.evaluate.distances import fid
from medsketch.evaluate.features import Extractor, thumbnails
from medsketch.train.callbacks import Checkpoint, Ema
from medsketch.train.trainer import Phase, Trainer

SIZE = 16


class Net(nn.Module):
    "A generator with all that drawing could disturb: batch statistics, dropout and PyTorch's own random numbers"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Linear(32, SIZE * SIZE))

    def forward(self, z):
        return self.body(z).tanh().view(-1, 1, SIZE, SIZE)


@pytest.fixture(scope='module')
def reals():
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.randn(24, 1, 4, 4, generator=g), (SIZE, SIZE), mode='bicubic').clamp(
        -1, 1
    )
    return ImageData(to_uint8(x).transpose(0, 3, 1, 2).copy())


def careless(net):
    "Draws with the global generator, in evaluation mode, and leaves the mode behind"

    def draw(n, seed):
        torch.manual_seed(seed)
        net.eval()
        return {'image': net(torch.randn(n, 8))}

    return draw


def train(reals, steps, folder=None, scores=True, **how):
    torch.manual_seed(3)
    G = Net()
    loss = lambda nets, batch: (nets.G(torch.randn(len(batch['image']), 8)) - batch['image']).square().mean()
    ema = Ema(halflife=20, G=G)
    callbacks = [ema]
    if scores:
        callbacks.append(Evaluate(careless(G), reals, thumbnails(4), **{'metrics': ('fid', 'swd'), 'every': 4} | how))
    if folder:
        callbacks.append(Checkpoint(folder, every=3))
    trainer = Trainer(
        {'G': G}, [Phase('G', loss, torch.optim.Adam(G.parameters(), 1e-2))], Batches(reals, 8), callbacks
    )
    trainer.fit(steps)
    return trainer


def same(a, b):
    x, y = a.nets.G.state_dict(), b.nets.G.state_dict()
    return all(torch.equal(x[k], y[k]) for k in x)


def test_a_training_is_the_same_with_and_without_scores(reals):
    watched, alone = train(reals, 10), train(reals, 10, scores=False)
    assert same(watched, alone) and watched.nets.G.training
    # and the generator stands where it did
    assert torch.equal(torch.rand(3), (train(reals, 10, scores=False), torch.rand(3))[1])


def test_scores_come_every_so_often_and_at_the_end(reals):
    trainer = train(reals, 10)
    seen = trainer.callbacks[1].history
    assert [h['step'] for h in seen] == [4, 8, 10]
    assert trainer.scores == {k: seen[-1][k] for k in ('fid', 'swd')} and all(
        isinstance(v, float) for v in trainer.scores.values()
    )


def test_interrupted_and_resumed_is_uninterrupted(reals, tmp_path):
    whole = train(reals, 11, tmp_path / 'whole')
    train(reals, 6, tmp_path / 'parts', every=4)
    parts = train(reals, 11, tmp_path / 'parts')
    assert same(whole, parts) and parts.scores == whole.scores
    assert [h for h in parts.callbacks[1].history if h['step'] != 6] == whole.callbacks[1].history


def test_the_last_scores_are_there_after_a_resume(reals, tmp_path):
    first = train(reals, 6, tmp_path, every=4).scores
    steps = []

    class Look(Evaluate):
        def after_step(self, trainer):
            steps.append(dict(trainer.scores))
            super().after_step(trainer)

    G = Net()
    look = Look(careless(G), reals, thumbnails(4), ('fid', 'swd'), every=100)
    look.__class__.__name__ = 'Evaluate'
    loss = lambda nets, batch: nets.G(torch.zeros(8, 8)).mean()
    Trainer(
        {'G': G},
        [Phase('G', loss, torch.optim.Adam(G.parameters()))],
        Batches(reals, 8),
        [Ema(halflife=20, G=G), look, Checkpoint(tmp_path, every=100)],
    ).fit(7)
    assert steps[0] == first


def test_real_features_are_taken_once_and_scores_are_those_of_the_samples(reals):
    calls = []
    base = thumbnails(4)
    counted = Extractor(lambda x: calls.append(len(x)) or base.net(x), 'counted', chunk=64, device='cpu')
    fake = torch.rand(24, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    e = Evaluate(lambda n, seed: fake[:n], reals, counted, ('fid',), every=1)
    for _ in range(3):
        got = e.score()
    assert calls == [24] * 4
    assert got['fid'] == pytest.approx(fid(base(reals), base(fake)))


def test_by_name_and_by_recipe(reals):
    class Recipe:
        def sample(self, n, seed=0):
            return {'image': reals.batch(range(n))['image'], 'mask': None}

    e = evaluate_during(Recipe(), reals, 'fid,swd', n=20, every=7, seed=1)
    found = e.score()
    assert list(found) == ['fid', 'swd'] and e.every == 7 and e.seed == 1
    assert evaluate_during(Recipe(), reals, ['swd']).features is None, 'scores of pixels need no features'


@pytest.mark.parametrize(
    ('how', 'says'),
    [
        ({'metrics': ('beauty',)}, 'no score is called'),
        ({'features': None}, 'needs features'),
        ({'n': 1}, 'too few'),
        ({'metrics': ()}, 'at least one score'),
        ({'every': 0}, 'at least 1 step'),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(reals, how, says):
    with pytest.raises(ValueError, match=says):
        Evaluate(**{'draw': None, 'real': reals, 'features': thumbnails(4)} | how)


def test_samples_that_are_no_images_are_refused(reals):
    score = lambda x: Evaluate(lambda n, seed: x, reals, thumbnails(4), ('fid', 'swd')).score()
    with pytest.raises(ValueError, match='NaN'):
        score(torch.full((24, 1, SIZE, SIZE), float('nan')))
    with pytest.raises(ValueError, match='at least 24'):
        score(torch.zeros(3, 1, SIZE, SIZE))
    with pytest.raises(ValueError, match='size'):
        score(torch.zeros(24, 1, SIZE, 2 * SIZE))


def test_training_does_not_import_evaluation():
    code = (
        "import sys, medsketch.train.stages, medsketch.train.callbacks; "
        "print([m for m in sys.modules if m.startswith('medsketch.evaluate')])"
    )
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    )


@pytest.mark.parametrize(
    'early', [lambda n, seed: {'sketch': torch.zeros(n, 1, SIZE, SIZE)}, lambda n, seed: no_weights()]
)
def test_a_stage_that_draws_no_images_has_no_scores(reals, early, tmp_path):
    "A sketch stage; a render stage without a sketch generator. The best by a score to come is allowed"
    evaluate = Evaluate(early, reals, thumbnails(4), metrics=('fid',), every=2)
    net = nn.Linear(1, 1)
    loss = lambda nets, batch: nets.G(torch.ones(1, 1)).square().sum()
    phases = [Phase('G', loss, torch.optim.SGD(net.parameters(), 0.1))]
    trainer = Trainer({'G': net}, phases, Batches(reals, 8), [evaluate, Checkpoint(tmp_path, best='fid')])
    trainer.fit(60)
    assert trainer.scores == {} and evaluate.history == [] and evaluate.state_dict() == {}


def no_weights():
    raise ValueError('these weights hold no G_S')
