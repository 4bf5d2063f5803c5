"""`medsketch studio`: what it prints, and who can reach it."""

import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pages import urls


def test_one_url_and_only_this_machine(browser, voila):
    url, log = voila
    assert urls(log) == [url] and urlsplit(url).hostname == "127.0.0.1", Path(log).read_text()
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
