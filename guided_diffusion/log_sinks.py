"""
Where a run's reports go: stdout, log.txt, progress.csv, progress.json and TensorBoard. Owns these files; knows nothing
of who writes when, nor of what the keys mean.
"""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .files import writing

FORMATS = ("stdout", "log", "csv", "json", "tensorboard")

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


def make_sinks(formats: Sequence[str], dir: str, suffix: str = "") -> list[Sink]:
    """
    :param formats: from FORMATS, each once.
    :param dir: the folder of their files; it is made if need be.
    :param suffix: goes into each file's name, before the extension.
    :raises ImportError: if tensorboard is asked for and not installed; nothing has been made then.
    :raises ValueError: if the folder cannot be made or written to.
    """
    writer_class = _summary_writer() if "tensorboard" in formats else None
    try:
        os.makedirs(dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"log folder {dir} cannot be made ({error.strerror}); set OPENAI_LOGDIR to another") from error
    if not os.access(dir, os.W_OK):
        raise ValueError(f"log folder {dir} cannot be written to; set OPENAI_LOGDIR to another")
    made = {
        "stdout": StdoutSink,
        "log": lambda: TextSink(os.path.join(dir, f"log{suffix}.txt")),
        "csv": lambda: CsvSink(os.path.join(dir, f"progress{suffix}.csv")),
        "json": lambda: JsonSink(os.path.join(dir, f"progress{suffix}.json")),
        "tensorboard": lambda: TensorBoardSink(os.path.join(dir, f"tb{suffix}"), writer_class),
    }
    return [made[name]() for name in formats]


def _summary_writer() -> Callable:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("the log format tensorboard needs a package: pip install tensorboard") from error
    return SummaryWriter


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
