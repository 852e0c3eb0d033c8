"""
From a file's bytes to its pixels: by tifffile where Pillow gets the numbers of a TIFF wrong, and refused where programs
do not agree on what they are. docs/data.md has the table.

Knows nothing of paths, nor of what images and masks are used for.
"""

import io
import logging
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tifffile import COMPRESSION, PHOTOMETRIC, TiffFile, TiffPage

MAX_PIXELS = 1 << 30  # 3 GiB of RGB
Image.MAX_IMAGE_PIXELS = None  # Pillow takes a slide of 13 600 px a side for an attack

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_UNPACKED = (COMPRESSION.NONE, COMPRESSION.DEFLATE, COMPRESSION.ADOBE_DEFLATE)  # by tifffile alone
_BY_LIBTIFF = (
    *(COMPRESSION.CCITTRLE, COMPRESSION.CCITTFAX3, COMPRESSION.CCITTFAX4, COMPRESSION.LZW, COMPRESSION.PACKBITS),
    *(COMPRESSION.OJPEG, COMPRESSION.JPEG, COMPRESSION.LZMA, COMPRESSION.ZSTD),
)
_LOSSY_TIFF = (COMPRESSION.OJPEG, COMPRESSION.JPEG)
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
_ORIENTATION = 274  # the tag that says how a picture is turned
_TURNS = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
logging.getLogger("tifffile").disabled = True  # it logs what is odd in tags; what matters of that, it raises


class Refused(ValueError):
    """Why a file is not read, and the remedy: the end of a sentence that begins with the file's name."""


@dataclass(frozen=True)
class Decoded:
    """
    What a file holds, upright.

    :param pixels: a Pillow image of at most 8 bits a channel; of more bits, or signed, an array, [H x W (x C)].
    :param doubt: why its numbers are no labels, as Refused has it; "" where they may be.
    :param cut: whether Pillow has kept the upper 8 of a channel's 16 bits alone.
    :param step: what Pillow has multiplied the numbers by, as it does with grey of 2 and 4 bits.
    """

    pixels: Image.Image | np.ndarray
    doubt: str = ""
    cut: bool = False
    step: int = 1


def decode(data: bytes) -> Decoded:
    """
    Decode a file's content.

    :raises Refused: where it is whole, but not read. What Pillow and tifffile raise where it is damaged.
    """
    if data[:4] in _TIFF:
        with TiffFile(io.BytesIO(data)) as file:
            return _decode_tiff(file, data)
    image = opened(data)
    doubt = f"is a {image.format}, which alters numbers" if image.format in _LOSSY else ""
    return _by_pillow(image, doubt and f"{doubt}: save the mask as .png or .tif")


def opened(data: bytes) -> Image.Image:
    """
    Begin to decode a file that is no TIFF.

    :return: an image whose pixels are not decoded yet.
    :raises Refused: where what comes before the pixels says that they are not to be had, or not as they are shown.
    """
    image = Image.open(io.BytesIO(data))
    _check_size(image.width, image.height)
    if image.format != "MPO":  # a photo, and what a camera hides behind it
        _check_pages(getattr(image, "n_frames", 1))
    return image


def _by_pillow(image: Image.Image, doubt: str) -> Decoded:
    """Let Pillow decode an image that it has opened."""
    rawmode, cut = _rawmode(image), is_cut(image)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    pixels = np.asarray(image) if image.mode.startswith(("I", "F")) else image
    if cut and not doubt:
        doubt = "has channels of 16 bits, not 8: save the mask with one channel of integers"
    return Decoded(pixels, doubt, cut, {"L;2": 85, "L;4": 17}.get(rawmode[:3], 1))


def _rawmode(image: Image.Image) -> str:
    """How Pillow understands the bytes of an image that is not decoded yet."""
    arguments = image.tile[0].args if image.tile else ""
    return arguments[0] if isinstance(arguments, tuple) else str(arguments)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Refused(f"is {width} x {height} px, more than the {MAX_PIXELS} that are read: cut it into parts")


def _check_pages(count: int) -> None:
    if count > 1:
        raise Refused(
            f"has {count} pages: save the one that counts alone, of a mask all nuclei in one, each by its own number"
        )


def is_cut(image: Image.Image) -> bool:
    """:return: whether Pillow, when it decodes an image, will cut 16 bits a channel down to the upper 8."""
    return ";16" in _rawmode(image) and not image.mode.startswith("I")


# ---- TIFF ----


def _decode_tiff(file: TiffFile, data: bytes) -> Decoded:
    page = file.pages.first
    if page.compression not in _UNPACKED + _BY_LIBTIFF:
        name = getattr(page.compression, "name", "an unknown method").replace("_", " ")
        raise Refused(
            f"is a TIFF compressed by {name} ({int(page.compression)}), which is not read: "
            "save it uncompressed, or compressed by LZW or deflate"
        )
    _check_size(page.imagewidth, page.imagelength)
    _check_pages(_page_count(file))
    if page.photometric == PHOTOMETRIC.PALETTE and np.max(page.colormap) < 256:
        raise Refused("is a TIFF whose palette is of 8 bits, not 16, which some programs show black: save it as RGB")
    if page.samplesperpixel > 4:
        raise Refused(f"is a TIFF of {_described(page)}, which is not read: {_REMEDY}")
    wide = page.bitspersample in (16, 32, 64) or page.sampleformat != 1
    if wide and page.compression in _UNPACKED and page.predictor in (1, 2):
        return Decoded(_by_tifffile(page), _doubt(page))
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise Refused(f"is a TIFF of {_described(page)}, which is not read: {_REMEDY}") from None
    signed = page.sampleformat != 1 or page.bitspersample > 16
    if signed and (page.bitspersample == 8 or file.byteorder == ">"):
        raise Refused(f"is a big-endian TIFF of {_described(page)} compressed by {page.compression.name}: {_REMEDY}")
    return _by_pillow(image, _doubt(page))


_REMEDY = "save it as 8-bit RGB, or a mask with one channel of integers, uncompressed"


def _described(page: TiffPage) -> str:
    kinds = {1: "unsigned", 2: "signed", 3: "floating-point"}
    channels = f"{page.samplesperpixel} channel{'s' * (page.samplesperpixel > 1)}"
    kind = kinds.get(page.sampleformat, "complex or unknown")
    return f"{channels} ({getattr(page.photometric, 'name', page.photometric)}) of {page.bitspersample} {kind} bits"


def _by_tifffile(page: TiffPage) -> np.ndarray:
    pixels = page.asarray()
    if pixels.ndim == 3 and page.planarconfig == 2:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.shape[:2] != (page.imagelength, page.imagewidth):
        raise Refused(f"is a TIFF of several images in one, {pixels.shape}: save each by itself")
    return _TURNS.get(page.tags.valueof(_ORIENTATION), np.asarray)(pixels)


def _page_count(file: TiffFile) -> int:
    """The pages of a file, but for smaller copies of the first one; those that ImageJ and tifffile hide behind it."""
    count = 1 + sum(not (page.is_reduced or page.is_mask) for page in file.pages[1:])
    if count == 1 and (file.is_imagej or file.is_shaped or file.is_stk):
        count = max(1, file.series[0].size // file.pages.first.size)
    return count


def _doubt(page: TiffPage) -> str:
    """What Decoded says of a TIFF's numbers."""
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        return "is a TIFF whose 0 is white, which programs read in two ways: save it as min-is-black"
    if page.photometric == PHOTOMETRIC.PALETTE and page.bitspersample > 8:
        return "is a TIFF with a palette of 16 bits: save the mask with one channel of integers"
    if page.compression in _LOSSY_TIFF:
        return "is a TIFF compressed by JPEG, which alters numbers: save the mask as .png or uncompressed"
    if 0 in page.extrasamples:
        return f"is a TIFF of {page.samplesperpixel} channels: save the mask with one channel of integers"
    return ""
