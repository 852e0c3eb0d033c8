"""The folders that sampling fills: names, formats, manifest.csv, and what is finished. Knows arrays, and nothing of how
they were made."""

import contextlib
import csv
import io
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from . import files
from .cell_classes import FOLDER as CLASS_FOLDER
from .cell_classes import TABLE, CellClass, write_classes
from .pictures import draw_grid, is_whole, save_picture

FOLDERS = ("images", "labels", "cond", "samples", "inst_masks")  # and, of classes, CLASS_FOLDER
# Which earlier versions did not write.
NEW_FIELDS = ("structure_slide", "appearance_slide", "noise", "structure_kind", "classes")
MANIFEST_FIELDS = (
    *("index", "stem", "seed", "structure", "appearance", "s", "checkpoint", "sampler", "steps"),
    *NEW_FIELDS,
)
# The run's flags have a name of their own: config.json is what lies beside checkpoints.
MANIFEST, RUN = "manifest.csv", "run.json"


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


def count_classes(class_map: np.ndarray, inst_map: np.ndarray) -> str:
    """
    :param class_map: [H x W] class ids; inst_map: [H x W] instance ids, 0 outside nuclei.
    :return: how many nuclei are of which class, as 1:12 2:3; "" where there are none.
    """
    inside = inst_map != 0
    pairs = np.unique(np.stack([class_map[inside], inst_map[inside]]), axis=1)
    return " ".join(f"{number}:{count}" for number, count in zip(*np.unique(pairs[0], return_counts=True)))


class ResultFolder:
    """
    Five folders with one file a sample, of equal stems, a sixth where cells have classes, and a manifest of the samples
    that are whole.

    Several processes may write samples at once: each notes its own in a part of the manifest, and merge puts
    the parts together, those that killed processes left, too.

    :param path: the folder; it is made by open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def open(self, classes: Sequence[CellClass] | None = None) -> None:
        """
        Make the folders, and clear away what killed runs had begun to write; for one process, before the others.

        :param classes: those of the samples' cells, none where these have no names; None: they have no classes.
        """
        if classes is not None:
            (self.path / CLASS_FOLDER).mkdir(parents=True, exist_ok=True)
        if classes and not (self.path / TABLE).exists():
            write_classes(self.path, classes)
        for folder in (self.path, *(self.path / name for name in self._folders())):
            folder.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(folder)

    def _folders(self) -> tuple[str, ...]:
        return (*FOLDERS, CLASS_FOLDER) if (self.path / CLASS_FOLDER).is_dir() else FOLDERS

    def _files(self, stem: str) -> dict[str, Path]:
        return {
            name: self.path / name / f"{stem}.{'tif' if name == 'inst_masks' else 'png'}" for name in self._folders()
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
        Write one sample's files, each whole or not at all, and then its row of this process's part of the manifest.

        :param row: with MANIFEST_FIELDS as keys.
        :param image: the appearance, [H x W x 1 or 3] uint8; sample: what the model made, shaped the same.
        :param label: the structure's class mask as stored, [H x W] integers; above 255 it becomes a 16-bit image. It is
            that of the cells' classes, too, where the folder has these.
        :param cond: the condition's picture, [H x W' x 3] uint8.
        :param inst: the structure's instance ids, [H x W] integers; above 65535 it becomes a 32-bit image.
        """
        arrays = {
            "images": _squeeze(image),
            "labels": label.astype(np.uint8 if label.max(initial=0) < 2**8 else np.uint16),
            "cond": cond,
            "samples": _squeeze(sample),
            "inst_masks": inst.astype(np.uint16 if inst.max(initial=0) < 2**16 else np.int32),
            CLASS_FOLDER: label.astype(np.uint8),
        }
        if CLASS_FOLDER in self._folders():
            row = {**row, "classes": count_classes(label, inst)}
        for folder, path in self._files(row["stem"]).items():
            save_picture(Image.fromarray(arrays[folder]), path)
        part = self.path / f".manifest.{socket.gethostname()}.{os.getpid()}.jsonl"
        with open(part, "a", encoding="ascii") as file:  # the break goes first, and ends what a full disk cut off
            file.write("\n" + json.dumps({field: str(row[field]) for field in MANIFEST_FIELDS if field in row}))

    def rows(self) -> dict[int, dict[str, str]]:
        """:return: sample number -> its row, of the manifest and its parts; what is no whole row is left out."""
        rows: list[Any] = []
        if (self.path / MANIFEST).exists():
            text = (self.path / MANIFEST).read_bytes().decode(errors="replace")
            with contextlib.suppress(csv.Error):
                rows.extend(csv.DictReader(io.StringIO(text, newline="")))
        for part in self._parts():
            for line in part.read_text("ascii", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # half a line
                    rows.append(files.parse_json(line))
        return {int(row["index"]): row for row in rows if _is_row(row)}

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob(".manifest.*.jsonl"))

    def finished(self) -> dict[int, dict[str, str]]:
        """:return: sample number -> its row, for the samples whose files are all there and whole."""
        return {k: row for k, row in self.rows().items() if all(map(is_whole, self._files(row["stem"]).values()))}

    def merge(self) -> dict[int, dict[str, str]]:
        """
        Write the manifest, whole and in order, with all its parts; for one process, while no other writes.

        :return: what finished gives.
        """
        rows, parts = self.finished(), self._parts()
        table = io.StringIO()
        writer = csv.DictWriter(table, MANIFEST_FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[k] for k in sorted(rows))
        manifest, text = self.path / MANIFEST, table.getvalue()
        before = manifest.read_bytes() if manifest.exists() else b""
        if before != text.encode() and (before or rows):  # what is right already keeps its time of change
            files.write_text(manifest, text)
        for part in parts:
            part.unlink()
        return rows

    def remove(self) -> None:
        """Delete what sampling wrote here by its manifest, and nothing else."""
        for row in self.rows().values():
            for path in self._files(row["stem"]).values():
                path.unlink(missing_ok=True)
        tables = [TABLE] if CLASS_FOLDER in self._folders() else []
        for folder in self._folders():
            files.remove_leftovers(self.path / folder)
            with contextlib.suppress(OSError):  # what holds other files stays
                (self.path / folder).rmdir()
        for path in (*self._parts(), *(self.path / name for name in (MANIFEST, RUN, *tables, "grid.png", "sweep.png"))):
            path.unlink(missing_ok=True)

    def picture(self, folder: str, stem: str) -> np.ndarray:
        """:return: a sample's picture in one of the folders, [H x W x 3] uint8."""
        with Image.open(self._files(stem)[folder]) as image:
            return np.asarray(image.convert("RGB"))

    def write_grid(self, stems: Sequence[str], title: str, note: str = "", mpp: float = 0.0) -> Path:
        """
        Draw samples one below the other: condition, appearance, sample.

        :param stems: which; they have been written.
        :param title: what stands above the picture.
        :param note: what stands below it; mpp: micrometres a pixel, for a scale bar. See draw_grid.
        :return: the picture's path.
        """
        rows = [[self.picture(folder, stem) for folder in ("cond", "images", "samples")] for stem in stems]
        return draw_grid(rows, ("condition", "appearance", "sample"), title, self.path / "grid.png", note, mpp)


def _is_row(row: Any) -> bool:
    """Whether something that was read is a row of a manifest, and names files of its folder only."""
    return (
        isinstance(row, dict)
        and {*row, *NEW_FIELDS} == {*MANIFEST_FIELDS}
        and all(isinstance(value, str) for value in row.values())
        and row["index"].isdecimal()
        and row["stem"] == os.path.basename(row["stem"])
    )


def _squeeze(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.shape[2] == 1 else image
