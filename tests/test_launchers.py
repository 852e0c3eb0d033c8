import csv
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TINY, write_patches

import image_sample
import image_train
from guided_diffusion import slides
from guided_diffusion.script_util import condition_spec
from guided_diffusion.train_options import TrainOptions
from scripts import summarise_runs

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
(WEIGHTS,) = (ROOT / "weights").glob("ema_*.pt")
FIELD, END = "\x1f", "\x1e\n"

# Writes down how it was called. `python -m venv DIR` also puts it there; it fails where an argument is FAIL.
STUB = """#!/bin/sh
{ printf '%s\\037' "$0" "$PWD" "$OPENAI_LOGDIR" "$OPENAI_LOG_FORMAT" "$@"; printf '\\036\\n'; } >>"$RECORD"
case " $* " in *" ${FAIL:-none} "*) exit 1 ;; esac
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
fi
"""

# The commands of the reference's README, with its variables filled in.
MODEL = """
 --attention_resolutions 32,16,8 --diffusion_steps 1000
 --learn_sigma True --noise_schedule cosine --num_channels 128 --num_head_channels 32 --num_res_blocks 2
 --resblock_updown True --use_fp16 True --use_scale_shift_norm True
 --num_classes 6 --class_cond False --use_hv_map True --use_col_map True --no_instance False
"""
TRAIN = f"""--data_dir data --dataset_mode monuseg --image_size 128 --lr 1e-4 --batch_size 8 --use_checkpoint True
 --save_interval 005000 {MODEL}"""
SAMPLE = f"""--data_dir data --dataset_mode monuseg --use_train True --image_size 128
 --shuffle_masks False --match_struct True --match_app False {MODEL} --batch_size 16 --num_samples 1000"""
# What the launchers add to it: a few steps for the thousand.
FEW = " --sampler dpmpp_2m_sde --num_steps 25"


@dataclass(frozen=True)
class Call:
    """One call of a stub: the program as called, where, its two OPENAI variables, and its arguments."""

    program: str
    cwd: str
    logdir: str
    log_format: str
    argv: list[str]


@dataclass(frozen=True)
class Run:
    code: int
    out: list[str]
    err: list[str]
    calls: list[Call]

    @property
    def trainings(self) -> list[Call]:
        """But for those that check flags alone."""
        program, trial = str(ROOT / "image_train.py"), ["--dry_run", "True"]
        return [call for call in self.calls if program in call.argv and call.argv[1:3] != trial]


Launch = Callable[..., Run]


@pytest.fixture
def launch(tmp_path) -> Launch:
    """Runs a script in tmp_path/here with stubs for python, mpiexec and nvidia-smi, and no variable of the caller's."""
    stubs, here = tmp_path / "stubs", tmp_path / "here"
    here.mkdir()
    for name in ("python", "mpiexec"):
        write_stub(stubs / name)
    # Whatever GPUs this machine has.
    write_stub(stubs / "nvidia-smi", "#!/bin/sh\nexit 9\n")

    def run(script: str | Path, *args: str, **env: str) -> Run:
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        path = f"{stubs}{os.pathsep}{os.defpath}"
        result = subprocess.run(
            ["bash", str(script) if "/" in str(script) else str(ROOT / "scripts" / script), *args],
            cwd=here,
            env={"PATH": path, "HOME": str(tmp_path), "RECORD": str(record), "PYTHON": "python", **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = record.read_text().split(END)[:-1] if record.exists() else []
        fields = [line.split(FIELD)[:-1] for line in lines]
        calls = [Call(Path(f[0]).name, *f[1:4], f[4:]) for f in fields]
        return Run(result.returncode, result.stdout.splitlines(), result.stderr.splitlines(), calls)

    return run


def write_stub(path: Path, text: str = STUB) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make_clusters(data: Path, *labels: str) -> None:
    for label in labels:
        (data / label / "MoNuSegTrainingData").mkdir(parents=True)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def value(argv: list[str], flag: str) -> str:
    """The value of the last such flag, which is the one that argparse takes."""
    return argv[len(argv) - argv[::-1].index(flag)]


def assert_stopped(run: Run, *words: str) -> None:
    assert run.code == 2
    assert run.calls == [] and run.out == []
    assert len(run.err) == 1
    for word in words:
        assert word in run.err[0]


# ---- the flags ----


def test_train_is_the_readme_command(launch):
    (call,) = launch("train.sh", "data").calls
    parser = image_train.create_argparser()
    flags = vars(parser.parse_args(call.argv[1:]))
    assert flags == vars(parser.parse_args(shlex.split(TRAIN)))
    assert condition_spec(flags).channel_names == ("hv_x", "hv_y", "colour_r", "colour_g", "colour_b", "edge")
    TrainOptions(**{name: flags[name] for name in TrainOptions.__dataclass_fields__})


def test_finetune_is_the_readme_command(launch, tmp_path):
    make_clusters(tmp_path / "here" / "data", "6")
    touch(tmp_path / "here" / "model.pt")
    (call,) = launch("finetune.sh", "data", "model.pt", "6").trainings
    (mixed,) = launch("finetune.sh", "data", "model.pt", "6", UNLABELLED="a,b").trainings
    assert value(mixed.argv, "--unlabelled_dir") == "a,b"
    parser = image_train.create_argparser()
    expected = parser.parse_args(
        shlex.split(f"{TRAIN} --drop_rate .2 --data_dir data/6 --init_checkpoint model.pt --max_steps 50000")
    )
    assert vars(parser.parse_args(call.argv[1:])) == vars(expected)


def test_sample_single_is_the_readme_command(launch):
    (call,) = launch("sample_single.sh", "data", "model.pt", "out").calls
    parser = image_sample.create_argparser()
    expected = parser.parse_args(
        [*shlex.split(SAMPLE + FEW), "--model_path", "model.pt", "--results_path", "out", "--s", "1.5"]
    )
    assert vars(parser.parse_args(call.argv[1:])) == vars(expected)
    condition_spec(vars(expected))


def test_the_environment_overrides_flags(launch):
    env = dict(IMAGE_SIZE="64", BATCH_SIZE="4", LR="2e-4", SAVE_INTERVAL="7", MAX_STEPS="9", NUM_SAMPLES="3", S="1.3")
    (train,) = launch("train.sh", "data", **env, UNLABELLED="a,b", DATA_LICENCE="CC BY").calls
    (sample,) = launch("sample_single.sh", "data", "m.pt", "out", **env).calls
    flags = ("image_size", "batch_size", "lr", "save_interval", "max_steps", "unlabelled_dir", "data_licence")
    assert [value(train.argv, f"--{flag}") for flag in flags] == ["64", "4", "2e-4", "7", "9", "a,b", "CC BY"]
    flags = ("image_size", "batch_size", "num_samples", "s")
    assert [value(sample.argv, f"--{flag}") for flag in flags] == ["64", "4", "3", "1.3"]


@pytest.mark.parametrize(
    ("words", "program"), [("train.sh data", image_train), ("sample_single.sh data m.pt out", image_sample)]
)
def test_a_recipe_is_of_training_and_sampling_alike(launch, words, program):
    plain, reference, v = (
        vars(program.create_argparser().parse_args(launch(*words.split(), **env).calls[0].argv[1:]))
        for env in ({}, {"RECIPE": "reference"}, {"RECIPE": "v"})
    )
    assert plain == reference
    changed = {"learn_sigma": False, "predict_v": True, "loss_weights": "min_snr"}
    assert {name: now for name, now in v.items() if now != plain[name]} == changed


# ---- how the programs are started ----


def test_train_starts_one_process_or_several(launch, tmp_path):
    (alone,) = launch("train.sh", "data", "--lr", "3e-4", "--dry_run", "True").calls
    assert alone.program == "python"
    assert alone.argv[:3] == [str(ROOT / "image_train.py"), "--data_dir", "data"]
    assert alone.argv[-4:] == ["--lr", "3e-4", "--dry_run", "True"]
    (several,) = launch("train.sh", "data", "--lr", "3e-4", "--dry_run", "True", NPROC="8").calls
    assert several.program == "mpiexec"
    assert several.argv == ["-n", "8", "python", *alone.argv]
    other = str(tmp_path / "other")
    write_stub(tmp_path / "other")
    (chosen,) = launch("train.sh", "data", NPROC="2", PYTHON=other, MPIEXEC="mpiexec -v").calls
    assert chosen.argv[:4] == ["-v", "-n", "2", other]


@pytest.mark.parametrize(
    ("visible", "expected"), [({}, 2), ({"CUDA_VISIBLE_DEVICES": "0,2,3"}, 3), ({"CUDA_VISIBLE_DEVICES": ""}, 1)]
)
def test_a_process_a_gpu(launch, tmp_path, visible, expected):
    write_stub(tmp_path / "stubs" / "nvidia-smi", "#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: B\\n'\n")
    (call,) = launch("train.sh", "data", **visible).calls
    assert call.program == ("mpiexec" if expected > 1 else "python")
    assert expected == 1 or call.argv[:2] == ["-n", str(expected)]
    # Of parts of GPUs a process sees one.
    write_stub(tmp_path / "stubs" / "nvidia-smi", "#!/bin/sh\nprintf 'GPU 0: A\\n  MIG 1g\\n  MIG 1g\\nGPU 1: B\\n'\n")
    assert launch("train.sh", "data", **visible).calls[0].program == "python"


def test_no_gpu_is_one_process(launch, tmp_path):
    write_stub(tmp_path / "stubs" / "nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    run = launch("train.sh", "data", CUDA_VISIBLE_DEVICES="0,1")
    assert [call.program for call in run.calls] == ["python"] and run.err == []


def test_log_folder_and_formats(launch):
    (call,) = launch("train.sh", "data").calls
    assert (call.logdir, call.log_format) == ("OUTPUT/SDM-MoNuSeg", "stdout,log,csv,tensorboard")
    (call,) = launch("train.sh", "data", OUT="elsewhere").calls
    assert call.logdir == "elsewhere/SDM-MoNuSeg"
    (call,) = launch("train.sh", "data", OPENAI_LOGDIR="run 1", OPENAI_LOG_FORMAT="json").calls
    assert (call.logdir, call.log_format) == ("run 1", "json")


def test_paths_stay_the_callers(launch, tmp_path):
    """Scripts are called by a relative path from a folder of the caller's; the programs run in that folder."""
    here = tmp_path / "here"
    link = tmp_path / "a repository"
    link.symlink_to(ROOT)
    run = launch(os.path.relpath(link / "scripts" / "train.sh", here), "../my data", "--resume_checkpoint", "m 1.pt")
    (call,) = run.calls
    assert call.cwd == str(here)
    assert Path(call.argv[0]).is_file()
    assert value(call.argv, "--data_dir") == "../my data"
    assert value(call.argv, "--resume_checkpoint") == "m 1.pt"


def test_interpreter_of_setup_unless_another_is_active(launch, tmp_path):
    repo = tmp_path / "repo"
    shutil.copytree(ROOT / "scripts", repo / "scripts")
    for name in ("python", "mpiexec"):
        write_stub(repo / ".venv" / "bin" / name, STUB.replace('"$0" "$PWD"', '"own" "$PWD"'))
    train = repo / "scripts" / "train.sh"
    assert [call.program for call in launch(train, "data", PYTHON="").calls] == ["own"]
    assert [call.program for call in launch(train, "data", PYTHON="", NPROC="2").calls] == ["own"]
    assert [call.program for call in launch(train, "data", PYTHON="", VIRTUAL_ENV="mine").calls] == ["python"]
    assert [call.program for call in launch(train, "data", PYTHON="python").calls] == ["python"]


@pytest.mark.parametrize(
    ("script", "least"), [("train.sh", 1), ("finetune.sh", 2), ("sample_single.sh", 3), ("sample.sh", 3)]
)
def test_missing_arguments(launch, script, least):
    for args in (["x"] * (least - 1), ["x"] * (least - 1) + ["--lr", "1", "2", "3"], [""] * least, ["--help"]):
        assert_stopped(launch(script, *args), "usage:", script)


def test_mistaken_environment(launch):
    assert_stopped(launch("train.sh", "data", NPROC="two"), "NPROC=two")
    assert_stopped(launch("train.sh", "data", NPROC="0"), "NPROC=0")
    assert_stopped(launch("train.sh", "data", RECIPE="x"), "RECIPE=x is neither reference nor v")
    assert_stopped(launch("train.sh", "data", NPROC="2", MPIEXEC="no-such-launcher"), "no-such-launcher")
    for script in ("train.sh data", "finetune.sh data m.pt", "sample.sh data m out", "sample_single.sh data m.pt out"):
        assert_stopped(launch(*script.split(), PYTHON="no-such-python"), "PYTHON=no-such-python is not a program")


@pytest.mark.parametrize("script", ["demo.sh", "make_weights.sh slides {}", "gpu_check.sh {}"])
def test_a_folder_that_cannot_be_made(launch, tmp_path, script):
    (tmp_path / "here" / "slides").mkdir()
    run = launch(*script.format("/proc/new").split(), DEMO_DIR="/proc/new")
    assert run.code == 2 and run.err[-1] == "error: " + run.err[-1].removeprefix("error: ")
    assert re.search(r"/proc/new\S* cannot be made or written to", run.err[-1]) and len(run.err) == 1


def test_mistakes_with_weights(launch, tmp_path):
    assert_stopped(launch("make_weights.sh", "none", "out"), "RAW none is not a folder")
    (tmp_path / "here" / "slides").mkdir()
    assert_stopped(launch("make_weights.sh", "slides", "out", STEP="many"), "not many")
    assert_stopped(launch("make_weights.sh", "slides", "out", MAX_STEPS="5", STEP="10"), "MAX_STEPS=5 is no multiple")
    assert not (tmp_path / "here" / "out").exists()


# ---- fine-tuning ----


@pytest.fixture
def clusters(tmp_path) -> Path:
    """A pretrained model, and clusters beside folders that are none."""
    make_clusters(tmp_path / "here" / "data", "-1", "0", "6", "6/10ss")
    (tmp_path / "here" / "data" / "logs").mkdir()
    touch(tmp_path / "here" / "data" / "train.json")
    touch(tmp_path / "here" / "model.pt")
    return tmp_path / "here" / "data"


def tuned(run: Run) -> list[tuple[str, str]]:
    """(data_dir, log folder) of each training."""
    assert run.code == 0, run.err
    return [(value(call.argv, "--data_dir"), call.logdir) for call in run.trainings]


def test_finetune_takes_every_cluster(launch, clusters):
    run = launch("finetune.sh", "data/", "model.pt", "--", "--lr", "5e-5", NPROC="2")
    assert tuned(run) == [(f"data/{label}", f"OUTPUT/SDM-MoNuSeg-clus{label}") for label in ("-1", "0", "6")]
    assert run.out[:3] == ["cluster -1 (1 of 3)", "cluster 0 (2 of 3)", "cluster 6 (3 of 3)"]
    assert run.out[3:] == ["summary: OUTPUT/SDM-MoNuSeg-finetune.csv"]
    runs = [f"{label}=OUTPUT/SDM-MoNuSeg-clus{label}" for label in ("-1", "0", "6")]
    summary = [str(ROOT / "scripts/summarise_runs.py"), "--", "OUTPUT/SDM-MoNuSeg-finetune.csv"]
    assert run.calls[-1].argv == [*summary, *runs]
    # It takes all of these for runs, though -1 is the first, and asks for what the trainings have left.
    with pytest.raises(FileNotFoundError, match="clus-1/result.json is missing"):
        summarise_runs.main(run.calls[-1].argv[1:])
    for call in run.trainings:
        assert call.argv[:4] == ["-n", "2", "python", str(ROOT / "image_train.py")]
        assert call.argv[-2:] == ["--lr", "5e-5"]
        assert value(call.argv, "--init_checkpoint") == "model.pt"


def test_finetune_takes_named_clusters(launch, clusters):
    assert tuned(launch("finetune.sh", "data", "model.pt", "-1")) == [("data/-1", "OUTPUT/SDM-MoNuSeg-clus-1")]
    run = launch("finetune.sh", "data", "model.pt", "6", "6/10ss", "--", "--seed", "1", OPENAI_LOGDIR="a/b")
    assert tuned(run) == [("data/6", "a/b-clus6"), ("data/6/10ss", "a/b-clus6_10ss")]


def test_finetune_takes_a_data_dir_itself(launch, clusters):
    assert tuned(launch("finetune.sh", "data/6", "model.pt")) == [("data/6", "OUTPUT/SDM-MoNuSeg-clus6")]


def test_finetune_steps(launch, clusters):
    (call,) = launch("finetune.sh", "data", "model.pt", "6", MAX_STEPS="12").trainings
    assert value(call.argv, "--max_steps") == "12"


def test_finetune_goes_on_after_a_failure_and_fails_at_its_end(launch, clusters):
    run = launch("finetune.sh", "data", "model.pt", FAIL="data/0")
    assert run.code == 1 and len(run.trainings) == 3
    assert run.err == ["cluster 0 failed", "error: not fine-tuned: 0"]
    runs = [f"{label}=OUTPUT/SDM-MoNuSeg-clus{label}" for label in ("-1", "6")]
    assert run.calls[-1].argv[3:] == runs and run.out[-1].startswith("summary: ")
    alone = launch("finetune.sh", "data", "model.pt", "0", FAIL="data/0")
    assert alone.code == 1 and alone.err[-1] == "error: not fine-tuned: 0" and "summary" not in " ".join(alone.out)


def test_finetune_begins_no_other_cluster_where_a_training_was_asked_to_stop(launch, clusters, tmp_path):
    """By a signal that did not come to the launcher: it saved, and ended well."""
    run = tmp_path / "here/OUTPUT/SDM-MoNuSeg-clus-1"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"max_steps": 12}, indent=2))
    for step, count in ((7, 1), (12, 3)):
        (run / "result.json").write_text(json.dumps({"images": 9, "step": step, "samples": 3}, indent=2))
        ended = launch("finetune.sh", "data", "model.pt")
        assert (ended.code, len(ended.trainings)) == ((75, 1) if count == 1 else (0, 3))
        assert ended.out[-1].startswith("stopped: the same command goes on" if count == 1 else "summary: ")


# Saves at SIGTERM, as image_train.py does, and ends well.
SAVES = """#!/usr/bin/env bash
case "$1 $2" in *--dry_run) exit 0 ;; *image_train.py* | *make_toy*) ;; *) exit 0 ;; esac
trap 'sleep .5; echo saved >>"$RECORD.saved"; exit 0' TERM
echo begun >>"$RECORD.saved"
for ((i = 0; i < 100; i++)); do sleep .1; done
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize(("script", "code"), [("train.sh", 0), ("finetune.sh", 75), ("demo.sh", 143)])
def test_a_signal_to_a_launcher_stops_its_program_which_saves(clusters, repo, tmp_path, script, code, number):
    """Of this process alone, as `kill` and `docker stop` send it; it ends after its program, and begins no other."""
    if script == "train.sh" and number != signal.SIGTERM:
        pytest.skip("what became the program gets the signal itself")
    saved = tmp_path / "record.saved"
    write_stub(repo / ".venv/bin/python", SAVES)
    environment = {"PATH": os.defpath, "RECORD": str(tmp_path / "record"), "NPROC": "1"}
    checksum = hashlib.sha256((repo / "requirements.txt").read_bytes()).hexdigest()
    (repo / ".venv/setup.stamp").write_text(f"requirements.txt {checksum}  -\n")
    arguments = {"train.sh": ["data"], "finetune.sh": ["data", "model.pt"], "demo.sh": []}[script]
    command = ["bash", repo / "scripts" / script, *arguments]
    process = subprocess.Popen(
        command,
        cwd=tmp_path / "here",
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup would have ignored, by bash, too
    )
    for _ in range(200):
        if saved.exists():
            break
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code and saved.read_text() == "begun\nsaved\n"


def test_finetune_ends_where_its_training_was_stopped(launch, clusters, tmp_path):
    write_stub(tmp_path / "stubs" / "python", '#!/bin/sh\n[ "$2" = --dry_run ] || exit 75\n')
    run = launch("finetune.sh", "data", "model.pt")
    assert run.code == 75 and run.out == ["cluster -1 (1 of 3)", "stopped: the same command goes on"]


@pytest.mark.slow
def test_finetune_for_real_and_once_more(tmp_path, quick):
    """Two clusters, from a small pretrained model; the same command again finds all done and sums up the same."""
    data, logs = tmp_path / "data", tmp_path / "logs" / "run"
    for i, label in enumerate(("0", "1")):
        write_patches(data / label / "MoNuSegTrainingData", count=12 if i else 4, first=20 * i)
    images = (data / "0/MoNuSegTrainingData/images").iterdir()
    slides.write_table(data / "0", [(path.name, "one") for path in images])  # so that none is held out
    options = [
        *TINY,
        "--microbatch",
        "-1",
        "--preview_samples",
        "0",
        "--val_interval",
        "2",
        "--use_checkpoint",
        "False",
    ]
    env = {**os.environ, "OPENAI_LOGDIR": str(tmp_path / "pre"), "OPENAI_LOG_FORMAT": "log", "OMP_NUM_THREADS": "1"}
    env |= {"NPROC": "1", "PYTHON": str(quick), "BATCH_SIZE": "2", "MAX_STEPS": "2"}
    run = functools.partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True, text=True)
    run(["bash", ROOT / "scripts/train.sh", data / "0", *options, "--use_fp16", "False"], env=env)
    env |= {"OPENAI_LOGDIR": str(logs), "MAX_STEPS": "4"}
    command = ["bash", ROOT / "scripts/finetune.sh", data, tmp_path / "pre" / "ema_0.9999_000002.pt", "--", *options]
    run([*command, "--use_fp16", "False"], env=env)
    with open(f"{logs}-finetune.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["cluster"], row["images"], row["steps"]) for row in rows] == [("0", "4", "4"), ("1", "8", "4")]
    assert rows[0]["best_val_loss"] == "" and float(rows[1]["best_val_loss"]) > 0
    assert all(Path(row["path"]).is_file() for row in rows) and Path(rows[1]["path"]).parent.name == "best"
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("logs/**/*.pt")}
    run([*command, "--use_fp16", "False"], env=env)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("logs/**/*.pt")}
    with open(f"{logs}-finetune.csv") as file:
        assert rows == list(csv.DictReader(file))


def test_finetune_mistakes(launch, clusters):
    assert_stopped(launch("finetune.sh", "data", "model.pt", "6", "7"), "data/7", "MoNuSegTrainingData")
    assert_stopped(launch("finetune.sh", "nowhere", "model.pt"), "nowhere", "MoNuSegTrainingData")
    assert_stopped(launch("finetune.sh", "data", "gone.pt"), "gone.pt")
    assert_stopped(launch("finetune.sh", "data", "model.pt", "6", "--lr", "1"), "--lr", " -- ")


# ---- the sweep ----


@pytest.fixture
def models(tmp_path) -> Path:
    folder = tmp_path / "here" / "models"
    for iteration in ("030000", "040000", "050000"):
        touch(folder / f"model{iteration}.pt")
        touch(folder / f"ema_0.9999_{iteration}.pt")
    return folder


def test_sweep_is_one_command(launch, models):
    run = launch("sample.sh", "data", "models/", "out", "--use_ddim", "True")
    (call,) = run.calls
    assert call.argv[0] == str(ROOT / "image_sample.py") and call.argv[-2:] == ["--use_ddim", "True"]
    iterations = ("030000", "040000", "050000")
    assert value(call.argv, "--model_path") == ",".join(f"models/ema_0.9999_{i}.pt" for i in iterations)
    assert value(call.argv, "--s") == "1.3,1.4,1.5,1.6" and value(call.argv, "--results_path") == "out"
    parser = image_sample.create_argparser()
    own = ("model_path", "results_path", "s", "use_ddim")
    expected = {k: v for k, v in vars(parser.parse_args(shlex.split(SAMPLE + FEW))).items() if k not in own}
    assert expected.items() <= vars(parser.parse_args(call.argv[1:])).items()


def test_sweep_of_the_weights_themselves(launch, models):
    env = dict(KIND="model", ITERATIONS="40000", S_VALUES="2 3", NPROC="3", SAMPLER="unipc", NUM_STEPS="9")
    (call,) = launch("sample.sh", "data", "models", "out", **env).calls
    assert call.argv[:3] == ["-n", "3", "python"]
    assert value(call.argv, "--model_path") == "models/model040000.pt" and value(call.argv, "--s") == "2,3"
    assert value(call.argv, "--sampler") == "unipc" and value(call.argv, "--num_steps") == "9"


def test_sweep_mistakes(launch, models):
    (models / "ema_0.9999_050000.pt").unlink()
    assert_stopped(launch("sample.sh", "data", "models", "out"), "models/ema_0.9999_050000.pt")
    assert_stopped(launch("sample.sh", "data", "models", "out", ITERATIONS="last"), "ITERATIONS", "last")
    assert_stopped(launch("sample.sh", "data", "models", "out", KIND="best"), "KIND=best")
    env = dict(KIND="ema", EMA_RATE="0.99", ITERATIONS="40000")
    assert_stopped(launch("sample.sh", "data", "models", "out", **env), "models/ema_0.99_040000.pt")


# ---- setup, tests, demo ----


@pytest.fixture
def repo(tmp_path) -> Path:
    """A copy of the scripts, where they may make a .venv of stubs."""
    repo = tmp_path / "a repo"
    shutil.copytree(ROOT / "scripts", repo / "scripts")
    touch(repo / "weights" / WEIGHTS.name)
    (repo / "requirements.txt").write_text("torch==1\n")
    (repo / "requirements-workflow.txt").write_text("snakemake==1\n")
    return repo


def setup_steps(run: Run) -> list[str]:
    """What setup.sh did: "venv" made, requirements "pip"-installed."""
    return [call.argv[1] for call in run.calls if call.argv[:1] == ["-m"]]


def test_setup_installs_once(launch, repo):
    setup = repo / "scripts" / "setup.sh"
    run = launch(setup)
    assert run.code == 0 and setup_steps(run) == ["venv", "pip"]
    assert run.calls[-1].argv[-2:] == ["--requirement", str(repo / "requirements.txt")]
    assert launch(setup).calls == [] and launch(setup).out == []


def test_setup_for_workflows(launch, repo):
    """Their requirements come on top, and stay installed where only the others change."""
    setup = repo / "scripts" / "setup.sh"
    run = launch(setup, "workflow")
    assert run.code == 0 and setup_steps(run) == ["venv", "pip", "pip"]
    assert [Path(call.argv[-1]).name for call in run.calls[-2:]] == ["requirements.txt", "requirements-workflow.txt"]
    (repo / "requirements.txt").write_text("torch==2\n")
    assert setup_steps(launch(setup)) == ["pip"]
    assert launch(setup, "workflow").calls == [] and launch(setup).calls == []
    (repo / "requirements-workflow.txt").write_text("snakemake==2\n")
    assert launch(setup).calls == []
    (call,) = launch(setup, "workflow").calls
    assert Path(call.argv[-1]).name == "requirements-workflow.txt"
    (repo / "requirements-readers.txt").write_text("datasets==1\n")
    (call,) = launch(setup, "workflow", "readers").calls
    assert Path(call.argv[-1]).name == "requirements-readers.txt"
    assert launch(setup, "workflow").calls == launch(setup, "readers").calls == launch(setup).calls == []
    assert_stopped(launch(setup, "workflow", "workflows"), "workflows is unknown")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="takes another user")
def test_setup_as_another_user(launch, repo):
    """Where all is installed there is nothing to write; where not, one line says who has to."""
    setup = repo / "scripts" / "setup.sh"
    command = f"exec setpriv --reuid 54321 --regid 54321 --clear-groups bash '{setup}'\n"
    (repo.parent / "as_nobody.sh").write_text(command)
    own = [folder for folder in repo.parents if any(p.name.startswith("pytest-of-") for p in (folder, *folder.parents))]
    for folder in own:
        folder.chmod(0o755)  # pytest's own, of which others see nothing
    assert_stopped(launch("../as_nobody.sh"), "is not yours to write to", "requirements.txt")
    launch(setup)
    assert launch("../as_nobody.sh").code == 0


def test_setup_installs_changed_requirements(launch, repo):
    setup = repo / "scripts" / "setup.sh"
    launch(setup)
    touch(repo / ".venv" / "kept")
    (repo / "requirements.txt").write_text("torch==2\n")
    run = launch(setup, FAIL="pip")
    assert run.code == 2 and setup_steps(run) == ["pip"]
    # What was installed last is now unknown, so that going back does not count as up to date either.
    (repo / "requirements.txt").write_text("torch==1\n")
    assert setup_steps(launch(setup)) == ["pip"]
    assert setup_steps(launch(setup)) == []
    assert (repo / ".venv" / "kept").exists()


@pytest.mark.parametrize("broken", ["venv", "pip"])
def test_setup_repairs_what_was_interrupted(launch, repo, broken):
    setup = repo / "scripts" / "setup.sh"
    run = launch(setup, FAIL=broken)
    assert run.code == 2 and len(run.err) == 1
    half = touch(repo / ".venv" / "lib" / "half")
    assert setup_steps(launch(setup)) == ["venv", "pip"]
    assert not half.exists()
    assert setup_steps(launch(setup)) == []


def test_setup_of_somebody_elses_venv(launch, repo):
    """It is used, and never emptied."""
    write_stub(repo / ".venv" / "bin" / "python")
    theirs = touch(repo / ".venv" / "lib" / "theirs")
    setup = repo / "scripts" / "setup.sh"
    assert setup_steps(launch(setup, FAIL="pip")) == ["pip"]
    assert setup_steps(launch(setup)) == ["pip"]
    assert setup_steps(launch(setup)) == []
    assert theirs.exists()


def test_setup_needs_a_recent_python(launch, repo):
    run = launch(repo / "scripts" / "setup.sh", PYTHON="no-such-python")
    assert_stopped(run, "no-such-python", "3.11")
    assert not (repo / ".venv").exists()


def test_tests_run_in_the_venv(launch, repo):
    run = launch(repo / "scripts" / "test.sh", "tests/test_unet.py", "-k", "a b")
    assert run.code == 0 and setup_steps(run) == ["venv", "pip", "pytest"]
    usual = ["--numprocesses", "2", "--dist", "worksteal", "-m", "not slow"]
    assert run.calls[-1].argv == ["-m", "pytest", *usual, "tests/test_unet.py", "-k", "a b"]
    assert run.calls[-1].cwd == str(repo)


def program(call: Call) -> str:
    return Path(call.argv[0]).name


def test_demo_walks_the_whole_road(launch, repo):
    run = launch(repo / "scripts" / "demo.sh", STEPS="30")
    assert run.code == 0, run.err
    made, prepared, painted, trained, sampled = run.calls[-5:]
    toy = str(repo / "demo_output" / "toy")
    assert [program(call) for call in run.calls[-5:]] == [
        "make_toy_monuseg.py",
        "prepare_monuseg.py",
        "image_sample.py",
        "image_train.py",
        "image_sample.py",
    ]
    assert made.argv[1:] == [f"{toy}/raw"]
    assert prepared.argv[1:] == shlex.split(f"'{toy}/raw' '{toy}/patches' --patch_size 128 --stride 64 --resize 64")
    assert trained.logdir == f"{toy}/model"

    flags = image_train.create_argparser().parse_args(trained.argv[1:])
    condition_spec(vars(flags))
    assert (flags.data_dir, flags.max_steps, flags.predict_v) == (f"{toy}/patches", 30, True)
    shipped, own = repo / "weights" / WEIGHTS.name, f"{toy}/model/ema_0.99_000030.pt"
    for call, model, results in ((painted, shipped, f"{toy}/painted"), (sampled, own, f"{toy}/samples")):
        flags = image_sample.create_argparser().parse_args(call.argv[1:])
        assert (flags.model_path, flags.results_path) == (str(model), results)
        assert (flags.num_samples, flags.s, flags.sampler, flags.num_steps) == (12, "1.5", "dpmpp_2m_sde", 25)
        assert flags.match_struct
    assert value(painted.argv, "--appearance_dir") == str(repo / "weights" / "appearances")

    assert [line[:5] for line in run.out if line.startswith("[")] == [f"[{stage}/5]" for stage in range(1, 6)]
    assert run.out[-2:] == [f"{toy}/painted/grid.png", f"{toy}/samples/grid.png"]


def test_demo_takes_real_slides(launch, repo, tmp_path):
    """RAW and DEMO_DIR are the caller's paths; held-out slides are used where there are any."""
    (tmp_path / "here" / "slides").mkdir()
    run = launch(repo / "scripts" / "demo.sh", RAW="slides", DEMO_DIR="out")
    prepared, painted, _, sampled = run.calls[-4:]
    assert prepared.argv[1:3] == ["slides", "out/real/patches"]
    assert all(program(call) != "make_toy_monuseg.py" for call in run.calls)
    assert value(painted.argv, "--use_train") == value(sampled.argv, "--use_train") == "True"
    assert run.out[-1] == "out/real/samples/grid.png"

    stub = repo / ".venv" / "bin" / "python"
    stub.write_text(stub.read_text() + 'case "$1" in *prepare*) mkdir -p "$3/MoNuSegTestData" ;; esac\n')
    run = launch(repo / "scripts" / "demo.sh", RAW="slides", DEMO_DIR="out")
    assert value(run.calls[-1].argv, "--use_train") == "False"


def test_demo_empties_only_what_it_made(launch, repo, tmp_path):
    demo, toy = repo / "scripts" / "demo.sh", tmp_path / "here" / "out" / "toy"
    beside = touch(toy / "notes.txt")
    assert launch(demo, DEMO_DIR="out").code == 0
    old = touch(toy / "model" / "model000400.pt")
    assert launch(demo, DEMO_DIR="out").code == 0
    assert beside.exists() and not old.exists()

    foreign = touch(tmp_path / "here" / "mine" / "toy" / "samples" / "a.png")
    assert_stopped(launch(demo, DEMO_DIR="mine"), "mine/toy/samples")
    assert foreign.exists()


def test_demo_mistakes(launch, repo):
    demo = repo / "scripts" / "demo.sh"
    assert_stopped(launch(demo, RAW="nowhere"), "RAW=nowhere")
    for steps in ("0", "-3", "many"):
        assert_stopped(launch(demo, STEPS=steps), f"STEPS={steps}")
    assert not (repo / ".venv").exists()


# ---- every script ----


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_script_is_sound(path):
    text = path.read_bytes().decode()
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    assert "\nset -euo pipefail\n" in text
    assert "\r" not in text and "\t" not in text
    assert not re.search(r"(?<![\w.}!])/(home|root|mnt|opt|usr|work|tmp)\b", text)
    assert max(map(len, text.splitlines())) <= 120
