"""What the U-Net is built of: resampling, residual blocks with and without the condition, attention. The names and the
order of their parameters are the reference's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch as th
import torch.nn.functional as F
from torch import nn

from .nn import Conv1d, Conv2d, checkpoint, modulate, normalization, silu, zero_module
from .spade import HIDDEN_CHANNELS, SPADEGroupNorm


def upsample(x: th.Tensor) -> th.Tensor:
    """Double height and width by nearest neighbour."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def downsample(x: th.Tensor) -> th.Tensor:
    """Halve height and width by averaging 2 x 2 pixels."""
    return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Doubles height and width, then convolves unless told not to."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.conv(upsample(x))


class Downsample(nn.Module):
    """Halves height and width, by a strided convolution or by averaging."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.op(x)


class ResidualBlock(nn.Module):
    """
    What the encoder's and the decoder's residual blocks share; they differ in how they normalise.

    The order in which the two make their layers is that of the reference's parameters, by which optimiser files go.

    :param resample: a function applied to the hidden and the skip branch (upsample, downsample), or None.
    :param use_scale_shift_norm: let the embedding scale and shift the second norm's output; else it is added before.
    :param use_checkpoint: compute activations again in the backward pass.
    """

    def __init__(self, *, resample, use_scale_shift_norm: bool, use_checkpoint: bool) -> None:
        super().__init__()
        self.resample = resample or (lambda x: x)
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint

    def _make_emb_layers(self, emb_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (1 + self.use_scale_shift_norm) * out_channels))

    def first_norm(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        raise NotImplementedError

    def second_norm(self, h: th.Tensor, y: th.Tensor) -> th.Tensor:
        raise NotImplementedError

    def forward(self, x: th.Tensor, emb: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        :param x: an [N x C x H x W] feature map.
        :param emb: an [N x emb_channels] fp32 timestep embedding.
        :param y: an [N x cond_channels x H' x W'] condition; the encoder's blocks do not look at it.
        """
        # Of few numbers, which are not worth computing again.
        shift = self.emb_layers(emb).to(x.dtype)[..., None, None]
        scale = None
        if self.use_scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            scale = 1 + scale
        return checkpoint(self._forward, self.use_checkpoint, x, scale, shift, y)

    def _forward(self, x: th.Tensor, scale: th.Tensor | None, shift: th.Tensor, y: th.Tensor) -> th.Tensor:
        h = self.resample(silu(self.first_norm(x, y)))
        h = self.in_layers[-1](h)
        if scale is None:
            h = self.second_norm(h.add_(shift), y)
        elif h.device.type == "cpu":
            h = self.second_norm(h, y) * scale + shift  # addcmul would round once, and change results by a bit
        else:
            h = modulate(self.second_norm(h, y), scale, shift)
        dropout, conv = self.out_layers[-2:]
        return conv(dropout(silu(h))).add_(self.skip_connection(self.resample(x)))


class ResBlock(ResidualBlock):
    """
    The encoder's residual block, normalised by group norms; it never sees the condition.

    :param channels: input channels.
    :param emb_channels: width of the timestep embedding.
    :param out_channels: output channels.
    :param options: resample, use_scale_shift_norm, use_checkpoint.
    """

    def __init__(self, channels: int, emb_channels: int, dropout: float, out_channels: int, **options) -> None:
        super().__init__(**options)
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = self._make_emb_layers(emb_channels, out_channels)
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = _make_skip(channels, out_channels)

    def first_norm(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        return self.in_layers[0](x)

    def second_norm(self, h: th.Tensor, y: th.Tensor) -> th.Tensor:
        return self.out_layers[0](h)


class SDMResBlock(ResidualBlock):
    """
    The middle block's and the decoder's residual block, normalised by SPADE with the condition.

    :param cond_channels: channels of the condition; other parameters as ResBlock's.
    :param spade_channels: of SPADE's hidden layer.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        cond_channels: int,
        spade_channels: int = HIDDEN_CHANNELS,
        **options,
    ) -> None:
        super().__init__(**options)
        self.in_norm = SPADEGroupNorm(channels, cond_channels, spade_channels)
        self.in_layers = nn.Sequential(nn.SiLU(), Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = self._make_emb_layers(emb_channels, out_channels)
        self.out_norm = SPADEGroupNorm(out_channels, cond_channels, spade_channels)
        self.out_layers = nn.Sequential(
            nn.SiLU(), nn.Dropout(dropout), zero_module(Conv2d(out_channels, out_channels, 3, padding=1))
        )
        self.skip_connection = _make_skip(channels, out_channels)

    def first_norm(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        return self.in_norm(x, y)

    def second_norm(self, h: th.Tensor, y: th.Tensor) -> th.Tensor:
        return self.out_norm(h, y)


def _make_skip(channels: int, out_channels: int) -> nn.Module:
    return nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)


class AttentionBlock(nn.Module):
    """
    Self-attention over all pixels, added to its input.

    :param channels: the number of channels.
    :param num_heads: heads, where num_head_channels is -1.
    :param num_head_channels: channels per head, or -1.
    :param use_new_attention_order: lay the qkv channels out as q, k, v, each split into heads; else as heads, each
        split into q, k, v. Only loading a checkpoint cares.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        by_count = num_head_channels == -1
        divisor = num_heads if by_count else num_head_channels
        if divisor < 1 or channels % divisor:
            flag = "--num_heads or --num_heads_upsample" if by_count else "--num_head_channels"
            raise ValueError(f"{flag} {divisor} does not divide the {channels} channels that attention works on")
        self.num_heads = divisor if by_count else channels // divisor
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(Conv1d(channels, channels, 1))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:param x: an [N x C x H x W] feature map."""
        return checkpoint(self._forward, self.use_checkpoint, x)

    def _forward(self, x: th.Tensor) -> th.Tensor:
        n, channels = x.shape[:2]
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.use_new_attention_order:
            qkv = qkv.unflatten(1, (3, self.num_heads, -1)).transpose(1, 2)
        else:
            qkv = qkv.unflatten(1, (self.num_heads, 3, -1))
        # [N x heads x T x d] each, contiguous: torch takes its slow path for any other layout.
        q, k, v = qkv.permute(2, 0, 1, 4, 3).contiguous()
        attended = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, channels, -1)
        return x + self.proj_out(attended).view(x.shape)


class TimestepEmbedSequential(nn.Sequential):
    """A sequence of layers; the embedding and the condition go to those that take them."""

    def forward(self, x: th.Tensor, emb: th.Tensor, y: th.Tensor) -> th.Tensor:
        for layer in self:
            x = layer(x, emb, y) if isinstance(layer, ResidualBlock) else layer(x)
        return x


@dataclass(frozen=True)
class BlockMaker:
    """
    Makes a U-Net's blocks, of which all share these settings.

    :param emb_channels: channels of the timestep embedding; cond_channels: of the condition; spade_channels: of SPADE's
        hidden layers.
    :param num_head_channels: channels of an attention head; -1 leaves it to the number of heads.
    :param conv_resample: convolve when resampling; has no effect with resblock_updown.
    :param resblock_updown: resample inside residual blocks.
    """

    emb_channels: int
    cond_channels: int
    spade_channels: int
    dropout: float
    num_head_channels: int
    conv_resample: bool
    resblock_updown: bool
    use_scale_shift_norm: bool
    use_checkpoint: bool
    use_new_attention_order: bool

    @property
    def _shared(self) -> dict[str, bool]:
        return dict(use_scale_shift_norm=self.use_scale_shift_norm, use_checkpoint=self.use_checkpoint)

    def plain(self, ch: int, out_ch: int, resample: Callable | None = None) -> ResBlock:
        """:return: a residual block of the encoder."""
        return ResBlock(ch, self.emb_channels, self.dropout, out_ch, resample=resample, **self._shared)

    def spade(self, ch: int, out_ch: int, resample: Callable | None = None) -> SDMResBlock:
        """:return: a residual block that sees the condition."""
        widths = self.cond_channels, self.spade_channels
        return SDMResBlock(ch, self.emb_channels, self.dropout, out_ch, *widths, resample=resample, **self._shared)

    def attention(self, ch: int, heads: int) -> AttentionBlock:
        """:return: a block of self-attention."""
        return AttentionBlock(ch, heads, self.num_head_channels, self.use_checkpoint, self.use_new_attention_order)

    def down(self, ch: int) -> ResBlock | Downsample:
        """:return: what halves height and width in the encoder."""
        return self.plain(ch, ch, downsample) if self.resblock_updown else Downsample(ch, self.conv_resample)

    def up(self, ch: int) -> SDMResBlock | Upsample:
        """:return: what doubles height and width in the decoder."""
        return self.spade(ch, ch, upsample) if self.resblock_updown else Upsample(ch, self.conv_resample)
