"What strangers' files do to reading: every kind of fault makes its own input here, and the right value is asserted."

import gzip
import itertools
import json
import os
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from medsketch.data import (
    ImageData,
    as_image_data,
    contact_sheet,
    files,
    join,
    load_images,
    phantom_data,
    summarise,
)
from medsketch.data.batches import Batches
from medsketch.data.cases import find_cases
from medsketch.data.files import TURNS, open_picture, shown, to_eight_bits
from medsketch.data.masks import read_mask
from medsketch.data.readers import (
    image_to_square,
    read_dicom,
    read_image,
    read_nifti,
    read_picture,
)

S = 32
YY, XX = np.mgrid[:S, :S]
DISC = (YY - 14) ** 2 + (XX - 18) ** 2 < 80
RNG = np.random.default_rng(0)
NOISE = RNG.integers(20, 200, (S, S), np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "Nothing is written outside the test's own folder"
    monkeypatch.setenv('MEDSKETCH_CACHE', str(tmp_path / 'cache'))


def load(path, size=S, **kw):
    "`load_images` where a warning would be a failure"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return load_images(path, size, **kw)


def put(path, a=NOISE, **kw):
    "A picture file with its folders"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path, **kw)
    return path


# DICOM

pydicom = pytest.importorskip('pydicom')


def item(**tags):
    "A data set with these elements; dictionaries become sequences of one item"
    ds = pydicom.dataset.Dataset()
    for k, v in tags.items():
        setattr(ds, k, pydicom.sequence.Sequence([item(**v)]) if isinstance(v, dict) else v)
    return ds


def dicom(path, a, syntax=pydicom.uid.ExplicitVRLittleEndian, bits=None, **tags):
    "A DICOM file of grey (H, W), (F, H, W) or colour (H, W, 3) numbers"
    path.parent.mkdir(parents=True, exist_ok=True)
    colour, ds = a.shape[-1] == 3, pydicom.dataset.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    meta = {
        'TransferSyntaxUID': syntax,
        'MediaStorageSOPInstanceUID': '1.2.3',
        'MediaStorageSOPClassUID': '1.2.840.10008.5.1.4.1.1.7',
    }
    for k, v in meta.items():
        setattr(ds.file_meta, k, v)
    if a.ndim == 3 + colour:
        ds.NumberOfFrames = len(a)
    ds.Rows, ds.Columns = a.shape[-3:-1] if colour else a.shape[-2:]
    each = a.dtype.itemsize * 8
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit = (
        3 if colour else 1,
        each,
        bits or each,
        (bits or each) - 1,
    )
    ds.PixelRepresentation, ds.PhotometricInterpretation = int(a.dtype.kind == 'i'), 'RGB' if colour else 'MONOCHROME2'
    if colour:
        ds.PlanarConfiguration = 0
    ds.PixelData = a.tobytes()
    for k, v in tags.items():
        setattr(ds, k, v)
    ds.save_as(path, enforce_file_format=True)
    return path


SLICES = [np.round(NOISE * k).astype('<u2') for k in (1, 0.7, 0.4)]


@pytest.mark.parametrize('where', ['shared', 'frame', 'top'])
@pytest.mark.parametrize('what', ['window', 'slope'])
def test_enhanced_files_read_like_their_classic_twins(tmp_path, where, what):
    "Rescale and window from the shared groups, from each frame's own, or from the top"

    def tags(i):
        if what == 'window':
            return {'FrameVOILUTSequence': {'WindowCenter': 60 + 20 * i, 'WindowWidth': 100}}, {
                'WindowCenter': 60 + 20 * i,
                'WindowWidth': 100,
            }
        return (
            {
                'PixelValueTransformationSequence': {'RescaleSlope': 1 + i, 'RescaleIntercept': -10 * i},
                'FrameVOILUTSequence': {'WindowCenter': 90, 'WindowWidth': 180},
            },
            {'RescaleSlope': 1 + i, 'RescaleIntercept': -10 * i, 'WindowCenter': 90, 'WindowWidth': 180},
        )

    numbers = range(3) if where == 'frame' else [1] * 3
    twins = [read_dicom(dicom(tmp_path / f'{i}.dcm', SLICES[i], **tags(k)[1]))[0] for i, k in enumerate(numbers)]
    extra = {
        'shared': {'SharedFunctionalGroupsSequence': pydicom.sequence.Sequence([item(**tags(1)[0])])},
        'frame': {
            'PerFrameFunctionalGroupsSequence': pydicom.sequence.Sequence([item(**tags(i)[0]) for i in range(3)])
        },
        'top': tags(1)[1],
    }[where]
    got = read_dicom(dicom(tmp_path / 'e.dcm', np.stack(SLICES), **extra))
    assert len(got) == 3 and all((g == t).all() for g, t in zip(got, twins))


def test_an_empty_or_half_group_of_a_frame_leaves_the_shared_one(tmp_path):
    shared = item(FrameVOILUTSequence={'WindowCenter': 100, 'WindowWidth': 200})
    slopes = item(PixelValueTransformationSequence={'RescaleSlope': 2, 'RescaleIntercept': 0})
    each = [
        item(FrameVOILUTSequence={}),
        item(FrameVOILUTSequence={'WindowCenter': 7}),
        item(PixelValueTransformationSequence={}, FrameVOILUTSequence={'WindowCenter': 50, 'WindowWidth': 100}),
    ]
    shared.PixelValueTransformationSequence = slopes.PixelValueTransformationSequence
    kw = {
        'SharedFunctionalGroupsSequence': pydicom.sequence.Sequence([shared]),
        'PerFrameFunctionalGroupsSequence': pydicom.sequence.Sequence(each),
    }
    got = read_dicom(dicom(tmp_path / 'e.dcm', np.stack(SLICES), **kw))
    for i, (a, centre) in enumerate(zip(SLICES, (100, 100, 50))):
        twin = dicom(tmp_path / 'c.dcm', a, RescaleSlope=2, WindowCenter=centre, WindowWidth=2 * centre)
        assert (got[i] == read_dicom(twin)[0]).all()


@pytest.mark.parametrize('normal', ['axial', 'sagittal'])
def test_frames_come_in_the_order_of_their_positions(tmp_path, normal):
    plane = {'axial': [1, 0, 0, 0, 1, 0], 'sagittal': [0, 1, 0, 0, 0, 1]}[normal]
    at = lambda z: [0, 0, z] if normal == 'axial' else [z, 0, 0]
    each = [item(PlanePositionSequence={'ImagePositionPatient': at(z)}) for z in (5, -5, 0)]
    shared = item(PlaneOrientationSequence={'ImageOrientationPatient': plane})
    kw = {
        'SharedFunctionalGroupsSequence': pydicom.sequence.Sequence([shared]),
        'PerFrameFunctionalGroupsSequence': pydicom.sequence.Sequence(each),
        'WindowCenter': 100,
        'WindowWidth': 200,
    }
    got = read_dicom(dicom(tmp_path / 'e.dcm', np.stack(SLICES), **kw))
    want = read_dicom(
        dicom(tmp_path / 'p.dcm', np.stack([SLICES[i] for i in (1, 2, 0)]), WindowCenter=100, WindowWidth=200)
    )
    assert all((g == w).all() for g, w in zip(got, want))


@pytest.mark.parametrize('bits', [10, 12, 14, 16])
def test_deep_colour_is_scaled_by_the_bits_that_are_used(tmp_path, bits):
    a = (RNG.random((S, S, 3)) * (2**bits - 1)).astype('<u2')
    a[0, 0] = 2**bits - 1
    want = a / (2**bits - 1) * 255
    assert np.abs(read_dicom(dicom(tmp_path / 'a.dcm', a, bits=bits))[0] - want).max() <= 1
    for name in ('a.png', 'a.tif'):
        cv2.imwrite(str(tmp_path / name), a[..., ::-1])
        assert np.abs(read_picture(tmp_path / name) - want).max() <= 1


def test_deep_colour_of_a_folder_shares_its_bits(tmp_path):
    for i, top in enumerate((4095, 1000)):
        cv2.imwrite(str(tmp_path / f'{i}.png'), np.full((S, S, 3), (top, 9, 9), np.uint16))
    assert load(tmp_path).images[:, 2, 5, 5].tolist() == [255, 62]  # BGR on disk


def test_deep_transparency_and_orientation(tmp_path):
    a = np.zeros((S, 20, 4), np.uint16)
    a[:5, :5], a[..., 3] = 65535, 65535
    a[:2, :2, 3] = 0
    cv2.imwrite(str(tmp_path / 'a.png'), a)
    got = read_picture(tmp_path / 'a.png')
    assert got.shape == (S, 20) and got[0, 0] == 0 and got[4, 4] == 255 and got[9, 9] == 0


@pytest.mark.parametrize('kind, value', [('u', 4000), ('i', -2000), ('i', 63536)])
@pytest.mark.parametrize('photometric', ['MONOCHROME2', 'MONOCHROME1'])
def test_padding_is_black_and_takes_no_part(tmp_path, kind, value, photometric):
    a = NOISE.astype(f'<{kind}2')
    (plain,) = read_dicom(
        dicom(
            tmp_path / 'a.dcm', np.where(DISC, a, a[DISC].max()).astype(a.dtype), PhotometricInterpretation=photometric
        )
    )
    padded = np.where(DISC, a, np.array(value).astype(a.dtype))
    pad = int(np.array(value).astype(a.dtype)) if value < 0 or kind == 'u' else -2000
    (got,) = read_dicom(dicom(tmp_path / 'b.dcm', padded, PhotometricInterpretation=photometric, PixelPaddingValue=pad))
    assert not got[~DISC].any() and np.ptp(got[DISC]) > 240 and np.abs(got[DISC].astype(int) - plain[DISC]).mean() < 6


@pytest.mark.parametrize('tags', [{}, {'RescaleIntercept': 0}])
@pytest.mark.parametrize('slope', [0, -0.0])
def test_a_slope_of_nothing_is_said(tmp_path, slope, tags):
    "All pixels would be the same; a blank frame, as PET scanners write it, is blank"
    dicom(tmp_path / 'a.dcm', SLICES[0], RescaleSlope=slope, **tags)
    with pytest.raises(ValueError, match='make all pixels the same'):
        read_dicom(tmp_path / 'a.dcm')
    blank = dicom(tmp_path / 'b.dcm', np.zeros((32, 32), '<u2'), RescaleSlope=slope, RescaleIntercept=0)
    assert not read_dicom(blank)[0].any()


def test_half_a_rescaling(tmp_path):
    "An intercept without a slope counts, so that a window in Hounsfield units fits; empty tags say nothing"
    a = np.tile(np.arange(32, dtype='<u2') * 64, (32, 1))
    window = {'WindowCenter': 0, 'WindowWidth': 2000}
    whole = read_dicom(dicom(tmp_path / 'a.dcm', a, RescaleSlope=1, RescaleIntercept=-1024, **window))[0]
    half = read_dicom(dicom(tmp_path / 'b.dcm', a, RescaleIntercept=-1024, **window))[0]
    empty = read_dicom(dicom(tmp_path / 'c.dcm', a, RescaleSlope=None, RescaleIntercept=-1024, **window))[0]
    assert (half == whole).all() and (empty == whole).all() and len(np.unique(whole)) > 20


def test_float_pixels(tmp_path):
    a = np.tile(np.linspace(0, 0.5, 32, dtype='<f4'), (32, 1))
    ds = pydicom.dcmread(dicom(tmp_path / 'a.dcm', np.zeros((32, 32), '<u2')))
    del ds.PixelData
    ds.FloatPixelData, ds.BitsAllocated = np.where(a > 0.4, np.nan, a).astype('<f4').tobytes(), 32
    ds.save_as(tmp_path / 'a.dcm')
    (got,) = read_dicom(tmp_path / 'a.dcm')
    assert (got[a > 0.4] == 0).all() and got.max() == 255 and len(np.unique(got)) > 20


def test_a_padding_range(tmp_path):
    a = np.where(DISC, NOISE, 5000 + NOISE.astype(int)).astype('<u2')
    (got,) = read_dicom(dicom(tmp_path / 'a.dcm', a, PixelPaddingValue=5300, PixelPaddingRangeLimit=5000))
    assert not got[~DISC].any() and np.ptp(got[DISC]) > 240


FUNCTIONS = {  # PS3.3 C.11.2.1.2.1, C.11.2.1.3.2, C.11.2.1.3.1
    None: lambda x, c, w: (x - (c - 0.5)) / (w - 1) + 0.5,
    'LINEAR': lambda x, c, w: (x - (c - 0.5)) / (w - 1) + 0.5,
    'LINEAR_EXACT': lambda x, c, w: (x - c) / w + 0.5,
    'SIGMOID': lambda x, c, w: 1 / (1 + np.exp(-4 * (x - c) / w)),
}


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('where', ['classic', 'enhanced'])
def test_a_window_is_applied_by_its_function(tmp_path, function, where):
    a = np.tile(np.arange(32, dtype='<u2') * 4, (32, 1))
    window = {'WindowCenter': 44, 'WindowWidth': 12} | ({'VOILUTFunction': function} if function else {})
    tags = window if where == 'classic' else {'SharedFunctionalGroupsSequence': [item(FrameVOILUTSequence=window)]}
    tags |= {'RescaleSlope': 1, 'RescaleIntercept': -10}
    want = np.round(255 * np.clip(FUNCTIONS[function](a - 10.0, 44, 12), 0, 1))
    (got,) = read_dicom(dicom(tmp_path / 'a.dcm', a, **tags))
    assert np.abs(got - want).max() <= 1 and (got == want).mean() > 0.9
    (negative,) = read_dicom(dicom(tmp_path / 'b.dcm', a, PhotometricInterpretation='MONOCHROME1', **tags))
    assert (negative == 255 - got).all()
    (own,) = read_dicom(tmp_path / 'a.dcm', window=(44, 100))  # a window that was asked for is a straight line
    assert np.abs(own - np.clip((a - 10.0 - 44) / 100 + 0.5, 0, 1) * 255).max() <= 1


def test_a_window_narrower_than_one_needs_an_exact_function(tmp_path):
    "A straight line of width 1 would show black and white alone, so the file's own range is shown"
    a = np.tile(np.arange(32, dtype='<u2'), (32, 1))
    tags = {'RescaleSlope': 1 / 64, 'RescaleIntercept': 0, 'WindowCenter': 0.25, 'WindowWidth': 0.5}
    exact = read_dicom(dicom(tmp_path / 'a.dcm', a, VOILUTFunction='LINEAR_EXACT', **tags))[0]
    assert np.abs(exact[0] - np.arange(32) / 32 * 255).max() <= 1
    assert len(np.unique(read_dicom(dicom(tmp_path / 'b.dcm', a, **tags))[0])) > 20
    odd = dicom(tmp_path / 'c.dcm', a, VOILUTFunction='CUBIC', **tags)
    with pytest.raises(ValueError, match='CUBIC'):
        read_dicom(odd)


# Numbers beyond 32 bits


def float64_nifti(path, a):
    nifti(path, np.stack([a.astype(np.float64)] * 3, -1))


def float64_dicom(path, a):
    ds = pydicom.dcmread(dicom(path, np.zeros((32, 32), '<u2')))
    del ds.PixelData
    ds.DoubleFloatPixelData, ds.BitsAllocated = a.astype('<f8').tobytes(), 64
    ds.save_as(path)


WIDE = {'a.nii.gz': float64_nifti, 'a.dcm': float64_dicom}


@pytest.mark.parametrize('name', WIDE)
@pytest.mark.parametrize('normalise', ['percentile', 'zscore'])
def test_values_beyond_32_bits_are_said(tmp_path, name, normalise):
    "They would be infinite, and infinite is black"
    put(tmp_path / 'd/good.png')
    WIDE[name](tmp_path / 'd' / name, NOISE.astype(float) * 1e300)
    with pytest.warns(UserWarning, match='1 of the images'):
        ds = load_images(tmp_path / 'd', S, normalise=normalise)
    ((path, why),) = ds.skipped
    assert Path(path).name == name and '3.4e+38' in why and why.isprintable()
    WIDE[name](tmp_path / 'd' / name, NOISE.astype(float) * 1e30)
    images = load(tmp_path / 'd', normalise=normalise).images
    assert all(len(np.unique(x)) > 100 for x in images)


def test_arrays_beyond_32_bits_are_said():
    image = np.zeros((1, S, S), np.float32)
    with pytest.raises(ValueError, match=r'sample 0: depth goes beyond 3.4e\+38'):
        as_image_data([{'image': image, 'depth': np.full((1, S, S), 1e300)}])
    for v in (1e300, np.float32(1e30)):
        with pytest.raises(ValueError, match='mask'):
            as_image_data([{'image': image, 'mask': np.full((1, S, S), v)}]).in_memory()
    with pytest.raises(ValueError):
        ImageData(np.full((1, 1, S, S), 1e300))


def test_a_series_without_a_window_has_one_scale(tmp_path):
    for i, a in enumerate(SLICES):
        dicom(tmp_path / f'd/{i}.dcm', a * 8, SeriesInstanceUID='1.2.7', PatientID='x')
    dicom(tmp_path / 'd/other.dcm', SLICES[2] * 8, SeriesInstanceUID='1.2.8', PatientID='x')
    means = load(tmp_path / 'd').images.reshape(4, -1).mean(1)
    assert means[1] < 0.85 * means[0] and means[2] < 0.6 * means[0] and means[3] > 0.8 * means[0]


NAMES = {
    'IM000017': 128,
    '1.2.840.113619.2.55.3.0': 128,
    'X.MR.0000.IMA': 128,
    'i0.CTDC.0': 128,
    'S0.DCM': 128,
    'raw.17': 0,
    'plain.dcm': 0,
}


@pytest.mark.parametrize('name', NAMES)
def test_dicom_is_found_by_its_content(tmp_path, name):
    path = dicom(tmp_path / 'd' / name, SLICES[0], WindowCenter=100, WindowWidth=200, PatientID='p')
    want = read_dicom(path)[0]
    if not NAMES[name]:
        path.write_bytes(path.read_bytes()[132:])  # without preamble
    (tmp_path / 'd/notes.17').write_text('1.2.840.10008 is a number\n' * 20)
    (tmp_path / 'd/data.bin').write_bytes(b'\x08\0' + bytes(range(256)))
    ds = load(tmp_path / 'd')
    assert len(ds) == 1 and (ds.images[0, 0] == want).all() and len(ds.subjects[0]) == 12


def test_subjects_fall_back_to_study_and_series(tmp_path):
    who = [
        {'PatientID': 'a', 'StudyInstanceUID': '1.1'},
        {'PatientID': 'a', 'StudyInstanceUID': '1.2'},
        {'PatientID': '', 'StudyInstanceUID': '1.3'},
        {'StudyInstanceUID': '1.3', 'SeriesInstanceUID': '1.4'},
        {'SeriesInstanceUID': '1.5'},
        {'SeriesInstanceUID': '1.5'},
        {},
    ]
    for i, tags in enumerate(who):
        dicom(tmp_path / f'd/{i}.dcm', SLICES[0], **tags)
    s = load(tmp_path / 'd').subjects
    assert (
        s[0] == s[1]
        and s[2] == s[3]
        and s[4] == s[5]
        and s[6] == '6'
        and len(set(s)) == 4
        and all(len(x) == 12 for x in s[:6])
    )


# NIfTI

nibabel = pytest.importorskip('nibabel')


def nifti(path, v, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(v, np.eye(4) if affine is None else affine), path)
    return path


@pytest.mark.parametrize('window', [(40, 400), None])
def test_what_is_no_number_is_the_low_end(tmp_path, window):
    v = RNG.normal(-900, 20, (S, S, 4)).astype(np.float32)
    v[8:24, 8:24] = 40
    v[:4], v[4:6] = np.nan, -np.inf
    got = read_nifti(nifti(tmp_path / 'a.nii.gz', v), window=window)[0]
    assert not got[:, -6:].any() and got[16, 16] in (128, 255)  # x runs to the left of the page
    assert to_eight_bits(np.array([np.nan, 40.0]), (40, 400)).tolist() == [0, 128]


@pytest.mark.parametrize('contrasts', [2, 3, 5, 9])
@pytest.mark.parametrize('size', [16, 64])
def test_contrasts_are_contrasts(tmp_path, contrasts, size):
    v = np.zeros((48, 40, 3, contrasts), np.float32)
    v[8:40, 8:32] = RNG.random((32, 24, 3, contrasts)) + np.arange(1, contrasts + 1)
    ds = load(nifti(tmp_path / 'a.nii.gz', v), size)
    assert ds.images.shape == (3, contrasts, size, size) and load(tmp_path / 'a.nii.gz', size, channels=1).channels == 1
    # the first, not a mean of colours
    assert (load(tmp_path / 'a.nii.gz', size, channels=1).images[:, 0] == ds.images[:, 0]).all()
    assert ds.images[0].any(0).mean() < 0.7  # letterboxed, not cropped like a photograph
    assert image_to_square(np.zeros((48, 40, contrasts), np.uint8), size).shape == (size, size, contrasts)


def test_a_matrix_that_is_no_number_leaves_the_volume_as_it_is_stored(tmp_path):
    v = RNG.random((S, S, 4)).astype(np.float32)
    path = nifti(tmp_path / 'a.nii', v)
    want, data = read_nifti(path), bytearray(path.read_bytes())
    data[280:328] = np.full(12, np.nan, '<f4').tobytes()  # the sform
    path.write_bytes(data)
    assert all((a == b).all() for a, b in zip(read_nifti(path), want))


@pytest.mark.parametrize('shape', [(S, S), (S, S, 1), (S, S, 3, 1), (S, S, 3, 1, 2)])
def test_dimensions_of_length_one(tmp_path, shape):
    got = read_nifti(nifti(tmp_path / 'a.nii', RNG.random(shape).astype(np.float32)))
    assert len(got) == (shape[2] if len(shape) > 2 else 1) and got[0].shape == (
        (S, S, 2) if len(shape) == 5 else (S, S)
    )


def test_z_scores_per_volume_over_the_brain(tmp_path):
    brain = np.zeros((S, S, 4), np.float32)
    brain[6:26, 6:26] = RNG.normal(5, 1, (20, 20, 4))
    for i, scale in enumerate((1, 300)):
        nifti(tmp_path / f'd/p{i}.nii.gz', brain * scale)
    ds = load(tmp_path / 'd', normalise='zscore')
    inside = ds.images[:, 0] > -1
    assert ds.images.dtype == np.float32 and ds.kinds['image'] == 'picture'
    assert inside.mean() == pytest.approx(400 / S**2, abs=0.01)
    assert abs(ds.images[:, 0][inside].mean()) < 0.01 and 5 * ds.images[:, 0][inside].std() == pytest.approx(
        1, abs=0.02
    )
    assert np.abs(ds.images[:4] - ds.images[4:]).max() < 1e-5  # no trace of the scanner's scale
    disk = [load(tmp_path / 'd', normalise='zscore', cache='disk') for _ in range(2)]
    assert {d.fingerprint() for d in disk} == {ds.fingerprint()} and disk[1].batch([0])['image'].dtype == torch.float32


# Masks

BLANK = np.zeros((S, S), np.uint8)
FORE = np.uint8(DISC) * 255
SOFT = cv2.resize(FORE[::2, ::2], (S, S), interpolation=cv2.INTER_LINEAR)
MASKS = {
    '0/1': FORE // 255,
    '0/255': FORE,
    '16 bits': FORE.astype(np.uint16) * 257,
    'bilevel': DISC,
    'float': DISC * np.float32(0.9),
    'small float': DISC * np.float32(0.01),
    'float labels': DISC.astype(np.float32),
    'int32': DISC.astype(np.int32),
    'alpha on black': np.dstack([BLANK] * 3 + [FORE]),
    'alpha on white': np.dstack([BLANK + 255] * 3 + [FORE]),
    'white, opaque': np.dstack([FORE] * 3 + [BLANK + 255]),
    'white on transparent': np.dstack([FORE] * 4),
    'grey and alpha': np.dstack([BLANK, FORE]),
    'grey as RGB': np.dstack([FORE] * 3),
    'red': np.dstack([FORE, BLANK, BLANK]),
    'green': np.dstack([BLANK, FORE, BLANK]),
    'blue': np.dstack([BLANK, BLANK, FORE // 2]),
}


@pytest.mark.parametrize('form', MASKS)
def test_masks_of_every_form(tmp_path, form):
    a = MASKS[form]
    path = put(tmp_path / ('a.tif' if a.dtype.kind in 'fi' else 'a.png'), a)
    (got,) = read_mask(path)
    assert ((got > 0) == DISC).all() and set(np.unique(got)) <= {0, 1, 255}


@pytest.mark.parametrize('form', ['0/255', 'red', 'green', 'blue', 'grey as RGB'])
def test_masks_as_jpeg(tmp_path, form):
    big = np.repeat(np.repeat(MASKS[form], 8, 0), 8, 1)
    (got,) = read_mask(put(tmp_path / 'a.jpg', big, quality=70))
    assert ((got > 0) == np.repeat(np.repeat(DISC, 8, 0), 8, 1)).mean() > 0.99 and set(np.unique(got)) == {0, 255}
    assert not read_mask(put(tmp_path / 'b.jpg', big * 0))[0].any()


@pytest.mark.parametrize('scale', [1.5, 2, 3])
@pytest.mark.parametrize('how', [cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA])
def test_soft_edges_go_to_the_nearer_value(tmp_path, scale, how):
    a = np.zeros((48, 48), np.uint8)
    cv2.circle(a, (24, 24), 15, 255, -1)
    soft = cv2.resize(a, None, fx=scale, fy=scale, interpolation=how)
    (got,) = read_mask(put(tmp_path / 'a.png', soft))
    assert set(np.unique(got)) == {0, 255} and ((got > 0) == (soft > 127)).mean() > 0.995


def test_antialiased_and_two_classes(tmp_path):
    a = np.zeros((64, 64), np.uint8)
    cv2.circle(a, (32, 32), 20, 255, -1, cv2.LINE_AA)
    cv2.circle(a, (32, 32), 9, 128, -1, cv2.LINE_AA)
    (got,) = read_mask(put(tmp_path / 'a.png', a))
    assert set(np.unique(got)) == {0, 128, 255} and (got == 128).sum() > 200
    ring = (got == 128) & ((np.mgrid[:64, :64] - 32) ** 2).sum(0).__gt__(15**2)
    # the outer edge is no ring of the inner class
    assert not ring.any()


@pytest.mark.parametrize('labels', [range(4), range(0, 250, 10), (0, 1, 2, 4), (0, 60, 120, 240)])
def test_label_maps_are_left_alone(tmp_path, labels):
    a = RNG.choice(np.array(labels, np.uint8), (S // 4, S // 4)).repeat(4, 0).repeat(4, 1)
    a[3, 3] = labels[1]
    assert (read_mask(put(tmp_path / 'a.png', a))[0] == a).all()


def test_float_label_maps_and_probabilities_in_volumes(tmp_path):
    v = np.repeat(DISC[..., None], 3, 2)
    softmax = np.where(v, 0.9, 0.1)  # never quite nothing
    for name, a in {
        'labels': v * 2.0001,
        'probability': v * 0.8,
        'softmax': softmax,
        'nan': np.where(v, 1.0, np.nan),
    }.items():
        got = read_mask(nifti(tmp_path / f'{name}.nii.gz', a.astype(np.float32)))
        assert all(((g > 0) == (got[0] > 0)).all() for g in got) and (got[0] > 0).sum() == DISC.sum()
    with pytest.raises(ValueError, match='with 2 channels'):
        read_mask(nifti(tmp_path / 'm.nii', np.zeros((S, S, 2, 2), np.float32)))


@pytest.mark.parametrize('full', [255, 65535])
def test_one_class_under_two_numbers(tmp_path, full):
    for i, m in enumerate((FORE // 255, FORE.astype(np.uint16) // 255 * full, BLANK)):
        put(tmp_path / f'images/{i}.png')
        put(tmp_path / f'masks/{i}.png', m)
    ds = load(tmp_path)
    assert (
        ds.classes == ('background', 'foreground')
        and ((ds.masks[0] > 0) == DISC).all()
        and (ds.masks[0] == ds.masks[1]).all()
    )
    put(tmp_path / 'masks/0.png', np.where(YY < 16, FORE, FORE // 255).astype(np.uint8))
    if full == 255:
        assert load(tmp_path).classes == ('background', 'label 1', 'label 255')  # one mask uses both


@pytest.mark.parametrize('tag', [3, 6, 8])
def test_image_and_mask_turn_together(tmp_path, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    put(tmp_path / 'images/0.png', np.where(DISC, 200, NOISE // 4).astype(np.uint8), exif=exif)
    put(tmp_path / 'masks/0.png', FORE, exif=exif)
    ds = load(tmp_path)
    assert ds.images[0, 0][ds.masks[0] > 0].min() == 200 and ((ds.masks[0] > 0) != DISC).any()


RED, BACK = (np.dstack([FORE, BLANK, BLANK]), np.dstack([255 - FORE] * 3))
OVERLAYS = {
    'half transparent': np.dstack([RED, FORE // 2]),
    'nearly transparent': np.dstack([RED, FORE // 5]),
    'all of it half transparent': np.dstack([RED, BLANK + 100]),
    'black on transparent white': np.dstack([BACK, FORE]),
}


@pytest.mark.parametrize('case', OVERLAYS)
def test_overlays_with_transparency(tmp_path, case):
    assert ((read_mask(put(tmp_path / 'a.png', OVERLAYS[case]))[0] > 0) == DISC).all()


def test_a_palette_with_transparency(tmp_path):
    im = Image.fromarray(np.uint8(DISC), 'P')
    im.putpalette([255, 255, 255, 0, 0, 0])  # a black object on transparent white
    im.save(tmp_path / 'a.png', transparency=0)
    assert ((read_mask(tmp_path / 'a.png')[0] > 0) == DISC).all()


BELOW_ZERO = {
    'whole': DISC * np.int32(3) - 1,
    'float': DISC * np.float32(2) - 1,
    'ignored': np.where(YY < 4, -1, DISC).astype(np.int32),
}


@pytest.mark.parametrize('case', BELOW_ZERO)
def test_what_is_below_zero_is_background(tmp_path, case):
    put(tmp_path / 'images/a.png')
    put(tmp_path / 'masks/a.tif', BELOW_ZERO[case])
    ds = load(tmp_path)
    assert ds.classes == ('background', 'foreground') and ((ds.masks[0] > 0) == DISC).all()


def test_a_class_number_in_one_channel_is_seen(tmp_path):
    assert ((read_mask(put(tmp_path / 'a.png', RED // 255))[0] > 0) == DISC).all()


@pytest.mark.parametrize(
    'name, pixels, says',
    [
        ('a.jpg', FORE // 255 * 2, 'a JPEG mask of brightness'),
        ('a.tif', np.full((S, S), 0.5, np.float32), 'a mask that is 0.5 everywhere'),
    ],
)
def test_a_mask_is_never_empty_without_a_word(tmp_path, name, pixels, says):
    kw = {'quality': 100} if name == 'a.jpg' else {}
    with pytest.raises(ValueError, match=says):
        read_mask(put(tmp_path / name, pixels, **kw))
    assert not read_mask(put(tmp_path / name, pixels * 0, **kw))[0].any()


BAD_MASKS = {
    'colours': lambda p: put(p, RNG.integers(0, 255, (S, S, 3), np.uint8)),
    'instances': lambda p: put(p, np.arange(S * S, dtype=np.uint16).reshape(S, S)),
    'broken': lambda p: p.write_text('no'),
}


@pytest.mark.parametrize('bad', BAD_MASKS)
def test_who_needs_no_masks_reads_none(tmp_path, bad):
    for i in range(3):
        put(tmp_path / f'images/{i}.png')
        (tmp_path / 'masks').mkdir(exist_ok=True)
        if i < 2:
            BAD_MASKS[bad](tmp_path / f'masks/{i}.png')
    ds = load(tmp_path, masks=False)
    assert len(ds) == 3 and ds.masks is None and not ds.skipped


def test_instances_are_a_plane(tmp_path):
    ids = np.arange(400).reshape(20, 20).repeat(2, 0).repeat(2, 1)[:S, :S].astype(np.uint16)
    put(tmp_path / 'images/0.png')
    put(tmp_path / 'masks/0.png', ids)
    for cache in ('memory', 'disk', 'disk'):
        ds = load(tmp_path, masks='instances', cache=cache)
        assert (
            ds.kinds['instances'] == 'instances'
            and (ds.planes['instances'][0] == ids).all()
            and ds.batch([0])['instances'].max() == ids.max()
        )


# Layouts

LAYOUTS = {
    'imgs + masks with an ending': ('imgs/{}.png', 'masks/{}_mask.png'),
    'image + mask': ('image/{}.png', 'mask/{}.png'),
    'Images + Masks': ('Images/{}.png', 'Masks/{}.png'),
    'DRIVE': ('training/images/{}_training.png', 'training/1st_manual/{}_manual1.png'),
    'beside': ('a/{}.png', 'a/{}_mask.png'),
    'beside, other words': ('{}.png', '{}_segmentation.png'),
    'below': ('{}.png', 'masks/{}.png'),
    'images + labels': ('x/images/{}.png', 'x/labels/{}.png'),
    'deep': ('images/train/{}.png', 'masks/train/{}.png'),
    'images + gt': ('images/{}.png', 'gt/{}_GT.png'),
    'beside, in images': ('images/{}.png', 'images/{}_mask.png'),
    'image endings': ('images/{}_image.png', 'masks/{}_label.png'),
    'words in capitals': ('{}.png', '{}Mask.png'),
    'a word in front': ('{}.png', 'mask_{}.png'),
    'words in front': ('images/img_{}.png', 'masks/mask_{}.png'),
    'behind a dot': ('{}.png', '{}.mask.png'),
    'two words behind': ('{}.png', '{}_seg_mask.png'),
    'contours': ('{}.png', '{}_contour_mask.png'),
    'CHASE_DB1': ('Image_{}.jpg', 'Image_{}_1stHO.png'),
    'STARE': ('{}.ppm', '{}.ah.ppm'),
    'HRF': ('images/{}.png', 'manual1/{}.tif'),
    'VOC': ('JPEGImages/{}.jpg', 'SegmentationClass/{}.png'),
    'ISIC': ('ISIC_Task1-2_Input/ISIC_{}.jpg', 'ISIC_Task1_GroundTruth/ISIC_{}_segmentation.png'),
    'CVC': ('Original/{}.tif', 'Ground Truth/{}.tif'),
    'two words of folders': ('train_images/{}.png', 'train_masks/{}.png'),
    'the other way round': ('images-train/{}.png', 'labels-train/{}.png'),
    'in one folder of a patient': ('p/T1 Image/{}.png', 'p/T1 Mask/{}.png'),
}


WORDLESS = {  # names that say nothing to us: told by what masks look like
    'x_roi': ('{}.png', '{}_roi.png'),
    'capitals': ('{}.png', '{}-ROI.png'),
    'input + target': ('input/{}.png', 'target/{}.png'),
    'inputs + targets': ('inputs/{}.jpg', 'targets/{}.png'),
    'A + B': ('A/{}.png', 'B/{}.png'),
    'images + rois': ('images/{}.png', 'rois/{}.png'),
    'a folder and a word': ('imgs/{}.png', 'rois/{}_roi.png'),
    'frames + labels': ('frames/{}.png', 'labels/{}.png'),
    'radiographs': ('CXR_png/{}.png', 'ManualMask/{}.png'),
    'ISIC 2017': ('ISIC-2017_Training_Data/{}.jpg', 'ISIC-2017_Training_Part1_GroundTruth/{}_segmentation.png'),
    'fundus + vessel': ('fundus/{}.png', 'vessel/{}.tif'),
    'a tumour': ('{}.png', '{}_tumour.png'),
    'words that are glued': ('im{}.png', 'seg{}.png'),
    'brackets': ('p ({}).png', 'mask ({}).png'),
    'patients': ('{}/t1.png', '{}/tumour.png'),
    'patients, deeper': ('{}/ct/0.png', '{}/outline/0.png'),
    'JPEG masks': ('in/{}.jpg', 'out/{}.jpg'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_masks_are_paired_and_never_images(tmp_path, layout):
    image, mask = LAYOUTS[layout]
    for i in range(3):
        put(tmp_path / 'd' / image.format(f'c{i}'), np.dstack([NOISE] * 3))
        put(tmp_path / 'd' / mask.format(f'c{i}'), np.dstack([np.roll(FORE, i, 1)] * 3))
    if layout == 'HRF':  # the field of view, which is no segmentation
        put(tmp_path / 'd/mask/c0_mask.tif', BLANK + 255)
    if layout == 'DRIVE':
        put(tmp_path / 'd/training/mask/c0_training_mask.png', BLANK + 255)
    ds = load(tmp_path / 'd')
    assert len(ds) == 3 and ds.classes == ('background', 'foreground')
    assert all(((ds.masks[i] > 0) == np.roll(DISC, i, 1)).all() for i in range(3))
    put(tmp_path / 'd' / mask.format('lonely'), np.dstack([FORE] * 3))
    with pytest.warns(UserWarning, match='looks like a mask'):
        ds = load_images(tmp_path / 'd', S)
    assert len(ds) == 3 and 'lonely' in ds.skipped[0][0] and len(load(tmp_path / 'd', masks=False)) == 3


def test_a_mask_for_each_side_and_a_mask_for_each_object(tmp_path):
    "Montgomery: left and right lung below one folder of masks. DSB 2018: a folder for each image, a file for each cell"
    halves = [np.where(np.arange(S) < S // 2, FORE, 0), np.where(np.arange(S) < S // 2, 0, FORE)]
    for i in range(3):
        put(tmp_path / f'cxr/CXR_png/c{i}.png')
        put(tmp_path / f'dsb/c{i}/images/c{i}.png')
        for k, side in enumerate(('left', 'right')):
            put(tmp_path / f'cxr/ManualMask/{side}Mask/c{i}.png', halves[k])
            put(tmp_path / f'dsb/c{i}/masks/{k}abc{i}.png', halves[k])
    for folder in ('cxr', 'dsb'):
        ds = load(tmp_path / folder)
        assert len(ds) == 3 and all(((ds.masks[i] > 0) == DISC).all() for i in range(3)), folder
    put(tmp_path / 'one/images/c0.png'), put(tmp_path / 'one/masks/c1.png', FORE)
    with pytest.warns(UserWarning, match='looks like a mask'):
        assert load_images(tmp_path / 'one', S).masks is None  # this folder is not called as its image
    for name in ('c0', 'c1'):
        put(tmp_path / f'two/{name}/images/{name}.png')
        put(tmp_path / f'two/{name}/masks/{name[1]}abc.png', FORE)
    put(tmp_path / 'two/c0/images/other.png')  # whose masks are they now?
    with pytest.warns(UserWarning, match='it has no mask'):
        assert [p.split('/')[-1] for p in load_images(tmp_path / 'two', S).paths] == ['c1.png']


def cell(y, x, r):
    return np.uint8((YY - y) ** 2 + (XX - x) ** 2 < r**2) * 255


CELLS = [cell(14, 10, 9), cell(14, 18, 5), cell(28, 28, 2), BLANK]  # two overlap, and one file is empty


@pytest.mark.parametrize('cache', ['memory', 'disk'])
def test_a_file_for_each_cell_gives_instances(tmp_path, cache):
    "DSB 2018: one mask, and a number for each file; where two overlap, the smaller lies on top"
    for i in range(2):
        put(tmp_path / f'd/c{i}/images/c{i}.png')
        for k, a in enumerate(CELLS):
            put(tmp_path / f'd/c{i}/masks/{k}ab{i}.png', np.roll(a, i, 0))
    for masks in (None, None, True, 'instances'):  # twice, the second time out of the cache
        ds = load(tmp_path / 'd', masks=masks, cache=cache)
        for i, ids in enumerate(ds.planes['instances']):
            large, small, alone, _ = (np.roll(a, i, 0) > 0 for a in CELLS)
            assert (ids == np.where(small, 2, np.where(large, 1, np.where(alone, 3, 0)))).all()
        assert ds.kinds['instances'] == 'instances' and (masks == 'instances') == (ds.masks is None)
        assert masks == 'instances' or ((ds.masks > 0) == (ds.planes['instances'] > 0)).all()
    assert 'instances' not in load(tmp_path / 'd', masks=False).planes
    sheet = contact_sheet(load(tmp_path / 'd'))
    assert (sheet != contact_sheet(load(tmp_path / 'd').with_planes(instances=None))).any()


def test_instances_of_several_masks_beside_an_image(tmp_path):
    "Each file an object; asked for only, for endings such as `_1` do not say that they are objects"
    put(tmp_path / 'a.png'), put(tmp_path / 'b.png')
    put(tmp_path / 'a_mask.png', CELLS[0] // 255 * 7)
    put(tmp_path / 'a_mask_1.png', CELLS[2] // 255 * 7)
    put(tmp_path / 'b_mask.png', CELLS[0] // 255 * 7 + CELLS[2] // 255 * 9)
    a, b = load(tmp_path, masks='instances').planes['instances']
    assert set(np.unique(a)) == {0, 1, 2} and set(np.unique(b)) == {0, 7, 9}  # numbered; as they stand in one file
    assert set(load(tmp_path).planes) == {'image', 'mask'}


def test_instances_of_a_set_that_is_joined_with_another(tmp_path):
    put(tmp_path / 'd/c/images/c.png'), put(tmp_path / 'd/c/masks/x1.png', CELLS[0])
    put(tmp_path / 'e/images/c.png'), put(tmp_path / 'e/masks/c.png', CELLS[1])
    cells, other = load(tmp_path / 'd'), load(tmp_path / 'e')
    assert 'instances' in join(cells, cells).planes and set(join(cells, other).planes) == {'image', 'mask'}
    assert set(join(other, cells).planes) == {'image', 'mask'}


def test_masks_of_one_image_are_read_one_after_the_other(tmp_path, monkeypatch):
    "A picture with a thousand cells does not need a thousand masks in memory"
    import gc

    from medsketch.data import masks

    class Mask(np.ndarray):
        alive = 0

        def __del__(self):
            Mask.alive -= 1

    def one(path, axis):
        Mask.alive += 1
        seen.append(Mask.alive)
        return [np.full((4, 4), int(path), np.int32).view(Mask)]

    for read in (masks.read_masks, masks.read_objects):
        seen = []
        monkeypatch.setattr(masks, 'read_mask', one)
        read([str(k) for k in range(20)])
        gc.collect()
        assert max(seen) < 10


def test_a_folder_beside_masks_holds_the_images_only_if_none_lie_above(tmp_path):
    for i in range(3):
        for folder, pixels in {'.': None, 'masks': FORE, 'preview': None}.items():
            put(tmp_path / folder / f'c{i}.png', *([] if pixels is None else [pixels]))
    with pytest.warns(UserWarning, match='it has no mask'):
        found = load_images(tmp_path, S).paths
    assert sorted(found) == [str(tmp_path / f'c{i}.png') for i in range(3)]


STRANGERS = {  # (images, masks) that have only digits or a piece of a checksum in common
    'a checksum': ('c0 c1', '0abc'),
    'checksums': ('c0 c1 c2', '0abc 1def 2fed'),
    'a piece of a checksum': ('1b2c-4d 77aa-01', '1b2c5e 77aa02'),
    'a number and a word': ('c0 c1', '0-abc'),
    'a date': ('20200101_p1 20200102_p2', '20200101_p7'),
    'dates': ('ann-2020-01-02 bob-2020-01-03', '2020-01-02-bob 2020-01-03-eve'),
    'patient 1 and 10': ('patient1 patient2', 'patient10'),
    'patients of one day': ('ann_20200102 bob_20200102', '20200102'),
    'other letters': ('甲1 乙2', '丙1 丁2'),
    'padded with zeros': ('case1 case11', 'case01 case011'),
}


@pytest.mark.parametrize('case', STRANGERS)
@pytest.mark.parametrize('place', ['images/{}.png masks/{}.png', '{}.png {}_mask.png'])
def test_masks_are_never_paired_by_a_number_alone(tmp_path, case, place):
    names = [n.split() for n in STRANGERS[case]]
    image, mask = place.split()
    for name in names[0]:
        put(tmp_path / image.format(name))
    for name in names[1]:
        put(tmp_path / mask.format(name), FORE)
    with pytest.warns(UserWarning, match='looks like a mask'):
        ds = load_images(tmp_path, S)
    assert ds.masks is None and len(ds) == len(names[0]) and len(ds.skipped) == len(names[1])


FRIENDS = {
    'a word in front': ('img_{}', '{}'),
    'another word in front': ('scan-{}', '{}'),
    'two words in front': ('ct_{}', 'roi_{}'),
    'glued words': ('im{}', 'roi{}'),
    'a word behind': ('{}', '{}_tumour'),
    'in front and behind': ('eye {}', '{}-vessels'),
    'letters with accents': ('Übung{}', 'U\u0308bung{}'),
    'other letters': ('影像{}', '掩膜{}'),
}


@pytest.mark.parametrize('case', FRIENDS)
@pytest.mark.parametrize('place', ['images/{}.png masks/{}.png', 'frames/{}.png rois/{}.png'])
@pytest.mark.parametrize('numbers', ['001 002', '1 10 11', '2020-01-02 2020-01-03'])
def test_masks_are_paired_by_a_number_and_words_that_all_have(tmp_path, case, place, numbers):
    image, mask = (p.format(n) for p, n in zip(place.split(), FRIENDS[case]))
    for k, n in enumerate(numbers.split()):
        put(tmp_path / image.format(n))
        put(tmp_path / mask.format(n), np.roll(FORE, k, 1))
    ds = load(tmp_path)
    assert all(((m > 0) == np.roll(DISC, k, 1)).all() for k, m in enumerate(ds.masks)) and len(ds) == k + 1


@pytest.mark.parametrize('pair', ['images/img_001 masks/001_mask', 'img_001 001_mask', 'im-1 1_seg', '7 7_tumour'])
def test_a_lone_pair(tmp_path, pair):
    image, mask = pair.split()
    put(tmp_path / f'{image}.png'), put(tmp_path / f'{mask}.png', FORE)
    if pair.startswith('im-'):
        with pytest.warns(UserWarning, match='looks like a mask'):
            assert load_images(tmp_path, S).masks is None
    else:
        assert load(tmp_path).masks.any()


@pytest.mark.parametrize('layout', WORDLESS)
def test_masks_are_told_by_their_looks_where_names_say_nothing(tmp_path, layout):
    image, mask = WORDLESS[layout]
    for i in range(3):
        put(tmp_path / 'd' / image.format(f'c{i}'), NOISE)
        put(tmp_path / 'd' / mask.format(f'c{i}'), np.roll(FORE, i, 1))
    ds = load(tmp_path / 'd')
    assert len(ds) == 3 and ds.classes == ('background', 'foreground')
    assert all(((ds.masks[i] > 0) == np.roll(DISC, i, 1)).all() for i in range(3))
    assert len(load(tmp_path / 'd', masks=False)) == 3


def test_masks_in_volumes_are_told_by_their_looks(tmp_path):
    for i in range(2):
        nifti(tmp_path / f'p{i}_ct.nii.gz', RNG.random((S, S, 3)) * 1000)
        nifti(tmp_path / f'p{i}_tumour.nii.gz', np.dstack([DISC] * 3).astype(np.uint8))
    ds = load(tmp_path)
    assert len(ds) == 6 and ds.masks.any()


def test_what_lies_beside_the_images_is_counted(tmp_path):
    for i in range(3):
        put(tmp_path / f'images/{i}.png')
        put(tmp_path / f'thumbnails/{i}.png', np.flipud(NOISE))
    ds = load(tmp_path)
    assert len(ds) == 3 and any('left out  3: in folder thumbnails' in line for line in summarise(ds).lines())


def test_masks_that_look_so_and_have_no_image_are_said(tmp_path):
    for i in range(3):
        put(tmp_path / f'd/CXR_png/{i}.png')
        put(tmp_path / f'd/ManualMask/left/{i}x.png', FORE)
        put(tmp_path / f'e/scans/{i}.png')
        put(tmp_path / f'e/rois/{i}.png', FORE)
    put(tmp_path / 'e/rois/lonely.png', FORE)
    for folder, n in (('d', 3), ('e', 1)):
        with pytest.warns(UserWarning, match='looks like a mask'):
            ds = load_images(tmp_path / folder, S)
        assert len(ds) == 3 and len(ds.skipped) == n


LOOK_ALIKE = {
    'two contrasts': ('T1/{}.png', 'T2/{}.png', lambda i: np.flipud(NOISE)),
    'eyes': ('{}_left.png', '{}_right.png', lambda i: np.flipud(NOISE)),
    'drawings on paper': ('photo/{}.png', 'drawn/{}.png', lambda i: 255 - FORE),
    'one black image': ('a/{}.png', 'b/{}.png', lambda i: BLANK if i == 1 else NOISE),
}


@pytest.mark.parametrize('case', LOOK_ALIKE)
def test_images_with_the_same_names_stay_images(tmp_path, case):
    first, second, other = LOOK_ALIKE[case]
    for i in range(3):
        put(tmp_path / first.format(i), NOISE)
        put(tmp_path / second.format(i), other(i))
    assert len(load(tmp_path)) == 6


def test_folders_of_the_same_words_stay_apart(tmp_path):
    "The same names in a set to train on and in one to test on"
    for k, part in enumerate(('train', 'test')):
        put(tmp_path / f'{part}_images/0.png', NOISE // (k + 1))
        put(tmp_path / f'{part}_masks/0.png', np.roll(FORE, 5 * k, 1))
    ds = load(tmp_path)
    test = int(ds.images[0].mean() > ds.images[1].mean())
    assert len(ds) == 2 and ((ds.masks[test] > 0) == np.roll(DISC, 5, 1)).all()
    assert ((ds.masks[1 - test] > 0) == DISC).all()


NO_MASKS = {
    'patients': ('scan 1/{}.png', 'scan 2/{}.png'),
    'faces': ('with_mask/{}.png', 'without_mask/{}.png'),
    'classes': ('label_0/{}.png', 'label_1/{}.png'),
    'words in front of all': ('mask_{}.png', 'gt_{}.png'),
    'a word inside': ('segment{}.png', 'labelled{}.png'),
}


@pytest.mark.parametrize('layout', NO_MASKS)
def test_names_that_only_sound_like_masks(tmp_path, layout):
    for name in NO_MASKS[layout]:
        for i in range(3):
            put(tmp_path / name.format(f'c{i}'))
    ds = load(tmp_path)
    assert len(ds) == 6 and ds.masks is None
    if layout == 'patients':
        assert sorted(set(ds.subjects)) == ['scan 1', 'scan 2']


def test_masks_without_any_image_are_said(tmp_path):
    "Not one can be paired: they are listed all the same, unless nobody asked for masks"
    for i in range(3):
        put(tmp_path / f'c{i}_sat.png')
        put(tmp_path / f'c{i}_mask.png', FORE)
    with pytest.warns(UserWarning, match='looks like a mask'):
        assert len(load_images(tmp_path, S).skipped) == 3
    assert not load(tmp_path, masks=False).skipped


def test_several_masks_of_one_image_are_joined(tmp_path):
    put(tmp_path / 'b (1).png')
    put(tmp_path / 'b (1)_mask.png', FORE)
    put(tmp_path / 'b (1)_mask_1.png', np.flipud(FORE).copy())
    ds = load(tmp_path)
    assert len(ds) == 1 and ((ds.masks[0] > 0) == (DISC | DISC[::-1])).all()


def test_a_folder_of_masks_alone_is_a_folder_of_images(tmp_path):
    for i in range(3):
        put(tmp_path / f'masks/{i}_mask.png', FORE)
    assert len(load(tmp_path / 'masks')) == 3 and len(find_cases(tmp_path)) == 3


def test_nnunet_channels_and_labels(tmp_path):
    v = np.zeros((S, S, 4), np.float32)
    v[8:24, 8:24] = 100 + RNG.random((16, 16, 4))
    for case in 'ab':
        for c in range(2):
            nifti(tmp_path / f'imagesTr/{case}_{c:04}.nii.gz', v * (c + 1))
        nifti(tmp_path / f'labelsTr/{case}.nii.gz', (v > 0).astype(np.uint8))
    nifti(tmp_path / 'imagesTr/c_0000.nii.gz', v)
    nifti(tmp_path / 'labelsTr/c.nii.gz', (v > 0).astype(np.uint8))
    with pytest.warns(UserWarning, match='it has 1 channels, others 2'):
        ds = load_images(tmp_path, S)
    assert (len(ds), ds.channels, sorted(set(ds.subjects)), ds.classes) == (
        8,
        2,
        ['a', 'b'],
        ('background', 'foreground'),
    )
    for i in range(3):
        put(tmp_path / f'plain/scan_{i:04}.png')
    assert load(tmp_path / 'plain').channels == 1 and len(load(tmp_path / 'plain')) == 3


def stack(path, pages, **kw):
    "A TIFF of several pages"
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *more = (Image.fromarray(a) for a in pages)
    first.save(path, save_all=True, append_images=more, **kw)
    return path


def test_pages_of_a_tiff_are_slices(tmp_path):
    pages, masks = [NOISE, np.flipud(NOISE), NOISE // 2], [FORE, BLANK, np.flipud(FORE)]
    stack(tmp_path / 'd/images/a.tif', pages), stack(tmp_path / 'd/masks/a.tif', masks)
    put(tmp_path / 'd/images/b.png'), put(tmp_path / 'd/masks/b.png', FORE)
    ds = load(tmp_path / 'd')
    assert ds.subjects == ['a'] * 3 + ['b'] and [Path(p).name[5:] for p in ds.paths] == ['#0', '#1', '#2', '']
    assert all((ds.images[i, 0] == a).all() for i, a in enumerate(pages))
    assert all(((ds.masks[i] > 0) == (a > 0)).all() for i, a in enumerate(masks))
    assert load(tmp_path / 'd', normalise='zscore').images.shape == (4, 1, S, S)
    put(tmp_path / 'd/masks/a.tif', FORE)
    with pytest.warns(UserWarning, match='different numbers of slices: 3, 1'):
        assert len(load_images(tmp_path / 'd', S)) == 1


def test_pages_share_their_brightness_and_their_colour(tmp_path):
    deep = [NOISE.astype(np.uint16) * 100, NOISE.astype(np.uint16) * 50]
    a, b = read_image(stack(tmp_path / 'a.tif', deep))
    assert b.mean() < 0.6 * a.mean()
    grey = np.dstack([NOISE] * 3)
    assert [x.shape for x in read_image(stack(tmp_path / 'b.tif', [grey, grey]))] == [(S, S)] * 2
    assert [x.shape for x in read_image(stack(tmp_path / 'c.tif', [grey, grey // np.uint8([1, 2, 1])]))] == [
        (S, S, 3)
    ] * 2


def test_previews_behind_a_picture_are_no_slices(tmp_path, monkeypatch):
    assert len(read_image(stack(tmp_path / 'a.tif', [NOISE, NOISE[::2, ::2]]))) == 1  # as microscopes write it
    assert len(read_image(stack(tmp_path / 'a.gif', [NOISE, np.flipud(NOISE)]))) == 1
    many = stack(tmp_path / 'b.tif', [NOISE] * 3)
    monkeypatch.setattr(files, 'MOST_BYTES', 3 * S * S * 8 - 1)
    with pytest.raises(ValueError, match='3 pages of 32×32 pixels would take'):
        read_image(many)


def test_pages_of_a_stack_are_walked_through_once(tmp_path, monkeypatch):
    "Pillow goes to a page by walking from the first: thousands of pages, each sought anew, took minutes"
    walked = []
    seek = TiffImageFile._seek
    monkeypatch.setattr(TiffImageFile, '_seek', lambda im, i: (walked.append(i), seek(im, i))[1])
    path = stack(tmp_path / 'a.tif', [FORE] * 20)
    for read in (read_image, read_mask):
        walked.clear()
        assert len(read(path)) == 20 and len(walked) <= 3 * 20
        assert sum(a > b for a, b in itertools.pairwise(walked)) <= 3  # back to the first page, for another walk
    monkeypatch.setattr(files, 'MOST_PAGES', 19)
    with pytest.raises(ValueError, match='more than 19 pages'):
        read_image(path)
    monkeypatch.setattr(files, 'MOST_PAGES', 20)
    assert len(read_image(path)) == 20
    walked.clear()
    monkeypatch.setattr(files, 'MOST_BYTES', 5 * S * S * 8 - 1)
    with pytest.raises(ValueError, match='5 pages of'):
        read_image(path)
    assert len(walked) <= 6  # refused there, whatever follows


def test_pages_turn_with_their_masks(tmp_path):
    for i in (1, 3, 6):
        tag = {274: i}
        stack(tmp_path / f'{i}/images/a.tif', [NOISE] * 2, tiffinfo=tag)
        stack(tmp_path / f'{i}/masks/a.tif', [FORE] * 2, tiffinfo=tag)
        ds = load(tmp_path / f'{i}')
        turn = TURNS.get(i, lambda a: a)
        assert all((ds.images[k, 0] == turn(NOISE)).all() for k in range(2))
        assert all(((ds.masks[k] > 0) == (turn(FORE) > 0)).all() for k in range(2))


def test_patient_folders_are_subjects_where_names_repeat(tmp_path):
    for p in 'xyz':
        for i in range(3):
            put(tmp_path / f'train/{p}/{i:03}.png')
    assert sorted(set(load(tmp_path).subjects)) == ['train/x', 'train/y', 'train/z']
    for p in 'xy':
        for kind in ('images', 'masks'):
            put(tmp_path / f'two/{p}/{kind}/0.png', FORE)
    assert sorted(load(tmp_path / 'two').subjects) == ['x', 'y']
    for p in ('benign', 'malignant'):
        put(tmp_path / f'classes/{p}/{p} 1.png')
    assert sorted(load(tmp_path / 'classes').subjects) == ['benign 1', 'malignant 1']


def test_same_stems_in_one_folder_have_names_of_their_own(tmp_path):
    for end in ('png', 'jpg', 'bmp'):
        put(tmp_path / f'a.{end}')
    cases = find_cases(tmp_path)
    assert len({c.name for c in cases}) == 3 and set(load(tmp_path).subjects) == {'a'}


def test_linked_folders_are_entered_once(tmp_path):
    put(tmp_path / 'far/one/a.png')
    put(tmp_path / 'far/two/b.png')
    (tmp_path / 'set').mkdir()
    for name, to in {
        'link': '../far/one',
        'again': '../far/one',
        'deep': '../far',
        'loop': '.',
        'up': '..',
        'gone': '../nothing',
    }.items():
        os.symlink(to, tmp_path / 'set' / name)
    os.symlink('../far/one/a.png', tmp_path / 'set/c.png')
    names = sorted(Path(p).name for p in load(tmp_path / 'set').paths)
    assert names == ['a.png', 'b.png', 'c.png']


@pytest.mark.parametrize(
    'name, content',
    [
        ('x.dcm', b'\0' * 300),
        ('x.dcm', b'DICM'),
        ('x.nii', b''),
        ('x.nii.gz', b'garbage'),
        ('x.nii.gz', gzip.compress(b'short')),
        ('x.png', b'\x89PNG\r\n\x1a\n'),
        ('x.jpg', b''),
        ('x.tif', b'II*\0' + b'\xff' * 40),
    ],
)
def test_one_bad_file_among_good_ones(tmp_path, name, content):
    for i in range(3):
        put(tmp_path / f'{i}.png')
    (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match='1 of the images'):
        ds = load_images(tmp_path, S)
    assert len(ds) == 3 and Path(ds.skipped[0][0]).name == name and ds.skipped[0][1].isprintable()


# Hostile files


def test_only_meant_formats_are_opened(tmp_path, monkeypatch):
    "EPS, PDF and the like never reach a decoder, whatever they are called"
    im = Image.fromarray(NOISE)
    for fmt in ('EPS', 'PDF', 'ICO', 'TGA', 'SGI', 'IM', 'PCX'):
        im.convert('RGB').save(tmp_path / 'a.png', format=fmt)
        with pytest.raises((ValueError, OSError)):
            open_picture(tmp_path / 'a.png')
        with pytest.raises((ValueError, OSError)):
            read_mask(tmp_path / 'a.png')


def test_every_room_opens_pictures_through_one_function():
    "`Image.open` stands in the data package once, with its formats"
    root = Path(files.__file__).parent
    lines = [line for p in root.glob('*.py') for line in p.read_text().splitlines() if 'Image.open(' in line]
    assert len(lines) == 1 and 'formats=FORMATS' in lines[0]


def test_memory_is_bounded_before_it_is_taken(tmp_path, monkeypatch):
    header = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).header
    header.set_data_shape((4000, 4000, 4000))
    with gzip.open(tmp_path / 'a.nii.gz', 'wb') as f:
        f.write(header.binaryblock + b'\0' * 100)
    with pytest.raises(ValueError, match=r'4000×4000×4000 voxels would take .* GiB'):
        read_image(tmp_path / 'a.nii.gz')
    path = dicom(tmp_path / 'a.dcm', SLICES[0], NumberOfFrames=100_000_000)
    with pytest.raises(ValueError, match='GiB of memory'):
        read_image(path)
    monkeypatch.setattr(files, 'MOST_BYTES', 1 << 20)
    ds = pydicom.dcmread(dicom(tmp_path / 'b.dcm', np.zeros((700, 700), '<u2')))
    ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    ds.save_as(tmp_path / 'c.dcm', enforce_file_format=True)
    assert (tmp_path / 'c.dcm').stat().st_size < 5000
    with pytest.raises(ValueError, match='the deflated file would take'):
        read_image(tmp_path / 'c.dcm')


def test_deflated_files_of_usual_size_are_read(tmp_path):
    want = read_dicom(dicom(tmp_path / 'a.dcm', SLICES[0], WindowCenter=100, WindowWidth=200))[0]
    ds = pydicom.dcmread(tmp_path / 'a.dcm')
    ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    ds.save_as(tmp_path / 'b.dcm', enforce_file_format=True)
    assert (read_dicom(tmp_path / 'b.dcm')[0] == want).all()


TABLES = {
    'up': ('image\n../secret.png\n', 'line 2: ../secret.png is outside its folder'),
    'absolute': ('image\n/etc/secret.png\n', 'outside its folder; pass outside=True'),
    'mask up': ('image,mask\na.png,x/../../m.png\n', 'outside its folder'),
    'extra up': ('image,extra\na.png,a.png;../b.png\n', 'outside its folder'),
    'latin': (b'image\n\xe4\xf6.png\n', 'not UTF-8 text'),
    'long': ('image\n' + 'a' * 200_000 + '\n', 'no table that can be read|can be used'),
    'null': (b'image\na\0.png\n', 'no table that can be read|outside|can be used'),
    'no column': ('colour\nred\n', "no column 'image'"),
    'control': ('colour\x1b[31m,b\nred,c\n', r'colour\\x1b\[31m'),
    'long name': ('image\n' + 'a' * 5000 + '.png\n', 'none of the 1 images'),
}


@pytest.mark.parametrize('case', TABLES)
@pytest.mark.parametrize('cache', ['memory', 'disk'])
def test_tables_stay_in_their_folder_and_in_one_line(tmp_path, case, cache):
    content, says = TABLES[case]
    put(tmp_path / 'd/a.png')
    put(tmp_path / 'secret.png')
    (tmp_path / 'd/manifest.csv').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as e:
        load(tmp_path / 'd', cache=cache)
    text = str(e.value)
    assert '\n' not in text and text.isprintable() and len(text) < 900


def test_a_row_that_is_there_twice_counts_once(tmp_path):
    for name in 'ab':
        put(tmp_path / f'd/{name}.png')
        put(tmp_path / f'd/m{name}.png', DISC * np.uint8(255))
    table = tmp_path / 'd/manifest.csv'
    table.write_text('image,mask,subject\na.png,ma.png,p\nb.png,mb.png,q\na.png,ma.png,p\n./b.png, mb.png,q\n')
    with pytest.warns(UserWarning, match='manifest.csv: 2 rows are there twice, e.g. line 4; each counts once'):
        ds = load_images(tmp_path / 'd', S)
    assert [Path(p).name for p in ds.paths] == ['a.png', 'b.png'] and ds.subjects == ['p', 'q']
    for other in ('a.png,mb.png,p', 'a.png,ma.png,q', 'a.png,,p'):
        table.write_text(f'image,mask,subject\na.png,ma.png,p\nb.png,mb.png,q\n{other}\n')
        with pytest.raises(ValueError, match=r'lines 2 and 4 say different things of a\.png: leave one'):
            load(tmp_path / 'd')


def test_a_table_may_lead_outside_if_allowed_and_utf16_is_read(tmp_path):
    put(tmp_path / 'far.png'), put(tmp_path / 'farther.png')
    (tmp_path / 'd').mkdir()
    rows = f'image,subject\n../far.png,ä\n{tmp_path}/farther.png,b'  # by a relative path, and an absolute one
    (tmp_path / 'd/manifest.csv').write_bytes(rows.encode('utf-16'))
    ds = load(tmp_path / 'd', outside=True)
    assert len(ds) == 2 and ds.subjects == ['ä', 'b'] and ds.subjects_known
    with pytest.raises(ValueError, match='no such table'):
        load(tmp_path / 'd', manifest=tmp_path / 'nothing.csv')


def test_the_table_of_a_parent_is_not_read(tmp_path):
    put(tmp_path / 'd/a.png')
    (tmp_path / 'manifest.csv').write_text('image,subject\nd/a.png,somebody\n')
    assert load(tmp_path / 'd').subjects == ['a'] and load(
        tmp_path / 'd', manifest=tmp_path / 'manifest.csv'
    ).subjects == ['somebody']


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes on this system')
@pytest.mark.parametrize('name', ['a.png', 'a.dcm', 'a.nii.gz', 'pipe'])
def test_pipes_and_devices_are_refused(tmp_path, name):
    put(tmp_path / 'good.png')
    os.mkfifo(tmp_path / name)
    for f in (read_image, read_mask, find_cases):
        with pytest.raises(ValueError):
            f(tmp_path / name)
    assert len(load(tmp_path)) == 1
    with pytest.raises(ValueError):
        find_cases('/dev/null')


def test_control_characters_never_reach_a_message(tmp_path):
    name = 'a\x1b[31m\n\u202eb\r.png'
    for i in range(2):
        put(tmp_path / f'd/{i}.png')
    (tmp_path / 'd' / name).write_text('broken')
    with pytest.warns(UserWarning) as caught:
        load_images(tmp_path / 'd', S)
    assert str(caught[0].message).isprintable() and r'\x1b' in str(caught[0].message)
    for bad in (tmp_path / name, tmp_path / 'd' / name):
        with pytest.raises((ValueError, OSError)) as e:
            load(bad)
        assert str(e.value).isprintable()
    assert shown('\udcff\x07') == r'\udcff\x07' and len(shown('x' * 900)) < 250


HARM = {
    'other shape': lambda f: np.save(f / 'image.npy', np.zeros((3, 1, 8, 8), np.uint8)),
    'other type': lambda f: np.save(f / 'image.npy', np.zeros((3, 1, S, S), np.float32)),
    'too few': lambda f: np.save(f / 'image.npy', np.zeros((2, 1, S, S), np.uint8)),
    'labels too large': lambda f: np.save(f / 'mask.npy', np.full((3, S, S), 9, np.uint8)),
    'objects': lambda f: np.save(f / 'image.npy', np.array([{}] * 3), allow_pickle=True),
    'no mask': lambda f: (f / 'mask.npy').unlink(),
    'names': lambda f: change(f, paths=[1, 2, 3]),
    'subjects': lambda f: change(f, subjects=['a']),
    'classes': lambda f: change(f, classes=None),
    'a list': lambda f: (f / 'data.json').write_text('[]'),
    'nested': lambda f: (f / 'data.json').write_text('[' * 100_000),
    'planes': lambda f: change(f, planes={'image': 3}),
    'facts': lambda f: change(f, facts={'low': [1]}),
    'empty': lambda f: change(f, paths=[], subjects=[]),
}


def change(folder, **what):
    "Rewrite parts of a cache's JSON"
    rest = json.loads((folder / 'data.json').read_text())
    (folder / 'data.json').write_text(json.dumps(rest | what))


@pytest.mark.parametrize('harm', HARM)
def test_a_cache_is_believed_only_if_it_fits(tmp_path, harm):
    for i in range(3):
        put(tmp_path / f'd/images/{i}.png', np.roll(NOISE, i, 0))
        put(tmp_path / f'd/masks/{i}.png', FORE)
    want = load(tmp_path / 'd', cache='disk').fingerprint()
    HARM[harm](next((tmp_path / 'cache').iterdir()))
    assert load(tmp_path / 'd', cache='disk').fingerprint() == want == load(tmp_path / 'd').fingerprint()


# Other people's data sets

X = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
SAMPLES = [{'image': x, 'mask': (x[0] > 0).long(), 'age': torch.tensor([3.0]), 'path': f'{i}'} for i, x in enumerate(X)]


@pytest.mark.parametrize('form', ['tensors', 'arrays', 'bytes', 'monai', 'masks with a channel'])
def test_any_data_set_of_dictionaries_trains(form):
    def sample(s):
        if form == 'arrays':
            return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
        if form == 'bytes':
            return s | {'image': ((s['image'] + 1) * 127.5).round().to(torch.uint8)}
        if form == 'masks with a channel':
            return s | {'mask': s['mask'][None].float()}
        if form == 'monai':
            from monai.data import MetaTensor

            return {k: MetaTensor(v) if isinstance(v, torch.Tensor) else v for k, v in s.items()}
        return s

    ds = as_image_data([sample(s) for s in SAMPLES], size=16, channels=1)
    b = next(Batches(ds, 4, seed=1, workers=2))
    assert b['image'].shape == (4, 1, 16, 16) and b['mask'].dtype == torch.int64 and b['mask'].shape == (4, 16, 16)
    i = int(b['path'][2])
    assert (
        type(b['image']) is torch.Tensor
        and torch.allclose(b['image'][2], X[i], atol=1 / 127)
        and torch.equal(b['mask'][2], SAMPLES[i]['mask'])
    )
    assert (ds.size, ds.channels, len(ds)) == (16, 1, 6) and ds.fingerprint() == as_image_data(
        [sample(s) for s in SAMPLES]
    ).fingerprint()
    assert as_image_data([sample(s) for s in SAMPLES[::-1]]).fingerprint() != ds.fingerprint()
    kept = ds.in_memory()
    assert torch.equal(kept.batch(range(6))['image'], ds.batch(range(6))['image']) and kept.kinds['mask'] == 'labels'


def test_samples_are_read_when_they_are_asked_for():
    class Lazy:
        def __init__(self):
            self.read = []

        def __len__(self):
            return 1000

        def __getitem__(self, i):
            self.read.append(i)
            return SAMPLES[i % 6]

    lazy = Lazy()
    ds = as_image_data(lazy)
    next(Batches(ds, 4))
    assert len(lazy.read) == 5
    with pytest.raises(IndexError):
        ds[1000]
    assert len(ds.fingerprint()) == 16 and len(lazy.read) < 40


WRONG = {
    'a path': ('images/', 'read a folder with load_images'),
    'a Path': (Path('images'), 'read a folder with load_images'),
    'a loader': (torch.utils.data.DataLoader(SAMPLES), 'pass its data set'),
    'an array': (X.numpy(), 'wrap arrays with ImageData'),
    'a generator': (iter(SAMPLES), 'a data set with a length'),
    'a dictionary': ({'image': X}, 'a data set with a length'),
    'pairs': ([(X[0], 1)], 'sample 0 is a tuple'),
    'no image': ([{'img': X[0]}], "sample 0 has no 'image'; it has img"),
    'empty': ([], 'empty'),
    '0 … 255': ([{'image': X[0] * 127 + 128}], 'image runs from'),
    'NaN': ([{'image': X[0] * float('nan')}], 'image runs from nan'),
    'integers': ([{'image': X[0].long()}], 'pass uint8, or float'),
    'flat': ([{'image': X[0, 0]}], r'must be \(C, H, W\)'),
    'text': ([{'image': 'a.png'}], 'image is a str'),
    'nothing': (None, 'NoneType'),
    'not square': ([{'image': X[0][:, :8]}], '16×8 pixels'),
}


@pytest.mark.parametrize('case', WRONG)
def test_what_is_no_training_data_is_refused_in_a_line(case):
    data, says = WRONG[case]
    with pytest.raises(ValueError, match=says) as e:
        as_image_data(data)
    assert '\n' not in str(e.value)


LATER = {
    'other size': (
        {'image': X[0][:, :8, :8], 'mask': SAMPLES[0]['mask'][:8, :8], 'age': torch.ones(1)},
        r'sample 1: image has shape \(1, 8, 8\)',
    ),
    'no mask': ({'image': X[0], 'age': torch.ones(1)}, "sample 1 has no 'mask'"),
    'new plane': (SAMPLES[0] | {'extra': X[0]}, 'extra has shape .* it is missing'),
}


@pytest.mark.parametrize('case', LATER)
def test_samples_that_do_not_fit_the_first(case):
    later, says = LATER[case]
    with pytest.raises(ValueError, match=says):
        as_image_data([SAMPLES[0], later]).batch([0, 1])


def test_sizes_and_channels_asked_for():
    with pytest.raises(ValueError, match='16×16 pixels; 32×32 needed'):
        as_image_data(SAMPLES, size=32)
    with pytest.raises(ValueError, match='1 channels, 3 needed'):
        as_image_data(SAMPLES, channels=3)
    ds = phantom_data('lung_ct', 3, 16)
    assert as_image_data(ds, 16, 1) is ds
    with pytest.raises(ValueError, match='16 px, 32 needed'):
        as_image_data(ds, 32)


def test_a_loader_with_processes_and_monai_transforms():
    from monai.data import Dataset
    from monai.transforms import Compose, EnsureChannelFirstd, RandFlipd

    ds = phantom_data('brain_mri', 6, 16)
    loader = torch.utils.data.DataLoader(ds, batch_size=3, num_workers=2)
    assert torch.equal(torch.cat([b['image'] for b in loader]), ds.batch(range(6))['image'])
    flip = Compose(
        [EnsureChannelFirstd('mask', channel_dim='no_channel'), RandFlipd(['image', 'mask'], prob=1.0, spatial_axis=1)]
    )
    b = as_image_data(Dataset(ds, flip)).batch([4])
    assert torch.equal(b['image'], ds.batch([4])['image'].flip(-1)) and torch.equal(
        b['mask'], ds.batch([4])['mask'].flip(-1)
    )


WRITTEN = {
    'commas': 'image,mask\na.png,m.png\n',
    'semicolons': 'image;mask\na.png;m.png\n',
    'tabs': 'image\tmask\na.png\tm.png\n',
    'capitals': 'Image,MASK\na.png,m.png\n',
    'blanks': ' image , mask \n a.png , m.png \n',
    'a mark in front': '\ufeffimage,mask\r\na.png,m.png\r\n',
    'empty columns': 'image,mask,,\na.png,m.png,,\n',
    'more than it says': 'image,mask\na.png,m.png,x,y\n',
    'empty lines': '\n\nimage,mask\n\na.png,m.png\n\n',
}


@pytest.mark.parametrize('table', WRITTEN)
def test_tables_as_programs_write_them(tmp_path, table):
    put(tmp_path / 'a.png'), put(tmp_path / 'm.png', FORE), put(tmp_path / 'other.png')
    (tmp_path / 'manifest.csv').write_text(WRITTEN[table], 'utf-8')
    ds = load(tmp_path)
    assert len(ds) == 1 and ((ds.masks[0] > 0) == DISC).all()


def test_a_column_that_is_there_twice_is_said(tmp_path):
    put(tmp_path / 'a.png')
    (tmp_path / 'manifest.csv').write_text('image,Image\na.png,b.png\n')
    with pytest.raises(ValueError, match="several columns 'image'"):
        load(tmp_path)


def test_three_contrasts_are_no_colours(tmp_path):
    for k, name in enumerate('abc'):
        put(tmp_path / f'{name}.png', np.roll(NOISE, k, 0))
    (tmp_path / 'manifest.csv').write_text('image,extra\na.png,b.png;c.png\n')
    for cache in ('memory', 'disk', 'disk'):
        ds = load(tmp_path, cache=cache)
        assert summarise(ds).meaning == '3 contrasts' and contact_sheet(ds).shape[1] > 2.9 * contact_sheet(ds).shape[0]
    put(tmp_path / 'd/a.png', np.dstack([NOISE, NOISE // 2, NOISE])), put(tmp_path / 'd/b.png')
    assert summarise(load(tmp_path / 'd')).meaning == summarise(phantom_data('fundus', 2, S)).meaning == 'RGB'


def test_a_link_to_a_place_that_may_not_be_looked_at_is_passed_over(tmp_path, monkeypatch):
    put(tmp_path / 'a.png')
    (tmp_path / 'link').symlink_to('elsewhere')

    class Forbidden:
        "As the entry of a link below a folder of somebody else"

        name = 'link'

        def is_dir(self):
            raise PermissionError('link')

        is_file = is_dir

    scan = os.scandir
    monkeypatch.setattr(os, 'scandir', lambda p: [*(e for e in scan(p) if e.name != 'link'), Forbidden()])
    assert len(load(tmp_path)) == 1


# The summary


def test_a_summary_says_what_was_understood(tmp_path):
    for i in range(5):
        put(tmp_path / f'images/{i}.png', np.repeat(NOISE, 1 + (i > 2), 1))
        put(tmp_path / f'masks/{i}.png', np.repeat(FORE * (i > 0), 1 + (i > 2), 1))
    (tmp_path / 'images/bad.png').write_text('no')
    put(tmp_path / 'masks/lonely.png', FORE)
    with pytest.warns(UserWarning):
        s = summarise(load_images(tmp_path, S))
    assert (s.images, s.with_mask, s.subjects, s.subjects_known, s.meaning) == (5, 4, 5, False, 'grey')
    assert s.sides == [((32, 32), 3), ((64, 32), 2)] and s.values == (float(NOISE.min()), float(NOISE.max()))
    assert s.classes[1][0] == 'foreground' and s.classes[1][2] == 0.8 and len(s.skipped) == 2
    text = '\n'.join(s.lines())
    assert (
        all(w in text for w in ('cannot identify', 'looks like a mask', '64×32 (2)', 'nothing says whose body'))
        and len(s.brief()) == 2
    )
    for cache in ('disk', 'disk'):
        with pytest.warns(UserWarning):
            assert summarise(load_images(tmp_path, S, cache=cache)) == s


@pytest.mark.parametrize('kind', ['fundus', 'brain_mri', 'chest_xray'])
def test_a_contact_sheet_shows_masks_on_images(kind):
    ds = phantom_data(kind, 5, 32)
    sheet, bare = contact_sheet(ds, 4), contact_sheet(ds.with_planes(mask=None), 4)
    assert sheet.dtype == np.uint8 and sheet.shape == bare.shape
    assert 800 <= sheet.shape[1] <= 1200 and (sheet != bare).any()
    inside = contact_sheet(ds.with_planes(mask=np.zeros_like(ds.masks)), 4)
    assert (inside == bare).all()
    assert contact_sheet(ImageData(ds.images.astype(np.float32) / 127.5 - 1)).any()
    with pytest.raises(ValueError, match='the set is empty'):
        contact_sheet(ds.subset([]))


def test_masks_that_may_be_inverted_are_said(tmp_path):
    "White is the object; black objects on white cannot be told in general, so that whoever reads must see it"
    for name, object_, ground in (('white', 255, 0), ('black', 0, 255)):
        for i in range(2):
            put(tmp_path / f'{name}/images/{i}.png')
            mask = np.where(DISC, object_, ground).astype(np.uint8)
            Image.fromarray(np.dstack([mask] * 3 + [mask | 255])).save(put(tmp_path / f'{name}/masks/{i}.png'))
    share = DISC.mean()
    white, black = (summarise(load(tmp_path / name)) for name in ('white', 'black'))
    assert 'invert' not in str(white) and 'invert' not in ''.join(white.brief())
    says = f'foreground is {1 - share:.0%} of the pixels: if objects are black on white, invert the masks'
    assert says in str(black) and says in black.brief()[1] and len(black.brief()) == 2


def white_is_zero(path):
    "The same file, said to be a negative: one value of one tag"
    data, at = path.read_bytes(), 0
    tag = np.array([262, 3], '<u2').tobytes() + np.array([1, 1], '<u4').tobytes()
    assert tag in data
    while (at := data.find(tag, at)) >= 0:  # in every page
        data, at = data[: at + 8] + bytes(2) + data[at + 10 :], at + 8
    path.write_bytes(data)
    return path


def test_negatives_of_more_than_eight_bits_are_turned(tmp_path):
    "Pillow turns eight bits alone; X-rays have twelve"
    deep = NOISE.astype(np.uint16) * 200
    for name, a in {'grey16': deep, 'float': deep.astype(np.float32)}.items():
        plain = read_image(stack(tmp_path / f'{name}.tif', [a]))[0]
        negative = read_image(white_is_zero(stack(tmp_path / f'{name}n.tif', [a])))[0]
        assert (negative == 255 - plain).all() and np.ptp(plain) > 200
        pages = read_image(white_is_zero(stack(tmp_path / f'{name}s.tif', [a, a])))
        assert len(pages) == 2 and all(np.abs(p - negative.astype(int)).max() <= 1 for p in pages)
    assert (read_image(white_is_zero(stack(tmp_path / 'b.tif', [NOISE])))[0] == 255 - NOISE).all()


def test_complex_volumes_are_their_magnitude(tmp_path, recwarn):
    phase = np.exp(2j * np.pi * RNG.random((S, S, 3)))
    body = np.repeat(NOISE[..., None], 3, 2).astype(np.float32)
    waves, still = nifti(tmp_path / 'c.nii.gz', (body * phase).astype(np.complex64)), nifti(tmp_path / 'm.nii.gz', body)
    for a, b in zip(read_image(waves), read_image(still), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    assert not [w for w in recwarn if 'imaginary' in str(w.message)]


def test_a_picture_without_a_number_is_left_out(tmp_path):
    put(tmp_path / 'd/a.png')
    stack(tmp_path / 'd/b.tif', [np.full((S, S), np.nan, np.float32)])
    with pytest.warns(UserWarning, match='none of its pixels is a number'):
        assert len(load_images(tmp_path / 'd', S)) == 1


def test_pictures_in_the_place_of_masks_are_said(tmp_path):
    for i in range(3):
        put(tmp_path / f'images/{i}.png')
        put(tmp_path / f'masks/{i}.png', np.roll(NOISE, i))
    s = summarise(load(tmp_path))
    assert 'are these pictures?' in str(s) and 'are these pictures?' in s.brief()[1]


def test_a_missing_file_of_a_table_is_said_in_words(tmp_path):
    put(tmp_path / 'a.png')
    (tmp_path / 'manifest.csv').write_text('image\na.png\nlost.png\n')
    with pytest.warns(UserWarning, match=r'lost\.png') as said:
        load_images(tmp_path, S)
    assert 'No such file' in str(said[0].message) and 'Errno' not in str(said[0].message)
