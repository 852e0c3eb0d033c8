"""
Horizontal and vertical distance maps of nuclei, as HoVer-Net defines them (Graham et al., Medical Image Analysis 2019).

Owns the way from an instance map to an HV map and from an HV map to a picture. Knows nothing of images, crops for
augmentation, channels of a condition or training.

All work is done on *runs*: maximal horizontal stretches of one id within a row. A map of 128 x 128 pixels with 60
nuclei has some 800 of them, so every per-nucleus sum, minimum and maximum is one pass over a short array.
"""

import functools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from .magnification import REFERENCE_MPP, area

MIN_AREA = 30  # px of 40x inside the crop; smaller pieces of a nucleus get no HV values


class _Runs(NamedTuple):
    """Foreground runs in raster order; every field is an int64 array of one entry per run."""

    row: np.ndarray
    start: np.ndarray  # first column
    stop: np.ndarray  # one past the last column
    instance: np.ndarray  # 0 .. number of instances - 1


def gen_instance_hv_map(
    inst_map: np.ndarray, crop_shape: tuple[int, int] | None = None, mpp: float = REFERENCE_MPP
) -> np.ndarray:
    """
    Compute the HV map of an instance map.

    Within each nucleus, x and y count pixels from its centre of mass; negative and positive values are scaled apart,
    so that both axes run from -1 to 1. Parts of one id that do not touch (4-connectivity) are nuclei of their own.
    Centre and scale come from the whole nucleus, also where the crop cuts it.

    :param inst_map: an [H x W] array of integer or boolean type with 0 as background and ids above it.
    :param crop_shape: (h, w) of the central crop that is returned; None for the whole map.
    :param mpp: micrometres a pixel.
    :return: an [h x w x 2] float32 array in [-1, 1], x first; 0 on background and on nuclei with fewer than 30
             pixels of 40x inside the crop.
    :raises ValueError: if inst_map is not 2-D, not of integer type or has negative ids, or is smaller than the crop.
    """
    inst_map = _checked(inst_map)
    top, left, height, width = _central_crop(inst_map.shape, crop_shape)
    hv_map = np.zeros((height, width, 2), np.float32)
    runs = _instance_runs(inst_map)
    if not len(runs.row) or min(inst_map.shape) < 2:  # HoVer-Net leaves what spans a single row or column at zero
        return hv_map

    length = runs.stop - runs.start
    size = np.bincount(runs.instance, length)
    x_centre, x_scale = _centre_and_scale(runs.instance, runs.start, runs.stop - 1, length, size)
    y_centre, y_scale = _centre_and_scale(runs.instance, runs.row, runs.row, length, size)

    row = runs.row - top
    start = np.clip(runs.start - left, 0, width)
    shown = np.where((row >= 0) & (row < height), np.clip(runs.stop - left, 0, width) - start, 0)
    drawn = (shown > 0) & (np.bincount(runs.instance, shown) >= area(MIN_AREA, mpp))[runs.instance]
    row, start, shown, instance = row[drawn], start[drawn], shown[drawn], runs.instance[drawn]

    # HoVer-Net counts pixels from 1 and the centre from 0, so the centre pixel is at +1: hence the 1 in both axes.
    y = _scaled(row + (top + 1) - y_centre[instance], y_scale[:, instance])
    before = np.cumsum(shown) - shown  # pixels drawn by earlier runs
    pixel = np.arange(shown.sum())
    x = np.repeat(start + (left + 1) - x_centre[instance] - before, shown) + pixel
    x = _scaled(x, np.repeat(x_scale[:, instance], shown, axis=1))
    position = np.repeat(row * width + start - before, shown) + pixel
    planes = hv_map.reshape(-1, 2)
    planes[position, 0] = x
    planes[position, 1] = np.repeat(y, shown)
    return hv_map


def vis_hv_map(hv_map: np.ndarray, shape: tuple[int, int] | None = None) -> np.ndarray:
    """
    Render an HV map in the jet colours, horizontal panel left, vertical panel right.

    :param hv_map: an [h x w x 2] array in [-1, 1].
    :param shape: (height, width) of each panel, padded with white round the map; None for the map's own size.
    :return: a [height x 2*width x 3] uint8 array.
    :raises ValueError: if shape is smaller than the map.
    """
    height, width = hv_map.shape[:2]
    shape = (height, width) if shape is None else shape
    missing = shape[0] - height, shape[1] - width
    if min(missing) < 0:
        raise ValueError(f"vis_hv_map: shape {tuple(shape)} is smaller than the HV map ({height}, {width})")
    position = (hv_map.astype(np.float32) + 1) / np.float32(2)
    panels = _jet()[np.clip((position * np.float32(256)).astype(np.int64), 0, 255)]  # [h x w x 2 x 3]
    margins = [(gap // 2, gap - gap // 2) for gap in missing]
    panels = np.pad(panels, [*margins, (0, 0), (0, 0)], constant_values=255)
    return np.concatenate([panels[:, :, 0], panels[:, :, 1]], axis=1)


@functools.cache
def _jet() -> np.ndarray:
    """The jet colour map as a [256 x 3] uint8 array: piecewise linear in each channel, truncated."""
    t = np.arange(256) / 255
    red = np.interp(t, [0, 0.35, 0.66, 0.89, 1], [0, 0, 1, 1, 0.5])
    green = np.interp(t, [0, 0.125, 0.375, 0.64, 0.91, 1], [0, 0, 1, 1, 0, 0])
    blue = np.interp(t, [0, 0.11, 0.34, 0.65, 1], [0.5, 1, 1, 0, 0])
    return (np.stack([red, green, blue], axis=1) * 255).astype(np.uint8)


def _checked(inst_map: np.ndarray) -> np.ndarray:
    inst_map = np.ascontiguousarray(inst_map)
    if inst_map.ndim != 2:
        raise ValueError(f"instance map: expected [H x W], got shape {inst_map.shape}")
    if inst_map.dtype.kind not in "bui":
        raise ValueError(f"instance map: ids must be integers, got {inst_map.dtype}")
    if inst_map.dtype.kind == "i" and inst_map.size and inst_map.min() < 0:
        raise ValueError(f"instance map: ids must not be negative, got {inst_map.min()}")
    return inst_map


def _central_crop(shape: tuple[int, int], crop_shape: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """Top, left, height, width of the central crop; an odd remainder is lost at the bottom and the right."""
    height, width = shape if crop_shape is None else crop_shape
    if height > shape[0] or width > shape[1]:
        raise ValueError(f"crop_shape {tuple(crop_shape)} is larger than the instance map {tuple(shape)}")
    return (shape[0] - height) // 2, (shape[1] - width) // 2, height, width


def _instance_runs(inst_map: np.ndarray) -> _Runs:
    """Cut a map into runs and number its instances: the 4-connected parts of equal ids."""
    width = inst_map.shape[1]
    begins = _run_begins(inst_map)
    first, length, ids = _foreground_runs(inst_map, begins)
    # Two runs of one id, one above the other, first meet in the column where one of them begins.
    meet = (inst_map[1:] == inst_map[:-1]) & (begins[1:] | begins[:-1]) & (inst_map[1:] != 0)
    upper = np.searchsorted(first, np.flatnonzero(meet), "right") - 1
    lower = np.searchsorted(first, np.flatnonzero(meet) + width, "right") - 1
    instance = _components(len(first), upper, lower)

    largest_id = 1 if inst_map.dtype == bool else np.iinfo(inst_map.dtype).max
    if len(ids) and int(ids.max()) + int(instance.max()) + 1 > largest_id:
        inst_map = _split_with_wrap_around(inst_map)
        first, length, ids = _foreground_runs(inst_map, _run_begins(inst_map))
        instance = np.unique(ids, return_inverse=True)[1]
    row, start = np.divmod(first, width)
    return _Runs(row, start, start + length, instance)


def _run_begins(inst_map: np.ndarray) -> np.ndarray:
    """Where a run begins, background included; an [H x W] boolean array."""
    begins = np.ones(inst_map.shape, bool)
    np.not_equal(inst_map[:, 1:], inst_map[:, :-1], out=begins[:, 1:])
    return begins


def _foreground_runs(inst_map: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First position in the raveled map, length and id of each run that is not background."""
    first = np.flatnonzero(begins)
    length = np.diff(first, append=inst_map.size)
    ids = inst_map.ravel()[first]
    nucleus = ids != 0
    return first[nucleus], length[nucleus], ids[nucleus]


def _components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """
    Number the connected components of a graph, in the order of their first nodes.

    In each round every tree that touches one with a smaller root goes under the smallest such root. A nucleus takes
    one to three rounds; this beats scipy.sparse.csgraph by the time that takes to build its matrix.

    :param n: the number of nodes.
    :param a: an [E] int64 array, one end of each edge.
    :param b: an [E] int64 array, the other end.
    :return: an [n] int64 array of component numbers from 0.
    """
    nodes = root = np.arange(n)
    while ((root_a := root[a]) != (root_b := root[b])).any():
        root = root.copy()
        np.minimum.at(root, np.maximum(root_a, root_b), np.minimum(root_a, root_b))
        while ((grandparent := root[root]) != root).any():
            root = grandparent
    return (np.cumsum(root == nodes) - 1)[root]


def _split_with_wrap_around(inst_map: np.ndarray) -> np.ndarray:
    """
    Give all parts of an id but the first a new id above the largest, in the map's own type, as HoVer-Net does.

    Only for maps whose new ids may not fit into their type: there they wrap around, so that a part may get id 0 and
    vanish, or an id that is taken and be drawn as one nucleus with that one. The definition has it so, and its
    numbers are what checkpoints were trained on; a type with room to spare (int32 of our patches) never comes here.
    """
    split = inst_map.copy()
    for inst_id in np.unique(inst_map[inst_map != 0]):
        parts = ndimage.label(split == inst_id)[0]
        moved = parts > 1
        split[moved] = (parts[moved].astype(np.uint64) + np.uint64(split.max())).astype(split.dtype)
    return split


def _centre_and_scale(
    instance: np.ndarray, low: np.ndarray, high: np.ndarray, length: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Centre and scale of every instance along one axis.

    :param instance: the instance of each run.
    :param low: the smallest coordinate of each run.
    :param high: the largest coordinate of each run.
    :param length: the pixels of each run.
    :param size: the pixels of each instance, as exact float64.
    :return: the centres, floor(mean + 0.5), int64 [n]; and what divides negative (row 0) and positive (row 1) offsets
             from them, float32 [2 x n].
    """
    centre = (np.bincount(instance, (low + high) * length) + size) // (2 * size)  # (2 * sum + n) // (2 * n), exact
    centre = centre.astype(np.int64)
    smallest, largest = centre.copy(), centre.copy()
    np.minimum.at(smallest, instance, low)
    np.maximum.at(largest, instance, high)
    scale = np.stack([centre - 1 - smallest, largest + 1 - centre])
    return centre, np.maximum(scale, 1).astype(np.float32)  # 1 where there are no negative offsets, so nothing divides


def _scaled(offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return offset.astype(np.float32) / np.where(offset < 0, scale[0], scale[1])
