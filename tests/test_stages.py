"""Stages that are skipped when done; the pipeline and the experiment, whole, on toy slides."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from guided_diffusion.images import list_items, slide_of
from scripts import make_toy_monuseg

ROOT = Path(__file__).resolve().parents[1]


def bash(*command, **environment):
    env = {**os.environ, "PYTHON": sys.executable, "NPROC": "1", "OMP_NUM_THREADS": "1", **environment}
    env.pop("OPENAI_LOGDIR", None)
    return subprocess.run(["bash", *map(str, command)], env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture
def stages(tmp_path):
    """:return: a function that runs lines of bash after `begin_stages`."""

    def run(*lines, **environment):
        script = tmp_path / "script.sh"
        head = [f"source {ROOT}/scripts/flags.sh", f"source {ROOT}/scripts/stages.sh", f"begin_stages {tmp_path}/out"]
        script.write_text("\n".join([*head, *lines, "echo end"]) + "\n")
        return bash(script, **environment)

    return run


def copies(tmp_path) -> str:
    """A command that leaves its output and counts how often it ran."""
    return f'bash -c "echo x >>{tmp_path}/runs; touch {tmp_path}/made" NAME'


def times(tmp_path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def test_a_stage_runs_once(stages, tmp_path):
    line = f"stage one {tmp_path}/made {copies(tmp_path)}"
    first, second = stages(line), stages(line)
    assert first.returncode == second.returncode == 0 and times(tmp_path) == 1
    assert first.stdout.startswith("[one] bash -c") and second.stdout == "end\n"


@pytest.mark.parametrize("change", ["output gone", "other command"])
def test_a_stage_runs_again_where_it_must(stages, tmp_path, change):
    stages(f"stage one {tmp_path}/made {copies(tmp_path)}")
    if change == "output gone":
        (tmp_path / "made").unlink()
    flag = "--more" if change == "other command" else ""
    assert stages(f"stage one {tmp_path}/made {copies(tmp_path)} {flag}").returncode == 0 and times(tmp_path) == 2


def test_a_stage_that_fails_ends_the_run_and_is_not_done(stages, tmp_path):
    run = stages(f"stage one {tmp_path}/made bash -c 'touch {tmp_path}/made; exit 7'")
    assert run.returncode == 7 and "end\n" not in run.stdout
    assert stages(f"stage one {tmp_path}/made {copies(tmp_path)}").returncode == 0 and times(tmp_path) == 1


def test_a_stage_without_its_output(stages, tmp_path):
    run = stages(f"stage one {tmp_path}/made true")
    assert run.returncode == 2 and re.search(r"error: stage one left no .*/made", run.stderr)


def test_a_changed_stage_has_those_after_it_done_anew(stages, tmp_path):
    second = f"stage two {tmp_path}/made {copies(tmp_path)}"
    for flag in ("", "", f"{tmp_path}/other", f"{tmp_path}/other"):
        assert stages(f"stage one {tmp_path}/first touch {tmp_path}/first {flag}", second).returncode == 0
    assert times(tmp_path) == 2


def test_stages_that_begin_at_the_same_one_do_not_see_each_other(stages, tmp_path):
    two = "before=trunk", f"stage two {tmp_path}/made {copies(tmp_path)}"
    stages("before=trunk", f"stage one {tmp_path}/first touch {tmp_path}/first", *two)
    assert stages(*two).returncode == 0 and times(tmp_path) == 1


def test_settings_of_the_environment_are_part_of_a_stage(stages, tmp_path):
    line = f"stage one {tmp_path}/made {copies(tmp_path)}"
    for settings in ("s=1", "s=1", "s=2"):
        stages(f"settings={settings} {line}")
    assert times(tmp_path) == 2


@pytest.mark.parametrize("stopped", [False, True])
def test_what_goes_on_from_its_files_is_refused_after_another_stage(stages, tmp_path, stopped):
    """Also where it was stopped before its end; not where its folder is gone."""
    folder = tmp_path / "run"
    make = f"bash -c 'mkdir -p {folder}; {'exit 7' if stopped else f'touch {folder}/done'}'"
    assert stages("before=a", f"resumed train {folder}/done {make}").returncode == (7 if stopped else 0)
    run = stages("before=b", f"resumed train {folder}/done true")
    assert run.returncode == 2 and run.stderr == (
        f"error: stage train was begun before an earlier one changed: remove {folder}, or give another OUT\n"
    )
    if not stopped:  # a record, not what was begun
        other = stages("before=a", f"settings=LR=2 resumed train {folder}/done {make}")
        assert other.returncode == 2 and "stage train was begun with other settings: remove" in other.stderr
    folder.rmdir() if stopped else shutil.rmtree(folder)
    again = f"bash -c 'mkdir -p {folder}; touch {folder}/done'"
    assert stages("before=b", f"resumed train {folder}/done {again}").returncode == 0


def test_what_goes_on_may_go_on_for_longer(stages, tmp_path):
    (tmp_path / "run").mkdir()
    for steps, samples in ((10, 4), (20, 4), (20, 8)):
        output = tmp_path / "run" / f"{steps}-{samples}"
        (tmp_path / "step.sh").write_text(f"echo x >>{tmp_path}/runs; touch {output}\n")
        line = f"resumed train {output} bash {tmp_path}/step.sh --max_steps {steps}"
        assert stages(f"settings=NUM_SAMPLES={samples} {line}").returncode == 0
    assert times(tmp_path) == 3


def test_the_launcher_is_no_part_of_a_stage(stages, tmp_path):
    """Other counts of processes and interpreters go on from the same files."""
    (tmp_path / "made").touch()
    launchers = sys.executable, f"env A=1 {sys.executable}"
    runs = [stages(f"stage one {tmp_path}/made {way} {ROOT}/scripts/subset_slides.py --help") for way in launchers]
    assert runs[0].stdout.startswith("[one]") and runs[1].returncode == 0 and runs[1].stdout == "end\n"


def test_a_limit_stops_in_time_and_the_next_run_goes_on(stages, tmp_path):
    slow = f"stage one {tmp_path}/made bash -c 'sleep 30; touch {tmp_path}/made'"
    began = time.monotonic()
    run = stages(slow, TIME_LIMIT="1")
    assert run.returncode == 0 and "TIME_LIMIT=1 is over: the same command goes on" in run.stdout
    assert time.monotonic() - began < 20 and "end\n" not in run.stdout
    assert stages(f"stage one {tmp_path}/made {copies(tmp_path)}", TIME_LIMIT="60").stdout.endswith("end\n")
    run = stages("true", TIME_LIMIT="soon")
    assert run.returncode == 2 and "TIME_LIMIT=soon is not a number of seconds" in run.stderr


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "raw"
    make_toy_monuseg.main([str(folder), "--train", "6", "--test", "2", "--size", "256"])
    return folder


@pytest.mark.slow
def test_pipeline(slides, tmp_path):
    out = tmp_path / "out"
    run = bash(ROOT / "scripts" / "pipeline.sh", slides, out, "--toy")
    assert run.returncode == 0, run.stderr[-3000:]
    items = list_items(str(out / "set"), "monuseg")
    real = list_items(str(out / "patches"), "monuseg")
    with open(out / "set" / "manifest.csv", newline="") as file:
        sources = [row["source"] for row in csv.DictReader(file)]
    assert sources.count("real") == len(real) == 96 and sources.count("synthetic") == len(items) - 96 == 10
    again = bash(ROOT / "scripts" / "pipeline.sh", slides, out, "--toy")
    assert again.returncode == 0 and "[" not in again.stdout
    fewer = bash(ROOT / "scripts" / "pipeline.sh", slides, out, "--toy", RATIO="0.05")
    assert fewer.returncode == 0 and re.findall(r"^\[.*?\]", fewer.stdout, re.M) == ["[set]"]
    assert len(list_items(str(out / "set"), "monuseg")) == 96 + 5
    other = bash(ROOT / "scripts" / "pipeline.sh", slides, out, "--toy", BACKBONE="stain")
    assert other.returncode == 2 and re.findall(r"^\[.*?\]", other.stdout, re.M) == ["[features]", "[clusters]"]
    assert re.search(r"error: stage finetune-\d was begun before an earlier one changed", other.stderr)


# Makes what the pipeline's programs make, up to a fine-tuning that a signal stopped.
STUB = """#!/usr/bin/env bash
case $1 in
    *make_toy_monuseg.py) mkdir -p "$2"; [[ -e $2/train ]] || { touch "$2/train"; exit 7; } ;;
    *prepare_monuseg.py) mkdir -p "$3"; touch "$3/prepare.json" ;;
    *extract_features.py) touch "${@: -1}" ;;
    *cluster_patches.py)
        mkdir -p "$2"/clusters/0/MoNuSegTrainingData/images
        touch "$2"/clusters/0/MoNuSegTrainingData/images/a.png "$2/clusters/scores.json" ;;
    *image_train.py)
        mkdir -p "$OPENAI_LOGDIR"
        [[ $OPENAI_LOGDIR == *finetune* ]] && output=result.json || output=ema_0.9_000020.pt
        touch "$OPENAI_LOGDIR/$output" ;;
esac
"""


@pytest.fixture
def toy(tmp_path):
    """:return: a function that runs the toy pipeline, from slides that are not drawn yet, with a stub for python."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)

    def run(**environment):
        arguments = tmp_path / "raw", tmp_path / "out", "--toy"
        return bash(ROOT / "scripts" / "pipeline.sh", *arguments, PYTHON=str(tmp_path / "python"), **environment)

    return run


def test_slides_that_were_not_drawn_to_the_end_are_drawn_again(toy, tmp_path):
    assert toy().returncode == 7 and not (tmp_path / "raw").exists()
    assert "[patches]" in toy().stdout and (tmp_path / "raw" / "train").exists()
    assert not (tmp_path / "raw.part").exists()


def test_a_fine_tuning_that_was_stopped_is_not_done(toy, tmp_path):
    (tmp_path / "raw").mkdir()
    run = toy(PRETRAIN_STEPS="000020")  # not octal
    assert run.returncode == 2 and re.fullmatch(
        r"error: stage finetune-0 left no .*/finetune-clus0/ema_0.9_000020.pt\n", run.stderr
    )
    assert (tmp_path / "out" / "finetune-clus0" / "result.json").exists()


def test_clusters_are_known_before_the_pretraining(toy, tmp_path):
    (tmp_path / "raw").mkdir()
    run = toy(CLUSTERS="0 6")
    assert run.returncode == 2 and run.stderr.endswith("has no training patches of 6\n")
    assert "[clusters]" in run.stdout and "[pretrain]" not in run.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ITERATIONS": "000010 000015"}, "000015 is no multiple of SAVE_INTERVAL=10"),
        ({"ITERATIONS": "000030"}, "000030 comes after FINETUNE_STEPS=20"),
        ({"ITERATIONS": "last"}, "last is not a number of steps"),
        ({"PRETRAIN_STEPS": "many"}, "PRETRAIN_STEPS=many is not a number of steps"),
    ],
)
def test_steps_are_checked_before_anything_is_written(toy, tmp_path, environment, message):
    run = toy(**environment)
    assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "raw.part").exists()


@pytest.mark.slow
def test_experiment(slides, tmp_path):
    config = tmp_path / "toy.conf"
    config.write_text((ROOT / "scripts" / "experiment_toy.conf").read_text())  # of 100 and 50 %
    out = tmp_path / "out"
    command = [ROOT / "scripts" / "experiment.sh", slides, out, config]
    first = bash(*command, CELLS="none")
    assert first.returncode == 0 and "look at" not in first.stdout and not list(out.glob("f*")), first.stderr[-3000:]
    run = bash(*command, CELLS="f50-s0")
    assert run.returncode == 0 and "[patches]" not in run.stdout and "results.png" in run.stdout, run.stderr[-3000:]
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["real", "colour", "unfiltered", "filtered", "filtered-colour"]
    assert all(0 <= float(row["aji"]) <= 1 and row["fraction"] == "50" for row in rows)
    with open(out / "f50-s0" / "samples" / "manifest.csv", newline="") as file:
        structures = [Path(row["structure"]).stem for row in csv.DictReader(file)]
    # Ten of 48 structures, yet of all three slides.
    assert len(structures) == 10 and len({slide_of(stem) for stem in structures}) == 3
    assert len(list_items(str(out / "f50-s0" / "filtered-set"), "monuseg")) == 48 + 5
    assert json.loads((out / "f50-s0" / "real" / "test" / "metrics.json").read_text())["average"]
    assert Image.open(out / "results.png").width > 600
    for cells in ("f50-s0", "none"):
        again = bash(*command, CELLS=cells)
        assert again.returncode == 0 and "[" not in again.stdout
    config.write_text(config.read_text() + "S=2\n")
    other = bash(*command)
    assert other.returncode == 2 and "begun with another CONFIG" in other.stderr


def test_an_unknown_cell_is_refused(slides, tmp_path):
    config = ROOT / "scripts" / "experiment_toy.conf"
    run = bash(ROOT / "scripts" / "experiment.sh", slides, tmp_path / "out", config, CELLS="f50-s0 f50-s1")
    assert run.returncode == 2 and run.stderr == "error: CELLS names f50-s1: choose of f100-s0 f50-s0, or none\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["pipeline.sh", "experiment.sh"])
def test_mistakes(script, slides, tmp_path):
    (tmp_path / "file").touch()
    for arguments, message in (
        ([slides], f"usage: bash scripts/{script} RAW OUT"),
        ([tmp_path / "none", tmp_path / "out"], "RAW .*/none is not a folder"),
        ([slides, tmp_path / "file"], "OUT .*/file is a file"),
    ):
        run = bash(ROOT / "scripts" / script, *arguments)
        assert run.returncode == 2 and re.search(message, run.stderr) and run.stderr.count("\n") == 1, run.stderr
    assert not (tmp_path / "out").exists()
