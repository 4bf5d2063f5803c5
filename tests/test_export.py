"""An exported set can be read by others: pairs, lists, datasheets, and DICOM files that keep to the standard."""

import io
import json
import re
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pydicom
import pytest
import torch
import yaml
from PIL import Image
from pydicom import config as pydicom_config
from pydicom.datadict import dictionary_has_tag, dictionary_VM, dictionary_VR
from pydicom.uid import ExplicitVRLittleEndian

from medsketch.core import to_uint8, torch_rng
from medsketch.data import ImageData, load_images
from medsketch.evaluate.features import Extractor
from medsketch.evaluate.table import METRICS
from medsketch.export import (
    Plan,
    chunk_seed,
    export_dataset,
    written,
)
from medsketch.recipes import ACGAN, Recipe, SkrGAN
from medsketch.synthetic_dicom import secondary_capture

NAMES = ('background', 'lung', 'heart')
pytestmark = pytest.mark.filterwarnings('ignore:MS-SSIM at')


class Painter(Recipe):
    "Smooth random pictures in pairs, each sample from a generator of its own, as recipes do"

    def __init__(self, channels=1, size=16, draws=('image', 'sketch', 'mask'), classes=3):
        super().__init__(channels=channels, size=size, draws=list(draws), classes=classes)
        self.calls = []

    def sample(self, n, seed=0):
        self.calls.append((n, seed))
        return {k: torch.stack([self._one(torch_rng(seed, i))[k] for i in range(n)]) for k in self.config['draws']}

    def _one(self, rng):
        c, s = self.config['channels'], self.config['size']
        image = (
            torch.nn.functional.interpolate(torch.rand(1, c, 5, 5, generator=rng), (s, s), mode='bicubic')[0].clamp(
                0, 1
            )
            * 2
            - 1
        )
        return {
            'image': image,
            'sketch': (image[:1] > 0).float(),
            'mask': ((image[0] + 1) * self.config['classes'] / 2).long().clamp(max=self.config['classes'] - 1),
        }


def pictures(channels=1, n=24, seed=99, size=16):
    "Real images for the painter: others of the same kind"
    drawn = Painter(channels, size).sample(n, seed)
    return ImageData(
        np.moveaxis(to_uint8(drawn['image']), -1, 1), drawn['mask'].numpy().astype(np.uint8), classes=NAMES
    )


def lines(out, top=''):
    return [json.loads(line) for line in (out / top / 'metadata.jsonl').read_text('utf-8').splitlines()]


# --- pairs that come back as they were drawn ---


@pytest.mark.parametrize('format', ['folder', 'hf', 'dicom'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_our_own_reader_gets_back_the_pixels_and_the_masks(tmp_path, format, channels):
    out = export_dataset(Painter(channels), 5, tmp_path / 'set', format, chunk=2, progress=False).out
    modalities = ('1', '2', '3', '4') if channels == 4 else None
    back = load_images(out, 16, fit='stretch', modalities=modalities, classes=NAMES)
    drawn = [Painter(channels).sample(2, chunk_seed(0, k)) for k in range(3)]
    image, mask = (torch.cat([d[k] for d in drawn])[:5] for k in ('image', 'mask'))
    assert back.images.shape == (5, channels, 16, 16) and not back.skipped and len(set(back.subjects)) == 5
    assert np.array_equal(back.images, np.moveaxis(to_uint8(image), -1, 1))
    assert np.array_equal(back.masks, mask)


@pytest.mark.parametrize(('format', 'top'), [('folder', ''), ('hf', 'train'), ('dicom', '')])
def test_the_list_names_every_file_and_says_how_to_draw_it_again(tmp_path, format, top):
    r = Painter(3)
    out = export_dataset(r, 5, tmp_path / 'set', format, seed=7, chunk=2, classes=NAMES, progress=False).out
    rows = lines(out, top)
    assert [row['index'] for row in rows] == list(range(5))
    for row in rows:
        assert row['synthetic'] is True and row['seed'] == 7 and row['classes'] == list(NAMES)
        again = r.sample(row['draw'] + 1, row['draw_seed'])
        sketch, mask = (np.array(Image.open(out / top / row[f'{k}_file_name'])) for k in ('sketch', 'mask'))
        assert np.array_equal(mask, again['mask'][-1])
        assert np.array_equal(sketch < 128, again['sketch'][-1, 0] == 1), 'dark strokes on white'
    named = {v for row in rows for k, v in row.items() if k.endswith('file_name')}
    there = {str(p.relative_to(out / top)) for d in ('images', 'sketches', 'masks') for p in (out / top / d).iterdir()}
    assert named == there and len(named) == 15


@pytest.mark.parametrize('draws', [('image',), ('image', 'sketch'), ('image', 'mask')])
def test_a_recipe_may_draw_images_alone_or_with_one_partner(tmp_path, draws):
    made = export_dataset(Painter(draws=draws), 2, tmp_path / 'set', progress=False)
    row = lines(made.out)[0]
    for kind, folder in (('sketch', 'sketches'), ('mask', 'masks')):
        assert (f'{kind}_file_name' in row) == (made.out / folder).exists() == (kind in draws)
        assert (f'the {kind}' in made.datasheet.read_text('utf-8')) == (kind in draws)


def test_real_recipes_are_exported_labels_included(tmp_path):
    small = {'size': 16, 'channels': 1, 'latent_dim': 8}
    sketcher = SkrGAN(**small, fmap_base=32, fmap_max=8, ngf=4, ndf=4, receptive_field=16)
    out = export_dataset(sketcher, 3, tmp_path / 'skrgan', progress=False).out
    assert np.array_equal(load_images(out, 16).images, np.moveaxis(to_uint8(sketcher.sample(3)['image']), -1, 1))
    folders = ImageData(
        np.random.default_rng(0).integers(0, 255, (8, 1, 16, 16), np.uint8),
        paths=[f'{"ab"[i % 2]}/{i}.png' for i in range(8)],
    )
    labelled = ACGAN(**small, ngf=4, ndf=4, steps=1, batch_size=4).fit(folders, progress=False)
    out = export_dataset(labelled, 6, tmp_path / 'acgan', progress=False).out
    names = list(labelled.config['classes'])
    assert [(row['label'], row['label_name']) for row in lines(out)] == [
        (int(v), names[v]) for v in labelled.sample(6)['label']
    ]


# --- DICOM: what dciodvfy looks at, for the Secondary Capture Image IOD (PS3.3, Table A.8-1) ---

TYPE_1 = {  # must be there and hold a value
    'General Study': ['StudyInstanceUID'],
    'General Series': ['Modality', 'SeriesInstanceUID'],
    'SC Equipment': ['ConversionType'],
    'Image Pixel': [
        'SamplesPerPixel',
        'PhotometricInterpretation',
        'Rows',
        'Columns',
        'BitsAllocated',
        'BitsStored',
        'HighBit',
        'PixelRepresentation',
        'PixelData',
    ],
    'SOP Common': ['SOPClassUID', 'SOPInstanceUID'],
}
TYPE_2 = {  # must be there, and may be empty
    'Patient': ['PatientName', 'PatientID', 'PatientBirthDate', 'PatientSex'],
    'General Study': ['StudyDate', 'StudyTime', 'ReferringPhysicianName', 'StudyID', 'AccessionNumber'],
    'General Series': ['SeriesNumber'],
    'General Equipment': ['Manufacturer'],
    'General Image': ['InstanceNumber', 'PatientOrientation'],
}
TERMS = {
    'SyntheticData': ['YES'],
    'PatientIdentityRemoved': ['YES'],
    'BurnedInAnnotation': ['NO'],
    'LossyImageCompression': ['00'],
    'ConversionType': ['SYN'],
    'PhotometricInterpretation': ['MONOCHROME2', 'RGB'],
    'VOILUTFunction': ['LINEAR_EXACT'],
    'SpecificCharacterSet': ['ISO_IR 192'],
    'PatientSex': ['M', 'F', 'O', ''],
}


def violations(ds):
    "What is wrong with a Secondary Capture file, in words"
    bad = [f'{module}: no {k}' for module, keys in TYPE_1.items() for k in keys if k not in ds or ds[k].is_empty]
    bad += [f'{module}: no {k}' for module, keys in TYPE_2.items() for k in keys if k not in ds]
    bad += [f'{k} = {ds.get(k)}' for k, known in TERMS.items() if k in ds and ds[k].value not in known]
    bad += [f'no {k}' for k in ('SyntheticData', 'PatientIdentityRemoved') if k not in ds]
    if ds.get('PatientIdentityRemoved') == 'YES' and not ds.get('DeidentificationMethod'):
        bad.append('1C: no DeidentificationMethod')
    if ('PlanarConfiguration' in ds) != (ds.get('SamplesPerPixel') == 3):
        bad.append('1C: PlanarConfiguration goes with colour')
    if ('WindowCenter' in ds) != ('WindowWidth' in ds):
        bad.append('1C: window centre and width go together')
    if ds.get('ImageType', ['', ''])[0] not in ('ORIGINAL', 'DERIVED') or ds.ImageType[1] not in (
        'PRIMARY',
        'SECONDARY',
    ):
        bad.append('ImageType')
    if len(ds.PixelData) != (n := ds.Rows * ds.Columns * ds.SamplesPerPixel) + n % 2:
        bad.append('length of PixelData')
    if (ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation) != (8, 8, 7, 0):
        bad.append('bits')
    return bad + [w for e in ds for w in wrong_element(e)] + wrong_meta(ds)


def wrong_element(e):
    "VR, number of values, UID rules"
    if e.tag.is_private or not dictionary_has_tag(e.tag):
        return [f'{e.tag} is not in the dictionary']
    bad = [] if e.VR in dictionary_VR(e.tag).split(' or ') else [f'{e.keyword}: VR {e.VR}']
    least, most = re.fullmatch(r'(\d+)(?:-(?:\d*n|\d+))?', dictionary_VM(e.tag))[1], dictionary_VM(e.tag)
    if e.VM and (e.VM < int(least) or (most.isdigit() and e.VM > int(most))):
        bad.append(f'{e.keyword}: {e.VM} values, {most} allowed')
    if e.VR == 'UI' and not (len(e.value) <= 64 and re.fullmatch(r'(0|[1-9]\d*)(\.(0|[1-9]\d*))+', e.value)):
        bad.append(f'{e.keyword}: {e.value}')
    return bad


def wrong_meta(ds):
    "File meta information, group 0002 (PS3.10, 7.1)"
    m = ds.file_meta
    needed = {
        'MediaStorageSOPClassUID': ds.SOPClassUID,
        'MediaStorageSOPInstanceUID': ds.SOPInstanceUID,
        'TransferSyntaxUID': ExplicitVRLittleEndian,
    }
    bad = [f'{k} = {m.get(k)}' for k, v in needed.items() if m.get(k) != v]
    return bad + [
        f'no {k}'
        for k in ('FileMetaInformationGroupLength', 'FileMetaInformationVersion', 'ImplementationClassUID')
        if k not in m
    ]


@pytest.fixture
def strict():
    "pydicom refuses values that the standard does not allow, in writing and in reading"
    s = pydicom_config.settings
    before = s.writing_validation_mode, s.reading_validation_mode
    s.writing_validation_mode = s.reading_validation_mode = pydicom_config.RAISE
    yield
    s.writing_validation_mode, s.reading_validation_mode = before


NAME = 'Größe\\Ж ' * 12


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_dicom_files_keep_to_the_standard(tmp_path, strict, channels):
    out = export_dataset(
        Painter(channels, 16), 3, tmp_path / 'set', 'dicom', modality='MR', name=NAME, progress=False
    ).out
    files = sorted((out / 'images').iterdir())
    assert len(files) == 3 * (4 if channels == 4 else 1)
    for f in files:
        assert f.read_bytes()[128:132] == b'DICM'
        ds = pydicom.dcmread(f)
        assert violations(ds) == []
        assert ds[0x0008001C].value == 'YES' and ds.Modality == 'MR' and str(ds.PatientName).startswith('SYNTHETIC')
        assert ds.StudyDescription.startswith('Größe/Ж') and len(ds.StudyDescription) <= 64


def test_the_checker_finds_what_is_wrong(strict):
    def file(**changes):
        ds = secondary_capture(np.zeros((9, 7), np.uint8), 'key', model='dcgan')
        buffer = io.BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        ds = pydicom.dcmread(io.BytesIO(buffer.getvalue()))
        for k, v in changes.items():
            if v is None:
                del ds[k]
            else:
                setattr(ds, k, v)
        return violations(ds)

    assert file() == []
    for changes in (
        {'SyntheticData': None},
        {'SyntheticData': 'NO'},
        {'ConversionType': None},
        {'PatientID': None},
        {'DeidentificationMethod': None},
        {'BitsStored': 12},
        {'Rows': 8},
        {'StudyInstanceUID': ''},
        {'WindowWidth': None},
        {'SOPInstanceUID': '1.2.3'},
    ):
        assert file(**changes), changes
    with pytest.raises(ValueError):
        secondary_capture(np.zeros((8, 8), np.uint8), 'key', modality='a code much too long')


def test_masks_become_segmentations_of_their_images(tmp_path):
    "Every class of every pixel comes back, and the file names the image that it lies over"
    hd = pytest.importorskip('highdicom', reason="medsketch[seg] is not installed")
    out = export_dataset(Painter(4), 3, tmp_path / 'set', 'dicom', classes=NAMES, progress=False).out
    for row in lines(out):
        seg = hd.seg.segread(out / row['segmentation_file'])
        source = pydicom.dcmread(out / row['image_1_file_name'])
        found = seg.get_pixels_by_source_instance([source.SOPInstanceUID], combine_segments=True)[0]
        assert (found == np.asarray(Image.open(out / row['mask_file_name']))).all() and found.any()
        assert [s.SegmentLabel for s in seg.SegmentSequence] == list(NAMES[1:]) and seg.SyntheticData == 'YES'
        assert (seg.PatientID, seg.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
    again = export_dataset(Painter(4), 3, tmp_path / 'again', 'dicom', classes=NAMES, progress=False).out
    for p in (out / 'segmentations').iterdir():
        assert p.read_bytes() == (again / 'segmentations' / p.name).read_bytes()


@pytest.mark.parametrize('format', ['folder', 'hf', 'dicom'])
def test_sixteen_bits_keep_differences_that_eight_lose(tmp_path, format):
    a, b = (
        export_dataset(Painter(1), 3, tmp_path / f'{format}{bits}', format, bits=bits, progress=False).out
        for bits in (8, 16)
    )
    plan = lambda out: Plan(**json.loads((out / 'export.json').read_text()))
    exact = Painter(1).sample(3)['image'].clamp(-1, 1)
    coarse, fine = (torch.cat(list(written(out, plan(out)))) for out in (a, b))
    assert (fine - exact).abs().max() < 2e-5 and (coarse - exact).abs().max() > 1e-3
    if format == 'dicom':
        ds = pydicom.dcmread(b / 'images/000000.dcm')
        assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit) == (16, 16, 15) and 'Laterality' not in ds


@pytest.mark.parametrize('bits, channels, why', [(16, 3, 'grey'), (12, 1, 'use 8 or 16'), (0, 1, 'use 8 or 16')])
def test_other_pixels_are_refused_before_anything_is_written(tmp_path, bits, channels, why):
    with pytest.raises(ValueError, match=why):
        export_dataset(Painter(channels), 3, tmp_path / 'set', bits=bits, progress=False)
    assert not (tmp_path / 'set').exists()


def test_every_sample_is_a_patient_of_its_own_and_every_file_has_its_own_uid(tmp_path):
    out = export_dataset(Painter(4), 3, tmp_path / 'set', 'dicom', progress=False).out
    ds = [pydicom.dcmread(p) for p in sorted((out / 'images').iterdir())]
    for key in ('PatientID', 'StudyInstanceUID', 'SeriesInstanceUID'):
        assert [len({d[key].value for d in ds[i : i + 4]}) for i in (0, 4, 8)] == [1, 1, 1] and len(
            {d[key].value for d in ds}
        ) == 3
    assert len({d.SOPInstanceUID for d in ds}) == 12
    assert [d.InstanceNumber for d in ds[:4]] == [1, 2, 3, 4]
    row = lines(out)[1]
    assert [row[f'sop_instance_uid_{i}'] for i in range(1, 5)] == [d.SOPInstanceUID for d in ds[4:8]]


def test_the_same_export_gives_the_same_files_and_another_gives_other_uids(tmp_path):
    files = lambda out: {str(p.relative_to(out)): p.read_bytes() for p in out.rglob('*') if p.is_file()}
    a, b = (export_dataset(Painter(), 3, tmp_path / n, 'dicom', progress=False).out for n in 'ab')
    assert files(a) == files(b)
    more = export_dataset(Painter(), 4, tmp_path / 'more', 'dicom', progress=False).out
    assert files(more)['images/000002.dcm'] == files(a)['images/000002.dcm'], (
        'the same image in a longer set is the same instance'
    )
    uids = lambda out: {row['sop_instance_uid'] for row in lines(out)}
    for i, change in enumerate(({'seed': 1}, {'modality': 'CT'}, {'name': 'other'})):
        assert not uids(a) & uids(
            export_dataset(Painter(), 3, tmp_path / f'c{i}', 'dicom', progress=False, **change).out
        ), change


@pytest.mark.skipif(not shutil.which('dciodvfy'), reason='dciodvfy (Debian package dicom3tools) is not installed')
@pytest.mark.parametrize('channels', [1, 3])
def test_dciodvfy_finds_no_error_but_that_it_is_older_than_the_attribute(tmp_path, channels):
    out = export_dataset(Painter(channels), 1, tmp_path / 'set', 'dicom', progress=False).out
    said = subprocess.run(['dciodvfy', out / 'images/000000.dcm'], check=False, capture_output=True, text=True).stderr
    assert 'SCImage' in said
    assert not [
        line for line in said.splitlines() if line.startswith('Error') and '0x0008,0x001c' not in line.lower()
    ], said


def test_without_pydicom_one_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pydicom', None)
    with pytest.raises(ImportError, match=r'medsketch\[volumes\]'):
        export_dataset(Painter(), 1, tmp_path / 'set', 'dicom')
    assert not (tmp_path / 'set').exists()
    assert export_dataset(Painter(), 1, tmp_path / 'set', progress=False).n == 1


# --- Hugging Face ---


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_a_hugging_face_set_keeps_to_the_rules_of_imagefolder(tmp_path, channels):
    made = export_dataset(
        Painter(channels),
        3,
        tmp_path / 'set',
        'hf',
        licence='CC BY 4.0',
        name='Größe: "x" #1',
        classes=NAMES,
        progress=False,
    )
    rows = lines(made.out, 'train')
    assert len({tuple(sorted(row)) for row in rows}) == 1, 'every line has the same columns'
    files = [v for row in rows for k, v in row.items() if k == 'file_name' or k.endswith('_file_name')]
    assert all(not f.startswith(('/', '..')) and (made.out / 'train' / f).is_file() for f in files)
    assert {'file_name', 'image_1_file_name'} & set(rows[0]) == {'file_name' if channels < 4 else 'image_1_file_name'}
    _, card, text = made.datasheet.read_text('utf-8').split('---\n', 2)
    card = yaml.safe_load(card)
    assert made.datasheet.name == 'README.md' and text.startswith('# Größe')
    assert (card['pretty_name'], card['license'], card['size_categories']) == ('Größe: "x" #1', 'cc-by-4.0', ['n<1K'])
    assert 'synthetic' in card['tags'] and 'image-segmentation' in card['task_categories']


@pytest.mark.parametrize(
    ('licence', 'card'),
    [
        ('', {'license': 'unknown'}),
        ('MIT', {'license': 'mit'}),
        ('of the hospital', {'license': 'other', 'license_name': 'of-the-hospital'}),
    ],
)
def test_the_card_names_licences_as_the_hub_does(tmp_path, licence, card):
    made = export_dataset(Painter(draws=('image',)), 1, tmp_path / 'set', 'hf', licence=licence, progress=False)
    head = yaml.safe_load(made.datasheet.read_text('utf-8').split('---\n')[1])
    assert {k: v for k, v in head.items() if k.startswith('license')} == card
    assert head['task_categories'] == ['unconditional-image-generation']


def test_datasets_reads_it(tmp_path):
    datasets = pytest.importorskip('datasets', reason='the datasets package is no dependency of medsketch')
    made = export_dataset(Painter(3), 3, tmp_path / 'set', 'hf', classes=NAMES, progress=False)
    ds = datasets.load_dataset('imagefolder', data_dir=str(made.out), cache_dir=str(tmp_path / 'cache'), split='train')
    assert len(ds) == 3 and {'image', 'sketch', 'mask', 'classes', 'index', 'synthetic'} <= set(ds.column_names)
    assert np.array_equal(np.array(ds[1]['mask']), Painter(3).sample(2)['mask'][1])


# --- the datasheet ---


def test_the_datasheet_says_what_has_to_be_known(tmp_path):
    train, held = pictures(), pictures(seed=5)
    made = export_dataset(
        Painter(),
        12,
        tmp_path / 'set',
        train=train,
        held=held,
        source='Two hospitals, 2019.',
        licence='cc-by-4.0',
        name='A set',
        progress=False,
    )
    text = made.datasheet.read_text('utf-8')
    assert not made.alarm and text.startswith('# A set\n\n> **Privacy checked, no alarm')
    assert made.privacy.table() in text and 'Two hospitals, 2019.' in text and 'cc-by-4.0' in text
    assert (
        'thumbnail 8 px' in text
        and '12 real, 12 synthetic' in text
        and 'two halves of the real' in text
        and 'held back' in text
    ), 'scores are labelled'
    assert made.scores.names == [METRICS[m] for m in ('swd', 'ms_ssim', 'fid')]
    few = export_dataset(Painter(), 11, tmp_path / 'few', train=train, held=held, progress=False)
    assert few.scores.names == [METRICS[m] for m in ('swd', 'ms_ssim')], 'eleven are too few for FID'
    assert '0 background, 1 lung, 2 heart' in text and '12 images, 16 × 16 pixels, grey' in text
    assert train.fingerprint() in text and '24 images of 24 subjects' in text
    assert str(tmp_path) not in text and not any(p in text for p in train.paths), (
        'no paths of the machine or of the source'
    )


def test_scores_tell_a_good_generator_from_a_bad_one(tmp_path):
    class Grain(Painter):
        def sample(self, n, seed=0):
            return super().sample(n, seed) | {'image': torch.rand(n, 1, 16, 16, generator=torch_rng(seed)) - 0.5}

    train, held = pictures(n=40), pictures(n=40, seed=5)
    good, bad = (
        export_dataset(r, 20, tmp_path / type(r).__name__, train=train, held=held, progress=False).scores
        for r in (Painter(), Grain())
    )
    for m, lower in (('swd', True), ('ms_ssim', False), ('fid', True)):
        assert (good.mean('synthetic', METRICS[m]) < bad.mean('synthetic', METRICS[m])) == lower, m
    assert bad.mean('synthetic', METRICS['fid']) > bad.floor[2].value > 0
    assert export_dataset(Painter(), 3, tmp_path / 'three', train=train, held=held, progress=False).scores is None
    assert 'fewer than 4 images' in (tmp_path / 'three/DATASHEET.md').read_text('utf-8')


def test_an_extractor_that_is_passed_in_is_used_and_named(tmp_path):
    mean = Extractor(
        lambda x: x.mean((2, 3)).repeat(1, 3) + torch.arange(3) * x.std((1, 2, 3))[:, None], 'mean colour', device='cpu'
    )
    made = export_dataset(
        Painter(), 12, tmp_path / 'set', train=pictures(), held=pictures(seed=5), extractor=mean, progress=False
    )
    assert (
        'mean colour' in [v.name for v in made.privacy.views]
        and made.scores.rows['synthetic'][0][2].extractor == 'mean colour on 16 px'
    )
    assert re.search('FID ↓: 12 real, 12 synthetic .*· mean colour', made.datasheet.read_text('utf-8'))


@pytest.mark.parametrize('format', ['folder', 'hf', 'dicom'])
def test_copies_raise_the_alarm_and_the_datasheet_begins_with_it(tmp_path, format):
    train, held = pictures(), pictures(seed=5)

    class Copier(Painter):
        def sample(self, n, seed=0):
            return {'image': train.batch(range(n))['image']}

    with pytest.warns(UserWarning, match='ALARM'):
        made = export_dataset(Copier(), 8, tmp_path / 'set', format, train=train, held=held, progress=False)
    text = made.datasheet.read_text('utf-8')
    if format == 'hf':
        text = text.split('---\n', 2)[2]
    assert made.alarm and text.startswith('> **ALARM: do not share this set.**') and '8 copies' in text.splitlines()[0]
    assert len(lines(made.out, 'train' if format == 'hf' else '')) == 8, 'written all the same'
    shown = set(made.out.rglob('*.png')) - set(made.out.glob('**/images/*'))
    assert made.worst.parent == tmp_path and {p.name for p in shown} == {'preview.png'}, (
        'training images stay out of the set'
    )


def test_without_training_images_the_datasheet_says_that_nothing_was_checked(tmp_path):
    made = export_dataset(Painter(), 2, tmp_path / 'set', classes=NAMES, progress=False)
    text = made.datasheet.read_text('utf-8')
    assert made.privacy is None and made.scores is None and not made.alarm
    assert (
        '**Privacy not checked.**' in text.splitlines()[2]
        and '*Not scored*' in text
        and text.count('*Not stated.*') == 2
    )
    checked = export_dataset(Painter(), 2, tmp_path / 'set', classes=NAMES, train=pictures(), progress=False)
    assert '**Privacy checked' in checked.datasheet.read_text('utf-8'), 'it can be scored and checked later'
    with pytest.raises(ValueError, match='finished'):
        export_dataset(Painter(), 2, tmp_path / 'set', classes=NAMES, progress=False)
    assert '**Privacy checked' in checked.datasheet.read_text('utf-8'), 'and what was found is not lost'


def test_masks_are_given_names_only_if_these_are_theirs(tmp_path):
    train = pictures()
    named = lambda sub, r, **more: lines(export_dataset(r, 2, tmp_path / sub, train=train, progress=False, **more).out)[
        0
    ].get('classes')
    assert named('three', Painter()) == list(NAMES)
    assert named('two', Painter(classes=2)) == ['background', 'foreground'], (
        'the recipe draws fewer classes than the training masks have'
    )
    assert named('given', Painter(classes=2), classes=('paper', 'ink')) == ['paper', 'ink']
    with pytest.raises(ValueError, match='drew class'):
        named('few', Painter(), classes=('paper', 'ink'))


# --- interrupted, resumed, refused ---


class Stop(Exception):
    pass


@pytest.mark.parametrize('format', ['folder', 'dicom'])
def test_an_interrupted_export_does_not_look_finished_and_goes_on(tmp_path, format, monkeypatch):
    class Dies(Painter):
        name = ''

        def sample(self, n, seed=0):
            if len(self.calls) == 3:
                raise Stop
            return super().sample(n, seed)

    out, whole, dies = tmp_path / 'set', tmp_path / 'whole', Dies()
    with pytest.raises(Stop):
        export_dataset(dies, 9, out, format, chunk=2, progress=False)
    assert len(list((out / 'images').iterdir())) == 4
    assert not (out / 'metadata.jsonl').exists() and not (out / 'DATASHEET.md').exists()
    with pytest.raises(ValueError, match='another seed'):
        export_dataset(Painter(), 9, out, format, chunk=2, seed=1, progress=False)
    r = Painter()
    export_dataset(r, 9, out, format, chunk=2, progress=False)
    assert [n for n, _ in r.calls] == [1, 2, 2, 1], 'what was there is not drawn again'
    export_dataset(Painter(), 9, whole, format, chunk=2, progress=False)
    files = lambda d: {str(p.relative_to(d)): p.read_bytes() for p in d.rglob('*') if p.is_file()}
    assert files(out) == files(whole)


def test_a_full_disk_is_told_and_resumed(tmp_path, monkeypatch):
    import medsketch.export as module

    real, count = module.save_png, []

    def full(path, pixels):
        count.append(path)
        if len(count) == 6:
            raise OSError(28, 'No space left on device')
        real(path, pixels)

    monkeypatch.setattr(module, 'save_png', full)
    with pytest.raises(RuntimeError, match='No space left'):
        export_dataset(Painter(), 4, tmp_path / 'set', chunk=2, progress=False)
    assert not (tmp_path / 'set/metadata.jsonl').exists()
    assert len(lines(export_dataset(Painter(), 4, tmp_path / 'set', chunk=2, progress=False).out)) == 4


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    def peak(n):
        r = Painter(3, 64, ('image',))
        tracemalloc.start()
        try:
            made = export_dataset(r, n, tmp_path / str(n), chunk=4, progress=False)
            assert max(k for k, _ in r.calls) == 4
            assert (
                sum(
                    len(b)
                    for b in written(
                        made.out,
                        Plan(**{**json.loads((made.out / 'export.json').read_text()), 'classes': None}),
                        chunk=4,
                    )
                )
                == n
            )
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(4)
    assert peak(48) < peak(8) + 100_000


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'n': 0}, 'at least 1'),
        ({'chunk': 0}, 'at least 1'),
        ({'format': 'nifti'}, 'folder, hf, dicom'),
        ({'modality': 'mr?'}, 'capital letters'),
        ({'recipe': Recipe()}, 'cannot sample'),
        ({'recipe': Painter(draws=('sketch',))}, 'no images'),
        ({'train': pictures(3)}, 'the recipe draws'),
        ({'train': pictures(n=5)}, 'at least 10'),
        ({'train': 'folder'}, 'ImageData'),
        ({'held': pictures()}, 'pass `train`'),
        ({'train': ImageData(pictures().images, subjects=['one'] * 24)}, 'fewer than 10 subjects'),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, given, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        export_dataset(**({'recipe': Painter(), 'n': 2, 'out': tmp_path / 'set'} | given))
    assert not list(tmp_path.iterdir())


def test_a_generator_that_draws_nan_is_refused(tmp_path):
    class Broken(Painter):
        def sample(self, n, seed=0):
            return {k: v * torch.nan for k, v in super().sample(n, seed).items()}

    with pytest.raises(ValueError, match='NaN'):
        export_dataset(Broken(draws=('image',)), 2, tmp_path / 'set')


def test_folders_that_hold_something_else_are_left_alone(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match=r'something else already \(thesis.txt\)'):
        export_dataset(Painter(), 2, tmp_path / 'mine')
    with pytest.raises(ValueError, match='is a file'):
        export_dataset(Painter(), 2, tmp_path / 'mine/thesis.txt')
    assert [p.name for p in (tmp_path / 'mine').iterdir()] == ['thesis.txt']
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set/export.json').write_text('{"n"')
    with pytest.raises(ValueError, match='cannot be read'):
        export_dataset(Painter(), 2, tmp_path / 'set')
    done = export_dataset(Painter(), 2, tmp_path / 'done', progress=False)
    for change, says in (
        ({'n': 3}, 'another n'),
        ({'format': 'hf'}, 'another format'),
        ({'recipe': Painter(3)}, 'another config'),
    ):
        with pytest.raises(ValueError, match=says):
            export_dataset(**({'recipe': Painter(), 'n': 2, 'out': done.out} | change))
    other = SkrGAN(size=16, channels=1, latent_dim=8, fmap_base=32, fmap_max=8, ngf=4, ndf=4, receptive_field=16)
    export_dataset(other, 1, tmp_path / 'skrgan', progress=False)
    with torch.no_grad():
        next(other.nets['G_P'].parameters()).add_(1)
    with pytest.raises(ValueError, match='another weights'):
        export_dataset(other, 1, tmp_path / 'skrgan')
