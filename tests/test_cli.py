"""The command line: what it writes, and that every mistake is one line and an exit status."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from faults import contents, disk_full
from PIL import Image

from medsketch.cli import main
from medsketch.core import save_png, to_uint8
from medsketch.data import phantom_data
from medsketch.recipes import PGGAN

TINY = (
    "--scale tour --steps 6 --style fundus --set batch_size=2 --set fmap_max=8 --set ngf=4 --set ndf=4 "
    "--set latent_dim=8"
)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    "A folder of eight phantom photographs, 32 px"
    folder = tmp_path_factory.mktemp("photos")
    for i, x in enumerate(phantom_data("fundus", 8, 32).batch(range(8))["image"]):
        Image.fromarray(to_uint8(x)).save(folder / f"eye{i}.png")
    return folder


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    "The folder of a run on these photographs"
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit) as stop:
        main(f"train skrgan --data {photos} --out {out} {TINY}".split())
    assert stop.value.code == 0
    return out


def pixels(path):
    return np.asarray(Image.open(path))


def test_sketch_keeps_stems_and_draws_dark_on_white(medsketch, photos, tmp_path):
    status, out, err = medsketch(f"sketch {photos} {tmp_path}/s --style fundus --size 64")
    assert (status, err) == (0, "") and "8 sketches" in out
    drawn = sorted((tmp_path / "s").iterdir())
    assert [p.name for p in drawn] == [f"eye{i}.png" for i in range(8)]
    for p in drawn:
        a = pixels(p)
        assert a.shape == (64, 64) and np.median(a) == 255 and a.min() < 64


def test_contours_need_masks_not_photographs(medsketch, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 10:30] = 255
    Image.fromarray(mask).save(folder / "a.png")
    status, _, err = medsketch(f"sketch {folder} {tmp_path}/out --method contour --size 32")
    assert status == 0, err
    a = pixels(tmp_path / "out/a.png") < 128
    assert 0.05 < a.mean() < 0.4 and not a[16, 16] and not a[0, 0]


def test_sample_writes_pairs_and_says_how(medsketch, trained, tmp_path):
    status, _, err = medsketch(f"sample {trained} --n 5 --out {tmp_path}/new --seed 3")
    assert (status, err) == (0, "")
    lines = [json.loads(x) for x in (tmp_path / "new/metadata.jsonl").read_text().splitlines()]
    assert [x["index"] for x in lines] == list(range(5)) and all(x["seed"] == 3 and x["synthetic"] for x in lines)
    for x in lines:
        assert pixels(tmp_path / "new/images" / x["images"][0]).shape == (32, 32, 3)
        assert pixels(tmp_path / "new/sketches" / x["sketch"]).shape == (32, 32)
    medsketch(f"sample {trained} --n 5 --out {tmp_path}/again --seed 3")
    medsketch(f"sample {trained} --n 5 --out {tmp_path}/other --seed 4")
    one, same, other = (pixels(tmp_path / d / "images/000002.png") for d in ("new", "again", "other"))
    assert (one == same).all() and (one != other).any()


def test_render_answers_every_sketch_and_lists_bad_ones(medsketch, trained, tmp_path):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    line = np.full((50, 30), 255, np.uint8)
    line[10:40, 14:17] = 0
    Image.fromarray(line).save(drawn / "line.png")
    clear = np.zeros((32, 32, 4), np.uint8)  # ink on nothing at all, as drawing apps export
    clear[8:24, 15:18, 3] = 255
    Image.fromarray(clear).save(drawn / "clear.png")
    (drawn / "text.png").write_text("not a picture")
    status, out, err = medsketch(f"render {trained} --sketches {drawn} --out {tmp_path}/r")
    assert status == 0 and "2 images" in out
    assert "text.png" in err and err.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["clear.png", "line.png"]
    assert pixels(tmp_path / "r/line.png").shape == (32, 19, 3)  # the padding is cut off again
    (drawn / "text.png").unlink()
    status, out, err = medsketch(f"render {trained} --sketches {drawn} --out {tmp_path}/large --size 64")
    assert (status, err) == (0, "")
    assert pixels(tmp_path / "large/line.png").shape == (64, 38, 3)
    assert pixels(tmp_path / "large/clear.png").shape == (64, 64, 3)
    for size, why in ((48, "power of two"), (0, "size 0"), (16, "--size 16"), (4096, "power of two")):
        status, out, err = medsketch(f"render {trained} --sketches {drawn} --out {tmp_path}/no --size {size}")
        assert status == 1 and err.count("\n") == 1 and why in err, err
        assert not (tmp_path / "no").exists()


def test_what_macos_writes_beside_a_sketch_is_no_sketch(medsketch, trained, tmp_path):
    save_png(tmp_path / "in/a.png", np.full((32, 32), 255, np.uint8))
    (tmp_path / "in/._a.png").write_bytes(b"\0\5\x16\7 of a resource fork")
    (tmp_path / "in/b.png").write_text("no picture")
    status, out, err = medsketch(f"render {trained} --sketches {tmp_path}/in --out {tmp_path}/out")
    assert status == 0 and "1 images" in out and err.count("\n") == 1
    assert err.startswith(f"skipped {tmp_path}/in/b.png: not a picture")


def test_whoever_waits_hears_what_was_scored(medsketch, photos, monkeypatch):
    clock = itertools.count(step=20)  # every look at it is twenty seconds later
    monkeypatch.setattr("medsketch.commands.score.time", SimpleNamespace(monotonic=lambda: next(clock)))
    status, out, err = medsketch(f"evaluate {photos} {photos} --size 32 --json --metrics swd,ms_ssim")
    assert status == 0 and json.loads(out)
    assert err.count("scored ") == 2 and ", 20 s" in err and ", 40 s" in err


def test_evaluate_prints_a_table_and_json(medsketch, photos, tmp_path):
    status, out, _ = medsketch(f"evaluate {photos} {photos} --size 32")
    assert status == 0 and "MS-SSIM" in out and "SWD" in out and "two halves of the real" in out
    status, out, _ = medsketch(f"evaluate {photos} {photos} --size 32 --json --metrics swd")
    scores = json.loads(out)
    assert scores["real"] == scores["fake"] == 8 and scores["used"] == 4
    assert (
        scores["swd"]["low"] <= scores["swd"]["score"] <= scores["swd"]["high"]
        and scores["swd"]["real_halves"] > 0
        and scores["swd"]["extractor"]
    )


def test_compare_prints_the_papers_table_and_goes_on(medsketch, tmp_path):
    line = (
        f"compare --data phantoms:fundus:24 --recipes dcgan,wgan --scale tour --size 32 --steps 4 --n 12 "
        f"--features thumbnails --metrics swd,fid --out {tmp_path}/c"
    )
    status, out, err = medsketch(line)
    assert (status, err) == (0, "") and "FID ↓" in out and "dcgan" in out and out.count("trained, scored") == 2
    table = (tmp_path / "c/table.csv").read_text()
    status, out, _ = medsketch(line.replace("dcgan,wgan", "dcgan,wgan,pggan"))
    assert status == 0 and out.count("trained before, scores kept") == 2 and out.count("trained, scored") == 1
    kept = [r for r in (tmp_path / "c/table.csv").read_text().splitlines() if not r.startswith("pggan")]
    assert kept == table.splitlines()


def test_export_writes_a_set_with_its_datasheet(medsketch, photos, trained, tmp_path):
    status, out, err = medsketch(f"export {trained} --n 3 --out {tmp_path}/set --licence cc0-1.0 --source phantoms")
    assert (status, err) == (0, "") and "datasheet" in out
    assert (
        len(list((tmp_path / "set/images").glob("*.png"))) == 3
        and "not checked" in (tmp_path / "set/DATASHEET.md").read_text().lower()
    )
    status, _, err = medsketch(f"export {trained} --n 3 --out {tmp_path}/set2 --format parquet")
    assert status == 1 and "folder" in err and not (tmp_path / "set2").exists()


def test_sixteen_bits_come_in_and_go_out(medsketch, tmp_path):
    "Of grey images: a run on them exports more levels than eight bits have"
    (tmp_path / "deep").mkdir()
    for i, x in enumerate(phantom_data("lung_ct", 6, 32).batch(range(6))["image"]):
        fine = ((x[0].numpy() + 1) / 2 * 65535).astype(np.uint16)
        cv2.imwrite(str(tmp_path / f"deep/{i}.png"), fine)
    assert medsketch(f"train dcgan --data {tmp_path}/deep --out {tmp_path}/run --steps 2 --size 32 {SMALL}")[0] == 0
    for bits in (8, 16):
        assert medsketch(f"export {tmp_path}/run --n 3 --out {tmp_path}/{bits} --bits {bits}")[0] == 0
    coarse, fine = (cv2.imread(str(next((tmp_path / b).rglob("000000.png"))), -1) for b in ("8", "16"))
    assert (coarse.dtype, fine.dtype, coarse.ndim, fine.ndim) == (np.uint8, np.uint16, 2, 2)
    assert len(np.unique(fine)) > len(np.unique(coarse))
    assert np.abs(fine / 65535 - coarse / 255).max() < 1 / 255  # the same picture


def test_resume_goes_on_and_a_second_start_is_refused(medsketch, photos, trained):
    before = (trained / "weights.safetensors").read_bytes()
    status, _, err = medsketch(f"train skrgan --data {photos} --out {trained} {TINY}")
    assert status == 1 and "--resume" in err
    status, _, err = medsketch(f"train skrgan --data {photos} --out {trained} {TINY} --resume --set ngf=8")
    assert status == 1 and "ngf" in err
    assert (trained / "weights.safetensors").read_bytes() == before
    status, _, err = medsketch(f"train skrgan --data {photos} --out {trained} {TINY} --resume")
    assert status == 0, err
    assert (trained / "weights.safetensors").read_bytes() == before  # nothing was left to do


def test_another_number_of_threads_does_not_rewrite_a_finished_run(medsketch, photos, tmp_path):
    "Its batch norm is estimated once more, with other last digits"
    torch.set_num_threads(2)  # the fixture of all tests sets it back
    run = tmp_path / "run"
    assert medsketch(f"train skrgan --data {photos} --out {run} {TINY}")[0] == 0
    before = (run / "weights.safetensors").read_bytes(), (run / "weights.safetensors").stat().st_mtime_ns
    torch.set_num_threads(1)
    assert medsketch(f"train --resume {run}")[0] == 0
    assert ((run / "weights.safetensors").read_bytes(), (run / "weights.safetensors").stat().st_mtime_ns) == before


def test_a_launcher_trains_on_two_processes_as_on_one(photos, tmp_path):
    "The line of the command page; without a GPU too"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    line = [
        sys.executable,
        "-c",
        "from medsketch.cli import main; main()",
        *f"train dcgan --data {photos} --out {tmp_path}/run --scale tour --steps 20 --set batch_size=2".split(),
    ]
    done = subprocess.run(run + line, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained: ") == 1 and (tmp_path / "run/weights.safetensors").exists()
    log = (tmp_path / "run/gan/log.csv").read_text().splitlines()
    assert [x.split(",")[:2] for x in log[1:]] == [["10", "40"], ["20", "80"]]  # steps and images


def test_bad_files_among_good_ones_are_listed(medsketch, photos, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for p in photos.iterdir():
        (folder / p.name).write_bytes(p.read_bytes())
    good = (folder / "eye0.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("hello")
    (folder / "zero.png").write_bytes(b"")
    Image.new("L", (1, 1)).save(folder / "dot.png")
    status, out, err = medsketch(f"train skrgan --data {folder} --out {tmp_path}/run {TINY}")
    assert status == 0, err
    assert "8 images" in out
    for name in ("cut.png", "text.png", "zero.png", "dot.png"):
        assert name in err
    assert "Traceback" not in err


MISTAKES = {
    "demo --out {tmp}/x --images 12": (1, "at least 16"),
    "train skrgan --data {tmp}/none --out {tmp}/x": (1, "no such folder"),
    "train skrgan --data {tmp}/empty --out {tmp}/x": (1, "no images"),
    "train skrgan --data {photos} --out {tmp}/x --size 100": (1, "nearest is 128"),
    "train stargan --data {photos} --out {tmp}/x": (1, "skrgan"),
    "train skrgan --data {photos} --out {tmp}/x --scale huge": (1, "tour, cpu, gpu, paper"),
    "train skrgan --data {photos} --out {tmp}/x --scale tour --style cubist": (1, "cubist"),
    "train skrgan --data {photos} --out {tmp}/x --set ngf": (1, "name=value"),
    "train skrgan --data {photos} --out {tmp}/x --scale tour --set colour=red": (1, "no argument 'colour'"),
    "train skrgan --data {photos} --out {tmp}/x --scale tour --steps 0": (1, "at least 1"),
    "train skrgan --data {photos} --out {tmp}/file/x --scale tour --steps 2": (1, "cannot write"),
    "train dcgan --data {photos} --out {tmp}/x --scale tour --steps 2 --set steps=3": (1, "steps=3 and --steps 2: say"),
    "train skrgan --data phantoms:toe --out {tmp}/x --scale tour": (1, "unknown phantom"),
    "train skrgan --out {tmp}/x": (2, "--data"),
    "paint": (2, "paint"),
    "sample {tmp}/empty --out {tmp}/x": (1, "does not exist"),
    "sample {tmp}/file --out {tmp}/x": (1, "not a file that medsketch saved"),
    "sample {run} --n 0 --out {tmp}/x": (1, "at least one"),
    "sample {run} --n 2 --out {tmp}/file/x": (1, "file/x"),
    "render {run} --sketches {tmp}/empty --out {tmp}/x": (1, "no sketches"),
    "sketch {photos} {tmp}/x --style cubist": (1, "cubist"),
    "sketch {photos} {tmp}/x --method pencil": (1, "sobel, canny, contour"),
    "sketch {photos} {tmp}/x --size 100": (1, "nearest is 128"),
    "evaluate {photos} {photos} --metrics beauty": (1, "swd, ms_ssim"),
    "evaluate {photos} {tmp}/empty": (1, "no images"),
    "evaluate {photos} {photos} --metrics fid --features thumbnails --size 32": (1, "at least 24 and 12"),
    "evaluate {photos} {photos} --metrics continuity --size 32": (1, "segmenter"),
    "evaluate {photos} {photos} --metrics fid --features {tmp}/file --size 32": (1, "train_moco"),
    "compare --data phantoms:fundus:12 --out {tmp}/x --recipes stargan --n 12 --size 32": (1, "no recipe is called"),
    "compare --data {photos} --out {tmp}/x --seeds a,b --size 32": (1, "whole numbers"),
    "compare --data phantoms:fundus:12 --out {tmp}/file --recipes dcgan --n 12 --size 32": (1, "cannot write to"),
    "compare --data {photos} --out {tmp}/x --size 32": (1, "at least 12"),
    "export {run} --n 0 --out {tmp}/x": (1, "n=0"),
    "export {tmp}/file --out {tmp}/x": (1, "not a file that medsketch saved"),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(medsketch, photos, trained, tmp_path, line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    status, _, err = medsketch(line.format(tmp=tmp_path, photos=photos, run=trained))
    expected, words = MISTAKES[line]
    assert status == expected and words in err
    assert err.startswith("medsketch: ") and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "in the way"


INTO_DATA = ["sample {run}", "sample {run}/weights.safetensors", "export {run} --n 4", "render {run}"]


@pytest.mark.parametrize("line", INTO_DATA)
def test_results_never_lie_among_the_images_of_the_run(medsketch, trained, photos, tmp_path, line):
    "The next training would read them"
    (tmp_path / "in").mkdir()
    save_png(tmp_path / "in/a.png", np.full((32, 32), 255, np.uint8))
    line = line.format(run=trained) + (f" --sketches {tmp_path}/in" if "render" in line else "")
    for out in (photos, photos / "new/samples"):
        status, _, err = medsketch(f"{line} --out {out}")
        assert status == 1 and err.startswith(f"medsketch: {out} ") and err.count("\n") == 1
        assert "inside" in err or "both input and output" in err
    assert not (photos / "new").exists()


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "folder", "file", "jpeg"])
def test_a_picture_never_takes_the_place_of_something_else(medsketch, photos, tmp_path, kind):
    "A device, too, is there to stay"
    out = tmp_path / ("out.jpg" if kind == "jpeg" else "out.png")
    os.mkfifo(tmp_path / "pipe")
    link = lambda p: p.symlink_to("pipe")
    make = {"pipe": os.mkfifo, "link to a pipe": link, "folder": Path.mkdir, "file": Path.touch}
    make.get(kind, lambda p: None)(out)
    before = os.lstat(out) if kind != "jpeg" else None
    for line in (f"privacy {photos} {photos} --size 32 --out {out}", f"inspect {photos} --size 32 --out {out}"):
        status, _, err = medsketch(line)
        assert status == 1 and err.count("\n") == 1 and "--overwrite" not in err  # there is no such option
        assert ("is a .png" if kind == "jpeg" else "is there already") in err
        assert out.exists() == (kind != "jpeg") and (before is None or os.lstat(out) == before)


def test_pipes_are_never_waited_for(medsketch, trained, tmp_path):
    "Nobody would write into them; and a page is not served for what is no run"
    os.mkfifo(tmp_path / "pipe")
    for line in (
        f"push {trained} a/b --to {tmp_path}/to --privacy {tmp_path}/pipe",
        f"studio {tmp_path}/pipe --no-browser --port 0",
        f"explore {tmp_path}/pipe --no-browser --port 0",
    ):
        status, _, err = medsketch(line)
        assert status == 1 and err.count("\n") == 1 and str(tmp_path / "pipe") in err and not (tmp_path / "to").exists()


def test_weights_of_another_recipe_or_none(medsketch, trained, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Evil()))
    status, _, err = medsketch(f"sample {tmp_path}/evil.safetensors --out {tmp_path}/x")
    assert status == 1 and "not a file that medsketch saved" in err
    assert not (tmp_path / "owned").exists()


def test_the_installed_command_runs_in_a_process_of_its_own(tmp_path):
    code = "from medsketch.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "sample", str(tmp_path), "--out", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("medsketch: ") and "Traceback" not in done.stderr


def test_text_is_utf8_where_the_machine_speaks_something_else(tmp_path):
    code = (
        "from medsketch.core import atomic_write\n"
        f"with atomic_write({str(tmp_path / 't')!r}, 'w') as f: f.write('SWD \\u00d7 10\\u00b3\\n')"
    )
    plain = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t").read_bytes() == "SWD × 10³\n".encode()


def test_demo_writes_picture_and_scores(medsketch, tmp_path):
    line = f"demo --out {tmp_path}/demo --steps 4 --size 32 --images 16 --kind"
    status, out, err = medsketch(f"{line} brain_mri")
    assert status == 0, err
    assert pixels(tmp_path / "demo/demo.png").shape[2] == 3
    rows = (tmp_path / "demo/scores.csv").read_text().splitlines()
    assert [r.split(",")[0] for r in rows] == ["", "untrained", "trained", "packaged"]
    with Image.open(tmp_path / "demo/growing.gif") as gif:
        assert gif.n_frames == 4
    assert "swd" in out and "demo.png" in out and "medsketch studio" in out
    weights = (tmp_path / "demo/brain_mri_32/weights.safetensors").read_bytes()
    assert medsketch(f"{line} brain_mri")[0] == 0  # a second demo goes on with what is there
    assert (tmp_path / "demo/brain_mri_32/weights.safetensors").read_bytes() == weights
    status, out, err = medsketch(f"{line} fundus")  # its packaged renderer draws photographs, not phantoms
    assert status == 0 and "untrained" in out and "packaged  " not in out


def test_a_demo_of_no_minutes_only_draws(medsketch, tmp_path):
    status, out, _ = medsketch(f"demo --out {tmp_path}/demo --minutes 0")
    assert status == 0 and [p.name for p in (tmp_path / "demo").iterdir()] == ["demo.png"]
    assert all(f"  {name}: L1 0." in out for name in ("fundus", "chest_xray", "lung_ct", "brain_mri"))


def test_steps_are_all_there_are_unless_more_is_asked_for(medsketch, photos, tmp_path):
    "The scale `gpu` has a joint stage of thousands of steps"
    small = TINY.replace("tour", "gpu --size 32 --set receptive_field=34 --set fmap_base=64")
    for more, stages in (
        ("", {"sketch", "render"}),
        (" --set joint_steps=3 --set render_steps=2", {"sketch", "render", "joint"}),
    ):
        out = tmp_path / str(len(stages))
        status, _, err = medsketch(f"train skrgan --data {photos} --out {out} {small}{more}")
        assert (status, err) == (0, "")
        assert {p.parent.name for p in out.glob("*/log.csv")} == stages
        last = [int(p.read_text().splitlines()[-1].split(",")[0]) for p in out.glob("*/log.csv")]
        assert sorted(last) == ([6, 6] if not more else [2, 3, 6])


def test_one_stage_alone(medsketch, photos, tmp_path):
    "A renderer for people who draw: trained without a sketch generator, and it says so when asked for sketches"
    status, _, err = medsketch(
        f"train skrgan --data {photos} --out {tmp_path}/run {TINY} --stages render "
        "--set variants=true --set consistency=20"
    )
    assert (status, err) == (0, "")
    medsketch(f"sketch {photos} {tmp_path}/s --style fundus --size 32")
    assert medsketch(f"render {tmp_path}/run --sketches {tmp_path}/s --out {tmp_path}/r")[0] == 0
    assert len(list((tmp_path / "r").iterdir())) == 8
    status, _, err = medsketch(f"sample {tmp_path}/run --n 2 --out {tmp_path}/new")
    assert status == 1 and "hold no G_S" in err and not (tmp_path / "new").exists()
    status, _, err = medsketch(f"train skrgan --data {photos} --out {tmp_path}/x {TINY} --stages paint")
    assert status == 1 and "no stage is called 'paint'" in err


def test_sketches_alone_can_be_sampled(medsketch, photos, tmp_path):
    assert medsketch(f"train skrgan --data {photos} --out {tmp_path}/run {TINY} --stages sketch")[0] == 0
    status, out, _ = medsketch(f"sample {tmp_path}/run --n 2 --out {tmp_path}/new")
    assert status == 0 and "2 samples (sketch)" in out
    assert [p.name for p in (tmp_path / "new").iterdir() if p.is_dir()] == ["sketches"]
    assert all("images" not in json.loads(line) for line in (tmp_path / "new/metadata.jsonl").read_text().splitlines())


def test_packaged_weights_by_name(medsketch, photos, tmp_path):
    medsketch(f"sketch {photos} {tmp_path}/s --style fundus --size 256")
    assert medsketch(f"render lung_ct --sketches {tmp_path}/s --out {tmp_path}/r")[0] == 0
    assert pixels(tmp_path / "r/eye0.png").shape == (256, 256)


@pytest.mark.parametrize(
    "line, says",
    [
        ("studio kidney", "no weights are called kidney"),
        ("studio fundus --port 700000", "choose another --port"),
        ("studio fundus --images {tmp}/nowhere", "no such folder"),
        ("studio fundus --images {tmp}", "no images in"),
        ("studio fundus --out {file} --port 700000", "cannot write to"),
        ("explore fundus --data {tmp}", "recipe skrgan has no encoder of images"),
        ("lab {file}/below", "cannot write notebooks"),
        ("pretrain chest_xray --out {tmp}/x --data {tmp}", "mhh_covid"),
    ],
)
def test_mistakes_of_people_who_draw(medsketch, tmp_path, line, says):
    (tmp_path / "file").write_text("")
    status, _, err = medsketch(line.format(file=tmp_path / "file", tmp=tmp_path))
    assert status == 1 and says in err and err.count("\n") == 1


def served(monkeypatch, medsketch, line):
    "The code of the page that a command would serve"
    pages = []
    read = lambda command: pages.append(json.loads(Path(command[3]).read_text())) or 0
    monkeypatch.setattr("medsketch.studio.app.until_stopped", read)
    assert medsketch(f"{line} --port 0 --no-browser")[0] == 0
    return pages[0]["cells"][0]["source"]


def test_studio_and_explorer_take_a_folder_of_images(medsketch, photos, tmp_path, monkeypatch):
    assert f"images={str(photos.resolve())!r}" in served(monkeypatch, medsketch, f"studio fundus --images {photos}")
    small = {"size": 16, "latent_dim": 8, "fmap_base": 32, "fmap_max": 8, "batches": {4: 1, 8: 1, 16: 1}}
    for name, steps in (("eyes", 1), ("blind", 0)):
        recipe = PGGAN(**small, encoder_steps=steps)
        recipe.fit(phantom_data("fundus", 8, 16), progress=False).save(tmp_path / f"{name}.safetensors")
    status, _, err = medsketch(f"explore {tmp_path}/blind.safetensors --data {photos}")
    assert status == 1 and "hold no E" in err
    code = served(monkeypatch, medsketch, f"explore {tmp_path}/eyes.safetensors --data {photos}")
    names = {}
    exec(code.replace("\nExplorer(", "\nexplorer = Explorer("), names)  # noqa: S102
    assert names["explorer"].recipe.name == "pggan" and len(names["explorer"].codes) == 8
    code = served(monkeypatch, medsketch, f"explore {tmp_path}/eyes.safetensors")  # without images: its own samples
    exec(code.replace("\nExplorer(", "\nexplorer = Explorer("), names)  # noqa: S102
    assert len(names["explorer"].codes) == 200 and "sample 0" in names["explorer"].text.value
    assert "--data is empty" in medsketch(f"explore {tmp_path}/eyes.safetensors --data=")[2]


# ---- resume, start from other weights, score while training ----------------------------------------

SMALL = "--scale tour --set ngf=4 --set ndf=4 --set latent_dim=8 --set batch_size=2"
COMPARED = f"--size 32 --steps 4 --n 8 --metrics swd --resamples 0 {SMALL}"


def weights(run):
    return (run / "weights.safetensors").read_bytes()


def stop_after(monkeypatch, steps):
    "The next training is interrupted after so many steps, as by Ctrl+C"
    from medsketch.train import callbacks

    def after_step(self, trainer, before=callbacks.StopOnNan.after_step):
        before(self, trainer)
        if trainer.step == steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(callbacks.StopOnNan, "after_step", after_step)


@pytest.mark.parametrize("step, gone", [(2, "."), (6, "."), (2, "config.json"), (6, "gan/log.csv")])
def test_a_run_that_is_removed_while_it_trains_is_never_called_trained(
    medsketch, photos, tmp_path, monkeypatch, step, gone
):
    "Neither is its folder written anew by halves"
    from medsketch.train import callbacks

    run = tmp_path / "run"

    def after_step(self, trainer, before=callbacks.StopOnNan.after_step):
        before(self, trainer)
        if trainer.step == step:
            shutil.rmtree(run) if gone == "." else (run / gone).unlink()

    with monkeypatch.context() as m:
        m.setattr(callbacks.StopOnNan, "after_step", after_step)
        status, out, err = medsketch(f"train dcgan --data {photos} --out {run} --steps 6 --every 3 {SMALL}")
    assert status == 1 and "trained: " not in out and err.count("\n") == 1
    assert str(run / gone) in err and "was removed while this was training" in err
    assert not (run / "weights.safetensors").exists() and (gone != "." or not any(run.rglob("*.*")))
    if gone == "gan/log.csv":
        assert medsketch(f"train --resume {run}")[0] == 0 and (run / gone).exists()


def test_resume_is_one_word_and_an_interruption_says_so(medsketch, photos, tmp_path, monkeypatch):
    line = f"train dcgan --data {photos} --steps 12 --every 5 --seed 3 {SMALL}"
    assert medsketch(f"{line} --out {tmp_path}/whole")[0] == 0
    with monkeypatch.context() as m:
        stop_after(m, 7)
        status, _, err = medsketch(f"{line} --out {tmp_path}/run")
    assert status == 130 and err.count("\n") == 1
    assert "saved: " in err and f"go on with: medsketch train --resume {tmp_path}/run" in err
    status, out, err = medsketch(f"train --resume {tmp_path}/run")
    assert (status, err) == (0, "") and "trained: " in out
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    noted = json.loads((tmp_path / "run/config.json").read_text())["train"]
    assert noted["data"] == str(photos) and noted["every"] == 5 and noted["scale"] == "tour" and noted["steps"] == 12
    assert medsketch(f"train {tmp_path}/run --resume --steps 12 --seed 3 {SMALL}")[0] == 0  # options that agree
    assert medsketch(f"{line} --out {tmp_path}/run --resume")[0] == 0  # and the line of before


def interrupting(f, at):
    "`f`, interrupted when it is called for the n-th time"
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return f(*args, **kwargs)

    return call


def test_whoever_interrupts_hears_what_is_kept_and_how_to_go_on(medsketch, photos, trained, tmp_path, monkeypatch):
    from medsketch.commands import draw, score

    line = f"sample {trained} --n 40 --out {tmp_path}/new"
    with monkeypatch.context() as m:
        m.setattr(draw, "draw_from", interrupting(draw.draw_from, 3))  # one for the plan, two chunks
        assert medsketch(line) == (
            130,
            "",
            "medsketch: interrupted; 16 of 40 samples are written; the same command goes on\n",
        )
    assert medsketch(line)[0] == 0 and len(list((tmp_path / "new/images").iterdir())) == 40
    with monkeypatch.context() as m:
        m.setattr(score, "score_in_turn", interrupting(score.score_in_turn, 1))
        status, _, err = medsketch(f"evaluate {photos} {photos} --size 32")
        assert status == 130 and err == "medsketch: interrupted; the same command starts again\n"
    line = f"compare --data {photos} --recipes dcgan --out {tmp_path}/c {COMPARED}"
    with monkeypatch.context() as m:
        stop_after(m, 2)
        status, _, err = medsketch(line)
    assert status == 130 and err.count("\n") == 1 and "kept; the same command goes on" in err
    assert "train --resume" not in err and medsketch(line)[0] == 0 and (tmp_path / "c/table.csv").exists()


def test_a_run_of_earlier_versions_resumes_with_its_data(medsketch, photos, tmp_path):
    assert medsketch(f"train dcgan --data {photos} --out {tmp_path}/run --steps 2 {SMALL}")[0] == 0
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    del config["train"]
    path.write_text(json.dumps(config))
    status, _, err = medsketch(f"train --resume {tmp_path}/run")
    assert status == 1 and "add --data" in err
    assert medsketch(f"train --resume {tmp_path}/run --data {photos} --steps 2")[0] == 0
    status, _, err = medsketch(f"train --resume {tmp_path}/run --data {photos} --steps 3")
    assert status == 1 and "steps 2, not 3" in err


def test_a_start_that_failed_leaves_nothing_in_the_way(medsketch, photos, tmp_path, monkeypatch):
    from medsketch.recipes import DCGAN

    line = f"train dcgan --data {photos} --out {tmp_path}/run --steps 2 {SMALL}"

    def broken(self, data):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as m:
        m.setattr(DCGAN, "stream", lambda *_: broken(*_[:2]))
        status, _, err = medsketch(line)
    assert status == 1 and "out of memory" in err and not (tmp_path / "run").exists()
    assert medsketch(line)[0] == 0
    before = weights(tmp_path / "run")
    assert medsketch(line)[0] == 1 and weights(tmp_path / "run") == before  # a run that is there stays


def test_fine_tuning_takes_shapes_and_weights(medsketch, photos, tmp_path):
    line = f"train skrgan --data {photos} --scale tour --stages render --set render_steps=1 --set batches=1"
    status, _, err = medsketch(f"{line} --size 32 --init lung_ct --out {tmp_path}/x")
    assert status == 1 and "start=64 is larger than the size, 32" in err and not (tmp_path / "x").exists()
    status, _, err = medsketch(f"{line} --size 32 --init G_P=lung_ct --out {tmp_path}/x")
    assert status == 1 and "this recipe needs" in err and not (tmp_path / "x").exists()
    assert medsketch(f"{line} --init lung_ct --out {tmp_path}/lung --set batch_size=2")[0] == 0
    config = json.loads((tmp_path / "lung/config.json").read_text())["config"]
    assert (config["size"], config["channels"], config["ngf"], config["style"]) == (256, 1, 24, "lung_ct")
    small = "--set ngf=4 --set ndf=4 --set fmap_max=8 --set latent_dim=8"
    assert medsketch(f"{line} {small} --out {tmp_path}/first")[0] == 0
    status, _, err = medsketch(f"{line} --out {tmp_path}/second --init {tmp_path}/first")
    assert (status, err) == (0, "")
    config = json.loads((tmp_path / "second/config.json").read_text())
    assert (
        config["config"]["ngf"] == 4
        and config["init"]["from"] == str(tmp_path / "first")
        and "G_P" in config["init"]["weights"]
    )
    assert medsketch(f"{line} {small} --out {tmp_path}/third --init G_P={tmp_path}/first")[0] == 0
    assert set(json.loads((tmp_path / "third/config.json").read_text())["init"]["weights"]) == {"G_P"}
    assert medsketch(f"train --resume {tmp_path}/third")[0] == 0


def test_what_is_taken_over_and_not_trained_is_said(medsketch, photos, trained, tmp_path):
    line = f"train skrgan --data {photos} {TINY} --init G_P={trained}"
    with pytest.warns(UserWarning, match="G_P: taken over and kept as it is, since stage sketch"):
        assert medsketch(f"{line} --out {tmp_path}/run --stages sketch")[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert medsketch(f"train --resume {tmp_path}/run")[0] == 0  # said once
        assert medsketch(f"{line} --out {tmp_path}/other --stages render")[0] == 0


def test_scores_while_training_choose_the_best(medsketch, photos, tmp_path):
    line = (
        f"train dcgan --data {photos} --out {tmp_path}/run --steps 60 --every 55 {SMALL} --evaluate fid,swd --best fid"
    )
    status, _, err = medsketch(line)
    assert (status, err) == (0, "")
    header, *rows = [x.split(",") for x in (tmp_path / "run/gan/log.csv").read_text().splitlines()]
    assert {"fid", "swd"} <= set(header) and float(rows[-1][header.index("fid")]) > 0
    assert (tmp_path / "run/gan/checkpoints/best.pt").exists()
    assert medsketch(f"train --resume {tmp_path}/run")[0] == 0


def test_stages_without_images_are_not_scored(medsketch, photos, tmp_path):
    status, _, err = medsketch(
        f"train skrgan --data {photos} --out {tmp_path}/run {TINY} --evaluate swd --best swd --every 3"
    )
    assert (status, err) == (0, "")
    logs = {k: (tmp_path / f"run/{k}/log.csv").read_text().splitlines()[0] for k in ("sketch", "render")}
    assert "swd" in logs["render"] and "swd" not in logs["sketch"]


def test_what_is_planned_is_said_and_steps_fit_the_minutes(medsketch, photos, tmp_path):
    status, out, _ = medsketch(
        f"train pggan --data {photos} --out {tmp_path}/run --scale tour --steps 40 --set fmap_max=4 --set batch_size=2"
    )
    assert status == 0 and "planned steps: " in out and "a step" in out and "images" in out.splitlines()[0]
    status, out, err = medsketch(
        f"train skrgan --data {photos} --out {tmp_path}/short --minutes 0.03 {TINY.replace('--steps 6', '')}"
    )
    assert (status, err) == (0, "")
    config = json.loads((tmp_path / "short/config.json").read_text())
    assert config["train"]["minutes"] == 0.03 and 1 <= config["config"]["render_steps"] < 250
    status, _, err = medsketch(f"train dcgan --data {photos} --out {tmp_path}/x --minutes 0.000001 {SMALL}")
    assert status == 1 and "allow more time" in err and not (tmp_path / "x").exists()


def test_the_scale_follows_the_machine(medsketch, photos, tmp_path, monkeypatch):
    from medsketch.commands.train import default_scale

    assert default_scale() == ("gpu" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_scale() == "gpu"


def test_help_lists_every_recipe_and_the_version_is_there(medsketch):
    from medsketch import __version__
    from medsketch.recipes import RECIPES

    status, out, _ = medsketch("train --help")
    assert status == 0
    for name, cls in RECIPES.items():
        assert f"{name} " in out and cls.__doc__.splitlines()[0][:20] in " ".join(out.split())
    assert medsketch("--version") == (0, f"medsketch {__version__}\n", "")
    for command in ("sketch", "sample", "export", "pretrain", "compare", "inspect", "privacy"):
        status, out, _ = medsketch(f"{command} --help")
        assert status == 0 and not re.search(r"\{(styles|kinds|formats|packaged|recipes)\}", out)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom medsketch.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'cv2', 'matplotlib', 'monai', 'accelerate', 'PIL'}\n"
        "print({m.split('.')[0] for m in sys.modules} & heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "set()" and "train" in done.stdout


# ---- nothing of the user's is overwritten ------------------------------------------------------------


def test_same_stems_get_names_of_their_own(medsketch, photos, trained, tmp_path):
    for name in ("a.png", "a.jpg", "A.bmp", "b.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.open(photos / "eye0.png").save(tmp_path / "in" / name)
    assert medsketch(f"sketch {tmp_path}/in {tmp_path}/s --size 32")[0] == 0
    names = [p.name.lower() for p in (tmp_path / "s").iterdir()]
    assert len(names) == len(set(names)) == 4
    assert medsketch(f"render {trained} --sketches {tmp_path}/in --out {tmp_path}/r")[0] == 0
    names = [p.name.lower() for p in (tmp_path / "r").iterdir()]
    assert len(names) == len(set(names)) == 4


def test_what_is_there_is_replaced_only_if_asked(medsketch, photos, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/eye3.png").write_text("mine")
    status, _, err = medsketch(f"sketch {photos} {tmp_path}/s --size 32")
    assert status == 1 and "--overwrite" in err and [p.name for p in (tmp_path / "s").iterdir()] == ["eye3.png"]
    assert medsketch(f"sketch {photos} {tmp_path}/s --size 32 --overwrite")[0] == 0
    assert pixels(tmp_path / "s/eye3.png").shape == (32, 32)


def test_samples_go_on_and_sets_are_never_mixed(medsketch, trained, tmp_path):
    medsketch(f"sample {trained} --n 20 --out {tmp_path}/whole")
    medsketch(f"sample {trained} --n 5 --out {tmp_path}/new")
    with open(tmp_path / "new/metadata.jsonl", "a") as f:
        f.write('{"recipe": "skr')  # a kill in the middle of a line
    assert medsketch(f"sample {trained} --n 20 --out {tmp_path}/new")[0] == 0
    assert contents(tmp_path / "new" / "images").keys() == contents(tmp_path / "whole/images").keys()
    assert (tmp_path / "new/metadata.jsonl").read_text() == (tmp_path / "whole/metadata.jsonl").read_text()
    assert (
        np.abs(
            pixels(tmp_path / "new/images/000017.png").astype(int) - pixels(tmp_path / "whole/images/000017.png")
        ).max()
        <= 1
    )
    status, said, _ = medsketch(f"sample {trained} --n 3 --out {tmp_path}/new")
    assert status == 0 and said.startswith("20 samples ") and "more than the 3 asked for" in said
    assert contents(tmp_path / "new").keys() == contents(tmp_path / "whole").keys()  # nothing is taken away
    assert pixels(tmp_path / "new/grid.png").shape == pixels(tmp_path / "whole/grid.png").shape  # sixteen, not five
    status, _, err = medsketch(f"sample {trained} --n 3 --seed 1 --out {tmp_path}/new")
    assert status == 1 and "other samples" in err
    (tmp_path / "new/images/mine.png").write_text("mine")
    assert medsketch(f"sample {trained} --n 3 --seed 1 --out {tmp_path}/new --overwrite")[0] == 0
    assert sorted(p.name for p in (tmp_path / "new/images").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "mine.png",
    ]


def test_samples_need_no_memory_for_all(trained, tmp_path, monkeypatch):
    "Whatever is drawn, at most sixteen are there at a time"
    from medsketch.commands import draw
    from medsketch.pretrained import load

    most, before = [], draw.draw_from
    monkeypatch.setattr(draw, "draw_from", lambda *a: most.append(len(next(iter((b := before(*a)).values())))) or b)
    assert list(draw.write_samples(load(trained), tmp_path, 0, 40, 0)) == [16, 32, 40]
    assert most == [16, 16, 8]


@pytest.mark.parametrize(
    "line",
    [
        "sketch {photos} {tmp}/x --size 32",
        "render {run} --sketches {photos} --out {tmp}/x",
        "sample {run} --n 8 --out {tmp}/x",
    ],
)
def test_a_full_disk_stops_and_says_how_many_are_written(medsketch, photos, trained, tmp_path, monkeypatch, line):
    from medsketch import core

    before, n = core.save_png, []

    def full(path, x):
        n.append(path)
        if len(n) > 4:
            disk_full()
        before(path, x)

    monkeypatch.setattr(core, "save_png", full)
    status, _, err = medsketch(line.format(photos=photos, run=trained, tmp=tmp_path))
    assert (
        status == 1
        and "No space left" in err
        and "are written" in err
        and "skipped" not in err
        and err.count("\n") == 1
    )


# ---- what people and programs read --------------------------------------------------------------------


def test_inspect_says_what_was_understood(medsketch, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = medsketch(f"inspect {photos} --size 32")
    assert (status, err) == (0, "") and "images    8" in out and "subjects" in out
    assert pixels(tmp_path / "contact-sheet.png").ndim == 3
    medsketch(f"inspect {photos} --size 32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["contact-sheet-1.png", "contact-sheet.png"]


def test_privacy_raises_the_alarm_for_copies(medsketch, tmp_path):
    for name, seed in {"train": 0, "new": 1}.items():
        (tmp_path / name).mkdir()
        for i, x in enumerate(phantom_data("lung_ct", 24, 32, seed).batch(range(24))["image"]):
            Image.fromarray(to_uint8(x)[..., 0]).save(tmp_path / name / f"{i}.png")
    status, out, err = medsketch(f"privacy {tmp_path}/train {tmp_path}/train --size 32")
    assert status == 1 and "ALARM" in err and "copies" in out
    status, out, _ = medsketch(f"privacy {tmp_path}/train {tmp_path}/new --size 32 --json --out {tmp_path}/nearest.png")
    assert status == 0 and json.loads(out)["alarm"] is False and (tmp_path / "nearest.png").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_scores_are_printed_to_any_stream(photos, encoding):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from medsketch.cli import main; main()",
            "evaluate",
            str(photos),
            str(photos),
            "--size",
            "32",
            "--resamples",
            "0",
        ],
        check=False,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert "SWD" in done.stdout.decode(encoding)


def test_json_has_no_nan(medsketch, photos):
    status, out, _ = medsketch(
        f"evaluate {photos} {photos} --size 32 --json --resamples 0 --metrics swd,ms_ssim,diversity"
    )

    def never(constant):
        raise AssertionError(constant)

    scores = json.loads(out, parse_constant=never)
    assert (
        status == 0
        and scores["swd"]["low"] is None
        and scores["ms_ssim"]["score"] > 0
        and scores["diversity"]["score"] > 0
    )


def test_control_characters_are_never_printed_raw(medsketch, photos, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "eye.png").write_bytes((photos / "eye0.png").read_bytes())
    (folder / "bad\x1b[2J\x07.png").write_text("no picture")
    for line in (f"sketch {folder} {tmp_path}/s --size 32", f"sketch {folder}/none\x1b[2J {tmp_path}/t"):
        with pytest.raises(SystemExit):
            main(line.split(" "))
    _, out, err = medsketch(f"train dcgan --data {folder} --out {tmp_path}/run --steps 1 {SMALL}")
    assert not any(c in out + err for c in "\x1b\x07") and "bad\\x1b[2J\\x07.png" in err


def test_whatever_happens_is_one_line(medsketch, photos, tmp_path, monkeypatch):
    from medsketch.commands import data

    for error in (
        KeyError("x"),
        ZeroDivisionError(),
        AssertionError(),
        MemoryError(),
        ValueError(),
        cv2.error("OpenCV(4.9) error: (-215)"),
    ):
        monkeypatch.setattr(data, "apart", lambda *_, e=error: (_ for _ in ()).throw(e))
        status, _, err = medsketch(f"sketch {photos} {tmp_path}/x")
        assert status == 1 and err.count("\n") == 1 and len(err) > len("medsketch: \n") + 5 and "OpenCV" not in err
    monkeypatch.setattr(data, "apart", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    status, _, err = medsketch(f"sketch {photos} {tmp_path}/x")
    assert status == 130 and "interrupted" in err


def test_a_mistyped_run_is_not_looked_up(medsketch, tmp_path, monkeypatch):
    from medsketch import pretrained

    monkeypatch.setattr(pretrained, "_from_hub", lambda *_: pytest.fail("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    names = ("runs/skrgna", "./runs/x", "/no/where", "a/b/c", "~/x/nowhere", "runs/x.safetensors", "run/skrgan", "a/b")
    for name in (*names, "runs/", "x.safetensors", "a\\b"):
        for line in ("sample {} --out x", "render {} --sketches s --out x", "train skrgan --init {} --data s --out x"):
            status, _, err = medsketch(line.format(name))
            assert status == 1 and "does not exist" in err and err.count("\n") == 1, (line, name)
    assert "written hf://user/eyes" in medsketch("sample user/eyes --out x")[2]
    asked = []
    monkeypatch.setattr(pretrained, "_from_hub", lambda repo: asked.append(repo) or pretrained.WEIGHTS / "gone")
    medsketch("sample hf://user/eyes --out x")
    assert asked == ["user/eyes"]


def test_instances_can_be_inspected_and_masks_that_are_not_needed_are_not_read(medsketch, photos, tmp_path):
    for name in ("images", "masks"):
        (tmp_path / "set" / name).mkdir(parents=True)
    for i in range(4):
        Image.open(photos / f"eye{i}.png").save(tmp_path / f"set/images/{i}.png")
        ids = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32)  # a thousand instances
        Image.fromarray(ids).save(tmp_path / f"set/masks/{i}.png")
    status, out, err = medsketch(f"inspect {tmp_path}/set --size 32 --out {tmp_path}/sheet.png")
    assert (status, err) == (0, "") and "instances" in out and (tmp_path / "sheet.png").exists()
    status, out, err = medsketch(f"train dcgan --data {tmp_path}/set --out {tmp_path}/run --steps 1 {SMALL}")
    assert (status, err) == (0, "") and "masks not needed" in out
