"""
What all layouts have in common: which files an example becomes, and what is written once all have been. Knows nothing
of processes and folders.
"""

import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ....cell_classes import CellClass
from ...slides.patches import PNG_LEVEL
from .labelled import NUCLEUS, Entry, Example


@dataclass(frozen=True)
class Record:
    """
    What is remembered of an example once its files are written.

    :param file: the image's path below the set. :param size: its height and width in pixels.
    :param counts: class id -> how many nuclei of it there are.
    :param note: what the writer's tables need beside that.
    """

    entry: Entry
    file: str
    size: tuple[int, int]
    counts: Mapping[int, int]
    note: Any = None

    @property
    def nuclei(self) -> int:
        """How many there are."""
        return sum(self.counts.values())

    def at(self, file: str) -> "Record":
        """:return: the record of an image that lies elsewhere."""
        return replace(self, file=file)


class Writer(ABC):
    """
    A layout.

    :param classes: that the set tells apart; none is fine.
    """

    def __init__(self, classes: Sequence[CellClass] = ()) -> None:
        self.told = bool(classes)
        self.classes = list(classes) or NUCLEUS

    def check(self, entries: Sequence[Entry]) -> None:
        """:raises ValueError: where the layout's tool would misread one of them, as far as names tell."""
        return None

    def numbered(self) -> Sequence[CellClass]:
        """:return: the classes by the numbers that they have in the layout."""
        return self.classes

    @abstractmethod
    def files(self, example: Example) -> Iterator[tuple[str, bytes]]:
        """:return: the example's files: path below the set and content, the image first."""

    def note(self, example: Example) -> Any:
        """:return: what `tables` needs of an example."""
        return None

    def tables(self, records: Sequence[Record]) -> Iterator[tuple[str, bytes]]:
        """:return: the files that are about all examples, as `files` gives them."""
        yield from ()

    def remarks(self, records: Sequence[Record]) -> Iterator[str]:
        """:return: what the layout's user must know of this set, in a line each."""
        yield from ()

    def record(self, example: Example, file: str) -> Record:
        """:param file: the image's path below the set."""
        counts = Counter(example.of_nucleus.values())
        return Record(example.entry, file, example.inst_map.shape, dict(sorted(counts.items())), self.note(example))


def png(array: np.ndarray) -> bytes:
    """:param array: [H x W] or [H x W x 3] uint8."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


def tiff(array: np.ndarray) -> bytes:
    """:param array: [H x W x 3] uint8; it is not compressed."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF")
    return file.getvalue()


def label_tiff(inst_map: np.ndarray) -> bytes:
    """
    :param inst_map: [H x W] int32, ids from 0 on.
    :return: a TIFF of 16 bits, or of 32 where ids need them, deflated.
    """
    kind = np.uint16 if inst_map.max(initial=0) < 2**16 else np.int32
    file = io.BytesIO()
    Image.fromarray(inst_map.astype(kind)).save(file, "TIFF", compression="tiff_adobe_deflate")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    """:param array: of numbers, structured ones too."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
