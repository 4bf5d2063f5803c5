"Reading folders, keeping bad files out, splitting and serving them."

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from medsketch.core import to_uint8, torch_rng
from medsketch.data import (
    ImageData,
    dataset,
    load_images,
    phantom_data,
    readers,
    split_by_subject,
)
from medsketch.data.batches import Augment, Batches, flip_lr, flip_rotate
from medsketch.data.cases import find_cases
from medsketch.data.readers import (
    field_of_view,
    image_to_square,
    mask_to_square,
    read_dicom,
    read_image,
    read_mask,
    read_nifti,
    read_picture,
    to_eight_bits,
)
from medsketch.phantoms import phantom

REAL = Path(os.environ.get('MEDSKETCH_DATA', Path(__file__).parents[1] / '../shared/data')).resolve()
real = pytest.mark.skipif(
    not (REAL / 'manifest.csv').is_file(), reason='the real images are not on this machine (MEDSKETCH_DATA)'
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "Nothing is written outside the test's own folder"
    monkeypatch.setenv('MEDSKETCH_CACHE', str(tmp_path / 'cache'))


@pytest.fixture(scope='module')
def eye():
    return to_uint8(phantom('fundus', 128, seed=1)['image'])


def disc(h, w, y, x, r):
    "A filled disc: (h, w) bool"
    yy, xx = np.mgrid[:h, :w]
    return (yy - y) ** 2 + (xx - x) ** 2 < r**2


def fill(folder, n=4, size=40, masks=False):
    "A folder of grey noise, with masks if asked"
    rng = np.random.default_rng(0)
    for sub in ('images', 'masks') if masks else ('images',):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (size, size), np.uint8)).save(folder / f'images/{i:02}.png')
        if masks:
            Image.fromarray(disc(size, size, 20, 20, 5 + i).astype(np.uint8) * 255).save(folder / f'masks/{i:02}.png')
    return folder


def load(path, size=32, **kw):
    "`load_images` where a warning would be a failure"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return load_images(path, size, **kw)


# Files


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.tif', 'a.bmp', 'a.gif', 'a.ppm', 'a.PNG'])
def test_picture_formats(tmp_path, eye, name):
    Image.fromarray(eye).save(tmp_path / name, **({"quality": 95} if name.endswith('jpg') else {}))
    back = read_picture(tmp_path / name)
    assert back.shape == eye.shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - eye).mean() < 6


@pytest.mark.parametrize(
    'tag, undo', [(3, Image.ROTATE_180), (6, Image.ROTATE_90), (8, Image.ROTATE_270), (2, Image.FLIP_LEFT_RIGHT)]
)
def test_exif_orientation(tmp_path, eye, tag, undo):
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(eye).transpose(undo).save(tmp_path / 'a.png', exif=exif)
    assert (read_picture(tmp_path / 'a.png') == eye).all()


def test_transparency_is_laid_on_black(tmp_path):
    a = np.full((16, 16, 4), 200, np.uint8)
    a[..., 3] = np.where(disc(16, 16, 8, 8, 5), 255, 0)
    Image.fromarray(a).save(tmp_path / 'a.png')
    back = read_picture(tmp_path / 'a.png')
    assert back[8, 8] == 200 and back[0, 0] == 0 and back.ndim == 2


def test_cmyk_is_not_a_negative(tmp_path, eye):
    Image.fromarray(eye).convert('CMYK').save(tmp_path / 'a.jpg', quality=95)
    assert np.corrcoef(read_picture(tmp_path / 'a.jpg').ravel(), eye.ravel())[0, 1] > 0.98


def test_animated_gif_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(np.full((16, 16), v, np.uint8)) for v in (50, 150, 250)]
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
    back = read_picture(tmp_path / 'a.gif')
    assert (back == 50).all() and back.ndim == 2


@pytest.mark.parametrize('top', [4095, 65535])
@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
def test_sixteen_bits_use_the_whole_range(tmp_path, top, name):
    ramp = np.tile(np.linspace(1, top, 64), (64, 1)).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / name)
    back = read_picture(tmp_path / name).astype(int)
    assert back.min() == 0 and back.max() == 255
    assert np.abs(back[0] - np.linspace(0, 255, 64)).max() < 6


def test_float_tiff_and_bilevel(tmp_path):
    Image.fromarray(np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / 'a.tif')
    Image.fromarray(disc(16, 16, 8, 8, 5)).save(tmp_path / 'b.png')
    assert np.ptp(read_picture(tmp_path / 'a.tif')) == 255
    assert set(np.unique(read_picture(tmp_path / 'b.png'))) == {0, 255}


@pytest.mark.parametrize(
    'a',
    [
        np.full((4, 4), np.nan),
        np.array([[np.inf, 1.0, 2.0]]),
        np.zeros((4, 4)),
        np.full((4, 4), 7.0),
        np.full((4, 4), -7.0),
    ],
)
def test_to_eight_bits_takes_anything(a):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert to_eight_bits(a).dtype == np.uint8


def dicom(path, pixels, photometric='MONOCHROME2', **tags):
    "A small DICOM file"
    pydicom = pytest.importorskip('pydicom')
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.ExplicitVRLittleEndian, '1.2.3'
    meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
    ds = pydicom.dataset.Dataset()
    ds.file_meta, bits = meta, pixels.dtype.itemsize * 8
    colour = pixels.shape[-1] == 3
    if pixels.ndim == 3 + colour:
        ds.NumberOfFrames = len(pixels)
    ds.Rows, ds.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 3 if colour else 1, bits, bits, bits - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == 'i')
    if colour:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation, ds.PixelData = photometric, pixels.tobytes()
    for k, v in tags.items():
        setattr(ds, k, v)
    ds.save_as(path, enforce_file_format=True)
    return path


def test_dicom_hounsfield_window_and_negative(tmp_path):
    ramp = np.tile(np.linspace(0, 2000, 32).astype('<i2'), (32, 1))
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1000, "WindowCenter": [0, 40], "WindowWidth": [1000, 80]}
    (plain,) = read_dicom(dicom(tmp_path / 'a.dcm', ramp, **tags))
    hounsfield = ramp[0].astype(float) - 1000
    assert np.abs(plain[0] - np.clip((hounsfield + 500) / 1000, 0, 1) * 255).max() <= 1
    (negative,) = read_dicom(dicom(tmp_path / 'b.dcm', ramp, 'MONOCHROME1', **tags))
    assert (negative == 255 - plain).all()
    (narrow,) = read_dicom(tmp_path / 'a.dcm', window=(40, 80))
    assert (narrow[0][hounsfield < 0] == 0).all() and (narrow[0][hounsfield > 80] == 255).all()


def test_dicom_without_a_window_is_not_black(tmp_path):
    faint = np.tile(np.linspace(1000, 1100, 32).astype('<u2'), (32, 1))
    (a,) = read_dicom(dicom(tmp_path / 'a.dcm', faint))
    assert a.min() == 0 and a.max() == 255


def test_dicom_colour(tmp_path, eye):
    (a,) = read_dicom(dicom(tmp_path / 'a.dcm', eye, 'RGB'))
    assert (a == eye).all()


def test_dicom_frames_are_samples_of_one_subject(tmp_path):
    movie = np.random.default_rng(0).integers(0, 4000, (5, 32, 40)).astype('<u2')
    folder = tmp_path / 'd'
    folder.mkdir()
    dicom(folder / 'IM0001', movie, PatientID='Doe^Jane')
    dicom(folder / 'b.dcm', movie[0], PatientID='Doe^Jane')
    dicom(folder / 'c.dcm', movie[1])
    ds = load(folder, 32)
    assert len(ds) == 7 and ds.channels == 1 and ds.paths[0].endswith('IM0001#0')
    assert len(set(ds.subjects)) == 2 and ds.subjects[-1] == 'c'
    assert 'Doe' not in repr(ds.subjects)


def nifti(path, v, affine=None):
    "A small NIfTI file"
    nibabel = pytest.importorskip('nibabel')
    nibabel.save(nibabel.Nifti1Image(v, np.eye(4) if affine is None else affine), path)
    return path


def test_nifti_is_upright_whatever_the_storage(tmp_path):
    v = np.zeros((24, 30, 20), np.float32)
    v[:] = 10
    v[18:, 22:, 12:] = 100  # right, front, top
    one = read_nifti(nifti(tmp_path / 'a.nii.gz', v))
    assert len(one) == 20 and one[15].shape == (30, 24)
    # front is up, right is on the left
    assert one[15][:8, :6].min() > 200 and one[15][8:].max() < 60 and one[5].max() < 60
    las = nifti(tmp_path / 'b.nii', v[::-1].copy(), np.diag([-1, 1, 1, 1]))
    turned = nifti(
        tmp_path / 'c.nii',
        v.transpose(1, 2, 0).copy(),
        np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float),
    )
    for other in (las, turned):
        assert all((p == q).all() for p, q in zip(one, read_nifti(other)))
    coronal = read_nifti(tmp_path / 'a.nii.gz', axis=1)
    assert len(coronal) == 30 and coronal[25].shape == (20, 24) and coronal[25][:8, :6].min() > 200


def test_nifti_voxels_become_square(tmp_path):
    v = np.random.default_rng(0).random((20, 20, 10)).astype(np.float32)
    path = nifti(tmp_path / 'a.nii.gz', v, np.diag([1, 1, 3, 1]))
    assert read_nifti(path, axis=0)[0].shape == (30, 20)
    assert read_mask(nifti(tmp_path / 'm.nii.gz', (v > 0.5).astype(np.uint8), np.diag([1, 1, 3, 1])), axis=0)[
        0
    ].shape == (30, 20)


def test_nifti_contrasts_and_masks_stay_together(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / 'd'
    folder.mkdir()
    brain = np.zeros((40, 40, 6), np.float32)
    brain[8:30, 10:36] = rng.random((22, 26, 6)) + 1
    brain[..., 5] = 0  # air above the head
    for c in ('t1', 'flair'):
        nifti(folder / f'p_{c}.nii.gz', brain * (2 if c == 't1' else 300))
    nifti(folder / 'p_seg.nii.gz', (brain > 0).astype(np.uint8) * 4)
    ds = load(folder, 32, modalities=('t1', 'flair'))
    assert (len(ds), ds.channels, ds.classes, set(ds.subjects)) == (5, 2, ('background', 'foreground'), {'p'})
    assert abs(ds.images[:, 0].astype(int) - ds.images[:, 1]).max() <= 1  # each contrast has its own scale
    inside = ds.masks[0] > 0
    assert ds.images[0, 0][~inside].mean() < 20 < ds.images[0, 0][inside].mean()
    with pytest.raises(ValueError, match="no contrast 't2'"):
        load(folder, 32, modalities=('t1', 't2'))


@pytest.mark.parametrize('name, package', [('a.dcm', 'pydicom'), ('a.nii.gz', 'nibabel')])
def test_missing_reader_says_what_to_install(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b'x' * 200)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda m: None)
    for f in (read_image, lambda p: load(p)):
        with pytest.raises(ImportError, match=rf"needs {package}: pip install 'medsketch\[volumes\]'"):
            f(tmp_path / name)


# Bad files


def test_bad_files_are_skipped_and_listed(tmp_path):
    good = fill(tmp_path / 'd', 3, masks=True)
    png = (good / 'images/00.png').read_bytes()
    (good / 'images/half.png').write_bytes(png[: len(png) // 2])
    (good / 'images/text.png').write_text('hello')
    (good / 'images/empty.jpg').touch()
    Image.new('L', (1, 1)).save(good / 'images/dot.png')
    Image.new('1', (11000, 11000)).save(good / 'images/bomb.png')
    Image.new('L', (40, 40)).save(good / 'images/nomask.png')
    Image.new('L', (40, 40)).save(good / 'images/other.png')
    Image.new('L', (20, 40)).save(good / 'masks/other.png')
    (good / 'images/false.dcm').write_bytes(b'\0' * 300)
    (good / 'images/false.nii.gz').write_bytes(b'\0' * 300)
    for n in ('half', 'text', 'empty', 'dot', 'bomb', 'false'):
        Image.new('L', (40, 40)).save(good / f'masks/{n}.png')
    with pytest.warns(UserWarning, match='9 of the images in') as caught:
        ds = load_images(good, 32)
    assert len(caught) == 1 and '\n' not in str(caught[0].message)
    assert len(ds) == 3
    reasons = {Path(p).name: r for p, r in ds.skipped}
    assert set(reasons) == {
        'half.png',
        'text.png',
        'empty.jpg',
        'dot.png',
        'bomb.png',
        'nomask.png',
        'other.png',
        'false.dcm',
        'false.nii.gz',
    }
    for name, word in {
        "half": 'truncated',
        "text": 'cannot identify',
        "dot": '1×1',
        "bomb": 'refused',
        "nomask": 'no mask',
        "other": '20×40 pixels, the image 40×40',
    }.items():
        assert word in reasons[f'{name}.png']
    assert all(r and '\n' not in r for r in reasons.values())


def test_folders_without_images(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad/a.png').write_text('no')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/notes.txt').write_text('no')
    for name, match in {
        "nowhere": 'no such folder',
        "empty": 'no images in',
        "other": 'no images in',
        "bad": r'none of the 1 images in .*bad can be used; a.png: cannot identify',
    }.items():
        with pytest.raises(ValueError, match=match) as e:
            load(tmp_path / name)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'kw, match',
    [
        ({"size": 100}, 'nearest is 128'),
        ({"fit": 'fill'}, "fit 'fill'"),
        ({"cache": 'cloud'}, "cache 'cloud'"),
        ({"axis": 3}, 'axis 3'),
        ({"normalise": 'minmax'}, 'normalise'),
        ({"channels": 0}, 'channels'),
        ({"window": (40, 0)}, 'window'),
        ({"channels": 4}, 'it has 1 channels?, 4 asked for'),
        ({"subject": 'x'}, 'finds no group'),
        ({"masks": True}, 'it has no mask'),
    ],
)
def test_wrong_arguments(tmp_path, kw, match):
    with pytest.raises(ValueError, match=match):
        load(fill(tmp_path / 'd'), **{'size': 32, **kw})


# Masks


def save_masks(folder, *masks, name='{}.png'):
    "Images of one grey with these masks"
    for sub in ('images', 'masks'):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for i, m in enumerate(masks):
        Image.new('L', m.shape[::-1], 90).save(folder / f'images/{i}.png')
        Image.fromarray(m.astype(np.uint8)).save(folder / 'masks' / name.format(i))
    return folder


def test_label_values_become_class_ids(tmp_path):
    a, b = np.zeros((2, 32, 32), np.uint8)
    a[4:12, 4:12], b[4:12, 4:12], b[20:28, 20:28] = 4, 2, 1
    ds = load(save_masks(tmp_path, a, b))
    assert ds.classes == ('background', 'label 1', 'label 2', 'label 4') and len(ds.colours) == 4
    assert (ds.masks[0] == np.where(a == 4, 3, 0)).all() and (ds.masks[1] == b).all()
    named = load(tmp_path, classes={0: 'background', 1: 'core', 2: 'oedema', 4: 'enhancing'})
    assert named.classes == ('background', 'core', 'oedema', 'enhancing') and (named.masks == ds.masks).all()


@pytest.mark.parametrize('high', [1, 255, 200])
def test_binary_masks(tmp_path, high):
    m = disc(32, 32, 16, 16, 8)
    ds = load(save_masks(tmp_path, m * high, np.zeros((32, 32))))
    assert ds.classes == ('background', 'foreground') and (ds.masks[0] == m).all() and not ds.masks[1].any()
    if high != 200:
        assert (load(tmp_path, classes=('nothing', 'lung')).masks == ds.masks).all()


def test_label_outside_the_classes_names_file_and_label(tmp_path):
    m = np.zeros((32, 32))
    m[0, 0] = 3  # one pixel is enough
    with pytest.raises(
        ValueError, match=r'masks/1.png: label 3 is not among the classes \(0 background, 1 vessel, 2 disc\)'
    ):
        load(save_masks(tmp_path, m * 0, m), size=8, classes=('background', 'vessel', 'disc'))


def test_soft_and_lossy_masks_are_cut_at_half(tmp_path):
    m = disc(64, 64, 32, 32, 20)
    soft = cv2.GaussianBlur(m.astype(np.uint8) * 255, (0, 0), 3)
    for name in ('{}.jpg', '{}.png'):
        ds = load(save_masks(tmp_path / name[-3:], soft, name=name), 64)
        assert ds.classes == ('background', 'foreground') and (ds.masks[0] != m).mean() < 0.03


def test_coloured_masks_are_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / 'a.png')
    with pytest.raises(ValueError, match='in colours'):
        read_mask(tmp_path / 'a.png')


@pytest.mark.parametrize('fit', ['auto', 'letterbox', 'crop', 'stretch'])
@pytest.mark.parametrize('shape', [(90, 160), (160, 90), (128, 128), (20, 30)])
def test_mask_stays_on_its_image(fit, shape):
    m = disc(*shape, shape[0] / 2, shape[1] / 2, 7)
    image = np.repeat(m[..., None] * np.uint8(255), 3, -1)
    image[2:-2, 4:-4] |= 60  # a lit field in a dark frame
    box = readers.keep_box(image, fit)
    a, b = image_to_square(image, 64, fit, box)[..., 0] > 150, mask_to_square(m.astype(np.int32) * 3, 64, fit, box) == 3
    assert (a & b).sum() / (a | b).sum() > 0.85


def test_field_of_view_finds_a_noisy_disc():
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 12, (400, 700, 3)).astype(np.uint8)
    lit = disc(400, 700, 205, 340, 180)
    photo[lit] = rng.integers(60, 200, (lit.sum(), 3))
    photo[5:12, 600:690] = 255  # a caption in the frame
    assert np.abs(np.subtract(field_of_view(photo), (25, 386, 160, 521))).max() <= 4
    assert field_of_view(np.zeros((50, 60, 3), np.uint8)) == (0, 50, 0, 60)


# Layouts


def test_a_table_above_the_folder(tmp_path):
    fill(tmp_path / 'a', 3, masks=True)
    fill(tmp_path / 'b', 2)
    lines = ['\ufeffdataset,image,mask,extra,subject']
    lines += [
        f'a,a/images/{i:02}.png,a/masks/{i:02}.png,a/images/{(i + 1) % 3:02}.png;a/masks/00.png,s{i // 2}'
        for i in range(3)
    ]
    lines += ['b,b/images/00.png,,,s0', 'b,b/images/gone.png,,,s1', '']
    (tmp_path / 'manifest.csv').write_text('\n'.join(lines), encoding='utf-8')
    table = tmp_path / 'manifest.csv'
    a = load(tmp_path / 'a', manifest=table)
    assert (len(a), a.channels, sorted(set(a.subjects)), a.classes) == (
        3,
        2,
        ['a/s0', 'a/s1'],
        ('background', 'foreground'),
    )
    assert (load(tmp_path / 'a', channels=1, manifest=table).images[:, 0] == a.images[:, 0]).all()
    with pytest.warns(UserWarning, match='1 of the images'):
        b = load_images(tmp_path / 'b', 32, manifest=table)
    assert (len(b), b.masks, b.subjects) == (1, None, ['b/s0']) and 'gone.png' in b.skipped[0][0]
    assert len(find_cases(tmp_path)) == len(find_cases(tmp_path / 'manifest.csv')) == 5


def test_a_strangers_table_further_up_is_left_alone(tmp_path):
    (tmp_path / 'manifest.csv').write_text('colour,taste\nred,sweet\n')
    assert len(load(fill(tmp_path / 'd'))) == 4
    (tmp_path / 'd/manifest.csv').write_text('colour,taste\nred,sweet\n')
    with pytest.raises(ValueError, match="no column 'image'"):
        load(tmp_path / 'd')


def test_order_does_not_depend_on_the_file_system(tmp_path):
    assert [Path(p).stem for p in load(fill(tmp_path / 'd', 12)).paths] == [f'{i:02}' for i in range(12)]


def test_subject_by_expression_below_the_folder(tmp_path):
    d = fill(tmp_path / 'study7', 4)
    assert load(d, subject=r'(\d)\d$').subjects == ['0'] * 4


def test_channels_of_mixed_sets(tmp_path, eye):
    Image.fromarray(eye).save(tmp_path / 'colour.png')
    Image.fromarray(np.repeat(eye[..., :1], 3, -1)).save(tmp_path / 'grey_as_rgb.png')
    Image.fromarray(eye[..., 1]).save(tmp_path / 'grey.png')
    assert load(tmp_path).channels == 3 and load(tmp_path, channels=1).channels == 1
    (tmp_path / 'colour.png').unlink()
    assert load(tmp_path).channels == 1 and load(tmp_path, channels=3).channels == 3


# The cache


def test_cache_decodes_once_and_notices_changes(tmp_path, monkeypatch):
    d = fill(tmp_path / 'd', masks=True)
    first = load(d, cache='disk')
    with monkeypatch.context() as m:
        m.setattr(dataset, 'decode_case', lambda *a: pytest.fail('decoded again'))
        again = load(d, cache='disk')
    memory = load(d)
    assert (
        isinstance(again.images, np.memmap)
        and (again.images == memory.images).all()
        and (again.masks == memory.masks).all()
    )
    assert first.fingerprint() == again.fingerprint() == memory.fingerprint()
    assert (again.paths, again.subjects, again.classes, again.skipped) == (
        memory.paths,
        memory.subjects,
        memory.classes,
        memory.skipped,
    )
    assert not list((tmp_path / 'cache').rglob('*.tmp'))
    Image.new('L', (40, 40), 255).save(d / 'images/02.png')
    os.utime(d / 'images/02.png', ns=(1, 1))
    assert (load(d, cache='disk').images[2] == 255).all()
    assert load(d, cache='disk', fit='stretch', size=16).size == 16


@pytest.mark.parametrize('harm', ['half', 'nojson', 'badjson'])
def test_a_broken_cache_is_built_again(tmp_path, harm):
    d = fill(tmp_path / 'd')
    whole = np.array(load(d, cache='disk').images)
    (folder,) = (tmp_path / 'cache').iterdir()
    if harm == 'half':
        (folder / 'image.npy').write_bytes((folder / 'image.npy').read_bytes()[:2000])
    if harm == 'nojson':
        (folder / 'data.json').unlink()
    if harm == 'badjson':
        (folder / 'data.json').write_text('{"paths": [')
    assert (load(d, cache='disk').images == whole).all()
    assert json.loads((folder / 'data.json').read_text())['paths']


def test_unwritable_cache_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('MEDSKETCH_CACHE', str(tmp_path / 'file/cache'))
    with pytest.raises(RuntimeError, match='set MEDSKETCH_CACHE') as e:
        load(fill(tmp_path / 'd'), cache='disk')
    assert '\n' not in str(e.value)


def test_skipped_files_are_warned_of_from_the_cache_too(tmp_path):
    d = fill(tmp_path / 'd')
    (d / 'images/bad.png').touch()
    for _ in range(2):
        with pytest.warns(UserWarning, match='bad.png'):
            ds = load_images(d, 32, cache='disk')
        assert [Path(p).name for p, _ in ds.skipped] == ['bad.png']


def test_subsets_of_a_set_on_disk_stay_on_disk(tmp_path):
    ds = load(fill(tmp_path / 'd', 9, masks=True), cache='disk')
    part = ds.subset([7, 2, 5]).subset([2, 0])
    assert not isinstance(part.images, np.ndarray) and part.images.shape == (2, 1, 32, 32)
    assert (part.batch([0, 1])['image'] == ds.batch([5, 7])['image']).all() and (
        part.batch([1])['mask'] == ds.batch([7])['mask']
    ).all()
    assert part.fingerprint() == load(tmp_path / 'd').subset([5, 7]).fingerprint()
    assert (np.asarray(part.images) == ds.images[[5, 7]]).all()


def test_quiet_when_nobody_watches(tmp_path, capfd):
    load(fill(tmp_path / 'd'))
    out = capfd.readouterr()
    assert out.out == '' and out.err == ''


# The dataset


def test_samples_keep_the_contracts():
    ds = phantom_data('brain_mri', 3, 32)
    ds = ds.with_sketches((ds.masks > 0).astype(np.uint8) * 255)
    b = ds.batch([2, 0, -1])
    assert (
        b['image'].dtype == torch.float32
        and b['image'].shape == (3, 4, 32, 32)
        and -1 <= b['image'].min() < b['image'].max() <= 1
    )
    assert b['mask'].dtype == torch.int64 and b['mask'].shape == (3, 32, 32)
    assert (
        b['sketch'].dtype == torch.float32
        and b['sketch'].shape == (3, 1, 32, 32)
        and set(b['sketch'].unique().tolist()) == {0.0, 1.0}
    )
    assert b['path'][0] == b['path'][2] == ds.paths[2] and (b['image'][0] == b['image'][2]).all()
    b['image'].zero_()
    assert ds.images.any()
    loader = torch.utils.data.DataLoader(ds, batch_size=3)
    assert (next(iter(loader))['image'] == ds.batch(range(3))['image']).all()
    with pytest.raises(IndexError):
        ds[3]
    with pytest.raises(ValueError, match='sketches are'):
        ds.with_sketches(np.zeros((3, 16, 16), np.uint8))


def test_fingerprint_sees_every_part():
    ds = phantom_data('fundus', 2, 16)
    other = ImageData(ds.images.copy(), ds.masks.copy(), classes=ds.classes)
    assert ds.fingerprint() == other.fingerprint()
    seen = {
        ds.fingerprint(),
        ds.with_sketches(np.zeros((2, 16, 16), np.uint8)).fingerprint(),
        ImageData(ds.images, classes=ds.classes).fingerprint(),
        ds.subset([1, 0]).fingerprint(),
    }
    other.images[1, 0, 0, 0] ^= 1
    assert len(seen | {other.fingerprint()}) == 5


@pytest.mark.parametrize('seed', range(20))
def test_split_never_divides_a_subject_and_leaves_no_side_empty(seed):
    rng = np.random.default_rng(seed)
    subjects = [f's{i}' for i in range(rng.integers(3, 9)) for _ in range(rng.choice([1, 1, 2, 40]))]
    rng.shuffle(subjects)
    ds = ImageData(np.zeros((len(subjects), 1, 4, 4), np.uint8), subjects=subjects)
    parts = split_by_subject(ds, seed=seed)
    assert all(len(p) for p in parts) and sorted(name for p in parts for name in p.paths) == sorted(ds.paths)
    people = [set(p.subjects) for p in parts]
    assert sum(map(len, people)) == len(set(subjects))
    assert [p.paths for p in split_by_subject(ds, seed=seed)] == [p.paths for p in parts]


def test_split_meets_its_fractions():
    ds = ImageData(np.zeros((200, 1, 4, 4), np.uint8))
    assert [len(p) for p in split_by_subject(ds)] == [160, 20, 20]
    assert [len(p) for p in split_by_subject(ds, (0.5, 0.5))] == [100, 100]
    assert [len(p) for p in split_by_subject(ds, (0.9, 0.1, 0.0))] == [180, 20, 0]
    assert split_by_subject(ds, seed=1)[1].paths != split_by_subject(ds, seed=2)[1].paths
    with pytest.raises(ValueError, match='sum to 1'):
        split_by_subject(ds, (0.8, 0.1))


# Batches


def test_stream_can_be_entered_anywhere():
    ds = phantom_data('lung_ct', 7, 16)
    make = lambda **kw: Batches(ds, 3, seed=5, augment=flip_rotate, **kw)
    whole = [b for b, _ in zip(make(), range(8))]
    for k in range(8):
        b = next(make(start=3 * k))
        assert (
            b['path'] == whole[k]['path']
            and (b['image'] == whole[k]['image']).all()
            and (b['mask'] == whole[k]['mask']).all()
        )
    paths = [name for b in whole for name in b['path']]
    assert all(sorted(paths[i : i + 7]) == sorted(ds.paths) for i in (0, 7, 14)) and paths[:7] != paths[7:14]
    assert next(Batches(ds, 3, seed=6))['path'] != whole[0]['path']
    big = next(Batches(ds, 40))
    assert len(big['image']) == 40


def test_stream_does_not_touch_the_global_generator():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    next(Batches(phantom_data('lung_ct', 3, 16), 4, augment=flip_rotate))
    assert torch.rand(1) == want


@pytest.mark.parametrize('f', [flip_lr, flip_rotate])
def test_augmentation_moves_everything_alike(f):
    x = torch.arange(64 * 64.0).view(1, 64, 64).repeat(32, 1, 1)
    batch = {"image": x[:, None].repeat(1, 2, 1, 1), "mask": x.long(), "sketch": x[:, None], "path": ['a'] * 32}
    before = {k: v.clone() for k, v in batch.items() if k != 'path'}
    out = f(batch, torch_rng(0))
    assert (
        (out['image'][:, 0].long() == out['mask']).all()
        and (out['sketch'] == out['image'][:, :1]).all()
        and out['path'] is batch['path']
    )
    assert all((batch[k] == v).all() for k, v in before.items())
    moved = (out['mask'] != batch['mask']).flatten(1).any(1).float().mean()
    assert 0.3 < moved < 1
    assert (Augment(f, p=0.0)(batch, torch_rng(0))['mask'] == batch['mask']).all()
    alone = f({"mask": batch['mask']}, torch_rng(0))
    assert (alone['mask'] == out['mask']).all()


# Imports, and the real thing


def test_import_is_light():
    code = "import sys, medsketch.data; heavy = 'monai', 'torchvision', 'pydicom', 'nibabel', 'scipy'\n"
    code += 'print([m for m in heavy if m in sys.modules])'
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    )


@real
@pytest.mark.parametrize(
    'folder, n, channels, classes, subjects',
    [
        ('retina', 49, 3, 2, 39),
        ('retina/chasedb1', 20, 3, 2, 10),
        ('chest_xray', 75, 1, None, 47),
        ('ct/lungsegdb', 12, 1, 2, 2),
        ('brain_mri/tcga_glioma_4mod', 28, 4, 3, 1),
        ('brain_mri', 42, 1, 4, 5),
        ('ultrasound/busi', 21, 1, 3, 21),
        ('endoscopy', 150, 3, 2, 150),
    ],
)
def test_real_sets(folder, n, channels, classes, subjects):
    ds = load(REAL / folder, 32, manifest=REAL / 'manifest.csv')
    assert (len(ds), ds.channels, ds.classes and len(ds.classes), len(set(ds.subjects))) == (
        n,
        channels,
        classes,
        subjects,
    )
    assert ds.images.reshape(n, -1).std(1).min() > 5
    if ds.masks is not None:
        assert ds.masks.any() and ds.masks.max() == classes - 1


@real
def test_real_fundus_fills_its_square():
    "The disc touches all four sides, where nearest the black frame was; and the vessels lie on it"
    ds = load(REAL / 'retina/chasedb1', 128)
    lit = ds.images.max(1) > 25
    assert lit.any(1).mean() > 0.97 and lit.any(2).mean() > 0.97 and lit.mean() < 0.85
    assert lit[ds.masks > 0].mean() > 0.97
    vessel, around = (ds.images[:, 1][m].mean() for m in (ds.masks > 0, (ds.masks == 0) & lit))
    assert vessel < around
