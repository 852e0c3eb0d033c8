"""
Labels of a segmenter's own: which of the nuclei that it finds it is sure of, and where it says nothing for sure.

Owns what "sure" means. What is unsure is neither nucleus nor background: a student that learns the teacher's misses as
background learns to miss. So is a nucleus whose class is unsure, where classes are told apart: every nucleus of a class
mask is of one class, and a guess would be learned as one. Leaving it out pixel by pixel keeps every image in; to take
only images without a doubt would take empty ones. Knows no files.
"""

import numpy as np

SURE_NUCLEUS = 0.8  # mean probability of a nucleus's pixels, from which it is kept
SURE_CLASS = 0.8  # mean probability of a class there: above 0.5, most of its pixels are of that class
SURE_BACKGROUND = 0.1  # probability of nucleus, up to which a pixel is background


def confident(
    probability: np.ndarray, inst_map: np.ndarray, of_class: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """
    :param probability: of nucleus, an [H x W] float32 array in [0, 1].
    :param inst_map: the [H x W] nuclei that were made of it, 0 = background.
    :param of_class: of K classes, if it is nucleus: an [H x W x K] float32 array of probabilities; None, or K = 0:
        classes are not asked for.
    :return: the [H x W] int32 map of the nuclei that are kept, with their ids; and [H x W] bool, True where nothing is
        known: in the other nuclei, and wherever else the probability is neither.
    """
    sure = _means(inst_map, probability) >= SURE_NUCLEUS
    if of_class is not None and of_class.shape[-1]:
        sure &= np.max([_means(inst_map, one) for one in np.moveaxis(of_class, -1, 0)], axis=0) >= SURE_CLASS
    sure[0] = False
    kept = np.where(sure[inst_map], inst_map, 0).astype(np.int32)
    ignored = (kept == 0) & ((inst_map > 0) | (probability > SURE_BACKGROUND))
    return kept, ignored


def _means(inst_map: np.ndarray, values: np.ndarray) -> np.ndarray:
    """:return: the mean of the values in each nucleus, by its id; 0 where there is no such id."""
    sizes = np.maximum(np.bincount(inst_map.ravel()), 1)
    return np.bincount(inst_map.ravel(), values.ravel()) / sizes
