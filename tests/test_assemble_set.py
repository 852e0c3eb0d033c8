"""assemble_set.py: a data folder that training reads, where every patch came from, and what is refused."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_patches
from PIL import Image
from test_cards import table
from test_evaluate import write_run

from guided_diffusion import cli
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.files import write_json
from guided_diffusion.image_datasets import load_dataset
from scripts import assemble_set

TRAIN = "MoNuSegTrainingData"


@pytest.fixture
def synthetic(tmp_path):
    return write_run(tmp_path / "results", count=8)


def assemble(data, synthetic, out, *flags):
    arguments = ["--data_dir", data, "--synthetic", synthetic, "--results_path", out, *(flags or ("--ratio", 0.5))]
    assemble_set.main([*map(str, arguments)])
    return list(csv.DictReader((out / "manifest.csv").open()))


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_the_set_is_a_data_dir(data_dir, synthetic, tmp_path, capsys):
    out = tmp_path / "set"
    rows = assemble(data_dir, synthetic, out)
    made, of = capsys.readouterr().out.splitlines()
    assert made == f"{out}: 8 real and 4 synthetic training patches"
    assert re.fullmatch("of [1-4] structures, [1-4] appearances, 4 triples", of)
    spec = ConditionSpec(num_classes=6, use_hv_map=True, use_col_map=True)
    arguments = dict(data_dir=str(out), dataset_mode="monuseg", image_size=32, spec=spec)
    loaded = load_dataset(**arguments)
    assert len(loaded) == 12 and len(load_dataset(**arguments, is_train=False)) == 4
    assert loaded[(0, 11)][0].shape == (3, 32, 32)
    assert len(rows) == 12 and {row["stem"] for row in rows} == {item.stem for item in loaded.items}
    made = [row for row in rows if row["source"] == "synthetic"]
    slides = {item.stem: item.slide for item in loaded.items}
    for row in made:
        assert slides[row["stem"]] == row["slide"] == Path(row["appearance"]).stem.rpartition("_")[0]
        assert row["structure"].endswith("_000.png") and row["s"] == "1.5" and row["seed"] == "0"
        assert row["checkpoint"] == "run/ema_0.99_000100.pt" and row["score"] == ""
        source = out / row["sample"]
        assert np.array_equal(Image.open(out / row["file"]), Image.open(source))
        mask = np.asarray(Image.open(out / TRAIN / "inst_masks" / f"{row['stem']}.tif"))
        assert np.array_equal(mask, Image.open(source.parents[1] / "inst_masks" / f"{source.stem}.tif"))


def test_what_is_not_known_of_a_sample_comes_along(data_dir, synthetic, tmp_path):
    (synthetic / "ignore_masks").mkdir()
    source = sorted((synthetic / "labels").iterdir())[0]
    shutil.copy(source, synthetic / "ignore_masks")
    made = assemble(data_dir, synthetic, tmp_path / "set", "--ratio", "all")
    (stem,) = [row["stem"] for row in made if Path(row["sample"]).stem == source.stem]
    (link,) = (tmp_path / "set" / TRAIN / "ignore_masks").iterdir()
    assert link.name == f"{stem}.png" and link.read_bytes() == source.read_bytes()


def test_what_is_not_known_of_a_real_patch_comes_along(data_dir, synthetic, tmp_path):
    (data_dir / TRAIN / "ignore_masks").mkdir()
    source = sorted((data_dir / TRAIN / "images").iterdir())[1]
    shutil.copy(source, data_dir / TRAIN / "ignore_masks")
    assemble(data_dir, synthetic, tmp_path / "set")
    (link,) = (tmp_path / "set" / TRAIN / "ignore_masks").iterdir()
    assert link.name == source.name and link.resolve() == data_dir / TRAIN / "ignore_masks" / source.name


@pytest.mark.parametrize("part", ["structure", "appearance"])
def test_what_is_made_of_a_test_slide_is_refused(data_dir, synthetic, tmp_path, part):
    for path in (data_dir / "MoNuSegTestData").glob("*/*"):
        path.rename(path.with_stem(path.stem.replace("slide-", "tested-")))
    manifest = synthetic / "manifest.csv"
    name = {"structure": "slide-3_000", "appearance": "slide-3_001"}[part]
    manifest.write_text(manifest.read_text().replace(name, "tested-25_000"))
    with pytest.raises(ValueError, match=r"s[37]_000.png is made of tested-25, a test slide of --data_dir"):
        assemble(data_dir, synthetic, tmp_path / "set", "--ratio", "all")
    assert not (tmp_path / "set").exists()


def test_the_card_says_what_there_is(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # manifests name checkpoints as they were given
    for name in ("run", "evaluation"):
        (tmp_path / name).mkdir()
    kept = write_run(tmp_path / "filtered" / "kept", count=8, checkpoint="ema_1.pt")
    header, *rows = (kept / "manifest.csv").read_text().splitlines()
    lines = [f"{header},run,sample,score,weight", *(f"{row},r,s{k},0,1" for k, row in enumerate(rows))]
    (kept / "manifest.csv").write_text("\n".join(lines) + "\n")
    write_json(tmp_path / "filtered" / "report.json", {"kept": 8, "synthetic": 10, "auroc": 0.625})
    write_json(tmp_path / "run" / "config.json", {"data_licence": "CC BY-NC-SA 4.0"})
    evaluation = {"runs": {"kept": {"copies": 0.125}}, "floor": {"copies": 0.01}}
    write_json(tmp_path / "evaluation" / "metrics.json", evaluation)
    assemble(data_dir, kept, tmp_path / "set", "--ratio", "1", "--evaluation", tmp_path / "evaluation")
    told = table((tmp_path / "set" / "card.md").read_text())
    assert told["training"].startswith("8 real patches of 2 slides, and 8 synthetic ones")
    assert told["test"] == "4 real patches of 1 slides" and told["size"] == "32 x 32 px" and told["classes"] == "none"
    assert told["made by"] == "ema_1.pt (s = 1.5)" and told["licence of the models' data"] == "CC BY-NC-SA 4.0"
    assert told["filter"] == "kept 8 of 10 samples, AUROC 0.625"
    assert told["copies"] == "12.5% of kept look like a training patch; of real patches of the same slides 1.0% do"
    (tmp_path / "run" / "config.json").unlink()
    assemble(data_dir, kept, tmp_path / "set", "--ratio", "1")
    told = table((tmp_path / "set" / "card.md").read_text())
    assert told["copies"] == "not looked for" and told["licence of the models' data"] == "unknown"
    with pytest.raises(ValueError, match="--evaluation .*metrics.json says nothing of copies"):
        assemble(data_dir, kept, tmp_path / "new", "--ratio", "1", "--evaluation", tmp_path / "run")
    assert not (tmp_path / "new").exists()
    write_json(tmp_path / "filtered" / "report.json", {"kept": 8})
    with pytest.raises(ValueError, match="report.json is not what filter_ood.py wrote: run it again"):
        assemble(data_dir, kept, tmp_path / "other", "--ratio", "1")
    assert not (tmp_path / "other").exists()


def test_the_real_files_are_the_real_files(data_dir, synthetic, tmp_path):
    assemble(data_dir, synthetic, tmp_path / "set")
    made, real = snapshot(tmp_path / "set"), snapshot(data_dir)
    assert all(made[name] == content for name, content in real.items() if name.startswith(TRAIN))
    assert (tmp_path / "set" / "MoNuSegTestData").resolve() == (data_dir / "MoNuSegTestData").resolve()


@pytest.mark.parametrize(("ratio", "count"), [("1", 8), ("0.2", 2), ("all", 8), ("1.2", 8)])
def test_ratios(data_dir, synthetic, tmp_path, capsys, ratio, count):
    rows = assemble(data_dir, synthetic, tmp_path / "set", "--ratio", ratio)
    assert sum(row["source"] == "synthetic" for row in rows) == count
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines == ["--ratio 1.2 asks for 10 synthetic patches; there are 8"] * (ratio == "1.2")
    record = json.loads((tmp_path / "set" / "assemble.json").read_text())
    assert record["distinct"]["triples"] == count


def test_what_a_sweep_repeats_is_taken_once(data_dir, tmp_path, capsys):
    """Two folders of equal conditions and noise, as --same_noise True makes them."""
    for s in ("1", "1.5"):
        write_run(tmp_path / "sweep" / f"s{s}", count=8, s=s)
    rows = assemble(data_dir, tmp_path / "sweep", tmp_path / "set", "--ratio", "2")
    assert sum(row["source"] == "synthetic" for row in rows) == 8
    assert {row["s"] for row in rows if row["source"] == "synthetic"} == {"1", "1.5"}
    assert capsys.readouterr().out.splitlines()[1:] == [
        "of 4 structures, 4 appearances, 8 triples",
        "--ratio 2 asks for 16 synthetic patches; there are 8; the others of 16 repeat one, or weigh 0",
    ]


def test_a_filter_that_kept_nothing_is_named(data_dir, synthetic, tmp_path):
    kept = tmp_path / "filtered" / "kept"
    for name in ("samples", "inst_masks"):
        (kept / name).mkdir(parents=True)
    (kept / "manifest.csv").write_text("index,stem,run,sample,score,weight\n")
    with pytest.raises(
        ValueError, match="filtered/kept is empty: the filter kept no sample, see .*filtered/report.json"
    ):
        assemble(data_dir, kept, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_copy_stands_alone_and_runs_repeat(data_dir, synthetic, tmp_path):
    flags = ("--ratio", 0.5, "--copy", True)
    assemble(data_dir, synthetic, tmp_path / "set", "--ratio", 1)
    assemble(data_dir, synthetic, tmp_path / "set", *flags)
    first = snapshot(tmp_path / "set")
    assemble(data_dir, synthetic, tmp_path / "set", *flags)
    assert snapshot(tmp_path / "set") == first
    assert not any(path.is_symlink() for path in (tmp_path / "set").rglob("*"))
    shutil.rmtree(synthetic)
    assert snapshot(tmp_path / "set") == first


def broken_link(data, synthetic):
    (synthetic / "samples/s0_000.png").unlink()
    (synthetic / "samples/s0_000.png").symlink_to("nowhere.png")


def broken_real(data, synthetic):
    (data / TRAIN / "images/slide-0_000.png").unlink()
    (data / TRAIN / "images/slide-0_000.png").symlink_to("nowhere.png")


def no_samples(data, synthetic):
    shutil.rmtree(synthetic / "samples")
    (synthetic / "samples").mkdir()


def no_mask(data, synthetic):
    (synthetic / "inst_masks/s0_000.tif").unlink()


def no_training(data, synthetic):
    shutil.rmtree(data / TRAIN)


def empty_training(data, synthetic):
    for path in (data / TRAIN).rglob("*.*"):
        path.unlink()


def no_instances(data, synthetic):
    shutil.rmtree(data / TRAIN / "inst_masks")


def foreign(data, synthetic):
    (data.parent / "set").mkdir()
    (data.parent / "set" / "mine").touch()


def half_prepared(data, synthetic):
    (data / "prepare.json").write_text('{"complete": false}')


CASES = [
    (half_prepared, "--ratio 1", "data is not prepared to the end: run prepare_monuseg.py again"),
    (None, "--ratio 0", "--ratio 0: give a number above 0"),
    (None, "--ratio -1", "--ratio -1"),
    (None, "--ratio nan", "--ratio nan"),
    (None, "--ratio some", "--ratio some"),
    (None, "--ratio 0.01", "--ratio 0.01 takes none of the 8 samples in --synthetic: give more"),
    (None, "--ratio 1 --weighted True", "has no weight"),
    (None, "--ratio 1 --seed -1", "--seed -1"),
    (None, "--ratio 1 --synthetic missing", "missing is not a folder"),
    (None, "--ratio 1 --results_path data/set", "lies in the input"),
    (None, "--ratio 1 --results_path results", "lies in the input"),
    (None, "--ratio 1 --results_path .", "would replace the input"),
    (broken_link, "--ratio 1", "s0_000.png is a link that leads nowhere"),
    (broken_real, "--ratio 1", "slide-0_000.png is a link that leads nowhere"),
    (no_samples, "--ratio 1", "holds no .png"),
    (no_mask, "--ratio 1", "has no mask"),
    (no_training, "--ratio 1", "has no MoNuSegTrainingData/images"),
    (empty_training, "--ratio 1", "holds no image"),
    (no_instances, "--ratio 1", "has no MoNuSegTrainingData/inst_masks"),
    (foreign, "--ratio 1", "did not make"),
]


@pytest.mark.parametrize(("damage", "flags", "message"), CASES)
def test_bad_input_leaves_no_trace(data_dir, synthetic, tmp_path, monkeypatch, damage, flags, message):
    monkeypatch.chdir(tmp_path)
    if damage:
        damage(data_dir, synthetic)
    before = snapshot(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        assemble_set.main(["--data_dir", "data", "--synthetic", "results", "--results_path", "set", *flags.split()])
    assert "\n" not in str(caught.value) and snapshot(tmp_path) == before


def test_patches_of_another_size_are_refused(data_dir, tmp_path):
    write_patches(data_dir / "MoNuSegTestData", count=1, first=40)
    with pytest.raises(ValueError, match="16 x 16 px, real patches 32 x 32"):
        assemble(data_dir, write_run(tmp_path / "small", count=2, size=16), tmp_path / "set", "--ratio", 0.2)


def test_one_line_and_exit_2(data_dir, synthetic, tmp_path, capsys):
    flags = [
        "--data_dir",
        str(data_dir),
        "--synthetic",
        str(synthetic),
        "--results_path",
        str(tmp_path / "set"),
        "--ratio",
        "0",
    ]
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: assemble_set.main(flags))
    said = capsys.readouterr()
    assert left.value.code == 2 and said.err.startswith("error: --ratio 0") and said.err.count("\n") == 1
    assert not said.out and not (tmp_path / "set").exists()
