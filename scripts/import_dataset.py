"""
Bring a foreign data set of nuclei into the raw layout that prepare_monuseg.py cuts into patches.

    python scripts/import_dataset.py SRC OUT [--format pannuke|consep|conic|lizard|kumar|tnbc|nuinsseg|cryonuseg|
        cellpose|stardist|coco|auto] [--mpp 0.25] [--test NAME,...] [--allow overlaps,empty] [--annotator NAME]

SRC is the folder that the data set was unpacked in; `auto` tells the format by what is there, and says what it found.
OUT gets {train,test}/{images,inst_masks}/NAME.png|tif, with classes class_masks/NAME.png and classes.json (id, name,
colour), and slides.csv: which slide or patient an image is of, by which all later splits go, and its micrometres a
pixel. Train and test are as the data set has them, or --test says which parts or slides are the test set. Nothing is
unpickled, and OUT appears when all of it is written. docs/data.md has a table of the formats.
"""

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from guided_diffusion import cell_classes, cli, magnification, progress
from guided_diffusion.files import check_apart, replace_folder, write_json
from guided_diffusion.histology.formats import data_sets, raw_layout
from guided_diffusion.histology.formats.fields import ALLOWED, TEST, TRAIN, DataSet
from guided_diffusion.histology.formats.raw_layout import Written
from guided_diffusion.histology.formats.readers.folders import ANNOTATORS
from guided_diffusion.options import SOME_WORKERS, check_ranges
from guided_diffusion.processes import each

RECORD = "import.json"  # in OUT, which is replaced by another import only


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    allowed, test = (list(filter(None, text.split(","))) for text in (args.allow, args.test))
    check(args, allowed)
    name, data_set = data_sets.find(args.src, args.format, args.annotator)
    data_set = data_sets.split(data_set, test)
    mpp = args.mpp or data_set.mpp
    print(f"{args.src}: {name}: {data_set.found}; {said_of(data_set, mpp)}")
    if data_sets.exported_as(args.src):
        print(f"{args.src} is an export: of slides, and of classes but COCO's, it says more than is read back from it")

    written: list[Written] = []

    def fill(folder: Path) -> None:
        raw_layout.make_folders(folder, {one.split for one in data_set.fields}, bool(data_set.classes))
        raw_layout.write_facts(folder, data_set.fields, mpp)
        if data_set.classes:
            cell_classes.write_classes(folder, data_set.classes)
        options = dict(out=folder, classes=data_set.classes, sparse=data_set.sparse, allowed=allowed)
        task = partial(raw_layout.write_field, **options)
        done = each(task, data_set.fields, args.num_workers)
        written.extend(progress.bar(done, "importing", len(data_set.fields)))
        if not any(one.nuclei for one in written):
            raise ValueError(f"SRC: {args.src} has no nucleus in any image: are these the masks?")
        write_json(folder / RECORD, {"format": name, "mpp": mpp, "test": test, "allow": allowed})

    replace_folder(args.out, fill, "OUT")
    print(f"{args.out}: {in_words(data_set, written)}")


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("src", metavar="SRC", type=Path, help="folder of the data set")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to; an earlier import in it is replaced")
    parser.add_argument("--format", default=data_sets.AUTO, help=f"one of {', '.join((*data_sets.FORMATS, 'auto'))}")
    parser.add_argument(
        "--mpp", type=float, metavar="X", help="micrometres a pixel, in place of what the data set says"
    )
    parser.add_argument(
        "--test", default="", metavar="NAME,...", help="parts or slides to test on, also by patterns: fold2,consep_*"
    )
    parser.add_argument(
        "--allow",
        default="",
        metavar="WHAT,...",
        help="what is not refused: overlaps (pixels of several nuclei go to the last), empty (a mask without nuclei)",
    )
    parser.add_argument("--annotator", default="", help=f"of CryoNuSeg, whose masks: {', '.join(ANNOTATORS)}")
    parser.add_argument("--num_workers", type=int, default=2, help="processes")
    return parser


def check(args: argparse.Namespace, allowed: list[str]) -> None:
    """:raises ValueError: where a flag is out of range, or OUT is not for this program to write to."""
    check_ranges(vars(args), num_workers=SOME_WORKERS)
    if args.mpp is not None:
        magnification.check(args.mpp, "--mpp is")
    for what in allowed:
        if what not in ALLOWED:
            raise ValueError(f"--allow {what}: choose of {', '.join(ALLOWED)}")
    check_apart(args.out, [args.src], args.out, "OUT")
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / RECORD).exists():
        raise ValueError(f"OUT: {args.out} holds what is not of this program: give a new folder")


def said_of(data_set: DataSet, mpp: float | None) -> str:
    """What a user should know before it is read."""
    scale = f"{mpp:g} um a pixel" if mpp else "micrometres a pixel unknown (--mpp says them)"
    names = ", ".join(one.name for one in data_set.classes)
    return f"{scale}; {f'classes {names}' if names else 'no classes'}"


def in_words(data_set: DataSet, written: list[Written]) -> str:
    """What was written."""
    parts = []
    for split in (TRAIN, TEST):
        own = [(one, count) for one, count in zip(data_set.fields, written) if one.split == split]
        if own:
            slides, nuclei = Counter(one.slide for one, _ in own), sum(count.nuclei for _, count in own)
            parts.append(f"{split}: {len(own)} images of {len(slides)} slides, {nuclei} nuclei")
    empty, overlap = sum(not count.nuclei for count in written), sum(count.overlap for count in written)
    parts += [f"{empty} images without a nucleus"] if empty else []
    parts += [f"{overlap} px that were of several nuclei"] if overlap else []
    return "; ".join(parts)


if __name__ == "__main__":
    cli.run(main)
