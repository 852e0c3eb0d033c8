"""
What real masks say of nuclei and of how they lie: the bank that new layouts are made of.

Knows instance maps and the classes of their nuclei, not their files.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np
from scipy.spatial import cKDTree
from skimage.measure import regionprops

UNKNOWN = 0  # the class of nuclei that have none
ELONGATED = 0.6  # eccentricity from which on a nucleus has a direction


@dataclass(frozen=True)
class Layout:
    """
    Nuclei that lie beside each other.

    :param inst_map: an [H x W] integer array of instance ids, 0 outside nuclei.
    :param classes: the class of each, as cell_classes.of_nuclei gives it; of those that are missing it is UNKNOWN.
    """

    inst_map: np.ndarray
    classes: Mapping[int, int] = field(default_factory=dict)

    def class_of(self, own: int) -> int:
        """:return: the class of a nucleus, by its id."""
        return self.classes.get(own, UNKNOWN)

    def numbered(self) -> "Layout":
        """:return: the same with ids from 1 without gaps: what follows takes time and memory by the largest."""
        ids, places = np.unique(np.append(self.inst_map, 0), return_inverse=True)
        classes = {place: self.classes[own] for place, own in enumerate(ids.tolist()) if own in self.classes}
        return Layout(places[:-1].reshape(self.inst_map.shape).astype(np.int32), classes)


@dataclass(frozen=True)
class Nucleus:
    """
    A whole nucleus.

    :param mask: an [h x w] boolean array that just holds it.
    :param angle: of its longer axis, in radians, from the x-axis towards the y-axis.
    :param weight: how many it stands for: the larger a nucleus, the likelier a mask's border cuts it.
    :param number: its class.
    """

    mask: np.ndarray
    angle: float
    weight: float
    number: int = UNKNOWN

    @property
    def area(self) -> int:
        """In pixels."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Share:
    """
    What the nuclei of one class in one real mask are like.

    :param density: nuclei a pixel; what the border cuts counts by half, at a corner by a quarter.
    :param areas: [N] in pixels, of its whole nuclei, and angles, [N], and weights, [N], theirs. Where it has none,
        those of all masks that are no smaller than the largest part in sight.
    """

    density: float
    areas: np.ndarray
    angles: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, density: float, nuclei: list[Nucleus]) -> "Share":
        """Measure nuclei, of which there is one at least."""
        rows = np.array([(nucleus.area, nucleus.angle, nucleus.weight) for nucleus in nuclei])
        return cls(density, *rows.T)


@dataclass(frozen=True)
class Pattern:
    """
    How the nuclei of one real mask lie.

    :param shares: class -> what its nuclei are like, of the classes that the mask has.
    :param gaps: [M] pixels between the edges of each nucleus and its nearest neighbour; 1 where they touch.
    :param turns: [K] as turns gives them; where it has none, those of all masks.
    """

    shares: Mapping[int, Share]
    gaps: np.ndarray
    turns: np.ndarray


@dataclass(frozen=True)
class Stock:
    """
    The whole nuclei of one class.

    :param nuclei: of all masks, sorted by area.
    :param areas: [N] theirs, in pixels.
    """

    nuclei: list[Nucleus]
    areas: np.ndarray

    @classmethod
    def of(cls, nuclei: Iterable[Nucleus]) -> "Stock":
        """Sort nuclei."""
        ascending = sorted(nuclei, key=lambda nucleus: nucleus.area)
        return cls(ascending, np.array([nucleus.area for nucleus in ascending]))

    def like(self, area: float, rng: np.random.Generator, among: int = 20) -> Nucleus:
        """:return: one of the nuclei whose areas come nearest to one."""
        place = int(np.searchsorted(self.areas, area))
        near = np.arange(max(0, place - among), min(place + among, len(self.nuclei)))
        nearest = near[np.argsort(np.abs(self.areas[near] - area), kind="stable")[:among]]
        return self.nuclei[int(nearest[rng.integers(len(nearest))])]

    def from_area(self, area: float) -> list[Nucleus]:
        """:return: the nuclei that are no smaller; one at least."""
        return self.nuclei[min(int(np.searchsorted(self.areas, area)), len(self.nuclei) - 1) :]


@dataclass(frozen=True)
class Bank:
    """
    Nuclei by their classes, and patterns.

    :param stocks: class -> its nuclei; classes of which no mask has a whole nucleus are missing, here and in patterns.
    :param patterns: one a mask: without those of large nuclei, which small masks cut, and those of none, there would be
        too many nuclei in what is made of them.
    """

    stocks: Mapping[int, Stock]
    patterns: list[Pattern]

    @classmethod
    def of(cls, layouts: Iterable[Layout]) -> "Bank":
        """:raises ValueError: where none has a whole nucleus."""
        looks = [look(layout) for layout in layouts]
        nuclei = [nucleus for own, *_ in looks for nucleus in own]
        if not nuclei:
            raise ValueError("no mask has a nucleus that its border does not cut")
        numbers = sorted({nucleus.number for nucleus in nuclei})
        stocks = {number: Stock.of(one for one in nuclei if one.number == number) for number in numbers}
        patterns, all_turns = [], np.concatenate([turned for *_, turned in looks])
        for own, seen, between, turned in looks:
            shares = {}
            for number in sorted(seen.keys() & stocks.keys()):
                density, part = seen[number]
                known = [nucleus for nucleus in own if nucleus.number == number]
                shares[number] = Share.of(density, known or stocks[number].from_area(part))
            patterns.append(Pattern(shares, between, turned if len(turned) else all_turns))
        return cls(stocks, patterns)

    @functools.cached_property
    def largest(self) -> int:
        """Pixels of the longest side of a nucleus's box."""
        return max(max(nucleus.mask.shape) for stock in self.stocks.values() for nucleus in stock.nuclei)


def look(layout: Layout) -> tuple[list[Nucleus], dict[int, tuple[float, int]], np.ndarray, np.ndarray]:
    """
    :return: the whole nuclei of a layout; class -> its density (see Share) and largest area; a Pattern's gaps; its
        turns.
    """
    height, width = layout.inst_map.shape
    nuclei, counts, largest = [], {}, {}
    regions = regionprops(layout.inst_map.astype(np.int32))
    for region in regions:
        top, left, bottom, right = region.bbox
        number = layout.class_of(region.label)
        cut = (top == 0) + (left == 0) + (bottom == height) + (right == width)
        counts[number] = counts.get(number, 0.0) + 0.5**cut
        largest[number] = max(largest.get(number, 0), int(region.area))
        if not cut:
            # The share of all places in which the border would have cut it.
            seen = (height - (bottom - top)) * (width - (right - left)) / (height * width)
            nuclei.append(Nucleus(region.image, angle_of(region.orientation), 1 / max(seen, 0.05), number))
    seen_of = {number: (count / layout.inst_map.size, largest[number]) for number, count in counts.items()}
    shapes = [(region.orientation, region.eccentricity, *region.centroid, *region.bbox) for region in regions]
    orientation, eccentricity, *places = np.array(shapes).reshape(len(shapes), 8).T
    turned = turns(orientation, eccentricity, np.stack(places[:2], 1), np.stack(places[2:], 1), layout.inst_map.shape)
    return nuclei, seen_of, gaps(layout.inst_map), turned


def turns(
    orientation: np.ndarray, eccentricity: np.ndarray, centres: np.ndarray, boxes: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """
    :param orientation: [N] as regionprops measures it, and eccentricity, [N], centres, [N x 2], and boxes, [N x 4].
    :param shape: height and width of the mask.
    :return: [K] radians, 0 to pi / 2, between the longer axes of a nucleus and its nearest neighbour, by their centres,
        where both are whole and elongated.
    """
    if len(centres) < 2:
        return np.empty(0)
    clear = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < shape).all(1) & (eccentricity > ELONGATED)
    nearest = cKDTree(centres).query(centres, k=2)[1][:, 1]
    return between(orientation, orientation[nearest])[clear & clear[nearest]]


def between(angle: np.ndarray | float, other: np.ndarray | float) -> np.ndarray:
    """:return: radians, 0 to pi / 2, between two axes of these angles."""
    turned = np.abs(angle - other) % np.pi
    return np.minimum(turned, np.pi - turned)


def angle_of(orientation: float) -> float:
    """:return: the angle, as Nucleus has it, of what regionprops measures from the y-axis towards the x-axis."""
    return np.pi / 2 - orientation


def gaps(inst_map: np.ndarray) -> np.ndarray:
    """:return: [N] pixels from the edge of each nucleus to its nearest neighbour's; 1 where they touch."""
    regions = regionprops(inst_map.astype(np.int32))
    return np.array([_gap(inst_map, region.label, region.bbox) for region in regions] if len(regions) > 1 else [])


def _gap(inst_map: np.ndarray, own: int, box: tuple[int, int, int, int]) -> float:
    """Pixels from the edge of a nucleus, in a box (top, left, bottom, right), to the nearest of the others."""
    top, left, bottom, right = box
    reach = 16
    while True:  # as far around it as needed: a slide is large
        part = inst_map[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach]
        others = (part == 0) | (part == own)
        nearest = distances(others.astype(np.uint8))[part == own].min() if not others.all() else np.inf
        if nearest <= reach or part.size == inst_map.size:
            return float(nearest)
        reach *= 2


def distances(mask: np.ndarray) -> np.ndarray:
    """
    :param mask: an [H x W] uint8 array, 0 somewhere.
    :return: an [H x W] float32 array: pixels from the middle of each pixel to that of the nearest that is 0.
    """
    # OpenCV's last bits depend on where in memory the mask lies, and layouts are to depend on their seed alone. The
    # squares are whole numbers.
    away = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.sqrt(np.rint(np.square(away, dtype=np.float64))).astype(np.float32)
