"""
Cellpose: train/NAME.png beside train/NAME_masks.tif, as `cellpose --train --dir train` reads them (cellpose.io).

Cellpose knows no classes, and would take any further picture in its folder for an image: class masks lie elsewhere.
"""

from collections.abc import Iterator, Sequence

from ....cell_classes import FOLDER
from .labelled import Entry, Example
from .writer import Record, Writer, label_tiff, png

MASKS = "_masks"
# What cellpose.io takes for its own output, and passes over.
_ENDINGS = (MASKS, "_cp_output", "_flows", "_flows_0", "_flows_1", "_flows_2", "_cellprob")
_FEW = 5  # its --min_train_masks


class Cellpose(Writer):
    """See the module."""

    def check(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.name.endswith(_ENDINGS):
                raise ValueError(f"{entry.image}: Cellpose passes over names that end so: rename it")

    def files(self, example: Example) -> Iterator[tuple[str, bytes]]:
        split, name = example.entry.split, example.entry.name
        yield f"{split}/{name}.png", png(example.image)
        yield f"{split}/{name}{MASKS}.tif", label_tiff(example.inst_map)
        if self.told:
            yield f"{FOLDER}/{split}/{name}.png", png(example.class_map)

    def remarks(self, records: Sequence[Record]) -> Iterator[str]:
        few = sum(record.nuclei < _FEW for record in records)
        if few:
            yield (
                f"{few} of {len(records)} images have fewer than {_FEW} nuclei: Cellpose trains on them with "
                "--min_train_masks 0 only"
            )
