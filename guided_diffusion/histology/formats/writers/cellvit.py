"""
CellViT: fold0 (train) and fold1 (test), each with images/NAME.png, labels/NAME.npy, types.csv and cell_count.csv, and
dataset_config.yaml, as its PanNuke loader reads them.

That loader takes labels by `np.load(file, allow_pickle=True)[()]["inst_map"]`, and "type_map", of a pickled dict. Here
a label is a structured array of one element with these two fields: the same expression reads it, and nothing is
pickled, so that allow_pickle may as well be False.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ....cell_classes import CellClass
from .labelled import Entry, Example
from .writer import Record, Writer, npy, png

FOLDS = {"train": "fold0", "test": "fold1"}
BACKGROUND = "Background"
TISSUE = "unknown"  # what tissue a picture shows, which PanNuke knows, is not ours to say


class CellViT(Writer):
    """See the module. Classes are numbered from 1 in the order of their ids, without gaps."""

    def check(self, entries: Sequence[Entry]) -> None:
        """:raises ValueError: where a class would be taken for what is outside nuclei."""
        if any(one.name == BACKGROUND for one in self.classes):
            raise ValueError(f"a class of SET is named {BACKGROUND}, as CellViT calls what is no nucleus: rename it")

    def numbered(self) -> Sequence[CellClass]:
        """See Writer."""
        return [replace(one, id=number) for number, one in enumerate(self.classes, 1)]

    def files(self, example: Example) -> Iterator[tuple[str, bytes]]:
        fold, name = FOLDS[example.entry.split], example.entry.name
        yield f"{fold}/images/{name}.png", png(example.image)
        numbers = np.zeros(256, np.uint8)
        numbers[[one.id for one in self.classes]] = [one.id for one in self.numbered()]
        fields = {"inst_map": example.inst_map, "type_map": numbers[example.class_map]}
        label = np.zeros((), [(key, value.dtype, value.shape) for key, value in fields.items()])
        for key, value in fields.items():
            label[key] = value
        yield f"{fold}/labels/{name}.npy", npy(label)

    def tables(self, records: Sequence[Record]) -> Iterator[tuple[str, bytes]]:
        for split, fold in FOLDS.items():
            rows = [(f"{one.entry.name}.png", one.counts) for one in records if one.entry.split == split]
            if rows:
                yield f"{fold}/types.csv", _csv([("img", "type"), *((file, TISSUE) for file, _ in rows)])
                head = ("Image", *(one.name for one in self.classes))
                counts = [(file, *(found.get(one.id, 0) for one in self.classes)) for file, found in rows]
                yield f"{fold}/cell_count.csv", _csv([head, *counts])
        kinds = {BACKGROUND: 0, **{one.name: one.id for one in self.numbered()}}
        yield "dataset_config.yaml", _yaml({"tissue_types": {TISSUE: 0}, "nuclei_types": kinds})


def _csv(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _yaml(tables: dict[str, dict[str, int]]) -> bytes:
    """Tables of numbers as YAML; a string of JSON is one of YAML."""
    lines = []
    for title, table in tables.items():
        lines += [f"{title}:", *(f"  {json.dumps(name)}: {number}" for name, number in table.items())]
    return ("\n".join(lines) + "\n").encode()
