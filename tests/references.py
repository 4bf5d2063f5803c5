"""Stored results of reference implementations, and how near ours must come."""

from pathlib import Path

import numpy as np
import torch

REFS = Path(__file__).parent / 'refs'


def close(a, b, tol=1e-4):
    "Equal to `tol`, relative to the largest value"
    a, b = (torch.as_tensor(t).detach().double() for t in (a, b))
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol * b.abs().max(), f"off by {(a - b).abs().max():.1e}"


def arrays(name):
    "The arrays of a file in `refs`"
    return {k: torch.from_numpy(v) for k, v in np.load(REFS / f'{name}.npz').items()}
