"""How the engine runs the experiment: whole, on toy slides, a cell of each track at once."""

import csv
import functools
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

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


@pytest.fixture
def experiment(quick) -> Callable[..., subprocess.CompletedProcess]:
    return functools.partial(run_experiment, quick)


def run_experiment(python: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": str(python), "ENGINE": str(python), "NPROC": "1", **environment}
    command = ["bash", SCRIPTS / "experiment.sh", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


def rules(run: subprocess.CompletedProcess) -> list[str]:
    """The rules of the jobs that ran, or would run."""
    return re.findall(r"^(?:local)?(?:rule|checkpoint) (\w+):", run.stdout + run.stderr, re.M)


def spans_of(stages: Path, cell: str) -> list[tuple[float, float]]:
    """When each stage of a cell began and ended."""
    seals = stages.glob(f"{cell}-*.json")
    return [(seal.with_suffix(".begun").stat().st_mtime, seal.stat().st_mtime) for seal in seals]


@pytest.mark.slow
def test_all_tracks_at_once(slides, experiment, tmp_path):
    config, out = tmp_path / "toy.conf", tmp_path / "out"
    config.write_text(CONFIG.read_text())
    first = experiment(slides, out, config, "--dry-run", CELLS="none")
    assert first.returncode == 0 and sorted(rules(first)) == ["all", "patches", "test"], first.stderr[-3000:]
    run = experiment(slides, out, config, "--cores", "2")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "masks | 50 % | 1 | 3 | 1 | 32 | 32 | 48" in run.stdout and "about" in run.stdout
    # Some stage of the one began and ended while one of the other ran.
    spans = {cell: spans_of(out / "stages", cell) for cell in ("masks-f50-s0", "patches-f30-s0")}
    assert any(
        begun < end and start < ended
        for begun, ended in spans["masks-f50-s0"]
        for start, end in spans["patches-f30-s0"]
    )

    rows = read(out / "results.csv")
    tested = {
        cell: list(dict.fromkeys(row["variant"] for row in rows if row["track"] == cell))
        for cell in ("masks", "slides", "patches")
    }
    # Nothing is useful to a segmenter that has learned nothing, so that there is nothing to train on.
    masks = ["jitter", "both1", "filtered", "random", "first", "pseudo", "transfer", "unseen", "layouts"]
    assert tested == {"masks": masks, "slides": ["made2"], "patches": ["real1"]}
    assert all(0 <= float(row["aji+"]) <= 1 for row in rows) and len(rows) == 11 * 3
    assert Image.open(out / "results.png").width > 400 and "### patches, 30 %" in (out / "results.md").read_text()
    check_cell(out / "masks-f50-s0", masks)

    check_models(out)
    for cells in ("", "none"):
        again = experiment(slides, out, config, CELLS=cells)
        assert again.returncode == 0 and rules(again) == []
    # A cell that fails is named, and the others go on: of two, all from a segmenter's training on is taken away.
    for cell, variant in (("slides-f50-s0", "made2"), ("patches-f30-s0", "real1")):
        (finished,) = (out / "stages").glob(f"{cell}.*")
        for path in (finished, *(out / f"stages/{cell}-{variant}-{stage}.json" for stage in ("train", "test"))):
            path.unlink()
        (out / f"{cell}/segmenters/{variant}/result.json").unlink()
    (out / "results.csv").unlink()
    (out / "slides-f50-s0/segmenters/made2/checkpoint.pt").write_text("broken")
    failed = experiment(slides, out, config)
    assert failed.returncode == 2, failed.stderr[-3000:]
    assert sorted(path.stem for path in (out / "stages").glob("*-s0.*")) == ["masks-f50-s0", "patches-f30-s0"]
    assert re.match(r"error: slides-f50-s0-made2-train: .*checkpoint.pt is broken", failed.stderr.splitlines()[-1])
    # A variant is added to a finished cell, whose filter is still to come.
    config.write_text(config.read_text().replace('"patches 30 0 real1"', '"patches 30 0 real1,filtered"'))
    grid = (out / "grid.json").read_text()
    more = experiment(slides, out, config, "--dry-run", CELLS="patches-f30-s0")
    assert (out / "grid.json").read_text() == grid  # it says what would be done, and does nothing
    assert "filter" in rules(more) and "model" not in rules(more), more.stdout
    config.write_text(config.read_text() + "S=2\n")
    other = experiment(slides, out, config, "--dry-run", CELLS="masks-f50-s0")
    assert {"samples", "filter", "results"} <= set(rules(other)), other.stdout
    assert not {"model", "rival", "pseudo"} & set(rules(other))


def check_models(out: Path) -> None:
    """The diffusion models have seen what their track says."""
    seen = {
        cell: json.loads((out / cell / "model/config.json").read_text()) for cell in ("masks-f50-s0", "patches-f30-s0")
    }
    assert seen["masks-f50-s0"]["unlabelled_dir"].endswith("masks-f50-s0/split/unlabelled")
    assert seen["masks-f50-s0"]["lr_anneal_steps"] == 8  # MAX_EPOCHS of 32 patches
    # Which is of its settings: with more steps it is made anew, for the rate has fallen to 0.
    assert '"settings": "000008 ' in (out / "stages/masks-f50-s0-model.json").read_text()
    assert (
        seen["patches-f30-s0"]["data_dir"].endswith("split/generator") and not seen["patches-f30-s0"]["unlabelled_dir"]
    )


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def check_cell(cell: Path, variants: list[str]) -> None:
    """What was added to a cell's real patches is of the share's slides, or of unlabelled ones, as its variant says."""
    split = read(cell / "split/split.csv")
    slides = {
        role: {row["slide"] for row in split if row[role] == "1"} for role in ("segmenter", "unlabelled", "held_out")
    }
    assert [len(found) for found in slides.values()] == [2, 3, 1]
    added = {
        name: [row for row in read(cell / f"sets/{name}/manifest.csv") if row["source"] == "synthetic"]
        for name in variants
        if name != "jitter"
    }
    # Of 32 real patches; the filter keeps five, and random takes as many.
    counts = {
        "both1": 10,
        "filtered": 5,
        "random": 5,
        "first": 6,
        "pseudo": 16,
        "transfer": 16,
        "unseen": 48,
        "layouts": 3,
    }
    assert {name: len(rows) for name, rows in added.items()} == counts
    samples = {name: {row["sample"] for row in rows} for name, rows in added.items()}
    # Smaller ratios take a part of what larger ones do, and a choice at random is another one than theirs.
    assert samples["first"] < samples["both1"] and samples["random"] < samples["both1"]
    assert not samples["random"] < samples["first"]
    structures = {name: {row["structure_slide"] for row in rows} for name, rows in added.items()}
    kinds = {row["structure_kind"] for name in ("both1", "first") for row in added[name]}
    assert kinds == {"real", "recombine"} and not structures["transfer"] - slides["segmenter"]
    for name in ("pseudo", "unseen", "layouts"):
        assert structures[name] <= slides["unlabelled"], name
    assert {row["slide"] for row in added["transfer"]} <= slides["unlabelled"]
    assert all(
        {row["structure_slide"] for row in rows if row["structure_kind"] == "real"} <= slides["segmenter"]
        for rows in (added["both1"], added["first"])
    )
    configs = [json.loads((cell / f"segmenters/{name}/config.json").read_text()) for name in variants]
    assert {(own["steps"], own["batch_size"], *own["slides_held_out"]) for own in configs} == {
        (4, 4, *slides["held_out"])
    }
    assert all(slides["held_out"].isdisjoint(own["slides_trained_on"]) for own in configs)
    assert [own["synthetic_first"] for own in configs if own["synthetic_first"]] == [0.5]


def test_mistakes(slides, experiment, tmp_path):
    (tmp_path / "file").touch()
    make_toy_monuseg.main([str(tmp_path / "train"), "--train", "1", "--test", "0", "--size", "256"])
    for name, more in (("steps", "SAMPLE_FLAGS+=(--num_steps 5000)"), ("rate", "DIFFUSION_FLAGS+=(--lr fast)")):
        (tmp_path / f"{name}.conf").write_text(f"{CONFIG.read_text()}\n{more}\n")
    for arguments, cells, message in (
        ([slides], "", "usage: bash scripts/experiment.sh RAW OUT"),
        ([tmp_path / "none", tmp_path / "out"], "", "RAW .*/none is not a folder"),
        ([slides, tmp_path / "file"], "", "OUT .*/file: .*/file is a file"),
        ([slides, tmp_path / "out", tmp_path / "file"], "", "CONFIG .*/file has no GRID: begin with a copy"),
        ([slides, tmp_path / "out", tmp_path / "steps.conf"], "", "--num_steps 5000"),
        ([slides, tmp_path / "out", tmp_path / "rate.conf"], "", "--lr"),
        ([slides, tmp_path / "out", tmp_path / "no.conf"], "", "CONFIG .*/no.conf is not a file"),
        ([slides, tmp_path / "out", CONFIG], "masks-f50-s1", "names masks-f50-s1: choose of masks-f50-s0, slides-f50"),
        ([tmp_path / "train", tmp_path / "out", CONFIG], "", "RAW .*/train has no test slides"),
    ):
        run = experiment(*arguments, CELLS=cells)
        assert not (tmp_path / "out").exists()
        assert run.returncode == 2 and re.search(message, run.stderr) and run.stderr.count("\n") == 1, run.stderr
