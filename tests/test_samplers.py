"""Samplers on data whose optimal denoiser is known, and the noise that they are given."""

import numpy as np
import pytest
import torch as th

from guided_diffusion import streams
from guided_diffusion.samplers import SAMPLERS, Denoised, SampleNoise
from guided_diffusion.schedules import Schedule

# ---- noise ----


def test_noise_of_a_sample_is_its_own_generators():
    generators = [streams.generator("noise of a sample", 3, index) for index in (7, 4)]
    noise = SampleNoise(3, [7, 4])
    for shape in [(1, 2, 2), (3,)]:  # successive draws go on in each stream
        expected = th.stack([th.randn(shape, generator=g) for g in generators])
        assert th.equal(noise.draw(shape), expected)
    like = th.zeros(2, 3, 2, dtype=th.bfloat16)
    assert th.equal(noise(like), th.stack([th.randn(3, 2, generator=g) for g in generators]))


def test_noise_is_standard_normal_and_uncorrelated():
    n = 4000
    draws = SampleNoise(0, range(8)).draw((n,))
    bound = 5 / n**0.5
    assert draws.mean(1).abs().max() < bound
    covariance = draws.cov()
    assert (covariance - th.eye(8)).abs().max() < bound * 2**0.5


def test_noise_depends_on_seed_and_number():
    draws = {(seed, index): SampleNoise(seed, [index]).draw((4,)) for seed in range(3) for index in range(3)}
    assert len({tuple(values.flatten().tolist()) for values in draws.values()}) == 9
    assert th.equal(SampleNoise(1, [2]).draw((4,)), draws[1, 2])


# ---- exact oracles: data whose optimal denoiser is known ----

MEAN, STD = 0.3, 0.4


def schedule_at(lambdas):
    """Points of a variance-preserving path."""
    alphas = 1 / np.sqrt(1 + np.exp(-2 * np.asarray(lambdas)))
    return Schedule(np.append(alphas, 1.0), np.append(np.sqrt(1 - alphas**2), 0.0))


def oracle_schedule(steps, low=-4.0, high=9.0):
    return schedule_at(np.linspace(low, high, steps))


def gaussian(x, alpha, sigma):
    """E[x_0 | x_t] where x_0 is N(MEAN, STD^2)."""
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def mixture(x, alpha, sigma):
    """E[x_0 | x_t] where x_0 is -0.8 with probability 0.3 and 0.5 with 0.7, each blurred by 0.05."""
    variance = alpha**2 * 0.05**2 + sigma**2
    centres, weights = th.tensor([-0.8, 0.5], dtype=x.dtype), th.tensor([0.3, 0.7], dtype=x.dtype)
    distance = x[..., None] - alpha * centres
    share = (weights.log() - distance**2 / (2 * variance)).softmax(dim=-1)
    return (share * (centres + alpha * 0.05**2 / variance * distance)).sum(dim=-1)


def posterior_of(schedule, expected=gaussian, share=1.0):
    """
    A denoiser that predicts x_{t-1}, too, by Bayes' rule (Ho et al. 2020, equations 6 and 7).

    :param share: of the way from the smallest to the largest variance, in logarithms.
    """
    levels = schedule.alphas**2

    def denoiser(x, i):
        x_start = expected(x, schedule.alphas[i], schedule.sigmas[i])
        here, there = levels[i], levels[i + 1]
        beta = 1 - here / there
        mean = (np.sqrt(there) * beta * x_start + np.sqrt(here / there) * (1 - there) * x) / (1 - here)
        smallest = beta * max(1 - there, 1e-12) / (1 - here)
        return Denoised(x_start, mean, th.tensor(share * np.log(beta) + (1 - share) * np.log(smallest)))

    return denoiser


def run(name, denoiser, x, schedule, noise_fn=th.randn_like, **options):
    """The image that a sampler ends on."""
    *_, (image, _) = SAMPLERS[name](denoiser, x, schedule, noise_fn, **options)
    return image


def solve(name, schedule, expected=gaussian, count=50_000, **options):
    generator = th.Generator().manual_seed(0)
    x = th.randn(count, generator=generator, dtype=th.float64)
    noise = lambda like: th.randn(like.shape, generator=generator, dtype=like.dtype)  # noqa: E731
    return x, run(name, posterior_of(schedule, expected), x, schedule, noise, **options)


def ode_error(name, steps):
    """The largest distance from the probability flow's exact solution for Gaussian data."""
    schedule = oracle_schedule(steps)
    x, end = solve(name, schedule, count=200)
    alpha, sigma = schedule.alphas[0], schedule.sigmas[0]
    exact = MEAN + STD * (x - alpha * MEAN) / np.sqrt(alpha**2 * STD**2 + sigma**2)
    return float((end - exact).abs().max())


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("unipc", 2)])
def test_error_falls_at_the_order(name, order):
    errors = [ode_error(name, steps) for steps in (20, 40, 80, 160)]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert rates[-1] > order - 0.2, (errors, rates)
    assert order > 1 or rates[-1] < 1.2


def test_higher_orders_beat_ddim_at_25_steps():
    first = ode_error("ddim", 25)
    assert ode_error("dpmpp_2m", 25) < first / 3 and ode_error("unipc", 25) < first / 3


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_first_order_is_ddim(name):
    # The first step and the last are of first order; two steps have no others.
    schedule = oracle_schedule(2)
    _, ours = solve(name, schedule, count=100)
    _, ddim = solve("ddim", schedule, count=100)
    if name == "dpmpp_2m":
        th.testing.assert_close(ours, ddim)
    one = oracle_schedule(1)
    th.testing.assert_close(solve(name, one, count=100)[1], solve("ddim", one, count=100)[1])


@pytest.mark.parametrize("ratio", [1.4, 1.9, 2.1, 5.0])
def test_steps_too_long_to_extrapolate_are_of_first_order(ratio):
    """The second step is `ratio` times as long as the first: beyond 2, only where it begins may matter."""
    length = 0.8
    schedule = schedule_at([-1.0, -1.0 + length, -1.0 + length * (1 + ratio)])
    seen = []
    for first in (0.0, 0.7):  # x_0 as it is predicted before the first step

        def denoiser(x, i, first=first):
            if i == 2:
                seen.append(x)
            return Denoised(th.full_like(x, (first, 0.2, 0.1)[i]))

        # The first step leads to 0 from here, whatever is predicted: both come to the second from the same place.
        start = th.zeros(4, dtype=th.float64)
        start += schedule.alphas[1] * np.expm1(-length) * first / (schedule.sigmas[1] / schedule.sigmas[0])
        run("dpmpp_2m", denoiser, start, schedule)
    assert th.allclose(*seen, atol=1e-12) == (ratio > 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_tells_where_it_came_and_by_what(name):
    schedule, seen = oracle_schedule(6), []

    def denoiser(x, i):
        seen.append((x, i))
        return posterior_of(schedule)(x, i)

    x = th.randn(5, dtype=th.float64, generator=th.Generator().manual_seed(0))
    steps = list(SAMPLERS[name](denoiser, x, schedule, th.zeros_like))
    assert [i for _, i in seen] == list(range(6)) and th.equal(seen[0][0], x)
    for (after, x_start), (before, i), following in zip(steps, seen, [*seen[1:], None]):
        assert th.equal(x_start, gaussian(before, schedule.alphas[i], schedule.sigmas[i]))
        assert following is None or th.equal(after, following[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_mean_and_variance_of_a_gaussian(name):
    _, end = solve(name, oracle_schedule(300, high=7.0))
    assert abs(float(end.mean()) - MEAN) < 0.01
    assert abs(float(end.std()) - STD) < 0.01


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_keeps_the_variance(eta):
    _, end = solve("ddim", oracle_schedule(300, high=7.0), eta=eta)
    assert abs(float(end.mean()) - MEAN) < 0.01 and abs(float(end.std()) - STD) < 0.01


def test_ddim_with_eta_one_is_ddpm_with_the_smaller_variance():
    schedule = oracle_schedule(30)
    denoiser = posterior_of(schedule, share=0.0)
    x = th.randn(50, dtype=th.float64)
    images = []
    for name, options in (("ddim", {"eta": 1.0}), ("ddpm", {})):
        generator = th.Generator().manual_seed(1)
        noise = lambda like, g=generator: th.randn(like.shape, generator=g, dtype=like.dtype)  # noqa: E731
        images.append(run(name, denoiser, x, schedule, noise, **options))
    th.testing.assert_close(*images)


@pytest.mark.parametrize("name", SAMPLERS)
def test_both_modes_of_a_mixture(name):
    _, end = solve(name, oracle_schedule(200, high=7.0), mixture, count=20_000)
    right = end > 0
    assert abs(float(right.double().mean()) - 0.7) < 0.02
    assert abs(float(end[right].mean()) - 0.5) < 0.01 and abs(float(end[~right].mean()) + 0.8) < 0.01
