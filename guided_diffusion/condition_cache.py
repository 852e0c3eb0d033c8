"""What a model is shown of conditions in sampling: convolved once for all steps and scales, as far as memory allows; of
whole patches, or of windows of fields. Knows models and plans, not where conditions come from or samples go."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch as th

from . import logger
from .conditioning import ConditionSpec
from .sampling_plan import SamplingPlan
from .spade import Condition
from .unet import UNetModel
from .windows import Fields

GROUP = Path("/sys/fs/cgroup")  # of this process, in a container

# Of a plan, the sample numbers, and whether to show a bar: a tensor [N x C x H x W] for each tensor of conditions.
SampleFn = Callable[[SamplingPlan, Sequence[int], bool], list[th.Tensor]]


class ConditionCache:
    """
    What one model is shown.

    :param model: with its weights, on the device to sample on.
    :param spec: the condition's layout.
    :param device: where conditions are.
    :param batch_size: patches or windows at once.
    :param mode: a value of --spade_cache.
    :param keep_colour: the null condition keeps the colour map.
    :param guide: the weaker model of guidance, if that is not the null condition's; it is shown the condition.
    """

    def __init__(
        self,
        model: UNetModel,
        spec: ConditionSpec,
        device: th.device,
        *,
        batch_size: int = 1,
        mode: str = "auto",
        keep_colour: bool = False,
        guide: UNetModel | None = None,
    ) -> None:
        self.model, self.spec, self.device, self.guide = model, spec, device, guide
        self.batch_size, self.mode, self.keep_colour = batch_size, mode, keep_colour
        size = model.image_size
        # Of one patch or window; the null condition is the same for all, unless it keeps the colours.
        self.bytes_each = model.modulation_bytes(size) * (1 + keep_colour + (guide is not None))
        needed = self.bytes_each * batch_size + model.modulation_bytes(size)
        self.on = needed <= self._room()
        if not self.on and mode == "auto":
            logger.log(
                f"--spade_cache auto: off, since it would take {needed / 2**20:.0f} MiB and "
                f"{free_memory(device) / 2**20:.0f} MiB are free, of which it takes half at most; a smaller "
                "--batch_size takes less"
            )
        self.zeros = self._shown(model, spec.null(th.empty(1, spec.channels, size, size, device=device)), self.on)

    def patches(self, y: th.Tensor) -> SampleFn:
        """:return: what samples a batch of patches. :param y: their [N x channels x H x W] condition."""
        shown, null = self._pair(y, self.on)

        def sample(plan: SamplingPlan, numbers: Sequence[int], progress: bool) -> list[th.Tensor]:
            return [dataclasses.replace(plan, null=null).sample(self.model, shown, numbers, progress)]

        return sample

    def fields(self, ys: Sequence[th.Tensor], overlap: float) -> SampleFn:
        """
        :param ys: the condition of each field, [1 x channels x H x W].
        :param overlap: of the windows, see windows.starts.
        :return: what samples fields. As many windows are kept as there is room for.
        """
        conditions = [y[0] for y in ys]
        fields = Fields([y.shape[1:] for y in conditions], self.model.image_size, overlap, self.batch_size, self.device)
        room = self._room() / (self.bytes_each * self.batch_size) if self.on else 0  # in batches
        kept: dict[int, tuple[Condition, Condition]] = {}

        def shown(batch: int) -> tuple[Condition, Condition]:
            keep = batch + 1 <= room
            pair = kept.get(batch) or self._pair(fields.cut(conditions, batch), keep)
            if keep:
                kept[batch] = pair
            return pair

        def sample(plan: SamplingPlan, numbers: Sequence[int], progress: bool) -> list[th.Tensor]:
            return [x[None] for x in plan.sample_fields(self.model, fields, shown, numbers, progress)]

        return sample

    def _pair(self, y: th.Tensor, keep: bool) -> tuple[Condition, Condition]:
        """What the model is shown of a batch's conditions, and what the weaker branch of guidance is."""
        if self.guide is not None:
            return self._shown(self.model, y, keep), self._shown(self.guide, y, keep)
        null = self._shown(self.model, self.spec.null(y, keep_colour=True), keep) if self.keep_colour else self.zeros
        return self._shown(self.model, y, keep), null

    @staticmethod
    @th.inference_mode()
    def _shown(model: UNetModel, y: th.Tensor, keep: bool) -> Condition:
        return model.modulations(y) if keep else y

    def _room(self) -> float:
        """The bytes that may be kept now."""
        if self.mode == "auto":
            return free_memory(self.device) / 2
        return float("inf") if self.mode == "on" else 0.0


def free_memory(device: th.device) -> int:
    """:return: the bytes of memory that a device has left for us."""
    if device.type == "cuda":
        # What torch holds and does not use is free, too.
        return th.cuda.mem_get_info(device)[0] + th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)
    # Files that were read fill most of what is free by the narrow word, and make room.
    available = _number("/proc/meminfo", "MemAvailable:") * 1024
    return min(available or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _of_group())


def _of_group() -> float:
    """The bytes that a container's limit leaves, see docs.kernel.org/admin-guide/cgroup-v2.html; inf without one."""
    try:
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # "max", or no such group
        return float("inf")
    return limit - used + _number(GROUP / "memory.stat", "inactive_file")


def _number(path: str | Path, name: str) -> int:
    """A number of a table of names and numbers; 0 where it does not have it."""
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        return next((int(line.split()[1]) for line in file if line.split()[0] == name), 0)
    return 0
