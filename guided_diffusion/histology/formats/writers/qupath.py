"""
QuPath: train/NAME.png and train/NAME.geojson, an annotation for each nucleus, in pixels from the image's top left
corner. Outlines run along the edges of pixels, so that pixels whose centres lie inside are the nucleus, all of it.
"""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from scipy import ndimage

from .labelled import Example
from .writer import Writer, png

_NAMES = uuid.UUID("f5b7bd4f-42b2-4b0f-9c5e-0d1f6a1f4d11")  # of the ids of features, which are the same in every run

Ring = list[list[int]]


class QuPath(Writer):
    """See the module."""

    def files(self, example: Example) -> Iterator[tuple[str, bytes]]:
        path = f"{example.entry.split}/{example.entry.name}"
        yield f"{path}.png", png(example.image)
        of_class = {one.id: {"name": one.name, "color": list(one.colour)} for one in self.classes}
        features = [
            {
                "type": "Feature",
                "id": str(uuid.uuid5(_NAMES, f"{path}/{nucleus}")),
                "geometry": geometry,
                "properties": {
                    "objectType": "annotation",
                    "name": str(nucleus),
                    "classification": of_class[example.of_nucleus[nucleus]],
                },
            }
            for nucleus, geometry in zip(example.of_nucleus, outlines(example.inst_map))
        ]
        yield f"{path}.geojson", json.dumps({"type": "FeatureCollection", "features": features}).encode()


def outlines(inst_map: np.ndarray) -> Iterator[dict[str, Any]]:
    """
    :param inst_map: [H x W] integers, 0 = background.
    :return: the outline of each nucleus in rising order of ids, as a GeoJSON geometry: a Polygon, or a MultiPolygon
        where edges of pixels do not connect all of it. All rings are closed and valid.
    """
    ids = np.unique(inst_map)
    dense = np.searchsorted(ids, inst_map) + (ids[0] != 0)  # NumPy's return_inverse sorts all pixels, for that
    for number, box in enumerate(ndimage.find_objects(dense), 1):
        polygons = _polygons(dense[box] == number, (box[1].start, box[0].start))
        if len(polygons) == 1:
            yield {"type": "Polygon", "coordinates": polygons[0]}
        else:
            yield {"type": "MultiPolygon", "coordinates": polygons}


def _polygons(mask: np.ndarray, corner: tuple[int, int]) -> list[list[Ring]]:
    """The polygons, outer ring first, of the parts of a mask whose top left corner lies at (x, y)."""
    count, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    polygons = []
    for part in range(1, count):
        # OpenCV's outlines run through pixels' centres. In a mask twice as large a pixel is 2 x 2, and its outer ones
        # lie next to the edge that is meant: at 2x or 2x + 1, of the edges x and x + 1.
        large = (parts == part).astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
        contours, tree = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        outer_first = sorted(range(len(contours)), key=lambda i: tree[0, i, 3] >= 0)
        polygons.append([_ring((contours[i][:, 0] + 1) // 2 + corner) for i in outer_first])
    return polygons


def _ring(points: np.ndarray) -> Ring:
    """A closed ring of [N x 2] points, of which those that come twice in a row count once."""
    ring = points[(points != np.roll(points, 1, axis=0)).any(1)].tolist()
    return [*ring, ring[0]]
