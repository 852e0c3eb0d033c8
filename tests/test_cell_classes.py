"""classes.json and class masks: what is kept, and that each thing that is wrong is named."""

import dataclasses
import json

import numpy as np
import pytest

from guided_diffusion import cell_classes
from guided_diffusion.cell_classes import CellClass

CLASSES = cell_classes.named(["neutrophil", "epithelial", "lymphocyte"])
IDS = cell_classes.ids_of(CLASSES)
INST = np.array([[0, 7, 7, 0], [0, 7, 0, 3], [90000, 90000, 0, 3]], np.int32)
CLASS = np.array([[0, 2, 2, 0], [0, 2, 0, 1], [2, 2, 0, 1]], np.uint8)


def test_a_table_is_read_as_it_was_written_from_any_folder_in_its_data(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert cell_classes.read_classes(tmp_path / "a") == []
    cell_classes.write_classes(tmp_path, CLASSES[::-1])
    assert cell_classes.read_classes(tmp_path / "a" / "b") == CLASSES
    assert json.loads((tmp_path / "classes.json").read_text())[0] == {
        "id": 1,
        "name": "neutrophil",
        "colour": [213, 94, 0],
    }


@pytest.mark.parametrize("folder", ["MoNuSegTrainingData", "clusters/0/MoNuSegTrainingData", "clusters/0/10ss/train"])
def test_the_table_of_a_mask_is_its_data_s(tmp_path, folder):
    (tmp_path / "data").mkdir()
    cell_classes.write_classes(tmp_path / "data", CLASSES)
    assert cell_classes.of_mask(f"{tmp_path}/data/{folder}/class_masks/a/b.png") == CLASSES
    assert cell_classes.of_mask(f"{tmp_path}/{folder}/class_masks/a/b.png") == []


def test_colours_differ():
    classes = cell_classes.named(list("abcdefgh"))
    assert len({one.colour for one in classes[:7]}) == 7 and classes[7].colour == classes[0].colour


ROW = {"id": 1, "name": "a", "colour": [1, 2, 3]}


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ({"id": 1}, "holds no list"),
        ([{"id": 1, "name": "a"}], "holds no list"),
        ([{**ROW, "colour": 3}], "holds no list"),
        ([{**ROW, "id": 0}], "id 0 is none"),
        ([{**ROW, "id": 256}], "id 256 is none"),
        ([{**ROW, "id": True}], "id True is none"),
        ([{**ROW, "name": " "}], "no name"),
        ([{**ROW, "name": "=1+1"}], "no name"),
        ([{**ROW, "name": "a\nb"}], "control characters"),
        ([{**ROW, "colour": [1, 2]}], "no colour"),
        ([{**ROW, "colour": [1, 2, 256]}], "no colour"),
        ([ROW, {**ROW, "name": "b"}], "two classes have the id 1"),
        ([ROW, {**ROW, "id": 2}], "two classes have the name 'a'"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, rows, what):
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=what):
        cell_classes.read_classes(tmp_path)


def test_what_a_reader_would_refuse_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no colour"):
        cell_classes.write_classes(tmp_path, [CellClass(1, "a", (1, 2, 300))])
    assert not list(tmp_path.iterdir())


def test_classes_of_nuclei_and_their_mask():
    found = cell_classes.of_nuclei(INST, CLASS, IDS, "m.png")
    assert found == {3: 1, 7: 2, 90000: 2}
    mask = cell_classes.painted(INST, found)
    assert mask.dtype == np.uint8 and np.array_equal(mask, CLASS)
    assert np.array_equal(cell_classes.painted(INST[1:, 2:], found), CLASS[1:, 2:])
    assert cell_classes.of_nuclei(0 * INST, 0 * CLASS, IDS, "m.png") == {}
    assert not cell_classes.painted(0 * INST, {}).any()


def changed(row, column, value):
    return np.where((np.arange(3)[:, None] == row) & (np.arange(4) == column), value, CLASS)


@pytest.mark.parametrize(
    ("class_map", "what"),
    [
        (CLASS[:2], "m.png is 4 x 2 px, its instance mask 4 x 3 px"),
        (changed(0, 0, 1), "1 px outside nuclei"),
        (changed(0, 1, 1), "nucleus 7 has pixels of classes 1, 2: a nucleus"),
        (changed(0, 1, 1) + (INST == 90000) * [[1, 0, 0, 0]], "nucleus 7 .*, and 1 more are so"),
        (changed(1, 3, 0) * (INST != 3), "nucleus 3 has none"),
        (np.where(CLASS == 1, 4, CLASS), r"nucleus 3 is of class 4, which is not in classes.json \(1, 2, 3\)"),
    ],
)
def test_a_mask_that_names_no_class_of_a_nucleus_is_refused(class_map, what):
    with pytest.raises(ValueError, match=what):
        cell_classes.of_nuclei(INST, class_map, IDS, "m.png")


def test_folders_that_are_put_together_have_the_same_classes(tmp_path):
    for name, classes in (("a", CLASSES), ("b", CLASSES), ("c", CLASSES[:2]), ("d", [])):
        (tmp_path / name / "class_masks").mkdir(parents=True)
        if classes:
            cell_classes.write_classes(tmp_path / name, classes)
    assert cell_classes.shared([tmp_path / "a", tmp_path / "b"]) == CLASSES
    assert cell_classes.shared([tmp_path / "d"]) == []
    cell_classes.write_classes(tmp_path / "b", [dataclasses.replace(one, colour=(1, 2, one.id)) for one in CLASSES])
    assert cell_classes.shared([tmp_path / "a", tmp_path / "b"]) == CLASSES
    for other in "cd":
        with pytest.raises(
            ValueError, match=rf"/a and .*/{other} have not the same classes of cells by their classes.j"
        ):
            cell_classes.shared([tmp_path / "a", tmp_path / other])
