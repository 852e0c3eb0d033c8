"""
COCO's annotations: polygons, and run lengths, written out or packed.

Run lengths are read here, since pycocotools takes those that are too short for what memory happens to hold; polygons
are drawn by pycocotools, so that they cover the pixels that COCO means.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ....cell_classes import MOST, CellClass, named
from ....files import nfc, parse_json, read_bytes
from ....image_files import EXTENSIONS, read_image
from ..fields import DataSet, Field, Labelled, safe
from .opening import Tree

_KEYS = ("images", "annotations", "categories")


def find_coco(tree: Tree) -> DataSet | None:
    """Find COCO's .json files, and the images that they name, anywhere in the data set."""
    tables = {path: _parsed(path) for folder in tree.files for path in folder.glob("*.json")}
    tables = {path: table for path, table in tables.items() if table is not None}
    if not tables:
        return None
    numbers, classes = _classes(tables)
    fields = [one for path, table in tables.items() for one in _fields(tree, path, table, numbers)]
    names = ", ".join(path.name for path in tables)
    return DataSet(f"COCO, {names}: {len(fields)} images", fields, None, classes if len(classes) > 1 else [])


def _parsed(path: Path) -> dict[str, list[dict]] | None:
    """A file's lists; None where it is of another kind."""
    data = read_bytes(path)
    if not any(f'"{key}"'.encode() in data for key in _KEYS[1:]):
        return None
    try:
        table = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path} is not a whole JSON file ({error}): export it again") from None
    if not isinstance(table, dict) or not {*_KEYS} <= table.keys():
        return None
    lists = {key: table[key] for key in _KEYS}
    if not all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in lists.values()):
        raise ValueError(f"{path}: {', '.join(_KEYS)} are not lists of objects: export it again")
    return lists


def _classes(tables: dict[Path, dict]) -> tuple[dict[Any, int], list[CellClass]]:
    """Category id -> class id, and the classes: their ids are kept where a class mask can hold them."""
    rows: dict[int, dict] = {}
    for path, table in tables.items():
        for row in table["categories"]:
            number, name = row.get("id"), row.get("name")
            if type(number) is not int or not isinstance(name, str) or rows.setdefault(number, row)["name"] != name:
                raise ValueError(f"{path}: category {number!r} {name!r} has no number, or no name, or two names")
    ids = sorted(rows)
    if len(ids) > MOST:
        raise ValueError(f"{len(ids)} categories are more than {MOST}: leave out those that are no cells")
    kept = all(1 <= number <= MOST for number in ids)
    numbers = {number: number if kept else place for place, number in enumerate(ids, 1)}
    classes = [
        CellClass(numbers[number], one.name, _colour(rows[number]) or one.colour)
        for number, one in zip(ids, named([rows[number]["name"] for number in ids]))
    ]
    return numbers, classes


def _colour(row: dict) -> tuple[int, int, int] | None:
    """What a category says of its colour, as those of panoptic sets and of export_set.py do."""
    colour = row.get("color")
    usable = isinstance(colour, list) and len(colour) == 3 and all(type(c) is int and 0 <= c <= 255 for c in colour)
    return tuple(colour) if usable else None


class _Annotation(NamedTuple):
    """One nucleus: its number in the file, its class and its outline."""

    number: Any
    class_id: int
    segmentation: Any


def _fields(tree: Tree, path: Path, table: dict, numbers: dict[Any, int]) -> list[Field]:
    images = {_id(row, "id", path): row for row in table["images"]}
    if len(images) < len(table["images"]):
        raise ValueError(f"{path}: two images have one id: export it again")
    found: dict[Any, dict[int, _Annotation]] = {number: {} for number in images}  # by instance
    for row in table["annotations"]:
        where, number = f"{path}: annotation {row.get('id')}", _id(row, "category_id", path)
        if number not in numbers:
            raise ValueError(f"{where} is of category {number}, which is none")
        if row.get("iscrowd"):
            raise ValueError(f"{where} is a crowd, not one nucleus: split or remove it")
        if _id(row, "image_id", path) not in found:
            raise ValueError(f"{where} is of image {row['image_id']}, which is not there")
        own = found[row["image_id"]]
        # export_set.py leaves the id that a nucleus had.
        instance = row.get("instance", len(own) + 1)
        if type(instance) is not int or not 0 < instance < 1 << 31 or instance in own:
            raise ValueError(f"{where}: instance {instance!r} is no id, or is there twice")
        own[instance] = _Annotation(row.get("id"), numbers[number], row.get("segmentation"))
    split, fields = tree.split_of(path.with_suffix("")), []
    for number, row in images.items():
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}: image {number} has no file_name")
        image, stem = _image(tree, path, name), safe(nfc(Path(name).stem))
        # export_set.py leaves the slide, too.
        slide = safe(row["slide"]) if isinstance(row.get("slide"), str) and row["slide"] else stem
        where = f"{path}: image {name}"
        fields.append(Field(stem, slide, path.stem, split, where, partial(_read, image, where, found[number])))
    return fields


def _id(row: dict, key: str, path: Path) -> int | str:
    if not isinstance(row.get(key), (int, str)):
        raise ValueError(f"{path}: {key} {row.get(key)!r} is neither a number nor a text: export it again")
    return row[key]


def _image(tree: Tree, path: Path, name: str) -> Path:
    """
    Find an image: beside its .json or in `images` there, or else the only one in the data set whose path ends so.

    :raises ValueError: where there is none, or several, or it lies outside.
    """
    parts = Path(name).parts
    if ".." in parts or Path(name).is_absolute() or Path(name).suffix.lower() not in EXTENSIONS:
        raise ValueError(
            f"{path}: file_name {name!r} must be a path below the data set of a file that is read as image"
        )
    near = [place / name for place in (path.parent, path.parent / "images") if (place / name).is_file()]
    if near:
        return near[0]
    ends = [file for file in tree.called(parts[-1]) if file.parts[-len(parts) :] == parts]
    if len(ends) != 1:
        what = f"{len(ends)} images are called so" if ends else "there is no such image"
        raise ValueError(f"{path}: file_name {name!r}: {what} in {tree.src}")
    return ends[0]


def _read(image: Path, where: str, annotations: dict[int, _Annotation]) -> Labelled:
    """Draw an image's annotations, by their ids in the instance map, in their order."""
    pixels = read_image(image)
    inst_map, class_map = np.zeros((2, *pixels.shape[:2]), np.int32)
    covered = np.zeros(pixels.shape[:2], np.uint8)
    for instance, one in annotations.items():
        inside = _drawn(one.segmentation, inst_map.shape, f"{where}: annotation {one.number}")
        covered += inside & (covered < 2)
        inst_map[inside], class_map[inside] = instance, one.class_id
    return Labelled(pixels, inst_map, class_map, np.count_nonzero(covered > 1))


def _drawn(segmentation: Any, shape: tuple[int, int], where: str) -> np.ndarray:
    """:return: an [H x W] array, true inside. :raises ValueError: where nothing is, or it is of no known kind."""
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if segmentation.get("size") != [*shape]:
            raise ValueError(
                f"{where} is for {segmentation.get('size')} px, height and width, its image is {[*shape]} px"
            )
        inside = _from_runs(unpacked(counts, where) if isinstance(counts, str) else counts, shape, where)
    elif isinstance(segmentation, list) and segmentation:
        inside = _from_polygons(segmentation, shape, where)
    else:
        raise ValueError(f"{where} has no segmentation, a box alone says no outline: export polygons or run lengths")
    if not inside.any():
        raise ValueError(f"{where} covers no pixel: remove it")
    return inside


def _from_runs(counts: Any, shape: tuple[int, int], where: str) -> np.ndarray:
    """Run lengths in the order of columns, the first of background."""
    whole = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
    if not whole or sum(counts) != shape[0] * shape[1]:
        raise ValueError(f"{where}: its run lengths are not those of {shape[1]} x {shape[0]} px: export it again")
    runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return runs.reshape(shape, order="F")


def unpacked(text: str, where: str) -> list[int]:
    """
    Read COCO's packed run lengths. A character holds five bits, the lowest first, and whether more follow; a number's
    last has its sign. From the fourth on, numbers are differences to the one two before.

    :raises ValueError: where the text is none of these.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError(f"{where}: {character!r} is no part of run lengths: export it again")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError(f"{where}: its run lengths break off: export it again")
    return counts


def _from_polygons(polygons: list, shape: tuple[int, int], where: str) -> np.ndarray:
    try:
        from pycocotools import mask
    except ImportError:
        raise ImportError("COCO's polygons need pycocotools: pip install pycocotools, or export run lengths") from None

    points = [np.asarray(polygon, dtype=object) for polygon in polygons]
    for polygon in points:
        numbers = all(type(value) in (int, float) for value in polygon.ravel())
        if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 or not numbers:
            raise ValueError(f"{where}: a polygon is not a list [x, y, x, y, ...] of three points or more")
    # What pycocotools takes of memory grows with the outline, and beyond some gigabytes it crashes.
    if sum(map(_length, points)) > 2 * (shape[0] + 2) * (shape[1] + 2):
        raise ValueError(f"{where}: its outline is longer than an image of {shape[1]} x {shape[0]} px has room for")
    runs = mask.frPyObjects([polygon.astype(float).tolist() for polygon in points], *shape)
    return mask.decode(mask.merge(runs)).astype(bool)


def _length(polygon: np.ndarray) -> float:
    """:return: of a closed outline x, y, x, y, ..., in pixels along the axes, those outside of the image, too."""
    far = 1 << 30
    corners = np.array([float(max(-far, min(far, value))) for value in polygon]).reshape(-1, 2)
    return np.abs(corners - np.roll(corners, 1, axis=0)).sum()
