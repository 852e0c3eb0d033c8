"""The folders that sampling fills: names, formats, manifest.csv, what is finished, and pictures of them. Knows arrays,
and nothing of how they were made."""

import contextlib
import csv
import io
import json
import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

FOLDERS = ("images", "labels", "cond", "samples", "inst_masks")
MANIFEST_FIELDS = ("index", "stem", "seed", "structure", "appearance", "s", "checkpoint", "sampler", "steps")
# The run's flags have a name of their own: config.json is what lies beside checkpoints.
MANIFEST, RUN = "manifest.csv", "run.json"
# Of pictures, in pixels: between panels, above the first row, and the least height of a panel.
GAP, HEADER, MIN_PANEL = 6, 34, 128


def unique_stems(stems: Sequence[str]) -> list[str]:
    """
    Name samples after their appearance images: stem, then stem_0, stem_1, ... where it comes again.

    :param stems: the appearance's stem of each sample.
    :return: as many names, no two alike; a name depends on the stems before it only.
    """
    taken: set[str] = set()
    repeats: dict[str, int] = {}
    names = []
    for stem in stems:
        name = stem
        while name in taken:
            name = f"{stem}_{repeats.get(stem, 0)}"
            repeats[stem] = repeats.get(stem, 0) + 1
        taken.add(name)
        names.append(name)
    return names


def folder_name(checkpoint: str, s: str) -> str:
    """:return: the name of a sweep's folder for a checkpoint's path and a guidance scale as it was written."""
    return f"{PurePath(checkpoint).stem}_s{s}"


class ResultFolder:
    """
    Five folders with one file a sample, of equal stems, and a manifest of the samples that are whole.

    :param path: the folder; it is made by open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def open(self) -> None:
        """Make the folders."""
        for folder in FOLDERS:
            (self.path / folder).mkdir(parents=True, exist_ok=True)

    def _files(self, stem: str) -> dict[str, Path]:
        return {
            folder: self.path / folder / f"{stem}.{'tif' if folder == 'inst_masks' else 'png'}" for folder in FOLDERS
        }

    def write(
        self,
        row: dict[str, Any],
        *,
        image: np.ndarray,
        label: np.ndarray,
        cond: np.ndarray,
        sample: np.ndarray,
        inst: np.ndarray,
    ) -> None:
        """
        Write one sample's files, each whole or not at all, and then its row of the manifest.

        :param row: with MANIFEST_FIELDS as keys.
        :param image: the appearance, [H x W x 1 or 3] uint8; sample: likewise, what the model made.
        :param label: the structure's class mask as stored, [H x W] integers; above 255 it becomes a 16-bit image.
        :param cond: the condition's picture, [H x W' x 3] uint8.
        :param inst: the structure's instance ids, [H x W] integers; above 65535 it becomes a 32-bit image.
        """
        arrays = {
            "images": _squeeze(image),
            "labels": label.astype(np.uint8 if label.max(initial=0) < 2**8 else np.uint16),
            "cond": cond,
            "samples": _squeeze(sample),
            "inst_masks": inst.astype(np.uint16 if inst.max(initial=0) < 2**16 else np.int32),
        }
        for folder, path in self._files(row["stem"]).items():
            _save(Image.fromarray(arrays[folder]), path)
        self._append(_csv_line(row))

    def _append(self, line: str) -> None:
        """Add a line to the manifest in one write, since several ranks do so at once."""
        with open(self.path / MANIFEST, "ab+") as file:
            # A killed run may have left the file empty; a full disk, half a line at its end.
            if not file.tell():
                line = _HEADER + line
            else:
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else f"\n{line}"
            file.write(line.encode())

    def finished(self) -> dict[int, dict[str, str]]:
        """:return: sample number -> its row, for the samples whose files are all there and whole."""
        return {k: row for k, row in self.rows().items() if all(map(_is_whole, self._files(row["stem"]).values()))}

    def rows(self) -> dict[int, dict[str, str]]:
        """:return: sample number -> its row of the manifest; a row that was cut off or ran into another is left out."""
        rows = {}
        if (self.path / MANIFEST).exists():
            with open(self.path / MANIFEST, newline="", errors="replace") as file:
                # Line by line, so that a quote left open in one does not swallow the next; by position, since two ranks
                # that begin at once may both write a header, and neither is a row.
                for values in (next(csv.reader([line]), []) for line in file):
                    row = dict(zip(MANIFEST_FIELDS, values))
                    whole = len(values) == len(MANIFEST_FIELDS) and row["stem"] == os.path.basename(row["stem"])
                    if whole and row["index"].isdecimal():
                        rows[int(row["index"])] = row
        return rows

    def close(self) -> int:
        """
        Put the manifest in order.

        :return: how many samples are finished.
        """
        rows = self.finished()
        lines = [_HEADER, *(_csv_line(rows[k]) for k in sorted(rows))]
        aside = self.path / f".{MANIFEST}.part"
        aside.write_text("".join(lines))
        os.replace(aside, self.path / MANIFEST)
        return len(rows)

    def remove(self) -> None:
        """Delete what sampling wrote here by its manifest, and nothing else."""
        for row in self.rows().values():
            for path in self._files(row["stem"]).values():
                path.unlink(missing_ok=True)
        for folder in FOLDERS:
            with contextlib.suppress(OSError):  # what holds other files stays
                (self.path / folder).rmdir()
        for name in (MANIFEST, RUN, "grid.png", "sweep.png"):
            (self.path / name).unlink(missing_ok=True)

    def picture(self, folder: str, stem: str) -> np.ndarray:
        """:return: a sample's picture in one of the folders, [H x W x 3] uint8."""
        with Image.open(self._files(stem)[folder]) as image:
            return np.asarray(image.convert("RGB"))

    def write_grid(self, stems: Sequence[str], title: str) -> Path:
        """
        Draw samples one below the other: condition, appearance, sample.

        :param stems: which; they have been written.
        :param title: one line above the picture.
        :return: the picture's path.
        """
        rows = [[self.picture(folder, stem) for folder in ("cond", "images", "samples")] for stem in stems]
        return draw_grid(rows, ("condition", "appearance", "sample"), title, self.path / "grid.png")


def draw_grid(rows: list[list[np.ndarray]], captions: Sequence[str], title: str, path: Path) -> Path:
    """
    Draw panels in rows and columns, small ones enlarged by a whole factor.

    :param rows: of [H x W x 3] uint8 panels; all of a column are of one size, all of one height.
    :param captions: one a column.
    :param title: one line above.
    :param path: where to write.
    :return: the path.
    """
    scale = -(-MIN_PANEL // rows[0][0].shape[0])
    rows = [[panel.repeat(scale, axis=0).repeat(scale, axis=1) for panel in row] for row in rows]
    lefts = np.cumsum([GAP, *(panel.shape[1] + GAP for panel in rows[0])])
    tops = HEADER + np.arange(len(rows) + 1) * (rows[0][0].shape[0] + GAP)
    grid = Image.new("RGB", (int(lefts[-1]), int(tops[-1])), "white")
    draw = ImageDraw.Draw(grid)
    draw.text((GAP, 2), title, fill="black")
    for left, caption in zip(lefts, captions):
        draw.text((int(left), HEADER // 2), caption, fill="black")
    for top, row in zip(tops, rows):
        for left, panel in zip(lefts, row):
            grid.paste(Image.fromarray(panel), (int(left), int(top)))
    _save(grid, path)
    return path


class BackgroundWriter:
    """
    Runs jobs on a thread of its own, in order, so that encoding files does not hold sampling up.

    Used in a with block, which waits for all of them; what a job raises comes up at the next call or at the end.

    :param waiting: how many jobs may wait; one more waits for room.
    """

    def __init__(self, waiting: int = 64) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> "BackgroundWriter":
        self._thread.start()
        return self

    def __call__(self, job: Callable[[], None]) -> None:
        """Put a job in the queue."""
        self._raise()
        self._jobs.put(job)

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._jobs.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None:  # after a failure the rest is taken off the queue and left undone
                try:
                    job()
                except BaseException as error:
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def check_results_path(path: str, data_dir: str = "", appearance_dir: str = "") -> None:
    """
    :param data_dir: the data that are sampled from; appearance_dir: the images without masks.
    :raises ValueError: where a results folder cannot be made at the path, or would mix with the data.
    """
    if not path:
        raise ValueError("--results_path is empty: give the folder to write to")
    if "://" in path:
        raise ValueError(f"--results_path {path} is a URL: give a local folder")
    data, results = Path(data_dir).resolve(), Path(path).resolve()
    split = results.relative_to(data).parts[:1] if data_dir and results.is_relative_to(data) else None
    if (split is not None and (data.joinpath(*split) / "images").is_dir()) or split == ():
        raise ValueError(f"--results_path {path} lies among the images of --data_dir {data_dir}: give another folder")
    if appearance_dir and results.is_relative_to(Path(appearance_dir).resolve()):
        raise ValueError(f"--results_path {path} lies in --appearance_dir {appearance_dir}: give another folder")
    nearest = Path(path)
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"--results_path {path}: {nearest} is a file; give a folder")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"--results_path {path}: {nearest} cannot be written to; give another folder")
    strangers = [name for name in FOLDERS if os.path.lexists(Path(path) / name)]
    known = (Path(path) / MANIFEST).is_file() or (Path(path) / RUN).is_file()
    if strangers and not known:
        raise ValueError(f"--results_path {path} holds {strangers[0]} that no sampling run made: give another folder")


def check_same_run(path: str, config: dict[str, Any]) -> None:
    """
    Compare a run with the one that a results folder was begun by.

    :param config: flag -> value, of all that decides what is written.
    :raises ValueError: naming the first flag that differs.
    """
    file = Path(path) / RUN
    if not file.exists():
        if (Path(path) / MANIFEST).exists():
            raise ValueError(f"--results_path {path} holds samples of an unknown run: give another folder")
        return
    try:
        before = json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{file} does not parse: give another --results_path, or --overwrite True") from None
    for name in sorted({*before, *config}):
        # A flag that came after the run began was at its default, which changes nothing.
        if before.get(name) != config.get(name) and (name in before or config[name]):
            raise ValueError(
                f"--results_path {path} was begun with --{name} {before.get(name)}, this run has "
                f"{config.get(name)}: give another folder, or --overwrite True to start anew"
            )


def save_run(path: str, config: dict[str, Any]) -> None:
    """Remember which run a results folder belongs to."""
    Path(path).mkdir(parents=True, exist_ok=True)
    aside = Path(path) / f".{RUN}.part"
    aside.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(aside, Path(path) / RUN)


def remove_run(path: str) -> None:
    """Delete what an earlier run wrote in its results folder: its own samples, and a sweep's in the folders below."""
    for manifest in Path(path).glob(f"*/{MANIFEST}"):
        folder = ResultFolder(manifest.parent)
        made_here = {folder_name(row["checkpoint"], row["s"]) for row in folder.rows().values()} == {folder.path.name}
        # Else it is a folder of another run, or what a later stage made of samples.
        if made_here and not (folder.path / RUN).exists():
            folder.remove()
            with contextlib.suppress(OSError):  # what holds other files stays
                folder.path.rmdir()
    ResultFolder(path).remove()


def _squeeze(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.shape[2] == 1 else image


def _csv_line(row: dict[str, Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(row[field] for field in MANIFEST_FIELDS)
    return line.getvalue()


_HEADER = _csv_line(dict(zip(MANIFEST_FIELDS, MANIFEST_FIELDS)))


def _is_whole(path: Path) -> bool:
    """Whether a picture is there and not cut off; a PNG's checksums are read, not its pixels."""
    try:
        with Image.open(path) as image:
            image.verify() if path.suffix == ".png" else image.load()
    except (OSError, SyntaxError):
        return False
    return True


def _save(image: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all; the format follows the path's suffix."""
    aside = path.with_name(f".{path.name}.part")
    try:
        image.save(aside, format="TIFF" if path.suffix == ".tif" else "PNG")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error.strerror or error}): run the same again to go on") from None
