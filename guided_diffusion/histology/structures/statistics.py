"""
How like real layouts made ones are: figures of nuclei and layouts, and distances between their distributions.

Knows instance maps, not how they came about.
"""

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import wasserstein_distance
from skimage.measure import regionprops_table

# Figure -> what it is. The first three are of whole nuclei, the next of all, the last three of layouts.
FIGURES = {
    "area": "area, px",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
    "neighbour": "distance to the nearest nucleus's centre, px",
    "count": "nuclei in 10 000 px",
    "share": "share of the area",
    "touching": "share of nuclei that touch another",
}
_PROPERTIES = ("label", "bbox", "centroid", "area", "eccentricity", "solidity")


def measure(inst_map: np.ndarray) -> dict[str, np.ndarray]:
    """:return: a layout's values of each of FIGURES, [N]."""
    found = regionprops_table(inst_map, properties=_PROPERTIES)
    height, width = inst_map.shape
    whole = (found["bbox-0"] > 0) & (found["bbox-1"] > 0) & (found["bbox-2"] < height) & (found["bbox-3"] < width)
    centres = np.stack([found["centroid-0"], found["centroid-1"]], axis=1)
    near = cKDTree(centres).query(centres, k=2)[0][:, 1] if len(centres) > 1 else np.empty(0)
    ids = found["label"]
    return {
        **{name: found[name][whole].astype(float) for name in ("area", "eccentricity", "solidity")},
        "neighbour": near,
        "count": np.array([1e4 * len(ids) / inst_map.size]),
        "share": np.array([(inst_map != 0).mean()]),
        "touching": np.array([len(touching(inst_map)) / len(ids)]) if len(ids) else np.empty(0),
    }


def touching(inst_map: np.ndarray) -> set[int]:
    """:return: the ids of nuclei with a pixel beside another nucleus's."""
    found: set[int] = set()
    for one, other in ((inst_map[:, 1:], inst_map[:, :-1]), (inst_map[1:], inst_map[:-1])):
        where = (one != other) & (one != 0) & (other != 0)
        found |= {*one[where].tolist(), *other[where].tolist()}
    return found


def pooled(measured: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """:return: the values of several layouts together."""
    return {name: np.concatenate([own[name] for own in measured]) for name in FIGURES}


def distances(real: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """:return: figure -> Wasserstein distance in units of the real spread, the standard deviation."""
    return {
        name: float(wasserstein_distance(real[name], other[name]) / max(real[name].std(), 1e-9)) for name in FIGURES
    }


def between_halves(
    measured: Sequence[dict[str, np.ndarray]], slides: Sequence[str], rng: np.random.Generator, times: int = 10
) -> dict[str, float]:
    """
    :param measured: real layouts. :param slides: the slide of each.
    :return: figure -> the distance between one half of the slides and the other, the mean of several choices.
    """
    names = np.unique(slides)
    rows = []
    for _ in range(times):
        half = set(rng.permutation(names)[: len(names) // 2])
        parts = [[own for own, slide in zip(measured, slides) if (slide in half) == side] for side in (True, False)]
        rows.append(distances(*map(pooled, parts)))
    return {name: float(np.mean([row[name] for row in rows])) for name in FIGURES}
