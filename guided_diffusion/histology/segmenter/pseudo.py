"""
Labels of a segmenter's own: which of the nuclei that it finds it is sure of, and where it says nothing for sure.

Owns what "sure" means. What is unsure is neither nucleus nor background: a student that learns the teacher's misses as
background learns to miss. Leaving it out pixel by pixel keeps every image in; to take only images without a doubt would
take empty ones. Knows no files.
"""

import numpy as np

SURE_NUCLEUS = 0.8  # mean probability of a nucleus's pixels, from which it is kept
SURE_BACKGROUND = 0.1  # probability of nucleus, up to which a pixel is background


def confident(probability: np.ndarray, inst_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param probability: of nucleus, an [H x W] float32 array in [0, 1].
    :param inst_map: the [H x W] nuclei that were made of it, 0 = background.
    :return: the [H x W] int32 map of the nuclei that are kept, with their ids; and [H x W] bool, True where nothing is
        known: in the other nuclei, and wherever else the probability is neither.
    """
    sizes = np.maximum(np.bincount(inst_map.ravel()), 1)
    means = np.bincount(inst_map.ravel(), probability.ravel()) / sizes
    sure = means >= SURE_NUCLEUS
    sure[0] = False
    kept = np.where(sure[inst_map], inst_map, 0).astype(np.int32)
    ignored = (kept == 0) & ((inst_map > 0) | (probability > SURE_BACKGROUND))
    return kept, ignored
