"""
What a run reports: lines, key-value tables and images, to stdout, log.txt, progress.csv, progress.json, TensorBoard.

Owns who may write: rank 0 writes everything, other ranks only what went wrong, unless OPENAI_LOG_FORMAT_MPI says what
else. Knows nothing of training, of process groups or of what the keys mean. One logger is current at a time; until
`configure` it prints to stdout and touches no file. Environment: OPENAI_LOGDIR, the folder; OPENAI_LOG_FORMAT and, for
ranks other than 0, OPENAI_LOG_FORMAT_MPI, comma lists of formats.

Keys of training have no prefix; what is logged inside ``with prefix("val"):`` has: "loss" becomes "val_loss". Prefixes
nest. A key "step" without prefix is the x-axis of TensorBoard; where it is missing, the number of the dump is.
"""

import contextlib
import datetime
import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import environment
from .log_sinks import FORMATS, Sink, StdoutSink, TextSink, Value, make_sinks

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50

DEFAULT_FORMATS = ("stdout", "log", "csv")

_LABELS = {WARN: "WARNING: ", ERROR: "ERROR: "}
_KEY_WIDTH, _VALUE_WIDTH = 32, 24  # characters of a table's columns at most


@dataclass
class _Logger:
    """
    :param dir: the folder of the run; None if there is none.
    :param sinks: where reports go.
    :param level: lines below it are dropped, tables count as INFO.
    :param prefixes: what goes before a key.
    :param kvs: the values since the last dump.
    :param sums: sum and number of the values behind each mean in kvs.
    :param dumps: how many there were.
    """

    dir: str | None
    sinks: Sequence[Sink]
    level: int = INFO
    prefixes: list[str] = field(default_factory=list)
    kvs: dict[str, Value] = field(default_factory=dict)
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    dumps: int = 0

    def key(self, key: str) -> str:
        return "_".join([*self.prefixes, key])

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


_current = _Logger(None, [StdoutSink()])


def configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, rank: int | None = None, log_suffix: str = ""
) -> None:
    """
    Close the current logger and start one that writes to a folder.

    Files are appended to, so a resumed run goes on in its old folder. Ranks other than 0 write warnings and errors to
    log-rankNNN.txt, which the first of them creates, and nothing else; `set_level` lets more lines through. With
    OPENAI_LOG_FORMAT_MPI they write all that rank 0 would, in these formats, to files with -rankNNN in their names.

    :param dir: the folder; created if need be. Default: OPENAI_LOGDIR, else a fresh openai-DATE-TIME in the system's
        temporary folder. Ranks agree on a folder only if one of the first two is given.
    :param format_strs: from stdout, log, csv, json, tensorboard. Default: OPENAI_LOG_FORMAT, else stdout, log and csv.
    :param rank: this process's rank. Default: what its launcher says.
    :param log_suffix: goes into each file's name, before the extension.
    :raises ValueError: if a format is unknown or dir is a file; nothing has changed then.
    :raises ImportError: if tensorboard is asked for and not installed; nothing has changed then.
    """
    new = _make_logger(dir, format_strs, rank, log_suffix)
    _current.close()
    _go_on_with(new)
    log(f"logging to {new.dir}")


@contextlib.contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, rank: int | None = None, log_suffix: str = ""
) -> Iterator[None]:
    """`configure` for the length of a with block; afterwards the logger from before is current again, as it was."""
    before = _current
    _go_on_with(_make_logger(dir, format_strs, rank, log_suffix))
    try:
        yield
    finally:
        _current.close()
        _go_on_with(before)


def reset() -> None:
    """Close all files and go back to the state before `configure`."""
    _current.close()
    _go_on_with(_Logger(None, [StdoutSink()]))


close = reset


def logkv(key: str, val: object) -> None:
    """
    Set a value for the next dump; the last one counts.

    :param key: its name; the current prefix goes before it.
    :param val: a number, a string, None, or an array or tensor of one element.
    :raises ValueError: if val is an array of more elements.
    """
    key = _current.key(key)
    _current.kvs[key] = _plain(key, val)
    _current.sums.pop(key, None)


def logkv_mean(key: str, val: object) -> None:
    """As `logkv`, for numbers, but the next dump has the mean of all since the last one; None is ignored."""
    key = _current.key(key)
    val = _plain(key, val)
    if val is not None:
        total, count = _current.sums.get(key, (0.0, 0))
        _current.sums[key] = total + val, count + 1
        _current.kvs[key] = (total + val) / (count + 1)


def logkvs(d: Mapping[str, object]) -> None:
    """`logkv` for every item of a mapping."""
    for key, val in d.items():
        logkv(key, val)


def getkvs() -> dict[str, Value]:
    """Return a copy of what the next dump would write."""
    return dict(_current.kvs)


def dumpkvs() -> dict[str, Value]:
    """Write what was collected, if anything was, and forget it; returns it."""
    kvs = getkvs()
    _current.kvs.clear()
    _current.sums.clear()
    if kvs:
        step = int(kvs["step"]) if isinstance(kvs.get("step"), (int, float)) else _current.dumps
        _current.dumps += 1
        log(_table(kvs))
        for sink in _listening():
            sink.write_kvs(kvs, step)
    return kvs


# The names that scripts of older days have for the same.
record_tabular, dump_tabular = logkv, dumpkvs


@contextlib.contextmanager
def profile_kv(name: str) -> Iterator[None]:
    """Add the seconds that a with block takes to the value "wait_NAME" of the next dump."""
    start = time.monotonic()
    try:
        yield
    finally:
        key = _current.key(f"wait_{name}")
        _current.kvs[key] = _current.kvs.get(key, 0.0) + time.monotonic() - start


def profile(name: str) -> Callable[[Callable], Callable]:
    """Decorate a function so that `profile_kv` takes the time of its calls."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            with profile_kv(name):
                return function(*args, **kwargs)

        return timed

    return decorate


def logimage(key: str, array: np.ndarray, step: int) -> None:
    """
    Write an image to TensorBoard; without it nothing happens.

    :param key: its name; the current prefix goes before it.
    :param array: an [H x W x 3] uint8 array.
    :param step: its place on the x-axis.
    :raises ValueError: if the array has another shape or type.
    """
    image = np.asarray(array)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image {key!r}: expected [H x W x 3] uint8, got {image.shape} {image.dtype}")
    for sink in _listening():
        sink.write_image(_current.key(key), image, step)


@contextlib.contextmanager
def prefix(name: str) -> Iterator[None]:
    """Put "NAME_" before every key that is logged in the with block, e.g. "val" for the keys of validation."""
    prefixes = _current.prefixes
    prefixes.append(name)
    try:
        yield
    finally:
        prefixes.pop()


def cut_back(step: int) -> None:
    """
    Forget the values of later steps in progress.csv, progress.json and TensorBoard: a run that goes on from a
    checkpoint takes these steps once more. log.txt keeps its lines.
    """
    for sink in _current.sinks:
        sink.cut_back(step)


def log(*args: object, level: int = INFO) -> None:
    """Write the arguments, separated by spaces, as one line, unless level is below the logger's."""
    if level >= _current.level:
        line = _LABELS.get(level, "") + " ".join(map(str, args))
        for sink in _listening():
            sink.write_line(line)


def debug(*args: object) -> None:
    """`log` at level DEBUG."""
    log(*args, level=DEBUG)


def info(*args: object) -> None:
    """`log` at level INFO."""
    log(*args, level=INFO)


def warn(*args: object) -> None:
    """`log` at level WARN."""
    log(*args, level=WARN)


def error(*args: object) -> None:
    """`log` at level ERROR."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """
    Drop lines below this level from now on, and tables above INFO; DISABLED silences all sinks. The modules that warn
    by Python's logging, since they do not know this one, keep to it, too. It is the current logger's: others begin with
    INFO.
    """
    _current.level = level
    _go_on_with(_current)


def _go_on_with(new: _Logger) -> None:
    """Make a logger the current one, to whose level modules that warn by Python's logging keep."""
    global _current
    _current = new
    logging.getLogger(__package__).setLevel(new.level)


def environment_dir() -> str:
    """Return the folder that OPENAI_LOGDIR names, before `configure` has made it; "" if it names none."""
    return os.path.expanduser(os.environ.get("OPENAI_LOGDIR", ""))


def get_dir() -> str | None:
    """Return the folder of the run; None before `configure`."""
    return _current.dir


def _listening() -> Sequence[Sink]:
    return _current.sinks if _current.level < DISABLED else ()


def _make_logger(dir: str | None, format_strs: Sequence[str] | None, rank: int | None, log_suffix: str) -> _Logger:
    rank = environment.rank(os.environ) if rank is None else rank
    formats = _formats("OPENAI_LOG_FORMAT_MPI", None, ()) if rank else _formats("OPENAI_LOG_FORMAT", format_strs)
    if not dir:
        fresh = f"openai-{datetime.datetime.now():%Y-%m-%d-%H-%M-%S-%f}"
        dir = os.environ.get("OPENAI_LOGDIR") or os.path.join(tempfile.gettempdir(), fresh)
    dir = os.path.expanduser(dir)
    if "://" in dir:
        raise ValueError(f"log folder {dir} is a URL; set OPENAI_LOGDIR to a local folder")
    if os.path.lexists(dir) and not os.path.isdir(dir):
        raise ValueError(f"log folder {dir} is a file; set OPENAI_LOGDIR to a folder")
    suffix = f"-rank{rank:03d}{log_suffix}" if rank else log_suffix
    if rank and not formats:
        return _Logger(dir, [TextSink(os.path.join(dir, f"log{suffix}.txt"))], WARN)
    return _Logger(dir, make_sinks(formats, dir, suffix))


def _formats(variable: str, wanted: Sequence[str] | None, default: Sequence[str] = DEFAULT_FORMATS) -> list[str]:
    """The formats asked for, by a caller or else by an environment variable, each once."""
    source = "format_strs" if wanted is not None else variable
    if wanted is None:
        wanted = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()] or default
    for name in wanted:
        if name not in FORMATS:
            raise ValueError(f"{source}: unknown format {name!r}; choose from {', '.join(FORMATS)}")
    return list(dict.fromkeys(wanted))


def _plain(key: str, val: object) -> Value:
    """A Python number from a scalar of NumPy, torch and the like."""
    if isinstance(val, (bool, int, float, str, type(None))) and not isinstance(val, np.generic):
        return val
    try:
        return val.item()
    except (AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"log key {key!r}: expected one number or string, got {type(val).__name__}") from error


def _shown(val: Value) -> str:
    return f"{val:.4g}" if isinstance(val, float) else str(val)


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _table(kvs: Mapping[str, Value]) -> str:
    """Keys left, values right-aligned, between two rules."""
    cells = [(_clipped(key, _KEY_WIDTH), _clipped(_shown(val), _VALUE_WIDTH)) for key, val in kvs.items()]
    key_width = max(len(key) for key, _ in cells)
    val_width = max(len(val) for _, val in cells)
    rule = "-" * (key_width + val_width + 2)
    return "\n".join([rule, *(f"{key:<{key_width}}  {val:>{val_width}}" for key, val in cells), rule])
