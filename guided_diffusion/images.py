"""
Files of images and masks: which belong together, and of which slides. For the core and histology alike.

Knows nothing of what the files hold, nor of conditions and batches.
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import blobfile as bf

from .cell_classes import FOLDER as CLASS_FOLDER
from .files import by_stem, list_files, read_json
from .image_files import EXTENSIONS
from .slides import hold_out, owners, read_manifest, slides_of

# Which kind a structure is: REAL was drawn on a slide, GIVEN is of unknown origin; of those made by a program, the
# method, which stands in the folder's STRUCTURES.
REAL, GIVEN = "real", "given"
STRUCTURES = "structures.json"


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps what: folder names by split, and the folders of a split."""

    train: str
    test: str
    class_folder: str
    instance_folder: str | None


LAYOUTS = {
    "monuseg": Layout("MoNuSegTrainingData", "MoNuSegTestData", "bin_masks", "inst_masks"),
    "dsb2018": Layout("train", "test", "masks", None),
}


@dataclass(frozen=True)
class Item:
    """
    The paths of one image, its class mask and its instance mask; either mask may be missing.

    :param stem: the image's path below images/, without suffix, which its masks share below their folders.
    :param slide: that it was cut from, see slides_of.
    :param image: "" of an instance mask without an image.
    :param kind: of the structure.
    """

    stem: str
    slide: str
    image: str
    class_mask: str | None = None
    inst_mask: str | None = None
    kind: str = REAL

    @property
    def path(self) -> str:
        """The path that it is known by: the image's, else the instance mask's."""
        return self.image or self.inst_mask

    @property
    def cell_classes(self) -> bool:
        """Whether the class mask tells classes of cells."""
        return bool(self.class_mask) and self.class_mask.split("/")[-2 - self.stem.count("/")] == CLASS_FOLDER


def list_items(data_dir: str, dataset_mode: str, is_train: bool = True, classes: bool = False) -> list[Item]:
    """
    Pair a split's files by stem; they may lie in sub-folders, of the same names for images and masks.

    :param data_dir: the folder, or blobfile URL, that holds the splits.
    :param dataset_mode: a key of LAYOUTS.
    :param classes: where there are masks of cells' classes, they are the class masks.
    :return: the items, sorted by stem.
    :raises ValueError: where the mode is unknown, the split empty, or a file without its partner.
    :raises FileNotFoundError: where a folder is missing.
    """
    if dataset_mode not in LAYOUTS:
        raise ValueError(f"unknown --dataset_mode {dataset_mode!r}: choose one of {', '.join(LAYOUTS)}")
    _require_folder("--data_dir", data_dir, "the one that holds the splits")
    check_complete(data_dir, "--data_dir")
    layout = LAYOUTS[dataset_mode]
    split = layout.train if is_train else layout.test
    folder = bf.join(data_dir, split)
    if not bf.isdir(bf.join(folder, "images")):
        raise FileNotFoundError(
            f"--data_dir {data_dir} has no {split}/images, which --dataset_mode {dataset_mode} reads: "
            "make it with scripts/prepare_monuseg.py"
        )
    images = by_stem(bf.join(folder, "images"), EXTENSIONS, deep=True)
    if not images:
        raise ValueError(f"{bf.join(folder, 'images')} holds no image ({', '.join(EXTENSIONS)})")
    inst_masks = _masks(folder, layout.instance_folder, images)
    of_cells = _masks(folder, CLASS_FOLDER, images) if classes and inst_masks else {}
    class_masks = of_cells or _masks(folder, layout.class_folder, images)
    if not class_masks and not inst_masks:
        wanted = " or ".join(name for name in (layout.instance_folder, layout.class_folder) if name)
        raise FileNotFoundError(f"{folder} has no {wanted}: every image needs a mask")
    slides = _slides(data_dir, images, layout.test if is_train else layout.train)
    return [
        Item(stem, slide, path, class_masks.get(stem), inst_masks.get(stem))
        for (stem, path), slide in zip(images.items(), slides)
    ]


def list_test_images(data_dir: str, dataset_mode: str) -> list[Item]:
    """:return: the images of the test set as items without masks, sorted by stem; none where there is no such set."""
    layout = LAYOUTS[dataset_mode]
    folder = bf.join(data_dir, layout.test, "images")
    images = by_stem(folder, EXTENSIONS, deep=True) if bf.isdir(folder) else {}
    return list(map(Item, images, _slides(data_dir, images, layout.train), images.values()))


def list_images(folder: str, flag: str) -> list[Item]:
    """
    List images that have no masks.

    :param folder: a folder, or blobfile URL, of images. :param flag: that names it.
    :return: the images as items without masks, sorted by stem.
    :raises ValueError: where there is none.
    :raises FileNotFoundError: where there is no such folder.
    """
    _require_folder(flag, folder, "one of images")
    images = by_stem(folder, EXTENSIONS)
    if not images:
        raise ValueError(f"{flag} {folder} holds no image ({', '.join(EXTENSIONS)})")
    return list(map(Item, images, slides_of(folder, list(images.values())), images.values()))


def list_structures(folder: str, flag: str, classes: bool = False) -> list[Item]:
    """
    List instance masks that have no images; parameters, order and errors as list_images'.

    :param folder: of masks, or one whose inst_masks holds them. :param classes: see list_items.
    """
    _require_folder(flag, folder, "one of instance masks")
    inner = bf.join(folder, "inst_masks")
    masks = by_stem(inner if bf.isdir(inner) else folder, EXTENSIONS)
    if not masks:
        raise ValueError(f"{flag} {folder} holds no mask ({', '.join(EXTENSIONS)})")
    slides, kind = slides_of(folder, list(masks.values())), _kind(folder)
    of_cells = _masks(folder, CLASS_FOLDER, masks) if classes and bf.isdir(inner) else {}
    return [Item(stem, slide, "", of_cells.get(stem), mask, kind) for (stem, mask), slide in zip(masks.items(), slides)]


def _kind(folder: str) -> str:
    """The kind of a folder's structures. :raises ValueError: where the file that says it cannot be read."""
    for path in (bf.join(place, STRUCTURES) for place in itertools.islice(owners(folder), 2)):
        if bf.exists(path):
            try:
                return str(read_json(path)["settings"]["method"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path} is not readable: run make_structures.py again, or remove it") from None
    return GIVEN


def _slides(data_dir: str, images: dict[str, str], other_split: str) -> list[str]:
    """The slides of a split's images, stem -> path; where they are guessed, by the names in the other split, too."""
    other = bf.join(data_dir, other_split, "images")

    def beside() -> list[str]:
        return list_files(other, EXTENSIONS, deep=True) if bf.isdir(other) else []

    return slides_of(data_dir, list(images.values()), beside) if images else []


def _require_folder(flag: str, folder: str, wanted: str) -> None:
    try:
        found = bool(folder) and bf.isdir(folder)
    except bf.Error as error:
        raise ValueError(f"{flag} {folder} cannot be read: {error}") from None
    if not found:
        raise FileNotFoundError(f"{flag} {folder!r} is not a folder: give {wanted}")


def check_complete(folder: str | Path, flag: str) -> None:
    """
    Refuse what an interrupted scripts/prepare_monuseg.py left, by the manifest that it begins with.

    :param folder: a data folder, or a folder in it, see slides.owners. :param flag: that names it.
    :raises ValueError: if it is not whole.
    """
    for place in owners(folder):
        if (read_manifest(place) or {}).get("complete") is False:
            raise ValueError(f"{flag} {folder} is not prepared to the end: run prepare_monuseg.py again")


def _masks(folder: str, name: str | None, images: dict[str, str]) -> dict[str, str]:
    """Stem -> path of one mask folder, which may be absent; if it is there it must hold a mask for each image."""
    if name is None or not bf.isdir(bf.join(folder, name)):
        if name is not None and os.path.lexists(bf.join(folder, name)):
            raise ValueError(f"{bf.join(folder, name)} is a file, or a link that leads nowhere: it must be a folder")
        return {}
    masks = by_stem(bf.join(folder, name), EXTENSIONS, deep=True)
    for stem in sorted(set(images) - set(masks)):
        raise ValueError(f"{images[stem]} has no mask {stem}.* in {bf.join(folder, name)}: add it or remove the image")
    for stem in sorted(set(masks) - set(images)):
        raise ValueError(
            f"{masks[stem]} has no image {stem}.* in {bf.join(folder, 'images')}: add it or remove the mask"
        )
    return masks


def split_slides(items: list[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """
    Hold some slides out of training; parameters and errors as hold_out's.

    :return: the items to train on and those held out, in their order.
    """
    held = hold_out([item.slide for item in items], share, seed)
    return [item for item in items if item.slide not in held], [item for item in items if item.slide in held]
