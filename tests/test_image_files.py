"""Pairing by stem, and reading images and masks of every kind."""

import numpy as np
import pytest
from conftest import draw_patch
from PIL import Image

from guided_diffusion.image_files import Item, list_items, read_image, read_mask, slide_of, split_slides


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


def test_interrupted_preparation_is_refused(data_dir):
    (data_dir / "prepare.json").write_text('{"complete": true}')
    assert len(list_items(str(data_dir), "monuseg")) == 8
    (data_dir / "prepare.json").write_text('{"complete": false}')
    with pytest.raises(ValueError, match="not prepared to the end"):
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
