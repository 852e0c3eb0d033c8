"""
The foreign data sets that can be read, by name, and how to tell which one a folder holds.

Knows nothing of what the files hold; readers do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from ...files import read_json
from .fields import TEST, TRAIN, DataSet, Field
from .readers import arrays, coco, folders, matlab
from .readers.opening import Tree

AUTO = "auto"
EXPORT = "export.json"  # what export_set.py leaves in each folder that it makes: its format, and more


@dataclass(frozen=True)
class Format:
    """
    A data set's layout.

    :param layout: what it looks like, in words.
    :param find: gives the data set of a folder, or None where it looks otherwise. Raises ValueError where it looks like
        this one, but cannot be used.
    """

    layout: str
    find: Callable[[Tree], DataSet | None]


FORMATS = {
    "pannuke": Format("fold1/images.npy, types.npy and masks.npy, or as published in Fold 1/", arrays.find_pannuke),
    "consep": Format("Train and Test with Images/*.png and Labels/*.mat that have type_map", matlab.find_consep),
    "conic": Format("images.npy, labels.npy and patch_info.csv", arrays.find_conic),
    "lizard": Format("info.csv beside Labels/*.mat, and the images", matlab.find_lizard),
    "kumar": Format(
        "train, test_same, test_diff with Images/*.tif and Labels/*.mat that have inst_map", matlab.find_kumar
    ),
    "tnbc": Format("Slide_XX/*.png and GT_XX/*.png", folders.find_tnbc),
    "nuinsseg": Format("organs with 'tissue images' and 'label masks modify'", folders.find_nuinsseg),
    "cryonuseg": Format("'tissue images' and 'Annotator ...' with 'label masks modify'", folders.find_cryonuseg),
    "cellpose": Format("NAME.tif and NAME_masks.tif", folders.find_cellpose),
    "stardist": Format("images/NAME.tif and masks/NAME.tif", folders.find_stardist),
    "coco": Format("a .json of images, annotations and categories", coco.find_coco),
}


def find(src: Path, name: str = AUTO, annotator: str = "") -> tuple[str, DataSet]:
    """
    Find the data set that a folder holds.

    :param name: a key of FORMATS, or AUTO, which tries all.
    :param annotator: of CryoNuSeg, see folders.ANNOTATORS; "": the first.
    :return: its key, and what was found.
    :raises ValueError: where there is none, or are several, or it is of pickled files, which are refused, or an export
        that is not read back.
    :raises FileNotFoundError: where there is no such folder.
    """
    if name != AUTO and name not in FORMATS:
        raise ValueError(f"unknown --format {name}: choose one of {', '.join((AUTO, *FORMATS))}")
    if not src.is_dir():
        raise FileNotFoundError(f"SRC: {src} is not a folder; give the one that the data set was unpacked in")
    if name == AUTO and (exported := exported_as(src)):
        if exported not in FORMATS:
            raise ValueError(
                f"SRC: {src} was made by export_set.py --format {exported}, which is not read back: give what it was "
                "made of"
            )
        name = exported
    tree = Tree(src)
    found = {}
    for key in FORMATS if name == AUTO else (name,):
        options = {"annotator": annotator} if annotator and key == "cryonuseg" else {}
        found[key] = partial(FORMATS[key].find, **options)(tree)
    found = {key: data_set for key, data_set in found.items() if data_set is not None}
    if len(found) > 1:
        raise ValueError(f"SRC: {src} looks like {' and '.join(found)}: say which by --format")
    if not found:
        refused = folders.pickled(tree)
        if refused:
            raise ValueError(f"SRC: {refused}")
        if name != AUTO:
            raise ValueError(f"SRC: {src} does not look like {name}: expected {FORMATS[name].layout}")
        raise ValueError(
            f"SRC: {src} looks like none of {', '.join(FORMATS)}; --format NAME says what is expected of one"
        )
    (key,) = found
    if annotator and key != "cryonuseg":
        raise ValueError(f"--annotator {annotator} is for cryonuseg; this is {key}")
    return key, found[key]


def exported_as(src: Path) -> str:
    """:return: the format in which export_set.py wrote a folder; "" where it did not."""
    try:
        facts = read_json(src / EXPORT)
    except (OSError, ValueError):
        return ""
    return str(facts.get("format", "")) if isinstance(facts, dict) else ""


def split(data_set: DataSet, patterns: Sequence[str]) -> DataSet:
    """
    :param patterns: what is to be the test set, of parts or slides, in place of what the data set says; none: as it has
        it.
    :return: the data set, so split.
    :raises ValueError: where a pattern fits nothing, nothing is left to train on, a slide would be of both splits, or
        two fields have one name.
    """
    fields = data_set.fields
    for pattern in patterns:
        if not any(_fits(one, pattern) for one in fields):
            known = sorted({one.part for one in fields} | {one.slide for one in fields})
            raise ValueError(f"--test {pattern}: there is no such part or slide; there are {', '.join(known[:20])}")
    if patterns:
        fields = [replace(f, split=TEST if any(_fits(f, p) for p in patterns) else TRAIN) for f in fields]
    if all(one.split == TEST for one in fields):
        raise ValueError("nothing is left to train on: all of the data set is test data; --test says what is to be")
    names: dict[str, Field] = {}
    slides: dict[str, Field] = {}
    for one in fields:
        if names.setdefault(one.name, one) is not one:
            raise ValueError(f"{names[one.name].where} and {one.where} would both be called {one.name}: rename one")
        other = slides.setdefault(one.slide, one)
        if other.split != one.split:
            raise ValueError(f"{other.where} and {one.where} are of one slide, {one.slide}, but in both splits")
    return replace(data_set, fields=fields)


def _fits(one: Field, pattern: str) -> bool:
    return fnmatch(one.part, pattern) or fnmatch(one.slide, pattern)
