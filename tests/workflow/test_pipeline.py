"""How the engine runs the pipeline: with stand-ins for its programs, and whole, on toy slides."""

import contextlib
import csv
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from guided_diffusion import cell_classes, cli, signals
from guided_diffusion.histology.slides import toy as toy_slides
from guided_diffusion.image_files import read_inst_mask, read_mask
from guided_diffusion.images import list_items
from scripts import make_toy_monuseg

pytest.importorskip("snakemake", reason="bash scripts/setup.sh workflow installs it")
psutil = pytest.importorskip("psutil")  # Snakemake needs it
ROOT = Path(__file__).resolve().parents[2]
PIPELINE = ROOT / "scripts" / "pipeline.sh"
STAND_IN = Path(__file__).with_name("stand_in.py")
ALL = ["patches", "features", "clusters", "pretrain", "finetune", "samples", "filter", "set"]
HARDER = ("SIGKILL", "TIME_LIMIT")
OF_A_USER = {"ENGINE": sys.executable}  # where signals go to all processes of the engine
PROGRAMS = {
    "prepare_monuseg": "patches",
    "extract_features": "features",
    "cluster_patches": "clusters",
    "image_sample": "samples",
    "make_structures": "structures",
    "filter_ood": "filter",
    "assemble_set": "set",
}


@pytest.fixture
def raw(tmp_path) -> Path:
    make_toy_monuseg.main([str(tmp_path / "raw"), "--train", "3", "--test", "1", "--size", "64"])
    return tmp_path / "raw"


class Toy:
    """
    The toy pipeline with stand-ins, in a folder of its own.

    :param engine: the interpreter of the engine and of what starts programs.
    """

    def __init__(self, folder: Path, engine: Path) -> None:
        self.folder, self.record = folder, folder / "record"
        program = folder / "a {python}"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
        program.chmod(0o755)
        # Nothing of the caller's.
        self.environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.environment |= {"PYTHON": str(program), "ENGINE": str(engine), "RECORD": str(self.record), "NPROC": "1"}

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen:
        self.record.unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", PIPELINE, *map(str, arguments)],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, raw: Path | str, out: Path | str, *flags: str, **environment: str) -> tuple[int, str]:
        """:return: exit code and what was printed."""
        process = self.start(raw, out, "--toy", *flags, **environment)
        text = process.communicate(timeout=120)[0]
        return process.returncode, text

    def done(self, raw: Path | str, out: Path | str, *flags: str, **environment: str) -> list[str]:
        """:return: the stages that ran, of a run that must end well."""
        code, text = self.run(raw, out, *flags, **environment)
        assert code == 0, text
        return self.stages()

    def stages(self) -> list[str]:
        """The stages whose programs were called."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        kinds = {"True": "finetune", "False": "pretrain"}
        names = [
            PROGRAMS.get(line.split()[0]) or kinds[str("--init_checkpoint" in line)]
            for line in lines
            if not line.startswith("summarise_runs")
        ]
        return names


@pytest.fixture
def toy(tmp_path, quick) -> Toy:
    return Toy(tmp_path, quick)


def write_program(path: Path, text: str) -> None:
    """Write a shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def content(out: Path) -> dict[str, bytes]:
    """What the stages made: path -> content."""
    skipped = (".snakemake", "stages", "logs")
    paths = [path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] not in skipped]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def steps(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "steps").read_text().split()]


@pytest.mark.slow
def test_only_what_changed_is_done_anew(toy, raw, tmp_path):
    """One history of an OUT: made, left alone, moved with its slides, with changed settings, slides and files."""
    assert toy.done(raw, "out") == ALL and steps(tmp_path / "out/pretrain") == list(range(1, 21))
    logs = {path.name for path in (tmp_path / "out/logs").iterdir()}
    assert logs == {f"{name}.log" for name in [*ALL[:4], "labels", "finetune-0", "samples-0", "filter", "set"]}
    assert toy.done(raw, "out") == []

    # All times are new, and so is every absolute path.
    shutil.copytree(raw, tmp_path / "a disk/raw", copy_function=shutil.copy)
    shutil.copytree(tmp_path / "out", tmp_path / "a disk/out", copy_function=shutil.copy, symlinks=True)
    shutil.rmtree(raw)
    shutil.rmtree(tmp_path / "out")
    raw, out = tmp_path / "a disk/raw", tmp_path / "a disk/out"
    assert toy.done(raw, out) == []
    assert toy.done(raw, out, RATIO="0.5") == ["set"]
    assert toy.done(raw, out, S_VALUES="2", RATIO="0.5") == ["samples", "filter", "set"]
    assert {path.name for path in (out / "samples/0").iterdir()} == {
        "ema_0.9_000010_s2",
        "ema_0.9_000020_s2",
        "sweep.png",
    }
    assert len(list((out / "replaced/samples-0.1").iterdir())) == 5  # two checkpoints at two s, and the picture

    before = content(out)
    next((out / "patches/MoNuSegTrainingData/images").iterdir()).unlink()
    shutil.rmtree(out / "set")
    looked = toy.run(raw, out, "--dry-run", S_VALUES="2", RATIO="0.5")[1]
    assert "files of patches have gone: they are made again" in looked and toy.stages() == []
    assert toy.done(raw, out, S_VALUES="2", RATIO="0.5") == ["patches", "set"] and content(out) == before

    slide = next((raw / "MoNuSegTestData").glob("*.tif"))
    for path in (slide, slide.with_suffix(".xml")):
        shutil.copy(path, path.with_stem(path.stem.replace("B000", "B007")))
    code, text = toy.run(raw, out, S_VALUES="2", RATIO="0.5")
    assert code == 0 and toy.stages() == ALL, text
    assert "made with other data, and is now replaced/pretrain.1" in text
    assert (out / "replaced/pretrain.1/ema_0.9_000020.pt").read_bytes() == before["pretrain/ema_0.9_000020.pt"]


@pytest.mark.slow
def test_one_checkpoint_and_one_s_of_a_place_with_braces(toy, raw, tmp_path):
    place, one = tmp_path / "a {site} %d" / "raw", {"ITERATIONS": "000020", "S_VALUES": "1.5"}
    place.parent.mkdir()
    raw.rename(place)
    (tmp_path / "model.pt").touch()
    assert toy.done(place, "out", BACKBONE="sdm:model.pt", **one) == ALL
    assert {path.name for path in (tmp_path / "out/samples/0").iterdir()} == {"samples", "grid.png"}
    # Where stages run, a relative path would mean something else.
    assert toy.record.read_text().count(f"--backbone sdm:{tmp_path}/model.pt") == 2
    again = toy.done(place, "out", BACKBONE="sdm:model.pt", TOTAL_BATCH_SIZE="4", **one)
    assert again == ["pretrain", "finetune", "samples", "filter", "set"]


@pytest.mark.slow
def test_trainings_go_on_for_longer_but_not_with_other_settings(toy, raw, tmp_path):
    toy.done(raw, "out")
    run = tmp_path / "out/finetune-clus0"
    assert toy.done(raw, "out", FINETUNE_STEPS="30")[:1] == ["finetune"] and steps(run) == list(range(1, 31))
    assert not (tmp_path / "out/replaced").exists()
    assert toy.done(raw, "out", LR="1", FINETUNE_STEPS="30") == ["pretrain", "finetune", "samples", "filter", "set"]
    assert steps(run) == list(range(1, 31))
    assert {path.name for path in (tmp_path / "out/replaced").iterdir()} == {
        "pretrain.1",
        "finetune-clus0.1",
        "samples-0.1",
    }
    # Images without masks are part of the settings, wherever they lie; stages, which run in OUT, find them.
    write_images(tmp_path / "other", count=1)
    assert toy.done(raw, "out", LR="1", FINETUNE_STEPS="30", UNLABELLED="other")[:2] == ["pretrain", "finetune"]
    lines = (tmp_path / "record").read_text().splitlines()
    assert sum(f"--unlabelled_dir {tmp_path / 'other'}" in line for line in lines) == 2
    # The recipe is the best, without being named.
    models = [line for line in lines if line.startswith(("image_train", "image_sample"))]
    assert models and all("--learn_sigma False --predict_v True --loss_weights min_snr" in line for line in models)
    (tmp_path / "other").rename(tmp_path / "moved")
    assert toy.done(raw, "out", LR="1", FINETUNE_STEPS="30", UNLABELLED="moved") == []


@pytest.mark.slow
def test_other_clusters(toy, raw, tmp_path):
    """What was made for those that are not asked for any more stays, and need not."""
    toy.done(raw, "out")
    assert toy.done(raw, "out", CLUSTERS="1") == ["finetune", "samples", "filter", "set"]
    shutil.rmtree(tmp_path / "out/finetune-clus0")
    assert toy.done(raw, "out", CLUSTERS="1") == []


@pytest.mark.slow
def test_made_structures_in_place_of_real_ones_and_beside_them(toy, raw, tmp_path):
    """As many samples in all, however they are divided; NUM_SAMPLES is 8, for two checkpoints at two s."""
    assert toy.done(raw, "out", NUM_SAMPLES="7") == ALL
    sample, out = ["samples", "filter", "set"], tmp_path / "out"
    ran = toy.done(raw, "out", NUM_SAMPLES="7", STRUCTURES="both")
    # Samples of real structures need no made ones: which of the two comes first is the engine's choice.
    assert sorted(ran[:3]) == ["samples", "samples", "structures"] and ran[3:] == sample[1:]
    kept = [path.name.split("-")[0] for path in (out / "filtered/kept/samples").iterdir()]
    assert kept.count("samples") == 7 * 4 and kept.count("made") == 3 * 4
    assert toy.done(raw, "out", NUM_SAMPLES="7", STRUCTURES="recombine") == ["structures", *sample]
    lines = (tmp_path / "record").read_text().splitlines()
    assert "--count 7 --size 16 --method recombine" in lines[0] and lines[0].endswith("recombine")
    kept = [path.name.split("-")[0] for path in (out / "filtered/kept/samples").iterdir()]
    assert kept == ["made"] * 7 * 4


@pytest.mark.slow
def test_unknown_clusters_are_refused_before_the_pretraining(toy, raw):
    code, text = toy.run(raw, "out", CLUSTERS="0 6")
    line = "error: labels: CLUSTERS: patches/clusters has no training patches of 6: choose another label"
    assert code == 2 and text.splitlines()[-1] == f"{line} (out/logs/labels.log)", text
    assert toy.stages() == ALL[:3]


@pytest.mark.parametrize("how", ["SIGTERM", *(pytest.param(how, marks=pytest.mark.slow) for how in HARDER)])
def test_what_stops_the_pipeline_stops_its_training_which_saves_and_goes_on(toy, raw, tmp_path, how):
    out = tmp_path / "out"
    slow = {"STEP_SECONDS": "1"}
    if how == "TIME_LIMIT":  # which has to do for a start of the engine and of the training, however busy the machine
        begun = time.monotonic()
        toy.done(raw, "out", "--until", "labels", **OF_A_USER)
        limit = 3 + int(time.monotonic() - begun)
        slow = {"STEP_SECONDS": str(limit / 10), "TIME_LIMIT": str(limit)}
    process = toy.start(raw, "out", "--toy", **slow, **OF_A_USER)
    wait_for(lambda: (out / "pretrain/steps").exists(), process)
    if how == "SIGTERM":
        code, second = toy.run(raw, "out")
        line = r"error: pretrain: stage stages/locks/pretrain is in use by process \d+ on "
        assert code == 2 and re.match(line, second.splitlines()[-1]), second
    if how != "TIME_LIMIT":
        process.send_signal(getattr(signal, how))
    text = process.communicate(timeout=600)[0]  # the end of all that it started, which hold its output
    assert process.returncode == (-signal.SIGKILL if how == "SIGKILL" else cli.NOT_FINISHED), text
    before = steps(out / "pretrain")
    assert len(before) < 20 and int((out / "pretrain/state").read_text()) == before[-1]
    assert toy.done(raw, "out") == ALL[3:]
    assert steps(out / "pretrain") == list(range(1, 21))  # none twice


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | None, seconds: int = 60) -> None:
    for _ in range(10 * seconds):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("it takes too long")


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("number", signals.SIGNALS)
def test_any_signal_stops_the_engine(number, early):
    """Also one that comes before it is known who is to be told."""
    before = f"real = subprocess.Popen; kill = lambda child: (os.kill(os.getpid(), {int(number)}), child)[1]; "
    before += "subprocess.Popen = lambda *words, **more: kill(real(*words, **more)); "
    process = start_runner("trap 'echo stopped; exit 1' TERM; echo begun; while :; do sleep 0.01; done", before * early)
    if not early:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == cli.NOT_FINISHED
    assert text.endswith(f"{number.name}: not finished, the same command goes on\n")
    assert early or text.startswith("stopped\n")


def start_runner(engine: str, before: str = "", limit: int | None = None, **options) -> subprocess.Popen:
    """Start the runner of an engine that is a shell's command; :param before: Python that is run before."""
    code = "import os, pathlib, subprocess, sys; from scripts.workflow import run; "
    code += f"{before}runner = run.Runner(pathlib.Path('.'), dict(os.environ), {limit}, False); "
    code += f"sys.exit(not runner.run(['bash', '-c', {engine!r}]))"
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_a_terminal_that_is_closed_hangs_up_twice():
    process = start_runner("trap 'sleep 1; echo saved; exit 1' TERM; echo begun; while :; do sleep 0.01; done")
    assert process.stdout.readline() == "begun\n"
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    assert process.communicate(timeout=60)[0].startswith("saved\n") and process.returncode == cli.NOT_FINISHED


@pytest.mark.slow
def test_nohup_is_meant():
    options = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = start_runner("echo begun; sleep 1; echo ended", **options)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[0] == "ended\n" and process.returncode == 0


@pytest.mark.slow
def test_what_does_not_stop_is_ended_with_all_that_it_started():
    engine = "trap '' TERM; set -m; sleep 100 & echo $!; wait"
    process = start_runner(engine, "run.GRACE = 1; ", limit=1, env={**os.environ, "TIME_LIMIT": "1"})
    started = int(process.stdout.readline())
    process.communicate(timeout=60)
    assert process.returncode == cli.NOT_FINISHED
    wait_for(lambda: not psutil.pid_exists(started) or psutil.Process(started).status() == "zombie", None, 10)


def test_a_training_takes_all_gpus_unless_it_is_told_how_many(toy, raw, tmp_path):
    write_program(tmp_path / "nvidia-smi", "echo GPU 0: A; echo GPU 1: A")
    write_program(tmp_path / "engine", "echo $NPROC $SDM_LAUNCH")
    environment = {"ENGINE": str(tmp_path / "engine"), "PATH": f"{tmp_path}:{os.environ['PATH']}", "MPIEXEC": "env"}
    assert toy.run(raw, "out", NPROC="", **environment)[1].startswith("2 env -n 2 ")
    assert toy.run(raw, "out", NPROC="1", **environment)[1].startswith(f"1 {tmp_path}/a\\ \\{{python\\}}")


def test_a_stage_that_fails_shows_its_log(toy, raw):
    code, text = toy.run(raw, "out", FAIL="cluster_patches")
    last = ["it was told to fail", "clusters failed with exit code 1, see out/logs/clusters.log"]
    assert code == 1 and text.splitlines()[-2:] == last, text
    assert toy.done(raw, "out") == ALL[2:]


@pytest.mark.slow
def test_others_go_on_where_a_stage_whose_files_have_gone_fails(toy, raw, tmp_path):
    out, two, fail = tmp_path / "out", {"CLUSTERS": "0 1"}, {"FAIL": "image_train finetune-clus0"}
    toy.done(raw, "out", **two)
    shutil.rmtree(out / "finetune-clus0")
    code, text = toy.run(raw, "out", "--keep-going", S_VALUES="2", **two, **fail)
    last = "finetune-0 failed with exit code 1, see out/logs/finetune-0.log"
    assert code == 1 and text.splitlines()[-1] == last and toy.stages() == ["finetune", "samples"], text
    assert {path.name[-3:] for path in (out / "samples/1").glob("ema*")} == {"_s2"}
    assert toy.done(raw, "out", S_VALUES="2", **two) == ["finetune", "samples", "filter", "set"]
    shutil.rmtree(out / "finetune-clus0")
    code, text = toy.run(raw, "out", S_VALUES="3", **two, **fail)
    assert code == 1 and text.splitlines()[-1] == last and toy.stages() == ["finetune"], text


def test_slides_that_were_not_drawn_to_the_end_are_drawn_again(toy, tmp_path):
    assert toy.run("raw", "out", FAIL="make_toy_monuseg")[0] == 1 and not (tmp_path / "raw").exists()
    write_program(tmp_path / "engine", "exit 0")
    for flag in ("-np", "--dry-run", "--dryrun", "-kn"):  # which draw nothing
        assert toy.run("raw", "out", flag, ENGINE=str(tmp_path / "engine"))[0] == 0
        assert not list(tmp_path.glob("raw*")), flag
    assert toy.run("raw/", "out", "-k", ENGINE=str(tmp_path / "engine"))[0] == 0
    assert [path.name for path in tmp_path.glob("raw*")] == ["raw"] and not list((tmp_path / "raw").iterdir())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ITERATIONS": "000010 000015"}, "000015 is no multiple of SAVE_INTERVAL=10"),
        ({"ITERATIONS": "000030"}, "000030 comes after FINETUNE_STEPS=20"),
        ({"ITERATIONS": "last"}, "last is not a number of steps"),
        ({"PRETRAIN_STEPS": "many"}, "PRETRAIN_STEPS=many is not a number of steps"),
        ({"TIME_LIMIT": "soon"}, "TIME_LIMIT=soon is not a number of seconds"),
        ({"UNLABELLED": "nowhere"}, "UNLABELLED=nowhere: 'nowhere' is not a folder"),
        ({"UNLABELLED": "."}, "OUT out lies in the input ."),
        ({"STRUCTURES": "new"}, "STRUCTURES=new: give real, recombine or both"),
        ({"STRUCTURES": "recombine", "NUM_SAMPLES": "0"}, "with NUM_SAMPLES=0: give 1 samples at least"),
        ({"STRUCTURES": "both", "NUM_SAMPLES": "1"}, "STRUCTURES=both with NUM_SAMPLES=1: give 2 samples at least"),
        ({"CLASSES": "many"}, "CLASSES=many is not a number of classes"),
        ({"NUM_SAMPLES": "few"}, "NUM_SAMPLES=few is not a number of samples"),
        ({"PYTHON": "nowhere/python"}, "PYTHON=nowhere/python is not a program"),
        ({"RATIO": "half"}, "RATIO=half: give a number above 0, such as 1 or 0.5, or all"),
        ({"RATIO": "0.0"}, "RATIO=0.0: give a number above 0"),
    ],
)
def test_mistakes(toy, tmp_path, raw, environment, message):
    code, text = toy.run(raw, "out", **environment)
    assert code == 2 and message in text and text.count("\n") == 1, text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LR": "fast"}, "--lr"),
        ({"BATCH_SIZE": "0"}, "--batch_size 0 must lie in"),
        ({"S_VALUES": "1.3 a"}, "--s 1.3,a does not parse"),
        ({"SAMPLER": "new"}, "unknown --sampler new: choose one of ddpm"),
        ({"NUM_STEPS": "2000"}, "--num_steps 2000 is out of range"),
        ({"IMAGE_SIZE": "17"}, "--image_size"),
    ],
)
def test_mistakes_that_programs_see(toy, tmp_path, quick, raw, environment, message):
    """Not when their stage comes, but before the first."""
    code, text = toy.run(raw, "out", PYTHON=str(quick), **environment)
    assert code == 2 and message in text and text.count("\n") == 1, text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rate", "expected"),
    [("0.9", "0.9"), (".990", "0.99"), ("0.9,0.99", ""), ("1", ""), ("0.0", ""), ("9e-1", "")],
)
def test_a_rate_is_spelt_as_checkpoints_are_named(toy, tmp_path, raw, rate, expected):
    write_program(tmp_path / "engine", "echo $SDM_TRAIN_FLAGS")
    process = toy.start(raw, "out", ENGINE=str(tmp_path / "engine"), EMA_RATE=rate)
    text = process.communicate(timeout=60)[0]
    wanted = f"error: EMA_RATE={rate} is not one rate between 0 and 1, such as 0.9999\n"
    assert (process.returncode, text) == ((0, f"--ema_rate {expected}\n") if expected else (2, wanted))


@pytest.mark.parametrize("ratio", ["1", "1.", "0.5", ".5", "5e-1", "all"])
def test_ratios_that_the_assembly_takes(toy, tmp_path, raw, ratio):
    write_program(tmp_path / "engine", "echo $RATIO")
    assert toy.run(raw, "out", ENGINE=str(tmp_path / "engine"), RATIO=ratio) == (0, f"{ratio}\n")


def test_mistaken_places(toy, tmp_path, raw):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([raw], "usage: bash scripts/pipeline.sh RAW OUT"),
        (["none", "out"], "RAW none is not a folder"),
        (["empty", "out"], "empty"),
        ([raw, "file"], "OUT file: file is a file, or a link"),
        ([raw, "/proc/new/out"], "OUT /proc/new/out: /proc cannot be written to"),
        ([raw, "file/out"], "OUT file/out: file is a file"),
        ([raw, raw / "out"], "lies in the input"),
        ([raw, raw], "lies in the input"),
    ):
        process = toy.start(*arguments)
        text = process.communicate(timeout=60)[0]
        assert process.returncode == 2 and message in text and text.count("\n") == 1, text
    assert not (tmp_path / "out").exists()


# ---- for real ----


CLASSES = cell_classes.named(["even", "odd"])


@pytest.fixture(scope="module")
def real(quick, tmp_path_factory) -> tuple[Path, Path]:
    """Slides with two classes of cells, and what the pipeline makes of them where nothing stops it."""
    folder = tmp_path_factory.mktemp("real")
    for number in range(8):
        slide = toy_slides.draw_slide(number, 256)
        class_map = np.where(slide.inst_map > 0, 1 + slide.inst_map % 2, 0).astype(np.uint8)
        arrays = {"images": slide.image, "inst_masks": slide.inst_map, "class_masks": class_map}
        for name, array in arrays.items():
            path = folder / "raw" / ("train" if number < 6 else "test") / name / f"slide-{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path.with_suffix(".tif" if name == "inst_masks" else ".png"))
    cell_classes.write_classes(folder / "raw", CLASSES)
    run = start_real(quick, folder / "raw", folder / "out", ENGINE=str(quick))
    assert run.wait(timeout=1500) == 0, (folder / "out.log").read_text()[-3000:]
    return folder / "raw", folder / "out"


def start_real(python: Path, raw: Path, out: Path, **environment: str) -> subprocess.Popen:
    settings = {"PYTHON": str(python), "ENGINE": sys.executable, "NPROC": "1", "STRUCTURES": "both", "CLASSES": "3"}
    env = {**os.environ, **settings, **environment}
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(["bash", PIPELINE, raw, out, "--toy"], env=env, stdout=log, stderr=log)


@pytest.mark.slow
def test_real_programs_make_a_set(real):
    _, out = real
    items = list_items(str(out / "set"), "monuseg", classes=True)
    real_items = list_items(str(out / "patches"), "monuseg")
    with open(out / "set" / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sources = [row["source"] for row in rows]
    assert {row["structure_kind"] for row in rows if row["source"] == "synthetic"} == {"real", "recombine"}
    assert cell_classes.read_classes(out / "set") == CLASSES
    for kind in ("real", "recombine"):
        counted = " ".join(row["classes"] for row in rows if row["structure_kind"] == kind)
        assert "1:" in counted and "2:" in counted
    for item in items:
        inst_map, class_map = read_inst_mask(item.inst_mask), read_mask(item.class_mask)
        cell_classes.of_nuclei(inst_map, class_map, (1, 2), item.class_mask)
    assert sources.count("real") == len(real_items) == 96 and sources.count("synthetic") == len(items) - 96 == 10


@pytest.mark.slow
def test_killed_at_random_until_done_equals_an_uninterrupted_run(real, quick, tmp_path):
    """As by a power cut, all processes at once; and with SIGTERM."""
    raw, whole = real
    rng, out = random.Random(0), tmp_path / "out"
    for stage, kill in (("clusters", True), ("samples-0", False)):
        process = start_real(quick, raw, out)
        wait_for((out / "stages" / f"{stage}.begun").exists, process, seconds=300)
        time.sleep(rng.uniform(0, 1))
        everything = [*psutil.Process(process.pid).children(recursive=True), process]
        for victim in everything if kill else [process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill() if kill else victim.terminate()
        assert process.wait(timeout=300) == (-signal.SIGKILL if kill else cli.NOT_FINISHED)
    last = start_real(quick, raw, out, ENGINE=str(quick))
    assert last.wait(timeout=1500) == 0, Path(f"{out}.log").read_text()[-3000:]
    assert not (out / "replaced").exists()
    made, expected = (comparable(folder) for folder in (out, whole))
    differ = sorted(name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name))
    assert ({name.partition("/")[0] for name in differ}, differ) == (set(), [])


def comparable(out: Path) -> dict[str, object]:
    """
    What the stages made, but for records of times and of where OUT lies, for the ids of runs, and for what a training
    that was asked to stop has saved between two intervals of ten steps, which stays.
    """
    kinds = (".png", ".tif", ".npz")
    named = ("samples/", "filtered/", "set/")
    made: dict[str, object] = {}
    for name, data in content(out).items():
        saved = re.match(r"(?:pretrain|finetune-clus0)/.*?(\d{6})(?:_train)?\.\w+$", name)
        if saved and int(saved[1]) % 10:
            continue
        if name.endswith(".pt"):  # the run's id is the archive's comment
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                made[name] = [(part.filename, part.file_size, part.CRC) for part in archive.infolist()]
        elif name.endswith(kinds) or (name.startswith(named) and name.endswith(".csv")):
            made[name] = data
    return made
