"""HV maps against numbers of the reference and against the definition, written out instance by instance."""

import statistics
import time

import numpy as np
import pytest
from reference_numbers import FOLDER
from scipy import ndimage

from guided_diffusion.hv_maps import gen_instance_hv_map, vis_hv_map

REFERENCE = FOLDER / "hv_maps.npz"


def split_ids(inst_map):
    """Step one of the definition, literally: one id after the other, the map's own type throughout."""
    split = inst_map.copy()
    largest = split.max()
    for inst_id in [i for i in np.unique(inst_map) if i != 0]:
        parts, n = ndimage.label(split == inst_id)
        renamed = split.copy()
        for part in range(2, n + 1):
            # A list of Python ints keeps the sum exact; astype then wraps as C does.
            renamed[parts == part] = np.array([part + int(largest)]).astype(split.dtype)
        split = renamed
        largest = split.max()
    return split


def brute_force(inst_map, crop_shape=None):
    split = split_ids(inst_map)
    full_h, full_w = split.shape
    h, w = crop_shape or split.shape
    top, left = int((full_h - h) * 0.5), int((full_w - w) * 0.5)
    inside = split[top : top + h, left : left + w]
    planes = np.zeros((2, full_h, full_w), np.float32)
    for inst_id in [i for i in np.unique(inside) if i != 0]:
        if (inside == inst_id).sum() < 30:
            continue
        rows, columns = np.where(split == inst_id)
        r0, r1 = max(rows.min() - 2, 0), rows.max() + 3
        c0, c1 = max(columns.min() - 2, 0), columns.max() + 3
        cut = (split == inst_id)[r0:r1, c0:c1]
        if min(cut.shape) < 2:
            continue
        i, j = np.where(cut)
        centre_y, centre_x = int(np.mean(i) + 0.5), int(np.mean(j) + 0.5)
        for plane, offset in zip(planes, (j + 1 - centre_x, i + 1 - centre_y)):
            offset = offset.astype(np.float32)
            if offset.min() < 0:
                offset[offset < 0] /= -offset[offset < 0].min()
            if offset.max() > 0:
                offset[offset > 0] /= offset[offset > 0].max()
            plane[r0:r1, c0:c1][cut] = offset
    return np.stack([plane[top : top + h, left : left + w] for plane in planes], axis=-1)


def assert_as_defined(inst_map, crop_shape=None):
    before = inst_map.copy()
    hv_map = gen_instance_hv_map(inst_map, crop_shape)
    assert hv_map.dtype == np.float32
    assert hv_map.tobytes() == brute_force(inst_map, crop_shape).tobytes()
    assert np.array_equal(inst_map, before)
    return hv_map


def ellipses(n, shape, seed, dtype=np.int32):
    """Overlapping ellipses, later over earlier, some across the border: touching, cut and split nuclei."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    inst_map = np.zeros(shape, dtype)
    for inst_id in range(1, n + 1):
        cy, cx = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        a, b = rng.uniform(2, 10, 2)
        angle = rng.uniform(0, np.pi)
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        inst_map[(u / a) ** 2 + (v / b) ** 2 <= 1] = inst_id
    return inst_map


@pytest.mark.parametrize("name", ["00_ordinary", "04_empty", "06_nonsquare", "08_crop_odd"])
def test_equals_the_reference_to_the_last_bit(name):
    with np.load(REFERENCE) as arrays:
        inst_map, crop, expected = (arrays[f"{name}/{part}"] for part in ("inst", "crop", "hv"))
    assert gen_instance_hv_map(inst_map, tuple(crop)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
def test_ellipses(dtype):
    for seed in range(4):
        shape = (70 + seed, 91)
        hv_map = assert_as_defined(ellipses(40, shape, seed, dtype))
        assert (hv_map < 0).any() and (hv_map > 0).any()
        assert_as_defined(ellipses(40, shape, seed, dtype), (64, 64))


def test_noise_of_few_ids():
    rng = np.random.default_rng(0)
    for share in (0.5, 0.6, 0.7, 0.9):
        for n_ids in (1, 2, 3):
            inst_map = np.where(rng.random((40, 37)) < share, rng.integers(1, n_ids + 1, (40, 37)), 0)
            assert_as_defined(inst_map)
            assert_as_defined(inst_map, (33, 20))


def test_winding_nucleus():
    snake = np.zeros((33, 21), int)
    snake[::2] = 1
    snake[1::4, -1] = 1
    snake[3::4, 0] = 1
    comb = np.zeros((33, 21), int)
    comb[:, ::2] = 1
    comb[16] = 1
    for inst_map in (snake, snake[::-1].copy(), snake.T, comb, comb[::-1].copy(), 1 - comb):
        assert_as_defined(inst_map)


@pytest.mark.parametrize(("area", "drawn"), [(1, False), (29, False), (30, True), (31, True)])
def test_smallest_area(area, drawn):
    inst_map = np.zeros((20, 20), np.int32)
    inst_map.reshape(-1)[105 : 105 + area] = 5
    assert assert_as_defined(inst_map).any() == drawn


@pytest.mark.parametrize(("mpp", "smallest"), [(0.125, 120), (0.25, 30), (0.5, 8), (1.0, 2)])
def test_the_smallest_area_goes_by_the_magnification(mpp, smallest):
    for size in (smallest - 1, smallest):
        inst_map = np.zeros((20, 20), np.int32)
        inst_map.reshape(-1)[105 : 105 + size] = 5
        assert gen_instance_hv_map(inst_map, mpp=mpp).any() == (size == smallest)


def test_area_counts_inside_the_crop_but_the_centre_is_of_the_whole_nucleus():
    inst_map = np.zeros((40, 40), np.int32)
    inst_map[10:20, 5:13] = 1  # 10 x 8, of which the crop has three columns
    hv_map = assert_as_defined(inst_map, (20, 20))
    assert np.array_equal(hv_map[0, :4], np.float32([[0.5, -1], [0.75, -1], [1, -1], [0, 0]]))
    assert not assert_as_defined(np.roll(inst_map, -1, axis=1), (20, 20)).any()


def test_parts_of_one_id_are_nuclei_of_their_own():
    inst_map = np.zeros((16, 40), np.int32)
    inst_map[4:10, 3:10] = 7
    inst_map[10:15, 10:18] = 7  # touches by a corner only
    inst_map[4:10, 30:37] = 7
    hv_map = assert_as_defined(inst_map)
    assert np.array_equal(hv_map[4:10, 3:10], hv_map[4:10, 30:37])


def test_touching_nuclei_stay_apart():
    inst_map = np.zeros((12, 20), np.int32)
    inst_map[2:10, 2:9] = 1
    inst_map[2:10, 9:16] = 2
    hv_map = assert_as_defined(inst_map)
    assert np.array_equal(hv_map[:, 2:9], hv_map[:, 9:16])


def test_nuclei_on_every_border_get_values():
    inst_map = np.zeros((40, 40), np.int32)
    for inst_id, (row, column) in enumerate([(0, 15), (33, 15), (15, 0), (15, 33), (0, 0), (33, 33), (1, 33)], 1):
        inst_map[row : row + 7, column : column + 7] = inst_id
    hv_map = assert_as_defined(inst_map)
    middle = np.zeros((11, 11), np.int32)
    middle[2:9, 2:9] = 1
    expected = gen_instance_hv_map(middle)[2:9, 2:9]
    for inst_id in range(1, 8):
        assert np.array_equal(hv_map[inst_map == inst_id], expected.reshape(-1, 2))


def test_map_without_background():
    hv_map = assert_as_defined(np.repeat(np.int32([[1, 2]]), 8, axis=1).repeat(9, axis=0))
    assert np.array_equal(hv_map[:, :8], hv_map[:, 8:])
    assert (np.abs(hv_map).max(axis=-1) > 0).mean() > 0.9


def test_narrow_maps_and_nuclei():
    for shape in ((1, 50), (50, 1), (2, 50), (50, 2), (1, 1), (0, 5)):
        inst_map = np.ones(shape, np.int32)
        hv_map = gen_instance_hv_map(inst_map)
        assert hv_map.shape == (*shape, 2)
        assert hv_map.any() == (min(shape) == 2)
        if inst_map.size:
            assert_as_defined(inst_map)
    line = np.zeros((40, 7), np.uint16)
    line[2:37, 3] = 9
    assert (assert_as_defined(line)[2:37, 3, 0] == 1).all()


@pytest.mark.parametrize("largest", [65533, 65534, 65535])
def test_new_ids_wrap_around_in_a_narrow_type(largest):
    inst_map = np.zeros((60, 60), np.uint16)
    inst_map[2:9, 2:9] = 1
    inst_map[20:28, 2:9] = 2
    inst_map[2:9, 30:38] = 3
    for row in (12, 30, 40, 50):
        inst_map[row : row + 7, 40:48] = largest
        inst_map[row : row + 7, 20:26] = 2
    hv_map = assert_as_defined(inst_map)
    assert not np.array_equal(hv_map, gen_instance_hv_map(inst_map.astype(np.int32)))


def test_wrap_around_on_noise():
    rng = np.random.default_rng(1)
    for _ in range(10):
        coarse = rng.choice([0, 0, 1, 2, 126, 127], (8, 8)).repeat(6, axis=0).repeat(6, axis=1)
        assert_as_defined(coarse.astype(np.uint8))
        assert_as_defined(coarse.astype(np.uint8) * np.uint8(2))
        assert_as_defined(coarse.astype(np.int8))
        assert_as_defined(coarse > 0)


def test_order_and_names_of_ids_do_not_matter():
    inst_map = ellipses(30, (64, 64), 3)
    names = np.random.default_rng(0).permutation(30) * 1000 + 5
    renamed = np.concatenate([[0], names])[inst_map]
    assert np.array_equal(gen_instance_hv_map(inst_map), gen_instance_hv_map(renamed))


def test_empty_and_strided_maps():
    assert not gen_instance_hv_map(np.zeros((5, 6), np.uint8)).any()
    inst_map = ellipses(30, (64, 50), 4)
    assert np.array_equal(gen_instance_hv_map(inst_map), gen_instance_hv_map(np.asfortranarray(inst_map)))


@pytest.mark.parametrize(
    ("inst_map", "crop", "message"),
    [
        (np.zeros((4, 4)), None, "integers, got float64"),
        (np.full((4, 4), -3), None, "negative, got -3"),
        (np.zeros((4, 4, 1), int), None, "H x W"),
        (np.zeros((4, 4), int), (5, 4), r"crop_shape \(5, 4\) is larger than the instance map \(4, 4\)"),
        (np.zeros((4, 4), int), (2, 6), "is larger"),
    ],
)
def test_bad_input(inst_map, crop, message):
    with pytest.raises(ValueError, match=message):
        gen_instance_hv_map(inst_map, crop)


def test_speed():
    inst_map = ellipses(60, (128, 128), 0)
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        gen_instance_hv_map(inst_map)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.005


def test_picture_uses_the_jet_colours():
    with np.load(REFERENCE) as arrays:
        lut = arrays["jet_lut_uint8"]
        assert np.array_equal(vis_hv_map(arrays["00_ordinary/hv"]), arrays["00_ordinary/vis"])
    level = (np.arange(256, dtype=np.float32) / 128 - 1).reshape(16, 16)
    picture = vis_hv_map(np.stack([level, np.ones_like(level)], axis=-1))
    assert picture.shape == (16, 32, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture[:, :16].reshape(-1, 3), lut)
    assert (picture[:, 16:] == lut[255]).all()


def test_picture_is_padded_with_white():
    picture = vis_hv_map(np.zeros((3, 4, 2), np.float32), (6, 7))
    assert picture.shape == (6, 14, 3)
    background = (picture == (124, 255, 121)).all(axis=-1)
    assert background[1:4, 1:5].all() and background[1:4, 8:12].all()
    assert background.sum() == 24
    assert (picture[~background] == 255).all()
    with pytest.raises(ValueError, match="smaller"):
        vis_hv_map(np.zeros((3, 4, 2), np.float32), (2, 4))
