"""Noise schedules: betas by name, the points that a sampler visits, and which timesteps to keep where it takes fewer.
Knows arrays only.

Here x_t = alpha_t x_0 + sigma_t noise, and lambda_t = log(alpha_t / sigma_t), half the log signal-to-noise ratio."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NOISE_SCHEDULES = ("linear", "cosine")

# Where lambda is lower than this, an image is noise to the eye and to fp32: the cosine schedule's end, at sigma 20 291
# alpha, is cut off for the multi-step solvers (Lu et al. 2022, appendix D).
LAMBDA_MIN = -5.1


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """
    Make a schedule by its flag's value.

    :param schedule_name: "linear" (Ho et al. 2020, stretched to the number of steps) or "cosine" (Nichol and
        Dhariwal 2021, equation 17).
    :param num_diffusion_timesteps: the number of steps.
    :return: a [num_diffusion_timesteps] float64 array of betas.
    """
    if schedule_name == "linear":
        stretch = 1000 / num_diffusion_timesteps
        if stretch * 0.02 >= 1:
            raise ValueError(
                f"--diffusion_steps {num_diffusion_timesteps} is too few for a linear schedule: give at least 21, or "
                "--noise_schedule cosine"
            )
        return np.linspace(stretch * 1e-4, stretch * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise ValueError(f"unknown --noise_schedule {schedule_name}: choose one of {', '.join(NOISE_SCHEDULES)}")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """
    Discretise a continuous schedule.

    :param alpha_bar: the cumulative product of (1 - beta) as a function of time in [0, 1].
    :param max_beta: a cap, which keeps the last steps from being singular.
    """
    n = num_diffusion_timesteps
    levels = np.array([alpha_bar(i / n) for i in range(n + 1)])
    return np.minimum(1 - levels[1:] / levels[:-1], max_beta)


@dataclass(frozen=True)
class Schedule:
    """
    The steps of a sampler: points of falling noise, and the image at their end.

    :param alphas: [K + 1] float64, the last of them 1.
    :param sigmas: [K + 1] float64, the last of them 0.
    """

    alphas: np.ndarray
    sigmas: np.ndarray

    @classmethod
    def of(cls, alphas_cumprod: np.ndarray) -> "Schedule":
        """:return: the steps of a process with these [K] alphas_cumprod, which fall from image to noise."""
        levels = alphas_cumprod[::-1]
        return cls(np.append(np.sqrt(levels), 1.0), np.append(np.sqrt(1 - levels), 0.0))

    def __len__(self) -> int:
        return len(self.alphas) - 1

    @property
    def lambdas(self) -> np.ndarray:
        """[K + 1] float64, the last of them infinite."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas) - np.log(self.sigmas)


def even_timesteps(alphas_cumprod: np.ndarray, steps: int) -> list[int]:
    """:return: timesteps evenly spaced from the first to the last, rising; one alone is the last."""
    _check_steps(steps, len(alphas_cumprod))
    return np.rint(np.linspace(len(alphas_cumprod) - 1, 0, steps)).astype(int)[::-1].tolist()


def timesteps_even_in_lambda(alphas_cumprod: np.ndarray, steps: int, lambda_min: float = LAMBDA_MIN) -> list[int]:
    """
    :return: timesteps as evenly spaced in lambda as whole ones allow, rising from the first to the last above
        lambda_min; one alone is the last.
    """
    lambdas = 0.5 * np.log(alphas_cumprod / (1 - alphas_cumprod))
    last = int(np.flatnonzero(lambdas >= lambda_min).max(initial=0))
    _check_steps(steps, last + 1)
    targets = np.linspace(lambdas[last], lambdas[0], steps)
    times = np.abs(lambdas[None] - targets[:, None]).argmin(axis=1)
    # Near the image lambda leaps from one timestep to the next: each is taken once, and enough of them are left.
    number = np.arange(steps)
    times = np.minimum.accumulate(times + number) - number
    return np.maximum(times, number[::-1])[::-1].tolist()


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"--num_steps {steps} is out of range: give 1 to {most}")
