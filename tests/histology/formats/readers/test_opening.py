"""The folders of a data set, and names that are safe to write to."""

import numpy as np
import pytest
from foreign_sets import conic, save_npy

from guided_diffusion.histology.formats.fields import TEST, TRAIN, numbered, safe
from guided_diffusion.histology.formats.readers import arrays, opening
from guided_diffusion.slides import without_number


@pytest.mark.parametrize(
    ("name", "split"),
    [("Test/a", TEST), ("test_diff", TEST), ("test/train", TRAIN), ("val2017", TRAIN), ("x/Train", TRAIN), ("", TRAIN)],
)
def test_the_nearest_name_says_the_split(tmp_path, name, split):
    folder = tmp_path / "src" / name
    folder.mkdir(parents=True)
    assert opening.Tree(tmp_path / "src").split_of(folder) == split


def test_hidden_and_deep_folders_are_passed_over(tmp_path):
    for name in (".git", "__MACOSX", "a/b/c/d/e", "a/b/c/d/e/f"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.npy").touch()
    assert opening.Tree(tmp_path).called("x.npy") == [tmp_path / "a/b/c/d/e/x.npy"]


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("Bile-duct", "Bile-duct"),
        ("../../etc", "etc"),
        ("=1+1", "1-1"),
        ("a b/c", "a-b-c"),
        ("組織", "組織"),
        ("", "unnamed"),
    ],
)
def test_names_from_files_stay_in_their_folder(name, made):
    assert safe(name) == made and without_number(numbered(safe(name), 7)) == made


def test_names_in_tables_stay_in_their_folder(tmp_path):
    conic(tmp_path)
    (tmp_path / "patch_info.csv").write_text("patch_info\n../../a-0000\n/b-0001\n=c-0002\n")
    names = [one.name for one in arrays.find_conic(opening.Tree(tmp_path)).fields]
    assert names == ["a_0000", "b_0001", "c_0002"]


def test_an_archive_of_arrays_is_no_array(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a.npy is no .npy of one array"):
        opening.load_npy(tmp_path / "a.npy")


def test_large_arrays_are_not_read_whole(tmp_path):
    save_npy(tmp_path / "a.npy", np.ones(3))
    assert isinstance(opening.load_npy(tmp_path / "a.npy"), np.memmap)
