"""How a run samples, as one value that sweep, validation and benchmarks share. Knows processes and models, not files or
what conditions mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch as th

from .gaussian_diffusion import GaussianDiffusion
from .guidance import GuidedModel, Model
from .progress import bar
from .respace import respaced
from .samplers import SAMPLERS, Denoised, Denoiser, NoiseFn, SampleNoise
from .schedules import even_timesteps, timesteps_even_in_lambda
from .spade import Condition
from .windows import Fields, count_windows

# Of the number of a batch of windows: what the model is shown of them, and what the weaker branch of guidance is.
ShownWindows = Callable[[int], tuple[Condition, Condition | None]]


def process_for(sampler: str, diffusion: GaussianDiffusion, num_steps: int = 0) -> GaussianDiffusion:
    """
    Choose a sampler's steps.

    :param sampler: a key of SAMPLERS.
    :param diffusion: the process.
    :param num_steps: how many; 0 means the process's own.
    :return: the process that visits these steps.
    :raises ValueError: where the name is unknown, or the process the model was trained on has fewer steps.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown --sampler {sampler}: choose one of {', '.join(SAMPLERS)}")
    if num_steps == 0:
        return diffusion
    # The one-step methods keep to the whole process; extrapolation does not survive the cosine schedule's end.
    choose = even_timesteps if sampler in ("ddpm", "ddim") else timesteps_even_in_lambda
    return respaced(diffusion, choose(diffusion.base_alphas_cumprod, num_steps))


@dataclass(frozen=True)
class SamplingPlan:
    """
    Everything about a sample but the model, its condition and its number.

    :param sampler: a key of SAMPLERS.
    :param process: the steps to take, see process_for.
    :param s: the guidance scale; 1 or less means none.
    :param null: what the weaker branch is shown, see GuidedModel; so is guide.
    :param interval: the noise levels, sigma / alpha, between which guidance acts (Kynkaanniemi et al. 2024); elsewhere
        the second branch is not run.
    :param clip_denoised: clip predictions of x_0 to [-1, 1].
    :param seed: the run's seed.
    :param channels: channels of the images.
    """

    sampler: str
    process: GaussianDiffusion
    s: float = 1.0
    null: Condition | None = None
    guide: Model | None = None
    interval: tuple[float, float] = (0.0, np.inf)
    clip_denoised: bool = True
    seed: int = 0
    channels: int = 3

    def __len__(self) -> int:
        """The number of steps."""
        return self.process.num_timesteps

    @th.inference_mode()
    def sample(self, model: Model, y: Condition, indices: Sequence[int], progress: bool = False) -> th.Tensor:
        """
        Sample images for a batch of conditions.

        :param model: a callable (x, timesteps, y=y) -> [N x C or 2C x H x W].
        :param y: an [N x ... x H x W] condition on the model's device, or its modulations.
        :param indices: the N sample numbers.
        :param progress: show a bar of steps.
        :return: an [N x channels x H x W] fp32 tensor, in [-1, 1] where clip_denoised is on.
        """
        noise_fn = SampleNoise(self.seed, indices, y.device)
        x = noise_fn.draw((self.channels, *y.shape[2:]))
        return self._walk(lambda x, i: self._denoise(model, x, i, y, self.null), x, noise_fn, progress)

    @th.inference_mode()
    def sample_fields(
        self, model: Model, fields: Fields, shown: ShownWindows, indices: Sequence[int], progress: bool = False
    ) -> list[th.Tensor]:
        """
        Sample fields, by windows. A field of one window is what `sample` makes of it; other parameters as there.

        :param shown: gives the conditions of one of the fields' batches of windows, in place of y and null.
        :return: of each field a [channels x H x W] image fp32.
        """
        noise = SampleNoise(self.seed, indices, fields.device)
        shapes = [(self.channels, *shape) for shape in fields.shapes]

        def noise_fn(like: th.Tensor | None = None) -> th.Tensor:
            return fields.join(noise.draw_each(shapes))

        denoiser = fields.blended(lambda x, i, batch: self._denoise(model, x, i, *shown(batch)))
        return fields.split(self._walk(denoiser, noise_fn(), noise_fn, progress))

    def cost_of_fields(self, size: int, overlap: float) -> dict[str, dict[str, float]]:
        """
        :param size: of a window; overlap: see windows.starts.
        :return: "denoiser_calls_a_pixel": the side of a square field -> in how many windows a pixel is denoised in all
            steps, on average. A patch takes one a step.
        """
        sides = [size << power for power in range(4)]
        counts = [count_windows(side, side, size, overlap) * len(self) for side in sides]
        calls = {f"{side} px": round(n * (size / side) ** 2, 1) for side, n in zip(sides, counts)}
        return {"denoiser_calls_a_pixel": calls}

    def _denoise(self, model: Model, x: th.Tensor, i: int, y: Condition, null: Condition | None) -> Denoised:
        """Ask the model, guided where guidance acts, at step i from noise."""
        schedule = self.process.schedule
        acts = self.interval[0] <= schedule.sigmas[i] / schedule.alphas[i] <= self.interval[1]
        shown = GuidedModel(model, self.s, null, self.guide) if acts else model
        step = len(schedule) - 1 - i
        return self.process.denoise(shown, x, step, clip_denoised=self.clip_denoised, model_kwargs={"y": y})

    def _walk(self, denoiser: Denoiser, x: th.Tensor, noise_fn: NoiseFn, progress: bool) -> th.Tensor:
        """From noise to image."""
        steps = SAMPLERS[self.sampler](denoiser, x, self.process.schedule, noise_fn)
        for step in bar(steps, total=len(self), unit="step", leave=False, disable=not progress):
            x, _ = step
        return x


def to_uint8(images: th.Tensor) -> np.ndarray:
    """:return: [N x H x W x C] uint8 from an [N x C x H x W] tensor in [-1, 1], rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).cpu().numpy()
