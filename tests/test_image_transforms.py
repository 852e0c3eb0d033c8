"""Crops and symmetries act on all arrays alike."""

import numpy as np
import pytest

from guided_diffusion.image_transforms import center_crop, random_crop, random_flip_turn


def arrays(height=9, width=12):
    ids = np.arange(height * width).reshape(height, width)
    return np.repeat(ids[..., None], 3, axis=2), ids


def test_center_crop_leaves_the_odd_pixel_at_the_end():
    image, ids = center_crop(arrays(9, 12), 4)
    np.testing.assert_array_equal(ids, arrays(9, 12)[1][2:6, 4:8])
    np.testing.assert_array_equal(image[..., 0], ids)


def test_random_crop_reaches_every_place_and_keeps_arrays_together():
    rng = np.random.default_rng(0)
    corners = set()
    for _ in range(400):
        image, ids = random_crop(arrays(6, 5), 4, rng)
        np.testing.assert_array_equal(image[..., 0], ids)
        corners.add(int(ids[0, 0]))
    assert corners == {0, 1, 5, 6, 10, 11}


def test_crop_of_the_whole():
    ids = random_crop(arrays(5, 5), 5, np.random.default_rng(0))[1]
    np.testing.assert_array_equal(ids, arrays(5, 5)[1])


def test_all_eight_symmetries():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        image, ids = random_flip_turn(arrays(3, 3), rng)
        np.testing.assert_array_equal(image[..., 0], ids)
        seen.add(ids.tobytes())
    base = arrays(3, 3)[1]
    expected = {np.ascontiguousarray(np.rot90(b, k)).tobytes() for b in (base, base[:, ::-1]) for k in range(4)}
    assert seen == expected and len(seen) == 8


@pytest.mark.parametrize("transform", [lambda a, r: random_crop(a, 4, r), random_flip_turn])
def test_equal_generators_give_equal_results(transform):
    first, second = (transform(arrays(), np.random.default_rng(3)) for _ in range(2))
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)
