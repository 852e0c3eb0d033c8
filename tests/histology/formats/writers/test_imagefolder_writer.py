"""Hugging Face's datasets read what is written, bit for bit, with all columns."""

import json
from dataclasses import replace

import numpy as np
import pytest
from labelled_set import BOTH, labelled_set, write

from guided_diffusion.histology.formats.writers.imagefolder import ImageFolder
from guided_diffusion.image_files import read_image, read_inst_mask, read_mask


@BOTH
def test_files(told, tmp_path):
    classes, examples = labelled_set(told)
    write(ImageFolder(classes), examples, tmp_path)
    for split in ("train", "test"):
        rows = list(map(json.loads, (tmp_path / split / "metadata.jsonl").read_text().splitlines()))
        chosen = [one for one in examples if one.entry.split == split]
        for one, row in zip(chosen, rows, strict=True):
            assert np.array_equal(read_image(tmp_path / split / row["file_name"]), one.image)
            assert np.array_equal(read_inst_mask(tmp_path / split / row["mask_file_name"]), one.inst_map)
            assert ("class_mask_file_name" in row) == bool(classes)
            if classes:
                mask = read_mask(tmp_path / split / row["class_mask_file_name"])
                assert np.array_equal(mask, one.class_map)
            assert row["slide"] == "007" and row["nuclei"] == len(one.of_nucleus)


def test_the_manifests_columns_do_not_name_files(tmp_path):
    one = labelled_set(False)[1][0]
    row = {"file_name": "scan_17.svs", "slide_file_name": "b", "slide": "007"}
    write(ImageFolder([]), [replace(one, entry=replace(one.entry, row=row))], tmp_path)
    line = json.loads((tmp_path / "train/metadata.jsonl").read_text())
    assert line["file_name"] == "images/a b_000.png" and "slide_file_name" not in line and line["slide"] == "007"


@BOTH
def test_datasets_read_them(told, tmp_path):
    classes, examples = labelled_set(told)
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    write(ImageFolder(classes), examples, folder)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "test"}
    for split, rows in loaded.items():
        chosen = [one for one in examples if one.entry.split == split]
        for one, row in zip(chosen, rows, strict=True):
            assert np.array_equal(np.asarray(row["image"]), one.image)
            assert np.array_equal(np.asarray(row["mask"]), one.inst_map)
            assert not classes or np.array_equal(np.asarray(row["class_mask"]), one.class_map)
            assert {name: row[name] for name in one.entry.row} == one.entry.row
