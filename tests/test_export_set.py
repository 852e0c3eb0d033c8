"""export_set.py: every kind of set in every layout, where each picture came from, and what is refused."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_patch, write_images
from PIL import Image
from test_assemble_set import assemble, snapshot
from test_evaluate import write_run
from test_image_sample import model_path, run  # noqa: F401

from guided_diffusion import cell_classes, cli
from guided_diffusion.histology.assembly import Kept, write_kept
from guided_diffusion.histology.evaluation.runs import find_runs
from guided_diffusion.histology.formats.writers.layouts import LAYOUTS
from guided_diffusion.image_files import read_image, read_inst_mask, read_mask
from guided_diffusion.results import FOLDERS, MANIFEST_FIELDS
from scripts import export_set, import_dataset

TRAIN = "MoNuSegTrainingData"


def export(folder, out, *flags, layout="cellpose", workers=1):
    export_set.main([*map(str, (folder, out, "--format", layout, "--num_workers", workers, *flags))])
    return list(csv.DictReader((out / "manifest.csv").open(encoding="utf-8")))


def add_classes(folder, table=True):
    """Have every nucleus beside folder's inst_masks one of two classes."""
    (folder / "class_masks").mkdir()
    for path in (folder / "inst_masks").iterdir():
        inst = read_inst_mask(path)
        Image.fromarray(np.where(inst, inst % 2 + 1, 0).astype(np.uint8)).save(
            folder / "class_masks" / f"{path.stem}.png"
        )
    if table:
        cell_classes.write_classes(folder, cell_classes.named(["odd", "even"]))


@pytest.fixture
def results(tmp_path):
    return write_run(tmp_path / "results", count=4)


@pytest.fixture(scope="module", params=[True, False], ids=["classes", "no classes"])
def told_and_large(request, tmp_path_factory):
    """Whether classes are told apart, and a results folder of pictures that are large enough for HoVer-Net."""
    folder = write_run(tmp_path_factory.mktemp("large") / "results", count=4, size=256)
    if request.param:
        add_classes(folder)
    return request.param, folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_results_folder_in_every_layout(told_and_large, tmp_path, capsys, layout):
    (told, results), out = told_and_large, tmp_path / "out"
    rows = export(results, out, layout=layout)
    inst = {path.stem: read_inst_mask(path) for path in (results / "inst_masks").iterdir()}
    nuclei = {stem: np.unique(mask[mask > 0]) for stem, mask in inst.items()}
    assert {row["stem"] for row in rows} == set(inst) and len({row["file"] for row in rows}) == 4
    for row in rows:
        assert (row["split"], row["source"], row["s"], row["steps"]) == ("train", "synthetic", "1.5", "5")
        assert row["slide"] == row["structure_slide"] == Path(row["appearance"]).stem[:-4]
        assert row["structure"].startswith("data/slide-") and row["checkpoint"] == "run/ema_0.99_000100.pt"
        ids = nuclei[row["stem"]]
        assert int(row["nuclei"]) == len(ids)
        if told:
            assert int(row["nuclei_odd"]) == sum(ids % 2 == 0) and int(row["nuclei_even"]) == sum(ids % 2)
        shard, _, member = row["file"].partition(".tar/")
        assert (out / (f"{shard}.tar" if member else row["file"])).is_file()
    assert (out / "classes.json").exists() == told
    record = json.loads((out / "export.json").read_text())
    assert record["format"] == layout and record["images"] == 4
    total = sum(map(len, nuclei.values()))
    said = capsys.readouterr()
    assert said.out.startswith(f"{out}: 4 train images with {total} nuclei, as {layout}\n")
    assert "writing: 100%" in said.err


def test_pictures_and_masks_are_those_of_the_set(results, tmp_path):
    for row in export(results, tmp_path / "out"):
        image = tmp_path / "out" / row["file"]
        assert np.array_equal(read_image(image), read_image(results / "samples" / f"{row['stem']}.png"))
        mask = read_inst_mask(image.with_name(f"{image.stem}_masks.tif"))
        assert np.array_equal(mask, read_inst_mask(results / "inst_masks" / f"{row['stem']}.tif"))


def test_an_assembled_set_keeps_its_splits_and_sources(data_dir, results, tmp_path, capsys):
    (data_dir / "prepare.json").write_text('{"mpp": 0.5}')
    told = {row["file"]: row for row in assemble(data_dir, results, tmp_path / "set", "--ratio", "all")}
    capsys.readouterr()
    rows = export(tmp_path / "set", tmp_path / "out")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: 12 train and 4 test images with ")
    assert [row["source"] for row in rows].count("synthetic") == 4
    assert {row["file"] for row in rows if row["split"] == "test"} == {f"test/slide-25_{k:03d}.png" for k in range(4)}
    assert {row["slide"] for row in rows if row["split"] == "test"} == {"slide-25"}
    for row in rows[:12]:
        before = told[f"{TRAIN}/images/{row['stem']}.png"]
        assert all(row[name] == value for name, value in before.items() if name != "file")
        assert np.array_equal(read_image(tmp_path / "out" / row["file"]), read_image(tmp_path / "set" / before["file"]))
    assert json.loads((tmp_path / "out" / "export.json").read_text())["mpp"] == 0.5
    assert (tmp_path / "out" / "card.md").read_bytes() == (tmp_path / "set" / "card.md").read_bytes()


def test_an_assembled_set_keeps_its_classes(data_dir, results, tmp_path):
    add_classes(results)
    for split in (TRAIN, "MoNuSegTestData"):
        add_classes(data_dir / split, table=False)
    cell_classes.write_classes(data_dir, cell_classes.named(["odd", "even"]))
    assemble(data_dir, results, tmp_path / "set", "--ratio", "all")
    for row in export(tmp_path / "set", tmp_path / "out"):
        mask = read_inst_mask(tmp_path / f"out/{row['split']}/{row['stem']}_masks.tif")
        classes = read_mask(tmp_path / f"out/class_masks/{row['split']}/{row['stem']}.png")
        assert np.array_equal(classes, np.where(mask, mask % 2 + 1, 0))


def test_what_a_filter_kept_keeps_its_classes(results, tmp_path):
    add_classes(results)
    [run] = find_runs([results])
    (tmp_path / "kept").mkdir()
    folders = (*FOLDERS, cell_classes.FOLDER)
    write_kept(tmp_path / "kept", [Kept(run, run.samples[0], 1.5, 0.25)], folders, MANIFEST_FIELDS)
    cell_classes.write_classes(tmp_path / "kept", cell_classes.named(["odd", "even"]))
    export(tmp_path / "kept", tmp_path / "out", layout="coco")
    (categories,) = {
        str(json.loads(path.read_text())["categories"]) for path in (tmp_path / "out/annotations").iterdir()
    }
    assert "odd" in categories and "even" in categories


def test_what_a_filter_kept_keeps_its_scores(results, tmp_path):
    [run] = find_runs([results])
    (tmp_path / "kept").mkdir()
    kept = [Kept(run, sample, 1.5, 0.25) for sample in run.samples[:2]]
    write_kept(tmp_path / "kept", kept, FOLDERS, MANIFEST_FIELDS)
    rows = export(tmp_path / "kept", tmp_path / "out")
    assert [(row["run"], row["score"], row["weight"]) for row in rows] == [("results", "1.5", "0.25")] * 2


def test_what_a_filter_kept_of_test_structures_stays_for_testing(results, tmp_path):
    (results / "run.json").write_text('{"use_train": false, "structure_dir": "", "mpp": 0.5}')
    [run] = find_runs([results])
    (tmp_path / "ood" / "kept").mkdir(parents=True)
    write_kept(tmp_path / "ood" / "kept", [Kept(run, run.samples[0], 1.5, 0.25)], FOLDERS, MANIFEST_FIELDS)
    [row] = export(tmp_path / "ood" / "kept", tmp_path / "out")
    assert row["split"] == "test"
    assert json.loads((tmp_path / "out" / "export.json").read_text())["mpp"] == 0.5


def test_colours_of_test_images_are_for_testing_too(results, tmp_path, capsys):
    (results / "ignore_masks").mkdir()
    for appearances, split in (("", "test"), ("images", "train")):
        flags = {"use_train": False, "structure_dir": "made", "appearance_dir": appearances}
        (results / "run.json").write_text(json.dumps(flags))
        export_set.read_flags.cache_clear()
        assert {row["split"] for row in export(results, tmp_path / split)} == {split}
    assert "WARNING: no format knows ignore_masks: where SET says so, nuclei may be missing" in capsys.readouterr().err


def test_a_sweep_is_one_set(tmp_path):
    for s in ("1", "2"):
        write_run(tmp_path / "sweep" / f"s{s}.5", count=2, s=s)
    (tmp_path / "sweep" / "run.json").write_text('{"use_train": false, "structure_dir": "", "mpp": 0.5}')
    rows = export(tmp_path / "sweep", tmp_path / "out")
    assert [row["file"] for row in rows] == [f"test/s{s}_5__s{k}_000.png" for s in "12" for k in "01"]
    assert json.loads((tmp_path / "out" / "export.json").read_text())["mpp"] == 0.5


def test_sub_folders_become_part_of_names(data_dir, tmp_path):
    for folder in ("images", "inst_masks", "bin_masks"):
        (data_dir / TRAIN / folder / "a.b").mkdir()
        for path in (data_dir / TRAIN / folder).glob("slide-0*"):
            path.rename(path.parent / "a.b" / path.name)
    files = {row["file"] for row in export(data_dir, tmp_path / "out")}
    assert {f"train/a_b__slide-0_{k:03d}.png" for k in range(4)} < files


def test_runs_and_workers_give_the_same_bytes(results, tmp_path):
    export(results, tmp_path / "a", layout="webdataset", workers=2)
    before = snapshot(tmp_path / "a")
    export(results, tmp_path / "b")
    assert snapshot(tmp_path / "b") != before
    export(results, tmp_path / "b", layout="webdataset")
    assert snapshot(tmp_path / "b") == before


@pytest.mark.parametrize("calls", [0, 3, 7])
def test_a_kill_leaves_what_was_there(results, tmp_path, monkeypatch, calls):
    """Of a run over another one, at the first file, in the middle, and before the last."""
    export(results, tmp_path / "out", layout="coco")
    before = snapshot(tmp_path / "out")
    child = os.fork()
    if not child:
        left = iter(range(calls))
        written = export_set.put
        monkeypatch.setattr(
            export_set,
            "put",
            lambda *given: written(*given) if next(left, None) is not None else os.kill(os.getpid(), signal.SIGKILL),
        )
        export(results, tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert snapshot(tmp_path / "out") == before
    export(results, tmp_path / "out")
    export(results, tmp_path / "whole")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"results", "out", "whole"}


def no_mask(results):
    (results / "inst_masks/s0_000.tif").unlink()


def cut(results):
    path = results / "samples/s3_000.png"
    path.write_bytes(path.read_bytes()[:-100])


def resized(results):
    Image.fromarray(np.zeros((9, 9), np.int32)).save(results / "inst_masks/s3_000.tif")


def empty(results):
    shutil.rmtree(results / "samples")
    (results / "samples").mkdir()


def neither(results):
    shutil.rmtree(results / "samples")


def no_table(results):
    add_classes(results, table=False)


def one_class_mask_less(results):
    add_classes(results)
    (results / "class_masks/s0_000.png").unlink()


def a_class_too_many(results):
    add_classes(results)
    cell_classes.write_classes(results, cell_classes.named(["odd"]))


def foreign(results):
    (results.parent / "out").mkdir()
    (results.parent / "out" / "mine").touch()


def bad_flags(results):
    (results / "run.json").write_text("{")


def named_alike(results):
    (results / "manifest.csv").unlink()  # which names all that counts
    for folder, suffix in (("samples", "png"), ("inst_masks", "tif")):
        for name in ("a.b", "a_b"):
            shutil.copy(results / folder / f"s0_000.{suffix}", results / folder / f"{name}.{suffix}")


CASES = [
    (None, "missing out --format coco", "SET missing is not a folder"),
    (None, "results results/out --format coco", "OUT results/out lies in the input results"),
    (None, "results . --format coco", "OUT . would replace the input results"),
    (None, "results out --format pascal", "invalid choice: 'pascal'"),
    (None, "results out", "required: --format"),
    (None, "results out --format coco --window 300", "--window 300 is for --format hovernet"),
    (None, "results out --format hovernet --window 0", "--window 0: HoVer-Net reads"),
    (None, "results out --format hovernet", "is 32 x 32 px: HoVer-Net reads 256 px"),
    (None, "results out --format coco --num_workers 0", "--num_workers 0"),
    (no_mask, "results out --format coco", "has no mask"),
    (cut, "results out --format coco", "s3_000.png cannot be decoded"),
    (resized, "results out --format coco", "s3_000.tif is 9 x 9 px, its image 32 x 32"),
    (empty, "results out --format coco", "holds no .png"),
    (neither, "results out --format coco", "has no samples/"),
    (no_table, "results out --format coco", "has class_masks but no classes.json"),
    (one_class_mask_less, "results out --format coco", "has no mask s0_000.* in class_masks"),
    (a_class_too_many, "results out --format coco", "is of class 2, which is not in classes.json"),
    (foreign, "results out --format coco", "holds what this command did not make"),
    (bad_flags, "results out --format coco", "run.json does not parse"),
    (named_alike, "results out --format coco", "would both be named a_b: rename one"),
]


@pytest.mark.parametrize(("damage", "arguments", "message"), CASES)
def test_bad_input_is_one_line_and_leaves_no_trace(results, tmp_path, monkeypatch, capsys, damage, arguments, message):
    monkeypatch.chdir(tmp_path)
    if damage:
        damage(results)
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: export_set.main(["--num_workers", "1", *arguments.split()]))
    *_, error = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and error.startswith("error: ") and message in error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("layout", ["hovernet", "cellvit", "qupath", "webdataset", "imagefolder"])
def test_what_is_not_read_back_is_refused(told_and_large, tmp_path, layout):
    """Some of it looks like another data set, without classes, and some like pickles."""
    export(told_and_large[1], tmp_path / "out", layout=layout)
    with pytest.raises(ValueError, match=f"was made by export_set.py --format {layout}, which is not read back: give"):
        import_dataset.main([str(tmp_path / "out"), str(tmp_path / "raw"), "--num_workers", "1"])
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("layout", ["cellpose", "stardist", "coco"])
def test_our_own_reader_gives_the_same_pixels_back(told_and_large, tmp_path, capsys, layout):
    told, results = told_and_large
    rows = export(results, tmp_path / "out", layout=layout)
    import_dataset.main([str(tmp_path / "out"), str(tmp_path / "raw"), "--num_workers", "1"])
    assert "is an export: of slides" in capsys.readouterr().out
    raw = tmp_path / "raw" / "train"
    assert len(list((raw / "images").iterdir())) == len(rows) == 4
    for stem in (row["stem"] for row in rows):
        assert np.array_equal(read_image(raw / f"images/{stem}.png"), read_image(results / f"samples/{stem}.png"))
        assert np.array_equal(*(read_inst_mask(folder / f"inst_masks/{stem}.tif") for folder in (raw, results)))
        if told and layout == "coco":
            assert np.array_equal(*(read_mask(folder / f"class_masks/{stem}.png") for folder in (raw, results)))


@pytest.mark.slow
def test_fields_go_from_masks_to_hovernet(model_path, tmp_path):  # noqa: F811
    """Structures of 256 px are sampled whole, and become HoVer-Net's arrays."""
    (tmp_path / "masks").mkdir()
    for k in range(2):
        Image.fromarray(draw_patch(k, 256)[1]).save(tmp_path / "masks" / f"field_{k}.tif")
    write_images(tmp_path / "colours", count=2, size=16)
    folders = ["--structure_dir", str(tmp_path / "masks"), "--appearance_dir", str(tmp_path / "colours")]
    flags = ["--field", "True", "--window_overlap", "0", "--min_nucleus", "0", "--timestep_respacing", "1"]
    run("", model_path, tmp_path / "out", *folders, *flags, "--num_samples", "2", "--batch_size", "64")
    rows = export(tmp_path / "out", tmp_path / "hovernet", layout="hovernet")
    assert len(rows) == 2
    for row in rows:
        array = np.load(tmp_path / "hovernet" / row["file"])
        assert array.shape == (256, 256, 4) and array.dtype == np.int32
        assert np.array_equal(array[..., :3], read_image(tmp_path / "out" / "samples" / f"{row['stem']}.png"))
        assert np.array_equal(array[..., 3], read_inst_mask(tmp_path / "masks" / Path(row["structure"]).name))
