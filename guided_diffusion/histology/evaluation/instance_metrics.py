"""
How well one instance map of nuclei agrees with another: F1 over IoU thresholds, AJI, panoptic quality, Dice.

All but Dice come from one overlap table. Owns the definitions, their conventions for empty maps, and averages with
intervals. Knows nothing of images, files or segmenters. Ids are any non-negative integers, 0 = background; each id is
one nucleus, also if its pixels do not touch.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment

THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(1, 10))
RESAMPLES = 2000  # of the bootstrap


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


def matches(table: Overlaps, threshold: float) -> np.ndarray:
    """
    Match nuclei one to one where their IoU is above a threshold.

    From 0.5 on, at most one match is possible for each nucleus. Below, the pairs are chosen so that there are as many
    as possible, and of those choices the one of largest total IoU (StarDist's: Schmidt et al., MICCAI 2018).

    :param threshold: in [0, 1).
    :return: an int64 array of indices into the table's pairs.
    """
    iou = table.iou
    kept = np.flatnonzero(iou > threshold)
    if threshold >= 0.5 or not len(kept):
        return kept
    shape = len(table.truth_area), len(table.found_area)
    chosen = [_assigned(table, part, iou) for part in _parts(table, kept, shape)]
    return np.sort(np.concatenate(chosen))


def instance_f1(table: Overlaps, threshold: float) -> float:
    """2 TP / (number of true + number of predicted nuclei), in [0, 1]; 1 if both maps are empty, 0 if one is."""
    total = len(table.truth_area) + len(table.found_area)
    return 2 * len(matches(table, threshold)) / total if total else 1.0


def aggregated_jaccard_index(table: Overlaps) -> float:
    """
    AJI (Kumar et al., IEEE TMI 2017), in [0, 1]; 1 if both maps are empty, 0 if one is.

    Each true nucleus takes the predicted one of largest IoU (the first of equals), which may be taken several times;
    intersections over unions, to which the predicted nuclei that nobody took are added.
    """
    union = table.truth_area.astype(np.int64).copy()
    # Sorted by truth, then by falling IoU, then by found: the first row of each truth is its choice.
    order = np.lexsort((table.found, -table.iou, table.truth))
    _, first = np.unique(table.truth[order], return_index=True)
    best = order[first]
    union[table.truth[best]] += table.found_area[table.found[best]] - table.shared[best]
    taken = np.zeros(len(table.found_area), bool)
    taken[table.found[best]] = True
    total = int(union.sum() + table.found_area[~taken].sum())
    return float(table.shared[best].sum() / total) if total else 1.0


def panoptic_quality(table: Overlaps) -> tuple[float, float, float]:
    """
    PQ, DQ and SQ at IoU > 0.5 (Kirillov et al., CVPR 2019), each in [0, 1].

    DQ is the F1 at 0.5, SQ the mean IoU of the matches, PQ their product. Both maps empty: all 1. No match: all 0.
    """
    detection = instance_f1(table, 0.5)
    kept = matches(table, 0.5)
    quality = float(table.iou[kept].mean()) if len(kept) else float(detection == 1)
    return detection * quality, detection, quality


def dice(truth: np.ndarray, found: np.ndarray) -> float:
    """Dice of nucleus against background, in [0, 1]; 1 if both maps are empty, 0 if one is."""
    truth, found = truth > 0, found > 0
    total = np.count_nonzero(truth) + np.count_nonzero(found)
    return 2 * int(np.count_nonzero(truth & found)) / int(total) if total else 1.0


def measure(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """
    All metrics of one image.

    :return: f1@0.1 ... f1@0.9, aji, pq, dq, sq and dice in [0, 1]; true_nuclei and found_nuclei, counts.
    """
    table = overlap_table(truth, found)
    pq, dq, sq = panoptic_quality(table)
    return {
        **{f"f1@{threshold}": instance_f1(table, threshold) for threshold in THRESHOLDS},
        "aji": aggregated_jaccard_index(table),
        "pq": pq,
        "dq": dq,
        "sq": sq,
        "dice": dice(truth, found),
        "true_nuclei": float(len(table.truth_area)),
        "found_nuclei": float(len(table.found_area)),
    }


def summarise(
    rows: Sequence[dict[str, float]], slides: Sequence[str], seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """
    Average the images' metrics, with a bootstrap interval over slides.

    Images of one slide are alike, so whole slides are drawn with replacement and the mean is taken over all images
    of those drawn; the interval runs between the quantiles .025 and .975 of RESAMPLES means.

    :param rows: from `measure`, one an image.
    :param slides: the slide of each.
    :param seed: of the draws.
    :return: metric -> {mean, low, high}; low and high are None where there is one slide, which says nothing of others.
    """
    if not rows or len(rows) != len(slides):
        raise ValueError(f"{len(rows)} images and {len(slides)} slides: give the slide of each of at least one image")
    members = defaultdict(list)
    for number, slide in enumerate(slides):
        members[slide].append(number)
    groups = [members[slide] for slide in sorted(members)]
    names = list(rows[0])
    values = np.array([[row[name] for name in names] for row in rows])
    sums = np.array([values[group].sum(axis=0) for group in groups])
    sizes = np.array([len(group) for group in groups])
    mean = values.mean(axis=0)
    if len(groups) < 2:
        return {name: dict(mean=float(mean[k]), low=None, high=None) for k, name in enumerate(names)}
    drawn = np.random.default_rng(seed).integers(0, len(groups), (RESAMPLES, len(groups)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)[:, None]
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return {name: dict(mean=float(mean[k]), low=float(low[k]), high=float(high[k])) for k, name in enumerate(names)}


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


def _parts(table: Overlaps, kept: np.ndarray, shape: tuple[int, int]) -> list[np.ndarray]:
    """Split pairs into groups that share no nucleus: small assignments in place of one large."""
    count = shape[0] + shape[1]
    ends = table.truth[kept], table.found[kept] + shape[0]
    graph = sparse.coo_matrix((np.ones(len(kept)), ends), shape=(count, count))
    component = sparse.csgraph.connected_components(graph, directed=False)[1][ends[0]]
    order = np.argsort(component, kind="stable")
    return np.split(kept[order], np.flatnonzero(np.diff(component[order])) + 1)


def _assigned(table: Overlaps, pairs: np.ndarray, iou: np.ndarray) -> np.ndarray:
    """The best one-to-one choice among some pairs."""
    if len(pairs) == 1:
        return pairs
    truth, rows = np.unique(table.truth[pairs], return_inverse=True)
    found, columns = np.unique(table.found[pairs], return_inverse=True)
    value = np.zeros((len(truth), len(found)))
    value[rows, columns] = 1 + iou[pairs] / (2 * min(value.shape))  # one more match outweighs any IoU
    index = np.full(value.shape, -1)
    index[rows, columns] = pairs
    taken = index[linear_sum_assignment(value, maximize=True)]
    return taken[taken >= 0]
