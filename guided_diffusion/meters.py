"""Means of what is measured at every step, kept on the device until somebody reads them. Knows no model and no sink."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch as th

from . import dist_util

QUARTERS = 4
# What the progress bar shows of a row of the log, by the names it has room for.
_SHOWN = {
    "loss": "loss",
    **{f"loss_q{i}": f"q{i}" for i in range(QUARTERS)},
    "grad_norm": "grad",
    "lr": "lr",
    "lg_loss_scale": "lg_scale",
    "samples": "seen",
    "images_per_s": "img/s",
    "data_wait": "wait",
    "peak_memory_mib": "MiB",
}


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """:return: what there is room for of a row of the log, in a progress bar."""
    return {short: f"{row[key]:.4g}" for key, short in _SHOWN.items() if key in row}


class LossMeter:
    """
    Weighted means of losses since the last reading, in all and by quarter of the timesteps, over all ranks.

    :param num_timesteps: the number of timesteps.
    :param device: where the losses are.
    :param strict: a loss that is not finite makes its mean infinite; else it is left out.
    """

    def __init__(self, num_timesteps: int, device: th.device | str = "cpu", strict: bool = False) -> None:
        self.num_timesteps = num_timesteps
        self.device = device
        self.strict = strict
        # Names -> [2 x names x QUARTERS]: sums of weighted losses, and of weights.
        self._sums: dict[tuple[str, ...], th.Tensor] = {}

    def add(self, t: th.Tensor, losses: dict[str, th.Tensor], weights: th.Tensor | None = None) -> None:
        """
        Count some losses in; nothing waits for the device.

        :param t: an [N] int tensor of timesteps.
        :param losses: name -> [N] losses.
        :param weights: [N] positive weights, as importance sampling gives; all 1 if None.
        """
        names, quarters = tuple(losses), QUARTERS * t // self.num_timesteps
        values = th.stack([values.detach() for values in losses.values()]).double()
        w = th.ones_like(values) if weights is None else weights.double().expand_as(values)
        finite = values.isfinite()
        if self.strict:
            values = th.where(finite, values, th.inf)
        else:
            values, w = values.nan_to_num(0, 0, 0), w * finite
        if names not in self._sums:
            self._sums[names] = th.zeros(2, len(names), QUARTERS, dtype=th.float64, device=self.device)
        self._sums[names].index_add_(2, quarters, th.stack([w * values, w]))

    def read(self) -> dict[str, float]:
        """
        Wait for the device and begin anew. Collective.

        :return: name -> mean, and name_q0 to name_q3 for the quarters that had losses; alike on all ranks, also on one
            that had none.
        """
        own = [row for names, both in self._sums.items() for row in zip(names, *both.tolist())]
        everyones = [row for rows in dist_util.all_gather(own) for row in rows]
        self._sums = {}
        means = {}
        for name in dict.fromkeys(name for name, *_ in everyones):
            parts = [sums for of, *sums in everyones if of == name]
            sums, weights = ([sum(values) for values in zip(*(part[i] for part in parts))] for i in (0, 1))
            if sum(weights):
                means[name] = sum(sums) / sum(weights)
                means |= {f"{name}_q{i}": s / w for i, (s, w) in enumerate(zip(sums, weights)) if w}
        return means


class StepClock:
    """
    How fast training goes, and which share of its time it waits for data; pauses do not count.

    :param samples: how many have been seen already.
    """

    def __init__(self, samples: int = 0) -> None:
        self._began = time.perf_counter()
        self._waited = 0.0
        self._samples = samples

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's time as spent waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def read(self, samples: int) -> dict[str, float]:
        """
        :param samples: how many have been seen by now.
        :return: "images_per_s", and "data_wait", the share of time, since the last reading.
        """
        seconds = max(time.perf_counter() - self._began, 1e-9)
        row = {"images_per_s": (samples - self._samples) / seconds, "data_wait": self._waited / seconds}
        self._began, self._waited, self._samples = time.perf_counter(), 0.0, samples
        return row
