"""Checkpoint files: their names, writing, safe reading, and which run wrote them. Knows no model and no flags."""

import errno
import hashlib
import io
import os
import re
import struct
import warnings
import zipfile
from typing import Any

import blobfile as bf
import torch as th
from torch import nn

from . import dist_util
from .files import is_file, is_remote, read_bytes, writing

BEST = "best"  # the sub-folder of the best set; and what links to its files have in place of the step
RESULT_NAME = "result.json"


def model_name(step: int) -> str:
    """:return: the file name of the weights after this number of steps."""
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


def resume_step(path: str) -> int:
    """:return: the step to go on from with a checkpoint: 0 for one that is no model's, or of unknown step."""
    return parse_step(path) if re.fullmatch(r"model\d+\.pt", bf.basename(path)) else 0


def save(state: dict[str, Any], folder: str, name: str, run_id: str = "") -> None:
    """
    Write a file whole or not at all.

    :param state: tensors, numbers and strings in dicts and lists; nothing else can be read back.
    :param folder: a local folder.
    :param run_id: what run_of will say; it changes nothing of what is loaded.
    :raises OSError: where it cannot be written; what was there before stays.
    """
    with writing(os.path.join(folder, name)) as file:
        th.save(state, file)
        if run_id:  # a zip archive ends in its comment and, before it, the comment's length, which was 0
            file.seek(-2, os.SEEK_END)
            file.write(struct.pack("<H", len(run_id)) + run_id.encode())


def run_of(path: str) -> str:
    """:return: the id of the run that wrote a local checkpoint; "" where it does not say, as the reference's."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment.decode(errors="replace")
    except zipfile.BadZipFile:
        return ""


def content_id(path: str) -> str:
    """:return: what tells a local checkpoint's tensors from others', wherever it lies; "" of what torch < 1.6 wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [(part.filename.partition("/")[2], part.CRC) for part in archive.infolist()]
    except zipfile.BadZipFile:
        return ""
    return hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()[:16]


def is_whole(path: str) -> bool:
    """
    :return: whether a local checkpoint is unspoilt, by its checksums.
    :raises OSError: where it cannot be read, which says nothing about what it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except OSError as error:
        if error.errno != errno.EINVAL:  # which the offsets of a broken archive lead to
            raise
    except Exception:  # zipfile raises half a dozen types for one
        pass
    try:
        parse(path, path)  # what torch wrote before 1.6 is no archive
    except ValueError:
        return False
    return True


def load_training_state(model_path: str) -> dict[str, Any]:
    """:return: what lies beside a model as state_name; {} where there is none, as with the reference's. Collective."""
    path = bf.join(bf.dirname(model_path) or ".", state_name(resume_step(model_path)))
    return load(path) if exists(path) else {}


def samples_seen(model_path: str, per_step: int) -> int:
    """
    :param model_path: what to go on from; "" at the start of a run.
    :param per_step: how many samples a step had, where the checkpoint does not say.
    :return: how many samples the run had seen. Collective.
    """
    step = resume_step(model_path)
    return load_training_state(model_path).get("samples", step * per_step) if step else 0


def exists(path: str) -> bool:
    """:return: whether rank 0, which reads all checkpoints, has such a file. Collective."""
    return dist_util.all_gather(dist_util.agree(lambda: dist_util.rank() == 0 and is_file(path)))[0]


def load(path: str) -> dict[str, Any]:
    """
    Read a checkpoint on rank 0 and give it to all ranks, on the CPU. Collective.

    Only tensors and plain containers are read: a file that would run code is refused.

    :raises FileNotFoundError: where there is no such file.
    :raises ValueError: where it is truncated, no checkpoint, or holds anything else.
    """
    data = dist_util.broadcast_bytes(dist_util.agree(lambda: _read(path) if dist_util.rank() == 0 else None))
    return parse(io.BytesIO(data), path)


def _read(path: str) -> bytes:
    try:
        if not is_file(path):
            raise FileNotFoundError(f"checkpoint {path} is not a file: check the path")
        return read_bytes(path)
    except bf.Error as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None


def parse(source: io.BytesIO | str, path: str, **options: Any) -> dict[str, Any]:
    """
    Read a file's tensors and plain containers on this rank.

    :param source: a local path, or the file's bytes.
    :param path: what to call it.
    :raises ValueError: saying in one line why that is not possible.
    :raises OSError: where the path cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of on its way to an error is part of the error
            state = th.load(source, map_location="cpu", weights_only=True, **options)
    except OSError:
        raise
    except Exception as error:  # torch raises half a dozen types for a broken file
        said = "weights_only" in str(error) or "Weights only" in str(error)  # as torch also says of what is no pickle
        if said and _beginning(source).startswith((b"\x80", b"PK")):
            reason = "holds more than tensors and would run code if it were loaded: refused"
        else:
            reason = "is truncated or no checkpoint"
        raise ValueError(f"checkpoint {path} {reason}; use a file that image_train.py wrote") from None
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} holds no state_dict; use a file that image_train.py wrote")
    return state


def _beginning(source: io.BytesIO | str) -> bytes:
    """:return: a file's first two bytes, as parse takes it."""
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:2]
    with open(source, "rb") as file:
        return file.read(2)


def check_weights(model: nn.Module, path: str) -> None:
    """
    Check that a checkpoint would load into a model; of a local file only the names and shapes are read. Collective.

    :raises ValueError: as load_weights does.
    """

    def check() -> None:
        if dist_util.rank() == 0:
            check_fit(model, parse(path, path, mmap=zipfile.is_zipfile(path)), path)  # else of torch < 1.6

    if is_remote(path) or not exists(path):
        check_fit(model, load(path), path)
    else:
        dist_util.agree(check)


def load_weights(model: nn.Module, path: str, alone: bool = False) -> None:
    """
    Load a checkpoint's weights into a model. Collective, unless alone.

    :param alone: this rank reads the file itself.
    :raises ValueError: where a name or a shape differs; the first is named.
    """
    state = parse(io.BytesIO(_read(path)), path) if alone else load(path)
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
