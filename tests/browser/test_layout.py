"""Nothing is cut off, overlaps or hangs over the edge: on several screens, and with larger text."""

import pytest

LARGER = """size => { const s = document.documentElement.style; s.fontSize = 16 * size + 'px';
    for (const [k, px] of [['--jp-widgets-font-size', 13], ['--jp-ui-font-size1', 13],
                           ['--jp-content-font-size1', 14]]) s.setProperty(k, px * size + 'px') }"""
CONTROLS = """root => [...root.querySelectorAll(
    'button, select, input:not([type=file]), canvas, img:not(button img),' +
    '.widget-label, .noUi-target, figcaption, .medsketch-say')]
    .map(e => [e, e.getBoundingClientRect()])
    .filter(([e, r]) => r.width > 0 && r.height > 0 && getComputedStyle(e).visibility != 'hidden')
    .map(([e, r]) => ({text: (e.innerText || e.placeholder || e.title || e.tagName).trim(), tag: e.tagName,
        left: r.left, top: r.top, right: r.right, bottom: r.bottom,
        cut: ['BUTTON', 'LABEL', 'FIGCAPTION'].includes(e.tagName)
            && (e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 2)}))"""


def overlap(a, b):
    return (
        min(a["right"], b["right"]) - max(a["left"], b["left"]) > 1
        and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > 1
    )


@pytest.mark.parametrize(
    "width, height, text",
    [(1280, 900, 1), (1024, 768, 1), (1280, 900, 1.25), (1024, 768, 1.25), (800, 900, 1.25), (390, 800, 1)],
)
def test_nothing_is_cut_off_or_overlaps(studio, width, height, text):
    page = studio.page
    before = studio.settled()
    studio.click("Surprise me")
    studio.changed(before)
    studio.click("Compare from here")
    studio.root.locator(".medsketch-compare img").first.wait_for(timeout=20000)
    if studio.name == "lab":
        page.evaluate("window.jupyterapp.shell.collapseLeft()")
    page.set_viewport_size({"width": width, "height": height})
    page.evaluate(LARGER, text)
    page.wait_for_timeout(400)
    try:
        studio.sheet.scroll_into_view_if_needed()
        studio.shot(f"layout_{width}_{round(text * 100)}")
        root = studio.root.locator(".medsketch-studio")
        controls = root.evaluate(CONTROLS)
        assert len(controls) > 20
        edge = root.evaluate("e => e.closest('.jp-OutputArea-output, .jp-Cell, body').getBoundingClientRect().right")
        for c in controls:
            assert not c["cut"], f"{c['text']!r} is cut off"
            assert c["left"] >= 0 and c["right"] <= min(edge, width) + 1, f"{c['text']!r} hangs over the edge"
        for i, a in enumerate(controls):
            for b in controls[:i]:
                assert not overlap(a, b), f"{a['text']!r} and {b['text']!r} overlap"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sheet, image = studio.sheet.bounding_box(), studio.img.bounding_box()
        assert abs(sheet["width"] - image["width"]) < 4
        if sheet["x"] < image["x"]:
            assert abs(sheet["y"] - image["y"]) < 4, "sheet and image side by side begin at the same height"
    finally:
        page.evaluate(LARGER, 1)
        page.set_viewport_size({"width": 1280, "height": 900})
