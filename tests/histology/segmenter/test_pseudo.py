"""Which of a segmenter's own nuclei are kept, and where nothing is known."""

import numpy as np

from guided_diffusion.histology.segmenter.pseudo import confident


def test_sure_nuclei_are_kept_and_doubt_is_no_background():
    probability = np.full((8, 12), 0.05, np.float32)
    inst_map = np.zeros((8, 12), np.int32)
    for number, (column, value) in enumerate(((0, 0.9), (4, 0.6)), 1):
        probability[2:6, column : column + 3] = value
        inst_map[2:6, column : column + 3] = number
    probability[0, :] = 0.3  # a nucleus that it hardly sees
    kept, ignored = confident(probability, inst_map)
    assert kept.dtype == np.int32 and np.array_equal(kept, np.where(inst_map == 1, 1, 0))
    expected = inst_map == 2
    expected[0] = True
    assert np.array_equal(ignored, expected)
    assert all(map(np.array_equal, confident(probability, inst_map, np.empty((8, 12, 0))), (kept, ignored)))
    nothing = confident(np.zeros((4, 4), np.float32), np.zeros((4, 4), np.int32))
    assert not nothing[0].any() and not nothing[1].any()


def test_a_nucleus_of_unsure_class_is_as_little_known():
    probability, inst_map = np.zeros((2, 12), np.float32), np.repeat([[0, 1, 2, 4]], 3, axis=1).repeat(2, axis=0)
    probability[inst_map > 0] = 0.9
    of_class = np.zeros((2, 12, 3), np.float32)
    of_class[..., 1] = np.repeat([0.2, 0.9, 0.75, 0.1], 3)  # the third nucleus has no class that all pixels agree on
    of_class[..., 2] = 1 - of_class[..., 1]
    of_class[0, 9:] = 1, 0, 0
    kept, ignored = confident(probability, inst_map, of_class)
    assert np.array_equal(kept, np.where(inst_map == 1, 1, 0)) and np.array_equal(ignored, inst_map > 1)
