"""README's and the docs' commands, as they stand but for a few flags more that make them small, on toy data."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageOps
from test_docs import PAGES, blocks, find_program

ROOT = Path(__file__).resolve().parents[1]
TINY = "--image_size 64 --num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --attention_resolutions 8"
TINY += " --num_head_channels 16 --use_fp16 False --batch_size 2 --num_workers 0"
TRAINED = f"{TINY} --max_steps 1 --preview_samples 0"
SAMPLED = f"{TINY} --num_samples 2 --num_steps 2"
# Program -> flags that make it small; those at the end win.
SMALL = {
    **dict.fromkeys(("image_train.py", "train.sh"), TRAINED),
    "finetune.sh": f"-- {TRAINED}",
    **dict.fromkeys(("image_sample.py", "sample.sh", "sample_single.sh"), SAMPLED),
    "prepare_monuseg.py": "--resize 64",
    "make_toy_monuseg.py": "--train 3 --test 1 --size 128",
    "extract_features.py": "--backbone stain",
    "cluster_patches.py": "--n_clusters 2",
    "filter_ood.py": "--max_bank 100 --mode top_n --top_n 2",
    "assemble_set.py": "",
    "export_set.py": "",
    "make_structures.py": "--count 2 --size 32",
    "train_segmenter.py": "--max_steps 2 --batch_size 2 --crop 32 --pretrained False --val_share 0",
    "segment.py": "",
    "evaluate.py": "",
}
# Of commands that say how large model and patches are.
OWN_SIZE = {
    "image_train.py": "--max_steps 1 --preview_samples 0",
    "image_sample.py": "--num_samples 2 --num_steps 2",
    "prepare_monuseg.py": "",
}
# Program -> the tests that run it whole, as its commands here would take minutes.
ELSEWHERE = {
    "demo.sh": "test_launchers.py",
    "test.sh": "test_launchers.py",
    "pipeline.sh": "workflow/test_pipeline.py",
    "experiment.sh": "workflow/test_experiment.py",
}
NOT_OURS = ("docker ", ".ci/run")  # the former take a GPU, which README says; the latter runs this test


@pytest.fixture
def place(tmp_path, quick) -> Path:
    """A folder in which the names in the commands are what they say, with README's programs."""
    for name in ("scripts", "weights", "image_train.py", "image_sample.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(quick)
    (tmp_path / "bin/mpiexec").write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    (tmp_path / "bin/mpiexec").chmod(0o755)
    return tmp_path


def small(command: str) -> str:
    """A command with the flags that make it small."""
    program = next(path.name for path in map(find_program, shlex.split(command, comments=True)) if path)
    extra = SMALL[program]
    if program == "evaluate.py" and "--predicted" not in command:
        extra = "--metrics structure,colour"
    if program in OWN_SIZE and ("weights/" in command or "TOY/" in command):
        extra = OWN_SIZE[program]
    return f"{command.partition(' #')[0]} {extra}"


def provide(command: str, place: Path) -> None:
    """Have what a command reads, and no earlier one has made, lie there."""
    if "make_structures.py" in command or "segment.py" in command:  # other masks than before
        shutil.rmtree(place / "MASKS", ignore_errors=True)
    data, tiny = place / "DATA", place / "MODEL/ema_0.9999_000001.pt"
    for name, source, stem in (("MASKS", "inst_masks", "a"), ("IMAGES", "images", "a"), ("MORE", "images", "b")):
        if name in command and f"--out {name}" not in command and not (place / name).exists():
            (place / name).mkdir()
            for number, path in enumerate(sorted((data / "MoNuSegTestData" / source).iterdir())):
                # By other names, and mirrored: nothing that is held out from training.
                ImageOps.mirror(Image.open(path)).save(place / name / f"{stem}_{number:03d}{path.suffix}")
    wanted = re.findall(r"([\w/-]+)/ema_0\.9999_(\d+)\.pt", command)
    if "sample.sh" in command:
        wanted += [("OUTPUT/SDM-MoNuSeg-clus6", step) for step in ("030000", "040000", "050000")]
    for folder, step in wanted:
        (place / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny, place / folder / f"ema_0.9999_{step}.pt")
        if not (place / folder / "config.json").exists():
            shutil.copy(tiny.parent / "config.json", place / folder)
    if "TOY/samples" in command and "evaluate" not in command:
        shutil.copy(place / "TOY/model/ema_0.995_000001.pt", place / "TOY/model/ema_0.995_000400.pt")
    shutil.rmtree(place / "OUT", ignore_errors=True)


def commands() -> Iterator[str]:
    """Those of all pages, in an order in which what they read has been made."""
    order = ("README", "training", "sampling", "metrics", "pipeline")
    pages = sorted(PAGES, key=lambda page: (*order, page.stem).index(page.stem))
    for page in pages:
        own = [command for command in blocks(page) if not command.startswith(NOT_OURS)]
        yield from sorted(own, key=lambda command: "evaluate.py" in command)  # segmenters come first


@pytest.mark.slow
def test_all_commands_run(place, quick):
    environment = {
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        **{"HOME": str(place), "PYTHON": str(quick), "NPROC": "1", "OMP_NUM_THREADS": "1", "OPENAI_LOG_FORMAT": "log"},
        **{"training_data": "DATA", "training_data_clus6": "DATA", "model_path": "MODEL/ema_0.9999_050000.pt"},
    }

    def run(command: str, **more: str) -> None:
        done = subprocess.run(
            ["bash", "-c", command], cwd=place, env={**environment, **more}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    run("python scripts/make_toy_monuseg.py RAW --train 4 --test 2 --size 256")
    ran = []
    for number, command in enumerate(commands()):
        if any(f"scripts/{name}" in command for name in ELSEWHERE):
            continue
        provide(command, place)
        ran.append(small(command))
        run(ran[-1], out_dir=f"out{number}", OPENAI_LOGDIR=f"log{number}")
        if "SYNTHETIC" in command:
            (place / "RESULTS").symlink_to("SYNTHETIC")
    assert len(ran) > 25


def test_what_is_run_elsewhere_is():
    """By its tests' text, which names the program."""
    for program, module in ELSEWHERE.items():
        assert program in (ROOT / "tests" / module).read_text()
