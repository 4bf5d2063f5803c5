"""What all tests share."""

import pytest
import torch

from medsketch.cli import main

torch.set_num_threads(1)  # for fixtures of a whole session too


@pytest.fixture(autouse=True)
def one_thread():
    "A forked process hangs in threads that stayed behind, and small networks gain nothing from a second one"
    torch.set_num_threads(1)


@pytest.fixture
def medsketch(capsys):
    "Run a command line in this process: (exit status, stdout, stderr)"

    def run(line):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return run
