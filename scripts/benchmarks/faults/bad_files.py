"""Every kind of file that a program reads, cut off, empty, of another kind, or made to do harm."""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import hostile
from .toy import STAGES
from .trials import Bench, Trial, differing, limit_memory, snapshot, stamps

MEMORY = 2048  # MiB that no file may make a program hold


@dataclass(frozen=True)
class Kind:
    """
    A kind of file. :param stage: reads it. :param pattern: where it lies among the inputs.
    :param hostile: content that does harm, by name.
    :param optional: it may be missing, or lack what it would say, so that the stage may end well.
    """

    stage: str
    pattern: str
    hostile: tuple[str, ...] = ()
    optional: bool = False


PICTURES = ("png bomb", "tiff bomb", "zip bomb", "pickle", "entities")
EVERY = ("pipe", "device")  # what any file may be in the place of
TABLES = ("pickle", "odd rows", "deep json")
ARCHIVES = ("pickle", "torch pickle", "zip bomb", "npy bomb", "npz pickle")
KINDS = {
    "slide": Kind("prepare", "raw/*/Tissue Images/*.tif", PICTURES),
    "annotation": Kind("prepare", "raw/*/Annotations/*.xml", ("entities", "external entity", "pickle", "huge polygon")),
    "prepare.json": Kind("training", "data/prepare.json", ("pickle", "deep json", "huge json")),
    "image": Kind("training", "data/MoNuSegTrainingData/images/*", PICTURES),
    "instance mask": Kind("training", "data/MoNuSegTrainingData/inst_masks/*", PICTURES),
    "image without mask": Kind("training", "unlabelled/*", PICTURES),
    "features": Kind("clusters", "features.npz", ARCHIVES),
    "checkpoint": Kind("sampling", "model/ema_0.9_000004.pt", ARCHIVES),
    "config.json": Kind("sampling", "model/config.json", ("pickle", "deep json", "huge json")),
    "segmenter": Kind("segment", "segmenter/segmenter.pt", ARCHIVES),
    "image to segment": Kind("segment", "data/MoNuSegTestData/images/*", PICTURES),
    "sample": Kind("evaluate", "samples/samples/*", PICTURES),
    "mask of a sample": Kind("evaluate", "samples/inst_masks/*", PICTURES),
    "manifest": Kind("assembly", "samples/manifest.csv", TABLES, optional=True),
    "foreign annotations": Kind("import", "foreign/annotations/*", ("pickle", "deep json", "huge json")),
    "foreign image": Kind("import", "foreign/train/*", PICTURES),
    "mask to export": Kind("export", "data/MoNuSegTrainingData/inst_masks/*", PICTURES),
    "mask to take nuclei from": Kind("structures", "data/MoNuSegTrainingData/inst_masks/*", PICTURES),
    "true mask": Kind("masks", "data/MoNuSegTestData/inst_masks/*", PICTURES),
    "result.json": Kind("summary", "model/result.json", ("pickle", "deep json", "huge json")),
}


def halve(path: Path, folder: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, folder: Path) -> None:
    os.truncate(path, 0)


def swap(path: Path, folder: Path) -> None:
    """Have the path hold a file of another kind: a picture where it is none, else text."""
    if path.suffix in (".png", ".tif"):
        path.write_text("file,slide\nthis,is a table\n")
    else:
        shutil.copy(folder / "toy/data/MoNuSegTestData/images/TCGA-TOY-B000-01Z-00-DX1_000.png", path)


def folder_in_place(path: Path, folder: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILT = {"cut off": halve, "empty": empty, "of another kind": swap, "a folder": folder_in_place}


def spoilt(bench: Bench) -> Iterator[Trial]:
    """:return: trials of files that nobody meant any harm with."""
    for name, kind in KINDS.items():
        for how, spoil in SPOILT.items():
            yield f"{name}, {how}", functools.partial(judge, bench, kind, spoil)


def hostile_files(bench: Bench) -> Iterator[Trial]:
    """:return: trials of files, names and links that were made to do harm."""
    for name, kind in KINDS.items():
        for how in (*kind.hostile, *EVERY):
            harmless = dataclasses.replace(kind, optional=kind.optional or how in hostile.ODD_NUMBERS)
            yield f"{name}: {how}", functools.partial(judge, bench, harmless, hostile.CONTENTS[how])
    for how, (stage, make) in hostile.PLACES.items():
        yield how, functools.partial(judge, bench, Kind(stage, "", optional=True), make)


def judge(bench: Bench, kind: Kind, spoil: Callable[[Path, Path], None], folder: Path) -> list[str]:
    """
    Spoil all files of a kind in a copy of the inputs, and run the stage.

    :param spoil: is given a file and the trial's folder; without a pattern, the inputs and that folder.
    :return: complaints, unless it is refused, without a trace.
    """
    stage = STAGES[kind.stage]
    bench.provide(stage)
    shutil.copytree(bench.toy, folder / "toy", symlinks=True)
    own = Bench(folder / "toy")
    for path in sorted(own.toy.glob(kind.pattern)) if kind.pattern else [own.toy]:
        spoil(path, folder)
    out = stage.prepare(own.toy, folder)
    before, outside = snapshot(out), stamps(folder)
    done = own.run(stage, folder, harm=limit_memory)
    complaints = [f"it took {done.memory:.0f} MiB"] if done.memory > MEMORY else []
    if (folder / hostile.MARKER).exists():
        complaints.append("code in a file was run")
    outside = {path: stamp for path, stamp in outside.items() if not Path(path).is_relative_to(out)}
    now = {path: stamp for path, stamp in stamps(folder).items() if not Path(path).is_relative_to(out)}
    known = {*outside, str(folder / "said.err"), str(folder / "said.out")}
    if strangers := sorted(now.keys() - known):
        complaints.append(f"outside the output: {strangers[0]}")
    if kind.optional and not done.well():
        return complaints
    return [*complaints, *done.refused(), *differing(snapshot(out), before, "outputs")]
