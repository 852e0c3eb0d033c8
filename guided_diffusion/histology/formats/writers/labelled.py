"""
A labelled set as writers see it: pictures by their files, read and checked. Knows nothing of where the set came from,
nor of any layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ....cell_classes import CellClass, ids_of, named, of_nuclei, painted
from ....image_files import read_image, read_inst_mask, read_mask

NUCLEUS = named(["nucleus"])  # the one class of a set that tells none apart


@dataclass(frozen=True)
class Entry:
    """
    A labelled picture, by its files.

    :param name: that its files get; no other of the set has it.
    :param split: "train" or "test".
    :param class_mask: None where the set tells no classes apart.
    :param row: what is known of it, by column: its source, slide, and so on.
    """

    name: str
    split: str
    image: Path
    inst_mask: Path
    class_mask: Path | None = None
    row: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """
    A labelled picture.

    :param image: [H x W x 3] uint8.
    :param inst_map: [H x W] int32, 0 = background, every other value one nucleus.
    :param of_nucleus: instance id -> class id, in rising order of instances.
    """

    entry: Entry
    image: np.ndarray
    inst_map: np.ndarray
    of_nucleus: Mapping[int, int]

    @cached_property
    def class_map(self) -> np.ndarray:
        """The class of each pixel: [H x W] uint8, 0 = background."""
        return painted(self.inst_map, self.of_nucleus)


def read_example(entry: Entry, classes: Sequence[CellClass]) -> Example:
    """
    :param classes: those that a class mask, where there is one, tells apart.
    :raises ValueError: where a file cannot be used, sizes differ, or a class mask contradicts the instances.
    """
    image, inst_map = read_image(entry.image), read_inst_mask(entry.inst_mask)
    if image.shape[:2] != inst_map.shape:
        (height, width), (other, wide) = image.shape[:2], inst_map.shape
        raise ValueError(
            f"{entry.inst_mask} is {wide} x {other} px, its image {width} x {height} px: they must be alike"
        )
    if entry.class_mask:
        of_nucleus = of_nuclei(inst_map, read_mask(entry.class_mask), ids_of(classes), str(entry.class_mask))
    else:
        of_nucleus = dict.fromkeys(np.unique(inst_map[inst_map > 0]).tolist(), NUCLEUS[0].id)
    return Example(entry, image, inst_map, of_nucleus)


def plain_name(stem: str) -> str:
    """
    :return: a name of one part without dots, which every layout can hold: sub-folders are joined by __, and what
        follows a dot would be a suffix to most tools.
    """
    return stem.replace("/", "__").replace(".", "_")
