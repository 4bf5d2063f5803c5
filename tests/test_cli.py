"""The command line: what it writes, and that every mistake is one line and an exit status."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from medsketch.cli import main
from medsketch.core import to_uint8
from medsketch.data import phantom_data

TINY = "--scale tour --steps 6 --style fundus --set batch_size=2 --set fmap_max=8 --set ngf=4 --set ndf=4 --set latent_dim=8"


@pytest.fixture
def medsketch(capsys):
    "Run a command line in this process: (exit status, stdout, stderr)"

    def run(line):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return run


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


def test_evaluate_prints_a_table_and_json(medsketch, photos, tmp_path):
    status, out, _ = medsketch(f"evaluate {photos} {photos} --size 32")
    assert status == 0 and "MS-SSIM" in out and "SWD" in out and "two halves of the real" in out
    status, out, _ = medsketch(f"evaluate {photos} {photos} --size 32 --json --metrics swd")
    scores = json.loads(out)
    assert scores["real"] == scores["fake"] == 8 and scores["used"] == 4
    assert scores["swd"]["low"] <= scores["swd"]["score"] <= scores["swd"]["high"] and scores["swd"]["real_halves"] > 0 and scores["swd"]["extractor"]


def test_compare_prints_the_papers_table_and_goes_on(medsketch, tmp_path):
    line = f"compare --data phantoms:fundus:24 --recipes dcgan,wgan --scale tour --size 32 --steps 4 --n 12 --features thumbnails --metrics swd,fid --out {tmp_path}/c"
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
    assert len(list((tmp_path / "set/images").glob("*.png"))) == 3 and "not checked" in (tmp_path / "set/DATASHEET.md").read_text().lower()
    status, _, err = medsketch(f"export {trained} --n 3 --out {tmp_path}/set2 --format parquet")
    assert status == 1 and "folder" in err and not (tmp_path / "set2").exists()


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


def test_a_launcher_trains_on_two_processes_as_on_one(photos, tmp_path):
    "The line of the command page; without a GPU too"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    line = [sys.executable, "-c", "from medsketch.cli import main; main()", *f"train dcgan --data {photos} --out {tmp_path}/run --scale tour --steps 20 --set batch_size=2".split()]
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
    "train cyclegan --data {photos} --out {tmp}/x": (1, "skrgan"),
    "train skrgan --data {photos} --out {tmp}/x --scale huge": (1, "tour, cpu, gpu, paper"),
    "train skrgan --data {photos} --out {tmp}/x --scale tour --style cubist": (1, "cubist"),
    "train skrgan --data {photos} --out {tmp}/x --set ngf": (1, "name=value"),
    "train skrgan --data {photos} --out {tmp}/x --scale tour --set colour=red": (1, "no argument 'colour'"),
    "train skrgan --data {photos} --out {tmp}/x --scale tour --steps 0": (1, "at least 1"),
    "train skrgan --data {photos} --out {tmp}/file/x --scale tour --steps 2": (1, "cannot write"),
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
    "compare --data phantoms:fundus:12 --out {tmp}/x --recipes cyclegan --n 12 --size 32": (1, "no recipe is called"),
    "compare --data {photos} --out {tmp}/x --seeds a,b --size 32": (1, "whole numbers"),
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
    done = subprocess.run([sys.executable, "-c", code, "sample", str(tmp_path), "--out", str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("medsketch: ") and "Traceback" not in done.stderr


def test_text_is_utf8_where_the_machine_speaks_something_else(tmp_path):
    code = f"from medsketch.core import atomic_write\nwith atomic_write({str(tmp_path / 't')!r}, 'w') as f: f.write('SWD \\u00d7 10\\u00b3\\n')"
    plain = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t").read_bytes() == "SWD × 10³\n".encode()


def test_demo_writes_picture_and_scores(medsketch, tmp_path):
    status, out, err = medsketch(f"demo --out {tmp_path}/demo --steps 4 --size 32 --images 16 --kinds fundus,brain_mri")
    assert status == 0, err
    assert pixels(tmp_path / "demo/demo.png").shape[2] == 3
    rows = (tmp_path / "demo/scores.csv").read_text().splitlines()
    assert [r.split(",")[0] for r in rows] == ["phantom", "fundus", "brain_mri"]
    assert "swd" in out and "demo.png" in out


def test_steps_are_all_there_are_unless_more_is_asked_for(medsketch, photos, tmp_path):
    "The scale `gpu` has a joint stage of thousands of steps"
    small = TINY.replace("tour", "gpu --size 32 --set receptive_field=34 --set fmap_base=64")
    for more, stages in (("", {"sketch", "render"}), (" --set joint_steps=3 --set render_steps=2", {"sketch", "render", "joint"})):
        out = tmp_path / str(len(stages))
        status, _, err = medsketch(f"train skrgan --data {photos} --out {out} {small}{more}")
        assert (status, err) == (0, "")
        assert {p.parent.name for p in out.glob("*/log.csv")} == stages
        last = [int(p.read_text().splitlines()[-1].split(",")[0]) for p in out.glob("*/log.csv")]
        assert sorted(last) == ([6, 6] if not more else [2, 3, 6])


def test_one_stage_alone(medsketch, photos, tmp_path):
    "A renderer for people who draw: trained without a sketch generator, and it says so when asked for sketches"
    status, _, err = medsketch(f"train skrgan --data {photos} --out {tmp_path}/run {TINY} --stages render --set variants=true --set consistency=20")
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
    medsketch(f"sketch {photos} {tmp_path}/s --style fundus --size 128")
    assert medsketch(f"render lung_ct --sketches {tmp_path}/s --out {tmp_path}/r")[0] == 0
    assert pixels(tmp_path / "r/eye0.png").shape == (128, 128)


@pytest.mark.parametrize("line, says", [
    ("studio kidney", "no weights are called kidney"), ("studio fundus --port 700000", "choose another --port"),
    ("lab {file}/below", "cannot write notebooks"), ("pretrain chest_xray --out {tmp}/x --data {tmp}", "mhh_covid")])
def test_mistakes_of_people_who_draw(medsketch, tmp_path, line, says):
    (tmp_path / "file").write_text("")
    status, _, err = medsketch(line.format(file=tmp_path / "file", tmp=tmp_path))
    assert status == 1 and says in err and err.count("\n") == 1
