"""HoVer-Net's arrays: whole pictures, windows of large ones, and what it could not read."""

import io

import numpy as np
import pytest
from labelled_set import BOTH, CLASSES, draw_nuclei, example, write

from guided_diffusion.histology.formats.writers.hovernet import HoVerNet


def arrays(writer, one) -> dict[str, np.ndarray]:
    return {name: np.load(io.BytesIO(data), allow_pickle=False) for name, data in writer.files(one)}


@pytest.mark.parametrize(("height", "width"), [(256, 256), (300, 270), (540, 540)])
@BOTH
def test_a_picture_is_one_array(told, height, width):
    classes = CLASSES if told else []
    one = example("a_000", "train", draw_nuclei(0, height, width), told)
    [(name, array)] = arrays(HoVerNet(classes), one).items()
    assert name == f"train/{height}x{width}_164x164/a_000_000.npy"
    assert array.dtype == np.int32 and array.shape == (height, width, 5 if told else 4)
    assert np.array_equal(array[..., :3], one.image) and np.array_equal(array[..., 3], one.inst_map)
    assert not told or np.array_equal(array[..., 4], one.class_map)


@BOTH
def test_a_large_picture_is_cut_so_that_all_of_it_is_learnt(told):
    """The central 164 px of the windows, which are learnt from in fast mode, cover the picture."""
    classes = CLASSES if told else []
    inst_map = draw_nuclei(0, 500, 400)
    one = example("a", "test", inst_map, told)
    found = arrays(HoVerNet(classes, window=270), one)
    assert [*found] == [f"test/270x270_164x164/a_{k:03d}.npy" for k in range(4 * 3)]
    places = [(r, c) for r in (0, 164, 328) for c in (0, 164)]  # then the bottom row, the right column, the corner
    places += [(336, c) for c in (0, 164)] + [(r, 236) for r in (0, 164, 328)] + [(336, 236)]
    seen = np.zeros(inst_map.shape, bool)
    for array, (row, column) in zip(found.values(), places):
        part = slice(row, row + 164), slice(column, column + 164)
        centre = array[53:217, 53:217]
        assert np.array_equal(centre[..., :3], one.image[part]) and np.array_equal(centre[..., 3], inst_map[part])
        assert not told or np.array_equal(centre[..., 4], one.class_map[part])
        seen[part] = True
    assert seen.all()


def test_what_hovernet_cannot_read_is_refused():
    with pytest.raises(ValueError, match=r"a.png is 256 x 128 px: HoVer-Net reads 256 px in fast mode"):
        arrays(HoVerNet(), example("a", "train", draw_nuclei(0, 128, 256), False))
    with pytest.raises(ValueError, match="--window 128"):
        HoVerNet(window=128)


def test_remarks(tmp_path):
    writer = HoVerNet(CLASSES)
    sizes = [(256, 256), (400, 300), (600, 300)]
    examples = [example(f"{k}", "train", draw_nuclei(0, *size), True) for k, size in enumerate(sizes)]
    records = write(writer, examples, tmp_path)
    many, kinds = writer.remarks(records)
    assert many.startswith("1 images of up to 540 px are one array each") and kinds.startswith("nr_type = 6 ")
    assert not list(HoVerNet().remarks(records[:1]))
