"""Image metrics against closed forms, brute force and cases whose answer is plain."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from guided_diffusion.histology.evaluation import image_metrics as metrics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def image(rng, size=48) -> np.ndarray:
    """Blobs of several sizes in colour."""
    small = rng.integers(0, 256, (size // 8, size // 8, 3))
    return np.kron(small, np.ones((8, 8, 1))).astype(np.uint8)


def test_nearest(rng):
    a, b = rng.normal(size=(7, 5)), rng.normal(size=(9, 5))
    direct = np.linalg.norm(a[:, None] - b[None], axis=2)
    indices, found = metrics.nearest(a, b, 3)
    np.testing.assert_array_equal(indices, np.argsort(direct, axis=1)[:, :3])
    np.testing.assert_allclose(found, np.sort(direct, axis=1)[:, :3], atol=1e-12)


def test_kernel_distance(rng):
    """Unbiased: 0 lies within the interval for equal distributions; and equal to the formula on one whole subset."""
    x, same, other = rng.normal(size=(300, 8)), rng.normal(size=(300, 8)), rng.normal(size=(300, 8)) + 0.7
    near, far = (metrics.kernel_distance(x, y, np.random.default_rng(1)) for y in (same, other))
    assert near.low < 0 < near.high and abs(near.value) < 0.05
    assert far.low > near.high and far.low < far.value < far.high
    assert metrics.kernel_distance(x, other, np.random.default_rng(1)) == far

    def kernel(a, b):
        return (a @ b.T / 8 + 1) ** 3

    n = 150
    expected = []
    draws = np.random.default_rng(1)
    for _ in range(metrics.KID_SUBSETS):
        a, b = (z[draws.choice(300, n, replace=False)] for z in (x, other))
        own = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(a, a), kernel(b, b)))
        expected.append(own - 2 * kernel(a, b).mean())
    assert far.value == pytest.approx(np.mean(expected), rel=1e-6)


def test_kernel_distance_of_too_few(rng):
    with pytest.raises(ValueError, match="at least 4 images a side, and there are 3"):
        metrics.kernel_distance(rng.normal(size=(9, 2)), rng.normal(size=(3, 2)), rng)


def test_frechet_distance(rng):
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(150, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = gap + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_needs_as_many_images_as_features(rng):
    enough = metrics.images_for_covariance(6)
    assert metrics.frechet_distance(rng.normal(size=(enough, 6)), rng.normal(size=(enough, 6))) is not None
    assert metrics.frechet_distance(rng.normal(size=(enough, 6)), rng.normal(size=(enough - 1, 6))) is None


def test_precision_recall_by_hand():
    real = np.array([[0.0], [1], [2], [3]])  # third neighbours: 3, 2, 2 and 3 away
    assert metrics.precision_recall(real, real) == (1, 1)
    synthetic = np.array([[1.5], [1.6], [1.7], [50]])
    precision, recall = metrics.precision_recall(real, synthetic)
    assert precision == 0.75 and recall == 1  # 50's neighbours are far, so its ball holds everything
    assert metrics.precision_recall(real, real + 100) == (0, 0)
    with pytest.raises(ValueError, match="more than 3 images"):
        metrics.precision_recall(real, real[:3])


def test_colour_error(rng):
    picture = image(rng)
    scattered = rng.permutation(picture.reshape(-1, 3)).reshape(picture.shape)
    assert metrics.colour_error(picture, scattered) == (pytest.approx(0, abs=1e-12), 0)
    flat = np.full((4, 4, 3), 99, np.uint8)
    shift, grey = metrics.colour_error(flat, np.full((8, 2, 3), 109, np.uint8))
    assert grey == 10 and shift == pytest.approx(np.sqrt(3) * np.log10(110 / 100))


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("mirror", [False, True])
def test_a_copy_is_found_however_it_lies(rng, turn, mirror):
    picture = image(rng)
    copy = np.rot90(np.roll(picture[:, ::-1] if mirror else picture, (6, -15), axis=(0, 1)), turn)
    others = np.stack([metrics.thumbnail(picture), *(metrics.thumbnail(image(rng)) for _ in range(5))])
    away = metrics.aligned_distance(metrics.thumbnail(copy), others)
    assert away[0] < 0.02 and away[1:].min() > 0.3
    assert metrics.aligned_distance(others[0], others[:1])[0] == pytest.approx(0, abs=1e-6)


def test_thumbnail_is_blind_to_brightness_and_defined_for_a_blank():
    blank = metrics.thumbnail(np.full((40, 40, 3), 200, np.uint8))
    assert blank.shape == (32, 32) and not blank.any()


def test_diversity():
    features = np.array([[0.0, 0], [3, 4], [1, 1], [1, 1], [9, 9]])
    assert metrics.diversity(features, ["a", "a", "b", "b", "c"]) == 2.5
    assert metrics.diversity(features, list("abcde")) is None
