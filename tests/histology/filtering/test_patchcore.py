"""PatchCore against brute force, on planted failures of real patches, and the rules of keeping."""

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from PIL import Image, ImageFilter

from guided_diffusion.histology.features.backbones import load_backbone
from guided_diffusion.histology.filtering import patchcore
from guided_diffusion.histology.slides.annotations import find_slides, read_slide
from guided_diffusion.histology.slides.patches import extract_patches


def vectors(*shape, seed=0):
    return th.randn(*shape, generator=th.Generator().manual_seed(seed))


def brute_force_coreset(x, count):
    x = x.double()
    chosen = [int((x - x.mean(0)).norm(dim=1).argmax())]
    while len(chosen) < count:
        nearest = th.cdist(x, x[chosen]).amin(1)
        nearest[chosen] = -1
        chosen.append(int(nearest.numpy().argmax()))
    return chosen


@pytest.mark.parametrize("candidates", [1, 7, 50, 4096])
def test_the_coreset_is_the_brute_force_one(monkeypatch, candidates):
    monkeypatch.setattr(patchcore, "_CANDIDATES", candidates)
    monkeypatch.setattr(patchcore, "_ROWS", 64)
    for seed in range(3):
        x = vectors(300, 5, seed=seed)
        for count in (1, 2, 60, 300):
            assert patchcore.greedy_coreset(x, count).tolist() == brute_force_coreset(x, count)


def test_copies_are_chosen_last_and_never_twice():
    x = vectors(6, 3).round(decimals=1).repeat(4, 1)
    chosen = patchcore.greedy_coreset(x, 24).tolist()
    assert sorted(chosen) == list(range(24))
    assert sorted(k % 6 for k in chosen[:6]) == list(range(6))


def test_progress_adds_up():
    seen = []
    patchcore.greedy_coreset(vectors(100, 4), 30, seen.append)
    assert sum(seen) == 30


def test_distances_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(patchcore, "_ROWS", 7)
    monkeypatch.setattr(patchcore, "_COLUMNS", 5)
    queries, bank = vectors(30, 6), vectors(23, 6, seed=1)
    expected = th.cdist(queries.double(), bank.double()).amin(1).square()
    assert th.allclose(patchcore.squared_distances(queries, bank).double(), expected, rtol=1e-4)
    assert float(patchcore.squared_distances(bank, bank).max()) < 1e-5


def test_projection_keeps_distances_roughly():
    x = vectors(40, 600)
    ratio = th.pdist(patchcore.projected(x, 0)) / th.pdist(x)
    assert patchcore.projected(x, 0).shape == (40, 128) and th.equal(
        patchcore.projected(x, 0), patchcore.projected(x, 0)
    )
    assert abs(float(ratio.mean()) - 1) < 0.05 and float(ratio.std()) < 0.1
    assert not th.equal(patchcore.projected(x, 0), patchcore.projected(x, 1))
    assert patchcore.projected(x[:, :9], 0).shape == (40, 9)


# ---- local features ----


def test_a_place_is_the_mean_of_what_is_around_it():
    fine, coarse = vectors(2, 3, 8, 8), vectors(2, 4, 4, 4, seed=1)
    found, grid = patchcore.local_features([fine, coarse], neighbourhood=3, stride=2)
    assert grid == (4, 4) and found.shape == (2, 16, 7)
    joint = th.cat([fine, F.interpolate(coarse, size=(8, 8), mode="bilinear")], 1)
    for place, (row, column) in enumerate((r, c) for r in range(0, 8, 2) for c in range(0, 8, 2)):
        window = joint[:, :, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        assert th.allclose(found[:, place], window.mean((2, 3)), atol=1e-6)


def test_wide_maps_are_averaged_to_128_channels():
    wide = vectors(2, 256, 4, 4)
    found, _ = patchcore.local_features([wide], 1, 1)
    assert th.allclose(found, (wide[:, ::2] + wide[:, 1::2]).flatten(2).transpose(1, 2) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "stride", "what"), [(4, 1, "--neighbourhood 4"), (0, 1, "odd"), (3, 0, "--stride 0")]
)
def test_windows_that_are_no_use_are_refused(window, stride, what):
    with pytest.raises(ValueError, match=what):
        patchcore.local_features([vectors(1, 2, 4, 4)], window, stride)


# ---- scores ----


def fitted(seed=0, fraction=0.5):
    return patchcore.PatchCore.fit(vectors(200, 6, seed=seed) @ vectors(6, 6, seed=9), fraction, seed=seed)


def test_fit_whitens():
    features = vectors(500, 4) * th.tensor([10.0, 1.0, 0.1, 1.0]) + 5
    features[:, 3] = features[:, 1]  # a direction without variance
    core = patchcore.PatchCore.fit(features.clone(), 1.0)
    assert core.bank.shape == (500, 3)
    assert th.allclose(th.cov(core.bank.T, correction=0), th.eye(3), atol=1e-2)


def test_the_score_is_the_largest_distance_to_the_nearest():
    core = fitted()
    features = vectors(20, 33, 6, seed=3) @ vectors(6, 6, seed=9)
    x = ((features - core.mean) @ core.whiten).double()
    expected = th.cdist(x.flatten(0, 1), core.bank.double()).amin(1).view(20, 33)
    assert th.allclose(core.distances(features).double(), expected, atol=1e-3)
    assert th.allclose(core.score(features).double(), expected.amax(1), atol=1e-5)


def test_the_weight_is_equation_7():
    core = fitted()
    features = vectors(5, 8, 6, seed=3)
    x = ((features - core.mean) @ core.whiten).double()
    bank = core.bank.double()
    for image, found in zip(x, core.score(features, reweight=True).double()):
        far = th.cdist(image, bank)
        place = int(far.amin(1).argmax())
        nearest = int(far[place].argmin())
        around = th.cdist(bank[nearest][None], bank)[0].argsort()[:9]
        weight = 1 - far[place, nearest].exp() / far[place, around].exp().sum()
        assert float(found) == pytest.approx(float(weight * far[place, nearest]), rel=1e-4)


def test_what_is_in_the_bank_has_distance_zero():
    features = vectors(60, 5)
    core = patchcore.PatchCore.fit(features.clone(), 1.0)
    assert float(core.score(features[:, None]).max()) < 1e-4


def test_order_and_batches_do_not_matter():
    features, images = vectors(300, 6), vectors(24, 16, 6, seed=1)
    core = patchcore.PatchCore.fit(features.clone(), 0.2)
    shuffled = patchcore.PatchCore.fit(features[th.randperm(300, generator=th.Generator().manual_seed(5))], 0.2)
    scores = core.score(images)
    assert th.allclose(scores, shuffled.score(images), atol=1e-4)
    for size in (1, 5):
        assert th.allclose(scores, th.cat([core.score(part) for part in images.split(size)]), atol=1e-5)
    assert th.allclose(scores.flip(0), core.score(images.flip(0)), atol=1e-5)


def test_bank_sizes():
    assert [patchcore.bank_size(*case) for case in ((1000, 0.1, 50), (1000, 0.1, 500), (3, 0.1, 9))] == [50, 100, 1]
    assert len(fitted(fraction=0.1).bank) == 20


# ---- what to keep ----


def test_weights_by_hand():
    assert patchcore.weights(np.array([1.0, 2.0, 3.0]), 1.0).tolist() == [2 / 3, 1 / 3, 0]
    assert patchcore.weights(np.array([0.0, 1.0, 2.0, 3.0, 90.0]), 0.5).tolist() == pytest.approx(
        [2 / 3, 1 / 3, 0, 0, 0]
    )
    assert patchcore.weights(np.full(4, 7.0), 0.5).tolist() == [0.25] * 4


def test_modes():
    scores = np.array([3.0, 1.0, 2.0, 1.0])
    weight = patchcore.weights(scores, 1.0)
    assert patchcore.keep("threshold", scores, weight, 2.0, None).tolist() == [False, True, True, True]
    assert patchcore.keep("weights", scores, weight, 0.0, None).tolist() == [False, True, True, True]
    assert patchcore.keep("top_n", scores, weight, 0.0, 1).tolist() == [False, True, False, False]


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    real, synthetic = rng.integers(0, 9, 40), rng.integers(2, 12, 30)
    pairs = (synthetic[:, None] > real) + 0.5 * (synthetic[:, None] == real)
    assert patchcore.auroc(real, synthetic) == pytest.approx(pairs.mean())


def test_slides_are_held_out_whole():
    slides = [name for name in "abcdefghij" for _ in range(3)]
    held = patchcore.held_out_slides(slides, 0.2, 0)
    assert len(held) == 2 and held == patchcore.held_out_slides(slides[::-1], 0.2, 0) and held <= set(slides)
    assert len(patchcore.held_out_slides(["a", "b"], 0.01, 0)) == 1
    with pytest.raises(ValueError, match="1 slide .a."):
        patchcore.held_out_slides(["a", "a"], 0.2, 0)
    with pytest.raises(ValueError, match="--val_share 0.9"):
        patchcore.held_out_slides(["a", "b"], 0.9, 0)


# ---- planted failures ----


def blur(image, rng):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2.5)))


def colour(image, rng):
    density = -np.log((image + 1.0) / 256) * (1.6, 0.8, 0.6)
    return np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8)


def noise(image, rng):
    return np.clip(image + rng.normal(0, 25, image.shape), 0, 255).astype(np.uint8)


def checkerboard(image, rng):
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]] // 4
    return np.clip(image + 25 * (2 * ((rows + columns) % 2) - 1)[..., None], 0, 255).astype(np.uint8)


@pytest.mark.slow
def test_planted_failures_of_real_patches_are_found(monuseg):
    slides = [slide for slide in find_slides(monuseg) if slide.split == "MoNuSegTrainingData"]
    held = patchcore.held_out_slides([slide.stem for slide in slides], 0.2, 0)
    backbone = load_backbone("efficientnet_lite0", th.device("cpu"))
    rng = np.random.default_rng(0)
    parts = {True: [], False: []}
    for slide in slides:
        cut = [image for image, _ in extract_patches(*read_slide(slide), 128, 128)]
        parts[slide.stem in held] += [cut[i] for i in rng.permutation(len(cut))[:12]]

    def features(images):
        maps = [backbone.maps(np.stack(images[i : i + 32])) for i in range(0, len(images), 32)]
        return patchcore.local_features([th.cat(part) for part in zip(*maps)])[0]

    core = patchcore.PatchCore.fit(features(parts[False]).flatten(0, 1))
    real = core.score(features(parts[True])).numpy()
    for plant in (blur, colour, noise, checkerboard):
        planted = core.score(features([plant(image, rng) for image in parts[True]])).numpy()
        assert patchcore.auroc(real, planted) >= 0.95, plant.__name__
