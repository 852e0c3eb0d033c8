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

from .files import parse_json, writing

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

    def cut_back(self, step: int) -> None:
        """Forget the values of later steps, which an earlier run into the folder left and this one writes again."""

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

    def cut_back(self, step: int) -> None:
        header = self._header()
        if "step" not in header:
            return
        with open(self.path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        place = header.index("step")
        kept = [row for row in rows if not _is_later(row[place] if place < len(row) else None, step)]
        if kept != rows:
            self._write([header, *kept])

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
        self._write([columns, *(row + [""] * (len(columns) - len(row)) for row in rows)])

    def _write(self, rows: Sequence[Sequence[str]]) -> None:
        with writing(self.path, "w") as file:
            file.writelines(_csv_line(row) + "\n" for row in rows)


class JsonSink(Sink):
    """One JSON object a line and dump; NaN and infinities, which JSON lacks, as null."""

    def __init__(self, path: str) -> None:
        self.path = path

    def write_kvs(self, kvs: Mapping[str, Value], step: int) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in kvs.items()}
        _append_line(self.path, json.dumps(finite))

    def cut_back(self, step: int) -> None:
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                lines = file.readlines()
            kept = [line for line in lines if not _is_later(_step_of(line), step)]
            if kept != lines:
                with writing(self.path, "w") as file:
                    file.writelines(kept)


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
        self.folder, self.writer_class = folder, writer_class
        self.writer = writer_class(folder)

    def cut_back(self, step: int) -> None:
        self.writer.close()
        self.writer = self.writer_class(self.folder, purge_step=step + 1)

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
    csv.writer(text, lineterminator="\n").writerow(cells)  # which quotes a line's end only if it knows it
    return text.getvalue().removesuffix("\n")


def _step_of(line: str) -> object:
    """The step in a line of JSON; None where it has none, as in half a line."""
    try:
        return parse_json(line).get("step")
    except (ValueError, AttributeError):
        return None


def _is_later(found: object, step: int) -> bool:
    try:
        return float(found) > step
    except (TypeError, ValueError):
        return False


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
