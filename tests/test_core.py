"Core: random streams that differ, the scale, labels on pictures, and an import without plotting"

import io
import itertools
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from medsketch import core
from medsketch.core import (
    SCALES,
    add_labels,
    atomic_write,
    by_scale,
    enlarge,
    grid,
    markdown_table,
    scale,
    show_images,
    torch_rng,
)

NUMBERS = (
    0,
    1,
    2,
    5,
    7,
    -1,
    -5,
    2**31,
    2**32 - 1,
    2**32,
    2**32 + 7,
    2**63 - 1,
    2**63,
    2**63 + 5,
    2**64,
    -(2**63),
    10**40,
)


def draws(seeds):
    return tuple(torch.randn(4, generator=torch_rng(*seeds)).tolist())


@pytest.mark.parametrize('length', [1, 2, 3])
def test_different_tuples_have_different_seeds(length):
    family = [t for k in range(length + 1) for t in itertools.product(NUMBERS, repeat=k)]
    assert len({torch_rng(*t).initial_seed() for t in family}) == len(family)


@pytest.mark.parametrize(
    'family',
    [
        [(5,) + (0,) * k for k in range(8)],  # zeros at the end
        [(0,) * k for k in range(8)],  # zeros alone
        [(s + k * 2**32,) for s in range(4) for k in range(8)]
        + [(s, k) for s in range(4) for k in range(8)],  # one or two
        [(s,) for s in range(-50, 50)],  # signs
        [(5 + k * 2**63,) for k in range(-4, 5)],  # beyond 64 bits
        [(a, b) for a in range(20) for b in range(20)],  # order
        [(1, 23), (12, 3), (1, 2, 3), (123,)],  # digits
    ],
)
def test_different_tuples_draw_different_numbers(family):
    assert len({draws(t) for t in family}) == len(set(family))


def test_streams_repeat_and_take_any_kind_of_integer():
    assert draws((7, 1234)) == draws((7, 1234))
    assert draws((np.int64(7), np.uint8(3))) == draws((7, 3))
    with pytest.raises(TypeError):
        torch_rng(1.5)


@pytest.mark.parametrize('seed', [0, 1, 42, 2**31, 2**32 - 1])
def test_a_single_small_seed_keeps_its_stream(seed):
    "Stored outputs depend on it: NumPy's SeedSequence of that one word"
    state = int(np.random.SeedSequence([seed]).generate_state(1, np.uint64)[0] >> 1)
    assert torch_rng(seed).initial_seed() == state


def test_seed_everything_takes_any_integer():
    found = set()
    for seed in (3, -3, 2**32 + 3, 2**64 + 3):
        core.seed_everything(seed)
        found.add((float(np.random.rand()), float(torch.rand(1))))
    core.seed_everything(3)
    assert (float(np.random.rand()), float(torch.rand(1))) in found


def test_the_scale_has_four_names(monkeypatch):
    found = {}
    for name in SCALES:
        monkeypatch.setenv('MEDSKETCH_SCALE', name)
        assert scale() == name
        found[name] = by_scale(1, 2, 3), by_scale(1, 2, 3, 4), by_scale(tour=1, cpu=0, gpu=2, paper=3)
    assert found == {"tour": (1, 1, 1), "cpu": (1, 4, 0), "gpu": (2, 2, 2), "paper": (3, 3, 3)}
    monkeypatch.setenv('MEDSKETCH_SCALE', 'huge')
    with pytest.raises(ValueError, match='tour, cpu, gpu, paper'):
        scale()


def test_nothing_that_plots_and_no_slow_library_is_imported():
    "MONAI takes longer to import than torch, torchmetrics half as long"
    code = (
        "import sys, medsketch.core, medsketch.phantoms, medsketch.sketch, medsketch.recipes\n"
        "import medsketch.evaluate.compare, medsketch.train.contrast\n"
        "bad = {'matplotlib', 'kornia', 'IPython', 'monai', 'torchmetrics'} & set(sys.modules)\nassert not bad, bad"
    )
    done = subprocess.run([sys.executable, '-c', code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('width', [3, 64, 526, 774, 799, 800, 1000, 3000])
def test_enlarged_to_a_width(width):
    out = enlarge(np.random.default_rng(0).integers(0, 256, (10, width, 3), np.uint8))
    assert 800 <= out.shape[1] <= 1120 and abs(out.shape[0] / out.shape[1] * width / 10 - 1) < 0.2


def test_labels_stand_beside_their_rows_and_columns():
    tiles = np.full((200, 400, 3), 255, np.uint8)
    out = add_labels(tiles, rows=['', 'lower'], cols=['', 'a long label that is wrapped', ''])
    left, top = out.shape[1] - 400, out.shape[0] - 200
    assert left > 0 and top > 16
    ink = out.min(-1) < 128
    assert not ink[:top, :left].any() and not ink[top:, left:].any()
    assert ink[top + 100 :, :left].any() and not ink[top : top + 100, :left].any()
    middle = ink[:top, left:].any(0).nonzero()[0]
    assert 133 <= middle.min() and middle.max() < 267
    assert (add_labels(tiles) == tiles).all()
    assert add_labels(tiles, title='above').shape == (out.shape[0] - top + 12 + core._box('above', 16)[1], 400, 3)


def shown(monkeypatch, *args, **kwargs):
    "What a notebook gets"
    import IPython.display as ipd

    out = []
    monkeypatch.setattr(core, 'IN_NOTEBOOK', True)
    monkeypatch.setattr(ipd, 'display', out.append)
    show_images(*args, **kwargs)
    return out[0], np.asarray(Image.open(io.BytesIO(out[0].data)).convert('RGB'))


def test_a_page_gets_a_wide_picture_with_labels(monkeypatch):
    batch = torch.rand(6, 3, 16, 16) * 2 - 1
    _, bare = shown(monkeypatch, batch, cols=3)
    _, full = shown(monkeypatch, batch, rows=['real', 'generated'], cols_labels=['a', 'b', 'c'], title='six')
    assert bare.shape[1] >= 800 and full.shape[0] > bare.shape[0] + 30 and full.shape[1] > bare.shape[1] + 60
    small, pixels = shown(monkeypatch, grid(batch), width=4)
    assert small.width == 400 and pixels.shape[1] >= 800
    with pytest.raises(ValueError, match='nothing to show'):
        show_images([])


def test_a_sketch_is_shown_without_loss(monkeypatch):
    sketch = (torch.rand(1, 1, 16, 16, generator=torch_rng(0)) < 0.2).float()
    _, pixels = shown(monkeypatch, sketch, kind='sketch')
    assert set(np.unique(pixels)) == {0, 255}


def test_markdown_table():
    assert markdown_table([['', 'FID'], ['SkrGAN', 69]]).split('\n') == ['|  | FID |', '|---|---|', '| SkrGAN | 69 |']


def test_a_size_of_nothing_names_the_smallest():
    from medsketch.core import check_size

    for size in (0, -32, 3.5, 'x', None):
        with pytest.raises(ValueError, match='nearest is 4'):
            check_size(size)


def test_a_name_as_long_as_the_file_system_allows_is_written(tmp_path):
    for name in ('x' * 251 + '.png', '日' * 83 + '.png'):
        with atomic_write(tmp_path / name) as f:
            f.write(b'1')
    assert {p.read_bytes() for p in tmp_path.iterdir()} == {b'1'} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("linked", [False, True])
def test_pipes_and_devices_are_never_replaced(tmp_path, linked):
    "Renaming a file into place would remove them"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    path, before = tmp_path / ("link" if linked else "pipe"), sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError), atomic_write(path) as f:
        f.write(b"x")
    assert sorted(tmp_path.iterdir()) == before and stat.S_ISFIFO(path.stat().st_mode) and path.is_symlink() == linked
