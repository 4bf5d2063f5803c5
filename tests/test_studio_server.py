"The studio's server, without starting it: kernels' number and end, its template and settings"

import asyncio
import re
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.web import HTTPError

from medsketch.studio.server import POLICY, StudioKernels, StudioServer


@pytest.fixture
def kernels(monkeypatch):
    "Kernels that are names only"
    numbers = iter(range(100))

    async def start(self, **kwargs):
        await asyncio.sleep(0)
        name = f"k{next(numbers)}"
        self._kernels[name] = SimpleNamespace(last_activity=datetime.now().astimezone())
        return name

    async def stop(self, name, now=False):
        del self._kernels[name]

    monkeypatch.setattr(AsyncMappingKernelManager, "start_kernel", start)
    monkeypatch.setattr(StudioKernels, "shutdown_kernel", stop)
    return StudioKernels(most=3)


def age(kernels, name, seconds):
    kernels._kernels[name].last_activity -= timedelta(seconds=seconds)


def test_idle_kernels_without_a_page_are_culled(kernels):
    assert 0 < kernels.cull_idle_timeout <= 900 and 0 < kernels.cull_interval <= 60 and not kernels.cull_connected


def test_there_are_never_more_kernels_than_allowed(kernels):
    async def many():
        return await asyncio.gather(*(kernels.start_kernel() for _ in range(5)), return_exceptions=True)

    done = asyncio.run(many())
    assert [isinstance(d, str) for d in done] == [True] * 3 + [False] * 2 and len(kernels) == 3
    assert all(isinstance(d, HTTPError) and d.status_code == 503 and "close one" in d.reason for d in done[3:])


def test_the_longest_abandoned_kernel_makes_room(kernels):
    a, b, c = (asyncio.run(kernels.start_kernel()) for _ in range(3))
    for name, seconds in ((a, 500), (b, 100), (c, 300)):
        age(kernels, name, seconds)
    kernels._kernel_connections[a] = 1  # a page looks at it
    d = asyncio.run(kernels.start_kernel())
    assert set(kernels.list_kernel_ids()) == {a, b, d}
    kernels._kernel_connections[b] = 1
    with pytest.raises(HTTPError):  # d is young: its page is still being loaded
        asyncio.run(kernels.start_kernel())


def test_the_template_names_no_other_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    app = StudioServer()
    app.initialize([])
    text = (Path(app.template_paths[0]) / "index.html.j2").read_text()
    assert "voila_finish" in text and not re.search(r'(src|href)="https?://', text)
    assert "https:" not in POLICY and "*" not in POLICY
    StudioServer.clear_instance()
