"""A share of the slides as a data folder of its own."""

import csv
import re
from pathlib import Path

import pytest
from conftest import write_patches

from guided_diffusion import cell_classes, cli, magnification
from guided_diffusion.histology.features import cluster_folders
from guided_diffusion.histology.features.cluster_folders import list_patches
from guided_diffusion.histology.segmenter.data import hold_out, training_pairs
from guided_diffusion.images import list_images, list_items
from scripts.experiment import subset_slides


@pytest.fixture
def data(tmp_path):
    write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=20)  # five slides
    write_patches(tmp_path / "data" / "MoNuSegTestData", count=4, first=100)
    return tmp_path / "data"


def subset(data, out, percent, seed=0):
    subset_slides.main([str(data), str(out), "--percent", str(percent), "--seed", str(seed)])
    return {item.slide for item in list_items(str(out), "monuseg")}


def test_shares_are_nested_whole_slides(data, tmp_path):
    everything, some, one = (subset(data, tmp_path / f"p{percent}", percent) for percent in (100, 60, 1))
    assert len(everything) == 5 and len(some) == 3 and len(one) == 1 and one < some < everything
    assert len(list_items(str(tmp_path / "p60"), "monuseg")) == 12
    assert len(list_items(str(tmp_path / "p60"), "monuseg", is_train=False)) == 4
    assert len({frozenset(subset(data, tmp_path / f"s{seed}", 40, seed)) for seed in range(6)}) > 1


def test_a_share_says_the_magnification(data, tmp_path):
    (data / "prepare.json").write_text('{"mpp": 0.5}')
    for _ in range(2):
        subset(data, tmp_path / "out", 40)
        assert magnification.of_data(tmp_path / "out") == 0.5


def test_a_share_has_the_classes(data, tmp_path):
    classes = cell_classes.named(["small", "large"])
    cell_classes.write_classes(data, classes)
    for _ in range(2):
        subset(data, tmp_path / "other" / "out", 40)
        assert cell_classes.read_classes(tmp_path / "other" / "out") == classes


def test_links_are_relative_and_a_second_run_changes_nothing(data, tmp_path):
    subset(data, tmp_path / "out", 40)
    links = {path: path.readlink() for path in (tmp_path / "out").rglob("*") if path.is_symlink()}
    assert len(links) == 3 * 8 + 1 and not any(target.is_absolute() for target in links.values())
    subset(data, tmp_path / "out", 40)
    assert {path: path.readlink() for path in links} == links


def test_what_segmenters_are_chosen_by_is_seen_by_nothing_else(data, tmp_path):
    flags = ["--subsample", "0.8", "--seed", "3", "--val_share", "0.5"]
    subset_slides.main([str(data), str(tmp_path / "out"), *flags])
    pairs = training_pairs(tmp_path / "out")
    train, held, _ = hold_out(pairs, 0.5, 3)
    seen = list_items(str(tmp_path / "out/seen"), "monuseg")
    assert len(held) == 8 and {item.stem for item in seen} == {pair.stem for pair in train}
    assert {item.stem for item in list_items(str(tmp_path / "out/held"), "monuseg")} == {pair.stem for pair in held}
    colours = list_images(str(tmp_path / "out/colours"), "--appearance_dir")
    kept_out = {slide for pair in held for slide in pair.slides}
    assert len(colours) == 20 - 8 and not kept_out & {image.slide for image in colours}
    subset_slides.main([str(data), str(tmp_path / "all"), *flags[:-1], "0"])
    assert len(list_items(str(tmp_path / "all/seen"), "monuseg")) == 16 and not (tmp_path / "all/held").exists()


def table(folder):
    """split.csv: column -> the files, and the slides, that have a 1 there."""
    with open(folder / "split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        role: tuple({row[what] for row in rows if row[role] == "1"} for what in ("file", "slide"))
        for role in subset_slides.ROLES
    }


@pytest.mark.parametrize("track", subset_slides.TRACKS)
def test_the_parts_of_a_cell_are_apart(data, tmp_path, track):
    flags = ["--track", track, "--subsample", "0.6", "--seed", "3", "--val_share", "0.5"]
    if track == "patches":
        patches = list_patches(data)
        own = [patch for patch in patches if patch.split == "MoNuSegTrainingData" and int(patch.stem[-3:]) < 3]
        entries = cluster_folders.plan(patches, ["big" if patch in own else "0" for patch in patches], {})
        cluster_folders.write_clusters(data / "clusters", entries, {})
        flags += ["--clusters", str(data / "clusters")]
    subset_slides.main([str(data), str(tmp_path / "out"), *flags])
    roles = table(tmp_path / "out")
    files, slides = ({role: found[k] for role, found in roles.items()} for k in (0, 1))
    # Held-out and test slides are seen by nothing that is trained, and lend nothing.
    for role in roles.keys() - {"held_out", "tested"}:
        assert not slides[role] & (slides["held_out"] | slides["tested"]), role
    assert slides["held_out"] and not slides["held_out"] & slides["tested"] and len(files["tested"]) == 4
    # Of what has no masks, none is seen with one; synthetic structures are of the segmenter's own patches.
    assert files["structures"] == files["segmenter"] and not files["unlabelled"] & files["segmenter"]
    everything = files["segmenter"] | files["unlabelled"]
    assert files["generator_masks"] == (everything if track == "patches" else files["segmenter"])
    assert files["generator_images"] == (files["unlabelled"] if track == "masks" else set())
    assert files["colours"] == (files["segmenter"] if track == "slides" else everything)
    if track == "patches":
        # Six tenths of the cluster's 15, of all slides, but for those of slides that are held out.
        kept = {item.stem for item in list_items(str(tmp_path / "out"), "monuseg")}
        assert len(kept) == 9 and kept <= {patch.stem for patch in own}
    else:
        assert not slides["unlabelled"] & slides["segmenter"]
    # The folders are what the table says.
    for folder, role in (("seen", "segmenter"), ("held", "held_out"), ("others", "unlabelled"), ("generator", "")):
        there = tmp_path / "out" / folder
        found = (
            {f"MoNuSegTrainingData/images/{item.stem}.png" for item in list_items(str(there), "monuseg")}
            if there.exists()
            else set()
        )
        assert found == (files[role] if role else everything if track == "patches" else set()), folder
    for folder, wanted in (("unlabelled", files["unlabelled"]), ("colours", everything)):
        assert {path.name for path in (tmp_path / "out" / folder).glob("*.png")} == {Path(f).name for f in wanted}


def test_a_share_chooses_what_its_per_cents_do(data, tmp_path):
    subset_slides.main([str(data), str(tmp_path / "share"), "--subsample", "0.29"])
    subset(data, tmp_path / "percent", 29)
    names = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in ("share", "percent")]
    assert names[0] == names[1] and subset_slides.per_cent("0.29") == 29


@pytest.mark.parametrize(
    ("name", "percent", "message"),
    [("out", 0, "--subsample 0 must"), ("out", 101, "--subsample 1.01 must"), ("data", 40, "OUT .*data (holds|is)")],
)
def test_mistakes(data, tmp_path, capsys, name, percent, message):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: subset(data, tmp_path / name, percent))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_links_to_another_data_folder_are_refused(data, tmp_path):
    subset(data, tmp_path / "out", 100)
    other = data.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"OUT: .*/out/.* does not lead to .*moved/.*, but .*: give a new folder"):
        subset(other, tmp_path / "out", 100)


def test_another_choice_does_not_mix(data, tmp_path):
    subset(data, tmp_path / "out", 60)
    with pytest.raises(ValueError, match="which is not of this choice"):
        subset(data, tmp_path / "out", 20)
