"""Betas by name, and the timesteps that samplers with fewer steps keep."""

import numpy as np
import pytest

from guided_diffusion import gaussian_diffusion, schedules
from guided_diffusion.schedules import (
    LAMBDA_MIN,
    NOISE_SCHEDULES,
    Schedule,
    betas_for_alpha_bar,
    even_timesteps,
    get_named_beta_schedule,
    timesteps_even_in_lambda,
)

COSINE = np.cumprod(1 - get_named_beta_schedule("cosine", 1000))


def test_linear_schedule():
    np.testing.assert_allclose(get_named_beta_schedule("linear", 1000), 1e-4 + np.arange(1000) * 0.0199 / 999)
    # Half the steps, each twice as long.
    np.testing.assert_allclose(get_named_beta_schedule("linear", 500)[[0, -1]], [2e-4, 0.04])


def test_cosine_schedule_follows_the_cosine_to_its_cap():
    betas = get_named_beta_schedule("cosine", 1000)
    u = np.arange(1001) / 1000
    level = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], (level / level[0])[1:-1], rtol=1e-9)
    assert betas[-1] == 0.999


def test_betas_for_alpha_bar():
    betas = betas_for_alpha_bar(4, lambda u: 1 - u**2, max_beta=0.6)
    np.testing.assert_allclose(betas, [1 / 16, 1 - 12 / 15, 1 - 7 / 12, 0.6])


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"--noise_schedule quadratic.*linear, cosine"):
        get_named_beta_schedule("quadratic", 10)
    assert all(len(get_named_beta_schedule(name, 30)) == 30 for name in NOISE_SCHEDULES)


def test_linear_schedule_too_short():
    # Twenty steps would need a beta of one: all signal gone at once.
    with pytest.raises(ValueError, match=r"--diffusion_steps 20 .*linear"):
        get_named_beta_schedule("linear", 20)
    assert get_named_beta_schedule("linear", 21).max() < 1
    assert get_named_beta_schedule("cosine", 2).max() < 1


def test_the_reference_has_them_in_gaussian_diffusion():
    for name in ("get_named_beta_schedule", "betas_for_alpha_bar"):
        assert getattr(gaussian_diffusion, name) is getattr(schedules, name)


# ---- what samplers visit ----


def test_schedule_of_a_process():
    schedule = Schedule.of(np.array([0.9, 0.5, 0.1]))
    assert len(schedule) == 3
    np.testing.assert_allclose(schedule.alphas**2, [0.1, 0.5, 0.9, 1.0])
    np.testing.assert_allclose(schedule.sigmas**2, [0.9, 0.5, 0.1, 0.0])
    np.testing.assert_allclose(schedule.lambdas, [0.5 * np.log(1 / 9), 0.0, 0.5 * np.log(9), np.inf])


def test_even_timesteps():
    assert even_timesteps(COSINE, 1) == [999]
    assert even_timesteps(COSINE, 4) == [0, 333, 666, 999]
    for steps in (2, 25, 333, 500, 999, 1000):
        times = even_timesteps(COSINE, steps)
        assert len(set(times)) == steps and times == sorted(times) and (times[0], times[-1]) == (0, 999)


def test_timesteps_even_in_lambda():
    lambdas = 0.5 * np.log(COSINE / (1 - COSINE))
    most = int((lambdas >= LAMBDA_MIN).sum())
    for steps in (1, 2, 25, 100, 500, 900, most):
        times = timesteps_even_in_lambda(COSINE, steps)
        assert len(set(times)) == steps and times == sorted(times) and times[0] >= 0
        assert times[-1] == most - 1 and (steps == 1 or times[0] == 0)
    gaps = -np.diff(lambdas[timesteps_even_in_lambda(COSINE, 25)])
    assert gaps.max() < 1.5 * gaps.min()
    with pytest.raises(ValueError, match=f"--num_steps {most + 1} is out of range: give 1 to {most}"):
        timesteps_even_in_lambda(COSINE, most + 1)
    with pytest.raises(ValueError, match="--num_steps 0 is out of range: give 1 to 1000"):
        even_timesteps(COSINE, 0)
