"""What all tests share."""

import pytest
import torch

torch.set_num_threads(1)  # for fixtures of a whole session too


@pytest.fixture(autouse=True)
def one_thread():
    "A forked process hangs in threads that stayed behind, and small networks gain nothing from a second one"
    torch.set_num_threads(1)
