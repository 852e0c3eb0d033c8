"""
New layouts of nuclei: put together from a bank, or a real one with each nucleus moved a little.

Knows no files. All lengths are pixels of the data, whatever their magnification.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from scipy import ndimage
from skimage.measure import regionprops

from .bank import UNKNOWN, Bank, Layout, Nucleus, Pattern, Stock, angle_of, between, distances

PLACES = 64  # that are tried for a nucleus
PAIRED = 0.7  # share of the nuclei that are put beside one that is there; the others fall where there is room
TRIES = 8  # to move a nucleus, each by less
MOVE = 0.25  # standard deviation of a nucleus's move, in its radii
OUTLINE = 48  # points of a nucleus's edge that are looked at
SMOOTH = 0.9  # px, of edges: with it, turned nuclei have the solidity of real ones
_PAD = 4


def recombine(bank: Bank, size: int, rng: np.random.Generator) -> Layout:
    """
    Make a layout as a real mask's nuclei lie, of the nuclei of all: of each class as dense, of such sizes and
    directions, and with such gaps.

    :param bank: of real masks.
    :param size: height and width, in pixels.
    :return: a [size x size] int32 instance map, and its classes. No two nuclei overlap; the border cuts some.
    """
    pattern = bank.patterns[int(rng.integers(len(bank.patterns)))]
    margin = bank.largest // 2 + 1
    ground = Ground(size + 2 * margin)
    for area, number in _areas(pattern, ground.side**2, rng):
        beside = int(rng.integers(len(ground.nuclei))) if ground.nuclei and rng.random() < PAIRED else None
        angle = _angle(pattern, number, None if beside is None else ground.nuclei[beside].angle, rng)
        mask = _drawn(bank, number, area, angle, rng)
        ground.place(mask, _gap(pattern, rng), beside, rng, number, angle)
    return ground.layout(margin)


def perturb(layout: Layout, rng: np.random.Generator) -> Layout:
    """
    Move, turn, scale and bend each nucleus of a layout a little. Those that the border cuts move along it or over it,
    so that no cut edge comes into sight.

    :param layout: [size x size].
    :return: another one, int32. Nuclei that find no place of their own lose what lies under others. The same nuclei in
        the same places come out only where none can move, as one that fills the layout.
    """
    for farther in range(1, TRIES + 1):
        made = _perturbed(layout, farther, rng)
        if not _alike(made.inst_map, layout.inst_map):
            break
    return made


def joined(layouts: Sequence[Layout], stocks: Mapping[int, Stock], size: int, rng: np.random.Generator) -> Layout:
    """
    Lay parts of real layouts side by side. Of the nuclei that an inner border cuts, both sides have some: half of them
    are left out, and whole nuclei, no smaller, lie in place of the others.

    :param layouts: to choose from, those that go together one after another, as of one slide.
    :param stocks: class -> whole nuclei, see Bank.
    :param size: height and width, in pixels.
    :return: a [size x size] int32 instance map, and its classes.
    """
    ground, cut = Ground(size), []
    side = min(min(layout.inst_map.shape) for layout in layouts)
    corners = list(itertools.product(range(0, size, side), repeat=2))
    chosen = int(rng.integers(len(layouts))) + rng.permutation(len(corners))
    for (top, left), place in zip(corners, chosen):
        layout = window(layouts[place % len(layouts)], side, rng)
        for region in regionprops(layout.inst_map.astype(np.int32)):
            at_top, at_bottom, at_left, at_right = _sides(region.bbox, side)
            inner = (at_top and top > 0) or (at_left and left > 0)
            inner |= (at_bottom and top + side < size) or (at_right and left + side < size)
            number = layout.class_of(region.label)
            if not inner:
                ground.put(region.image, top + region.bbox[0], left + region.bbox[1], number)
            elif number in stocks and rng.random() < 0.5:
                cut.append((region.area, (top + region.centroid[0], left + region.centroid[1]), number))
    for area, centre, number in cut:
        larger = stocks[number].from_area(area)
        mask = changed(larger[int(rng.integers(len(larger)))], rng.uniform(0, np.pi), 1.0)
        ground.put(mask, *(round(middle - length / 2) for middle, length in zip(centre, mask.shape)), number)
    return ground.layout()


def window(layout: Layout, size: int, rng: np.random.Generator) -> Layout:
    """:return: a [size x size] part of a layout, anywhere."""
    top, left = (int(rng.integers(side - size + 1)) for side in layout.inst_map.shape)
    return Layout(layout.inst_map[top : top + size, left : left + size], layout.classes)


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two instance maps of one size show the same nuclei, whatever their ids."""
    if not np.array_equal(one != 0, other != 0):
        return False
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1)
    return pairs.shape[1] == len(np.unique(one)) == len(np.unique(other))


def _perturbed(layout: Layout, farther: int, rng: np.random.Generator) -> Layout:
    """A layout with each nucleus moved, so many times as far."""
    ground = Ground(len(layout.inst_map))
    regions = regionprops(layout.inst_map.astype(np.int32))
    # The cut ones first, which have the least choice, then the largest.
    for region in sorted(regions, key=lambda region: (not any(_sides(region.bbox, ground.side)), -region.area)):
        top, left = region.bbox[:2]
        number, sides = layout.class_of(region.label), _sides(region.bbox, ground.side)
        nucleus = Nucleus(region.image, angle_of(region.orientation), 1.0, number)
        tried = (_moved(nucleus, sides, strength, rng) for strength in np.linspace(farther, 0, TRIES))
        if not any(ground.put(mask, top + down, left + right, number) for mask, down, right in tried):
            ground.put_under(region.image, top, left, number)
    return ground.layout()


def _moved(
    nucleus: Nucleus, sides: tuple[bool, bool, bool, bool], strength: float, rng: np.random.Generator
) -> tuple[np.ndarray, int, int]:
    """A nucleus changed a little, and how far down and to the right it has come; of strength 0 it is as it was."""
    shift, mask = rng.normal(0, MOVE * np.sqrt(nucleus.area / np.pi), 2), nucleus.mask
    if any(sides):
        shift = np.array([_outward(shift[0], *sides[:2]), _outward(shift[1], *sides[2:])])
    else:
        turn, growth, bend = rng.normal(0, (0.25, 0.08, 0.05)) * strength
        mask = changed(nucleus, nucleus.angle + turn, float(np.exp(growth)), bend)
    down, right = np.round((np.array(nucleus.mask.shape) - mask.shape) / 2 + strength * shift).astype(int)
    return mask, int(down), int(right)


def _sides(box: tuple[int, int, int, int], side: int) -> tuple[bool, bool, bool, bool]:
    """Whether a box (top, left, bottom, right) lies at the top, the bottom, the left, the right."""
    return box[0] == 0, box[2] == side, box[1] == 0, box[3] == side


def _outward(step: float, at_start: bool, at_end: bool) -> float:
    """A step along one axis, turned away from what is cut there."""
    if at_start and at_end:
        return 0.0
    return -abs(step) if at_start else abs(step) if at_end else step


def _areas(pattern: Pattern, pixels: int, rng: np.random.Generator) -> list[tuple[float, int]]:
    """
    The areas and classes of the nuclei that lie in so many pixels, the largest first, which find a place the least
    easily.
    """
    drawn = []
    for number, share in pattern.shares.items():
        count = int(share.density * pixels + rng.random())
        chance = share.weights / share.weights.sum()
        areas = rng.choice(share.areas, count, p=chance) * np.exp(rng.normal(0, 0.1, count))
        drawn += [(float(area), number) for area in areas]
    return sorted(drawn, reverse=True)


def _gap(pattern: Pattern, rng: np.random.Generator) -> float:
    return float(rng.choice(pattern.gaps)) if len(pattern.gaps) else 0.0


def _angle(pattern: Pattern, number: int, neighbour: float | None, rng: np.random.Generator) -> float:
    """
    The direction of a nucleus: as one of the pattern's, or turned against its neighbour's, if any, as in the pattern.
    Of the two ways to turn, that which comes nearer to one of the pattern's: nuclei lie along each other far and wide.
    """
    own = float(rng.choice(pattern.shares[number].angles)) + rng.normal(0, 0.2)
    if neighbour is None or not len(pattern.turns):
        return own
    turn = float(rng.choice(pattern.turns))
    return min(neighbour + turn, neighbour - turn, key=lambda angle: between(angle, own))


def _drawn(bank: Bank, number: int, area: float, angle: float, rng: np.random.Generator) -> np.ndarray:
    """A nucleus of the bank, of this class, about this area and of this direction."""
    nucleus = bank.stocks[number].like(area, rng)
    scale = float(np.clip(np.sqrt(area / nucleus.area), 0.85, 1.18))
    return changed(nucleus, angle, scale, bend=rng.normal(0, 0.08), mirrored=rng.random() < 0.5)


def changed(nucleus: Nucleus, angle: float, scale: float, bend: float = 0.0, mirrored: bool = False) -> np.ndarray:
    """
    Turn, mirror, scale and bend a nucleus.

    :param angle: of its longer axis afterwards, see Nucleus.
    :param scale: of its lengths.
    :param bend: by how much of its half length its ends move across it.
    :return: a boolean array that just holds it, in one part.
    """
    height, width = nucleus.mask.shape
    reach = 0.5 * np.hypot(height, width)
    side = int(np.ceil(2 * scale * reach * (1 + abs(bend)))) + 4
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    # Backwards, from the new pixels to the old: first along and across the new direction.
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    along, across = along / scale, across / scale
    across = (-across if mirrored else across) + bend * (along**2 / reach - reach / 3)
    old_x = along * np.cos(nucleus.angle) - across * np.sin(nucleus.angle) + (width - 1) / 2
    old_y = along * np.sin(nucleus.angle) + across * np.cos(nucleus.angle) + (height - 1) / 2
    old = (old_x + _PAD).astype(np.float32), (old_y + _PAD).astype(np.float32)
    # By the depth below the edge, smoothed: turning the pixels themselves would make the edge rough.
    depth = cv2.GaussianBlur(_depth(np.pad(nucleus.mask, _PAD)), (0, 0), SMOOTH)
    return trimmed(largest_part(cv2.remap(depth, *old, cv2.INTER_LINEAR, borderValue=-1.0) > 0))


class Placed(NamedTuple):
    """A nucleus that lies on a ground: its box there, its class, and its direction, see Nucleus."""

    box: tuple[slice, slice]
    number: int
    angle: float


class Ground:
    """
    A square on which nuclei are put, none over another.

    :param side: in pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.inst_map = np.zeros((side, side), np.int32)
        self.away = np.full((side, side), np.float32(2 * side))  # px to the nearest nucleus; far where there is none
        self.nuclei: list[Placed] = []  # those with ids 1, 2, ...

    def place(
        self,
        mask: np.ndarray,
        gap: float,
        beside: int | None,
        rng: np.random.Generator,
        number: int = UNKNOWN,
        angle: float = 0.0,
    ) -> bool:
        """
        Put a nucleus somewhere.

        :param mask: a boolean array that just holds it.
        :param gap: pixels to the nearest of the others: about so many where it is to lie beside one, else that or more.
        :param beside: the place in `nuclei` of the one that it is to be nearest to, if there is room; None: of none.
        :param number: its class; angle: its direction.
        :return: whether there was room.
        """
        if not mask.any():
            return False
        height, width = mask.shape
        rows, columns = np.nonzero(mask & ~_eroded(mask))
        chosen = np.linspace(0, len(rows) - 1, min(OUTLINE, len(rows))).astype(int)
        rows, columns = rows[chosen] - height // 2, columns[chosen] - width // 2
        radius = np.sqrt(mask.sum() / np.pi)
        best = partial(self._far, gap + 0.8 * radius) if beside is None else partial(self._around, beside, gap, radius)
        for search in (best, partial(self._far, 0.6 * radius)):
            places = search()
            y, x = np.divmod(rng.choice(places, min(PLACES, len(places)), replace=False), self.side)
            seen_y, seen_x = (np.clip(at[:, None] + edge, 0, self.side - 1) for at, edge in ((y, rows), (x, columns)))
            nearest = self.away[seen_y, seen_x].min(axis=1)
            wrong = np.maximum(gap - nearest, 0) if beside is None else np.abs(nearest - gap)
            for choice in np.argsort(wrong, kind="stable"):
                top, left = int(y[choice]) - height // 2, int(x[choice]) - width // 2
                if nearest[choice] >= 1 and self.put(mask, top, left, number, angle):
                    return True
        return False

    def _far(self, least: float) -> np.ndarray:
        """:return: the pixels, counted row by row, that lie so far from all nuclei."""
        return np.flatnonzero(self.away >= least)

    def _around(self, beside: int, gap: float, radius: float) -> np.ndarray:
        """:return: the pixels whose nearest nucleus is this one, about a gap and a radius away."""
        reach = int(gap + 1.3 * radius) + 2
        top, left, bottom, right = self._box(self.nuclei[beside].box, reach)
        away, own = self.away[top:bottom, left:right], self.inst_map[top:bottom, left:right] == beside + 1
        about = np.abs(away - gap - radius) <= 0.3 * radius + 1
        y, x = np.nonzero(about & (distances((~own).astype(np.uint8)) <= away))
        return (y + top) * self.side + x + left

    def _box(self, box: tuple[slice, slice], reach: int) -> tuple[int, int, int, int]:
        """:return: top, left, bottom and right of a box with so many pixels around it, within the square."""
        top, left = (max(0, side.start - reach) for side in box)
        bottom, right = (min(self.side, side.stop + reach) for side in box)
        return top, left, bottom, right

    def put(self, mask: np.ndarray, top: int, left: int, number: int = UNKNOWN, angle: float = 0.0) -> bool:
        """Put a nucleus at a place, what goes over the side cut off, unless it lies on another."""
        rows = slice(max(0, top), min(self.side, top + mask.shape[0]))
        columns = slice(max(0, left), min(self.side, left + mask.shape[1]))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return False
        part = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        if self.inst_map[rows, columns][part].any():
            return False
        if not part.any():
            return False
        self._mark(part, Placed((rows, columns), number, angle))
        return True

    def put_under(self, mask: np.ndarray, top: int, left: int, number: int = UNKNOWN) -> None:
        """Put what others leave of a nucleus at a place in the square, if that is most of it."""
        rows, columns = slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])
        free = largest_part(mask & (self.inst_map[rows, columns] == 0))
        if 2 * free.sum() > mask.sum():
            self._mark(free, Placed((rows, columns), number, 0.0))

    def _mark(self, mask: np.ndarray, placed: Placed) -> None:
        self.nuclei.append(placed)
        self.inst_map[placed.box][mask] = len(self.nuclei)
        # It is the nearest to no pixel that lies further from it than any does from the others.
        top, left, bottom, right = self._box(placed.box, int(min(self.away.max(), self.side)) + 1)
        others = (self.inst_map[top:bottom, left:right] != len(self.nuclei)).astype(np.uint8)
        near = self.away[top:bottom, left:right]
        np.minimum(near, distances(others), out=near)

    def layout(self, margin: int = 0) -> Layout:
        """:return: what lies within a margin: ids from 1 without gaps, and of each nucleus its largest part alone."""
        inner = slice(margin, self.side - margin)
        seen = self.inst_map[inner, inner]
        inst_map, classes = np.zeros(seen.shape, np.int32), {}
        for before, box in enumerate(ndimage.find_objects(seen), 1):
            if box:
                own = len(classes) + 1
                inst_map[box][largest_part(seen[box] == before)] = own
                classes[own] = self.nuclei[before - 1].number
        return Layout(inst_map, classes)


def largest_part(mask: np.ndarray) -> np.ndarray:
    """:return: the largest connected part of a mask, without holes."""
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if count < 2:
        return mask
    part = (parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()).astype(np.uint8)
    outlines, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(part, outlines, -1, 1, cv2.FILLED).astype(bool)


def trimmed(mask: np.ndarray) -> np.ndarray:
    """:return: the part of a mask that just holds what is in it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else mask[:0, :0]


def _depth(mask: np.ndarray) -> np.ndarray:
    """Pixels to the edge of a mask, positive in it and negative outside."""
    inside, outside = (distances(part.astype(np.uint8)) for part in (mask, ~mask))
    return np.where(mask, inside - 0.5, 0.5 - outside).astype(np.float32)


def _eroded(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1).astype(np.uint8)
    return cv2.erode(padded, np.ones((3, 3), np.uint8))[1:-1, 1:-1].astype(bool)
