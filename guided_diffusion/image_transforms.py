"""
Crops, flips and turns of an image together with its masks, from an explicit generator.

Knows nothing of files.
"""

import numpy as np

Arrays = tuple[np.ndarray, ...]


def center_crop(arrays: Arrays, size: int) -> Arrays:
    """
    Cut a square out of the middle; where a pixel is over, it stays at the bottom or right.

    :param arrays: [H x W] or [H x W x C] arrays of equal H and W, each at least size.
    :param size: the side of the square, in pixels.
    """
    height, width = arrays[0].shape[:2]
    return _crop(arrays, (height - size) // 2, (width - size) // 2, size)


def random_crop(arrays: Arrays, size: int, rng: np.random.Generator) -> Arrays:
    """Cut a square out of a random place, every one alike. Parameters as center_crop's."""
    height, width = arrays[0].shape[:2]
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return _crop(arrays, int(top), int(left), size)


def random_flip_turn(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    """
    Apply one of the square's eight symmetries, every one alike.

    :param arrays: [H x W] or [H x W x C] arrays.
    """
    symmetry = int(rng.integers(8))
    turned = tuple(np.rot90(a, symmetry % 4) for a in arrays)
    return tuple(a[:, ::-1] for a in turned) if symmetry >= 4 else turned


def _crop(arrays: Arrays, top: int, left: int, size: int) -> Arrays:
    return tuple(a[top : top + size, left : left + size] for a in arrays)
