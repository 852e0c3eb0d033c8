"""
Raw slides, as the MoNuSeg archives and scripts/import_dataset.py have them: which there are, their pixels, and their
nuclei as an instance map, with classes where there are any.

Owns the folder layouts the data is published in. Knows nothing of patches nor of what the maps are used for, and writes
nothing.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...cell_classes import FOLDER as CLASS_FOLDER
from ...cell_classes import CellClass, ids_of, of_nuclei
from ...files import by_stem, nfc
from ...image_files import EXTENSIONS, read_image, read_inst_mask, read_mask
from ...magnification import check
from ...slides import MANIFEST, TABLE, recorded
from . import aperio

TRAIN_SPLIT = "MoNuSegTrainingData"
TEST_SPLIT = "MoNuSegTestData"

_IMAGE_FOLDERS = ("images", "tissue images")
_XML_FOLDERS = ("annotations",)
_MASK_FOLDERS = ("inst_masks",)
# The words of a folder's name that say which split it feeds; "testg" as the reference's MoNuSegTestgData has it.
_SPLIT_WORDS = {
    TRAIN_SPLIT: ("train", "training", "traindata", "trainingdata", "trainset", "trainingset"),
    TEST_SPLIT: ("test", "tests", "testg", "testing", "testdata", "testingdata", "testset", "testingset"),
}
# What the reference's mask script writes beside the images; its masks and overlays are no slides.
_DERIVED_FOLDERS = ("bin_masks", "overlay", "rgb_image")
_MAX_DEPTH = 3
_LONGEST = 200  # bytes of a slide's name, which patches add a number to: file systems take 255


@dataclass(frozen=True)
class Slide:
    """
    One image and the file that says where its nuclei are.

    :param split: TRAIN_SPLIT or TEST_SPLIT.
    :param stem: the name both files share.
    :param image: the image file.
    :param annotation: an Aperio .xml, or an instance mask.
    :param folder: the folder both were found under.
    :param class_mask: says which classes the nuclei are of.
    :param name: the slide or patient that the image is of, which other images may be of, too: what goes by slides goes
        by it, and patches are named after it.
    :param mpp: micrometres a pixel, where slides.csv says them.
    """

    split: str
    stem: str
    image: Path
    annotation: Path
    folder: Path
    class_mask: Path | None = None
    name: str = ""
    mpp: float | None = None

    @property
    def outlined(self) -> bool:
        """Whether the annotation is an XML."""
        return self.annotation.suffix.lower() in aperio.SUFFIXES


def find_slides(raw: Path) -> list[Slide]:
    """
    Find all slides at most three folders below `raw`, in any mixture of the layouts they are published in.

    A folder of slides holds `Tissue Images` or `images` beside `Annotations` or `inst_masks` (an .xml goes before
    a mask of the same stem) and perhaps `class_masks`, or .tif and .xml files side by side. It feeds the split that
    its name, or else that of its nearest ancestor up to `raw`, has as a word: train or training, test or testing, as
    in MoNuSegTestData. A folder with a manifest of prepared patches, one named `patches_*` (the reference's output)
    and hidden ones are skipped. A slides.csv in `raw`, or above a `raw` that is one split, says which slide or patient
    an image is of.

    :param raw: the folder to search.
    :return: the slides, training before test, sorted by stem.
    :raises ValueError: no slide, a file without its partner, a stem used twice, a folder of unknown split.
    """
    raw = Path(raw)
    if not raw.is_dir():
        raise FileNotFoundError(f"RAW: there is no folder {raw}; give the folder the MoNuSeg archives were unpacked in")
    if (raw / MANIFEST).exists():
        raise ValueError(f"RAW: {raw} holds prepared patches ({MANIFEST}); give the folder of the MoNuSeg archives")
    slides = [slide for folder in _walk(raw) for slide in _slides_in(folder, raw)]
    if not slides:
        raise ValueError(
            f"RAW: found no slides in {raw}; expected 'Tissue Images' (or 'images') beside 'Annotations' (or "
            f"'inst_masks'), or .tif and .xml side by side, at most {_MAX_DEPTH} folders deep"
        )
    first: dict[str, Slide] = {}
    for slide in slides:
        other = first.setdefault(slide.stem, slide)
        if other is not slide:
            raise ValueError(
                f"{other.image} and {slide.image} are the same slide by name; remove or rename one of them"
            )
    return _checked(_with_facts(sorted(slides, key=lambda slide: (slide.split != TRAIN_SPLIT, slide.stem)), raw))


def read_slide(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
    """
    Read one slide.

    :return: an [H x W x 3] uint8 RGB image and an [H x W] int32 instance map, 0 = background.
    :raises ValueError: a file that cannot be used, or the two do not fit each other.
    """
    image = read_image(slide.image)
    height, width = image.shape[:2]
    if not slide.outlined:
        inst_map = read_inst_mask(slide.annotation)
        if inst_map.shape != (height, width):
            raise ValueError(
                f"{slide.annotation} is {inst_map.shape[1]} x {inst_map.shape[0]} px but its image {slide.image} is "
                f"{width} x {height} px; give the mask that was made for this image"
            )
        return image, inst_map
    polygons = aperio.read_polygons(slide.annotation)
    drawn = [polygon for polygon in polygons if len(polygon)]
    if drawn and not any(_touches(polygon, height, width) for polygon in drawn):
        raise ValueError(
            f"{slide.annotation}: every region lies outside its image {slide.image} ({width} x {height} px); "
            f"give the annotation that was made for this image"
        )
    return image, aperio.rasterise(polygons, height, width)


def read_classes_of(slide: Slide, inst_map: np.ndarray, classes: Sequence[CellClass]) -> dict[int, int]:
    """
    Read which classes a slide's nuclei are of.

    :param inst_map: its instance map. :param classes: those that there are.
    :return: instance id -> class id; empty where it has no class mask.
    :raises ValueError: see cell_classes.of_nuclei.
    """
    if slide.class_mask is None:
        return {}
    return of_nuclei(inst_map, read_mask(slide.class_mask), ids_of(classes), str(slide.class_mask))


def _touches(polygon: np.ndarray, height: int, width: int) -> bool:
    (x0, y0), (x1, y1) = polygon.min(axis=0), polygon.max(axis=0)
    return bool(x1 >= 0 and y1 >= 0 and x0 < width and y0 < height)


def _walk(raw: Path) -> Iterator[Path]:
    """`raw` and the folders below it that may hold slides, in sorted order."""
    named = (*_IMAGE_FOLDERS, *_XML_FOLDERS, *_MASK_FOLDERS, CLASS_FOLDER, *_DERIVED_FOLDERS)
    for folder, subfolders, _ in os.walk(raw, followlinks=True):
        here = Path(folder)
        if len(here.relative_to(raw).parts) >= _MAX_DEPTH:
            subfolders.clear()
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith((".", "__", "patches_"))
            and name.lower() not in named
            and not (here / name / MANIFEST).exists()
        )
        yield here


def _slides_in(folder: Path, raw: Path) -> list[Slide]:
    """Pair the files of one folder by stem; empty if it holds no slides."""
    children = {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}
    images = _by_stem([children[name] for name in _IMAGE_FOLDERS if name in children], EXTENSIONS)
    outlines = _by_stem([children[name] for name in _XML_FOLDERS if name in children], aperio.SUFFIXES)
    masks = _by_stem([children[name] for name in _MASK_FOLDERS if name in children], EXTENSIONS)
    classes = _by_stem([children[CLASS_FOLDER]] if CLASS_FOLDER in children else [], EXTENSIONS)
    slides = _pair(images, masks | outlines, folder, raw, classes)
    if any(
        path.suffix.lower() in (".xml", ".tif", ".tiff") for path in folder.iterdir() if not path.name.startswith(".")
    ):
        slides += _pair(_by_stem([folder], EXTENSIONS), _by_stem([folder], aperio.SUFFIXES), folder, raw)
    return slides


def _by_stem(folders: Sequence[Path], suffixes: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for stem, file in by_stem(folder, suffixes).items():
            if stem in found:
                raise ValueError(f"{found[stem]} and {file} are the same slide by name; remove or rename one of them")
            found[stem] = Path(file)
    return found


def _pair(
    images: dict[str, Path], annotations: dict[str, Path], folder: Path, raw: Path, classes: Mapping[str, Path] = {}
) -> list[Slide]:
    for stem, path in images.items():
        if stem not in annotations:
            raise ValueError(f"{path}: no annotation named {stem}.xml and no instance mask; add it or remove the image")
    for stem, path in annotations.items():
        if stem not in images:
            raise ValueError(f"{path}: no image named {stem}.tif belongs to it; add the image or remove this file")
    for stem in sorted(images.keys() ^ classes.keys() if classes else ()):
        there, missing = (images, CLASS_FOLDER) if stem in images else (classes, "images")
        raise ValueError(f"{there[stem]}: no file of {missing} has this name; add it or remove this file")
    if not images:
        return []
    split = _split_of(folder, raw)
    return [Slide(split, stem, path, annotations[stem], folder, classes.get(stem)) for stem, path in images.items()]


def _with_facts(slides: list[Slide], raw: Path) -> list[Slide]:
    """The slides with what slides.csv says of them; without it each is a slide of its own."""
    above = [raw.resolve().parent] if split_named(raw.resolve().name) else []
    place = next((place for place in (raw, *above) if (place / TABLE).exists()), raw)
    rows = recorded(place, [slide.image for slide in slides])
    if rows is None:
        return [replace(slide, name=slide.stem) for slide in slides]
    for row in rows:
        if "/" in row["slide"] or len(row["slide"].encode()) > _LONGEST:
            raise ValueError(
                f"{place / TABLE}: patches are named after their slide, and {row['slide']} is no file's name: take one "
                f"without /, of {_LONGEST} bytes at most"
            )
    return [
        replace(slide, name=nfc(row["slide"]), mpp=_mpp(row.get("mpp"), f"{place / TABLE}: {slide.stem} has mpp"))
        for slide, row in zip(slides, rows)
    ]


def _mpp(text: str | None, where: str) -> float | None:
    if not (text or "").strip():
        return None
    try:
        return check(float(text), where)
    except ValueError:
        raise ValueError(f"{where} {text!r}: give micrometres a pixel, such as 0.25, or nothing") from None


def _checked(slides: list[Slide]) -> list[Slide]:
    """:raises ValueError: where a slide is of both splits, or some slides alone have classes."""
    splits: dict[str, Slide] = {}
    for slide in slides:
        other = splits.setdefault(slide.name, slide)
        if other.split != slide.split:
            raise ValueError(
                f"{other.image} and {slide.image} are of one slide, {slide.name}, but in both splits: move one"
            )
    bare, classed = ([slide for slide in slides if (slide.class_mask is None) == none] for none in (True, False))
    if bare and classed:
        raise ValueError(
            f"{bare[0].image} has no class mask, {classed[0].image} has one: give all of them, or remove {CLASS_FOLDER}"
        )
    return slides


def split_named(name: str) -> str | None:
    """
    :return: the split that a folder of a name feeds; None where the name does not say.
    :raises ValueError: where it says both.
    """
    splits = [split for split, words in _SPLIT_WORDS.items() if not _words(name).isdisjoint(words)]
    if len(splits) > 1:
        raise ValueError(f"'{name}' has the words train and test; name the folder after one of them")
    return splits[0] if splits else None


def _split_of(folder: Path, raw: Path) -> str:
    for name in reversed((raw.resolve().name, *folder.relative_to(raw).parts)):
        try:
            split = split_named(name)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        if split:
            return split
    if folder == raw:
        return TRAIN_SPLIT
    raise ValueError(
        f"{folder} holds slides, but is it training or test data? Name it 'train' or 'test', "
        f"or give that folder itself as RAW"
    )


def _words(name: str) -> set[str]:
    """The words of a name in lower case; they end at whatever is no letter, and where a capital begins another."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return set(re.split(r"[\W\d_]+", parted.lower()))
