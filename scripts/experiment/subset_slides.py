"""
Make a data folder of a share of the training slides.

    python scripts/experiment/subset_slides.py DATA OUT --subsample 0.2 [--seed 0]

OUT gets the patches of the chosen slides, at least one, as relative links; the test data are one link to DATA's.
"""

import argparse
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from guided_diffusion import cli, images
from guided_diffusion.files import LOCK, replace_folder

LAYOUT = images.LAYOUTS["monuseg"]


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", type=Path, help="data folder with MoNuSegTrainingData")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    share = parser.add_mutually_exclusive_group(required=True)
    share.add_argument(
        "--subsample", dest="percent", metavar="SHARE", type=per_cent, help="share of the slides, in (0, 1]"
    )
    share.add_argument("--percent", type=float, help="deprecated spelling of --subsample, in per cent")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds choose equal slides")
    return parser


def per_cent(share: str) -> float:
    """:return: a share in per cent, without the rounding of the product: 29 of 0.29."""
    return round(100 * float(share), 9)


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if not 0 < args.percent <= 100:
        raise ValueError(f"--subsample {args.percent / 100:g} must lie in (0, 1]")
    items = images.list_items(str(args.data), "monuseg")
    names = {images.slide_of(item.stem) for item in items}
    slides = images.draw_slides(names, max(1, math.floor(len(names) * args.percent / 100 + 0.5)), args.seed)
    kept = [item for item in items if images.slide_of(item.stem) in slides]
    wanted = {
        f"{LAYOUT.train}/{folder}/{item.stem}{Path(path).suffix}": Path(path)
        for item in kept
        for folder, path in parts(item)
    }
    if (args.data / LAYOUT.test).is_dir():
        wanted[LAYOUT.test] = args.data / LAYOUT.test
    present = {p.relative_to(args.out).as_posix() for p in args.out.rglob("*") if p.is_symlink() or p.is_file()}
    foreign = sorted(present - {*wanted, LOCK})
    if foreign or args.out.resolve() == args.data.resolve():
        named = f"holds {foreign[0]}, which is not of this choice" if foreign else "is DATA itself"
        raise ValueError(f"OUT {args.out} {named}: give a new folder")
    for name, target in wanted.items():
        if os.path.lexists(args.out / name) and (args.out / name).resolve() != target.resolve():
            raise ValueError(f"OUT: {args.out / name} does not lead to {target}, but to other data: give a new folder")

    def fill(folder: Path) -> None:
        for name, target in wanted.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(target.resolve(), place.parent.resolve()))

    replace_folder(args.out, fill, "OUT")
    print(f"{args.out}: {len(slides)} slides, {len(kept)} patches")


def parts(item: images.Item) -> list[tuple[str, str]]:
    """:return: (folder, path) of each of an item's files."""
    files = (("images", item.image), (LAYOUT.class_folder, item.class_mask), (LAYOUT.instance_folder, item.inst_mask))
    return [(folder, path) for folder, path in files if path]


if __name__ == "__main__":
    cli.run(main)
