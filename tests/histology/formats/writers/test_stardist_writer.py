"""csbdeep and StarDist read what is written, bit for bit."""

import json

import numpy as np
import pytest
from labelled_set import BOTH, labelled_set, write

from guided_diffusion.histology.formats.writers.stardist import StarDist
from guided_diffusion.image_files import read_image, read_inst_mask


@BOTH
def test_files(told, tmp_path):
    classes, examples = labelled_set(told)
    write(StarDist(classes), examples, tmp_path)
    for one in examples:
        folder, name = tmp_path / one.entry.split, one.entry.name
        assert np.array_equal(read_image(folder / "images" / f"{name}.tif"), one.image)
        assert np.array_equal(read_inst_mask(folder / "masks" / f"{name}.tif"), one.inst_map)
        assert (folder / "classes").is_dir() == bool(classes)
        if classes:
            told = json.loads((folder / "classes" / f"{name}.json").read_text())
            assert {int(nucleus): number for nucleus, number in told.items()} == one.of_nucleus


@BOTH
def test_csbdeep_reads_them(told, tmp_path):
    classes, examples = labelled_set(told)
    data = pytest.importorskip("csbdeep.data")
    write(StarDist(classes), examples, tmp_path)
    pairs = data.RawData.from_folder(tmp_path / "train", ["images"], "masks", "YXC")
    by_shape = {one.inst_map.shape: one for one in examples if one.entry.split == "train"}
    assert pairs.size == 3
    for image, mask, axes, _ in pairs.generator():
        one = by_shape.pop(mask.shape)
        assert axes == "YXC" and np.array_equal(image, one.image) and np.array_equal(mask, one.inst_map)


@BOTH
def test_stardist_makes_its_targets_of_them(told, tmp_path):
    """Of nuclei, and of their classes, as StarDist2D.train is given them."""
    classes, examples = labelled_set(told)
    stardist = pytest.importorskip("stardist")
    from stardist.utils import mask_to_categorical
    from tifffile import imread

    write(StarDist(classes), examples, tmp_path)
    one = examples[0]
    mask = imread(tmp_path / "train" / "masks" / f"{one.entry.name}.tif")
    assert stardist.star_dist(mask, 32, mode="cpp").shape == (*mask.shape, 32)
    if classes:
        told = json.loads((tmp_path / "train" / "classes" / f"{one.entry.name}.json").read_text())
        parts = mask_to_categorical(mask, 5, {int(nucleus): number for nucleus, number in told.items()})
        assert np.array_equal(parts.argmax(-1), one.class_map)
