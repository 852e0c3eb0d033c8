"""
Make layouts of nuclei that no slide has: instance masks for image_sample.py --structure_dir.

    python scripts/make_structures.py DATA --out MASKS --count 1000 [--size 128] [--method recombine|perturb]

DATA is a data folder, of whose training masks they are made. recombine puts whole nuclei of all masks together anew,
turned, mirrored, scaled and bent a little, as dense, of such sizes, directions and gaps as in one real mask each;
perturb takes a real layout and moves each nucleus a little. MASKS/inst_masks gets made_000000.tif and so on; layout k
depends on --seed, k and the other flags alone. MASKS/structures.json says how far the layouts are from real ones,
figure by figure, beside how far one half of the real slides is from the other (Wasserstein distance, in standard
deviations of the real ones); structures.png shows it. The same command goes on, also with a larger --count.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from guided_diffusion import cli, magnification, progress, streams
from guided_diffusion.files import fingerprint, write_json, writing
from guided_diffusion.histology.structures import statistics
from guided_diffusion.histology.structures.bank import Bank
from guided_diffusion.histology.structures.layouts import perturb, recombine
from guided_diffusion.histology.structures.picture import SHOWN, draw_structures
from guided_diffusion.image_files import read_inst_mask
from guided_diffusion.images import STRUCTURES, Item, list_items
from guided_diffusion.slides import write_table

METHODS = ("recombine", "perturb")
REPORT, PICTURE, FOLDER = STRUCTURES, "structures.png", "inst_masks"

Make = Callable[[np.random.Generator], np.ndarray]
_make: Make | None = None  # of a worker process


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check(args)
    items = masked_items(args.data)
    masks = [read_inst_mask(item.inst_mask) for item in progress.bar(items, "reading", leave=False, delay=1)]
    make = maker(args, masks)
    settings = dict(method=args.method, seed=args.seed, size=args.size, masks=fingerprint([i.inst_mask for i in items]))
    begin(args.out, settings, args.count)
    magnification.pass_on(args.data, args.out)
    paths = [args.out / FOLDER / f"made_{number:06d}.tif" for number in range(args.count)]
    write_table(args.out, [(path.name, path.stem) for path in paths])
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    jobs = [(number, args.seed, paths[number]) for number in missing]
    with multiprocessing.get_context("fork").Pool(args.num_workers, set_maker, (make,)) as pool:
        list(progress.bar(pool.imap_unordered(make_one, jobs, 8), "making", len(jobs)))
        real = list(progress.bar(pool.imap(statistics.measure, masks, 32), "measuring", len(masks), leave=False))
        layouts = [read_inst_mask(str(path)) for path in paths]
        made = list(pool.imap(statistics.measure, layouts, 32))
    report(args, settings, items, (masks, real), (layouts, made))


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
    for name, least in (("count", 1), ("size", 1), ("seed", 0), ("num_workers", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {least}")
    if args.method not in METHODS:
        raise ValueError(f"unknown --method {args.method}: choose one of {', '.join(METHODS)}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--results_path {args.out} is a file: give a folder")
    if args.out.resolve().is_relative_to(args.data.resolve()):
        raise ValueError(f"--results_path {args.out} lies among the data of {args.data}: give another folder")


def masked_items(data: Path) -> list[Item]:
    """:return: the training patches of a data folder. :raises ValueError: where they have no instance masks."""
    items = list_items(str(data), "monuseg")
    if items[0].inst_mask is None:
        raise ValueError(f"DATA {data} has no inst_masks: layouts are made of instances")
    return items


def maker(args: argparse.Namespace, masks: list[np.ndarray]) -> Make:
    """:return: what makes a layout. :raises ValueError: where --size does not allow it, or no nucleus is whole."""
    if args.method == "perturb":
        smallest = min(min(mask.shape) for mask in masks)
        if smallest < args.size:
            raise ValueError(
                f"--size {args.size}: the smallest mask of DATA is {smallest} px, and perturb makes no more"
            )
        return lambda rng: perturb(window(masks[int(rng.integers(len(masks)))], args.size, rng), rng)
    try:
        bank = Bank.of(masks)
    except ValueError as error:
        raise ValueError(f"DATA {args.data}: {error}") from None
    largest = max(max(nucleus.mask.shape) for nucleus in bank.nuclei)
    if args.size < largest:
        raise ValueError(f"--size {args.size} is below the largest nucleus of DATA, {largest} px: give more")
    return lambda rng: recombine(bank, args.size, rng)


def window(mask: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """:return: a [size x size] part of a mask, anywhere."""
    top, left = (int(rng.integers(side - size + 1)) for side in mask.shape)
    return mask[top : top + size, left : left + size]


def begin(out: Path, settings: dict[str, object], count: int) -> None:
    """Make the folder, and note what is made in it. :raises ValueError: where it holds something else."""
    path = out / REPORT
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
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
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, {"settings": settings})


def set_maker(make: Make) -> None:
    global _make
    _make = make


def make_one(job: tuple[int, int, Path]) -> None:
    number, seed, path = job
    layout = _make(streams.rng("layout of nuclei", seed, number))
    with writing(path, durable=False) as file:
        Image.fromarray(layout.astype(np.uint16)).save(file, format="TIFF", compression="tiff_lzw")


def report(
    args: argparse.Namespace,
    settings: dict[str, object],
    items: list[Item],
    real: tuple[list[np.ndarray], list[dict]],
    made: tuple[list[np.ndarray], list[dict]],
) -> None:
    """Write structures.json and structures.png, and print the table. Of each kind: layouts, and what they measure."""
    values = [statistics.pooled(measured) for _, measured in (real, made)]
    slides = [item.slide for item in items]
    halves = statistics.between_halves(real[1], slides, streams.rng("halves of slides", args.seed))
    away = statistics.distances(*values)
    figures = {name: {"distance": away[name], "between_halves": halves[name]} for name in statistics.FIGURES}
    write_json(args.out / REPORT, {"settings": settings, "count": args.count, "figures": figures})
    order = streams.rng("shown layouts", args.seed).permutation(len(items))[:SHOWN]
    with writing(args.out / PICTURE) as file:
        draw_structures(*values, figures, ([real[0][i] for i in order], made[0]), file)
    print(f"{'':10} distance  between halves of the slides")
    for name, row in figures.items():
        print(f"{name:10} {row['distance']:8.3f}  {row['between_halves']:.3f}")
    print(f"{args.out}: {args.count} layouts; look at {args.out / PICTURE}")


if __name__ == "__main__":
    cli.run(main)
