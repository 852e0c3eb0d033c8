"""
Data sets whose labels are MATLAB files beside images: CoNSeP and Kumar as HoVer-Net packs them, and Lizard.

Sources: the folders as they are published, and HoVer-Net's loaders.
"""

import csv
from functools import partial
from pathlib import Path

import numpy as np

from ....cell_classes import named
from ....files import by_stem
from ....image_files import EXTENSIONS, read_image
from ..fields import TEST, TRAIN, DataSet, Field, Labelled, safe
from .arrays import CONIC_CLASSES
from .opening import Tree, load_mat, mat_names, pairs, whole

_CONSEP_CLASSES = (
    *("other", "inflammatory", "healthy epithelial", "malignant epithelial"),
    *("fibroblast", "muscle", "endothelial"),
)
_TYPES = ("type_map", "inst_type")
_LIZARD_TEST = "3"  # in info.csv; 1 is training, 2 validation


def find_consep(tree: Tree) -> DataSet | None:
    """Find CoNSeP's tiles: `Train` and `Test` with `Images` and `Labels`, which have types."""
    fields = _tiles(tree, typed=True)
    if not fields:
        return None
    return DataSet(f"CoNSeP: {len(fields)} tiles", fields, 0.25, named(_CONSEP_CLASSES))


def find_kumar(tree: Tree) -> DataSet | None:
    """Find tiles as Kumar's: `train`, `test_same`, `test_diff` with `Images` and `Labels`, which have no types."""
    fields = _tiles(tree, typed=False)
    if not fields:
        return None
    return DataSet(f"Kumar, or a set packed like it: {len(fields)} tiles", fields, 0.25)


def _tiles(tree: Tree, typed: bool) -> list[Field]:
    fields = []
    for images, labels in tree.holding("images", "labels"):
        mats = by_stem(labels, (".mat",))
        if not mats or mat_names(Path(next(iter(mats.values())))).isdisjoint(_TYPES) == typed:
            continue
        folder = images.parent
        for stem, image, mat in pairs(images, labels, (".mat",)):
            read = partial(_read_tile, image, mat, typed)
            fields.append(Field(safe(stem), safe(stem), folder.name, tree.split_of(folder), str(mat), read))
    return fields


def _read_tile(image: Path, mat: Path, typed: bool) -> Labelled:
    """
    One tile. Its types are type_map's, as HoVer-Net reads them, or else inst_type's, of which the i-th is that of the
    i-th id in rising order. Types outside nuclei count for nothing.
    """
    content = load_mat(mat, ("inst_map", *(_TYPES if typed else ())))
    if "inst_map" not in content:
        raise ValueError(f"{mat} has no inst_map: give the instance labels of the data set")
    inst_map = _flat(content["inst_map"], f"{mat}: inst_map")
    class_map = None
    if "type_map" in content:
        class_map = _flat(content["type_map"], f"{mat}: type_map")
        if class_map.shape != inst_map.shape:
            raise ValueError(f"{mat}: type_map is {class_map.shape}, inst_map {inst_map.shape}: they must be alike")
        class_map = np.where(inst_map > 0, class_map, 0)
    elif typed:
        ids = np.unique(inst_map[inst_map > 0])
        class_map = _by_id(inst_map, ids, content.get("inst_type"), f"{mat}: inst_type")
    return Labelled(read_image(image), inst_map, class_map)


def _flat(array: np.ndarray, where: str) -> np.ndarray:
    if array.ndim != 2:
        raise ValueError(f"{where} has {array.ndim} dimensions, not height and width")
    return whole(array, where)


def _by_id(inst_map: np.ndarray, ids: np.ndarray, types: np.ndarray | None, where: str) -> np.ndarray:
    """
    :param ids: the ids in rising order. :param types: the type of each.
    :return: an [H x W] class map.
    """
    if types is None or types.size != len(ids):
        raise ValueError(f"{where} has {0 if types is None else types.size} types for {len(ids)} nuclei")
    numbers = np.concatenate([[0], whole(types.ravel(), where)])
    return numbers[np.searchsorted(np.concatenate([[0], ids]), inst_map)]


def find_lizard(tree: Tree) -> DataSet | None:
    """Find Lizard's regions: info.csv with columns Filename and Split, `Labels` beside it, images anywhere."""
    tables = [path for path in tree.called("info.csv") if (path.parent / "Labels").is_dir()]
    rows = [(path, row) for path in tables for row in _info(path)]
    if not rows:
        return None
    images: dict[str, str] = {}
    for folder in tree.files:
        for stem, image in by_stem(folder, EXTENSIONS).items():
            if images.setdefault(stem, image) != image:
                raise ValueError(f"{images[stem]} and {image} are one region by name: remove one")
    fields = []
    for path, (stem, split) in rows:
        mat = path.parent / "Labels" / f"{stem}.mat"
        if stem not in images or not mat.is_file():
            missing = f"image {stem}.png" if stem not in images else f"{mat.name} in {mat.parent}"
            raise ValueError(f"{path} has a row of {stem}, but there is no {missing}: unpack all of Lizard's archives")
        read = partial(_read_lizard, Path(images[stem]), mat)
        part, where = f"split{split}", str(mat)
        fields.append(Field(safe(stem), safe(stem), part, TEST if split == _LIZARD_TEST else TRAIN, where, read))
    return DataSet(f"Lizard: {len(fields)} regions", fields, 0.5, named(CONIC_CLASSES))


def _info(path: Path) -> list[tuple[str, str]]:
    """Stem and split of each row; none where the table is of something else."""
    try:
        table = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
        if not {"Filename", "Split"} <= {*(table.fieldnames or ())}:
            return []
        rows = [(Path((row["Filename"] or "").strip()).stem, (row["Split"] or "").strip()) for row in table]
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path} is no table in UTF-8: download it again") from None
    for stem, split in rows:
        if not stem or split not in ("1", "2", "3"):
            raise ValueError(f"{path}: {stem!r} is of split {split!r}; expected 1, 2 or 3")
    return rows


def _read_lizard(image: Path, mat: Path) -> Labelled:
    """One region; ids have gaps, so the class of each is looked up by `id`."""
    content = load_mat(mat, ("inst_map", "id", "class"))
    if len(content) < 3:
        raise ValueError(f"{mat} lacks {', '.join(sorted({'inst_map', 'id', 'class'} - content.keys()))}")
    inst_map = _flat(content["inst_map"], f"{mat}: inst_map")
    ids, types = (whole(content[name].ravel(), f"{mat}: {name}") for name in ("id", "class"))
    if len(ids) != len(types) or len(np.unique(ids)) != len(ids):
        raise ValueError(f"{mat} has {len(types)} classes for {len(np.unique(ids))} ids: download it again")
    present = np.unique(inst_map[inst_map > 0])
    unknown = np.setdiff1d(present, ids)
    if len(unknown):
        raise ValueError(f"{mat}: nucleus {unknown[0]} is in inst_map but not in id: it has no class")
    order = np.argsort(ids)
    classes = types[order][np.searchsorted(ids[order], present)]
    return Labelled(read_image(image), inst_map, _by_id(inst_map, present, classes, f"{mat}: class"))
