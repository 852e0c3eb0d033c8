"""What docs/data.md says of images and masks: each kind of file is read as viewers show it, or refused in a line."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from guided_diffusion.image_files import EXTENSIONS, check_image, read_image, read_inst_mask, read_mask

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 255, (8, 10, 3)).astype(np.uint8)
GREY = RGB[..., 0]
IDS = RNG.integers(0, 300, (8, 10)).astype(np.uint16)
BITS = IDS > 150
SMALL = (IDS % 4).astype(np.uint8)
PAGES = np.stack([GREY] * 3)
COLOURS = RNG.integers(1, 255, (3, 256)).astype(np.uint16)
COLOURS[:, 0] = 0
OPAQUE, CLEAR = np.full((8, 10, 1), 255, np.uint8), np.full((8, 10, 1), 254, np.uint8)


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **({"photometric": "minisblack", "metadata": None} | options))
    return file.getvalue()


def pillow(image, format, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_tag(data, tag, before, after):
    """A little-endian TIFF with another value of one of its tags."""
    head = struct.pack("<HHI", tag, 3, 1)
    assert data.count(head + struct.pack("<H", before)) == 1
    return data.replace(head + struct.pack("<H", before), head + struct.pack("<H", after))


def rgb_tiff(array, **options):
    return tiff(array, photometric="rgb", **options)


def png(width, height, bits=8, colour=0, pixels=b""):
    """A PNG from its header on; without pixels, one that is refused only where these are decoded."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(pixels)),
    ]
    chunks += [(b"IEND", b"")]
    packed = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def reduced():
    """A slide as scanners store it: the picture, and a smaller copy of it."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(RGB, photometric="rgb", metadata=None)
        writer.write(RGB[::2, ::2], photometric="rgb", metadata=None, subfiletype=1)
    return file.getvalue()


def palette_picture():
    picture = Image.fromarray(GREY).convert("P")
    picture.putpalette(COLOURS.T.astype(np.uint8).tobytes())
    return picture


def four_bits(values):
    """A grey PNG of 4 bits a pixel."""
    rows = (values[:, ::2] << 4 | values[:, 1::2]).astype(np.uint8)
    return png(10, 8, bits=4, pixels=b"".join(b"\0" + row.tobytes() for row in rows))


def in_16_bits(array, suffix):
    return cv2.imencode(suffix, array)[1].tobytes()


def as_grey(values):
    return np.repeat(values[..., None], 3, axis=2).astype(np.uint8)


NOT_RGB, NO_LABELS = "8 bits a channel: convert it to 8-bit RGB", "save the mask with one channel of integers"
# Kind of file -> its content, what it is as an image, and as a mask: an array, or words of the refusal.
KINDS = {
    "rgb": (pillow(RGB, "PNG"), RGB, "colour image"),
    "rgb, bmp": (pillow(RGB, "BMP"), RGB, "colour image"),
    "rgb, tiff": (rgb_tiff(RGB), RGB, "colour image"),
    "rgb, bigtiff": (rgb_tiff(RGB, bigtiff=True), RGB, "colour image"),
    "rgb, lzw": (pillow(RGB, "TIFF", compression="tiff_lzw"), RGB, "colour image"),
    "rgb, deflate": (rgb_tiff(RGB, compression="zlib", predictor=True), RGB, "colour image"),
    "rgb, planes": (rgb_tiff(np.moveaxis(RGB, 2, 0), planarconfig="separate"), RGB, "colour image"),
    "rgb, tiles": (rgb_tiff(RGB, tile=(16, 16)), RGB, "colour image"),
    "rgb of equal channels": (pillow(as_grey(GREY), "PNG"), as_grey(GREY), GREY),
    "rgb, opaque": (pillow(np.dstack([RGB, OPAQUE]), "PNG"), RGB, "colour image"),
    "rgb, transparent": (pillow(np.dstack([RGB, CLEAR]), "PNG"), "partly transparent", "partly transparent"),
    "rgb, transparent, tiff": (pillow(np.dstack([RGB, CLEAR]), "TIFF"), "partly transparent", "partly transparent"),
    "rgb and another": (rgb_tiff(np.dstack([RGB, CLEAR]), extrasamples=[0]), RGB, f"4 channels: {NO_LABELS}"),
    "rgb and two others": (rgb_tiff(np.dstack([RGB, CLEAR, CLEAR])), "5 channels .RGB. of 8 unsigned", "5 channels"),
    "grey": (pillow(GREY, "PNG"), as_grey(GREY), GREY),
    "grey, tiff": (tiff(GREY), as_grey(GREY), GREY),
    "grey, opaque": (pillow(np.dstack([GREY, OPAQUE]), "PNG"), as_grey(GREY), GREY),
    "grey, transparent": (pillow(np.dstack([GREY, CLEAR]), "PNG"), "partly transparent", "partly transparent"),
    "grey, one value transparent": (pillow(GREY, "PNG", transparency=int(GREY[0, 0])), "partly transparent", GREY),
    "grey and another": (tiff(np.dstack([GREY, CLEAR]), planarconfig="contig"), as_grey(GREY), "2 channels"),
    "grey, three channels": (tiff(RGB, planarconfig="contig"), "3 channels .MINISBLACK", "3 channels .MINISBLACK"),
    "grey, three planes": (tiff(PAGES, planarconfig="separate"), "3 channels .MINISBLACK", "3 channels .MINISBLACK"),
    "grey, 4 bits": (four_bits(SMALL), as_grey(SMALL * 17), SMALL),
    "bits": (pillow(BITS, "PNG"), as_grey(BITS * 255), BITS),
    "bits, fax": (pillow(BITS, "TIFF", compression="group4"), as_grey(BITS * 255), BITS),
    "signed bytes": (tiff(SMALL.astype(np.int8)), f"int8, not {NOT_RGB}", SMALL),
    "signed bytes, negative": (tiff(-SMALL.astype(np.int8)), f"int8, not {NOT_RGB}", "negative"),
    "16 bits": (pillow(IDS, "PNG"), "less than 16 bits", IDS),
    "16 bits, tiff": (tiff(IDS), "less than 16 bits", IDS),
    "16 bits, lzw": (pillow(IDS, "TIFF", compression="tiff_lzw"), "less than 16 bits", IDS),
    "16 bits, rgb": (in_16_bits(np.dstack([IDS] * 3), ".png"), "less than 16 bits", "channels of 16 bits"),
    "16 bits, rgb, lzw": (in_16_bits(np.dstack([IDS] * 3), ".tif"), "less than 16 bits", "channels of 16 bits"),
    "16 bits, rgb, tiff": (rgb_tiff(np.dstack([IDS] * 3)), "less than 16 bits", IDS),
    "16 bits, rgb, planes": (rgb_tiff(np.stack([IDS] * 3), planarconfig="separate"), "less than 16 bits", IDS),
    "16 bits in full, rgb": (in_16_bits(RGB[..., ::-1] * np.uint16(257), ".png"), RGB, "channels of 16 bits"),
    "16 bits in full, rgb, lzw": (in_16_bits(RGB[..., ::-1] * np.uint16(257), ".tif"), RGB, "channels of 16 bits"),
    "16 bits in full, rgb, tiff": (rgb_tiff(RGB * np.uint16(257)), RGB, "colour image"),
    "16 bits in full": (pillow(GREY * np.uint16(257), "PNG"), as_grey(GREY), GREY * np.uint16(257)),
    "palette": (pillow(Image.fromarray(SMALL).convert("P"), "PNG"), as_grey(SMALL), SMALL),
    "palette of colours": (pillow(palette_picture(), "PNG"), COLOURS.T[GREY].astype(np.uint8), GREY),
    "palette, background transparent": (pillow(palette_picture(), "PNG", transparency=0), None, GREY),
    "palette, 0 is no black": (
        pillow(Image.fromarray(BITS * np.uint8(255)).quantize(2), "PNG"),
        None,
        "a palette that",
    ),
    "palette, grey": (pillow(Image.fromarray(SMALL * 20).quantize(256), "PNG"), as_grey(SMALL * 20), "a palette that"),
    "palette, 8 bits": (
        tiff(GREY, photometric="palette", colormap=COLOURS),
        "palette is of 8 bits",
        "palette is of 8 bits",
    ),
    "palette, 16 bits": (
        tiff(IDS, photometric="palette", colormap=np.zeros((3, 65536), np.uint16) + 999),
        NOT_RGB,
        "a palette of 16 bits",
    ),
    "white is 0": (tiff(GREY, photometric="miniswhite"), as_grey(255 - GREY), "0 is white"),
    "white is 0, 16 bits": (tiff(IDS, photometric="miniswhite"), NOT_RGB, "0 is white"),
    "white is 0, bits": (tiff(BITS, photometric="miniswhite"), as_grey(~BITS * 255), "0 is white"),
    "cmyk": (tiff(np.dstack([RGB, GREY]), photometric="separated"), "colours in CMYK", "in CMYK"),
    "cmyk, jpeg": (pillow(Image.fromarray(RGB).convert("CMYK"), "JPEG"), "colours in CMYK", "is a JPEG"),
    "lab": (tiff(RGB, photometric="cielab"), "colours in LAB", "in LAB"),
    "ycbcr": (tiff(RGB, photometric="ycbcr"), "colours in YCbCr", "in YCbCr"),
    "jpeg": (pillow(as_grey(GREY), "JPEG"), None, "is a JPEG, which alters numbers: save the mask as .png or .tif"),
    "jpeg in tiff": (pillow(GREY, "TIFF", compression="jpeg"), None, "JPEG, which alters numbers"),
    "jpeg 2000": (pillow(GREY, "JPEG2000"), as_grey(GREY), "is a JPEG2000, which alters numbers"),
    "jpeg 2000 in tiff": (with_tag(tiff(GREY), 259, 1, 34712), "compressed by JPEG2000 .34712.", "by JPEG2000"),
    "aperio's jpeg 2000": (
        with_tag(tiff(GREY), 259, 1, 33005),
        "APERIO JP2000 RGB .33005., which is not read",
        "33005",
    ),
    "webp in tiff": (
        with_tag(tiff(GREY), 259, 1, 50001),
        "by WEBP .50001., which is not read: save it uncompressed",
        "by WEBP",
    ),
    "pages": (tiff(PAGES), "has 3 pages", "has 3 pages"),
    "pages, apng": (
        pillow(GREY, "PNG", save_all=True, append_images=[Image.fromarray(GREY + 1)]),
        "has 2 pages",
        "has 2 pages",
    ),
    "pages of imagej": (tiff(PAGES, imagej=True, truncate=True, metadata={}), "has 3 pages", "has 3 pages"),
    "pages behind one": (tiff(PAGES, truncate=True, metadata={}), "has 3 pages", "has 3 pages"),
    "a smaller copy": (reduced(), RGB, "colour image"),
    "no picture": (b"hello", "not an image that can be read", "not an image that can be read"),
    "cut off": (tiff(IDS)[:-9], "cannot be decoded", "cannot be decoded"),
    "too large": (png(40_000, 40_000), "40000 x 40000 px, more than the 1073741824", "cut it into parts"),
    "floating-point, lzw": (
        pillow(IDS.astype(np.float32), "TIFF", compression="tiff_lzw"),
        f"float32, not {NOT_RGB}",
        "floating-point",
    ),
    "32 bits and more": (tiff(np.full((8, 10), 2**31, np.uint32)), f"uint32, not {NOT_RGB}", "more than 31 bits"),
    "negative": (tiff(-IDS.astype(np.int32)), f"int32, not {NOT_RGB}", "negative"),
}
for order in "<>":
    for dtype in "i2 u4 i4 u8 i8 f2 f4 f8 c8".split():
        for how in ({}, {"compression": "zlib"}):
            name = f"{order}{dtype}{', deflate' * bool(how)}"
            read = "floating-point numbers" if dtype[0] in "fc" else IDS
            KINDS[name] = (tiff(IDS.astype(dtype), byteorder=order, **how), NOT_RGB, read)
for dtype, read in (("u2", IDS), ("i2", "big-endian"), ("i4", "big-endian"), ("f4", "big-endian")):
    # Of a TIFF that only libtiff can decompress; deflate's content passes for LZMA's until it is decoded.
    content = tiff(IDS.astype(dtype), byteorder=">", compression="lzma")
    KINDS[f">{dtype}, lzma"] = (content, None, read)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(tmp_path, kind):
    content, as_image, as_mask = KINDS[kind]
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    for read, expected in ((read_image, as_image), (check_image, as_image), (read_mask, as_mask)):
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path} ") and "\n" not in str(caught.value)
        elif read is check_image:
            assert expected is None or read(path) == expected.shape[1::-1]
        elif expected is not None:
            np.testing.assert_array_equal(read(path), expected)
            assert read(path).dtype == (np.int32 if read is read_mask else np.uint8)


@pytest.mark.parametrize("format", ["TIFF", "PNG", "JPEG", "TIFF, 16 bits"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_images_and_masks_stand_upright(tmp_path, format, turn):
    """As Pillow, whose rule for one format is ours for all, turns it."""
    array = np.zeros((16, 32), np.uint8)
    array[:4, 8:], array[8:, :16] = 80, 200
    exif = Image.Exif()
    exif[274] = turn
    path = tmp_path / "a"
    if "16" in format:
        path.write_bytes(tiff(array.astype(np.uint16), extratags=[(274, 3, 1, turn, True)]))
    else:
        path.write_bytes(pillow(array, format, exif=exif))
    flips = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}.get(turn, [])
    upright = Image.fromarray(array)
    for method in flips:
        upright = upright.transpose(Image.Transpose(method))
    if "16" in format:
        np.testing.assert_array_equal(read_mask(path), np.asarray(upright))
    else:
        assert abs(read_image(path)[..., 0].astype(int) - np.asarray(upright)).max() < 9
        assert check_image(path) == upright.size


def test_grey_images_of_one_channel(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    grey = np.asarray(Image.fromarray(RGB).convert("L"))
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), 1), grey[..., None])


def test_single_bits_are_no_ids(tmp_path):
    Image.fromarray(BITS).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png holds single bits, not instance ids"):
        read_inst_mask(tmp_path / "a.png")


def test_a_large_slide_is_no_attack(tmp_path):
    (tmp_path / "a.png").write_bytes(png(13_600, 13_600))
    assert check_image(tmp_path / "a.png") == (13_600, 13_600)


def test_a_damaged_image_is_found_without_its_pixels(tmp_path):
    content = bytearray(pillow(RGB, "PNG"))
    content[60] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png cannot be decoded"):
        check_image(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="b.png is gone"):
        read_mask(tmp_path / "b.png")


def test_the_docs_name_every_suffix():
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [suffix for suffix in EXTENSIONS if f"`{suffix}`" not in text] == []
