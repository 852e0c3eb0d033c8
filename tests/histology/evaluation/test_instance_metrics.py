"""Metrics of instance maps against brute force over all matchings and against cases made by hand."""

import itertools
import time

import numpy as np
import pytest

from guided_diffusion.histology.evaluation import instance_metrics
from guided_diffusion.histology.evaluation.instance_metrics import measure, overlap_table

EMPTY = np.zeros((6, 8), np.int32)
EMPTY_12 = np.zeros((12, 12), np.int32)
GRID = np.kron(np.arange(1, 7).reshape(2, 3), np.pad(np.ones((3, 3), np.int32), ((0, 3), (0, 1))))
COUNTS = ("true_nuclei", "found_nuclei")


def square(row, column, side, inst_id=1, shape=(12, 12)):
    inst_map = np.zeros(shape, np.int32)
    inst_map[row : row + side, column : column + side] = inst_id
    return inst_map


def random_map(rng, count=5, size=14):
    inst_map = np.zeros((size, size), np.int64)
    for inst_id in rng.choice(10**6, count, replace=False) + 1:
        row, column = rng.integers(0, size - 1, 2)
        height, width = rng.integers(1, 7, 2)
        inst_map[row : row + height, column : column + width] = inst_id
    return inst_map


def masks_of(inst_map):
    return [inst_map == inst_id for inst_id in np.unique(inst_map) if inst_id]


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def brute_force_matches(truth, found, threshold):
    """Over all one-to-one choices: the largest number of pairs, and the largest total IoU of that many."""
    allowed = [(i, j, v) for i, a in enumerate(truth) for j, b in enumerate(found) if (v := iou(a, b)) >= threshold]
    for count in range(min(len(truth), len(found)), 0, -1):
        totals = [
            sum(v for *_, v in pairs)
            for pairs in itertools.combinations(allowed, count)
            if len({i for i, *_ in pairs}) == len({j for _, j, _ in pairs}) == count
        ]
        if totals:
            return count, max(totals)
    return 0, 0.0


def brute_force_aji(truth, found):
    intersection = union = 0
    taken = set()
    for a in truth:
        values = [iou(a, b) for b in found]
        if not values or max(values) == 0:
            union += a.sum()
            continue
        j = int(np.argmax(values))
        taken.add(j)
        intersection += (a & found[j]).sum()
        union += (a | found[j]).sum()
    union += sum(b.sum() for j, b in enumerate(found) if j not in taken)
    return intersection / union


def brute_force_aji_plus(truth, found):
    """The one-to-one choice of largest total IoU, by going through all of them."""
    few, many = sorted((truth, found), key=len)
    pairs = max(
        (list(zip(few, order)) for order in itertools.permutations(many, len(few))),
        key=lambda pairs: sum(iou(a, b) for a, b in pairs),
    )
    intersection = sum((a & b).sum() for a, b in pairs)
    return intersection / (sum(mask.sum() for mask in (*truth, *found)) - intersection)


@pytest.mark.parametrize("seed", range(25))
def test_agrees_with_brute_force(seed):
    rng = np.random.default_rng(seed)
    truth, found = random_map(rng), random_map(rng)
    if seed % 2:
        found = np.where(rng.random(truth.shape) < 0.25, 0, truth)
    table, true_masks, found_masks = overlap_table(truth, found), masks_of(truth), masks_of(found)
    figures = measure(truth, found)
    total = len(true_masks) + len(found_masks)
    for threshold in instance_metrics.THRESHOLDS:
        count, best = brute_force_matches(true_masks, found_masks, threshold)
        chosen = instance_metrics.matches(table, threshold)
        assert len(chosen) == count == len(set(table.truth[chosen])) == len(set(table.found[chosen]))
        assert table.iou[chosen].sum() == pytest.approx(best)
        assert figures[f"f1@{threshold}"] == 2 * count / total
    count, best = brute_force_matches(true_masks, found_masks, 0.5)
    assert figures["dq"] == figures["f1@0.5"]
    assert figures["sq"] == pytest.approx(best / count if count else 0)
    assert figures["pq"] == pytest.approx(2 * best / total)
    assert figures["aji"] == pytest.approx(brute_force_aji(true_masks, found_masks))
    assert figures["aji+"] == pytest.approx(brute_force_aji_plus(true_masks, found_masks))
    assert figures["dice"] == pytest.approx(
        2 * ((truth > 0) & (found > 0)).sum() / ((truth > 0).sum() + (found > 0).sum())
    )


def test_equal_maps_are_perfect_whatever_the_ids():
    truth = random_map(np.random.default_rng(0))
    other = np.where(truth > 0, 2 * 10**6 - truth, 0).astype(np.uint32)
    figures = measure(truth, other)
    assert figures.pop("true_nuclei") == figures.pop("found_nuclei") == len(masks_of(truth))
    assert set(figures.values()) == {1.0}


def test_empty_maps():
    both = measure(EMPTY, EMPTY)
    assert {both[name] for name in both if name not in COUNTS} == {1.0}
    for truth, found in ((EMPTY, EMPTY + 3), (EMPTY + 3, EMPTY)):
        one = measure(truth, found)
        assert {one[name] for name in one if name not in COUNTS} == {0.0}
    assert measure(np.ones((3, 3), np.int32), np.full((3, 3), 7))["aji"] == 1  # a map without background


def test_a_split_nucleus():
    truth = square(2, 2, 4)
    found = truth.copy()
    found[2:6, 4:6] = 2  # two halves, IoU 0.5 each, of which one is matched: exactly at the threshold is enough
    figures = measure(truth, found)
    assert (figures["f1@0.5"], figures["f1@0.6"], figures["pq"], figures["sq"]) == (2 / 3, 0, 1 / 3, 0.5)
    assert figures["aji"] == figures["aji+"] == 8 / (16 + 8) and figures["dice"] == 1


def test_two_merged_nuclei():
    truth = square(2, 2, 4)
    truth[2:6, 6:9] = 2
    found = (truth > 0).astype(np.int32)
    figures = measure(truth, found)  # IoU 16/28 and 12/28
    assert (figures["f1@0.4"], figures["f1@0.5"], figures["f1@0.6"]) == (2 / 3, 2 / 3, 0)
    assert (figures["dq"], figures["sq"]) == (2 / 3, 16 / 28)
    assert figures["aji"] == (16 + 12) / (28 + 28)  # the merged one is taken twice
    assert figures["aji+"] == 16 / (28 + 12)


def test_touching_nuclei_are_not_one():
    truth = square(2, 2, 4) + square(2, 6, 4, 5)
    assert measure(truth, truth)["f1@0.9"] == 1
    assert measure(truth, truth)["true_nuclei"] == 2


def test_a_nucleus_of_one_pixel():
    truth = square(3, 3, 1)
    assert measure(truth, truth)["f1@0.9"] == 1
    assert measure(truth, square(3, 4, 1))["aji"] == 0
    assert measure(truth, square(3, 3, 2))["f1@0.2"] == 1 and measure(truth, square(3, 3, 2))["f1@0.3"] == 0


def test_below_a_half_the_choice_is_the_best_of_all():
    """Greedy by IoU would match B with its best and leave C alone; two matches are possible."""
    truth, found = np.zeros((1, 20), np.int32), np.zeros((1, 20), np.int32)
    truth[0, 0:8], truth[0, 8:14] = 1, 2
    found[0, 3:11], found[0, 0:3] = 1, 2  # IoU: t1-f1 5/11, t2-f1 3/11, t1-f2 3/8
    assert measure(truth, found)["f1@0.2"] == 1
    assert measure(truth, found)["f1@0.3"] == 0.5


@pytest.mark.parametrize(
    ("truth", "found", "what"),
    [
        (EMPTY, EMPTY.T, "differ in size"),
        (EMPTY, EMPTY.astype(float), "must be integers"),
        (EMPTY - 1, EMPTY, "must not be negative"),
    ],
)
def test_maps_that_are_none_are_refused(truth, found, what):
    with pytest.raises(ValueError, match=what):
        overlap_table(truth, found)


def test_six_hundred_nuclei_take_well_under_a_second():
    rows, columns = np.mgrid[:1000, :1000]
    truth = (rows // 40 * 25 + columns // 40 + 1) * ((rows % 40 < 25) & (columns % 40 < 25))
    found = np.roll(truth, (2, 3), (0, 1))
    started = time.process_time()
    figures = measure(truth, found)
    assert time.process_time() - started < 0.9
    assert figures["true_nuclei"] == 625
    assert figures["sq"] == pytest.approx(23 * 22 / (2 * 625 - 23 * 22), rel=0.01)


def test_a_slides_images_are_pooled_and_slides_are_drawn():
    """A patch of one nucleus, missed, beside one of six, found, is a slide of six in seven: not of a half."""
    pairs = {
        "A": [(square(0, 0, 3), EMPTY_12), (GRID, GRID)],
        "B": [(GRID, np.where(GRID < 4, GRID, 0))],
        "C": [(GRID, np.roll(GRID, 1, axis=1)), (EMPTY_12, EMPTY_12)],
    }
    tallies = [instance_metrics.tally(*pair) for images in pairs.values() for pair in images]
    average = instance_metrics.summarise(tallies, list("AABCC"), seed=3)
    assert average == instance_metrics.summarise(tallies[::-1], list("CCBAA"), seed=3)
    slides = [2 * 6 / 13, 2 * 3 / 9, 2 * 6 / 12]  # the shifted squares have an IoU of a half
    assert average["f1@0.5"]["mean"] == pytest.approx(np.mean(slides))
    assert average["aji"]["mean"] == pytest.approx(np.mean([54 / 63, 27 / 54, 36 / 72]))
    assert average["true_nuclei"]["mean"] == pytest.approx(19 / 3)
    # All 27 draws of three slides with replacement.
    means = [np.mean(draw) for draw in itertools.product(slides, repeat=3)]
    for bound, quantile in (("low", 0.025), ("high", 0.975)):
        expected = np.quantile(means, quantile, method="inverted_cdf")
        assert average["f1@0.5"][bound] == pytest.approx(expected, abs=0.02)


def test_one_slide_has_no_interval():
    average = instance_metrics.summarise([instance_metrics.tally(GRID, GRID)] * 2, ["A", "A"])["aji"]
    assert average == {"mean": 1.0, "low": None, "high": None}


def test_every_image_has_a_slide():
    with pytest.raises(ValueError, match="0 images"):
        instance_metrics.summarise([], [])
    with pytest.raises(ValueError, match="2 slides"):
        instance_metrics.summarise([instance_metrics.tally(GRID, GRID)], ["A", "B"])
