"""The experiment's tables and plot, of figures whose means, gains and tests are plain."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.histology.experiment.gains import gain
from scripts.experiment import experiment_results as results

VARIANTS = {"real": "real", "jitter": "real, jitter", "both2": "real + 2 synthetic, jitter", "pseudo": "real + 2 more"}
SLIDES = ("a", "b")


def put(out, cell, variant, f1, settings="these"):
    """:param f1: of each slide; other figures are a tenth less, one after another, and the pooled one 0.01 more."""
    folder = out / cell / "segmenters" / variant / "test"
    folder.mkdir(parents=True)
    figures = [{name: value - 0.1 * i for i, name in enumerate(results.FIGURES)} for value in (*f1, np.mean(f1) + 0.01)]
    facts = {"slides": dict(zip(SLIDES, figures)), "pooled": figures[-1]}
    (folder / "metrics.json").write_text(json.dumps(facts))
    seal = out / f"stages/{cell}-{variant}-test.json"
    seal.parent.mkdir(exist_ok=True)
    seal.write_text(json.dumps({"made_with": {"settings": settings}}))


@pytest.fixture
def out(tmp_path):
    facts = {"variants": VARIANTS, "baselines": ["jitter", "real"], "rivals": ["pseudo"]}
    facts["settings"] = dict.fromkeys(VARIANTS, "these")
    (tmp_path / "grid.json").write_text(json.dumps(facts))
    for seed in range(3):
        base = 0.6 + 0.05 * seed
        put(tmp_path, f"masks-f10-s{seed}", "jitter", (base, base + 0.1))
        put(tmp_path, f"masks-f10-s{seed}", "real", (base - 0.1, base))
        put(tmp_path, f"masks-f10-s{seed}", "both2", (base + 0.03, base + 0.14 + 0.01 * seed))
        put(tmp_path, f"masks-f10-s{seed}", "pseudo", (base - 0.05, base + 0.15 - 0.01 * seed))
    put(tmp_path, "slides-f100-s0", "real", (0.8, 0.9))
    put(tmp_path, "slides-f100-s0", "foreign", (0.8, 0.9))
    put(tmp_path, "elsewhere", "real", (0.8, 0.9))
    return tmp_path


def test_every_segmenter_and_slide_is_a_row(out, capsys):
    results.main([str(out)])
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["track", "share", "seed", "variant", "slide", *results.FIGURES] and len(rows) == 13 * 3
    assert [(row["share"], row["variant"], row["slide"]) for row in rows[:4]] == [
        *(("10", "real", slide) for slide in ("", "a", "b")),
        ("10", "jitter", ""),
    ]
    assert [float(rows[0][name]) for name in results.FIGURES] == pytest.approx([0.56, 0.46, 0.36, 0.26, 0.16])
    assert capsys.readouterr().out == (out / "results.md").read_text()


def test_figures_of_another_configuration_are_left_out(out, capsys):
    results.main([str(out)])
    rows = (out / "results.csv").read_text()
    put(out, "masks-f10-s3", "jitter", (0.1, 0.1), "others")
    put(out, "masks-f10-s4", "jitter", (0.1, 0.1))
    (out / "stages/masks-f10-s4-jitter-test.json").unlink()  # under way
    capsys.readouterr()
    results.main([str(out)])
    assert (out / "results.csv").read_text() == rows
    assert capsys.readouterr().err == (
        "WARNING: left out, as they were made with another CONFIG: segmenters of masks-f10-s3\n"
    )


def test_gains_with_intervals_and_corrected_tests(out):
    results.main([str(out)])
    text = (out / "results.md").read_text().splitlines()
    assert text[0] == "### masks, 10 %: 3 seeds, 2 test slides" and "### slides, 100 %: 1 seeds, 2 test slides" in text
    assert (
        f"| `both2` | {results.as_text(gain(np.array([[0.08, -0.01 + 0.02 * seed] for seed in range(3)])))} |" in text
    )
    cells = {row.split(":")[0]: row.strip("| ").split(" | ") for row in text if row.startswith("| `")}
    gains = np.array([[0.03, 0.04 + 0.01 * seed] for seed in range(3)])
    both, pseudo = gain(gains), gain(np.array([[-0.05, 0.05 - 0.01 * seed] for seed in range(3)]))
    own = cells["| `both2`"]
    assert own[:3] == ["`both2`: real + 2 synthetic, jitter", "3", "0.740"]
    assert own[3] == f"+0.040 ({both.low:+.3f} to {both.high:+.3f})" == "+0.040 (+0.028 to +0.057)"
    # Three rows are tested: real loses .1 everywhere, as surely as both2 gains.
    assert own[4] == f"{min(1, 2 * both.p):.3f}" and cells["| `pseudo`"][4] == f"{pseudo.p:.3f}"
    assert next(row for row in text if row.startswith("| `real`")).split(" | ")[4] == "<0.001"
    assert own[5] == results.as_text(gain(gains + 0.1)) and own[6:] == ["0.640", "0.540", "0.440", "0.340", "0.750"]
    assert cells["| `jitter`"][3:5] == ["", ""] and cells["| `jitter`"][5].startswith("+0.100 (")
    assert text[-1] == "| `real`: real | 1 | 0.850 |  |  |  | 0.750 | 0.650 | 0.550 | 0.450 | 0.860 |"


def test_a_picture_of_what_is_there(out):
    results.main([str(out)])
    with Image.open(out / "results.png") as image:
        assert 500 < image.width < 1100 and len(np.unique(np.asarray(image.convert("L")))) > 20
    assert not list(out.glob(".*.part"))


def test_results_of_other_folders_fill_what_is_missing(out, tmp_path_factory):
    results.main([str(out)])
    whole = (out / "results.md").read_text()
    other = tmp_path_factory.mktemp("other")
    shutil.copy(out / "results.csv", other)
    shutil.rmtree(out / "masks-f10-s1")
    results.main([str(out)])
    assert (out / "results.md").read_text() != whole
    put(out, "masks-f10-s1", "real", (0.55, 0.65))  # as it was; of what both have, the folder's own counts
    earlier = (other / "results.csv").read_text()
    (other / "results.csv").write_text(earlier.replace("masks,10,1,real,a,0.550000", "masks,10,1,real,a,0.000000"))
    results.main([str(out), str(other / "results.csv")])
    assert (out / "results.md").read_text() == whole


@pytest.mark.parametrize("text", ["", "track,share\nmasks,10\n", "\0", "{header}\nmasks,10,0,real,a,1,1,1,1,1\n"])
def test_what_is_no_table_of_results(out, tmp_path_factory, text):
    path = tmp_path_factory.mktemp("other") / "other.csv"
    header = ",".join(("track", "share", "seed", "variant", "slide", *results.FIGURES))
    path.write_text(text.format(header=header))
    with pytest.raises(ValueError, match=r"other\.csv (is no results\.csv|lacks lines)"):
        results.main([str(out), str(path)])
    assert not (out / "results.csv").exists()


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no grid.json: run experiment.sh first"):
        results.main([str(tmp_path)])
    (tmp_path / "grid.json").write_text(
        json.dumps({"variants": VARIANTS, "baselines": ["jitter", "real"], "settings": {}})
    )
    with pytest.raises(FileNotFoundError, match=r"test/metrics.json of its settings: run experiment.sh first"):
        results.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]
