"""MATLAB's labels: which class belongs to which id."""

import numpy as np
import pytest
from foreign_sets import save, save_mat, scene

from guided_diffusion.histology.formats.readers import matlab, opening

INST = np.array([[9, 9, 0], [0, 3, 3], [70, 0, 0]], float)
CLASS = np.array([[5, 5, 0], [0, 2, 2], [1, 0, 0]])


def read(tmp_path, reader, *rest, **arrays):
    save(tmp_path / "a.png", scene(0).image)
    save_mat(tmp_path / "a.mat", **arrays)
    return reader(tmp_path / "a.png", tmp_path / "a.mat", *rest)


def test_types_belong_to_ids_in_rising_order(tmp_path):
    found = read(tmp_path, matlab._read_tile, True, inst_map=INST, inst_type=np.array([[2], [5], [1]]))
    assert np.array_equal(found.inst_map, INST) and np.array_equal(found.class_map, CLASS)
    with pytest.raises(ValueError, match="inst_type has 2 types for 3 nuclei"):
        read(tmp_path, matlab._read_tile, True, inst_map=INST, inst_type=np.array([[2], [5]]))
    with pytest.raises(ValueError, match="inst_type has 0 types for 3 nuclei"):
        read(tmp_path, matlab._read_tile, True, inst_map=INST)


def test_a_type_map_counts_inside_nuclei(tmp_path):
    found = read(tmp_path, matlab._read_tile, True, inst_map=INST, type_map=np.where(INST > 0, CLASS, 7))
    assert np.array_equal(found.class_map, CLASS)


def test_classes_of_lizard_belong_to_ids_in_any_order_with_gaps(tmp_path):
    classes = {"id": np.array([[70], [9], [4], [3]]), "class": np.array([[1], [5], [6], [2]])}  # 4 is not in the map
    found = read(tmp_path, matlab._read_lizard, inst_map=INST, **classes)
    assert np.array_equal(found.class_map, CLASS)
    with pytest.raises(ValueError, match="has 4 classes for 3 ids"):
        read(tmp_path, matlab._read_lizard, inst_map=INST, **{**classes, "id": np.array([[70], [9], [9], [3]])})


def test_newer_files_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "a.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n" * 8)
    for call in (lambda path: opening.load_mat(path, ["a"]), opening.mat_names):
        with pytest.raises(ValueError, match=r"is of MATLAB 7.3, which is not read: save it with -v7"):
            call(tmp_path / "a.mat")
