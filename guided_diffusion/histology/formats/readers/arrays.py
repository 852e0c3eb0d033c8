"""
Data sets of patches in a few large arrays: PanNuke, also as HoVer-NeXt packs it, and CoNIC.

Sources: the folders as they are published, and the loaders of the tools that train on them.
"""

import csv
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from ....cell_classes import named
from ..fields import TEST, TRAIN, DataSet, Field, Labelled, numbered, safe
from .opening import Tree, load_npy, rgb, whole

_PANNUKE_CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
CONIC_CLASSES = ("neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective")
_TEST_FOLD = 3  # of the first of the three ways to use the folds that were published


def find_pannuke(tree: Tree) -> DataSet | None:
    """
    Find PanNuke's folds, in folders that are numbered so.

    It does not say which slides patches are of: those of one tissue and fold count as one. Fold 3 is the test set where
    others are there.
    """
    folds: dict[int, dict[str, Path]] = {}
    for name in ("images.npy", "types.npy", "masks.npy", "labels.npy"):
        for path in tree.called(name):
            number = _fold(tree, path)
            if number is not None and folds.setdefault(number, {}).setdefault(name, path) != path:
                raise ValueError(f"{folds[number][name]} and {path} are both of fold {number}: remove one")
    folds = {number: files for number, files in sorted(folds.items()) if files.keys() - {"types.npy"}}
    if not folds:
        return None
    fields = [one for number, files in folds.items() for one in _fold_fields(number, files, len(folds) > 1)]
    found = f"PanNuke, fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}: {len(fields)} patches"
    return DataSet(found, fields, 0.25, named(_PANNUKE_CLASSES), sparse=True)


def _fold(tree: Tree, path: Path) -> int | None:
    found = [re.search(r"(?<![a-z])fold[\s_-]*(\d+)", part.lower()) for part in tree.parts(path.parent)]
    numbers = [int(match[1]) for match in found if match]
    return numbers[-1] if numbers else None


def _fold_fields(number: int, files: dict[str, Path], several: bool) -> list[Field]:
    masks = files.get("masks.npy") or files.get("labels.npy")
    for name, path in (("masks.npy", masks), *((name, files.get(name)) for name in ("images.npy", "types.npy"))):
        if path is None:
            raise ValueError(f"{next(iter(files.values()))} is of fold {number}, which has no {name}: download it, too")
    channels, read = (6, _read_pannuke) if masks.name == "masks.npy" else (2, _read_pair)
    count = _check_shapes(files["images.npy"], masks, channels)
    types = load_npy(files["types.npy"])
    if types.shape != (count,) or types.dtype.kind != "U":
        raise ValueError(f"{files['types.npy']} is not a name of a tissue for each of {count} patches")
    split = TEST if several and number == _TEST_FOLD else TRAIN
    fields = []
    for index, tissue in enumerate(types.tolist()):
        slide = safe(f"fold{number}-{tissue}")
        where, reader = f"{masks}, patch {index}", partial(read, files["images.npy"], masks, index)
        fields.append(Field(numbered(slide, index), slide, f"fold{number}", split, where, reader))
    return fields


def _check_shapes(images: Path, masks: Path, channels: int) -> int:
    """:return: how many patches two arrays hold. :raises ValueError: where they are not of the same."""
    shape, wanted = load_npy(images).shape, load_npy(masks).shape
    if len(shape) != 4 or shape[3] != 3 or wanted != (*shape[:3], channels):
        raise ValueError(
            f"{images} is {shape}, {masks} {wanted}: expected (N, H, W, 3) and (N, H, W, {channels}) of equal N, H, W"
        )
    return shape[0]


def _read_pannuke(images: Path, masks: Path, index: int) -> Labelled:
    """One patch; an id means another nucleus in each channel, which is of one class."""
    channels = whole(load_npy(masks)[index, ..., : len(_PANNUKE_CLASSES)], f"{masks}, patch {index}")
    inst_map, class_map = np.zeros((2, *channels.shape[:2]), np.int32)
    count = 0
    for number in range(channels.shape[2]):
        inside = channels[..., number] > 0
        ids, places = np.unique(channels[inside, number], return_inverse=True)
        inst_map[inside], class_map[inside] = count + 1 + places, number + 1
        count += len(ids)
    overlap = np.count_nonzero((channels > 0).sum(axis=2) > 1)
    return Labelled(rgb(load_npy(images)[index], f"{images}, patch {index}"), inst_map, class_map, overlap)


def find_conic(tree: Tree) -> DataSet | None:
    """Find CoNIC's arrays; patch_info.csv says which image a patch was cut from."""
    images = [path for path in tree.called("images.npy") if "labels.npy" in tree.files[path.parent]]
    images = [path for path in images if _fold(tree, path) is None]
    if not images:
        return None
    if len(images) > 1:
        raise ValueError(f"{images[0]} and {images[1]} are both CoNIC's by name: give the folder of one")
    (path,) = images
    labels = path.with_name("labels.npy")
    count = _check_shapes(path, labels, 2)
    fields = []
    for index, name in enumerate(_patch_names(path.with_name("patch_info.csv"), count)):
        source, _, number = name.rpartition("-")
        slide, read = safe(source), partial(_read_pair, path, labels, index)
        fields.append(Field(numbered(slide, int(number)), slide, "", TRAIN, f"{labels}, patch {index}", read))
    sources = len({one.slide for one in fields})
    return DataSet(f"CoNIC: {count} patches of {sources} images", fields, 0.5, named(CONIC_CLASSES), sparse=True)


def _patch_names(path: Path, count: int) -> list[str]:
    """The names in patch_info.csv, SOURCE-NUMBER."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: it says which patches are of one image, which a split keeps together"
        ) from None
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path} is no table in UTF-8: download it again") from None
    names = [row[-1].strip() for row in rows[1:] if row]
    if len(names) != count:
        raise ValueError(f"{path} has {len(names)} rows for {count} patches: download both again")
    for name, times in Counter(names).items():
        if times > 1 or not re.fullmatch(r".+-\d{1,9}", name):
            raise ValueError(f"{path}: {name!r} is no name such as consep_1-0000, or is there twice")
    return names


def _read_pair(images: Path, labels: Path, index: int) -> Labelled:
    """One patch whose labels are an instance map and a class map."""
    where = f"{labels}, patch {index}"
    pair = whole(load_npy(labels)[index], where)
    return Labelled(rgb(load_npy(images)[index], f"{images}, patch {index}"), pair[..., 0], pair[..., 1])
