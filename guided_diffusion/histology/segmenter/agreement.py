"""
How well a segmenter finds the nuclei that patches should show, and names their classes: the evaluation's figures of
structure, and one patch's.

Owns what the segmenter's findings are held against and how they are averaged. Knows no files.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from ... import progress
from ..evaluation import class_metrics, image_metrics, instance_metrics
from ..evaluation.class_metrics import ClassTally
from ..evaluation.evaluator import Figures, PatchSet, StructureMetric
from ..evaluation.instance_metrics import Tally
from .decoding import Segmenter


def structure_metric(segmenter: Segmenter) -> StructureMetric:
    """
    :return: a metric of how well a segmenter finds the nuclei that patches should show, f1 and aji; with classes on
        both sides class_accuracy and class_f1_NAME, see class_metrics; of each kind of structure apart, f1_KIND and so
        on, where there are several; and those of the real patches that have the same masks, where they are known: what
        perfect samples would reach. Of a segmenter that was trained on those patches, that is more than new samples
        can.
    """

    def count(image: np.ndarray, truth: np.ndarray, true_class: Mapping[int, int] | None) -> Tally | ClassTally:
        found, found_class = segmenter.find(image)
        if true_class is None or not segmenter.classes:
            return instance_metrics.tally(truth, found)
        return class_metrics.tally(truth, true_class, found, found_class, segmenter.classes)

    def agreement(name: str, images: np.ndarray, patches: PatchSet) -> Figures:
        bar = progress.bar(images, f"{name}: segmenting", leave=False, delay=2)
        classes = patches.classes or [None] * len(patches.slides)
        tallies = [count(*row) for row in zip(bar, patches.inst_maps, classes)]
        figures = _summed_up(tallies, patches.slides)
        kinds = sorted(set(patches.kinds or ()))
        for kind in kinds if len(kinds) > 1 else ():
            own = [number for number, found in enumerate(patches.kinds) if found == kind]
            of_kind = _summed_up([tallies[i] for i in own], [patches.slides[i] for i in own])
            figures |= {f"{name}_{kind}": value for name, value in of_kind.items()}
        return figures

    known: dict[bytes, Figures] = {}  # the runs of a sweep share their originals

    def measure(patches: PatchSet) -> Figures:
        figures = agreement(patches.name, patches.images, patches)
        if patches.originals is not None:
            facts = json.dumps([patches.classes, patches.slides, patches.kinds]).encode()
            key = hashlib.sha256(patches.originals.tobytes() + patches.inst_maps.tobytes() + facts).digest()
            if key not in known:
                known[key] = agreement(f"{patches.name}, originals", patches.originals, patches)
            figures |= {f"{name}_originals": value for name, value in known[key].items()}
        return figures

    return measure


def agreement_of(segmenter: Segmenter, image: np.ndarray, inst_map: np.ndarray) -> float:
    """
    :param image: an [H x W x 3] uint8 array; inst_map: the [H x W] nuclei that it should show.
    :return: the AJI of what the segmenter finds there, in [0, 1]; 1 where it rightly finds nothing.
    """
    return instance_metrics.measure(inst_map, segmenter.segment(image))["aji"]


def _summed_up(tallies: Sequence[Tally | ClassTally], slides: Sequence[str]) -> Figures:
    means = instance_metrics.summarise(tallies, slides)
    names = {"f1@0.5": "f1", "aji": "aji", "class_accuracy": "class_accuracy"}
    names |= {name: name for name in means if name.startswith("class_f1_")}
    return {name: estimate(means[key]) for key, name in names.items() if key in means}


def estimate(summary: dict[str, float | None]) -> image_metrics.Estimate | None:
    """:param summary: mean, low and high, as instance_metrics.summarise gives them; None without a mean."""
    if summary["mean"] is None:
        return None
    return image_metrics.Estimate(summary["mean"], summary["low"], summary["high"])
