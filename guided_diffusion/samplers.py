"""Samplers by name: the one implementation of the way from noise to image. Each is a generator that takes a schedule's
steps by a denoiser's predictions of x_0; noise is injected. Knows neither diffusion processes nor models.

Here x_t = alpha_t x_0 + sigma_t noise, and lambda_t = log(alpha_t / sigma_t), half the log signal-to-noise ratio."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch as th

from . import streams
from .schedules import Schedule


@dataclass(frozen=True)
class Denoised:
    """
    What a model makes of x_t.

    :param x_start: its prediction of x_0, shaped as x_t.
    :param mean: that of x_{t-1}, shaped as x_t; so is log_variance. Only the ancestral chain reads them.
    """

    x_start: th.Tensor
    mean: th.Tensor | None = None
    log_variance: th.Tensor | None = None


# Of x_t and the number of the step from t, counted from noise.
Denoiser = Callable[[th.Tensor, int], Denoised]
# Standard normal noise shaped as its argument.
NoiseFn = Callable[[th.Tensor], th.Tensor]
# For each step x after it and the prediction of x_0 that it went by; the last x is the image.
Steps = Iterator[tuple[th.Tensor, th.Tensor]]


class SampleNoise:
    """
    Standard normal noise in which each sample of a batch draws from its own generator.

    So sample k of a run is the same whatever batch it is in. Draws differ between kinds of device, not between runs.

    :param seed: the run's seed.
    :param indices: the batch's sample numbers in the run.
    :param device: where the noise is made.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: th.device | str = "cpu") -> None:
        self.device = device
        self.generators = [streams.generator("noise of a sample", seed, index, device=device) for index in indices]

    def __call__(self, like: th.Tensor) -> th.Tensor:
        """:return: noise shaped as an [N x ...] tensor, N being the number of generators."""
        return self.draw(like.shape[1:])

    def draw(self, shape: Sequence[int]) -> th.Tensor:
        """:return: an [N x *shape] fp32 tensor of noise."""
        return th.stack(self.draw_each([shape] * len(self.generators)))

    def draw_each(self, shapes: Sequence[Sequence[int]]) -> list[th.Tensor]:
        """:return: noise for samples of various shapes, one a generator; fp32."""
        pairs = zip(shapes, self.generators)
        return [th.randn(tuple(shape), generator=generator, device=self.device) for shape, generator in pairs]


# ---- single steps ----


def ancestral_step(out: Denoised, noise: th.Tensor | float) -> th.Tensor:
    """Draw x_{t-1} (Ho et al. 2020, algorithm 2), its noise given; the last step, to the image, has none."""
    return out.mean + (0.5 * out.log_variance).exp() * noise


def ddim_step(
    x: th.Tensor,
    x_start: th.Tensor,
    here: tuple,
    there: tuple,
    eta: float = 0.0,
    noise: th.Tensor | None = None,
) -> th.Tensor:
    """
    Take a DDIM step (Song et al. 2021, equation 12).

    :param x: x at the point where the step begins; x_start is x_0's prediction there.
    :param here: (alpha, sigma) of that point, numbers or tensors that broadcast to x; so is there, of where it ends.
    :param eta: 0 is deterministic, 1 has the ancestral step's variance.
    :param noise: shaped as x; needed where eta is not 0.
    """
    (alpha, sigma), (alpha_next, sigma_next) = here, there
    eps = (x - alpha * x_start) / sigma
    if not eta:
        return alpha_next * x_start + sigma_next * eps
    fresh = eta * sigma_next / sigma * (1 - (alpha / alpha_next) ** 2) ** 0.5
    return alpha_next * x_start + (sigma_next**2 - fresh**2) ** 0.5 * eps + fresh * noise


# ---- samplers ----


def sample_ddpm(denoiser: Denoiser, x: th.Tensor, schedule: Schedule, noise_fn: NoiseFn) -> Steps:
    """
    Walk the ancestral chain (Ho et al. 2020, algorithm 2).

    :param denoiser: predicts mean and variance, too, for the points of this schedule.
    :param x: [N x C x H x W] standard normal noise.
    """
    last = len(schedule) - 1
    for i in range(len(schedule)):
        out = denoiser(x, i)
        noise = noise_fn(x)  # the last is drawn in vain, as in the reference: the generator then stands as there
        x = ancestral_step(out, noise) if i < last else out.mean
        yield x, out.x_start


def sample_ddim(denoiser: Denoiser, x: th.Tensor, schedule: Schedule, noise_fn: NoiseFn, eta: float = 0.0) -> Steps:
    """Take DDIM steps, see ddim_step. Other parameters as sample_ddpm's."""
    points = list(zip(schedule.alphas, schedule.sigmas))
    for i in range(len(schedule)):
        x_start = denoiser(x, i).x_start
        x = ddim_step(x, x_start, points[i], points[i + 1], eta, noise_fn(x) if eta else None)
        yield x, x_start


def sample_dpmpp_2m(denoiser: Denoiser, x: th.Tensor, schedule: Schedule, noise_fn: NoiseFn) -> Steps:
    """Take DPM-Solver++(2M) steps (Lu et al. 2022, algorithm 2). Parameters as sample_ddpm's; no noise is added."""
    alphas, sigmas = schedule.alphas, schedule.sigmas
    steps = np.diff(schedule.lambdas)
    previous = None
    for i in range(len(schedule)):
        x_start = denoiser(x, i).x_start
        direction = _second_order(x_start, previous, steps, i)
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * np.expm1(-steps[i]) * direction
        yield x, x_start
        previous = x_start


def sample_dpmpp_2m_sde(denoiser: Denoiser, x: th.Tensor, schedule: Schedule, noise_fn: NoiseFn) -> Steps:
    """Take SDE-DPM-Solver++(2M) steps (Lu et al. 2022, section 4.3). Parameters as sample_ddpm's."""
    alphas, sigmas = schedule.alphas, schedule.sigmas
    steps = np.diff(schedule.lambdas)
    previous = None
    for i in range(len(schedule)):
        x_start = denoiser(x, i).x_start
        direction = _second_order(x_start, previous, steps, i)
        kept, replaced = np.exp(-steps[i]), -np.expm1(-2 * steps[i])
        x = sigmas[i + 1] / sigmas[i] * kept * x + alphas[i + 1] * replaced * direction
        if sigmas[i + 1] > 0:
            x = x + sigmas[i + 1] * np.sqrt(replaced) * noise_fn(x)
        yield x, x_start
        previous = x_start


# Extrapolating over a step this many times longer than the one before would multiply the model's errors, as at the end
# of the cosine schedule's own timesteps.
_LONGEST_EXTRAPOLATION = 2


def _second_order(x_start: th.Tensor, previous: th.Tensor | None, steps: np.ndarray, i: int) -> th.Tensor:
    """x_0's prediction extrapolated to the middle of step i; first order at the first step and at those too long for
    it, such as the last, which is infinite."""
    if previous is None or steps[i] > _LONGEST_EXTRAPOLATION * steps[i - 1]:
        return x_start
    return th.lerp(previous, x_start, float(1 + 0.5 * steps[i] / steps[i - 1]))


def sample_unipc(denoiser: Denoiser, x: th.Tensor, schedule: Schedule, noise_fn: NoiseFn) -> Steps:
    """
    Take UniPC steps of order 2, with B(h) = expm1(h) (Zhao et al. 2023). Parameters as sample_ddpm's; adds no noise.

    Each prediction of x_0 first corrects the step that led to it, which costs no evaluation.
    """
    alphas, sigmas = schedule.alphas, schedule.sigmas
    steps = np.diff(schedule.lambdas)
    history: list[th.Tensor] = []  # the latest two predictions of x_0
    before = None  # x at the latest point, as corrected
    for i in range(len(schedule)):
        x_start = denoiser(x, i).x_start
        if before is not None:
            x = _unipc_correct(before, x_start, history, schedule, steps, i - 1)
        before = x
        history = [*history[-1:], x_start]
        if i == len(schedule) - 1:
            x = x_start  # the last step, of infinite length, ends on the prediction
        else:
            direction = _second_order(x_start, history[0] if len(history) > 1 else None, steps, i)
            x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * np.expm1(-steps[i]) * direction
        yield x, x_start


def _unipc_correct(
    before: th.Tensor, x_start: th.Tensor, history: list[th.Tensor], schedule: Schedule, steps: np.ndarray, i: int
) -> th.Tensor:
    """Take step i again from x before it, now that x_0's prediction after it is known (Zhao et al. 2023, UniC-2)."""
    h = -steps[i]
    growth = np.expm1(h)
    scale = schedule.alphas[i + 1] * growth
    x = schedule.sigmas[i + 1] / schedule.sigmas[i] * before - scale * history[-1]
    towards = x_start - history[-1]
    if len(history) == 1:
        return x - scale * 0.5 * towards
    ratio = -steps[i - 1] / steps[i]
    phi_1 = growth / h - 1
    phi_2 = phi_1 / h - 0.5
    weights = np.linalg.solve([[1, 1], [ratio, 1]], [phi_1 / growth, 2 * phi_2 / growth])
    backwards = (history[-2] - history[-1]) / ratio
    return x - scale * (weights[0] * backwards + weights[1] * towards)


SAMPLERS: dict[str, Callable[..., Steps]] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "unipc": sample_unipc,
}
