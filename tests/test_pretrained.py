"Packaged renderers: found, whole, and answering to strokes"

import os
import re
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import medsketch
from medsketch import pretrained
from medsketch.cli import main
from medsketch.data import phantom_data
from medsketch.pretrained import (
    PRETRAINED,
    RIM,
    card,
    find_weights,
    load,
    packaged,
)
from medsketch.recipes import load_recipe, recipe_class
from medsketch.recipes.pggan import on_sphere
from medsketch.sketch import add_sketches
from medsketch.studio.strokes import Drawing, Stroke

DATA = Path(os.environ.get('MEDSKETCH_DATA', Path(__file__).parents[2] / 'shared/data'))
TINY = {"latent_dim": 8, "fmap_base": 64, "fmap_max": 8, "ngf": 4, "ndf": 4, "receptive_field": 16}


def eye_strokes(without=None):
    "An eye as a person draws it: eight vessels that leave the disc in gentle curves, two of them branching"
    d = Drawing(256)
    t = np.linspace(0, 1, 20)
    for k in range(8):
        if k == without:
            continue
        turn = 2 * np.pi * k / 8 + 0.4 * t * (-1) ** k
        d.add(Stroke('pen', tuple(zip(0.5 + 0.42 * t * np.cos(turn), 0.5 + 0.42 * t * np.sin(turn))), 0.014))
    return d.sketch()


def test_all_are_there_and_small():
    assert set(packaged()) == set(PRETRAINED) and set(packaged('pgsgan', 'pggan')) == {'ultrasound', 'eyes'}
    assert set(packaged(*pretrained.ON_PAD)) == set(PRETRAINED) - {'eyes'}  # what the studio can draw with
    assert sum(p.stat().st_size for p in pretrained.WEIGHTS.glob('*.safetensors')) <= 40e6
    for n in packaged():
        c = card(n)
        assert f'medsketch pretrain {n}' in c and 'Not for diagnosis' in c and PRETRAINED[n].licence in c and 'L1' in c


@pytest.mark.parametrize('name', sorted(set(PRETRAINED) - {'eyes'}))
def test_each_renders_what_its_card_says(name):
    r = load(name)
    c = r.config
    blank = torch.zeros(1, getattr(r, 'planes', 1), c['size'], c['size'])
    if blank.shape[1] > 1:
        blank[:, 0, 32:-32, 32:-32] = 1  # an ovary; without it and without strokes the field is black
    if name == 'pharynx':
        blank[:, 0, 16:-16, 32] = 1  # a sheet without a stroke is refused
    image = r.render(blank)
    assert image.shape == (1, c['channels'], c['size'], c['size']) and image.isfinite().all() and image.std() > 0.05
    p = PRETRAINED[name]
    assert c == recipe_class(p.recipe)(**p.config).config  # the command on the card makes this network
    quick = r.for_drawing().render(blank)
    assert (quick - image).abs().max() < 2e-3


def test_fundus_has_a_whole_rim_and_no_stroke_outside():
    made = load('fundus').sample(24, seed=5)
    at = (torch.arange(256) + 0.5) / 256 - 0.5
    away = (at[:, None] ** 2 + at**2).sqrt()
    ring = (away <= RIM) & (away > RIM - 0.012)
    assert (made['image'].max(1).values[:, ring] > -0.5).float().mean(1).min() > 0.98  # half of them had bites in it
    assert (made['image'][:, :, away > RIM] == -1).all()
    assert (made['sketch'][:, :, away > RIM] == 0).all() and made['sketch'].max() > 0.9


def test_eyes_draws_pairs_and_finds_its_own_codes_again():
    r, p = load('eyes'), PRETRAINED['eyes']
    assert r.config == recipe_class('pggan')(**p.config).config
    made, others = r.sample(24, seed=5), r.sample(24, seed=6)
    z = r.encode(made['image'], made['mask'])
    off = lambda a, b: (a['image'] - b['image']).abs().mean().item()
    assert off(r.decode(z), made) < 0.9 * off(others, made)  # nearer than any other sample
    assert torch.cosine_similarity(z, on_sphere(r.noise(24, 5))).mean() > 0.2  # random directions: 0.00 ± 0.03
    assert made['image'].std(0).mean() > 0.08  # 24 eyes, not one: real ones have 0.107
    vessels = made['mask'].float().mean((1, 2))
    assert 0.02 < vessels.mean() < 0.25


@pytest.mark.parametrize('vessel', range(8))
def test_a_vessel_that_is_erased_goes_and_the_rest_stays(vessel):
    before, after = (torch.as_tensor(eye_strokes(**k)) for k in ({}, {'without': vessel}))
    edited = cv2.dilate(((before - after)[0].abs() > 0.1).numpy().astype(np.uint8), np.ones((15, 15))) > 0
    change = (load('fundus').render(before) - load('fundus').render(after)).abs().mean((0, 1)).numpy()
    assert change[edited].mean() >= 4 * change[~edited].mean()


def test_a_vessel_that_is_drawn_darkens_the_image_where_it_runs():
    r, before, after = load('fundus'), eye_strokes(without=0), eye_strokes()
    along = torch.from_numpy((after - before)[0] > 0.5)
    green = lambda s: r.render(s)[0, 1]
    assert (green(after) - green(before))[along].mean() < -0.02


def test_unlike_images_of_another_modality():
    "Each renderer's image of a phantom's own sketch is nearer to that phantom than the other phantoms are"
    from medsketch.sketch import sobel_sketch

    for name in ('lung_ct', 'brain_mri'):
        r = load(name)
        ds = phantom_data(name, 6, r.config['size'], seed=77).batch(range(6))['image']
        made = r.render(torch.from_numpy(np.stack([sobel_sketch(x, name) for x in ds]))[:, None])
        own = (made - ds).abs().mean((1, 2, 3))
        other = torch.stack([(made - ds.roll(k, 0)).abs().mean((1, 2, 3)) for k in range(1, 6)]).mean(0)
        assert (own < other).all(), (name, own, other)


@pytest.mark.skipif(not (DATA / 'ct/lung_pet_ct_dx').exists(), reason=f'no real images in {DATA}: set MEDSKETCH_DATA')
def test_ct_slices_that_are_scored_lie_apart_and_are_rendered():
    "They are of the one body that it has learned from, but not next to a slice that it has seen"
    train, held = pretrained.pretraining_data('lung_ct', DATA)
    numbers = lambda d: {int(re.search(r'(\d+)\.png', str(p))[1]) for p in d.paths}
    assert min(abs(a - b) for a in numbers(train) for b in numbers(held)) >= 2
    held = held.subset(range(0, len(held), 5))  # the whole slices, not the windows on them
    r, real = load('lung_ct'), held.batch(range(len(held)))['image']
    made = r.render(pretrained.what_is_drawn(r, held)['sharp'])
    mean = torch.from_numpy(train.images[::5].mean(0)).float() / 127.5 - 1
    assert (made - real).abs().mean() < 0.6 * (mean - real).abs().mean()


def test_ct_slices_from_noise_differ_and_are_bodies():
    made = load('lung_ct').sample(8, seed=11)
    assert made['image'].shape == (8, 1, 256, 256)
    assert made['image'].std(0).mean() > 0.08  # not one slice eight times
    inside = made['image'][..., 100:156, 60:196].mean((1, 2, 3))
    assert (inside > made['image'][..., :16, :].mean((1, 2, 3)) + 0.3).all()  # tissue, and air above the body


def test_brains_from_noise_differ_in_their_lines():
    "Nearly as much as phantoms do: most trainings came to one brain for every noise pattern (sameness 0.74)"
    from medsketch.evaluate.variety import sameness

    small = lambda x: torch.nn.functional.avg_pool2d(x, 4)
    real = add_sketches(phantom_data('brain_mri', 24, 256, seed=77), style='brain_mri').batch(range(24))['sketch']
    made = load('brain_mri').sample(24, seed=11)
    assert made['image'].shape == (24, 4, 256, 256)
    assert sameness(small(made['sketch'])) < 1.5 * sameness(small(real))
    ink = [small(s).flatten(1).mean(1).mean() for s in (made['sketch'], real)]
    assert 0.5 < ink[0] / ink[1] < 2  # neither empty sheets nor noise, which would differ as well


def test_throats_follow_their_contours_and_bear_a_scrawl():
    from medsketch.evaluate.levels import drawn_by

    r, real = load('pharynx'), phantom_data('pharynx', 12, 128, seed=9500).batch(range(12))['image']
    contours = r.sketch(real)
    own, rough = r.render(contours), r.render(drawn_by(contours, 1.0, 0))
    assert r.agreement(real, own) > r.agreement(real, own.roll(1, 0)) + 0.08  # another throat's answer is worse
    assert r.agreement(real, rough) > 0.6 and rough.std(0).mean() > 0.04  # whole throats, not one


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDSKETCH_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    save = lambda path, **kw: recipe_class('skrgan')(size=32, **TINY, **kw).save(path)
    save(tmp_path / 'cache/weights/mine.safetensors', seed=1)
    assert load('mine').config['seed'] == 1
    save(tmp_path / 'mine', seed=2)
    assert load('mine').config['seed'] == 2  # a path comes before the cache
    save(tmp_path / 'fundus', seed=3)
    assert find_weights('fundus').parent == pretrained.WEIGHTS  # and the package before both
    assert medsketch.load('mine').config['seed'] == 2
    with pytest.raises(AttributeError):
        medsketch.lode()


class Refused(OSError):
    "What the Hub answers with"


def hub(monkeypatch, metadata, download):
    "A Hub library of our own, with these two functions"
    fake = types.SimpleNamespace(
        hf_hub_download=download,
        get_hf_file_metadata=metadata,
        hf_hub_url=lambda *args: '/'.join(args),
        errors=types.SimpleNamespace(HfHubHTTPError=Refused),
    )
    monkeypatch.setitem(sys.modules, 'huggingface_hub', fake)


def test_weights_from_the_hub(tmp_path, monkeypatch):
    recipe_class('skrgan')(size=32, seed=4, **TINY).save(tmp_path / 'weights.safetensors')
    asked = []

    def metadata(url, timeout):
        if 'nobody' in url:
            raise Refused('404')

    def download(*args, local_files_only):
        asked.append((*args, local_files_only))
        if args[0] == 'nobody/nothing':
            raise Refused('404 not found\nlong story')
        return str(tmp_path / 'weights.safetensors')

    hub(monkeypatch, metadata, download)
    assert load('someone/eyes').config['seed'] == 4 and asked == [('someone/eyes', 'weights.safetensors', False)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'someone').mkdir()  # a folder of the same name: then it can only be meant so
    assert load('hf://someone/eyes').config['seed'] == 4 and len(asked) == 2
    (tmp_path / 'someone').rmdir()
    with pytest.raises(ValueError, match='could not be fetched from the Hub .404 not found.'):
        load('nobody/nothing')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match=r"pip install 'medsketch\[hub\]'"):
        load('someone/eyes')
    for odd in ('kidney', './no/where', '/no/where'):
        with pytest.raises(ValueError, match='no weights are called'):
            load(odd)


def test_without_a_connection_the_hub_is_asked_once(tmp_path, monkeypatch):
    "What it sent before is used; anything else is an error at once, which says that there is no such folder either"
    recipe_class('skrgan')(size=32, seed=4, **TINY).save(tmp_path / 'weights.safetensors')
    monkeypatch.chdir(tmp_path)  # where runs/ is a folder, runs/eyse is a path, and nobody is asked
    asked = []

    def metadata(url, timeout):
        asked.append(timeout)
        raise ConnectionError('Name or service not known')

    def download(*args, local_files_only):
        assert local_files_only, 'this one asks again and again'
        if args[0] == 'someone/eyes':
            return str(tmp_path / 'weights.safetensors')
        raise FileNotFoundError('long story')

    hub(monkeypatch, metadata, download)
    assert load('someone/eyes').config['seed'] == 4
    with pytest.raises(ValueError, match='no file or folder is called runs/eyse.*no connection') as e:
        load('runs/eyse')
    assert '\n' not in str(e.value) and len(asked) == 2 and max(asked) <= 5


def test_a_renderer_alone_says_that_it_draws_no_sketches(tmp_path):
    r = load('brain_mri')
    r.learned = {'G_P'}
    r.save(tmp_path / 'again.safetensors', half=True)
    again = load_recipe(tmp_path / 'again.safetensors')
    with pytest.raises(ValueError, match='hold no G_S'):
        again.sample(1)
    x = torch.from_numpy(eye_strokes())
    assert torch.equal(again.render(x), r.render(x))


def test_half_the_file_and_the_same_image(tmp_path):
    r = recipe_class('skrgan')(size=32, **TINY | {"ngf": 16})
    for n, half in (('whole', False), ('half', True)):
        r.save(tmp_path / n, half=half)
    assert (tmp_path / 'half').stat().st_size < 0.6 * (tmp_path / 'whole').stat().st_size
    x = torch.rand(2, 1, 32, 32)
    assert (load_recipe(tmp_path / 'half').render(x) - load_recipe(tmp_path / 'whole').render(x)).abs().max() < 2 / 255


def run(*args):
    with pytest.raises(SystemExit) as e:
        main(list(map(str, args)))
    return e.value.code


def test_pretraining_again_is_one_command(tmp_path, monkeypatch, capsys):
    small = TINY | {
        "size": 64,
        "channels": 1,
        "style": 'lung_ct',
        "variants": True,
        "augment": 'turn',
        "render_steps": 3,
        "batch_size": 2,
    }
    few = pretrained.Pretrained(
        lambda folder, size: phantom_data('lung_ct', 8, size), small, 'eight phantoms', 'Apache 2.0', 'phantom', 'None.'
    )
    monkeypatch.setitem(PRETRAINED, 'lung_ct', few)
    assert run('pretrain', 'lung_ct', '--out', tmp_path / 'run') == 0
    text = (tmp_path / 'run/lung_ct.md').read_text()
    assert 'medsketch pretrain lung_ct --out RUN' in text and '| sharp |' in text and '| locality |' in text
    assert load_recipe(tmp_path / 'run/lung_ct.safetensors').learned == {'G_P'}
    assert run('pretrain', 'lung_ct', '--out', tmp_path / 'run') == 0  # a finished run is taken up, not begun again
    assert run('pretrain', 'kidney', '--out', tmp_path / 'x') == 1
    assert "no packaged renderer is called 'kidney'" in capsys.readouterr().err


def test_training_by_hand_resumes_bit_for_bit(tmp_path):
    data = phantom_data('fundus', 6, 32)
    make = lambda steps: recipe_class('skrgan')(
        size=32, variants=True, augment='turn', batch_size=2, render_steps=steps, style='fundus', **TINY
    )
    whole = make(6).fit(data, stages=('render',), progress=False)
    first = make(6)

    class Stop(Exception):
        pass

    from medsketch.train import callbacks

    save = callbacks.Checkpoint.save

    def stop(self, trainer):
        save(self, trainer)
        if trainer.step == 3:
            raise Stop

    callbacks.Checkpoint.save = stop
    try:
        with pytest.raises(Stop):
            first.fit(data, tmp_path / 'run', stages=('render',), every=3, progress=False)
    finally:
        callbacks.Checkpoint.save = save
    second = make(6).fit(data, tmp_path / 'run', stages=('render',), every=3, progress=False)
    for a, b in zip(whole.nets['G_P'].state_dict().values(), second.nets['G_P'].state_dict().values()):
        assert torch.equal(a, b)
    assert load_recipe(tmp_path / 'run').learned == {'G_P'}
