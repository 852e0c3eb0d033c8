"""Finding and pairing of raw slides, and what says whose they are and how large their pixels."""

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.histology.slides import annotations, scales
from guided_diffusion.histology.slides.annotations import TEST_SPLIT, TRAIN_SPLIT
from guided_diffusion.image_files import EXTENSIONS

XML = '<A><Region><Vertex X="1" Y="1"/></Region></A>'


def add(root, image, annotation):
    """A slide of 8 x 8 px; the annotation is an XML or a mask by its suffix."""
    for name in (image, annotation):
        if name:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
    if image:
        Image.new("RGB", (8, 8)).save(root / image)
    if annotation and annotation.lower().endswith(".xml"):
        (root / annotation).write_text(XML)
    elif annotation:
        Image.fromarray(np.ones((8, 8), np.uint8)).save(root / annotation)


def found(root):
    return {(slide.split, slide.stem): slide.annotation.suffix for slide in annotations.find_slides(root)}


def test_published_layouts_and_mixtures_are_found(tmp_path):
    add(
        tmp_path,
        "raw/MoNuSeg 2018 Training Data/Tissue Images/a.tif",
        "raw/MoNuSeg 2018 Training Data/Annotations/a.xml",
    )
    add(tmp_path, "raw/MoNuSegTestData/t.tif", "raw/MoNuSegTestData/t.xml")
    add(tmp_path, "masks/MoNuSegTrainingData/images/b.tiff", "masks/MoNuSegTrainingData/inst_masks/b.png")
    add(tmp_path, "other/MoNuSegTestgData/images/u.PNG", "other/MoNuSegTestgData/annotations/u.XML")
    add(tmp_path, "train/deep/er/images/c.png", "train/deep/er/inst_masks/c.tif")
    assert found(tmp_path) == {
        (TRAIN_SPLIT, "a"): ".xml",
        (TRAIN_SPLIT, "b"): ".png",
        (TRAIN_SPLIT, "c"): ".tif",
        (TEST_SPLIT, "t"): ".xml",
        (TEST_SPLIT, "u"): ".XML",
    }


def test_an_xml_goes_before_a_mask(tmp_path):
    add(tmp_path, "train/images/a.tif", "train/annotations/a.xml")
    add(tmp_path, "train/images/a.tif", "train/inst_masks/a.tif")
    add(tmp_path, "train/images/b.tif", "train/inst_masks/b.tif")
    assert found(tmp_path) == {(TRAIN_SPLIT, "a"): ".xml", (TRAIN_SPLIT, "b"): ".tif"}


def test_raw_itself_may_hold_the_slides(tmp_path):
    for name, split in (("stuff", TRAIN_SPLIT), ("MoNuSegTestData", TEST_SPLIT)):
        add(tmp_path / name, "images/a.tif", "annotations/a.xml")
        assert found(tmp_path / name) == {(split, "a"): ".xml"}
    add(tmp_path / "flat", "a.tif", "a.xml")
    assert found(tmp_path / "flat") == {(TRAIN_SPLIT, "a"): ".xml"}


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        *((name, TEST_SPLIT) for name in ("test", "Test2", "MoNuSegTestData", "testset", "my-testing.x", "TESTData")),
        *((name, TRAIN_SPLIT) for name in ("train_1", "MoNuSeg 2018 Training Data", "MoNuSegTrainingData", "TrainSet")),
        ("train/latest", TRAIN_SPLIT),
        ("test/Strain_B", TEST_SPLIT),
        ("training_slides/latest", TRAIN_SPLIT),
        *((name, None) for name in ("latest", "contest", "Strain_B", "attestation", "retrain", "contestée")),
    ],
)
def test_only_words_speak_of_a_split(tmp_path, folder, split):
    raw = tmp_path / "raw"
    add(raw, f"{folder}/a.tif", f"{folder}/a.xml")
    if split is None:
        assert found(raw / folder) == {(TRAIN_SPLIT, "a"): ".xml"}
        with pytest.raises(ValueError, match="training or test data"):
            found(raw)
    else:
        assert found(raw) == {(split, "a"): ".xml"}
        if "/" in folder:  # also where the one that says it is what is given
            assert found(raw / folder.partition("/")[0]) == {(split, "a"): ".xml"}


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_images_and_masks_of_any_suffix_are_found(tmp_path, suffix):
    add(tmp_path / "raw", f"images/a{suffix}", "annotations/a.xml")
    add(tmp_path / "raw", f"images/b{suffix}", f"inst_masks/b{suffix}")
    assert found(tmp_path / "raw") == {(TRAIN_SPLIT, "a"): ".xml", (TRAIN_SPLIT, "b"): suffix}


def test_the_nearest_name_decides_the_split(tmp_path):
    add(tmp_path, "contest/Training/a.tif", "contest/Training/a.xml")
    assert found(tmp_path) == {(TRAIN_SPLIT, "a"): ".xml"}


def test_prepared_patches_and_leftovers_are_no_slides(tmp_path):
    add(tmp_path, "train/a.tif", "train/a.xml")
    add(tmp_path, "patches_valid_inst_128x128_128x128/MoNuSegTestData/images/p.png", None)
    add(tmp_path, "done/MoNuSegTestData/images/p.png", None)
    (tmp_path / "done" / annotations.MANIFEST).write_text("{}")
    add(tmp_path, "__MACOSX/train/._a.tif", None)
    add(tmp_path, "train/._a.tif", None)
    add(tmp_path, "train/overlay/a.tif", None)
    (tmp_path / "README.txt").write_text("x")
    assert found(tmp_path) == {(TRAIN_SPLIT, "a"): ".xml"}


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([("train/a.tif", None)], "a.tif: no annotation"),
        ([(None, "train/a.xml")], "a.xml: no image"),
        ([("train/images/a.tif", None)], "a.tif: no annotation"),
        ([("train/images/a.tif", "train/inst_masks/a.tif"), (None, "train/inst_masks/b.tif")], "b.tif: no image"),
        ([("train/a.tif", "train/a.xml"), ("test/a.tif", "test/a.xml")], "a.tif and .*a.tif are the same"),
        ([("train/a.tif", "train/a.xml"), ("train2/a.tif", "train2/a.xml")], "a.tif and .*a.tif are the same"),
        ([("train/a.tif", "train/a.xml"), ("train/a.png", None)], "a.png and .*a.tif share a stem"),
        ([("some/a.tif", "some/a.xml")], "training or test"),
        ([("train_test/a.tif", "train_test/a.xml")], "words train and test"),
        ([("a/b/c/train/images/a.tif", "a/b/c/train/annotations/a.xml")], "no slides"),
    ],
)
def test_what_cannot_be_paired_is_named(tmp_path, files, what):
    for image, annotation in files:
        add(tmp_path / "raw", image, annotation)
    with pytest.raises(ValueError, match=what):
        annotations.find_slides(tmp_path / "raw")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        annotations.find_slides(tmp_path / "nowhere")


def test_an_annotation_of_another_image_is_refused(tmp_path):
    add(tmp_path, "train/a.tif", "train/a.xml")
    (tmp_path / "train/a.xml").write_text(XML.replace("1", "500"))
    with pytest.raises(ValueError, match="outside its image"):
        annotations.read_slide(annotations.find_slides(tmp_path)[0])


def write_set(root, names, classes=()):
    """Training slides of these names, and class masks of those."""
    for name in names:
        add(root, f"train/images/{name}.png", f"train/inst_masks/{name}.png")
    for name in classes:
        add(root, f"train/class_masks/{name}.png", "")


def facts(raw):
    return {slide.stem: (slide.name, slide.mpp) for slide in annotations.find_slides(raw)}


def test_slides_csv_says_whose_images_are_and_how_large_their_pixels(tmp_path):
    write_set(tmp_path, "abc")
    assert facts(tmp_path) == {name: (name, None) for name in "abc"}
    (tmp_path / "slides.csv").write_text("file,slide,mpp\ntrain/images/a.png,P,0.5\nb.png,P,\nc.png,Q,0.25\n")
    assert facts(tmp_path) == facts(tmp_path / "train") == {"a": ("P", 0.5), "b": ("P", None), "c": ("Q", 0.25)}
    assert scales.read_scales(annotations.find_slides(tmp_path), "b=1") == {"a": 0.5, "b": 1, "c": 0.25}


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("a.png,P,x", "slides.csv: a has mpp 'x': give micrometres"),
        ("a.png,P,-1", "slides.csv: a has mpp '-1': give micrometres"),
        ("a.png,P/1,", "slides.csv: patches are named after their slide, and P/1 is no file's name"),
        (f"a.png,{201 * 'P'},", "is no file's name: take one without /, of 200 bytes at most"),
        ("b.png,P,", "has no row of .*a.png"),
        ("a.png,=P,", "formula"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, rows, what):
    write_set(tmp_path, "a")
    (tmp_path / "slides.csv").write_text(f"file,slide,mpp\n{rows}\n")
    with pytest.raises(ValueError, match=what):
        annotations.find_slides(tmp_path)


def test_a_slide_of_both_splits_is_refused(tmp_path):
    write_set(tmp_path, "a")
    add(tmp_path, "test/images/t.png", "test/inst_masks/t.png")
    (tmp_path / "slides.csv").write_text("file,slide\na.png,P\nt.png,P\n")
    with pytest.raises(ValueError, match=r"a.png and .*t.png are of one slide, P, but in both splits"):
        annotations.find_slides(tmp_path)


def test_class_masks_are_found_for_all_slides_or_none(tmp_path):
    write_set(tmp_path / "raw", "ab", classes="ab")
    assert [slide.class_mask.name for slide in annotations.find_slides(tmp_path / "raw")] == ["a.png", "b.png"]
    write_set(tmp_path / "raw/more", "c")
    with pytest.raises(ValueError, match=r"c.png has no class mask, .*a.png has one"):
        annotations.find_slides(tmp_path / "raw")
    for names, classes, what in (("ab", "a", "b.png: no file of class_masks"), ("a", "ac", "c.png: no file of images")):
        write_set(tmp_path / what, names, classes)
        with pytest.raises(ValueError, match=what):
            annotations.find_slides(tmp_path / what)
