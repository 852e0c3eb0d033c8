"""
Feature files: which images a folder holds, their vectors, and the .npz that keeps both.

Owns FEATURES.npz and how its rows are matched with images. Knows of a backbone only that it embeds.

| array | of | |
|---|---|---|
| features | [N x D] float32 | finite |
| paths | [N] str | POSIX, relative to the data root, each once |
| stems | [N] str | file names without suffix |
| backbone, weight_hash | str | see backbones.Backbone |
"""

import hashlib
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from ...files import list_files, nfc, writing
from ...image_files import EXTENSIONS, check_image, read_image
from ...images import check_complete
from ..slides.annotations import TEST_SPLIT, TRAIN_SPLIT

if TYPE_CHECKING:  # which needs torch: features that are there are read without
    from .backbones import Backbone

SPLITS = (TRAIN_SPLIT, TEST_SPLIT)
CHUNK = 256  # images whose vectors are kept together until all are there
ARRAYS = ("features", "paths", "stems", "backbone", "weight_hash")


@dataclass(frozen=True)
class Features:
    """
    Vectors of images.

    :param features: an [N x D] float32 array.
    :param paths: N paths, POSIX, relative to the data root; stems: their names without suffix.
    :param backbone: its name; weight_hash: that of its weights.
    """

    features: np.ndarray
    paths: list[str]
    stems: list[str]
    backbone: str
    weight_hash: str

    @cached_property
    def _row_of_path(self) -> dict[str, int]:
        return {nfc(path): row for row, path in enumerate(self.paths)}

    @cached_property
    def _rows_of_stem(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for row, stem in enumerate(self.stems):
            rows.setdefault(nfc(stem), []).append(row)
        return rows

    def of(self, images: Sequence[str | Path]) -> np.ndarray:
        """
        Look images up by the end of their path, of the path that links lead to, or, where that is unique, by stem.

        :param images: paths, absolute or not.
        :return: an [len(images) x D] float32 array, a row for each.
        :raises ValueError: naming the first image that has none.
        """
        return self.features[[self._row(str(image)) for image in images]]

    def _row(self, image: str) -> int:
        for path in (os.path.abspath(image), os.path.realpath(image)):
            parts = PurePosixPath(nfc(path)).parts[1:]
            for first in range(len(parts)):
                row = self._row_of_path.get("/".join(parts[first:]))
                if row is not None:
                    return row
        rows = self._rows_of_stem.get(nfc(PurePosixPath(image).stem), [])
        if len(rows) == 1:
            return rows[0]
        what = f"{len(rows)} rows" if rows else "no row"
        raise ValueError(f"--features has {what} for {image}: extract features of this very data")


# ---- which images ----


def find_images(folders: Sequence[Path]) -> list[Path]:
    """
    List the images of folders, each of them one of: images; a data folder, with splits; a split, whose images/ may have
    sub-folders; the results of sampling (its samples/), or a sweep of them.

    :return: absolute paths, links not followed, sorted, each once.
    :raises FileNotFoundError: where a folder is missing; ValueError: where it holds no image, or was not prepared to
        the end.
    """
    found: set[str] = set()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"DIR: {folder} is not a folder; give one that holds images")
        check_complete(folder, "DIR:")
        images = _images_of(folder)
        if not images:
            raise ValueError(f"DIR: {folder} holds no image ({', '.join(EXTENSIONS)}), nor {TRAIN_SPLIT}/images")
        found.update(os.path.abspath(path) for path in images)
    return [Path(path) for path in sorted(found)]


def _images_of(folder: Path) -> list[str]:
    if _is_results(folder):
        return list_files(folder / "samples", EXTENSIONS)
    for inside in ([folder / split / "images" for split in SPLITS], [folder / "images"]):
        found = [path for images in inside if images.is_dir() for path in list_files(images, EXTENSIONS, deep=True)]
        if found:
            return found
    runs = [inner / "samples" for inner in sorted(folder.glob("[!.]*")) if _is_results(inner)]
    return [path for place in runs or [folder] for path in list_files(place, EXTENSIONS)]


def _is_results(folder: Path) -> bool:
    """As evaluation.runs has it, for the reference's have no manifest."""
    return (folder / "samples").is_dir() and (folder / "inst_masks").is_dir()


def data_root(files: Sequence[Path], root: Path | None = None) -> Path:
    """
    :param files: absolute paths.
    :param root: chosen by the user.
    :return: the folder that paths are relative to: the nearest above all files that holds a split, else the nearest.
    :raises ValueError: where a file lies outside the chosen one.
    """
    if root is not None:
        root = Path(os.path.abspath(root))
        for file in files:
            if not file.is_relative_to(root):
                raise ValueError(f"--root {root} does not hold {file}: give a folder above all images")
        return root
    common = Path(os.path.commonpath([file.parent for file in files]))
    return next((above for above in (common, *common.parents) if any((above / s).is_dir() for s in SPLITS)), common)


# ---- extraction ----


def digest(file: Path) -> str:
    """
    Check that an image can be read, as far as its checksums tell.

    :return: a SHA-256 of the file.
    :raises FileNotFoundError, ValueError: in one line, naming the file.
    """
    check_image(file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def extract(
    files: Sequence[Path],
    digests: Sequence[str],
    backbone: "Backbone",
    parts: Path,
    *,
    key: str = "",
    batch_size: int = 32,
    num_workers: int = 2,
    progress: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """
    Embed images, chunk by chunk; finished chunks are saved, so that after a kill the same call resumes.

    :param digests: from `digest`, one a file.
    :param parts: a folder for finished chunks, made with the first. A chunk is named after the contents of its files,
        the backbone, its weights and `key`, so that those of another run are never taken for this one's.
    :param key: what else decides a vector, such as its precision.
    :param num_workers: threads that read; 0 reads in this one.
    :param progress: called with the number of images finished in each step.
    :return: an [N x D] float32 array.
    :raises ValueError: naming the first image whose vector is not finite.
    """
    vectors = []
    for start in range(0, len(files), CHUNK):
        chunk = files[start : start + CHUNK]
        about = "\n".join([backbone.name, backbone.weight_hash, key, *digests[start : start + CHUNK]])
        part = parts / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.npy"
        rows = _load_part(part, len(chunk))
        if rows is None:
            batches = _embed(chunk, backbone, batch_size, num_workers)
            done = []
            for batch in batches:
                done.append(batch)
                progress(len(batch))
            rows = np.concatenate(done)
            _check_finite(rows, chunk)
            parts.mkdir(parents=True, exist_ok=True)
            with writing(part) as file:
                np.save(file, rows)
        else:
            progress(len(chunk))
        vectors.append(rows)
    return np.concatenate(vectors)


def _embed(files: Sequence[Path], backbone: "Backbone", batch_size: int, num_workers: int) -> Iterator[np.ndarray]:
    """Vectors of images, in order, by batches of one size."""
    for start_of_size in _batches(_read_ahead(files, num_workers, 2 * batch_size), batch_size):
        yield np.asarray(backbone.embed(np.stack(start_of_size)), np.float32)


def _batches(images: Iterator[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
    for _, same in groupby(images, key=lambda image: image.shape):
        batch = []
        for image in same:
            batch.append(image)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def _read_ahead(files: Sequence[Path], workers: int, ahead: int) -> Iterator[np.ndarray]:
    if not workers:
        yield from map(read_image, files)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(read_image, file) for file in files[:ahead])
        for i in range(len(files)):
            image = waiting.popleft().result()
            if i + ahead < len(files):
                waiting.append(pool.submit(read_image, files[i + ahead]))
            yield image


def _load_part(part: Path, count: int) -> np.ndarray | None:
    try:
        rows = np.load(part, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.ndim == 2 and len(rows) == count and rows.dtype == np.float32 else None


def _check_finite(rows: np.ndarray, names: Sequence[object]) -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ValueError(f"the features of {names[bad[0]]} are not finite: use --precision fp32, or another --backbone")


# ---- the file ----


def save_features(path: Path, features: Features) -> None:
    """Write a feature file, whole or not at all."""
    arrays = {name: np.array(getattr(features, name)) for name in ARRAYS}
    with writing(path) as file:
        np.savez(file, **arrays)


def load_features(path: Path) -> Features:
    """
    Read a feature file. Nothing in it is unpickled.

    :raises FileNotFoundError, ValueError: in one line, naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--features {path} is not a file: make it with scripts/extract_features.py")
    try:
        _check_unpacked(path)
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in ARRAYS}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, TypeError, MemoryError, zipfile.BadZipFile):
        raise ValueError(f"--features {path} is no whole feature file: extract it again") from None
    rows, paths, stems = arrays["features"], arrays["paths"], arrays["stems"]
    if rows.ndim != 2 or rows.dtype != np.float32 or not rows.size:
        raise ValueError(f"--features {path} holds {list(rows.shape)} {rows.dtype}, not float32 [N x D]: make it again")
    if any(array.dtype.kind != "U" for name, array in arrays.items() if name != "features"):
        raise ValueError(f"--features {path} has names that are not text: make it again with extract_features.py")
    if paths.shape != (len(rows),) or stems.shape != (len(rows),) or len(set(paths.tolist())) != len(rows):
        raise ValueError(f"--features {path} lacks a path or stem for some of its {len(rows)} rows: make it again")
    for name in paths.tolist():
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"--features {path}: {name!r} leads out of the data's folder; make the file again")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ValueError(f"--features {path}: the features of {paths[bad[0]]} are not finite; make the file again")
    return Features(rows, paths.tolist(), stems.tolist(), str(arrays["backbone"]), str(arrays["weight_hash"]))


def _check_unpacked(path: Path) -> None:
    """:raises ValueError: where an archive unpacks to far more than it takes, which features do not."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > 50 * path.stat().st_size:
        raise ValueError


def same_slide_share(features: np.ndarray, slides: Sequence[str]) -> float:
    """
    How well features separate slides: the share of images whose nearest other image, by Euclidean
    distance, is of the same slide. Chance is about 1 / slides.

    :param features: an [N x D] array, N at least 2.
    :param slides: N names.
    :return: in [0, 1].
    """
    from sklearn.neighbors import NearestNeighbors  # takes as long as torch, and sampling only reads features

    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(np.asarray(features, np.float64))
    nearest = search.kneighbors(return_distance=False)[:, 0]
    names = np.asarray(slides)
    return float((names[nearest] == names).mean())
