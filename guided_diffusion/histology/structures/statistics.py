"""
How like real layouts made ones are: figures of nuclei and layouts, and distances between their distributions.

Knows layouts, not how they came about.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import wasserstein_distance
from skimage.measure import regionprops_table

from .bank import Layout, turns

# Figure -> what it is. The first three are of whole nuclei, the next of all, then one of pairs of whole elongated ones
# (see bank.turns), the last three of layouts.
FIGURES = {
    "area": "area, px",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
    "neighbour": "distance to the nearest nucleus's centre, px",
    "turn": "angle between neighbours' longer axes, rad",
    "count": "nuclei in 10 000 px",
    "share": "share of the area",
    "touching": "share of nuclei that touch another",
}
_PROPERTIES = ("label", "bbox", "centroid", "area", "eccentricity", "solidity", "orientation")


def measure(inst_map: np.ndarray) -> dict[str, np.ndarray]:
    """:return: a layout's values of each of FIGURES, [N]."""
    found = regionprops_table(inst_map, properties=_PROPERTIES)
    boxes = np.stack([found[f"bbox-{side}"] for side in range(4)], axis=1)
    whole = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < inst_map.shape).all(1)
    centres = np.stack([found["centroid-0"], found["centroid-1"]], axis=1)
    near = cKDTree(centres).query(centres, k=2)[0][:, 1] if len(centres) > 1 else np.empty(0)
    ids = found["label"]
    return {
        **{name: found[name][whole].astype(float) for name in ("area", "eccentricity", "solidity")},
        "neighbour": near,
        "turn": turns(found["orientation"], found["eccentricity"], centres, boxes, inst_map.shape),
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


def class_shares(layout: Layout, numbers: Iterable[int]) -> dict[str, np.ndarray]:
    """:return: of each of these classes, "class NUMBER": its share of a layout's nuclei, [N]; empty without nuclei."""
    own = [layout.class_of(nucleus) for nucleus in np.unique(layout.inst_map[layout.inst_map != 0]).tolist()]
    return {f"class {number}": np.array([own.count(number) / len(own)] if own else []) for number in numbers}


def pooled(measured: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """:return: the values of several layouts together; of none, there are no figures."""
    return {name: np.concatenate([own[name] for own in measured]) for name in measured[0]} if measured else {}


def distances(real: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """
    :return: figure -> Wasserstein distance, of FIGURES in units of the real spread, the standard deviation; NaN where
        one side has no values.
    """
    away = dict.fromkeys(real, math.nan)
    for name in (name for name in real.keys() & other.keys() if len(real[name]) and len(other[name])):
        unit = max(real[name].std(), 1e-9) if name in FIGURES else 1
        away[name] = float(wasserstein_distance(real[name], other[name]) / unit)
    return away


def between_halves(
    measured: Sequence[dict[str, np.ndarray]], slides: Sequence[str], rng: np.random.Generator, times: int = 10
) -> dict[str, float]:
    """
    :param measured: real layouts, one at least. :param slides: the slide of each.
    :return: figure -> the distance between one half of the slides and the other, the mean of several choices; NaN where
        there is none, as of a single slide.
    """
    names = np.unique(slides)
    found: dict[str, list[float]] = {name: [] for name in measured[0]}
    for _ in range(times):
        half = set(rng.permutation(names)[: len(names) // 2])
        parts = [[own for own, slide in zip(measured, slides) if (slide in half) == side] for side in (True, False)]
        for name, distance in distances(*map(pooled, parts)).items():
            found[name] += [] if math.isnan(distance) else [distance]
    return {name: float(np.mean(values)) if values else math.nan for name, values in found.items()}
