"""Servers, a browser, and the studio as a person handles it in the page."""

import base64
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

OUT = Path(__file__).parent / "out"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60  # seconds; a loaded machine takes its time, a healthy one needs two


def chromium():
    "Where a Chromium is installed, or None"
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def environment(**more):
    "One thread for each computation: kernel, server and browser share few cores"
    return (
        os.environ
        | {"OMP_NUM_THREADS": "1", "MEDSKETCH_SCALE": "tour", "PYTHONUNBUFFERED": "1"}
        | {k: str(v) for k, v in more.items()}
    )


@contextlib.contextmanager
def server(command, folder, log, end=signal.SIGINT, **variables):
    "A server of our own, which writes to a log: yields the process, and ends it, at first politely"
    with open(log, "w") as f:
        p = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=f,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield p
    finally:
        for sign in (end, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                p.wait(10)
                break


def urls(log):
    "All URLs that a server has printed"
    return re.findall(r"https?://[^\s)]+", Path(log).read_text())


def read_url(process, log, seconds=PATIENCE):
    "The first URL that a server prints"
    end = time.monotonic() + seconds
    while not (found := urls(log)):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the server printed no URL; it said: {Path(log).read_text()}")
        time.sleep(0.1)
    return found[0]


def answers(url, seconds=PATIENCE):
    "Wait until a server answers"
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(url, timeout=5).status
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def medsketch(*words):
    "The command line, run by this Python"
    return [sys.executable, "-c", "from medsketch.cli import main; main()", *words]


def run_notebook(page, url):
    "Open a notebook in JupyterLab and run all its cells; none of them may fail"
    page.goto(url)
    opened(page, url.split("?")[0].rsplit("/", 1)[-1])
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    bad = page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap(
        c => c.model.type == 'code' ? c.model.sharedModel.getOutputs()
            .filter(o => o.output_type == 'error').map(o => o.evalue) : [])""")
    assert not bad, bad


def opened(page, name):
    "Wait until JupyterLab has opened a notebook and its kernel"
    page.wait_for_function(
        "name => { const c = window.jupyterapp?.shell?.currentWidget?.context; "
        "return c?.isReady && c.path.endsWith(name) }",
        arg=name,
        timeout=PATIENCE * 1000,
    )
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.ready")


def find_cell(page, text, run=False):
    "The cell of the open notebook that contains a text, as a locator; `run` runs it (again)"
    page.evaluate(
        """async ([text, run]) => { const app = window.jupyterapp, book = app.shell.currentWidget.content;
        const i = book.widgets.findIndex(c => c.model.type == 'code' && c.model.sharedModel.getSource().includes(text));
        await book.scrollToItem(i); book.activeCellIndex = i; book.activeCell.node.id = 'tested';
        if (run) await app.commands.execute('notebook:run-cell') }""",
        [text, run],
    )
    return page.locator("#tested")


def cells(page):
    "The open notebook as JupyterLab holds it: (kind, text, line numbers shown?) of each cell"
    return page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets.map(
        c => [c.model.type, c.model.sharedModel.getSource(), !!c.node.querySelector('.cm-lineNumbers')])""")


class Studio:
    "The drawing app in a page, handled with mouse, fingers and keys"

    def __init__(self, page, name, root=None):
        self.page, self.name, self.fingers = page, name, page.context.new_cdp_session(page)
        self.root = root or page.locator("body")

    def ready(self):
        "Wait until pad and first image are there"
        self.sheet = self.root.locator("canvas.medsketch-sheet")
        self.img = self.root.locator("img.medsketch-image")
        self.sheet.wait_for(timeout=PATIENCE * 1000)
        self.until(lambda: self.size() != (0, 0))
        self.settled()
        return self

    def until(self, condition, seconds=PATIENCE):
        "Wait for a condition"
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"waited {seconds} s in vain"
            self.page.wait_for_timeout(50)
        return found

    def size(self):
        return tuple(self.img.evaluate("i => [i.naturalWidth, i.naturalHeight]"))

    def png(self):
        "The bytes of the image on the page"
        return base64.b64decode(
            self.img.evaluate("""async i => { const b = await (await fetch(i.src)).blob();
            return await new Promise(done => { const r = new FileReader();
                r.onload = () => done(r.result.split(',')[1]); r.readAsDataURL(b) }) }""")
        )

    def settled(self, quiet=0.7, seconds=PATIENCE):
        "The image's bytes once nothing has changed for a while"
        last, since, end = None, 0, time.monotonic() + seconds
        while last is None or time.monotonic() - since < quiet:
            assert time.monotonic() < end, "the image never came to rest"
            if (now := self.png()) != last:
                last, since = now, time.monotonic()
            self.page.wait_for_timeout(100)
        return last

    def shows(self, png, seconds=PATIENCE):
        "Wait until exactly this image is shown"
        self.until(lambda: self.png() == png, seconds)

    def fresh(self):
        "An empty sheet, the pen, the first weights, nothing underneath, nothing to compare with"
        self.choose("fundus")
        if self.button("Stop comparing").is_enabled():
            self.click("Stop comparing")
        self.click("Clear")
        self.click("Pen")
        self.settled()
        return self

    def press(self, *keys):
        for k in keys:
            self.page.keyboard.press(k)
            self.page.wait_for_timeout(
                150
            )  # a page sends a slider's value back, rounded; let it arrive before the next key

    def choose(self, weights):
        "Another renderer, from the menu"
        self.root.locator(".widget-dropdown:has-text('Renderer') select").select_option(weights)

    def changed(self, before):
        "Wait for another image than `before`, and for rest"
        self.until(lambda: self.png() != before)
        return self.settled()

    def at(self, x, y):
        "A position on the sheet, in sides, as a position in the window"
        box = self.sheet.bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def draw(self, *points, steps=6):
        "A stroke with the mouse"
        self.sheet.scroll_into_view_if_needed()
        self.page.mouse.move(*self.at(*points[0]))
        self.page.mouse.down()
        for p in points[1:]:
            self.page.mouse.move(*self.at(*p), steps=steps)
        self.page.mouse.up()

    def touch(self, kind, *points):
        "touchStart, touchMove or touchEnd with one finger on each point"
        at = [dict(zip("xy", self.at(*p))) for p in points]
        self.fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})

    def ink(self):
        "The sheet as the page shows it, without the pointer: (side, side, 3) uint8"
        self.sheet.scroll_into_view_if_needed()
        self.page.mouse.move(*self.at(0.5, -0.05))
        self.page.wait_for_timeout(300)
        return np.asarray(Image.open(io.BytesIO(self.sheet.screenshot())).convert("RGB"))

    def button(self, text):
        return self.root.get_by_role("button", name=text, exact=False)

    def click(self, text):
        self.button(text).first.click()

    def status(self):
        return self.root.locator(".medsketch-say").inner_text()

    def shot(self, step):
        "A screenshot of the whole page, for people"
        OUT.mkdir(exist_ok=True)
        self.page.screenshot(path=OUT / f"{self.name}_{step}.png", full_page=True)
