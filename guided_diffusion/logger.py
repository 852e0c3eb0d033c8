"""
What a run reports: lines, key-value tables and images, to stdout, log.txt, progress.csv, progress.json, TensorBoard.

Owns the sinks, their files and who may write: rank 0 writes everything, other ranks only what went wrong. Knows nothing
of training, of process groups or of what the keys mean. One logger is current at a time; until `configure` it prints
to stdout and touches no file. Environment: OPENAI_LOGDIR, the folder, and OPENAI_LOG_FORMAT, a comma list of formats.

Keys of training have no prefix; what is logged inside ``with prefix("val"):`` has: "loss" becomes "val_loss". Prefixes
nest. A key "step" without prefix is the x-axis of TensorBoard; where it is missing, the number of the dump is.
"""

import contextlib
import csv
import datetime
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .files import writing

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50

FORMATS = ("stdout", "log", "csv", "json", "tensorboard")
DEFAULT_FORMATS = ("stdout", "log", "csv")

_LABELS = {WARN: "WARNING: ", ERROR: "ERROR: "}
_KEY_WIDTH, _VALUE_WIDTH = 32, 24  # characters of a table's columns at most

Value = bool | int | float | str | None


class Sink:
    """Where reports go. A sink overrides what it has use for; the rest is ignored."""

    def write_line(self, line: str) -> None:
        """:param line: text without a final newline; it may be a table of several lines."""

    def write_kvs(self, kvs: Mapping[str, Value], step: int) -> None:
        """
        :param kvs: the values of one dump.
        :param step: its place on the x-axis.
        """

    def write_image(self, key: str, image: np.ndarray, step: int) -> None:
        """
        :param key: the image's name.
        :param image: an [H x W x 3] uint8 array.
        :param step: its place on the x-axis.
        """

    def close(self) -> None:
        """Let go of files and threads."""


class StdoutSink(Sink):
    """Lines on stdout, above any tqdm bar."""

    def write_line(self, line: str) -> None:
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None:
            sys.stdout.write(line + "\n")
        else:
            tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


class TextSink(Sink):
    """Lines appended to a file, which the first of them creates."""

    def __init__(self, path: str) -> None:
        self.path = path

    def write_line(self, line: str) -> None:
        _append_line(self.path, line)


class CsvSink(Sink):
    """
    One row a dump, values in full precision, appended to what earlier runs into the folder left.

    A new key widens the header: the file is written anew beside the old one and takes its place in one move.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def write_kvs(self, kvs: Mapping[str, Value], step: int) -> None:
        header = self._header()
        columns = header + [key for key in kvs if key not in header]
        if columns != header:
            self._widen(columns)
        _append_line(self.path, _csv_line([kvs.get(key) for key in columns]))

    def _header(self) -> list[str]:
        if not os.path.exists(self.path):
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _widen(self, columns: list[str]) -> None:
        rows = []
        if os.path.exists(self.path):
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))[1:]
        with writing(self.path, "w") as file:
            file.write(_csv_line(columns) + "\n")
            file.writelines(_csv_line(row + [""] * (len(columns) - len(row))) + "\n" for row in rows)


class JsonSink(Sink):
    """One JSON object a line and dump; NaN and infinities, which JSON lacks, as null."""

    def __init__(self, path: str) -> None:
        self.path = path

    def write_kvs(self, kvs: Mapping[str, Value], step: int) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in kvs.items()}
        _append_line(self.path, json.dumps(finite))


class TensorBoardSink(Sink):
    """
    Numbers and images as TensorBoard events; text values are left out. A row's "mode" goes before its tags: "loss" with
    mode "train" is train_loss, and "val_loss" with mode "val" stays so.
    """

    def __init__(self, folder: str, writer_class: Callable) -> None:
        """
        :param folder: where the event files go.
        :param writer_class: see `_summary_writer`; passed in, so that a missing package shows before anything is made.
        """
        self.writer = writer_class(folder)

    def write_kvs(self, kvs: Mapping[str, Value], step: int) -> None:
        mode = f"{kvs['mode']}_" if kvs.get("mode") else ""
        for key, value in kvs.items():
            if key != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(mode + key.removeprefix(mode), value, step)
        self.writer.flush()

    def write_image(self, key: str, image: np.ndarray, step: int) -> None:
        self.writer.add_image(key, image, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


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
    dir: str | None = None, format_strs: Sequence[str] | None = None, rank: int = 0, log_suffix: str = ""
) -> None:
    """
    Close the current logger and start one that writes to a folder.

    Files are appended to, so a resumed run goes on in its old folder. Ranks other than 0 write warnings and errors to
    log-rankNNN.txt, which the first of them creates, and nothing else; `set_level` lets more lines through.

    :param dir: the folder; created if need be. Default: OPENAI_LOGDIR, else a fresh openai-DATE-TIME in the system's
        temporary folder. Ranks agree on a folder only if one of the first two is given.
    :param format_strs: from stdout, log, csv, json, tensorboard. Default: OPENAI_LOG_FORMAT, else stdout, log and csv.
    :param rank: this process's rank.
    :param log_suffix: goes into each file's name, before the extension.
    :raises ValueError: if a format is unknown or dir is a file; nothing has changed then.
    :raises ImportError: if tensorboard is asked for and not installed; nothing has changed then.
    """
    global _current
    new = _make_logger(dir, format_strs, rank, log_suffix)
    _current.close()
    _current = new
    log(f"logging to {new.dir}")


@contextlib.contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, rank: int = 0, log_suffix: str = ""
) -> Iterator[None]:
    """`configure` for the length of a with block; afterwards the logger from before is current again, as it was."""
    global _current
    before, _current = _current, _make_logger(dir, format_strs, rank, log_suffix)
    try:
        yield
    finally:
        _current.close()
        _current = before


def reset() -> None:
    """Close all files and go back to the state before `configure`."""
    global _current
    _current.close()
    _current = _Logger(None, [StdoutSink()])


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
    """Drop lines below this level from now on, and tables above INFO; DISABLED silences all sinks."""
    _current.level = level


def environment_dir() -> str:
    """Return the folder that OPENAI_LOGDIR names, before `configure` has made it; "" if it names none."""
    return os.path.expanduser(os.environ.get("OPENAI_LOGDIR", ""))


def get_dir() -> str | None:
    """Return the folder of the run; None before `configure`."""
    return _current.dir


def _listening() -> Sequence[Sink]:
    return _current.sinks if _current.level < DISABLED else ()


def _make_logger(dir: str | None, format_strs: Sequence[str] | None, rank: int, log_suffix: str) -> _Logger:
    formats = _formats(format_strs)
    if not dir:
        fresh = f"openai-{datetime.datetime.now():%Y-%m-%d-%H-%M-%S-%f}"
        dir = os.environ.get("OPENAI_LOGDIR") or os.path.join(tempfile.gettempdir(), fresh)
    dir = os.path.expanduser(dir)
    if "://" in dir:
        raise ValueError(f"log folder {dir} is a URL; set OPENAI_LOGDIR to a local folder")
    if os.path.lexists(dir) and not os.path.isdir(dir):
        raise ValueError(f"log folder {dir} is a file; set OPENAI_LOGDIR to a folder")
    if rank:
        return _Logger(dir, [TextSink(os.path.join(dir, f"log-rank{rank:03d}{log_suffix}.txt"))], WARN)
    writer_class = _summary_writer() if "tensorboard" in formats else None
    try:
        os.makedirs(dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"log folder {dir} cannot be made ({error.strerror}); set OPENAI_LOGDIR to another") from error
    if not os.access(dir, os.W_OK):
        raise ValueError(f"log folder {dir} cannot be written to; set OPENAI_LOGDIR to another")
    sinks = {
        "stdout": StdoutSink,
        "log": lambda: TextSink(os.path.join(dir, f"log{log_suffix}.txt")),
        "csv": lambda: CsvSink(os.path.join(dir, f"progress{log_suffix}.csv")),
        "json": lambda: JsonSink(os.path.join(dir, f"progress{log_suffix}.json")),
        "tensorboard": lambda: TensorBoardSink(os.path.join(dir, f"tb{log_suffix}"), writer_class),
    }
    return _Logger(dir, [sinks[name]() for name in formats])


def _formats(format_strs: Sequence[str] | None) -> list[str]:
    """The formats asked for, each once."""
    source, wanted = "format_strs", format_strs
    if format_strs is None:
        source = "OPENAI_LOG_FORMAT"
        wanted = [name.strip() for name in os.environ.get(source, "").split(",") if name.strip()] or DEFAULT_FORMATS
    for name in wanted:
        if name not in FORMATS:
            raise ValueError(f"{source}: unknown format {name!r}; choose from {', '.join(FORMATS)}")
    return list(dict.fromkeys(wanted))


def _summary_writer() -> Callable:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("the log format tensorboard needs a package: pip install tensorboard") from error
    return SummaryWriter


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


def _csv_line(cells: Sequence[object]) -> str:
    """One row without a final newline; floats as the shortest text that reads back the same, None as nothing."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def _append_line(path: str, line: str) -> None:
    """Append to a file, made with its folder if need be; a line that a killed run left half written is ended first."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write((line + "\n").encode())
