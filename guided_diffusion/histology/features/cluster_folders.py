"""
Cluster folders: NAME/LABEL/{MoNuSegTrainingData,MoNuSegTestData}/{images,bin_masks,inst_masks} of links or copies.

Owns their layout, and the record of what it wrote, by which it never touches anything else. Knows nothing of how labels
came about.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...files import by_stem, write_link, write_text, writing
from ...images import EXTENSIONS, check_complete
from ..slides.annotations import TEST_SPLIT, TRAIN_SPLIT
from ..slides.patches import SUFFIXES

# Paths in the folder and where their links lead, or a copy's SHA-256: "links", what the last run wrote or was to write,
# and "earlier", what was there before it, empty once it is finished.
RECORD = "links.json"
COPY = "sha256:"


@dataclass(frozen=True)
class Patch:
    """
    A patch's files by the folder they lie in, images among them, and its split.

    :param stem: their path below that folder, without suffix.
    """

    split: str
    stem: str
    files: Mapping[str, Path]

    @property
    def image(self) -> Path:
        """The image's path."""
        return self.files["images"]

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
    patches = [patch for split in (TRAIN_SPLIT, TEST_SPLIT) for patch in _list_split(data / split)]
    if not any(patch.split == TRAIN_SPLIT for patch in patches):
        raise ValueError(f"DATA: {data / TRAIN_SPLIT / 'images'} holds no image")
    return patches


def _list_split(folder: Path) -> list[Patch]:
    found = {name: _files_in(folder / name) for name in SUFFIXES if (folder / name).is_dir()}
    images = found.pop("images", {})
    if images and not found:
        raise FileNotFoundError(f"DATA: {folder} has neither bin_masks nor inst_masks")
    patches = []
    for stem, image in images.items():
        files = {"images": image}
        for name, masks in found.items():
            if stem not in masks:
                raise ValueError(f"{image} has no mask {stem}.* in {folder / name}: add it or remove the image")
            files[name] = masks[stem]
        for file in files.values():
            if not file.exists():
                raise FileNotFoundError(f"{file} is a link that leads nowhere: mend it or remove it")
        patches.append(Patch(folder.name, stem, files))
    return patches


def _files_in(folder: Path) -> dict[str, Path]:
    return {stem: Path(file) for stem, file in by_stem(folder, EXTENSIONS, deep=True).items()}


def plan(
    patches: Sequence[Patch],
    labels: Sequence[str],
    subsets: Mapping[str, Mapping[int, Sequence[int]]],
    copy: bool = False,
) -> dict[str, Path]:
    """
    Say what the folder is to hold. A split without patches gets no folder, so that whoever looks for it sees that.

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


class ClusterFolder:
    """
    A folder that holds what a plan says, beside anything that others have put there.

    :param path: it need not be there yet.
    :param entries: what `plan` gave.
    :param copy: copy files rather than link them.
    :raises ValueError: where something that this class did not write stands in the way. Nothing is written yet.
    """

    def __init__(self, path: Path, entries: Mapping[str, Path], copy: bool = False) -> None:
        self.path = Path(path)
        self.copy = copy
        self.entries = dict(entries)
        self.before = self._read_record()
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise ValueError(f"{self.path} is there and is no folder: choose another --out_name")
        own = {name for name, marks in self.before.items() if any(self._is_own(name, mark) for mark in marks)}
        self.stale = own - self.entries.keys()
        for name in self.entries:
            self._check_free(name, own)

    def write(self, progress: Callable[[], object] = lambda: None) -> None:
        """
        Make the folder as planned; what an earlier run has put there and is not planned goes.

        :param progress: called after each entry.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        # What is to come is recorded first, so that a killed run's links are known for what they are.
        marks = {name: self._mark(name) for name in self.entries}
        self._write_record(marks, self.before)
        for name in sorted(self.stale):
            (self.path / name).unlink()
            self._remove_empty((self.path / name).parent)
        for name, mark in marks.items():
            self._make(name, mark)
            progress()
        self._write_record(marks, {})

    def _check_free(self, name: str, own: set[str]) -> None:
        """Refuse to write to a path where something lies that this class did not write, or below such a thing."""
        for above in reversed(PurePosixPath(name).parents[:-1]):
            place = self.path / above
            if str(above) in self.stale or not os.path.lexists(place):
                return
            if place.is_symlink() or not place.is_dir():
                raise ValueError(f"{place} is there and is no folder of this command: choose another --out_name")
        place = self.path / name
        if os.path.lexists(place) and name not in own and not self._goes_away(place):
            raise ValueError(f"{place} is there but not by this command, or changed: choose another --out_name")

    def _mark(self, name: str) -> str:
        target = self.entries[name]
        if self.copy:
            return COPY + _sha256(target)
        if not target.is_absolute():
            target = self.path / target
        # Both ends with links resolved, for a link is followed from where it really lies.
        folder = os.path.realpath((self.path / name).parent)
        return os.path.relpath(os.path.join(os.path.realpath(target.parent), target.name), folder)

    def _make(self, name: str, mark: str) -> None:
        place = self.path / name
        if self._is_own(name, mark):
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        if not self.copy:
            write_link(place, mark)
            return
        with writing(place, durable=False) as file, open(self.entries[name], "rb") as source:
            shutil.copyfileobj(source, file)

    def _is_own(self, name: str, mark: str) -> bool:
        """Whether a path is still what the record says this class put there."""
        place = self.path / name
        if any((self.path / above).is_symlink() for above in PurePosixPath(name).parents[:-1]):
            return False  # whatever is there lies elsewhere
        if mark.startswith(COPY):
            return place.is_file() and not place.is_symlink() and COPY + _sha256(place) == mark
        return place.is_symlink() and os.readlink(place) == mark

    def _goes_away(self, place: Path) -> bool:
        """Whether a folder holds nothing but what is to be removed."""
        if place.is_symlink() or not place.is_dir():
            return False
        held = [inner for inner in place.rglob("*") if inner.is_symlink() or not inner.is_dir()]
        return all(inner.relative_to(self.path).as_posix() in self.stale for inner in held)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self.path and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    def _read_record(self) -> dict[str, set[str]]:
        """Path -> what it may be, as far as this class has put it there."""
        file = self.path / RECORD
        if not file.exists():
            return {}
        known: dict[str, set[str]] = {}
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            for name, mark in [*record["links"].items(), *record["earlier"]]:
                known.setdefault(str(name), set()).add(str(mark))
        except (ValueError, TypeError, KeyError, AttributeError, OSError):
            raise ValueError(f"{file} is not readable; choose another --out_name or delete {self.path}") from None
        for name in known:
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{file}: {name!r} leads out of {self.path}; choose another --out_name")
        return known

    def _write_record(self, marks: Mapping[str, str], earlier: Mapping[str, set[str]]) -> None:
        pairs = [[name, mark] for name, marks in sorted(earlier.items()) for mark in sorted(marks)]
        write_text(self.path / RECORD, json.dumps({"links": dict(marks), "earlier": pairs}, indent=0) + "\n")


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
