"""How the engine runs the experiment: whole, on toy slides, two cells at once."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from guided_diffusion.images import list_items
from scripts import make_toy_monuseg

pytest.importorskip("snakemake", reason="bash scripts/setup.sh workflow installs it")
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
CONFIG = SCRIPTS / "experiment" / "experiment_toy.conf"


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "raw"
    make_toy_monuseg.main([str(folder), "--train", "6", "--test", "2", "--size", "256"])
    return folder


def experiment(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, "ENGINE": sys.executable, "NPROC": "1", **environment}
    command = ["bash", SCRIPTS / "experiment.sh", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)


def rules(run: subprocess.CompletedProcess) -> list[str]:
    """The rules of the jobs that ran, or would run."""
    return re.findall(r"^(?:local)?(?:rule|checkpoint) (\w+):", run.stdout + run.stderr, re.M)


def spans_of(stages: Path, cell: str) -> list[tuple[float, float]]:
    """When each stage of a cell began and ended."""
    seals = stages.glob(f"{cell}-*.json")
    return [(seal.with_suffix(".begun").stat().st_mtime, seal.stat().st_mtime) for seal in seals]


@pytest.mark.slow
def test_two_cells_at_once(slides, quick, tmp_path):
    config, out = tmp_path / "toy.conf", tmp_path / "out"
    config.write_text(CONFIG.read_text())  # of 100 and 50 %
    first = experiment(slides, out, config, CELLS="none", PYTHON=str(quick))
    assert first.returncode == 0 and sorted(rules(first)) == ["all", "patches", "test"], first.stderr[-3000:]
    run = experiment(slides, out, config, "--cores", "2", PYTHON=str(quick))
    assert run.returncode == 0 and not {"patches", "test"} & set(rules(run)), run.stderr[-3000:]
    # Some stage of the one began and ended while one of the other ran.
    spans = {cell: spans_of(out / "stages", cell) for cell in ("f100-s0", "f50-s0")}
    assert any(begun < end and start < ended for begun, ended in spans["f100-s0"] for start, end in spans["f50-s0"])

    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    variants = ["real", "colour", "unfiltered", "filtered", "filtered-colour"]
    assert [(row["fraction"], row["variant"]) for row in rows] == [(f, v) for f in ("100", "50") for v in variants]
    assert all(0 <= float(row["aji"]) <= 1 for row in rows)
    with open(out / "f50-s0/samples/manifest.csv", newline="") as file:
        structures = [row["structure_slide"] for row in csv.DictReader(file)]
    # Five of 32 structures, of the two slides that are not held out, and five that are made of them.
    assert len(structures) == 5 and len(set(structures)) == 2
    with open(out / "f50-s0/unfiltered-set/manifest.csv", newline="") as file:
        kinds = [row["structure_kind"] for row in csv.DictReader(file)]
    assert [kinds.count(kind) for kind in ("real", "recombine")] == [48 + 5, 5]
    configs = [json.loads((out / f"f50-s0/{variant}/config.json").read_text()) for variant in variants]
    ((steps, *held),) = {(config["steps"], *config["slides_held_out"]) for config in configs}
    assert steps == 4 and len(held) == 1 and not {*held} & {*structures}
    # Two epochs of 32 patches, and ten steps of 64.
    made = [json.loads((out / cell / "model/result.json").read_text())["step"] for cell in ("f50-s0", "f100-s0")]
    assert made == [8, 10]
    assert len(list_items(str(out / "f50-s0/filtered-set"), "monuseg")) == 48 + 5
    assert json.loads((out / "f50-s0/real/test/metrics.json").read_text())["average"]
    assert Image.open(out / "results.png").width > 600

    for cells in ("", "none"):
        again = experiment(slides, out, config, CELLS=cells)
        assert again.returncode == 0 and rules(again) == []
    config.write_text(config.read_text() + "S=2\nFRACTIONS=50\n")
    other = experiment(slides, out, config, "--dry-run")
    assert {"samples", "filter", "results"} <= set(rules(other)) and "model" not in rules(other), other.stdout


def test_mistakes(slides, tmp_path):
    (tmp_path / "file").touch()
    make_toy_monuseg.main([str(tmp_path / "train"), "--train", "1", "--test", "0", "--size", "256"])
    for arguments, cells, message in (
        ([slides], "", "usage: bash scripts/experiment.sh RAW OUT"),
        ([tmp_path / "none", tmp_path / "out"], "", "RAW .*/none is not a folder"),
        ([slides, tmp_path / "file"], "", "OUT .*/file is a file"),
        ([slides, tmp_path / "out", tmp_path / "no.conf"], "", "CONFIG .*/no.conf is not a file"),
        ([slides, tmp_path / "out", CONFIG], "f50-s0 f50-s1", "names f50-s1: choose of f100-s0 f50-s0, or none"),
        ([tmp_path / "train", tmp_path / "out", CONFIG], "", "RAW .*/train has no test slides"),
    ):
        run = experiment(*arguments, CELLS=cells)
        assert run.returncode == 2 and re.search(message, run.stderr) and run.stderr.count("\n") == 1, run.stderr
