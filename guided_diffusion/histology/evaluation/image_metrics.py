"""
How near synthetic images are to real ones: distribution distances on features, colours, copies, diversity.

Owns the formulas, on arrays. Knows nothing of files, backbones or tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import pdist
from scipy.stats import wasserstein_distance
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

KID_SUBSETS, KID_SUBSET = 100, 1000  # how many, and images a side in each
NEIGHBOURS = 3  # of the manifolds in precision_recall, as in the paper
_BLOCK = 32  # MiB of distances at a time
_ALIGNED_SIDE = 32  # in px: what images are reduced to before they are aligned


@dataclass(frozen=True)
class Estimate:
    """A figure and the bounds that hold 95 % of its resampled values; None where there is nothing to resample."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Estimate":
        """:return: the mean of resampled values, and their 0.025 and 0.975 quantiles."""
        return cls(float(np.mean(values)), *map(float, np.quantile(values, (0.025, 0.975))))


# ---- distributions ----


def kernel_distance(real: np.ndarray, synthetic: np.ndarray, rng: np.random.Generator) -> Estimate:
    """
    Kernel inception distance (Binkowski et al. 2018): the squared MMD with the kernel (x . y / D + 1)^3, unbiased.

    :param real: an [N x D] array of features; synthetic: [M x D].
    :param rng: draws KID_SUBSETS subsets of KID_SUBSET images a side; fewer where there are not twice as many.
    :return: mean and spread over the subsets; about 0 for equal distributions, and below at times.
    :raises ValueError: where a side has fewer than 4 images.
    """
    from torch import from_numpy
    from torchmetrics.image.kid import poly_mmd

    fewest = min(len(real), len(synthetic))
    if fewest < 4:
        raise ValueError(f"the kernel distance takes at least 4 images a side, and there are {fewest}: give more")
    size = min(KID_SUBSET, fewest // 2)
    values = []
    for _ in range(KID_SUBSETS):
        picked = [from_numpy(x[rng.choice(len(x), size, replace=False)]).double() for x in (real, synthetic)]
        values.append(float(poly_mmd(*picked)))
    return Estimate.of(values)


def images_for_covariance(dimensions: int) -> int:
    """:return: how many images a side frechet_distance takes, so that the covariance has full rank."""
    return dimensions + 1


def frechet_distance(real: np.ndarray, synthetic: np.ndarray) -> float | None:
    """
    Frechet distance between Gaussians fitted to the features (Heusel et al. 2017).

    :param real: an [N x D] array of features; synthetic: [M x D].
    :return: the distance; None where a side has fewer images than images_for_covariance.
    """
    import torch as th
    from torchmetrics.image.fid import FrechetInceptionDistance

    dimensions = real.shape[1]
    if min(len(real), len(synthetic)) < images_for_covariance(dimensions):
        return None
    extractor = th.nn.Identity()
    extractor.num_features = dimensions
    metric = FrechetInceptionDistance(feature=extractor).set_dtype(th.float64)
    metric.update(th.from_numpy(real).double(), real=True)
    metric.update(th.from_numpy(synthetic).double(), real=False)
    return float(metric.compute())


def precision_recall(real: np.ndarray, synthetic: np.ndarray) -> tuple[float, float]:
    """
    Improved precision and recall (Kynkaanniemi et al. 2019).

    :param real: an [N x D] array of features; synthetic: [M x D]; both with more than NEIGHBOURS rows.
    :return: the share of synthetic images that lie in the real ones' manifold, and the other way round.
    """
    if min(len(real), len(synthetic)) <= NEIGHBOURS:
        raise ValueError(f"precision and recall take more than {NEIGHBOURS} images a side: give more")
    return _share_within(synthetic, real), _share_within(real, synthetic)


def _share_within(points: np.ndarray, manifold: np.ndarray) -> float:
    """The share of points no further from some point of the manifold than that one's last neighbour is."""
    points, manifold = (np.asarray(x, np.float64) for x in (points, manifold))
    radii = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(manifold).kneighbors()[0][:, -1]
    within = pairwise_distances_chunked(
        points, manifold, reduce_func=lambda block, _: (block <= radii).any(axis=1), working_memory=_BLOCK
    )
    return float(np.concatenate(list(within)).mean())


# ---- colours ----


def colour_error(image: np.ndarray, appearance: np.ndarray) -> tuple[float, float]:
    """
    Distance between the colours of two images, wherever in the image they are.

    :param image: an [H x W x C] uint8 array; appearance: another, of any size.
    :return: the Euclidean distance between their mean optical densities, -log10((value + 1) / 256) by channel; and the
        Wasserstein distance between their pixel values, in grey levels, averaged over the channels.
    """
    pairs = [(image[..., c].ravel(), appearance[..., c].ravel()) for c in range(image.shape[2])]
    densities = [[-np.log10((values.astype(np.float64) + 1) / 256).mean() for values in pair] for pair in pairs]
    shift = np.linalg.norm(np.subtract(*np.transpose(densities)))
    return float(shift), float(np.mean([_grey_distance(*pair) for pair in pairs]))


def _grey_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein distance of two arrays of uint8 values, by their histograms."""
    levels = np.arange(256)
    return wasserstein_distance(levels, levels, np.bincount(a, minlength=256), np.bincount(b, minlength=256))


# ---- copies and diversity ----


def nearest(points: np.ndarray, others: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Find each point's nearest others.

    :param points: [N x D]; others: [M x D], with at least `count` rows.
    :return: their indices and distances, both [N x count], the nearest first.
    """
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(np.asarray(others, np.float64))
    away, indices = search.kneighbors(np.asarray(points, np.float64))
    return indices, away


def thumbnail(image: np.ndarray) -> np.ndarray:
    """
    Reduce an image to what aligned_distance compares.

    :param image: an [H x W x C] uint8 array, at least 2 px wide and high.
    :return: [32 x 32] float32: optical density over all channels, of mean 0 and norm 1; all zero if it is constant.
    """
    from cv2 import INTER_AREA, resize

    density = -np.log10((image.astype(np.float32) + 1) / 256).mean(axis=2)
    small = resize(density, (_ALIGNED_SIDE, _ALIGNED_SIDE), interpolation=INTER_AREA)
    small -= small.mean()
    norm = np.linalg.norm(small)
    return small / norm if norm > 1e-4 else np.zeros_like(small)


def aligned_distance(small: np.ndarray, others: np.ndarray) -> np.ndarray:
    """
    Compare an image with others where they match best: by quarter turns, mirroring and cyclic shifts.

    :param small: a thumbnail; others: [M x 32 x 32] thumbnails.
    :return: [M] distances, 1 - the largest correlation: 0 for a copy, about 1 for unrelated images.
    """
    turns = [np.rot90(mirrored, turn) for mirrored in (small, small[:, ::-1]) for turn in range(4)]
    # The correlation for every shift at once, by the convolution theorem.
    spectra = np.fft.rfft2(np.stack(turns))[:, None] * np.fft.rfft2(others)[None].conj()
    return 1 - np.fft.irfft2(spectra, s=small.shape).max(axis=(0, 2, 3))


def diversity(features: np.ndarray, conditions: Sequence[object]) -> float | None:
    """
    Mean distance between the features of samples of one condition, over all conditions that have several.

    :param features: an [N x D] array; conditions: what each was made from.
    :return: the mean over conditions of the mean over pairs; None where no condition comes twice.
    """
    groups: dict[object, list[int]] = {}
    for i, condition in enumerate(conditions):
        groups.setdefault(condition, []).append(i)
    means = [pdist(features[group]).mean() for group in groups.values() if len(group) > 1]
    return float(np.mean(means)) if means else None
