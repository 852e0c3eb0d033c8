"""Whose slide a patch is, by the data folder and never by its name alone; and the one rule of what is held out."""

import json
import logging

import pytest

from guided_diffusion import slides
from guided_diffusion.histology.segmenter import data as segmenter_data
from guided_diffusion.histology.segmenter.data import Pair
from guided_diffusion.images import Item, split_slides
from guided_diffusion.slides import hold_out, keep, ranked, slides_of

TRAIN, TEST = "MoNuSegTrainingData/images", "MoNuSegTestData/images"


@pytest.fixture
def said(caplog):
    slides._say.cache_clear()
    caplog.set_level(logging.WARNING, slides.__name__)
    return caplog


def paths(folder, *names):
    return [str(folder / TRAIN / f"{name}.png") for name in names]


def prepared(folder, **counts):
    folder.mkdir(exist_ok=True)
    (folder / slides.MANIFEST).write_text(
        json.dumps({"patches": {"MoNuSegTrainingData": counts, "MoNuSegTestData": {}}})
    )
    return folder


def table(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / slides.TABLE).write_text("".join(f"{row}\n" for row in ("file,slide", *rows)))
    return folder


def test_prepare_json_owns_the_slides(tmp_path, said):
    data = prepared(tmp_path, train_1=2, train_2=2, A=1001)
    names = ("train_1_000", "train_1_001", "train_2_001", "A_1000")
    assert slides_of(data, paths(data, *names)) == ["train_1", "train_1", "train_2", "A"]
    inside = data / "clusters" / "6" / "10ss"
    assert slides_of(inside, paths(inside, *names)) == slides_of(
        data, [f"{data}/{TRAIN}/x/{name}.tif" for name in names]
    )
    assert not said.records


def test_what_prepare_json_does_not_name_is_guessed_and_said(tmp_path, said):
    data = prepared(tmp_path, A=2, B=1)
    assert slides_of(data, paths(data, "A_001", "A_002", "C_1")) == ["A", "A_002", "C_1"]
    assert (
        "prepare.json does not name all images" in said.text
        and "slides.csv with the columns file and slide" in said.text
    )


@pytest.mark.parametrize("file", [f"{TRAIN}/x/tile 1.png", "x/tile 1.png", "tile 1.png", "tile 1", "x/tile 1.TIF"])
def test_slides_csv_owns_the_slides(tmp_path, said, file):
    data = table(prepared(tmp_path, tile=9), f"{file},S-1", "other_000.png,S/2")
    assert slides_of(data, paths(data, "x/tile 1", "other_000")) == ["S-1", "S/2"]
    assert slides_of(data / TRAIN, [data / "MoNuSegTrainingData/inst_masks/x/tile 1.tif"]) == ["S-1"]
    assert not said.records


def test_a_table_that_was_written_is_read(tmp_path):
    rows = [(f"{TRAIN}/a,b.png", 'the "third"'), (f"{TEST}/a,b.png", "Zürich 2")]
    slides.write_table(tmp_path, rows)
    assert slides_of(tmp_path, [tmp_path / file for file, _ in rows]) == [slide for _, slide in rows]
    assert slides_of(tmp_path, [tmp_path / TEST / "a,b.png"], beside=lambda: [tmp_path / "never" / "looked at"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,slide\nb.png,S\n", "slides.csv has no row of .*/a.png: add its file and slide"),
        ("image,slide\na.png,S\n", "slides.csv has no columns file and slide: begin it with the line file,slide"),
        ("", "slides.csv has no columns"),
        ("file,slide\na.png,\n", "slides.csv, line 2 lacks a file or a slide"),
        ("file,slide\na.png,=1+1\n", "slides.csv: slide =1.1 is a formula to spreadsheets"),
        *(
            (f"file,slide\na.png,{slide}\n", "slides.csv: slide .* would name a place out of its folder: rename it")
            for slide in ("../S", "S/..", "/S", "S/", ".", "S//T")
        ),
        ("file,slide\na.png,S\x1bT\n", "control characters"),
        ("file,slide\na.png\n", "slides.csv, line 2 lacks a file or a slide"),
        ("file,slide\na.png,S\na.tif,T\n", "slides.csv names two slides of a.tif, S and T: give one"),
        (b"file,slide\na.png,\xff\n", "slides.csv is not UTF-8"),
        (f"file,slide\na.png,{200_000 * 'x'}\n", "slides.csv is no readable table"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, message):
    (tmp_path / slides.TABLE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        slides_of(tmp_path, paths(tmp_path, "a"))


@pytest.mark.parametrize("text", ["", "[]", 100_000 * "[", '{"patches": 3}', '{"patches": {"x": {"A": "many"}}}'])
def test_a_prepare_json_that_is_wrong(tmp_path, text):
    (tmp_path / slides.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="prepare.json is not readable"):
        slides_of(tmp_path, paths(tmp_path, "a"))


@pytest.mark.parametrize(
    "names",
    [
        [f"train_{k}" for k in range(1, 28)],
        ["consep_3", "consep_11", "crag_3", "glas_1"],
        ["Human_AdrenalGland_01", "Human_AdrenalGland_02", "Human_Bladder_01"],
        ["image_000", "image_001", "image_002"],
        ["tumor_001", "tumor_002", "stroma_001"],
        ["x/1", "y/1"],
    ],
)
def test_a_number_that_alone_tells_images_apart_is_not_cut(tmp_path, said, names):
    assert slides_of(tmp_path, paths(tmp_path, *names)) == names
    assert "each is taken for a slide of its own" in said.text and len(said.records) == 1
    slides_of(tmp_path, paths(tmp_path, *names))
    assert len(said.records) == 1


def test_patches_are_told_by_how_they_are_numbered(tmp_path, said):
    names = ("A-01_000", "A-01_001", "x/A-01_002", "b_12_1000", "whole", "b_12")
    assert slides_of(tmp_path, paths(tmp_path, *names)) == ["A-01", "A-01", "A-01", "b_12", *names[4:]]
    assert "neither slides.csv nor prepare.json: NAME_000 is taken for a patch of slide NAME, 3 in all" in said.text
    assert slides_of(tmp_path, paths(tmp_path, "A_000")) == ["A_000"]
    assert slides_of(tmp_path, paths(tmp_path, "A_000"), beside=lambda: paths(tmp_path, "B_000")) == ["A"]


# ---- what is held out ----

NAMES = [f"s{k:02d}" for k in range(30)]


@pytest.mark.parametrize(("count", "share", "held"), [(3, 0.1, 1), (10, 0.25, 2), (10, 0.3, 3), (20, 0.1, 2)])
def test_how_many_are_held_out(count, share, held):
    assert len(hold_out(NAMES[:count] * 2, share, 7)) == held


def test_fewer_than_three_are_not_split_and_something_is_left():
    assert hold_out(NAMES[:2], 0.9, 0) == hold_out(NAMES, 0.0, 0) == set()
    with pytest.raises(ValueError, match="--val_share 0.9 leaves no training slide of 4"):
        hold_out(NAMES[:4], 0.9, 0)


def test_one_rule_for_all():
    """What training and the segmenter hold out, and what the experiment keeps."""
    items = [Item(f"{name}_{i:03d}", name, "") for name in NAMES for i in range(3)]
    pairs = [Pair(item.stem, item.stem, item.stem, frozenset([item.slide])) for item in items]
    for seed in range(3):
        order = ranked(reversed(NAMES), seed)
        training, held = split_slides(items, 0.1, seed)
        assert [*training, *held] == sorted(items, key=lambda item: item in held)
        assert {item.slide for item in held} == {*order[:3]}
        train, held, _ = segmenter_data.hold_out(pairs, 0.2, seed)
        assert set().union(*(pair.slides for pair in held)) == {*order[:6]} and len(train) == 72
        assert keep(NAMES, 0.1, seed) == {*order[-3:]} < keep(NAMES, 0.5, seed) and len(keep(NAMES, 0.001, seed)) == 1
    assert len({ranked(NAMES, seed)[0] for seed in range(20)}) > 3


def test_a_part_of_the_slides_holds_out_what_all_of_them_did():
    held = hold_out(NAMES, 0.1, 0)
    for kept in held:  # a cluster that has one of the three, and most of the others
        assert kept in hold_out([name for name in NAMES if name not in held or name == kept], 0.1, 0)
