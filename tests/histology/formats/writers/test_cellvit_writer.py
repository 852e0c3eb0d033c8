"""CellViT's layout: labels are read by its loader's expressions, and are no pickles."""

import csv

import numpy as np
import pytest
from labelled_set import BOTH, labelled_set, write

from guided_diffusion.cell_classes import CellClass
from guided_diffusion.histology.formats.writers.cellvit import CellViT
from guided_diffusion.image_files import read_image


def rows(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


@BOTH
def test_labels(told, tmp_path):
    classes, examples = labelled_set(told)
    write(CellViT(classes), examples, tmp_path)
    numbers = {one.id: number for number, one in enumerate(classes, 1)} or {1: 1}
    for one in examples:
        fold = tmp_path / {"train": "fold0", "test": "fold1"}[one.entry.split]
        assert np.array_equal(read_image(fold / "images" / f"{one.entry.name}.png"), one.image)
        label = np.load(fold / "labels" / f"{one.entry.name}.npy", allow_pickle=False)
        assert np.array_equal(label[()]["inst_map"].astype(np.int32), one.inst_map)
        kinds = label[()]["type_map"].astype(np.int32)
        for number, kind in numbers.items():
            assert np.array_equal(kinds == kind, one.class_map == number)
        assert np.array_equal(kinds > 0, one.inst_map > 0)


def test_classes_have_no_gaps_and_none_is_the_background():
    classes = [CellClass(1, "a", (255, 0, 0)), CellClass(3, "b", (0, 255, 0))]
    assert [(one.id, one.name) for one in CellViT(classes).numbered()] == [(1, "a"), (2, "b")]
    with pytest.raises(ValueError, match="a class of SET is named Background"):
        CellViT([CellClass(1, "Background", (1, 2, 3))]).check([])


@BOTH
def test_tables(told, tmp_path):
    classes, examples = labelled_set(told)
    write(CellViT(classes), examples, tmp_path)
    names = [one.name for one in classes] or ["nucleus"]
    for split, fold in (("train", "fold0"), ("test", "fold1")):
        chosen = [one for one in examples if one.entry.split == split]
        types, counts = (rows(tmp_path / fold / name) for name in ("types.csv", "cell_count.csv"))
        files = [f"{one.entry.name}.png" for one in chosen]
        assert [row["img"] for row in types] == files == [row["Image"] for row in counts]
        assert {row["type"] for row in types} == {"unknown"} and [*counts[0]] == ["Image", *names]
        for one, row in zip(chosen, counts):
            assert sum(int(row[name]) for name in names) == len(one.of_nucleus)
    config = (tmp_path / "dataset_config.yaml").read_text().splitlines()
    assert config[:4] == ["tissue_types:", '  "unknown": 0', "nuclei_types:", '  "Background": 0']
    assert len(config) == 4 + len(names)
