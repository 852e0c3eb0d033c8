"""Checkpoints: file names, writing, safe reading, and config.json beside the weights. Knows no model and no flag's
meaning."""

import contextlib
import io
import json
import os
import re
import warnings
import zipfile
from typing import Any

import blobfile as bf
import torch as th
from torch import nn

from . import dist_util, logger

CONFIG_NAME, RESULT_NAME = "config.json", "result.json"
ASIDE = ".part"  # what a file's name ends in while it is written

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
    "num_classes",
    "class_cond",
    "use_hv_map",
    "use_col_map",
    "no_instance",
    "learn_sigma",
    "predict_xstart",
    "diffusion_steps",
    "noise_schedule",
    "rescale_timesteps",
)


def model_name(step: int) -> str:
    """:return: the file name of the weights after so many steps."""
    return f"model{step:06d}.pt"


def ema_name(rate: float, step: int) -> str:
    """:return: the file name of the averaged weights."""
    return f"ema_{rate}_{step:06d}.pt"


def opt_name(step: int) -> str:
    """:return: the file name of the optimiser's state."""
    return f"opt{step:06d}.pt"


def state_name(step: int) -> str:
    """:return: the file name of what else a run needs to go on: see train_util.TrainLoop.training_state."""
    return f"state{step:06d}.pt"


def parse_step(path: str) -> int:
    """:return: the step in a checkpoint's name, model040000.pt or ema_0.9999_040000.pt, or 0 where there is none."""
    match = re.search(r"(?:^model|_)(\d+)\.pt$", bf.basename(path))
    return int(match.group(1)) if match else 0


def save(state: dict[str, Any], folder: str, name: str) -> None:
    """
    Write a file whole or not at all: aside first, then renamed.

    :param state: tensors, numbers and strings in dicts and lists; nothing else can be read back.
    :param folder: a folder or blobfile URL.
    :raises OSError: where it cannot be written; what was there before stays.
    """
    path = bf.join(folder, name)
    if _is_remote(path):
        with bf.BlobFile(path, "wb") as file:
            th.save(state, file)
        return
    aside = f"{path}{ASIDE}"
    try:
        with open(aside, "wb") as file:
            th.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        # torch closes its archive after a full disk, too, and complains of that instead.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"cannot write {path}: {cause.strerror}") from None
        raise
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # so that the new name survives a power cut, too
    finally:
        os.close(directory)


def steps(folder: str) -> list[int]:
    """:return: the steps of the models in a local folder, rising."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(parse_step(name) for name in names if re.fullmatch(r"model\d+\.pt", name))


def _files(folder: str) -> dict[str, int]:
    """The checkpoint files in a local folder, models first, and their steps."""
    pattern = re.compile(r"(?:model|ema_[^_/]+_|opt|state)(\d+)\.pt")
    names = sorted(os.listdir(folder), key=lambda name: (not name.startswith("model"), name))
    return {os.path.join(folder, name): int(match[1]) for name in names if (match := pattern.fullmatch(name))}


def prune(folder: str, keep: int, newest: int) -> None:
    """
    Delete the files of all but the newest so many steps of a local folder; the model goes first, as it came last.

    :param newest: the step that was written last. Later ones are left from a run that went back, and deleted, too.
    """
    kept = [step for step in steps(folder) if step <= newest][-keep:]
    for path, step in _files(folder).items():
        if kept and not kept[0] <= step <= newest:
            os.unlink(path)


def remove_leftovers(folder: str) -> None:
    """Delete what a killed run had begun to write in a local folder."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name.endswith(f".pt{ASIDE}"):
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                os.unlink(os.path.join(folder, name))


def is_whole(path: str) -> bool:
    """:return: whether a local checkpoint's files are all there and unspoilt, by their checksums."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        _parse(path, path)  # what torch wrote before 1.6
    except (ValueError, OSError, zipfile.BadZipFile, RuntimeError):
        return False
    return True


def find_newest(folder: str) -> str:
    """
    Find the model to go on from in a run's local folder. Collective.

    :return: the path of the newest one that is whole with all that belongs to it; "" where there is none at all.
    :raises ValueError: where there are some, and each is broken.
    """

    def find() -> str:
        found = steps(folder) if dist_util.rank() == 0 else []
        for step in reversed(found):
            files = (path for path, of in _files(folder).items() if of == step)
            broken = next((path for path in files if not is_whole(path)), None)
            if broken is None:
                return os.path.join(folder, model_name(step))
            logger.warn(f"{broken} is truncated or spoilt: going on from the checkpoint before")
        if found:
            raise ValueError(f"no checkpoint in {folder} is whole: restore one, or remove them to begin anew")
        return ""

    return dist_util.all_gather(dist_util.agree(find))[0]


def load_training_state(model_path: str) -> dict[str, Any]:
    """:return: what lies beside a model as state_name; {} where there is none, as with the reference's. Collective."""
    path = bf.join(bf.dirname(model_path) or ".", state_name(parse_step(model_path)))
    return load(path) if exists(path) else {}


def samples_seen(model_path: str, per_step: int) -> int:
    """
    :param model_path: a checkpoint, or "" at the start of a run.
    :param per_step: how many samples a step had, where the checkpoint does not say.
    :return: how many samples the run had seen. Collective.
    """
    if not model_path:
        return 0
    return load_training_state(model_path).get("samples", parse_step(model_path) * per_step)


def _is_remote(path: str) -> bool:
    return "://" in path


def exists(path: str) -> bool:
    """:return: whether rank 0, which reads all checkpoints, has such a file. Collective."""
    return dist_util.all_gather(dist_util.rank() == 0 and bf.exists(path) and not bf.isdir(path))[0]


def load(path: str) -> dict[str, Any]:
    """
    Read a checkpoint on rank 0 and give it to all ranks, on the CPU. Collective.

    Only tensors and plain containers are read: a file that would run code is refused.

    :raises FileNotFoundError: where there is no such file.
    :raises ValueError: where it is truncated, no checkpoint, or holds anything else.
    """
    data = dist_util.broadcast_bytes(dist_util.agree(lambda: _read(path) if dist_util.rank() == 0 else None))
    return _parse(io.BytesIO(data), path)


def _read(path: str) -> bytes:
    try:
        if not bf.exists(path) or bf.isdir(path):
            raise FileNotFoundError(f"checkpoint {path} is not a file: check the path")
        with bf.BlobFile(path, "rb") as file:
            return file.read()
    except bf.Error as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None


def _parse(source: io.BytesIO | str, path: str, **options: Any) -> dict[str, Any]:
    """Read a file's tensors and plain containers, or say in one line why that is not possible."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of on its way to an error is part of the error
            state = th.load(source, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # torch raises half a dozen types for a broken file
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = "holds more than tensors and would run code if it were loaded: refused"
        else:
            reason = "is truncated or no checkpoint"
        raise ValueError(f"checkpoint {path} {reason}; use a file that image_train.py wrote") from None
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} holds no state_dict; use a file that image_train.py wrote")
    return state


def check_weights(model: nn.Module, path: str) -> None:
    """
    Check that a checkpoint would load into a model; of a local file only the names and shapes are read. Collective.

    :raises ValueError: as load_weights does.
    """

    def check() -> None:
        if dist_util.rank() == 0:
            check_fit(model, _parse(path, path, mmap=True), path)

    if _is_remote(path) or not exists(path):
        check_fit(model, load(path), path)
    else:
        dist_util.agree(check)


def load_weights(model: nn.Module, path: str, alone: bool = False) -> None:
    """
    Load a checkpoint's weights into a model. Collective, unless alone.

    :param alone: this rank reads the file itself.
    :raises ValueError: where a name or a shape differs; the first is named.
    """
    state = _parse(io.BytesIO(_read(path)), path) if alone else load(path)
    check_fit(model, state, path)
    model.load_state_dict(state, strict=True)


def check_fit(model: nn.Module, state: dict[str, Any], path: str) -> None:
    """:raises ValueError: where a state_dict does not fit a model, naming the first entry that differs."""
    own = model.state_dict()
    fields = "check the model flags (--image_size, --num_channels, --num_classes, --channel_mult, ...)"
    for key, value in own.items():
        if key not in state:
            raise ValueError(f"checkpoint {path} has no {key}, which this configuration has: {fields}")
        if not isinstance(state[key], th.Tensor) or state[key].shape != value.shape:
            found = list(getattr(state[key], "shape", []))
            raise ValueError(
                f"checkpoint {path}: {key} is {found} there and {list(value.shape)} in this configuration: {fields}"
            )
    for key in state:
        if key not in own:
            raise ValueError(f"checkpoint {path} has {key}, which this configuration has not: {fields}")


def save_config(folder: str, config: dict[str, Any], name: str = CONFIG_NAME) -> None:
    """Write the resolved flags beside the weights, or something else that is no tensor, whole or not at all."""
    aside = os.path.join(folder, f".{name}{ASIDE}")
    with open(aside, "w") as file:
        file.write(json.dumps(config, indent=2) + "\n")
    os.replace(aside, os.path.join(folder, name))


def check_fresh(folder: str, flags: dict[str, Any]) -> None:
    """:raises ValueError: where a folder holds checkpoints of another configuration, which new ones would mix with."""
    for step in steps(folder):
        check_config(os.path.join(folder, model_name(step)), flags)


def load_config(checkpoint_path: str) -> dict[str, Any] | None:
    """:return: the flags that a checkpoint was trained with, or None where there is no config.json beside it."""
    path = bf.join(bf.dirname(checkpoint_path) or ".", CONFIG_NAME)
    if not bf.exists(path):
        return None
    try:
        with bf.BlobFile(path, "r") as file:
            config = json.loads(file.read())
    except (ValueError, OSError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not parse: restore it, or remove it to go without its check")
    return config


def _meaning(value: Any) -> Any:
    """A flag's value, in which lists of numbers such as 1,2 and 1.0,2 are alike."""
    try:
        return [float(part) for part in value.split(",")] if isinstance(value, str) else value
    except ValueError:
        return value


def check_config(checkpoint_path: str, flags: dict[str, Any]) -> None:
    """
    Compare flags with those a checkpoint was trained with, as far as these are known.

    :param flags: flag -> value of this run.
    :raises ValueError: naming the first of MODEL_FIELDS that differs.
    """
    config = load_config(checkpoint_path) or {}
    for field in MODEL_FIELDS:
        if field in config and field in flags and _meaning(config[field]) != _meaning(flags[field]):
            raise ValueError(
                f"checkpoint {checkpoint_path} was trained with --{field} {config[field]}, "
                f"this run has --{field} {flags[field]}: give the same"
            )
