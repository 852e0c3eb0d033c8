"""Tables and pictures of figures."""

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.histology.evaluation import report
from guided_diffusion.histology.evaluation.image_metrics import Estimate

FLOOR = {"kid": Estimate(0.1, 0.05, 0.2), "recall": 0.5, "frechet": None}
RUNS = {f"m_s{s:g}": {"kid": Estimate(s, s - 0.2, s + 0.1), "recall": 0.1 * s, "frechet": None} for s in (1, 1.5, 2)}


def ink(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_values_in_json():
    assert report.as_json(FLOOR) == {"kid": dict(value=0.1, low=0.05, high=0.2), "recall": 0.5, "frechet": None}


def test_table():
    lines = report.table({"real": FLOOR, "m": {"recall": 0.25}}).splitlines()
    assert lines[0].split() == ["kid", "recall", "frechet"]
    assert lines[1] == "real  0.1 [0.05, 0.2]     0.5        -"
    assert lines[2].split() == ["m", "-", "0.25", "-"] and len(set(map(len, lines[1:]))) == 1


def test_a_figure_without_an_interval(tmp_path):
    rows = {"m": {"f1": Estimate(0.5, None, None)}}
    assert report.table(rows).splitlines()[1].split() == ["m", "0.5", "-"]
    assert report.as_json(rows["m"]) == {"f1": dict(value=0.5, low=None, high=None)}
    report.draw_figures({}, rows, {"m": ("m", 1.5)}, tmp_path / "points.png")
    assert ink(tmp_path / "points.png").std() > 10


def test_a_set_without_an_s_is_drawn_beside_the_curves(tmp_path):
    places = {name: ("m", float(name[3:])) for name in RUNS}
    rows = {**RUNS, "kept": {"recall": 0.5}}
    report.draw_figures({}, RUNS, places, tmp_path / "curves.png")
    report.draw_figures({}, rows, {**places, "kept": ("kept", None)}, tmp_path / "both.png")
    curves, both = ink(tmp_path / "curves.png"), ink(tmp_path / "both.png")
    # The panel of kid, which it has not, but for the legend; and a line from side to side in that of recall.
    changed = (curves != both).any(axis=2)
    assert changed[:, 396:].sum(axis=1).max() > 100


def test_curves_over_s_show_the_floor(tmp_path):
    places = {name: ("m", float(name[3:])) for name in RUNS}
    report.draw_figures({"same": FLOOR, "other": {"kid": 0.4}}, RUNS, places, tmp_path / "with.png")
    report.draw_figures({}, RUNS, places, tmp_path / "without.png")
    with_floor, without = ink(tmp_path / "with.png"), ink(tmp_path / "without.png")
    # Two panels: what is missing everywhere is not drawn.
    assert with_floor.shape[1] == 2 * 396 and (with_floor != without).any()


@pytest.mark.parametrize("s", [None, 1.5])
def test_sets_that_are_no_sweep_are_points(tmp_path, s):
    report.draw_figures(
        {"same": FLOOR, "other": {"kid": 0.4}}, RUNS, {name: (name, s) for name in RUNS}, tmp_path / "points.png"
    )
    assert ink(tmp_path / "points.png").std() > 10


def test_pairs(tmp_path):
    pair = np.full((8, 8, 3), 200, np.uint8), np.zeros((8, 8, 3), np.uint8), "a | b"
    report.draw_pairs([pair] * 30, tmp_path / "pairs.png")  # more than are drawn
    assert {0, 200, 255} <= set(np.unique(ink(tmp_path / "pairs.png")))
