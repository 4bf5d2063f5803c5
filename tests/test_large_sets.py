"""Large sets: several processes, numbered folders, kills; whatever happens, the files of one uninterrupted process."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from faults import contents, die, exit_codes, killed
from PIL import Image

from medsketch.cli import main
from medsketch.commands import draw
from medsketch.data import dataset, load_images
from medsketch.export import export_dataset, written
from medsketch.pretrained import load
from medsketch.processes import Alone, Lists
from medsketch.recipes import DCGAN, SkrGAN


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "An untrained SkrGAN: what it draws does not matter here"
    path = tmp_path_factory.mktemp("weights") / "skrgan.safetensors"
    SkrGAN(size=32, channels=1, fmap_base=64, fmap_max=8, latent_dim=8, ngf=4, ndf=4, receptive_field=34).save(path)
    return path


def run(line):
    "Exit status of a command line"
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    return stop.value.code


class Crew(Alone):
    "One of several processes; where it would wait for the others, `meet` is called"

    def __init__(self, i, n, meet=lambda: None):
        self.process_index, self.num_processes, self.is_main_process, self.wait_for_everyone = i, n, not i, meet


class Stop(Exception):
    pass


def stop():
    raise Stop


def launched(lines, log):
    "Two processes that run these command lines together, as a launcher starts them; their exit codes"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        PartialState._reset_state()  # this process came out of one that was alone
        with open(f"{log}.{rank}", "w") as f, contextlib.redirect_stdout(f):
            for line in lines:
                assert run(line) == 0

    return exit_codes(lambda: process(0), lambda: process(1))


def test_two_processes_write_what_one_writes(weights, tmp_path, capsys):
    "On a machine without a GPU"
    lines = [
        "sample {w} --n 70 --shard 30 --out {to}/shards",
        "sample {w} --n 40 --seed 3 --out {to}/flat",
        "export {w} --n 70 --shard 40 --format hf --out {to}/set",
        "evaluate {one}/flat/images {one}/set/train --size 32 --resamples 4 --features thumbnails --metrics swd,fid",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    for line in lines:
        assert run(line.format(w=weights, to=one, one=one)) == 0
    said = capsys.readouterr().out
    assert launched([line.format(w=weights, to=two, one=one) for line in lines], tmp_path / "log") == [0, 0]
    assert contents(two) == contents(one)
    assert (tmp_path / "log.0").read_text().replace(str(two), str(one)) == said and "FID" in said
    assert (tmp_path / "log.1").read_text() == ""  # everything is said once


def test_a_launcher_starts_processes_that_find_each_other(weights, tmp_path):
    "The line of the page"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    line = [*launch, "medsketch.cli", *f"sample {weights} --n 40 --shard 20 --out {tmp_path}/new".split()]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 samples (") == 1 and sum(1 for _ in draw.lists_of(tmp_path / "new", 20).rows(40)) == 40


@pytest.mark.parametrize("shard", [0, 30])
def test_a_process_that_died_is_made_up_for(weights, tmp_path, shard):
    "Of three processes one dies at once, one in the middle; then two go on, or one"
    r = load(weights)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    list(draw.write_samples(r, tmp_path / "whole", 0, 100, 0, shard))
    out, lists = tmp_path / "broken", draw.lists_of(tmp_path / "broken", shard)

    def dies_in_the_middle():
        before, n = draw.draw_from, []

        def draw_from(*args):
            n.append(args)
            return before(*args) if len(n) < 2 else die()

        draw.draw_from = draw_from
        list(draw.write_samples(r, out, 0, 100, 0, shard, Crew(2, 3)))

    killed(dies_in_the_middle)
    with pytest.raises(Stop):  # the first process waits for the others, and the launcher ends it
        list(draw.write_samples(r, out, 0, 100, 0, shard, Crew(0, 3, stop)))
    assert lists.count() == 16 and len(list(lists.parts.iterdir())) == 3  # chunks 2, 3 and 6
    with open(lists.home(lists.count() - 1) / "metadata.jsonl", "a") as f:
        f.write('{"recipe": "sk')  # and a kill while a list is written
    done = lists.count()
    with pytest.raises(Stop):
        list(draw.write_samples(r, out, done, 100, 0, shard, Crew(1, 2, stop)))
    assert list(draw.write_samples(r, out, done, 100, 0, shard))[-1] == 100
    assert contents(out) == contents(tmp_path / "whole")
    assert sum(1 for _ in lists.rows(100)) == 100 and not lists.parts.exists()


@pytest.mark.parametrize("shard", [0, 20])
def test_a_killed_command_goes_on(weights, tmp_path, shard):
    line = f"sample {weights} --n 50 --out {tmp_path}/%s" + (f" --shard {shard}" if shard else "")
    assert run(line % "whole") == 0

    def half_way():
        from medsketch import core

        before, n = core.save_png, []

        def save_png(path, pixels):
            n.append(path)
            if len(n) > 77:
                path.with_name(f".{path.name}.x1.tmp").write_bytes(b"half a picture")
                die()
            before(path, pixels)

        core.save_png = save_png
        main((line % "broken").split())

    killed(half_way)
    assert list((tmp_path / "broken").rglob(".*.tmp"))
    assert run(line % "broken") == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_an_export_in_shards_goes_on_and_is_read_back(weights, tmp_path):
    r, made = load(weights), {}
    for shard in (0, 15):
        made[shard] = export_dataset(r, 40, tmp_path / str(shard), chunk=8, shard=shard, progress=False)
    with pytest.raises(ValueError, match="another shard"):
        export_dataset(r, 40, tmp_path / "15", chunk=8, progress=False)
    one, many = (load_images(made[k].out, 32, fit="stretch") for k in made)
    assert len(one) == len(many) == 40 and np.array_equal(one.images, many.images)
    assert [p.name for p in sorted(made[15].out.iterdir()) if p.is_dir()] == ["00000", "00001", "00002"]
    assert "15 in each of the numbered folders" in made[15].datasheet.read_text()

    def dies():
        from medsketch import export

        before, n = export.write_sample, []
        export.write_sample = lambda *args: n.append(args) or (before(*args) if len(n) < 25 else die())
        export_dataset(r, 40, tmp_path / "broken", chunk=8, shard=15, progress=False)

    killed(dies)
    assert not list((tmp_path / "broken").rglob("metadata.jsonl"))
    export_dataset(r, 40, tmp_path / "broken", chunk=8, shard=15, progress=False)
    assert contents(tmp_path / "broken") == contents(tmp_path / "15")


def test_shards_keep_to_the_rules_of_imagefolder(weights, tmp_path):
    "Every picture below `train` has one line in the list of its folder, and all lines have the same columns"
    grey = tmp_path / "grey.safetensors"
    DCGAN(size=32, channels=2, ngf=4, ndf=4, latent_dim=8).save(grey)
    for path, columns in ((weights, {"file_name", "sketch_file_name"}), (grey, {"image_1_file_name"})):
        out = tmp_path / path.stem
        assert run(f"sample {path} --n 45 --shard 20 --out {out}") == 0
        shards = sorted((out / "train").iterdir())
        assert [p.name for p in shards] == ["00000", "00001", "00002"]
        rows = [(p, json.loads(x)) for p in shards for x in (p / "metadata.jsonl").read_text().splitlines()]
        assert len({tuple(sorted(row)) for _, row in rows}) == 1 and columns <= set(rows[0][1])
        named = [p / v for p, row in rows for k, v in row.items() if k.endswith("file_name")]
        assert sorted(named) == sorted((out / "train").rglob("*.png"))
        assert [row["index"] for _, row in rows] == list(range(45))
    first = np.asarray(Image.open(tmp_path / "skrgan/train/00001/images/000020.png"))
    back = load_images(tmp_path / "skrgan/train", 32, fit="stretch")
    assert len(back) == 45 and (back.images[20] == first).all()  # our own reader leaves the sketches out


def test_datasets_reads_all_shards_as_one_set(weights, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets package is no dependency of medsketch")
    assert run(f"sample {weights} --n 45 --shard 20 --out {tmp_path}/new") == 0
    ds = datasets.load_dataset("imagefolder", data_dir=f"{tmp_path}/new", cache_dir=f"{tmp_path}/cache", split="train")
    assert len(ds) == 45 and {"image", "sketch", "seed", "index"} <= set(ds.column_names)
    assert sorted(ds["index"]) == list(range(45))


def test_a_set_in_shards_is_replaced_as_a_whole(weights, tmp_path, capsys):
    line = f"sample {weights} --n 40 --out {tmp_path}/new"
    assert run(f"{line} --shard 20") == 0
    before = contents(tmp_path / "new")
    assert run(line) == 1 and "other samples" in capsys.readouterr().err and contents(tmp_path / "new") == before
    assert run(f"{line} --shard 20") == 0 and contents(tmp_path / "new") == before
    (tmp_path / "new/train/mine.txt").write_text("mine")
    assert run(f"{line} --overwrite") == 0
    names = sorted(str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").iterdir())
    assert names == ["grid.png", "images", "metadata.jsonl", "sample.json", "sketches", "train"]
    assert [p.name for p in (tmp_path / "new/train").rglob("*")] == ["mine.txt"]


def test_more_samples_than_before_and_a_chunk_that_was_shorter(weights, tmp_path):
    "The last chunk of twenty samples has four; of a hundred it has sixteen"
    for name, numbers in (("whole", (40,)), ("grown", (20, 37, 40))):
        for n in numbers:
            assert run(f"sample {weights} --n {n} --shard 12 --out {tmp_path}/{name}") == 0
    whole, grown = (contents(tmp_path / name) for name in ("whole", "grown"))
    assert whole.keys() == grown.keys()
    lists = [v for k, v in whole.items() if k.name == "metadata.jsonl"]
    assert lists == [v for k, v in grown.items() if k.name == "metadata.jsonl"] and len(lists) == 4


def test_of_a_large_folder_some_are_read(weights, tmp_path, monkeypatch, capsys):
    "The same ones each time, and it is said; what is not read is not decoded either"
    assert run(f"sample {weights} --n 40 --out {tmp_path}/new") == 0
    decoded, before = [], dataset._try_decode
    monkeypatch.setattr(dataset, "_try_decode", lambda *args: decoded.append(args) or before(*args))
    line = f"evaluate {tmp_path}/new/images {tmp_path}/new/sketches --size 32 --resamples 0 --metrics swd --most 12"
    found = []
    for _ in range(2):
        capsys.readouterr()
        assert run(f"{line} --json") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and len(decoded) == 48
    assert (found[0]["real"], found[0]["fake"], found[0]["files"]) == (12, 12, {"real": 40, "fake": 40})
    assert run(line) == 0 and "12 of the 40 files in" in capsys.readouterr().out
    assert run(line.replace("--most 12", "")) == 0 and "files in" not in capsys.readouterr().out
    names = [Path(p).name for p in load_images(tmp_path / "new/images", 32, most=12).paths]
    assert names == sorted(names) and len(set(names)) == 12 and names[-1] > "000020.png"


def test_a_part_about_other_samples_counts_for_nothing(tmp_path):
    lists = Lists(tmp_path, "", 4)
    rows = lambda *numbers: [json.dumps({"index": i}) + "\n" for i in numbers]
    lists.keep(0, rows(0, 1))
    assert lists.kept(0, 4) is None and lists.kept(0, 2) == rows(0, 1) and lists.kept(1, 2) == rows(1)
    lists.keep(0, rows(2, 3))
    assert lists.kept(0, 4) is None and lists.kept(2, 4) == rows(2, 3)
    assert lists.take_in(0, 8) == 0 and lists.take_in(2, 8) == 4 and lists.count() == 2


def test_images_of_an_export_are_read_a_few_at_a_time(weights, tmp_path):
    r = load(weights)
    made = export_dataset(r, 20, tmp_path / "set", chunk=8, shard=6, progress=False)
    plan = export_plan(made.out)
    assert [len(b) for b in written(made.out, plan, chunk=8)] == [8, 8, 4]


def export_plan(out):
    from medsketch.export import Plan

    return Plan(**json.loads((out / "export.json").read_text()))
