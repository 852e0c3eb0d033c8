"""Samplers by name. Each is one pure function that walks from noise to image by a denoiser's predictions of x_0; noise
and progress are injected. Knows diffusion processes and models, not conditions' meaning or files.

Here x_t = alpha_t x_0 + sigma_t noise, and lambda_t = log(alpha_t / sigma_t), half the log signal-to-noise ratio."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

from .gaussian_diffusion import GaussianDiffusion, Model
from .guidance import GuidedModel
from .spade import cached_condition

# Where lambda is lower than this, an image is noise to the eye and to fp32: the cosine schedule's end, at sigma 20 291
# alpha, is cut off for the multi-step solvers (Lu et al. 2022, appendix D).
LAMBDA_MIN = -5.1

Callback = Callable[[int, th.Tensor], None]
NoiseFn = Callable[[th.Tensor], th.Tensor]


# ---- noise ----


def sample_seed(seed: int, index: int) -> int:
    """:return: a 63-bit seed that depends on (seed, index) alone, and on both well mixed."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


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
        self.generators = [th.Generator(device).manual_seed(sample_seed(seed, index)) for index in indices]

    def __call__(self, like: th.Tensor) -> th.Tensor:
        """:return: noise shaped as an [N x ...] tensor, N being the number of generators."""
        return self.draw(like.shape[1:])

    def draw(self, shape: Sequence[int]) -> th.Tensor:
        """:return: an [N x *shape] fp32 tensor of noise."""
        return th.stack([th.randn(tuple(shape), generator=g, device=self.device) for g in self.generators])


# ---- schedules ----


@dataclass(frozen=True)
class Schedule:
    """
    The steps of a sampler: points of falling noise, and the image at their end.

    :param times: [K] timesteps of the base process, falling; what the model is shown.
    :param alphas: [K + 1] float64, the last of them 1.
    :param sigmas: [K + 1] float64, the last of them 0.
    """

    times: np.ndarray
    alphas: np.ndarray
    sigmas: np.ndarray

    @classmethod
    def at(cls, alphas_cumprod: np.ndarray, times: Sequence[int]) -> "Schedule":
        """:return: the steps through these timesteps, in falling order, of a process with these alphas_cumprod."""
        times = np.asarray(sorted(times, reverse=True))
        levels = alphas_cumprod[times]
        return cls(times, np.append(np.sqrt(levels), 1.0), np.append(np.sqrt(1 - levels), 0.0))

    @classmethod
    def even(cls, alphas_cumprod: np.ndarray, steps: int) -> "Schedule":
        """:return: so many steps, evenly spaced in time from the last one to the first."""
        _check_steps(steps, len(alphas_cumprod))
        return cls.at(alphas_cumprod, np.rint(np.linspace(len(alphas_cumprod) - 1, 0, steps)).astype(int))

    @classmethod
    def even_in_lambda(cls, alphas_cumprod: np.ndarray, steps: int, lambda_min: float = LAMBDA_MIN) -> "Schedule":
        """
        :return: so many steps, as evenly spaced in lambda as whole timesteps allow, from the last one above lambda_min
            to the first.
        """
        lambdas = 0.5 * np.log(alphas_cumprod / (1 - alphas_cumprod))
        last = int(np.flatnonzero(lambdas >= lambda_min).max(initial=0))
        _check_steps(steps, last + 1)
        targets = np.linspace(lambdas[last], lambdas[0], steps)
        times = np.abs(lambdas[None] - targets[:, None]).argmin(axis=1)
        # Near the image lambda leaps from one timestep to the next: each is taken once, and enough of them are left.
        number = np.arange(steps)
        times = np.minimum.accumulate(times + number) - number
        return cls.at(alphas_cumprod, np.maximum(times, number[::-1]))

    def __len__(self) -> int:
        return len(self.times)

    @property
    def lambdas(self) -> np.ndarray:
        """[K + 1] float64, the last of them infinite."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas) - np.log(self.sigmas)


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"--num_steps {steps} is out of range: give 1 to {most}")


# ---- the denoiser ----


@dataclass(frozen=True)
class Denoised:
    """
    What a model makes of x_t.

    :param x_start: its prediction of x_0, shaped as x_t.
    :param variance: its prediction of the reverse step's variance as a share of the way from the smallest to the
        largest in logarithms, shaped as x_t; None where the variance is not learned.
    """

    x_start: th.Tensor
    variance: th.Tensor | None = None


class Denoiser:
    """
    A model, its guidance and its parametrisation as one function of (x, schedule, i).

    :param diffusion: the process the model was trained on.
    :param model: a callable (x, timesteps, y=y) -> [N x C or 2C x H x W].
    :param y: the condition, [N x ...].
    :param s: the guidance scale; 1 or less means none.
    :param null: the null condition, [N or 1 x ...]; zeros if None.
    :param guide: see GuidedModel.
    :param interval: the noise levels, sigma / alpha, between which guidance acts (Kynkaanniemi et al. 2024); elsewhere
        the second branch is not run.
    :param clip_denoised: clip x_0 to [-1, 1].
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: Model,
        y: th.Tensor,
        *,
        s: float = 1.0,
        null: th.Tensor | None = None,
        guide: Model | None = None,
        interval: tuple[float, float] = (0.0, np.inf),
        clip_denoised: bool = True,
    ) -> None:
        self.diffusion = diffusion
        self.model = model
        self.guided = GuidedModel(model, s, null, guide)
        self.interval = interval
        self.y = y
        self.clip_denoised = clip_denoised

    def __call__(self, x: th.Tensor, schedule: Schedule, i: int) -> Denoised:
        """:return: the prediction for x at the schedule's i-th point."""
        alpha, sigma = float(schedule.alphas[i]), float(schedule.sigmas[i])
        t = th.full((len(x),), float(schedule.times[i]) * self.diffusion.time_scale, device=x.device)
        acts = self.interval[0] <= sigma / alpha <= self.interval[1]
        output = (self.guided if acts else self.model)(x, t, y=self.y)
        prediction, variance = self.diffusion.split_output(output, x.shape[1])
        x_start = self.diffusion.x_start_from(prediction, x, alpha, sigma)
        share = None if variance is None else (variance + 1) / 2  # the model's -1 ... 1 spans the range
        return Denoised(x_start.clamp(-1, 1) if self.clip_denoised else x_start, share)


# ---- samplers ----


def sample_ddpm(
    denoiser: Callable, x: th.Tensor, schedule: Schedule, noise_fn: NoiseFn, callback: Callback
) -> th.Tensor:
    """
    Walk the ancestral chain (Ho et al. 2020, algorithm 2; with learned variance Nichol and Dhariwal 2021, equation 15).

    :param denoiser: a callable (x, schedule, i) -> Denoised.
    :param x: [N x C x H x W] standard normal noise.
    :param noise_fn: gives fresh noise shaped as its argument.
    :param callback: is told (i, x_0's prediction) at each step.
    :return: an image, shaped as x.
    """
    levels = schedule.alphas**2
    for i in range(len(schedule)):
        out = denoiser(x, schedule, i)
        beta = 1 - levels[i] / levels[i + 1]
        posterior = beta * (1 - levels[i + 1]) / (1 - levels[i])
        mean = (
            np.sqrt(levels[i + 1]) * beta / (1 - levels[i]) * out.x_start
            + np.sqrt(levels[i] / levels[i + 1]) * (1 - levels[i + 1]) / (1 - levels[i]) * x
        )
        callback(i, out.x_start)
        if i == len(schedule) - 1:
            return mean
        if out.variance is None:
            std = np.sqrt(beta)
        else:
            std = (0.5 * (out.variance * np.log(beta) + (1 - out.variance) * np.log(posterior))).exp()
        x = mean + std * noise_fn(x)
    return x


def sample_ddim(
    denoiser: Callable, x: th.Tensor, schedule: Schedule, noise_fn: NoiseFn, callback: Callback, eta: float = 0.0
) -> th.Tensor:
    """
    Take DDIM steps (Song et al. 2021, equation 12). Parameters as sample_ddpm's.

    :param eta: 0 is deterministic, 1 has the ancestral chain's variance.
    """
    alphas, sigmas = schedule.alphas, schedule.sigmas
    for i in range(len(schedule)):
        x_start = denoiser(x, schedule, i).x_start
        eps = (x - alphas[i] * x_start) / sigmas[i]
        fresh = eta * sigmas[i + 1] / sigmas[i] * np.sqrt(1 - (alphas[i] / alphas[i + 1]) ** 2)
        x = alphas[i + 1] * x_start + np.sqrt(sigmas[i + 1] ** 2 - fresh**2) * eps
        if fresh > 0:
            x = x + fresh * noise_fn(x)
        callback(i, x_start)
    return x


def sample_dpmpp_2m(
    denoiser: Callable, x: th.Tensor, schedule: Schedule, noise_fn: NoiseFn, callback: Callback
) -> th.Tensor:
    """Take DPM-Solver++(2M) steps (Lu et al. 2022, algorithm 2). Parameters as sample_ddpm's; no noise is added."""
    alphas, sigmas = schedule.alphas, schedule.sigmas
    steps = np.diff(schedule.lambdas)
    previous = None
    for i in range(len(schedule)):
        x_start = denoiser(x, schedule, i).x_start
        direction = _second_order(x_start, previous, steps, i)
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * np.expm1(-steps[i]) * direction
        callback(i, x_start)
        previous = x_start
    return x


def sample_dpmpp_2m_sde(
    denoiser: Callable, x: th.Tensor, schedule: Schedule, noise_fn: NoiseFn, callback: Callback
) -> th.Tensor:
    """Take SDE-DPM-Solver++(2M) steps (Lu et al. 2022, section 4.3). Parameters as sample_ddpm's."""
    alphas, sigmas = schedule.alphas, schedule.sigmas
    steps = np.diff(schedule.lambdas)
    previous = None
    for i in range(len(schedule)):
        x_start = denoiser(x, schedule, i).x_start
        direction = _second_order(x_start, previous, steps, i)
        kept, replaced = np.exp(-steps[i]), -np.expm1(-2 * steps[i])
        x = sigmas[i + 1] / sigmas[i] * kept * x + alphas[i + 1] * replaced * direction
        if sigmas[i + 1] > 0:
            x = x + sigmas[i + 1] * np.sqrt(replaced) * noise_fn(x)
        callback(i, x_start)
        previous = x_start
    return x


# Extrapolating over a step this many times longer than the one before would multiply the model's errors, as at the end
# of the cosine schedule's own timesteps.
_LONGEST_EXTRAPOLATION = 2


def _second_order(x_start: th.Tensor, previous: th.Tensor | None, steps: np.ndarray, i: int) -> th.Tensor:
    """x_0's prediction extrapolated to the middle of step i; first order at the first step and at those too long for
    it, such as the last, which is infinite."""
    if previous is None or steps[i] > _LONGEST_EXTRAPOLATION * steps[i - 1]:
        return x_start
    return th.lerp(previous, x_start, float(1 + 0.5 * steps[i] / steps[i - 1]))


def sample_unipc(
    denoiser: Callable, x: th.Tensor, schedule: Schedule, noise_fn: NoiseFn, callback: Callback
) -> th.Tensor:
    """
    Take UniPC steps of order 2, with B(h) = expm1(h) (Zhao et al. 2023). Parameters as sample_ddpm's; adds no noise.

    Each prediction of x_0 first corrects the step that led to it, which costs no evaluation.
    """
    alphas, sigmas = schedule.alphas, schedule.sigmas
    steps = np.diff(schedule.lambdas)
    history: list[th.Tensor] = []  # the latest two predictions of x_0
    before = None  # x at the latest point, as corrected
    for i in range(len(schedule)):
        x_start = denoiser(x, schedule, i).x_start
        if before is not None:
            x = _unipc_correct(before, x_start, history, alphas, sigmas, steps, i - 1)
        before = x
        callback(i, x_start)
        history = [*history[-1:], x_start]
        if i == len(schedule) - 1:
            return x_start  # the last step, of infinite length, ends on the prediction
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * np.expm1(-steps[i]) * _second_order(
            x_start, history[0] if len(history) > 1 else None, steps, i
        )
    return x


def _unipc_correct(
    before: th.Tensor,
    x_start: th.Tensor,
    history: list[th.Tensor],
    alphas: np.ndarray,
    sigmas: np.ndarray,
    steps: np.ndarray,
    i: int,
) -> th.Tensor:
    """Take step i again from x before it, now that x_0's prediction after it is known (Zhao et al. 2023, UniC-2)."""
    h = -steps[i]
    growth = np.expm1(h)
    x = sigmas[i + 1] / sigmas[i] * before - alphas[i + 1] * growth * history[-1]
    towards = x_start - history[-1]
    if len(history) == 1:
        return x - alphas[i + 1] * growth * 0.5 * towards
    ratio = -steps[i - 1] / steps[i]
    phi_1 = growth / h - 1
    phi_2 = phi_1 / h - 0.5
    weights = np.linalg.solve([[1, 1], [ratio, 1]], [phi_1 / growth, 2 * phi_2 / growth])
    backwards = (history[-2] - history[-1]) / ratio
    return x - alphas[i + 1] * growth * (weights[0] * backwards + weights[1] * towards)


SAMPLERS: dict[str, Callable] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "unipc": sample_unipc,
}


def make_schedule(name: str, diffusion: GaussianDiffusion, num_steps: int = 0) -> Schedule:
    """
    Choose a sampler's steps.

    :param name: a key of SAMPLERS.
    :param diffusion: the process.
    :param num_steps: how many; 0 means the process's own timesteps.
    :raises ValueError: where the name is unknown, or the process has not so many steps.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown --sampler {name}: choose one of {', '.join(SAMPLERS)}")
    if num_steps == 0:
        return Schedule.at(diffusion.base_alphas_cumprod, diffusion.timestep_map)
    # The one-step methods keep to the whole process; extrapolation does not survive the cosine schedule's end.
    space = Schedule.even if name in ("ddpm", "ddim") else Schedule.even_in_lambda
    return space(diffusion.base_alphas_cumprod, num_steps)


@contextlib.contextmanager
def kept_conditions(model: Model, *conditions: th.Tensor, enabled: bool = True) -> Iterator[None]:
    """
    Let a U-Net convolve these conditions once, for all that is sampled in a with block from these very tensors.

    :param enabled: False does nothing, at more time and less memory.
    """
    with contextlib.ExitStack() as stack:
        for condition in conditions if enabled else ():
            stack.enter_context(cached_condition(model, condition))
        yield


@th.inference_mode()
def sample(
    name: str,
    diffusion: GaussianDiffusion,
    model: Model,
    y: th.Tensor,
    *,
    channels: int,
    seed: int,
    indices: Sequence[int],
    schedule: Schedule | None = None,
    callback: Callback = lambda i, x_start: None,
    **options: Any,
) -> th.Tensor:
    """
    Sample images for a batch of conditions.

    :param name: a key of SAMPLERS.
    :param diffusion: the process.
    :param model: the U-Net.
    :param y: an [N x C x H x W] condition on the model's device.
    :param channels: channels of the images.
    :param seed: the run's seed.
    :param indices: the N sample numbers.
    :param schedule: the steps; the process's own if None.
    :param callback: is told (i, x_0's prediction) at each step.
    :param options: Denoiser's: s, null, guide, interval, clip_denoised.
    :return: an [N x channels x H x W] fp32 tensor, in [-1, 1] where clip_denoised is on.
    """
    schedule = schedule or make_schedule(name, diffusion)
    noise_fn = SampleNoise(seed, indices, y.device)
    x = noise_fn.draw((channels, *y.shape[2:]))
    denoiser = Denoiser(diffusion, model, y, **options)
    return SAMPLERS[name](denoiser, x, schedule, noise_fn, callback)


def to_uint8(images: th.Tensor) -> np.ndarray:
    """:return: [N x H x W x C] uint8 from an [N x C x H x W] tensor in [-1, 1], rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).cpu().numpy()
