"The drawing pad: strokes, history and files without a browser, and a browser's events, simulated"

import base64
import io
import json
import time
import zipfile

import cv2
import numpy as np
import pytest
import torch
from ipycanvas.canvas import _CANVAS_MANAGER, COMMANDS
from PIL import Image

from medsketch.core import to_uint8
from medsketch.phantoms import phantom
from medsketch.sketch import read_sketch, sobel_sketch
from medsketch.studio import uploads
from medsketch.studio.board import Board, PointerInput, send_together, square_pixels
from medsketch.studio.ink import MOST_POINTS, Stroke, cover, smooth
from medsketch.studio.sketchpad import SketchPad
from medsketch.studio.strokes import Drawing
from medsketch.studio.toolbar import widths

KINDS = ("background", "ovary", "follicle", "vessel")


def scrawls(n, seed=0, classes=1):
    "Strokes of every tool, all over the sheet"
    rng = np.random.default_rng(seed)
    tools = ["pen", "pen", "eraser", "line"] + ["region"] * (classes > 1)
    for i in range(n):
        t = np.linspace(0, rng.uniform(1, 6), 40)
        p = rng.uniform(-0.1, 1.1, 2) + rng.uniform(0.03, 0.3) * np.stack(
            [np.cos(t * rng.uniform(0.5, 1)), np.sin(t)], 1
        )
        tool = tools[i % len(tools)]
        points = p[[0, -1]] if tool == "line" else smooth(p, closed=tool == "region")
        yield Stroke(tool, points, float(rng.uniform(0.002, 0.05)), int(rng.integers(1, classes + 1)))


def drawn(n, seed=0, classes=1, size=128):
    d = Drawing(size, KINDS[: classes + 1])
    for s in scrawls(n, seed, classes):
        d.add(s)
    return d


def same(a, b):
    return (a.sketch() == b.sketch()).all() and (a.mask() == b.mask()).all() and (a.picture() == b.picture()).all()


# strokes and ink


@pytest.mark.parametrize("w", [0.5, 1, 2.56, 3, 7.3, 24])
def test_ink_is_as_wide_as_asked_and_turns_with_the_line(w):
    for angle in np.linspace(0, np.pi, 9):
        d = np.array([np.cos(angle), np.sin(angle)])
        ink = cover(Stroke("line", [0.5 - 0.3 * d, 0.5 + 0.3 * d], w / 256), 256)[1]
        assert abs(ink.sum() / 255 - (154 * w + np.pi / 4 * w * w)) / 154 < 0.05 * w + 0.12


def test_a_single_point_is_a_round_dot():
    for w in (2.0, 5.0, 20.0):
        d = Drawing(256)
        d.add(Stroke("pen", [(0.5, 0.5)], w / 256))
        s = d.sketch()[0]
        assert abs(s.sum() - np.pi / 4 * w * w) < 0.2 * w * w + 1
        y, x = np.nonzero(s > 0.5)
        assert abs(np.ptp(x) - np.ptp(y)) <= 1 and abs(x.mean() - 127.5) < 0.6


def test_sizes_agree():
    d = drawn(30, classes=3)
    big, small = d.sketch(512)[0], d.sketch(256)[0]
    gap = np.abs(cv2.resize(big, (256, 256), interpolation=cv2.INTER_AREA) - small)
    assert gap.mean() < 0.01 and gap.max() < 0.35
    assert (d.mask(512)[::2, ::2] != d.mask(256)).mean() < 0.03


def test_eraser_only_removes_and_never_in_white():
    d = drawn(10)
    for s in scrawls(10, seed=3):
        before = d.sketch().copy()
        d.add(Stroke("eraser", s.points, s.width))
        assert (d.sketch() <= before).all()
    before = d.sketch()
    d.add(Stroke("pen", [(0.1, 0.1), (0.9, 0.9)], 0.02))
    assert (d.sketch() >= before).all() and d.sketch().sum() > before.sum()


def test_points_outside_are_brought_to_the_edge():
    s = Stroke("pen", [(-5, 0.5), (0.5, 9e9)], 0.02)
    assert s.points == ((0.0, 0.5), (0.5, 1.0))
    d = Drawing(64)
    d.add(s)
    assert d.sketch().max() == 1


def test_a_region_fills_exactly_its_outline_and_draws_its_edge():
    square = [(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)]
    d = Drawing(256, KINDS)
    d.add(Stroke("region", square, 0.02, 2))
    m, s = d.mask(), d.sketch()[0]
    assert set(np.unique(m)) == {0, 2} and abs((m == 2).sum() - 128**2) < 300
    assert s[128, 128] == 0 and s[128, 66] == 1 and s[128, 60] == 0  # ink along the inside of the edge
    d.add(Stroke("pen", [(0.3, 0.5), (0.7, 0.5)], 0.02, 3))
    assert d.mask()[128, 128] == 3 and d.mask()[100, 128] == 2
    d.add(Stroke("eraser", [(0.3, 0.5), (0.7, 0.5)], 0.1))
    assert d.mask()[128, 128] == 0


def test_a_region_that_crosses_itself_has_no_holes():
    turns = np.linspace(0, 4 * np.pi, 200)
    d = Drawing(256, KINDS)
    d.add(Stroke("region", np.stack([0.5 + 0.3 * np.cos(turns), 0.5 + 0.3 * np.sin(turns)], 1), 0.01, 1))
    assert abs((d.mask() == 1).mean() - np.pi * 0.09) < 0.01
    for points in ([(0.5, 0.5)], [(0.2, 0.2), (0.8, 0.8)], [(0.1, 0.1)] * 5, [(0, 0), (1, 0), (1, 1), (0, 1)]):
        d.add(Stroke("region", points, 0.02, 1))  # nothing to enclose, or everything
    assert (d.mask() == 1).all()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: Stroke("spray", [(0, 0)], 0.1), "use one of pen"),
        (lambda: Stroke("pen", [(0, 0, 0)], 0.1), "pairs"),
        (lambda: Stroke("pen", [(0, 0)] * (MOST_POINTS + 1), 0.1), "1 to"),
        (lambda: Stroke("pen", [(0, np.inf)], 0.1), "finite"),
        (lambda: Stroke("pen", "abc", 0.1), "numbers"),
        (lambda: Stroke("pen", [(0, 0)], float("nan")), "width"),
        (lambda: Stroke("pen", [(0, 0)], 0.1, True), "whole numbers"),
        (lambda: Drawing(100), "power of two"),
        (lambda: Drawing(64, ("a",)), "2 to 33"),
        (lambda: Drawing(64, ("a", "b", "b")), "same name"),
        (lambda: Drawing(64, colours=[(0, 0, 0)]), "2 rows"),
        (lambda: Drawing(64).add("pen"), "add a Stroke"),
        (lambda: Drawing(64).add(Stroke("pen", [(0, 0)], 0.1, 2)), "class 2"),
        (lambda: Drawing(64).load(np.zeros((64, 32))), "square"),
        (lambda: Drawing(64).load(np.full((64, 64), np.nan)), "from 0"),
        (lambda: Drawing(64).load(np.zeros((64, 64), np.uint8)), "from 0"),
        (lambda: Drawing(64).sketch(0), "size 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        wrong()


# smoothing


def distance(a, b):
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(1)


def test_smoothing_keeps_ends_and_stays_near():
    rng = np.random.default_rng(0)
    for n in (2, 3, 4, 7, 50, 400):
        for scale in (1e-4, 0.02, 1.0):
            p = rng.uniform(0, 1, (n, 2)) * scale
            s = smooth(p, step=1 / 512)
            assert np.abs(s[[0, -1]] - p[[0, -1]]).max() < 1e-9 and np.isfinite(s).all() and len(s) <= MOST_POINTS
            assert distance(p, s).max() <= 0.8 * 0.008 + 1 / 128, (n, scale)


def test_smoothing_keeps_straight_lines_straight_and_takes_jitter_out():
    a, b = np.array([0.1, 0.8]), np.array([0.9, 0.3])
    along = np.sort(np.random.default_rng(1).uniform(0, 1, 30))[:, None]
    line = np.concatenate([[a], a + along * (b - a), [b]])
    off = lambda s: np.abs(np.cross(np.append(b - a, 0), np.pad(s - a, ((0, 0), (0, 1))))[:, 2]) / np.linalg.norm(b - a)
    assert off(smooth(line)).max() < 1e-9
    steps = np.round((a + np.linspace(0, 1, 300)[:, None] * (b - a)) * 512) / 512
    assert off(smooth(steps)).mean() < 0.4 * off(steps).mean()


def test_smoothing_of_degenerate_input():
    assert smooth([(0.3, 0.4)] * 9).tolist() == [[0.3, 0.4]]
    assert len(smooth([(0.3, 0.4)], closed=True)) == 1
    for p in ([(0.1, 0.1), (0.2, 0.1)], [(0.1, 0.1), (0.2, 0.1), (0.2, 0.3)], [(0.1, 0.1), (0.2, 0.1), (0.1, 0.1)]):
        s = smooth(p, closed=True)
        assert np.isfinite(s).all() and distance(np.array(p), s).max() < 0.02


# history


@pytest.mark.parametrize("classes", [1, 3])
def test_undo_and_redo_are_exact(classes):
    d = drawn(60, classes=classes)
    d.load(np.random.default_rng(0).random((1, 64, 64)))
    for s in scrawls(40, seed=9, classes=classes):
        d.add(s)
    d.clear()
    for s in scrawls(20, seed=10, classes=classes):
        d.add(s)
    states = [(d.sketch(), d.mask())]
    while d.undo():
        states.append((d.sketch(), d.mask()))
    assert len(states) == 123 and not states[-1][0].any() and not d.can_undo
    for sketch, mask in states[-2::-1]:
        assert d.redo() and (d.sketch() == sketch).all() and (d.mask() == mask).all()
    assert not d.can_redo and not d.redo()


def test_the_picture_does_not_depend_on_when_it_was_looked_at():
    a, b = Drawing(128, KINDS), Drawing(128, KINDS)
    for i, s in enumerate(scrawls(80, classes=3)):
        a.add(s), b.add(s)
        a.sketch(), a.picture(64 + i % 9)
        if i % 5 == 4:
            a.undo(), b.undo(), a.undo(), b.undo()
            if i % 2:
                a.redo(), b.redo()
    assert same(a, b)


def test_a_new_stroke_ends_what_could_be_redone():
    d = drawn(5)
    d.sketch()
    d.undo(), d.undo()
    d.add(Stroke("pen", [(0.5, 0.5)], 0.1))
    assert not d.can_redo and len(d.actions) == 4
    fresh = Drawing(128)
    for a in d.actions:
        fresh.add(a)
    assert same(d, fresh)


def test_version_changes_with_the_picture():
    d = Drawing(64)
    seen = [d.version]
    for act in (lambda: d.add(Stroke("pen", [(0, 0)], 0.1)), lambda: d.load(np.ones((8, 8))), d.clear, d.undo, d.redo):
        act()
        seen.append(d.version)
    assert len(set(seen)) == 6
    d.sketch(), d.mask(32), d.redo(), d.clear()
    assert d.version == seen[-1]


def test_a_stroke_among_hundreds_costs_one_stroke():
    d = drawn(200, size=256)
    d.sketch(), d.sketch(512)
    redraws = []
    for _ in range(5):
        start = time.perf_counter()
        d.add(Stroke("pen", smooth([(0.1, 0.1), (0.5, 0.4), (0.9, 0.2)]), 0.01))
        d.sketch()
        more = time.perf_counter() - start
        start = time.perf_counter()
        d.undo()
        d.sketch()
        redraws.append((more, time.perf_counter() - start))
    more, less = np.min(redraws, 0)
    start = time.perf_counter()
    drawn(200, size=256).sketch()
    everything = time.perf_counter() - start
    assert less < 0.02 and more < 0.02 and more < everything / 10


def test_a_loaded_sketch_is_a_sketch():
    d = Drawing(128)
    whole = sobel_sketch(phantom("fundus", 256, seed=2)["image"], "fundus")
    d.add(Stroke("pen", [(0.5, 0.5)], 0.9))
    d.load(torch.from_numpy(whole)[None])
    expected = cv2.resize(whole, (128, 128), interpolation=cv2.INTER_AREA)
    assert np.abs(d.sketch()[0] - expected).max() < 0.01 and (d.sketch(256)[0] == whole).all()
    d.add(Stroke("eraser", [(0.5, 0.5)], 0.5))
    assert not d.sketch()[0, 50:78, 50:78].any()
    d.undo(), d.undo()
    assert d.sketch()[0, 64, 64] == 1


# files


def test_json_round_trip_is_exact():
    d = drawn(40, classes=3)
    d.load(np.random.default_rng(0).random((64, 64)).astype(np.float32))
    for s in scrawls(20, seed=4, classes=3):
        d.add(s)
    text = d.to_json()
    again = Drawing.from_json(text)
    assert same(d, again) and again.to_json() == text and again.classes == d.classes
    while d.undo():
        again.undo()
    assert same(d, again)


def test_damaged_files_are_refused_by_name():
    good = json.loads(drawn(3, classes=3).to_json())
    picture = drawn(1)
    picture.load(np.ones((16, 16)))
    png = json.loads(picture.to_json())["actions"][-1]["picture"]
    raw = base64.b64decode(png)
    huge = raw[:16] + (60000).to_bytes(4, "big") * 2 + raw[24:]
    stroke = good["actions"][0]
    for change, why in [
        ({"format": "x"}, "not a medsketch drawing"),
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"size": 100}, "power of two"),
        ({"size": 10**400}, "out of range"),
        ({"size": -256}, "out of range"),
        ({"size": True}, "size"),
        ({"size": "256"}, "size"),
        ({"classes": ["a"]}, "2 to 33"),
        ({"classes": [["a"], 3]}, "2 to 33"),
        ({"classes": "ab"}, "classes"),
        ({"colours": [[0, 0, 0]]}, "rows"),
        ({"colours": [[0, 0, "x"]] * 4}, "rows"),
        ({"colours": [[0, 0, 10**400]] * 4}, "rows"),
        ({"actions": None}, "actions"),
        ({"actions": [1]}, "action 0"),
        ({"actions": [stroke, {}]}, "action 1"),
        ({"actions": [stroke] * 20001}, "20001 actions"),
        ({"actions": [stroke | {"cls": 4}]}, "class 4"),
        ({"actions": [stroke | {"cls": 1.5}]}, "cls"),
        ({"actions": [stroke | {"width": 1e999}]}, "Infinity"),
        ({"actions": [stroke | {"width": 10**400}]}, "numbers"),
        ({"actions": [stroke | {"width": None}]}, "width"),
        ({"actions": [stroke | {"points": [[0, "1"]]}]}, "pairs of numbers"),
        ({"actions": [stroke | {"points": [[0, True]]}]}, "pairs of numbers"),
        ({"actions": [stroke | {"points": [[0, 10**400]]}]}, "numbers"),
        ({"actions": [stroke | {"points": [0, 1]}]}, "pairs of numbers"),
        ({"actions": [stroke | {"points": []}]}, "1 to"),
        ({"actions": [stroke | {"points": [[0, 0]] * 20001}]}, "1 to"),
        ({"actions": [stroke | {"points": [[float("nan"), 0]]}]}, "NaN"),
        ({"actions": [{"picture": "%%%"}]}, "base64"),
        ({"actions": [{"picture": "aGFsbG8="}]}, "not a PNG"),
        ({"actions": [{"picture": 5}]}, "picture"),
        ({"actions": [{"picture": base64.b64encode(raw[:40]).decode()}]}, "decoded"),
        ({"actions": [{"picture": base64.b64encode(huge).decode()}]}, "power of two"),
    ]:
        with pytest.raises(ValueError, match=why):
            Drawing.from_json(json.dumps(good | change))
    for text in ("", "null", "[" * 100_000, "{}", "\x00", b"\xff\xfe", None):
        with pytest.raises(ValueError, match="drawing"):
            Drawing.from_json(text)


def test_a_file_cut_short_anywhere_is_refused():
    text = drawn(2, classes=3).to_json()
    for n in range(0, len(text) - 1, max(1, len(text) // 97)):
        with pytest.raises(ValueError, match="drawing"):
            Drawing.from_json(text[:n])


def test_saved_png_reads_back(tmp_path):
    d = drawn(12, size=256)
    d.save_png(tmp_path / "new/sketch.png")
    assert np.abs(read_sketch(tmp_path / "new/sketch.png", 256).numpy() - d.sketch()).max() <= 1 / 255
    assert np.asarray(Image.open(tmp_path / "new/sketch.png"))[d.sketch()[0] == 0].min() == 255


# the hand


def feed(hand, kind, *at):
    event = (
        {"event": kind, "touches": list(at)} if kind.startswith("touch") else {"event": kind, "x": at[0], "y": at[1]}
    )
    return [what for what, _ in hand.feed(event, 100)]


def test_every_stroke_begins_and_ends_once_whatever_comes():
    rng = np.random.default_rng(0)
    hand, count, open_ = PointerInput(), {"begin": 0, "end": 0}, False
    kinds = [
        "mouse_down",
        "mouse_move",
        "mouse_move",
        "mouse_up",
        "mouse_out",
        "touch_start",
        "touch_move",
        "touch_end",
        "touch_cancel",
        "mouse_wheel",
    ]
    for _ in range(5000):
        kind = kinds[rng.integers(len(kinds))]
        at = (
            [tuple(v) for v in rng.uniform(-50, 150, (rng.integers(0, 3), 2))]
            if kind.startswith("touch")
            else rng.uniform(-50, 150, 2)
        )
        for what in feed(hand, kind, *at):
            assert what != "begin" or not open_
            assert what not in ("extend", "end") or open_
            open_ = what in ("begin", "extend") or (open_ and what != "end")
            count[what] = count.get(what, 0) + 1
        assert all(0 <= v <= 1 for p in hand.points for v in p)
    assert count["begin"] - count["end"] == bool(hand.points) and count["begin"] > 500


def test_the_hand_knows_the_traps():
    hand = PointerInput()
    assert feed(hand, "mouse_up", 5, 5) == [] and feed(hand, "mouse_move", 5, 5) == ["hover"]
    assert feed(hand, "mouse_down", 5, 5) == ["begin"] and feed(hand, "mouse_down", 50, 50) == ["end", "begin"]
    hand.points = [(0.5, 0.5)]
    points = next(p for what, p in hand.feed({"event": "mouse_out", "x": 150, "y": 75}, 100) if what == "end")
    assert points == [(0.5, 0.5), (1.0, 0.625)]  # the edge, where the way out crosses it
    assert feed(hand, "touch_start", (1, 1)) == ["begin"] and feed(hand, "touch_start", (1, 1), (9, 9)) == ["end"]
    assert (
        feed(hand, "touch_move", (2, 2)) == []
        and feed(hand, "touch_end", (2, 2)) == []
        and feed(hand, "touch_end") == ["leave"]
    )
    assert feed(hand, "touch_start", (1, 1)) == ["begin"] and feed(hand, "touch_cancel") == ["end", "leave"]
    with pytest.raises(ValueError, match="pointer"):
        feed(hand, "mouse_down", float("nan"), 0)


# the pad, with simulated events


@pytest.fixture
def sent(monkeypatch):
    "The commands that would go to the browser, one list per message"
    messages = []
    monkeypatch.setattr(_CANVAS_MANAGER, "_send_custom", lambda command, buffers=[]: messages.append(command))
    return messages


def event(pad, kind, x=None, y=None, **more):
    side = pad.canvas.width
    content = {"event": kind} | ({} if x is None else {"x": x * side, "y": y * side}) | more
    pad.canvas[-1]._handle_frontend_event(None, content, [])


def touch(pad, kind, *at):
    event(pad, kind, touches=[{"x": x * pad.canvas.width, "y": y * pad.canvas.width} for x, y in at])


def stroke(pad, points):
    event(pad, "mouse_down", *points[0])
    for p in points[1:]:
        event(pad, "mouse_move", *p)
    event(pad, "mouse_up", *points[-1])


def key(pad, name, ctrl=False, shift=False):
    event(pad, "key_down", key=name, shift_key=shift, ctrl_key=ctrl, meta_key=False)


WAVE = [(0.1 + 0.02 * i, 0.5 + 0.1 * np.sin(i / 3)) for i in range(40)]


def test_a_stroke_becomes_ink():
    pad, calls = SketchPad(128), []
    pad.on_change(lambda p, final: calls.append((final, float(p.sketch().sum()))))
    stroke(pad, WAVE)
    assert len(pad.drawing.actions) == 1 and pad.sketch().sum() > 100
    assert [final for final, _ in calls].count(True) == 1 and calls[-1][0]
    assert calls[0][0] is False and 0 < calls[0][1] < calls[-1][1]  # what is being drawn is part of the sketch
    assert not pad.bar.undo_button.disabled and pad.bar.redo_button.disabled


def test_live_notices_are_spaced():
    pad, times = SketchPad(64), []
    pad.on_change(lambda p, final: times.append(time.monotonic()) or time.sleep(0.1 if not final else 0))
    event(pad, "mouse_down", 0.1, 0.1)
    start = time.monotonic()
    while time.monotonic() - start < 0.7:
        event(pad, "mouse_move", *np.random.rand(2))
    assert 3 <= len(times) <= 5 and np.diff(times).min() > 0.19  # a slow listener waits as long as it takes


def test_two_hundred_fast_strokes_are_all_there():
    pad = SketchPad(64)
    for i in range(200):
        x, y = 0.05 + 0.9 * (i % 20) / 20, 0.05 + 0.9 * (i // 20) / 10
        stroke(pad, [(x, y), (x + 0.01, y + 0.03), (x + 0.02, y)])
    assert len(pad.drawing.actions) == 200
    for _ in range(200):
        key(pad, "z", ctrl=True)
    assert not pad.sketch().any()
    for _ in range(200):
        key(pad, "Z", ctrl=True, shift=True)
    assert len(pad.drawing.actions) == 200 and pad.sketch().any()


def test_keys_do_what_the_tooltips_say():
    pad = SketchPad(64, KINDS)
    for name, tool in (("l", "line"), ("R", "region"), ("e", "eraser"), ("p", "pen")):
        key(pad, name)
        assert pad.tool == tool
    wide = pad.width
    key(pad, "]")
    assert pad.width > wide
    key(pad, "["), key(pad, "[")
    assert pad.width < wide
    for i in (2, 3, 1):
        key(pad, str(i))
        assert pad.cls == i and pad.bar.classes[i - 1].icon == "check"
    key(pad, "9")
    assert pad.cls == 1 and "class 9" in pad.message.value
    stroke(pad, WAVE), key(pad, "Delete")
    assert not pad.sketch().any()
    key(pad, "z", ctrl=True)
    assert pad.sketch().any()
    key(pad, "z", ctrl=True), key(pad, "y", ctrl=True)
    assert len(pad.drawing.actions) == 1
    for name in ("F5", "Shift", "Tab", "", "é", "[]"):
        key(pad, name)
    assert len(pad.drawing.actions) == 1


def test_tools_and_classes():
    pad = SketchPad(128, KINDS)
    key(pad, "r"), key(pad, "2")
    stroke(pad, [(0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7)])
    assert pad.mask()[64, 64] == 2 and pad.sketch()[0, 64, 64] == 0 and [c for *_, c in pad.drawing.labels()] == [2]
    key(pad, "e")
    stroke(pad, [(0.2, 0.5), (0.8, 0.5)])
    assert pad.mask()[64, 64] == 0
    key(pad, "l"), key(pad, "3")
    stroke(pad, [(0.1, 0.1), (0.5, 0.8), (0.9, 0.1)])
    assert pad.drawing.actions[-1].points == ((0.1, 0.1), (0.9, 0.1)) and pad.mask()[13, 64] == 3
    with pytest.raises(ValueError, match="this pad has Pen|this pad has pen"):
        SketchPad(64).tool = "region"
    with pytest.raises(ValueError, match="class 4"):
        pad.cls = 4


def test_the_eraser_has_a_width_of_its_own():
    pad = SketchPad(256)
    pen = pad.width
    pad.tool = "eraser"
    assert pad.width > 2 * pen
    pad.width = 0.1
    pad.tool = "pen"
    assert pad.width == pen
    pad.tool = "line"
    assert pad.width == pen
    pad.tool = "eraser"
    assert abs(pad.width - 0.1) < 0.012
    pad.width = 99
    assert pad.width <= 0.26


def test_leaving_the_sheet_ends_the_stroke():
    pad = SketchPad(64)
    event(pad, "mouse_down", 0.5, 0.5), event(pad, "mouse_move", 0.7, 0.5), event(pad, "mouse_out", 1.4, 0.5)
    assert len(pad.drawing.actions) == 1 and pad.drawing.actions[0].points[-1] == (1.0, 0.5)
    event(pad, "mouse_move", 0.2, 0.2), event(pad, "mouse_up", 0.3, 0.3)
    assert len(pad.drawing.actions) == 1


def test_a_second_press_without_release_loses_nothing():
    pad = SketchPad(64)
    event(pad, "mouse_down", 0.2, 0.2), event(pad, "mouse_move", 0.4, 0.2)
    event(pad, "mouse_down", 0.2, 0.8), event(pad, "mouse_move", 0.4, 0.8), event(pad, "mouse_up", 0.4, 0.8)
    assert len(pad.drawing.actions) == 2


def test_fingers():
    pad = SketchPad(64)
    touch(pad, "touch_start", (0.2, 0.2)), touch(pad, "touch_move", (0.6, 0.2)), touch(pad, "touch_end")
    assert len(pad.drawing.actions) == 1
    touch(pad, "touch_start", (0.2, 0.5)), touch(pad, "touch_move", (0.3, 0.5))
    (
        touch(pad, "touch_start", (0.3, 0.5), (0.8, 0.8)),
        touch(pad, "touch_move", (0.5, 0.1), (0.8, 0.9)),
        touch(pad, "touch_end", (0.5, 0.1)),
    )
    touch(pad, "touch_move", (0.9, 0.9)), touch(pad, "touch_end")
    assert len(pad.drawing.actions) == 2 and max(x for x, _ in pad.drawing.actions[1].points) <= 0.3
    touch(pad, "touch_start", (0.2, 0.5)), touch(pad, "touch_cancel", (0.2, 0.5))
    assert len(pad.drawing.actions) == 3 and "&#9888;" not in pad.message.value


def test_undo_in_the_middle_of_a_stroke_gives_it_up():
    pad = SketchPad(64)
    stroke(pad, WAVE)
    before = pad.sketch()
    for name, ctrl in (("z", True), ("Escape", False)):
        event(pad, "mouse_down", 0.2, 0.9), event(pad, "mouse_move", 0.8, 0.9)
        assert (pad.sketch() != before).any()
        key(pad, name, ctrl=ctrl)
        assert (pad.sketch() == before).all() and len(pad.drawing.actions) == 1
        event(pad, "mouse_move", 0.5, 0.5), event(pad, "mouse_up", 0.5, 0.5)
        assert len(pad.drawing.actions) == 1


def test_a_tool_changed_in_the_middle_counts_from_the_next_stroke():
    pad = SketchPad(64)
    event(pad, "mouse_down", 0.2, 0.5)
    key(pad, "e")
    event(pad, "mouse_move", 0.8, 0.5), event(pad, "mouse_up", 0.8, 0.5)
    assert pad.drawing.actions[0].tool == "pen" and pad.sketch().any()


def test_errors_are_shown_and_stop_nothing(sent):
    pad = SketchPad(64)

    def angry(pad, final):
        raise RuntimeError("no <b>renderer</b>")

    pad.on_change(angry)
    stroke(pad, WAVE)
    assert "no &lt;b&gt;renderer" in pad.message.value and len(pad.drawing.actions) == 1
    for bad in (
        {},
        {"event": "mouse_down"},
        {"event": "mouse_down", "x": float("nan"), "y": 0},
        {"event": "touch_start", "touches": [3]},
        {"event": "key_down"},
    ):
        pad.handle(bad)
    assert not _CANVAS_MANAGER._caching
    with pytest.raises(ZeroDivisionError), send_together(pad.canvas):
        pad.canvas[0].clear()
        1 / 0  # noqa: B018
    assert not _CANVAS_MANAGER._caching and not _CANVAS_MANAGER._commands_cache
    before = len(sent)
    stroke(pad, WAVE)
    assert len(pad.drawing.actions) == 2 and len(sent) > before


def test_one_message_per_move_and_ink_in_it(sent):
    pad = SketchPad(64)
    event(pad, "mouse_down", 0.1, 0.5)
    del sent[:]
    event(pad, "mouse_move", 0.3, 0.5)
    assert len(sent) == 1 and COMMANDS["strokeLines"] in [c[0] for c in sent[0]]
    del sent[:]
    event(pad, "mouse_up", 0.3, 0.5)
    names = [c[0] for m in sent for c in m]
    assert names.index(COMMANDS["clearRect"]) < names.index(COMMANDS["putImageData"])  # pixels blend: clear first


def test_a_new_page_is_told_everything(sent):
    pad = SketchPad(64, KINDS)
    stroke(pad, WAVE)
    pad.underlay(phantom("fundus", 64)["image"])
    _CANVAS_MANAGER._current_canvas = pad.canvas[0]
    del sent[:]
    event(pad, "client_ready")
    names = [c[0] for m in sent for c in m]
    assert names[0] == COMMANDS["switchCanvas"]  # even if Python believes that the page knows
    assert names.count(COMMANDS["putImageData"]) == 2


def test_images_files_and_underlay(tmp_path):
    image, pad = phantom("fundus", 256, seed=1)["image"], SketchPad(256)
    pad.load_image(image, style="fundus")
    assert (
        np.abs(pad.sketch()[0] - sobel_sketch(to_uint8(image), "fundus")).max() < 1e-6
        and pad.board.under is not None
        and not pad.bar.opacity.disabled
    )
    shot = pad.screenshot()
    assert shot.shape == (512, 512, 3) and shot.dtype == np.uint8 and (shot != 255).any()
    pad.bar.opacity.value = 0.0
    assert (pad.board.paper() == 255).all()
    pad.underlay(None)
    assert pad.bar.opacity.disabled
    pad.save(tmp_path / "a.png"), pad.save(tmp_path / "a.json")
    ink = pad.sketch()
    other = SketchPad(256)
    stroke(other, WAVE)
    other.load_file(tmp_path / "a.png")
    assert np.abs(other.sketch() - ink).max() < 0.01
    other.load_file(tmp_path / "a.json")
    assert (other.sketch() == ink).all()
    while other.drawing.undo():
        pass
    assert other.drawing.redo() and len(other.drawing.actions) == 1
    for wrong in ("missing.png", "missing.json"):
        with pytest.raises(ValueError, match="missing"):
            other.load_file(tmp_path / wrong)
    with pytest.raises(ValueError, match="this one is of stroke"):
        (tmp_path / "b.json").write_text(Drawing(64, KINDS).to_json())
        other.load_file(tmp_path / "b.json")
    with pytest.raises(ValueError, match="one image"):
        other.underlay(np.zeros((2, 3, 8, 8)))
    assert square_pixels(np.zeros((30, 50), np.uint8), 64).shape == (64, 64, 3)


def send(pad, name, data):
    "A file from the browser"
    pad.bar.file.set_state(
        {"value": [{"name": name, "type": "", "size": len(data), "content": memoryview(data), "last_modified": 0}]}
    )


def answer(pad, text):
    "Press a button of the question what to do with the file"
    next(b for b in pad.bar.ask.children if getattr(b, "description", "") == text and hasattr(b, "click")).click()
    assert not pad.bar.ask.children and pad.bar.ask.layout.display == "none"


@pytest.mark.parametrize("kind", ["Sketch", "Image to sketch", "Image underneath"])
def test_a_file_from_the_browser(kind, tmp_path):
    pad = SketchPad(128)
    pixels = np.moveaxis(np.uint8((phantom("fundus", 128)["image"].numpy() + 1) * 127), 0, -1)
    Image.fromarray(pixels).save(tmp_path / "eye.png")
    send(pad, "eye.png", (tmp_path / "eye.png").read_bytes())
    assert pad.bar.file.value == () and not pad.drawing.actions  # nothing happens before the question is answered
    answer(pad, kind)
    assert "Opened eye.png" in pad.message.value
    assert pad.sketch().any() == (kind != "Image underneath") and (pad.board.under is not None) == (kind != "Sketch")
    send(pad, "notes.png", b"not a picture")
    assert "notes.png" in pad.message.value and "&#9888;" in pad.message.value and "/tmp" not in pad.message.value
    send(pad, "eye.png", (tmp_path / "eye.png").read_bytes())
    answer(pad, "Nothing")
    answered = len(pad.drawing.actions)
    send(pad, "eye.png", (tmp_path / "eye.png").read_bytes())
    answer(pad, kind)
    assert "Opened eye.png" in pad.message.value and len(pad.drawing.actions) >= answered


ODD = ["..", ".", "", "/", "a" * 300, "b" * 300 + ".dcm", "two\nlines.png", "x.dcm", "y.nii.gz"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("content", [b"", b"junk", bytes(128) + b"DICM" + bytes(range(256)) * 20])
def test_odd_names_and_junk_are_said_in_one_line(name, content):
    pad = SketchPad(64)
    send(pad, name, content)
    said = pad.message.value
    assert "cannot be used" in said and "alert" in said and "\n" not in said and len(said) < 400 and "/tmp" not in said
    assert pad.bar.file.value == () and not pad.bar.ask.children
    stroke(pad, WAVE)
    assert pad.sketch().any() and "alert" not in pad.message.value


def test_a_zip_that_unpacks_to_far_more_is_not_unpacked(monkeypatch):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("strokes.json", " " * (uploads.MOST_STROKES + 1))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("unpacked"))
    pad = SketchPad(64)
    send(pad, "bomb.zip", packed.getvalue())
    assert len(packed.getvalue()) < 100_000 and "strokes.json is too large" in pad.message.value


def test_save_is_one_zip_that_can_be_opened_again():
    pad = SketchPad(64)
    stroke(pad, WAVE)
    ink = pad.sketch()
    pad.bar.save_button.click()
    assert 'download="drawing.zip"' in pad.message.value
    packed = base64.b64decode(pad.message.value.split("base64,")[1].split('"')[0])
    with zipfile.ZipFile(io.BytesIO(packed)) as z:
        assert set(z.namelist()) == {"sketch.png", "strokes.json"}
    pad.bar.undo_button.click()
    assert not pad.sketch().any()
    pad.bar.redo_button.click()
    pad.bar.clear_button.click()
    assert not pad.sketch().any() and pad.drawing.can_undo
    send(pad, "mine.zip", packed)
    assert (pad.sketch() == ink).all() and "Opened mine.zip" in pad.message.value


def test_a_stroke_with_shift_is_straight():
    pad = SketchPad(64)
    key(pad, "medsketch straight")
    stroke(pad, WAVE)
    stroke(pad, WAVE)
    assert [a.tool for a in pad.drawing.actions] == ["line", "pen"] and len(pad.drawing.actions[0].points) == 2


def test_the_width_is_one_of_a_fixed_set_and_keys_take_single_steps():
    pad = SketchPad(256)
    slider = pad.bar.width_px
    at = slider.index
    for _ in range(3):
        key(pad, "]")
        slider.set_state({"index": slider.index})  # what the page sends back
    assert slider.index == at + 3 and pad.width == widths(256)[at + 3] / 256
    for _ in range(99):
        key(pad, "[")
    assert slider.index == 0
    for _ in range(99):
        key(pad, "]")
    assert slider.index == len(slider.options) - 1


def test_every_control_has_a_label_a_tooltip_and_no_fixed_pixels():
    pad = SketchPad(64, KINDS)
    controls = [c for row in (*pad.bar.children, pad.ends) for c in row.children]
    assert len(controls) == 2 + 3 + 3 + 2 + 1
    for c in controls:
        assert getattr(c, "description", "") or c is pad.bar.tools
        assert getattr(c, "tooltip", None) or getattr(c, "tooltips", None), c
        assert "px" not in (c.layout.width or "")
    assert len(pad.bar.tools.tooltips) == len(pad.bar.tools.options) == 6
    assert [b.description for b in pad.bar.classes] == ["1 ovary", "2 follicle", "3 vessel"]


def test_canvas_and_screenshot_show_the_drawing():
    board = Board(drawn(12, classes=3), 256)
    shot = board.screenshot()
    ink = board.drawing.picture(256)
    paper = (ink[..., 3] == 0) & (cv2.dilate(ink[..., 3], np.ones((15, 15))) == 0)
    assert (shot[paper] == 255).all()
    solid = cv2.erode((ink[..., 3] == 255).astype(np.uint8), np.ones((3, 3))) > 0
    assert (shot[solid] == ink[..., :3][solid]).all(-1).mean() > 0.8  # labels lie on top of some of it


def test_a_drawing_can_be_handed_over():
    d = drawn(5, classes=3)
    pad = SketchPad(drawing=d)
    assert (
        pad.drawing is d
        and (pad.sketch() == d.sketch()).all()
        and len(pad.bar.classes) == 3
        and not pad.bar.undo_button.disabled
    )


def ovary():
    "A disc with a smaller one in it, and strokes around"
    y, x = np.mgrid[:64, :64]
    far = lambda a, b: np.hypot(y - a, x - b)
    mask = (far(30, 26) < 16).astype(np.int64) + (far(28, 24) < 5)
    sketch = np.zeros((64, 64), np.float32)
    sketch[2], sketch[:, 60], sketch[60, 10] = 1, 0.5, 0.25
    drawing = Drawing(64, ("background", "ovary", "follicle"))
    drawing.load(sketch, mask, 0)
    return drawing, sketch, mask


def test_a_case_is_loaded_exactly_and_comes_back_from_its_file():
    drawing, sketch, mask = ovary()
    for d in (drawing, Drawing.from_json(drawing.to_json())):
        assert (d.mask() == mask).all() and np.abs(d.sketch(bare=True)[0] - sketch * (mask == 0)).max() < 0.003
    with pytest.raises(ValueError, match="class 3"):
        drawing.load(sketch, mask + 1, 0)
    bad = drawing.to_json().replace('"classes":["background","ovary","follicle"]', '"classes":["background","ovary"]')
    with pytest.raises(ValueError, match="action 0: the mask holds class 2|colours"):
        Drawing.from_json(bad.replace(str(drawing.colours.tolist()).replace(" ", ""), "[[0,0,0],[9,9,9]]"))


def test_a_region_moves_with_what_lies_on_it_and_nothing_else_changes():
    drawing, sketch, mask = ovary()
    drawing.add(Stroke("move", ((20 / 64, 40 / 64), (28 / 64, 44 / 64)), 0.02))
    want = np.roll(mask, (4, 8), (0, 1))
    assert (drawing.mask() == want).all()
    clear = cv2.dilate(((mask > 0) | (want > 0)).astype(np.uint8), np.ones((5, 5))) == 0
    assert (np.abs(drawing.sketch(bare=True)[0] - sketch)[clear] < 0.003).all()
    drawing.add(Stroke("move", ((32 / 64, 32 / 64), (36 / 64, 36 / 64)), 0.02))  # the follicle alone
    again = drawing.mask()
    assert (again == 2).sum() == (mask == 2).sum() and ((again > 0) == (want > 0)).all()
    drawing.add(Stroke("move", ((1 / 64, 60 / 64), (0.5, 0.5)), 0.02))  # nothing lies here
    assert (drawing.mask() == again).all()
    for _ in range(3):
        drawing.undo()
    assert (drawing.mask() == mask).all()


def test_a_region_is_resized_by_as_much_as_the_pointer_moves_outwards():
    for start in (25, 27):  # wherever it is taken hold of
        drawing, _, mask = ovary()
        drawing.add(Stroke("resize", ((start / 64, 28.5 / 64), ((start + 4) / 64, 28.5 / 64)), 0.02))
        radius = lambda m: np.sqrt((m == 2).sum() / np.pi)
        assert radius(drawing.mask()) - radius(mask) == pytest.approx(4, abs=0.8)
        drawing.add(Stroke("resize", (((start + 4) / 64, 28.5 / 64), (start / 64, 28.5 / 64)), 0.02))
        assert radius(drawing.mask()) == pytest.approx(radius(mask), abs=0.8)


def test_ink_of_no_class_leaves_objects_whole():
    drawing, _, mask = ovary()
    drawing.add(Stroke("pen", ((0, 0.5), (1, 0.5)), 0.05, 0))
    assert (drawing.mask() == mask).all()
    bare = drawing.sketch(bare=True)[0]
    assert bare[32, 55] == 1 and not bare[mask > 0].any() and drawing.sketch()[0][32, 26] == 1


def test_move_and_strokes_on_the_pad():
    pad = SketchPad(64, ("background", "ovary", "follicle"), strokes=True)
    _, sketch, mask = ovary()
    pad.load(sketch, mask, 0)
    assert pad.cls == 0 and [b.description for b in pad.bar.classes] == ["0 strokes", "1 ovary", "2 follicle"]
    assert ", 0 to 2 class, " in pad.message.value and ", 1 to 3 class, " in SketchPad(64, KINDS).message.value
    key(pad, "2")
    assert pad.cls == 2 and pad.bar.classes[2].icon == "check"
    key(pad, "0")
    key(pad, "m")
    assert pad.cls == 0 and pad.tool == "move"
    seen = []
    pad.on_change(lambda pad, final: seen.append((final, pad.mask())))
    pad.handle({"event": "mouse_down", "x": 20 * 8, "y": 40 * 8})
    pad.handle({"event": "mouse_move", "x": 28 * 8, "y": 44 * 8})
    pad.handle({"event": "mouse_up", "x": 28 * 8, "y": 44 * 8})
    assert seen[-1][0] and (seen[-1][1] == np.roll(mask, (4, 8), (0, 1))).all()
    key(pad, "z", ctrl=True)
    assert (pad.mask() == mask).all()
