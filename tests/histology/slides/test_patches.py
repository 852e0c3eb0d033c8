"""Window positions against the specification's numbers and brute force, and the files a patch becomes."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from guided_diffusion.histology.slides import patches
from guided_diffusion.hv_maps import gen_instance_hv_map


def test_a_monuseg_image_gives_64_patches_in_this_order():
    positions = patches.window_positions(1000, 1000, 128, 128)
    grid = [k * 128 for k in range(7)]
    assert positions[:49] == [(row, column) for row in grid for column in grid]
    assert positions[49:56] == [(872, column) for column in grid]
    assert positions[56:63] == [(row, 872) for row in grid]
    assert positions[63:] == [(872, 872)]


def test_no_flush_window_where_nothing_remains():
    assert patches.window_positions(256, 256, 128, 64) == [(r, c) for r in (0, 64, 128) for c in (0, 64, 128)]
    assert patches.window_positions(128, 128, 128, 500) == [(0, 0)]
    assert patches.window_positions(130, 256, 128, 128) == [(0, 0), (0, 128), (2, 0), (2, 128)]
    assert patches.window_positions(256, 130, 128, 128) == [(0, 0), (128, 0), (0, 2), (128, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_positions_agree_with_a_search_over_all_pixels(seed):
    rng = np.random.default_rng(seed)
    window, step = (int(v) for v in rng.integers(1, 12, 2))
    height, width = (int(v) for v in window + rng.integers(0, 30, 2))
    positions = patches.window_positions(height, width, window, step)

    def allowed(start, length):
        return start + window <= length and (start % step == 0 or start + window == length)

    expected = {(r, c) for r in range(height) for c in range(width) if allowed(r, height) and allowed(c, width)}
    assert set(positions) == expected and len(positions) == len(expected)
    kinds = [(row % step != 0) + 2 * (column % step != 0) for row, column in positions]
    assert kinds == sorted(kinds)
    for kind in range(4):
        block = [position for position, k in zip(positions, kinds) if k == kind]
        assert block == sorted(block)


def test_patches_are_the_pixels_under_the_window():
    rng = np.random.default_rng(0)
    image, inst_map = (
        rng.integers(0, 256, (50, 41, 3), dtype=np.uint8),
        rng.integers(0, 70_000, (50, 41), dtype=np.int32),
    )
    cut = list(patches.extract_patches(image, inst_map, 16, 12))
    assert len(cut) == patches.patch_count(50, 41, 16, 12) == 16
    for (row, column), (patch, mask) in zip(patches.window_positions(50, 41, 16, 12), cut):
        assert np.array_equal(patch, image[row : row + 16, column : column + 16])
        assert np.array_equal(mask, inst_map[row : row + 16, column : column + 16])


def test_mirror_is_valid_where_window_and_step_agree():
    inst_map = np.arange(40 * 33).reshape(40, 33)
    image = np.repeat(inst_map[..., None], 3, axis=2)
    valid, mirror = (list(patches.extract_patches(image, inst_map, 8, 8, mode)) for mode in patches.MODES)
    assert len(valid) == len(mirror)
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(valid, mirror) for k in (0, 1))


def test_mirror_reflects_without_repeating_the_edge():
    inst_map = np.arange(30 * 30).reshape(30, 30)
    image = np.repeat(inst_map[..., None], 3, axis=2)
    window, step = 13, 8  # 5 px of padding: 2 before, 3 after
    assert patches.mirror_margins(window, step, "mirror") == (2, 3)

    def reflected(k, length):
        return -k if k < 0 else 2 * (length - 1) - k if k >= length else k

    cut = list(patches.extract_patches(image, inst_map, window, step, "mirror"))
    assert len(cut) == patches.patch_count(30, 30, window, step, "mirror") == 16
    for (row, column), (patch, mask) in zip(patches.window_positions(35, 35, window, step), cut):
        rows = [reflected(row + k - 2, 30) for k in range(window)]
        columns = [reflected(column + k - 2, 30) for k in range(window)]
        assert np.array_equal(mask, inst_map[np.ix_(rows, columns)])
        assert np.array_equal(patch[..., 1], mask)


def test_the_mirrored_monuseg_image_gives_64_patches():
    assert patches.patch_count(1000, 1000, 256, 128, "mirror") == 64


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((100, 200, 128, 128, "valid"), "smaller than the patch"),
        ((200, 100, 128, 128, "valid"), "smaller than the patch"),
        ((200, 200, 128, 0, "valid"), "--stride is 0"),
        ((200, 200, 0, 5, "valid"), "--patch_size is 0"),
        ((200, 200, 128, 129, "mirror"), "--stride is 129"),
        ((200, 200, 128, 128, "other"), "valid, mirror"),
    ],
)
def test_a_window_that_is_no_use_is_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        patches.patch_count(*arguments)


def test_image_and_map_must_agree():
    with pytest.raises(ValueError, match="differ in size"):
        next(patches.extract_patches(np.zeros((8, 8, 3)), np.zeros((8, 9)), 4, 4))


def test_parts_of_an_id_get_numbers_of_their_own():
    rng = np.random.default_rng(0)
    for inst_map in (rng.integers(0, 4, (20, 30)).astype(np.int32), np.full((3, 4), 7, np.int32)):
        parts = patches.parted(inst_map)
        assert parts.dtype == np.int32 and np.array_equal(parts == 0, inst_map == 0)
        assert np.array_equal(gen_instance_hv_map(parts, mpp=9), gen_instance_hv_map(inst_map, mpp=9))
        for number in np.unique(parts[parts > 0]):
            assert ndimage.label(parts == number)[1] == 1 and len(np.unique(inst_map[parts == number])) == 1
        ids = set(np.unique(inst_map))
        assert ids <= set(np.unique(parts)) and all(inst_map[parts == i].max() == i for i in ids)
    last = np.iinfo(np.int32).max  # beyond which there are no numbers
    assert patches.parted(np.array([[last, 0, last, 5]], np.int32)).tolist() == [[1, 0, 2, 3]]


def saved(folder, image, inst_map, size=None, index=7):
    files = patches.patch_files(folder, "S", index)
    for path in files.values():
        path.parent.mkdir(exist_ok=True)
    patches.save_patch(files, *(patches.resized(image, inst_map, size, size) if size else (image, inst_map)))
    return files


def test_files_and_formats(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    inst_map = np.where(rng.random((16, 16)) < 0.5, 0, 100_000).astype(np.int32)
    files = saved(tmp_path, image, inst_map)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")) == [
        "bin_masks/S_007.png",
        "images/S_007.png",
        "inst_masks/S_007.tif",
    ]
    with Image.open(files["images"]) as picture:
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), image)
    with Image.open(files["bin_masks"]) as binary:
        assert binary.mode == "L" and np.array_equal(np.asarray(binary), np.where(inst_map > 0, 255, 0))
    with Image.open(files["inst_masks"]) as instances:
        bits, compression, sample_format = (instances.tag_v2[tag] for tag in (258, 259, 339))
        assert (bits, compression, sample_format) == ((32,), 1, (2,))
        read = np.asarray(instances)
        assert instances.mode == "I" and read.dtype == np.int32 and np.array_equal(read, inst_map)


def test_running_numbers_grow_past_three_digits(tmp_path):
    assert patches.patch_files(tmp_path, "S", 1234)["inst_masks"] == tmp_path / "inst_masks" / "S_1234.tif"


def test_resizing_is_bicubic_for_images_and_nearest_for_masks(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    inst_map = rng.integers(0, 3, (12, 12)).astype(np.int32) * 40_000
    files = saved(tmp_path, image, inst_map, size=6)
    with Image.open(files["images"]) as picture:
        expected = Image.fromarray(image).resize((6, 6), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
    with Image.open(files["inst_masks"]) as instances, Image.open(files["bin_masks"]) as binary:
        assert np.array_equal(np.asarray(instances), inst_map[1::2, 1::2])
        assert np.array_equal(np.asarray(binary) == 255, inst_map[1::2, 1::2] > 0)


def test_an_empty_patch_is_fine(tmp_path):
    files = saved(tmp_path, np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.int32))
    with Image.open(files["bin_masks"]) as binary:
        assert binary.mode == "L" and not np.asarray(binary).any()
