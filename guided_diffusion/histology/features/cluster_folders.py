"""
Cluster folders: NAME/LABEL/{MoNuSegTrainingData,MoNuSegTestData}/{images,bin_masks,inst_masks} of links or copies.

Owns their layout, and the record of what it wrote, by which it replaces nothing else. Knows nothing of how labels came
about.
"""

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...cell_classes import FOLDER as CLASS_FOLDER
from ...files import LOCK, by_stem, leading, read_json, replace_folder, write_bytes, write_json
from ...image_files import EXTENSIONS
from ...images import check_complete
from ...slides import slides_of
from ..slides.annotations import TEST_SPLIT, TRAIN_SPLIT
from ..slides.patches import IGNORE_MASKS, SUFFIXES

RECORD = "links.json"  # path in the folder -> where its link leads, or a copy's SHA-256
COPY = "sha256:"


@dataclass(frozen=True)
class Patch:
    """
    A patch's files by the folder they lie in, images among them and ignore_masks where it has one, its split and slide.

    :param stem: their path below that folder, without suffix.
    """

    split: str
    stem: str
    slide: str
    files: Mapping[str, Path]

    @property
    def image(self) -> Path:
        """The image's path."""
        return self.files["images"]

    @property
    def file(self) -> str:
        """The image's path below the data folder."""
        return f"{self.split}/images/{self.stem}{self.image.suffix}"

    def places(self) -> Iterator[tuple[str, Path]]:
        """:return: each file's path below the split's folder, as FOLDER/STEM.SUFFIX, and the file."""
        for name, file in self.files.items():
            yield f"{name}/{self.stem}{file.suffix}", file


def list_patches(data: Path) -> list[Patch]:
    """
    List a data folder's patches, those of the training split first, sorted by stem; paths are absolute.

    :raises FileNotFoundError, ValueError: for a missing split, a broken link, an image without its mask, or a folder
        that was not prepared to the end.
    """
    if not (data / TRAIN_SPLIT / "images").is_dir():
        raise FileNotFoundError(f"DATA: {data} has no {TRAIN_SPLIT}/images: give a folder that prepare_monuseg.py made")
    check_complete(data, "DATA")
    data = Path(os.path.abspath(data))
    found = [(split, *patch) for split in (TRAIN_SPLIT, TEST_SPLIT) for patch in _list_split(data / split)]
    if not any(split == TRAIN_SPLIT for split, _, _ in found):
        raise ValueError(f"DATA: {data / TRAIN_SPLIT / 'images'} holds no image")
    slides = slides_of(data, [files["images"] for _, _, files in found])
    return [Patch(split, stem, slide, files) for (split, stem, files), slide in zip(found, slides)]


def _list_split(folder: Path) -> list[tuple[str, dict[str, Path]]]:
    """The stem and the files of each patch."""
    found = {name: _files_in(folder / name) for name in (*SUFFIXES, CLASS_FOLDER) if (folder / name).is_dir()}
    images = found.pop("images", {})
    if images and not found:
        raise FileNotFoundError(f"DATA: {folder} has neither bin_masks nor inst_masks")
    patches, ignored = [], _files_in(folder / IGNORE_MASKS) if (folder / IGNORE_MASKS).is_dir() else {}
    for stem, image in images.items():
        files = {"images": image}
        for name, masks in found.items():
            if stem not in masks:
                raise ValueError(f"{image} has no mask {stem}.* in {folder / name}: add it or remove the image")
            files[name] = masks[stem]
        if stem in ignored:
            files[IGNORE_MASKS] = ignored[stem]
        for file in files.values():
            if not file.exists():
                raise FileNotFoundError(f"{file} is a link that leads nowhere: repair it or remove it")
        patches.append((stem, files))
    return patches


def _files_in(folder: Path) -> dict[str, Path]:
    return {stem: Path(file) for stem, file in by_stem(folder, EXTENSIONS, deep=True).items()}


def largest_cluster(clusters: Path) -> str:
    """
    :param clusters: a folder that write_clusters made.
    :return: the label of the cluster with the most training patches, the first of several by name; noise, -1, is none.
    """
    sizes = {
        folder.parents[1].name: sum(1 for _ in folder.iterdir())
        for folder in sorted(clusters.glob(f"*/{TRAIN_SPLIT}/images"))
        if folder.parents[1].name != "-1"
    }
    if not sizes:
        raise ValueError(f"{clusters} has no cluster but noise: choose other settings")
    return max(sizes, key=sizes.__getitem__)


def plan(
    patches: Sequence[Patch],
    labels: Sequence[str],
    subsets: Mapping[str, Mapping[int, Sequence[int]]],
    copy: bool = False,
) -> dict[str, Path]:
    """
    Say what the folder is to hold. A split without patches gets no folder, so that a program that needs it says so.

    :param labels: one for each patch.
    :param subsets: label -> per cent -> indices into the label's training patches, in order.
    :param copy: the subsets' test split is to be files, too; else it is one link to their cluster's.
    :return: path in the folder -> what is to be found there: a file, or, relative, another path in the folder.
    """
    entries: dict[str, Path] = {}

    def place(base: str, patch: Patch) -> None:
        for name, file in patch.places():
            entries[f"{base}/{patch.split}/{name}"] = file

    of_label: dict[str, dict[str, list[Patch]]] = {}
    for patch, label in zip(patches, labels):
        place(label, patch)
        of_label.setdefault(label, {}).setdefault(patch.split, []).append(patch)
    for label, shares in subsets.items():
        splits = of_label[label]
        for percent, indices in shares.items():
            base = f"{label}/{percent:02d}ss"
            for index in indices:
                place(base, splits[TRAIN_SPLIT][index])
            for patch in splits.get(TEST_SPLIT, []) if copy else ():
                place(base, patch)
            if TEST_SPLIT in splits and not copy:
                entries[f"{base}/{TEST_SPLIT}"] = Path(label) / TEST_SPLIT
    return entries


def check_replaceable(folder: Path, own: Collection[str]) -> None:
    """
    Refuse to replace a folder that holds anything but what write_clusters put there.

    :param own: the names of its own files, beside links and copies.
    :raises ValueError: naming what was not put there, or has changed since.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is there and is no folder: choose another --out_name")
    record = _read_record(folder)
    for name in _files_below(folder):
        if not (record and name in {RECORD, LOCK, *own}) and _mark(folder / name) != record.get(name):
            raise ValueError(
                f"{folder / name} is there but not by this command, or changed: move it or choose another --out_name"
            )


def write_clusters(
    folder: Path,
    entries: Mapping[str, Path],
    files: Mapping[str, bytes],
    copy: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """
    Make a folder as planned, in the place of what check_replaceable has passed.

    :param entries: what `plan` gave.
    :param files: name -> content, beside them.
    :param copy: copy files rather than link them.
    :param progress: called after each entry.
    """

    def fill(aside: Path) -> None:
        marks, real = {}, functools.cache(os.path.realpath)
        for name, target in entries.items():
            place = aside / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                shutil.copyfile(target, place)
            else:
                place.symlink_to(leading(aside / target, place, real))
            marks[name] = _mark(place)
            progress()
        for name, content in files.items():
            write_bytes(aside / name, content)
        write_json(aside / RECORD, {"links": marks})

    replace_folder(folder, fill, "--out_name")


def _mark(place: Path) -> str:
    """What the record says of a link or a file."""
    if place.is_symlink():
        return os.readlink(place)
    with open(place, "rb") as opened:
        return COPY + hashlib.file_digest(opened, "sha256").hexdigest()


def _files_below(folder: Path) -> Iterator[str]:
    """The paths of all files and links below a folder, from it on; links to folders are not followed."""
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        yield from (os.path.relpath(os.path.join(root, name), folder) for name in sorted([*files, *links]))


def _read_record(folder: Path) -> dict[str, str]:
    """Path -> mark of what write_clusters put there; nothing where it did not make the folder."""
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        return dict(read_json(file)["links"])
    except (ValueError, TypeError, KeyError, OSError):
        raise ValueError(f"{file} is not readable; choose another --out_name or delete {folder}") from None
