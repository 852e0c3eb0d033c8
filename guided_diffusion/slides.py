"""
Which slide a patch was cut from, and which slides are held out of training. No other module says so.

The slide is a fact of the data, and a data folder owns it: its slides.csv (file, slide), else the prepare.json that
scripts/prepare_monuseg.py leaves. Where neither is, it is guessed by the names, and a warning says how. Knows nothing
of images.
"""

import csv
import functools
import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import blobfile as bf

from .files import check_path, is_remote, nfc, read_bytes, read_json, reading_table, write_text

MANIFEST = "prepare.json"  # of a data folder, which scripts/prepare_monuseg.py writes first and last
TABLE = "slides.csv"
FIELDS = ("file", "slide")
_ABOVE = 3  # folders above a data folder that may own its facts: DATA's are those of DATA/CLUSTERS/LABEL/10ss, too
_SUFFIX = re.compile(r"\.[A-Za-z]{3,4}$")
_NUMBERED = re.compile(r"(.+)_(\d{3,})")  # as prepare_monuseg.py numbers patches: NAME_000, NAME_001, ...


def owners(folder: str | Path) -> Iterator[str]:
    """
    :param folder: a data folder, or any folder in it, local or a blobfile URL.
    :return: the folders whose files may state facts of it, the nearest first: itself and, of a local one, those above.
    """
    place = str(folder) if is_remote(folder) else os.path.abspath(folder)
    for _ in range(1 if is_remote(folder) else 1 + _ABOVE):
        yield place
        place = bf.dirname(place)


# ---- which slide ----


def slides_of(
    folder: str | Path, images: Sequence[str | Path], beside: Callable[[], Iterable[str | Path]] = tuple
) -> list[str]:
    """
    Look up the slides of patches.

    :param folder: a data folder, or any folder in it, local or a blobfile URL.
    :param images: paths in it.
    :param beside: gives other images of it, as of another split: where slides must be guessed, all names count.
    :return: the slide of each.
    :raises ValueError: where slides.csv or prepare.json cannot be read, or the former lacks an image.
    """
    stems = [_stem(image) for image in images]
    for place in owners(folder):
        rows = recorded(place, images)
        if rows is not None:
            return [row["slide"] for row in rows]
        manifest = read_manifest(place)
        if manifest is not None:
            counts = _prepared(manifest, bf.join(place, MANIFEST))
            found = [_of_prepared(stem, counts) for stem in stems]
            if all(found):
                return found
            return _guessed(found, stems, beside(), f"{place}/{MANIFEST} does not name all images of {folder}")
    return _guessed([""] * len(stems), stems, beside(), f"{folder} has neither {TABLE} nor {MANIFEST}")


def recorded(place: str | Path, images: Sequence[str | Path]) -> list[dict[str, str]] | None:
    """
    :param place: a folder that may hold a slides.csv. :param images: paths below it.
    :return: the row of each, by columns: `FIELDS` and whatever else the file has; None where there is none.
    :raises ValueError: where it cannot be read, or lacks an image.
    """
    table = bf.join(str(place), TABLE)
    if not bf.exists(table):
        return None
    rows = _of_table(table)
    found = [next((rows[end] for end in _ends(_stem(image)) if end in rows), None) for image in images]
    if None in found:
        raise ValueError(f"{table} has no row of {images[found.index(None)]}: add its file and slide")
    return found


def read_manifest(place: str | Path) -> dict[str, Any] | None:
    """
    :param place: a folder of `owners`.
    :return: what its prepare.json says; None where it has none.
    :raises ValueError: where that cannot be read.
    """
    path = bf.join(str(place), MANIFEST)
    if not bf.exists(path):
        return None
    try:
        manifest = read_json(path)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is not readable: run prepare_monuseg.py again, or write {TABLE}")
    return manifest


def write_table(folder: Path, rows: Iterable[tuple[str, ...]], columns: Sequence[str] = ()) -> None:
    """
    Write a data folder's slides.csv.

    :param rows: an image's path below the folder, its slide, and what other columns hold.
    :param columns: their names.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*FIELDS, *columns))
    writer.writerows(sorted(rows))
    write_text(folder / TABLE, text.getvalue())


def without_number(stem: str) -> str:
    """:return: NAME of NAME_000, as prepare_monuseg.py names patches; else the stem."""
    matched = _NUMBERED.fullmatch(stem)
    return matched[1] if matched else stem


def _of_table(path: str) -> dict[str, dict[str, str]]:
    """Path without suffix -> its row."""
    found: dict[str, dict[str, str]] = {}
    table = csv.DictReader(io.StringIO(_read(path)))
    with reading_table(path):
        if not {*FIELDS} <= {*(table.fieldnames or ())}:
            raise ValueError(f"{path} has no columns {' and '.join(FIELDS)}: begin it with the line {','.join(FIELDS)}")
        rows = [(table.line_num, row) for row in table]
    for number, row in rows:
        file, slide = ((row[name] or "").strip() for name in FIELDS)
        if not file or not slide:
            raise ValueError(f"{path}, line {number} lacks a file or a slide: give both")
        if slide[0] in "=+-@":
            raise ValueError(f"{path}: slide {slide} is a formula to spreadsheets, which read manifests: rename it")
        if not {"", ".", ".."}.isdisjoint(slide.split("/")):
            raise ValueError(f"{path}: slide {slide} would name a place out of its folder: rename it")
        check_path(slide)
        first = found.setdefault(_stem(file), {**row, "slide": slide})["slide"]
        if first != slide:
            raise ValueError(f"{path} names two slides of {file}, {first} and {slide}: give one")
    return found


def _prepared(manifest: Mapping[str, Any], path: str) -> Mapping[str, int]:
    """Slide -> how many patches prepare_monuseg.py cut of it."""
    try:
        return {slide: int(count) for split in manifest.get("patches", {}).values() for slide, count in split.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is not readable: run prepare_monuseg.py again, or write {TABLE}") from None


def _of_prepared(stem: str, counts: Mapping[str, int]) -> str:
    """The slide of a patch, by its name as prepare_monuseg.py gave it; "" of a file that it did not write."""
    slide, _, number = stem.rpartition("/")[2].rpartition("_")
    return slide if number.isdecimal() and int(number) < counts.get(slide, 0) else ""


def _guessed(known: Sequence[str], stems: Sequence[str], others: Iterable[str | Path], why: str) -> list[str]:
    """
    Fill in what is not known: the slide of NAME_000 is NAME where several NAMEs are numbered so, from 000 on. Any other
    image is a slide of its own; so are image_000 and image_001, where nothing but numbers tells one image from another.
    """
    names = {stem.rpartition("/")[2] for stem in (*stems, *map(_stem, others))}
    numbered = {without_number(name) for name in names if _NUMBERED.fullmatch(name)}
    cut = len(numbered) > 1 and any(name.endswith("_000") for name in names)
    found = [slide or _by_name(stem, cut) for slide, stem in zip(known, stems)]
    how = "NAME_000 is taken for a patch of slide NAME" if cut else "each is taken for a slide of its own"
    _say(f"{why}: {how}, {len(set(found))} in all; {TABLE} with the columns {' and '.join(FIELDS)} would say")
    return found


def _by_name(stem: str, cut: bool) -> str:
    """Of a path, the NAME of NAME_000 if that is to be cut, else all of it below images/."""
    name = stem.rpartition("/")[2]
    if cut and _NUMBERED.fullmatch(name):
        return without_number(name)
    return stem.rpartition("/images/")[2] if "/images/" in stem else name


@functools.cache
def _say(text: str) -> None:
    """Warn once."""
    logging.getLogger(__name__).warning(text)


def _read(path: str) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: save it so") from None


def _stem(path: str | Path) -> str:
    """A path without suffix, however its letters are composed; masks go by the images whose names they share."""
    stem = nfc(_SUFFIX.sub("", Path(path).as_posix()))
    return re.sub(r"/(?:inst_|bin_)?masks/", "/images/", stem)


def _ends(stem: str) -> Iterator[str]:
    """a/b/c, b/c, c."""
    yield stem
    while "/" in stem:
        stem = stem.partition("/")[2]
        yield stem


# ---- which are held out ----


def ranked(slides: Iterable[str], seed: int) -> list[str]:
    """
    :return: the slides' names in the order in which a seed holds them out. By lot, but by each slide's own: what
        fine-tuning on a part of the slides holds out, training on all did as well, as far as the part has such a slide.
    """
    return sorted(set(slides), key=lambda slide: hashlib.sha256(f"{seed} {slide}".encode()).digest())


def hold_out(slides: Iterable[str], share: float, seed: int) -> set[str]:
    """
    Choose the slides to hold out of training; patches of one slide are too alike to be on both sides. Of equal seeds, a
    smaller share is part of a larger one.

    :param slides: names, in any order and number.
    :param share: of the slides, at least one; of fewer than three, and where the share is 0, none is held out.
    :raises ValueError: where nothing would be left to train on.
    """
    order = ranked(slides, seed)
    if len(order) < 3 or not share:
        return set()
    count = max(1, round(share * len(order)))
    if count == len(order):
        raise ValueError(f"--val_share {share} leaves no training slide of {len(order)}: give less")
    return set(order[:count])


def keep(slides: Iterable[str], share: float, seed: int) -> set[str]:
    """
    :return: the share of the slides, at least one, that is held out last: what a model of fewer slides is to be trained
        on. Of equal seeds, a smaller share is part of a larger one.
    """
    order = ranked(slides, seed)
    count = max(1, int(round(share * len(order), 9) + 0.5))
    return set(order[-count:])
