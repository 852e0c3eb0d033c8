"""
The flags that a checkpoint was trained with: config.json beside it, and which of them its weights depend on.

Knows no weights, so that who asks for a fact of a model need not load torch.
"""

from typing import Any

import blobfile as bf

from . import logger
from .files import is_file, read_json
from .magnification import REFERENCE_MPP, check, mismatch

CONFIG_NAME = "config.json"

# The flags that a checkpoint's weights depend on: with another value they do not load or do not mean the same.
MODEL_FIELDS = (
    "image_size",
    "in_channels",
    "num_channels",
    "channel_mult",
    "num_res_blocks",
    "attention_resolutions",
    "num_heads",
    "num_head_channels",
    "num_heads_upsample",
    "use_new_attention_order",
    "resblock_updown",
    "use_scale_shift_norm",
    "spade_channels",
    "num_classes",
    "class_cond",
    "use_hv_map",
    "use_col_map",
    "no_instance",
    "mark_unknown",
    "learn_sigma",
    "predict_xstart",
    "predict_v",
    "diffusion_steps",
    "noise_schedule",
    "rescale_timesteps",
)
# What a config.json means that is older than the flag.
BEFORE_FLAGS = {"spade_channels": 128, "predict_v": False, "loss_weights": "none", "mark_unknown": False}
# What is read of a config.json without being given to a flag, which would check it.
TYPES = {"mark_unknown": bool, "drop_hvb_only": bool, "drop_rate": (float, int), "unlabelled_share": (float, int)}


def load_config(checkpoint_path: str) -> dict[str, Any] | None:
    """
    :return: the flags that a checkpoint was trained with, or None where there is no config.json beside it. A flag that
        there was not yet has the value that it stood for; micrometres a pixel those of 40x.
    :raises ValueError: where the file is damaged, or one of TYPES is of another type.
    """
    path = bf.join(bf.dirname(checkpoint_path) or ".", CONFIG_NAME)
    if not is_file(path):
        return None
    try:
        config = read_json(path)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not parse: restore it, or remove it to go without its check")
    for name, kind in TYPES.items():
        if name in config and not isinstance(config[name], kind):
            raise ValueError(f"{path} has --{name} {config[name]!r}: restore it or remove it")
    return {**BEFORE_FLAGS, **config, "mpp": config.get("mpp") or REFERENCE_MPP}


def trained_null_condition(config: dict[str, Any]) -> str:
    """
    :param config: the flags that a model was trained with, as far as they are known.
    :return: the null condition that it has seen more often: dropped conditions', or that of images without masks, which
        keep their colours.
    """
    dropped = config.get("drop_rate") or 0
    unlabelled = (config.get("unlabelled_share") or 0) * (1 - dropped) if config.get("unlabelled_dir") else 0
    kept = config.get("drop_hvb_only") or unlabelled > dropped
    return "keep_colour" if kept and config.get("use_col_map") else "zeros"


def meaning(value: Any) -> Any:
    """:return: a flag's value, in which lists of numbers such as 1,2 and 1.0,2 are alike."""
    try:
        return [float(part) for part in value.split(",")] if isinstance(value, str) else value
    except ValueError:
        return value


def check_config(checkpoint_path: str, flags: dict[str, Any]) -> None:
    """
    Compare flags with those a checkpoint was trained with, as far as these are known; and warn where it was trained at
    another magnification than that of --data_dir or --structure_dir.

    :param flags: flag -> value of this run.
    :raises ValueError: naming the first of MODEL_FIELDS that differs.
    """
    config = load_config(checkpoint_path) or {}
    for field in MODEL_FIELDS:
        if field in config and field in flags and meaning(config[field]) != meaning(flags[field]):
            raise ValueError(
                f"checkpoint {checkpoint_path} was trained with --{field} {config[field]}, "
                f"this run has --{field} {flags[field]}: give the same"
            )
    mpp = check(config.get("mpp") or REFERENCE_MPP, f"config.json beside {checkpoint_path}: mpp")
    for folder in ("data_dir", "structure_dir"):
        if line := mismatch(checkpoint_path, mpp, flags.get(folder, "")):
            logger.warn(line)
