"""Kills trainings at random moments until they are finished, and compares them with uninterrupted ones.

    python tools/kills.py                      100 kills in all, every recipe
    python tools/kills.py --kills 20 --only skrgan,pggan --seed 3

Every recipe is trained twice on the same tiny data: once without interruption, and once killed (SIGKILL) after random
times and taken up again. Both folders must then be equal to the last bit: configuration, weights, logs, sample grids
and everything in the checkpoints; and no temporary file may be left. Slow, so not part of `make test`. Linux and macOS
only (fork).
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"  # "to the last bit" is a promise for the CPU
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "tests")]

import numpy as np
import torch
from faults import same_runs

from medsketch.data import phantom_data
from medsketch.recipes import RECIPES

SMALL = {
    "latent_dim": 8,
    "fmap_base": 32,
    "fmap_max": 8,
    "ngf": 4,
    "ndf": 4,
    "receptive_field": 16,
    "batch_size": 2,
    "w_dim": 8,
    "mapping_layers": 2,
    "blocks": 1,
    "fade_maps": 4,
    "resnet": 18,
    "net_width": 0.125,
    "convs": 1,
    "rank": 4,
}
OWN = {"pggan": {"seg": "vessel", "encoder_steps": 12}}  # beyond what `steps_each` asks for
STEPS = 30


def recipe(name):
    "A tiny recipe of that name"
    import inspect

    cls = RECIPES[name]
    known = inspect.signature(cls).parameters
    size = 32 if name == "pgsgan" else 16
    settings = {k: v for k, v in (SMALL | {"size": size}).items() if k in known}
    return cls(**settings | cls.steps_each(STEPS, size) | OWN.get(name, {}))


def train(name, out):
    "From the beginning, or from where it stopped"
    torch.set_num_threads(1)
    r = recipe(name)
    kind = "ultrasound" if name == "pgsgan" else "fundus"
    data = phantom_data(kind, 6, r.config["size"])
    if r.config["channels"] == 1 and data.channels == 3:
        data = data.with_planes(image=data.images[:, 1:2])
    r.fit(data, out, every=4, progress=False, resume=out.exists())


def process(f, *args):
    p = multiprocessing.get_context("fork").Process(target=f, args=args)
    p.start()
    return p


def campaign(name, folder, kills, rng):
    "(kills, trainings) until so many kills have happened; raises `AssertionError` where a folder differs"
    began = time.monotonic()
    p = process(train, name, folder / "whole")
    p.join()
    assert p.exitcode == 0, f"{name} does not train"
    took, done, trained = time.monotonic() - began, 0, 0
    while done < kills:
        out = folder / f"killed{trained}"
        while True:
            p = process(train, name, out)
            p.join(float(rng.uniform(0.05, 0.9)) * took)
            if p.exitcode is None:
                os.kill(p.pid, signal.SIGKILL)
                p.join()
                done += 1
                continue
            assert p.exitcode == 0, f"{name}: a resumed training ended with {p.exitcode}"
            break
        same_runs(folder / "whole", out)
        trained += 1
    return done, trained


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--kills", type=int, default=100)
    a.add_argument("--only", default=",".join(RECIPES))
    a.add_argument("--seed", type=int, default=0)
    a = a.parse_args()
    names, rng, total = a.only.split(","), np.random.default_rng(a.seed), 0
    for name in names:
        with tempfile.TemporaryDirectory() as d:
            done, trained = campaign(name, Path(d), -(-a.kills // len(names)), rng)
        total += done
        print(f"{name:10} {done:4} kills in {trained} trainings: equal to the uninterrupted one", flush=True)
    print(f"{total} kills, 0 differences")


if __name__ == "__main__":
    main()
