"""
Folders of synthetic patches: which files belong together, and where each sample came from.

Owns how runs are found, checked and named. Knows nothing of how samples are made or judged.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ...files import by_stem, nfc, reading_table
from ...slides import without_number

MANIFEST = "manifest.csv"


def add_run_flags(parser: argparse.ArgumentParser, real: str, results: str, required: bool = True) -> None:
    """
    Add the flags of a program that holds synthetic patches beside real ones: args.real, args.synthetic and args.out.

    :param real: what --data_dir is; results: what --results_path is.
    :param required: whether it does nothing else.
    """
    parser.add_argument("--data_dir", "--real", dest="real", metavar="DATA", type=Path, required=required, help=real)
    parser.add_argument(
        "--synthetic",
        metavar="RESULTS",
        nargs="+",
        type=Path,
        default=[],
        required=required,
        help="results folders, or a sweep's",
    )
    parser.add_argument("--results_path", "--out", dest="out", metavar="OUT", type=Path, required=True, help=results)


@dataclass(frozen=True)
class Sample:
    """
    One synthetic patch.

    :param stem: of all its files.
    :param sample: the image; inst_mask: its nuclei; appearance: the real image whose colours it took, if that is there.
    :param row: its row of the run's manifest, {} where there is none.
    """

    stem: str
    sample: Path
    inst_mask: Path
    appearance: Path | None
    row: dict[str, str] = field(default_factory=dict)


def slides_of_sample(sample: Sample, known: Mapping[str, str]) -> tuple[str, str]:
    """
    :param known: name of a real patch, without folder and suffix -> its slide.
    :return: the slides of a sample's structure and of its appearance, by its row, else by what is known of the patches
        that it names, else by their names; "" where it names none.
    """
    structure = nfc(PurePath(sample.row.get("structure") or "").stem)
    appearance = appearance_stem(sample, known)
    return (
        sample.row.get("structure_slide") or known.get(structure) or without_number(structure),
        sample.row.get("appearance_slide") or known.get(appearance) or without_number(appearance),
    )


def appearance_stem(sample: Sample, known: Mapping[str, str]) -> str:
    """:return: the stem of the image that a sample took its appearance from, by its row, else by its own name."""
    if sample.row.get("appearance"):
        return nfc(PurePath(sample.row["appearance"]).stem)
    # Sampling names a second sample of STEM's appearance STEM_0, a third STEM_1.
    first, _, number = sample.stem.rpartition("_")
    return first if number.isdecimal() and sample.stem not in known and first in known else sample.stem


@dataclass(frozen=True)
class Run:
    """The samples of one results folder, in the order of their stems; each has a `name` of its own."""

    name: str
    path: Path
    samples: list[Sample]


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """
    Find results folders.

    :param folders: each either holds samples/ and inst_masks/, or folders that do, as a sweep makes them.
    :return: the runs, each under a name of its own.
    :raises FileNotFoundError: where a folder is missing, or holds no samples.
    :raises ValueError: where samples lack masks, a link leads nowhere, or a run is named twice.
    """
    paths: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give a results folder of image_sample.py")
        children = [folder] if (folder / "samples").is_dir() else sorted(p.parent for p in folder.glob("[!.]*/samples"))
        if not children:
            raise FileNotFoundError(f"{folder} has no samples/, nor a folder in it that has: give a results folder")
        paths += children
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is named twice: give it once")
    names = names_of(paths)
    for path, name in zip(paths, names):
        if names.count(name) > 1:
            raise ValueError(f"{path}: another folder is named {name}, too: rename one")
    return [read_run(path, name) for path, name in zip(paths, names)]


def names_of(paths: Sequence[Path]) -> list[str]:
    """:return: the folders' own names; equal ones, as of A/kept and B/kept, get that of the folder above, too."""
    places = [path.resolve().parts[1:] for path in paths]
    names = [place[-1] for place in places]
    for depth in range(2, max(map(len, places)) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = ["_".join(place[-depth:]) if name in twice else name for place, name in zip(places, names)]
    return names


def read_run(path: Path, name: str) -> Run:
    """
    Read one results folder; parameters, result and errors as find_runs'. Where it has a manifest, pictures without a
    row in it are those of a run that was killed, and no samples, which a line says.
    """
    rows = _rows(path / MANIFEST)
    files, masks = _files(path / "samples", ".png"), _files(path / "inst_masks", ".tif")
    appearances = {stem: file for stem, file in _files(path / "images", ".png").items() if file.exists()}
    if not files:
        raise FileNotFoundError(f"{path / 'samples'} holds no .png: sample first")
    for part in (*files.values(), *masks.values()):
        if part.is_symlink() and not part.exists():
            raise ValueError(f"{part} is a link that leads nowhere: make it again")
    if unknown := files.keys() - rows.keys() if rows else ():
        sys.stderr.write(f"WARNING: {path}: {len(unknown)} pictures that {MANIFEST} does not name are left out\n")
    samples = []
    for stem in (stem for stem in files if stem not in unknown):
        file = files[stem]
        if stem not in masks:
            raise ValueError(f"{file} has no mask {path / 'inst_masks' / stem}.tif: sample it again, or remove it")
        samples.append(Sample(stem, file, masks[stem], appearances.get(stem), rows.get(stem, {})))
    return Run(name, path, samples)


def _files(folder: Path, suffix: str) -> dict[str, Path]:
    """Stem -> file of a folder, which may be missing."""
    return {stem: Path(file) for stem, file in by_stem(folder, (suffix,)).items()} if folder.is_dir() else {}


def _rows(path: Path) -> dict[str, dict[str, str]]:
    """Stem -> row of a manifest; incomplete rows are skipped."""
    if not path.exists():
        return {}
    with reading_table(path), open(path, newline="", encoding="utf-8") as file:
        return {nfc(row["stem"]): row for row in csv.DictReader(file) if row.get("stem") and None not in row.values()}
