"Planes of any name and kind: stored, served, moved, cut, joined and named without code of their own."

import hashlib
import pickle
import warnings

import numpy as np
import pytest
import torch

from medsketch.core import torch_rng
from medsketch.data import ImageData, join, phantom_data, split_by_subject
from medsketch.data.batches import (
    AUGMENT,
    Augment,
    Batches,
    flip_lr,
    flip_rotate,
    plane_names,
    turn,
)
from medsketch.data.planes import KINDS

N, S = 6, 16
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (N, 1, S, S), np.uint8)
LABELS = RNG.integers(0, 4, (N, S, S), np.uint8)
PLANES = {
    'picture': (RNG.integers(0, 256, (N, 2, S, S), np.uint8), torch.float32, (N, 2, S, S)),
    'float picture': (RNG.uniform(-1, 1, (N, 2, S, S)).astype(np.float32), torch.float32, (N, 2, S, S)),
    'sketch': ((LABELS > 1).astype(np.uint8) * 255, torch.float32, (N, 1, S, S)),
    'labels': (LABELS, torch.int64, (N, S, S)),
    'labels of 16 bits': (LABELS.astype(np.uint16) * 300, torch.int64, (N, S, S)),
    'instances': (RNG.integers(0, 70_000, (N, S, S), np.int32), torch.int64, (N, S, S)),
    'table': (RNG.integers(0, 5, (N, 3), np.uint8), torch.int64, (N, 3)),
    'float table': (RNG.normal(size=(N, 3)), torch.float32, (N, 3)),
}
kind_of = lambda case: next(k for k in KINDS if k in case)


def some(case, name='thing', rows=slice(None), **kw):
    "A set with one further plane"
    return ImageData(BYTES[rows], planes={name: PLANES[case][0][rows]}, kinds={name: kind_of(case)}, **kw)


@pytest.mark.parametrize('case', PLANES)
def test_a_new_plane_is_served_cut_joined_and_named(case):
    ds = some(case)
    a, dtype, shape = PLANES[case]
    b = ds.batch(range(N))
    assert b['thing'].dtype == dtype and tuple(b['thing'].shape) == shape
    part = ds.subset([4, 1]).subset([1])
    assert torch.equal(part.batch([0])['thing'], b['thing'][1:2]) and part.kinds == ds.kinds
    halves = join(ds.subset(range(3)), ds.subset(range(3, N)))
    assert halves.fingerprint() == ds.fingerprint() and np.array_equal(halves.planes['thing'], a)
    changed = a.copy()
    changed[0, ..., 0] = a[0, ..., 0] / 2 if a.dtype.kind == 'f' else a[0, ..., 0] ^ 1
    prints = {
        ds.fingerprint(),
        ImageData(BYTES).fingerprint(),
        some(case, 'other').fingerprint(),
        ds.with_planes(thing=changed).fingerprint(),
    }
    assert len(prints) == 4
    loaded = pickle.loads(pickle.dumps(ds))
    assert loaded.fingerprint() == ds.fingerprint() and torch.equal(loaded[2]['thing'], ds[2]['thing'])
    with pytest.raises(ValueError, match='only some of the sets have thing'):
        join(ds, ImageData(BYTES))


@pytest.mark.parametrize('move', [flip_lr, flip_rotate, turn, Augment(flip_rotate, turn)])
@pytest.mark.parametrize('case', PLANES)
def test_a_new_plane_moves_by_its_kind(case, move):
    b = some(case).batch(range(N))
    where = torch.arange(float(S * S)).view(1, 1, S, S).repeat(N, 1, 1, 1)
    out = move(b | {'where': where.long()[:, 0]}, torch_rng(3))
    if 'table' in case:
        assert torch.equal(out['thing'], b['thing'])
    elif case in ('labels', 'labels of 16 bits', 'instances'):
        flat = b['thing'].flatten(1)
        # each value comes from one pixel
        assert torch.equal(out['thing'].flatten(1), flat.gather(1, out['where'].flatten(1)))
    elif move in (flip_lr, flip_rotate):
        rows = out['where'].flatten(1)[:, None].expand(-1, b['thing'].shape[1], -1)
        assert torch.equal(out['thing'].flatten(2), b['thing'].flatten(2).gather(2, rows))
    else:
        assert not torch.equal(out['thing'], b['thing']) and set(out['thing'].unique().tolist()) - set(
            b['thing'].unique().tolist()
        )
    assert out['path'] == b['path']


def test_names_and_shapes_say_the_kind():
    ds = ImageData(BYTES, planes={'instances': LABELS, 'atlas': BYTES, 'age': np.zeros((N, 1))})
    assert ds.kinds == {'image': 'picture', 'instances': 'instances', 'atlas': 'picture', 'age': 'table'}
    assert ImageData(planes={'image': BYTES, 'mask': LABELS}).fingerprint() == ImageData(BYTES, LABELS).fingerprint()
    with pytest.raises(ValueError, match="kinds={'zones': 'labels'}"):
        ImageData(BYTES, planes={'zones': LABELS})
    assert plane_names(ds.batch([0]) | {'affine': torch.eye(4)[None]}) == ['image', 'instances', 'atlas']


def test_tables_of_different_widths_join():
    a, b = (ImageData(BYTES, planes={'instances': LABELS, 'instance_class': np.ones((N, k), np.uint8)}) for k in (2, 4))
    assert join(a, b).planes['instance_class'].tolist() == [[1, 1, 0, 0]] * N + [[1] * 4] * N


def test_fingerprints_of_byte_sets_are_what_they_were():
    "Runs that stand on disk go on: the recipe of the hash for images, masks and sketches has not changed"
    masks, sketches = LABELS, (LABELS > 1).astype(np.uint8) * 255
    for parts in ((BYTES, None, None), (BYTES, masks, None), (BYTES, masks, sketches), (BYTES, None, sketches)):
        h = hashlib.blake2b(repr((BYTES.shape, ('a', 'b'))).encode(), digest_size=8)
        for a in parts:
            h.update(b'|' + (b'' if a is None else a.tobytes()))
        assert ImageData(*parts, classes=('a', 'b')).fingerprint() == h.hexdigest()


def test_attributes_are_planes():
    ds = ImageData(BYTES, LABELS)
    assert ds.images is ds.planes['image'] and ds.masks is ds.planes['mask'] and ds.sketches is None
    ds.masks = None
    assert 'mask' not in ds.planes and 'mask' not in ds[0]
    ds.masks = LABELS * 0
    assert not ds.batch([0])['mask'].any()
    with pytest.raises(ValueError, match='8×8 pixels, the images 16×16'):
        ds.masks = LABELS[:, :8, :8]


REFUSED = {
    '0 … 2': (lambda: ImageData(BYTES.clip(0, 200) / 100), 'float pictures lie in'),
    '0 … 255, as float': (lambda: ImageData(BYTES.astype(np.float32)), r'pass x.astype\(np.uint8\)'),
    '0 … 65535': (lambda: ImageData(BYTES.astype(np.float64) * 257), 'to_eight_bits'),
    '-3 … 3': (lambda: ImageData(RNG.normal(size=(N, 1, S, S)) * 9), r'scale it to \[-1, 1\]'),
    'NaN': (lambda: ImageData(np.where(BYTES > 9, np.nan, 0.0)), 'NaN or infinity'),
    'integers': (lambda: ImageData(BYTES.astype(np.int64)), 'image is int64: pass uint8, or float32'),
    'sixteen bits': (lambda: ImageData(BYTES.astype(np.uint16)), 'image is uint16'),
    'channels last, flat': (lambda: ImageData(BYTES[:, 0]), r'picture is \(N, C, H, W\)'),
    'float labels': (lambda: ImageData(BYTES, LABELS / 2), 'labels are whole numbers'),
    'float sketch': (lambda: ImageData(BYTES, None, LABELS / 4), '255 = stroke'),
    'masks of other size': (lambda: ImageData(BYTES, LABELS[:, :8]), 'mask is 16×8 pixels, the images 16×16'),
    'too few masks': (lambda: ImageData(BYTES, LABELS[:3]), 'mask has 3 entries for 6 images'),
    'too few names': (lambda: ImageData(BYTES, paths=['a']), '1 names for 6 images'),
    'a path': (lambda: ImageData('images'), r'image is a str: read a folder with load_images\(folder, size\)'),
    'a loader': (lambda: ImageData(torch.utils.data.DataLoader(ImageData(BYTES))), r'DataLoader: pass its data set'),
    'a data set': (lambda: ImageData(ImageData(BYTES)), r'read by as_image_data\(data\)'),
    'dictionaries': (lambda: ImageData([{'image': BYTES[0]}]), r'read by as_image_data\(data\)'),
    'numbers': (lambda: ImageData(7), r'image is a int: pass an array'),
    'nothing': (lambda: ImageData(), 'a set needs images'),
    'an unknown kind': (
        lambda: ImageData(BYTES, planes={'a': LABELS}, kinds={'a': 'mask'}),
        "kind 'mask' of a; use one of",
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_no_set_is_refused_in_a_line(case):
    f, says = REFUSED[case]
    with pytest.raises(ValueError, match=says) as e:
        f()
    assert '\n' not in str(e.value) and len(str(e.value)) < 200


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_what_they_are(dtype):
    x = RNG.uniform(-1, 1, (N, 1, S, S)).astype(dtype)
    for a in (x, torch.from_numpy(x)):
        got = ImageData(a).batch(range(N))['image']
        assert got.dtype == torch.float32 and torch.equal(got, torch.from_numpy(x.astype(np.float32)))
    served = ImageData(BYTES).batch(range(N))['image']
    assert torch.equal(ImageData(served).batch([3])['image'], served[3:4])
    with pytest.warns(UserWarning, match='0 is mid-grey'):
        ImageData(np.abs(x))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ImageData(x).subset([1, 2]).with_planes(mask=LABELS[:2])


def test_a_batch_is_a_copy():
    for case in PLANES:
        ds = some(case)
        before = ds.fingerprint()
        for v in ds.batch(range(N)).values():
            if isinstance(v, torch.Tensor):
                v.zero_()
        assert ds.fingerprint() == before


# The split


def test_a_split_without_subjects_says_so_once():
    ds = ImageData(BYTES)
    with pytest.warns(UserWarning, match='each of the 6 images is a subject of its own'):
        split_by_subject(ds)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        split_by_subject(ds, seed=1)


@pytest.mark.parametrize(
    'ds',
    [
        ImageData(BYTES, subjects=list('abcdef')),
        ImageData(BYTES, subjects=list('aabbcc')),
        phantom_data('lung_ct', 4, 16),
    ],
)
def test_a_split_with_subjects_is_quiet(ds):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        split_by_subject(ds, (0.5, 0.5))
        split_by_subject(join(ds, ds), (0.5, 0.5))


# The stream


def test_augmentations_by_name():
    assert (
        list(AUGMENT)[:2] == ['none', 'mirror']
        and set(AUGMENT) >= {'flip', 'rotate', 'turn', 'all'}
        and AUGMENT['none'] is None
    )
    b = {'image': torch.arange(S * S * 1.0).view(1, 1, S, S).repeat(64, 1, 1, 1)}
    moved = AUGMENT['mirror'](b, torch_rng(0))['image']
    mirrored = torch.stack([torch.equal(m, o.flip(-1)) * torch.ones(1) for m, o in zip(moved, b['image'])]).mean()
    assert 0.3 < mirrored < 0.7 and all(
        torch.equal(m, o) or torch.equal(m, o.flip(-1)) for m, o in zip(moved, b['image'])
    )


@pytest.mark.parametrize('workers', [1, 2, 5])
@pytest.mark.parametrize('world', [1, 3])
def test_workers_change_nothing(workers, world):
    "Not with batch size, position and probability changed on the way, nor when resumed"
    ds = ImageData(BYTES, LABELS, planes={'depth': PLANES['float picture'][0]})

    def stream(workers, start=0, step=0):
        augment = Augment(flip_rotate, turn, p=min(1, 0.3 + step / 9))
        b, out = Batches(ds, 2 if step < 4 else 3, 7, start, augment, rank=world - 1, world=world, workers=workers), []
        for i in range(step, 9):
            if i == 4:
                b.batch_size = 3
            if i == 7:
                b.position += 5
            augment.p = min(1, 0.3 + i / 9)
            out.append((b.position, next(b)))
        b.close()
        return out

    plain, threads = stream(0), stream(workers)
    resumed = stream(workers, plain[5][0], 5)
    for want, got in (*zip(plain, threads), *zip(plain[5:], resumed)):
        assert want[0] == got[0] and want[1]['path'] == got[1]['path']
        assert all(torch.equal(want[1][k], got[1][k]) for k in ('image', 'mask', 'depth'))


def test_an_error_in_a_thread_is_raised():
    class Broken:
        def __len__(self):
            return 4

        def batch(self, indices):
            raise OSError('disk gone')

    with pytest.raises(OSError, match='disk gone'):
        next(Batches(Broken(), 2, workers=2))
    for kw, says in (({'workers': -1}, 'workers -1'), ({'batch_size': 0}, 'at least 1')):
        with pytest.raises(ValueError, match=says):
            Batches(ImageData(BYTES), **{'batch_size': 2} | kw)
    with pytest.raises(ValueError, match=r'list has no batch\(indices\): pass as_image_data'):
        Batches([1, 2], 1)


def test_a_stream_with_threads_can_be_copied_and_left():
    b = Batches(ImageData(BYTES), 2, workers=2, pin=True)
    next(b)
    assert torch.equal(next(pickle.loads(pickle.dumps(b)))['image'], next(b)['image'])
    pool = b._pool
    del b
    assert pool._shutdown
