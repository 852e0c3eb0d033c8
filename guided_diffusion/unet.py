"""The U-Net: a plain encoder, a middle block and a decoder that sees the condition through SPADE. Knows no channel's
meaning; the layout of its state_dict is the reference's."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch as th
from torch import nn

from .casting import casts_kept
from .fp16_util import cast_convolutions
from .nn import GROUPS, Conv2d, normalization, timestep_embedding, zero_module
from .spade import HIDDEN_CHANNELS, Condition, Modulation, Modulations, SPADEGroupNorm, resized
from .unet_blocks import AttentionBlock as AttentionBlock
from .unet_blocks import BlockMaker, SDMResBlock, TimestepEmbedSequential, Upsample, upsample
from .unet_blocks import Downsample as Downsample
from .unet_blocks import ResBlock as ResBlock


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
    :param dims: 2, for images; the reference's order of arguments has it here.
    :param num_classes: channels of the condition y (the name is the reference's).
    :param use_fp16: compute in fp16; the parameters stay in fp32. See convert_to.
    :param num_heads_upsample: heads in the decoder; -1 means num_heads.
    :param resblock_updown: resample inside residual blocks.
    :param spade_channels: channels of SPADE's hidden layers, by which the decoder sees the condition.
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
        dims: int = 2,
        num_classes: int = 1,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        *,
        spade_channels: int = HIDDEN_CHANNELS,
    ) -> None:
        super().__init__()
        _check_values(num_res_blocks, dropout, dims)
        _check_sizes(image_size, model_channels, channel_mult)
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.model_channels, self.levels = model_channels, len(channel_mult)
        self.dtype = th.float16 if use_fp16 else th.float32
        emb_channels = 4 * model_channels
        make = BlockMaker(
            emb_channels=emb_channels,
            cond_channels=num_classes,
            spade_channels=spade_channels,
            dropout=dropout,
            num_head_channels=num_head_channels,
            conv_resample=conv_resample,
            resblock_updown=resblock_updown,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
            use_new_attention_order=use_new_attention_order,
        )
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        widths = [int(mult * model_channels) for mult in channel_mult]
        attend = [2**level in attention_resolutions for level in range(self.levels)]

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        first = TimestepEmbedSequential(Conv2d(in_channels, widths[0], 3, padding=1))
        blocks, skips = _encoder(make, widths, num_res_blocks, attend, num_heads)
        self.input_blocks = nn.ModuleList([first, *blocks])
        ch = widths[-1]
        self.middle_block = TimestepEmbedSequential(
            make.spade(ch, ch), make.attention(ch, num_heads), make.spade(ch, ch)
        )
        self.output_blocks = nn.ModuleList(_decoder(make, widths, num_res_blocks, attend, heads_up, skips))
        last = Conv2d(widths[0], out_channels, 3, padding=1)
        self.out = nn.Sequential(normalization(widths[0]), nn.SiLU(), zero_module(last))

    def convert_to(self, dtype: th.dtype, weights: bool = False) -> None:
        """
        Compute in this dtype from now on. The time embedding and the last layer stay in fp32, as do the group norms but
        for those of SPADE, see SPADEGroupNorm.

        :param weights: also store the convolutions' weights so: half the memory, for inference only.
        """
        self.dtype = dtype
        if weights:
            for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
                cast_convolutions(blocks, dtype)

    def place(self, device: th.device, compiled: bool = False, training: bool = False) -> None:
        """
        Move the model to a device, in the memory layout that is fastest there.

        :param compiled: compile encoder and decoder to fused kernels when they are first called, which takes minutes;
            once for each batch size.
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

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """
        In a with block a compiled model computes as it is written: for what is computed seldom, and in shapes or modes
        of its own, each of which would be compiled for minutes.
        """
        compiled = {name: vars(self).pop(name) for name in ("encode", "_decode") if name in vars(self)}
        try:
            yield
        finally:
            vars(self).update(compiled)

    def convert_to_fp16(self) -> None:
        """Store and compute the body of the model in fp16, for inference."""
        self.convert_to(th.float16, weights=True)

    def convert_to_fp32(self) -> None:
        """Undo convert_to_fp16, as far as the rounded weights allow."""
        self.convert_to(th.float32, weights=True)

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: Condition) -> th.Tensor:
        """
        :param x: an [N x in_channels x H x W] tensor of noisy images.
        :param timesteps: an [N] tensor of timesteps.
        :param y: an [N or 1 x num_classes x H x W] condition, or its modulations.
        :return: an [N x out_channels x H x W] tensor, in x's dtype.
        """
        return self.branches(x, timesteps, [y])[0]

    def branches(self, x: th.Tensor, timesteps: th.Tensor, ys: Sequence[Condition]) -> list[th.Tensor]:
        """
        Run the encoder once and the decoder for each of several conditions, as guidance does.

        :param ys: conditions or their modulations; other parameters as forward's.
        :return: what forward gives for each.
        """
        emb = self.embed(timesteps)
        h, skips = self.encode(x, emb)
        return [self.decode(h, skips, emb, y).to(x.dtype) for y in ys]

    def modulations(self, y: th.Tensor) -> Modulations:
        """
        Convolve a condition once, for all the calls of this model that are given the result in y's place.

        Sampling wants this in th.no_grad() or th.inference_mode(), since gradients take memory.

        :param y: an [N or 1 x num_classes x H x W] condition, of the images' own size.
        """
        self._check_channels(y)
        shrink = 2 ** (self.levels - 1)
        sizes = self._spade_layers(y.shape[2] // shrink, y.shape[3] // shrink)
        cast = y.to(self.dtype)
        return Modulations(y.shape, {layer: layer.modulation(cast, size) for layer, size in sizes})

    def modulation_bytes(self, image_size: int) -> int:
        """:return: how many bytes the modulations of one image of this height and width take."""
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

    def decode(self, h: th.Tensor, skips: list[th.Tensor], emb: th.Tensor, y: Condition) -> th.Tensor:
        """
        Run the middle block, the decoder and the output layer.

        :param h: what encode gave; so are skips.
        :param emb: the timestep embedding that encode was given.
        :param y: an [N or 1 x num_classes x H x W] condition, or its modulations.
        :return: an [N x out_channels x H x W] fp32 tensor.
        """
        if th.is_tensor(y):
            self._check_channels(y)
            return self._decode(h, skips, emb, y.to(self.dtype))
        if self.middle_block[0].in_norm not in y.layers:
            raise ValueError("these modulations are another model's: make them by this one's method")
        return self._decode(h, skips, emb, y.layers)

    def parameters_cast(self) -> contextlib.AbstractContextManager[None]:
        """
        A context in which the parameters are cast to the dtype of the computation once, not at every use: for a
        training step. It takes as much memory as they do in that dtype. A compiled model casts in its own kernels.
        """
        blocks = [*self.input_blocks, self.middle_block, *self.output_blocks]
        needless = self.dtype == th.float32 or "encode" in vars(self)  # see place
        return casts_kept([] if needless else blocks, self.dtype)

    def _check_channels(self, y: th.Tensor) -> None:
        if y.shape[1] != self.num_classes:
            raise ValueError(
                f"the condition has {y.shape[1]} channels; by --num_classes the model was made for {self.num_classes}"
            )

    def _decode(
        self, h: th.Tensor, skips: list[th.Tensor], emb: th.Tensor, y: th.Tensor | dict[SPADEGroupNorm, Modulation]
    ) -> th.Tensor:
        if th.is_tensor(y):
            deepest = h.shape[2:]
            sizes = [tuple(2**level * side for side in deepest) for level in range(self.levels)]
            y = {size: resized(y, size) for size in sizes}  # once, for all layers and all that is computed again
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


def _encoder(
    make: BlockMaker, widths: list[int], num_res_blocks: int, attend: list[bool], heads: int
) -> tuple[list[TimestepEmbedSequential], list[int]]:
    """
    Make the encoder's blocks after its first convolution.

    :param widths: channels of each level; attend: whether a level has attention.
    :return: the blocks, and the channels that each block leaves for the decoder, the first convolution's before them.
    """
    blocks, skips = [], [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            layers = [make.plain(skips[-1], width), *([make.attention(width, heads)] if attend[level] else [])]
            blocks.append(TimestepEmbedSequential(*layers))
            skips.append(width)
        if level != len(widths) - 1:
            blocks.append(TimestepEmbedSequential(make.down(width)))
            skips.append(width)
    return blocks, skips


def _decoder(
    make: BlockMaker, widths: list[int], num_res_blocks: int, attend: list[bool], heads: int, skips: list[int]
) -> list[TimestepEmbedSequential]:
    """:return: the decoder's blocks; parameters as _encoder's, and the channels that the encoder left."""
    blocks, ch, skips = [], widths[-1], list(skips)
    for level in reversed(range(len(widths))):
        for i in range(num_res_blocks + 1):
            layers = [make.spade(ch + skips.pop(), widths[level])]
            ch = widths[level]
            if attend[level]:
                layers.append(make.attention(ch, heads))
            if level and i == num_res_blocks:
                layers.append(make.up(ch))
            blocks.append(TimestepEmbedSequential(*layers))
    return blocks


def check_compiler(device: th.device) -> None:
    """:raises ValueError: where torch.compile finds no working compiler for a device, by a trial that takes seconds."""
    try:
        th.compile(th.sigmoid)(th.zeros(8, device=device))
    except Exception as error:  # whatever breaks in a tool chain
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"--compile True needs a working C++ compiler such as g++, and Python's headers ({reason}): leave it out"
        ) from None


def _check_values(num_res_blocks: int, dropout: float, dims: int) -> None:
    if dims != 2:
        raise ValueError(f"UNetModel is for images: dims {dims} must be 2")
    if num_res_blocks < 1:
        raise ValueError(f"--num_res_blocks {num_res_blocks} must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"--dropout {dropout} must lie in [0, 1)")


WIDEST = 1 << 16  # channels of a layer


def _check_sizes(image_size: int, model_channels: int, channel_mult: tuple[float, ...]) -> None:
    factor = 2 ** (len(channel_mult) - 1)
    if image_size < 1 or image_size % factor:
        raise ValueError(
            f"--image_size {image_size} does not divide by {factor}, which {len(channel_mult)} levels need: "
            f"choose a multiple of {factor}, or fewer entries in --channel_mult"
        )
    for mult in channel_mult:
        width = mult * model_channels
        if width > WIDEST:
            raise ValueError(
                f"--num_channels {model_channels} times {mult:g} of --channel_mult is over {WIDEST}: give less"
            )
        if width <= 0 or width % GROUPS:
            raise ValueError(
                f"--num_channels {model_channels} times {mult:g} of --channel_mult is not a multiple of {GROUPS}, "
                "which the group norms need"
            )
