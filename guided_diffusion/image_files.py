"""Files of images and masks: which belong together, and how they are read. Knows nothing of conditions or batches."""

import hashlib
import io
import os
import warnings
from dataclasses import dataclass

import blobfile as bf
import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")


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
    """The paths of one image: its class mask and its instance mask, either of which may be missing."""

    stem: str
    image: str
    class_mask: str | None
    inst_mask: str | None


def slide_of(stem: str) -> str:
    """:return: the slide a patch was cut from: NAME of NAME_000; a stem that ends otherwise is a slide of its own."""
    name, _, number = stem.rpartition("_")
    return name if name and number.isdecimal() else stem


def list_items(data_dir: str, dataset_mode: str, is_train: bool = True) -> list[Item]:
    """
    Pair a split's files by stem.

    :param data_dir: the folder, or blobfile URL, that holds the splits.
    :param dataset_mode: a key of LAYOUTS.
    :return: the items, sorted by stem.
    :raises ValueError: where the mode is unknown, the split empty, or a file without its partner.
    :raises FileNotFoundError: where a folder is missing.
    """
    if dataset_mode not in LAYOUTS:
        raise ValueError(f"unknown --dataset_mode {dataset_mode!r}: choose one of {', '.join(LAYOUTS)}")
    _require_folder("--data_dir", data_dir, "the one that holds the splits")
    _check_complete(data_dir)
    layout = LAYOUTS[dataset_mode]
    split = layout.train if is_train else layout.test
    folder = bf.join(data_dir, split)
    if not bf.isdir(bf.join(folder, "images")):
        raise FileNotFoundError(
            f"--data_dir {data_dir} has no {split}/images, which --dataset_mode {dataset_mode} reads: "
            "make it with scripts/prepare_monuseg.py"
        )
    images = _by_stem(bf.join(folder, "images"))
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
    images = _by_stem(folder)
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


def _check_complete(data_dir: str) -> None:
    """Refuse what an interrupted scripts/prepare_monuseg.py left, by the manifest that it begins with."""
    manifest = bf.join(data_dir, "prepare.json")
    if bf.exists(manifest):
        with bf.BlobFile(manifest, "r") as file:
            text = file.read()
        if '"complete": false' in text:
            raise ValueError(f"--data_dir {data_dir} is not prepared to the end: run prepare_monuseg.py again")


def _by_stem(folder: str) -> dict[str, str]:
    paths: dict[str, str] = {}
    # blobfile asks for every entry's size, which a link that leads nowhere has not.
    names = bf.listdir(folder) if "://" in folder else os.listdir(folder)
    for name in sorted(names):
        stem, dot, extension = name.rpartition(".")
        if name.startswith(".") or (dot + extension).lower() not in EXTENSIONS:
            continue
        path = bf.join(folder, name)
        if stem in paths:
            raise ValueError(f"{paths[stem]} and {path} share a stem: keep one of them")
        paths[stem] = path
    return paths


def _masks(folder: str, name: str | None, images: dict[str, str]) -> dict[str, str]:
    """Stem -> path of one mask folder, which may be absent; if it is there it must hold a mask for each image."""
    if name is None or not bf.isdir(bf.join(folder, name)):
        if name is not None and os.path.lexists(bf.join(folder, name)):
            raise ValueError(f"{bf.join(folder, name)} is a file, or a link that leads nowhere: it must be a folder")
        return {}
    masks = _by_stem(bf.join(folder, name))
    for stem in sorted(set(images) - set(masks)):
        raise ValueError(f"{images[stem]} has no mask {stem}.* in {bf.join(folder, name)}: add it or remove the image")
    for stem in sorted(set(masks) - set(images)):
        raise ValueError(
            f"{masks[stem]} has no image {stem}.* in {bf.join(folder, 'images')}: add it or remove the mask"
        )
    return masks


def _open(path: str) -> Image.Image:
    try:
        with bf.BlobFile(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of on its way to an error is part of the error
            image = Image.open(io.BytesIO(file.read()))
            image.load()
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read: replace it or remove it") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is gone, or a link that leads nowhere") from None
    except Exception as error:  # a damaged file makes Pillow raise a dozen types
        raise ValueError(f"{path} cannot be decoded ({error}): replace it or remove it") from None
    return image


def read_image(path: str, in_channels: int = 3) -> np.ndarray:
    """
    Read a grey, palette, RGB or RGBA image.

    :return: an [H x W x in_channels] uint8 array; transparency is ignored.
    """
    image = _open(path)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has pixels of mode {image.mode}, not 8 bits a channel: convert it to 8-bit RGB")
    # Through RGB, so that a palette with transparency becomes grey by its colours.
    image = image.convert("RGB")
    if in_channels == 1:
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image)


def read_mask(path: str) -> np.ndarray:
    """
    Read a mask of integers.

    :return: an [H x W] int32 array; of a colour image with equal channels, the first.
    :raises ValueError: where values are fractional or negative, or channels differ.
    """
    mask = np.asarray(_open(path))
    if mask.dtype.kind == "f":
        raise ValueError(f"{path} holds floating-point numbers: save instance ids or classes as integers")
    if mask.ndim == 3:
        colours = mask[..., :3] if mask.shape[2] > 2 else mask[..., :1]
        if (colours != colours[..., :1]).any():
            raise ValueError(f"{path} is a colour image: save the mask with one channel of integers")
        mask = colours[..., 0]
    if mask.dtype.kind != "b" and mask.min(initial=0) < 0:
        raise ValueError(f"{path} holds negative numbers: background is 0, ids are positive")
    return mask.astype(np.int32)


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
