"""
Write a labelled set as segmenters and loaders read it.

    python scripts/export_set.py SET OUT --format hovernet|cellvit|cellpose|stardist|coco|qupath|webdataset|imagefolder

SET is a results folder of image_sample.py, a sweep of them, the kept/ of filter_ood.py, a set of assemble_set.py, or
another data folder. OUT gets the images and their nuclei, training and test split apart, with classes where SET has
class_masks and classes.json; manifest.csv, which says of every image what SET's says and how many nuclei it has; SET's
card.md; and export.json. docs/export.md says what each format holds, and how its tool is trained on it. Run again, it
replaces OUT as a whole.
"""

import argparse
import csv
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from guided_diffusion import cards, cli, magnification, progress
from guided_diffusion.cell_classes import FOLDER, CellClass, shared, write_classes
from guided_diffusion.files import (
    by_stem,
    check_apart,
    csv_text,
    read_json,
    reading_table,
    replace_folder,
    write_bytes,
    write_json,
    write_text,
)
from guided_diffusion.histology.evaluation.runs import MANIFEST, Run, find_runs, slides_of_sample
from guided_diffusion.histology.features.cluster_folders import list_patches
from guided_diffusion.histology.formats.data_sets import EXPORT
from guided_diffusion.histology.formats.writers.hovernet import WINDOW
from guided_diffusion.histology.formats.writers.labelled import Entry, plain_name, read_example
from guided_diffusion.histology.formats.writers.layouts import LAYOUTS
from guided_diffusion.histology.formats.writers.webdataset import Shards, WebDataset, by_lot
from guided_diffusion.histology.formats.writers.writer import Record, Writer
from guided_diffusion.histology.slides.annotations import TRAIN_SPLIT
from guided_diffusion.histology.slides.patches import IGNORE_MASKS
from guided_diffusion.image_files import EXTENSIONS
from guided_diffusion.options import SOME_WORKERS, check_ranges
from guided_diffusion.processes import each
from guided_diffusion.results import RUN

FIRST_FIELDS = ("file", "split", "source", "slide", "nuclei")


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check_ranges(vars(args), num_workers=SOME_WORKERS)
    if args.window is not None and args.format != "hovernet":
        raise ValueError(f"--window {args.window} is for --format hovernet: leave it out")
    check_apart(args.out, [args.set], args.out, "OUT")
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / EXPORT).is_file():
        raise ValueError(f"OUT {args.out} holds what this command did not make: give another folder")
    entries = find_entries(args.set)
    classes = find_classes(args.set, entries)
    window = {"window": WINDOW if args.window is None else args.window} if args.format == "hovernet" else {}
    writer = LAYOUTS[args.format](classes, **window)
    writer.check(entries)

    records: list[Record] = []

    def fill(folder: Path) -> None:
        records.extend(write_examples(folder, writer, entries, args.num_workers))
        for name, content in writer.tables(records):
            put(folder / name, content)
        write_text(folder / MANIFEST, manifest(records, classes))
        if classes:
            write_classes(folder, writer.numbered())
        counts = {"images": len(records), "nuclei": sum(record.nuclei for record in records)}
        if (card := args.set / cards.NAME).is_file() and not card.is_symlink():
            write_bytes(folder / cards.NAME, card.read_bytes())
        write_json(folder / EXPORT, {"format": args.format, **window, "mpp": find_mpp(args.set, entries), **counts})

    replace_folder(args.out, fill, "OUT")
    if any(args.set.glob(f"{level}{IGNORE_MASKS}") for level in ("", "*/")):
        print(f"WARNING: no format knows {IGNORE_MASKS}: where SET says so, nuclei may be missing", file=sys.stderr)
    report(args.out, args.format, records, writer)


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("set", metavar="SET", type=Path, help="the labelled set")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--format", choices=LAYOUTS, required=True, help="the layout: " + ", ".join(LAYOUTS))
    parser.add_argument(
        "--window",
        type=int,
        metavar="PX",
        help=f"of hovernet: side of the windows that larger images are cut into; {WINDOW} where it is not given",
    )
    parser.add_argument("--num_workers", type=int, default=2, help="processes")
    return parser


# ---- what there is ----


def find_entries(folder: Path) -> list[Entry]:
    """
    :return: the set's labelled pictures, in the order of their names, training ones first.
    :raises FileNotFoundError, ValueError: where there are none, one lacks its mask, or two would share a name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"SET {folder} is not a folder: give a results folder, or a data folder")
    if (folder / TRAIN_SPLIT).is_dir():
        entries = list(of_data(folder))
    else:
        runs = find_runs([folder])
        entries = [entry for run in runs for entry in of_run(run, f"{run.name}__" if len(runs) > 1 else "")]
    taken: dict[str, Entry] = {}
    for entry in entries:
        other = taken.setdefault(entry.name, entry)
        if other is not entry:
            raise ValueError(f"{other.image} and {entry.image} would both be named {entry.name}: rename one")
    return entries


def of_data(folder: Path) -> Iterator[Entry]:
    """The pictures of a data folder, which assemble_set.py may have made."""
    told = {row["file"]: row for row in read_rows(folder / MANIFEST) if row.get("file")}
    for patch in list_patches(folder):
        if "inst_masks" not in patch.files:
            raise ValueError(f"SET {folder} has no {patch.split}/inst_masks: give a folder of prepare_monuseg.py")
        row = told.get(patch.file, {"stem": patch.stem, "source": "real", "slide": patch.slide})
        split = "train" if patch.split == TRAIN_SPLIT else "test"
        masks = (patch.files["inst_masks"], patch.files.get(FOLDER))
        yield Entry(plain_name(patch.stem), split, patch.image, *masks, row)


def of_run(run: Run, prefix: str) -> Iterator[Entry]:
    """The samples of a results folder. Those of the test split's structures or colours are for the test split."""
    masks = by_stem(run.path / FOLDER, EXTENSIONS) if (run.path / FOLDER).is_dir() else {}
    for sample in run.samples:
        flags = flags_of(sample.sample)
        elsewhere = flags.get("structure_dir") and flags.get("appearance_dir")
        split = "test" if flags.get("use_train") is False and not elsewhere else "train"
        structure, appearance = slides_of_sample(sample, {})
        row = {"stem": sample.stem, **sample.row, "source": "synthetic", "slide": appearance}
        row["structure_slide"] = structure
        if masks and sample.stem not in masks:
            raise ValueError(f"{sample.sample} has no mask {sample.stem}.* in {FOLDER}: add it or remove the image")
        class_mask = Path(masks[sample.stem]) if masks else None
        yield Entry(plain_name(prefix + sample.stem), split, sample.sample, sample.inst_mask, class_mask, row)


def find_classes(folder: Path, entries: Sequence[Entry]) -> list[CellClass]:
    """
    :return: the classes that the set's class masks tell apart; none where it has no such masks.
    :raises ValueError: where some pictures have no such mask, or the classes have no names, or several.
    """
    lacking = [entry for entry in entries if not entry.class_mask]
    if len(lacking) == len(entries):
        return []
    if lacking:
        raise ValueError(f"{lacking[0].image} has no class mask, as others of SET {folder} have: add those, or none")
    folders = dict.fromkeys(str(entry.class_mask).rpartition(f"/{FOLDER}/")[0] for entry in entries)
    classes = shared([*folders])
    if not classes:
        raise ValueError(f"SET {folder} has {FOLDER} but no classes.json: copy it from the data that they are made of")
    return classes


def find_mpp(folder: Path, entries: Sequence[Entry]) -> float | None:
    """The set's micrometres a pixel, where it says them."""
    return flags_of(entries[0].image).get("mpp") or magnification.of_data(folder)


def flags_of(sample: Path) -> dict:
    """The flags of the run that made a sample, or what is linked to one, as a filter does."""
    return read_flags(sample.resolve().parents[1])


@functools.cache
def read_flags(folder: Path) -> dict:
    """The flags that a results folder, or the sweep that it is part of, was made with; none where it does not say."""
    for place in (folder, folder.absolute().parent):
        try:
            return dict(read_json(place / RUN))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError):
            raise ValueError(f"{place / RUN} does not parse: remove it, or sample again") from None
    return {}


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with reading_table(path), open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]


# ---- what is written ----


def write_examples(folder: Path, writer: Writer, entries: Sequence[Entry], workers: int) -> list[Record]:
    """Write all that is about one picture. :return: what is remembered of each, in the order of writing."""
    packed = isinstance(writer, WebDataset)
    task = functools.partial(write_example, writer=writer, folder=None if packed else folder)
    order = by_lot(entries) if packed else entries
    records = []
    with Shards(folder) if packed else nullcontext() as shards:
        for record, members in progress.bar(each(task, order, workers), "writing", len(order), unit="image"):
            if packed:
                record = record.at(f"{shards.add(record.entry.split, members)}/{record.file}")
            records.append(record)
    return records


def write_example(entry: Entry, writer: Writer, folder: Path | None) -> tuple[Record, list[tuple[str, bytes]]]:
    """
    :param folder: to write to.
    :return: what is remembered of a picture, and its files where they have no folder.
    """
    example = read_example(entry, writer.classes)
    first, kept = "", []
    for name, content in writer.files(example):
        first = first or name
        if folder is None:
            kept.append((name, content))
        else:
            put(folder / name, content)
    return writer.record(example, first), kept


def put(path: Path, content: bytes) -> None:
    """Write a file of a folder that appears when all are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content, durable=False)


def manifest(records: Iterable[Record], classes: Sequence[CellClass]) -> str:
    """:return: manifest.csv: a row an image; after our columns those of SET's manifest."""
    rows = []
    for record in records:
        by_class = {f"nuclei_{one.name}": record.counts.get(one.id, 0) for one in classes}
        own = {"file": record.file, "split": record.entry.split, "nuclei": record.nuclei, **by_class}
        rows.append({**record.entry.row, **own})
    columns = dict.fromkeys(
        [*FIRST_FIELDS, *(f"nuclei_{one.name}" for one in classes), *(c for row in rows for c in row)]
    )
    return csv_text(list(columns), rows)


def report(out: Path, name: str, records: Sequence[Record], writer: Writer) -> None:
    counts = {
        split: sum(record.entry.split == split for record in records)
        for split in dict.fromkeys(record.entry.split for record in records)
    }
    parts = " and ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{out}: {parts} images with {sum(record.nuclei for record in records)} nuclei, as {name}")
    for line in writer.remarks(records):
        print(line)


if __name__ == "__main__":
    cli.run(main)
