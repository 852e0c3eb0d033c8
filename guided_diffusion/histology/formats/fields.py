"""
What every reader of a foreign data set gives: fields of tissue with the nuclei in them, and what is checked of each.

Knows no format.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ...cell_classes import CellClass, ids_of, of_nuclei

TRAIN, TEST = "train", "test"
OVERLAPS, EMPTY = "overlaps", "empty"
ALLOWED = (OVERLAPS, EMPTY)  # what may be allowed


class Labelled(NamedTuple):
    """
    An image with its nuclei.

    image: an [H x W x 3] uint8 array.
    inst_map: an [H x W] integer array of instance ids, 0 outside nuclei.
    class_map: an [H x W] integer array of class ids, 0 outside nuclei; None where there are no classes.
    overlap: how many pixels the data set gives to more than one nucleus; in inst_map they are the last one's.
    """

    image: np.ndarray
    inst_map: np.ndarray
    class_map: np.ndarray | None = None
    overlap: int = 0


@dataclass(frozen=True)
class Field:
    """
    One image of a data set.

    :param name: what its files are to be called, which no other field is.
    :param slide: the slide or patient that it is of, as far as the data set says; fields of one slide are never parted.
    :param part: of the data set, by its own name, such as "fold3".
    :param split: TRAIN or TEST, as the data set has it.
    :param where: what names it in an error.
    :param read: reads it; can be pickled. Raises ValueError or FileNotFoundError where it cannot be used.
    """

    name: str
    slide: str
    part: str
    split: str
    where: str
    read: Callable[[], Labelled]


@dataclass(frozen=True)
class DataSet:
    """
    A data set that was found.

    :param found: what, in words, for the user.
    :param mpp: micrometres a pixel; None where the data set does not say.
    :param sparse: whether fields are so small that some hold no nucleus.
    """

    found: str
    fields: list[Field]
    mpp: float | None = None
    classes: list[CellClass] = field(default_factory=list)
    sparse: bool = False


def safe(text: str) -> str:
    """:return: a name without what file names and tables cannot hold or read as more than a name."""
    return re.sub(r"[^\w.-]+", "-", text).lstrip("-.") or "unnamed"


def numbered(slide: str, number: int) -> str:
    """:return: the name of a slide's field, whose slide is told from it as from a patch's."""
    return f"{slide}_{number:04d}"


def checked(
    one: Field, classes: Sequence[CellClass], sparse: bool, allowed: Sequence[str]
) -> tuple[Labelled, dict[int, int]]:
    """
    Read a field and check it.

    :param classes: of its data set. :param sparse: see DataSet. :param allowed: of ALLOWED.
    :return: what was read, and instance id -> class id, empty without classes.
    :raises ValueError: where its arrays do not fit each other, nuclei overlap or there are none, or classes are not as
        cell_classes.of_nuclei wants them.
    """
    labelled = one.read()
    image, inst_map = labelled.image, labelled.inst_map
    if image.shape[:2] != inst_map.shape:
        (height, width), (rows, columns) = image.shape[:2], inst_map.shape
        raise ValueError(f"{one.where}: the mask is {columns} x {rows} px, its image {width} x {height} px")
    if labelled.overlap and OVERLAPS not in allowed:
        raise ValueError(
            f"{one.where}: {labelled.overlap} px are of several nuclei; --allow {OVERLAPS} gives them to the last"
        )
    if not inst_map.any() and not sparse and EMPTY not in allowed:
        raise ValueError(f"{one.where}: no nucleus in the mask; remove the image, or --allow {EMPTY} if it is meant")
    if not classes:
        return labelled, {}
    return labelled, of_nuclei(inst_map, labelled.class_map, ids_of(classes), one.where)
