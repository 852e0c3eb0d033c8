"""
COCO: images in train/ and test/, and annotations/instances_train.json, with nuclei as compressed run lengths, which
lose nothing, unlike polygons.

Beyond the standard's keys an image says its row of the manifest, and an annotation its id in the instance mask.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .labelled import Example
from .writer import Record, Writer, png

_MASK_BYTES = 2**26  # at most, of single nuclei's masks at a time


class Coco(Writer):
    """See the module."""

    def files(self, example: Example) -> Iterator[tuple[str, bytes]]:
        yield f"{example.entry.split}/{example.entry.name}.png", png(example.image)

    def note(self, example: Example) -> list[dict[str, Any]]:
        """:return: the annotations of an image, without the numbers that they get in the whole file."""
        return [
            {
                "category_id": number,
                "bbox": box,
                "area": area,
                "iscrowd": 0,
                "segmentation": {"size": list(example.inst_map.shape), "counts": counts},
                "instance": nucleus,
            }
            for (nucleus, number), (counts, area, box) in zip(
                example.of_nucleus.items(), _encoded(example.inst_map, list(example.of_nucleus))
            )
        ]

    def tables(self, records: Sequence[Record]) -> Iterator[tuple[str, bytes]]:
        categories = [
            {"id": one.id, "name": one.name, "supercategory": "nucleus", "color": list(one.colour)}
            for one in self.classes
        ]
        for split in ("train", "test"):
            chosen = [record for record in records if record.entry.split == split]
            if not chosen:
                continue
            images, annotations = [], []
            for number, record in enumerate(chosen, 1):
                file, (height, width) = f"{record.entry.name}.png", record.size
                images.append({**record.entry.row, "id": number, "file_name": file, "width": width, "height": height})
                for found in record.note:
                    annotations.append({"id": len(annotations) + 1, "image_id": number, **found})
            content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
            yield f"annotations/instances_{split}.json", json.dumps(content).encode()


def _encoded(inst_map: np.ndarray, nuclei: Sequence[int]) -> Iterator[tuple[str, float, list[float]]]:
    """The run lengths, area and box (x, y, width, height) of nuclei, a stack of masks at a time."""
    from pycocotools import mask

    step = max(1, _MASK_BYTES // inst_map.size)
    columns = np.asfortranarray(inst_map)[..., None]
    for start in range(0, len(nuclei), step):
        stack = np.asfortranarray(columns == np.array(nuclei[start : start + step]), np.uint8)
        runs = mask.encode(stack)
        for one, area, box in zip(runs, mask.area(runs).tolist(), mask.toBbox(runs).tolist()):
            yield one["counts"].decode("ascii"), float(area), box
