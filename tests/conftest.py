"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    "A forked process hangs in threads that stayed behind, and small networks gain nothing from a second one"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
