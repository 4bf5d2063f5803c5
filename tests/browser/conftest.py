"""One browser, one Voila and one JupyterLab for all tests of this folder."""

import json
import os
import secrets
import signal
import sys
from pathlib import Path

import pytest
from pages import (
    FLAGS,
    Studio,
    answers,
    chromium,
    find_cell,
    medsketch,
    read_url,
    run_notebook,
    server,
)

from medsketch.studio.app import copy_notebooks, free_port

PAD = """from medsketch.studio.sketchpad import SketchPad
from ipywidgets import HTML, VBox
pad, seen = SketchPad(classes=('background', 'vessel', 'disc')), HTML()
seen.add_class('seen')
def look(*_): seen.value = f'<pre>{pad.drawing.to_json()}</pre>'
pad.on_change(look)
look()
VBox([pad, seen])"""


def notebook(code):
    cell = {"cell_type": "code", "id": "a", "execution_count": None, "metadata": {}, "outputs": [], "source": code}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": [cell]})


def pytest_collection_modifyitems(items):
    "After all other tests: servers and browser stay up to the end"
    items.sort(key=lambda i: i.path.parent == Path(__file__).parent)


@pytest.fixture(scope="session")
def browser():
    "Chromium. A machine without one skips these tests; continuous integration must have one"
    path = chromium()
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Chromium is installed (Debian, Ubuntu: apt install chromium)"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=FLAGS)
        yield b
        b.close()


@pytest.fixture(scope="session")
def voila(tmp_path_factory):
    "`medsketch studio`: (URL with its token, log of all it printed, process)"
    folder = tmp_path_factory.mktemp("voila")
    log = folder / "log.txt"
    with server(medsketch("studio", "--port", "0", "--no-browser"), folder, log) as p:
        url = read_url(p, log)
        answers(url.split("?")[0] + "voila/static/voila.js")
        yield url, log, p


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the notebooks: f(path in it) -> URL"
    folder = tmp_path_factory.mktemp("lab")
    notebooks, token, port = folder / "nbs", secrets.token_hex(16), free_port("127.0.0.1", 0)
    copy_notebooks(notebooks)
    (notebooks / "pad.ipynb").write_text(notebook(PAD))
    quiet = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    own = {
        "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": folder / "work",
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
    }
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--notebook-dir={notebooks}",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--no-browser",
        *root,
        f"--IdentityProvider.token={token}",
        "--ServerApp.port_retries=0",
        "--LabApp.expose_app_in_browser=True",
    ]
    with server(command, notebooks, folder / "log.txt", signal.SIGTERM, **own):
        answers(f"http://127.0.0.1:{port}/api?token={token}")
        # a workspace each: JupyterLab would open what another page has open
        yield lambda path: f"http://127.0.0.1:{port}/lab/workspaces/{Path(path).stem}/tree/{path}?token={token}"


@pytest.fixture(scope="session", params=["voila", "lab"])
def opened(request, browser):
    "The studio in both apps, opened once"
    name = request.param
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_navigation_timeout(120_000)  # a kernel starts meanwhile, slowly on a busy machine
    page = context.new_page()
    if name == "voila":
        page.goto(request.getfixturevalue("voila")[0])
        root = None
    else:
        run_notebook(page, request.getfixturevalue("lab")("tutorials/draw.ipynb"))
        root = find_cell(page, "= LiveRender(", run=True)  # again: other cells have drawn on it
    yield Studio(page, name, root).ready()
    context.close()


@pytest.fixture
def studio(opened):
    "The studio with an empty sheet, the pen in hand, the first weights, and nothing to compare with"
    return opened.fresh()
