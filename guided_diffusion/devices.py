"""Which device a program computes on. Knows nothing of ranks or of what is computed."""

import os
import shutil
import subprocess
import warnings

import torch as th

DEVICES = ("auto", "cuda", "cpu")


def choose(device: str = "auto", number: int = 0) -> th.device:
    """
    Choose the device, and make a GPU the current one.

    :param device: auto is a GPU where there is one; cuda needs one; cpu takes none.
    :param number: which of the GPUs, from 0; beyond the last it begins at the first again.
    :raises ValueError: where torch cannot use the GPUs that are there and cpu was not asked for: days on a CPU would
        be what nobody meant.
    """
    if device not in DEVICES:
        raise ValueError(f"--device {device}: choose one of {', '.join(DEVICES)}")
    if device == "cpu":
        return th.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver that is too old; the error says so
        usable = th.cuda.is_available()
    if not usable:
        gpus = _listed_gpus()
        if gpus or device == "cuda":
            raise ValueError(_unusable(gpus))
        return th.device("cpu")
    chosen = th.device("cuda", number % th.cuda.device_count())
    th.cuda.set_device(chosen)
    return chosen


def _listed_gpus() -> list[str]:
    """The GPUs that the driver lists, as "GPU 0: NVIDIA A100 (UUID: ...)"; none where the user has hidden them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles") or not _driver_tool():
        return []
    return [line for line in _ask_driver("-L") if line.startswith("GPU ")]


def _unusable(gpus: list[str]) -> str:
    built = f"CUDA {th.version.cuda}" if th.version.cuda else "no CUDA, for CPUs only"
    driver = next(iter(_ask_driver("--query-gpu=driver_version", "--format=csv,noheader") if gpus else []), "")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = f"nvidia-smi lists {len(gpus)} GPU{'s' * (len(gpus) > 1)}" if gpus else "there is no GPU"
    details = [f"driver {driver}"] * bool(driver) + [f"CUDA_VISIBLE_DEVICES={hidden}"] * (hidden is not None)
    return (
        f"{there}{' (' + ', '.join(details) + ')' if details else ''}, but torch {th.__version__}, which was built for "
        f"{built}, can use none: install a torch that fits the driver, or give --device cpu"
    )


def _driver_tool() -> str | None:
    return shutil.which("nvidia-smi")


def _ask_driver(*arguments: str) -> list[str]:
    try:
        answer = subprocess.run([_driver_tool(), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.splitlines() if answer.returncode == 0 else []
