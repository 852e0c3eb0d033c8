"""Cellpose reads what is written, bit for bit; names that it would pass over are refused."""

from dataclasses import replace

import numpy as np
import pytest
from labelled_set import BOTH, example, labelled_set, write

from guided_diffusion.histology.formats.writers.cellpose import Cellpose
from guided_diffusion.image_files import read_image, read_inst_mask, read_mask


@BOTH
def test_files(told, tmp_path):
    classes, examples = labelled_set(told)
    write(Cellpose(classes), examples, tmp_path)
    assert len(list((tmp_path / "train").iterdir())) == 6 and len(list((tmp_path / "test").iterdir())) == 2
    for one in examples:
        path = tmp_path / one.entry.split / one.entry.name
        assert np.array_equal(read_image(f"{path}.png"), one.image)
        assert np.array_equal(read_inst_mask(f"{path}_masks.tif"), one.inst_map)
        if classes:
            mask = read_mask(tmp_path / "class_masks" / one.entry.split / f"{one.entry.name}.png")
            assert np.array_equal(mask, one.class_map)


@BOTH
def test_cellpose_reads_them(told, tmp_path):
    classes, examples = labelled_set(told)
    cellpose_io = pytest.importorskip("cellpose.io")
    write(Cellpose(classes), examples, tmp_path)
    loaded = cellpose_io.load_train_test_data(f"{tmp_path}/train", f"{tmp_path}/test")
    images, masks = loaded[0] + loaded[3], loaded[1] + loaded[4]
    assert len(images) == len(examples)
    for one, image, mask in zip(examples, images, masks):
        assert np.array_equal(image, one.image) and np.array_equal(mask, one.inst_map)


def test_names_that_cellpose_passes_over_are_refused():
    entry = example("a", "train", np.zeros((4, 4), np.int32), False).entry
    Cellpose().check([entry])
    for name in ("a_masks", "a_flows", "a_cp_output"):
        with pytest.raises(ValueError, match="rename it"):
            Cellpose().check([entry, replace(entry, name=name)])


@BOTH
def test_few_nuclei_are_told(told, tmp_path):
    classes, examples = labelled_set(told)
    records = write(Cellpose(classes), examples, tmp_path)
    assert list(Cellpose().remarks(records)) == [
        "1 of 4 images have fewer than 5 nuclei: Cellpose trains on them with --min_train_masks 0 only"
    ]
    assert not list(Cellpose().remarks(records[:1]))
