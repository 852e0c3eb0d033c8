"""SPADE normalisation: the only way by which the condition enters the U-Net. Knows no channel's meaning."""

from dataclasses import dataclass

import torch as th
import torch.nn.functional as F
from torch import nn

from .casting import Casting, Parts
from .nn import GROUPS, Conv2d, modulate

HIDDEN_CHANNELS = 128  # the reference's

Modulation = tuple[th.Tensor, th.Tensor]
Sizes = dict[tuple[int, int], th.Tensor]  # (height, width) -> a condition


@dataclass(frozen=True, eq=False)
class Modulations:
    """
    What a U-Net's SPADE layers make of one condition. It depends on neither the image nor the timestep: sampling
    computes it once, by UNetModel.modulations, and passes it where the condition would go.

    A plain value: made in no_grad or inference mode it carries no gradients, and later changes of the condition or of
    the weights do not reach it.

    :param shape: the condition's, [N x C x H x W]; N = 1 serves a batch of any size.
    :param layers: what each layer's modulation method gives.
    """

    shape: th.Size
    layers: "dict[SPADEGroupNorm, Modulation]"

    @property
    def device(self) -> th.device:
        """Where the tensors are."""
        return next(iter(self.layers.values()))[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tensors take."""
        return sum(part.nbytes for modulation in self.layers.values() for part in modulation)


Condition = th.Tensor | Modulations


class SPADEGroupNorm(Casting):
    """
    Spatially-adaptive normalisation (Park et al. 2019) over a group norm without affine parameters.

    GroupNorm(x) * (1 + gamma(y)) + beta(y), with gamma and beta from two convolutions on a shared hidden layer.

    In half precision PyTorch's group norm sums in fp32. By its source, the GPU's then rounds mean and deviation to x's
    own dtype before it applies them, as there is no affine map in fp32; the CPU's does not.

    :param channels: the number of channels of x.
    :param cond_channels: the number of channels of the condition y.
    :param hidden_channels: the hidden layer's.
    """

    def __init__(self, channels: int, cond_channels: int, hidden_channels: int = HIDDEN_CHANNELS) -> None:
        super().__init__()
        self.channels = channels
        self.mlp_shared = nn.Sequential(Conv2d(cond_channels, hidden_channels, 3, padding=1), nn.ReLU())
        # Never called: their parameters are those of one convolution, see sources.
        self.mlp_gamma = nn.Conv2d(hidden_channels, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden_channels, channels, 3, padding=1)

    def forward(self, x: th.Tensor, y: "th.Tensor | Sizes | dict[SPADEGroupNorm, Modulation]") -> th.Tensor:
        """
        :param x: an [N x channels x H x W] tensor.
        :param y: an [N or 1 x cond_channels x H' x W'] condition, brought to x's size by nearest neighbour; that at
            several sizes, x's among them; or what Modulations holds.
        """
        size = tuple(x.shape[2:])
        if th.is_tensor(y):
            made = self.modulation(y, size)
        else:
            made = y[self] if self in y else self.modulation(y[size], size)
        return modulate(F.group_norm(x, GROUPS), *made)

    def modulation(self, y: th.Tensor, size: tuple[int, int]) -> Modulation:
        """
        Compute what the condition says at one resolution; it depends on neither x nor the timestep.

        :return: (1 + gamma, beta), each [N x channels x *size].
        """
        hidden = self.mlp_shared(resized(y, size))
        # One convolution for both: the hidden layer is read once.
        return F.conv2d(hidden, *self.operands(hidden.dtype), padding=1).chunk(2, dim=1)

    def sources(self) -> tuple[Parts, ...]:
        gamma, beta = self.mlp_gamma, self.mlp_beta
        return (gamma.weight, beta.weight), (gamma.bias + 1, beta.bias)


def resized(y: th.Tensor, size: tuple[int, int]) -> th.Tensor:
    """:return: a condition of this height and width, by nearest neighbour."""
    return y if y.shape[2:] == size else F.interpolate(y, size=size, mode="nearest")
