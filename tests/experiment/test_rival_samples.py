"""What synthetic patches are held against: results folders that assemble_set.py takes, of what they should be."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import write_patches
from PIL import Image

from guided_diffusion import cli
from guided_diffusion.histology.segmenter.data import training_pairs
from guided_diffusion.histology.segmenter.decoding import as_content, instances, load_segmenter
from guided_diffusion.histology.segmenter.net import seeded_net
from guided_diffusion.histology.segmenter.pseudo import confident
from guided_diffusion.images import list_items
from guided_diffusion.stains import colour_statistics
from scripts import assemble_set
from scripts.experiment import rival_samples, subset_slides


@pytest.fixture
def split(tmp_path):
    """Two of five slides, of four patches each."""
    write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=20)
    subset_slides.main([str(tmp_path / "data"), str(tmp_path / "split"), "--subsample", "0.4", "--val_share", "0"])
    return tmp_path / "split"


def make(kind, split, count, *flags, name=""):
    out = split.parent / (name or kind)
    rival_samples.main([kind, str(split), "--results_path", str(out), "--count", str(count), *map(str, flags)])
    with open(out / "manifest.csv", newline="") as file:
        return out, list(csv.DictReader(file))


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_patches_of_unseen_slides_have_their_own_masks(split):
    out, rows = make("unseen", split, 6)
    unseen = {item.stem: item for item in list_items(str(split / "others"), "monuseg")}
    assert len(rows) == 6 and len({row["structure_slide"] for row in rows}) == 3
    for row in rows:
        assert os.path.samefile(out / f"samples/{row['stem']}.png", unseen[row["stem"]].image)
        assert os.path.samefile(out / f"inst_masks/{row['stem']}.tif", unseen[row["stem"]].inst_mask)
    assert len(make("unseen", split, 99, name="all")[1]) == 12


def test_transferred_patches_have_other_slides_colours(split):
    out, rows = make("transfer", split, 20)
    seen = {item.slide: [] for item in list_items(str(split / "seen"), "monuseg")}
    assert {row["structure_slide"] for row in rows} == set(seen)
    assert len({(row["structure"], row["appearance_slide"]) for row in rows}) == 20  # no pair twice
    assert not {row["appearance_slide"] for row in rows} & set(seen)
    lent = {}
    for path in sorted((split / "unlabelled").glob("*.png")):
        lent.setdefault(path.stem.rpartition("_")[0], []).append(read(path))
    # What a slide's patches became has, all together, the mean colours of the slide that lent them.
    (slide, target), *_ = {
        (row["structure_slide"], row["appearance_slide"]) for row in rows if row["stem"].endswith("_000")
    }
    own = [row for row in rows if (row["structure_slide"], row["appearance_slide"]) == (slide, target)]
    for row in own:
        mask = split / "seen/MoNuSegTrainingData/inst_masks" / f"{Path(row['structure']).stem}.tif"
        assert os.path.samefile(out / f"inst_masks/{row['stem']}.tif", mask)
    found = colour_statistics([read(out / f"samples/{row['stem']}.png") for row in own])
    original = colour_statistics([read(split / "seen/MoNuSegTrainingData/images" / row["structure"]) for row in own])
    wanted = colour_statistics(lent[target])
    assert np.abs(found[0] - wanted[0]).max() < np.abs(original[0] - wanted[0]).max()


def test_pseudo_labels_are_what_a_segmenter_is_sure_of(split, tmp_path):
    net = seeded_net()
    with th.no_grad():
        net.head.weight[:4] *= 30  # of chance weights, it says nucleus in many places
    th.save(as_content(net, ["slide-0"]), tmp_path / "segmenter.pt")
    flags = ("--model_path", tmp_path / "segmenter.pt", "--device", "cpu")
    out, rows = make("pseudo", split, 5, *flags)
    segmenter = load_segmenter(tmp_path / "segmenter.pt", th.device("cpu"))
    for row in rows:
        maps = segmenter.predict(read(split / "unlabelled" / row["structure"]))
        kept, ignored = confident(maps.probability, instances(maps.probability, maps.position, segmenter.mpp))
        assert np.array_equal(read(out / f"inst_masks/{row['stem']}.tif"), kept)
        assert np.array_equal(read(out / f"ignore_masks/{row['stem']}.png") > 0, ignored)
        assert os.path.samefile(out / f"samples/{row['stem']}.png", split / "unlabelled" / row["structure"])
    before = {path: path.lstat().st_mtime_ns for path in out.rglob("*.*") if path.name != "manifest.csv"}
    (out / "inst_masks" / f"{rows[0]['stem']}.tif").unlink()  # as a kill leaves it
    make("pseudo", split, 5, *flags)
    after = {path: path.lstat().st_mtime_ns for path in before}
    assert {path.stem for path in before if before[path] != after[path]} == {rows[0]["stem"]}
    # A segmenter learns from them, but is not chosen by them.
    assemble_set.main(
        ["--data_dir", str(split), "--synthetic", str(out), "--results_path", str(tmp_path / "set"), "--ratio", "all"]
    )
    pairs = training_pairs(tmp_path / "set")
    assert [pair.synthetic for pair in pairs].count(True) == 5 == sum(pair.ignored is not None for pair in pairs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gan split", "unknown KIND gan"),
        ("unseen split --model_path m.pt", "unseen with --model_path m.pt"),
        ("pseudo split", "pseudo with --model_path None"),
        ("unseen data", "SPLIT data has no seen/"),
        ("unseen all", "SPLIT all has no unlabelled/"),
        ("unseen split --count 0", "--count 0 must be at least 1"),
    ],
)
def test_mistakes(split, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    subset_slides.main(["data", "all", "--subsample", "1", "--val_share", "0"])
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: rival_samples.main(["--count", "2", *words.split(), "--results_path", "out"]))
    assert stop.value.code == 2 and message in capsys.readouterr().err and not Path("out").exists()
