"""
Our own layout of raw slides, as scripts/prepare_monuseg.py reads it: where a field's files lie, and the tables beside
them. Knows no foreign format.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...cell_classes import FOLDER as CLASS_FOLDER
from ...cell_classes import CellClass, painted
from ...slides import write_table
from ..slides.patches import save_picture
from .fields import Field, checked


class Written(NamedTuple):
    """Of a field: how many nuclei it has, and how many pixels are of more than one."""

    nuclei: int
    overlap: int


def make_folders(out: Path, splits: Iterable[str], classes: bool) -> None:
    for split in splits:
        for name in ("images", "inst_masks", *([CLASS_FOLDER] if classes else [])):
            (out / split / name).mkdir(parents=True, exist_ok=True)


def write_field(field: Field, out: Path, classes: Sequence[CellClass], sparse: bool, allowed: Sequence[str]) -> Written:
    """
    Write a field's image, instance mask and, where there are classes, class mask. Parameters and errors as checked's.

    :param out: its folders exist.
    """
    labelled, of_nucleus = checked(field, classes, sparse, allowed)
    folder, inst_map = out / field.split, labelled.inst_map.astype(np.int32)
    save_picture(folder / "images" / f"{field.name}.png", labelled.image)
    save_picture(folder / "inst_masks" / f"{field.name}.tif", inst_map)
    if classes:
        save_picture(folder / CLASS_FOLDER / f"{field.name}.png", painted(inst_map, of_nucleus))
    return Written(np.count_nonzero(np.unique(inst_map)), labelled.overlap)


def write_facts(out: Path, fields: Sequence[Field], mpp: float | None) -> None:
    """Write slides.csv: which slide or patient each field is of, and its micrometres a pixel."""
    said = "" if mpp is None else f"{mpp:g}"
    write_table(out, [(f"{one.split}/images/{one.name}.png", one.slide, said) for one in fields], ["mpp"])
