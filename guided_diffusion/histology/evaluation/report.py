"""
Figures as people read them: a table, curves over a sweep, and copies side by side.

Owns their look. Knows nothing of how figures are measured.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np

from ...figures import save_png
from .image_metrics import Estimate

# Figure -> its name for people, and which way is better ("" where neither is).
TITLES = {
    "kid": ("kernel distance", "lower"),
    "frechet": ("Frechet distance", "lower"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    "colour_od": ("colour shift, optical density", "lower"),
    "colour_grey": ("colour distance, grey levels", "lower"),
    "f1": ("structure agreement, F1", "higher"),
    "aji": ("structure agreement, AJI", "higher"),
    "f1_originals": ("F1 on real patches of these masks", ""),
    "aji_originals": ("AJI on real patches of these masks", ""),
    "class_accuracy": ("class agreement, share that is right", "higher"),
    "class_f1": ("class agreement, F1", "higher"),
    "nearest_features": ("nearest training patch, features", ""),
    "nearest_pixels": ("nearest training patch, pixels", ""),
    "copies": ("share of copies", "lower"),
    "diversity": ("diversity in a condition", "higher"),
}

Value = float | Estimate | None
FLOOR_STYLES = (dict(color="grey", linestyle="--", linewidth=1), dict(color="grey", linestyle="-.", linewidth=1))


def as_json(figures: dict[str, Value]) -> dict[str, float | dict[str, float] | None]:
    """:return: figures with their intervals as plain values."""
    return {name: asdict(value) if isinstance(value, Estimate) else value for name, value in figures.items()}


def table(rows: dict[str, dict[str, Value]]) -> str:
    """
    Format figures in columns, one line a set.

    :param rows: set -> figure -> value; a set without a figure has a dash there.
    """
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    cells = [["", *names]]
    for title, figures in rows.items():
        cells.append([title, *(_cell(figures.get(name)) for name in names)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        interval = "-" if value.low is None else f"[{value.low:.4g}, {value.high:.4g}]"
        return f"{value.value:.4g} {interval}"
    return f"{value:.4g}"


def draw_figures(
    real: dict[str, dict[str, Value]],
    rows: dict[str, dict[str, Value]],
    places: dict[str, tuple[str, float | None]],
    path: Path | IO[bytes],
) -> None:
    """
    Draw each figure: over s, a line a checkpoint, where there are several s; else a point a set. Beside the lines a set
    whose s is not known is a dotted one right across.

    :param real: sets of real patches, two at most -> figure -> value, lines across: the first dashed.
    :param rows: set -> figure -> value.
    :param places: set -> (checkpoint, s); s is None where it is not known.
    :param path: where to write the PNG.
    """
    from matplotlib.figure import Figure

    every = dict.fromkeys([*TITLES, *(name for figures in rows.values() for name in figures)])
    names = [name for name in every if any(figures.get(name) is not None for figures in rows.values())]
    columns = min(4, max(len(names), 1))
    lines = -(-max(len(names), 1) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * lines), layout="constrained")
    swept = len({s for _, s in places.values()} - {None}) > 1
    for number, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, number + 1)
        title, better = TITLES.get(name) or _title_of_part(name)
        axes.set_title(f"{title}\n({better} is better)" if better else title, fontsize=9)
        axes.tick_params(labelsize=8)
        values = {key: figures.get(name) for key, figures in rows.items() if figures.get(name) is not None}
        (_draw_curves if swept else _draw_points)(axes, values, places)
        known = [(row[name], kind, style) for (kind, row), style in zip(real.items(), FLOOR_STYLES) if name in row]
        for value, kind, style in known:
            if value is not None:
                axes.axhline(_middle(value), label=kind, **style)
        if number == 0 and (swept or known):
            axes.legend(fontsize=7)
    save_png(figure, path)


def _title_of_part(name: str) -> tuple[str, str]:
    """As in TITLES, of a figure of one kind of structures, or one class, as f1_recombine."""
    figure = max((known for known in TITLES if name.startswith(f"{known}_")), key=len)
    title, better = TITLES[figure]
    part = name.removeprefix(f"{figure}_").replace("_", " ")
    return f"{title}, {part}", "" if part.endswith("originals") else better  # samples do not change those


def _middle(value: Value) -> float:
    return value.value if isinstance(value, Estimate) else float(value)


def _bars(values: Sequence[Value]) -> np.ndarray:
    """Distances from the middle down and up to the bounds, [2 x N]."""
    known = [isinstance(v, Estimate) and v.low is not None for v in values]
    bounds = [(v.value - v.low, v.high - v.value) if there else (0, 0) for v, there in zip(values, known)]
    return np.maximum(np.array(bounds).T, 0)


def _draw_curves(axes, values: dict[str, Value], places: dict[str, tuple[str, float | None]]) -> None:
    apart = [key for key in values if places[key][1] is None]
    known = [key for key in values if key not in apart]
    for checkpoint in dict.fromkeys(places[key][0] for key in known):
        points = sorted((places[key][1], key) for key in known if places[key][0] == checkpoint)
        own = [values[key] for _, key in points]
        axes.errorbar([s for s, _ in points], list(map(_middle, own)), _bars(own), marker="o", label=checkpoint)
    for number, key in enumerate(apart):
        axes.axhline(_middle(values[key]), color=f"C{9 - number % 10}", linestyle=":", label=key)
    axes.set_xlabel("s", fontsize=8)


def _draw_points(axes, values: dict[str, Value], places: dict[str, tuple[str, float | None]]) -> None:
    own = list(values.values())
    axes.errorbar(range(len(own)), list(map(_middle, own)), _bars(own), fmt="o")
    axes.set_xticks(range(len(own)), [key if len(key) < 24 else f"..{key[-22:]}" for key in values], fontsize=7)
    axes.margins(x=0.4)


def draw_pairs(pairs: Sequence[tuple[np.ndarray, np.ndarray, str]], path: Path | IO[bytes]) -> None:
    """
    Draw samples beside the training patches they look copied from.

    :param pairs: (sample, training patch, caption), images [H x W x 3] uint8; at most two dozen are drawn.
    :param path: where to write the PNG.
    """
    from matplotlib.figure import Figure

    shown = pairs[:24]
    figure = Figure(figsize=(9, 1.9 * -(-len(shown) // 3)), layout="constrained")
    for number, (sample, patch, caption) in enumerate(shown):
        axes = figure.add_subplot(-(-len(shown) // 3), 3, number + 1)
        axes.imshow(np.concatenate([sample, np.full((len(sample), 4, 3), 255, np.uint8), patch], axis=1))
        axes.set_title(caption, fontsize=6)
        axes.axis("off")
    save_png(figure, path)
