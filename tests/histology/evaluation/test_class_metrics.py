"""Metrics of nuclei with classes, against cases made by hand."""

import numpy as np
import pytest

from guided_diffusion import cell_classes
from guided_diffusion.histology.evaluation import class_metrics, instance_metrics

CLASSES = cell_classes.named(["round", "long", "dark"])
# Four squares of 16 px: ids 3, 8, 1000, 4.
TRUTH = np.zeros((12, 24), np.int32)
for place, nucleus in enumerate((3, 8, 1000, 4)):
    TRUTH[2:6, 6 * place : 6 * place + 4] = nucleus
TRUE_CLASS = {3: 1, 4: 2, 8: 1, 1000: 2}


def found_map():
    """The first as it is, the second a row shorter, the third as another class, the fourth missed, a fifth invented."""
    found = np.zeros_like(TRUTH)
    found[2:6, 0:4], found[2:5, 6:10], found[2:6, 12:16], found[8:12, 0:4] = 70, 5, 6, 1
    return found, {1: 1, 5: 1, 6: 1, 70: 1}


def test_each_class_is_matched_alone_and_the_accuracy_is_of_what_matches():
    own = class_metrics.tally(TRUTH, TRUE_CLASS, *found_map(), CLASSES)
    plain = instance_metrics.measure(TRUTH, found_map()[0])
    figures = {name: value for name, value in own.figures().items() if name not in plain}
    assert {name: own.figures()[name] for name in plain} == plain
    # Round: two matched of two true and four found, IoU 1 and 0.75. Long: two missed. Dark: on neither side.
    assert figures == {
        "class_accuracy": 2 / 3,
        "class_f1": (2 / 3 + 0) / 2,
        "mpq": pytest.approx(2 / 3 * 0.875 / 2),
        "class_f1_round": 2 / 3,
        "class_f1_long": 0,
        "class_f1_dark": None,
        "class_pq_round": pytest.approx(2 / 3 * 0.875),
        "class_pq_long": 0,
        "class_pq_dark": None,
    }
    assert (own.of_class["round"].true_nuclei, own.of_class["round"].found_nuclei) == (2, 4)


def test_what_a_slide_has_no_nucleus_of_does_not_count_there():
    empty, perfect = np.zeros_like(TRUTH), (TRUTH, TRUE_CLASS, TRUTH, TRUE_CLASS)
    pairs = [(TRUTH, TRUE_CLASS, *found_map()), perfect, (empty, {}, empty, {}), (empty, {}, empty, {})]
    pairs.append((TRUTH, dict.fromkeys(TRUE_CLASS, 3), empty, {}))
    tallies = [class_metrics.tally(*pair, CLASSES) for pair in pairs]
    means = instance_metrics.summarise(tallies, ["A", "A", "A", "B", "C"], seed=1)
    assert means["class_accuracy"] == {"mean": (2 + 4) / (3 + 4), "low": None, "high": None}  # slide A's alone
    assert means["class_f1_round"] == {"mean": 2 * 4 / (4 + 6), "low": None, "high": None}
    assert means["class_f1_dark"] == {"mean": 0, "low": None, "high": None}
    both = instance_metrics.summarise(tallies[:2], ["A", "B"])["class_f1_round"]
    assert (both["mean"], both["low"], both["high"]) == (pytest.approx(5 / 6), pytest.approx(2 / 3), 1)
    nothing = instance_metrics.summarise(tallies[2:4], ["A", "B"])
    for name, mean in nothing.items():
        assert mean["mean"] is None if name.startswith(("class", "mpq")) else mean["mean"] is not None
