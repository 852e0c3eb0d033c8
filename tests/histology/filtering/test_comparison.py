"""What samples are compared with, by hand; perfect samples and planted failures; the rules of keeping."""

import numpy as np
import pytest
import torch as th
from sklearn.metrics import roc_auc_score

from guided_diffusion.histology.features.backbones import load_backbone
from guided_diffusion.histology.filtering import comparison, patchcore
from guided_diffusion.histology.slides.annotations import find_slides, read_slide
from guided_diffusion.histology.slides.patches import extract_patches
from scripts.benchmarks import measure_filter


def test_folds_are_equal_shares_of_the_slides():
    def folds(count, share, seed=0):
        return comparison.deal_folds([f"s{k}" for k in range(count)], share, seed)

    assert np.bincount(folds(30, 0.1)).tolist() == [3] * 10 and np.array_equal(folds(30, 0.1), folds(30, 0.1))
    assert not np.array_equal(folds(30, 0.1), folds(30, 0.1, seed=1))
    # Three at least: a sample of two folds is to have one left.
    assert [folds(*case).max() + 1 for case in ((30, 0.2), (30, 0.9), (4, 0.1), (2, 0.1))] == [5, 3, 4, 2]


def test_what_a_sample_is_scored_without():
    names = [("a", "b"), ("d", "a"), ("b", "b"), ("x", "c"), ("c", "x"), ("a", "c"), ("x", "y"), ("y", "x"), ("x", "x")]
    origins = comparison.Origins.of(names, ["a", "b", "c", "d"], np.array([0, 1, 2, 0]))
    assert origins.slides.tolist() == [
        *([0, 1], [0, 3], [-1, 1], [-1, 2], [-1, 2], [0, 2]),
        *([-1, -1], [-1, -1], [-1, -1]),
    ]
    left = origins.groups[origins.group].tolist()
    assert left[:6] == [[0, 1], [-1, 0], [-1, 1], [-1, 2], [-1, 2], [0, 2]]
    assert left[6:] == [[-1, 0], [-1, 1], [-1, 2]]  # of unknown slides, dealt in turn
    assert origins.unknown.tolist() == [False] * 6 + [True] * 3


def features(slides, seed, spread=1.0):
    """Patches of 4 places, each slide at a place of its own, some slides far from the rest."""
    rng = np.random.default_rng(seed)
    centre = np.random.default_rng(0).normal(0, 1, (20, 1, 5)) * np.linspace(0.5, 4, 20)[:, None, None]
    return th.from_numpy((centre[slides] + rng.normal(0, spread, (len(slides), 4, 5))).astype(np.float32))


@pytest.mark.parametrize("reweight", [False, True])
def test_samples_stand_beside_real_patches_of_their_slides_scored_alike(reweight):
    slides, folds = np.repeat(np.arange(5), 4), np.array([0, 1, 2, 0, 1])
    real = features(slides, 1)
    memory = patchcore.Memory.fit(real, folds[slides])
    names = [(0, 2), (3, 3), (2, 0), (9, 9), (0, 0), (0, 3)]
    origins = comparison.Origins.of(names, range(5), folds)
    samples = features(np.array([2, 3, 0, 4, 0, 3]), 2)
    rows = np.array([4, 0, 5, 1, 3, 2])
    scores = np.empty(6)
    scores[rows] = comparison.score(memory, origins, rows, samples[th.from_numpy(rows)], reweight)
    compared = comparison.compare(memory, scores, origins, real, slides, folds, reweight)
    # What each is scored without, by folds, and whose patches it is compared with; the fourth is dealt the last fold.
    expected = [((0, 2), (0, 2)), ((0,), (3,)), ((0, 2), (0, 2)), ((0,), (0, 3)), ((0,), (0,)), ((0,), (0, 3))]
    for sample, (left_out, own) in enumerate(expected):
        core = memory.without(left_out)
        beside = core.score(real[th.from_numpy(np.isin(slides, own))], reweight).numpy()
        assert scores[sample] == pytest.approx(float(core.score(samples[sample : sample + 1], reweight)), rel=1e-5)
        assert np.allclose(compared.real[compared.kind[sample]], beside, rtol=1e-5)
        assert compared.ranks[sample] == pytest.approx((beside < scores[sample]).mean())
    assert compared.auroc() == pytest.approx(compared.ranks.mean())
    assert compared.auroc(np.arange(6) > 3) == pytest.approx(compared.ranks[4:].mean())
    pooled, weights = compared.pooled
    assert sorted(weights) == pytest.approx([1 / 48] * 16 + [1 / 24] * 16)  # a sixth for each sample
    below = weights[pooled <= compared.quantile(0.7)].sum()
    assert below + 1e-9 >= 0.7 and below - weights.max() < 0.7


def test_ranks_count_pairs():
    rng = np.random.default_rng(0)
    real, scores = rng.integers(0, 9, 40), rng.integers(2, 12, 30)
    compared = comparison.Comparison(scores, np.zeros(30, np.int64), [real])
    assert compared.auroc() == pytest.approx(roc_auc_score([0] * 40 + [1] * 30, [*real, *scores]))


@pytest.mark.parametrize("count", [3, 6, 15, 20])
def test_perfect_samples_cannot_be_told_apart_however_few_and_unlike_the_slides(count):
    """A whitening that saw their slides' real patches would tell them, and so would slides that are unlike the rest."""
    found, kept = [], []
    for choice in range(5):
        chosen = np.random.default_rng((count, choice)).permutation(20)[:count]
        slides = np.repeat(np.arange(count), 24)
        folds = comparison.deal_folds([str(slide) for slide in range(count)], comparison.SHARE, choice)
        real, samples = features(chosen[slides], choice), features(chosen[slides], 100 + choice)
        memory = patchcore.Memory.fit(real, folds[slides])
        structures = (slides + 1 + choice % (count - 1)) % count if choice % 2 else slides
        origins = comparison.Origins.of(list(zip(structures, slides)), range(count), folds)
        scores = comparison.score(memory, origins, np.arange(len(slides)), samples)
        compared = comparison.compare(memory, scores, origins, real, slides, folds)
        found.append(compared.auroc())
        kept.append((scores <= compared.quantile(0.95)).mean())
    assert abs(np.mean(found) - 0.5) < 0.05 and abs(np.mean(kept) - 0.95) < 0.03, (found, kept)


@pytest.mark.slow
def test_perfect_samples_and_planted_failures_of_real_patches(monuseg):
    slides = [slide for slide in find_slides(monuseg) if slide.split == "MoNuSegTrainingData"][::3]
    backbone = load_backbone("efficientnet_lite0", th.device("cpu"))
    patches = [list(extract_patches(*read_slide(slide), 128, 128)) for slide in slides]
    numbers = np.repeat(np.arange(len(slides)), 24)
    images, samples = ([image for own in patches for image, _ in own[first:48:2]] for first in (0, 1))

    def local(images):
        maps = [backbone.maps(np.stack(images[i : i + 32])) for i in range(0, len(images), 32)]
        return patchcore.local_features([th.cat(part) for part in zip(*maps)])[0]

    real, folds = local(images), comparison.deal_folds([slide.stem for slide in slides], comparison.SHARE, 0)
    memory = patchcore.Memory.fit(real, folds[numbers])
    rows = np.arange(0, len(samples), 3)
    origins = comparison.Origins.of([(number, number) for number in numbers[rows]], range(len(slides)), folds)

    def auroc(images):
        scores = comparison.score(memory, origins, np.arange(len(rows)), local(images))
        return comparison.compare(memory, scores, origins, real, numbers, folds).auroc()

    assert abs(auroc([samples[i] for i in rows]) - 0.5) < 0.1
    rng = np.random.default_rng(0)
    for name in ("blur", "hue", "noise", "checkerboard"):
        assert auroc([measure_filter.PLANTS[name](samples[i], rng) for i in rows]) >= 0.95, name


# ---- what to keep ----


def test_weights_by_hand():
    assert comparison.weights(np.array([1.0, 2.0, 3.0]), 1.0).tolist() == [2 / 3, 1 / 3, 0]
    assert comparison.weights(np.array([0.0, 1.0, 2.0, 3.0, 90.0]), 0.5).tolist() == pytest.approx(
        [2 / 3, 1 / 3, 0, 0, 0]
    )
    assert comparison.weights(np.full(4, 7.0), 0.5).tolist() == [0.25] * 4


def test_modes():
    scores = np.array([3.0, 1.0, 2.0, 1.0])
    weight = comparison.weights(scores, 1.0)
    assert comparison.keep("threshold", scores, weight, 2.0, None).tolist() == [False, True, True, True]
    assert comparison.keep("weights", scores, weight, 0.0, None).tolist() == [False, True, True, True]
    assert comparison.keep("top_n", scores, weight, 0.0, 1).tolist() == [False, True, False, False]
