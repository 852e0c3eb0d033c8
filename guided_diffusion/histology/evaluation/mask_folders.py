"""
Folders of predicted and true instance masks, with classes where both have class masks beside them: what pairs, and the
tallies of each pair.

Knows no figures.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ... import cell_classes, progress
from ...cell_classes import CellClass
from ...files import by_stem
from ...image_files import EXTENSIONS, read_inst_mask, read_mask
from . import class_metrics, instance_metrics
from .class_metrics import ClassTally
from .instance_metrics import Tally


def compare(truth: Path, predicted: Path) -> dict[str, Tally | ClassTally]:
    """
    :param truth: folder of instance masks; predicted: another, of the same stems.
    :return: path of the true mask -> its tally, sorted by stem.
    :raises FileNotFoundError, ValueError: where masks are missing, or do not fit each other.
    """
    found, true = _masks_in(predicted), _masks_in(truth)
    for stem in sorted(found.keys() ^ true.keys()):
        there, missing = (predicted, truth) if stem in found else (truth, predicted)
        raise ValueError(f"{there} has {stem}, {missing} has not: the folders must hold the same stems")
    classes, class_masks = _classes_beside((truth, predicted), set(true))
    tallies = {}
    for stem in progress.bar(sorted(true), "comparing", leave=False, delay=2):
        pair = [read_inst_mask(path) for path in (true[stem], found[stem])]
        if pair[0].shape != pair[1].shape:
            sizes = [f"{mask.shape[1]} x {mask.shape[0]} px" for mask in pair]
            raise ValueError(f"{found[stem]} is {sizes[1]}, {true[stem]} {sizes[0]}: they must be of one size")
        tallies[true[stem]] = _tally(pair, [masks[stem] for masks in class_masks], classes)
    return tallies


def _masks_in(folder: Path) -> dict[str, str]:
    """:return: stem -> path of the masks in a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one of instance masks")
    masks = by_stem(folder, EXTENSIONS)
    if not masks:
        raise ValueError(f"{folder} holds no mask ({', '.join(EXTENSIONS)})")
    return masks


def _classes_beside(folders: Sequence[Path], stems: set[str]) -> tuple[list[CellClass], list[dict[str, str]]]:
    """
    :param folders: of instance masks; stems: theirs.
    :return: the classes, and of each folder the class masks beside it, stem -> path; none where one has no such masks.
    :raises ValueError: where their classes differ or have no names, or a mask is missing.
    """
    places = [folder.absolute().parent / cell_classes.FOLDER for folder in folders]
    if not all(place.is_dir() for place in places):
        return [], []
    classes, masks = cell_classes.shared(places), [_masks_in(place) for place in places]
    if not classes:
        raise ValueError(f"{places[0]} has classes, but no folder above it the {cell_classes.TABLE} that names them")
    for place, own in zip(places, masks):
        for stem in sorted(stems - own.keys()):
            raise ValueError(f"{place} has no mask of {stem}, but of others: add it")
    return classes, masks


def _tally(pair: Sequence[np.ndarray], class_masks: Sequence[str], classes: Sequence[CellClass]) -> Tally | ClassTally:
    """:param pair: a true and a found instance map. :param class_masks: the paths of theirs, if there are classes."""
    if not classes:
        return instance_metrics.tally(*pair)
    known = cell_classes.ids_of(classes)
    sides = [(own, cell_classes.of_nuclei(own, read_mask(path), known, path)) for own, path in zip(pair, class_masks)]
    return class_metrics.tally(*sides[0], *sides[1], classes)
