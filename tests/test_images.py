"""Pairing by stem, and reading images and masks of every kind."""

import struct

import cv2
import numpy as np
import pytest
from conftest import draw_patch
from PIL import Image

from guided_diffusion.images import (
    Item,
    check_complete,
    check_image,
    list_items,
    read_image,
    read_inst_mask,
    read_mask,
    slide_of,
    split_slides,
)


def test_pairs_by_stem_whatever_the_extension(data_dir):
    folder = data_dir / "MoNuSegTrainingData"
    Image.open(folder / "images" / "slide-0_001.png").save(folder / "images" / "slide-0_001.TIFF")
    (folder / "images" / "slide-0_001.png").unlink()
    (folder / "images" / ".DS_Store").write_bytes(b"")
    (folder / "images" / "notes.txt").write_text("")
    items = list_items(str(data_dir), "monuseg")
    assert [item.stem for item in items] == [f"slide-{k // 4}_{k % 4:03d}" for k in range(8)]
    assert items[1].image.endswith("slide-0_001.TIFF") and items[1].inst_mask.endswith("slide-0_001.tif")


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "1"])
def test_image_modes(tmp_path, mode, in_channels):
    image = Image.fromarray(draw_patch(0)[0]).convert(mode)
    image.save(tmp_path / "a.png")
    array = read_image(str(tmp_path / "a.png"), in_channels)
    assert array.dtype == np.uint8
    expected = image.convert("RGB") if in_channels == 3 else image.convert("RGB").convert("L")
    np.testing.assert_array_equal(array.reshape(32, 32, -1).squeeze(), np.asarray(expected))


@pytest.mark.parametrize("suffix", ["tif", "png"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, bool])
def test_mask_types(tmp_path, dtype, suffix):
    mask = draw_patch(0)[1].astype(dtype)
    if dtype == np.uint16:
        mask[0, 0] = 40_000
    if dtype == np.int32 and suffix == "png":
        mask = mask.astype(np.uint16)  # a PNG has no 32-bit pixels
    Image.fromarray(mask).save(tmp_path / f"m.{suffix}")
    np.testing.assert_array_equal(read_mask(str(tmp_path / f"m.{suffix}")), mask.astype(np.int32))


def test_mask_with_three_equal_channels(tmp_path):
    mask = draw_patch(0)[1].astype(np.uint8)
    Image.fromarray(np.repeat(mask[..., None], 3, axis=2)).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(str(tmp_path / "m.png")), mask)


def refused(path, what, read):
    with pytest.raises(ValueError, match=what) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.full((4, 4), 0.5, np.float32), "floating-point"),
        (np.full((4, 4), -3, np.int32), "negative"),
        (np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "colour image"),
        (np.zeros((4, 4), bool), "single bits"),
    ],
)
def test_masks_that_are_no_ids_are_refused(tmp_path, values, what):
    Image.fromarray(values).save(tmp_path / "m.tif")
    refused(tmp_path / "m.tif", what, read_inst_mask)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_16_bits_a_channel_are_refused(tmp_path, suffix):
    """Pillow keeps the upper 8 of several channels, so that 12-bit images turn black and small ids to 0."""
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), np.full((4, 4, 3), 9, np.uint16))
    for read in (read_image, read_mask):
        refused(path, "16 bits", read)
    cv2.imwrite(str(path), np.full((4, 4), 300, np.uint16))
    refused(path, "not 8 bits", read_image)
    assert (read_mask(path) == 300).all()


def test_a_mask_of_several_pages_is_refused(tmp_path):
    pages = [Image.new("L", (4, 4), k) for k in range(3)]
    pages[0].save(tmp_path / "m.tif", save_all=True, append_images=pages[1:])
    refused(tmp_path / "m.tif", "3 pages", read_mask)


def test_a_palette_is_indices_unless_its_colours_say_otherwise(tmp_path):
    mask = draw_patch(0)[1].astype(np.uint8)
    picture = Image.fromarray(mask).convert("P")
    picture.save(tmp_path / "same.png")
    picture.putpalette([0, 0, 0] + [(37 * k) % 256 for k in range(765)])
    picture.save(tmp_path / "coloured.png")
    for name in ("same.png", "coloured.png"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), mask)
    Image.fromarray((mask > 0).astype(np.uint8) * 255).quantize(2).save(tmp_path / "q.png")  # white comes first
    refused(tmp_path / "q.png", "palette", read_mask)
    Image.fromarray(mask * 5).quantize(256).save(tmp_path / "q.png")
    refused(tmp_path / "q.png", "palette", read_mask)


def test_a_mask_whose_0_is_white_is_refused(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "m.tif")
    content, tag = (tmp_path / "m.tif").read_bytes(), struct.pack("<HHI", 262, 3, 1)
    (tmp_path / "m.tif").write_bytes(content.replace(tag + b"\1", tag + b"\0"))
    refused(tmp_path / "m.tif", "0 is white", read_mask)


def test_big_endian_and_compressed_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    mask = np.full((4, 4), 3, np.int32)
    for options in ({"byteorder": ">"}, {"compression": "zlib"}):
        tifffile.imwrite(tmp_path / "m.tif", mask, **options)
        np.testing.assert_array_equal(read_mask(tmp_path / "m.tif"), mask)
    tifffile.imwrite(tmp_path / "m.tif", mask, byteorder=">", compression="zlib")
    refused(tmp_path / "m.tif", "big-endian", read_mask)


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg"])
def test_images_stand_upright(tmp_path, suffix):
    array = np.zeros((8, 16, 3), np.uint8)
    array[:, 8:] = 200
    exif = Image.Exif()
    exif[274] = 6  # turn it a quarter clockwise
    Image.fromarray(array).save(tmp_path / f"a.{suffix}", exif=exif)
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (16, 8, 3) and abs(image.astype(int) - np.rot90(array, -1)).max() < 9


def test_an_image_is_checked_without_its_pixels(tmp_path):
    Image.fromarray(draw_patch(0)[0]).save(tmp_path / "a.png")
    assert check_image(tmp_path / "a.png") == (32, 32)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:700] + b"x" + content[701:])
    refused(tmp_path / "a.png", "cannot be decoded", check_image)


@pytest.mark.parametrize("name", ["d", "d/split", "d/split/images"])
def test_a_folder_that_was_not_prepared_to_the_end_is_refused(tmp_path, name):
    (tmp_path / "d" / "split" / "images").mkdir(parents=True)
    check_complete(tmp_path / name, "DATA")
    (tmp_path / "d" / "prepare.json").write_text('{\n "complete": false\n}')
    with pytest.raises(ValueError, match=f"^DATA .*/{name} is not prepared to the end: run prepare_monuseg.py again$"):
        check_complete(tmp_path / name, "DATA")
    (tmp_path / "d" / "prepare.json").write_text('{\n "complete": true\n}')
    check_complete(tmp_path / name, "DATA")


def test_sub_folders_are_found_and_pair_by_their_paths(data_dir):
    split = data_dir / "MoNuSegTrainingData"
    for folder in ("images", "bin_masks", "inst_masks"):
        for path in list((split / folder).iterdir())[:]:
            inside = split / folder / ("x" if path.stem < "slide-1" else "y/z")
            inside.mkdir(parents=True, exist_ok=True)
            path.rename(inside / path.name.replace("slide-1", "slide-0"))
    items = list_items(str(data_dir), "monuseg")
    assert [item.stem for item in items] == [f"{f}/slide-0_{k:03d}" for f in ("x", "y/z") for k in range(4)]
    for item in items:
        assert item.inst_mask == item.image.replace("images", "inst_masks").replace(".png", ".tif")
    assert {slide_of(item.stem) for item in items} == {"slide-0"}
    (split / "inst_masks" / "x" / "slide-0_000.tif").rename(split / "inst_masks" / "slide-0_000.tif")
    with pytest.raises(ValueError, match=r"x/slide-0_000.png has no mask x/slide-0_000\.\*"):
        list_items(str(data_dir), "monuseg")


@pytest.mark.parametrize("what", ["file", "dead link"])
def test_a_mask_folder_that_is_none_is_not_passed_over(data_dir, what):
    masks = data_dir / "MoNuSegTrainingData" / "inst_masks"
    masks.rename(masks.with_name("old"))
    masks.write_text("") if what == "file" else masks.symlink_to("nowhere")
    with pytest.raises(ValueError, match="inst_masks is a file, or a link that leads nowhere"):
        list_items(str(data_dir), "monuseg")


def test_unrelated_dead_links_do_no_harm(data_dir):
    (data_dir / "MoNuSegTrainingData" / "images" / "notes").symlink_to("nowhere")
    assert len(list_items(str(data_dir), "monuseg")) == 8


def test_unknown_mode_and_folder(data_dir, tmp_path):
    with pytest.raises(ValueError, match="--dataset_mode 'ade20k'"):
        list_items(str(data_dir), "ade20k")
    with pytest.raises(FileNotFoundError, match="--data_dir"):
        list_items(str(tmp_path / "nowhere"), "monuseg")
    with pytest.raises(FileNotFoundError, match="MoNuSegTrainingData/images"):
        list_items(str(tmp_path), "monuseg")


@pytest.mark.parametrize(
    ("stem", "slide"),
    [
        ("A-01_000", "A-01"),
        ("a_b_12", "a_b"),
        ("a_b", "a_b"),
        ("a_", "a_"),
        ("_3", "_3"),
        ("17", "17"),
        ("a_1x", "a_1x"),
        ("_000", "_000"),
        ("folder_1/a_000", "a"),
    ],
)
def test_slide_of(stem, slide):
    assert slide_of(stem) == slide


def patches(slides, each=3):
    return [Item(f"s{k:02d}_{i:03d}", "", None, None) for k in range(slides) for i in range(each)]


@pytest.mark.parametrize(("slides", "share", "held"), [(3, 0.1, 1), (10, 0.25, 2), (10, 0.3, 3), (20, 0.1, 2)])
def test_slides_are_held_out_whole(slides, share, held):
    items = patches(slides)
    training, held_out = split_slides(items, share, 7)
    assert len({slide_of(item.stem) for item in held_out}) == held and len(held_out) == 3 * held
    assert training == [item for item in items if item not in held_out] and held_out == sorted(held_out, key=str)
    assert split_slides(items, share, 7) == (training, held_out)


def test_the_seed_chooses_the_slides():
    assert len({str(split_slides(patches(10), 0.1, seed)[1]) for seed in range(20)}) > 3


def test_a_part_of_the_slides_holds_out_what_all_of_them_did():
    def held_out(items):
        return {slide_of(item.stem) for item in split_slides(items, 0.1, 0)[1]}

    whole = patches(30)
    held = sorted(held_out(whole))
    for kept in held:  # a cluster that has one of the three, and most of the others
        part = [item for item in whole if slide_of(item.stem) not in held or slide_of(item.stem) == kept]
        assert kept in held_out(part)


def test_fewer_than_three_slides_are_not_split():
    assert split_slides(patches(2), 0.9, 0) == (patches(2), [])


def test_something_is_left_to_train_on():
    with pytest.raises(ValueError, match="--val_share 0.9 leaves no training slide of 4"):
        split_slides(patches(4), 0.9, 0)
