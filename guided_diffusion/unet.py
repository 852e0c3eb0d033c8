"""The U-Net: a plain encoder, a middle block and a decoder that sees the condition through SPADE. Knows no channel's
meaning; the layout of its state_dict is the reference's."""

import math
from collections.abc import Iterator, Sequence

import torch as th
import torch.nn.functional as F
from torch import nn

from .fp16_util import cast_convolutions
from .nn import GROUPS, Conv1d, Conv2d, checkpoint, normalization, silu, timestep_embedding, zero_module
from .spade import CachedCondition, Modulations, SPADEGroupNorm


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


class _ResidualBlock(nn.Module):
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
        return checkpoint(self._forward, self.use_checkpoint, x, emb, y)

    def _forward(self, x: th.Tensor, emb: th.Tensor, y: th.Tensor) -> th.Tensor:
        h = self.resample(silu(self.first_norm(x, y)))
        h = self.in_layers[-1](h)
        emb_out = self.emb_layers(emb).to(h.dtype)[..., None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.second_norm(h, y) * (1 + scale) + shift
        else:
            h = self.second_norm(h.add_(emb_out), y)
        dropout, conv = self.out_layers[-2:]
        return conv(dropout(silu(h))).add_(self.skip_connection(self.resample(x)))


class ResBlock(_ResidualBlock):
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


class SDMResBlock(_ResidualBlock):
    """
    The middle block's and the decoder's residual block, normalised by SPADE with the condition.

    :param cond_channels: channels of the condition; other parameters as ResBlock's.
    """

    def __init__(
        self, channels: int, emb_channels: int, dropout: float, out_channels: int, cond_channels: int, **options
    ) -> None:
        super().__init__(**options)
        self.in_norm = SPADEGroupNorm(channels, cond_channels)
        self.in_layers = nn.Sequential(nn.SiLU(), Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = self._make_emb_layers(emb_channels, out_channels)
        self.out_norm = SPADEGroupNorm(out_channels, cond_channels)
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
            q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        else:
            q, k, v = qkv.unflatten(1, (self.num_heads, 3, -1)).unbind(2)
        # [N x heads x T x d], contiguous: torch takes its slow path for any other layout.
        q, k, v = (part.transpose(2, 3).contiguous() for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, channels, -1)
        return x + self.proj_out(attended).view(x.shape)


class TimestepEmbedSequential(nn.Sequential):
    """A sequence of layers; the embedding and the condition go to those that take them."""

    def forward(self, x: th.Tensor, emb: th.Tensor, y: th.Tensor) -> th.Tensor:
        for layer in self:
            x = layer(x, emb, y) if isinstance(layer, _ResidualBlock) else layer(x)
        return x


class UNetModel(nn.Module):
    """
    Predicts noise (and variance) of a noisy image, given its timestep and a spatial condition.

    :param image_size: height and width of the images, in pixels.
    :param in_channels: channels of x.
    :param model_channels: the base width.
    :param out_channels: channels of the output: in_channels, or twice as many with a learned variance.
    :param num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    :param attention_resolutions: the downsampling rates at which attention is used; 4 means at image_size / 4.
    :param channel_mult: multiplier of model_channels, per level; its length is the number of levels.
    :param conv_resample: convolve when resampling; has no effect with resblock_updown.
    :param num_classes: channels of the condition y (the name is the reference's).
    :param use_fp16: compute in fp16; the parameters stay in fp32. See convert_to.
    :param num_heads_upsample: heads in the decoder; -1 means num_heads.
    :param resblock_updown: resample inside residual blocks.
    :raises ValueError: where sizes do not divide.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        dropout: float = 0,
        channel_mult: tuple[float, ...] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_classes: int = 1,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(image_size, model_channels, channel_mult)
        if num_res_blocks < 1:
            raise ValueError(f"--num_res_blocks {num_res_blocks} must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"--dropout {dropout} must lie in [0, 1)")
        self.image_size = image_size
        self.model_channels = model_channels
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.dtype = th.float16 if use_fp16 else th.float32
        self.cached_conditions: list[CachedCondition] = []  # filled by spade.cached_condition
        emb_channels = 4 * model_channels
        options = dict(use_scale_shift_norm=use_scale_shift_norm, use_checkpoint=use_checkpoint)

        def plain(ch: int, out_ch: int, resample=None) -> ResBlock:
            return ResBlock(ch, emb_channels, dropout, out_ch, resample=resample, **options)

        def spade(ch: int, out_ch: int, resample=None) -> SDMResBlock:
            return SDMResBlock(ch, emb_channels, dropout, out_ch, num_classes, resample=resample, **options)

        def attention(ch: int, heads: int) -> AttentionBlock:
            return AttentionBlock(ch, heads, num_head_channels, use_checkpoint, use_new_attention_order)

        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        widths = [int(mult * model_channels) for mult in channel_mult]
        last = len(widths) - 1
        self.levels = len(widths)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        ch = widths[0]
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(Conv2d(in_channels, ch, 3, padding=1))])
        skips = [ch]
        for level, width in enumerate(widths):
            attend = 2**level in attention_resolutions
            for _ in range(num_res_blocks):
                layers = [plain(ch, width), *([attention(width, num_heads)] if attend else [])]
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                ch = width
                skips.append(ch)
            if level != last:
                down = plain(ch, ch, downsample) if resblock_updown else Downsample(ch, conv_resample)
                self.input_blocks.append(TimestepEmbedSequential(down))
                skips.append(ch)

        self.middle_block = TimestepEmbedSequential(spade(ch, ch), attention(ch, num_heads), spade(ch, ch))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            attend = 2**level in attention_resolutions
            for i in range(num_res_blocks + 1):
                layers = [spade(ch + skips.pop(), width), *([attention(width, heads_up)] if attend else [])]
                ch = width
                if level and i == num_res_blocks:
                    layers.append(spade(ch, ch, upsample) if resblock_updown else Upsample(ch, conv_resample))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(normalization(ch), nn.SiLU(), zero_module(Conv2d(ch, out_channels, 3, padding=1)))

    def convert_to(self, dtype: th.dtype, weights: bool = False) -> None:
        """
        Compute in this dtype from now on; norms' statistics, the time embedding and the last layer stay in fp32.

        :param weights: also store the convolutions' weights so: half the memory, for inference only.
        """
        self.dtype = dtype
        if weights:
            for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
                cast_convolutions(blocks, dtype)

    def place(self, device: th.device, compiled: bool = False, training: bool = False) -> None:
        """
        Move the model to a device, in the memory layout that is fastest there.

        :param compiled: have encoder and decoder translated to fused kernels when they are first called, which takes
            minutes; every other batch size is translated apart.
        :param training: whether there will be backward passes.
        :raises ValueError: where this machine has no compiler that would do.
        """
        # Channels last: the CPU's convolutions are faster so, but for their gradients, as is what a compiler makes of
        # the norms; a GPU's group norm is not.
        by_pixel = compiled or (device.type == "cpu" and not training)
        self.to(device, memory_format=th.channels_last if by_pixel else th.contiguous_format)
        if compiled:
            check_compiler(device)
            self.encode = th.compile(self.encode)
            self._decode = th.compile(self._decode)

    def convert_to_fp16(self) -> None:
        """Store and compute the body of the model in fp16, for inference."""
        self.convert_to(th.float16, weights=True)

    def convert_to_fp32(self) -> None:
        """Undo convert_to_fp16, as far as the rounded weights allow."""
        self.convert_to(th.float32, weights=True)

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        :param x: an [N x in_channels x H x W] tensor of noisy images.
        :param timesteps: an [N] tensor of timesteps.
        :param y: an [N x num_classes x H x W] condition.
        :return: an [N x out_channels x H x W] tensor, in x's dtype.
        """
        return self.branches(x, timesteps, [y])[0]

    def branches(self, x: th.Tensor, timesteps: th.Tensor, ys: Sequence[th.Tensor]) -> list[th.Tensor]:
        """
        Run the encoder once and the decoder for each of several conditions, as guidance does.

        :param ys: conditions, each [N or 1 x num_classes x H x W]; other parameters as forward's.
        :return: what forward gives for each.
        """
        emb = self.embed(timesteps)
        h, skips = self.encode(x, emb)
        return [self.decode(h, skips, emb, y).to(x.dtype) for y in ys]

    def modulation_bytes(self, image_size: int) -> int:
        """:return: how much memory spade.cached_condition takes for one image of this height and width."""
        side = image_size // 2 ** (self.levels - 1)
        values = sum(2 * layer.channels * math.prod(size) for layer, size in self._spade_layers(side, side))
        return values * self.dtype.itemsize

    def embed(self, timesteps: th.Tensor) -> th.Tensor:
        """:return: the [N x emb_channels] fp32 embedding of [N] timesteps."""
        return self.time_embed(timestep_embedding(timesteps, self.model_channels))

    def encode(self, x: th.Tensor, emb: th.Tensor) -> tuple[th.Tensor, list[th.Tensor]]:
        """
        Run the encoder, which does not depend on the condition.

        :return: the deepest feature map, and the feature maps that the decoder takes up, shallowest first.
        """
        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, None)
            skips.append(h)
        return h, skips

    def decode(self, h: th.Tensor, skips: list[th.Tensor], emb: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        Run the middle block, the decoder and the output layer.

        :param h: what encode gave; so are skips.
        :param emb: the timestep embedding that encode was given.
        :param y: an [N x num_classes x H x W] condition.
        :return: an [N x out_channels x H x W] fp32 tensor.
        """
        if y.shape[1] != self.num_classes:
            raise ValueError(
                f"the condition has {y.shape[1]} channels; by --num_classes the model was made for {self.num_classes}"
            )
        cached = next((c for c in self.cached_conditions if c.y is y), None)
        if cached:
            y = cached.modulations(list(self._spade_layers(*h.shape[2:])), self.dtype)
        else:
            y = y.to(self.dtype)
        return self._decode(h, skips, emb, y)

    def _decode(self, h: th.Tensor, skips: list[th.Tensor], emb: th.Tensor, y: th.Tensor | Modulations) -> th.Tensor:
        h = self.middle_block(h, emb, y)
        for block, skip in zip(self.output_blocks, reversed(skips)):
            h = block(th.cat([h, skip], dim=1), emb, y)
        return self.out(h.float())

    def _spade_layers(self, height: int, width: int) -> Iterator[tuple[SPADEGroupNorm, tuple[int, int]]]:
        """
        :param height: that of the deepest feature map; so is width.
        :return: an iterator over the SPADE layers in the order of use, each with the size it works at.
        """
        size = height, width
        for block in (self.middle_block, *self.output_blocks):
            for layer in block:
                grown = tuple(2 * side for side in size)
                if isinstance(layer, SDMResBlock):
                    yield layer.in_norm, size
                    size = grown if layer.resample is upsample else size
                    yield layer.out_norm, size
                elif isinstance(layer, Upsample):
                    size = grown


def check_compiler(device: th.device) -> None:
    """:raises ValueError: where torch.compile finds no working compiler for a device, by a trial that takes seconds."""
    try:
        th.compile(th.sigmoid)(th.zeros(8, device=device))
    except Exception as error:  # whatever breaks in a tool chain
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"--compile True needs a working C++ compiler such as g++ ({reason}): leave it out") from None


def _check_sizes(image_size: int, model_channels: int, channel_mult: tuple[float, ...]) -> None:
    factor = 2 ** (len(channel_mult) - 1)
    if image_size < 1 or image_size % factor:
        raise ValueError(
            f"--image_size {image_size} does not divide by {factor}, which {len(channel_mult)} levels need: "
            f"choose a multiple of {factor}, or fewer entries in --channel_mult"
        )
    for mult in channel_mult:
        width = mult * model_channels
        if width <= 0 or width % GROUPS:
            raise ValueError(
                f"--num_channels {model_channels} times {mult:g} of --channel_mult is not a multiple of {GROUPS}, "
                "which the group norms need"
            )
