"""The experiment's table and plot, of figures whose means and intervals are plain."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from scripts.experiment import experiment_results as results


def put(out, fraction, seed, variant, f1):
    folder = out / f"f{fraction}-s{seed}" / variant / "test"
    folder.mkdir(parents=True)
    average = {name: {"mean": f1 - 0.1 * i, "low": 0, "high": 1} for i, name in enumerate(results.FIGURES)}
    (folder / "metrics.json").write_text(json.dumps({"average": average}))


@pytest.fixture
def out(tmp_path):
    for seed, (real, filtered) in enumerate([(0.6, 0.63), (0.5, 0.55), (0.7, 0.74)]):
        put(tmp_path, 20, seed, "real", real)
        put(tmp_path, 20, seed, "filtered", filtered)
    put(tmp_path, 100, 0, "real", 0.8)
    put(tmp_path, 100, 0, "foreign", 0.9)
    return tmp_path


def test_every_segmenter_is_a_row(out, capsys):
    results.main([str(out)])
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["fraction"], row["seed"], row["variant"]) for row in rows[:3]] == [
        ("100", "0", "real"),
        ("20", "0", "real"),
        ("20", "0", "filtered"),
    ]
    assert len(rows) == 7 and float(rows[2]["f1@0.5"]) == 0.63 and float(rows[2]["aji"]) == pytest.approx(0.53)
    assert capsys.readouterr().out == (out / "results.md").read_text()


def test_gains_are_paired_by_seed(out):
    rows = results.read_rows(out)
    assert results.differences(rows, 20, "filtered", "f1@0.5") == pytest.approx([0.03, 0.05, 0.04])
    mean, reach = results.interval([0.03, 0.05, 0.04])
    # Student's t of two degrees of freedom: 4.3027; the deviation is 0.01.
    assert mean == pytest.approx(0.04) and reach == pytest.approx(4.3027 * 0.01 / np.sqrt(3), rel=1e-4)
    assert np.isnan(results.interval([0.03, 0.05])[1])
    table = results.as_markdown(rows).splitlines()
    assert table[2] == "| 100 % | real | 1 | 0.800 |  | 0.700 | 0.600 |"
    assert table[4].startswith("| 20 % | real + synthetic, filtered | 3 | 0.640 ± 0.237 | +0.040 ± 0.025 |")


def test_a_picture_of_what_is_there(out):
    results.main([str(out)])
    with Image.open(out / "results.png") as image:
        assert image.width > 600 and len(np.unique(np.asarray(image.convert("L")))) > 20
    assert not list(out.glob(".*.part"))


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run experiment.sh first"):
        results.main([str(tmp_path)])
    assert not list(tmp_path.iterdir())
