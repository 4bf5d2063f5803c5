"Public sets by name, from archives in their true layout on a server of this machine: nothing here needs a network."

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsketch.data import archives, public
from medsketch.data.archives import fetch, members, noted_checksums, resuming
from medsketch.data.cases import find, find_cases, pair
from medsketch.data.masks import read_mask
from medsketch.data.public import PUBLIC, Archive, get_public

pytest.importorskip("pooch", reason="pip install 'medsketch[data]'")
RNG = np.random.default_rng(0)
ACCEPT = "--accept-licence"


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch):
    "Nothing outside the test's own folder; no proxy, no waiting, no token"
    monkeypatch.chdir(tmp_path)
    for name in [*os.environ]:
        if name.startswith("KAGGLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MEDSKETCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "kaggle"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(archives, "WAIT", 0)


class Server:
    "Files at addresses, and the ways in which a server can be odd"

    def __init__(self):
        self.files, self.asked = {}, []
        self.ranges, self.most, self.silent, self.status = True, None, False, None
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()

    def put(self, name, data):
        self.files["/" + name] = data
        return f"http://127.0.0.1:{self.http.server_port}/{name}"

    def answer(self, request):
        asked = request.headers.get("Range")
        self.asked.append((request.path, asked, request.headers.get("Authorization")))
        data = self.files.get(request.path)
        if data is None or self.status:
            return request.send_error(self.status or 404)
        start = int(re.findall(r"\d+", asked)[0]) if asked and self.ranges else 0
        if start >= len(data) > 0:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(data)}")
            request.send_header("Content-Length", "0")
            return request.end_headers()
        request.send_response(206 if start else 200)
        if not self.silent:
            request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        request.wfile.write(data[start:][: self.most])


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def picture(ending="png", a=None, **kw):
    "A picture as bytes; noise if not given"
    out = io.BytesIO()
    a = RNG.integers(20, 200, (24, 32), np.uint8) if a is None else a
    Image.fromarray(a).save(out, {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()), **kw)
    return out.getvalue()


def dot(top=255, at=8, kind=np.uint8):
    "A mask with a square of 16 pixels"
    a = np.zeros((24, 32), kind)
    a[at : at + 4, at : at + 4] = top
    return a


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
    return out.getvalue()


def tarred(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


COLOUR = RNG.integers(20, 200, (24, 32, 3), np.uint8)


def chase(n=2):
    out = {"__MACOSX/._Image_01L.jpg": b"mac"}
    for who, side in ((f"{i + 1:02d}", s) for i in range(n) for s in "LR"):
        out[f"Image_{who}{side}.jpg"] = picture("jpg", COLOUR)
        out[f"Image_{who}{side}_1stHO.png"] = picture("png", dot(True, kind=bool))
        out[f"Image_{who}{side}_2ndHO.png"] = picture("png", dot(True, 12, bool))
    return zipped(out)


def hrf():
    "Six archives, as they lie on the server of FAU"
    for k in ("h", "dr", "g"):
        ending = "JPG" if k == "dr" else "jpg"
        yield zipped({f"{i:02d}_{k}.{ending}": picture("jpg", COLOUR) for i in (1, 2)})
        yield zipped({f"{i:02d}_{k}.tif": picture("tif", dot()) for i in (1, 2)})


def stare():
    ppm = lambda a: gzip.compress(picture("ppm", a))
    names = ("im0001", "im0139")
    yield tarred({f"./{n}.ppm.gz": ppm(COLOUR) for n in names})
    for who, at in (("ah", 8), ("vk", 12)):
        yield tarred({f"./{n}.{who}.ppm.gz": ppm(dot(at=at)) for n in names})


def drive():
    "Two archives that somebody downloaded by hand; the second observer's masks hold 0 and 1"
    for part, ids in (("training", ("21", "22")), ("test", ("01", "02"))):
        out = {}
        for i in ids:
            out[f"{part}/images/{i}_{part}.tif"] = picture("tif", COLOUR)
            out[f"{part}/1st_manual/{i}_manual1.gif"] = picture("gif", dot())
            out[f"{part}/mask/{i}_{part}_mask.gif"] = picture("gif", dot(at=2))
            if part == "test":
                out[f"{part}/2nd_manual/{i}_manual2.gif"] = picture("gif", dot(1))
        yield zipped(out)


def montgomery():
    out = {}
    for n in ("MCUCXR_0001_0", "MCUCXR_0104_1"):
        out[f"MontgomerySet/CXR_png/{n}.png"] = picture()
        out[f"MontgomerySet/ClinicalReadings/{n}.txt"] = b"normal"
        for side, at in (("left", 4), ("right", 12)):
            out[f"MontgomerySet/ManualMask/{side}Mask/{n}.png"] = picture("png", dot(True, at, bool))
    return zipped(out)


def mhh():
    top = "covid-19-image-repository-master/"
    rows = "patient_id,image_id,sex\n042f06a9,b343e657,m\n042f06a9,c9280a30,m\n04a33bab,6b5af975,f\n"
    pictures = {f"{top}png/{n}.png": picture() for n in ("b343e657", "c9280a30", "6b5af975")}
    return zipped({f"{top}README.md": b"# COVID", **pictures, f"{top}data.csv": rows.encode()})


def paediatric():
    "With the copy of everything that this archive holds once more"
    names = [
        "train/PNEUMONIA/person1_bacteria_1",
        "train/PNEUMONIA/person1_bacteria_2",
        "test/PNEUMONIA/person1_virus_6",
    ]
    names += ["train/NORMAL/IM-0115-0001", "val/NORMAL/NORMAL2-IM-1427-0001", "test/NORMAL/IM-0001-0001"]
    out = {f"chest_xray/{n}.jpeg": picture("jpeg") for n in names}
    out |= {k.replace("chest_xray/", "chest_xray/chest_xray/"): v for k, v in out.items()}
    return zipped(out | {"chest_xray/__MACOSX/train/NORMAL/._IM-0115-0001.jpeg": b"mac"})


def hc18():
    import cv2

    line = cv2.ellipse(np.zeros((120, 160), np.uint8), (80, 60), (50, 30), 20, 0, 360, 255, 2)
    out = {}
    for n in ("000_HC", "010_HC", "010_2HC"):
        out[f"training_set/{n}.png"] = picture("png", RNG.integers(0, 99, (120, 160), np.uint8))
        out[f"training_set/{n}_Annotation.png"] = picture("png", line)
    return zipped(out)


def busi():
    out = {}
    for label, ids in {"benign": (1, 2), "malignant": (1,), "normal": (1,)}.items():
        for i in ids:
            out[f"Dataset_BUSI_with_GT/{label}/{label} ({i}).png"] = picture("png", COLOUR)
            mask = dot(0 if label == "normal" else True, kind=bool)
            out[f"Dataset_BUSI_with_GT/{label}/{label} ({i})_mask.png"] = picture("png", mask)
    out["Dataset_BUSI_with_GT/benign/benign (1)_mask_1.png"] = picture("png", dot(True, 16, bool))
    return zipped(out)


SHENZHEN = {f"ChinaSet_AllFiles/CXR_png/CHNCXR_{i:04d}_{i % 2}.png": picture() for i in (1, 2)}
LAYOUTS = {  # archives, images, subjects (None: nothing says), images with a mask, its values, its area
    "chase_db1": ([chase()], 4, 2, 4, {0, 255}, 16),
    "hrf": ([*hrf()], 6, 6, 6, {0, 255}, 16),
    "drive": ([*drive()], 4, 4, 4, {0, 255}, 16),
    "stare": ([*stare()], 2, None, 2, {0, 255}, 16),
    "montgomery": ([montgomery()], 2, 2, 2, {0, 255}, 32),
    "shenzhen": ([zipped(SHENZHEN)], 2, 2, 0, set(), 0),
    "mhh_covid": ([mhh()], 3, 2, 0, set(), 0),
    "chest_xray_pneumonia": ([paediatric()], 6, 4, 0, set(), 0),
    "hc18": ([hc18()], 3, 2, 3, {0, 255}, 4770),
    "busi": ([busi()], 4, None, 4, {0, 1}, 32),
}


def from_hand(tmp_path, datas):
    "Archives as files"
    paths = [tmp_path / f"archive-{i}" for i in range(len(datas))]
    for p, data in zip(paths, datas):
        p.write_bytes(data)
    return paths


def quiet(_):
    "Lines that nobody reads"


def test_every_set_of_the_table_is_tested_in_its_layout():
    assert {k for k, s in PUBLIC.items() if s.files} == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_becomes_images_masks_and_a_table(tmp_path, name):
    datas, images, subjects, with_mask, values, area = LAYOUTS[name]
    get_public(name, tmp_path / "set", True, from_hand(tmp_path, datas), quiet)
    paired = pair(find(tmp_path / "set"))
    cases = paired.cases
    assert (len(cases), paired.left_out) == (images, ())
    assert len({c.subject for c in cases} - {""}) == (subjects or 0)
    assert all(c.subject for c in cases) == (subjects is not None)
    masks = [c for c in cases if c.mask]
    assert len(masks) == with_mask
    assert all(c.path.stem == c.mask.stem and c.mask.parent.name == "masks" for c in masks)
    if masks:
        first = np.asarray(Image.open(masks[0].mask))
        assert set(np.unique(first)) == values
        assert abs(int((first > 0).sum()) - area) <= area * 0.02
        assert (read_mask(masks[0].mask)[0] > 0).sum() == (first > 0).sum()
    assert json.loads((tmp_path / "set/dataset.json").read_text())["licence"] == PUBLIC[name].licence
    assert not [p for p in (tmp_path / "set").rglob(".*")]


def test_both_eyes_of_a_child_are_one_subject(tmp_path):
    get_public("chase_db1", tmp_path / "set", True, from_hand(tmp_path, [chase()]), quiet)
    found = {c.name: c.subject for c in find_cases(tmp_path / "set")}
    assert found == {f"{i}{s}": f"chase_db1/{i}" for i in ("01", "02") for s in "LR"}
    second = np.asarray(Image.open(tmp_path / "set/masks2/01L.png"))
    assert second[12, 12] == 255 and second[8, 8] == 0


def test_classes_of_lesions_and_the_second_observer_with_ones(tmp_path):
    get_public("busi", tmp_path / "busi", True, from_hand(tmp_path, [busi()]), quiet)
    top = lambda p: int(np.asarray(Image.open(tmp_path / p)).max())
    assert [top(f"busi/masks/{n}_1.png") for n in ("benign", "malignant", "normal")] == [1, 2, 0]
    get_public("drive", tmp_path / "drive", True, from_hand(tmp_path, [*drive()]), quiet)
    assert top("drive/masks2/01.png") == 255
    assert {"21,training", "01,test"} <= {
        ",".join((r.split(",")[4], r.split(",")[6])) for r in (tmp_path / "drive/manifest.csv").read_text().split()
    }


def test_images_are_stored_byte_for_byte(tmp_path):
    data = picture("jpg", COLOUR)
    get_public("chase_db1", tmp_path / "set", True, from_hand(tmp_path, [zipped({"Image_01L.jpg": data})]), quiet)
    assert (tmp_path / "set/images/01L.jpg").read_bytes() == data


# downloads


def test_a_download_goes_on_where_it_broke_off(server, tmp_path):
    data = RNG.bytes(100_000)
    url, server.most = server.put("a.zip", data), 30_000
    lines = []
    assert fetch(url, tmp_path / "d", tell=lines.append).read_bytes() == data
    starts = [int(r[6:-1]) for _, r, _ in server.asked[1:]]
    assert server.asked[0][1] is None and len(starts) == 3
    assert all(30_000 * i - 4000 < at <= 30_000 * i for i, at in enumerate(starts, 1))
    assert len(lines) == 3 and "0.0 MB" in lines[0]


def test_a_killed_download_goes_on(server, tmp_path):
    data = RNG.bytes(50_000)
    url = server.put("a.zip", data)
    (tmp_path / "a.zip.part").write_bytes(data[:20_000])
    assert fetch(url, tmp_path).read_bytes() == data
    assert [r for _, r, _ in server.asked] == ["bytes=20000-"]
    assert not (tmp_path / "a.zip.part").exists()


@pytest.mark.parametrize("have", [50_000, 60_000])
def test_a_part_that_is_whole_or_too_long_is_no_trap(server, tmp_path, have):
    data = RNG.bytes(50_000)
    url = server.put("a.zip", data)
    (tmp_path / "a.zip.part").write_bytes((data + RNG.bytes(10_000))[:have])
    assert fetch(url, tmp_path).read_bytes() == data


def test_a_server_without_ranges_sends_everything_again(server, tmp_path):
    data = RNG.bytes(50_000)
    url, server.ranges = server.put("a.zip", data), False
    (tmp_path / "a.zip.part").write_bytes(RNG.bytes(20_000))
    assert fetch(url, tmp_path).read_bytes() == data


def test_a_truncated_answer_is_never_taken_for_the_file(server, tmp_path):
    url, server.most, server.ranges = server.put("a.zip", RNG.bytes(50_000)), 20_000, False
    with pytest.raises(RuntimeError, match="broke off .* the same call goes on"):
        fetch(url, tmp_path, tell=quiet)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.zip.part"]
    server.most = None
    assert fetch(url, tmp_path).stat().st_size == 50_000


def test_an_answer_that_ends_early_without_an_error_is_noticed(server, tmp_path, monkeypatch):
    "As urllib3 did before its version 2"
    import requests

    whole = requests.Response.iter_content

    def silently(self, *args, **kw):
        with contextlib.suppress(requests.RequestException):
            yield from whole(self, *args, **kw)

    monkeypatch.setattr(requests.Response, "iter_content", silently)
    data = RNG.bytes(50_000)
    url, server.most = server.put("a.zip", data), 20_000
    assert fetch(url, tmp_path, tell=quiet).read_bytes() == data


def test_a_wrong_checksum_is_refused_and_nothing_stays(server, tmp_path):
    url = server.put("a.zip", b"not it")
    with pytest.raises(RuntimeError, match="not the file that was expected"):
        fetch(url, tmp_path / "d", "sha256:" + "0" * 64)
    assert not [*(tmp_path / "d").iterdir()]


@pytest.mark.parametrize("status, said", [(404, "404 .*may have moved"), (403, "403: access"), (500, "500 ")])
def test_a_refusal_is_a_line(server, tmp_path, status, said):
    url, server.status = server.put("a.zip", b"x"), status
    with pytest.raises(RuntimeError, match=said):
        fetch(url, tmp_path)


def test_nobody_there_is_a_line(server, tmp_path):
    url = server.put("a.zip", b"x").replace(str(server.http.server_port), "9")
    with pytest.raises(RuntimeError, match="ConnectionError"):
        fetch(url, tmp_path)


def row(server, monkeypatch, data):
    "CHASE_DB1 as if it stood on the server"
    url = server.put("CHASEDB1.zip", data)
    spec = replace(PUBLIC["chase_db1"], images=4, archives=(Archive(url, 0.1),))
    monkeypatch.setitem(PUBLIC, "chase_db1", spec)
    return url


def test_the_first_checksum_is_kept_and_compared(server, tmp_path, monkeypatch):
    url, lines = row(server, monkeypatch, chase()), []
    get_public("chase_db1", tmp_path / "one", True, tell=lines.append)
    kept = noted_checksums()[url]
    assert kept.startswith("sha256:") and any(kept in line for line in lines)
    assert json.loads((tmp_path / "one/dataset.json").read_text())["archives"] == {"CHASEDB1.zip": kept}
    get_public("chase_db1", tmp_path / "two", True, tell=quiet)
    server.put("CHASEDB1.zip", chase(1))
    with pytest.raises(RuntimeError, match="downloaded before: its checksum differs"):
        get_public("chase_db1", tmp_path / "three", True, tell=quiet)
    assert not (tmp_path / "three/images").exists()


def test_a_login_page_is_not_believed(server, tmp_path, monkeypatch):
    row(server, monkeypatch, b"<html>Please log in")
    with pytest.raises(ValueError, match="neither a zip nor a tar"):
        get_public("chase_db1", tmp_path / "set", True, tell=quiet)
    assert noted_checksums() == {}
    server.put("CHASEDB1.zip", chase())
    get_public("chase_db1", tmp_path / "set", True, tell=quiet)
    assert len(find_cases(tmp_path / "set")) == 4


def test_an_archive_that_is_made_anew_is_not_compared(server, tmp_path, monkeypatch):
    url = row(server, monkeypatch, chase())
    spec = replace(PUBLIC["chase_db1"], archives=(Archive(url, 0.1, anew=True),))
    monkeypatch.setitem(PUBLIC, "chase_db1", spec)
    get_public("chase_db1", tmp_path / "one", True, tell=quiet)
    server.put("CHASEDB1.zip", chase(3))
    get_public("chase_db1", tmp_path / "two", True, tell=quiet)
    assert len(find_cases(tmp_path / "two")) == 6


# archives


@pytest.mark.parametrize("bad", ["../../evil.png", "/tmp/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_an_archive_that_leads_out_of_its_folder_unpacks_nothing(tmp_path, bad, pack):
    archive = from_hand(tmp_path, [pack({"Image_01L.jpg": picture("jpg", COLOUR), bad: b"evil"})])
    with pytest.raises(ValueError, match="outside its folder"):
        get_public("chase_db1", tmp_path / "set", True, archive, quiet)
    assert not (tmp_path / "set/images").exists()
    assert not [p for p in tmp_path.rglob("*evil*")]


def test_a_damaged_archive_is_a_line(tmp_path):
    whole = chase()
    at = whole.index(b"\xff\xd8") + 30  # within the first photograph
    archive = from_hand(tmp_path, [whole[:at] + b"????" + whole[at + 4 :]])
    with pytest.raises(ValueError, match="is damaged: Bad CRC"):
        get_public("chase_db1", tmp_path / "set", True, archive, quiet)
    assert not (tmp_path / "set/images").exists()


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 1000)
    small = tarred({"./im0001.ppm.gz": gzip.compress(bytes(5000))})
    (path,) = from_hand(tmp_path, [small])
    with pytest.raises(ValueError, match="larger than"):
        [m.read() for m in members(path)]


def test_two_different_images_of_one_name_are_an_error(tmp_path):
    files = {f"{d}/Image_01L.jpg": picture("jpg", a) for d, a in (("a", COLOUR), ("b", COLOUR // 2))}
    with pytest.raises(ValueError, match="two different images"):
        get_public("chase_db1", tmp_path / "set", True, from_hand(tmp_path, [zipped(files)]), quiet)


def test_a_mask_that_is_no_picture_is_a_line(tmp_path):
    files = {"Image_01L.jpg": picture("jpg", COLOUR), "Image_01L_1stHO.png": b"no picture"}
    with pytest.raises(ValueError, match="a mask cannot be read"):
        get_public("chase_db1", tmp_path / "set", True, from_hand(tmp_path, [zipped(files)]), quiet)
    assert not [*(tmp_path / "set").iterdir()]  # another set may still go there


def test_an_archive_with_the_right_checksum_stays_if_it_cannot_be_read(server, tmp_path, monkeypatch):
    url = row(server, monkeypatch, zipped({"other.txt": b"?"}))
    known = "sha256:" + hashlib.sha256(server.files["/CHASEDB1.zip"]).hexdigest()
    monkeypatch.setitem(PUBLIC, "chase_db1", replace(PUBLIC["chase_db1"], archives=(Archive(url, 0.1, known),)))
    for _ in range(2):
        with pytest.raises(ValueError, match="no images of this set"):
            get_public("chase_db1", tmp_path / "set", True, tell=quiet)
    assert len(server.asked) == 1


def test_a_mask_without_an_image_goes_and_an_image_without_one_stays(tmp_path):
    files = {"Image_01L.jpg": picture("jpg", COLOUR), "Image_02L_1stHO.png": picture("png", dot())}
    lines = []
    get_public("chase_db1", tmp_path / "set", True, from_hand(tmp_path, [zipped(files)]), lines.append)
    assert [p.name for p in (tmp_path / "set").rglob("*.png")] == []
    assert "note: 1 images were found, 28 were expected" in lines and "note: 1 images have no mask" in lines


def test_terms_that_are_not_accepted_stop_a_script_too(tmp_path):
    with pytest.raises(ValueError, match="CC BY 4.0.*accept_licence=True"):
        get_public("chase_db1", tmp_path / "set", archives=from_hand(tmp_path, [chase()]), tell=quiet)
    assert not (tmp_path / "set").exists()


# what is half done, and what is somebody's


def test_an_interrupted_unpacking_leaves_nothing_half(server, tmp_path, monkeypatch):
    row(server, monkeypatch, chase())
    keep, n = public._keep_mask, []

    def stops(*args):
        n.append(1)
        if len(n) == 3:
            raise KeyboardInterrupt
        keep(*args)

    monkeypatch.setattr(public, "_keep_mask", stops)
    with pytest.raises(KeyboardInterrupt):
        get_public("chase_db1", tmp_path / "set", True, tell=quiet)
    assert [p.name for p in (tmp_path / "set").iterdir()] == [".chase_db1"]
    get_public("chase_db1", tmp_path / "set", True, tell=quiet)
    assert len(server.asked) == 1  # the archive was there
    assert len(find_cases(tmp_path / "set")) == 4


@pytest.mark.parametrize("at", range(1, 7))
def test_a_stop_while_results_move_goes_on_too(tmp_path, monkeypatch, at):
    rename, n = os.rename, []

    def stops(a, b):
        n.append(1)
        if len(n) == at:
            raise KeyboardInterrupt
        rename(a, b)

    hand = from_hand(tmp_path, [chase()])
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "rename", stops)
        get_public("chase_db1", tmp_path / "set", True, hand, quiet)
    assert not (tmp_path / "set/manifest.csv").exists()  # it comes last: a folder with a table is whole
    get_public("chase_db1", tmp_path / "set", True, hand, quiet)
    assert len(find_cases(tmp_path / "set")) == 4 and not (tmp_path / "set/.chase_db1").exists()


def test_nothing_of_the_users_is_replaced(tmp_path):
    hand = from_hand(tmp_path, [chase()])
    (tmp_path / "set/images").mkdir(parents=True)
    (tmp_path / "set/images/01L.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds other files \(images\)"):
        get_public("chase_db1", tmp_path / "set", True, hand, quiet)
    assert (tmp_path / "set/images/01L.jpg").read_bytes() == b"mine" and hand[0].exists()
    with pytest.raises(ValueError, match="is a file"):
        get_public("chase_db1", hand[0], True, hand, quiet)
    get_public("chase_db1", tmp_path / "other", True, hand, quiet)
    with pytest.raises(ValueError, match="holds other files"):
        get_public("hrf", tmp_path / "other", True, from_hand(tmp_path, [*hrf()]), quiet)


# Kaggle


def kaggle(server, monkeypatch):
    url = server.put("pneumonia", paediatric())
    spec = replace(PUBLIC["chest_xray_pneumonia"], archives=(Archive(url, 0.1),), images=6)
    monkeypatch.setitem(PUBLIC, "chest_xray_pneumonia", spec)


@pytest.mark.parametrize("how", ["file", "key", "token"])
def test_the_users_own_kaggle_token_is_sent(server, tmp_path, monkeypatch, how):
    kaggle(server, monkeypatch)
    if how == "file":
        (tmp_path / "kaggle").mkdir()
        (tmp_path / "kaggle/kaggle.json").write_text('{"username": "me", "key": "secret"}')
    elif how == "key":
        monkeypatch.setenv("KAGGLE_USERNAME", "me")
        monkeypatch.setenv("KAGGLE_KEY", "secret")
    else:
        monkeypatch.setenv("KAGGLE_API_TOKEN", "secret")
    lines = []
    get_public("chest_xray_pneumonia", tmp_path / "set", True, tell=lines.append)
    assert server.asked[0][2] == ("Bearer secret" if how == "token" else "Basic bWU6c2VjcmV0")
    written = " ".join([*lines, *(p.read_text() for p in (tmp_path / "set").glob("*.*"))])
    assert "secret" not in written and "bWU6" not in written


def test_without_a_token_it_says_how_to_get_one(server, tmp_path, monkeypatch):
    kaggle(server, monkeypatch)
    with pytest.raises(ValueError, match="kaggle.com/settings"):
        get_public("chest_xray_pneumonia", tmp_path / "set", True, tell=quiet)
    (tmp_path / "kaggle").mkdir()
    (tmp_path / "kaggle/kaggle.json").write_text('["odd"]')
    with pytest.raises(ValueError, match="is no Kaggle token"):
        get_public("chest_xray_pneumonia", tmp_path / "set", True, tell=quiet)
    assert server.asked == []


# the command


def test_the_list_and_the_terms(medsketch):
    status, out, _ = medsketch("data")
    assert status == 0 and all(name in out for name in PUBLIC)
    head = out.splitlines()[0].split()
    assert head == ["name", "organ", "images", "masks", "licence", "size", "how", "checksum"]
    status, out, _ = medsketch("data drive")
    assert status == 0 and "register" in out and "drive.grand-challenge.org" in out


def test_a_set_by_name_and_what_inspect_makes_of_it(server, medsketch, monkeypatch):
    row(server, monkeypatch, chase())
    status, out, err = medsketch(f"data chase_db1 --to eyes {ACCEPT}")
    assert (status, err) == (0, "") and "CC BY 4.0" in out and "Fraz" in out
    status, out, _ = medsketch("inspect eyes --size 32")
    assert status == 0 and "images    4" in out and "subjects  2 (named)" in out and "4 with something in them" in out
    status, out, _ = medsketch("data chase_db1 --to eyes")
    assert (status, len(server.asked)) == (0, 1) and "already" in out


@pytest.mark.parametrize(
    "line, said, code",
    [
        ("data imagenet", "there are: chase_db1, hrf", 1),
        ("data imagenet --to x", "there are: chase_db1, hrf", 1),
        ("data --to x", "name a set", 2),
        ("data chase_db1 --archive a.zip", "--to DIR", 2),
        ("data chase_db1 --to x", "add --accept-licence", 1),
        (f"data drive --to x {ACCEPT}", "training.zip and test.zip", 1),
        (f"data brats --to x {ACCEPT}", "modalities=", 1),
        (f"data hc18 --to x --archive none.zip {ACCEPT}", "no such archive", 1),
    ],
)
def test_mistakes_are_a_line(medsketch, monkeypatch, line, said, code):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status, _, err = medsketch(line)
    assert status == code and said in err and err.count("\n") == 1
    assert not Path("x").exists()


@pytest.mark.parametrize("answer, ok", [("y", True), ("YES", True), ("", False), ("n", False), (EOFError, False)])
def test_a_person_is_asked(server, medsketch, monkeypatch, answer, ok):
    row(server, monkeypatch, chase())
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    def said(_):
        if answer is EOFError:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", said)
    status, _, err = medsketch("data chase_db1 --to eyes")
    assert (status == 0) == ok == Path("eyes/manifest.csv").exists()
    assert ok or "not accepted" in err and not server.asked


def test_an_address_that_has_moved_says_what_to_do(server, medsketch, monkeypatch):
    row(server, monkeypatch, chase())
    server.files.clear()
    status, _, err = medsketch(f"data chase_db1 --to eyes {ACCEPT}")
    assert status == 1 and "answers 404" in err and "--archive" in err and err.count("\n") == 1


def test_a_full_looking_disk(server, medsketch, monkeypatch):
    import shutil

    row(server, monkeypatch, chase())
    few = shutil.disk_usage(".")._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: few)
    status, _, err = medsketch(f"data chase_db1 --to eyes {ACCEPT}")
    assert status == 1 and "are free in" in err and not server.asked and not Path("eyes").exists()


def test_a_disk_that_fills_up_keeps_what_has_arrived(server, medsketch, monkeypatch):
    row(server, monkeypatch, chase())

    def full(*_):
        raise OSError(28, "No space left on device", "01L.jpg")

    monkeypatch.setattr(public, "_keep_image", full)
    status, _, err = medsketch(f"data chase_db1 --to eyes {ACCEPT}")
    assert status == 1 and "No space left" in err and "goes on" in err and err.count("\n") == 1
    assert not Path("eyes/images").exists()


def test_without_pooch_it_says_what_to_install(medsketch, monkeypatch):
    monkeypatch.setattr(archives, "find_spec", lambda name: None)
    status, _, err = medsketch(f"data chase_db1 --to eyes {ACCEPT}")
    assert status == 1 and "pip install 'medsketch[data]'" in err and err.count("\n") == 1


def test_archives_by_hand_need_no_pooch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    get_public("chase_db1", tmp_path / "set", True, from_hand(tmp_path, [chase()]), quiet)
    assert len(find_cases(tmp_path / "set")) == 4


def test_a_downloader_for_pooch_hands_over_what_arrived(server, tmp_path):
    url = server.put("a.zip", b"x" * 10)
    resuming(tmp_path / "a.part")(url, tmp_path / "a.zip", None)
    assert (tmp_path / "a.zip").read_bytes() == b"x" * 10
