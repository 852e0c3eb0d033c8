"""Mixed precision: which dtype to compute in, and fp16's dynamic loss scale. The parameters themselves are the fp32
master weights; layers compute with casts of them (see casting), so checkpoints are always fp32."""

import math
from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn

from . import logger
from .devices import PRECISIONS, has_bf16

INITIAL_LOG_LOSS_SCALE = 20.0
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam remembers of a parameter, besides the number of steps


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

    :param model: what is trained, with parameters in fp32; gradients must already be equal on all ranks.
    :param use_fp16: whether the model computes in fp16; no other precision needs a loss scale.
    :param fp16_scale_growth: what a good step adds to lg_loss_scale.
    :param grad_clip: scale gradients down to this norm, over all parameters; 0 leaves them.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
        grad_clip: float = 0.0,
    ) -> None:
        self.model = model
        self.master_params = list(model.parameters())
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.grad_clip = grad_clip
        self.grad_norm: th.Tensor | None = None
        device = self.master_params[0].device
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
        for p in self.master_params:
            p.grad = None

    def backward(self, loss: th.Tensor) -> None:
        """Add the gradients of a scalar loss, scaled where that is needed."""
        (loss * self._lg_loss_scale.exp2().to(loss.dtype) if self.use_fp16 else loss).backward()

    def optimize(self, optimizer: th.optim.Optimizer) -> th.Tensor:
        """
        Take an optimiser step unless a gradient is not finite; grad_norm then has the norm before clipping.

        :return: whether the step was taken, as a 0-d boolean tensor on the device.
        """
        grads = [p.grad for p in self.master_params if p.grad is not None]
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

    # ---- as files hold it ----

    def master_params_to_state_dict(self, master_params: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
        """:return: the model's state_dict, with these values, in the order of master_params, for its parameters."""
        names = (name for name, _ in self.model.named_parameters())
        return {**self.model.state_dict(), **dict(zip(names, master_params, strict=True))}

    def state_dict_to_master_params(self, state_dict: dict[str, th.Tensor]) -> list[th.Tensor]:
        """:return: a state_dict's values in the order of master_params."""
        return [state_dict[name] for name, _ in self.model.named_parameters()]

    def optimizer_state(self, optimizer: th.optim.Optimizer) -> dict[str, Any]:
        """
        Say what an Adam optimiser of master_params holds, as the reference's files say it: without settings of this
        machine's kernels, and in fp16 with two flat entries, one of all vectors and one of all other parameters.

        :return: a state_dict, which load_optimizer_state takes up. Flat entries are made on the CPU.
        """
        state = optimizer.state_dict()
        groups = [{**group, "fused": None, "foreach": None} for group in state["param_groups"]]
        entries = state["state"]
        if self.use_fp16 and len(entries) == len(self.master_params):
            entries = {
                number: {
                    "step": entries[members[0]]["step"],
                    **{
                        name: th.cat([entries[k][name].flatten().cpu() for k in members]).view(shape)
                        for name in MOMENTS
                    },
                }
                for number, (members, shape) in enumerate(self._flat_groups())
            }
            groups = [{**groups[0], "params": list(entries)}]
        return {"state": entries, "param_groups": groups}

    def load_optimizer_state(self, optimizer: th.optim.Optimizer, state: dict[str, Any]) -> None:
        """
        Take up what an Adam optimiser held, of every parameter or of the reference's two flat ones in fp16. Settings,
        such as the learning rate, stay the optimiser's own.

        :raises ValueError: where it does not fit.
        """
        settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(self._by_parameter(state))
            fits = all(optimizer.state[p][name].shape == p.shape for p in self.master_params for name in MOMENTS)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError("no optimiser state of this model")
        for group, own in zip(optimizer.param_groups, settings):
            group.update(own)
        for p, own in optimizer.state.items():
            # The fused optimiser counts its steps on the device, and takes its averages to be laid out as parameters.
            own["step"] = th.as_tensor(float(own["step"]), dtype=th.float32, device=p.device)
            for name in MOMENTS:
                own[name] = th.empty_like(p).copy_(own[name])

    def _flat_groups(self) -> list[tuple[list[int], tuple[int, ...]]]:
        """The reference's groups in fp16: the numbers of their parameters, and the shape of the flat one they make."""
        vectors = [k for k, p in enumerate(self.master_params) if p.ndim <= 1]
        others = [k for k, p in enumerate(self.master_params) if p.ndim > 1]
        return [(members, shape) for members, shape in ((vectors, (-1,)), (others, (1, -1))) if members]

    def _by_parameter(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state of every parameter, of one that may be in flat groups."""
        groups, entries = self._flat_groups(), {}
        sizes = [sum(self.master_params[k].numel() for k in members) for members, _ in groups]
        if [math.prod(entry["exp_avg"].shape) for entry in state["state"].values()] != sizes:
            return state
        for number, (members, _) in enumerate(groups):
            flat = state["state"][number]
            parts = {
                name: flat[name].flatten().split([self.master_params[k].numel() for k in members]) for name in MOMENTS
            }
            for place, k in enumerate(members):
                own = {name: parts[name][place].view(self.master_params[k].shape) for name in MOMENTS}
                entries[k] = {"step": flat["step"], **own}
        group = {**state["param_groups"][0], "params": list(range(len(self.master_params)))}
        return {"state": dict(sorted(entries.items())), "param_groups": [group]}
