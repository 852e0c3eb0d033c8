"""
Make a data folder of a share of the training slides.

    python scripts/experiment/subset_slides.py DATA OUT --subsample 0.2 [--seed 0] [--val_share 0.15]

OUT gets the patches of the chosen slides, at least one, as relative links, slides.csv, which says their slides,
prepare.json, which says their magnification, and DATA's classes.json; the test data are one link to DATA's. With
--val_share, OUT/held is a data folder of those that train_segmenter.py with the same --val_share and --seed holds out,
and OUT/seen of the others, and OUT/colours holds the training images of DATA but for the held-out slides: what to train
a diffusion model on, and what samples may take their colours from, where neither is to see what is chosen by.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from guided_diffusion import cell_classes, cli
from guided_diffusion.files import LOCK, replace_folder
from guided_diffusion.histology.features.cluster_folders import list_patches
from guided_diffusion.histology.slides.annotations import TEST_SPLIT, TRAIN_SPLIT
from guided_diffusion.magnification import pass_on
from guided_diffusion.slides import MANIFEST, TABLE, hold_out, keep, write_table

SEEN, HELD, COLOURS = "seen", "held", "colours"


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
    parser.add_argument("--val_share", type=float, help="share of the chosen slides that is held out, in [0, 1)")
    return parser


def per_cent(share: str) -> float:
    """:return: a share in per cent, without the rounding of the product: 29 of 0.29."""
    return round(100 * float(share), 9)


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if not 0 < args.percent <= 100:
        raise ValueError(f"--subsample {args.percent / 100:g} must lie in (0, 1]")
    if args.val_share is not None and not 0 <= args.val_share < 1:
        raise ValueError(f"--val_share {args.val_share:g} must lie in [0, 1)")
    patches = list_patches(args.data)
    training = [patch for patch in patches if patch.split == TRAIN_SPLIT]
    slides = keep((patch.slide for patch in training), args.percent / 100, args.seed)
    kept = [patch for patch in training if patch.slide in slides]
    wanted = {f"{TRAIN_SPLIT}/{name}": file for patch in kept for name, file in patch.places()}
    if (args.data / TEST_SPLIT).is_dir():
        wanted[TEST_SPLIT] = args.data / TEST_SPLIT
    tests = [patch for patch in patches if patch.split == TEST_SPLIT]
    tables = {TABLE: [(patch.file, patch.slide) for patch in kept + tests]}
    if args.val_share is not None:
        held = hold_out(slides, args.val_share, args.seed)
        for part in (SEEN, HELD):
            own = [patch for patch in kept if (patch.slide in held) == (part == HELD)]
            if own:
                wanted |= {f"{part}/{TRAIN_SPLIT}/{name}": file for patch in own for name, file in patch.places()}
                tables[f"{part}/{TABLE}"] = [(patch.file, patch.slide) for patch in own]
        colours = [patch for patch in training if patch.slide not in held]
        wanted |= {f"{COLOURS}/{patch.image.name}": patch.image for patch in colours}
        tables[f"{COLOURS}/{TABLE}"] = [(patch.image.name, patch.slide) for patch in colours]
    present = {p.relative_to(args.out).as_posix() for p in args.out.rglob("*") if p.is_symlink() or p.is_file()}
    foreign = sorted(present - {*wanted, *tables, LOCK, MANIFEST, cell_classes.TABLE})
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
        pass_on(args.data, folder)
        cell_classes.pass_on(args.data, folder)
        for name, rows in tables.items():
            write_table((folder / name).parent, rows)

    replace_folder(args.out, fill, "OUT")
    print(f"{args.out}: {len(slides)} slides, {len(kept)} patches")


if __name__ == "__main__":
    cli.run(main)
