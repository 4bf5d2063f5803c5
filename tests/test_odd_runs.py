"""Run folders and sketches that something happened to, by family: one clear line, nothing lost, or a right result."""

import json
import os
import shlex
import shutil
import struct

import numpy as np
import pytest
import torch
from faults import contents
from PIL import Image

from medsketch.cli import main
from medsketch.evaluate.moco import load_moco
from medsketch.evaluate.retrieve import index_header
from medsketch.evaluate.segment import Segmenter
from medsketch.recipes import DCGAN, SkrGAN, load_recipe
from medsketch.train.checkpoints import checkpoints
from medsketch.train.stages import read_config

TINY = "--scale tour --steps 2 --every 2 --set ngf=4 --set ndf=4 --set latent_dim=8 --set batch_size=2"


def run(line):
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    return stop.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A finished run"
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run(f"train dcgan --data phantoms:fundus:8 --size 32 --out {out} {TINY}") == 0
    return out


@pytest.fixture
def broken(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def entry(**what):
    "Change entries of config.json; those of a dictionary one by one"

    def change(d):
        found = json.loads((d / "config.json").read_text())
        for k, v in what.items():
            found[k] = found[k] | v if isinstance(v, dict) and isinstance(found.get(k), dict) else v
        (d / "config.json").write_text(json.dumps(found))

    return change


def text(name, content):
    return lambda d: (d / name).write_bytes(content)


def folder(name):
    "A folder where a file should be"
    return lambda d: ((d / name).unlink(), (d / name).mkdir())


def weights(change):
    def harm(d):
        path = d / "weights.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return harm


CONFIGS = {
    "empty": (text("config.json", b""), "cannot be read"),
    "no table": (text("config.json", b"[1, 2]"), "cannot be read"),
    "an empty list": (text("config.json", b"[]"), "is empty"),
    "nothing": (text("config.json", b"null"), "cannot be read"),
    "a number": (text("config.json", b"3"), "cannot be read"),
    "no text": (text("config.json", b"\xff\xfe\0"), "cannot be read"),
    "cut": (lambda d: text("config.json", (d / "config.json").read_bytes()[:40])(d), "cannot be read"),
    "very deep": (text("config.json", b"[" * 100_000), "cannot be read"),
    "a folder": (folder("config.json"), "holds no run"),
    "recipe is a number": (entry(recipe=3), "odd 'recipe'"),
    "recipe is unknown": (entry(recipe="stargan"), "no recipe is called 'stargan'"),
    "another recipe": (entry(recipe="wgan"), "no argument"),
    "arguments are a list": (lambda d: set_to(d, "config", [1]), "odd 'config'"),
    "arguments are a text": (lambda d: set_to(d, "config", "size"), "odd 'config'"),
    "an argument of a wrong type": (entry(config={"size": "x"}), "size='x'"),
    "an argument out of range": (entry(config={"ngf": 0}), "at least 1"),
    "an unknown argument": (entry(config={"foo": 1}), "no argument 'foo'"),
    "notes are a list": (lambda d: set_to(d, "train", [1]), "odd 'train'"),
    "notes are a text": (lambda d: set_to(d, "train", "x"), "odd 'train'"),
    "data is a number": (entry(train={"data": 3}), "odd 'data'"),
    "every is a text": (entry(train={"every": "often"}), "odd 'every'"),
    "stages is a text": (entry(train={"stages": "gan"}), "odd 'stages'"),
    "no such data": (entry(train={"data": "/no/where"}), "no such folder"),
    "init is a number": (entry(init=3), "odd 'init'"),
    "frozen is a number": (entry(frozen=3), "odd 'frozen'"),
    "networks of terabytes": (entry(config={"ngf": 4096, "size": 1024}), "of memory are free"),
    "other images": (entry(data="0123"), "another data"),
    "another number of images": (entry(images="many"), "another images"),
}


def set_to(d, name, value):
    found = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(found | {name: value}))


@pytest.mark.parametrize("case", CONFIGS)
def test_an_odd_configuration_is_one_line_and_stays_as_it_is(broken, capsys, case):
    harm, words = CONFIGS[case]
    harm(broken)
    before = contents(broken)
    capsys.readouterr()
    assert run(f"train --resume {broken}") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("medsketch: ") and words in err, err
    assert "Error" not in err and contents(broken) == before


HUGE = {
    "ngf": ({"ngf": 4096}, r"this recipe needs|of memory are free"),
    "size": ({"size": 1024}, "this recipe and the file differ|this recipe needs"),
    "wider than the file": ({"ngf": 64}, "this recipe needs"),
}


@pytest.mark.parametrize("case", HUGE)
def test_shapes_are_compared_before_networks_take_memory(trained, broken, monkeypatch, case):
    change, words = HUGE[case]
    path, built = broken / "weights.safetensors", []
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + n])
    about = json.loads(head["__metadata__"]["medsketch"])
    head["__metadata__"]["medsketch"] = json.dumps(about | {"config": about["config"] | change})
    new = json.dumps(head).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + n :])
    networks = DCGAN.networks
    monkeypatch.setattr(DCGAN, "networks", lambda r: built.append(torch.empty(0).is_meta) or networks(r))
    with pytest.raises(ValueError, match=words):
        load_recipe(broken)
    assert built == [True]
    load_recipe(trained)
    assert built[1:] == [True, True, False]  # compared with the file, then with the memory, then made


WIDE = {
    "dcgan": "ngf=4096",
    "dualgan": "ngf_max=65536 ngf=4096",
    "skrgan": "ngf_max=65536 ngf=4096",
    "pggan": "widths=" + json.dumps({4 * 2**i: 65_536 for i in range(9)}, separators=(",", ":")),
    "pgsgan": "ngf=4096",
    "stylegan2": "fmap_max=65536 fmap_base=1048576",
    "sketch2medi": "fmap_max=65536 fmap_base=1048576",
}


@pytest.mark.parametrize("recipe", WIDE)
def test_networks_larger_than_memory_are_refused_before_anything_is_read(tmp_path, capsys, recipe):
    wide = " ".join(f"--set {shlex.quote(k)}" for k in WIDE[recipe].split())
    assert run(f"train {recipe} --data {tmp_path}/none --out {tmp_path}/run --size 1024 --scale gpu {wide}") == 1
    err = capsys.readouterr().err
    assert "of memory are free" in err and err.count("\n") == 1


flip = lambda b: b[:-100] + bytes([b[-100] ^ 1]) + b[-99:]
WEIGHTS = {
    "empty": (weights(lambda b: b""), "not a file that medsketch saved"),
    "cut": (weights(lambda b: b[: len(b) // 2]), "not a file that medsketch saved"),
    "too long": (weights(lambda b: b + b"\0" * 64), "not a file that medsketch saved"),
    "one bit flipped": (weights(flip), "is damaged"),
    "zeros in the middle": (weights(lambda b: b[:-4000] + b"\0" * 2000 + b[-2000:]), "is damaged"),
    "a header of exabytes": (weights(lambda b: struct.pack("<Q", 2**60) + b[8:]), "not a file that medsketch saved"),
    "no header": (weights(lambda b: b[8:]), "not a file that medsketch saved"),
    "a text": (weights(lambda b: b"hello"), "not a file that medsketch saved"),
    "gone": (lambda d: (d / "weights.safetensors").unlink(), "does not exist"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_damaged_weights_are_noticed_and_written_anew(trained, broken, tmp_path, capsys, case):
    harm, words = WEIGHTS[case]
    harm(broken)
    capsys.readouterr()
    assert run(f"sample {broken} --n 2 --out {tmp_path}/new") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err and not (tmp_path / "new").exists()
    assert run(f"train --resume {broken}") == 0  # the checkpoint has them
    assert (broken / "weights.safetensors").read_bytes() == (trained / "weights.safetensors").read_bytes()


LINES = np.full((32, 32), 255, np.uint8)
LINES[10:20, 14:16] = 0
SKETCHES = {
    "white": LINES * 0 + 255,
    "black": LINES * 0,
    "grey": LINES * 0 + 128,
    "light on dark": 255 - LINES,
    "16 bits": LINES.astype(np.uint16) * 257,
    "bilevel": Image.fromarray(LINES).convert("1"),
    "palette": Image.fromarray(LINES).convert("P"),
    "grey and alpha": np.dstack([LINES, LINES]),
    "float": LINES.astype(np.float32) / 255,
    "cmyk": Image.fromarray(np.dstack([LINES] * 3)).convert("CMYK"),
    "one pixel": LINES[:1, :1],
    "a line of pixels": np.full((1, 300), 255, np.uint8),
    "large": np.full((1500, 1000), 255, np.uint8),
}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "r.safetensors"
    SkrGAN(size=32, fmap_base=64, fmap_max=8, latent_dim=8, ngf=4, ndf=4, receptive_field=34).save(path)
    return path


@pytest.mark.parametrize("case", SKETCHES)
def test_every_form_of_sketch_is_rendered(renderer, tmp_path, capsys, case):
    a = SKETCHES[case]
    im = a if isinstance(a, Image.Image) else Image.fromarray(a)
    (tmp_path / "in").mkdir()
    im.save(tmp_path / "in" / ("a.tif" if im.mode in ("F", "CMYK") else "a.png"))
    assert run(f"render {renderer} --sketches {tmp_path}/in --out {tmp_path}/out") == 0
    w, h = Image.open(tmp_path / "out/a.png").size
    assert max(w, h) == 32 and min(w, h) == max(1, round(32 * min(im.size) / max(im.size)))


def bomb(path):
    "A picture that says that it has four thousand million pixels"
    Image.new("L", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    path.write_bytes(data)


NO_SKETCHES = {
    "a folder called so": lambda p: p.mkdir(),
    "a pipe": os.mkfifo,
    "a link to nothing": lambda p: p.symlink_to("nowhere"),
    "eps": lambda p: Image.fromarray(LINES).convert("RGB").save(p, format="EPS"),
    "too many pixels": bomb,
    "empty": lambda p: p.touch(),
    "text": lambda p: p.write_text("hello"),
    "half a picture": lambda p: (Image.fromarray(SKETCHES["large"]).save(p), p.write_bytes(p.read_bytes()[:60])),
}


@pytest.mark.parametrize("case", NO_SKETCHES)
def test_what_is_no_sketch_is_left_out_and_the_good_one_is_rendered(renderer, tmp_path, capsys, case):
    (tmp_path / "in").mkdir()
    NO_SKETCHES[case](tmp_path / "in/bad.png")
    line = f"render {renderer} --sketches {tmp_path}/in --out {tmp_path}/out"
    assert run(line) == 1 and not (tmp_path / "out").exists()
    err = capsys.readouterr().err.splitlines()
    assert len(err) <= 2 and err[-1].startswith("medsketch: no") and "Traceback" not in str(err)
    Image.fromarray(LINES).save(tmp_path / "in/good.png")
    assert run(line) == 0 and [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]


def test_there_are_more_than_fifty():
    assert sum(map(len, (CONFIGS, WEIGHTS, SKETCHES, NO_SKETCHES))) > 50


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_where_a_file_should_be_is_refused_and_never_waited_for(broken, tmp_path):
    "Nothing would ever be written into it"
    for name in ("weights.safetensors", "config.json"):
        (broken / name).unlink()
        os.mkfifo(broken / name)
    for read in (load_recipe, load_moco, Segmenter.load):
        with pytest.raises(ValueError, match="(?i)not a file that medsketch saved|no such file"):
            read(broken)
    with pytest.raises(ValueError, match="is empty"):
        read_config(broken)
    assert index_header(broken / "weights.safetensors") is None
    os.mkfifo(tmp_path / "000003.pt")
    assert checkpoints(tmp_path) == []
