"""
Sets of checkpoints in a local folder: which there are, the newest that is whole, and how many stay.

A set is the files of one step. Its model is written last and vouches for the others; all carry the id of the run that
wrote them, so files of two runs are no set. Knows file names, and nothing of what is in the files.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import blobfile as bf

from . import checkpoint, dist_util, logger
from .files import is_remote


def steps(folder: str) -> list[int]:
    """:return: the steps of the models in a local folder, rising."""
    return sorted(step for path, step in _files(folder).items() if os.path.basename(path).startswith("model"))


def _files(folder: str) -> dict[str, int]:
    """The checkpoint files in a local folder, models first, and their steps."""
    pattern = re.compile(r"(?:model|ema_[^_/]+_|opt|state)(\d+)\.pt")
    try:
        names = sorted(os.listdir(folder), key=lambda name: (not name.startswith("model"), name))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {os.path.join(folder, name): int(match[1]) for name in names if (match := pattern.fullmatch(name))}


def files_of(model_path: str) -> list[str]:
    """:return: the files of a local model's set, itself first."""
    step = checkpoint.resume_step(model_path)
    return [path for path, of in _files(os.path.dirname(model_path) or ".").items() if of == step]


def check_one_run(model_path: str) -> None:
    """:raises ValueError: where the files of a local model's set are known to be of more than one run."""
    paths: dict[str, str] = {}
    for path in files_of(model_path):
        if run := checkpoint.run_of(path):
            paths.setdefault(run, path)
    if len(paths) > 1:
        raise ValueError(f"{' and '.join(list(paths.values())[:2])} are of two runs, so no set")


def find_newest(folder: str, run_id: str = "") -> str:
    """
    Find the model to go on from in a run's local folder.

    :param run_id: pass over what is known to be of other runs; "" takes any run's.
    :return: the path of the newest one that is whole with all that belongs to it; "" where there is none of this run.
    :raises ValueError: where there are some, and each is broken.
    :raises OSError: where one cannot be read: that is no reason to go back.
    """
    broken = False
    for step in reversed(steps(folder)):
        path = os.path.join(folder, checkpoint.model_name(step))
        if run_id and checkpoint.run_of(path) not in ("", run_id):
            logger.warn(f"{path} is of another run: passed over")
            continue
        corrupt = next((part for part in files_of(path) if not checkpoint.is_whole(part)), None)
        try:
            check_one_run(path)
            if corrupt is None:
                return path
            reason = f"{corrupt} is truncated or corrupt"
        except ValueError as error:
            reason = str(error)
        logger.warn(f"{reason}: going on from the checkpoint before")
        broken = True
    if broken:
        raise ValueError(f"no checkpoint in {folder} is whole: restore one, or remove them to begin anew")
    return ""


def prune(folder: str, keep: int, newest: int) -> None:
    """
    Delete the files of all but the newest sets of a local folder; the model goes first, as it came last.

    :param keep: how many sets stay.
    :param newest: the step that was written last. Later ones are left from a run that went back, and deleted, too.
    """
    kept = [step for step in steps(folder) if step <= newest][-keep:]
    for path, step in _files(folder).items():
        if kept and not kept[0] <= step <= newest:
            os.unlink(path)


def take_up(model_path: str, parts: Mapping[str, Callable[[dict[str, Any], str], None]]) -> str:
    """
    Read what lies beside a model, as far as it does. Collective.

    :param parts: file name -> what takes up its state, given that and its path.
    :return: in one line, what was taken up and what was not.
    :raises ValueError: where the files are of two runs, or one does not fit.
    """
    if not checkpoint.resume_step(model_path):
        return f"beginning at step 0 with the weights of {model_path}, and nothing else: its name has no model's step"
    dist_util.agree(lambda: check_one_run(model_path) if not (dist_util.rank() or is_remote(model_path)) else None)
    found, missing = ["weights"], []
    for name, load in parts.items():
        path = bf.join(bf.dirname(model_path) or ".", name)
        if checkpoint.exists(path):
            load(checkpoint.load(path), path)
            found.append(name)
        else:
            missing.append(name)
    anew = f"; there is no {', no '.join(missing)}: begun anew" if missing else ""
    return f"going on from {model_path}: {', '.join(found)}{anew}"
