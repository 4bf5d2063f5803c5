"""Two hundred ways to get a command line wrong, by family: one clear line, the right status, nothing written."""

import inspect
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from medsketch.cli import main
from medsketch.commands.tools import distinct, free
from medsketch.core import to_uint8
from medsketch.data import phantom_data
from medsketch.models import factory
from medsketch.models.factory import check_batch
from medsketch.recipes import DCGAN, RECIPES, DualGAN, SkrGAN
from medsketch.recipes.arguments import BOUNDS, POSITIVE, UNTYPED, check_argument, check_arguments

SKR = "train skrgan --data {photos} --out x --scale tour "
DC = "train dcgan --data {photos} --out x --scale tour "
GO = "train --resume {run} "
CMP = "compare --data {photos} --out x --size 32 --n 12 --recipes skrgan,dcgan --scale tour "


def sets(start, table):
    "{argument=value: words} -> {command line: (status, words)}"
    return {f"{start}--set {shlex.quote(k)}": (1, words) for k, words in table.items()}


TYPES = sets(
    SKR,
    {
        "ngf=abc": "ngf='abc': a whole number",
        "ngf=2.5": "whole number",
        "ngf=true": "whole number",
        "ngf=null": "ngf",
        "ngf=[4]": "ngf=[4]",
        "batch_size=2.5": "batch_size=2.5",
        "batch_size=x": "batch_size='x'",
        "lam=x": "lam='x'",
        "lam=NaN": "lam=nan",
        "lam=Infinity": "lam=inf",
        "r1=yes": "r1='yes'",
        "latent_dim=1e3": "latent_dim=1000.0",
        "render_steps=many": "render_steps",
        "render_steps=1.5": "render_steps=1.5",
        "position=1": "true or false",
        "variants=maybe": "true or false",
        "depth=deep": "depth",
        "style=3": "style=3",
        "loss=1": "loss=1",
        "augment=true": "augment=True",
        "seed=now": "seed",
        "seed=0.5": "seed=0.5",
        "batches=[1,2]": "batches=[1, 2]",
        'batches={"32": "x"}': "not a whole number",
        'batches={"30": 5}': "no resolution",
        'batches={"a": 5}': "no resolution",
        "batches={}": "empty table",
        'widths={"32": 1.5}': "not a whole number",
        "widths=3": "widths=3",
        "renderer=3": "renderer=3",
        "size=abc": "size='abc'",
        "size=32.5": "size=32.5",
        "channels=rgb": "channels='rgb'",
        "start=first": "start",
        "ada=often": "ada='often'",
        "diffaugment=3": "diffaugment=3",
    },
)

RANGES = sets(
    SKR,
    {
        "ngf=0": "at least 1",
        "ngf=-4": "at least 1",
        "ngf=1000000": "4096 at most",
        "ndf=0": "at least 1",
        "batch_size=0": "at least 1",
        "batch_size=-1": "at least 1",
        "batch_size=1000000": "65536 at most",
        "lr_sketch=0": "above 0",
        "lr_sketch=-0.1": "above 0",
        "lr_sketch=2": "1 at most",
        "lam=-1": "at least 0",
        "r1=-1": "at least 0",
        "r1_every=0": "at least 1",
        "batches=-2": "at least 1",
        "batches=0": "at least 1",
        "batches=10000000000": "1000000000 at most",
        "render_steps=-1": "at least 0",
        "joint_steps=-5": "at least 0",
        "latent_dim=0": "at least 1",
        "fmap_max=0": "at least 1",
        "fmap_base=0": "at least 1",
        "depth=0": "at least 1",
        "depth=99": "10 at most",
        "receptive_field=0": "at least 1",
        "ada=2": "1 at most",
        "consistency=-1": "at least 0",
        "channels=0": "at least 1",
        "channels=1000": "64 at most",
        "size=0": "power of two",
        "size=100": "nearest is 128",
        "size=8": "nearest is 16",
        "size=100000": "nearest is 1024",
        "start=3": "3",
        "seed=100000000000000000000": "at most",
        'batches={"4": 1, "8": 1, "16": 1, "32": 0}': "at least 1",
        'batch_size={"4": 0}': "at least 1",
        "receptive_field=64": "receptive_field",
    },
)

CHOICES = sets(
    SKR,
    {
        "style=cubist": "cubist",
        "augment=shake": "use one of none",
        "loss=hinge": "logistic",
        "diffaugment=shake": "shake",
        "colour=red": "no argument 'colour'",
        "nfg=32": "no argument 'nfg'",
        "self=1": "no argument 'self'",
        "ngf": "name=value",
        "ngf=": "name=value",
        "=3": "name=value",
        "size=": "name=value",
        "channels=": "name=value",
        'renderer={"factory": "os:system"}': "os:system",
        "skrgan.ngf=3": "no argument",
    },
)

OTHERS = (
    sets(
        "train wgan --data {photos} --out x --scale tour ",
        {
            "clip=0": "above 0",
            "clip=-1": "above 0",
            "clip=x": "clip='x'",
            "critic=1.5": "critic=1.5",
            "critic=0": "at least 1",
            "lr=0": "above 0",
            "lr=fast": "lr='fast'",
            "steps=0": "at least 1",
            "steps=-2": "at least 1",
            "steps=two": "steps='two'",
            "diffaugment=nothing": "nothing",
            "ada=x": "ada='x'",
        },
    )
    | sets(
        "train acgan --data {photos} --out x --scale tour ",
        {"pseudo=0": "at least 1", "pseudo=2.5": "pseudo=2.5", "classes=3": "classes=3"},
    )
    | sets(
        "train dualgan --data {photos} --out x --scale tour ",
        {
            "classes=1": "at least 2",
            "mask_steps=0": "at least 1",
            "soft=-1": "at least 0",
            "speck=-1": "at least 0",
            "speck=0.5": "speck=0.5",
            "lr=true": "lr=True",
        },
    )
)

OPTIONS = {
    DC + "--every 0": (1, "--every 0: at least 1"),
    DC + "--every -1": (1, "--every -1"),
    DC + "--every x": (2, "--every"),
    DC + "--size 0": (1, "power of two"),
    DC + "--size -32": (1, "power of two"),
    DC + "--size 33": (1, "nearest is 32"),
    DC + "--size big": (2, "--size"),
    DC + "--steps 0": (1, "at least 1"),
    DC + "--steps -3": (1, "at least 1"),
    DC + "--steps 1.5": (2, "--steps"),
    DC + "--minutes 0": (1, "--minutes 0"),
    DC + "--minutes -5": (1, "--minutes -5"),
    DC + "--minutes nan": (1, "--minutes nan"),
    DC + "--minutes soon": (2, "--minutes"),
    DC + "--minutes 5 --steps 5": (1, "say one"),
    DC + "--precision fp8": (1, "no, bf16 or fp16"),
    DC + "--seed x": (2, "--seed"),
    DC + "--channels 0": (1, "at least 1"),
    DC + "--channels 99": (1, "at most"),
    DC + "--channels 1 --set channels=3": (1, "say it once"),
    DC + "--seed 1 --set seed=2": (1, "--set seed=2 and --seed 1: say it once"),
    DC + "--size 32 --set size=64": (1, "--set size=64 and --size 32: say it once"),
    SKR + "--style generic --set style=fundus": (1, "say it once"),
    DC + "--style fundus": (1, "no argument 'style'"),
    DC + "--stages paint": (1, "no stage is called 'paint'"),
    DC + "--stages ''": (1, "--stages is empty"),
    DC + "--log-with paper": (1, "tensorboard"),
    DC + "--log-with ''": (1, "--log-with is empty"),
    DC + "--evaluate beauty": (1, "while training there are"),
    DC + "--evaluate ''": (1, "--evaluate is empty"),
    DC + "--evaluate fid --features none": (1, "no features are called"),
    DC + "--best fid": (1, "needs --evaluate fid"),
    DC + "--evaluate precision --best precision": (1, "highest"),
    DC + "--init nowhere": (1, "no weights are called"),
    DC + "--init ./nowhere": (1, "does not exist"),
    DC + "--init fundus": (1, "no network in common"),
    DC + "--init fundus --init lung_ct": (1, "one run for all"),
    DC + "--init G=./nowhere": (1, "does not exist"),
    DC + "--init X=fundus": (1, "no network is called 'X'"),
    SKR + "--scale huge": (1, "tour, cpu, gpu, paper"),
    SKR + "--style cubist": (1, "cubist"),
    "train skrgan --data {photos}": (2, "--out"),
    "train skrgan --out x": (2, "--data"),
    "train": (2, "'recipe'"),
    "train stargan --data {photos} --out x": (1, "skrgan"),
    "train {run} --data {photos} --out x": (1, "--resume"),
}

RESUME = {
    "train --resume": (2, "--resume RUN"),
    "train --resume nowhere": (1, "holds no run"),
    "train --resume {empty}": (1, "holds no run"),
    "train {empty} --resume": (1, "holds no run"),
    "train --resume skrgan": (2, "--out"),
    "train --resume --out nowhere": (1, "holds no run"),
    "train skrgan --resume --out {run} --data {photos}": (1, "of dcgan, not skrgan"),
    "train dcgan --data {photos} --out {run} --scale tour": (1, "add --resume"),
    GO + "--steps 9": (1, "--steps 2, not 9"),
    GO + "--set ngf=8": (1, "ngf 4, not 8"),
    GO + "--size 64": (1, "size 32, not 64"),
    GO + "--seed 5": (1, "seed 0, not 5"),
    GO + "--scale gpu": (1, "--scale tour, not gpu"),
    GO + "--every 7": (1, "--every 2, not 7"),
    GO + "--channels 1": (1, "channels"),
    GO + "--set depth=3": (1, "depth"),
    GO + "--data phantoms:lung_ct:12 --channels 3": (1, "3"),
    GO + "--data phantoms:fundus:13": (1, "another"),
    GO + "--data ''": (1, "--data is empty"),
    GO + "--stages paint": (1, "no stage"),
    "train --resume {torn}": (1, "cannot be read"),
}

EARLY = {
    "train dcgan --data nowhere --out {text} --scale tour": (1, "cannot write to"),
    "train dcgan --data nowhere --out {text}/run --scale tour": (1, "is no folder"),
    "train dcgan --data nowhere --out x --stages paint": (1, "no stage is called 'paint'"),
    "train dcgan --data nowhere --out x --set size=1024 --set batch_size=65536": (1, "choose a smaller batch_size"),
    "train skrgan --data nowhere --out x --stages joint": (1, "stage joint has 0 steps"),
    "train sketch2medi --data nowhere --out x --scale tour --stages paint": (1, "there are: segment, gan, moco"),
    "train sketch_synth --data nowhere --out x --scale tour --stages paint": (1, "there are: segment"),
}

SOURCES = {
    "train dcgan --data '' --out x": (1, "--data is empty"),
    "train dcgan --data ' ' --out x": (1, "--data is empty"),
    "train dcgan --data {photos} --out ''": (1, "--out is empty"),
    "train dcgan --data nowhere --out x": (1, "no such folder"),
    "train dcgan --data {empty} --out x": (1, "no images"),
    "train dcgan --data {text} --out x": (1, "no"),
    "train dcgan --data {junk} --out x": (1, "none of the 2 images"),
    "train dcgan --data phantoms:toe --out x": (1, "unknown phantom"),
    "train dcgan --data phantoms: --out x": (1, "unknown phantom"),
    "train dcgan --data phantoms:fundus:0 --out x": (1, "1 to 100000"),
    "train dcgan --data phantoms:fundus:-5 --out x": (1, "1 to"),
    "train dcgan --data phantoms:fundus:1000000000 --out x": (1, "1 to 100000"),
    "train dcgan --data phantoms:fundus:many --out x": (1, "1 to 100000"),
    "train dcgan --data phantoms:fundus:1:2 --out x": (1, "1 to 100000"),
    "train dcgan --data phantoms:fundus:8 --channels 1 --out x --scale tour": (1, "3 channels, not 1"),
    "inspect nowhere": (1, "no such folder"),
    "inspect ''": (1, "is empty"),
    "inspect {empty}": (1, "no images"),
    "inspect {photos} --size 0": (1, "power of two"),
    "inspect {photos} --n 0": (1, "--n 0"),
    "inspect {photos} --channels -1": (1, "--channels -1"),
    "inspect {photos} --out {photos}/sheet.png": (1, "inside"),
    "inspect {photos} --out {text}": (1, "already"),
    "inspect {photos} --out sheet.jpg": (1, "the contact sheet is a .png"),
    "inspect {photos} --out sheet": (1, "the contact sheet is a .png"),
    "inspect 'a\0b'": (1, "cannot be the name of a file"),
    "inspect": (2, "'data'"),
}

OUTPUTS = {
    "sketch {photos} {photos}": (1, "both input and output"),
    "sketch {photos} {photos}/s": (1, "inside"),
    "sketch {photos} {photos}/../photos": (1, "both"),
    "sketch {photos} {link}": (1, "both"),
    "sketch {photos} ''": (1, "--out is empty"),
    "sketch {photos} {drawn} --size 32": (1, "there already"),
    "render {renderer} --sketches {drawn} --out {drawn}": (1, "both input and output"),
    "render {renderer} --sketches {drawn} --out {drawn}/r": (1, "inside"),
    "render {renderer} --sketches {drawn} --out ''": (1, "empty"),
    "render {run} --sketches {drawn} --out {run}": (1, "both input and output"),
    "render {renderer} --sketches '' --out x": (1, "--sketches is empty"),
    "train dcgan --data {photos} --out {photos} --scale tour": (1, "both"),
    "train dcgan --data {photos} --out {photos}/run --scale tour": (1, "inside"),
    "train dcgan --data {photos} --out {text}/run --scale tour --steps 1": (1, "cannot write"),
    CMP + "--out {photos}/c": (1, "inside"),
    "sample {weights} --out {photos}": (1, "something else"),
    "sample {weights} --out {text}/x": (1, "text"),
    "export {weights} --out {photos}": (1, "something else"),
    "export {weights} --out {photos}/e --train {photos}": (1, "inside"),
    "privacy {photos} {photos} --out {photos}/p.png": (1, "inside"),
    "sample {weights} --out {samples} --seed 9": (1, "other samples"),
    "sample {renderer} --out {samples}": (1, ""),
}

DRAWING = {
    "sample {weights} --out x --n 0": (1, "at least one"),
    "sample {weights} --out x --n -1": (1, "at least one"),
    "sample {weights} --out x --n 1000000000": (1, "GB"),
    "sample {weights} --out x --n few": (2, "--n"),
    "sample {weights} --out x --shard 0": (1, "--shard 0"),
    "sample {weights} --out x --shard -4": (1, "--shard -4"),
    "sample {weights} --out {samples} --shard 2": (1, "other samples"),
    "export {weights} --out x --shard 0": (1, "--shard 0"),
    "sample {weights} --out x --seed x": (2, "--seed"),
    "sample {weights}": (2, "--out"),
    "sample": (2, "'run'"),
    "sample ./nowhere --out x": (1, "does not exist"),
    "sample {empty}/run --out x": (1, "does not exist"),
    "sample nowhere.safetensors --out x": (1, "does not exist"),
    "sample a/b/c --out x": (1, "does not exist"),
    "sample '' --out x": (1, "is empty"),
    "sample {empty} --out x": (1, "does not exist"),
    "sample {text} --out x": (1, "not a file that medsketch saved"),
    "sample {photos}/eye0.png --out x": (1, "not a file"),
    "sample {fake} --out x": (1, "not a file that medsketch saved"),
    "render {weights} --sketches {drawn} --out x": (1, "does not render"),
    "render {renderer} --sketches {empty} --out x": (1, "no sketches"),
    "render {renderer} --sketches nowhere --out x": (1, "no sketches"),
    "render {renderer} --out x": (2, "--sketches"),
    "export {weights} --n 0 --out x": (1, "n=0"),
    "export {weights} --n 1000000000 --out x": (1, "GB"),
    "export {weights} --format zip --out x": (1, "use one of"),
    "export {weights} --train '' --out x": (1, "--train is empty"),
    "export {weights} --n 4 --modality mr --out x": (1, "modality"),
    "export {weights} --n 4 --train {photos} --out x": (1, "at least 10"),
    "export {text} --out x": (1, "not a file"),
}

SCORES = {
    "evaluate {photos} {photos} --metrics beauty": (1, "no score is called 'beauty'"),
    "evaluate {photos} {photos} --metrics ''": (1, "empty"),
    "evaluate {photos} {empty}": (1, "no images"),
    "evaluate nowhere {photos}": (1, "no such folder"),
    "evaluate '' {photos}": (1, "empty"),
    "evaluate {photos} {photos} --size 0": (1, "power of two"),
    "evaluate {photos} {photos} --resamples -1": (1, "--resamples -1"),
    "evaluate {photos} {photos} --most 0": (1, "--most 0"),
    "evaluate {photos} {photos} --most 3": (1, "too few"),
    "evaluate {photos} {photos} --metrics fid --features thumbnails --size 32": (1, "at least 24 and 12"),
    "evaluate {photos} {photos} --metrics fid --features ''": (1, "--features is empty"),
    "evaluate {photos} {photos} --metrics fid --features none": (1, "no features are called"),
    "evaluate {photos} {photos} --metrics continuity --size 32": (1, "segmenter"),
    "evaluate {photos}": (2, "'fake'"),
    "evaluate {photos} {photos} --segmenter {text} --metrics continuity": (1, "text"),
    "privacy {photos} {photos} --size 32": (1, "at least 10"),
    "privacy {photos}": (2, "'fake'"),
    "privacy nowhere {photos}": (1, "no such"),
    CMP + "--set x=1": (1, "has an argument 'x'"),
    CMP + "--set skrgna.ngf=3": (1, "--set skrgna.ngf: 'skrgna' is not compared"),
    CMP + "--set nfg=3": (1, "--set nfg: none of skrgan, dcgan has an argument 'nfg'"),
    CMP + "--set skrgan.x=3": (1, "no argument 'x'"),
    CMP + "--set size=": (1, "name=value"),
    CMP + "--set channels=1": (1, "--channels"),
    CMP + "--set ngf=abc": (1, "ngf='abc'"),
    CMP + "--set dcgan.lr=0": (1, "above 0"),
    CMP + "--seeds a,b": (1, "whole numbers"),
    CMP + "--seeds ''": (1, "--seeds"),
    CMP + "--size 0": (1, "power of two"),
    CMP + "--every 0": (1, "--every 0"),
    CMP + "--n 0": (1, "--n 0"),
    CMP + "--steps 0": (1, "--steps 0"),
    CMP + "--precision x": (1, "bf16"),
    CMP + "--scale x": (1, "tour"),
    CMP + "--metrics beauty": (1, "beauty"),
    CMP + "--recipes stargan": (1, "no recipe is called"),
    CMP + "--recipes ''": (1, "empty"),
    CMP + "--resamples x": (2, "--resamples"),
    CMP: (1, "at least 12"),
    CMP + "--reference nowhere --metrics swd": (1, "no such"),
}

OTHER_COMMANDS = {
    "demo --size 100": (1, "nearest is 128"),
    "demo --size 0": (1, "power of two"),
    "demo --size 16": (1, "nearest is 32"),
    "demo --steps 0": (1, "--steps 0"),
    "demo --images 12": (1, "at least 16"),
    "demo --images 1000000000": (1, "at most"),
    "demo --kind toe": (1, "no phantom"),
    "demo --kind ''": (1, "no phantom"),
    "demo --minutes -1": (1, "--minutes -1"),
    "demo --minutes nan": (1, "--minutes nan"),
    "demo --out ''": (1, "--out is empty"),
    "sketch {photos} x --style cubist": (1, "cubist"),
    "sketch {photos} x --method pencil": (1, "sobel, canny, contour"),
    "sketch {photos} x --size 100": (1, "nearest is 128"),
    "sketch {junk} x": (1, "none of the 2"),
    "sketch nowhere x": (1, "no such"),
    "sketch {photos}": (2, "'out'"),
    "studio kidney": (1, "no weights are called kidney"),
    "studio ./kidney": (1, "does not exist"),
    "studio fundus --port 700000": (1, "choose another --port"),
    "studio fundus --port x": (2, "--port"),
    "studio fundus --out ''": (1, "empty"),
    "lab {text}/below": (1, "cannot write notebooks"),
    "lab x --port 99999999": (1, "--port"),
    "lab ''": (1, "empty"),
    "pretrain kidney --out x": (1, "no packaged renderer"),
    "pretrain fundus --out x --every 0": (1, "--every 0"),
    "pretrain fundus --out ''": (1, "empty"),
    "paint": (2, "paint"),
    "--paint": (2, "--paint"),
    "train --paint": (2, "--paint"),
    "sketch a b c": (2, "c"),
    "evaluate a b --json yes": (2, "yes"),
}

FAMILIES = {
    "types": TYPES,
    "ranges": RANGES,
    "choices": CHOICES,
    "others": OTHERS,
    "options": OPTIONS,
    "resume": RESUME,
    "early": EARLY,
    "sources": SOURCES,
    "outputs": OUTPUTS,
    "drawing": DRAWING,
    "scores": SCORES,
    "commands": OTHER_COMMANDS,
}
CASES = [(family, line, *expected) for family, table in FAMILIES.items() for line, expected in table.items()]


@pytest.fixture(scope="session")
def around(tmp_path_factory):
    "What the lines are about: images, sketches, weights, a run, samples, and things that are none of these"
    d = tmp_path_factory.mktemp("around")
    for name in ("photos", "drawn", "empty", "junk", "torn"):
        (d / name).mkdir()
    for i, x in enumerate(phantom_data("fundus", 8, 32).batch(range(8))["image"]):
        Image.fromarray(to_uint8(x)).save(d / f"photos/eye{i}.png")
        Image.fromarray(np.full((32, 32), 255, np.uint8)).save(d / f"drawn/eye{i}.png")
    for name in ("junk/a.png", "junk/b.jpg", "text", "fake.safetensors", "torn/config.json"):
        (d / name).write_text("not what it seems")
    (d / "link").symlink_to(d / "photos")
    DCGAN(size=32, ngf=4, ndf=4, latent_dim=8).save(d / "weights.safetensors")
    small = {"size": 32, "fmap_base": 64, "fmap_max": 8, "latent_dim": 8, "ngf": 4, "ndf": 4, "receptive_field": 34}
    renderer = SkrGAN(**small)
    renderer.learned = {"G_P"}
    renderer.save(d / "renderer.safetensors")
    tiny = "--scale tour --steps 2 --every 2 --set ngf=4 --set ndf=4 --set latent_dim=8 --set batch_size=2"
    assert run(f"train dcgan --data {d}/photos --out {d}/run {tiny}") == 0
    assert run(f"sample {d}/weights.safetensors --out {d}/samples --n 2") == 0
    return d


def run(line):
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    return stop.value.code


def tree(*folders):
    "Every file with its time and size"
    return {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for f in folders for p in f.rglob("*") if not p.is_dir()}


@pytest.mark.parametrize(("family", "line", "status", "words"), CASES, ids=[f"{f}: {x}" for f, x, *_ in CASES])
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    around, tmp_path, monkeypatch, capsys, family, line, status, words
):
    monkeypatch.chdir(tmp_path)
    names = {p.name: p for p in around.iterdir()}
    names |= {
        "weights": around / "weights.safetensors",
        "renderer": around / "renderer.safetensors",
        "fake": around / "fake.safetensors",
    }
    before = tree(around, tmp_path)
    capsys.readouterr()
    for name, path in names.items():
        line = line.replace("{" + name + "}", str(path))
    found = run(line)
    out, err = capsys.readouterr()
    said = [x for x in err.splitlines() if not x.startswith("skipped ")]
    assert found == status, err
    assert len(said) == 1 and said[0].startswith("medsketch: ") and len(said[0]) > len("medsketch: ") + 8, err
    assert words in said[0]
    assert "Traceback" not in out + err and "OpenCV" not in err and "Errno" not in err
    assert tree(around, tmp_path) == before


def test_there_are_two_hundred():
    assert len(CASES) >= 200 and len({line for _, line, *_ in CASES}) == len(CASES)


def test_presets_and_defaults_pass():
    for cls in RECIPES.values():
        defaults = {k: p.default for k, p in inspect.signature(cls).parameters.items()}
        assert check_arguments(cls, defaults) is defaults
        for preset in cls.presets.values():
            check_arguments(cls, preset)


def test_every_argument_of_ours_has_bounds_or_is_no_number():
    "A new recipe's arguments are added to the table, or bring their own"
    for cls in RECIPES.values():
        for k, p in inspect.signature(cls).parameters.items():
            text = f"{p.annotation} {UNTYPED.get(k, '')}"
            number = (
                isinstance(p.default, (int, float))
                and not isinstance(p.default, bool)
                or "int" in text
                or "float" in text
            )
            assert not number or k in (*BOUNDS, *POSITIVE, "size", "start"), f"{cls.name}: {k}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ngf", np.int64(3)),
        ("lam", 3),
        ("lam", np.float32(0.5)),
        ("batches", {"32": 5}),
        ("batch_size", {32: 4}),
        ("depth", None),
        ("seed", -1),
        ("style", "fundus"),
    ],
)
def test_what_fits_passes(name, value):
    check_arguments(SkrGAN, {name: value})


def test_an_annotation_brings_its_bounds():
    from typing import Annotated

    check_argument("heat", 0.5, Annotated[float, (0, 1)])
    with pytest.raises(ValueError, match="heat=2: 1 at most"):
        check_argument("heat", 2, Annotated[float, (0, 1)])
    with pytest.raises(ValueError, match="whole number"):
        check_argument("classes", 2.5, inspect.signature(DualGAN).parameters["classes"].annotation)


def test_the_memory_of_a_batch_is_foreseen(monkeypatch):
    "One line before anything is allocated: refused where a first layer's maps do not fit, a warning where it is near"
    monkeypatch.setattr(factory.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    monkeypatch.setattr(factory, "default_device", lambda: torch.device("cpu"))
    config = {"size": 256, "channels": 3, "ngf": 64}
    with pytest.raises(ValueError, match="64 images of 256 px needs 1.1 GB.* choose a smaller batch_size"):
        check_batch(config | {"batch_size": 64})
    with pytest.raises(ValueError, match="9,000 images of 32 px"):
        check_batch(config | {"batch_size": {"32": 9000, "256": 1}})
    with pytest.warns(UserWarning, match="if memory runs out"):
        check_batch(config | {"batch_size": 16})
    check_batch(config | {"batch_size": 2})
    with pytest.raises(ValueError, match="choose a smaller batch_size"):
        DCGAN(32, ngf=4, ndf=4, latent_dim=8, batch_size=65536).fit("nowhere")


def test_names_differ_where_file_systems_see_no_case():
    names = [str(p) for p in distinct(["d/a.png", "d/A.png", "d/a-2.png", "d/b.png", "D/a.png"])]
    assert len({n.lower() for n in names}) == 5 and names[0] == "d/a.png" and names[3] == "d/b.png"


@pytest.mark.parametrize("through", ["itself", "a link", "another way"])
def test_an_input_is_replaced_for_no_option(tmp_path, through):
    own, out = tmp_path / "a.png", tmp_path / "b.png"
    own.touch()
    if through == "a link":
        out.symlink_to(own)
    place = {"itself": own, "a link": out, "another way": tmp_path / "x/../a.png"}[through]
    (tmp_path / "x").mkdir()
    for overwrite in (True, False, None):
        with pytest.raises(ValueError, match="is an input and would be replaced"):
            free([place], [own], overwrite)
    free([tmp_path / "new.png"], [own], False)
