"""
Say what each share of the experiment would train on, and for how long: python scripts/experiment/plan.py RAW

What cannot be trained is refused here, not after the days that the larger shares take. Settings come from the
environment, see experiment.sh, which calls this before anything else.
"""

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image

from guided_diffusion import cli
from guided_diffusion.histology.slides import scales
from guided_diffusion.histology.slides.annotations import TRAIN_SPLIT, find_slides
from guided_diffusion.histology.slides.patches import patch_count
from guided_diffusion.slides import hold_out, keep


class Cell(NamedTuple):
    """What a share of the slides comes to: numbers of slides, of those held out, of patches, of those that are seen."""

    slides: int
    held_out: int
    patches: int
    seen: int


def main(argv: list[str] | None = None) -> None:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("raw", metavar="RAW", type=Path, help="folder of the unpacked archives")
    raw = parser.parse_args(argv).raw
    settings = {name: int(os.environ[name]) for name in ("DIFFUSION_STEPS", "MAX_EPOCHS", "DIFFUSION_BATCH")}
    batch, processes, val_share = settings["DIFFUSION_BATCH"], int(os.environ["NPROC"]), float(os.environ["VAL_SHARE"])
    if batch < 1 or batch % processes:
        raise ValueError(f"DIFFUSION_BATCH={batch} is no multiple of NPROC={processes}: change one of them")
    if os.environ["STRUCTURES"] == "both" and int(os.environ["SAMPLES"]) == 1:
        raise ValueError("STRUCTURES=both with SAMPLES=1: give 2 samples at least, or 0")
    counts = count_patches(raw, shlex.split(os.environ["SDM_PATCH_FLAGS"]))
    print(f"{processes} process(es), each with {batch // processes} of {batch} patches a step of the diffusion model")
    print("| share | slides | held out | patches | seen by the diffusion model | its steps | epochs |")
    print("|---|---|---|---|---|---|---|")
    for fraction in os.environ["FRACTIONS"].split():
        cells = [cell_of(counts, float(fraction), int(seed), val_share) for seed in os.environ["SEEDS"].split()]
        least = min(cell.seen for cell in cells)
        if least < batch:
            raise ValueError(
                f"FRACTIONS: {fraction} % of the slides give the diffusion model {least} patches, fewer than "
                f"DIFFUSION_BATCH={batch}: give a larger share or a smaller batch"
            )
        steps = [diffusion_steps(cell.seen) for cell in cells]
        epochs = [number * batch / cell.seen for number, cell in zip(steps, cells)]
        columns = [*zip(*cells), steps, [round(number) for number in epochs]]
        print(f"| {fraction} % | {' | '.join(map(span, columns))} |")


def count_patches(raw: Path, flags: list[str]) -> dict[str, int]:
    """:return: slide -> its number of patches, for the training slides of RAW, and flags of prepare_monuseg.py."""
    parser = cli.FlagParser()
    parser.add_argument("--patch_size", type=int, default=128)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--mode", default="valid")
    parser.add_argument("--mpp", type=float)
    parser.add_argument("--slide_mpp", default="")
    args, _ = parser.parse_known_args(flags)
    slides = find_slides(raw)
    zooms = scales.zooms(scales.nominal_scales(scales.read_scales(slides, args.slide_mpp)), args.mpp)
    counts = {}
    for slide in slides:
        if slide.split == TRAIN_SPLIT:
            with Image.open(slide.image) as image:
                height, width = (round(side * zooms[slide.stem]) for side in (image.height, image.width))
            count = patch_count(height, width, args.patch_size, args.stride, args.mode)
            counts[slide.name] = counts.get(slide.name, 0) + count
    return counts


def cell_of(counts: dict[str, int], fraction: float, seed: int, val_share: float) -> Cell:
    """:return: what subset_slides.py makes of these patches."""
    slides = keep(counts, fraction / 100, seed)
    held = hold_out(slides, val_share, seed)
    return Cell(len(slides), len(held), sum(counts[s] for s in slides), sum(counts[s] for s in slides - held))


def image_size(flags: str) -> int:
    """:return: that of the model's flags, as words of a shell; without one, image_train.py's default."""
    parser = cli.FlagParser(add_help=False)
    parser.add_argument("--image_size", type=int, default=64)
    return parser.parse_known_args(shlex.split(flags))[0].image_size


def diffusion_steps(patches: int) -> int:
    """:return: for how many steps a model that sees so many patches is trained: DIFFUSION_STEPS, or MAX_EPOCHS."""
    steps, epochs, batch = (int(os.environ[name]) for name in ("DIFFUSION_STEPS", "MAX_EPOCHS", "DIFFUSION_BATCH"))
    return min(steps, max(1, epochs * patches // batch))


def span(numbers: Iterable[int]) -> str:
    """:return: "smallest to largest" of the seeds, or the one number that they all have."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


if __name__ == "__main__":
    cli.run(main)
