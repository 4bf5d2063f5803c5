"""What a recipe offers, in the browser: a palette that fills, regions that move, steps, styles and nearest images."""

import contextlib

import numpy as np
import pytest
import torch
from pages import PATIENCE, Studio, medsketch, read_url, server
from test_studio import figures, pixels

from medsketch.core import save_png, to_uint8
from medsketch.data import phantom_data
from medsketch.recipes import Sketch2MedI

TINY = {'latent_dim': 8, 'w_dim': 8, 'mapping_layers': 2, 'fmap_base': 64, 'fmap_max': 8, 'resnet': 18,
        'net_width': 0.125, 'convs': 1, 'rank': 4, 'ada': None, 'diffaugment': None}  # fmt: skip
BLUE, ORANGE = (86, 180, 233), (230, 159, 0)


@contextlib.contextmanager
def studio(browser, folder, name, *words):
    "The app in a page of its own"
    log = folder / 'log'
    with server(medsketch('studio', *words, '--port', '0', '--no-browser'), folder, log) as process:
        page = browser.new_page(viewport={'width': 1280, 'height': 1100})
        page.set_default_timeout(240_000)
        errors = []
        page.on('pageerror', lambda e: errors.append(e))
        page.goto(read_url(process, log, 3 * PATIENCE))
        yield Studio(page, name).ready()
        assert not errors, errors
        page.close()


def tinted(ink, colour):
    "Where the sheet shows a region of this colour, or its outline"
    full = np.array(colour, float)
    return np.minimum(*(np.abs(ink - c).max(-1) for c in (full, 255 - 0.35 * (255 - full)))) < 12


def test_objects_are_painted_moved_and_compared(browser, tmp_path):
    with studio(browser, tmp_path, 'paint', 'ultrasound') as s:
        before, sheet = s.settled(), s.ink()
        follicles, ovary = tinted(sheet, BLUE), tinted(sheet, ORANGE)
        assert 500 < follicles.sum() < ovary.sum()
        s.click('Compare from here')
        s.click('2 follicle')
        s.click('Region')
        middle = np.argwhere(ovary)
        y, x = middle[middle[:, 1].argmin()] / len(sheet) + (0, 0.08)  # where no follicle lies
        s.draw((x - 0.03, y - 0.03), (x + 0.03, y - 0.03), (x + 0.03, y + 0.03), (x - 0.03, y + 0.03))
        painted = s.changed(before)
        assert tinted(s.ink(), BLUE).sum() > follicles.sum() + 300, 'the region is filled'
        s.until(lambda: {'before', 'now', 'change'} <= set(figures(s)) and pixels(figures(s)['change']).max() > 60)
        s.shot('painted')
        s.click('Move')
        left = middle[middle[:, 1].argmin()] / len(sheet)
        s.draw((left[1] + 0.015, left[0]), (left[1] + 0.1, left[0] + 0.05))
        moved = s.changed(painted)
        after = np.argwhere(tinted(s.ink(), ORANGE)).mean(0) - middle.mean(0)
        assert after == pytest.approx((0.05 * len(sheet), 0.085 * len(sheet)), abs=8)
        s.shot('moved')
        s.click('Undo')
        s.shows(painted)
        s.click('Redo')
        s.shows(moved)


def test_steps_styles_truncation_and_nearest_images(browser, tmp_path):
    run, throats = tmp_path / 'throat.safetensors', phantom_data('pharynx', 8, 32)
    r = Sketch2MedI(**TINY, size=32, classes=5, refine=2)
    r.class_names = tuple(throats.classes)
    torch.manual_seed(0)
    for p in r.nets['H'].parameters():  # an untrained one bends nothing
        p.data += 0.1 * torch.randn_like(p)
    r.save(run)
    for i, t in enumerate(throats):
        save_png(tmp_path / f'throats/throat_{i}.png', to_uint8(t['image']))
    with studio(browser, tmp_path, 'offers', str(run), '--retrieve', str(tmp_path / 'throats')) as s:
        press = lambda word: s.root.locator(f'[data-medsketch^="{word}"]')
        s.until(lambda: press('near ').count() == 5 and press('step ').count() == 3)
        last = s.settled()
        press('step 0').click()
        first = s.changed(last)
        press('step 2').click()
        s.shows(last)
        s.click('Other styles')
        s.until(lambda: press('style ').count() == 6)
        press('style 2').click()
        styled = s.changed(last)
        assert styled not in (first, last)
        beside = [b.bounding_box()['x'] for b in press('style ').all()]
        assert min(beside) == beside[0] > press('style ').first.locator('xpath=../../span').bounding_box()['x'] + 40
        assert s.page.locator('progress, .progress-bar-interrupted').count() == 0, 'the index is made without a bar'
        menu = s.root.locator(".widget-dropdown:has-text('Renderer') select")
        assert menu.evaluate('m => m.selectedOptions[0].text') == 'throat'
        assert str(run) in menu.locator('xpath=..').get_attribute('title')
        press('near ').first.click()
        s.root.locator('.medsketch-reference img').wait_for()
        assert '.png' in s.root.locator('.medsketch-reference figcaption').inner_text()
        s.shot('controls')
        nearest = s.root.locator('.medsketch-near').inner_html()
        s.draw((0.2, 0.2), (0.5, 0.8), (0.8, 0.2))
        s.changed(styled)
        s.until(lambda: s.root.locator('.medsketch-near').inner_html() != nearest)
        s.choose('fundus')  # which offers nothing of all this
        s.until(lambda: press('step ').count() == 0 and not s.button('Other styles').first.is_visible())
