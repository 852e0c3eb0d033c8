"""A picture of what the filter did: score histograms, the best and worst patches, their maps. Knows arrays only."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...figures import save_png

SHOWN = 6  # patches at either end


@dataclass(frozen=True)
class Scored:
    """A patch's image, [H x W x 3] uint8, its score map, [rows x columns], its score and a caption."""

    image: np.ndarray
    score_map: np.ndarray
    score: float
    caption: str


def draw_scores(
    real: np.ndarray,
    weights: np.ndarray,
    synthetic: np.ndarray,
    threshold: float,
    best: Sequence[Scored],
    worst: Sequence[Scored],
    title: str,
) -> bytes:
    """
    Draw the scores.

    :param real: scores of the real patches that synthetic ones are compared with, and their weights, of sum 1.
    :param synthetic: scores of synthetic patches.
    :param threshold: drawn as a line.
    :param best: synthetic patches of low scores, worst: of high ones; all maps share one colour scale.
    :return: a PNG.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("ood.png needs: pip install matplotlib") from None
    columns = max(len(best), len(worst), 3)
    figure = Figure(figsize=(1.7 * columns + 1.2, 10.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 2.6])
    _histograms(top.subplots(), real, weights, synthetic, threshold)
    axes = bottom.subplots(4, columns, squeeze=False)
    maps = [patch.score_map for patch in (*best, *worst)]
    limits = dict(vmin=min(m.min() for m in maps), vmax=max(m.max() for m in maps))
    for first, patches, name in ((0, best, "most"), (2, worst, "least")):
        rows = axes[first : first + 2]
        shown = _strip(rows, patches, limits)
        labels = (f"{name} like\nthe real ones", "distance to\nthe nearest\nreal place")
        for axis, label in zip(rows[:, 0], labels):
            axis.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    bottom.colorbar(shown, ax=axes.ravel().tolist(), shrink=0.5, pad=0.01).ax.tick_params(labelsize=7)
    buffer = io.BytesIO()
    save_png(figure, buffer)
    return buffer.getvalue()


def _histograms(axis, real: np.ndarray, weights: np.ndarray, synthetic: np.ndarray, threshold: float) -> None:
    both = np.concatenate([real, synthetic])
    # Outliers are counted in the last bin, so that they do not flatten the rest.
    high = max(float(np.quantile(both, 0.995)), threshold) * 1.02
    bins = np.linspace(min(float(both.min()), threshold) * 0.98, high, 61)
    equal = np.full(len(synthetic), 1 / len(synthetic))
    for scores, share, colour, name in (
        (real, weights, "tab:blue", "real ones of their slides"),
        (synthetic, equal, "tab:orange", f"synthetic, {len(synthetic)}"),
    ):
        median = np.quantile(scores, 0.5, weights=share, method="inverted_cdf")
        label = f"{name}: median {median:.3g}"
        axis.hist(np.minimum(scores, high), bins, weights=share, color=colour, alpha=0.55, label=label)
    axis.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.4g}")
    axis.set_xlabel("score (largest distance of a place to the nearest real one)", fontsize=8)
    axis.set_ylabel("share of patches", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=8)


def _strip(rows: np.ndarray, patches: Sequence[Scored], limits: dict):
    """Draw images above their maps; :return: a map, for the colour scale."""
    shown = None
    for axis in rows.ravel():
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for (above, below), patch in zip(rows.T, patches):
        above.imshow(patch.image)
        above.set_title(f"{patch.score:.3g}\n{patch.caption}", fontsize=6)
        height, width = patch.image.shape[:2]
        extent = (0, width, height, 0)
        shown = below.imshow(patch.score_map, cmap="magma", interpolation="bilinear", extent=extent, **limits)
    return shown
