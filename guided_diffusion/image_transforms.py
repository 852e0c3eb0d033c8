"""
Crops, flips and turns of an image together with its masks, and jitter of its stains, all from an explicit generator.

Knows nothing of files.
"""

import numpy as np

from .data_util import STAINS

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


def jitter_stains(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """
    Change how much there is of each stain, c to a * c + b (Tellez et al., IEEE TMI 2018).

    :param image: an [H x W x 3] uint8 array.
    :param amount: in [0, 1): a is drawn from 1 - amount to 1 + amount, b from a seventh of it, in optical density, on
        either side of 0.
    :return: a new array of the same kind.
    """
    a, b = rng.uniform(1 - amount, 1 + amount, 3), rng.uniform(-amount / 7, amount / 7, 3)
    density = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)[image]
    mixing = (np.linalg.inv(STAINS) * a) @ STAINS
    changed = density @ mixing.astype(np.float32) + (b @ STAINS).astype(np.float32)
    return np.clip(np.rint(256 * 10**-changed - 1), 0, 255).astype(np.uint8)


def _crop(arrays: Arrays, top: int, left: int, size: int) -> Arrays:
    return tuple(a[top : top + size, left : left + size] for a in arrays)
