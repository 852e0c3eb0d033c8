"""Stains: amounts add up, jitter changes each alike in all pixels, and colours are transferred by their statistics."""

import numpy as np
import pytest
from skimage.color import rgb2lab

from guided_diffusion.stains import STAINS, colour_statistics, jitter_stains, optical_density, transfer_colours


def stain_amounts(image: np.ndarray) -> np.ndarray:
    return optical_density(image) @ np.linalg.inv(STAINS)


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


def test_jitter_leaves_glass_nearly_white():
    image = np.array([[[110, 60, 130], [225, 160, 200], [250, 250, 250]]], np.uint8)
    changed = [jitter_stains(image, 0.35, np.random.default_rng(k)).astype(int) for k in range(50)]
    spread = np.std([c[0] for c in changed], axis=0)
    assert (spread[:2] > 3).all() and np.abs(np.mean([c[0, 2] for c in changed]) - 250) < 6


def test_optical_density():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(optical_density(values), -np.log10((values.astype(np.float64) + 1) / 256))
    assert optical_density(values, np.float32).dtype == np.float32
    assert optical_density(values)[-1, -1] == 0


def test_what_an_image_becomes_is_a_matter_of_its_seed_alone():
    """Pinned: runs of training and of the segmenter that go on after an update must see the same images."""
    image = np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8)
    assert jitter_stains(image, 0.35, np.random.default_rng(1)).tolist() == [
        [[88, 138, 186], [204, 201, 233]],
        [[17, 255, 49], [217, 255, 156]],
    ]


def test_colours_are_transferred_by_mean_and_deviation():
    rng = np.random.default_rng(0)
    pale, dark = (
        np.clip(rng.normal(mean, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
        for mean in ((200, 160, 190), (120, 90, 150))
    )
    lab = rgb2lab(pale).reshape(-1, 3)
    source, target = (colour_statistics([image[:20], image[20:]]) for image in (pale, dark))
    assert source == pytest.approx(np.stack([lab.mean(0), lab.std(0)]))
    assert colour_statistics([transfer_colours(pale, source, target)]) == pytest.approx(target, abs=0.3)
    assert np.abs(transfer_colours(pale, source, source).astype(int) - pale).max() <= 1
