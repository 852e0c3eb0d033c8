"""A diffusion process that visits only some timesteps of another. Knows nothing of models or conditions."""

from collections.abc import Iterable

import numpy as np

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | list[int]) -> set[int]:
    """
    Choose the timesteps of a shorter process.

    :param num_timesteps: the length of the original process.
    :param section_counts: a list, or comma-separated string, of how many steps to take from each of equally long
        sections, spread evenly from a section's first to its last step; or "ddimN" for N steps at a fixed stride
        from 0, as the DDIM paper takes them.
    :return: the timesteps that are kept.
    :raises ValueError: where a section is too short, no stride gives N, or the text does not parse.
    """
    flag = f"--timestep_respacing {section_counts}"
    if isinstance(section_counts, str):
        stride = section_counts.startswith("ddim")
        try:
            section_counts = [int(count) for count in section_counts.removeprefix("ddim").split(",")]
        except ValueError:
            raise ValueError(f'{flag} does not parse: give counts such as 250 or 10,15,20, or "ddim25"') from None
        if stride and len(section_counts) > 1:
            raise ValueError(f"{flag}: ddim takes one number, such as ddim25")
        if stride:
            return _strided(num_timesteps, section_counts[0], flag)

    quotient, remainder = divmod(num_timesteps, len(section_counts))
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(section_counts):
        size = quotient + (i < remainder)
        if not 1 <= count <= size:
            raise ValueError(f"{flag}: cannot take {count} steps from a section of {size}; give 1 to {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # Summed, not multiplied: the rounding of published schedules depends on it.
        offsets = np.concatenate([[0.0], np.cumsum(np.full(count - 1, stride))])
        kept.update(start + int(offset) for offset in np.rint(offsets))
        start += size
    return kept


def _strided(num_timesteps: int, count: int, flag: str) -> set[int]:
    for stride in range(1, num_timesteps + 1):
        steps = range(0, num_timesteps, stride)
        if len(steps) == count:
            return set(steps)
    raise ValueError(f"{flag}: no integer stride takes {count} of {num_timesteps} steps; try a divisor of it")


class SpacedDiffusion(GaussianDiffusion):
    """
    A process that skips steps of a base process; its marginals at the steps it keeps are the base's.

    :param use_timesteps: the base timesteps to keep, in any order.
    :param betas: the base process's schedule; other parameters as GaussianDiffusion's.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: np.ndarray, **options) -> None:
        timestep_map = sorted(set(use_timesteps))
        base_alphas_cumprod = np.cumprod(1 - np.asarray(betas, dtype=np.float64))
        super().__init__(betas=_betas_of(base_alphas_cumprod[timestep_map]), **options)
        self.timestep_map = timestep_map
        self.base_alphas_cumprod = base_alphas_cumprod
        self.original_num_steps = len(betas)


def respaced(diffusion: GaussianDiffusion, use_timesteps: Iterable[int]) -> SpacedDiffusion:
    """:return: the process that keeps these timesteps of the one that a process's model was trained on."""
    return SpacedDiffusion(
        use_timesteps,
        betas=_betas_of(diffusion.base_alphas_cumprod),
        model_mean_type=diffusion.model_mean_type,
        model_var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
        min_snr_gamma=diffusion.min_snr_gamma,
        rescale_timesteps=diffusion.rescale_timesteps,
    )


def _betas_of(alphas_cumprod: np.ndarray) -> np.ndarray:
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
