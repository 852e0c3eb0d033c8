"""Crops and symmetries act on all arrays alike."""

import numpy as np
import pytest

from guided_diffusion.data_util import STAINS
from guided_diffusion.image_transforms import center_crop, jitter_stains, random_crop, random_flip_turn


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


def stain_amounts(image: np.ndarray) -> np.ndarray:
    return -np.log10((image.astype(np.float64) + 1) / 256) @ np.linalg.inv(STAINS)


def test_jitter_scales_and_shifts_each_stain_alike_in_all_pixels():
    # Amounts at which no channel of any jitter leaves the range of a byte.
    amounts = np.random.default_rng(0).uniform(0.1, 0.5, (64, 64, 3)) * (1, 1, 0.4)
    image = np.rint(256 * 10 ** -(amounts @ STAINS) - 1).astype(np.uint8)
    for seed in range(5):
        changed = jitter_stains(image, 0.35, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        a, b = rng.uniform(0.65, 1.35, 3), rng.uniform(-0.05, 0.05, 3)
        np.testing.assert_allclose(stain_amounts(changed), stain_amounts(image) * a + b, atol=0.02)
    same = jitter_stains(image, 0.0, np.random.default_rng(0))
    assert abs(same.astype(int) - image).max() <= 1 and same is not image
    white = np.full((2, 2, 3), 255, np.uint8)
    assert jitter_stains(white, 0.9, np.random.default_rng(1)).min() > 150
