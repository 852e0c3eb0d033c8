"""
Stains of H&E slides: their colours, amounts, and how these vary from slide to slide. For the core and histology alike.

An amount of stain lies on the scale of optical density, -log10((value + 1) / 256), where stains add up (Beer-Lambert).
"""

import warnings
from collections.abc import Iterable

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


def haematoxylin(image: np.ndarray) -> np.ndarray:
    """:return: how much of it each pixel of an [H x W x 3] uint8 image has, [H x W], in optical density."""
    return optical_density(image) @ np.linalg.inv(STAINS)[:, 0]


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


def colour_statistics(images: Iterable[np.ndarray]) -> np.ndarray:
    """
    :param images: [H x W x 3] uint8 arrays, as of a slide.
    :return: [2 x 3] float64: mean and standard deviation of their pixels in CIELAB.
    """
    from skimage.color import rgb2lab  # which takes long to import, for this alone

    sums = [(lab.sum(0), (lab**2).sum(0), len(lab)) for lab in (rgb2lab(image).reshape(-1, 3) for image in images)]
    total, squares, count = map(sum, zip(*sums))
    return np.stack([total / count, np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))])


def transfer_colours(image: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """
    Give an image the colours of others by mean and deviation (Reinhard et al., IEEE Computer Graphics and Applications
    2001), in CIELAB, as is usual for H&E.

    :param image: an [H x W x 3] uint8 array.
    :param source: colour_statistics of what the image is of; target: of what it is to look like.
    :return: a new array of the same kind.
    """
    from skimage.color import lab2rgb, rgb2lab

    scale = target[1] / np.maximum(source[1], 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of colours that no screen shows, which are clipped
        changed = lab2rgb((rgb2lab(image) - source[0]) * scale + target[0])
    return np.rint(255 * np.clip(changed, 0, 1)).astype(np.uint8)
