"""The results folder: names, formats, manifest, what is finished, pictures, and the writer thread."""

import csv
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.results import (
    FOLDERS,
    MANIFEST_FIELDS,
    BackgroundWriter,
    ResultFolder,
    check_results_path,
    check_same_run,
    save_run,
    unique_stems,
)


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


def test_manifest_is_put_in_order(folder):
    for index in (2, 0, 1):
        write(folder, index, f"s{index}")
    assert folder.close() == 3
    rows = manifest(folder)
    assert [row["index"] for row in rows] == ["0", "1", "2"] and tuple(rows[0]) == MANIFEST_FIELDS
    assert rows[0]["structure"] == 'a "quoted", path'


def spoil(folder, what):
    sample, mask = folder.path / "samples" / "s1.png", folder.path / "inst_masks" / "s1.tif"
    if what == "gone":
        sample.unlink()
    elif what == "cut":
        sample.write_bytes(sample.read_bytes()[:-20])
    elif what == "empty":
        mask.write_bytes(b"")
    elif what == "row cut":
        lines = (folder.path / "manifest.csv").read_text().splitlines(keepends=True)
        (folder.path / "manifest.csv").write_text("".join(lines[:2]) + lines[2][:5] + "\n" + lines[3])


def test_a_manifest_that_a_kill_left_empty(folder):
    (folder.path / "manifest.csv").touch()
    assert folder.finished() == {}
    write(folder, 0, "a")
    write(folder, 1, "b")
    assert [row["stem"] for row in manifest(folder)] == ["a", "b"] and sorted(folder.finished()) == [0, 1]


@pytest.mark.parametrize("left", ["1", "1,s1,0", '1,s1,0,"an open quote'])
def test_half_a_row_at_the_end_spoils_no_other(folder, left):
    write(folder, 0, "s0")
    with open(folder.path / "manifest.csv", "a") as file:
        file.write(left)
    for index in (2, 3):
        write(folder, index, f"s{index}")
    assert {k: row["stem"] for k, row in folder.finished().items()} == {0: "s0", 2: "s2", 3: "s3"}


@pytest.mark.parametrize("what", ["gone", "cut", "empty", "row cut"])
def test_only_whole_samples_are_finished(folder, what):
    assert folder.finished() == {}
    for index in range(3):
        write(folder, index, f"s{index}")
    assert sorted(folder.finished()) == [0, 1, 2]
    spoil(folder, what)
    assert sorted(folder.finished()) == [0, 2]
    assert folder.close() == 2 and sorted(folder.finished()) == [0, 2]
    write(folder, 1, "s1")
    assert sorted(folder.finished()) == [0, 1, 2]


def test_grid_shows_what_was_written(folder):
    for i, stem in enumerate("abc"):
        write(folder, i, stem, value=100 + 50 * i)
    grid = np.asarray(Image.open(folder.write_grid(["a", "c"], "title")))
    # 16 px panels are enlarged eightfold; the sample is the last panel of its row.
    assert grid.shape[1] == 8 * 16 * 6 + 4 * 6
    assert (grid[34 + 64, -70] == 100).all() and (grid[34 + 64 + 128 + 6, -70] == 200).all()
    assert (grid[34 + 64, -70 - 128 - 6] == 50).all()


def test_remove_leaves_what_is_not_ours(folder):
    write(folder, 0, "a")
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "samples" / "mine.png").write_text("mine")
    folder.remove()
    left = sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file())
    assert left == ["notes.txt", "samples/mine.png"]


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="holds images that no sampling run made"):
        check_results_path(str(tmp_path))
    with pytest.raises(ValueError, match="is a URL"):
        check_results_path("gs://bucket/out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        check_results_path(str(tmp_path / "link"))


def test_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="--results_path .* is a file"):
            check_results_path(str(path))
    check_results_path(str(tmp_path / "new" / "folder"))
    assert not (tmp_path / "new").exists()


def test_results_do_not_mix_with_appearances(tmp_path):
    (tmp_path / "unannotated").mkdir()
    check_results_path(str(tmp_path / "out"), appearance_dir=str(tmp_path / "unannotated"))
    for path in (tmp_path / "unannotated", tmp_path / "unannotated" / "out"):
        with pytest.raises(ValueError, match=r"--results_path .* lies in --appearance_dir"):
            check_results_path(str(path), appearance_dir=str(tmp_path / "unannotated"))


def test_another_run_is_refused_by_name(tmp_path):
    path = str(tmp_path / "out")
    check_same_run(path, {"s": "1.5"})
    save_run(path, {"s": "1.5", "seed": 0})
    check_same_run(path, {"s": "1.5", "seed": 0})
    with pytest.raises(ValueError, match="begun with --s 1.5, this run has 1.6"):
        check_same_run(path, {"s": "1.6", "seed": 0})
    check_same_run(path, {"s": "1.5", "seed": 0, "a_later_flag": ""})
    with pytest.raises(ValueError, match="begun with --a_later_flag None, this run has on"):
        check_same_run(path, {"s": "1.5", "seed": 0, "a_later_flag": "on"})
    Path(path, "run.json").write_text("{")
    with pytest.raises(ValueError, match="does not parse"):
        check_same_run(path, {})
    Path(path, "run.json").unlink()
    Path(path, "manifest.csv").write_text("")
    with pytest.raises(ValueError, match="unknown run"):
        check_same_run(path, {})


def test_writer_keeps_order_and_waits():
    done = []
    with BackgroundWriter(waiting=2) as writer:
        for i in range(20):
            writer(lambda i=i: done.append((i, threading.current_thread().name)))
    assert done == [(i, "writer") for i in range(20)]


def test_writer_raises_what_a_job_raised():
    def fail():
        raise OSError("disk full")

    done = []
    with pytest.raises(OSError, match="disk full"), BackgroundWriter() as writer:
        writer(fail)
        writer(lambda: done.append(1))
    assert done == []


def test_a_failed_write_leaves_no_half(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"a\.png cannot be written \(No space left on device\)"):
        write(folder, 0, "a")
    assert folder.finished() == {} and not list(folder.path.rglob("*.p*"))
