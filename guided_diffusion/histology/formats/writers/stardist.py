"""
StarDist: train/images/NAME.tif and train/masks/NAME.tif, uint16 labels, as its notebooks and csbdeep read them.

Its classes are a dict, label -> class, for each image: train/classes/NAME.json holds it.
"""

import json
from collections.abc import Iterator

from .labelled import Example
from .writer import Writer, label_tiff, tiff


class StarDist(Writer):
    """See the module."""

    def files(self, example: Example) -> Iterator[tuple[str, bytes]]:
        split, name = example.entry.split, example.entry.name
        yield f"{split}/images/{name}.tif", tiff(example.image)
        yield f"{split}/masks/{name}.tif", label_tiff(example.inst_map)
        if self.told:
            yield f"{split}/classes/{name}.json", json.dumps(example.of_nucleus).encode()
