"""What the page does by itself: pointer, keys, zoom, names for screen readers, and a server that goes away."""

import re
import signal

import numpy as np
import pytest
from pages import Studio, answers, medsketch, read_url, server
from PIL import Image
from test_studio import dark, export, strokes, upload

from medsketch.studio.app import free_port

NAMELESS = """root => [...root.querySelectorAll(
    'button, select, input:not([type=file]), canvas.medsketch-sheet, .noUi-handle, img, a[href]')]
    .filter(e => e.getClientRects().length)
    .filter(e => !(e.getAttribute('aria-label') || e.innerText || e.alt || e.labels?.[0]?.innerText || '').trim()
        && !e.querySelector('img[alt]')).map(e => e.outerHTML.slice(0, 200))"""


def transform(studio):
    "(x, y, scale) of the sheet"
    found = re.findall(r"[-.\d]+", studio.sheet.evaluate("s => s.style.transform"))
    return [float(v) for v in found] or [0, 0, 1]


# pointer


def test_the_first_stroke_lands_under_the_pointer_though_the_sheet_is_partly_out_of_sight(studio):
    if studio.name == "lab":
        pytest.skip("the sheet's place is set by scrolling the window")
    studio.page.set_viewport_size({"width": 1280, "height": 420})
    try:
        studio.page.evaluate("window.scrollTo(0, 0); document.activeElement.blur()")
        studio.page.wait_for_timeout(200)
        top = studio.sheet.bounding_box()["y"]
        studio.page.mouse.move(*studio.at(0.3, 0.2))
        studio.page.mouse.down()
        studio.page.mouse.move(*studio.at(0.6, 0.3), steps=5)
        studio.page.mouse.up()
        assert studio.sheet.bounding_box()["y"] == top
        (stroke,), _ = strokes(export(studio))
        assert stroke.points[0] == pytest.approx((0.3, 0.2), abs=0.01)
    finally:
        studio.page.set_viewport_size({"width": 1280, "height": 900})


def test_only_the_left_button_draws(studio):
    empty = studio.settled()
    for button in ("right", "middle"):
        studio.page.mouse.move(*studio.at(0.2, 0.2))
        studio.page.mouse.down(button=button)
        studio.page.mouse.move(*studio.at(0.7, 0.6), steps=5)
        studio.page.mouse.up(button=button)
    studio.page.keyboard.press("Escape")
    assert studio.settled() == empty and strokes(export(studio))[0] == ()


def test_a_stroke_goes_on_where_the_pointer_comes_back(studio):
    studio.sheet.scroll_into_view_if_needed()
    studio.page.mouse.move(*studio.at(0.3, 0.5))
    studio.page.mouse.down()
    for at in ((0.3, 0.3), (-0.1, 0.3), (-0.1, 0.6), (0.2, 0.6), (0.5, 0.6)):
        studio.page.mouse.move(*studio.at(*at), steps=8)
    studio.page.mouse.up()
    studio.page.mouse.move(*studio.at(0.8, 0.8), steps=3)
    out, back = strokes(export(studio))[0]
    assert out.points[-1] == pytest.approx((0, 0.3), abs=0.03)
    assert back.points[0] == pytest.approx((0.02, 0.6), abs=0.04)
    assert back.points[-1] == pytest.approx((0.5, 0.6), abs=0.02)


def test_shift_draws_straight(studio):
    studio.page.keyboard.down("Shift")
    studio.draw((0.2, 0.2), (0.5, 0.7), (0.8, 0.2))
    studio.page.keyboard.up("Shift")
    studio.draw((0.2, 0.8), (0.5, 0.6), (0.8, 0.8))
    straight, free = strokes(export(studio))[0]
    assert len(straight.points) == 2 and straight.points[1] == pytest.approx((0.8, 0.2), abs=0.01)
    assert len(free.points) > 10


def test_the_wheel_zooms_and_space_moves_the_view(studio):
    studio.sheet.scroll_into_view_if_needed()
    box = studio.sheet.bounding_box()
    spot = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])
    studio.page.mouse.move(*spot(0.5, 0.5))
    studio.page.mouse.wheel(0, -350)
    studio.until(lambda: transform(studio)[2] > 1.5)
    scale = transform(studio)[2]
    for at, act in (((0.5, 0.5), "down"), ((0.7, 0.5), "up")):
        studio.page.mouse.move(*spot(*at), steps=5)
        getattr(studio.page.mouse, act)()
    studio.shot("zoom")
    before = transform(studio)
    studio.sheet.focus()
    studio.page.keyboard.down(" ")
    studio.page.mouse.move(*spot(0.5, 0.5))
    studio.page.mouse.down()
    studio.page.mouse.move(*spot(0.4, 0.45), steps=5)
    studio.page.mouse.up()
    studio.page.keyboard.up(" ")
    moved = transform(studio)
    assert moved[0] == pytest.approx(before[0] - 0.1 * box["width"], abs=2) and moved[2] == scale
    studio.page.mouse.wheel(0, 5000)
    studio.until(lambda: transform(studio)[2] == 1)
    (stroke,), _ = strokes(export(studio))
    ends = np.array([stroke.points[0], stroke.points[-1]])
    assert np.abs(ends - [(0.5, 0.5), (0.5 + 0.2 / scale, 0.5)]).max() < 0.01


# keys and names


def test_undo_works_wherever_the_focus_is(studio):
    empty = studio.settled()
    studio.draw((0.2, 0.3), (0.8, 0.4))
    drawn = studio.changed(empty)
    for control in (studio.button("Save"), studio.root.locator(".noUi-handle").first, studio.button("Pen").first):
        control.focus()
        studio.press("Control+z")
        studio.shows(empty)
        control.focus()
        studio.press("Control+y")
        studio.shows(drawn)
    if studio.name == "voila":
        studio.page.evaluate("document.activeElement.blur()")
        studio.press("Control+z")
        studio.shows(empty)


def test_every_control_has_a_name_and_the_tab_key_leads_from_the_sheet_to_save(studio):
    studio.draw((0.2, 0.3), (0.8, 0.4))
    studio.settled()
    assert studio.root.evaluate(NAMELESS) == []
    pressed = lambda: [studio.button(n).first.get_attribute("aria-pressed") for n in ("Pen", "Line", "Eraser")]
    studio.until(lambda: pressed() == ["true", "false", "false"])
    studio.sheet.focus()
    studio.press("e")
    studio.until(lambda: pressed() == ["false", "false", "true"])
    assert studio.sheet.get_attribute("role") == "application" and "Ctrl+Z" in studio.sheet.get_attribute("aria-label")
    frame = studio.root.locator(".medsketch-frame").evaluate("f => getComputedStyle(f).outlineWidth")
    assert frame == "3px"
    studio.press("Tab")
    focused = studio.page.evaluate("document.activeElement.innerText.trim()")
    outline = studio.page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert (focused, outline) == ("Save", "3px")
    for where in (".medsketch-say", ".medsketch-keys"):
        assert studio.root.locator(where).first.get_attribute("aria-live") == "polite"
    assert "not for diagnosis" in studio.img.get_attribute("alt")
    slider = studio.root.locator(".noUi-handle").first
    assert slider.get_attribute("role") == "slider" and slider.get_attribute("aria-label") == "Width"
    assert float(slider.get_attribute("aria-valuetext")) > 0
    studio.press("Shift+Tab")
    studio.press("p")


# pictures that can be pressed


def test_an_example_and_an_earlier_rendering_come_with_one_click(studio):
    empty = studio.settled()
    studio.root.get_by_title("example 2: fundus").click()
    example = studio.changed(empty)
    assert dark(studio.ink()).mean() > 0.003
    studio.draw((0.2, 0.3), (0.8, 0.4))
    drawn = studio.changed(example)
    last = studio.root.locator("button[data-medsketch^=recall]")
    studio.until(lambda: 2 <= last.count() <= 8)
    last.nth(1).click()
    studio.shows(example)
    last.first.click()
    studio.shows(drawn)
    studio.shot("strip")


def test_contrasts_are_named_and_phantoms_are_called_so(studio):
    says = lambda: studio.root.locator(".medsketch-caption").inner_text()
    assert "phantoms" not in says()
    studio.choose("brain_mri")
    studio.until(lambda: "FLAIR (bottom right)" in says() and "never seen a patient" in says())
    studio.until(lambda: "FLAIR" in studio.img.get_attribute("alt"))
    studio.shot("contrasts")


# files and connection, in Voila


def test_large_files_arrive_and_larger_ones_are_refused_in_words(studio, tmp_path):
    if studio.name == "lab":
        pytest.skip("JupyterLab has limits of its own")
    noise = np.random.default_rng(0).integers(0, 256, (2200, 2200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 12e6
    upload(studio, tmp_path / "large.png", "Image underneath")
    studio.until(lambda: "Opened large.png" in studio.root.locator(".medsketch-keys").inner_text())
    with open(tmp_path / "huge.nii", "wb") as f:
        f.truncate(70_000_000)
    upload(studio, tmp_path / "huge.nii")
    alert = studio.root.locator("[role=alert]:has-text('huge.nii')")
    alert.wait_for(timeout=20000)
    assert "64 MB" in alert.inner_text()
    studio.shot("huge")
    upload(studio, tmp_path / "large.png", "Nothing")
    studio.until(lambda: alert.count() == 0)


def test_a_stopped_server_is_announced_and_the_drawing_comes_back(browser, tmp_path):
    port, own = str(free_port("127.0.0.1", 0)), {"JUPYTER_RUNTIME_DIR": tmp_path / "runtime"}
    command = medsketch("studio", "--port", port, "--no-browser")
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_navigation_timeout(120_000)  # a kernel starts meanwhile, slowly on a busy machine
    page = context.new_page()
    with server(command, tmp_path, tmp_path / "one.txt", signal.SIGINT, **own) as p:
        page.goto(read_url(p, tmp_path / "one.txt"))
        studio = Studio(page, "voila").ready()
        assert "token" not in page.url and dark(studio.ink()).any(), "opens on an example"
        studio.click("Clear")
        before = studio.settled()
        studio.draw((0.2, 0.3), (0.8, 0.4))
        drawn = studio.changed(before)
        ink = dark(studio.ink())
    banner = page.locator(".medsketch-connection")
    banner.wait_for(timeout=30000)
    studio.shot("lost")
    assert "drawing is saved" in banner.inner_text() and (dark(studio.ink()) == ink).mean() > 0.9
    with server(command, tmp_path, tmp_path / "two.txt", signal.SIGINT, **own) as p:
        answers(read_url(p, tmp_path / "two.txt").split("?")[0] + "voila/static/voila.js")
        page.wait_for_function("document.querySelector('.medsketch-connection').innerText.includes('restarted')")
        page.get_by_role("button", name="Reload").click()
        studio.ready().shows(drawn)
        assert (dark(studio.ink()) == ink).mean() > 0.999 and banner.count() == 0
    context.close()
