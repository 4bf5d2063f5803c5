"The studio in Chromium: from the end of a stroke to the new image on the screen, pointer to ink; the renderers alone."

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Row, alone, best, peak_memory
from medsketch.core import keep_memory, seed_everything
from medsketch.models.unet import UNetRenderer
from medsketch.pretrained import load
from tests.browser.pages import (
    FLAGS,
    Studio,
    answers,
    chromium,
    medsketch,
    read_url,
    server,
)

STROKES, MOVES, PAUSE = 50, 12, 16  # moves per stroke, milliseconds between them: a hand at 60 events a second
PGSGAN = 5.58  # s on a CPU for one image of 512 px, as its paper says

# All clocks are the page's own. An image counts as shown at the end of the frame that follows its load;
# ink when a frame finds the canvas dark under the pointer. Of the images that come after a stroke ends, the last one is
# the stroke's: earlier ones show it half drawn.
WATCH = """() => { const b = window.bench = {up: 0, shown: 0, ink: [], errors: 0},
    sheet = document.querySelector('canvas.medsketch-sheet');
    const after = f => requestAnimationFrame(() => { const c = new MessageChannel();
        c.port1.onmessage = () => f(performance.now()); c.port2.postMessage(0) });
    document.addEventListener('mouseup', () => { b.up = performance.now() }, true);
    document.querySelector('img.medsketch-image').addEventListener('load', () => after(t => { b.shown = t }));
    let waits = null; const pen = sheet.getContext('2d', {willReadFrequently: true});
    const dark = p => pen.getImageData(p.x, p.y, 1, 1).data[1] < 90;
    const look = () => { if (waits && dark(waits)) { b.ink.push(performance.now() - waits.t); waits = null }
        requestAnimationFrame(look) };
    look();
    sheet.addEventListener('mousemove', e => { if (!(e.buttons & 1) || waits) return;
        const r = sheet.getBoundingClientRect(), p = {t: performance.now(),
            x: (e.clientX - r.left) * sheet.width / r.width, y: (e.clientY - r.top) * sheet.height / r.height};
        if (!dark(p)) waits = p }, true) }"""


def draw(studio, rng):
    "One stroke as a hand draws it: (milliseconds from its end to its image, milliseconds the model took)"
    page, start, angle = studio.page, rng.uniform(0.25, 0.75, 2), rng.uniform(0, 2 * np.pi)
    page.mouse.move(*studio.at(*start))
    page.mouse.down()
    for i in range(1, MOVES + 1):
        page.wait_for_timeout(PAUSE)
        page.mouse.move(*studio.at(*start + 0.018 * i * np.array([np.cos(angle), np.sin(angle)])))
    page.mouse.up()  # at once: the image of this last move cannot be there yet
    page.wait_for_function("bench.shown > bench.up && performance.now() - bench.shown > 600", timeout=20_000)
    up, shown = page.evaluate("[bench.up, bench.shown]")
    return shown - up, float(studio.status().split(' ms')[0].split()[-1])


def in_browser(threads):
    "Milliseconds: of every stroke, of the model for each, of the ink"
    from playwright.sync_api import sync_playwright

    if chromium() is None:
        raise RuntimeError("no Chromium is installed (Debian, Ubuntu: apt install chromium)")
    rng = np.random.default_rng(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        server(medsketch('studio', '--port', '0'), folder, f'{folder}/log', OMP_NUM_THREADS=threads) as p,
        sync_playwright() as play,
    ):
        url = read_url(p, Path(folder) / 'log')
        answers(url + 'voila/static/voila.js')
        browser = play.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url)
        studio = Studio(page, 'bench').ready()
        page.evaluate(WATCH)
        for _ in range(3):
            draw(studio, rng)  # the first ones warm up
        page.evaluate("bench.ink = []")
        strokes = []
        for i in range(STROKES):
            if i % 10 == 0:  # ink on ink cannot be timed
                studio.click('Clear')
                page.wait_for_timeout(500)
            strokes.append(draw(studio, rng))
        ink = page.evaluate("bench.ink")
        browser.close()
    return np.array(strokes).T, np.array(ink)


def packaged(threads):
    "(seconds for one image, parameters, GB) of the packaged fundus renderer"
    keep_memory(), torch.set_num_threads(threads)
    before = peak_memory()
    fast = load('fundus', 'cpu').for_drawing()
    sketch = (torch.rand(1, 1, 256, 256) > 0.9).float()
    return (
        best(lambda: fast.render(sketch), repeats=30),
        sum(p.numel() for p in fast.nets['G_P'].parameters()),
        before,
        peak_memory(),
    )


def large(bf16, threads):
    "(seconds for one image, parameters, GB) of the paper's U-Net at 512 px"
    keep_memory(), torch.set_num_threads(threads), seed_everything(0)
    net = UNetRenderer(512, depth=8)
    fast, x = net.for_inference(torch.bfloat16 if bf16 else torch.float32), (torch.rand(1, 1, 512, 512) > 0.9).float()
    with torch.inference_mode():
        return best(lambda: fast(x), repeats=10), sum(p.numel() for p in net.parameters()), peak_memory()


def rows(peak):
    threads = torch.get_num_threads()
    seconds, weights, before, after = alone(packaged, threads)
    out = [
        Row(
            'packaged fundus, one image of 256 px',
            seconds * 1e3,
            'ms',
            80,
            f'{weights / 1e6:.1f} M parameters, {after:.2f} GB at most, '
            f'{before:.2f} GB of them Python and its libraries',
        )
    ]
    for bf16 in (False, True):
        seconds, weights, memory = alone(large, bf16, threads)
        out.append(
            Row(
                f"paper's U-Net, one image of 512 px, {'bf16' if bf16 else 'fp32'}",
                seconds,
                's',
                0.35 if bf16 else None,
                f'{weights / 1e6:.0f} M parameters, {memory:.1f} GB; '
                f'PGSgan: {PGSGAN} s, {PGSGAN / seconds:.0f} times as long',
            )
        )
    (shown, model), ink = in_browser(threads)
    middle, most = np.median(shown), np.percentile(shown, 95)
    return out + [
        Row(
            'end of stroke to image on screen, median',
            middle,
            'ms',
            200,
            f'{len(shown)} strokes; of that the model {np.median(model):.0f} ms',
        ),
        Row(
            'end of stroke to image on screen, 95th percentile',
            most,
            'ms',
            350,
            f'of that the model {np.percentile(model, 95):.0f} ms',
        ),
        Row('pointer to ink, median', np.median(ink), 'ms', 50, f'{len(ink)} moves'),
        Row('pointer to ink, 95th percentile', np.percentile(ink, 95), 'ms'),
    ]
