"""
Say what the experiment will train on what, and about how long: python scripts/experiment/plan.py RAW OUT [--dry_run]

What cannot be trained is refused here, not after the days that other cells take. Settings come from the environment,
see experiment.sh, which calls this before anything else. Writes OUT/grid.json: cells, the variants' titles, and what
their figures are to be made with.
"""

import hashlib
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image

from guided_diffusion import cli
from guided_diffusion.files import check_apart, write_json
from guided_diffusion.histology.experiment import protocol
from guided_diffusion.histology.experiment.protocol import Cell, Variant
from guided_diffusion.histology.slides import scales
from guided_diffusion.histology.slides.annotations import TEST_SPLIT, TRAIN_SPLIT, find_slides
from guided_diffusion.histology.slides.patches import patch_count
from guided_diffusion.options import contains, in_words
from guided_diffusion.slides import hold_out, keep

GRID = "grid.json"
RATES = {
    "model": "a training step",
    "sample": "a sample",
    "segmenter": "a segmenter's step",
    "filter": "an image in the filter",
}


# Programs, or parts of the data, whose flags the configuration says.
FLAGS = (
    "PATCH",
    "TEST",
    "CLUSTER",
    "MODEL",
    "DIFFUSION",
    "SAMPLE",
    "FILTER",
    "PATCHCORE",
    "SEGMENTER",
    "PLAIN",
    "COLOUR",
)
# Setting of the configuration -> its kind, and the range that it lies in, as flags have them.
SETTINGS = {
    "DIFFUSION_STEPS": (int, "[1, inf)"),
    "DIFFUSION_BATCH": (int, "[1, inf)"),
    "MAX_EPOCHS": (int, "[1, inf)"),
    "EMA_RATE": (float, "(0, 1)"),
    "VAL_SHARE": (float, "[0, 1)"),
    "S": (float, "[0, inf)"),
}


class Sizes(NamedTuple):
    """
    What a cell comes to, in patches.

    :param slides: of the share; held_out: of these.
    :param seen: that the segmenters see; masks: that the diffusion model sees with masks; others: training patches
        beside those, of which the segmenters see no mask.
    """

    slides: int
    held_out: int
    seen: int
    masks: int
    others: int


def main(argv: list[str] | None = None) -> None:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("raw", metavar="RAW", type=Path, help="folder of the unpacked archives")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the experiment")
    parser.add_argument("--dry_run", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    check_apart(args.out, [args.raw], args.out / "patches", "OUT")
    check_settings()
    batch, processes = int(os.environ["DIFFUSION_BATCH"]), int(os.environ["NPROC"])
    if batch < 1 or batch % processes:
        raise ValueError(f"DIFFUSION_BATCH={batch} is no multiple of NPROC={processes}: change one of them")
    variants, cells = from_environment()
    if not protocol.baselines(variants.values()):
        raise ValueError("VARIANTS has none of real patches alone, which the others are compared with: add 'real:'")
    if not cells:
        raise ValueError("GRID has no row: give some, such as 'masks 10 0-4 all'")
    cells = chosen(cells, os.environ.get("CELLS", ""))
    counts = count_patches(args.raw, shlex.split(os.environ["SDM_PATCH_FLAGS"]))
    sizes = {cell.name: sizes_of(cell, counts) for cell in cells}
    for cell in cells:
        if sizes[cell.name].masks < batch:
            raise ValueError(
                f"GRID: {cell.name} gives the diffusion model {sizes[cell.name].masks} patches with masks, fewer than "
                f"DIFFUSION_BATCH={batch}: give a larger share or a smaller batch"
            )
    print(f"{processes} process(es), each with {batch // processes} of {batch} patches a step of the diffusion model")
    rates = measured(args.out)
    print("\n".join(table(cells, variants, sizes, rates)))
    if args.dry_run:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    titles = {name: variant.title for name, variant in variants.items()}
    facts = {"variants": titles, "baselines": protocol.baselines(variants.values())}
    facts |= {"rivals": protocol.rivals(variants.values())}
    facts |= {"settings": {name: settings_of(name, variants) for name in variants}}
    write_json(args.out / GRID, {**facts, "cells": [cell.name for cell in cells]})


def check_settings() -> None:
    """:raises ValueError: naming the first setting that is missing, no number or out of range."""
    for name, (kind, within) in SETTINGS.items():
        text = os.environ.get(name, "")
        try:
            fits = contains(within, kind(text))
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{name}={text} must {in_words(within)}: mend CONFIG")
    rates = dict(word.partition("=")[::2] for word in os.environ.get("RATES", "").split())
    for name, what in RATES.items():
        try:
            float(rates[name])
        except (KeyError, ValueError):
            raise ValueError(f"RATES={os.environ.get('RATES', '')} does not say {name}=SECONDS of {what}") from None
    side, flags = patch_side(os.environ["SDM_PATCH_FLAGS"]), os.environ["SDM_SEGMENTER_FLAGS"]
    if (crop := number_in(flags, "--crop", 128)) > side:
        raise ValueError(f"SEGMENTER_FLAGS have --crop {crop}, and patches {side} px: give no more")
    if (size := number_in(os.environ["SDM_MODEL_FLAGS"], "--image_size", 64)) > side:
        raise ValueError(f"MODEL_FLAGS have --image_size {size}, and patches {side} px: give no more")
    if clusters(os.environ["SDM_CLUSTER_FLAGS"]) < 1:
        raise ValueError("CLUSTER_FLAGS have --n_clusters below 1: give more")


def settings_of(name: str, variants: dict[str, Variant]) -> str:
    """:return: a checksum of what decides a variant's figures: all settings but the grid, and the variants it needs."""
    told = {setting: os.environ[setting] for setting in (*SETTINGS, "CLUSTER", "BACKBONE")}
    told |= {flags: os.environ[f"SDM_{flags}_FLAGS"] for flags in FLAGS}
    needed = [asdict(variant) for variant in protocol.involved([name], variants)]
    return hashlib.sha256(json.dumps([told, needed], sort_keys=True).encode()).hexdigest()


def from_environment() -> tuple[dict[str, Variant], dict[str, Cell]]:
    """:return: the variants and the cells of the configuration, by name."""
    variants = protocol.parse_variants(filter(None, os.environ["SDM_VARIANTS"].split("\n")))
    return variants, protocol.parse_grid(filter(None, os.environ["SDM_GRID"].split("\n")), variants)


def chosen(cells: dict[str, Cell], names: str) -> list[Cell]:
    """:return: the cells that CELLS names, all where it names none. :raises ValueError: where there is no such cell."""
    for name in names.split():
        if name != "none" and name not in cells:
            raise ValueError(f"CELLS names {name}: choose of {', '.join(cells)}, or none")
    return [cell for name, cell in cells.items() if not names.split() or name in names.split()]


def count_patches(raw: Path, flags: list[str]) -> dict[str, int]:
    """
    :return: slide -> its number of patches, for the training slides of RAW, and flags of prepare_monuseg.py.
    :raises ValueError: where there are no test slides.
    """
    parser = cli.FlagParser()
    parser.add_argument("--patch_size", type=int, default=128)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--mode", default="valid")
    parser.add_argument("--mpp", type=float)
    parser.add_argument("--slide_mpp", default="")
    args, _ = parser.parse_known_args(flags)
    slides = find_slides(raw)
    if not any(slide.split == TEST_SPLIT for slide in slides):
        raise ValueError(f"RAW {raw} has no test slides: the experiment needs some")
    zooms = scales.zooms(scales.nominal_scales(scales.read_scales(slides, args.slide_mpp)), args.mpp)
    counts = {}
    for slide in slides:
        if slide.split == TRAIN_SPLIT:
            with Image.open(slide.image) as image:
                height, width = (round(side * zooms[slide.stem]) for side in (image.height, image.width))
            count = patch_count(height, width, args.patch_size, args.stride, args.mode)
            counts[slide.name] = counts.get(slide.name, 0) + count
    return counts


def sizes_of(cell: Cell, counts: dict[str, int]) -> Sizes:
    """:return: what subset_slides.py makes of these patches; of track patches about, for clusters come later."""
    val_share, total = float(os.environ["VAL_SHARE"]), sum(counts.values())
    if cell.track == "patches":
        held = hold_out(counts, val_share, cell.seed)
        clean = total - sum(counts[slide] for slide in held)
        seen = max(1, round(clean * cell.share / 100 / clusters(os.environ["SDM_CLUSTER_FLAGS"])))
        return Sizes(len(counts), len(held), seen, clean, clean - seen)
    slides = keep(counts, cell.share / 100, cell.seed)
    held = hold_out(slides, val_share, cell.seed)
    seen = sum(counts[slide] for slide in slides - held)
    return Sizes(len(slides), len(held), seen, seen, total - sum(counts[slide] for slide in slides))


# ---- what the configuration's flags say ----


def number_in(flags: str, name: str, usual: int, *aliases: str) -> int:
    """:return: the number that a flag has among words of a shell; `usual` where it is not there."""
    parser = cli.FlagParser(add_help=False)
    parser.add_argument(name, *aliases, dest="number", type=int, default=usual)
    return parser.parse_known_args(shlex.split(flags))[0].number


def patch_side(flags: str) -> int:
    """:return: of the patches that prepare_monuseg.py makes with these flags, in px."""
    return number_in(flags, "--resize", number_in(flags, "--patch_size", 128))


def clusters(flags: str) -> int:
    """:return: into how many clusters cluster_patches.py sorts with these flags, as far as they say."""
    return number_in(flags, "--n_clusters", 6)


def diffusion_steps(patches: int) -> int:
    """:return: for how many steps a model that sees so many masks is trained: DIFFUSION_STEPS, or MAX_EPOCHS."""
    steps, epochs, batch = (int(os.environ[name]) for name in ("DIFFUSION_STEPS", "MAX_EPOCHS", "DIFFUSION_BATCH"))
    return min(steps, max(1, epochs * patches // batch))


# ---- how long ----


def measured(out: Path) -> dict[str, tuple[float, str]]:
    """
    :return: what takes time -> seconds, by what is finished in OUT, else by RATES; and which of the two. Of stages that
        were broken off and went on, it is not known how long they took.
    """
    assumed = dict(word.split("=") for word in os.environ["RATES"].split())
    found: dict[str, list[float]] = {name: [] for name in RATES}
    for seal in (out / "stages").glob("*.json"):
        begun, kind = seal.with_suffix(".begun"), seal.stem.rpartition("-")[2]
        if kind in ("model", "samples", "made", "layouts") and begun.exists() and starts(out, seal.stem) == 1:
            seconds, names = seal.stat().st_mtime - begun.stat().st_mtime, json.loads(seal.read_text())["files"]
            units = [int(Path(name).stem.rpartition("_")[2]) for name in names if kind == "model"]
            units = units or [sum(Path(name).parent.name == "samples" for name in names)]
            found["model" if kind == "model" else "sample"].append(seconds / max(1, *units))
    for result in out.glob("*/segmenters/*/result.json"):
        facts = json.loads(result.read_text())
        found["segmenter"].append(facts["seconds"] / facts["steps"])
    return {
        name: (statistics.median(own), f"measured, median of {len(own)}") if own else (float(assumed[name]), "assumed")
        for name, own in found.items()
    }


def starts(out: Path, stage: str) -> int:
    """:return: how often a stage was begun or gone on with, by the lines that stage.py writes in its log."""
    with open(out / "logs" / f"{stage}.log", encoding="utf-8", errors="replace") as log:
        return sum(bool(re.match(r"# \d{4}-\d\d-\d\d ", line)) for line in log)


def seconds_of(cell: Cell, variants: dict[str, Variant], sizes: Sizes, rates: dict[str, tuple[float, str]]) -> float:
    """:return: how long a cell takes on one core or GPU, about."""
    wanted = protocol.involved(cell.variants, variants)
    kinds = protocol.amounts(wanted, variants, sizes.seen, sizes.others)
    sampled = sum(number for kind, number in kinds.items() if kind in ("samples", "made", "layouts"))
    # A filter looks at all real images, too.
    filtered = {v.choice: sum(kinds[kind] for kind in v.kinds) + sizes.seen + sizes.others for v in wanted if v.choice}
    steps = number_in(os.environ["SDM_SEGMENTER_FLAGS"], "--max_steps", 4000, "--steps")
    amounts = {
        "model": diffusion_steps(sizes.masks) if sampled else 0,
        "sample": sampled,
        "segmenter": len(wanted) * steps,
        "filter": sum(filtered.values()),
    }
    return sum(rates[name][0] * amount for name, amount in amounts.items())


def table(
    cells: list[Cell], variants: dict[str, Variant], sizes: dict[str, Sizes], rates: dict[str, tuple[float, str]]
) -> list[str]:
    """:return: the plan: a row a track and share; what the variants are; hours, and where they come from."""
    titles = ["track", "share", "seeds", "slides", "held out", "patches: segmenters", "model, with masks", "without"]
    titles += ["its steps", "epochs", "variants", "hours a cell"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    batch, total = int(os.environ["DIFFUSION_BATCH"]), 0.0
    for track, share in dict.fromkeys((cell.track, cell.share) for cell in cells):
        row = [cell for cell in cells if (cell.track, cell.share) == (track, share)]
        own = [sizes[cell.name] for cell in row]
        hours = [seconds_of(cell, variants, sizes[cell.name], rates) / 3600 for cell in row]
        total += sum(hours)
        steps = [diffusion_steps(size.masks) for size in own]
        columns = [*zip(*(size[:4] for size in own)), [size.others if track == "masks" else 0 for size in own], steps]
        columns.append([round(number * batch / size.masks) for number, size in zip(steps, own)])
        names = ", ".join(row[0].variants)
        words = [track, f"{share:g} %", str(len(row)), *map(span, columns), names, f"{statistics.mean(hours):.2g}"]
        lines.append(f"| {' | '.join(words)} |")
    lines += [f"{name}: {variant.title}" for name, variant in variants.items()]
    lines += [f"{rates[name][0]:.3g} s {what} ({rates[name][1]})" for name, what in RATES.items()]
    return [
        *lines,
        f"about {total:.3g} hours of one core or GPU for {len(cells)} cells; {os.environ.get('RATES_OF', '')}",
    ]


def span(numbers: Iterable[int]) -> str:
    """:return: "smallest to largest" of the seeds, or the one number that they all have."""
    low, high = min(numbers := list(numbers)), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


if __name__ == "__main__":
    cli.run(main)
