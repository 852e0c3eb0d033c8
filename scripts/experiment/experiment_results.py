"""
Sum up scripts/experiment.sh: python scripts/experiment/experiment_results.py OUT [RESULTS ...]

RESULTS are results.csv of the same experiment in other folders, as of machines that share no disk; of segmenters that
several have, the first counts. Reads OUT/grid.json and OUT/CELL/segmenters/VARIANT/test/metrics.json, as far as they
are there, and made with the settings that grid.json has. Writes OUT/results.csv, a row a segmenter and test slide, and
one of all slides pooled, whose slide is empty; OUT/results.md, a table a track and share: means over slides and seeds,
and gains in F1, paired by seed and slide, over real patches with jitter and without, with 95 % intervals by a
hierarchical bootstrap, and p-values of the former, corrected for the rows of the table; a second table, the gains over
each rival; and OUT/results.png, the gains over real patches with jitter.
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from guided_diffusion import cli
from guided_diffusion.figures import save_png
from guided_diffusion.files import csv_text, read_json, write_bytes, write_text
from guided_diffusion.histology.experiment.gains import Gain, differences, gain, holm

FIGURES = ("f1@0.5", "aji", "aji+", "pq", "dice")
TITLES = ("F1@0.5", "AJI", "AJI+", "PQ", "Dice")
MAIN = FIGURES[0]
POOLED = ""  # in place of a slide
CELL = re.compile(r"([a-z]+)-f([\d.]+)-s(\d+)")


class Row(NamedTuple):
    """One segmenter: of which cell, and slide -> its figures there."""

    track: str
    share: float
    seed: int
    variant: str
    slides: dict[str, dict[str, float]]


class Grid(NamedTuple):
    """
    Variant -> its title, in order; those of real patches alone, with jitter and without, as far as there are; and those
    of what could be done instead.
    """

    variants: dict[str, str]
    baselines: list[str]
    rivals: list[str]


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if not (args.out / "grid.json").exists():
        raise FileNotFoundError(f"{args.out} has no grid.json: run experiment.sh first")
    facts = read_json(args.out / "grid.json")
    grid = Grid(facts["variants"], facts["baselines"], facts.get("rivals", []))
    found = {row[:4]: row for path in reversed(args.results) for row in read_csv(path)}
    found |= {row[:4]: row for row in read_rows(args.out, facts.get("settings", {}))}
    order = list(grid.variants)
    rows = sorted(
        (row for row in found.values() if row.variant in grid.variants),
        key=lambda row: (*row[:3], order.index(row.variant)),
    )
    if not rows:
        raise FileNotFoundError(
            f"{args.out} holds no CELL/segmenters/VARIANT/test/metrics.json of its settings: run experiment.sh first"
        )
    write_text(args.out / "results.csv", as_csv(rows))
    text = "\n".join("\n".join(as_markdown(*part, grid)) for part in parts_of(rows))
    write_text(args.out / "results.md", text)
    write_bytes(args.out / "results.png", as_picture(rows, grid))
    print(text, end="")


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the experiment")
    parser.add_argument("results", metavar="RESULTS", nargs="*", type=Path, help="results.csv of other folders")
    return parser


def read_rows(out: Path, settings: dict[str, str]) -> list[Row]:
    """
    :param settings: variant -> a checksum of what its figures are to be made with.
    :return: the segmenters that have been tested. It warns of those that were made with other settings.
    """
    rows, others = [], set()
    for path in out.glob("*/segmenters/*/test/metrics.json"):
        cell, variant = path.parents[3].name, path.parents[1].name
        match, seal = CELL.fullmatch(cell), out / "stages" / f"{cell}-{variant}-test.json"
        if not (match and variant in settings and seal.exists()):  # it may be under way
            continue
        if read_json(seal)["made_with"]["settings"] != settings[variant]:
            others.add(cell)
            continue
        found = read_json(path)
        slides = {POOLED: found["pooled"], **found["slides"]}
        own = {slide: {name: figures[name] for name in FIGURES} for slide, figures in slides.items()}
        rows.append(Row(match[1], float(match[2]), int(match[3]), variant, own))
    if others:
        names = ", ".join(sorted(others))
        sys.stderr.write(f"WARNING: left out, as they were made with another CONFIG: segmenters of {names}\n")
    return rows


def read_csv(path: Path) -> list[Row]:
    """:return: the segmenters of a results.csv, see as_csv. :raises ValueError: where it is none."""
    found: dict[tuple, Row] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                key = line["track"], float(line["share"]), int(line["seed"]), line["variant"]
                figures = {name: float(line[name]) for name in FIGURES}
                found.setdefault(key, Row(*key, {})).slides[line["slide"]] = figures
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{path} is no results.csv of an experiment") from None
    if not found or not all(POOLED in row.slides for row in found.values()):
        raise ValueError(f"{path} lacks lines of an experiment's results.csv")
    return list(found.values())


def parts_of(rows: Sequence[Row]) -> list[tuple[str, float, list[Row]]]:
    """:return: each track and share, with its rows."""
    keys = dict.fromkeys((row.track, row.share) for row in rows)
    return [(*key, [row for row in rows if (row.track, row.share) == key]) for key in keys]


def of(rows: Sequence[Row], variant: str, figure: str) -> dict[int, dict[str, float]]:
    """:return: seed -> slide -> figure; without the pooled one."""
    return {
        row.seed: {slide: own[figure] for slide, own in row.slides.items() if slide != POOLED}
        for row in rows
        if row.variant == variant
    }


def gain_over(rows: Sequence[Row], variant: str, baseline: str, figure: str = MAIN) -> Gain | None:
    """:return: what a variant gains over a baseline; None where they are one, or no seed has both."""
    found = differences(of(rows, variant, figure), of(rows, baseline, figure))
    return gain(found) if found.size and variant != baseline else None


def as_csv(rows: Sequence[Row]) -> str:
    lines = [
        {**row._asdict(), "share": f"{row.share:g}", "slide": slide, **{k: f"{v:.6f}" for k, v in own.items()}}
        for row in rows
        for slide, own in sorted(row.slides.items())
    ]
    return csv_text(("track", "share", "seed", "variant", "slide", *FIGURES), lines)


def as_markdown(track: str, share: float, rows: Sequence[Row], grid: Grid) -> list[str]:
    """:return: the lines of a table: a row a variant."""
    seeds, slides = len({row.seed for row in rows}), len(rows[0].slides) - 1
    over = [f"gain over {name}" for name in grid.baselines]
    titles = ["trained on", "seeds", TITLES[0], *over[:1], "p", *over[1:], *TITLES[1:], "F1@0.5, pooled"]
    lines = [f"### {track}, {share:g} %: {seeds} seeds, {slides} test slides", ""]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    there = [name for name in grid.variants if of(rows, name, MAIN)]
    gains = {name: [gain_over(rows, name, baseline) for baseline in grid.baselines] for name in there}
    tested = [name for name in there if gains[name][0] and gains[name][0].p is not None]
    corrected = dict(zip(tested, holm([gains[name][0].p for name in tested])))
    for name in there:
        own = [row for row in rows if row.variant == name]
        means = [np.mean([list(slides.values()) for slides in of(rows, name, figure).values()]) for figure in FIGURES]
        pooled = np.mean([row.slides[POOLED][MAIN] for row in own])
        first, *others = map(as_text, gains[name])
        p = as_p(corrected[name]) if name in corrected else ""
        cells = [f"`{name}`: {grid.variants[name]}", str(len(own)), f"{means[0]:.3f}", first, p, *others]
        lines.append(f"| {' | '.join([*cells, *(f'{mean:.3f}' for mean in [*means[1:], pooled])])} |")
    return [*lines, "", *over_rivals(rows, grid)]


def over_rivals(rows: Sequence[Row], grid: Grid) -> list[str]:
    """:return: the lines of a table: what each variant gains in F1 over each rival; none where there is no rival."""
    rivals = [name for name in grid.rivals if of(rows, name, MAIN)]
    others = [name for name in grid.variants if name not in (*rivals, *grid.baselines) and of(rows, name, MAIN)]
    if not (rivals and others):
        return []
    lines = [f"| trained on | {' | '.join(f'gain over {name}' for name in rivals)} |", "|---" * (1 + len(rivals)) + "|"]
    for name in others:
        cells = [as_text(gain_over(rows, name, rival)) for rival in rivals]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return [*lines, ""]


def as_text(found: Gain | None) -> str:
    """:return: "+0.012 (-0.003 to +0.027)", without brackets where there is no interval."""
    if found is None:
        return ""
    return f"{found.mean:+.3f}" + ("" if found.low is None else f" ({found.low:+.3f} to {found.high:+.3f})")


def as_p(value: float) -> str:
    """:return: "0.012", or "<0.001"."""
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def as_picture(rows: Sequence[Row], grid: Grid) -> bytes:
    """:return: a PNG: a panel a track and share, the gain in F1 of each variant, and a faint point a seed."""
    from matplotlib.figure import Figure

    parts = parts_of(rows)
    names = [name for name in grid.variants if name != grid.baselines[0] and any(row.variant == name for row in rows)]
    wide = min(3, len(parts))
    tall = -(-len(parts) // wide)
    figure = Figure(figsize=(2.2 + 2.6 * wide, tall * (1.2 + 0.26 * len(names))), layout="constrained")
    panels = figure.subplots(tall, wide, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (track, share, own) in zip(panels, parts):
        axes.axvline(0, color="0.6", linewidth=1)
        for place, name in enumerate(names):
            found = gain_over(own, name, grid.baselines[0])
            if found is None:
                continue
            points = differences(of(own, name, MAIN), of(own, grid.baselines[0], MAIN)).mean(1)
            axes.plot(points, [place] * len(points), ".", color="C0", alpha=0.35)
            reach = [[found.mean - found.low], [found.high - found.mean]] if found.low is not None else None
            axes.errorbar(found.mean, place, xerr=reach, fmt="o", color="C0", capsize=3, markersize=5)
        axes.set_title(f"{track}, {share:g} %", fontsize=10)
        axes.tick_params(labelsize=8)
    for axes in panels[len(parts) :]:
        axes.remove()
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"gain in F1@0.5 over {grid.variants[grid.baselines[0]]}", fontsize=9)
    buffer = io.BytesIO()
    save_png(figure, buffer)
    return buffer.getvalue()


if __name__ == "__main__":
    cli.run(main)
