"""
How well nuclei are found with their classes: F1 and panoptic quality of each class, and how often the class is right.

Owns these figures' definitions. Knows no files and no segmenters.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...cell_classes import CellClass, painted
from . import instance_metrics
from .instance_metrics import HALF, THRESHOLDS, Tally


class ClassTally(NamedTuple):
    """
    What figures of nuclei with classes are made of, counted in one image or, added up, in several.

    :param nuclei: the tally of all nuclei, whatever their classes.
    :param of_class: name of a class -> the tally of its nuclei alone, on both sides.
    :param agreeing: how many of the pairs that match at an IoU of 0.5, whatever their classes, are of equal ones.
    """

    nuclei: Tally
    of_class: dict[str, Tally]
    agreeing: int

    def figures(self) -> dict[str, float | None]:
        """
        :return: those of all nuclei; class_accuracy, the share of matched nuclei whose class is right; class_f1 and
            mpq, the means over the classes; class_f1_NAME and class_pq_NAME of each. None where nothing matches, or no
            nucleus is of the class, on neither side.
        """
        there = {name: own.true_nuclei + own.found_nuclei for name, own in self.of_class.items()}
        rows = {name: own.figures() if there[name] else {} for name, own in self.of_class.items()}
        f1, pq = ({name: row.get(figure) for name, row in rows.items()} for figure in ("f1@0.5", "pq"))
        matched = int(self.nuclei.matched[HALF])
        return {
            **self.nuclei.figures(),
            "class_accuracy": self.agreeing / matched if matched else None,
            "class_f1": _mean(f1.values()),
            "mpq": _mean(pq.values()),
            **{f"class_f1_{name}": value for name, value in f1.items()},
            **{f"class_pq_{name}": value for name, value in pq.items()},
        }

    @staticmethod
    def pooled(tallies: Sequence["ClassTally"]) -> "ClassTally":
        """See instance_metrics.pooled; all have the same classes."""
        of_class = {name: Tally.pooled([own.of_class[name] for own in tallies]) for name in tallies[0].of_class}
        return ClassTally(Tally.pooled([own.nuclei for own in tallies]), of_class, sum(own.agreeing for own in tallies))


def tally(
    truth: np.ndarray,
    true_class: Mapping[int, int],
    found: np.ndarray,
    found_class: Mapping[int, int],
    classes: Sequence[CellClass],
) -> ClassTally:
    """
    Count what one image adds to each figure.

    Of each class, its nuclei alone are matched, as instance_metrics.tally has it: a nucleus that is found, but as
    another class, is missed in its own and invented in the other. So have it PanNuke's mPQ (Gamper et al., 2020) and
    CoNIC's mPQ+ (Graham et al., 2021).

    :param truth: an [H x W] array of ids; true_class: id -> class; found, found_class: the same, of the prediction.
    """
    class_maps = painted(truth, true_class), painted(found, found_class)
    of_class = {}
    for one in classes:
        own = (np.where(class_map == one.id, side, 0) for side, class_map in zip((truth, found), class_maps))
        of_class[one.name] = instance_metrics.tally(*own)
    table = instance_metrics.overlap_table(truth, found)
    chosen = instance_metrics.matches(table, THRESHOLDS[HALF])
    true_ids, found_ids = (np.unique(side[side > 0]) for side in (truth, found))  # what the table's indices stand for
    pairs = zip(true_ids[table.truth[chosen]].tolist(), found_ids[table.found[chosen]].tolist())
    agreeing = sum(true_class[nucleus] == found_class[other] for nucleus, other in pairs)
    return ClassTally(instance_metrics.tally(truth, found), of_class, agreeing)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
