"""Sampling from the command line: files, numbers, seeds, ranks, and mistakes."""

import csv
import glob
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import TINY, draw_patch, write_patches
from forked import Child, start_ranks
from PIL import Image

import image_sample
from guided_diffusion import cell_classes, checkpoint, cli, dist_util, files, sweep
from guided_diffusion.histology.features.embeddings import Features, save_features
from guided_diffusion.results import FOLDERS, ResultFolder
from guided_diffusion.script_util import args_to_dict, create_model_and_diffusion, model_and_diffusion_defaults

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    """A checkpoint of the tiny model with weights that do something."""
    folder = tmp_path_factory.mktemp("model")
    args = image_sample.create_argparser().parse_args(TINY)
    model, _ = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    generator = th.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.add_(0.02 * th.randn(p.shape, generator=generator))
    checkpoint.save(model.state_dict(), str(folder), "model000007.pt")
    return str(folder / "model000007.pt")


def flags(data_dir, model_path, out, *extra):
    respacing = ["--timestep_respacing", "4", "--use_train", "True", "--batch_size", "3"]
    paths = ["--data_dir", str(data_dir), "--model_path", model_path, "--results_path", str(out)]
    return [*paths, *TINY, *respacing, *extra]


def run(data_dir, model_path, out, *extra):
    image_sample.main(flags(data_dir, model_path, out, *extra))
    return out


def pixels(out, stem):
    return np.asarray(Image.open(out / "samples" / f"{stem}.png")).astype(int)


def manifest(out):
    with open(out / "manifest.csv") as file:
        return list(csv.DictReader(file))


def test_five_folders_manifest_and_grid(data_dir, model_path, tmp_path):
    out = run(data_dir, model_path, tmp_path / "out", "--num_samples", "0", "--s", "1.5", "--match_struct", "True")
    rows = manifest(out)
    assert len(rows) == 8 and [row["index"] for row in rows] == [str(k) for k in range(8)]
    for folder in FOLDERS:
        assert sorted(path.stem for path in (out / folder).iterdir()) == sorted(row["stem"] for row in rows)
    assert (out / "grid.png").stat().st_size > 0
    for row in rows:
        assert row["s"] == "1.5" and row["steps"] == "4" and row["sampler"] == "ddpm" and row["seed"] == "0"
        assert row["checkpoint"] == model_path
        assert row["stem"].startswith(Path(row["appearance"]).stem)
        number = Path(row["structure"]).stem
        seed = 4 * int(number[6]) + int(number[-3:])
        inst = draw_patch(seed)[1][8:24, 8:24]
        np.testing.assert_array_equal(np.asarray(Image.open(out / "inst_masks" / f"{row['stem']}.tif")), inst)
        np.testing.assert_array_equal(np.asarray(Image.open(out / "labels" / f"{row['stem']}.png")), (inst > 0) * 255)
        appearance = np.asarray(Image.open(row["appearance"]))[8:24, 8:24]
        np.testing.assert_array_equal(np.asarray(Image.open(out / "images" / f"{row['stem']}.png")), appearance)
        assert Image.open(out / "cond" / f"{row['stem']}.png").size == (64, 16)
        assert pixels(out, row["stem"]).shape == (16, 16, 3)
    assert any(row["structure"] != row["appearance"] for row in rows)


def test_classes_of_cells_go_through(data_dir, model_path, tmp_path):
    """From class_masks to the results', cut as the nuclei are; a nucleus of two classes is told."""
    data = data_dir
    cell_classes.write_classes(data, cell_classes.named(["small", "large"]))
    (data / "MoNuSegTrainingData/class_masks").mkdir()
    for path in (data / "MoNuSegTrainingData/inst_masks").iterdir():
        inst = np.asarray(Image.open(path))
        classes = np.where(inst > 0, 1 + inst % 2, 0).astype(np.uint8)
        Image.fromarray(classes).save(data / f"MoNuSegTrainingData/class_masks/{path.stem}.png")
    extra = ["--class_cond", "True", "--num_classes", "3"]
    args = image_sample.create_argparser().parse_args([*TINY, *extra])
    model, _ = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    (tmp_path / "model").mkdir()
    checkpoint.save(model.state_dict(), str(tmp_path / "model"), "model000001.pt")
    path = str(tmp_path / "model/model000001.pt")
    out = run(data, path, tmp_path / "out", "--num_samples", "3", *extra)
    assert [one.name for one in cell_classes.read_classes(out)] == ["small", "large"]
    for row in manifest(out):
        inst = np.asarray(Image.open(out / f"inst_masks/{row['stem']}.tif"))
        classes = np.asarray(Image.open(out / f"class_masks/{row['stem']}.png"))
        np.testing.assert_array_equal(classes, np.where(inst > 0, 1 + inst % 2, 0))
        own = np.unique(inst[inst > 0]) % 2
        expected = [f"{1 + odd}:{(own == odd).sum()}" for odd in (0, 1) if (own == odd).any()]
        assert row["classes"] == " ".join(expected)
    before = manifest(out)
    assert manifest(run(data, path, out, "--num_samples", "3", *extra)) == before
    run(data, path, out, "--num_samples", "3", *extra, "--overwrite", "True")
    assert len(cell_classes.read_classes(out)) == 2
    # Structures without images have classes, too, where they lie beside them.
    folders = ["--structure_dir", str(out), "--min_nucleus", "0", "--first", "True", "--num_samples", "3"]
    again = run(data, path, tmp_path / "again", *folders, *extra)
    assert cell_classes.read_classes(again) == cell_classes.read_classes(out)
    for one, other in zip(sorted(manifest(out), key=lambda row: row["stem"]), manifest(again), strict=True):
        assert one["classes"] == other["classes"]
    fields = run(
        data, path, tmp_path / "fields", "--num_samples", "1", "--field", "True", "--window_overlap", "0", *extra
    )
    (row,) = manifest(fields)
    inst, classes = (
        np.asarray(Image.open(fields / name))
        for name in (f"inst_masks/{row['stem']}.tif", f"class_masks/{row['stem']}.png")
    )
    np.testing.assert_array_equal(classes, np.where(inst > 0, 1 + inst % 2, 0))
    assert classes.shape == (32, 32)
    plain = run(data, model_path, tmp_path / "plain", "--num_samples", "1")
    assert not (plain / "class_masks").exists() and not (plain / "classes.json").exists()
    assert set(np.unique(np.asarray(Image.open(next((plain / "labels").iterdir()))))) <= {0, 255}
    wrong = np.asarray(Image.open(data / "MoNuSegTrainingData/class_masks/slide-0_000.png")).copy()
    wrong[np.nonzero(wrong)[0][0], np.nonzero(wrong)[1][0]] ^= 3
    Image.fromarray(wrong).save(data / "MoNuSegTrainingData/class_masks/slide-0_000.png")
    with pytest.raises(ValueError, match=r"slide-0_000.png: nucleus \d+ has pixels of classes 1, 2: a nucleus is of"):
        run(data, path, tmp_path / "other", "--num_samples", "0", *extra)


@pytest.mark.parametrize("count", [1, 5, 8, 11])
def test_exactly_as_many_as_asked_for(data_dir, model_path, tmp_path, count):
    out = run(data_dir, model_path, tmp_path / "out", "--num_samples", str(count))
    assert len(manifest(out)) == count
    assert all(len(list((out / folder).iterdir())) == count for folder in FOLDERS)


@pytest.mark.parametrize("sampler", [[], ["--use_ddim", "True"]])
def test_a_sample_depends_on_seed_and_number_alone(data_dir, model_path, tmp_path, sampler):
    options = ["--s", "1.3", *sampler]
    all_at_once = run(data_dir, model_path, tmp_path / "a", "--num_samples", "10", "--batch_size", "10", *options)
    by_four = run(data_dir, model_path, tmp_path / "b", "--num_samples", "9", "--batch_size", "4", *options)
    other = run(data_dir, model_path, tmp_path / "c", "--num_samples", "2", "--seed", "1", *options)
    for row in manifest(by_four):
        difference = np.abs(pixels(all_at_once, row["stem"]) - pixels(by_four, row["stem"]))
        assert difference.max() <= 1
    assert all(np.abs(pixels(all_at_once, r["stem"]) - pixels(other, r["stem"])).max() > 20 for r in manifest(other))
    # The ninth sample is the first item again, with new noise.
    first, ninth = manifest(by_four)[0], manifest(by_four)[8]
    assert first["structure"] == ninth["structure"] and ninth["stem"] == first["stem"] + "_0"
    assert np.abs(pixels(by_four, first["stem"]) - pixels(by_four, ninth["stem"])).max() > 20


def test_guidance_acts(data_dir, model_path, tmp_path):
    outs = [
        run(data_dir, model_path, tmp_path / s, "--num_samples", "2", "--same_noise", "True", "--s", s)
        for s in ("0.5", "1", "3")
    ]
    stem = manifest(outs[0])[0]["stem"]
    assert (pixels(outs[0], stem) == pixels(outs[1], stem)).all()
    assert (pixels(outs[1], stem) != pixels(outs[2], stem)).any()


def test_test_split_and_empty_patches(data_dir, model_path, tmp_path):
    for path in (data_dir / "MoNuSegTestData" / "inst_masks").iterdir():
        Image.fromarray(np.zeros((32, 32), np.int32)).save(path)
    out = run(data_dir, model_path, tmp_path / "out", "--use_train", "False", "--num_samples", "0")
    rows = manifest(out)
    assert len(rows) == 4 and all("MoNuSegTestData" in row["structure"] for row in rows)


def test_grey_images(data_dir, tmp_path):
    grey = ["--in_channels", "1", "--num_classes", "4"]
    args = image_sample.create_argparser().parse_args([*TINY, *grey])
    model, _ = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    checkpoint.save(model.state_dict(), str(tmp_path), "model000001.pt")
    out = run(data_dir, str(tmp_path / "model000001.pt"), tmp_path / "out", "--num_samples", "1", *grey)
    assert pixels(out, manifest(out)[0]["stem"]).shape == (16, 16)


def test_a_scale_counts_once_however_it_is_written():
    scales = sweep.parse_scales("1.3, 1.30,1,1.3000001, 2.5")
    assert [(scale.s, scale.text) for scale in scales] == [(1.3, "1.3"), (1, "1"), (2.5, "2.5")]


def test_dry_run(data_dir, model_path, tmp_path, capsys):
    run(data_dir, model_path, tmp_path / "out", "--dry_run", "True")
    assert json.loads(capsys.readouterr().out)["condition_channels"][0] == "hv_x"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(data_dir, model_path, tmp_path):
    one = run(data_dir, model_path, tmp_path / "one", "--num_samples", "5")
    command = [Path(sys.executable).with_name("mpiexec"), "-n", "2", sys.executable, ROOT / "image_sample.py"]
    command += flags(data_dir, model_path, tmp_path / "two", "--num_samples", "5")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("5 samples; look at") == 1
    assert manifest(one) == manifest(tmp_path / "two")
    for row in manifest(one):
        assert np.abs(pixels(one, row["stem"]) - pixels(tmp_path / "two", row["stem"])).max() <= 1


def list_on_rank_0(argv):
    """Sample, in a process where another rank that looks for checkpoints fails."""
    if dist_util.launched_rank():
        glob.glob = None
    image_sample.main(argv)


def test_ranks_without_work(data_dir, model_path, tmp_path):
    """Two of three samples are there, so one of the ranks has nothing to do. Rank 0 alone lists the checkpoints."""
    pattern = str(Path(model_path).with_name("model00000[7]*.pt"))
    out = run(data_dir, pattern, tmp_path / "out", "--num_samples", "2")
    two = start_ranks(2, list_on_rank_0, flags(data_dir, pattern, out, "--num_samples", "3"), tmp_path / "two")
    assert [rank.wait() for rank in two] == [0, 0], (tmp_path / "two.err").read_text()
    assert "2 of 3 samples are finished already" in (tmp_path / "two.out").read_text() and len(manifest(out)) == 3


# ---- sweeps ----


@pytest.fixture(scope="module")
def two_models(model_path) -> list[str]:
    """The checkpoint, and a second one beside it."""
    state = {key: 1.05 * value for key, value in th.load(model_path, weights_only=True).items()}
    checkpoint.save(state, str(Path(model_path).parent), "model000008.pt")
    return [model_path, str(Path(model_path).with_name("model000008.pt"))]


def test_checkpoints_by_scales(data_dir, two_models, tmp_path):
    out = run(data_dir, ",".join(two_models), tmp_path / "out", "--s", "1,1.5", "--num_samples", "4")
    names = ["model000007_s1", "model000007_s1.5", "model000008_s1", "model000008_s1.5"]
    assert sorted(path.name for path in out.iterdir()) == sorted([".lock", *names, "run.json", "sweep.png"])
    pattern = str(Path(two_models[0]).with_name("model*.pt"))
    again = run(data_dir, pattern, tmp_path / "again", "--s", "1.5,1", "--num_samples", "4")
    for name in names:
        rows = manifest(out / name)
        assert len(rows) == 4 and {row["s"] for row in rows} == {name.rpartition("_s")[2]}
        assert all(Path(row["checkpoint"]).stem == name.rpartition("_s")[0] for row in rows)
        assert rows == manifest(again / name)
        if name != names[2]:
            continue
        alone = tmp_path / "alone" / name
        run(data_dir, rows[0]["checkpoint"], alone, "--s", rows[0]["s"], "--num_samples", "4")
        for row in rows:
            assert np.abs(pixels(out / name, row["stem"]) - pixels(alone, row["stem"])).max() <= 1
    assert np.asarray(Image.open(out / "sweep.png")).shape[1] == 8 * 16 * 4 + 5 * 6
    drawn = [[(row["structure"], row["noise"]) for row in manifest(out / name)] for name in names]
    assert len(set(map(str, drawn))) == len({noise for rows in drawn for _, noise in rows}) / 4 == 4


def test_the_same_noise_compares_scales(data_dir, model_path, tmp_path):
    options = ["--same_noise", "True", "--first", "True", "--match_struct", "True", "--num_samples", "10"]
    out = run(data_dir, model_path, tmp_path / "out", "--s", "1,1.5", *options)
    assert np.asarray(Image.open(out / "sweep.png")).shape[1] == 8 * 16 * (4 + 1 + 2) + 5 * 6
    one, two = (
        [{**row, "s": "", "noise": row["noise"]} for row in manifest(out / f"model000007_s{s}")] for s in ("1", "1.5")
    )
    assert one == two and [row["noise"] for row in one] == [f"0/{k}" for k in range(10)]
    assert [Path(row["structure"]).stem for row in one] == [f"slide-{k // 4 % 2}_{k % 4:03d}" for k in range(10)]


@pytest.mark.parametrize("pairing", ["match_struct", "match_app", "shuffle_masks"])
def test_a_few_samples_are_spread_over_slides_and_paired_anew(data_dir, model_path, tmp_path, pairing):
    out = run(data_dir, model_path, tmp_path / "out", "--num_samples", "4", "--s", "1,2", f"--{pairing}", "True")
    folders = [manifest(out / f"model000007_s{s}") for s in "12"]
    for rows in folders:
        slides = [row["structure_slide"] for row in rows]
        assert sorted(slides) == ["slide-0"] * 2 + ["slide-1"] * 2 and len({row["structure"] for row in rows}) == 4
        assert all(Path(row["appearance"]).stem.startswith(row["appearance_slide"]) for row in rows)
    pairs = [{(row["structure"], row["appearance"]) for row in rows} for rows in folders]
    assert pairs[0] != pairs[1]


def snapshot(out):
    """All files but the lock, which names a process."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def assert_same(left, right):
    """Equal files; samples, and pictures of them, to the grey level that a batch of another size may change."""
    assert left.keys() == right.keys()
    for name in left:
        if "/samples/" in f"/{name}" or name.endswith(("grid.png", "sweep.png")):
            a, b = (np.asarray(Image.open(io.BytesIO(files[name]))).astype(int) for files in (left, right))
            assert np.abs(a - b).max() <= 1, name
        else:
            assert left[name] == right[name], name


def test_overwrite_takes_an_earlier_sweep_away(data_dir, model_path, tmp_path):
    out = run(data_dir, model_path, tmp_path / "out", "--s", "1,1.5", "--num_samples", "2")
    run(data_dir, model_path, out / "apart", "--num_samples", "1")
    (out / "model000007_s1" / "mine.txt").write_text("mine")
    (out / "kept").mkdir()
    kept = (out / "model000007_s1" / "manifest.csv").read_bytes()
    (out / "kept" / "manifest.csv").write_bytes(kept)  # as filter_ood.py makes one of samples
    run(data_dir, model_path, out, "--s", "1.5,2", "--num_samples", "2", "--seed", "7", "--overwrite", "True")
    names = [".lock", "apart", "kept", "model000007_s1", "model000007_s1.5", "model000007_s2", "run.json", "sweep.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [path.name for path in (out / "model000007_s1").iterdir()] == ["mine.txt"]
    assert {row["seed"] for row in manifest(out / "model000007_s1.5")} == {"7"} and len(manifest(out / "apart")) == 1
    assert (out / "kept" / "manifest.csv").read_bytes() == kept


def test_the_same_command_goes_on(data_dir, two_models, tmp_path):
    options = ["--s", "1,1.5", "--num_samples", "5", "--batch_size", "2"]
    out = run(data_dir, ",".join(two_models), tmp_path / "out", *options)
    whole = snapshot(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("samples/*.png")}
    (lost, *_), (cut, *_) = sorted(out.glob("model000007_s1/samples/*")), sorted(out.glob("model000008_s1.5/samples/*"))
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    run(data_dir, ",".join(two_models), out, *options)
    assert_same(snapshot(out), whole)
    rewritten = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert rewritten == {lost, cut}


def test_paths_with_commas_and_brackets(data_dir, model_path, tmp_path):
    for name in ("a,b", "m[1]"):
        folder = tmp_path / name
        folder.mkdir()
        checkpoint.save(th.load(model_path, weights_only=True), str(folder), "m.pt")
        assert len(manifest(run(data_dir, str(folder / "m.pt"), tmp_path / f"{name}-out", "--num_samples", "1"))) == 1


def test_fewer_samples_than_there_are(data_dir, model_path, tmp_path):
    out = run(data_dir, model_path, tmp_path / "out", "--num_samples", "3")
    with pytest.raises(ValueError, match="holds 3 samples of this run, more than --num_samples 2"):
        run(data_dir, model_path, out, "--num_samples", "2")
    run(data_dir, model_path, out, "--num_samples", "2", "--overwrite", "True")
    assert len(manifest(out)) == 2


def test_more_samples_of_the_same_run(data_dir, model_path, tmp_path):
    out = run(data_dir, model_path, tmp_path / "out", "--num_samples", "3")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("samples/*.png")}
    run(data_dir, model_path, out, "--num_samples", "6", "--batch_size", "4")
    assert len(manifest(out)) == 6 and all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--seed", "1"], "seed"),
        (["--s", "1.7"], "s"),
        (["--use_ddim", "True"], "sampler"),
        (["--match_app", "True"], "match_app"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(data_dir, model_path, tmp_path, change, name):
    out = run(data_dir, model_path, tmp_path / "out", "--num_samples", "2")
    before = snapshot(out)
    with pytest.raises(ValueError, match=f"--results_path .*begun with --{name} "):
        run(data_dir, model_path, out, "--num_samples", "2", *change)
    assert snapshot(out) == before
    run(data_dir, model_path, out, "--num_samples", "2", *change, "--overwrite", "True")
    assert len(manifest(out)) == 2 and snapshot(out) != before


@pytest.mark.slow
def test_killed_at_random_moments(data_dir, two_models, tmp_path):
    """SIGKILL, again and again, each time on another number of ranks; what is there afterwards is what an undisturbed
    run writes. Where one rank dies, the others end, too."""

    def images():
        return [path for path in (tmp_path / "out").rglob("samples/*.png") if not path.name.startswith(".")]

    options = ["--s", "1,1.5", "--num_samples", "24", "--batch_size", "2", "--timestep_respacing", "12"]
    calm = run(data_dir, ",".join(two_models), tmp_path / "calm", *options)
    arguments = flags(data_dir, ",".join(two_models), tmp_path / "out", *options)
    rng = np.random.default_rng(0)
    written = kills = 0
    for kills in range(10):
        ranks = start_ranks(1 + kills % 3, image_sample.main, arguments, tmp_path / "log")
        # Alternately once another sample is there, and at any moment of the start.
        if kills % 2:
            ranks[0].until(lambda: len(images()) > written)  # noqa: B023
            time.sleep(0.02 * rng.random())
        else:
            time.sleep(rng.random())
        if not ranks[0].process.is_alive():
            break
        for rank in ranks if rng.random() < 0.5 else ranks[-1:]:
            rank.kill()
        assert 0 not in [rank.wait() for rank in ranks]
        written = len(images())
        for path in images():
            Image.open(path).load()
    for rank in ranks:
        rank.wait()
    assert kills > 2
    assert Child(image_sample.main, arguments, tmp_path / "log").wait() == 0
    assert_same(snapshot(tmp_path / "out"), snapshot(calm))


@pytest.fixture(scope="module")
def sixteen(model_path, tmp_path_factory) -> tuple[list[str], dict[str, bytes]]:
    """The flags of a run that writes one sample after the other, but for --results_path, and what it writes."""
    folder = tmp_path_factory.mktemp("sixteen")
    write_patches(folder / "data" / "MoNuSegTrainingData")
    argv = flags(folder / "data", model_path, folder / "calm", "--num_samples", "16", "--batch_size", "1")
    image_sample.main(argv)
    return argv, snapshot(folder / "calm")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_goes_on_later(sixteen, tmp_path, number):
    argv, whole = sixteen
    argv, out = [*argv, "--results_path", str(tmp_path / "out")], tmp_path / "out"
    child = Child(image_sample.main, [*argv, "--num_workers", "1"], tmp_path / "log")
    assert child.until(lambda: any(out.glob("samples/*.png")))
    child.kill(number)  # its workers, too
    assert child.wait() == 75 and "the same command goes on" in (tmp_path / "log.out").read_text()
    errors = (tmp_path / "log.err").read_text()
    assert errors.endswith(f"stopped by {number.name}\n") and "Traceback" not in errors
    assert 0 < len(ResultFolder(out).finished()) < 16
    image_sample.main(argv)
    assert_same(snapshot(out), whole)


def test_two_runs_at_once(sixteen, tmp_path):
    """The second is told who uses the folder, before it changes anything, and the first goes on undisturbed."""
    argv, whole = sixteen
    argv, out = [*argv, "--results_path", str(tmp_path / "out")], tmp_path / "out"
    first = Child(image_sample.main, argv, tmp_path / "log")
    assert first.until(lambda: any(out.glob("samples/*.png")))
    first.kill(signal.SIGSTOP)
    for extra in ([], ["--overwrite", "True"]):
        with pytest.raises(ValueError, match=rf"--results_path .*out is in use by process {first.pid} on "):
            image_sample.main([*argv, *extra])
    first.kill(signal.SIGCONT)
    assert first.wait() == 0
    assert_same(snapshot(out), whole)


def test_samples_of_data_that_have_changed_are_refused(data_dir, model_path, tmp_path):
    """An image more, and sample k has another structure."""
    out = run(data_dir, model_path, tmp_path / "out", "--num_samples", "6", "--first", "True")
    before = snapshot(out)
    for path in list((data_dir / "MoNuSegTrainingData").rglob("slide-0_002.*")):
        path.with_stem("slide-0_001a").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"sample 2 was made of structure .*slide-0_002.png, and the data now give "):
        run(data_dir, model_path, out, "--num_samples", "6", "--first", "True")
    assert snapshot(out) == before
    run(data_dir, model_path, out, "--num_samples", "2", "--overwrite", "True")


def test_samples_that_are_lost_are_an_error(data_dir, two_models, tmp_path, monkeypatch):
    out, load = tmp_path / "out", checkpoint.load_weights

    def lose(model, path, **options):
        sample = out / "model000007_s1.0" / "samples" / "slide-0_001.png"
        while path == two_models[1] and not sample.exists():  # it is written in the background
            time.sleep(0.01)
        sample.unlink(missing_ok=True)
        load(model, path, **options)

    monkeypatch.setattr(checkpoint, "load_weights", lose)
    arguments = (data_dir, ",".join(two_models), out, "--num_samples", "4", "--batch_size", "4", "--first", "True")
    with pytest.raises(OSError, match=r"model000007_s1.0 holds 3 of 4 samples: run the same again to go on"):
        run(*arguments)
    monkeypatch.undo()
    run(*arguments)
    assert len(manifest(out / "model000007_s1.0")) == 4


def test_odd_names(data_dir, model_path, tmp_path):
    """What a file may be called, a sample may be; from data to manifest, and again."""
    stems = ["a b_000", "a,b_001", 'q"q_000', "'_000", "h#sh_000", "%d{}_000", "x-_000", "ä;日_000"]
    split = data_dir / "MoNuSegTrainingData"
    for path in list(split.rglob("*.*")):
        path.rename(path.with_stem(stems[4 * int(path.stem[6]) + int(path.stem[-1])]))
    options = ["--num_samples", "10", "--match_app", "True", "--s", "1,2"]
    out = run(data_dir, model_path, tmp_path / "a, b#'\"ä", *options)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("samples/*")}
    run(data_dir, model_path, out, *options)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("samples/*")} == times and len(times) == 20
    for folder in (out / "model000007_s1", out / "model000007_s2"):
        rows = manifest(folder)
        assert sorted(Path(row["structure"]).stem for row in rows[:8]) == sorted(stems)
        for row in rows:
            assert Path(row["structure"]).is_file() and row["stem"].startswith(Path(row["appearance"]).stem)
            assert {path.stem for path in (folder / "samples").iterdir()} == {row["stem"] for row in rows}


def test_a_full_disk_leaves_a_run_that_goes_on(data_dir, model_path, tmp_path, small_disk, capsys):
    calm = run(data_dir, model_path, tmp_path / "calm", "--num_samples", "12")
    disk = small_disk(140)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: run(data_dir, model_path, disk / "out", "--num_samples", "12"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and re.fullmatch(r"error: .*No space left on device.*", error), error
    rows = ResultFolder(disk / "out").finished().values()
    finished = {row["stem"]: (disk / "out" / "samples" / f"{row['stem']}.png").stat() for row in rows}
    assert 0 < len(finished) < 12
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    run(data_dir, model_path, disk / "out", "--num_samples", "12")
    for stem, before in finished.items():
        assert (disk / "out" / "samples" / f"{stem}.png").stat().st_mtime_ns == before.st_mtime_ns
    assert_same(snapshot(disk / "out"), snapshot(calm))


@pytest.mark.slow
def test_compile_without_a_compiler(data_dir, model_path, tmp_path):
    command = [sys.executable, str(ROOT / "image_sample.py"), "--compile", "True"]
    command += flags(data_dir, model_path, tmp_path / "out")
    env = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    last = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"error: --compile True needs a working C\+\+ compiler .*: leave it out", last), result.stderr


def test_the_checkpoint_brings_its_flags(data_dir, model_path, tmp_path):
    args = image_sample.create_argparser().parse_args(TINY)
    folder = tmp_path / "model"
    folder.mkdir()
    path = str(folder / "model000007.pt")
    checkpoint.save(th.load(model_path, weights_only=True), str(folder), "model000007.pt")
    files.write_json(folder / "config.json", vars(args))
    short = ["--data_dir", str(data_dir), "--use_train", "True", "--num_samples", "2", "--timestep_respacing", "4"]
    image_sample.main([*short, "--model_path", path, "--results_path", str(tmp_path / "short")])
    long = run(data_dir, path, tmp_path / "long", "--num_samples", "2")
    for row in manifest(long):
        assert np.abs(pixels(long, row["stem"]) - pixels(tmp_path / "short", row["stem"])).max() <= 1
    with pytest.raises(ValueError, match="trained with --num_channels 32, this run has --num_channels 64"):
        image_sample.main([*short, "--model_path", path, "--results_path", "x", "--num_channels", "64"])
    files.write_json(folder / "config.json", {**vars(args), "preserve_nuclei_col": True})
    assert image_sample.resolve(["--model_path", path])[0].preserve_nuclei_col
    assert not image_sample.resolve(["--model_path", path, "--preserve_nuclei_col", "False"])[0].preserve_nuclei_col
    for known, mpp in (({"mpp": 0.5}, 0.5), ({}, 0.25)):
        files.write_json(folder / "config.json", {"image_size": 32, **known})
        assert image_sample.resolve(["--model_path", path])[0].mpp == mpp
    assert image_sample.resolve(["--model_path", path, "--mpp", "1"])[0].mpp == 1


# Flags of training, and what contradicts those of them that say what the weights are or mean.
RECIPES = {
    "width": (["--spade_channels", "8"], "--spade_channels 16"),
    "velocity": (["--predict_v", "True"], "--predict_v False"),
    "weights": (["--loss_weights", "min_snr", "--min_snr_gamma", "3"], ""),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_need_not_be_named(data_dir, tmp_path, name):
    recipe, other = RECIPES[name]
    args = image_sample.create_argparser().parse_args([*TINY, *recipe])
    model, _ = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    th.nn.init.normal_(model.out[-1].weight, std=0.1, generator=th.Generator().manual_seed(0))
    checkpoint.save(model.state_dict(), str(tmp_path), "model000001.pt")
    path, few = str(tmp_path / "model000001.pt"), ["--num_samples", "1", "--timestep_respacing", "2"]
    named = run(data_dir, path, tmp_path / "named", *recipe, *few)
    files.write_json(tmp_path / "config.json", vars(args))
    short = ["--data_dir", str(data_dir), "--use_train", "True", *few, "--model_path", path, "--results_path"]
    image_sample.main([*short, str(tmp_path / "short")])
    assert not differs(named, tmp_path / "short")
    if other:
        with pytest.raises(ValueError, match=f"{recipe[0]} {recipe[1]}.*{other}"):
            image_sample.main([*short, str(tmp_path / "other"), *other.split()])
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "unipc", "ddim", "ddpm"])
def test_few_step_samplers(data_dir, model_path, tmp_path, sampler):
    extra = ["--sampler", sampler, "--num_steps", "3", "--timestep_respacing", "", "--num_samples", "1"]
    out = run(data_dir, model_path, tmp_path / "out", *extra)
    (row,) = manifest(out)
    assert row["sampler"] == sampler and row["steps"] == "3"


def differs(a, b):
    return any((pixels(a, row["stem"]) != pixels(b, row["stem"])).any() for row in manifest(a))


def test_guidance_options_act(data_dir, two_models, tmp_path):
    options = ["--num_samples", "2", "--s", "3"]
    plain = run(data_dir, two_models[0], tmp_path / "plain", *options)
    for name, extra in {
        "interval": ["--guidance_interval", "0.1,2"],
        "guide": ["--guide_path", two_models[1]],
        "null": ["--null_condition", "keep_colour"],
        "bf16": ["--precision", "bf16"],
    }.items():
        assert differs(plain, run(data_dir, two_models[0], tmp_path / name, *options, *extra)), name
    zeros = run(data_dir, two_models[0], tmp_path / "zeros", *options, "--null_condition", "zeros")
    assert not differs(plain, zeros)


def test_null_condition_comes_from_training(data_dir, model_path, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoint.save(th.load(model_path, weights_only=True), str(folder), "m.pt")
    files.write_json(folder / "config.json", {"drop_hvb_only": True, "use_col_map": True})
    options = ["--num_samples", "2", "--s", "3", "--same_noise", "True"]
    taken = run(data_dir, str(folder / "m.pt"), tmp_path / "taken", *options)
    given = run(data_dir, model_path, tmp_path / "given", *options, "--null_condition", "keep_colour")
    assert not differs(taken, given)
    won = run(data_dir, str(folder / "m.pt"), tmp_path / "won", *options, "--null_condition", "zeros")
    assert differs(won, given)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ({}, "zeros"),
        ({"drop_rate": 0.2, "drop_hvb_only": True}, "keep_colour"),
        # 0.18 of the samples with colours alone, 0.1 with nothing; then 0.09 and 0.1; then 0.5 and 0.
        ({"drop_rate": 0.1, "unlabelled_dir": "images", "unlabelled_share": 0.2}, "keep_colour"),
        ({"drop_rate": 0.1, "unlabelled_dir": "images", "unlabelled_share": 0.1}, "zeros"),
        ({"drop_rate": 0.0, "unlabelled_dir": "images", "unlabelled_share": 0.5}, "keep_colour"),
        ({"drop_rate": 0.0, "unlabelled_dir": "images", "unlabelled_share": 0.5, "use_col_map": False}, "zeros"),
        ({"drop_rate": 0.0, "unlabelled_share": 0.5}, "zeros"),
    ],
)
def test_the_null_condition_is_one_that_the_model_has_seen(tmp_path, trained, expected):
    (tmp_path / "m.pt").touch()
    files.write_json(tmp_path / "config.json", {"use_col_map": True, "mark_unknown": True, **trained})
    args, _ = image_sample.resolve(["--model_path", str(tmp_path / "m.pt")])
    assert args.null_condition == expected and args.mark_unknown


def test_cache_changes_nothing(data_dir, model_path, tmp_path, capsys):
    outs = {}
    for cache in ("on", "off", "auto"):
        outs[cache] = run(
            data_dir, model_path, tmp_path / cache, "--num_samples", "4", "--s", "2", "--spade_cache", cache
        )
    for row in manifest(outs["on"]):
        for cache in ("off", "auto"):
            assert np.abs(pixels(outs["on"], row["stem"]) - pixels(outs[cache], row["stem"])).max() <= 1


# ---- mistakes ----

MISTAKES = {
    "no data": (["--data_dir", "nowhere"], "--data_dir 'nowhere'"),
    "no model": (["--model_path", "nowhere.pt"], "nowhere.pt is not a file"),
    "odd model": (["--model_path", "m\udce4.pt"], r"^error: m\\xe4\.pt: a name that is not UTF-8"),
    "odd results": (["--results_path", "o\nt"], r"^error: o\\u000at: a name that has control characters"),
    "no model given": (["--model_path", ""], "--model_path is empty"),
    "results": (["--results_path", ""], "--results_path is empty"),
    "channels": (["--num_classes", "7"], "--num_classes 7.*6 channels"),
    "seed": (["--seed", "99999999999999999999"], "--seed: 99999999999999999999 has more than 64 bits"),
    "workers": (["--num_workers", "-1"], "--num_workers -1"),
    "count": (["--num_samples", "-1"], "--num_samples -1"),
    "batch": (["--batch_size", "0"], "--batch_size 0"),
    "other model": (["--num_channels", "64"], "is \\[.*\\] there and"),
    "boolean": (["--use_ddim", "maybe"], "use_ddim.*maybe"),
    "pairing": (["--shuffle_masks", "True", "--match_struct", "True"], "--match_struct True with --shuffle_masks"),
    "respacing": (["--timestep_respacing", "2000"], "--timestep_respacing 2000"),
    "sampler": (["--sampler", "euler"], "--sampler euler"),
    "steps": (["--num_steps", "1001", "--timestep_respacing", ""], "--num_steps 1001"),
    "negative steps": (["--num_steps", "-1"], "--num_steps -1"),
    "both lengths": (["--num_steps", "5"], "--num_steps 5 with --timestep_respacing 4"),
    "both samplers": (["--sampler", "unipc", "--use_ddim", "True"], "--use_ddim True with --sampler unipc"),
    "scale": (["--s", "1.5,high"], "--s 1.5,high does not parse"),
    "scale nan": (["--s", "nan"], "--s nan does not parse"),
    "no such model": (
        ["--model_path", "nowhere/ema_1.pt"],
        "--model_path nowhere/ema_1.pt is not a file: check the path",
    ),
    "glob": (["--model_path", "nowhere/*.pt"], r"--model_path nowhere/\*.pt matches no file"),
    "interval": (["--guidance_interval", "5,1"], "--guidance_interval 5,1: .*the lower first"),
    "guide": (["--guide_path", "nowhere.pt"], "nowhere.pt is not a file"),
    "null": (["--null_condition", "mean"], "--null_condition mean"),
    "precision": (["--precision", "fp8"], "--precision fp8"),
    "fp16": (["--precision", "fp16"], "--precision fp16 on a CPU"),
    "cache": (["--spade_cache", "maybe"], "--spade_cache maybe"),
    "features": (["--match_app", "True", "--features", "none.npz"], "--features none.npz is not a file"),
    "unread features": (["--features", "f.npz"], "--features f.npz needs --match_app True"),
    "features and structure": (
        ["--match_app", "True", "--match_struct", "True", "--features", "f"],
        "--features f needs",
    ),
    "no appearances": (["--appearance_dir", "nowhere"], "--appearance_dir 'nowhere' is not a folder: give one"),
    "no appearance": (["--appearance_dir", str(ROOT / "scripts")], "--appearance_dir .*/scripts holds no image"),
    "no structures": (["--structure_dir", "nowhere"], "--structure_dir 'nowhere' is not a folder: give one"),
    "no structure": (["--structure_dir", str(ROOT / "scripts")], "--structure_dir .*/scripts holds no mask"),
    "structures alike": (
        ["--structure_dir", "m", "--match_app", "True"],
        "--structure_dir m with --match_app, .*: turn them off",
    ),
    "smallest nucleus": (["--min_nucleus", "-1"], "--min_nucleus -1.0 must be at least 0"),
    "unread smallest nucleus": (["--min_nucleus", "5"], "--min_nucleus 5.0 without --structure_dir: nothing reads it"),
    "jitter": (["--stain_jitter", "-0.1"], r"--stain_jitter -0.1 must lie in \[0, 1\)"),
    "other slide": (["--match_other_slide", "True"], "--match_other_slide True needs --match_struct"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_line_and_write_nothing(data_dir, model_path, tmp_path, capsys, name):
    extra, message = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: run(data_dir, model_path, tmp_path / "out", *extra))
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error


def test_appearance_of_images_without_masks(data_dir, model_path, tmp_path):
    """Jittered, too: images/ then has what the sample's colours were taken from."""
    folder = tmp_path / "unannotated"
    folder.mkdir()
    Image.fromarray(draw_patch(50)[0]).save(folder / "other_000.png")
    for jitter in ("0", "0.3"):
        extra = ["--appearance_dir", str(folder), "--stain_jitter", jitter, "--num_samples", "2"]
        out = run(data_dir, model_path, tmp_path / jitter, *extra)
        rows = manifest(out)
        assert {row["appearance"] for row in rows} == {str(folder / "other_000.png")}
        assert {row["structure_slide"] for row in rows} == {"slide-0", "slide-1"}
        image = np.asarray(Image.open(out / "images" / f"{rows[0]['stem']}.png"))
        assert np.array_equal(image, draw_patch(50)[0][8:24, 8:24]) == (jitter == "0")


def test_appearance_by_features(data_dir, model_path, tmp_path):
    stems = [f"slide-{i // 4}_{i % 4:03d}" for i in range(8)]
    vectors = np.eye(4, dtype=np.float32)[np.arange(8) % 4] * 100
    file = tmp_path / "f.npz"
    save_features(file, Features(vectors, [f"{stem}.png" for stem in stems], stems, "own", "none"))
    extra = ["--match_app", "True", "--match_other_slide", "True", "--features", str(file), "--num_samples", "0"]
    rows = manifest(run(data_dir, model_path, tmp_path / "out", *extra))
    pairs = {(Path(row["structure"]).stem, Path(row["appearance"]).stem) for row in rows}
    assert len(pairs) == 8 and all(structure[6] != appearance[6] for structure, appearance in pairs)
    save_features(file, Features(vectors[:6], [f"{stem}.png" for stem in stems[:6]], stems[:6], "own", "none"))
    with pytest.raises(ValueError, match=r"--features has no row for .*slide-1_002\.png"):
        run(data_dir, model_path, tmp_path / "other", *extra)
    assert not (tmp_path / "other").exists()


def test_results_path_that_is_a_file(data_dir, model_path, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="--results_path .*out is a file"):
        run(data_dir, model_path, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_results_in_the_data_are_refused(data_dir, model_path):
    for out in (data_dir, data_dir / "MoNuSegTrainingData" / "images"):
        with pytest.raises(ValueError, match="lies among the images of --data_dir"):
            run(data_dir, model_path, out)
    assert len(manifest(run(data_dir, model_path, data_dir / "results", "--num_samples", "1"))) == 1


def test_a_mistake_in_a_process_of_its_own(data_dir, model_path, tmp_path):
    image = data_dir / "MoNuSegTrainingData" / "images" / "slide-0_002.png"
    image.write_bytes(image.read_bytes()[:300])
    child = Child(image_sample.main, flags(data_dir, model_path, tmp_path / "out"), tmp_path / "log")
    assert child.wait() == 2 and (tmp_path / "log.out").read_text() == ""
    guessed, error = (tmp_path / "log.err").read_text().splitlines()
    assert "NAME_000 is taken for a patch of slide NAME" in guessed
    assert re.fullmatch(r"error: .*slide-0_002\.png cannot be decoded .*", error), error
    assert not (tmp_path / "out").exists()


def structures(folder, *arrays):
    """Instance masks without images, the first a .tif, others .png."""
    folder.mkdir()
    for number, array in enumerate(arrays):
        Image.fromarray(array.astype(np.uint16)).save(folder / f"made_{number:03d}.{'png' if number else 'tif'}")
    return folder


def test_structures_without_images(data_dir, model_path, tmp_path):
    """Their ids as they stand, cut as images are; the colours of any image, or one of as many nuclei."""
    few, many = np.zeros((20, 22), int), np.zeros((20, 22), int)
    few[4:9, 4:9] = 700
    many[2:18, 2:10], many[2:18, 11:20] = 3, 60_000
    folder = structures(tmp_path / "masks", few, many)
    images = [str(path) for path in (data_dir / "MoNuSegTrainingData" / "images").iterdir()]
    for extra in ([], ["--match_struct", "True"]):
        out = tmp_path / f"out{len(extra)}"
        rows = manifest(run(data_dir, model_path, out, "--structure_dir", str(folder), "--num_samples", "0", *extra))
        assert [row["structure"] for row in sorted(rows, key=lambda row: row["structure"])] == [
            str(folder / name) for name in ("made_000.tif", "made_001.png")
        ]
        for row in rows:
            assert row["structure_kind"] == "given"
            assert row["appearance"] in images and row["structure_slide"] == Path(row["structure"]).stem
            expected = (few, many)[int(Path(row["structure"]).stem[-3:])][2:18, 3:19]
            np.testing.assert_array_equal(np.asarray(Image.open(out / f"inst_masks/{row['stem']}.tif")), expected)
            np.testing.assert_array_equal(np.asarray(Image.open(out / f"labels/{row['stem']}.png")) > 0, expected > 0)
        if extra:
            masks = [row["appearance"].replace("/images/", "/inst_masks/").replace(".png", ".tif") for row in rows]
            nuclei = [(np.asarray(Image.open(mask)) > 0).mean() for mask in masks]
            assert nuclei[0] < nuclei[1] if "made_000" in rows[0]["structure"] else nuclei[0] > nuclei[1]
        (out / f"samples/{rows[0]['stem']}.png").unlink()
        more = ["--num_samples", "0", "--batch_size", "1", *extra]
        assert manifest(run(data_dir, model_path, out, "--structure_dir", str(folder), *more)) == rows
    appearances = tmp_path / "images"
    appearances.mkdir()
    Image.fromarray(draw_patch(50)[0]).save(appearances / "other_000.png")
    extra = ["--structure_dir", str(folder), "--appearance_dir", str(appearances), "--num_samples", "2"]
    rows = manifest(run("", model_path, tmp_path / "no data", *extra))
    assert [row["appearance"] for row in rows] == 2 * [str(appearances / "other_000.png")]


@pytest.mark.parametrize(
    ("shape", "part", "message"),
    [
        ((20, 20), (slice(5, 8), slice(5, 8)), "made_000.tif has a part of nucleus 4 of 9 px, below 10 px: remove"),
        ((12, 20), (slice(5, 9), slice(5, 9)), "made_000.tif is 20 x 12 px, smaller than --image_size 16"),
    ],
)
def test_a_structure_that_will_not_do(data_dir, model_path, tmp_path, capsys, shape, part, message):
    mask = np.zeros(shape, int)
    mask[part] = 4
    extra = ["--structure_dir", str(structures(tmp_path / "masks", mask)), "--num_samples", "1"]
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: run(data_dir, model_path, tmp_path / "out", *extra))
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error
    if "below" in message:
        run(data_dir, model_path, tmp_path / "out", *extra, "--min_nucleus", "0")


def test_an_odd_structure_is_named(data_dir, model_path, tmp_path, caplog):
    mask = np.zeros((20, 20), int)
    mask[3:8, 3:8], mask[12:16, 12:16] = 4, 4
    folder = structures(tmp_path / "masks", mask)
    run(data_dir, model_path, tmp_path / "out", "--structure_dir", str(folder), "--num_samples", "1")
    assert f"{folder / 'made_000.tif'}: nucleus 4 has several parts" in caplog.messages
