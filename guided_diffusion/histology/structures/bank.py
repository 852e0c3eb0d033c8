"""
What real masks say of nuclei and of how they lie: the bank that new layouts are made of.

Knows instance maps, not their files.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from skimage.measure import regionprops


@dataclass(frozen=True)
class Nucleus:
    """
    A whole nucleus.

    :param mask: an [h x w] boolean array that just holds it.
    :param angle: of its longer axis, in radians, from the x-axis towards the y-axis.
    :param weight: how many it stands for: the larger a nucleus, the likelier a mask's border cuts it.
    """

    mask: np.ndarray
    angle: float
    weight: float

    @property
    def area(self) -> int:
        """In pixels."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Pattern:
    """
    How the nuclei of one real mask lie.

    :param density: nuclei a pixel; what the border cuts counts by half, at a corner by a quarter.
    :param areas: [N] in pixels, of its whole nuclei, and angles, [N], and weights, [N], theirs. Where it has none,
        those of all masks that are no smaller than the largest part in sight.
    :param gaps: [M] pixels between the edges of each nucleus and its nearest neighbour; 1 where they touch.
    """

    density: float
    areas: np.ndarray
    angles: np.ndarray
    weights: np.ndarray
    gaps: np.ndarray


@dataclass(frozen=True)
class Bank:
    """
    Nuclei, sorted by area, and patterns.

    :param nuclei: of all masks.
    :param areas: [N] theirs, in pixels.
    :param patterns: one a mask: without those of large nuclei, which small masks cut, and those of none, there would be
        too many nuclei in what is made of them.
    """

    nuclei: list[Nucleus]
    areas: np.ndarray
    patterns: list[Pattern]

    @classmethod
    def of(cls, inst_maps: Iterable[np.ndarray]) -> "Bank":
        """
        :param inst_maps: [H x W] integer arrays.
        :raises ValueError: where none has a whole nucleus.
        """
        looks = [look(inst_map) for inst_map in inst_maps]
        nuclei = sorted((nucleus for own, _, _ in looks for nucleus in own), key=lambda nucleus: nucleus.area)
        if not nuclei:
            raise ValueError("no mask has a nucleus that its border does not cut")
        areas = np.array([nucleus.area for nucleus in nuclei])
        patterns = []
        for own, spread, part in looks:
            known = own or nuclei[min(int(np.searchsorted(areas, part)), len(nuclei) - 1) :]
            patterns.append(Pattern(**spread, **measures(known)))
        return cls(nuclei, areas, patterns)

    def like(self, area: float, rng: np.random.Generator, among: int = 20) -> Nucleus:
        """:return: one of the nuclei whose areas come nearest to one."""
        place = int(np.searchsorted(self.areas, area))
        first = min(max(0, place - among // 2), max(0, len(self.nuclei) - among))
        return self.nuclei[int(rng.integers(first, min(first + among, len(self.nuclei))))]


def look(inst_map: np.ndarray) -> tuple[list[Nucleus], dict[str, Any], int]:
    """:return: the whole nuclei of an instance map, its Pattern's density and gaps, the area of its largest part."""
    height, width = inst_map.shape
    nuclei, count, largest = [], 0.0, 0
    for region in regionprops(inst_map.astype(np.int32)):
        top, left, bottom, right = region.bbox
        cut = (top == 0) + (left == 0) + (bottom == height) + (right == width)
        count, largest = count + 0.5**cut, max(largest, int(region.area))
        if not cut:
            # The share of all places in which the border would have cut it.
            seen = (height - (bottom - top)) * (width - (right - left)) / (height * width)
            nuclei.append(Nucleus(region.image, angle_of(region.orientation), 1 / max(seen, 0.05)))
    return nuclei, {"density": count / inst_map.size, "gaps": gaps(inst_map)}, largest


def measures(nuclei: list[Nucleus]) -> dict[str, np.ndarray]:
    """What a Pattern says of nuclei, one by one."""
    rows = np.array([(nucleus.area, nucleus.angle, nucleus.weight) for nucleus in nuclei])
    return dict(zip(("areas", "angles", "weights"), rows.T))


def angle_of(orientation: float) -> float:
    """:return: the angle, as Nucleus has it, of what regionprops measures from the y-axis towards the x-axis."""
    return np.pi / 2 - orientation


def gaps(inst_map: np.ndarray) -> np.ndarray:
    """:return: [N] pixels from the edge of each nucleus to its nearest neighbour's; 1 where they touch."""
    found = []
    for region in regionprops(inst_map.astype(np.int32)):
        others = ((inst_map == 0) | (inst_map == region.label)).astype(np.uint8)
        if not others.all():
            away = cv2.distanceTransform(others, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            found.append(float(away[inst_map == region.label].min()))
    return np.array(found)
