"""The explorer in a browser: map, thumbnails, sliders, anchors, a walk, and what can be downloaded."""

import base64
import io
import sys

import cv2
import numpy as np
from pages import OUT, PATIENCE, read_url, server
from PIL import Image

from medsketch.data import phantom_data
from medsketch.recipes.pggan import PGGAN

EXPLORER = """from medsketch.data import phantom_data
from medsketch.evaluate.latent import which_eye
from medsketch.recipes import load_recipe
from medsketch.studio.explorer import Explorer
eyes = phantom_data('fundus', 24, 32)
Explorer(load_recipe('eyes.safetensors'), eyes, dict(eye=which_eye(eyes)))"""
SMALL = {'size': 32, 'latent_dim': 16, 'fmap_base': 64, 'fmap_max': 16, 'lr': 3e-3, 'batch_size': 8}
SERVE = """import sys
from medsketch.studio.app import _notebook, serve_page
sys.exit(serve_page(_notebook(open('explorer.py').read()), port=0, browser=False))"""


def picture(page, css):
    "The image with a class, as the page has it"
    data = page.locator(f'img.{css}').evaluate("""async i => { const b = await (await fetch(i.src)).blob();
        return await new Promise(done => { const r = new FileReader();
            r.onload = () => done(r.result.split(',')[1]); r.readAsDataURL(b) }) }""")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB'))


def changed(page, css, before):
    "Wait for another image"
    for _ in range(PATIENCE * 10):
        if (now := picture(page, css)).shape != before.shape or (now != before).any():
            return now
        page.wait_for_timeout(100)
    raise AssertionError(f'{css} never changed')


def download(page, button):
    page.get_by_role('button', name=button).click()
    ending = button.split()[-1].lower()
    link = page.locator(f"a[download='walk.{ending}']")
    link.wait_for(timeout=PATIENCE * 1000)
    return base64.b64decode(link.get_attribute('href').split(',')[1])


def test_map_sliders_anchors_and_a_walk(browser, tmp_path):
    (tmp_path / 'explorer.py').write_text(EXPLORER.replace('eyes.safetensors', str(tmp_path / 'eyes.safetensors')))
    r = PGGAN(**SMALL, batches={4: 10, 8: 10, 16: 10, 32: 10}, seg=['disc', 'vessel'], encoder_steps=10)
    r.fit(phantom_data('fundus', 24, 32), progress=False).save(tmp_path / 'eyes.safetensors')
    log = tmp_path / 'log'
    with server([sys.executable, '-c', SERVE], tmp_path, log) as process:
        page = browser.new_page(viewport={'width': 1280, 'height': 1000})
        page.set_default_timeout(240_000)  # a kernel starts meanwhile, slowly on a busy machine
        errors = []
        page.on('pageerror', lambda e: errors.append(e))
        page.goto(read_url(process, log, 3 * PATIENCE))
        canvas = page.locator('canvas').last
        canvas.wait_for()
        page.wait_for_timeout(1000)
        box = canvas.bounding_box()
        sheet = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert('RGB')).astype(int)
        blue_or_orange = (sheet.max(-1) - sheet.min(-1)) > 80
        assert blue_or_orange.sum() > 24 * 30, 'points in the colours of their labels'
        assert 'left' in page.inner_text('body') and 'right' in page.inner_text('body')
        _, _, _, centres = cv2.connectedComponentsWithStats(blue_or_orange.astype(np.uint8))
        a, b = centres[1], centres[-1]
        real = picture(page, 'medsketch-real')
        page.mouse.move(box['x'] + b[0], box['y'] + b[1])
        page.wait_for_timeout(800)
        OUT.mkdir(exist_ok=True)
        page.screenshot(path=OUT / 'explorer_hover.png')
        assert (np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert('RGB')) != sheet).any(-1).sum() > 5000
        page.mouse.click(box['x'] + a[0], box['y'] + a[1])
        page.wait_for_timeout(500)
        page.get_by_role('button', name='walk').click()
        page.get_by_text('anchor A is not set').wait_for()
        page.get_by_role('button', name='set A').click()
        page.get_by_text('anchor A is here').wait_for()
        made = picture(page, 'medsketch-made')
        page.mouse.click(box['x'] + b[0], box['y'] + b[1])
        changed(page, 'medsketch-real', real)
        page.get_by_text('real image').last.wait_for()
        page.get_by_role('button', name='set B').click()
        page.get_by_text('anchor B is here').wait_for()
        handle = page.locator('.noUi-handle').first
        handle.focus()
        before = picture(page, 'medsketch-made')
        for _ in range(15):
            page.keyboard.press('ArrowRight')
        changed(page, 'medsketch-made', before)
        page.get_by_role('button', name='walk').click()
        page.get_by_text('walk from A to B').wait_for()
        assert (picture(page, 'medsketch-made') == made).all(), 'a walk begins at anchor A'
        with Image.open(io.BytesIO(download(page, 'save GIF'))) as gif:
            assert gif.n_frames == 16
        (tmp_path / 'walk.mp4').write_bytes(download(page, 'save MP4'))
        assert cv2.VideoCapture(str(tmp_path / 'walk.mp4')).get(cv2.CAP_PROP_FRAME_COUNT) == 16
        page.screenshot(path=OUT / 'explorer.png', full_page=True)
        page.reload()
        page.locator('canvas').last.wait_for()
        assert not errors, errors
        page.close()
