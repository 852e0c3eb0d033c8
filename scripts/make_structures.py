"""
Make layouts of nuclei that no slide has: instance masks for image_sample.py --structure_dir.

    python scripts/make_structures.py DATA --out MASKS --count 1000 [--size 128] [--method recombine|perturb]

DATA is a data folder, of whose training masks they are made. recombine puts whole nuclei of all masks together anew,
turned, mirrored, scaled and bent a little, as dense, of such sizes, directions and gaps as in one real mask each;
perturb takes a real layout, for a larger --size several side by side, and moves each nucleus a little. MASKS/inst_masks
gets made_000000.tif and so on; layout k depends on --seed, k and the other flags alone. MASKS/structures.json says how
far the layouts are from real ones, figure by figure, beside how far one half of the real slides is from the other
(Wasserstein distance, in standard deviations of the real ones); structures.png shows it. The same command goes on, also
with a larger --count.

Where DATA has class_masks, MASKS gets class_masks/made_000000.png and classes.json, too: recombine puts in as many
nuclei of each class as one real mask has, of shapes of that class; with perturb each keeps its own.
"""

import argparse
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from guided_diffusion import cell_classes, cli, magnification, progress, streams
from guided_diffusion.cell_classes import CellClass
from guided_diffusion.files import check_place, claimed, fingerprint, read_json, write_json, writing
from guided_diffusion.histology.structures import statistics
from guided_diffusion.histology.structures.bank import Bank, Layout
from guided_diffusion.histology.structures.layouts import joined, perturb, recombine, window
from guided_diffusion.histology.structures.picture import SHOWN, draw_structures
from guided_diffusion.image_files import read_inst_mask, read_mask
from guided_diffusion.images import STRUCTURES, Item, list_items
from guided_diffusion.options import COUNT, SOME_WORKERS, check_ranges
from guided_diffusion.processes import each
from guided_diffusion.slides import write_table
from guided_diffusion.structures import LEAST, without_fragments

METHODS = ("recombine", "perturb")
REPORT, PICTURE, FOLDER = STRUCTURES, "structures.png", "inst_masks"
LARGEST = 10_000  # px of a layout's side, a gigabyte of arrays

Make = Callable[[np.random.Generator], Layout]
Measured = dict[str, np.ndarray]
_make: Make | None = None  # the workers get both by being forked
_least = 0.0  # see without_specks


def main(argv: list[str] | None = None) -> None:
    global _make, _least
    args = create_argparser().parse_args(argv)
    check(args)
    items = masked_items(args.data)
    own = [item.class_mask if item.cell_classes else None for item in items]
    table = cell_classes.of_mask(own[0]) if own[0] else []
    read = functools.partial(read_layout, known=cell_classes.ids_of(table) or range(1, cell_classes.MOST + 1))
    layouts = [
        read(item.inst_mask, mask) for item, mask in zip(progress.bar(items, "reading", leave=False, delay=1), own)
    ]
    names = class_names(table, layouts)
    mpp = magnification.of_data(str(args.data)) or magnification.REFERENCE_MPP
    least = magnification.area(LEAST, mpp)
    layouts = [without_specks(layout, least) for layout in layouts]
    _make, _least = maker(args, layouts, names), least
    masks = [item.inst_mask for item in items] + [mask for mask in own if mask]
    settings = dict(method=args.method, seed=args.seed, size=args.size, masks=fingerprint(masks))
    with claimed(args.out, "--results_path"):
        begin(args.out, settings, args.count, table, bool(names))
        magnification.pass_on(args.data, args.out)
        paths = [args.out / FOLDER / f"made_{number:06d}.tif" for number in range(args.count)]
        write_table(args.out, [(path.name, path.stem) for path in paths])
        class_paths = [class_mask_of(path) if names else None for path in paths]
        jobs = [(number, args.seed, *pair) for number, pair in enumerate(zip(paths, class_paths))]
        missing = [job for job in jobs if not all(path.exists() for path in job[2:] if path)]
        for _ in progress.bar(each(make_one, missing, args.num_workers, fork=True), "making", len(missing)):
            pass
        made_layouts = [read(*pair) for pair in zip(paths, class_paths)]
        both = [*layouts, *made_layouts]
        figures = each(functools.partial(measured, names), both, args.num_workers, fork=True)
        values = list(progress.bar(figures, "measuring", len(both), leave=False))
        real, made = values[: len(layouts)], values[len(layouts) :]
        report(args, settings, items, names, (layouts, real), (made_layouts, made))


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", type=Path, help="data folder, of prepare_monuseg.py or alike")
    parser.add_argument(
        "--results_path", "--out", dest="out", metavar="MASKS", type=Path, required=True, help="folder to write to"
    )
    parser.add_argument("--count", type=int, required=True, help="layouts")
    parser.add_argument("--size", type=int, default=128, help="height and width in px")
    parser.add_argument("--method", default="recombine", help="recombine or perturb")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    return parser


def check(args: argparse.Namespace) -> None:
    """:raises ValueError: where a flag is out of range, or MASKS lies among the data."""
    check_ranges(vars(args), count=COUNT, size=f"[1, {LARGEST}]", seed="[0, inf)", num_workers=SOME_WORKERS)
    if args.method not in METHODS:
        raise ValueError(f"unknown --method {args.method}: choose one of {', '.join(METHODS)}")
    check_place(args.out)
    if args.out.resolve().is_relative_to(args.data.resolve()):
        raise ValueError(f"--results_path {args.out} lies among the data of {args.data}: give another folder")


def masked_items(data: Path) -> list[Item]:
    """:return: the training patches of a data folder. :raises ValueError: where they have no instance masks."""
    items = list_items(str(data), "monuseg", classes=True)
    if items[0].inst_mask is None:
        raise ValueError(f"DATA {data} has no inst_masks: layouts are made of instances")
    return items


def read_layout(inst_mask: str | Path, class_mask: str | Path | None, known: Collection[int]) -> Layout:
    """:return: the nuclei of a mask, and, of a class mask, their classes. :raises ValueError: see of_nuclei."""
    inst_map = read_inst_mask(inst_mask)
    if class_mask is None:
        return Layout(inst_map).numbered()
    of_nucleus = cell_classes.of_nuclei(inst_map, read_mask(class_mask), known, str(class_mask))
    return Layout(inst_map, of_nucleus).numbered()


def without_specks(layout: Layout, least: float) -> Layout:
    """
    :param least: the smallest area of a part of a nucleus that the border does not cut, in pixels.
    :return: the layout without smaller ones, which annotations have, and which sampling refuses.
    """
    return Layout(without_fragments(layout.inst_map, least), layout.classes).numbered()


def class_names(table: Sequence[CellClass], layouts: Sequence[Layout]) -> dict[int, str]:
    """:return: number -> name of the classes that there are, by their table, else as they occur."""
    numbers = {number for layout in layouts for number in layout.classes.values()}
    return {one.id: one.name for one in table} or {number: str(number) for number in sorted(numbers)}


def class_mask_of(path: Path) -> Path:
    """:return: where the classes of a layout are."""
    return path.parents[1] / cell_classes.FOLDER / f"{path.stem}.png"


def measured(numbers: Collection[int], layout: Layout) -> Measured:
    """:return: a layout's figures, those of these classes among them."""
    return {**statistics.measure(layout.inst_map), **statistics.class_shares(layout, numbers)}


def maker(args: argparse.Namespace, layouts: list[Layout], names: dict[int, str]) -> Make:
    """:return: what makes a layout. :raises ValueError: where --size does not allow it, or no nucleus is whole."""
    if not any(layout.inst_map.any() for layout in layouts):
        raise ValueError(f"DATA {args.data}: no mask has a nucleus")
    large = [layout for layout in layouts if min(layout.inst_map.shape) >= args.size]
    if args.method == "perturb" and large:
        return lambda rng: perturb(window(large[int(rng.integers(len(large)))], args.size, rng), rng)
    try:
        bank = Bank.of(layouts)
    except ValueError as error:
        raise ValueError(f"DATA {args.data}: {error}") from None
    if args.size < bank.largest:
        raise ValueError(f"--size {args.size} is below the largest nucleus of DATA, {bank.largest} px: give more")
    cut = {number for layout in layouts for number in layout.classes.values()} - bank.stocks.keys()
    for number in sorted(cut):
        logging.getLogger(__name__).warning(
            f"class {names[number]} has no whole nucleus in DATA: layouts have none of it"
        )
    if args.method == "perturb":
        return lambda rng: perturb(joined(layouts, bank.stocks, args.size, rng), rng)
    return lambda rng: recombine(bank, args.size, rng)


def begin(out: Path, settings: dict[str, object], count: int, table: Sequence[CellClass], classes: bool) -> None:
    """Make the folder, and note what is made in it. :raises ValueError: where it holds something else."""
    path = out / REPORT
    if path.exists():
        try:
            before = dict(read_json(path)["settings"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is damaged, so what was begun there is not known: give another folder") from None
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"--results_path {out} was begun with {name} {before.get(name)}, this run has {value}: give "
                    "another folder"
                )
        made = sum(1 for _ in (out / FOLDER).glob("made_*.tif"))
        if made > count:
            raise ValueError(f"--results_path {out} holds {made} layouts, more than --count {count}: give as many")
    elif (out / FOLDER).exists():
        raise ValueError(f"--results_path {out} holds {FOLDER} that this program did not make: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, {"settings": settings})
    for folder in (FOLDER, cell_classes.FOLDER) if classes else (FOLDER,):
        (out / folder).mkdir(exist_ok=True)
    if table:
        cell_classes.write_classes(out, table)


def make_one(job: tuple[int, int, Path, Path | None]) -> None:
    number, seed, path, class_path = job
    layout = without_specks(_make(streams.rng("layout of nuclei", seed, number)), _least)
    if class_path:
        with writing(class_path, durable=False) as file:
            Image.fromarray(cell_classes.painted(layout.inst_map, layout.classes)).save(file, format="PNG")
    with writing(path, durable=False) as file:
        narrow = layout.inst_map.astype(np.uint16 if layout.inst_map.max() < 1 << 16 else np.int32)
        Image.fromarray(narrow).save(file, format="TIFF", compression="tiff_lzw")


def report(
    args: argparse.Namespace,
    settings: dict[str, object],
    items: list[Item],
    names: dict[int, str],
    real: tuple[list[Layout], list[Measured]],
    made: tuple[list[Layout], list[Measured]],
) -> None:
    """Write structures.json and structures.png, and print the table. Of each kind: layouts, and what they measure."""
    values = [statistics.pooled(measured) for _, measured in (real, made)]
    slides = [item.slide for item in items]
    halves = statistics.between_halves(real[1], slides, streams.rng("halves of slides", args.seed))
    away = statistics.distances(*values)
    figures = {name: {"distance": away[name], "between_halves": halves[name]} for name in halves}
    classes = {name: figures.pop(f"class {number}") for number, name in names.items()}
    for kind, (layouts, _) in ({"real": real, "made": made} if names else {}).items():
        nuclei = [layout.class_of(own) for layout in layouts for own in np.unique(layout.inst_map).tolist() if own]
        for number, name in names.items():
            classes[name][kind] = nuclei.count(number) / max(len(nuclei), 1)
    rows = {"figures": for_json(figures), **({"classes": for_json(classes)} if classes else {})}
    write_json(args.out / REPORT, {"settings": settings, "count": args.count, **rows})
    order = streams.rng("shown layouts", args.seed).permutation(len(items))[:SHOWN]
    shares = {name: (row["real"], row["made"]) for name, row in classes.items()}
    with writing(args.out / PICTURE) as file:
        draw_structures(*values, figures, ([real[0][i] for i in order], made[0]), shares, file)
    print(f"{'':10} distance  between halves of the slides")
    for name, row in figures.items():
        print(f"{name:10} {row['distance']:8.3f}  {row['between_halves']:.3f}")
    for name, row in classes.items():
        print(f"{name:10} {row['distance']:8.3f}  {row['between_halves']:.3f}  {row['real']:.3f} real, ", end="")
        print(f"{row['made']:.3f} made: share of the nuclei")
    print(f"{args.out}: {args.count} layouts; look at {args.out / PICTURE}")


def for_json(figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """:return: figures as JSON can hold them: None in place of NaN."""
    return {
        name: {key: None if math.isnan(value) else value for key, value in row.items()} for name, row in figures.items()
    }


if __name__ == "__main__":
    cli.run(main)
