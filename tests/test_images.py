"""Pairing by stem, and whole slides held out."""

import pytest
from PIL import Image

from guided_diffusion.images import Item, check_complete, list_items, slide_of, split_slides


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
    assert {slide_of(item.stem) for item in items} == {"slide-0"}
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


@pytest.mark.parametrize(
    ("stem", "slide"),
    [
        ("A-01_000", "A-01"),
        ("a_b_12", "a_b"),
        ("a_b", "a_b"),
        ("a_", "a_"),
        ("_3", "_3"),
        ("17", "17"),
        ("a_1x", "a_1x"),
        ("_000", "_000"),
        ("folder_1/a_000", "a"),
    ],
)
def test_slide_of(stem, slide):
    assert slide_of(stem) == slide


def patches(slides, each=3):
    return [Item(f"s{k:02d}_{i:03d}", "", None, None) for k in range(slides) for i in range(each)]


@pytest.mark.parametrize(("slides", "share", "held"), [(3, 0.1, 1), (10, 0.25, 2), (10, 0.3, 3), (20, 0.1, 2)])
def test_slides_are_held_out_whole(slides, share, held):
    items = patches(slides)
    training, held_out = split_slides(items, share, 7)
    assert len({slide_of(item.stem) for item in held_out}) == held and len(held_out) == 3 * held
    assert training == [item for item in items if item not in held_out] and held_out == sorted(held_out, key=str)
    assert split_slides(items, share, 7) == (training, held_out)


def test_the_seed_chooses_the_slides():
    assert len({str(split_slides(patches(10), 0.1, seed)[1]) for seed in range(20)}) > 3


def test_a_part_of_the_slides_holds_out_what_all_of_them_did():
    def held_out(items):
        return {slide_of(item.stem) for item in split_slides(items, 0.1, 0)[1]}

    whole = patches(30)
    held = sorted(held_out(whole))
    for kept in held:  # a cluster that has one of the three, and most of the others
        part = [item for item in whole if slide_of(item.stem) not in held or slide_of(item.stem) == kept]
        assert kept in held_out(part)


def test_fewer_than_three_slides_are_not_split():
    assert split_slides(patches(2), 0.9, 0) == (patches(2), [])


def test_something_is_left_to_train_on():
    with pytest.raises(ValueError, match="--val_share 0.9 leaves no training slide of 4"):
        split_slides(patches(4), 0.9, 0)
