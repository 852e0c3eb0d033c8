"""
The classes of cells that a data set tells apart: classes.json, and the class masks whose numbers it explains.

A folder of raw slides or of patches owns its classes.json: a list of {"id", "name", "colour"}. Beside inst_masks lie
class_masks: per pixel the class of the nucleus that it is in, 0 outside nuclei. Knows nothing of images or models, nor
of how other data sets write classes down.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blobfile as bf
import numpy as np

from .files import check_path, parse_json, read_bytes, write_json
from .slides import owners

TABLE = "classes.json"
FOLDER = "class_masks"
MOST = 255  # a class mask has 8 bits
# Okabe and Ito's colours, which the colour-blind tell apart, too, but for black, which is background.
_COLOURS = (
    *((213, 94, 0), (0, 158, 115), (0, 114, 178), (240, 228, 66)),
    *((204, 121, 167), (86, 180, 233), (230, 159, 0)),
)


@dataclass(frozen=True)
class CellClass:
    """
    One class of cells.

    :param id: its number in class masks, 1 to 255.
    :param name: as people know it; no other class of the table has it.
    :param colour: to draw it in: red, green and blue, 0 to 255.
    """

    id: int
    name: str
    colour: tuple[int, int, int]


def ids_of(classes: Iterable[CellClass]) -> set[int]:
    """:return: the numbers of classes in class masks."""
    return {one.id for one in classes}


def named(names: Sequence[str]) -> list[CellClass]:
    """:return: classes of these names, numbered from 1, in colours that differ as long as there are."""
    return [CellClass(number, name, _COLOURS[(number - 1) % len(_COLOURS)]) for number, name in enumerate(names, 1)]


# ---- the table ----


def read_classes(folder: str | Path) -> list[CellClass]:
    """
    :param folder: a data folder, or any folder in it, local or a blobfile URL.
    :return: the classes by the nearest classes.json, in rising order of ids; none where there is no such file.
    :raises ValueError: where it cannot be used.
    """
    for place in owners(folder):
        path = bf.join(place, TABLE)
        if bf.exists(path):
            return _parsed(read_bytes(path), path)
    return []


def of_mask(path: str) -> list[CellClass]:
    """:return: the classes of a class mask, see read_classes; those of DATA/CLUSTERS/LABEL/10ss are DATA's, too."""
    split = path.rpartition(f"/{FOLDER}/")[0]
    return read_classes(split) or read_classes(bf.dirname(split))


def write_classes(folder: Path, classes: Sequence[CellClass]) -> None:
    """Write a folder's classes.json. :raises ValueError: where a reader would refuse it."""
    path = folder / TABLE
    write_json(path, as_rows(_checked(classes, str(path))))


def shared(folders: Sequence[str | Path]) -> list[CellClass]:
    """
    :return: the classes of several folders, see read_classes; in the first one's colours.
    :raises ValueError: where two have others, so that a number would mean two things.
    """
    first, *others = folders
    classes = read_classes(first)
    named = [(one.id, one.name) for one in classes]  # colours say nothing of what they are
    for other in others:
        if [(one.id, one.name) for one in read_classes(other)] != named:
            raise ValueError(
                f"{first} and {other} have not the same classes of cells by their {TABLE}: use one of them"
            )
    return classes


def pass_on(source: str | Path, target: Path) -> None:
    """Give a folder the classes.json of the data that its files are made from, if they have one."""
    if classes := read_classes(source):
        write_classes(target, classes)


def as_rows(classes: Sequence[CellClass]) -> list[dict[str, Any]]:
    """:return: classes as plain values, as JSON gives them back."""
    return [{**asdict(one), "colour": list(one.colour)} for one in classes]


def from_rows(rows: Any, path: str) -> list[CellClass]:
    """
    :param rows: what as_rows gave, as it was read. :param path: of what holds it.
    :raises ValueError: where they are no classes.
    """
    try:
        classes = [CellClass(row["id"], row["name"], tuple(row["colour"])) for row in rows]
    except (TypeError, KeyError):
        raise ValueError(
            f'{path} holds no list of {{"id": 1, "name": "lymphocyte", "colour": [0, 114, 178]}}'
        ) from None
    return _checked(classes, path)


def _parsed(data: bytes, path: str) -> list[CellClass]:
    try:
        rows = parse_json(data)
    except ValueError:
        rows = None
    return from_rows(rows, path)


def _checked(classes: Sequence[CellClass], path: str) -> list[CellClass]:
    for one in classes:
        if not (_is_int(one.id) and 1 <= one.id <= MOST):
            raise ValueError(f"{path}: id {one.id!r} is none of a class: give a whole number from 1 to {MOST}")
        if not (isinstance(one.name, str) and one.name.strip() and one.name[0] not in "=+-@"):
            raise ValueError(f"{path}: class {one.id} has no name that a table can hold: {one.name!r}")
        check_path(one.name)
        if not (len(one.colour) == 3 and all(_is_int(part) and 0 <= part <= 255 for part in one.colour)):
            raise ValueError(f"{path}: class {one.id} has no colour: give red, green and blue, 0 to 255")
    for what in ("id", "name"):
        values = [getattr(one, what) for one in classes]
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{path}: two classes have the {what} {value!r}")
    return sorted(classes, key=lambda one: one.id)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ---- masks ----


def of_nuclei(inst_map: np.ndarray, class_map: np.ndarray, known: Collection[int], where: str) -> dict[int, int]:
    """
    Look up the class of each nucleus, and check that a class mask says one.

    :param inst_map: an [H x W] integer array of instance ids, 0 outside nuclei.
    :param class_map: an [H x W] integer array of class ids, 0 outside nuclei.
    :param known: the ids of the classes that there are. :param where: what names the class mask in an error.
    :return: instance id -> class id, in rising order of instances.
    :raises ValueError: where sizes differ, a nucleus has no class, several, or one that is not in the table, or a class
        lies outside nuclei.
    """
    if inst_map.shape != class_map.shape:
        (height, width), (other, wide) = inst_map.shape, class_map.shape
        raise ValueError(f"{where} is {wide} x {other} px, its instance mask {width} x {height} px: they must be alike")
    outside = np.count_nonzero((inst_map == 0) & (class_map != 0))
    if outside:
        raise ValueError(f"{where}: {outside} px outside nuclei have a class, which is their instance mask's to bound")
    inside = inst_map != 0
    pairs = np.unique(np.stack([inst_map[inside], class_map[inside]]).astype(np.int64), axis=1)
    found = dict(zip(*pairs.tolist()))
    if len(found) < pairs.shape[1]:
        ids, counts = np.unique(pairs[0], return_counts=True)
        several = ids[counts > 1]
        raise ValueError(
            f"{where}: nucleus {several[0]} has pixels of classes {_listed(pairs[1][pairs[0] == several[0]])}"
            f"{f', and {len(several) - 1} more are so' if len(several) > 1 else ''}: a nucleus is of one class"
        )
    for nucleus, number in found.items():
        if number not in known:
            what = f"is of class {number}, which is not in {TABLE} ({_listed(sorted(known))})" if number else "has none"
            raise ValueError(f"{where}: nucleus {nucleus} {what}: give it a class of the table")
    return found


def painted(inst_map: np.ndarray, of_nucleus: Mapping[int, int]) -> np.ndarray:
    """
    Make the class mask of an instance map, or of any part of it.

    :param inst_map: an [H x W] integer array of instance ids, 0 outside nuclei.
    :param of_nucleus: the class of each, as of_nuclei gives it.
    :return: an [H x W] uint8 array of class ids.
    """
    ids = np.array([0, *sorted(of_nucleus)], np.int64)
    numbers = np.array([0, *(of_nucleus[nucleus] for nucleus in ids[1:].tolist())], np.uint8)
    return numbers[np.searchsorted(ids, inst_map)]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
