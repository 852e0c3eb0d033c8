"""What is wrong with the nuclei of an instance mask that comes without an image. Knows nothing of where it is from."""

import numpy as np
from scipy import ndimage

LEAST = 10.0  # pixels at 40x: what is smaller is no nucleus
_ANY_NEIGHBOUR = 2  # pixels that touch at a corner are of one part


def fragments(inst_map: np.ndarray, least: float) -> list[tuple[int, int]]:
    """
    Find parts of nuclei that are too small to be any. Those that the mask's border cuts may be of any size.

    :param inst_map: an [H x W] integer array of instance ids, 0 outside nuclei.
    :param least: the smallest size that is none, in pixels.
    :return: the id and the size in pixels of each.
    """
    parts, ids = _parts(inst_map)
    sizes, small = _sizes(parts, least)
    return [(int(ids[part]), int(sizes[part])) for part in np.flatnonzero(small)]


def without_fragments(inst_map: np.ndarray, least: float) -> np.ndarray:
    """:return: the map without what `fragments` finds: a nucleus that is left without a part keeps the others."""
    parts, _ = _parts(inst_map)
    return np.where(_sizes(parts, least)[1][parts], 0, inst_map)


def _sizes(parts: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each part, by its number, the size and whether it is a fragment."""
    sizes = np.bincount(parts.ravel())
    small = sizes < least
    small[0] = False
    small[np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])] = False
    return sizes, small


def oddities(inst_map: np.ndarray) -> str:
    """
    Say what may be meant, but is unlike a nucleus.

    :param inst_map: see fragments.
    :return: which ids have several parts, and which a hole, of each kind the first; "" where there are none.
    """
    _, ids = _parts(inst_map)
    found, counts = np.unique(ids[1:], return_counts=True)
    said = []
    for what, those in (("several parts", found[counts > 1].tolist()), ("a hole", _with_holes(inst_map))):
        if those:
            others = f" and {len(those) - 1} more have" if len(those) > 1 else " has"
            said.append(f"nucleus {those[0]}{others} {what}")
    return "; ".join(said)


def _parts(inst_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected parts of equal id, [H x W], numbered from 1, and the id of each by its number; 0 is background."""
    from skimage.measure import label  # which takes as long to import as all else of a program's start

    parts = label(inst_map, background=0, connectivity=_ANY_NEIGHBOUR)
    ids = np.zeros(parts.max() + 1, np.int64)
    ids[parts] = inst_map
    return parts, ids


def _with_holes(inst_map: np.ndarray) -> list[int]:
    """The ids of nuclei that lie all around some background."""
    # A hole's pixels touch at their sides, or a ring that closes at corners alone would leak.
    gaps = ndimage.label(inst_map == 0)[0]
    at_border = np.unique(np.concatenate([gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]]))
    found = set()
    for number, where in enumerate(ndimage.find_objects(gaps), 1):
        if number not in at_border:
            wider = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in where)
            around = ndimage.binary_dilation(gaps[wider] == number) & (inst_map[wider] != 0)
            ids = np.unique(inst_map[wider][around])
            if len(ids) == 1:
                found.add(int(ids[0]))
    return sorted(found)
