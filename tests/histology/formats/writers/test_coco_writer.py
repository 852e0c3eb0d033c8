"""pycocotools reads what is written, bit for bit, with boxes, areas, classes and where an image came from."""

import json

import numpy as np
import pytest
from labelled_set import BOTH, labelled_set, write
from pycocotools.coco import COCO

from guided_diffusion.histology.formats.writers import coco


@pytest.fixture(params=[coco._MASK_BYTES, 1], ids=["at once", "one by one"])
def stacks(request, monkeypatch):
    monkeypatch.setattr(coco, "_MASK_BYTES", request.param)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of NumPy, at pycocotools
@pytest.mark.usefixtures("stacks")
@BOTH
def test_pycocotools_reads_them(told, tmp_path):
    classes, examples = labelled_set(told)
    write(coco.Coco(classes), examples, tmp_path)
    for split, count in (("train", 3), ("test", 1)):
        read = COCO(tmp_path / "annotations" / f"instances_{split}.json")
        names = {number: one["name"] for number, one in read.cats.items()}
        assert names == ({one.id: one.name for one in classes} or {1: "nucleus"})
        chosen = [one for one in examples if one.entry.split == split]
        assert len(read.imgs) == count == len(list((tmp_path / split).iterdir()))
        for one, info in zip(chosen, read.loadImgs(sorted(read.imgs))):
            assert info["file_name"] == f"{one.entry.name}.png" and info["slide"] == "007"
            assert (info["height"], info["width"]) == one.inst_map.shape
            inst, kinds = np.zeros_like(one.inst_map), np.zeros_like(one.inst_map)
            for found in read.loadAnns(read.getAnnIds(info["id"])):
                mask = read.annToMask(found).astype(bool)
                assert found["area"] == mask.sum() and not inst[mask].any()
                rows, columns = np.nonzero(mask)
                x, y = columns.min(), rows.min()
                assert found["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
                inst[mask], kinds[mask] = found["instance"], found["category_id"]
            assert np.array_equal(inst, one.inst_map) and np.array_equal(kinds, one.class_map)


@BOTH
def test_numbers_are_unique_and_a_split_without_images_has_no_file(told, tmp_path):
    classes, examples = labelled_set(told)
    write(coco.Coco(classes), examples[:3], tmp_path)
    assert [path.name for path in (tmp_path / "annotations").iterdir()] == ["instances_train.json"]
    content = json.loads((tmp_path / "annotations" / "instances_train.json").read_text())
    numbers = [found["id"] for found in content["annotations"]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) == sum(len(one.of_nucleus) for one in examples[:3])
