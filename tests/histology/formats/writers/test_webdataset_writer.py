"""webdataset reads the shards with its usual decoder, bit for bit."""

import numpy as np
import webdataset
from labelled_set import BOTH, example, labelled_set

from guided_diffusion.histology.formats.writers import webdataset as writing
from guided_diffusion.histology.formats.writers.webdataset import Shards, WebDataset, by_lot


def write(writer, examples, folder):
    with Shards(folder) as shards:
        return [shards.add(one.entry.split, list(writer.files(one))) for one in examples]


def read(*shards) -> dict[str, dict]:
    data = webdataset.WebDataset([*map(str, shards)], shardshuffle=False).decode("pil")
    return {sample["__key__"]: sample for sample in data}


@BOTH
def test_webdataset_reads_them(told, tmp_path):
    classes, examples = labelled_set(told)
    write(WebDataset(classes), examples, tmp_path)
    train, test = read(tmp_path / "train-000000.tar"), read(tmp_path / "test-000000.tar")
    assert len(train) == 3 and len(test) == 1
    for one in examples:
        sample = {**train, **test}[one.entry.name]
        assert np.array_equal(np.asarray(sample["png"]), one.image)
        labels = sample["npz"]
        assert np.array_equal(labels["inst_map"], one.inst_map) and labels["inst_map"].dtype == np.int32
        assert ("class_map" in labels) == bool(classes)
        assert not classes or np.array_equal(labels["class_map"], one.class_map)
        assert sample["json"] == {**one.entry.row, "split": one.entry.split, "nuclei": len(one.of_nucleus)}


def test_a_full_shard_is_followed_by_another(monkeypatch, tmp_path):
    monkeypatch.setattr(writing, "SHARD", 20_000)
    examples = [example(f"{k}", "train", np.full((40, 40), 3, np.int32), False) for k in range(10)]
    shards = write(WebDataset(), examples, tmp_path)
    assert shards == sorted(shards) and 2 < len(set(shards)) < 10
    assert {path.name for path in tmp_path.iterdir()} == set(shards)
    assert sorted(read(*sorted(tmp_path.iterdir()))) == sorted(one.entry.name for one in examples)


@BOTH
def test_shards_are_the_same_in_every_run(told, tmp_path):
    classes, examples = labelled_set(told)
    for name in "ab":
        (tmp_path / name).mkdir()
        write(WebDataset(classes), examples, tmp_path / name)
    assert (tmp_path / "a/train-000000.tar").read_bytes() == (tmp_path / "b/train-000000.tar").read_bytes()


def test_the_order_mixes_sources_and_is_the_same_in_every_run():
    entries = [example(f"{k:03d}", "train", np.zeros((4, 4), np.int32), False).entry for k in range(100)]
    order = by_lot(entries)
    assert order == by_lot(entries[::-1]) and {*map(id, order)} == {*map(id, entries)}
    assert 15 < sum(int(entry.name) < 50 for entry in order[:50]) < 35
