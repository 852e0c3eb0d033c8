"""Layer primitives of the U-Net. Knows tensors only: nothing of conditions, diffusion or training."""

import math
from collections.abc import Callable, Iterable

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .casting import Casting

GROUPS = 32  # of every group norm; channel counts must be multiples of it


class Conv1d(Casting, nn.Conv1d):
    """A convolution computed in the dtype of its input; its own parameters may stay in fp32 (master weights)."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self._conv_forward(x, *self.operands(x.dtype))


class Conv2d(Casting, nn.Conv2d):
    """A convolution computed in the dtype of its input; its own parameters may stay in fp32 (master weights)."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self._conv_forward(x, *self.operands(x.dtype))


class GroupNorm32(nn.GroupNorm):
    """A group norm whose statistics and affine map are computed in fp32, whatever the dtype of its input."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        if x.device.type == "cpu":
            return super().forward(x)  # the CPU's kernel takes fp32 weights beside any input, at no copy
        return super().forward(x.float()).to(x.dtype)


def silu(x: th.Tensor) -> th.Tensor:
    """SiLU of a tensor that nobody needs afterwards: without gradients its memory is used again."""
    return F.silu(x, inplace=not th.is_grad_enabled())


class _Modulate(th.autograd.Function):
    """h * scale + shift, in one pass over the memory. The gradient of torch's own addcmul takes two more: times 1."""

    @staticmethod
    def forward(ctx, h: th.Tensor, scale: th.Tensor, shift: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(h, scale)
        ctx.shift = shift.shape
        return th.addcmul(shift, h, scale)

    @staticmethod
    def backward(ctx, grad: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        h, scale = ctx.saved_tensors
        return grad * scale, (grad * h).sum_to_size(scale.shape), grad.sum_to_size(ctx.shift)


def modulate(h: th.Tensor, scale: th.Tensor, shift: th.Tensor) -> th.Tensor:
    """
    Compute h * scale + shift, of a tensor h that nobody needs afterwards: without gradients its memory is used again.

    :param h: an [N x C x H x W] tensor; scale and shift broadcast to it.
    """
    if th.compiler.is_compiling():  # which finds a place by itself, and cannot take one that is channels_last
        return th.addcmul(shift, h, scale)
    return _Modulate.apply(h, scale, shift) if th.is_grad_enabled() else th.addcmul(shift, h, scale, out=h)


def normalization(channels: int) -> GroupNorm32:
    """
    Make the U-Net's standard normalisation layer.

    :param channels: the number of channels, a multiple of 32.
    """
    return GroupNorm32(GROUPS, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero, so that its residual branch starts as the identity, and return it."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def mean_flat(x: th.Tensor) -> th.Tensor:
    """
    Average over all dimensions but the first.

    :param x: an [N x ...] tensor.
    :return: an [N] tensor.
    """
    return x.flatten(1).mean(1)


def timestep_embedding(timesteps: th.Tensor, dim: int, max_period: float = 10_000) -> th.Tensor:
    """
    Embed timesteps as cosines, then sines, of geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    :param timesteps: an [N] tensor of timesteps, possibly fractional.
    :param dim: the width of the embedding.
    :param max_period: the longest period, in timesteps.
    :return: an [N x dim] fp32 tensor; where dim is odd its last column is zero.
    """
    half = dim // 2
    exponents = th.arange(half, dtype=th.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * th.exp(-math.log(max_period) * exponents)
    return F.pad(th.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def checkpoint(function: Callable[..., th.Tensor], enabled: bool, *inputs: th.Tensor) -> th.Tensor:
    """
    Call a function; when enabled, keep no intermediate activations and compute them again in the backward pass.

    :param function: a function of tensors.
    :param enabled: whether to trade time for memory.
    """
    if enabled and th.is_grad_enabled():
        return torch_checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


@th.no_grad()
def update_ema(
    target: Iterable[th.Tensor], source: Iterable[th.Tensor], rate: float = 0.99, moved: th.Tensor | None = None
) -> None:
    """
    Move an exponential moving average in place: target = rate * target + (1 - rate) * source.

    :param target: the averages.
    :param source: the current values, in the same order.
    :param rate: the share of the average that stays; near 1 is slow.
    :param moved: a 0-d boolean tensor on their device: at False the averages stay. None is True.
    """
    target = list(target)
    if moved is not None and moved.device.type == "cpu":  # where its value is at hand
        if not moved:
            return
        moved = None
    if moved is None:
        th._foreach_lerp_(target, [p.detach() for p in source], 1 - rate)  # in one pass over the memory
        return
    towards = th._foreach_sub([p.detach() for p in source], target)
    th._foreach_mul_(towards, (1 - rate) * moved)
    th._foreach_add_(target, towards)
