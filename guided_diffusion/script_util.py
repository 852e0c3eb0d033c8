"""From flags to objects: defaults, parsing, factories, by the reference's names. Knows none of training or sampling."""

import argparse
from collections.abc import Iterable
from typing import Any

from . import gaussian_diffusion as gd
from .conditioning import ConditionSpec
from .model_options import DiffusionOptions, ModelOptions
from .options import str2bool as str2bool
from .options import value_type
from .respace import SpacedDiffusion, space_timesteps
from .run_options import DataOptions, RunOptions
from .spade import HIDDEN_CHANNELS
from .unet import UNetModel

NUM_CLASSES = ConditionSpec.flags()["num_classes"]

# Levels of the U-Net by image size, where --channel_mult is not given.
DEFAULT_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}


# (use_kl, rescale_learned_sigmas) -> what is minimised.
LOSS_TYPES = {
    (False, False): gd.LossType.MSE,
    (False, True): gd.LossType.RESCALED_MSE,
    (True, False): gd.LossType.RESCALED_KL,
    (True, True): gd.LossType.RESCALED_KL,
}

# (predict_xstart, predict_v) -> what the model predicts.
MEAN_TYPES = {
    (False, False): gd.ModelMeanType.EPSILON,
    (True, False): gd.ModelMeanType.START_X,
    (False, True): gd.ModelMeanType.VELOCITY,
}


def diffusion_defaults() -> dict[str, Any]:
    """:return: the flags that make a diffusion process, with their defaults."""
    return DiffusionOptions.flags()


def model_and_diffusion_defaults() -> dict[str, Any]:
    """:return: the flags that make a model and a diffusion process, with their defaults."""
    condition = ConditionSpec.flags()
    for name in ("mpp", "mark_unknown"):  # what its channels mean is no business of the model
        del condition[name]
    return {**ModelOptions.flags(), **condition, **DiffusionOptions.flags()}


def data_defaults() -> dict[str, Any]:
    """:return: the flags that choose and arrange the data, in training and sampling alike, with their defaults."""
    return {**DataOptions.flags(), **{name: RunOptions.flags()[name] for name in ("num_workers", "seed")}}


def check_data_flags(flags: dict[str, Any]) -> None:
    """:raises ValueError: where a flag of DataOptions is out of range, or contradicts the images."""
    if DataOptions.read(flags).stain_jitter and flags["in_channels"] != 3:
        raise ValueError(f"--stain_jitter with --in_channels {flags['in_channels']}: only RGB images have stains")


def condition_spec(flags: dict[str, Any]) -> ConditionSpec:
    """
    Make the condition's layout from flags, which checks --num_classes against it.

    :param flags: flag -> value; others than the spec's are ignored. Scripts for the reference know of no mpp and
        no mark_unknown.
    """
    return ConditionSpec.read({"mpp": 0.0, "mark_unknown": False, **flags})


def create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """
    Make a model and its diffusion process.

    :param flags: those of model_and_diffusion_defaults; one that is missing has its default.
    :raises ValueError: where a value is out of range, or does not fit another.
    """
    flags = {**model_and_diffusion_defaults(), **flags}
    ModelOptions.read(flags)
    of_diffusion = vars(DiffusionOptions.read(flags))
    of_model = {name: value for name, value in flags.items() if name not in of_diffusion}
    model = create_model(learn_sigma=of_diffusion["learn_sigma"], **of_model)
    steps = of_diffusion.pop("diffusion_steps")
    return model, create_gaussian_diffusion(steps=steps, **of_diffusion)


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0.0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    *,
    num_classes: int = NUM_CLASSES,
    in_channels: int = 3,
    no_instance: bool = False,
    use_col_map: bool = False,
    use_hv_map: bool = False,
    spade_channels: int = HIDDEN_CHANNELS,
) -> UNetModel:
    """
    Make a U-Net from flags.

    :param channel_mult: comma-separated multipliers, one a level; "" means the default for the image size.
    :param attention_resolutions: comma-separated heights of the feature maps that get attention, in pixels.
    :param num_classes: with class_cond the number of one-hot classes, on top of which edges and colour come; else
        the number of channels of the condition.
    :param spade_channels: channels of SPADE's hidden layers.
    """
    cond_channels = num_classes
    if class_cond:
        others = dict(in_channels=in_channels, no_instance=no_instance, use_col_map=use_col_map, use_hv_map=use_hv_map)
        cond_channels = ConditionSpec(class_cond=True, num_classes=num_classes, **others).channels
    return UNetModel(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=2 * in_channels if learn_sigma else in_channels,
        num_res_blocks=num_res_blocks,
        attention_resolutions=_attention_rates(image_size, attention_resolutions),
        dropout=dropout,
        channel_mult=_channel_mult(image_size, channel_mult),
        num_classes=cond_channels,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
        spade_channels=spade_channels,
    )


def _channel_mult(image_size: int, channel_mult: str) -> tuple[float, ...]:
    if channel_mult:
        try:
            return tuple(float(mult) for mult in channel_mult.split(","))
        except ValueError:
            raise ValueError(f"--channel_mult {channel_mult} does not parse: give multipliers such as 1,2,2") from None
    if image_size not in DEFAULT_CHANNEL_MULT:
        sizes = ", ".join(str(size) for size in sorted(DEFAULT_CHANNEL_MULT))
        raise ValueError(
            f"--image_size {image_size} has no default --channel_mult ({sizes} have): give one, e.g. 1,2,2"
        )
    return DEFAULT_CHANNEL_MULT[image_size]


def _attention_rates(image_size: int, attention_resolutions: str) -> tuple[int, ...]:
    flag = f"--attention_resolutions {attention_resolutions}"
    try:
        sizes = [int(size) for size in attention_resolutions.split(",") if size]
    except ValueError:
        raise ValueError(f"{flag} does not parse: give sizes such as 32,16,8") from None
    for size in sizes:
        if not 1 <= size <= image_size:
            raise ValueError(f"{flag}: {size} is out of range for --image_size {image_size}")
    return tuple(image_size // size for size in sizes)


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | list[int] = "",
    predict_v: bool = False,
    loss_weights: str = "none",
    min_snr_gamma: float = 5.0,
) -> SpacedDiffusion:
    """
    Make a diffusion process from flags.

    :param steps: the length of the process the model is trained on.
    :param sigma_small: without learn_sigma, use the posterior's variance rather than beta.
    :param timestep_respacing: see respace.space_timesteps; "" keeps all steps.
    """
    if steps < 1:
        raise ValueError(f"--diffusion_steps {steps} must be at least 1")
    if predict_v and predict_xstart:
        raise ValueError("--predict_v True with --predict_xstart True: a model predicts one of them")
    if use_kl and loss_weights == "min_snr":
        raise ValueError("loss_weights min_snr with use_kl: they weigh the squared error, which that does not take")
    if learn_sigma:
        var_type = gd.ModelVarType.LEARNED_RANGE
    else:
        var_type = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=MEAN_TYPES[predict_xstart, predict_v],
        model_var_type=var_type,
        loss_type=LOSS_TYPES[use_kl, rescale_learned_sigmas],
        min_snr_gamma=min_snr_gamma if loss_weights == "min_snr" else None,
        rescale_timesteps=rescale_timesteps,
    )


# ---- command lines ----


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """
    Add a flag for each entry, typed as its default; booleans are written True or False.

    :param parser: is added to.
    :param default_dict: flag -> default; None makes a string.
    """
    for name, default in default_dict.items():
        parser.add_argument(f"--{name}", default=default, type=value_type(default))


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """:return: flag -> value for the flags named."""
    return {key: getattr(args, key) for key in keys}
