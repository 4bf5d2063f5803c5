"""Kills trainings at random moments until they are finished, and compares them with uninterrupted ones.

    python tools/kills.py                      100 kills of every recipe, about a minute of computing for each
    python tools/kills.py --kills 20 --only skrgan,pggan --seed 3

Every recipe is trained twice on the same tiny data: once without interruption, and again and again killed (SIGKILL)
after random times and taken up, so that kills land in every stage, while loading and in the middle of writing. Every
folder that is finished must then be equal to the first one to the last bit: configuration, weights, logs, sample grids
and everything in the checkpoints; and no temporary file may be left. Slow, so not part of `make test`. Linux and macOS
only (fork).
"""

import argparse
import contextlib
import inspect
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"  # "to the last bit" is a promise for the CPU
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "tests")]

import numpy as np
import psutil
import torch
import torch._dynamo  # before the forks: optimisers import it, which takes longer than all their steps
from faults import names, same_runs

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
STEPS = 5
OWN = {"pggan": {"seg": "vessel", "encoder_steps": 3}, "skrgan": {"joint_steps": 3}}  # beyond `steps_each`


def recipe(name):
    "A tiny recipe of that name"
    cls = RECIPES[name]
    known = inspect.signature(cls).parameters
    size = 32 if name == "pgsgan" else 16
    settings = {k: v for k, v in (SMALL | {"size": size}).items() if k in known}
    return cls(**settings | cls.steps_each(STEPS, size) | OWN.get(name, {}))


def data_for(name):
    "Six images, as the recipe needs them"
    config = recipe(name).config
    data = phantom_data("ultrasound" if name == "pgsgan" else "fundus", 6, config["size"])
    if config["channels"] == 1 and data.channels == 3:
        data = data.with_planes(image=data.images[:, 1:2])
    return data


def train(name, data, out, said):
    "From the beginning, or from where it stopped; warnings go into the file `said`"
    torch.set_num_threads(1)

    def note(message, *_, **__):
        with open(said, "a") as f:
            f.write(f"{message}\n")

    warnings.showwarning = note
    recipe(name).fit(data, out, every=2, progress=False, resume=out.exists())


def process(*args):
    p = multiprocessing.get_context("fork").Process(target=train, args=args)
    p.start()
    return p


def killed_after(p, seconds) -> float:
    "Kill a process once it has computed for so long; how long it has computed if it was done before, else 0"
    spent = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        watch = psutil.Process(p.pid)
        while p.exitcode is None:
            times = watch.cpu_times()
            spent = times.user + times.system
            if spent >= seconds:
                os.kill(p.pid, signal.SIGKILL)
                break
            p.join(min(seconds - spent, 0.05))
    p.join()
    return 0.0 if p.exitcode == -signal.SIGKILL else max(spent, 0.01)


@dataclass
class Campaign:
    "What became of one recipe"

    name: str
    kills: int = 0
    finished: int = 0
    differing: int = 0
    left: int = 0
    failed: int = 0
    passed_over: int = 0
    first: str = ""

    def line(self):
        "A row of the table"
        counts = (self.kills, self.finished, self.differing, self.left, self.failed, self.passed_over)
        return f"{self.name:13}" + "".join(f"{n:>12}" for n in counts) + (f"  {self.first}" if self.first else "")

    def wrong(self):
        return self.differing + self.left + self.failed

    def compare(self, whole, out):
        "Count what differs between the uninterrupted run and another one"
        self.finished += 1
        self.left += len({*names(out)} - {*names(whole)})
        try:
            same_runs(whole, out)
        except AssertionError as e:
            self.differing, self.first = self.differing + 1, self.first or " ".join(str(e).split())[:100]


HEADER = f"{'recipe':13}" + "".join(
    f"{h:>12}" for h in ("kills", "finished", "differing", "files left", "failed", "passed over")
)


def campaign(name, folder, kills, rng):
    "A `Campaign` of so many kills"
    data, said, done = data_for(name), folder / "said.txt", Campaign(name)
    train(name, data, folder / "whole", said)  # here, so that all it imports is there before the forks
    out, took = folder / "killed", 0.0
    while done.kills < kills:
        p = process(name, data, out, said)
        spent = killed_after(p, float(rng.uniform(0, 1)) * took or float("inf"))  # the first one is measured
        if not spent:
            done.kills += 1
            continue
        took = took or spent
        if p.exitcode:
            done.failed += 1
        else:
            done.compare(folder / "whole", out)
        shutil.rmtree(out)
    lines = said.read_text().splitlines() if said.exists() else []
    done.passed_over = sum("cannot be read" in line for line in lines)
    return done


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--kills", type=int, default=100, help="of each recipe")
    a.add_argument("--only", default=",".join(RECIPES), help="names of recipes, comma-separated")
    a.add_argument("--seed", type=int, default=0)
    a = a.parse_args()
    print(HEADER, flush=True)
    total = wrong = 0
    for name in a.only.split(","):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as d:
            done = campaign(name, Path(d), a.kills, np.random.default_rng(a.seed))
        total, wrong = total + done.kills, wrong + done.wrong()
        print(f"{done.line()}  {time.monotonic() - began:.0f} s", flush=True)
    print(f"{total} kills, {wrong} differences")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
