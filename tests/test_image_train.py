"""Training from the command line: what it writes, resuming, ranks, and mistakes."""

import csv
import gc
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
from conftest import TINY, new_pages, write_class_masks, write_images, write_patches
from forked import start_ranks
from torch.nn.parallel import DistributedDataParallel

import image_sample
import image_train
from guided_diffusion import checkpoint, checkpoint_sets, cli, devices, dist_util
from guided_diffusion.condition_cache import ConditionCache
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.script_util import condition_spec

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ["--batch_size", "4", "--lr", "1e-4", "--log_interval", "1"]


def train(data_dir, *flags):
    image_train.main(["--data_dir", str(data_dir), *TINY, *TRAIN, *flags])


def weights(path):
    return th.load(path, weights_only=True)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def test_a_run_writes_checkpoints_config_and_logs(data_dir, logdir):
    devices.keep_memory(False)
    train(data_dir, "--max_steps", "3", "--save_interval", "2", "--ema_rate", "0.9,0.99", "--drop_rate", "0.3")
    names = {path.name for path in logdir.iterdir()}
    for step in ("000002", "000003"):
        assert {f"model{step}.pt", f"ema_0.9_{step}.pt", f"ema_0.99_{step}.pt", f"opt{step}.pt"} <= names
    config = json.loads((logdir / "config.json").read_text())
    assert config["num_channels"] == 32 and config["condition_channels"][-1] == "edge"
    model = weights(logdir / "model000003.pt")
    assert all(value.dtype == th.float32 and value.isfinite().all() for value in model.values())
    assert model.keys() == weights(logdir / "ema_0.9_000003.pt").keys()
    with open(logdir / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"] and [row["samples"] for row in rows] == ["4", "8", "12"]
    for key in ("loss", "mse", "vb", "grad_norm"):
        assert all(float(row[key]) >= 0 for row in rows), key
    assert new_pages() < 100
    devices.keep_memory(False)


def test_resumed_equals_uninterrupted(data_dir, logdir, monkeypatch):
    flags = ["--drop_rate", "0.5", "--ema_rate", "0.9", "--lr_anneal_steps", "10", "--augment", "True"]
    flags += ["--schedule_sampler", "loss-second-moment"]
    flags += [*write_class_masks(data_dir / "MoNuSegTrainingData"), "--balance_classes", "True"]
    train(data_dir, "--max_steps", "5", "--save_interval", "2", *flags)
    for name in ("model000004.pt", "opt000004.pt", "ema_0.9_000004.pt"):
        assert (logdir / name).exists()
    monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / "resumed"))
    train(data_dir, "--max_steps", "5", *flags, "--resume_checkpoint", str(logdir / "model000002.pt"))
    for name in ("model000005.pt", "ema_0.9_000005.pt"):
        assert largest_difference(weights(logdir / name), weights(logdir.parent / "resumed" / name)) == 0


def test_resume_with_dropout_and_a_new_learning_rate(data_dir, logdir, monkeypatch):
    flags = ["--dropout", "0.3", "--ema_rate", "0.9"]
    train(data_dir, "--max_steps", "3", "--save_interval", "2", *flags)
    resumed = [*flags, "--max_steps", "3", "--resume_checkpoint", str(logdir / "model000002.pt")]
    for name, extra in (("same", []), ("faster", ["--lr", "1e-2"])):
        monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / name))
        train(data_dir, *resumed, *extra)
    whole = weights(logdir / "model000003.pt")
    assert largest_difference(whole, weights(logdir.parent / "same" / "model000003.pt")) == 0
    assert largest_difference(whole, weights(logdir.parent / "faster" / "model000003.pt")) > 1e-3


@pytest.mark.parametrize("spoiled", ["ema_0.9_000001.pt", "opt000001.pt"])
def test_files_beside_the_checkpoint_must_fit(data_dir, logdir, monkeypatch, spoiled):
    train(data_dir, "--max_steps", "1", "--ema_rate", "0.9")
    narrow = {"a": th.zeros(1)} if spoiled.startswith("ema") else {"state": {}, "param_groups": []}
    th.save(narrow, logdir / spoiled)
    monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / "resumed"))
    with pytest.raises(ValueError, match=spoiled):
        train(data_dir, "--max_steps", "2", "--ema_rate", "0.9", "--resume_checkpoint", str(logdir / "model000001.pt"))
    assert not (logdir.parent / "resumed").exists()


def test_another_configuration_in_the_same_folder_is_refused(data_dir, logdir):
    train(data_dir, "--max_steps", "1")
    with pytest.raises(ValueError, match="has a run with --num_channels 32, this one has --num_channels 64"):
        train(data_dir, "--max_steps", "1", "--num_channels", "64")
    assert json.loads((logdir / "config.json").read_text())["num_channels"] == 32


def test_init_checkpoint_starts_at_step_zero(data_dir, logdir, monkeypatch):
    train(data_dir, "--max_steps", "2", "--ema_rate", "0.5")
    monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / "tuned"))
    train(data_dir, "--max_steps", "1", "--lr", "1e-12", "--init_checkpoint", str(logdir / "ema_0.5_000002.pt"))
    tuned = weights(logdir.parent / "tuned" / "model000001.pt")
    assert largest_difference(tuned, weights(logdir / "ema_0.5_000002.pt")) < 1e-9
    line = f"beginning at step 0 with the weights of {logdir / 'ema_0.5_000002.pt'}"
    assert line in (logdir.parent / "tuned" / "log.txt").read_text()


def test_microbatches_change_nothing(data_dir, logdir, monkeypatch):
    train(data_dir, "--max_steps", "2")
    monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / "micro"))
    train(data_dir, "--max_steps", "2", "--microbatch", "2")
    difference = largest_difference(
        weights(logdir / "model000002.pt"), weights(logdir.parent / "micro" / "model000002.pt")
    )
    assert difference < 1e-5


def test_dry_run_prints_the_configuration_and_writes_nothing(data_dir, logdir, capsys):
    train(data_dir, "--dry_run", "True")
    config = json.loads(capsys.readouterr().out)
    assert config["batch_size"] == 4 and config["mpp"] == 0.25
    assert config["condition_channels"] == ["hv_x", "hv_y", "colour_r", "colour_g", "colour_b", "edge"]
    assert not logdir.exists()


@pytest.mark.parametrize(("flags", "mpp"), [((), 0.5), (("--mpp", "0.3"), 0.3)])
def test_the_magnification_is_that_of_the_data(tmp_path, logdir, capsys, flags, mpp):
    (tmp_path / "prepare.json").write_text('{"mpp": 0.5}')
    train(tmp_path, "--dry_run", "True", *flags)
    assert json.loads(capsys.readouterr().out)["mpp"] == mpp


def test_fp16_on_a_cpu_is_told_of_once(data_dir, logdir, capsys):
    train(data_dir, "--max_steps", "1", "--use_fp16", "True", "--use_checkpoint", "True")
    assert capsys.readouterr().out.count("bfloat16") == 1
    assert all(value.dtype == th.float32 for value in weights(logdir / "model000001.pt").values())


def test_bf16_leaves_fp32_weights(data_dir, logdir, monkeypatch):
    train(data_dir, "--max_steps", "2", "--precision", "bf16", "--ema_rate", "0.9")
    monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / "fp32"))
    train(data_dir, "--max_steps", "2", "--precision", "fp32", "--ema_rate", "0.9")
    for name in ("model000002.pt", "ema_0.9_000002.pt"):
        state = weights(logdir / name)
        assert all(value.dtype == th.float32 and value.isfinite().all() for value in state.values())
        assert 0 < largest_difference(state, weights(logdir.parent / "fp32" / name)) < 1e-3


def test_the_newest_checkpoints_stay(data_dir, logdir):
    train(data_dir, "--max_steps", "4", "--save_interval", "1", "--keep_checkpoints", "2", "--ema_rate", "0.9")
    kinds = ("ema_0.9_{}", "model{}", "opt{}", "state{}")
    expected = sorted(f"{kind.format(step)}.pt" for kind in kinds for step in ("000003", "000004"))
    assert sorted(path.name for path in logdir.glob("*.pt")) == expected


@pytest.mark.slow
def test_steps_that_are_never_finite_end_the_run(data_dir, logdir, capsys):
    steps = ["--batch_size", "1", "--save_interval", "20", "--max_steps", "1000"]
    with pytest.raises(SystemExit) as stop:
        # Each step multiplies the weights by -999.
        cli.run(lambda: train(data_dir, "--lr", "1", "--weight_decay", "1000", *steps))
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    found = re.search(
        r"(\d+) steps in a row were not finite, up to step (\d+), and the last finite loss was (\S+):", line
    )
    assert "lower --lr" in line and "--grad_clip 1" in line and int(found[1]) >= 50 and int(found[2]) <= 70
    with open(logdir / "progress.csv") as file:
        losses = [row["loss"] for row in csv.DictReader(file) if row["loss"]]
    assert float(found[3]) == pytest.approx(float(losses[-1]), rel=1e-3)
    assert (
        not list(logdir.glob("model*.pt")) and not (logdir / "result.json").exists()
    )  # nothing that is spoilt is kept


# ---- the same command again ----


def files(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.pt")}


@pytest.mark.parametrize(("skipped", "steps"), [(4, [2, 4, 5]), (5, [5])])
def test_a_step_that_is_skipped_by_chance_is_saved_all_the_same(data_dir, logdir, monkeypatch, skipped, steps):
    monkeypatch.setattr(MixedPrecisionTrainer, "skipped_in_a_row", property(lambda self: skipped))
    train(data_dir, "--max_steps", "5", "--save_interval", "2")
    assert checkpoint_sets.steps(str(logdir)) == steps


def test_the_same_command_again_does_nothing(data_dir, logdir):
    train(data_dir, "--max_steps", "2")
    before, rows = files(logdir), (logdir / "progress.csv").read_text()
    result = (logdir / "result.json").read_text()
    train(data_dir, "--max_steps", "2")
    assert files(logdir) == before and (logdir / "progress.csv").read_text() == rows
    assert (logdir / "result.json").read_text() == result
    assert f"going on from {logdir / 'model000002.pt'}" in (logdir / "log.txt").read_text()


def test_more_steps_go_on(data_dir, logdir, monkeypatch):
    flags = ["--ema_rate", "0.9", "--drop_rate", "0.3", "--schedule_sampler", "loss-second-moment"]
    train(data_dir, "--max_steps", "2", *flags)
    train(data_dir, "--max_steps", "4", *flags)
    monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / "calm"))
    train(data_dir, "--max_steps", "4", *flags)
    for name in ("model000004.pt", "ema_0.9_000004.pt"):
        assert largest_difference(weights(logdir / name), weights(logdir.parent / "calm" / name)) == 0
    with pytest.raises(ValueError, match="--max_steps 3 is below the resumed step 4"):
        train(data_dir, "--max_steps", "3", *flags)


def test_what_is_in_the_folder_is_newer_than_what_to_begin_with(data_dir, logdir, monkeypatch):
    train(data_dir, "--max_steps", "1", "--lr", "1e-2")
    init = ["--init_checkpoint", str(logdir / "model000001.pt")]
    for name, steps in (("calm", "3"), ("out", "2"), ("out", "3")):
        monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / name))
        train(data_dir, "--max_steps", steps, *init)
    calm, out = (weights(logdir.parent / name / "model000003.pt") for name in ("calm", "out"))
    assert largest_difference(calm, out) == 0


def test_fine_tuning_into_the_pretrainings_folder_is_refused(data_dir, logdir):
    train(data_dir, "--max_steps", "1")
    before, config = files(logdir), (logdir / "config.json").read_text()
    for flags in (["--init_checkpoint", str(logdir / "model000001.pt")], ["--seed", "1"], ["--val_split", "none"]):
        with pytest.raises(ValueError, match=rf"OPENAI_LOGDIR .* has a run with {flags[0]} .*: give .*another"):
            train(data_dir, "--max_steps", "2", *flags)
    write_patches(data_dir / "MoNuSegTrainingData", count=1, first=50)
    with pytest.raises(ValueError, match=f"--data_dir {data_dir} does not hold the images .* another OPENAI_LOGDIR"):
        train(data_dir, "--max_steps", "2")
    assert files(logdir) == before and (logdir / "config.json").read_text() == config


def test_a_checkpoint_given_by_hand_wins(data_dir, logdir):
    """Over what lies in the folder; the same command again goes on with what came of it."""
    train(data_dir, "--max_steps", "4", "--save_interval", "2", "--lr", "1e-2")
    far = weights(logdir / "model000004.pt")
    back = ["--resume_checkpoint", str(logdir / "model000002.pt")]
    train(data_dir, "--max_steps", "3", "--lr", "1e-3", *back)
    train(data_dir, "--max_steps", "4", "--lr", "1e-3", *back)
    log = (logdir / "log.txt").read_text()
    assert f"going on from {logdir / 'model000002.pt'}: weights, ema_0.9999_000002.pt, opt000002.pt, state" in log
    assert f"going on from {logdir / 'model000003.pt'}: weights" in log
    assert "going on with --lr 0.001, before it was 0.01" in log
    assert largest_difference(far, weights(logdir / "model000004.pt")) > 0
    with open(logdir / "progress.csv") as file:
        rows = [(row["step"], float(row["lr"])) for row in csv.DictReader(file) if row["mode"] == "train"]
    assert rows == [("1", 1e-2), ("2", 1e-2), ("3", 1e-3), ("4", 1e-3)]


@pytest.mark.parametrize("name", ["model.pt", "model000007.pt"])
def test_resume_checkpoint_fine_tunes_as_there(data_dir, logdir, monkeypatch, name):
    """From another folder: with a step in its name training goes on from it, without one it begins with the weights."""
    train(data_dir, "--max_steps", "1", "--ema_rate", "0.5")
    source = logdir.parent / "theirs" / name
    source.parent.mkdir()
    source.write_bytes((logdir / "model000001.pt").read_bytes())
    monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / "tuned"))
    step = 7 * ("7" in name)
    train(data_dir, "--max_steps", str(step + 1), "--lr", "1e-12", "--resume_checkpoint", str(source))
    tuned = logdir.parent / "tuned"
    assert largest_difference(weights(tuned / f"model{step + 1:06d}.pt"), weights(source)) < 1e-9
    log = (tuned / "log.txt").read_text()
    if step:
        assert f"going on from {source}: weights; there is no ema_0.9999_000007.pt, no opt000007.pt, no state" in log
    else:
        assert f"beginning at step 0 with the weights of {source}, and nothing else" in log


def test_another_batch_size_goes_on_in_the_data(data_dir, logdir, monkeypatch, capsys):
    seen = []

    def recording(*args, stream=image_train.stream, **options):
        for batch, cond in stream(*args, **options):
            seen.append(cond["path"])
            yield batch, cond

    monkeypatch.setattr(image_train, "stream", recording)
    train(data_dir, "--max_steps", "3", "--batch_size", "4")
    train(data_dir, "--max_steps", "6", "--batch_size", "2")
    printed = capsys.readouterr().out + (logdir / "log.txt").read_text()
    assert "going on with 1 x 2 samples a step (ranks x batch), before it were 1 x 4" in printed
    resumed = list(itertools.chain(*seen[3:6]))
    with open(logdir / "progress.csv") as file:
        assert [row["samples"] for row in csv.DictReader(file)] == ["4", "8", "12", "14", "16", "18"]
    seen.clear()
    monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / "calm"))
    train(data_dir, "--max_steps", "9", "--batch_size", "2")
    assert list(itertools.chain(*seen[:9]))[12:18] == resumed


# ---- images without masks ----


def test_images_without_masks_are_learned_from(data_dir, logdir, tmp_path, monkeypatch):
    """The log counts them, and the checkpoint says how they are marked: to sampling, and to fine-tuning."""
    other = write_images(tmp_path / "other", count=5)
    (other / "copy.png").write_bytes((data_dir / "MoNuSegTrainingData" / "images" / "slide-0_000.png").read_bytes())
    flags = ["--ema_rate", "0.9", "--drop_rate", "0.3", "--max_steps", "3"]
    train(data_dir, *flags, "--unlabelled_dir", str(other), "--unlabelled_share", "0.3", "--save_interval", "2")
    with open(logdir / "progress.csv") as file:
        rows = [(row["samples"], row["unlabelled_samples"]) for row in csv.DictReader(file)]
    assert rows == [("4", "1"), ("8", "2"), ("12", "3")]
    result = json.loads((logdir / "result.json").read_text())
    assert (result["images"], result["unlabelled_images"]) == (8, 5)
    line = "8 labelled images, 5 without masks; 1 more are labelled ones, and left out"
    assert line in (logdir / "log.txt").read_text()

    made = tmp_path / "made"
    sample = (
        f"--data_dir {data_dir} --use_train True --num_samples 2 --s 2 --num_steps 2 --sampler dpmpp_2m --num_workers 0"
    )
    shown = []
    show = ConditionCache._shown
    watch = staticmethod(lambda model, y, keep: shown.append(y) or show(model, y, keep))
    monkeypatch.setattr(ConditionCache, "_shown", watch)
    path = str(logdir / "ema_0.9_000003.pt")
    image_sample.main([*sample.split(), "--model_path", path, "--results_path", str(made)])
    expected = th.zeros(1, 6, 16, 16)
    expected[:, 5] = -1
    assert th.equal(shown[0].cpu(), expected) and len(list((made / "samples").iterdir())) == 2

    monkeypatch.setenv("OPENAI_LOGDIR", str(logdir.parent / "tuned"))
    train(data_dir, *flags, "--init_checkpoint", path)
    assert json.loads((logdir.parent / "tuned" / "config.json").read_text())["mark_unknown"] is True
    with pytest.raises(
        ValueError, match="trained with --mark_unknown True, this run has --mark_unknown False: give the"
    ):
        train(data_dir, *flags, "--init_checkpoint", path, "--mark_unknown", "False")
    logdir.rename(logdir.parent / "away")  # the same command goes on without it
    train(data_dir, *flags, "--max_steps", "4", "--init_checkpoint", path)


def test_other_images_without_masks_are_another_run(data_dir, logdir, tmp_path, monkeypatch):
    other = write_images(tmp_path / "other")
    flags = ["--max_steps", "1"]
    train(data_dir, *flags, "--unlabelled_dir", str(other))
    other = other.rename(tmp_path / "moved")
    train(data_dir, *flags, "--unlabelled_dir", str(other))
    assert (
        f"going on with --unlabelled_dir {other}, before it was {tmp_path / 'other'}"
        in (logdir / "log.txt").read_text()
    )
    with pytest.raises(
        ValueError, match=r"--unlabelled_share 0\.5, this one has --unlabelled_share 0\.3: give the same"
    ):
        train(data_dir, *flags, "--unlabelled_dir", str(other), "--unlabelled_share", "0.3")
    with pytest.raises(ValueError, match="--unlabelled_dir '' does not hold the images that the run in .* began with"):
        train(data_dir, *flags)
    write_images(other, count=1, first=300)
    with pytest.raises(
        ValueError, match=f"--unlabelled_dir '{other}' does not hold .* give those; or, to go on with others"
    ) as caught:
        train(data_dir, *flags, "--unlabelled_dir", str(other))
    assert str(caught.value).endswith("its last model by --resume_checkpoint and another OPENAI_LOGDIR")
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "second"))
    resumed = ["--max_steps", "2", "--resume_checkpoint", str(logdir / "model000001.pt")]
    train(data_dir, *resumed, "--unlabelled_dir", str(other))


def test_a_model_without_the_mark_can_be_taught_it(data_dir, logdir, tmp_path, monkeypatch):
    """By fine-tuning, where it has a fresh optimiser; not by going on."""
    train(data_dir, "--max_steps", "1")
    unlabelled = ["--unlabelled_dir", str(write_images(tmp_path / "other"))]
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "tuned"))
    with pytest.raises(ValueError, match="trained with --mark_unknown False, this run has --mark_unknown True"):
        train(data_dir, "--max_steps", "2", *unlabelled, "--resume_checkpoint", str(logdir / "model000001.pt"))
    train(data_dir, "--max_steps", "1", *unlabelled, "--init_checkpoint", str(logdir / "model000001.pt"))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_file_that_cannot_be_read_keeps_the_last_checkpoint(data_dir, logdir, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr("guided_diffusion.image_datasets.CHECKED", 1)
    other = write_images(tmp_path / "other", count=40)
    (other / "other-52_001.png").write_bytes(b"no image")
    flags = ["--unlabelled_dir", str(other), "--save_interval", "1", "--num_workers", workers]
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: train(data_dir, "--max_steps", "100", *flags))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith(f"error: {other / 'other-52_001.png'} is not an image")
    steps = checkpoint_sets.steps(str(logdir))
    assert not multiprocessing.active_children()
    assert 1 <= steps[-1] < 20 and checkpoint.is_whole(str(logdir / checkpoint.model_name(steps[-1])))


# ---- several ranks ----


def launch(command, data_dir, out, *flags):
    env = {**os.environ, "OPENAI_LOGDIR": str(out), "OPENAI_LOG_FORMAT": "log", "OMP_NUM_THREADS": "1"}
    command = [*command, "image_train.py", "--data_dir", str(data_dir), *TINY, "--lr", "1e-4", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def train_and_look(argv):
    """image_train.main, which fails where what holds on to the process group outlives training: see run_loop."""
    shutdown = dist_util.shutdown

    def checked():
        left = [found for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]
        shutdown()
        if left:
            raise ValueError("DistributedDataParallel outlives training")

    dist_util.shutdown = checked
    image_train.main(argv)


def ranks(count, data_dir, out, *flags):
    """:return: the exit codes of so many ranks, and what they print on stderr."""
    argv = ["--data_dir", str(data_dir), *TINY, *TRAIN, *flags]
    started = start_ranks(count, train_and_look, argv, out, OPENAI_LOGDIR=str(out), OPENAI_LOG_FORMAT="log")
    return [rank.wait() for rank in started], out.with_suffix(".err").read_text()


@pytest.mark.slow
def test_two_ranks_equal_one(data_dir, logdir, tmp_path):
    flags = ["--max_steps", "5", "--drop_rate", "0.3", "--augment", "True", "--total_batch_size", "8"]
    flags += ["--unlabelled_dir", str(write_images(tmp_path / "other")), "--unlabelled_share", "0.3"]
    flags += [*write_class_masks(data_dir / "MoNuSegTrainingData"), "--balance_classes", "True"]
    train(data_dir, *flags)
    mpiexec = [str(Path(sys.executable).with_name("mpiexec")), "-n", "2", sys.executable]
    by_mpi = launch(mpiexec, data_dir, tmp_path / "by mpi", *flags)
    assert by_mpi.returncode == 0, by_mpi.stderr
    assert ranks(2, data_dir, tmp_path / "as torchrun", *flags)[0] == [0, 0]
    for name in ("model000005.pt", "ema_0.9999_000005.pt"):
        for two in ("by mpi", "as torchrun"):
            assert largest_difference(weights(logdir / name), weights(tmp_path / two / name)) < 1e-5


@pytest.mark.slow
def test_three_ranks_and_one_line_of_error(data_dir, tmp_path):
    mpiexec = [str(Path(sys.executable).with_name("mpiexec")), "-n", "3", sys.executable]
    run = launch(mpiexec, data_dir, tmp_path / "out", "--batch_size", "3")
    assert run.returncode == 2
    assert [line for line in run.stderr.splitlines() if line.startswith("error:")] == [
        "error: --batch_size 3 is out of range: each of 3 ranks has 2 of 8 images; give 1 to 2, or --total_batch_size"
    ]
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()


def test_more_ranks_than_images(tmp_path):
    write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=2)
    codes, errors = ranks(3, tmp_path / "data", tmp_path / "out")
    assert codes == [2, 2, 2] and "3 ranks but only 2 images" in errors and "Traceback" not in errors


OUT_OF_MEMORY = """
import image_train, sys
from guided_diffusion.train_util import TrainLoop
def run_step(self, batch, cond):
    raise RuntimeError("out of memory")
TrainLoop.run_step = run_step
image_train.main(sys.argv[1:])
"""


def test_a_failure_leaves_no_worker_behind(data_dir, quick, tmp_path):
    """The end of the process would wait for one, and the launcher would never hear that this rank is gone."""
    flags = ["--data_dir", str(data_dir), *TINY, *TRAIN, "--num_workers", "1", "--max_steps", "1"]
    command = [quick, "-c", OUT_OF_MEMORY, *flags]
    env = {**os.environ, "OPENAI_LOGDIR": str(tmp_path / "out")}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith("RuntimeError: out of memory"), run.stderr


# ---- mistakes ----


@pytest.mark.parametrize("split", ["slides", "test"])
def test_images_without_masks_are_none_to_validate_on(data_dir, tmp_path, split):
    """Nor are previews made of them, which take the parts' items, too."""
    write_patches(data_dir / "MoNuSegTrainingData", first=8)  # a third and a fourth slide
    flags = ["--unlabelled_dir", str(write_images(tmp_path / "other")), "--val_split", split]
    args, _ = image_train.resolve(["--data_dir", str(data_dir), *TINY, *flags])
    seen, held = image_train.load_parts(args, condition_spec(vars(args)))
    assert (seen.unlabelled, held.unlabelled) == (8, 0)
    assert all("other" not in source.image for source in held.sources)


def test_a_run_does_not_lie_among_its_images(data_dir, monkeypatch):
    """Previews of it would be images to learn from."""
    monkeypatch.setenv("OPENAI_LOGDIR", str(data_dir / "MoNuSegTrainingData" / "images"))
    with pytest.raises(ValueError, match="OPENAI_LOGDIR .* lies among the images of --data_dir"):
        image_train.main(["--data_dir", str(data_dir), *TINY])


MISTAKES = {
    "no heads": (["--num_heads", "-7"], "--num_heads -7 must lie in"),
    "heads above": (["--num_heads_upsample", "0"], "--num_heads_upsample 0 must be -1 or at least 1"),
    "no device": (["--device", ""], "--device : give auto, cpu, cuda"),
    "no folder": (["--data_dir", "nowhere"], "--data_dir 'nowhere' is not a folder"),
    "channels": (["--num_classes", "5"], "--num_classes 5.*6 channels"),
    "no classes": (
        ["--class_cond", "True"],
        r"slide-0_00\d.tif has no classes in class_masks beside it, which --class",
    ),
    "nothing to balance": (["--balance_classes", "True"], "--balance_classes True with --class_cond False: it is for"),
    "mode": (["--dataset_mode", "coco"], "--dataset_mode coco"),
    "schedule": (["--noise_schedule", "sigmoid"], "--noise_schedule sigmoid"),
    "sampler": (["--schedule_sampler", "best"], "--schedule_sampler best"),
    "size": (["--image_size", "17", "--attention_resolutions", "17"], "--image_size 17 does not divide by 2"),
    "image too small": (["--image_size", "64", "--attention_resolutions", "32"], "smaller than --image_size 64"),
    "batch": (["--batch_size", "9"], "--batch_size 9"),
    "boolean": (["--use_hv_map", "perhaps"], "use_hv_map.*'perhaps' is neither True nor False"),
    "number": (["--lr", "fast"], "--lr.*'fast'"),
    "flag": (["--no_such_flag", "1"], "--no_such_flag"),
    "checkpoint": (["--resume_checkpoint", "nowhere/model000001.pt"], "nowhere/model000001.pt is not a file"),
    "both": (
        ["--resume_checkpoint", "model000001.pt", "--init_checkpoint", "b"],
        "--resume_checkpoint and --init_checkpoint",
    ),
    "pairing": (["--match_struct", "True"], "--match_struct True pairs images with the masks of others"),
    "too few steps": (["--resume_checkpoint", "model000009.pt"], "--max_steps 1 is below the resumed step 9"),
    "subsample": (["--subsample", "1.5"], "--subsample 1.5"),
    "ema": (["--ema_rate", "1"], "--ema_rate 1"),
    "drop": (["--drop_rate", "2"], "--drop_rate 2"),
    "seed": (["--seed", "-1"], "--seed -1"),
    "jitter": (["--stain_jitter", "1"], r"--stain_jitter 1.0 must lie in \[0, 1\)"),
    "grey jitter": (["--stain_jitter", "0.1", "--in_channels", "1"], "--stain_jitter with --in_channels 1"),
    "large seed": (["--seed", "99999999999999999999"], "--seed: 99999999999999999999 has more than 64 bits"),
    "workers": (["--num_workers", "-1"], "--num_workers -1"),
    "nan": (["--lr", "nan"], "--lr nan"),
    "decay": (["--weight_decay", "-1"], "--weight_decay -1"),
    "heads": (["--num_head_channels", "12"], "--num_head_channels 12"),
    "respacing": (["--timestep_respacing", "ddim700"], "--timestep_respacing ddim700"),
    "validation": (["--val_split", "best"], "--val_split best: choose one of slides, test, none"),
    "no share": (["--val_share", "0"], "--val_share 0.0 must lie in"),
    "kept": (["--keep_checkpoints", "0"], "--keep_checkpoints 0: give at least 1, or all"),
    "precision": (["--precision", "fp8"], "--precision fp8: choose one of fp32, bf16, fp16"),
    "fp16": (["--precision", "fp16"], "--precision fp16 on a CPU.*give bf16 or fp32"),
    "microbatch": (["--microbatch", "few"], "--microbatch few is neither a number nor auto"),
    "divisor": (["--microbatch", "3"], "--microbatch 3 does not divide --batch_size 4"),
    "two predictions": (
        ["--predict_v", "True", "--predict_xstart", "True"],
        "--predict_v True with --predict_xstart True",
    ),
    "structures": (["--structure_dir", "masks"], "--structure_dir"),
    "SPADE": (["--spade_channels", "0"], "--spade_channels 0 must"),
    "gamma": (["--loss_weights", "min_snr", "--min_snr_gamma", "0"], "--min_snr_gamma 0"),
    "weights": (["--loss_weights", "snr"], "unknown --loss_weights snr: choose one of none, min_snr"),
    "clip": (["--grad_clip", "-1"], "--grad_clip -1"),
    "share": (["--unlabelled_share", "0.3"], "--unlabelled_share 0.3 without --unlabelled_dir: give the images"),
    "whole share": (["--unlabelled_share", "1"], r"--unlabelled_share 1.0 must lie in \(0, 1\)"),
    "no unlabelled share": (["--unlabelled_share", "0"], r"--unlabelled_share 0.0 must lie in \(0, 1\)"),
    "unlabelled": (["--unlabelled_dir", "nowhere"], "--unlabelled_dir 'nowhere' is not a folder: give one of images"),
    "no edges": (["--unlabelled_dir", ".", "--no_instance", "True", "--num_classes", "5"], "--no_instance True leaves"),
    "no mark": (["--unlabelled_dir", ".", "--mark_unknown", "False"], "--unlabelled_dir with --mark_unknown False"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_line_and_write_nothing(data_dir, logdir, capsys, name):
    flags, message = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: train(data_dir, "--max_steps", "1", *flags))
    assert stop.value.code == 2 and not logdir.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(message, error), error


def test_other_configuration_is_named(data_dir, logdir, capsys):
    train(data_dir, "--max_steps", "1")
    path = str(logdir / "model000001.pt")
    with pytest.raises(ValueError, match="trained with --num_channels 32, this run has --num_channels 64"):
        train(data_dir, "--resume_checkpoint", path, "--num_channels", "64")
    (logdir / "config.json").unlink()
    with pytest.raises(ValueError, match="is .* there and .* in this configuration"):
        train(data_dir, "--resume_checkpoint", path, "--num_channels", "64")


def test_bad_log_format(data_dir, logdir, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,wandb")
    with pytest.raises(ValueError, match="OPENAI_LOG_FORMAT.*'wandb'"):
        train(data_dir, "--max_steps", "1")
    assert not logdir.exists()


def test_a_log_folder_that_is_a_file(data_dir, logdir, capsys):
    logdir.write_text("not a folder")
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: train(data_dir, "--max_steps", "1"))
    assert stop.value.code == 2 and logdir.read_text() == "not a folder"
    assert re.search(
        r"^error: log folder .* is a file; set OPENAI_LOGDIR to a folder\n$", capsys.readouterr().err, re.M
    )
