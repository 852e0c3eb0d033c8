"""
Which images stand beside which structures: shape properties, stain descriptors, matching, shuffling, subsampling.

Owns the choice of indices. Knows nothing of files, ranks or batches: it sees arrays of one value or one vector per
image and answers with indices. Randomness comes from seeds in the arguments; NumPy's global generator is never touched.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial.distance import cdist

from . import streams
from .stains import OD_QUANTILES, haematoxylin, optical_density

NEAREST = 19  # the candidates of a match; the reference ranks 20 and takes the query itself out
CAP_QUANTILE = 0.85  # differences above this quantile count as equally large
LEGACY_SEED = 42  # of the reference's shuffles and subsamples

_MAX_COUNTED_ID = 1 << 20  # above it, counting by sorting takes less memory than a table of all ids
_CHUNK_ELEMENTS = 1 << 21  # of one [rows x N] block of distances: 16 MiB of float64


def area_properties(inst: np.ndarray) -> tuple[int, float]:
    """
    Measure the areas of a mask's nuclei, by id as stored.

    :param inst: an [H x W] integer array of ids, 0 = background.
    :return: (total area, median area) in pixels; (0, 0.0) for an empty mask.
    :raises ValueError: if ids are not integers or are negative.
    """
    areas = _areas(inst)
    return (int(areas.sum()), float(np.median(areas))) if len(areas) else (0, 0.0)


def shape_properties(inst: np.ndarray) -> tuple[float, int, float]:
    """
    Measure solidity and areas of a mask's nuclei, by id as stored.

    Solidity is area / area of the convex hull: the hull of the mid-points of all pixel edges, its area the number of
    pixel centres inside or on it.

    :param inst: an [H x W] integer array of ids, 0 = background.
    :return: (area-weighted mean solidity, total area, median area); (1.0, 0, 0.0) for an empty mask.
    :raises ValueError: if ids are not integers or are negative.
    """
    total_area, med_area = area_properties(inst)
    if not total_area:
        return 1.0, 0, 0.0
    rows, columns = np.nonzero(inst)
    by_id = np.argsort(inst[rows, columns], kind="stable")
    rows, columns = rows[by_id], columns[by_id]
    borders = np.flatnonzero(np.diff(inst[rows, columns])) + 1
    nuclei = zip(np.split(rows, borders), np.split(columns, borders))
    weighted = sum(len(rows) ** 2 / _hull_area(rows, columns) for rows, columns in nuclei)
    return weighted / total_area, total_area, med_area


def class_mixture(class_map: np.ndarray, inst_map: np.ndarray, classes: int) -> np.ndarray:
    """
    Measure which shares of a mask's nuclei are of which class.

    :param class_map: an [H x W] integer array, one class in each nucleus, 1 to classes - 1.
    :param inst_map: an [H x W] integer array of ids, 0 = background.
    :return: a [classes - 1] float64 array; zeros for an empty mask.
    """
    ids, first = np.unique(inst_map, return_index=True)
    counts = np.bincount(class_map.ravel()[first[ids != 0]], minlength=classes)[1:]
    return counts / max(counts.sum(), 1)


def match_scores(properties: np.ndarray, rows: np.ndarray, mixtures: np.ndarray | None = None) -> np.ndarray:
    """
    Score how well every mask of a set matches some of them.

    Per property, the differences to the query are capped at their 0.85 quantile and scaled to [0, 1]; the score is
    1 - the mean over the properties, so the query itself has 1. The mixture of classes counts as one property, by the
    sum of the differences of its shares.

    :param properties: an [N x P] array, e.g. total and median area of N masks.
    :param rows: an [R] integer array, the indices of the queries.
    :param mixtures: an [N x K] array of class_mixture's, where classes count as well.
    :return: an [R x N] float64 array in [0, 1], higher = more alike.
    """
    properties = np.asarray(properties, np.float64)
    parts = [(values[rows, None], values[:, None]) for values in properties.T]
    parts += [] if mixtures is None else [(mixtures[rows], mixtures)]
    return 1 - _penalties(parts)


def _penalties(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """
    :param parts: of each property the queries' values, [R x D], and those of what they are compared with, [N x D].
    :return: an [R x N] float64 array in [0, 1], see match_scores.
    """
    penalty = np.zeros((len(parts[0][0]), len(parts[0][1])))
    for queries, values in parts:
        difference = cdist(queries, values, "cityblock")
        cap = np.quantile(difference, CAP_QUANTILE, axis=1, keepdims=True)
        np.minimum(difference, cap, out=difference)
        difference -= difference.min(axis=1, keepdims=True)  # in a set, the query's own 0
        largest = difference.max(axis=1, keepdims=True)
        scale = 1 / np.where(largest < 10 * np.finfo(np.float64).eps, 1.0, largest)
        penalty += difference * scale * (1 / len(parts))
    return np.clip(penalty, 0, 1)


def match_struct(
    total_area: np.ndarray, med_area: np.ndarray, seed: int, slides: Sequence[str] | None = None
) -> np.ndarray:
    """
    Choose for each structure the image that lends it its appearance, by likeness of the nuclei's areas.

    :param seed: of the draw among the 19 best matches; other parameters and errors as near_struct's.
    :return: an [N] int64 array of indices, never a mask's own.
    """
    return near_struct(total_area, med_area, slides).draw(seed)


def near_struct(
    total_area: np.ndarray,
    med_area: np.ndarray,
    slides: Sequence[str] | None = None,
    mixtures: np.ndarray | None = None,
) -> "Neighbours":
    """
    Find for each structure those that are most alike, by the nuclei's areas, and their classes where these are known.

    :param total_area: an [N] array, pixels of nuclei in each mask.
    :param med_area: an [N] array, median area of the nuclei in each mask.
    :param slides: the slide of each mask, to look at other slides only.
    :param mixtures: see match_scores.
    :raises ValueError: if there are fewer than two masks, or slides.
    """
    _require_others(len(total_area), "--match_struct")
    properties = np.stack([np.asarray(med_area), np.asarray(total_area)], axis=1)
    return _neighbours(len(properties), lambda rows: -match_scores(properties, rows, mixtures), slides)


def near_mixtures(structures: np.ndarray, images: np.ndarray) -> "Neighbours":
    """
    Find for each structure the images that are most alike, where these have masks with classes: by the share of the
    area that nuclei take and the mixture of classes, each a property as match_scores' are.

    :param structures: an [N x 1 + K] array, of each mask the share and its class_mixture; images: [M x 1 + K].
    :return: indices of images.
    """
    n_near = min(NEAREST, len(images))
    found = np.empty((len(structures), n_near), np.int64)
    for rows in _chunks(len(structures), len(images)):
        parts = [(structures[rows, part], images[:, part]) for part in (slice(1), slice(1, None))]
        found[rows] = _nearest(_penalties(parts), n_near)
    return Neighbours(found, n_near)


def stain_descriptor(image: np.ndarray) -> np.ndarray:
    """
    Describe the stain of an image by statistics of its optical density.

    Density is proportional to the amount of stain (Beer-Lambert), so its statistics say how much of which colour
    there is, and nothing of where.

    :param image: an [H x W x 3] uint8 array.
    :return: a [21] float32 array: for each channel mean, standard deviation and the quantiles 0.05, 0.25, 0.5, 0.75
             and 0.95 (as values that occur, not interpolated).
    :raises ValueError: if the image has another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"stain descriptor: expected [H x W x 3] uint8, got {image.shape} {image.dtype}")
    density = optical_density(np.arange(255, -1, -1))  # ascending: the brightest value first
    n = image.shape[0] * image.shape[1]
    described = []
    for channel in range(3):
        count = np.bincount(image[..., channel].ravel(), minlength=256)[::-1]
        mean = count @ density / n
        deviation = np.sqrt(count @ (density - mean) ** 2 / n)
        ranks = np.ceil(np.array(OD_QUANTILES) * n)
        described += [mean, deviation, *density[np.searchsorted(np.cumsum(count), ranks)]]
    return np.array(described, np.float32)


def match_app(descriptors: np.ndarray, seed: int, slides: Sequence[str] | None = None) -> np.ndarray:
    """
    Choose for each structure the image that lends it its appearance, by likeness to the structure's own image.

    :param seed: of the draw among the 19 nearest; other parameters and errors as near_app's.
    :return: an [N] int64 array of indices, never an image's own.
    """
    return near_app(descriptors, slides).draw(seed)


def near_app(descriptors: np.ndarray, slides: Sequence[str] | None = None) -> "Neighbours":
    """
    Find for each image those that are most alike.

    :param descriptors: an [N x D] array, one appearance vector per image; each of the D values is scaled to zero
        mean and unit deviation over the set, then distance is Euclidean.
    :param slides: the slide of each image, to look at other slides only.
    :raises ValueError: if there are fewer than two images, or slides.
    """
    _require_others(len(descriptors), "--match_app")
    descriptors = np.asarray(descriptors, np.float64)
    deviation = descriptors.std(axis=0)
    z = (descriptors - descriptors.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    return _neighbours(len(z), lambda rows: cdist(z[rows], z), slides)


def haematoxylin_histogram(image: np.ndarray) -> np.ndarray:
    """
    Count the pixels of an image by their amount of haematoxylin.

    :param image: an [H x W x 3] uint8 array.
    :return: a [64] int64 array: pixels with up to 0.025 units of optical density, up to 0.05, ..., and the rest.
    """
    return np.bincount(np.clip(haematoxylin(image).ravel() * 40, 0, 63).astype(np.int64), minlength=64)


def nuclear_shares(histograms: np.ndarray, slides: Sequence[str]) -> np.ndarray:
    """
    Estimate what share of each image nuclei take, where there is no mask: what is above its slide's threshold.

    :param histograms: an [N x 64] array of haematoxylin_histogram's.
    :param slides: the slide of each image; Otsu's threshold is that of all pixels of a slide.
    :return: an [N] array in [0, 1]; 0 on a slide of one amount alone.
    """
    shares = np.empty(len(histograms))
    names, codes = np.unique(np.asarray(slides), return_inverse=True)
    for code in range(len(names)):
        own = histograms[codes == code]
        shares[codes == code] = own[:, _otsu(own.sum(axis=0)) :].sum(axis=1) / own.sum(axis=1)
    return shares


def _otsu(histogram: np.ndarray) -> int:
    """:return: the first bin of the upper of two classes with the largest variance between them; else how many bins."""
    share = histogram / histogram.sum()
    below, mass = np.cumsum(share)[:-1], np.cumsum(share * np.arange(len(share)))
    above = 1 - below
    split = (below > 0) & (np.cumsum(histogram)[:-1] < histogram.sum())
    if not split.any():
        return len(histogram)
    # The squared distance of the classes' means, times both their shares.
    between = (mass[-1] * below - mass[:-1]) ** 2 / np.where(split, below * above, 1)
    return 1 + int(np.argmax(np.where(split, between, -1)))


def match_shares(shares: np.ndarray, candidates: np.ndarray, seed: int) -> np.ndarray:
    """
    Choose for each structure an image without mask by likeness of the share that nuclei take.

    :param shares: an [N] array, of the structures; candidates: an [M] array, of the images.
    :param seed: of the draw among the 19 nearest.
    :return: an [N] int64 array of indices of candidates.
    """
    rng = streams.rng("appearance", seed)
    order = np.argsort(candidates, kind="stable")
    ascending = candidates[order]
    n_near = min(NEAREST, len(candidates))
    rank = rng.integers(n_near, size=len(shares))
    # Where each would stand: among equals, anywhere.
    places = rng.integers(*(np.searchsorted(ascending, shares, side) for side in ("left", "right")), endpoint=True)
    chosen = np.empty(len(shares), np.int64)
    for i, (share, place) in enumerate(zip(shares, places)):
        start = max(place - n_near, 0)  # the nearest lie within n_near places
        near = np.argsort(abs(ascending[start : place + n_near] - share), kind="stable")
        chosen[i] = order[start + near[rank[i]]]
    return chosen


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """
    Weigh patches by how rare the classes of their nuclei are.

    A nucleus of a class that is f of all nuclei counts 1 / sqrt(f), and a patch weighs the mean over its nuclei. So if
    each patch had nuclei of one class, as many as others, f would become proportional to sqrt(f). One without nuclei
    weighs as much as the others on average, and comes as often as it would without weights.

    Inverse frequencies of the classes in a patch are CellViT's way (Hoerst et al. 2024), which goes by their presence;
    the root, by which no few patches come over and over, is that of LVIS's repeat factors (Gupta et al. 2019).

    :param counts: an [N x K] integer array: nuclei of each class in each patch.
    :return: an [N] float64 array, positive, with a mean of 1.
    """
    nuclei = counts.sum(axis=1)
    if not nuclei.any():
        return np.ones(len(counts))
    rarity = np.sqrt(nuclei.sum() / np.maximum(counts.sum(axis=0), 1))
    weights = counts @ rarity / np.maximum(nuclei, 1)
    weights[nuclei == 0] = weights[nuclei > 0].mean()
    return weights / weights.mean()


def repeated(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Draw as many items as there are, in random order, each as often as its weight is of their mean, rounded up or down.

    :param weights: an [N] array of positive numbers.
    :return: an [N] int64 array of indices, by systematic resampling (Kitagawa 1996).
    """
    count = len(weights)
    ends = np.floor(np.cumsum(weights) * (count / np.sum(weights)) + rng.random())
    ends[-1] = count  # whatever rounding makes of it
    times = np.diff(np.minimum(ends, count), prepend=0).astype(np.int64)
    return rng.permutation(np.repeat(np.arange(count), times))


def shuffled(n: int) -> np.ndarray:
    """
    Permute the indices of n images, the same way in every run and as the reference does.

    :param n: the number of images.
    :return: an [n] int64 array, a permutation of 0 .. n - 1.
    """
    return np.random.RandomState(LEGACY_SEED).choice(n, n, replace=False).astype(np.int64)


def subsample_indices(n: int, fraction: float) -> np.ndarray:
    """
    Choose a share of n images, the same in every run and as the reference does.

    :param n: the number of images.
    :param fraction: the share, in (0, 1].
    :return: an int64 array of int(n * fraction) different indices, in random order.
    :raises ValueError: if the fraction is out of range or leaves no image.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"--subsample {fraction}: the share of the images to keep must be in (0, 1]")
    kept = int(n * fraction)
    if not kept:
        enough = np.ceil(1e4 / max(n, 1)) / 1e4
        raise ValueError(f"--subsample {fraction} leaves none of {n} images; give at least {enough}")
    return np.random.RandomState(LEGACY_SEED).choice(n, kept, replace=False).astype(np.int64)


def _areas(inst: np.ndarray) -> np.ndarray:
    """Pixels of each id that occurs, ascending by id."""
    if inst.dtype.kind not in "bui":
        raise ValueError(f"instance mask: ids must be integers, got {inst.dtype}")
    values = inst[inst != 0]
    if not len(values):
        return np.zeros(0, np.int64)
    if values.min() < 0:
        raise ValueError(f"instance mask: ids must not be negative, got {values.min()}")
    if values.max() > _MAX_COUNTED_ID:
        return np.unique(values, return_counts=True)[1]
    count = np.bincount(values)
    return count[count > 0]


def _hull_area(rows: np.ndarray, columns: np.ndarray) -> int:
    """
    Count the pixel centres inside or on the convex hull of the edge mid-points of some pixels.

    Coordinates are doubled, so that mid-points are integers and every comparison is exact.

    :param rows: an [n] int64 array, the pixels' rows.
    :param columns: an [n] int64 array, the pixels' columns.
    :return: the number of centres, at least n.
    """
    centres = 2 * np.stack([columns - columns.min(), rows - rows.min()], axis=1)
    edges = np.concatenate([centres + step for step in ((1, 0), (-1, 0), (0, 1), (0, -1))])
    hull = cv2.convexHull(edges.astype(np.int32), clockwise=False)[:, 0].astype(np.int64)
    height, width = centres[:, 1].max() // 2 + 1, centres[:, 0].max() // 2 + 1
    y, x = np.ogrid[: 2 * height : 2, : 2 * width : 2]
    inside = np.ones((height, width), bool)
    for (x0, y0), (x1, y1) in zip(hull, np.roll(hull, -1, axis=0)):
        inside &= (x1 - x0) * (y - y0) >= (y1 - y0) * (x - x0)
    return int(inside.sum())


def _require_others(n: int, flag: str) -> None:
    if n < 2:
        raise ValueError(f"{flag} has {n} image(s) to choose from; give --data_dir with at least 2, or drop {flag}")


@dataclass(frozen=True)
class Neighbours:
    """
    What an appearance is drawn from, found once for any number of draws.

    :param near: an [N x up to 19] int64 array: for each item the indices of its nearest others, the nearest first.
    :param choices: how many of them count: one number for all, or one for each.
    """

    near: np.ndarray
    choices: int | np.ndarray

    def draw(self, seed: int) -> np.ndarray:
        """:return: an [N] int64 array: one of the nearest of each."""
        rank = streams.rng("appearance", seed).integers(self.choices, size=len(self.near))
        return self.near[np.arange(len(self.near)), rank]


def _neighbours(
    n: int, distance: Callable[[np.ndarray], np.ndarray], slides: Sequence[str] | None = None
) -> Neighbours:
    """
    Find for each of n items its 19 nearest others (all others if they are fewer).

    An item, or all of its slide, is taken out of its own ranking first; equal distances rank by index. So neither the
    platform's sort nor the way the rows are cut into chunks changes the answer.

    :param n: the number of items.
    :param distance: maps [R] indices to an [R x n] float array.
    :param slides: the slide of each item, or None to take the item alone out.
    """
    n_near = min(NEAREST, n - 1)
    codes, choices = np.arange(n), n_near
    if slides is not None:
        names, codes, sizes = np.unique(np.asarray(slides), return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise ValueError(
                f"--match_other_slide True: all {n} images are of slide {names[0]}: give --data_dir with more slides, "
                "or leave it out"
            )
        choices = np.minimum(NEAREST, n - sizes[codes])
    found = np.empty((n, n_near), np.int64)
    for rows in _chunks(n, n):
        far = distance(rows)
        far[codes[rows, None] == codes] = np.inf
        found[rows] = _nearest(far, n_near)
    return Neighbours(found, choices)


def _nearest(far: np.ndarray, n_near: int) -> np.ndarray:
    """:return: of each row of distances the indices of so many smallest, in rising order; equal ones rank by index."""
    reach = np.partition(far, n_near - 1, axis=1)[:, n_near - 1]
    chosen = np.empty((len(far), n_near), np.int64)
    for i, (row, limit) in enumerate(zip(far, reach)):
        near = np.flatnonzero(row <= limit)
        chosen[i] = near[np.argsort(row[near], kind="stable")[:n_near]]
    return chosen


def _chunks(n: int, columns: int) -> Iterator[np.ndarray]:
    """Ranges of n rows for which a [rows x columns] block stays small."""
    size = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, n, size):
        yield np.arange(start, min(start + size, n))
