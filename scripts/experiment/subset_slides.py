"""
Make the data folders of a share of the training slides, or of the patches of one cluster.

    python scripts/experiment/subset_slides.py DATA OUT --subsample 0.2 [--seed 0] [--val_share 0.15]
        [--track slides|masks|patches] [--clusters CLUSTERS [--cluster LABEL]]

OUT is a data folder of the chosen slides' patches, at least one slide, as relative links; the test data are one link to
DATA's. With --val_share, in OUT are, too:

    held        the patches of the slides that train_segmenter.py with the same --val_share and --seed holds out
    seen        the chosen ones of the other slides: what is trained on
    others      a data folder of all other training patches but those of held-out slides
    unlabelled  the images of these, alone
    colours     the images of seen and others
    generator   --track patches: a data folder of seen and others, which a diffusion model sees there with masks
    split.csv   which part each patch of DATA has in the experiment's --track, see ROLES in this program

--track patches chooses among the patches of one cluster of cluster_patches.py, the largest or LABEL, whatever their
slides.
"""

import argparse
import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from guided_diffusion import cell_classes, cli
from guided_diffusion.files import LOCK, csv_text, leading, replace_folder, write_text
from guided_diffusion.histology.experiment.protocol import TRACKS
from guided_diffusion.histology.features.cluster_folders import Patch, largest_cluster, list_patches
from guided_diffusion.histology.slides.annotations import TEST_SPLIT, TRAIN_SPLIT
from guided_diffusion.magnification import pass_on
from guided_diffusion.options import check_ranges
from guided_diffusion.slides import MANIFEST, TABLE, hold_out, keep, write_table

SEEN, HELD, OTHERS, GENERATOR = "seen", "held", "others", "generator"
UNLABELLED, COLOURS, SPLIT = "unlabelled", "colours", "split.csv"
# Column of split.csv -> the patches that have a 1 there: those that ...
ROLES = {
    "generator_masks": "the diffusion model is trained on with masks",
    "generator_images": "it is trained on without",
    "structures": "real structures of samples, and made ones, come from",
    "colours": "samples may take their colours from",
    "segmenter": "all segmenters of the cell are trained on",
    "unlabelled": "pseudo-labels and transferred stains come from, without masks, and interventions with them",
    "held_out": "segmenters are chosen by",
    "tested": "segmenters are tested on, as whole slides",
}


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
    parser.add_argument("--track", default="slides", help=", ".join(TRACKS))
    parser.add_argument("--clusters", type=Path, help="of --track patches: a folder of cluster_patches.py")
    parser.add_argument("--cluster", metavar="LABEL", default="", help="one of them; empty: the largest")
    return parser


def per_cent(share: str) -> float:
    """:return: a share in per cent, without the rounding of the product: 29 of 0.29."""
    return round(100 * float(share), 9)


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check(args)
    patches = list_patches(args.data)
    training = [patch for patch in patches if patch.split == TRAIN_SPLIT]
    tests = [patch for patch in patches if patch.split == TEST_SPLIT]
    kept = choose(args, training)
    slides = {patch.slide for patch in kept}
    held = hold_out(slides, args.val_share, args.seed) if args.val_share is not None else set()

    wanted, tables, texts = folder_of("", kept), {TABLE: [(patch.file, patch.slide) for patch in kept + tests]}, {}
    if (args.data / TEST_SPLIT).is_dir():
        wanted[TEST_SPLIT] = args.data / TEST_SPLIT
    if args.val_share is not None:
        seen, others, parts = divided(training, kept, held)
        if args.track != "patches":
            del parts[GENERATOR]
        for part, own in parts.items():
            if own:
                wanted |= folder_of(f"{part}/", own)
                tables[f"{part}/{TABLE}"] = [(patch.file, patch.slide) for patch in own]
        for part, own in ((UNLABELLED, others), (COLOURS, seen + others)):
            if own:
                wanted |= {f"{part}/{patch.image.name}": patch.image for patch in own}
                tables[f"{part}/{TABLE}"] = [(patch.image.name, patch.slide) for patch in own]
        texts[SPLIT] = split_table(args.track, patches, seen, others, parts[HELD])
    check_out(args, wanted, {*tables, *texts})

    def fill(folder: Path) -> None:
        real = functools.cache(os.path.realpath)
        for name, target in wanted.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(leading(target, place, real))
        pass_on(args.data, folder)
        cell_classes.pass_on(args.data, folder)
        for name, rows in tables.items():
            write_table((folder / name).parent, rows)
        for name, text in texts.items():
            write_text(folder / name, text)

    replace_folder(args.out, fill, "OUT")
    print(f"{args.out}: {len(slides)} slides, {len(kept)} patches")


def check(args: argparse.Namespace) -> None:
    """:raises ValueError: where flags are out of range or do not go together."""
    if not 0 < args.percent <= 100:
        raise ValueError(f"--subsample {args.percent / 100:g} must lie in (0, 1]")
    if args.track not in TRACKS:
        raise ValueError(f"unknown --track {args.track}: choose one of {', '.join(TRACKS)}")
    check_ranges(vars(args), seed="[0, inf)", val_share="[0, 1)")
    if args.cluster and args.track != "patches":
        raise ValueError(f"--track {args.track} with --cluster {args.cluster}: give it with patches, and only there")
    if (args.track == "patches") != (args.clusters is not None):
        raise ValueError(f"--track {args.track} with --clusters {args.clusters}: give it with patches, and only there")


def choose(args: argparse.Namespace, training: list[Patch]) -> list[Patch]:
    """:return: the share's patches: those of some slides, or some of those of a cluster."""
    if args.track != "patches":
        slides = keep((patch.slide for patch in training), args.percent / 100, args.seed)
        return [patch for patch in training if patch.slide in slides]
    label = args.cluster or largest_cluster(args.clusters)
    if not (args.clusters / label / TRAIN_SPLIT).is_dir():
        raise ValueError(f"--cluster {label}: {args.clusters} has no training patches of it: choose another")
    members = {patch.stem for patch in list_patches(args.clusters / label) if patch.split == TRAIN_SPLIT}
    stems = keep(members, args.percent / 100, args.seed)
    return [patch for patch in training if patch.stem in stems]


def divided(
    training: list[Patch], kept: list[Patch], held: set[str]
) -> tuple[list[Patch], list[Patch], dict[str, list[Patch]]]:
    """:return: the patches that are seen, those that are not, and those of each data folder in OUT."""
    stems = {patch.stem for patch in kept}
    clean = [patch for patch in training if patch.slide not in held]
    seen, others = ([patch for patch in clean if (patch.stem in stems) == chosen] for chosen in (True, False))
    held_out = [patch for patch in kept if patch.slide in held]
    return seen, others, {SEEN: seen, HELD: held_out, OTHERS: others, GENERATOR: clean}


def folder_of(base: str, patches: Iterable[Patch]) -> dict[str, Path]:
    """:return: path in OUT -> file, of a data folder of training patches."""
    return {f"{base}{TRAIN_SPLIT}/{name}": file for patch in patches for name, file in patch.places()}


def split_table(track: str, patches: list[Patch], seen: list[Patch], others: list[Patch], held: list[Patch]) -> str:
    """:return: split.csv: a row a patch of DATA, with a 1 in the columns of its ROLES."""
    of = {
        "generator_masks": seen + others if track == "patches" else seen,
        "generator_images": others if track == "masks" else [],
        "structures": seen,
        "colours": seen if track == "slides" else seen + others,
        "segmenter": seen,
        "unlabelled": others,
        "held_out": held,
        "tested": [patch for patch in patches if patch.split == TEST_SPLIT],
    }
    members = {role: {patch.file for patch in of[role]} for role in ROLES}
    rows = [
        {"file": patch.file, "slide": patch.slide, **{role: int(patch.file in own) for role, own in members.items()}}
        for patch in patches
    ]
    return csv_text(("file", "slide", *ROLES), rows)


def check_out(args: argparse.Namespace, wanted: dict[str, Path], written: set[str]) -> None:
    """:raises ValueError: where OUT holds something else than links of this choice."""
    present = {p.relative_to(args.out).as_posix() for p in args.out.rglob("*") if p.is_symlink() or p.is_file()}
    foreign = sorted(present - {*wanted, *written, LOCK, MANIFEST, cell_classes.TABLE})
    if foreign or args.out.resolve() == args.data.resolve():
        named = f"holds {foreign[0]}, which is not of this choice" if foreign else "is DATA itself"
        raise ValueError(f"OUT {args.out} {named}: give a new folder")
    for name, target in wanted.items():
        if os.path.lexists(args.out / name) and (args.out / name).resolve() != target.resolve():
            raise ValueError(f"OUT: {args.out / name} does not lead to {target}, but to other data: give a new folder")


if __name__ == "__main__":
    cli.run(main)
