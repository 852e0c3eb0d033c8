"""Folders of links: layout, repetition, other settings, and what others put there."""

import os

import pytest
from conftest import write_patches
from PIL import Image

from guided_diffusion.histology.features.cluster_folders import (
    RECORD,
    check_replaceable,
    list_patches,
    plan,
    write_clusters,
)

TRAIN, TEST = "MoNuSegTrainingData", "MoNuSegTestData"
FILES = {"clusters.csv": b"path,label\n"}


def tree(folder):
    """Path -> where a link leads, or the bytes of a file."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
    }


def links(folder):
    return {name: value for name, value in tree(folder).items() if isinstance(value, str)}


@pytest.fixture
def patches(data_dir):
    return list_patches(data_dir)


@pytest.fixture
def entries(patches):
    """Two clusters of four training patches each, all test patches in the first, and half of that as 50ss."""
    return plan(patches, list("aaaabbbbaaaa"), {"a": {50: [1, 3]}, "b": {}})


def make(data_dir, entries, copy=False):
    folder = data_dir / "NAME"
    check_replaceable(folder, FILES)
    write_clusters(folder, entries, FILES, copy)
    return folder


def test_lists_training_patches_first(patches):
    assert [patch.split for patch in patches] == [TRAIN] * 8 + [TEST] * 4
    assert patches[0].stem == "slide-0_000" and set(patches[0].files) == {"images", "bin_masks", "inst_masks"}


def test_links_are_relative_and_lead_to_the_files(data_dir, entries):
    folder = make(data_dir, entries)
    assert (
        os.readlink(folder / "a" / TRAIN / "inst_masks" / "slide-0_001.tif")
        == f"../../../../{TRAIN}/inst_masks/slide-0_001.tif"
    )
    assert os.readlink(folder / "a" / "50ss" / TEST) == f"../{TEST}"
    for path in folder.rglob("*.*"):
        if path.suffix in (".png", ".tif"):
            with Image.open(path) as image:
                image.load()
    assert sorted(path.name for path in (folder / "a" / "50ss" / TRAIN / "images").iterdir()) == [
        "slide-0_001.png",
        "slide-0_003.png",
    ]
    assert len(list((folder / "a" / "50ss" / TEST / "images").iterdir())) == 4
    assert not (folder / "b" / TEST).exists()


def test_the_whole_can_be_moved(data_dir, entries, tmp_path):
    make(data_dir, entries)
    data_dir.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "NAME" / "a" / "50ss" / TEST / "images" / "slide-25_000.png").exists()


def test_data_may_be_reached_by_a_link(data_dir, entries, tmp_path):
    (tmp_path / "far" / "off").mkdir(parents=True)
    (tmp_path / "far" / "off" / "link").symlink_to(data_dir)
    patches = list_patches(tmp_path / "far" / "off" / "link")
    folder = make(tmp_path / "far" / "off" / "link", plan(patches, ["a"] * 12, {}))
    assert all(path.exists() for path in (folder / "a" / TRAIN / "images").iterdir())


def test_again_is_the_same_and_other_settings_replace_all(data_dir, patches, entries):
    before = tree(make(data_dir, entries))
    assert tree(make(data_dir, entries)) == before and before["clusters.csv"] == FILES["clusters.csv"]
    left = tree(make(data_dir, plan(patches, ["c"] * 12, {})))
    assert len(left) == 36 + 2 and all(name.startswith("c/") for name in left.keys() - {RECORD, *FILES})
    assert sorted(path.name for path in (data_dir / "NAME").iterdir()) == ["c", "clusters.csv", RECORD]


def add_a_file(folder):
    (folder / "b" / "notes.txt").write_text("mine")


def add_a_link(folder):
    (folder / "a" / TRAIN / "images" / "mine.png").symlink_to("elsewhere.png")


def turn_a_link(folder):
    link = folder / "b" / TRAIN / "images" / "slide-1_000.png"
    link.unlink()
    link.symlink_to("elsewhere.png")


def link_a_folder(folder):
    (folder / "d").symlink_to("a")


def lose_the_record(folder):
    (folder / RECORD).unlink()


@pytest.mark.parametrize("change", [add_a_file, add_a_link, turn_a_link, link_a_folder, lose_the_record])
def test_what_others_put_there_is_not_replaced(data_dir, entries, change):
    folder = make(data_dir, entries)
    change(folder)
    before = tree(folder)
    with pytest.raises(ValueError, match="NAME/.* is there but not by this command, or changed: move it or choose"):
        make(data_dir, entries)
    assert tree(folder) == before


def test_a_run_that_ends_early_leaves_what_was_there(data_dir, patches, entries):
    before = tree(make(data_dir, entries))

    def kill():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_clusters(data_dir / "NAME", plan(patches, ["c"] * 12, {}), FILES, progress=kill)
    assert tree(data_dir / "NAME") == before and not list(data_dir.glob(".*"))


def test_copies_are_files_and_known_again(data_dir, patches, entries):
    subsets = {"a": {50: [1, 3]}, "b": {}}
    copies = plan(patches, list("aaaabbbbaaaa"), subsets, copy=True)
    before = tree(make(data_dir, copies, copy=True))
    assert not links(data_dir / "NAME") and tree(make(data_dir, copies, copy=True)) == before
    source = (data_dir / TEST / "images" / "slide-25_000.png").read_bytes()
    assert before[f"a/50ss/{TEST}/images/slide-25_000.png"] == source
    assert len(links(make(data_dir, entries))) == 12 * 3 + 2 * 3 + 1
    assert tree(make(data_dir, copies, copy=True)) == before


def test_a_copy_that_was_changed_is_not_overwritten(data_dir, patches):
    copies = plan(patches, ["a"] * 12, {}, copy=True)
    folder = make(data_dir, copies, copy=True)
    (folder / "a" / TRAIN / "bin_masks" / "slide-0_000.png").write_bytes(b"drawn by hand")
    with pytest.raises(ValueError, match="slide-0_000.png is there but not by this command, or changed"):
        make(data_dir, copies, copy=True)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"links": 1}'])
def test_a_record_that_is_no_use_is_refused(data_dir, entries, text):
    (data_dir / "NAME").mkdir()
    (data_dir / "NAME" / RECORD).write_text(text)
    with pytest.raises(ValueError, match="is not readable"):
        make(data_dir, entries)


def test_bad_data_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"has no {TRAIN}/images"):
        list_patches(tmp_path)
    folder = write_patches(tmp_path / TRAIN, count=2)
    mask = folder / "inst_masks" / "slide-0_001.tif"
    mask.unlink()
    with pytest.raises(ValueError, match=r"slide-0_001.png has no mask"):
        list_patches(tmp_path)
    mask.symlink_to("nowhere.tif")
    with pytest.raises(FileNotFoundError, match="slide-0_001.tif is a link that leads nowhere"):
        list_patches(tmp_path)
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="holds no image"):
        list_patches(tmp_path)
