"""Scores of sets that are too small, do not fit together, hold NaN, or are one and the same: one line, or a value."""

import math
import warnings

import numpy as np
import pytest
import torch

from medsketch.data import ImageData, phantom_data
from medsketch.evaluate.distances import (
    bootstrap,
    feature_scores,
    fid,
    fid_score,
    grey_histograms,
    kid,
    kl_divergence,
    orientation_histograms,
    prdc,
    width_histograms,
)
from medsketch.evaluate.features import (
    Extractor,
    FeatureStats,
    feature_stats,
    image_batches,
    thumbnails,
)
from medsketch.evaluate.metrics import (
    ms_ssim,
    ms_ssim_pairs,
    ms_ssim_sets,
    sliced_distance,
    swd,
)
from medsketch.evaluate.moco import load_moco, train_moco
from medsketch.evaluate.paired import class_scores, dists, lpips, segmentation_scores
from medsketch.evaluate.privacy import privacy_check

pytestmark = pytest.mark.filterwarnings("ignore:MS-SSIM at")
NAN = float("nan")


def pictures(n=12, c=3, size=32, seed=0):
    return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def points(n=20, d=4, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def holed(v):
    "One NaN in the middle of the set"
    v = v.clone()
    v[len(v) // 2].flatten()[1] = NAN
    return v


X, Y, F, G = pictures(), pictures(seed=1), points(), points(seed=1)
SMALL, TINY = thumbnails(2), X[..., :16, :16]
MASKS, PROBS = (
    torch.randint(2, (3, 8, 8), generator=torch.Generator().manual_seed(2)),
    torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3)),
)


# Every score of two sets of images, as a function of them
IMAGE_SCORES = {
    "swd": swd,
    "ms_ssim": ms_ssim,
    "ms_ssim_sets": ms_ssim_sets,
    "lpips": lpips,
    "dists": dists,
    "feature_scores": lambda a, b: feature_scores(a, b, SMALL, resamples=0),
    "fid of statistics": lambda a, b: fid(feature_stats(SMALL, a), feature_stats(SMALL, b)),
    "privacy": lambda a, b: privacy_check(a, b, shift=0),
    "privacy, held back": lambda a, b: privacy_check(Y, a, {"image": b}, shift=0),
}
BAD_IMAGES = {
    "NaN": (holed(X), "NaN"),
    "infinity": (X.where(X < 0.9, math.inf), "images run from -1 to 1"),
    "0 ... 255": (X * 127.5 + 127.5, "images run from -1 to 1"),
    "smaller images": (TINY, "one size"),
    "grey images": (X[:, :1], "number of channels"),
    "more channels": (X.repeat(1, 2, 1, 1), "number of channels"),
    "no images": (X[:0], "0 images"),
    "no pixels": (X[..., :0], "not a pixel"),
    "no channels": (X[:, :0], "not a pixel"),
    "one image, without batch": (X[0], r"float image batch \(N, C, H, W\)"),
    "8-bit pixels": (X.byte(), "uint8"),
    "nothing": (None, "NoneType"),
    "a path": ("images/real", "is a str"),
}


@pytest.mark.parametrize("bad", BAD_IMAGES)
@pytest.mark.parametrize("score", IMAGE_SCORES)
def test_image_scores_refuse(score, bad):
    images, says = BAD_IMAGES[bad]
    for args in ((images, Y), (Y, images)):
        with pytest.raises(ValueError, match=says) as e:
            IMAGE_SCORES[score](*args)
        assert "\n" not in str(e.value)


STREAMS = {
    "mixed sizes": ([X, TINY], r"\(3, 32, 32\) and \(3, 16, 16\)"),
    "mixed channels": ([X, X[:, :1]], r"\(3, 32, 32\) and \(1, 32, 32\)"),
    "NaN in the last batch": ([X, holed(X)], "NaN"),
    "an empty batch": ([X, X[:0]], "0 images"),
    "loose images": (list(X), "float image batch"),
    "dicts without images": ([{"mask": MASKS}], "has mask and no 'image'"),
    "no batches": ([], "there are no"),
    "numbers": ([1, 2], "is a int"),
}


@pytest.mark.parametrize("bad", STREAMS)
@pytest.mark.parametrize(
    "reader",
    {
        "extractor": SMALL,
        "feature_scores": lambda s: feature_scores(s, Y, SMALL, resamples=0),
        "privacy": lambda s: privacy_check(s, Y, shift=0),
        "grey": grey_histograms,
        "orientations": orientation_histograms,
    }.items(),
    ids=lambda kv: kv[0],
)
def test_streams_are_checked_to_the_end(reader, bad):
    batches, says = STREAMS[bad]
    with pytest.raises(ValueError, match=says):
        reader[1](iter(batches))


def test_an_error_names_the_set():
    for args, name in (((holed(X), Y), "real"), ((X, holed(Y)), "fake")):
        with pytest.raises(ValueError, match=f"{name} contains NaN"):
            feature_scores(*args, SMALL, resamples=0)
    for args, name in (((holed(X), Y), "synthetic"), ((X, holed(Y)), "training"), ((X, Y, holed(Y)), "held-back")):
        with pytest.raises(ValueError, match=f"{name} images contains NaN"):
            privacy_check(*args, shift=0)


def test_what_a_recipe_samples_is_a_set():
    assert torch.equal(SMALL({"image": X, "sketch": X[:, :1]}), SMALL(X)) and torch.equal(SMALL(X.numpy()), SMALL(X))
    assert torch.equal(torch.cat(list(image_batches(iter([{"image": X[:5]}, X[5:]]), 2))), X)


# ---- too few -----------------------------------------------------------------------------------

TOO_FEW = {
    "fid": (lambda: fid(F[:1], G), "real has 1 images; at least 2"),
    "fid of statistics": (lambda: fid(FeatureStats().add(F[:1]), G), "at least 2 images; there is 1"),
    "fid of nothing": (lambda: fid_score(feature_stats(SMALL, []), feature_stats(SMALL, X)), "there are none"),
    "kid": (lambda: kid(F, G[:3]), "fake has 3 images; at least 4"),
    "kid, large subsets": (lambda: kid(F, G, size=21), "from 2 to 20"),
    "kid, subsets of one": (lambda: kid(F, G, size=1), "from 2 to 20"),
    "kid, subsets of none": (lambda: kid(F, G, size=0), "from 2 to 20"),
    "kid, no subsets": (lambda: kid(F, G, 0), "subsets is 0"),
    "prdc": (lambda: prdc(F, G[:5]), "fake has 5 images; at least 6"),
    "prdc, k = 0": (lambda: prdc(F, G, 0), "k is 0"),
    "feature_scores": (lambda: feature_scores(X[:11], Y, SMALL), "real has 11 images; at least 12"),
    "bootstrap": (lambda: bootstrap(fid, F, G[:3]), "at least 4 images"),
    "bootstrap of nothing": (lambda: bootstrap(fid), "at least one set"),
    "bootstrap without resamples": (lambda: bootstrap(fid, F, G, resamples=0), "at least one resample"),
    "ms_ssim_pairs": (lambda: ms_ssim_pairs(X[:1]), "x has 1 images; at least 2"),
    "ms_ssim_sets, no pairs": (lambda: ms_ssim_sets(X, Y, 0), "n_pairs is 0"),
    "swd, unequal sets": (lambda: swd(X, Y[:5]), "take 5 of each"),
    "ms_ssim, unequal sets": (lambda: ms_ssim(X, Y[:5]), "one to one"),
    "sliced distance, unequal clouds": (
        lambda: sliced_distance(F.numpy(), G[:1].numpy(), np.random.default_rng(0)),
        "as many points",
    ),
    "sliced distance, no points": (
        lambda: sliced_distance(F[:0].numpy(), G[:0].numpy(), np.random.default_rng(0)),
        "at least one",
    ),
    "lpips": (lambda: lpips(X, Y[:5]), "one to one"),
    "no masks": (lambda: width_histograms(MASKS[:0]), "no masks"),
    "no segmentations": (lambda: segmentation_scores(PROBS[:0], MASKS[:0]), "no segmentations"),
    "segmentations without pixels": (lambda: segmentation_scores(PROBS[:, :0], MASKS[:, :0]), "no segmentations"),
    "no classes": (lambda: class_scores(MASKS[:0], MASKS[:0], 2), r"both must be \(N, H, W\)"),
    "privacy, training": (lambda: privacy_check(X, Y[:9], shift=0), "9 training images; the check needs at least 10"),
    "privacy, training beside held-back": (
        lambda: privacy_check(X, Y[:2], Y, shift=0),
        "2 training images; the check needs at least 3",
    ),
    "privacy, held-back": (
        lambda: privacy_check(X, Y, Y[:9], shift=0),
        "9 held-back images; the check needs at least 10",
    ),
    "privacy, subjects": (lambda: privacy_check(X, Y, subjects=list("aabbccddeeff"), shift=0), "show 6 subjects"),
    "privacy, no moves": (lambda: privacy_check(X, Y, moves={}), "0 moves"),
    "privacy, negative shift": (lambda: privacy_check(X, Y, shift=-1), "shift is -1"),
    "moco": (lambda: train_moco(phantom_data("fundus", 7, 16), steps=1), "at least 8"),
    "moco, empty batches": (
        lambda: train_moco(phantom_data("fundus", 8, 16), steps=1, batch_size=0),
        "batch_size is 0",
    ),
    "moco, empty queue": (lambda: train_moco(phantom_data("fundus", 8, 16), steps=1, queue=0), "queue is 0"),
    "thumbnails": (lambda: thumbnails(0), "at least 1 pixel"),
}


@pytest.mark.parametrize("case", TOO_FEW)
def test_too_few(case):
    call, says = TOO_FEW[case]
    with pytest.raises(ValueError, match=says) as e:
        call()
    assert "\n" not in str(e.value)


def test_the_fewest_that_are_enough():
    assert (
        fid(F[:2], G[:2]) > 0
        and math.isfinite(kid(F[:4], G[:4])["kid"])
        and set(prdc(F[:6], G[:6])) == {"precision", "recall", "density", "coverage"}
    )
    assert all(math.isfinite(s.value) and s.low <= s.value <= s.high for s in feature_scores(X, Y, SMALL, resamples=5))
    assert swd(X[:1], Y[:1])["mean"] > 0 and 0 <= ms_ssim_pairs(X[:2]) <= 1
    assert len(privacy_check(X[:1], Y[:3], X[2:], shift=0)) == 1 == len(privacy_check(X[:1], Y[:10], shift=0))


# ---- features and histograms that are none ---------------------------------------------------------

BAD_FEATURES = {
    "NaN": (holed(F), "NaN or infinity"),
    "infinity": (F.where(F < 1, math.inf), "NaN or infinity"),
    "other d": (F[:, :3], "one extractor"),
    "d = 0": (F[:, :0], "not a feature"),
    "images": (X, r"pass features as floats \(N, d\)"),
    "one vector": (F[0], r"pass features as floats \(N, d\)"),
    "whole numbers": (F.long(), r"pass features as floats \(N, d\)"),
}


@pytest.mark.parametrize("bad", BAD_FEATURES)
@pytest.mark.parametrize("score", [fid, kid, prdc], ids=lambda f: f.__name__)
def test_feature_scores_refuse(score, bad):
    features, says = BAD_FEATURES[bad]
    for args in ((features, G), (G, features)):
        with pytest.raises(ValueError, match=says):
            score(*args)


@pytest.mark.parametrize("score", [kid, prdc], ids=lambda f: f.__name__)
def test_statistics_are_no_features(score):
    with pytest.raises(ValueError, match="only fid makes do"):
        score(FeatureStats().add(F), G)


@pytest.mark.parametrize(
    "net, says",
    {
        "one row for all": (lambda v: v.mean((0, 2, 3))[None], r"gave \(1, 3\) for 12 images"),
        "no columns": (lambda v: v.mean((1, 2, 3)), r"gave \(12,\) for"),
        "a tuple": (lambda v: (v,), "gave tuple"),
        "NaN": (lambda v: v.mean((2, 3)) * NAN, "not finite"),
    }.values(),
    ids=str,
)
def test_networks_that_give_no_features(net, says):
    for call in (lambda e: e(X), lambda e: feature_stats(e, X), lambda e: privacy_check(X, Y, Y, e, shift=0)):
        with pytest.raises(ValueError, match=says):
            call(Extractor(net, "odd", device="cpu"))


def test_a_network_without_a_name_makes_no_scores():
    with pytest.raises(ValueError, match="wrap a network"):
        feature_scores(X, Y, lambda v: v.mean((2, 3)))


@pytest.mark.parametrize(
    "args, says",
    {
        "NaN": (([0.5, NAN], [0.5, 0.5]), "negative numbers or NaN"),
        "negative": (([1.5, -0.5], [0.5, 0.5]), "negative numbers or NaN"),
        "nothing": (([0, 0], [0.5, 0.5]), "nothing to compare"),
        "other bins": (([0.5, 0.5], [0.2, 0.3, 0.5]), "2 bins and fake 3"),
        "too many axes": ((torch.ones(2, 2, 2), torch.ones(2, 2, 2)), r"\(N, bins\)"),
        "a number": ((1.0, 1.0), r"\(N, bins\)"),
        "a share above 1": (([1.0, 0], [0.5, 0.5], 2), "even is 2"),
    }.values(),
    ids=str,
)
def test_histograms_that_are_none(args, says):
    with pytest.raises(ValueError, match=says):
        kl_divergence(*(torch.as_tensor(a) if i < 2 else a for i, a in enumerate(args)))


def test_kl_with_empty_bins_and_nothing_mixed_in():
    kl = lambda p, q: kl_divergence(torch.tensor(p), torch.tensor(q), even=0)
    assert kl([1.0, 0, 0], [0.5, 0.5, 0]) == pytest.approx(math.log(2))  # what neither has adds nothing
    assert kl([0.5, 0.5], [1.0, 0]) == math.inf and kl([1.0, 0], [1.0, 0]) == 0


@pytest.mark.parametrize(
    "args, says",
    {
        "probabilities for classes": ((PROBS, MASKS, 2), "pass class numbers"),
        "NaN": ((MASKS, MASKS * NAN, 2), "pass class numbers"),
        "a class too many": ((MASKS * 2, MASKS, 2), "holds class 2"),
        "negative classes": ((MASKS - 1, MASKS, 2), "holds class -1"),
        "other sizes": ((MASKS, MASKS[:, :4], 2), "both must be"),
    }.values(),
    ids=str,
)
def test_classes_that_are_none(args, says):
    with pytest.raises(ValueError, match=says):
        class_scores(*args)


# ---- identical sets --------------------------------------------------------------------------------


@pytest.mark.parametrize("n, d", [(4, 3), (12, 200), (200, 6)])
def test_features_against_themselves(n, d):
    x = points(n, d)
    assert fid(x, x) < 1e-5 * x.var(0).sum() and fid(x, x.flip(0)) < 1e-5 * x.var(0).sum()
    assert kid(x, x, 1, n)["kid"] < 0  # unbiased, and the pairs of an image with itself are missing on one side only
    if n > 5:
        assert list(prdc(x, x).values()) == [
            1,
            1,
            pytest.approx(1.2),
            1,
        ]  # density counts an image's own ball as well: (k + 1) / k


def test_images_against_themselves():
    soft = torch.nn.functional.avg_pool2d(Y, 3, 1, 1)
    assert swd(X, X)["mean"] < 0.8 * swd(X, soft)["mean"] and ms_ssim(X, X) == pytest.approx(1, abs=1e-6)
    assert (
        kl_divergence(grey_histograms(X), grey_histograms(X))
        == 0
        == kl_divergence(orientation_histograms(X), orientation_histograms(X.clone()))
    )
    got = {s.name.split(" (")[0]: s.value for s in feature_scores(X, X, SMALL, resamples=0)}
    assert got["FID"] < 1e-6 and got["precision"] == got["recall"] == got["coverage"] == 1


@pytest.mark.parametrize("held", [None, Y], ids=["leave-one-out", "held-back"])
def test_privacy_of_the_training_set_itself(held):
    for fake in (X, X.flip(0), X.flip(-1)):
        got = privacy_check(fake, X, held, SMALL, shift=0)
        assert got.alarm and set(got.verdicts) == {"copy"} and "ALARM" in got.table()


def test_held_back_images_that_were_trained_on_are_told():
    with pytest.warns(UserWarning, match="come as near as 0"):
        got = privacy_check(X, X, X, shift=0)
    assert got.alarm and set(got.verdicts) == {"copy"}


def test_a_set_of_one_image_again_and_again():
    one = X[:1].repeat(12, 1, 1, 1)
    scores = {s.name.split(" (")[0]: s.value for s in feature_scores(X, one, SMALL, resamples=4)}
    assert scores["precision"] == 1 and scores["recall"] < 0.1 and all(math.isfinite(v) for v in scores.values())
    assert ms_ssim_pairs(one) == pytest.approx(1, abs=1e-6) and math.isfinite(swd(X, one)["mean"])
    assert set(privacy_check(one, X, Y, shift=0).verdicts) == {"copy"}


def test_images_without_any_contrast():
    flat = torch.zeros_like(X)
    scores = {s.name.split(" (")[0]: s.value for s in feature_scores(flat, flat, SMALL, resamples=4)}
    assert scores["FID"] == 0 and scores["precision"] == scores["recall"] == scores["coverage"] == 1
    assert swd(flat, flat)["mean"] == 0 and ms_ssim(flat, flat) == pytest.approx(1) and 0 <= ms_ssim(flat, X) < 0.5
    with pytest.raises(ValueError, match="images without edges"):
        kl_divergence(orientation_histograms(X), orientation_histograms(flat))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a reference of equal images is told, see above
        assert set(privacy_check(flat, flat, shift=0).verdicts) == {"copy"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_give_nearly_the_same(dtype):
    a, b = X.to(dtype), Y.to(dtype)
    assert swd(a, b)["mean"] == pytest.approx(swd(X, Y)["mean"], rel=0.1) and ms_ssim(a, b) == pytest.approx(
        ms_ssim(X, Y), abs=1e-3
    )
    assert torch.allclose(SMALL(a), SMALL(X), atol=0.01) and torch.allclose(
        grey_histograms(a), grey_histograms(X), atol=0.05
    )
    assert torch.allclose(orientation_histograms(a), orientation_histograms(X), atol=0.05) and fid(
        F.to(dtype), G.to(dtype)
    ) == pytest.approx(fid(F, G), rel=0.05)


# ---- domain features -------------------------------------------------------------------------------


def test_moco_refuses_what_it_cannot_learn_from(tmp_path):
    with pytest.raises(ValueError, match="Tensor; pass an ImageData"):
        train_moco(X, steps=1)
    e = train_moco(
        ImageData(np.zeros((8, 3, 16, 16), np.uint8)), steps=1, width=0.125, progress=False
    )  # nothing to learn from, but numbers
    assert e(X).isfinite().all() and e(TINY).shape == e(X).shape
    for bad, says in ((X[:, :1], "3 channels, not 1"), (holed(X), "NaN"), ([X, TINY], "one set holds")):
        with pytest.raises(ValueError, match=says):
            e(bad)


@pytest.mark.parametrize(
    "config",
    [
        "no json",
        "[]",
        "{}",
        '{"channels": "three", "depth": 18, "width": 1}',
        '{"channels": 3, "depth": 34, "width": 1}',
        '{"channels": 3, "depth": 18, "width": 0.125}',
    ],
)
def test_weights_that_are_none(tmp_path, config):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors", {"medsketch-moco": config})
    with pytest.raises(ValueError, match="odd.safetensors holds no features"):
        load_moco(tmp_path / "odd.safetensors")
