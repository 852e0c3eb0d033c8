"""Samplers of training timesteps. Know losses per timestep and nothing of what they are losses of."""

import itertools
import math
from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import torch as th
import torch.distributed as dist

SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")


class Timesteps(Protocol):
    """What has timesteps: a diffusion process."""

    num_timesteps: int


def _count(timesteps: int | Timesteps) -> int:
    return getattr(timesteps, "num_timesteps", timesteps)


def create_named_schedule_sampler(name: str, diffusion: int | Timesteps) -> "ScheduleSampler":
    """
    Make a sampler by its flag's value.

    :param name: "uniform" or "loss-second-moment".
    :param diffusion: the process whose timesteps to choose from, or their number.
    """
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise ValueError(f"unknown --schedule_sampler {name}: choose one of {', '.join(SCHEDULE_SAMPLERS)}")


class ScheduleSampler(ABC):
    """A distribution over timesteps, with the weights that keep the expected loss what uniform sampling gives."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """:return: a [num_timesteps] array of positive weights, not necessarily normalised."""

    def state_dict(self) -> dict[str, th.Tensor]:
        """:return: what the sampler has learnt, as tensors; load_state_dict takes it up."""
        return {}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        """
        Go on with what an earlier sampler of this kind has learnt.

        :raises ValueError: where the state is of another kind of sampler, or of another number of timesteps.
        """
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[key].shape != state[key].shape for key in own):
            raise ValueError("the timestep sampler's history is that of another --schedule_sampler or process")

    def update_with_local_losses(self, local_t: th.Tensor, local_losses: th.Tensor) -> None:  # noqa: B027
        """
        Learn from this rank's losses, if this is a sampler that learns. Collective then.

        :param local_t: an [N] int tensor of timesteps; N may differ between ranks.
        :param local_losses: their [N] losses, unweighted.
        """

    def sample(
        self, batch_size: int, device: th.device | str = "cpu", rng: np.random.Generator | None = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw timesteps by importance.

        :param batch_size: how many.
        :param rng: the source of randomness; a fresh one if None.
        :return: ([batch_size] int64 timesteps, [batch_size] fp32 factors for their losses).
        """
        rng = rng or np.random.default_rng()
        w = self.weights()
        p = w / w.sum()
        t = rng.choice(len(p), size=batch_size, p=p)
        factors = 1 / (len(p) * p[t])
        # Copied without a wait for what the device still has to do.
        return (
            th.from_numpy(t).to(device, non_blocking=True),
            th.from_numpy(factors).float().to(device, non_blocking=True),
        )


class UniformSampler(ScheduleSampler):
    """Every timestep alike."""

    def __init__(self, diffusion: int | Timesteps) -> None:
        self._weights = np.ones(_count(diffusion))

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses of all ranks, and so stays the same on all of them."""

    def update_with_local_losses(self, local_t: th.Tensor, local_losses: th.Tensor) -> None:
        pairs = list(zip(local_t.tolist(), local_losses.tolist()))
        gathered = [pairs]
        if dist.is_available() and dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, pairs)
        # Ranks share a batch out in turns, so in turns their losses come in the order that one rank would see.
        flat = [pair for turn in itertools.zip_longest(*gathered) for pair in turn if pair is not None]
        self.update_with_all_losses([t for t, _ in flat], [loss for _, loss in flat])

    @abstractmethod
    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """Take up losses in the order given; every rank passes the same."""


class LossSecondMomentResampler(LossAwareSampler):
    """
    Weights by the root mean square of each timestep's latest losses (Nichol and Dhariwal 2021, section 3.3).

    Uniform until every timestep has a full history.

    :param diffusion: the process whose timesteps to choose from, or their number.
    :param history_per_term: how many losses of each are remembered.
    :param uniform_prob: the share of uniform sampling mixed in, so that no timestep starves.
    """

    def __init__(self, diffusion: int | Timesteps, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        num_timesteps = _count(diffusion)
        self.uniform_prob = uniform_prob
        self._history = np.zeros((num_timesteps, history_per_term))
        self._counts = np.zeros(num_timesteps, dtype=np.int64)

    def state_dict(self) -> dict[str, th.Tensor]:
        return {"history": th.from_numpy(self._history.copy()), "counts": th.from_numpy(self._counts.copy())}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        super().load_state_dict(state)
        self._history[:], self._counts[:] = state["history"].numpy(), state["counts"].numpy()

    def weights(self) -> np.ndarray:
        num_timesteps, history_per_term = self._history.shape
        if not (self._counts >= history_per_term).all():
            return np.ones(num_timesteps)
        rms = np.sqrt((self._history**2).mean(axis=1))
        return (1 - self.uniform_prob) * rms / rms.sum() + self.uniform_prob / num_timesteps

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        for t, loss in zip(ts, losses):
            if not math.isfinite(loss):  # of a step that is not taken
                continue
            # A ring: the mean over the history does not care which slot is the oldest.
            self._history[t, self._counts[t] % self._history.shape[1]] = loss
            self._counts[t] += 1
