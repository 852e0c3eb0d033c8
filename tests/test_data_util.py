"""Shape properties, matching and subsampling against numbers of the reference and brute force."""

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest
from reference_numbers import FOLDER

from guided_diffusion import data_util
from guided_diffusion.data_util import (
    area_properties,
    balanced_weights,
    class_mixture,
    haematoxylin_histogram,
    match_app,
    match_scores,
    match_shares,
    match_struct,
    near_mixtures,
    near_struct,
    nuclear_shares,
    repeated,
    shape_properties,
    shuffled,
    stain_descriptor,
    subsample_indices,
)
from guided_diffusion.stains import STAINS


def test_properties_equal_the_reference():
    with np.load(FOLDER / "match_struct.npz") as arrays:
        masks, props = arrays["masks"], arrays["props"]
    np.testing.assert_allclose([shape_properties(mask) for mask in masks], props, rtol=1e-12)
    assert np.array_equal([area_properties(mask) for mask in masks], props[:, 1:])


def test_areas_go_by_id_whatever_the_type():
    mask = np.zeros((10, 10), np.int64)
    mask[0, :3] = 4
    mask[5, :3] = 4  # another part of the same nucleus
    mask[8, :2] = 60000
    for dtype in (np.uint16, np.int32, np.int64):
        assert area_properties(mask.astype(dtype)) == (8, 4.0)
    assert area_properties(np.where(mask == 4, 1 << 40, mask)) == (8, 4.0)
    assert area_properties(np.zeros((3, 3), np.uint8)) == (0, 0.0)
    assert shape_properties(np.zeros((3, 3), np.uint8)) == (1.0, 0, 0.0)


@pytest.mark.parametrize(("mask", "message"), [(np.ones((2, 2)), "integers"), (np.full((2, 2), -1), "negative")])
def test_bad_masks(mask, message):
    for function in (area_properties, shape_properties):
        with pytest.raises(ValueError, match=message):
            function(mask)


def hull_area(mask):
    """Pixel centres that lie in some triangle of edge mid-points (Caratheodory), in exact arithmetic."""
    centres = 2 * np.argwhere(mask)
    corners = np.unique(np.concatenate([centres + step for step in ((0, 1), (0, -1), (1, 0), (-1, 0))]), axis=0)
    points = 2 * np.argwhere(np.ones(mask.shape))

    def side(a, b):  # [triangles x points]
        ab, ap = b - a, points[None] - a[:, None]
        return np.sign(ab[:, None, 0] * ap[..., 1] - ab[:, None, 1] * ap[..., 0])

    a, b, c = np.array(list(itertools.combinations(corners, 3))).transpose(1, 0, 2)
    solid = (b - a)[:, 0] * (c - a)[:, 1] != (b - a)[:, 1] * (c - a)[:, 0]
    sides = np.stack([side(a, b), side(b, c), side(c, a)])[:, solid]
    return int(((sides >= 0).all(axis=0) | (sides <= 0).all(axis=0)).any(axis=0).sum())


def test_solidity_by_brute_force():
    rng = np.random.default_rng(0)
    for size in (1, 1, 2, 3, 3, 4, 5, 6, 7, 8):
        mask = np.zeros((5, 6), np.int32)
        mask.reshape(-1)[rng.choice(30, size, replace=False)] = 3
        expected = Fraction(size, hull_area(mask > 0))
        assert shape_properties(mask) == (float(expected), size, float(size))


def test_solidity_is_weighted_by_area():
    mask = np.zeros((20, 20), np.int32)
    mask[2:6, 2:6] = 1  # convex: solidity 1
    mask[10:14, 2], mask[13, 2:6] = 2, 2  # an L of 7 px; the hull adds its diagonal and what lies below: 10 px
    solidity, total, median = shape_properties(mask)
    assert (total, median) == (23, 11.5)
    assert solidity == pytest.approx((16 + 7 * 7 / 10) / 23)


def reference_scores(properties, i):
    """The score as the definition has it, one query at a time."""
    score = 0
    for values in properties.T:
        d = np.abs(values - values[i])
        d = np.clip(d, None, np.quantile(d, 0.85))
        spread = d.max() - d.min()
        score = score + 0.5 * (d - d.min()) / (spread if spread > 1e-14 else 1)
    return 1 - np.clip(score, 0, 1)


def test_scores_by_brute_force():
    rng = np.random.default_rng(0)
    properties = np.stack([rng.integers(0, 4000, 50), rng.integers(0, 400, 50) / 2], axis=1)
    properties[:10] = 0
    scores = match_scores(properties, np.arange(50))
    assert scores.shape == (50, 50)
    np.testing.assert_allclose(scores, [reference_scores(properties, i) for i in range(50)], atol=1e-14)
    assert (np.diag(scores) == 1).all()
    assert np.array_equal(match_scores(properties, np.array([7, 3])), scores[[7, 3]])
    assert (match_scores(np.ones((5, 2)), np.arange(5)) == 1).all()


def test_the_mixture_of_classes_counts_as_one_property():
    mask, classes = np.zeros((2, 6, 8), np.int32)
    mask[:2, :2], mask[:2, 3:5], mask[4:, :3], mask[5, 5:] = 7, 2, 90, 1
    classes[mask == 7], classes[mask == 2], classes[mask == 90], classes[mask == 1] = 1, 3, 3, 1
    assert class_mixture(classes, mask, 5).tolist() == [0.5, 0, 0.5, 0]
    assert class_mixture(0 * classes, 0 * mask, 3).tolist() == [0, 0]

    areas = np.array([[10, 100], [20, 100], [10, 100], [30, 100]], float)
    mixtures = np.array([[1, 0], [0.5, 0.5], [0, 1], [1, 0]])
    # To the first: areas 0, 10, 0, 20, capped at 20 - 0.45 * 10 = 15.5; mixtures 0, 1, 2, 0, capped at 1 + 0.55.
    expected = 1 - np.array([0, 10 / 15.5 + 1 / 1.55, 1, 1]) / 3
    np.testing.assert_allclose(match_scores(areas, np.array([0]), mixtures)[0], expected)


def test_structures_of_equal_areas_are_matched_by_their_classes():
    mixtures = np.array([[1, 0], [0.2, 0.8]])[np.arange(40) % 2]
    ones = np.ones(40)
    for seed in range(10):
        chosen = near_struct(ones, ones, mixtures=mixtures).draw(seed)
        assert (chosen % 2 == np.arange(40) % 2).all() and (chosen != np.arange(40)).all()
    assert (near_struct(ones, ones).draw(0) % 2 != np.arange(40) % 2).any()


def test_images_for_other_structures_by_their_classes():
    structures, images = np.array([[0.3, 1, 0], [0.5, 0, 1]]), np.array([[0.3, 0, 1], [0.4, 0.5, 0.5], [0.35, 1, 0]])
    # To the first 0, 0.1, 0.05 of at most 0.085, and 2, 1, 0 of at most 1.7; to the second 0.185, 0.1, 0.15, less 0.1,
    # and 0, 1, 2.
    assert near_mixtures(structures, images).near.tolist() == [[2, 0, 1], [1, 0, 2]]
    many = near_mixtures(structures[:1].repeat(30, axis=0), images.repeat(20, axis=0)).draw(3)
    assert (many >= 40).all() and len(set(many.tolist())) > 5


def nearest(distance, i, k=19):
    order = sorted((d, j) for j, d in enumerate(distance) if j != i)
    return [j for _, j in order[:k]]


def test_match_struct_draws_from_the_nearest_others():
    rng = np.random.default_rng(1)
    total, median = rng.integers(0, 40, (2, 60))  # coarse: many ties
    properties = np.stack([median, total], axis=1)
    distance = -match_scores(properties, np.arange(60))
    seen = [set() for _ in range(60)]
    for seed in range(200):
        for i, j in enumerate(match_struct(total, median, seed)):
            seen[i].add(int(j))
    for i in range(60):
        assert seen[i] <= set(nearest(distance[i], i))
        assert len(seen[i]) > 15


def test_match_struct_is_a_function_of_the_seed(monkeypatch):
    total, median = np.random.default_rng(2).integers(0, 40, (2, 60))
    state = np.random.get_state()[1].copy()
    chosen = match_struct(total, median, 5)
    assert chosen.dtype == np.int64
    assert np.array_equal(chosen, match_struct(list(total), list(median), 5))
    assert not np.array_equal(chosen, match_struct(total, median, 6))
    monkeypatch.setattr(data_util, "_CHUNK_ELEMENTS", 60 * 7)
    assert np.array_equal(chosen, match_struct(total, median, 5))
    assert np.array_equal(np.random.get_state()[1], state)


def test_many_empty_masks():
    total = np.array([0] * 25 + [500, 900, 100, 300, 700])
    for seed in range(20):
        chosen = match_struct(total, total / 10, seed)
        assert (chosen != np.arange(30)).all()
        assert (chosen[:25] < 20).all()  # 24 ties at a distance of 0: the first 19 others


def test_few_masks():
    assert match_struct([3, 4], [1, 1], 0).tolist() == [1, 0]
    chosen = np.array([match_struct([1, 2, 3], [1, 2, 3], seed) for seed in range(30)])
    assert all(set(chosen[:, i]) == {0, 1, 2} - {i} for i in range(3))
    for n in (0, 1):
        with pytest.raises(ValueError, match=rf"--match_struct has {n} image.*at least 2"):
            match_struct(np.ones(n), np.ones(n), 0)
        with pytest.raises(ValueError, match=rf"--match_app has {n} image.*at least 2"):
            match_app(np.ones((n, 21)), 0)


def test_stain_descriptor():
    flat = np.broadcast_to(np.uint8([255, 127, 0]), (4, 5, 3))
    expected = np.zeros((3, 7))
    expected[1:] = np.log10([[2], [256]])
    expected[:, 1] = 0
    np.testing.assert_allclose(stain_descriptor(flat).reshape(3, 7), expected, atol=1e-6)

    image = np.random.default_rng(0).integers(0, 256, (31, 33, 3), dtype=np.uint8)
    density = -np.log10((image.reshape(-1, 3) + 1.0) / 256)
    quantiles = np.quantile(density, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0, method="inverted_cdf")
    expected = np.concatenate([[density.mean(axis=0), density.std(axis=0)], quantiles]).T.ravel()
    described = stain_descriptor(image)
    assert described.dtype == np.float32
    np.testing.assert_allclose(described, expected, rtol=1e-5)
    pixels = np.random.default_rng(1).permutation(image.reshape(-1, 3)).reshape(33, 31, 3)
    assert np.array_equal(stain_descriptor(pixels), described)  # colours, not places


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_bad_images(image):
    with pytest.raises(ValueError, match="uint8"):
        stain_descriptor(image)


def test_match_app_finds_the_same_stain():
    rng = np.random.default_rng(0)
    stains = rng.uniform(60, 220, (3, 3))
    images = [np.clip(stains[i % 3] + rng.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8) for i in range(75)]
    descriptors = np.stack([stain_descriptor(image) for image in images])
    z = (descriptors - descriptors.mean(axis=0, dtype=np.float64)) / descriptors.std(axis=0, dtype=np.float64)
    for seed in range(20):
        chosen = match_app(descriptors, seed)
        assert chosen.dtype == np.int64
        assert (chosen % 3 == np.arange(75) % 3).all()
        for i, j in enumerate(chosen):
            assert j in nearest(np.sqrt(((z - z[i]) ** 2).sum(axis=1)), i)


def test_match_app_with_equal_images():
    for seed in range(20):
        chosen = match_app(np.full((50, 21), 0.3, np.float32), seed)
        assert (chosen != np.arange(50)).all()
        assert chosen.max() <= 19


def test_matching_among_other_slides():
    """By brute force: the 19 nearest that are of another slide, or all of these where they are fewer."""
    rng = np.random.default_rng(3)
    slides = np.array(["a"] * 30 + ["b"] * 8 + ["c"] * 2)[rng.permutation(40)]
    features = rng.normal(size=(40, 5))
    total, median = rng.integers(1, 400, (2, 40))
    z = (features - features.mean(axis=0)) / features.std(axis=0)
    distances = {
        "app": np.linalg.norm(z[:, None] - z, axis=2),
        "struct": -match_scores(np.stack([median, total], axis=1), np.arange(40)),
    }
    for kind, distance in distances.items():
        seen = [set() for _ in range(40)]
        for seed in range(300):
            chosen = match_app(features, seed, slides) if kind == "app" else match_struct(total, median, seed, slides)
            for i, j in enumerate(chosen):
                seen[i].add(int(j))
        for i in range(40):
            others = [j for j in np.argsort(distance[i], kind="stable") if slides[j] != slides[i]]
            assert seen[i] == set(others[:19])


def test_matching_needs_another_slide():
    with pytest.raises(ValueError, match="--match_other_slide True: all 4 images are of slide a"):
        match_app(np.eye(4), 0, ["a"] * 4)
    assert match_app(np.eye(3), 0, ["a", "a", "b"])[:2].tolist() == [2, 2]


def test_2400_masks_in_seconds():
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 60, (24, 16, 16)).repeat(8, axis=1).repeat(8, axis=2).astype(np.int32)
    start = time.perf_counter()
    total, median = np.array([area_properties(masks[i % 24]) for i in range(2400)]).T
    match_struct(total, median, 0)
    assert time.perf_counter() - start < 6


def test_shuffles_are_the_legacy_generators():
    state = np.random.get_state()[1].copy()
    assert shuffled(10).tolist() == [8, 1, 5, 0, 7, 2, 9, 4, 3, 6]  # np.random.seed(42); np.random.permutation(10)
    assert shuffled(10).dtype == np.int64
    assert subsample_indices(10, 0.35).tolist() == [8, 1, 5]
    assert subsample_indices(10, 1.0).tolist() == shuffled(10).tolist()
    assert np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, 25, float("nan"), 0.05])
def test_bad_subsample(fraction):
    with pytest.raises(ValueError, match=rf"--subsample {fraction}"):
        subsample_indices(10, fraction)


# ---- rare classes ----


def test_weights_of_rare_classes_by_hand():
    """Of 25 nuclei 16 are of one class, which count 1 / 0.8, and 9 of another, which count 1 / 0.6."""
    counts = np.array([[12, 0, 0], [4, 4, 0], [0, 5, 0], [0, 0, 0]])
    own = np.array([1 / 0.8, (1 / 0.8 + 1 / 0.6) / 2, 1 / 0.6])
    np.testing.assert_allclose(balanced_weights(counts), [*own / own.mean(), 1])
    assert balanced_weights(np.zeros((3, 2), int)).tolist() == [1, 1, 1]
    # Patches of one class each, as many nuclei: shares of 0.9 and 0.1 become 0.75 and 0.25, as 3 to 1.
    weights = balanced_weights(np.repeat([[7, 0], [0, 7]], [90, 10], axis=0))
    assert weights[90:].sum() / weights.sum() == pytest.approx(0.25)


def test_items_are_repeated_by_their_weights():
    weights = np.array([1.0, 3, 0.5, 9.5, 1])  # a third, 1, a sixth, 3 and a sixth, and a third of their mean
    times = np.array([np.bincount(repeated(weights, np.random.default_rng(seed)), minlength=5) for seed in range(600)])
    share = weights / weights.mean()
    assert (times.sum(axis=1) == 5).all() and ((np.floor(share) <= times) & (times <= np.ceil(share))).all()
    np.testing.assert_allclose(times.mean(axis=0), share, atol=0.06)
    orders = {tuple(repeated(np.ones(4), np.random.default_rng(seed))) for seed in range(300)}
    assert len(orders) == 24  # all permutations


# ---- images without masks ----


def stained(amounts: np.ndarray) -> np.ndarray:
    """An image of haematoxylin alone, from its amounts in units of optical density, [H x W]."""
    return np.clip(np.rint(256 * 10 ** -(amounts[..., None] * STAINS[0]) - 1), 0, 255).astype(np.uint8)


def test_the_histogram_counts_amounts_of_haematoxylin():
    amounts = np.repeat([0.0, 0.33, 0.83, 9.0], 4).reshape(4, 4)
    counts = haematoxylin_histogram(stained(amounts))
    assert len(counts) == 64 and np.flatnonzero(counts).tolist() == [0, 13, 33, 63] and set(counts[counts > 0]) == {4}


def test_shares_of_nuclei_by_the_threshold_of_their_slide():
    """A pale slide's nuclei are paler than a dark one's background."""
    rng = np.random.default_rng(0)
    histograms, expected = [], []
    for low, high in ((0.1, 0.4), (0.5, 1.1)):
        for share in (0.0, 0.25, 0.5):
            nuclei = np.arange(1024).reshape(32, 32) < share * 1024
            amounts = np.where(nuclei, high, low) + rng.normal(0, 0.02, (32, 32))
            histograms.append(haematoxylin_histogram(stained(amounts)))
            expected.append(share)
    shares = nuclear_shares(np.array(histograms), ["pale"] * 3 + ["dark"] * 3)
    np.testing.assert_allclose(shares, expected, atol=0.01)
    many = np.array(histograms) * 10**7  # as many pixels as slides have, and more
    np.testing.assert_array_equal(nuclear_shares(many, ["pale"] * 3 + ["dark"] * 3), shares)


def test_a_slide_of_one_amount_has_no_nuclei():
    assert nuclear_shares(np.eye(64)[[0, 7]] * 9, ["glass", "pale glass"]).tolist() == [0, 0]
    assert nuclear_shares(np.eye(64)[[3, 7]] * 9, ["both", "both"]).tolist() == [0, 1]


@pytest.mark.parametrize("count", [1, 5, 200])
def test_matched_shares_against_brute_force(count):
    rng = np.random.default_rng(count)
    shares, candidates = rng.random(300).round(2), rng.random(count).round(2)
    chosen = match_shares(shares, candidates, 7)
    np.testing.assert_array_equal(chosen, match_shares(shares, candidates, 7))
    for share, index in zip(shares, chosen):
        distances = np.sort(abs(candidates - share))
        assert abs(candidates[index] - share) <= distances[min(19, count) - 1] + 1e-12
    equal = match_shares(np.zeros(300), np.zeros(count), 7)
    assert len(set(equal.tolist())) > 0.7 * count
    if count == 200:
        assert len(set(chosen.tolist())) > 100 and len({match_shares(shares, candidates, s)[0] for s in range(40)}) > 5
