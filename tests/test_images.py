"""Pairing by stem, and whole slides held out."""

import pytest
from PIL import Image

from guided_diffusion.images import check_complete, list_items


def test_pairs_by_stem_whatever_the_extension(data_dir):
    folder = data_dir / "MoNuSegTrainingData"
    Image.open(folder / "images" / "slide-0_001.png").save(folder / "images" / "slide-0_001.TIFF")
    (folder / "images" / "slide-0_001.png").unlink()
    (folder / "images" / ".DS_Store").write_bytes(b"")
    (folder / "images" / "notes.txt").write_text("")
    items = list_items(str(data_dir), "monuseg")
    assert [item.stem for item in items] == [f"slide-{k // 4}_{k % 4:03d}" for k in range(8)]
    assert items[1].image.endswith("slide-0_001.TIFF") and items[1].inst_mask.endswith("slide-0_001.tif")


@pytest.mark.parametrize("name", ["d", "d/split", "d/split/images"])
def test_a_folder_that_was_not_prepared_to_the_end_is_refused(tmp_path, name):
    (tmp_path / "d" / "split" / "images").mkdir(parents=True)
    check_complete(tmp_path / name, "DATA")
    (tmp_path / "d" / "prepare.json").write_text('{\n "complete": false\n}')
    with pytest.raises(ValueError, match=f"^DATA .*/{name} is not prepared to the end: run prepare_monuseg.py again$"):
        check_complete(tmp_path / name, "DATA")
    (tmp_path / "d" / "prepare.json").write_text('{\n "complete": true\n}')
    check_complete(tmp_path / name, "DATA")


def test_sub_folders_are_found_and_pair_by_their_paths(data_dir):
    split = data_dir / "MoNuSegTrainingData"
    for folder in ("images", "bin_masks", "inst_masks"):
        for path in list((split / folder).iterdir())[:]:
            inside = split / folder / ("x" if path.stem < "slide-1" else "y/z")
            inside.mkdir(parents=True, exist_ok=True)
            path.rename(inside / path.name.replace("slide-1", "slide-0"))
    items = list_items(str(data_dir), "monuseg")
    assert [item.stem for item in items] == [f"{f}/slide-0_{k:03d}" for f in ("x", "y/z") for k in range(4)]
    for item in items:
        assert item.inst_mask == item.image.replace("images", "inst_masks").replace(".png", ".tif")
    assert {item.slide for item in items} == {"slide-0"}
    (split / "inst_masks" / "x" / "slide-0_000.tif").rename(split / "inst_masks" / "slide-0_000.tif")
    with pytest.raises(ValueError, match=r"x/slide-0_000.png has no mask x/slide-0_000\.\*"):
        list_items(str(data_dir), "monuseg")


@pytest.mark.parametrize("what", ["file", "dead link"])
def test_a_mask_folder_that_is_none_is_not_passed_over(data_dir, what):
    masks = data_dir / "MoNuSegTrainingData" / "inst_masks"
    masks.rename(masks.with_name("old"))
    masks.write_text("") if what == "file" else masks.symlink_to("nowhere")
    with pytest.raises(ValueError, match="inst_masks is a file, or a link that leads nowhere"):
        list_items(str(data_dir), "monuseg")


def test_unrelated_dead_links_do_no_harm(data_dir):
    (data_dir / "MoNuSegTrainingData" / "images" / "notes").symlink_to("nowhere")
    assert len(list_items(str(data_dir), "monuseg")) == 8


def test_unknown_mode_and_folder(data_dir, tmp_path):
    with pytest.raises(ValueError, match="--dataset_mode 'ade20k'"):
        list_items(str(data_dir), "ade20k")
    with pytest.raises(FileNotFoundError, match="--data_dir"):
        list_items(str(tmp_path / "nowhere"), "monuseg")
    with pytest.raises(FileNotFoundError, match="MoNuSegTrainingData/images"):
        list_items(str(tmp_path), "monuseg")
