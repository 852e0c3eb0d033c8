"""
Sum up scripts/experiment.sh: python scripts/experiment/experiment_results.py OUT

Reads OUT/fFRACTION-sSEED/VARIANT/test/metrics.json, as far as they are there. Writes OUT/results.csv, a row a
segmenter, OUT/results.md, means over the seeds and differences from `real`, with 95 % intervals, and OUT/results.png.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from scipy import stats

from guided_diffusion import cli
from guided_diffusion.files import write_bytes

FIGURES = ("f1@0.5", "aji", "pq", "dice")
VARIANTS = {
    "real": "real",
    "colour": "real, colour augmentation",
    "unfiltered": "real + synthetic",
    "filtered": "real + synthetic, filtered",
    "filtered-colour": "real + synthetic, filtered, colour augmentation",
}


class Row(NamedTuple):
    """One segmenter: per cent of the training slides, seed, a key of VARIANTS, and its figures on the test slides."""

    fraction: float
    seed: int
    variant: str
    figures: dict[str, float]


def main(argv: list[str] | None = None) -> None:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the experiment")
    args = parser.parse_args(argv)
    rows = read_rows(args.out)
    if not rows:
        raise FileNotFoundError(f"{args.out} holds no f*-s*/VARIANT/test/metrics.json: run experiment.sh first")
    write_bytes(args.out / "results.csv", as_csv(rows).encode())
    text = as_markdown(rows)
    write_bytes(args.out / "results.md", text.encode())
    write_bytes(args.out / "results.png", as_picture(rows))
    print(text, end="")


def read_rows(out: Path) -> list[Row]:
    """:return: the segmenters that have been tested, the largest share first."""
    rows = []
    for path in out.glob("f*-s*/*/test/metrics.json"):
        variant, match = path.parents[1].name, re.fullmatch(r"f([\d.]+)-s(\d+)", path.parents[2].name)
        if match and variant in VARIANTS:
            average = json.loads(path.read_text())["average"]
            rows.append(Row(float(match[1]), int(match[2]), variant, {name: average[name]["mean"] for name in FIGURES}))
    return sorted(rows, key=lambda row: (-row.fraction, row.seed, list(VARIANTS).index(row.variant)))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """:return: mean and half the width of its 95 % interval by Student's t; nan of fewer than three values."""
    if len(values) < 3:  # of two, t is 12.7: wider than anything worth knowing
        return float(np.mean(values)), float("nan")
    reach = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(reach)


def of(rows: list[Row], fraction: float, variant: str, figure: str) -> dict[int, float]:
    """:return: seed -> figure."""
    return {row.seed: row.figures[figure] for row in rows if (row.fraction, row.variant) == (fraction, variant)}


def differences(rows: list[Row], fraction: float, variant: str, figure: str) -> list[float]:
    """:return: what a variant gains over `real`, seed by seed: with the same slides and the same initial weights."""
    own, real = of(rows, fraction, variant, figure), of(rows, fraction, "real", figure)
    return [own[seed] - real[seed] for seed in sorted(own.keys() & real.keys())]


def as_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["fraction", "seed", "variant", *FIGURES])
    for row in rows:
        writer.writerow([f"{row.fraction:g}", row.seed, row.variant, *(f"{row.figures[name]:.6f}" for name in FIGURES)])
    return text.getvalue()


def as_markdown(rows: list[Row]) -> str:
    """A table: mean and 95 % interval over the seeds, and the gain over `real`, paired by seed."""
    lines = [
        "| slides | trained on | seeds | F1@0.5 | gain in F1 | AJI | PQ |",
        "|---|---|---|---|---|---|---|",
    ]
    for fraction in sorted({row.fraction for row in rows}, reverse=True):
        for variant, title in VARIANTS.items():
            own = of(rows, fraction, variant, "f1@0.5")
            if not own:
                continue
            gains = differences(rows, fraction, variant, "f1@0.5")
            gain = "" if variant == "real" or not gains else _cell(interval(gains), "+.3f")
            cells = [_cell(interval(list(of(rows, fraction, variant, name).values())), ".3f") for name in FIGURES[:3]]
            lines.append(f"| {fraction:g} % | {title} | {len(own)} | {cells[0]} | {gain} | {cells[1]} | {cells[2]} |")
    return "\n".join(lines) + "\n"


def _cell(value: tuple[float, float], form: str) -> str:
    mean, reach = value
    return f"{mean:{form}}" if np.isnan(reach) else f"{mean:{form}} ± {reach:.3f}"


def as_picture(rows: list[Row]) -> bytes:
    """:return: a PNG: F1 over the share of the slides, a line a variant, a faint point a segmenter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    fractions = sorted({row.fraction for row in rows})
    for number, (variant, title) in enumerate(VARIANTS.items()):
        own = {fraction: list(of(rows, fraction, variant, "f1@0.5").values()) for fraction in fractions}
        own = {fraction: values for fraction, values in own.items() if values}
        if not own:
            continue
        # Lines side by side, so that their bars do not cover each other.
        places = [fractions.index(fraction) + 0.07 * (number - 2) for fraction in own]
        means, reaches = zip(*map(interval, own.values()))
        line = axes.errorbar(places, means, np.nan_to_num(reaches), marker="o", capsize=3, label=title)
        for place, values in zip(places, own.values()):
            axes.plot([place] * len(values), values, ".", color=line[0].get_color(), alpha=0.4)
    axes.set_xticks(range(len(fractions)), [f"{fraction:g} %" for fraction in fractions])
    axes.set_xlim(-0.5, len(fractions) - 0.5)
    axes.set_xlabel("share of the training slides")
    axes.set_ylabel("F1 at IoU 0.5, test slides")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()


if __name__ == "__main__":
    cli.run(main)
