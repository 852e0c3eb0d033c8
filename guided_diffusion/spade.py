"""SPADE normalisation: the only way by which the condition enters the U-Net, and the explicit cache that sampling keeps
of it. Knows no channel's meaning."""

import contextlib
from collections.abc import Iterator, Sequence

import torch as th
import torch.nn.functional as F
from torch import nn

from .nn import GROUPS, Conv2d

HIDDEN_CHANNELS = 128

Modulation = tuple[th.Tensor, th.Tensor]
Modulations = dict["SPADEGroupNorm", Modulation]


class CachedCondition:
    """
    A condition, and what each SPADE layer has made of it: gamma and beta depend on neither the image nor the timestep.

    For inference only. All is made anew once y or a layer's weights have changed, in place or by moving to another
    device or dtype.

    :param y: an [N x C x H x W] condition; N = 1 serves a batch of any size.
    """

    def __init__(self, y: th.Tensor) -> None:
        self.y = y
        self._made_from: tuple = ()
        self._kept: Modulations = {}

    def modulations(self, layers: "Sequence[tuple[SPADEGroupNorm, tuple[int, int]]]", dtype: th.dtype) -> Modulations:
        """
        :param layers: a model's SPADE layers and the heights and widths they work at.
        :return: what each layer.modulation gives for y in this dtype.
        """
        if th.is_grad_enabled():
            raise RuntimeError("a cached condition would cut gradients off: it is for inference only")
        tensors = [self.y, *(p for layer, _ in layers for p in layer.parameters())]
        made_from = dtype, [size for _, size in layers], list(map(_state, tensors))
        if self._made_from != made_from:
            self.clear()
            y = self.y.to(dtype)
            self._kept = {layer: layer.modulation(y, size) for layer, size in layers}
            self._made_from = made_from
        return self._kept

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the kept modulations take."""
        return sum(part.nbytes for modulation in self._kept.values() for part in modulation)

    def clear(self) -> None:
        """Forget all modulations."""
        self._kept, self._made_from = {}, ()


def _state(tensor: th.Tensor) -> tuple[int, int]:
    """What changes when a tensor's values may have; one made in inference mode counts no versions."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@contextlib.contextmanager
def cached_condition(model: nn.Module, y: th.Tensor) -> Iterator[CachedCondition]:
    """
    Let a U-Net keep what its SPADE layers make of a condition, for the length of a block.

    Inside it, the model called with this very tensor for y, and without gradients, convolves it once. Several blocks
    may be open at once.

    :param model: a unet.UNetModel.
    :param y: an [N x C x H x W] condition.
    """
    cached = CachedCondition(y)
    model.cached_conditions.append(cached)
    try:
        yield cached
    finally:
        model.cached_conditions.remove(cached)
        cached.clear()


class SPADEGroupNorm(nn.Module):
    """
    Spatially-adaptive normalisation (Park et al. 2019) over a group norm without affine parameters.

    GroupNorm(x) * (1 + gamma(y)) + beta(y), with gamma and beta from two convolutions on a shared hidden layer.

    :param channels: the number of channels of x.
    :param cond_channels: the number of channels of the condition y.
    """

    def __init__(self, channels: int, cond_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.mlp_shared = nn.Sequential(Conv2d(cond_channels, HIDDEN_CHANNELS, 3, padding=1), nn.ReLU())
        self.mlp_gamma = Conv2d(HIDDEN_CHANNELS, channels, 3, padding=1)
        self.mlp_beta = Conv2d(HIDDEN_CHANNELS, channels, 3, padding=1)

    def forward(self, x: th.Tensor, y: th.Tensor | Modulations) -> th.Tensor:
        """
        :param x: an [N x channels x H x W] tensor.
        :param y: an [N or 1 x cond_channels x H' x W'] condition, brought to x's size by nearest neighbour; or what
            CachedCondition keeps of one.
        """
        scale, shift = self.modulation(y, tuple(x.shape[2:])) if th.is_tensor(y) else y[self]
        h = F.group_norm(x, GROUPS)
        # A compiler finds a place for the result by itself, and cannot take one that is channels_last.
        fresh = th.is_grad_enabled() or th.compiler.is_compiling()
        return th.addcmul(shift, h, scale, out=None if fresh else h)

    def modulation(self, y: th.Tensor, size: tuple[int, int]) -> Modulation:
        """
        Compute what the condition says at one resolution; it depends on neither x nor the timestep.

        :return: (1 + gamma, beta), each [N x channels x *size].
        """
        hidden = self.mlp_shared(F.interpolate(y, size=size, mode="nearest"))
        # One convolution for both: the hidden layer is read once.
        weight = th.cat([self.mlp_gamma.weight, self.mlp_beta.weight]).to(hidden.dtype)
        bias = th.cat([self.mlp_gamma.bias + 1, self.mlp_beta.bias]).to(hidden.dtype)
        return F.conv2d(hidden, weight, bias, padding=1).chunk(2, dim=1)
