"""
The imagefolder of Hugging Face's datasets: train/images/NAME.png, train/masks/NAME.tif, and train/metadata.jsonl, which
pairs them and holds the manifest.

It is JSON rather than CSV, for a CSV's columns are typed by what they hold: a column that is empty in one split would
be of another type there, which datasets refuses, and slides named 1 and 2 would become numbers.
"""

import json
from collections.abc import Iterator, Sequence

from ....cell_classes import FOLDER
from .labelled import Example
from .writer import Record, Writer, label_tiff, png


class ImageFolder(Writer):
    """See the module."""

    def files(self, example: Example) -> Iterator[tuple[str, bytes]]:
        split, name = example.entry.split, example.entry.name
        yield f"{split}/images/{name}.png", png(example.image)
        yield f"{split}/masks/{name}.tif", label_tiff(example.inst_map)
        if self.told:
            yield f"{split}/{FOLDER}/{name}.png", png(example.class_map)

    def tables(self, records: Sequence[Record]) -> Iterator[tuple[str, bytes]]:
        columns = dict.fromkeys(column for record in records for column in record.entry.row)
        for split in ("train", "test"):
            lines = [self._line(record, columns) for record in records if record.entry.split == split]
            if lines:
                yield f"{split}/metadata.jsonl", "".join(lines).encode()

    def _line(self, record: Record, columns: Sequence[str]) -> str:
        name = record.entry.name
        files = {"file_name": f"images/{name}.png", "mask_file_name": f"masks/{name}.tif"}
        if self.told:
            files["class_mask_file_name"] = f"{FOLDER}/{name}.png"
        # datasets takes every column whose name ends so for files.
        row = {column: record.entry.row.get(column, "") for column in columns if not column.endswith("file_name")}
        return json.dumps({**files, **row, "nuclei": record.nuclei}) + "\n"
