"""
Files of images and masks: which belong together, and of which slides. For the core and histology alike.

Knows nothing of what the files hold, nor of conditions and batches.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import blobfile as bf
import numpy as np

from .files import by_stem, is_remote
from .image_files import EXTENSIONS

MANIFEST = "prepare.json"  # of a data folder, which scripts/prepare_monuseg.py writes first and last


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
    """

    stem: str
    image: str
    class_mask: str | None
    inst_mask: str | None


def slide_of(stem: str) -> str:
    """
    Tell the slide a patch was cut from by the patch's name: NAME of NAME_000; a name that ends otherwise is a slide of
    its own. Sub-folders do not count: equal names in two of them are one slide, which a split keeps on one side.
    """
    stem = stem.rpartition("/")[2]
    name, _, number = stem.rpartition("_")
    return name if name and number.isdecimal() else stem


def list_items(data_dir: str, dataset_mode: str, is_train: bool = True) -> list[Item]:
    """
    Pair a split's files by stem; they may lie in sub-folders, of the same names for images and masks.

    :param data_dir: the folder, or blobfile URL, that holds the splits.
    :param dataset_mode: a key of LAYOUTS.
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
    class_masks = _masks(folder, layout.class_folder, images)
    inst_masks = _masks(folder, layout.instance_folder, images)
    if not class_masks and not inst_masks:
        wanted = " or ".join(name for name in (layout.instance_folder, layout.class_folder) if name)
        raise FileNotFoundError(f"{folder} has no {wanted}: every image needs a mask")
    return [Item(stem, images[stem], class_masks.get(stem), inst_masks.get(stem)) for stem in sorted(images)]


def list_images(folder: str) -> list[Item]:
    """
    List images that have no masks.

    :param folder: a folder, or blobfile URL, of images.
    :return: the images as items without masks, sorted by stem.
    :raises ValueError: where there is none.
    :raises FileNotFoundError: where there is no such folder.
    """
    _require_folder("--appearance_dir", folder, "one of images")
    images = by_stem(folder, EXTENSIONS)
    if not images:
        raise ValueError(f"--appearance_dir {folder} holds no image ({', '.join(EXTENSIONS)})")
    return [Item(stem, images[stem], None, None) for stem in sorted(images)]


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

    :param folder: a data folder, or a folder up to two below it: a split, or its images. :param flag: that names it.
    :raises ValueError: if it is not whole.
    """
    place = str(folder) if is_remote(folder) else os.path.abspath(folder)
    for _ in range(1 if is_remote(folder) else 3):
        manifest = bf.join(place, MANIFEST)
        if bf.exists(manifest):
            with bf.BlobFile(manifest, "r") as file:
                text = file.read()
            if '"complete": false' in text:
                raise ValueError(f"{flag} {folder} is not prepared to the end: run prepare_monuseg.py again")
        place = bf.dirname(place)


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


def draw_slides(slides: Iterable[str], count: int, seed: int) -> set[str]:
    """:return: `count` of the slides' names; fewer are among more that the same seed draws."""
    names = sorted(set(slides))
    order = np.random.default_rng([seed, len(names)]).permutation(len(names))
    return {names[i] for i in order[:count]}


def split_slides(items: list[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """
    Hold some slides out of training; patches of one slide are too alike to be on both sides.

    :param share: of the slides, at least one; of fewer than three slides none is held out.
    :param seed: of the choice.
    :return: the items to train on and those held out, in their order.
    :raises ValueError: where nothing would be left to train on.
    """
    slides = sorted({slide_of(item.stem) for item in items})
    if len(slides) < 3:
        return items, []
    count = max(1, round(share * len(slides)))
    if count == len(slides):
        raise ValueError(f"--val_share {share} leaves no training slide of {len(slides)}: give less")
    # By lot, but by each slide's own: what fine-tuning on a part of the slides holds out, training on all did as well,
    # as far as the part has such a slide.
    held = set(sorted(slides, key=lambda slide: hashlib.sha256(f"{seed} {slide}".encode()).digest())[:count])
    parts = {True: [], False: []}
    for item in items:
        parts[slide_of(item.stem) in held].append(item)
    return parts[False], parts[True]
