"""Pictures are read with their masks, and what contradicts each other is named."""

import numpy as np
import pytest
from labelled_set import CLASSES, draw_nuclei
from PIL import Image

from guided_diffusion.histology.formats.writers.labelled import Entry, plain_name, read_example


def entry(folder, class_map=None):
    inst_map = draw_nuclei(0, 20, 30)
    Image.fromarray(np.full((20, 30, 3), 9, np.uint8)).save(folder / "a.png")
    Image.fromarray(inst_map).save(folder / "a.tif")
    if class_map is not None:
        Image.fromarray(class_map(inst_map).astype(np.uint8)).save(folder / "c.png")
    return inst_map, Entry("a", "train", folder / "a.png", folder / "a.tif", class_map and folder / "c.png")


def test_without_classes_all_are_of_one(tmp_path):
    inst_map, one = entry(tmp_path)
    read = read_example(one, [])
    assert np.array_equal(read.inst_map, inst_map) and set(read.of_nucleus.values()) == {1}
    assert np.array_equal(read.class_map, inst_map > 0) and read.image.shape == (20, 30, 3)


def test_classes_are_those_of_the_mask(tmp_path):
    _, one = entry(tmp_path, lambda inst: 2 * (inst > 0))
    assert set(read_example(one, CLASSES).of_nucleus.values()) == {2}


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        (lambda inst: 3 * (inst > 0), "is of class 3, which is not in classes.json"),
        (lambda inst: inst > 20, "has none"),
        (lambda inst: np.ones_like(inst), "outside nuclei have a class"),
        (lambda inst: (inst > 0)[:10], "must be alike"),
    ],
)
def test_a_class_mask_that_contradicts_is_named(tmp_path, class_map, message):
    with pytest.raises(ValueError, match=f"c.png.*{message}"):
        read_example(entry(tmp_path, class_map)[1], CLASSES)


def test_a_mask_of_another_size_is_named(tmp_path):
    _, one = entry(tmp_path)
    Image.fromarray(np.zeros((20, 31), np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a.tif is 31 x 20 px, its image 30 x 20 px"):
        read_example(one, [])


def test_names_have_one_part():
    assert plain_name("a/b.c_000") == "a__b_c_000" and plain_name("é x") == "é x"
