"""
Stains of H&E slides: their colours, amounts, and how these vary from slide to slide. For the core and histology alike.

An amount of stain lies on the scale of optical density, -log10((value + 1) / 256), where stains add up (Beer-Lambert).
"""

import numpy as np

# Haematoxylin, eosin and DAB as optical densities of red, green and blue (Ruifrok and Johnston 2001).
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
# The first two as that paper rounds them, by which feature files of the backbone `stain` are made.
ROUNDED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
OD_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # that describe how amounts are spread over an image


def optical_density(values: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """
    :param values: a uint8 array.
    :param dtype: to compute in.
    :return: their optical densities, an array of the same shape: 0 where it is white, 2.4 where it is black.
    """
    return -np.log10((np.arange(256, dtype=dtype) + 1) / 256)[values]


def jitter_stains(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """
    Change how much there is of each stain, c to a * c + b (Tellez et al., IEEE TMI 2018).

    :param image: an [H x W x 3] uint8 array.
    :param amount: in [0, 1): a is drawn from 1 - amount to 1 + amount, b from a seventh of it, in optical density, on
        either side of 0.
    :return: a new array of the same kind.
    """
    a, b = rng.uniform(1 - amount, 1 + amount, 3), rng.uniform(-amount / 7, amount / 7, 3)
    mixing = (np.linalg.inv(STAINS) * a) @ STAINS
    changed = optical_density(image, np.float32) @ mixing.astype(np.float32) + (b @ STAINS).astype(np.float32)
    return np.clip(np.rint(256 * 10**-changed - 1), 0, 255).astype(np.uint8)
