"""
Files of images and masks: which belong together, and how they are read. For the core and histology alike.

Knows nothing of conditions, batches or what masks are used for.
"""

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import blobfile as bf
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .files import by_stem, is_remote

EXTENSIONS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
MANIFEST = "prepare.json"  # of a data folder, which scripts/prepare_monuseg.py writes first and last
_PHOTOMETRIC = 262  # the TIFF tag that says whether 0 is white or black


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


# ---- reading ----


def read_image(path: str | Path, in_channels: int = 3) -> np.ndarray:
    """
    Read a grey, palette, RGB or RGBA image; transparency is ignored.

    :param path: a file or blobfile URL.
    :return: an [H x W x in_channels] uint8 array.
    :raises ValueError: where it cannot be decoded or has more than 8 bits a channel.
    :raises FileNotFoundError: where it is gone.
    """
    image = _decoded(path)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has pixels of mode {image.mode}, not 8 bits a channel: convert it to 8-bit RGB")
    # Through RGB, so that a palette with transparency becomes grey by its colours.
    image = image.convert("RGB")
    if in_channels == 1:
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image)


def read_mask(path: str | Path) -> np.ndarray:
    """
    Read a mask of integers.

    :return: an [H x W] int32 array; of a colour image with equal channels, the first.
    :raises ValueError: where it cannot be decoded, values are fractional or negative, or channels differ.
    :raises FileNotFoundError: where it is gone.
    """
    return _read_labels(path)[0]


def read_inst_mask(path: str | Path) -> np.ndarray:
    """
    Read an instance mask, see read_mask.

    :return: an [H x W] int32 map, 0 = background, every other value one nucleus.
    :raises ValueError: as read_mask, and where pixels are single bits, which tell no nuclei apart.
    """
    mask, bits = _read_labels(path)
    if bits:
        raise ValueError(f"{path} holds single bits, not instance ids: save it as 16-bit integers")
    return mask


def check_image(path: str | Path) -> tuple[int, int]:
    """
    Check that an image can be read, as far as its checksums tell, and nothing of what it holds.

    :return: its width and height in pixels.
    :raises FileNotFoundError, ValueError: see read_image.
    """
    with _naming(path), _opened(path) as image:
        image.verify() if image.format == "PNG" else image.load()
        return image.size


def _read_labels(path: str | Path) -> tuple[np.ndarray, bool]:
    """A mask as read_mask gives it, and whether its pixels are single bits."""
    image = _decoded(path)
    _check_meaning(image, path)
    mask = np.asarray(image)
    if mask.dtype.kind == "f":
        raise ValueError(f"{path} holds floating-point numbers: save instance ids or classes as integers")
    if mask.ndim == 3:
        colours = mask[..., :3] if mask.shape[2] > 2 else mask[..., :1]
        if (colours != colours[..., :1]).any():
            raise ValueError(f"{path} is a colour image: save the mask with one channel of integers")
        mask = colours[..., 0]
    bits = mask.dtype.kind == "b"
    if not bits and mask.min(initial=0) < 0:
        raise ValueError(f"{path} holds negative numbers: background is 0, ids are positive")
    return mask.astype(np.int32), bits


def _check_meaning(image: Image.Image, path: str | Path) -> None:
    """:raises ValueError: where the file says that its numbers are not what they seem to be."""
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise ValueError(f"{path} has {pages} pages: save all nuclei in one, each by its own number")
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        raise ValueError(f"{path} is a TIFF whose 0 is white, which programs read in two ways: save it as min-is-black")
    if image.mode == "P":
        values = np.unique(np.asarray(image))
        colours = np.array(image.getpalette("RGB")).reshape(-1, 3)[values]
        grey = (colours == colours[:, :1]).all()
        if (grey and (colours[:, 0] != values).any()) or colours[values == 0].any():
            raise ValueError(f"{path} has a palette that contradicts its numbers: save it with one channel of integers")


def _decoded(path: str | Path) -> Image.Image:
    """An image in memory, upright."""
    with _naming(path):
        image = _opened(path)
        layouts = [f"{tile.codec_name} {tile.args}" for tile in image.tile]
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    # Pillow cuts several channels of 16 bits down to 8, and swaps the bytes of compressed 32-bit numbers twice.
    if any(";16" in layout for layout in layouts) and not image.mode.startswith("I"):
        raise ValueError(f"{path} has channels of 16 bits, not 8: convert it to 8-bit RGB, or a mask to one channel")
    if any(layout.startswith("libtiff") and ";32B" in layout for layout in layouts):
        raise ValueError(f"{path} is big-endian and compressed, which is not read rightly: save it as little-endian")
    return image


def _opened(path: str | Path) -> Image.Image:
    with bf.BlobFile(str(path), "rb") as file:
        return Image.open(io.BytesIO(file.read()))


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Name the file in whatever its decoder raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of on its way to an error is part of the error
            yield
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read: replace it or remove it") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is gone, or a link that leads nowhere") from None
    except Exception as error:  # a damaged file makes Pillow raise a dozen types
        raise ValueError(f"{path} cannot be decoded ({error}): replace it or remove it") from None


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
