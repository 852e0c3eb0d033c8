"""Mixed precision: which dtype to compute in, and fp16's dynamic loss scale. The parameters themselves are the fp32
master weights; layers cast them at use (see nn.Conv2d), so checkpoints are always fp32."""

from collections.abc import Iterable
from pathlib import Path

import torch as th
from torch import nn

from . import logger

INITIAL_LOG_LOSS_SCALE = 20.0


PRECISIONS = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}


def has_bf16(device: th.device) -> bool:
    """
    Say whether a device computes in bfloat16 itself, as GPUs do from Ampere on, and CPUs with AVX-512 BF16, AMX or
    Arm's extension of that name. Other CPUs imitate it, some 20 times slower than fp32.
    """
    if device.type == "cuda":
        return th.cuda.is_bf16_supported(False)
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def compute_dtype(use_fp16: bool, device: th.device, precision: str = "") -> th.dtype:
    """
    The dtype to compute in.

    :param use_fp16: the reference's flag; on a CPU, which has no fast fp16, it means bf16 where the CPU has that, and
        fp32 elsewhere, with one warning.
    :param device: where the model runs.
    :param precision: a key of PRECISIONS, which wins; "" leaves it to use_fp16.
    :raises ValueError: where the precision is unknown, or the device has not got it.
    """
    if precision:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown --precision {precision}: choose one of {', '.join(PRECISIONS)}")
        if precision == "fp16" and device.type == "cpu":
            raise ValueError("--precision fp16 on a CPU, which has no fast fp16: give bf16 or fp32")
        if precision == "bf16" and not has_bf16(device):
            if device.type == "cuda":
                raise ValueError("--precision bf16 on a GPU that has none: give fp16 or fp32")
            logger.warn("--precision bf16: this CPU has no bfloat16 units and imitates them, slowly; fp32 is faster")
        return PRECISIONS[precision]
    if not use_fp16:
        return th.float32
    if device.type == "cpu":
        if has_bf16(device):
            logger.warn("--use_fp16 True on a CPU: computing in bfloat16 instead, which needs no loss scale")
            return th.bfloat16
        logger.warn("--use_fp16 True on a CPU without bfloat16 units: computing in fp32 instead")
        return th.float32
    return th.float16


def cast_convolutions(module: nn.Module, dtype: th.dtype) -> None:
    """Store the weights of a module's convolutions in another dtype, in place; all other layers stay as they are."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            layer.to(dtype)


class MixedPrecisionTrainer:
    """
    The backward pass and the optimiser step, with a dynamic loss scale where the model computes in fp16.

    The loss is multiplied by 2**lg_loss_scale, gradients are divided by it. A step with a gradient that is not finite
    is skipped, in every precision; in fp16 the scale is then halved, down to 1, and every other step raises its
    logarithm by fp16_scale_growth. All of it happens on the device: with a fused optimiser nothing waits for it.

    :param params: the parameters that are trained; gradients must already be equal on all ranks.
    :param dtype: what the model computes in; only fp16 needs a loss scale.
    :param fp16_scale_growth: what a good step adds to lg_loss_scale.
    :param grad_clip: scale gradients down to this norm, over all parameters; 0 leaves them.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        dtype: th.dtype = th.float32,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
        grad_clip: float = 0.0,
    ) -> None:
        self.params = list(params)
        self.use_fp16 = dtype == th.float16
        self.fp16_scale_growth = fp16_scale_growth
        self.grad_clip = grad_clip
        self.grad_norm: th.Tensor | None = None
        device = self.params[0].device
        self._lg_loss_scale = th.full((), initial_lg_loss_scale, dtype=th.float64, device=device)
        self._skipped = th.zeros((2,), dtype=th.int64, device=device)  # in all, and in a row

    @property
    def lg_loss_scale(self) -> float:
        """The loss scale's logarithm to base 2. Waits for the device; so do skipped and skipped_in_a_row."""
        return self._lg_loss_scale.item()

    @lg_loss_scale.setter
    def lg_loss_scale(self, value: float) -> None:
        self._lg_loss_scale.fill_(value)

    @property
    def skipped(self) -> int:
        """How many steps have been skipped."""
        return int(self._skipped[0])

    @property
    def skipped_in_a_row(self) -> int:
        """How many steps have been skipped since the last good one."""
        return int(self._skipped[1])

    def state_dict(self) -> dict[str, float | int]:
        """:return: what load_state_dict takes up."""
        return dict(lg_loss_scale=self.lg_loss_scale, skipped=self.skipped, skipped_in_a_row=self.skipped_in_a_row)

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on where a run stopped."""
        self.lg_loss_scale = state["lg_loss_scale"]
        self._skipped.copy_(th.tensor([state["skipped"], state["skipped_in_a_row"]]))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.params:
            p.grad = None

    def backward(self, loss: th.Tensor) -> None:
        """Add the gradients of a scalar loss, scaled where that is needed."""
        (loss * self._lg_loss_scale.exp2().to(loss.dtype) if self.use_fp16 else loss).backward()

    def optimize(self, optimizer: th.optim.Optimizer) -> th.Tensor:
        """
        Take an optimiser step unless a gradient is not finite; grad_norm then has the norm before clipping.

        :return: whether the step was taken, as a 0-d boolean tensor on the device.
        """
        grads = [p.grad for p in self.params if p.grad is not None]
        if self.use_fp16:
            th._foreach_mul_(grads, (-self._lg_loss_scale).exp2().float())
        norm = th.nn.utils.get_total_norm(grads)
        finite = norm.isfinite()
        if self.grad_clip:
            th._foreach_mul_(grads, (self.grad_clip / (norm + 1e-6)).clamp(max=1))
        if optimizer.defaults.get("fused"):
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # torch skips by it on the device
            optimizer.step()
        elif finite:
            optimizer.step()
        if self.use_fp16:
            grown, halved = self._lg_loss_scale + self.fp16_scale_growth, (self._lg_loss_scale - 1).clamp(min=0)
            self._lg_loss_scale.copy_(th.where(finite, grown, halved))
        self._skipped += ~finite
        self._skipped[1] *= ~finite
        self.grad_norm = norm
        return finite
