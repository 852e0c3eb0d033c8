"""
Make what synthetic patches are held against, in the place of samples: a results folder that assemble_set.py takes.

    python scripts/experiment/rival_samples.py KIND SPLIT --results_path DIR --count N [--seed 0]
        [--model_path SEGMENTER --slides_dir SLIDES]

SPLIT is a folder of subset_slides.py. KIND is one of

    pseudo     its unlabelled images, with the nuclei that SEGMENTER is sure of; DIR/ignore_masks says where it is not.
               SLIDES has the whole slides that they are cut from, of the same magnification: it looks at these, since
               at an image's border it sees little
    transfer   its seen patches, with the colours of unlabelled images' slides (Reinhard's statistics of a slide)
    unseen     the others, which its segmenters do not see, with their true masks: what perfect samples would be worth

The images of pseudo and unseen are spread evenly over slides and patches; there are no more of them than there are.
Where SPLIT has classes of cells, so have transfer and unseen; where SEGMENTER tells classes apart, pseudo leaves out
those nuclei, too, whose class it is not sure of. DIR has class_masks and classes.json then. The same command goes on
where it was killed.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
from PIL import Image
from skimage.segmentation import relabel_sequential

from guided_diffusion import cell_classes, cli, progress, streams
from guided_diffusion.cell_classes import CellClass
from guided_diffusion.devices import find_device
from guided_diffusion.files import csv_text, write_link, write_text, writing
from guided_diffusion.histology.evaluation.runs import MANIFEST
from guided_diffusion.histology.segmenter.decoding import Segmenter, instances, load_segmenter, voted
from guided_diffusion.histology.segmenter.pseudo import confident
from guided_diffusion.histology.slides.patches import IGNORE_MASKS
from guided_diffusion.image_files import read_image, read_inst_mask, read_mask
from guided_diffusion.images import REAL, Item, list_images, list_items
from guided_diffusion.options import COUNT, check_ranges
from guided_diffusion.results import count_classes
from guided_diffusion.stains import colour_statistics, transfer_colours

KINDS = ("pseudo", "transfer", "unseen")
FIELDS = (
    *("stem", "structure", "structure_slide", "structure_kind", "appearance", "appearance_slide", "seed", "noise"),
    "classes",
)


class Row(NamedTuple):
    """A patch to make: its name, whose nuclei it shows, and whose slide's colours."""

    stem: str
    structure: Item
    appearance: Item


FOREIGN = 12  # grey levels by which an image may differ from its place in its slide, which was resized otherwise

Write = Callable[[Row, Path], None]  # the files of a row, in a results folder; the mask last


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check(args)
    if args.kind == "unseen":
        others = list_items(str(args.split / "others"), "monuseg", classes=True)
    else:
        others = list_images(str(args.split / "unlabelled"), "SPLIT")
    device, segmenter = find_device(args.device), None
    if args.kind == "pseudo":
        segmenter = load_segmenter(args.model_path, device)
    rows = list(plan(args, others))
    classes = classes_of(args, rows, segmenter)
    if segmenter:
        write = Labeller(segmenter, args.slides_dir)
    elif args.kind == "transfer":
        write = recolourer([*list_items(str(args.split / "seen"), "monuseg"), *others])
    else:
        write = link
    last = ["inst_masks/{}.tif", *([] if classes is None else [f"{cell_classes.FOLDER}/{{}}.png"])]
    for name in ("samples", *([IGNORE_MASKS] if segmenter else []), *(path.partition("/")[0] for path in last)):
        (args.out / name).mkdir(parents=True, exist_ok=True)
    if classes:
        cell_classes.write_classes(args.out, classes)
    for row in progress.bar(rows, args.kind, unit="patch"):
        if not all((args.out / path.format(row.stem)).exists() for path in last):
            write(row, args.out)
    table = [
        {
            **{"stem": row.stem, "structure_kind": REAL, "seed": args.seed, "noise": row.stem},
            **{"structure": Path(row.structure.image).name, "structure_slide": row.structure.slide},
            **{"appearance": Path(row.appearance.image).name, "appearance_slide": row.appearance.slide},
            "classes": "" if classes is None else counted(args.out, row.stem),
        }
        for row in rows
    ]
    write_text(args.out / MANIFEST, csv_text(FIELDS, table))
    alone = f", {write.alone} of them looked at without their slides" if segmenter and write.alone else ""
    print(f"{args.out}: {len(rows)} patches{alone}")


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("kind", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("split", metavar="SPLIT", type=Path, help="folder of subset_slides.py with --val_share")
    parser.add_argument(
        "--results_path", "--out", dest="out", metavar="DIR", type=Path, required=True, help="folder to write to"
    )
    parser.add_argument("--count", type=int, required=True, help="patches to make")
    parser.add_argument("--seed", type=int, default=0, help="of which slide lends its colours")
    parser.add_argument("--model_path", "--segmenter", metavar="MODEL", type=Path, help="of pseudo")
    parser.add_argument("--slides_dir", metavar="SLIDES", type=Path, help="of pseudo: the slides, whole")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    return parser


def check(args: argparse.Namespace) -> None:
    """:raises ValueError: where flags are out of range or do not go together, or the folders are others."""
    if args.kind not in KINDS:
        raise ValueError(f"unknown KIND {args.kind}: choose one of {', '.join(KINDS)}")
    check_ranges(vars(args), count=COUNT, seed="[0, inf)")
    if (args.kind == "pseudo") != (args.model_path is not None):
        raise ValueError(f"{args.kind} with --model_path {args.model_path}: give it with pseudo, and only there")
    if args.slides_dir and args.kind != "pseudo":
        raise ValueError(f"{args.kind} with --slides_dir {args.slides_dir}: give it with pseudo alone")
    for name in ("seen", "unlabelled"):
        if not (args.split / name).is_dir():
            raise FileNotFoundError(
                f"SPLIT {args.split} has no {name}/: make it with subset_slides.py --val_share, of a part of the slides"
            )
    if args.out.resolve().is_relative_to(args.split.resolve()):
        raise ValueError(f"--results_path {args.out} lies in SPLIT {args.split}: give a folder outside")


def classes_of(args: argparse.Namespace, rows: Sequence[Row], segmenter: Segmenter | None) -> list[CellClass] | None:
    """
    :return: the classes of the nuclei that are written, none where these have no names; None: they have no classes.
    :raises ValueError: where the segmenter's are not SPLIT's, or those of what is there are others.
    """
    known = cell_classes.read_classes(args.split)
    if segmenter:
        if segmenter.classes and known:
            segmenter.check_classes(known, f"SPLIT {args.split}")
        classes = (known or segmenter.classes) if segmenter.classes else None
    else:
        classes = known if all(row.structure.cell_classes for row in rows) else None
    table, masks = (args.out / name for name in (cell_classes.TABLE, cell_classes.FOLDER))
    if (masks.exists() and classes is None) or (table.exists() and cell_classes.read_classes(args.out) != classes):
        raise ValueError(f"--results_path {args.out} has nuclei of other classes than {args.kind}: give another folder")
    return classes


def counted(out: Path, stem: str) -> str:
    """:return: how many nuclei of a patch that is written are of which class, see count_classes."""
    class_map = read_mask(out / cell_classes.FOLDER / f"{stem}.png")
    return count_classes(class_map, read_inst_mask(out / "inst_masks" / f"{stem}.tif"))


def plan(args: argparse.Namespace, others: Sequence[Item]) -> Iterator[Row]:
    """:param others: the images, or patches, of unseen slides. :return: what to make, in order."""
    if args.kind != "transfer":
        for item in spread(others, args.count):
            yield Row(Path(item.image).stem, item, item)
        return
    seen = list_items(str(args.split / "seen"), "monuseg", classes=True)
    first = {item.slide: item for item in reversed(others)}
    for number in range(args.count):
        turn, place = divmod(number, len(seen))
        own = seen[place]
        slides = sorted(first.keys() - {own.slide}) or sorted(first)
        # A patch takes slide after slide, in an order of its own.
        order = streams.rng("slides that lend colours", args.seed, place).permutation(len(slides))
        target = first[slides[order[turn % len(slides)]]]
        yield Row(f"{Path(own.image).stem}_{turn:03d}", own, target)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """:return: at most so many of the items, evenly spread over them as they are sorted, slide by slide."""
    return list(items) if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def link(row: Row, out: Path) -> None:
    """A real patch and its masks."""
    lead(out / "samples" / f"{row.stem}.png", row.structure.image)
    link_masks(row, out)


def link_masks(row: Row, out: Path) -> None:
    """The masks of the patch whose nuclei a row shows."""
    if row.structure.cell_classes:
        lead(out / cell_classes.FOLDER / f"{row.stem}.png", row.structure.class_mask)
    lead(out / "inst_masks" / f"{row.stem}.tif", row.structure.inst_mask)


def lead(place: Path, target: str) -> None:
    """Make a relative link to what a path is in the end."""
    write_link(place, os.path.relpath(os.path.realpath(target), place.parent.resolve()))


class Labeller:
    """
    Writes the nuclei that a segmenter is sure of, in the whole slide of an image where that is there.

    :param slides: folder of images of whole slides, or of large parts of them; None: images are looked at alone.
    """

    def __init__(self, segmenter: Segmenter, slides: Path | None) -> None:
        self.segmenter = segmenter
        self.alone = 0  # images that have been looked at alone
        self._slides: dict[str, list[str]] = {}
        for item in list_images(str(slides), "--slides_dir") if slides else ():
            self._slides.setdefault(item.slide, []).append(item.image)
        self._read = functools.lru_cache(maxsize=4)(read_image)
        self._labelled = functools.lru_cache(maxsize=4)(self._label)

    def __call__(self, row: Row, out: Path) -> None:
        path, cut = self._place(row.structure)
        kept, ignored, *class_map = (array[cut] for array in self._labelled(path))
        lead(out / "samples" / f"{row.stem}.png", row.structure.image)
        save(out / IGNORE_MASKS / f"{row.stem}.png", np.where(ignored, 255, 0).astype(np.uint8))
        if class_map:
            save(out / cell_classes.FOLDER / f"{row.stem}.png", class_map[0])
        if kept.max() > np.iinfo(np.uint16).max:  # as a large slide has them
            kept = relabel_sequential(kept)[0]
        save(out / "inst_masks" / f"{row.stem}.tif", kept.astype(np.uint16))

    def _place(self, item: Item) -> tuple[str, tuple[slice, ...]]:
        """The image to look at, and where in it an item lies."""
        image = read_image(item.image)
        for path in self._slides.get(item.slide, ()):
            if cut := place(image, self._read(path)):
                return path, cut
        self.alone += 1
        return item.image, (slice(None), slice(None))

    def _label(self, path: str) -> list[np.ndarray]:
        """The nuclei to keep, where nothing is known, and of segmenters that tell classes apart the class map."""
        maps = self.segmenter.predict(self._read(path))
        found = instances(maps.probability, maps.position, self.segmenter.mpp)
        kept, ignored = confident(maps.probability, found, maps.of_class)
        if not self.segmenter.classes:
            return [kept, ignored]
        return [kept, ignored, cell_classes.painted(kept, voted(found, maps.of_class, self.segmenter.classes))]


def place(image: np.ndarray, slide: np.ndarray) -> tuple[slice, slice] | None:
    """:return: where an image lies in one of its slide, of the same magnification; None where it does not."""
    height, width = image.shape[:2]
    if height > slide.shape[0] or width > slide.shape[1]:
        return None
    away = cv2.matchTemplate(slide, image, cv2.TM_SQDIFF)
    row, column = np.unravel_index(away.argmin(), away.shape)
    cut = slice(row, row + height), slice(column, column + width)
    return cut if np.abs(slide[cut].astype(int) - image).mean() <= FOREIGN else None


def recolourer(items: Iterable[Item]) -> Write:
    """:param items: all images that may lend or take colours. :return: what writes patches in other slides' colours."""
    members: dict[str, list[str]] = {}
    for item in items:
        members.setdefault(item.slide, []).append(item.image)

    @functools.cache
    def colours(slide: str) -> np.ndarray:
        return colour_statistics(map(read_image, members[slide]))

    def write(row: Row, out: Path) -> None:
        own, target = colours(row.structure.slide), colours(row.appearance.slide)
        save(out / "samples" / f"{row.stem}.png", transfer_colours(read_image(row.structure.image), own, target))
        link_masks(row, out)

    return write


def save(path: Path, array: np.ndarray) -> None:
    with writing(path, durable=False) as file:
        Image.fromarray(array).save(file, "TIFF" if path.suffix == ".tif" else "PNG")


if __name__ == "__main__":
    cli.run(main)
