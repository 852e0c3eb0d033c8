"""
Aperio's XML: the outlines of nuclei, how they become pixels, and the micrometres a pixel.

Knows nothing of images, nor of where the files lie.
"""

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np

from ...files import read_bytes

SUFFIXES = (".xml",)

_HEAD = 4096  # bytes of an XML that hold its first element


def read_polygons(path: Path) -> list[np.ndarray]:
    """
    Read the outlines of an Aperio XML: every `Region` of every layer, in document order.

    :return: per region a [V x 2] int32 array of (x, y), truncated toward zero; V = 0 if it has no vertex.
    :raises ValueError: not well-formed, has a document type, has no region, or a vertex that is not two numbers.
    """
    parser = ElementTree.XMLParser(target=_RegionCollector())
    try:
        parser.feed(read_bytes(path))
        regions = parser.close()
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path}: not a usable Aperio XML ({error}); export or download it again") from error
    if not regions:
        raise ValueError(f"{path}: no Region in this XML; give the annotation of the nuclei, exported from ImageScope")
    return [_to_pixels(vertices, path, number) for number, vertices in enumerate(regions, start=1)]


def frame_among(polygons: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """
    Find a region that surrounds the field, as an outline of what was annotated does: filled, it swallows the nuclei
    before it, or turns what lies between those after it into a nucleus.

    :param polygons: as read_polygons gives them.
    :return: the first one's number, from 1, that has more than half of the others' middles inside, and how many.
    """
    drawn = [number for number, polygon in enumerate(polygons, start=1) if len(polygon)]
    low, high = (np.array([bound(polygons[n - 1], axis=0) for n in drawn]).reshape(-1, 2) for bound in (np.min, np.max))
    middles = (low + high) / 2
    for place, number in enumerate(drawn):
        near = ((middles >= low[place]) & (middles <= high[place])).all(axis=1)
        near[place] = False
        if 2 * near.sum() >= len(drawn):
            outline = polygons[number - 1].astype(np.float32)
            count = sum(cv2.pointPolygonTest(outline, middle, False) >= 0 for middle in middles[near].tolist())
            if 2 * count > len(drawn) - 1:
                return number, count
    return None


def read_mpp(path: Path) -> float | None:
    """:return: the micrometres a pixel that an XML begins with; None where it has no such number."""
    collector = _RegionCollector()
    try:
        with open(path, "rb") as file:
            ElementTree.XMLParser(target=collector).feed(file.read(_HEAD))
        value = float(collector.attributes.get("MicronsPerPixel", "nan"))
    except (ElementTree.ParseError, LookupError, ValueError):
        return None  # what is wrong with the file is read_polygons' to say
    return value if 0 < value <= 100 else None


def rasterise(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """
    Fill outlines into an instance map, number n (from 1) with id n; later ones overwrite earlier ones.

    OpenCV's rules: border pixels belong to the shape, a loop within a loop is a hole (even-odd), and what lies
    outside the map is cut off. An outline without vertices leaves its number unused.

    :param polygons: [V x 2] int32 arrays of (x, y).
    :return: an [H x W] int32 map, 0 = background.
    """
    inst_map = np.zeros((height, width), dtype=np.int32)
    for number, polygon in enumerate(polygons, start=1):
        if len(polygon):
            cv2.fillPoly(inst_map, [np.ascontiguousarray(polygon, dtype=np.int32)], number)
    return inst_map


class _RegionCollector:
    """A parser target that keeps the vertices of each region and builds no tree."""

    def __init__(self):
        self.attributes: dict[str, str] = {}  # of the outermost element
        self.regions: list[list[tuple[float, float]]] = []
        self._open: list[list[tuple[float, float]]] = []

    def doctype(self, name, public_id, system):
        raise ValueError("it has a document type declaration, which could define entities")

    def start(self, tag, attributes):
        tag = tag.rpartition("}")[2]
        self.attributes = self.attributes or {"": tag, **attributes}
        if tag == "Region":
            self.regions.append([])
            self._open.append(self.regions[-1])
        elif tag == "Vertex" and self._open:
            try:
                vertex = float(attributes["X"]), float(attributes["Y"])
            except KeyError as error:
                raise ValueError(f"a Vertex in region {len(self.regions)} has no {error.args[0]}") from error
            for region in self._open:
                region.append(vertex)

    def end(self, tag):
        if tag.rpartition("}")[2] == "Region":
            self._open.pop()

    def close(self):
        return self.regions


def _to_pixels(vertices: list[tuple[float, float]], path: Path, number: int) -> np.ndarray:
    points = np.trunc(np.array(vertices, dtype=np.float64).reshape(-1, 2))
    if not (np.abs(points) < 2**31).all():
        raise ValueError(f"{path}: region {number} has a vertex that is no pixel position; export the XML again")
    return points.astype(np.int32)
