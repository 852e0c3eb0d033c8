"""Which device to compute on, and in which precision. For the core and histology alike; knows nothing of ranks."""

import contextlib
import ctypes
import os
import subprocess
import warnings
from pathlib import Path

import torch as th

PRECISIONS = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}
# malloc.h: option -> its values to keep what is freed, and as glibc comes to have them by itself.
_MALLOC = {"M_MMAP_MAX": (-4, 0, 65536), "M_TRIM_THRESHOLD": (-1, -1, 2**26), "M_MMAP_THRESHOLD": (-3, 2**25, 2**25)}
UNSCALED = ("fp32", "bf16")  # those that need no scaled loss, which all programs but image_train.py offer


def has_bf16(device: th.device) -> bool:
    """
    Say whether a device computes in bfloat16 itself, as GPUs do from Ampere on, and CPUs with AVX-512 BF16, AMX or
    Arm's extension of that name. Other CPUs imitate it, some 20 times slower than fp32.
    """
    if device.type == "cuda":
        return th.cuda.is_bf16_supported(False)
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def find_device(text: str = "auto", number: int = 0) -> th.device:
    """
    Find the device that a --device names, and make a GPU the current one, with one meaning of fp32 for all programs.

    :param text: auto is a GPU where there is one; cuda, or cuda:1, needs one; cpu takes none.
    :param number: which of the GPUs auto and cuda take, from 0; beyond the last it begins at the first again.
    :raises ValueError: where there is no such device, or where torch cannot use the GPUs that are there and cpu was not
        asked for: days on a CPU would be what nobody meant.
    """
    kind, _, place = text.partition(":")
    if kind not in ("auto", "cuda", "cpu") or (place and not (kind == "cuda" and place.isdecimal())):
        raise ValueError(f"--device {text}: give auto, cpu, cuda, or one GPU such as cuda:1")
    if kind == "cpu":
        return th.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver that is too old; the error says so
        usable = th.cuda.is_available()
    if not usable:
        gpus = _listed_gpus()
        if gpus or kind == "cuda":
            raise ValueError(f"--device {text}: {_unusable(gpus)}")
        return th.device("cpu")
    count = th.cuda.device_count()
    if place and int(place) >= count:
        raise ValueError(f"--device {text}: torch sees {count} GPU{'s' * (count > 1)}, numbered from 0")
    device = th.device("cuda", int(place) if place else number % count)
    th.cuda.set_device(device)
    # As torch has it by default, which is how the reference computes. In TF32 numbers are rounded to fp16's digits, and
    # some eight times as fast; matrix products, of which distances of features are made, are not worth that.
    th.backends.cudnn.allow_tf32, th.backends.cuda.matmul.allow_tf32 = True, False
    return device


def prepare_training(device: th.device) -> None:
    """
    Set up what pays off where every step has the same shapes. A CPU keeps its memory, see keep_memory. On a GPU, cuDNN
    tries its kernels for each convolution at its first call, and goes on with the fastest: which that is may differ
    between runs, and with it the rounding, so sampling does without.
    """
    if device.type == "cpu":
        keep_memory()
    else:
        th.backends.cudnn.benchmark = True


def keep_memory(keep: bool = True) -> None:
    """
    Have the C library keep what is freed for the next tensor. By itself glibc hands large blocks back to the system,
    which clears each page anew when it is next touched: some 7 % of a training step on a CPU.

    :param keep: False has glibc hand back what it holds, and do so again, as a benchmark may want to.
    """
    with contextlib.suppress(AttributeError, OSError):  # of other C libraries
        library = ctypes.CDLL(None)
        for option, kept, own in _MALLOC.values():
            library.mallopt(option, kept if keep else own)
        if not keep:
            library.malloc_trim(0)


def _listed_gpus() -> list[str]:
    """The GPUs that the driver lists, as "GPU 0: NVIDIA A100 (UUID: ...)"; none where the user has hidden them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles"):
        return []
    return [line for line in _ask_driver("-L") if line.startswith("GPU ")]


def _unusable(gpus: list[str]) -> str:
    built = f"CUDA {th.version.cuda}" if th.version.cuda else "no CUDA, for CPUs only"
    answer = _ask_driver("--query-gpu=driver_version", "--format=csv,noheader") if gpus else []
    details = [f"driver {line}" for line in answer[:1] if line.replace(".", "").isdecimal()]
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        details.append(f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}")
    there = f"nvidia-smi lists {len(gpus)} GPU{'s' * (len(gpus) > 1)}" if gpus else "there is no GPU"
    return (
        f"{there}{' (' + ', '.join(details) + ')' if details else ''}, but torch {th.__version__}, which was built for "
        f"{built}, can use none: install a torch that fits the driver, or give --device cpu"
    )


def _ask_driver(*arguments: str) -> list[str]:
    try:
        answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.splitlines() if answer.returncode == 0 else []
