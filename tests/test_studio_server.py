"The studio's server, without starting it: kernels' number and end, its template and settings"

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.web import HTTPError

from medsketch.studio import app as program
from medsketch.studio.app import free_port, until_stopped
from medsketch.studio.server import LARGEST, PATIENCE, POLICY, OneLine, StudioKernels, StudioServer


@pytest.fixture
def kernels(monkeypatch):
    "Kernels that are names only"
    numbers = iter(range(100))

    async def start(self, **kwargs):
        await asyncio.sleep(0)
        assert kwargs["extra_arguments"] == ["--InteractiveShell.xmode=Minimal"]  # errors as one line
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


def test_what_is_set(tmp_path, monkeypatch):
    "No page of another name, no page without a token, no connection for half a request"
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    for ip, remote in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        server = StudioServer(ip=ip)
        server.initialize([])
        settings = server.init_settings()
        assert settings["allow_remote_access"] is remote and len(server.identity_provider.token) >= 32
        assert settings["websocket_max_message_size"] == LARGEST >= 50_000_000
        StudioServer.clear_instance()
    asked = {}
    server.app = SimpleNamespace(listen=lambda *args, **kw: asked.update(kw))
    server.open_browser, server.stop = False, lambda: None
    monkeypatch.setattr("medsketch.studio.server.IOLoop", SimpleNamespace(current=lambda: SimpleNamespace(start=int)))
    server.listen()
    assert asked["idle_connection_timeout"] == asked["body_timeout"] == PATIENCE <= 120


def test_errors_are_one_line(caplog):
    log = logging.getLogger("of a server")
    log.addFilter(OneLine())
    try:
        raise AssertionError("odd\npath")
    except AssertionError:
        log.exception("Uncaught exception %s\n%r", "GET /", "a request")
    (record,) = caplog.records
    assert record.getMessage() == "Uncaught exception GET /: AssertionError odd path" and record.exc_info is None


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "A server whose page is never asked for: (port, token, file of all that it printed)"
    d = tmp_path_factory.mktemp("served")
    (d / "studio.ipynb").write_text(json.dumps(program._notebook("1")))
    port, log = free_port("127.0.0.1", 0), d / "log.txt"
    command = [sys.executable, "-m", "medsketch.studio.server", str(d / "studio.ipynb"), f"--port={port}"]
    env = os.environ | {"JUPYTER_RUNTIME_DIR": str(d)}
    with open(log, "w") as f:
        more = ["--Voila.ip=127.0.0.1", "--Voila.log_level=WARN", "--no-browser"]
        process = subprocess.Popen(command + more, stdout=f, stderr=f, env=env, cwd=d)
    for _ in range(1200):
        if found := re.search(r"token=(\w+)", log.read_text()):
            break
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    yield port, found[1], log
    process.terminate()
    process.wait(60)


def raw(port, request):
    "The answer to some bytes"
    with socket.create_connection(("127.0.0.1", port), 60) as s:
        s.sendall(request)
        answer = b""
        while piece := s.recv(1 << 16):
            answer += piece
    return answer.decode("latin1")


def ask(served, path, host="127.0.0.1", method="GET"):
    port, token, _ = served
    line = f"{method} {path}{'&' if '?' in path else '?'}token={token} HTTP/1.1\r\n"
    return raw(port, f"{line}Host: {host}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())


OUTSIDE = ["../" * 9, "..%2f" * 9, "%2e%2e/" * 9, "/", "//", "%2f", "....//" * 9, "..%5c" * 9]
ODD = [
    *(f"/voila/templates/{x}" for x in ("", "%00", "a", "a/b/c", "lab/static/%00", "lab/static/../../x")),
    *("/logout", "/voila/static/", "/voila/static/%00", "/%00", "/" + "a" * 5000, "/api/kernels/x/channels"),
]


@pytest.mark.parametrize(
    "base", ["voila/static", "voila/templates/lab/static", "voila/files", "voila/labextensions", ""]
)
def test_nothing_outside_is_read(served, base):
    for way in OUTSIDE:
        answer = ask(served, f"/{base}/{way}etc/passwd")
        assert "root:" not in answer and answer.split()[1] in ("302", "403", "404", "500"), (way, answer[:300])


def test_odd_requests_leave_no_traceback(served):
    for path in ODD:
        for method in ("GET", "POST", "ODD"):
            answer = ask(served, path, method=method)
            assert answer.startswith("HTTP/1.1 ") and "Traceback" not in answer and "site-packages" not in answer
    for junk in (b"\0\xff\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"):
        assert raw(served[0], junk).startswith("HTTP/1.1 400")
    assert raw(served[0], b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\n").startswith(
        "HTTP/1.1 400"
    )
    assert "HTTP/1.1 200" in ask(served, "/voila/static/voila.js")  # it is still there
    said = served[2].read_text(errors="replace")
    assert "Traceback" not in said and 'File "' not in said and "Could not open" not in said, said[-3000:]


def test_pages_are_for_those_who_are_meant(served):
    port, *_ = served
    kernel = "/api/kernels/00000000-0000-0000-0000-000000000000"
    for path in ("/", kernel, "/login"):
        assert ask(served, path, host="example.org").startswith("HTTP/1.1 403")
        assert ask(served, path, host="127.0.0.1.example.org").startswith("HTTP/1.1 403")
    no = raw(port, f"GET {kernel}/channels HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    assert no.startswith(("HTTP/1.1 403", "HTTP/1.1 400", "HTTP/1.1 302")), no[:200]
    for to in ("//example.org/x", "https://example.org"):
        assert "example.org" not in ask(served, f"/login?next={to}").partition("Location:")[2].partition("\n")[0]


def test_a_farewell_is_taken_from_our_own_page_only(served):
    port, *_ = served
    path = "/voila/api/shutdown/00000000-0000-0000-0000-000000000000"

    login = ask(served, "/login", host=f"127.0.0.1:{port}")
    cookies = "; ".join(re.findall(r"Set-Cookie: (username-[^;]+)", login))
    assert cookies

    def send(origin, who=cookies):
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Length: 0\r\n"
        more = f"Origin: {origin}\r\n" * bool(origin) + f"Cookie: {who}\r\n" * bool(who)
        return raw(port, f"{head}{more}\r\n".encode()).split()[1]

    own = f"http://127.0.0.1:{port}"
    assert [send(o) for o in (None, "null", "http://example.org", own + "0")] == ["403"] * 4
    assert send(own, "") == "403" and send(own) == "204"


def alive(pid):
    try:
        return os.kill(pid, 0) is None
    except ProcessLookupError:
        return False


@pytest.mark.parametrize("ends", ["asked", "stubborn"])
def test_the_server_ends_with_the_command_that_started_it(tmp_path, ends):
    "`docker stop` and service managers end the command alone"
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ends == "stubborn" else ""
    inner = f"{stubborn}import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    outer = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "from medsketch.studio.app import until_stopped as u; sys.exit(u([sys.executable, '-c', {!r}], .5))"
    )
    process = subprocess.Popen([sys.executable, "-c", outer.format(inner)], cwd=tmp_path)
    for _ in range(600):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.1)
    pid = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGTERM if ends == "asked" else signal.SIGINT)
    process.wait(60)
    assert not alive(pid)


def test_a_servers_status_is_handed_on():
    before = signal.getsignal(signal.SIGTERM)
    assert until_stopped([sys.executable, "-c", "import sys; sys.exit(3)"]) == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_studio_imports_nothing_slow_that_it_does_not_use():
    code = (
        'import sys, medsketch.studio.app, medsketch.studio.server, medsketch.studio.live\n'
        "slow = {'sklearn', 'rfc3987_syntax', 'matplotlib', 'monai'}\n"
        'print(slow & {name for name, module in sys.modules.items() if module})'
    )
    done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == 'set()'


def test_a_studio_without_voila_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'voila', None)
    with pytest.raises(ImportError, match=r"pip install 'medsketch\[lab\]'"):
        program.serve_page(program.studio_notebook())
