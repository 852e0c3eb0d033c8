"""The flags of a model and of its diffusion process. Knows nothing of what is built from them."""

from dataclasses import dataclass

from .options import COUNT, SIZE, Options, flag
from .schedules import NOISE_SCHEDULES
from .spade import HIDDEN_CHANNELS

LOSS_WEIGHTS = ("none", "min_snr")


@dataclass(frozen=True)
class ModelOptions(Options):
    """The U-Net, without what its condition decides (see ConditionSpec)."""

    image_size: int = flag(64, "height and width of the images, in pixels", within=SIZE)
    num_channels: int = flag(128, "channels of the first level", within=SIZE)
    num_res_blocks: int = flag(2, "residual blocks a level", within="[1, 1000]")
    channel_mult: str = flag(
        "",
        "multiples of --num_channels, one a level, such as 1,1,2,3,4; empty: by --image_size, for 64, 128, 256 and 512",
    )
    num_heads: int = flag(4, "attention heads, where --num_head_channels is -1", within=SIZE)
    num_heads_upsample: int = flag(-1, "the same in the decoder; -1: as --num_heads")
    num_head_channels: int = flag(-1, "channels of an attention head; -1: by --num_heads")
    attention_resolutions: str = flag("16,8", "heights of the feature maps that get attention, in pixels")
    dropout: float = flag(0.0, "share of activations dropped in training", within="[0, 1)")
    use_checkpoint: bool = flag(
        False, "compute activations again in the backward pass: less memory, more time", changeable=True
    )
    use_scale_shift_norm: bool = flag(True, "the time embedding scales and shifts features; False: it is added to them")
    resblock_updown: bool = flag(False, "change resolution inside residual blocks")
    use_fp16: bool = flag(
        False, "compute in fp16; on a CPU in bf16 where it has units for it, else in fp32", changeable=True
    )
    use_new_attention_order: bool = flag(False, "lay out the channels of queries, keys and values one after another")
    spade_channels: int = flag(
        HIDDEN_CHANNELS,
        "channels of the hidden layers by which the decoder sees the condition; fewer are cheaper",
        within=SIZE,
        ours=True,
    )

    def __post_init__(self) -> None:
        """:raises ValueError: naming flag, value and remedy."""
        super().__post_init__()
        for name in ("num_heads_upsample", "num_head_channels"):
            value = getattr(self, name)
            if value < 1 and value != -1:
                raise ValueError(f"--{name} {value} must be -1 or at least 1")


@dataclass(frozen=True)
class DiffusionOptions(Options):
    """
    The diffusion process and the loss.

    :raises ValueError: where a value is out of range or contradicts another.
    """

    learn_sigma: bool = flag(False, "the model predicts the reverse process's variance, too")
    diffusion_steps: int = flag(1000, "steps of the process that the model is trained on", within=COUNT)
    noise_schedule: str = flag("linear", "how noise grows over the steps", choices=NOISE_SCHEDULES)
    timestep_respacing: str = flag("", "how many of the steps to keep: 250, 10,15,20 for sections, ddim25; empty: all")
    use_kl: bool = flag(False, "train on the variational bound rather than the squared error")
    predict_xstart: bool = flag(False, "the model predicts the image rather than the noise")
    predict_v: bool = flag(
        False,
        "the model predicts v = alpha noise - sigma image (Salimans and Ho 2022) rather than the noise",
        ours=True,
    )
    rescale_timesteps: bool = flag(False, "scale timesteps to 0..1000 before the model sees them")
    rescale_learned_sigmas: bool = flag(False, "weigh the variance's part of the loss as a sum over all steps")
    loss_weights: str = flag(
        "none",
        "weights of the squared error by timestep: none, or min_snr (Hang et al. 2023), by which an error of the image "
        "costs as much as its signal-to-noise ratio says, up to --min_snr_gamma; in the log, loss is with them, which "
        "--schedule_sampler and validation go by, and mse without",
        choices=LOSS_WEIGHTS,
        ours=True,
    )
    min_snr_gamma: float = flag(
        5.0, "the largest signal-to-noise ratio that --loss_weights min_snr counts", within="(0, inf)", ours=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predict_v and self.predict_xstart:
            raise ValueError(
                "--predict_v True with --predict_xstart True, given or by the checkpoint's config.json: a model "
                "predicts one of them"
            )
        if self.use_kl and self.loss_weights != "none":
            raise ValueError(
                f"--loss_weights {self.loss_weights} with --use_kl True: it weighs the squared error, which is not "
                "trained on then; give one of them"
            )
        if self.loss_weights != "min_snr" and self.min_snr_gamma != self.flags()["min_snr_gamma"]:
            raise ValueError(f"--min_snr_gamma {self.min_snr_gamma} without --loss_weights min_snr: nothing reads it")
