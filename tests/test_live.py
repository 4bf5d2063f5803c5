"The drawing app without a browser: what its pad, its thread and its buttons do"

import base64
import io
import json
import re
import subprocess
import sys
import threading
import time
import zipfile

import cv2
import numpy as np
import pytest
import torch
from test_sketch2medi import TINY as SMALLEST

from medsketch.core import png_bytes, save_png, to_uint8
from medsketch.data import load_images, phantom_data
from medsketch.evaluate.retrieve import index_sketches, save_index, style_codes
from medsketch.phantoms import PHANTOMS, phantom
from medsketch.recipes import RECIPES, recipe_class
from medsketch.recipes.sketch_synth import objects_of, outlines
from medsketch.sketch.conditions import background_sketch
from medsketch.studio.autosave import Autosave
from medsketch.studio.choices import CSS
from medsketch.studio.gallery import row
from medsketch.studio.live import LiveRender
from medsketch.studio.near import Near, open_index
from medsketch.studio.newest import Newest
from medsketch.studio.paper import UploadRender
from medsketch.studio.pictures import as_picture, difference, phantom_sketch, real_image, surprise
from medsketch.studio.strokes import Drawing
from medsketch.studio.uploads import uploads

TINY = {"latent_dim": 8, "fmap_base": 64, "fmap_max": 8, "ngf": 4, "ndf": 4, "receptive_field": 16}
THROAT = {k: v for k, v in SMALLEST.items() if k != 'size'}


def tiny(size=32, **kw):
    return recipe_class('skrgan')(size=size, style='fundus', **TINY, **kw)


@pytest.fixture
def app(tmp_path):
    a = LiveRender(tiny(), out=tmp_path / 'out')
    assert a.worker.wait(20)
    return a


def draw(app, *points):
    send = lambda kind, x, y: app.pad.handle({"event": kind, "x": x, "y": y})
    send('mouse_down', *points[0])
    for p in points[1:]:
        send('mouse_move', *p)
    send('mouse_up', *points[-1])


def pixels(app):
    assert app.worker.wait(20)
    return cv2.imdecode(np.frombuffer(app.image.value, np.uint8), 1)[..., ::-1]


def test_a_stroke_changes_the_image_and_undo_brings_back_the_old_one(app):
    empty = pixels(app)
    draw(app, (50, 50), (300, 300), (450, 120))
    drawn = pixels(app)
    assert (drawn != empty).any()
    app.pad.undo()
    assert (pixels(app) == empty).all()
    app.pad.redo()
    assert (pixels(app) == drawn).all()
    expected = as_picture(app.recipe.render(app.pad.sketch(32))[0])
    assert np.abs(drawn.astype(int) - expected).max() <= 1  # norms are folded, so the last bit may differ


def test_the_image_follows_while_the_stroke_is_drawn(app):
    empty = pixels(app)
    app.pad.handle({"event": 'mouse_down', "x": 50, "y": 50})
    for i in range(20):
        app.pad.handle({"event": 'mouse_move', "x": 50 + 20 * i, "y": 60 + 15 * i})
        time.sleep(0.02)
    assert (pixels(app) != empty).any() and not app.pad.drawing.can_undo


def test_a_warning_is_not_written_over_by_a_rendering_that_was_under_way(app):
    go, work = threading.Event(), app.worker.work
    app.worker.work = lambda request: (go.wait(10), work(request))[1]
    app.refresh()
    app.say(ValueError('no such weights'))
    go.set()
    pixels(app)
    assert 'no such weights' in app.status.value
    draw(app, (50, 50), (300, 300))
    pixels(app)
    assert 'rendered in' in app.status.value


def test_what_is_at_work_when_python_ends_is_finished():
    code = (
        "import time; from medsketch.studio.newest import Newest\n"
        "Newest(lambda r: time.sleep(.5), lambda a: print('done', flush=True), print).ask(1)"
    )
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, 'done\n'), ended.stderr


def test_two_hundred_strokes_lose_none_and_the_newest_is_shown(app):
    for i in range(200):
        draw(app, (10 + 2 * i, 10), (500 - 2 * i, 500))
    last = pixels(app)
    assert len(app.pad.drawing.actions) == 200
    assert np.abs(last.astype(int) - as_picture(app.recipe.render(app.pad.drawing.sketch(32))[0])).max() <= 1
    assert app.worker.answered == app.worker.asked


def test_nothing_queues_up():
    answers, busy = [], threading.Semaphore(0)
    newest = Newest(lambda r: (busy.acquire(timeout=5), r)[1], answers.append, pytest.fail)
    for i in range(50):
        newest.ask(i)
    for _ in range(2):
        busy.release()
    assert newest.wait(5) and answers[-1] == 49 and len(answers) <= 2


def test_an_error_is_shown_and_does_not_end_the_thread(app):
    def broken(sketch):
        raise ValueError('the ink is <dry>')

    right, app.drawer = app.drawer, type('Broken', (), {"draw": staticmethod(broken)})
    draw(app, (50, 50), (100, 100))
    app.worker.wait(10)
    assert 'the ink is &lt;dry&gt;' in app.status.value and 'alert' in app.status.value
    app.drawer = right
    draw(app, (150, 50), (100, 100))
    app.worker.wait(10)
    assert 'rendered in' in app.status.value


def test_weights_that_do_not_exist_leave_everything_as_it_was(app):
    before = pixels(app)
    app.use('kidney')
    assert 'no weights are called kidney' in app.status.value and app.name == 'skrgan'
    app.other.value = 'nobody knows'
    assert app.finder.wait(10) and "&#x27;nobody knows&#x27; is no name of weights" in app.status.value
    assert (pixels(app) == before).all()


def test_other_weights_of_another_size(tmp_path):
    tiny(64, channels=1).save(tmp_path / 'grey.safetensors')
    app = LiveRender(tiny(), models=[str(tmp_path / 'grey.safetensors')], out=tmp_path / 'out')
    draw(app, (50, 50), (300, 300))
    app.model.value = str(tmp_path / 'grey.safetensors')
    image = pixels(app)
    assert image.shape == (64, 64, 3) and (image[..., 0] == image[..., 1]).all()
    app.model.value = 'skrgan'
    assert pixels(app).shape == (32, 32, 3) and len(app.pad.drawing.actions) == 1


def test_surprise_is_a_function_of_the_seed(app):
    app.seed.value = 5
    app.surprise()
    first = pixels(app)
    assert app.seed.value == 6
    app.surprise()
    assert (pixels(app) != first).any()
    app.seed.value = 5
    app.surprise()
    assert (pixels(app) == first).all()


def test_surprise_without_a_sketch_generator_is_a_phantom(tmp_path):
    r = tiny()
    r.learned = {'G_P'}
    one, two = (surprise(r, i)[0] for i in (1, 2))
    assert one.shape == (1, 32, 32) and one.any() and (one != two).any()
    r.config['style'] = 'endoscopy'
    with pytest.raises(ValueError, match='no phantom shows endoscopy'):
        surprise(r, 1)


def test_editing_a_real_image_compares(app):
    eye = phantom_data('fundus', 1, 64, seed=3)[0]['image']
    app.edit(eye)
    pixels(app)
    assert [f'alt="{k}"' in app.compare.value for k in ('real', 'before', 'now', 'change')] == [True] * 4
    assert (app.shown['before'] == app.shown['picture']).all()
    draw(app, (100, 100), (400, 400))
    pixels(app)
    assert (app.shown['before'] != app.shown['picture']).any()
    app.surprise()
    pixels(app)
    assert app.compare.value == '' and app.pad.board.under is None
    app.edit(torch.zeros(1, 32, 32))
    assert 'the image has 1 channel, these weights draw 3' in app.status.value


def test_the_difference_is_dark_where_nothing_changed():
    a = np.full((4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[0, 0, 1], b[1, 1] = 130, 255
    d = difference(a, b).astype(int).sum(-1)
    assert d[2, 2] < 8 and d[2, 2] < d[0, 0] < d[1, 1]


def test_comparing_from_here_without_a_real_image(app):
    draw(app, (50, 50), (300, 300))
    app.keep()
    before = pixels(app)
    draw(app, (300, 50), (50, 400))
    after = pixels(app)
    assert (app.shown['before'] == before).all() and (after != before).any() and 'alt="real"' not in app.compare.value


def test_the_box_for_weights_never_waits_and_says_nothing_about_files(app, tmp_path, monkeypatch):
    free = threading.Event()

    def slow(repo):
        free.wait(20)
        raise ValueError(f'{repo} could not be fetched')

    monkeypatch.setattr('medsketch.pretrained._from_hub', slow)
    start = time.monotonic()
    app.other.value = 'user/eyes'
    assert time.monotonic() - start < 1 and 'looking for user/eyes' in app.status.value
    draw(app, (50, 50), (300, 300))
    pixels(app)  # and drawing goes on meanwhile
    free.set()
    assert app.finder.wait(10) and 'user/eyes could not be fetched' in app.status.value
    tiny().save(tmp_path / 'mine.safetensors')
    said = []
    for path in (tmp_path / 'mine.safetensors', tmp_path / 'none.safetensors', '/etc/passwd', '../x', 'mine/'):
        app.other.value = str(path)
        app.finder.wait(10)
        said.append(app.status.value.replace(str(path), ''))
    assert len(set(said)) == 1 and 'is no name of weights' in said[0]


def test_weights_that_were_found_are_in_the_menu(app, tmp_path, monkeypatch):
    tiny(64).save(tmp_path / 'weights.safetensors')
    monkeypatch.setattr('medsketch.pretrained._from_hub', lambda repo: tmp_path / 'weights.safetensors')
    app.other.value = 'user/eyes'
    assert app.finder.wait(10)
    assert pixels(app).shape == (64, 64, 3) and app.model.value == 'user/eyes' and app.other.value == ''
    monkeypatch.setattr('medsketch.pretrained._from_hub', pytest.fail)  # nobody asks a second time
    app.model.value = 'skrgan'
    app.model.value = 'user/eyes'
    assert pixels(app).shape == (64, 64, 3)


@pytest.mark.parametrize(
    'form', [lambda n, c: ({'name': n, 'content': memoryview(c)},), lambda n, c: {n: {'content': c}}]
)
def test_uploads_of_both_generations_of_ipywidgets(form):
    assert uploads(form('eye.png', b'123')) == [('eye.png', b'123')]


def send(app, name, content):
    file = {'name': name, 'type': '', 'size': len(content), 'content': memoryview(content), 'last_modified': 0}
    app.pad.bar.file.set_state({'value': [file]})


def test_a_file_is_opened_as_an_image_to_edit(app):
    eye = (phantom_data('fundus', 1, 64, seed=3).images[0].transpose(1, 2, 0)).copy()
    send(app, 'eye.png', png_bytes(eye))
    choices = {b.description: b for b in app.pad.bar.ask.children[1:]}
    assert list(choices) == ['Sketch', 'Image to edit', 'Image underneath', 'Nothing']
    choices['Image to edit'].click()
    pixels(app)
    assert 'alt="real"' in app.compare.value
    send(app, 'notes.png', b'not a picture')
    assert 'notes.png cannot be used' in app.pad.message.value and '/tmp' not in app.pad.message.value


def test_an_example_is_there_at_the_start_and_three_can_be_chosen(tmp_path):
    app = LiveRender(tiny(), out=tmp_path, example=True)
    first = pixels(app)
    assert app.pad.sketch().any() and app.gallery.value.count('data-medsketch="example') == 3
    tell(app, 'example 1')
    assert (pixels(app) != first).any()
    app.pad.undo()
    assert (pixels(app) == first).all()


def tell(app, words):
    app.pad.handle({'event': 'key_down', 'key': f'medsketch {words}'})


def test_the_strip_keeps_eight_renderings_and_brings_one_back_with_its_strokes(app):
    shown = []
    for i in range(10):
        draw(app, (50, 20 + 40 * i), (400, 40 + 40 * i))
        shown.append(pixels(app))
    assert app.last.value.count('data-medsketch="recall') == 8
    tell(app, 'recall 5')
    assert (pixels(app) == shown[4]).all() and len(app.pad.drawing.actions) == 10 + 1 + 5
    app.pad.undo()
    tell(app, 'recall 1')
    assert 'no longer in the strip' in app.pad.message.value


def test_a_page_that_says_its_number_gets_its_drawing_back(tmp_path):
    first = LiveRender(tiny(), out=tmp_path, example=True)
    tell(first, 'page 12-34')
    draw(first, (50, 50), (300, 300))
    assert first.saver.worker.wait(10)
    again = LiveRender(tiny(), out=tmp_path, example=True)  # the server was restarted
    assert not np.array_equal(again.pad.sketch(), first.pad.sketch())
    tell(again, 'page 12-34')
    assert np.array_equal(again.pad.sketch(), first.pad.sketch())
    other = LiveRender(tiny(), out=tmp_path)
    draw(other, (50, 50), (100, 300))
    tell(other, 'page 12-34')  # whoever has drawn already keeps that
    assert not np.array_equal(other.pad.sketch(), first.pad.sketch())
    tell(other, 'page ../../x')
    assert 'digits' in other.pad.message.value


def reloaded(app, number='12-34', **kw):
    "Another process answers the same page; it opens on an example"
    assert app.saver.worker.wait(10)
    again = LiveRender(tiny(), out=app.out, example=True, **kw)
    assert again.worker.wait(20)
    tell(again, f'page {number}')
    return again


def test_a_reloaded_page_goes_back_to_the_weights_of_its_drawing(tmp_path):
    runs = [tmp_path / f'{k}/ovary.safetensors' for k in 'ab']
    for run in runs:
        paints(tmp_path).given['pgsgan'].save(run)
    app = LiveRender(tiny(), models=runs, out=tmp_path / 'out')
    assert [label for label, _ in app.model.options] == ['skrgan', 'a/ovary', 'b/ovary']
    assert app.model.value == 'skrgan'
    tell(app, 'page 12-34')
    app.model.value = str(runs[1])
    tell(app, 'page 12-34')  # the new pad says it too
    app.pad.tool, app.pad.cls = 'region', 2
    draw(app, (100, 100), (400, 100), (400, 400), (100, 400))
    mask = app.pad.mask()
    assert (mask == 2).any()
    again = reloaded(app, models=runs)
    assert again.name == again.model.value == str(runs[1]) and (again.pad.mask() == mask).all()
    tell(again, 'page 12-34')
    assert again.name == str(runs[1]) and (again.pad.mask() == mask).all()
    image = pixels(again)
    again.model.value = str(runs[0])  # of the same classes: the pad stays, and nothing is drawn
    assert again.worker.wait(20)
    third = reloaded(again, models=runs)
    assert third.name == str(runs[0]) and (third.pad.mask() == mask).all() and (pixels(third) == image).all()
    assert third.saver.worker.wait(10)
    for run in runs:
        run.unlink()
    assert third.saver.path.exists()
    without = reloaded(third, models=[])
    assert without.finder.wait(10) and without.name == 'skrgan'
    assert (without.pad.sketch() == third.pad.sketch()).all() and 'is no name of weights' in without.status.value


def test_an_empty_sheet_of_other_classes_is_not_written_over_a_drawing(tmp_path):
    saver, drawing = Autosave(tmp_path, pytest.fail), Drawing(32, ('background', 'ovary'))
    assert saver.open('12-34') == (None, None)
    drawing.load(np.ones((32, 32), np.float32))
    for sheet, name in ((drawing, 'scan'), (Drawing(32), 'eye')):
        saver.keep(sheet, name)
        assert saver.worker.wait(10)
    again = Autosave(tmp_path, pytest.fail)
    saved, weights = again.open('12-34')
    assert weights == 'scan' and len(saved.actions) == 1
    again.keep(Drawing(32), 'eye')  # and neither after a reload
    drawing.undo()
    assert again.worker.wait(10) and len(again.open('12-34')[0].actions) == 1
    again.keep(drawing, 'scan')  # an empty sheet of the same classes is what is there
    assert again.worker.wait(10) and not again.open('12-34')[0].actions
    saver.path.write_text(drawing.to_json())  # of earlier versions
    assert again.open('12-34')[1] is None


def test_real_images_become_what_the_recipe_draws():
    grey = np.full((40, 30), 100, np.uint8)
    assert real_image(png_bytes(grey), 'a.png', 64, 3).shape == (3, 64, 64)
    colour = np.zeros((64, 64, 3), np.uint8) + np.uint8([200, 100, 50])
    x = real_image(png_bytes(colour), 'a.png', 32, 1)
    assert x.shape == (1, 32, 32) and abs(x.mean() - ((0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 127.5 - 1)) < 0.01
    with pytest.raises(ValueError, match='these weights draw 4'):
        real_image(png_bytes(grey), 'a.png', 64, 4)
    with pytest.raises(ValueError, match='../b.png|b.png'):
        real_image(b'', '../b.png', 64, 3)


def test_export_writes_everything_and_never_over_what_is_there(app):
    draw(app, (50, 50), (300, 300))
    first, second = app.export(), app.export()
    assert first != second
    names = {p.name for p in first.iterdir()}
    assert names == {'sketch.png', 'image.png', 'side_by_side.png', 'strokes.json', 'about.json'}
    assert (cv2.imread(str(first / 'image.png'))[..., ::-1] == pixels(app)).all()
    again = Drawing.from_json((first / 'strokes.json').read_text())
    assert (again.sketch() == app.pad.drawing.sketch()).all()
    about = json.loads((first / 'about.json').read_text())
    assert about['synthetic'] and about['recipe'] == 'skrgan'
    assert 'download="drawing-002.zip"' in app.links.value
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(app.links.value.split('base64,')[1].split('"')[0]))) as z:
        assert set(z.namelist()) == names and z.read('image.png') == (second / 'image.png').read_bytes()


def test_export_to_a_place_that_cannot_be_written(app, tmp_path):
    (tmp_path / 'file').write_text('')
    app.out = tmp_path / 'file' / 'below'
    assert app.export() is None and 'alert' in app.status.value


def test_upload_instead_of_a_pad():
    a = UploadRender(tiny())
    paper = np.full((100, 100), 255, np.uint8)
    cv2.line(paper, (10, 10), (90, 90), 0, 5)
    a._uploaded(({'name': 'mine.png', 'content': png_bytes(paper)},))
    shown = cv2.imdecode(np.frombuffer(a.image.value, np.uint8), 1)
    assert shown.shape == (32, 64, 3) and (shown[:, :32] < 100).any()
    a._uploaded(({'name': 'mine.txt', 'content': b'?'},))
    assert 'mine.txt is not a picture' in a.status.value


def test_a_recipe_that_does_not_render_says_so(monkeypatch):
    monkeypatch.setitem(RECIPES, 'skrgan', RECIPES['skrgan'])  # a subclass takes its parent's place in the table

    class Silent(recipe_class('skrgan')):
        render = property()

    r = Silent(size=32, **TINY)
    a = LiveRender(r)
    a.worker.wait(10)
    assert 'does not render sketches' in a.status.value
    a.surprise()
    assert 'skrgan is not loaded' in a.status.value


def test_the_page_has_a_picture_where_no_kernel_runs(app):
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(app._repr_mimebundle_()['image/png']), np.uint8), 1)
    assert shown.shape[1] == 1024 and shown.shape[0] > 512  # pad and image, with labels above
    assert (shown[-512:, :, ::-1] == app.screenshot()).all()


def test_keys_of_the_app_work_on_the_sheet(app):
    press = lambda key: app.pad.handle(
        {"event": 'key_down', "key": key, "shift_key": False, "ctrl_key": False, "meta_key": False}
    )
    press('S')
    assert app.pad.drawing.can_undo and app.seed.value == 1
    press('c')
    pixels(app)
    assert 'alt="before"' in app.compare.value
    press('x')
    assert len(list(app.out.iterdir())) == 1
    assert 'S surprise' in app.pad.message.value


def paints(tmp_path, **kw):
    small = {'size': 32, 'ngf': 4, 'blocks': 1, 'ndf': 4, 'receptive_field': 1, 'fade_maps': 4, 'classes': 3}
    r = recipe_class('pgsgan')(**small)
    r.class_names = PHANTOMS['ultrasound'].classes
    a = LiveRender(r, out=tmp_path / 'out', **kw)
    assert a.worker.wait(20)
    return a


def test_a_recipe_of_masks_gets_a_palette_and_its_condition(tmp_path):
    app = paints(tmp_path, example=True)
    assert [b.description for b in app.pad.bar.classes] == ['0 strokes', '1 ovary', '2 follicle']
    scan = phantom('ultrasound', 32, 0)
    sketch, mask = app.on_pad()
    assert (mask == scan['mask'].numpy()).all() and (sketch[0] == background_sketch(scan['image'], mask)).all()
    assert (pixels(app) == as_picture(app.recipe.render(app.recipe.condition(mask, sketch))[0])).all()
    app.pad.tool, app.pad.cls = 'region', 2
    draw(app, (20, 20), (120, 20), (120, 120), (20, 120))
    sketch, painted = app.on_pad()
    assert (painted[2:7, 2:7] == 2).all() and not sketch[0, 2:7, 2:7].any()
    app.pad.tool, app.pad.cls = 'pen', 0
    draw(app, (20, 60), (400, 60))  # strokes over an object leave it whole
    sketch, again = app.on_pad()
    assert (again == painted).all() and sketch[0, 3, 10:20].any() and not sketch[0, 3, 2:7].any()


def test_a_case_is_edited_and_compared(tmp_path):
    scans = phantom_data('ultrasound', 2, 32, seed=5)
    app = paints(tmp_path, images=scans)
    app.example.value = 1
    before = pixels(app)
    assert (app.on_pad()[1] == scans[1]['mask'].numpy()).all() and 'alt="real"' in app.compare.value
    y, x = np.argwhere(app.on_pad()[1] == 1).mean(0) * 16
    app.pad.tool = 'move'
    draw(app, (x, y), (x + 100, y + 40))
    assert (pixels(app) != before).any() and (app.shown['before'] == before).all()
    app.pad.undo()
    assert (pixels(app) == before).all()


def test_a_folder_of_cases_to_edit(tmp_path):
    scans = phantom_data('ultrasound', 2, 32, seed=5)
    for i, scan in enumerate(scans):
        save_png(tmp_path / f'scans/images/{i}.png', to_uint8(scan['image'])[..., 0])
        save_png(tmp_path / f'scans/masks/{i}.png', scan['mask'].numpy().astype(np.uint8))
    app = paints(tmp_path, images=str(tmp_path / 'scans'))
    assert [label for label, _ in app.example.options[1:]] == ['0.png', '1.png']
    app.example.value = 1
    assert (app.on_pad()[1] == scans[1]['mask'].numpy()).all() and (pixels(app) != 0).any()


def test_other_weights_bring_another_pad_and_keep_the_strokes(tmp_path):
    app = paints(tmp_path, models=[tmp_path / 'mine.safetensors'])
    draw(app, (50, 50), (400, 300))
    sketch = app.pad.sketch()
    r = tiny()
    r.save(tmp_path / 'mine.safetensors')
    app.model.value = str(tmp_path / 'mine.safetensors')
    assert app.pad.drawing.classes == ('background', 'stroke') and (app.pad.sketch() == sketch).all()
    assert (pixels(app) == as_picture(r.render(sketch)[0])).all()
    assert '<span>mine: rendered' in app.status.value and '>mine: synthetic' in app.caption.value
    assert f'title="{tmp_path}/mine.safetensors"' in app.caption.value
    tell(app, 'recall 1')
    assert app.pad.drawing.classes[1:] == ('ovary', 'follicle') and (app.pad.sketch() == sketch).all()


@pytest.fixture
def throat(tmp_path):
    r = recipe_class('sketch2medi')(**THROAT, size=32, classes=5, refine=2)
    r.class_names = PHANTOMS['pharynx'].objects
    folder = tmp_path / 'throats'
    for i, sample in enumerate(phantom_data('pharynx', 6, 32)):
        save_png(folder / f'{i}.png', to_uint8(sample['image']))
    a = LiveRender(r, out=tmp_path / 'out', retrieve=folder)
    assert a.worker.wait(20)
    return a


def test_steps_styles_and_truncation_of_sketch2medi(throat):
    app, c = throat, throat.choices
    draw(app, (50, 50), (300, 300), (450, 120))
    sketch = app.pad.sketch()
    steps = app.recipe.render(sketch, steps=2)
    assert (pixels(app) == as_picture(steps[2][0])).all() and c.steps.value.count('<button') == 3
    tell(app, 'step 0')
    assert (pixels(app) == as_picture(steps[0][0])).all() and c.steps.value.count('medsketch-chosen') == 1
    tell(app, 'step 2')
    c.more.value = True
    assert app.worker.wait(20) and c.styles.value.count('<button') == 6
    tell(app, 'style 3')
    assert (pixels(app) == as_picture(app.recipe.render(sketch, style=3)[0])).all()
    c.truncation.value = 0.5
    assert (pixels(app) == as_picture(app.recipe.render(sketch, style=3, truncation=0.5)[0])).all()
    tell(app, 'style 9')
    assert 'there are 1 to 5' in app.pad.message.value
    tell(app, 'style own')
    assert (pixels(app) == as_picture(app.recipe.render(sketch, truncation=0.5)[0])).all()


def test_what_is_painted_is_outlined_and_an_empty_sheet_is_the_mean(throat):
    app = throat
    mean = pixels(app)
    assert 'alert' not in app.status.value and app.beside.value == ''
    app.pad.tool, app.pad.cls = 'region', 2
    draw(app, (100, 100), (400, 100), (400, 400), (100, 400))
    mask = app.pad.mask()
    assert (pixels(app) != mean).any()
    want = app.recipe.render(outlines(objects_of(torch.tensor(mask))[0]).astype(np.float32) / 255)
    assert (pixels(app) == as_picture(want[0])).all()


def test_nearest_images_follow_the_drawing(throat):
    app = throat
    draw(app, (50, 50), (300, 300), (450, 120))
    assert app.worker.wait(20) and app.beside.value.count('data-medsketch="near ') == 5
    index = index_sketches(app.recipe.sketch_all(load_images(app.retrieve, 32)), style_codes(app.recipe))
    _, which = index.search(app.pad.sketch(), 5)
    assert [int(n) for n in re.findall(r'near (\d+)', app.beside.value)] == which[0].tolist()
    tell(app, f'near {int(which[0, 0])}')
    assert f'{int(which[0, 0])}.png' in app.large.value and 'Lay it under the sheet' in app.large.value
    tell(app, f'under {int(which[0, 0])}')
    assert app.pad.board.under.shape == (512, 512, 3)
    tell(app, 'shut')
    assert app.large.value == ''
    app.pad.clear()
    assert app.worker.wait(20) and 'draw something' in app.beside.value


def test_indexing_is_said_in_one_line_and_shows_no_progress_bar(throat, monkeypatch):
    said, bars = [], []
    monkeypatch.setattr('medsketch.core.IN_NOTEBOOK', True)
    monkeypatch.setattr('medsketch.data.dataset.progress_bar', lambda items, **kw: bars.append(kw) or items)
    throat.beside.observe(lambda change: said.append(change['new']), 'value')
    draw(throat, (50, 50), (300, 300))
    assert throat.worker.wait(20) and not bars  # a thread has no cell that a bar could stand below
    assert 'indexing' in said[0] and 'near 0' not in said[0] and 'indexing' not in said[-1]
    load_images(throat.retrieve, 32)
    assert len(bars) == 1


def test_rows_of_pictures_wrap_beside_their_label():
    assert re.fullmatch(r'<div class="medsketch-row medsketch-large"><span>Styles</span><div>ab</div></div>',
                        row('Styles', ['a', 'b'], 'large'))  # fmt: skip
    rules = dict(re.findall(r'(?m)^(\.medsketch-row.*?) \{(.*?)\}', CSS))
    assert [k for k, v in rules.items() if 'wrap' in v] == ['.medsketch-row > div']


def test_an_index_that_lost_its_images_or_is_none_is_said_beside_the_image(throat, tmp_path):
    index = index_sketches(throat.recipe.sketch_all(load_images(throat.retrieve, 32)), style_codes(throat.recipe),
                           throat.retrieve)  # fmt: skip
    save_index(tmp_path / 'a.safetensors', index)
    found = open_index(tmp_path / 'a.safetensors', throat.recipe)
    assert found.root == str(throat.retrieve) and Near(found).pixels(0, 32).shape == (32, 32, 3)
    throat.retrieve.rename(tmp_path / 'elsewhere')
    app = LiveRender(throat.recipe, out=tmp_path, retrieve=tmp_path / 'a.safetensors')
    draw(app, (50, 50), (300, 300))
    assert (pixels(app) != 0).any() and 'names images that are not there' in app.beside.value
    with pytest.raises(ValueError, match='neither an index'):
        open_index(__file__, throat.recipe)


@pytest.mark.parametrize("size", [64, 128])
def test_the_vessels_of_a_retina_are_strokes_where_they_are_broad_too(size):
    "Where they meet on the disc they are broader than a pen: they were drawn as outlines then, all of them"
    for seed in (0, 1):
        mask = phantom("fundus", size, seed)["mask"].numpy()
        assert phantom_sketch("fundus", size, seed)[mask == PHANTOMS["fundus"].classes.index("vessel")].min() == 1
