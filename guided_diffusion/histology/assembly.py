"""
Folders made of other folders' files: the samples that a filter keeps, and training sets of real and synthetic patches.

Owns names, links and manifests of both. Knows nothing of how samples are scored.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from .. import cell_classes, streams
from ..files import csv_text, write_text
from ..image_files import check_image, read_inst_mask
from ..images import REAL
from ..magnification import pass_on
from ..slides import write_table
from .evaluation.runs import MANIFEST, Run, Sample, slides_of_sample
from .features.cluster_folders import Patch
from .slides.annotations import TEST_SPLIT, TRAIN_SPLIT
from .slides.patches import IGNORE_MASKS, SUFFIXES

SET_FIELDS = (
    *("file", "stem", "source", "slide", "structure", "structure_slide", "structure_kind", "appearance"),
    *("s", "checkpoint", "seed", "score", "weight", "classes", "sample"),
)
KEPT_FIELDS = ("run", "sample", "score", "weight")  # beside those of a results folder's manifest
FIRST_NUMBER = 100_000  # of synthetic patches' running numbers; a slide's own are far below


# ---- writing ----


def put(source: Path, target: Path, copy: bool = False) -> None:
    """Place a file: a relative link to what `source` is in the end, or a copy of it."""
    if copy:
        shutil.copyfile(source, target)
    else:
        target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))


# ---- the samples that are kept ----


@dataclass(frozen=True)
class Kept:
    """A sample that is kept: its run, its score and weight."""

    run: Run
    sample: Sample
    score: float
    weight: float


def write_kept(
    folder: Path, kept: Sequence[Kept], folders: Sequence[str], fields: Sequence[str], several: bool = False
) -> None:
    """
    Fill a results folder with links to the files of samples, and a manifest of them.

    :param folder: exists.
    :param folders: the names of a results folder's folders; files of a sample that are missing there are left out.
    :param fields: of a results folder's manifest.
    :param several: name samples RUN__STEM, so that those of several runs differ; else STEM.
    """
    for name in folders:
        (folder / name).mkdir()
    rows = []
    for index, item in enumerate(kept):
        stem = f"{item.run.name}__{item.sample.stem}" if several else item.sample.stem
        for name in folders:
            source = item.run.path / name / f"{item.sample.stem}{'.tif' if name == 'inst_masks' else '.png'}"
            if source.exists():
                put(source, folder / name / f"{stem}{source.suffix}")
        run = {"run": item.run.name, "sample": item.sample.stem, "score": item.score, "weight": item.weight}
        rows.append({**item.sample.row, "index": index, "stem": stem, **run})
    write_text(folder / MANIFEST, csv_text([*fields, *KEPT_FIELDS], rows))


def is_kept(folder: Path) -> bool:
    """Whether a folder is what write_kept fills, by the manifest that comes last."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    with open(manifest, encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n").endswith(",".join(KEPT_FIELDS))


# ---- the training set ----


@dataclass(frozen=True)
class Synthetic:
    """
    A synthetic patch of a set.

    :param stem: its name there, SLIDE_NUMBER with the slide of its appearance.
    :param slide: of its appearance; structure_slide: of its structure, "" where that is not known.
    """

    stem: str
    sample: Sample
    slide: str
    structure_slide: str

    @property
    def class_mask(self) -> Path:
        """Where the classes of its cells are, if it has any."""
        return self.beside(cell_classes.FOLDER)

    def beside(self, folder: str) -> Path:
        """Where its file in another folder of its results folder is, if it has one."""
        return self.sample.sample.parents[1] / folder / f"{self.sample.stem}.png"

    @property
    def file(self) -> str:
        """The image's path below the set's folder."""
        return f"{TRAIN_SPLIT}/images/{self.stem}.png"

    def row(self, folder: Path) -> dict[str, object]:
        """:return: its row of the manifest of the set in `folder`."""
        origin = self.sample.row
        copied = ("structure", "structure_kind", "appearance", "s", "checkpoint", "seed", "score", "weight", "classes")
        return {
            **{name: origin.get(name, "") for name in copied},
            **{name: getattr(self, name) for name in ("file", "stem", "slide", "structure_slide")},
            "source": "synthetic",
            "sample": Path(os.path.relpath(self.sample.sample.resolve(), folder.resolve())).as_posix(),
        }


def triple(sample: Sample) -> tuple[str, str, str]:
    """
    :return: what tells a sample from those that are all but the same: structure, appearance, and which noise it was
        made of, which the folders of a sweep may share. A sample of unknown origin is told by its path.
    """
    row = sample.row
    if not row.get("structure") or not row.get("appearance"):
        return "", "", str(sample.sample)
    return (
        row["structure"],
        row["appearance"],
        row.get("noise") or f"{row.get('seed')} {row.get('sample', sample.stem)}",
    )


def draw(samples: Sequence[Sample], count: int | None, weighted: bool, seed: int) -> list[Sample]:
    """
    Draw samples without replacement, each triple at most once.

    :param count: how many; None, or more than there are: all.
    :param weighted: by the weights in their rows, which a filter left there; else uniformly. None of weight 0 is drawn.
    :return: samples, in their order.
    :raises ValueError: where weights are missing.
    """
    chances, there = None, len(samples)
    if weighted:
        weights = np.array([_weight(sample) for sample in samples])
        there = int((weights > 0).sum())
        chances = weights / (weights.sum() or 1)
    order = streams.rng("set", seed, len(samples)).choice(len(samples), there, replace=False, p=chances)
    first: dict[tuple[str, str, str], int] = {}
    for i in order:
        first.setdefault(triple(samples[i]), i)
    return [samples[i] for i in sorted(list(first.values())[:count])]


def _weight(sample: Sample) -> float:
    try:
        weight = float(sample.row["weight"])
    except (KeyError, ValueError):
        weight = float("nan")
    if not 0 <= weight < float("inf"):
        raise ValueError(f"--weighted True: {sample.sample} has no weight: give the kept/ of scripts/filter_ood.py")
    return weight


def name_synthetic(samples: Sequence[Sample], real: Sequence[Patch]) -> list[Synthetic]:
    """
    Name samples SLIDE_NUMBER: SLIDE is that of the appearance, and NUMBER is above those of real patches.

    :param real: the real patches, whose names do not come again.
    """
    taken, number, named = {patch.stem for patch in real}, FIRST_NUMBER, []
    known = {PurePath(patch.stem).name: patch.slide for patch in real}
    for sample in samples:
        structure, appearance = slides_of_sample(sample, known)
        name = re.sub(r"[^\w.-]+", "_", appearance)
        while f"{name}_{number}" in taken:
            number += 1
        named.append(Synthetic(f"{name}_{number}", sample, appearance, structure))
        number += 1
    return named


def check_sizes(real: Patch, samples: Sequence[Synthetic]) -> None:
    """
    Fields may be larger than real patches: what learns from a set cuts what it needs.

    :raises ValueError: where a sample is smaller, its mask is of another size, or either cannot be read.
    """
    least = check_image(real.image)
    for item in samples:
        image, mask = item.sample.sample, item.sample.inst_mask
        size, of_mask = check_image(image), read_inst_mask(mask).shape[::-1]
        if size[0] < least[0] or size[1] < least[1]:
            raise ValueError(
                f"{image} is {size[0]} x {size[1]} px, real patches {least[0]} x {least[1]}: it must not be smaller"
            )
        if of_mask != size:
            raise ValueError(
                f"{mask} is {of_mask[0]} x {of_mask[1]} px, {image} {size[0]} x {size[1]}: they must be of one size"
            )


def without_classes(training: Sequence[Patch], synthetic: Sequence[Synthetic]) -> int:
    """:return: how many of real training patches and of synthetic ones have no mask of their cells' classes."""
    of_real = sum(cell_classes.FOLDER not in patch.files for patch in training)
    return of_real + sum(not item.class_mask.exists() for item in synthetic)


def write_set(
    folder: Path,
    data: Path,
    real: Sequence[Patch],
    synthetic: Sequence[Synthetic],
    copy: bool,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """
    Fill a data folder: all real training patches, the synthetic ones beside them, the test split, slides.csv, and a
    manifest. Classes of cells come along where all of these patches have them; ValueError where they differ.

    :param folder: exists. :param data: the real data folder, whose test split is linked or copied as it is.
    :param real: its patches, the training ones each with an instance mask; a missing binary one is made of it.
    :param progress: called after each patch.
    """
    train = folder / TRAIN_SPLIT
    for name in SUFFIXES:
        (train / name).mkdir(parents=True)
    rows, training = [], [patch for patch in real if patch.split == TRAIN_SPLIT]
    classes = not without_classes(training, synthetic)
    if classes:
        table = cell_classes.shared([data, *dict.fromkeys(item.class_mask.parents[1] for item in synthetic)])
        cell_classes.write_classes(folder, table)
    for patch in training:
        for name, source in patch.places():
            if name.startswith(f"{cell_classes.FOLDER}/") and not classes:
                continue
            (train / name).parent.mkdir(parents=True, exist_ok=True)
            put(source, train / name, copy)
        if "bin_masks" not in patch.files:
            (train / "bin_masks" / patch.stem).parent.mkdir(parents=True, exist_ok=True)
            _write_binary(patch.files["inst_masks"], train / "bin_masks" / f"{patch.stem}.png")
        name = f"{patch.stem}{patch.image.suffix}"
        own = dict(structure=name, appearance=name, slide=patch.slide, structure_slide=patch.slide)
        own["structure_kind"] = REAL
        rows.append({**own, "file": patch.file, "stem": patch.stem, "source": "real"})
        progress()
    for item in synthetic:
        put(item.sample.sample, train / "images" / f"{item.stem}.png", copy)
        put(item.sample.inst_mask, train / "inst_masks" / f"{item.stem}.tif", copy)
        _write_binary(item.sample.inst_mask, train / "bin_masks" / f"{item.stem}.png")
        if (ignored := item.beside(IGNORE_MASKS)).exists():
            (train / IGNORE_MASKS).mkdir(exist_ok=True)
            put(ignored, train / IGNORE_MASKS / f"{item.stem}.png", copy)
        if classes:
            put(item.class_mask, train / cell_classes.FOLDER / f"{item.stem}.png", copy)
        rows.append(item.row(folder))
        progress()
    if (data / TEST_SPLIT).is_dir() and copy:
        shutil.copytree(data / TEST_SPLIT, folder / TEST_SPLIT)
    elif (data / TEST_SPLIT).is_dir():
        put(data / TEST_SPLIT, folder / TEST_SPLIT)
    pass_on(data, folder)
    write_table(folder, ((patch.file, patch.slide) for patch in (*real, *synthetic)))
    write_text(folder / MANIFEST, csv_text(SET_FIELDS, rows))


def _write_binary(inst_mask: Path, target: Path) -> None:
    Image.fromarray(np.where(read_inst_mask(inst_mask) > 0, 255, 0).astype(np.uint8)).save(target)
