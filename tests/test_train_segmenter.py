"""The command that trains a segmenter: what it writes, how it goes on, and the mistakes that it names."""

import json

import numpy as np
import pytest
import torch as th
from conftest import write_class_masks, write_patches
from PIL import Image
from test_evaluate import write_run

from guided_diffusion.cell_classes import named, write_classes
from guided_diffusion.histology.segmenter.decoding import load_segmenter
from scripts import assemble_set, train_segmenter

CLASSES = named(["odd", "even"])
QUICK = "--max_steps 4 --batch_size 2 --crop 32 --val_interval 2 --pretrained False --device cpu".split()


@pytest.fixture
def data(tmp_path):
    """Five training slides of four patches each, and two test slides."""
    write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=20)
    write_patches(tmp_path / "data" / "MoNuSegTestData", count=8, first=100)
    return tmp_path / "data"


def train(data, out, *flags):
    train_segmenter.main([str(data), "--results_path", str(out), *QUICK, *flags])


def weights(out):
    return load_segmenter(out, th.device("cpu")).net.state_dict()


def test_a_run_writes_a_segmenter_and_its_story(data, tmp_path, capsys):
    out = tmp_path / "out"
    train(data, out, "--val_share", "0.4")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "result.json", "segmenter.pt"]
    config, result = (json.loads((out / name).read_text()) for name in ("config.json", "result.json"))
    assert (config["steps"], config["crop"], config["seed"], config["images_trained_on"]) == (4, 32, 0, 12)
    assert len(config["slides_held_out"]) == 2 and len(config["slides_trained_on"]) == 3
    assert (result["steps"], [row["step"] for row in result["history"]]) == (4, [2, 4])
    assert {"f1@0.5", "aji", "dice", "loss"} <= result["validation"].keys()
    segmenter = load_segmenter(out, th.device("cpu"))
    assert segmenter.slides == set(config["slides_trained_on"])
    assert segmenter.held_slides == set(config["slides_held_out"])
    printed = capsys.readouterr().out
    assert "4 steps" in printed and printed.count("0.25 (40x) is assumed") == 1
    assert config["mpp"] == segmenter.mpp == 0.25


def test_the_same_command_again_does_nothing(data, tmp_path, capsys):
    train(data, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    train(data, tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    assert "finished before" in capsys.readouterr().out


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_equals_one_that_was_not(data, tmp_path, monkeypatch):
    train(data, tmp_path / "whole")
    usual = train_segmenter.report

    def kill(row):
        if row["step"] == 4:
            raise Killed

    monkeypatch.setattr(train_segmenter, "report", kill)
    with pytest.raises(Killed):
        train(data, tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoint.pt").exists()
    monkeypatch.setattr(train_segmenter, "report", usual)
    train(data, tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(th.equal(whole[name], parts[name]) for name in whole)
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()


def test_what_a_killed_run_had_begun_to_write_goes(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".checkpoint.pt.12.part").touch()
    train(data, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "result.json", "segmenter.pt"]


def test_a_run_killed_before_its_result_is_written_goes_on(data, tmp_path, monkeypatch, capsys):
    usual = train_segmenter.write_json

    def kill(path, content):
        if path.name == "result.json":
            raise Killed
        usual(path, content)

    monkeypatch.setattr(train_segmenter, "write_json", kill)
    with pytest.raises(Killed):
        train(data, tmp_path / "out")
    assert (tmp_path / "out" / "segmenter.pt").exists()
    monkeypatch.setattr(train_segmenter, "write_json", usual)
    monkeypatch.setattr(train_segmenter.Training, "_train_step", None)  # there is nothing left to train
    train(data, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "result.json", "segmenter.pt"]


def test_images_that_have_changed_are_another_run(data, tmp_path):
    train(data, tmp_path / "out")
    path = data / "MoNuSegTrainingData" / "images" / "slide-0_000.png"
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"out was begun with checksum \w+, this run has \w+: give another folder"):
        train(data, tmp_path / "out")


def test_synthetic_patches_are_trained_on_but_not_those_of_held_out_slides(data, tmp_path, capsys):
    train(data, tmp_path / "plain")
    (held,) = json.loads((tmp_path / "plain" / "config.json").read_text())["slides_held_out"]
    other = "slide-0" if held != "slide-0" else "slide-1"
    folder = data / "MoNuSegTrainingData"
    rows = ["stem,source,structure,appearance"]
    for k, (structure, appearance) in enumerate([(other, other), (held, other), (other, held)]):
        for name, suffix in (("images", ".png"), ("inst_masks", ".tif")):
            (folder / name / f"syn_{k:03d}{suffix}").write_bytes((folder / name / f"slide-0_000{suffix}").read_bytes())
        rows.append(f"syn_{k:03d},run,{structure}_001,{appearance}_002")
    (data / "manifest.csv").write_text("\n".join(rows) + "\n")
    train(data, tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert (config["synthetic_trained_on"], config["synthetic_left_out"]) == (1, 2)
    assert config["slides_held_out"] == [held] and held not in config["slides_trained_on"]
    assert "2 synthetic images made from held-out slides are left out" in capsys.readouterr().out


def test_classes_are_learned_of_real_and_synthetic_patches_alike(data, tmp_path, capsys):
    """From a set that assemble_set.py makes of both; a patch without its class mask is refused."""
    results = write_run(tmp_path / "results", count=4)
    for folder, owner in ((data / "MoNuSegTrainingData", data), (results, results)):
        write_class_masks(folder, rare=2)
        write_classes(owner, CLASSES)
    assembled = tmp_path / "set"
    assemble_set.main(
        ["--data_dir", str(data), "--synthetic", str(results), "--results_path", str(assembled), "--ratio", "all"]
    )
    for _ in range(2):
        train(assembled, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "nuclei of 2 classes: odd, even" in printed and "out: finished before" in printed
    config, result = (json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "result.json"))
    assert config["synthetic_trained_on"] > 0 and [row["name"] for row in config["classes"]] == ["odd", "even"]
    assert 0 <= result["validation"]["class_f1"] <= 1
    assert load_segmenter(tmp_path / "out", th.device("cpu")).classes == CLASSES
    (assembled / "MoNuSegTrainingData" / "class_masks" / "slide-1_002.png").unlink()
    with pytest.raises(ValueError, match=r"slide-1_002.png has no mask slide-1_002.\* in .*class_masks"):
        train(assembled, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_too_few_slides_to_hold_one_out_are_reported(tmp_path, capsys):
    write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=8)
    train(tmp_path / "data", tmp_path / "out")
    assert "no slide is held out" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "result.json").read_text())["validation"] is None


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--max_steps 0", "--max_steps 0"),
        ("--minutes 0", "--minutes 0"),
        ("--minutes nan", "--minutes nan"),
        ("--crop 40", "--crop 40 must be a multiple of 16"),
        ("--adapt 2", "--adapt 2.0 must lie in"),
        ("--crop 48", "--crop 48 is larger than slide"),
        ("--lr -1", "--lr -1"),
        ("--batch_size 1", "--batch_size 1"),
        ("--synthetic_first 1", "--synthetic_first 1.0 must be in"),
        ("--synthetic_first 0.5 --minutes 1", "goes without --minutes"),
        ("--synthetic_first 0.5", "take images of both kinds"),
        ("--real_last 1", "--real_last 1.0 must be in"),
        ("--synthetic_first 0.5 --real_last 0.2", "both say when real images come alone"),
        ("--precision fp8", "unknown --precision fp8"),
        ("--val_share 1", "--val_share 1.0"),
        ("--val_share 0.95", "leaves no training slide"),
        ("--device abacus", "--device abacus"),
        ("--no_such_flag 1", "no_such_flag"),
    ],
)
def test_flags_out_of_range_are_named(data, tmp_path, flags, what):
    with pytest.raises(ValueError, match=what):
        train(data, tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


def remove(path):
    return lambda data: (data / "MoNuSegTrainingData" / path).unlink()


def resize_mask(data):
    Image.fromarray(np.ones((30, 32), np.int32)).save(data / "MoNuSegTrainingData" / "inst_masks" / "slide-1_002.tif")


def float_mask(data):
    Image.fromarray(np.ones((32, 32), np.float32)).save(data / "MoNuSegTrainingData" / "inst_masks" / "slide-1_002.tif")


def no_nuclei(data):
    for path in (data / "MoNuSegTrainingData" / "inst_masks").iterdir():
        Image.fromarray(np.zeros((32, 32), np.int32)).save(path)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (remove("inst_masks/slide-1_002.tif"), "slide-1_002.png has no mask"),
        (remove("images/slide-1_002.png"), "slide-1_002.tif has no image"),
        (resize_mask, "32 x 30 px but .*32 x 32 px"),
        (float_mask, "floating-point numbers"),
        (no_nuclei, "shows no nucleus"),
        (lambda data: write_patches(data / "MoNuSegTestData", count=4), "slide slide-0 of .* is trained on"),
        (
            lambda data: (data / "prepare.json").write_text('{"complete": false}'),
            "DATA .* not prepared to the end: run",
        ),
        (lambda data: (data / "MoNuSegTrainingData").rename(data / "other"), "has no MoNuSegTrainingData"),
    ],
)
def test_data_that_cannot_be_used_are_named(data, tmp_path, damage, what):
    damage(data)
    with pytest.raises((ValueError, FileNotFoundError), match=what):
        train(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run_is_refused(data, tmp_path):
    out = tmp_path / "out"
    train(data, out)
    with pytest.raises(ValueError, match=r"begun with lr 0\.002, this run has 0\.1"):
        train(data, out, "--lr", "0.1")
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds segmenter\.pt of an unknown run"):
        train(data, out)
    with pytest.raises(ValueError, match="is a file"):
        train(data, out / "segmenter.pt")
    with pytest.raises(ValueError, match="is DATA itself"):
        train(data, data)


def test_a_broken_checkpoint_is_refused(data, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(row):
        if row["step"] == 4:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train_segmenter, "report", stop)
        train(data, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is broken"):
        train(data, tmp_path / "out")
