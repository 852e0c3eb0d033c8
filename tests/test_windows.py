"""Fields by windows: where these lie, and that no one can see it afterwards."""

import numpy as np
import pytest
import torch as th

from guided_diffusion.samplers import SAMPLERS, Denoised, SampleNoise
from guided_diffusion.schedules import Schedule
from guided_diffusion.windows import Fields, count_windows, starts

SIZE = 16
SCHEDULE = Schedule(np.array([0.1, 0.4, 0.7, 0.9, 1.0]), np.sqrt(1 - np.array([0.1, 0.4, 0.7, 0.9, 1.0]) ** 2))


def test_windows_cover_a_side_evenly():
    assert starts(16, 16, 0.5) == [0]
    assert starts(17, 16, 0.5) == [0, 1]
    assert starts(32, 16, 0.5) == [0, 8, 16]
    assert starts(33, 16, 0.5) == [0, 6, 11, 17]
    assert starts(48, 16, 0.0) == [0, 16, 32]
    assert starts(18, 16, 0.99) == [0, 1, 2]  # no two alike
    for length in range(16, 70):
        for overlap in (0, 0.25, 0.5, 0.8):
            places = starts(length, 16, overlap)
            assert places[0] == 0 and places[-1] == length - 16
            assert np.diff(places).max(initial=0) <= max(1, round(16 * (1 - overlap)))
    assert count_windows(32, 16, 16, 0.5) == 3


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75])
def test_weights_sum_to_one(overlap):
    """A denoiser that is right at each pixel is right in a field; where a window is alone, to the bit."""
    fields = Fields([(16, 16), (41, 23)], SIZE, overlap, batch_size=3)
    x = th.randn(2, 16 * 16 + 41 * 23, generator=th.Generator().manual_seed(0))
    out = fields.blended(lambda windows, i, batch: Denoised(windows, 2 * windows, windows - 1))(x, 0)
    assert th.equal(out.x_start[:, :256], x[:, :256])
    th.testing.assert_close(out.x_start, x, rtol=0, atol=2e-6)
    th.testing.assert_close(out.mean, 2 * x, rtol=0, atol=4e-6)
    th.testing.assert_close(out.log_variance, x - 1, rtol=0, atol=4e-6)


def test_fields_are_parts_of_one_tensor():
    fields = Fields([(16, 20), (18, 17)], SIZE, 0.5, batch_size=5)
    one, other = th.randn(3, 16, 20), th.randn(3, 18, 17)
    x = fields.join([one, other])
    assert x.shape == (3, 16 * 20 + 18 * 17)
    assert th.equal(fields.split(x)[0], one) and th.equal(fields.split(x)[1], other)
    assert [len(batch) for batch in fields.batches] == [5, 1]
    assert th.equal(fields.cut([one, other], 0)[1], one[:, :, 4:20])
    assert th.equal(fields.cut([one, other], 1)[0], other[:, 2:18, 1:17])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_of_pixels_samples_the_same_with_and_without_windows(name):
    """That of Gaussian data with a mean and variance of its own at each place."""
    mean, variance = th.linspace(-0.5, 0.5, 3 * 37 * 30).view(3, 37, 30), 0.3
    level = list(zip(SCHEDULE.alphas, SCHEDULE.sigmas))

    def denoise(x, i, mean):
        alpha, sigma = level[i]
        x_start = mean + alpha * variance * (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        return Denoised(x_start, 0.9 * x_start, th.full_like(x, -3.0))

    fields = Fields([(37, 30)], SIZE, 0.5, batch_size=4)
    by_windows = fields.blended(lambda windows, i, batch: denoise(windows, i, fields.cut([mean], batch)))

    def sample(denoiser):
        noise = SampleNoise(0, [3])
        noise_fn = lambda like: noise.draw(like.shape)[0]  # noqa: E731
        *_, (x, _) = SAMPLERS[name](denoiser, noise_fn(mean.flatten(1)), SCHEDULE, noise_fn)
        return x

    whole = sample(lambda x, i: denoise(x, i, mean.flatten(1)))
    assert whole.std() > 0.1
    th.testing.assert_close(sample(by_windows), whole, rtol=0, atol=1e-5)


def border_ratio(image, places):
    """Mean gradient across the borders of windows over that elsewhere, of a [C x H x W] image, along its width."""
    gradient = image.diff(dim=2).abs().mean((0, 1))
    borders = sorted({edge - 1 for place in places for edge in (place, place + SIZE)} - {-1, image.shape[2] - 1})
    elsewhere = np.setdiff1d(np.arange(len(gradient)), borders)
    return float(gradient[borders].mean() / gradient[elsewhere].mean())


@pytest.mark.parametrize(("overlap", "seams"), [(0.5, False), (0.25, False), (0.0, True)])
def test_no_seams_where_windows_disagree(overlap, seams):
    """Each window's brightness is off by a draw of its own, and its outermost pixels by more."""
    fields = Fields([(128, 400)], SIZE, overlap, batch_size=64)
    generator = th.Generator().manual_seed(0)
    rim = th.zeros(SIZE, SIZE)
    rim[[0, -1]] = rim[:, [0, -1]] = 0.2

    def denoise(windows, i, batch):
        off = 0.3 * th.randn(len(windows), 1, 1, 1, generator=generator) + rim
        return Denoised(windows + off, windows, windows)

    texture = 0.2 * th.randn(3, 128 * 400, generator=generator)
    (made,) = fields.split(fields.blended(denoise)(texture, 0).x_start)
    ratio = border_ratio(made, starts(400, SIZE, overlap))
    assert ratio > 1.5 if seams else abs(ratio - 1) < 0.05


def test_the_denoiser_is_shown_a_batch_at_a_time():
    """So that memory does not grow with the number of windows."""
    fields = Fields([(64, 64), (32, 32)], SIZE, 0.5, batch_size=7)
    seen = []
    fields.blended(lambda windows, i, batch: seen.append(windows.shape) or Denoised(*[windows] * 3))(
        th.zeros(3, 64 * 64 + 32 * 32), 0
    )
    assert seen == [(7, 3, 16, 16)] * 8 + [(2, 3, 16, 16)]
