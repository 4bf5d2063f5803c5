"""A pad with several classes in JupyterLab: palette, region tool, and keys that the notebook uses as well."""

import numpy as np
import pytest
from pages import Studio, cells, run_notebook

from medsketch.studio.strokes import Drawing


@pytest.fixture(scope="module")
def pad(browser, lab):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_navigation_timeout(120_000)  # a kernel starts meanwhile, slowly on a busy machine
    page = context.new_page()
    run_notebook(page, lab("pad.ipynb"))
    p = Studio(page, "pad")
    p.sheet = page.locator("canvas.medsketch-sheet").first
    try:
        p.sheet.wait_for(timeout=20000)
    except Exception:
        p.shot("stuck")
        raise
    page.locator(".seen pre").wait_for(timeout=60000)
    yield p
    context.close()


def drawn(pad, n):
    "The drawing once it has n actions"

    def look():
        d = Drawing.from_json(pad.page.locator(".seen pre").inner_text())
        return len(d.actions) == n and d

    return pad.until(look, 20)


def near(pixel, colour):
    return np.abs(pixel.astype(int) - colour).max() < 30


def test_classes_by_click_and_by_key_draw_in_their_colours(pad):
    held = cells(pad.page)
    pad.draw((0.1, 0.2), (0.9, 0.2))
    pad.click("2 disc")
    pad.draw((0.1, 0.4), (0.9, 0.4))
    pad.sheet.focus()
    pad.press("1")
    pad.draw((0.1, 0.6), (0.9, 0.6))
    pad.press("2")
    pad.draw((0.1, 0.8), (0.9, 0.8))
    d = drawn(pad, 4)
    assert [a.cls for a in d.actions] == [1, 2, 1, 2]
    a = pad.ink()
    pad.shot("classes")
    side = len(a)
    for y, c in ((0.2, 1), (0.4, 2), (0.6, 1), (0.8, 2)):
        assert near(a[round(y * side), round(0.15 * side)], d.colours[c]), f"class {c}"
    assert np.abs(d.colours[1].astype(int) - d.colours[2]).max() > 60
    assert cells(pad.page) == held, "JupyterLab's own shortcuts for these keys changed the notebook"


def test_a_region_is_filled_with_its_class(pad):
    pad.click("Clear")
    pad.sheet.focus()
    pad.press("r", "2")
    pad.draw((0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7), (0.3, 0.32), steps=12)
    pad.until(
        lambda: Drawing.from_json(pad.page.locator(".seen pre").inner_text()).actions[-1].__class__.__name__ == "Stroke"
    )
    d = Drawing.from_json(pad.page.locator(".seen pre").inner_text())
    assert d.actions[-1].tool == "region"
    mask = d.mask(256)
    assert mask[128, 128] == 2 and mask[30, 30] == 0 and 0.12 < (mask == 2).mean() < 0.2
    a = pad.ink()
    pad.shot("region")
    side = len(a)
    inside, outside = a[round(0.4 * side), round(0.6 * side)].astype(int), a[round(0.1 * side), round(0.1 * side)]
    assert outside.min() > 240 and np.abs(inside - (255 - 0.35 * (255 - d.colours[2].astype(int)))).max() < 12
