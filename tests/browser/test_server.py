"""`medsketch studio`: what it prints, who can reach it, what it fetches, and what it leaves running."""

import contextlib
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from pages import Studio, urls


def ask(url, **headers):
    "(status, address after redirections, text) of a request outside the browser"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as r:
            return r.status, r.url, r.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.url, e.read().decode()


def kernels(process):
    "The kernels that a server runs"
    found = set()
    for p in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found |= {p.pid} if "ipykernel_launcher" in " ".join(p.cmdline()) else set()
    return found


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_navigation_timeout(120_000)  # a kernel starts meanwhile, slowly on a busy machine
    yield context.new_page()
    context.close()


def test_one_url_and_only_this_machine(browser, voila):
    url, log, _ = voila
    assert urls(log) == [url] and urlsplit(url).hostname == "127.0.0.1", Path(log).read_text()
    assert len(urlsplit(url).query.removeprefix("token=")) >= 32
    port = urlsplit(url).port
    socket.create_connection(("127.0.0.1", port), 5).close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # the address that this machine has in its network
        try:
            s.connect(("10.255.255.255", 1))
            own = s.getsockname()[0]
        except OSError:
            own = "127.0.0.1"
    for address in {own, "127.0.0.2"} - {"127.0.0.1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, port), 2)


def test_without_the_token_or_under_another_name_there_is_no_page(voila):
    url, _, process = voila
    plain, before = url.split("?")[0], kernels(process)
    for wrong in (plain, plain + "?token=guess"):
        status, at, text = ask(wrong)
        assert status == 200 and urlsplit(at).path == "/login" and "ipykernel" not in text
    for host in ("example.org", f"example.org:{urlsplit(url).port}", "192.0.2.1"):
        assert ask(url, Host=host)[0] == 403
    assert kernels(process) == before


def test_a_beacon_is_taken_from_our_own_page_only(voila):
    url, *_ = voila
    token = urlsplit(url).query
    beacon = f"{url.split('?')[0]}voila/api/shutdown/00000000-0000-0000-0000-000000000000"

    def send(address, **headers):
        request = urllib.request.Request(address, data=b"", headers=headers, method="POST")
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as e:
            return e.code

    assert send(beacon) == send(beacon, Origin=url.split("/?")[0]) == 403  # nobody is logged in
    assert send(f"{beacon}?{token}", Origin=url.split("/?")[0]) == 204


def test_nothing_is_fetched_elsewhere_and_icons_are_there(voila, page):
    asked = []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(voila[0])
    Studio(page, "voila").ready()
    own = voila[0].split("?")[0]
    assert [u for u in asked if not u.startswith((own, own.replace("http", "ws"), "data:", "blob:"))] == []
    assert page.evaluate("[...document.fonts].some(f => f.family.includes('Awesome') && f.status == 'loaded')")


def test_a_page_that_is_left_leaves_no_kernel(voila, page):
    url, _, process = voila
    before = kernels(process)
    page.goto(url)
    studio = Studio(page, "voila").ready()
    (first,) = kernels(process) - before
    page.reload()
    studio.ready()
    studio.until(lambda: first not in kernels(process), 20)
    assert len(kernels(process) - before) == 1
    page.goto("about:blank")
    studio.until(lambda: kernels(process) == before, 20)
