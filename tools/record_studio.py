"""A moving picture of the studio for README: `python tools/record_studio.py nbs/images/studio.gif`.

A pen draws an eye in a real browser, vessel by vessel, and the photograph follows. Takes a minute and needs Chromium.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

root = Path(__file__).resolve().parents[1]
sys.path += [str(root / "tests"), str(root / "tests/browser")]

from drawings import eye, line
from pages import FLAGS, Studio, answers, chromium, medsketch, read_url, server

WIDTH, HEIGHT, SCALE = 1180, 760, 0.7  # of the window; of the picture
VESSELS = [
    line((0.3, 0.5), (0.42, 0.44), (0.5, 0.36)),
    line((0.3, 0.5), (0.41, 0.58), (0.52, 0.66)),
    line((0.5, 0.36), (0.56, 0.4), (0.6, 0.46)),
]


class Camera:
    "Takes pictures of the page"

    def __init__(self, page):
        self.page, self.frames, self.durations = page, [], []

    def take(self, ms=120):
        png = self.page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT})
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        self.frames.append(picture.resize((round(WIDTH * SCALE), round(HEIGHT * SCALE)), Image.LANCZOS))
        self.durations.append(ms)

    def write(self, path, colours=96):
        "One palette for all pictures; Pillow stores only what changes from one to the next"
        palette = self.frames[-1].quantize(colours)
        first, *more = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in self.frames)
        first.save(path, save_all=True, append_images=more, duration=self.durations, loop=0, optimize=True)


def stroke(studio, camera, points, pictures=3):
    "Draw a stroke, and look at it a few times on the way"
    page = studio.page
    page.mouse.move(*studio.at(*points[0]))
    page.mouse.down()
    for i, p in enumerate(points[1:], 1):
        page.mouse.move(*studio.at(*p))
        if i % max(1, len(points) // pictures) == 0:
            page.wait_for_timeout(120)
            camera.take()
    page.mouse.up()
    page.wait_for_timeout(400)
    camera.take(200)


def record(page, path):
    "An empty sheet, a disc, four vessels, finer ones, and one taken back"
    studio = Studio(page, "voila").ready().fresh()
    camera = Camera(page)
    camera.take(800)
    for s in eye(0.3, 0.5, 1) + VESSELS:
        stroke(studio, camera, s.points[::3] + s.points[-1:])
    studio.settled()
    camera.take(1500)
    studio.press("Control+z")
    studio.settled()
    camera.take(1000)
    studio.press("Control+Shift+z")
    studio.settled()
    camera.take(3000)
    camera.write(path)


def main(path):
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        log = Path(folder) / "log.txt"
        with server(medsketch("studio", "--port", "0", "--no-browser"), folder, log) as process:
            url = read_url(process, log)
            answers(url.split("?")[0] + "voila/static/voila.js")
            browser = p.chromium.launch(executable_path=chromium(), args=FLAGS)
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(url, timeout=120_000)
            record(page, path)
            browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
