"""A picture of clusters: the embedding coloured by cluster, beside strips of patches. Knows arrays only."""

import io
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.decomposition import PCA

from ... import streams
from ...figures import save_png
from .clustering import NOISE

ROWS, MEMBERS, THUMB = 16, 8, 64  # clusters that get a strip, patches in it, their side in px
NOISE_COLOUR = (0.75, 0.75, 0.75)


def draw_clusters(
    points: np.ndarray,
    labels: Sequence[str],
    is_test: Sequence[bool],
    read: Callable[[int], np.ndarray],
    title: str,
    seed: int,
) -> bytes:
    """
    Draw clusters.

    :param points: an [N x d] array, or [N x 0] for no scatter; more than two dimensions are turned to the two principal
        axes of their training points.
    :param labels: N labels; is_test: whether each is of a test patch, drawn as a ring.
    :param read: gives the image of a patch as [H x W x 3] uint8.
    :param seed: of the choice of members.
    :return: a PNG.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("clusters.png needs: pip install matplotlib") from None
    labels, is_test = np.asarray(labels), np.asarray(is_test, bool)
    names, sizes = by_size(labels[~is_test] if (~is_test).any() else labels)
    shown = names[:ROWS]
    colours = dict(zip([name for name in names if name != NOISE], _colours(len(names))), **{NOISE: NOISE_COLOUR})

    scatter = points.shape[1] > 0
    height = max(4.0 if scatter else 1.5, 0.75 * len(shown) + 0.8)
    figure = Figure(figsize=(14 if scatter else 7.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.05]) if scatter else (None, figure)
    if scatter:
        _scatter(left.subplots(), _plane(points, is_test), labels, is_test, colours)
    axes = right.subplots(len(shown), 1, squeeze=False)[:, 0]
    rng = streams.rng("cluster picture", seed)
    for axis, name in zip(axes, shown):
        members = np.flatnonzero((labels == name) & ~is_test)
        chosen = np.sort(rng.permutation(members)[:MEMBERS])
        axis.imshow(_strip([read(int(i)) for i in chosen]))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(
            f"{_short(name)}\n{sizes[name]}", fontsize=7, color="black", rotation=0, ha="right", va="center"
        )
        for spine in axis.spines.values():
            spine.set(color=colours.get(name, NOISE_COLOUR), linewidth=2)
    if len(names) > len(shown):
        axes[-1].set_xlabel(f"and {len(names) - len(shown)} more", fontsize=7)
    file = io.BytesIO()
    save_png(figure, file)
    return file.getvalue()


def by_size(labels: np.ndarray) -> tuple[list[str], dict[str, int]]:
    """:return: the labels that occur, largest first and noise last, and label -> size."""
    names, counts = np.unique(labels, return_counts=True)
    sizes = {str(name): int(count) for name, count in zip(names, counts)}
    return sorted(sizes, key=lambda name: (name == NOISE, -sizes[name], name)), sizes


def _plane(points: np.ndarray, is_test: np.ndarray) -> np.ndarray:
    if points.shape[1] == 1:
        return np.concatenate([points, np.zeros_like(points)], axis=1)
    if points.shape[1] == 2:
        return points
    return PCA(2).fit(points[~is_test]).transform(points)


def _scatter(axis: object, plane: np.ndarray, labels: np.ndarray, is_test: np.ndarray, colours: dict) -> None:
    colour = np.array([colours.get(label, NOISE_COLOUR) for label in labels])
    order = np.argsort(labels != NOISE, kind="stable")  # noise beneath
    train, test = order[~is_test[order]], order[is_test[order]]
    axis.scatter(*plane[train].T, s=6, c=colour[train], linewidths=0, label="training")
    if len(test):
        axis.scatter(*plane[test].T, s=14, facecolors="none", edgecolors=colour[test], linewidths=0.6, label="test")
        axis.legend(fontsize=7, loc="best")
    for name in sorted(set(labels) - {NOISE}):
        at = np.median(plane[labels == name], axis=0)
        if len(set(labels)) <= ROWS:
            text = axis.text(*at, name, fontsize=9, weight="bold", ha="center", va="center")
            text.set_bbox(dict(facecolor="white", alpha=0.7, linewidth=0, pad=1))
    axis.set(xticks=[], yticks=[], xlabel="first axis", ylabel="second axis")


def _strip(images: Sequence[np.ndarray]) -> np.ndarray:
    from PIL import Image

    strip = np.full((THUMB, MEMBERS * (THUMB + 2) - 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        thumb = Image.fromarray(image).resize((THUMB, THUMB), Image.Resampling.BILINEAR)
        strip[:, i * (THUMB + 2) : i * (THUMB + 2) + THUMB] = np.asarray(thumb)
    return strip


def _colours(count: int) -> list[tuple[float, float, float]]:
    """As many colours as wanted, neighbours well apart: hues by the golden angle, lightness in turn."""
    import colorsys

    return [colorsys.hls_to_rgb((0.6 + i * 0.618034) % 1, (0.42, 0.58, 0.3)[i % 3], 0.75) for i in range(count)]


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:14]}.."
