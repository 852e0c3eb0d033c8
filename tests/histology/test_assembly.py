"""Drawing, naming and provenance of training sets by hand-made cases; folders that are replaced as a whole."""

import csv
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from guided_diffusion import cell_classes, files
from guided_diffusion.histology import assembly
from guided_diffusion.histology.evaluation.runs import Run, Sample
from guided_diffusion.histology.features.cluster_folders import Patch
from guided_diffusion.images import list_items

ENDS = ("2_007", "1_100000", "2_100003")


def sample(stem, folder="run", **row):
    return Sample(stem, folder / f"samples/{stem}.png", folder / f"inst_masks/{stem}.tif", None, row)


@pytest.fixture
def samples(tmp_path):
    return [sample(f"a_{k:03d}", tmp_path, weight=str(w)) for k, w in enumerate((0, 0.5, 0.3, 0.2, 0))]


def test_a_draw_is_seeded_and_without_replacement(samples):
    drawn = assembly.draw(samples, 3, False, 0)
    assert len({item.stem for item in drawn}) == 3 and drawn == sorted(drawn, key=lambda item: item.stem)
    assert drawn == assembly.draw(samples, 3, False, 0)
    assert len({tuple(item.stem for item in assembly.draw(samples, 2, False, seed)) for seed in range(20)}) > 3
    assert assembly.draw(samples, 5, False, 3) == samples


def test_a_weighted_draw_follows_the_weights(samples):
    drawn = [assembly.draw(samples, 1, True, seed)[0].stem for seed in range(600)]
    shares = [drawn.count(item.stem) / 600 for item in samples]
    assert shares == pytest.approx([0, 0.5, 0.3, 0.2, 0], abs=0.06) and shares[0] == shares[4] == 0
    assert [item.stem for item in assembly.draw(samples, 3, True, 0)] == ["a_001", "a_002", "a_003"]


def test_more_than_there_are(samples, tmp_path):
    assert assembly.draw(samples, 6, False, 0) == assembly.draw(samples, None, False, 1) == samples
    assert assembly.draw(samples, 4, True, 0) == assembly.draw(samples, None, True, 0) == samples[1:4]
    for weight in ("", "nan", "-1", "inf", "x"):
        with pytest.raises(ValueError, match="b_000.png has no weight"):
            assembly.draw([*samples, sample("b_000", tmp_path, weight=weight)], 1, True, 0)


def test_a_triple_is_drawn_once(tmp_path):
    given = [
        sample("a", tmp_path / s, structure="x", appearance=appearance, noise=noise, s=s)
        for s in ("1", "1.5")
        for appearance, noise in (("p", "0/1"), ("q", "0/1"), ("p", f"{s}/1"))
    ]
    drawn = assembly.draw(given, 6, False, 0)
    assert len(drawn) == 4 and len({assembly.triple(item) for item in drawn}) == 4
    taken = {item.row["s"] for seed in range(9) for item in assembly.draw(given, 1, False, seed)}
    assert taken == {"1", "1.5"}
    # Before the noise was noted, a sample's own name and the run's seed told it.
    old = [sample(f"{s}__a", tmp_path, structure="x", appearance="p", seed="0", sample="a") for s in "12"]
    assert len(assembly.draw(old, 2, False, 0)) == 1


def test_names_carry_the_slide_of_the_appearance_and_never_come_twice(tmp_path):
    given = [
        sample("x", tmp_path, appearance="d/slide-1_004.png", structure="d/slide-2_001.png"),
        sample("run__slide-1_004_3", tmp_path, appearance="d/slide-1_004.png"),
        sample("slide-2_007", tmp_path),
        sample("slide-2_007_0", tmp_path),
        sample("alone", tmp_path),
        sample("y", tmp_path, appearance="d/mine_2.png", structure_slide="other"),
    ]
    real = [Patch("MoNuSegTrainingData", f"x/{name}", "one of mine", {}) for name in ("mine_1", "mine_2")]
    real += [Patch("MoNuSegTrainingData", f"slide-{end}", f"slide-{end[0]}", {}) for end in ENDS]
    named = assembly.name_synthetic(given, real)
    assert [item.stem for item in named] == [
        "slide-1_100001",
        "slide-1_100002",
        "slide-2_100004",
        "slide-2_100005",
        "alone_100006",
        "one_of_mine_100007",
    ]
    slides = ["slide-1", "slide-1", "slide-2", "slide-2", "alone", "one of mine"]
    assert [item.slide for item in named] == slides and named[-1].structure_slide == "other"
    row = named[0].row(tmp_path)
    assert (row["slide"], row["structure_slide"], row["source"]) == ("slide-1", "slide-2", "synthetic")
    assert row["sample"] == "samples/x.png"


def write_sample(folder, stem, size=8, dtype=np.uint16):
    for name in ("samples", "inst_masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), 7, np.uint8)).save(folder / "samples" / f"{stem}.png")
    mask = np.zeros((size, size), dtype)
    mask[1, 2] = 60_000
    Image.fromarray(mask).save(folder / "inst_masks" / f"{stem}.tif")
    return sample(stem, folder)


def real_patch(folder, stem="slide-0_000", size=8):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "inst_masks").mkdir(exist_ok=True)
    files = {"images": folder / f"images/{stem}.png", "inst_masks": folder / f"inst_masks/{stem}.tif"}
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(files["images"])
    Image.fromarray(np.eye(size, dtype=np.int32) * 70_000).save(files["inst_masks"])
    return Patch("MoNuSegTrainingData", stem, "slide-0", files)


@pytest.mark.parametrize("copy", [False, True])
def test_a_set(tmp_path, copy):
    real = real_patch(tmp_path / "data/MoNuSegTrainingData")
    (tmp_path / "data/MoNuSegTestData").mkdir()
    (tmp_path / "data/MoNuSegTestData/file").write_text("test")
    named = assembly.name_synthetic([write_sample(tmp_path / "run", "slide-0_001")], [real])
    out = tmp_path / "deep/er/out"
    files.replace_folder(
        out, lambda folder: assembly.write_set(folder, tmp_path / "data", [real], named, copy), "--out"
    )
    train = out / "MoNuSegTrainingData"
    for name, stem in (("70000", "slide-0_000"), ("60000", "slide-0_001")):
        stem = stem if name == "70000" else named[0].stem
        mask = np.asarray(Image.open(train / "inst_masks" / f"{stem}.tif"))
        binary = np.asarray(Image.open(train / "bin_masks" / f"{stem}.png"))
        assert mask.max() == int(name) and np.array_equal(binary, np.where(mask > 0, 255, 0))
        assert (train / "images" / f"{stem}.png").is_symlink() != copy
    assert (out / "MoNuSegTestData/file").read_text() == "test"
    assert all(not os.path.isabs(os.readlink(path)) for path in out.rglob("*") if path.is_symlink())
    rows = list(csv.DictReader((out / "manifest.csv").open()))
    assert [row["source"] for row in rows] == ["real", "synthetic"]
    assert all((out / row["file"]).is_file() for row in rows)
    assert (out / rows[1]["sample"]).resolve() == (tmp_path / "run/samples/slide-0_001.png").resolve()


@pytest.mark.parametrize("whole", [True, False])
def test_a_set_of_classes(tmp_path, whole):
    """Where every patch has them; else the set has none, since a folder of masks must have each one."""
    data = tmp_path / "data"
    patch = real_patch(data / "MoNuSegTrainingData")
    samples = [write_sample(tmp_path / "run", stem) for stem in ("slide-0_001", "slide-0_002")]
    places = [data / "MoNuSegTrainingData/class_masks/slide-0_000.png"]
    places += [tmp_path / f"run/class_masks/{one.stem}.png" for one in samples[: 1 + whole]]
    for path in places:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.ones((8, 8), np.uint8)).save(path)
    for folder in (data, tmp_path / "run"):
        cell_classes.write_classes(folder, cell_classes.named(["any"]))
    patch = replace(patch, files={**patch.files, "class_masks": places[0]})
    (tmp_path / "out").mkdir()
    assembly.write_set(tmp_path / "out", data, [patch], assembly.name_synthetic(samples, [patch]), copy=False)
    made = sorted(path.stem for path in tmp_path.glob("out/MoNuSegTrainingData/class_masks/*"))
    assert made == (["slide-0_000", "slide-0_100000", "slide-0_100001"] if whole else [])
    assert (tmp_path / "out/classes.json").exists() == whole
    assert len(list_items(str(tmp_path / "out"), "monuseg")) == 3
    assert assembly.without_classes([patch], assembly.name_synthetic(samples, [patch])) == 1 - whole
    if whole:
        cell_classes.write_classes(tmp_path / "run", cell_classes.named(["other"]))
        (tmp_path / "again").mkdir()
        with pytest.raises(ValueError, match="data and .*/run have not the same classes of cells"):
            assembly.write_set(tmp_path / "again", data, [patch], assembly.name_synthetic(samples, [patch]), copy=False)


def test_samples_are_no_smaller_than_patches_and_as_large_as_their_masks(tmp_path):
    real = real_patch(tmp_path / "data")
    large = assembly.name_synthetic([write_sample(tmp_path / "run", "field", size=11)], [])
    assembly.check_sizes(real, large)
    Image.fromarray(np.zeros((9, 11), np.uint16)).save(tmp_path / "run/inst_masks/field.tif")
    with pytest.raises(ValueError, match=r"field.tif is 11 x 9 px, .*field.png 11 x 11: they must be of one size"):
        assembly.check_sizes(real, large)
    small = assembly.name_synthetic([write_sample(tmp_path / "run", "a", size=4)], [])
    with pytest.raises(ValueError, match=r"a.png is 4 x 4 px, real patches 8 x 8"):
        assembly.check_sizes(real, small)
    (tmp_path / "run/samples/a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not an image"):
        assembly.check_sizes(real, small)


def test_kept_files_are_relative_links_that_survive_a_move(tmp_path):
    one, two = (Run(name, tmp_path / "in" / name, [write_sample(tmp_path / "in" / name, "a_000")]) for name in "xy")
    kept = [assembly.Kept(run, run.samples[0], score, 0.5) for run, score in ((one, 1.5), (two, 2.5))]
    folder = tmp_path / "in" / "kept"
    folders, fields = ("images", "labels", "samples", "inst_masks"), ("index", "stem", "s")
    assert not assembly.is_kept(folder)
    files.replace_folder(folder, lambda aside: assembly.write_kept(aside, kept, folders, fields, several=True), "--out")
    assert assembly.is_kept(folder)
    os.rename(tmp_path / "in", tmp_path / "moved")
    moved = tmp_path / "moved" / "kept"
    assert sorted(path.name for path in moved.glob("samples/*")) == ["x__a_000.png", "y__a_000.png"]
    assert all(path.exists() for path in moved.rglob("*")) and not list(moved.glob("labels/*"))
    rows = list(csv.DictReader((moved / "manifest.csv").open()))
    assert [(row["stem"], row["run"], row["score"]) for row in rows] == [
        ("x__a_000", "x", "1.5"),
        ("y__a_000", "y", "2.5"),
    ]
