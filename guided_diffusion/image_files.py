"""
The one reader of images and masks, for all programs: it gives what any viewer shows, or refuses the file in one line.
docs/data.md has the table of what is read.

Knows nothing of folders, nor of what images and masks are used for.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .files import check_content, read_bytes
from .image_decoding import Decoded, Refused, decode, is_cut, opened

EXTENSIONS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # of Pillow, that all programs show alike
# Where a PNG may say that it is to be turned.
_TURNED = (b"eXIf", b"Raw profile type", b"tiff:Orientation")


def read_image(path: str | Path, in_channels: int = 3) -> np.ndarray:
    """
    Read a grey, palette, RGB or RGBA image, upright.

    :param path: a file or blobfile URL.
    :return: an [H x W x in_channels] uint8 array.
    :raises ValueError: where it cannot be decoded, or docs/data.md refuses it.
    :raises FileNotFoundError: where it is gone.
    """
    with _naming(path):
        image = _in_8_bits(_decoded(path))
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise Refused("is partly transparent, so that its colours depend on what is behind it: save it as RGB")
        # Through RGB, so that a palette becomes grey by its colours.
        image = image.convert("RGB")
        return np.asarray(image) if in_channels == 3 else np.asarray(image.convert("L"))[..., None]


def read_mask(path: str | Path) -> np.ndarray:
    """
    Read a mask of integers, upright.

    :return: an [H x W] int32 array; of a colour image with equal channels, the first.
    :raises ValueError: where it cannot be decoded, or docs/data.md refuses it.
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
    Check that an image can be read; most PNGs' pixels by their checksums alone.

    :return: its width and height in pixels.
    :raises FileNotFoundError, ValueError: see read_image.
    """
    with _naming(path):
        data = read_bytes(path)
        if data.startswith(b"\x89PNG") and not any(mark in data for mark in _TURNED):
            with opened(data) as image:
                wide = is_cut(image) or image.mode.startswith("I")
                if not wide and not image.has_transparency_data:
                    image.verify()
                    return image.size
    height, width, _ = read_image(path).shape
    return width, height


def _in_8_bits(decoded: Decoded) -> Image.Image:
    """
    An image of 8 bits a channel; of 16 the upper ones, as viewers show them.

    :raises Refused: where the numbers are others, or stay in the lower half of 16 bits: those of 12 would be black.
    """
    image, cut = decoded.pixels, decoded.cut
    wide = isinstance(image, np.ndarray) and (image.dtype.kind, image.dtype.itemsize) == ("u", 2)
    if wide and not decoded.doubt and image.shape[2:] in ((), (3,)):
        image, cut = Image.fromarray((image >> 8).astype(np.uint8)), True
    _check_kind(image)
    if cut and np.max(image.convert("RGB").getextrema()) < 128:
        raise Refused("has uint16 pixels of less than 16 bits, not 8 bits a channel: convert it to 8-bit RGB")
    return image


def _check_kind(image: Image.Image | np.ndarray) -> None:
    """:raises Refused: where an image has more than 8 bits a channel, or colours that programs show unlike."""
    if isinstance(image, np.ndarray):
        raise Refused(f"has pixels of {image.dtype}, not 8 bits a channel: convert it to 8-bit RGB")
    if image.mode not in _MODES:
        raise Refused(f"has colours in {image.mode}, which programs show in several ways: convert it to 8-bit RGB")


def _read_labels(path: str | Path) -> tuple[np.ndarray, bool]:
    """A mask as read_mask gives it, and whether its pixels are single bits."""
    with _naming(path):
        decoded = _decoded(path)
        if decoded.doubt:
            raise Refused(decoded.doubt)
        mask = _one_channel(_numbers(decoded))
        if mask.dtype.kind not in "bui":
            raise Refused(f"holds floating-point numbers ({mask.dtype}): save instance ids or classes as integers")
        bits = mask.dtype.kind == "b"
        if not bits and mask.min(initial=0) < 0:
            raise Refused("holds negative numbers: background is 0, ids are positive")
        if mask.max(initial=0) > np.iinfo(np.int32).max:
            raise Refused("holds numbers of more than 31 bits: number the nuclei from 1 on")
        return mask.astype(np.int32), bits


def _numbers(decoded: Decoded) -> np.ndarray:
    """
    The numbers that a mask's file holds, [H x W] or [H x W x C].

    :raises Refused: where its colours say something else.
    """
    image = decoded.pixels
    if isinstance(image, np.ndarray):
        return image
    if image.mode not in _MODES:
        raise Refused(f"is a colour image, in {image.mode}: save the mask with one channel of integers")
    if image.mode in ("LA", "PA", "RGBA") and image.getchannel("A").getextrema()[0] < 255:
        raise Refused("is partly transparent: save the mask with one channel of integers")
    numbers = np.asarray(image)
    if image.mode in ("P", "PA"):
        values = np.unique(numbers if image.mode == "P" else numbers[..., 0])
        colours = np.array(image.getpalette("RGB")).reshape(-1, 3)[values]
        grey = (colours == colours[:, :1]).all()
        if (grey and (colours[:, 0] != values).any()) or colours[values == 0].any():
            raise Refused("has a palette that contradicts its numbers: save it with one channel of integers")
    return numbers // decoded.step if decoded.step > 1 else numbers


def _one_channel(numbers: np.ndarray) -> np.ndarray:
    """The first of channels that must be equal, but for the last of two or four, which is opacity."""
    if numbers.ndim == 2:
        return numbers
    colours = numbers[..., : 3 if numbers.shape[2] > 2 else 1]
    if (colours != colours[..., :1]).any():
        raise Refused("is a colour image: save the mask with one channel of integers")
    return colours[..., 0]


def _decoded(path: str | Path) -> Decoded:
    return decode(read_bytes(path))


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Name the file in whatever its decoder raises."""
    check_content(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of on its way to an error is part of the error
            yield
    except Refused as error:
        raise ValueError(f"{path} {error}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read: replace it or remove it") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is gone, or a link that leads nowhere") from None
    except MemoryError:
        raise ValueError(f"{path} does not fit into this machine's memory: cut it into parts") from None
    except Exception as error:  # a damaged file makes Pillow raise a dozen types
        raise ValueError(f"{path} cannot be decoded ({error}): replace it or remove it") from None
