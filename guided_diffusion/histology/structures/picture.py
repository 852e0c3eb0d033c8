"""structures.png: how made layouts compare with real ones, in figures and to the eye. Knows no files but its own."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ...figures import save_png
from .bank import Layout
from .statistics import FIGURES

SHOWN = 12  # layouts of each kind
_BINS = 30


def draw_structures(
    real: dict[str, np.ndarray],
    made: dict[str, np.ndarray],
    report: dict[str, dict[str, float]],
    layouts: tuple[Sequence[Layout], Sequence[Layout]],
    classes: dict[str, tuple[float, float]],
    file: Path | IO[bytes],
) -> None:
    """
    Draw histograms of each figure, shares of classes, and layouts of both kinds.

    :param real: figure -> values; made: the same.
    :param report: figure -> "distance" and "between_halves".
    :param layouts: real and made ones of one size, of which the first SHOWN are drawn.
    :param classes: name -> its share of the real nuclei and of the made ones.
    :param file: where to write the PNG.
    """
    from matplotlib.figure import Figure

    columns = math.ceil((len(FIGURES) + bool(classes)) / 2)
    figure = Figure(figsize=(11, 7), layout="constrained")
    above, *below = figure.subfigures(3, 1, height_ratios=[3.4, 1, 1])
    for number, (name, title) in enumerate(FIGURES.items()):
        axes = above.add_subplot(2, columns, number + 1)
        top = np.quantile([*real[name], *made[name], 1e-9], 0.995)
        bins = np.linspace(0, top, _BINS + 1)
        for values, label in ((real[name], "real"), (made[name], "made")):
            weights = np.full(len(values), 1 / max(len(values), 1))
            axes.hist(values, bins, weights=weights, histtype="step", label=label)
        own = report[name]
        axes.set_title(f"{title}\ndistance {own['distance']:.2f}, real halves {own['between_halves']:.2f}", fontsize=8)
        axes.set_yticks([])
        axes.tick_params(labelsize=7)
        if number == 0:
            axes.legend(fontsize=8)
    if classes:
        axes, places = above.add_subplot(2, columns, len(FIGURES) + 1), np.arange(len(classes))
        for shares, beside in zip(zip(*classes.values()), (-0.2, 0.2)):
            axes.bar(places + beside, shares, 0.4)
        axes.set_xticks(places, classes, rotation=30, fontsize=7)
        axes.set_title("share of nuclei, by class", fontsize=8)
        axes.tick_params(labelsize=7)
    for part, shown, title in zip(below, layouts, ("real", "made")):
        part.suptitle(title, fontsize=9)
        for number, layout in enumerate(shown[:SHOWN]):
            axes = part.add_subplot(1, SHOWN, number + 1)
            axes.imshow(_coloured(layout.inst_map), interpolation="nearest")
            axes.axis("off")
    save_png(figure, file)


def _coloured(inst_map: np.ndarray) -> np.ndarray:
    """[H x W x 3] uint8: a colour a nucleus, by its place, so that ids tell nothing."""
    colours = np.zeros((int(inst_map.max()) + 1, 3), np.uint8)
    for own in np.unique(inst_map[inst_map != 0]):
        place = int(np.flatnonzero(inst_map == own)[0])
        colours[own] = np.random.default_rng(place).integers(70, 255, 3)
    return colours[inst_map]
