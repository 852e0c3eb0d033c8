"""
How well one instance map of nuclei agrees with another: F1 over IoU thresholds, AJI, AJI+, panoptic quality, Dice.

All but Dice come from one overlap table. Owns the definitions, their conventions for empty maps, how images of a slide
are pooled, and averages with intervals. Knows nothing of images, files or segmenters. Ids are any non-negative
integers, 0 = background; each id is one nucleus, also if its pixels do not touch.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from ... import streams

THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(1, 10))
HALF = THRESHOLDS.index(0.5)
RESAMPLES = 2000  # of the bootstrap
T = TypeVar("T")  # Tally, or class_metrics' of the same methods


class Overlaps(NamedTuple):
    """
    The pairs of nuclei that share a pixel, and all areas.

    :param truth: an [P] int64 array, the pair's truth nucleus as an index into `truth_area`.
    :param found: an [P] int64 array, its predicted nucleus as an index into `found_area`.
    :param shared: an [P] int64 array of pixels that both have.
    :param truth_area: an [N] int64 array of px.
    :param found_area: an [M] int64 array of px.
    """

    truth: np.ndarray
    found: np.ndarray
    shared: np.ndarray
    truth_area: np.ndarray
    found_area: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each pair, an [P] float64 array in (0, 1]."""
        return self.shared / (self.truth_area[self.truth] + self.found_area[self.found] - self.shared)


def overlap_table(truth: np.ndarray, found: np.ndarray) -> Overlaps:
    """
    :param truth: an [H x W] array of ids.
    :param found: an [H x W] array of ids.
    :raises ValueError: if shapes differ, or ids are negative or not integers.
    """
    if truth.ndim != 2 or truth.shape != found.shape:
        raise ValueError(f"instance maps differ in size: {truth.shape} and {found.shape}")
    (truth_index, truth_area), (found_index, found_area) = _indexed(truth), _indexed(found)
    both = (truth_index > 0) & (found_index > 0)
    pair = (truth_index[both] - 1) * max(len(found_area), 1) + found_index[both] - 1
    pair, shared = np.unique(pair, return_counts=True)
    rows, columns = np.divmod(pair, max(len(found_area), 1))
    return Overlaps(rows, columns, shared, truth_area, found_area)


class Tally(NamedTuple):
    """
    What figures are made of, counted in one image or, added up, in several.

    :param true_nuclei: in the truth; found_nuclei: predicted.
    :param matched: [9] int64, the pairs matched at each of THRESHOLDS.
    :param matched_iou: the sum of the IoU of those matched at 0.5.
    :param aji: [2] int64, the pixels of AJI's numerator and denominator; aji_plus and dice: the same of theirs.
    """

    true_nuclei: int
    found_nuclei: int
    matched: np.ndarray
    matched_iou: float
    aji: np.ndarray
    aji_plus: np.ndarray
    dice: np.ndarray

    def figures(self) -> dict[str, float]:
        """
        :return: f1@0.1 ... f1@0.9, aji, aji+, pq, dq, sq and dice in [0, 1]; true_nuclei and found_nuclei, counts.
            Where both sides are empty all ratios are 1, where one is they are 0.
        """
        nuclei = self.true_nuclei + self.found_nuclei
        f1 = [_ratio(2 * count, nuclei) for count in self.matched]
        sq = self.matched_iou / self.matched[HALF] if self.matched[HALF] else float(nuclei == 0)
        return {
            **{f"f1@{threshold}": value for threshold, value in zip(THRESHOLDS, f1)},
            "aji": _ratio(*self.aji),
            "aji+": _ratio(*self.aji_plus),
            "pq": f1[HALF] * sq,
            "dq": f1[HALF],
            "sq": sq,
            "dice": _ratio(*self.dice),
            "true_nuclei": float(self.true_nuclei),
            "found_nuclei": float(self.found_nuclei),
        }

    @staticmethod
    def pooled(tallies: Sequence["Tally"]) -> "Tally":
        """See pooled."""
        return Tally(*map(sum, zip(*tallies)))


def _ratio(part: int, whole: int) -> float:
    return int(part) / int(whole) if whole else 1.0


def tally(truth: np.ndarray, found: np.ndarray) -> Tally:
    """
    Count what one image adds to each figure.

    F1, and panoptic quality (Kirillov et al., CVPR 2019: DQ is the F1 at 0.5, SQ the mean IoU of its matches, PQ their
    product), match pairs whose IoU is at least the threshold, as StarDist does; Kirillov's has "above 0.5", which
    differs where an IoU is a half to the digit.

    :param truth: an [H x W] array of ids; found: another.
    """
    table = overlap_table(truth, found)
    chosen = [matches(table, threshold) for threshold in THRESHOLDS]
    both, either = np.count_nonzero((truth > 0) & (found > 0)), np.count_nonzero(truth) + np.count_nonzero(found)
    return Tally(
        true_nuclei=len(table.truth_area),
        found_nuclei=len(table.found_area),
        matched=np.array([len(pairs) for pairs in chosen]),
        matched_iou=float(table.iou[chosen[HALF]].sum()),
        aji=_aji(table),
        aji_plus=_aji_plus(table),
        dice=np.array([2 * both, either]),
    )


def measure(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """:return: the figures of one image: those of its tally."""
    return tally(truth, found).figures()


def pooled(tallies: Sequence[T]) -> T:
    """:return: what several images count together. :param tallies: at least one."""
    return tallies[0].pooled(tallies)


def by_slide(tallies: Sequence[T], slides: Sequence[str]) -> dict[str, T]:
    """:return: slide -> what its images count together, sorted by slide. :param slides: the slide of each image."""
    members = defaultdict(list)
    for own, slide in zip(tallies, slides):
        members[slide].append(own)
    return {slide: pooled(members[slide]) for slide in sorted(members)}


def summarise(tallies: Sequence[T], slides: Sequence[str], seed: int = 0) -> dict[str, dict[str, float | None]]:
    """
    Average the slides' figures, with a bootstrap interval over slides.

    The images of a slide are pooled: patches of few nuclei, which score 0 or 1, weigh no more than their nuclei do.
    Slides are drawn with replacement; the interval runs between the quantiles .025 and .975 of RESAMPLES means.

    :param tallies: from `tally` or class_metrics.tally, one an image.
    :param slides: the slide of each.
    :param seed: of the draws.
    :return: metric -> {mean, low, high}; low and high are None where there is one slide, which says nothing of others.
        A figure that is None of a slide is averaged over the other slides.
    """
    if not tallies or len(tallies) != len(slides):
        raise ValueError(
            f"{len(tallies)} images and {len(slides)} slides: give the slide of each of at least one image"
        )
    rows = [own.figures() for own in by_slide(tallies, slides).values()]
    values = np.array([[np.nan if value is None else value for value in row.values()] for row in rows])
    known = ~np.isnan(values)
    drawn = streams.rng("bootstrap", seed).integers(0, len(rows), (RESAMPLES, len(rows)))
    with np.errstate(invalid="ignore"):  # 0 / 0 where a draw, or every slide, says nothing
        means, drawn_means = (
            np.where(known, values, 0)[which].sum(-2) / known[which].sum(-2) for which in (..., drawn)
        )
    summary = {}
    for k, name in enumerate(rows[0]):
        low = high = None
        if known[:, k].sum() > 1:
            low, high = np.nanquantile(drawn_means[:, k], (0.025, 0.975)).tolist()
        summary[name] = dict(mean=float(means[k]) if known[:, k].any() else None, low=low, high=high)
    return summary


def matches(table: Overlaps, threshold: float) -> np.ndarray:
    """
    Match nuclei one to one where their IoU is at least a threshold.

    Where a nucleus could be matched with several, the pairs are chosen so that there are as many as possible, and of
    those choices the one of largest total IoU (StarDist's: Schmidt et al., MICCAI 2018).

    :param threshold: in (0, 1].
    :return: an int64 array of indices into the table's pairs.
    """
    iou = table.iou
    fewer = max(1, min(len(table.truth_area), len(table.found_area)))
    # One more match outweighs any IoU.
    return _one_to_one(table, np.flatnonzero(iou >= threshold), 1 + iou / (2 * fewer))


def _aji(table: Overlaps) -> np.ndarray:
    """
    Numerator and denominator of AJI (Kumar et al., IEEE TMI 2017), px.

    Each true nucleus takes the predicted one of largest IoU (the first of equals), which may be taken several times;
    intersections over unions, to which the predicted nuclei that nobody took are added.
    """
    # Sorted by truth, then by falling IoU, then by found: the first row of each truth is its choice.
    order = np.lexsort((table.found, -table.iou, table.truth))
    _, first = np.unique(table.truth[order], return_index=True)
    return _intersection_and_union(table, order[first])


def _aji_plus(table: Overlaps) -> np.ndarray:
    """
    The same of AJI+ (Graham et al., Medical Image Analysis 2019): nuclei are paired one to one, with the largest total
    IoU, so that a predicted one that covers two is not taken twice.
    """
    return _intersection_and_union(table, _one_to_one(table, np.arange(len(table.shared)), table.iou))


def _intersection_and_union(table: Overlaps, pairs: np.ndarray) -> np.ndarray:
    """Of the pairs, and all that is in none of them added to the union; each true nucleus is in one pair at most."""
    shared = table.shared[pairs].sum()
    left = np.ones(len(table.found_area), bool)
    left[table.found[pairs]] = False
    union = table.truth_area.sum() + table.found_area[table.found[pairs]].sum() - shared + table.found_area[left].sum()
    return np.array([shared, union])


def _indexed(inst_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The map with ids 1 ... N in order, and the N areas."""
    if inst_map.dtype.kind not in "bui":
        raise ValueError(f"instance map: ids must be integers, got {inst_map.dtype}")
    if inst_map.size and inst_map.min() < 0:
        raise ValueError(f"instance map: ids must not be negative, got {inst_map.min()}")
    ids, index, area = np.unique(inst_map, return_inverse=True, return_counts=True)
    index = index.reshape(inst_map.shape)
    if len(ids) and ids[0] == 0:
        return index, area[1:]
    return index + 1, area


def _one_to_one(table: Overlaps, kept: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Choose among the kept pairs so that no nucleus comes twice and the sum of the values is largest."""
    ends = table.truth[kept], table.found[kept]
    if all(len(np.unique(end)) == len(kept) for end in ends):
        return kept
    chosen = [_assigned(table, part, value) for part in _parts(table, kept)]
    return np.sort(np.concatenate(chosen))


def _parts(table: Overlaps, kept: np.ndarray) -> list[np.ndarray]:
    """Split pairs into groups that share no nucleus: small assignments in place of one large."""
    true = len(table.truth_area)
    ends = table.truth[kept], table.found[kept] + true
    graph = sparse.coo_matrix((np.ones(len(kept)), ends), shape=(true + len(table.found_area),) * 2)
    component = sparse.csgraph.connected_components(graph, directed=False)[1][ends[0]]
    order = np.argsort(component, kind="stable")
    return np.split(kept[order], np.flatnonzero(np.diff(component[order])) + 1)


def _assigned(table: Overlaps, pairs: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The best one-to-one choice among some pairs."""
    if len(pairs) == 1:
        return pairs
    truth, rows = np.unique(table.truth[pairs], return_inverse=True)
    found, columns = np.unique(table.found[pairs], return_inverse=True)
    worth = np.zeros((len(truth), len(found)))
    worth[rows, columns] = value[pairs]
    index = np.full(worth.shape, -1)
    index[rows, columns] = pairs
    taken = index[linear_sum_assignment(worth, maximize=True)]
    return taken[taken >= 0]
