"""The results folder: names, formats, the manifest and its parts, what is finished."""

import csv
import json
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.results import FOLDERS, MANIFEST_FIELDS, ResultFolder, unique_stems


@pytest.fixture
def folder(tmp_path) -> ResultFolder:
    result = ResultFolder(tmp_path / "out")
    result.open()
    return result


def write(folder, index, stem, value=200, channels=3, size=16, top_id=500):
    inst = np.zeros((size, size), np.int64)
    inst[4:9, 4:9] = top_id
    sample = np.full((size, size, channels), value, np.uint8)
    cond = np.zeros((size, 4 * size, 3), np.uint8)
    row = {**dict.fromkeys(MANIFEST_FIELDS, "x"), "index": index, "stem": stem, "structure": 'a "quoted", path'}
    folder.write(row, image=sample // 2, label=(inst > 0) * 255, cond=cond, sample=sample, inst=inst)
    return inst


def manifest(folder):
    with open(folder.path / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_names_repeat_with_numbers_and_never_collide():
    assert unique_stems(["a", "b", "a", "a"]) == ["a", "b", "a_0", "a_1"]
    assert unique_stems(["a", "a", "a_0", "a"]) == ["a", "a_0", "a_0_0", "a_1"]
    stems = ["x", "x_0", "x", "x_1", "x"] * 3
    names = unique_stems(stems)
    assert len(set(names)) == len(stems)
    assert unique_stems(stems[:7]) == names[:7]


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_files(folder, channels, mode):
    inst = write(folder, 0, "s_000", channels=channels)
    folder.merge()
    assert sorted(path.name for path in folder.path.iterdir()) == sorted([*FOLDERS, "manifest.csv"])
    read = {path.parent.name: Image.open(path) for path in folder.path.rglob("s_000.*")}
    assert {name: image.mode for name, image in read.items()} == {
        "images": mode,
        "samples": mode,
        "labels": "L",
        "cond": "RGB",
        "inst_masks": "I;16",
    }
    np.testing.assert_array_equal(np.asarray(read["inst_masks"]), inst)
    np.testing.assert_array_equal(np.asarray(read["labels"]), (inst > 0) * 255)
    assert (np.asarray(read["samples"]) == 200).all() and (np.asarray(read["images"]) == 100).all()
    assert not list(folder.path.rglob("*.part"))


def test_ids_beyond_16_bits_are_kept(folder):
    inst = write(folder, 0, "a", top_id=70_000)
    np.testing.assert_array_equal(np.asarray(Image.open(folder.path / "inst_masks" / "a.tif")), inst)


def part(folder):
    """The rows that processes noted and nobody merged."""
    (path,) = folder.path.glob(".manifest.*.jsonl")
    return path


def test_manifest_is_in_order_and_written_when_it_changes(folder):
    assert folder.merge() == {} and not (folder.path / "manifest.csv").exists()
    for index in (2, 0, 1):
        write(folder, index, f"s{index}")
    assert sorted(folder.merge()) == [0, 1, 2]
    rows = manifest(folder)
    assert [row["index"] for row in rows] == ["0", "1", "2"] and tuple(rows[0]) == MANIFEST_FIELDS
    assert rows[0]["structure"] == 'a "quoted", path'
    before = (folder.path / "manifest.csv").stat().st_mtime_ns
    folder.merge()
    assert (folder.path / "manifest.csv").stat().st_mtime_ns == before and not list(folder.path.glob(".*"))


def test_processes_write_at_once_and_one_merges(folder):
    write(folder, 60, "earlier")
    folder.merge()
    fork = multiprocessing.get_context("fork")

    def share(rank):
        for k in range(rank, 60, 4):
            write(folder, k, f"s{k}")

    processes = [fork.Process(target=share, args=(rank,)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(folder.path.glob(".manifest.*.jsonl"))) == 4 and len(manifest(folder)) == 1
    assert sorted(folder.finished()) == list(range(61))
    folder.merge()
    assert [row["index"] for row in manifest(folder)] == [str(k) for k in range(61)]
    assert not list(folder.path.glob(".*"))


ODD = ["a b", " a", "a,b", 'a"b', '"a"', "a'b", "a#b", "a;b", "a\tb", "a\nb", "a\r\nb", "%s", "a%20b", "{a}"]
ODD += [".a", "-a", "ä日", "a.part"]


def test_odd_names_survive(folder):
    for index, stem in enumerate(ODD):
        write(folder, index, stem)
    assert [row["stem"] for row in folder.merge().values()] == ODD
    assert [row["stem"] for row in manifest(folder)] == ODD and len(folder.finished()) == len(ODD)
    assert (folder.picture("samples", "a\nb") == 200).all()


def test_a_part_cut_anywhere_loses_the_row_that_is_cut(folder):
    for index in range(2):
        write(folder, index, f"s{index}")
    whole = part(folder).read_bytes()
    first = len(whole) - len(whole.splitlines()[-1]) - 1
    for length in range(len(whole)):
        part(folder).write_bytes(whole[:length])
        assert sorted(folder.rows()) == ([0] if length >= first else [])
        write(folder, 2, "s2")
        assert sorted(folder.rows()) == ([0, 2] if length >= first else [2])


@pytest.mark.parametrize("left", ["", "1", "1,s1,0", '1,s1,0,"an open quote', "1,s1\0", "1,s1,0," + 200_000 * '"'])
def test_a_manifest_that_is_cut_spoils_no_other_row(folder, left):
    write(folder, 0, "s0")
    folder.merge()
    with open(folder.path / "manifest.csv", "a") as file:
        file.write(left)
    write(folder, 2, "s2")
    assert {k: row["stem"] for k, row in folder.finished().items()} == {0: "s0", 2: "s2"}
    (folder.path / "manifest.csv").write_text("")
    assert sorted(folder.merge()) == [2] and [row["stem"] for row in manifest(folder)] == ["s2"]


def test_rows_of_files_elsewhere_are_none(folder):
    write(folder, 0, "s0")
    row = json.loads(part(folder).read_text())
    others = [{**row, "stem": "../s0"}, {**row, "index": "-1"}, {**row, "index": 1}, {**row, "x": ""}, [], "s0"]
    part(folder).write_text("\n".join(json.dumps(other) for other in others))
    assert folder.rows() == {} and folder.remove() is None
    assert not (folder.path / "manifest.csv").exists() and list(folder.path.rglob("s0.png"))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("what", ["gone", "cut", "empty"])
def test_only_whole_samples_are_finished(folder, what, merged):
    assert folder.finished() == {}
    for index in range(3):
        write(folder, index, f"s{index}")
    if merged:
        folder.merge()
    assert sorted(folder.finished()) == [0, 1, 2]
    sample = folder.path / "samples" / "s1.png"
    if what == "gone":
        sample.unlink()
    elif what == "cut":
        sample.write_bytes(sample.read_bytes()[:-20])
    else:
        (folder.path / "inst_masks" / "s1.tif").write_bytes(b"")
    assert sorted(folder.finished()) == [0, 2]
    assert sorted(folder.merge()) == [0, 2] == [int(row["index"]) for row in manifest(folder)]
    write(folder, 1, "s1")
    assert sorted(folder.finished()) == [0, 1, 2]


def test_what_killed_runs_had_begun_goes(folder):
    for left in (folder.path / ".manifest.csv.7.part", folder.path / "samples" / ".a.png.7.part"):
        left.write_text("half")
    write(folder, 0, "a")
    folder.open()
    assert not list(folder.path.rglob("*.part")) and sorted(folder.finished()) == [0]


def test_grid_shows_what_was_written(folder):
    for i, stem in enumerate("abc"):
        write(folder, i, stem, value=100 + 50 * i)
    grid = np.asarray(Image.open(folder.write_grid(["a", "c"], "title")))
    # 16 px panels are enlarged eightfold; the sample is the last panel of its row.
    assert grid.shape[1] == 8 * 16 * 6 + 4 * 6
    second = len(grid) - 6 - 64
    first = second - 6 - 128
    assert (grid[first, -70] == 100).all() and (grid[second, -70] == 200).all()
    assert (grid[first, -70 - 128 - 6] == 50).all()


def test_remove_leaves_what_is_not_ours(folder):
    write(folder, 0, "a")
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "samples" / "mine.png").write_text("mine")
    folder.remove()
    left = sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file())
    assert left == ["notes.txt", "samples/mine.png"]


def test_a_failed_write_leaves_no_half(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.png: No space left on device"):
        write(folder, 0, "a")
    assert folder.finished() == {} and not list(folder.path.rglob("*.p*"))
