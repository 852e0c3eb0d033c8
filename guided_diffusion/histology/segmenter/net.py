"""
The segmenter's network: a U-Net that predicts what is nucleus, where in its nucleus a pixel is, and of which class.

The encoder is EfficientNet-Lite0 up to 1/16 of the resolution, for which there are ImageNet weights; the decoder ends
at 1/2 and is unfolded to full resolution, which costs a quarter of one more level. Owns the layers. Knows nothing of
instance maps, losses or files.
"""

import torch as th
import torch.nn.functional as F
from torch import nn

from ..features.lite0 import STAGES, STEM, ConvNorm, load_weights, make_stages, shipped_weights

ADAPT = 0.3  # the share of an image's own mean and variance in evaluation
STRIDE = 16  # height and width of the input must be multiples of it
_ENCODER = 5  # stages of EfficientNet-Lite0
_SKIPS = (0, 1, 2)  # the stages whose outputs the decoder sees: 1/2, 1/4 and 1/8 of the resolution
_DECODER = (32, 64, 96)  # channels at 1/2, 1/4 and 1/8
_UNFOLDED = 12  # channels of the 2 x 2 pixels that the last decoder block sees beside the encoder


class SegmenterNet(nn.Module):
    """
    Maps pixels, (value - 127) / 128, to three values each: nucleus as a logit, and the position in it, x and y; and to
    as many logits as there are classes of nuclei.

    :param classes: how many; 0: it tells none apart.
    """

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, stride=2, norm=AdaptiveNorm)
        self.stages = make_stages(_ENCODER, AdaptiveNorm)
        channels = STAGES[_ENCODER - 1][3]
        self.decoder = nn.ModuleList()
        for level in reversed(range(len(_SKIPS))):
            skipped = STAGES[_SKIPS[level]][3] + (_UNFOLDED if level == 0 else 0)
            width = _DECODER[level]
            first = ConvNorm(channels + skipped, width, 3, norm=AdaptiveNorm)
            self.decoder.append(nn.Sequential(first, ConvNorm(width, width, 3, norm=AdaptiveNorm)))
            channels = width
        self.head = nn.Conv2d(channels, 3 * 4, 1)
        # The last to draw its weights, so that a seed's others are the same without classes.
        self.class_head = nn.Conv2d(channels, classes * 4, 1) if classes else None

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: [N x 3 x H x W], H and W multiples of 16.
        :return: [N x (3 + classes) x H x W] of x's type.
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
        out = self.head(h) if self.class_head is None else th.cat([self.head(h), self.class_head(h)], dim=1)
        return F.pixel_shuffle(out, 2)


def seeded_net(seed: int = 0, classes: int = 0) -> SegmenterNet:
    """A new network, a function of both alone; torch's global generator, which layers draw from, is put back."""
    with th.random.fork_rng(devices=[]):
        th.manual_seed(seed)
        return SegmenterNet(classes)


def load_imagenet_weights(net: SegmenterNet) -> None:
    """Give the encoder ImageNet weights. :raises ImportError: the package that ships them is missing."""
    load_weights([net.stem, net.stages], shipped_weights("--pretrained True"))


class AdaptiveNorm(nn.BatchNorm2d):
    """
    BatchNorm that meets a new stain halfway: evaluation mixes in the statistics of the image at hand.

    Schneider et al., NeurIPS 2020, per image; training is plain BatchNorm. So what is found in a place depends on all
    of the image, or of the tile of it that passes the network, also in a test: no label is seen, but the method is one
    that adapts at test time, and is to be compared with such.
    """

    adapt = ADAPT  # 0 is plain BatchNorm

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:param x: [N x C x H x W]."""
        if self.training:
            return super().forward(x)
        # On a CPU var_mean, in one pass, takes ten times as long as these two.
        wide = x.float()
        mean = wide.mean((2, 3), keepdim=True)
        variance = (wide - mean).square_().mean((2, 3))
        mean = th.lerp(self.running_mean.float(), mean[..., 0, 0], self.adapt)
        variance = th.lerp(self.running_var.float(), variance, self.adapt)
        scale = self.weight * th.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return th.addcmul(shift[..., None, None], x, scale[..., None, None]).to(x.dtype)
