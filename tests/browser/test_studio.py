"""The drawing app, in Voila and in JupyterLab, handled as a person does."""

import base64
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pages import PATIENCE, cells, find_cell, opened
from PIL import Image

from medsketch.core import to_uint8
from medsketch.phantoms import phantom
from medsketch.pretrained import load, packaged
from medsketch.studio.pictures import as_picture
from medsketch.studio.strokes import Drawing, Picture

DATA = Path(os.environ.get("MEDSKETCH_DATA", Path(__file__).parents[3] / "shared/data"))
FAST = """async (sheet, lines) => { for (const [from, to] of lines) {  // a hundred strokes a second
    for (const [kind, [x, y]] of [['mousemove', from], ['mousedown', from], ['mousemove', to], ['mouseup', to]])
        sheet.dispatchEvent(new MouseEvent(kind, {
            bubbles: true, clientX: x, clientY: y, buttons: kind == 'mouseup' ? 0 : 1}));
    await new Promise(done => setTimeout(done, 10)) } }"""
VEE = ((0.3, 0.6), (0.5, 0.35), (0.7, 0.6))


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def dark(ink):
    "Where the sheet shows strokes: (side, side) bool, without the frame and the pointer's ring"
    a = ink.max(-1) < 100
    a[:4] = a[-4:] = False
    a[:, :4] = a[:, -4:] = False
    return a


def decoded(studio):
    "The files in the zip that the page offers: {name: bytes}"
    links = studio.root.locator(".medsketch-links a[download]").all()
    packed = [base64.b64decode(a.get_attribute("href").split(",")[1]) for a in links]
    return {n: z.read(n) for z in map(zipfile.ZipFile, map(io.BytesIO, packed)) for n in z.namelist()}


def export(studio):
    "Press Save: {name: bytes}"
    studio.page.evaluate("document.querySelectorAll('.medsketch-links a').forEach(a => a.remove())")
    studio.click("Save")
    studio.until(lambda: "written to" in studio.status())
    return studio.until(lambda: decoded(studio))


def strokes(files):
    "The strokes since the last new sheet, and the drawing"
    d = Drawing.from_json(files["strokes.json"].decode())
    since = [i for i, a in enumerate(d.actions) if isinstance(a, Picture)]
    return d.actions[since[-1] + 1 if since else 0 :], d


def upload(studio, path, use=None):
    "Open a file, and say what it is"
    with studio.page.expect_file_chooser() as chosen:
        studio.click("Open a file")
    chosen.value.set_files(path)
    if use:
        studio.root.get_by_role("button", name=use, exact=True).click(timeout=60000)


def figures(studio):
    "What is compared: {label: bytes}"
    images = studio.root.locator(".medsketch-compare img").all()
    return {i.get_attribute("alt"): base64.b64decode(i.get_attribute("src").split(",")[1]) for i in images}


def test_drawing_changes_the_image_and_undo_brings_it_back_exactly(studio):
    empty = studio.settled()
    red, green, blue = pixels(empty)[64:192, 64:192].mean((0, 1))
    assert pixels(empty).shape == (256, 256, 3) and pixels(empty).std() > 20 and red > green > blue
    studio.draw(*VEE)
    drawn = studio.changed(empty)
    studio.shot("draw")
    ink = dark(studio.ink())
    side = len(ink)
    assert ink[int(0.33 * side) : int(0.63 * side), int(0.27 * side) : int(0.73 * side)].sum() > 0.95 * ink.sum() > 500
    assert "rendered in" in studio.status() and "not for diagnosis" in studio.status()
    studio.click("Undo")
    studio.shows(empty)
    assert dark(studio.ink()).sum() < 50
    studio.shot("undo")
    studio.click("Redo")
    studio.shows(drawn)
    assert (dark(studio.ink()) == ink).mean() > 0.999


def test_the_image_follows_while_the_stroke_is_drawn(studio):
    empty = studio.settled()
    studio.page.mouse.move(*studio.at(0.2, 0.3))
    studio.page.mouse.down()
    studio.page.mouse.move(*studio.at(0.8, 0.4), steps=10)
    half = studio.changed(empty)
    studio.page.mouse.move(*studio.at(0.5, 0.8), steps=10)
    studio.page.mouse.up()
    assert studio.changed(half) not in (half, empty)


def test_a_stroke_that_leaves_the_sheet_ends_there(studio):
    empty = studio.settled()
    studio.draw((0.5, 0.5), (1.1, 0.5))
    studio.changed(empty)
    studio.page.mouse.move(*studio.at(0.5, 0.8), steps=3)
    done, _ = strokes(export(studio))
    assert len(done) == 1 and done[0].points[-1][0] > 0.97 and done[0].points[0] == pytest.approx((0.5, 0.5), abs=0.01)


def test_eraser_takes_ink_away_and_the_image_with_it(studio):
    empty = studio.settled()
    studio.draw((0.2, 0.5), (0.8, 0.5))
    drawn = studio.changed(empty)
    before = dark(studio.ink())
    studio.click("Eraser")
    studio.draw((0.5, 0.4), (0.5, 0.6))
    studio.changed(drawn)
    after = dark(studio.ink())
    studio.shot("eraser")
    middle = np.s_[:, int(0.49 * len(after)) : int(0.51 * len(after))]
    assert before[middle].sum() > 0 == after[middle].sum() and after.sum() > 0.5 * before.sum()


def test_keys(studio):
    held = cells(studio.page) if studio.name == "lab" else None
    empty = studio.settled()
    studio.draw((0.2, 0.3), (0.8, 0.3))
    one = studio.changed(empty)
    studio.press("l")
    studio.draw((0.2, 0.7), (0.5, 0.5), (0.8, 0.7))
    studio.press("p", "]", "]")
    studio.draw((0.2, 0.9), (0.8, 0.9))
    studio.press("[")
    studio.draw((0.2, 0.2), (0.8, 0.2))
    studio.press("e")
    studio.draw((0.5, 0.1), (0.5, 0.35))
    three = studio.changed(one)
    studio.shot("keys")
    pen, line, thick, thinner, rubber = strokes(export(studio))[0]
    assert (pen.tool, line.tool, thick.tool, rubber.tool) == ("pen", "line", "pen", "eraser") and len(line.points) == 2
    assert thick.width == pytest.approx(pen.width * 1.25**2, rel=0.06) and thinner.width == pytest.approx(
        pen.width * 1.25, rel=0.06
    )
    studio.sheet.focus()
    studio.press(*["Control+z"] * 4)
    studio.shows(one)
    studio.press(*["Control+y"] * 3, "Control+Shift+Z")
    studio.shows(three)
    studio.press("Delete")
    studio.shows(empty)
    if held:
        assert cells(studio.page) == held, "JupyterLab's own shortcuts for these keys changed the notebook"


def test_a_finger_draws_and_two_fingers_do_not(studio):
    empty = studio.settled()
    studio.sheet.scroll_into_view_if_needed()
    studio.touch("touchStart", (0.3, 0.6))
    for i in range(1, 9):
        studio.touch("touchMove", (0.3 + 0.05 * i, 0.6 - 0.03 * i))
    studio.touch("touchEnd")
    studio.changed(empty)
    studio.shot("touch")
    studio.touch("touchStart", (0.2, 0.2), (0.3, 0.2))
    studio.touch("touchMove", (0.2, 0.5), (0.3, 0.5))
    studio.touch("touchEnd")
    studio.touch("touchStart", (0.8, 0.8))
    studio.touch("touchMove", (0.6, 0.8))
    studio.touch("touchEnd")
    studio.settled()
    first, *dots, last = strokes(export(studio))[0]
    assert first.points[0] == pytest.approx((0.3, 0.6), abs=0.01) and first.points[-1] == pytest.approx(
        (0.7, 0.36), abs=0.01
    )
    assert last.points[0] == pytest.approx((0.8, 0.8), abs=0.01) and last.points[-1] == pytest.approx(
        (0.6, 0.8), abs=0.01
    )
    assert all(len(d.points) == 1 for d in dots) and len(dots) <= 1  # where the first of two fingers came down


def test_another_renderer_draws_the_same_sketch(studio):
    others = [n for n in packaged('skrgan') if n != "fundus"]
    studio.draw(*VEE)
    first = studio.settled()
    for name in others:
        before = studio.png()
        studio.choose(name)
        second = studio.changed(before)
        studio.until(lambda name=name: name in studio.status())
        studio.shot(f"model_{name}")
        assert pixels(second).std() > 10
    studio.choose("fundus")
    studio.shows(first)
    assert len(strokes(export(studio))[0]) == 1


def test_surprise_me_shows_a_sketch_and_its_image(studio):
    empty = studio.settled()
    studio.click("Surprise me")
    one = studio.changed(empty)
    studio.shot("surprise")
    assert dark(studio.ink()).mean() > 0.003
    studio.click("Surprise me")
    assert studio.changed(one) != one


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    "A fundus photograph, real where the shared data is at hand"
    real = sorted((DATA / "retina/chasedb1").rglob("*.jpg"))
    if real:
        return real[0]
    path = tmp_path_factory.mktemp("photo") / "phantom.png"
    Image.fromarray(to_uint8(phantom("fundus", 256, 1)["image"])).save(path)
    return path


def test_edit_a_real_image_and_compare(studio, photo):
    empty = studio.settled()
    upload(studio, photo, "Image to edit")
    before = studio.changed(empty)
    studio.until(lambda: set(figures(studio)) == {"real", "before", "now", "change"})
    shown = {k: pixels(v) for k, v in figures(studio).items()}
    assert (shown["before"] == shown["now"]).all() and (shown["before"] == pixels(before)).all()
    assert len(np.unique(shown["change"].reshape(-1, 3), axis=0)) == 1
    studio.shot("edit_before")
    ink = studio.ink()
    assert dark(ink).mean() > 0.003 and (ink[..., 0] > ink[..., 2].astype(int) + 20).mean() > 0.2, (
        "sketch over a reddish underlay"
    )
    studio.draw((0.3, 0.5), (0.7, 0.5))
    now = studio.changed(before)
    studio.shot("edit_after")
    shown = {k: pixels(v) for k, v in figures(studio).items()}
    assert (shown["before"] == pixels(before)).all() and (shown["now"] == pixels(now)).all()
    assert shown["change"].max() > 60


def test_a_broken_file_is_reported_and_the_pad_goes_on(studio, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    before = studio.settled()
    upload(studio, tmp_path / "broken.png")
    alert = studio.root.locator(".medsketch-keys [role=alert]")
    alert.wait_for(timeout=20000)
    assert "broken.png" in alert.inner_text()
    studio.shot("broken")
    studio.draw(*VEE)
    studio.changed(before)
    studio.until(lambda: alert.count() == 0)


def test_open_a_sketch_and_a_broken_one(studio, tmp_path):
    a = np.full((256, 256), 255, np.uint8)
    a[120:130, 40:220] = 0
    Image.fromarray(a).save(tmp_path / "bar.png")
    empty = studio.settled()
    upload(studio, tmp_path / "bar.png", "Sketch")
    opened = studio.changed(empty)
    ink = dark(studio.ink())
    assert ink[int(0.46 * len(ink)) : int(0.52 * len(ink))].sum() > 0.9 * ink.sum() > 1000
    (tmp_path / "broken.png").write_bytes(b"nothing")
    upload(studio, tmp_path / "broken.png")
    alert = studio.root.locator("[role=alert]:has-text('broken.png')")
    alert.wait_for(timeout=20000)
    assert studio.settled() == opened
    studio.draw(*VEE)
    studio.until(lambda: alert.count() == 0)


def test_export_offers_files_that_hold_what_is_shown(studio):
    studio.draw(*VEE)
    shown = studio.settled()
    files = export(studio)
    studio.shot("export")
    assert set(files) == {"sketch.png", "image.png", "side_by_side.png", "strokes.json", "about.json"}
    assert (pixels(files["image.png"]) == pixels(shown)).all()
    assert pixels(files["side_by_side.png"]).shape == (256, 512, 3)
    done, drawing = strokes(files)
    assert len(done) == 1
    assert (np.round(255 - drawing.sketch()[0] * 255) == pixels(files["sketch.png"])[..., 0]).all()
    about = json.loads(files["about.json"])
    assert about["synthetic"] is True and about["weights"] == "fundus"
    with studio.page.expect_download() as saved:
        studio.click("Save")  # the page downloads it without another click
    with zipfile.ZipFile(saved.value.path()) as z:
        assert z.read("image.png") == files["image.png"] and set(z.namelist()) == set(files)


def test_two_hundred_fast_strokes_lose_none_and_the_newest_is_rendered(studio):
    studio.sheet.scroll_into_view_if_needed()
    starts = np.random.default_rng(0).uniform(0.1, 0.9, (200, 2))
    lines = [[studio.at(x, y), studio.at(x + 0.05, y + 0.04)] for x, y in starts]
    studio.sheet.evaluate(FAST, lines)
    files = export(studio)  # the kernel comes to it after all strokes
    shown = studio.settled()
    studio.shot("fast")
    done, drawing = strokes(files)
    assert len(done) == 200
    assert np.abs(np.array([s.points[0] for s in done]) - starts).max() < 0.01
    newest = as_picture(load("fundus", "cpu").for_drawing().render(drawing.sketch())[0]).astype(int)
    assert np.abs(newest - pixels(shown)).max() <= 2
    assert (pixels(files["image.png"]) == pixels(shown)).all()


def come_back(studio):
    "Reload the page. JupyterLab looks for a widget for two seconds and may miss one that comes just then: once more"
    lost = studio.root.get_by_text("Error displaying widget: model not found")  # ipywidgets 8.1.9: `get_model`
    for _ in range(5):
        studio.page.reload()
        if studio.name == "voila":
            break
        opened(studio.page, "draw.ipynb")
        find_cell(studio.page, "= LiveRender(")
        studio.sheet.or_(lost).first.wait_for(timeout=PATIENCE * 1000)
        if not lost.count():
            break
    studio.ready()


def test_reload(studio):
    "A new page shows the drawing: in Voila a new kernel has it from the autosave file, in JupyterLab the old one"
    empty = studio.settled()
    studio.draw(*VEE)
    drawn = studio.changed(empty)
    ink = dark(studio.ink())
    if studio.name == "lab":
        studio.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    come_back(studio)
    studio.shows(drawn)
    studio.until(lambda: (dark(studio.ink()) == ink).mean() > 0.999)
    studio.shot("reload")
    studio.draw((0.2, 0.8), (0.8, 0.8))
    studio.changed(drawn)
    assert dark(studio.ink())[int(0.78 * len(ink)) : int(0.82 * len(ink))].any()
