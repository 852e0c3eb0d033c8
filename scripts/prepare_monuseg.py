"""
Cut raw slides, MoNuSeg's archives or what import_dataset.py makes of others, into the patches that training reads.

    python scripts/prepare_monuseg.py RAW OUT [--patch_size 128] [--stride 128] [--mode valid|mirror] [--resize N]
        [--mpp 0.5] [--slide_mpp NAME=0.5,...]

RAW is the folder the archives were unpacked in: `Tissue Images` (or `images`) beside `Annotations` (or `inst_masks`
where there is no XML), or .tif and .xml side by side, at most three folders deep and in any mixture. `class_masks`
beside `inst_masks` say which class of RAW's classes.json a nucleus is of. RAW's slides.csv (columns file, slide and,
where known, mpp) says which slide or patient an image is of.
OUT becomes {MoNuSegTrainingData,MoNuSegTestData}/{images,bin_masks,inst_masks}/SLIDE_###.png|tif, with class_masks and
classes.json where RAW has them, and prepare.json says their micrometres a pixel. All input is checked before anything
is written. Running it again writes the same bytes; nothing it did not write is touched.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from guided_diffusion import cell_classes, cli, magnification, progress
from guided_diffusion.cell_classes import CellClass
from guided_diffusion.files import check_place, claimed, read_json, write_text
from guided_diffusion.histology.slides import annotations, aperio, patches, scales
from guided_diffusion.histology.slides.annotations import TEST_SPLIT, TRAIN_SPLIT, Slide
from guided_diffusion.options import SIZE, SOME_WORKERS, check_ranges
from guided_diffusion.processes import each
from guided_diffusion.slides import MANIFEST

Counts = dict[str, dict[str, int]]  # split -> slide -> its number of patches


class Job(NamedTuple):
    """A slide, what to multiply its size by, and the number of its first patch."""

    slide: Slide
    zoom: float
    first: int = 0


class Findings(NamedTuple):
    """What reading a slide has shown: its number of patches, what is odd in it, its nuclei, and those that are lost."""

    patches: int
    remark: str
    nuclei: int
    lost: int


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check_ranges(vars(args), num_workers=SOME_WORKERS, resize=SIZE)
    if args.mpp is not None:
        magnification.check(args.mpp, "--mpp is")
    patches.mirror_margins(args.patch_size, args.stride, args.mode)
    slides = annotations.find_slides(args.raw)
    classes = classes_of(args.raw, slides)
    check_out(args.raw, args.out, slides)
    known = scales.read_scales(slides, args.slide_mpp)
    mpp_of = scales.nominal_scales(known)
    cut = {name: getattr(args, name) for name in ("patch_size", "stride", "mode")}
    settings = {**cut, "resize": args.resize, "mpp": args.mpp, "slide_mpp": args.slide_mpp or None}
    check_manifest(args.out, settings, classes)
    for line in scales.in_words(known, args.mpp):
        print(line)

    zooms = scales.zooms(mpp_of, args.mpp)
    jobs = [Job(slide, zooms[slide.stem]) for slide in slides]
    checks = each(partial(look_at, classes=classes, **cut), jobs, args.num_workers)
    findings = list(progress.bar(checks, "checking", len(slides), leave=False))
    jobs, counts = numbered(jobs, findings)
    for line in in_words(findings):
        print(f"WARNING: {line}", file=sys.stderr)
    zoom = args.patch_size / (args.resize or args.patch_size)
    facts = {"settings": settings, "mpp": (args.mpp or scales.common(mpp_of)) * zoom, "slides_mpp": known}
    write = partial(write_patches, out=args.out, resize=args.resize, classes=classes, **cut)
    with claimed(args.out, "OUT"):
        check_manifest(args.out, settings, classes)  # once more: another run may have been there meanwhile
        check_recorded_slides(args.out, counts, bool(classes))
        make_folders(args.out, counts, bool(classes))
        # It goes first, so that what an interrupted run leaves is not taken for a finished set of other settings.
        write_manifest(args.out, facts, counts, complete=False)
        if classes:
            cell_classes.write_classes(args.out, classes)
        for _ in progress.bar(each(write, jobs, args.num_workers), "slides", len(slides)):
            pass
        write_manifest(args.out, facts, counts, complete=True)
    summary = "; ".join(f"{split}: {len(c)} slides, {sum(c.values())} patches" for split, c in counts.items())
    print(f"{args.out}: {summary}")


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("raw", metavar="RAW", type=Path, help="folder of the unpacked archives")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="folder for the patches; the reference would name it patches_valid_inst_128x128_128x128 "
        "(patches_MODE_inst_SIZExSIZE_STRIDExSTRIDE)",
    )
    parser.add_argument("--patch_size", type=int, default=128, help="side of a patch in px")
    parser.add_argument("--stride", type=int, default=128, help="distance between patches in px")
    parser.add_argument("--mode", default="valid", help="valid, or mirror: pads by reflection first")
    parser.add_argument(
        "--resize", type=int, metavar="N", help="resize patches to N px (images bicubic, masks nearest)"
    )
    parser.add_argument(
        "--mpp", type=float, metavar="X", help="bring all slides to X micrometres a pixel first, e.g. 0.5 (20x)"
    )
    parser.add_argument(
        "--slide_mpp",
        default="",
        metavar="NAME=X,...",
        help="micrometres a pixel of slides whose XML does not say them; NAME may be a pattern: TCGA-HE-*=0.5",
    )
    parser.add_argument("--num_workers", "--workers", type=int, default=2, help="processes")
    return parser


def classes_of(raw: Path, slides: list[Slide]) -> list[CellClass]:
    """The classes that class masks name; none where there are no such masks, which is so of all slides or of none."""
    if slides[0].class_mask is None:
        return []
    classes = cell_classes.read_classes(raw)
    if not classes:
        raise ValueError(
            f"RAW: {slides[0].class_mask} has classes, but {raw} lacks the {cell_classes.TABLE} that names them: write "
            'it, a list of {"id": 1, "name": "lymphocyte", "colour": [0, 114, 178]}'
        )
    return classes


def zoomed(job: Job, image: np.ndarray, inst_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A slide's image and instance map, at the job's times their size."""
    height, width = (max(1, round(side * job.zoom)) for side in inst_map.shape)
    return (image, inst_map) if inst_map.shape == (height, width) else patches.resized(image, inst_map, width, height)


def look_at(job: Job, patch_size: int, stride: int, mode: str, classes: list[CellClass]) -> Findings:
    """Read a slide for no other purpose than to meet all its errors, and to count."""
    image, inst_map = annotations.read_slide(job.slide)
    annotations.read_classes_of(job.slide, inst_map, classes)
    _, smaller = zoomed(job, image, inst_map)
    before, after = (np.count_nonzero(np.unique(ids)) for ids in (inst_map, smaller))
    try:
        count = patches.patch_count(*smaller.shape, patch_size, stride, mode)
    except ValueError as error:
        raise ValueError(f"{job.slide.image}: {error}") from error
    return Findings(count, remark_on(job.slide), before, before - after)


def numbered(jobs: list[Job], findings: list[Findings]) -> tuple[list[Job], Counts]:
    """The jobs with the numbers of their first patches, which run on over all images of a slide, and their counts."""
    counts: Counts = {TRAIN_SPLIT: {}, TEST_SPLIT: {}}
    placed = []
    for job, found in zip(jobs, findings):
        split = counts[job.slide.split]
        placed.append(job._replace(first=split.get(job.slide.name, 0)))
        split[job.slide.name] = placed[-1].first + found.patches
    return placed, counts


def in_words(findings: list[Findings]) -> list[str]:
    """What a user should know of before patches are cut."""
    lines = [found.remark for found in findings if found.remark]
    lost = sum(found.lost for found in findings)
    if lost:
        nuclei = sum(found.nuclei for found in findings)
        lines.append(f"--mpp loses {lost} of {nuclei} nuclei, which are too small at that size")
    return lines


def remark_on(slide: Slide) -> str:
    """What is odd in a slide's outlines, but no mistake for certain; "" where nothing is."""
    if not slide.outlined:
        return ""
    polygons = aperio.read_polygons(slide.annotation)
    frame = aperio.frame_among(polygons)
    if frame is None:
        return ""
    return (
        f"{slide.annotation}: region {frame[0]} of {len(polygons)} lies around {frame[1]} of the others, and counts "
        "as a nucleus: remove it if it is a frame"
    )


def write_patches(
    job: Job, out: Path, patch_size: int, stride: int, mode: str, resize: int | None, classes: list[CellClass]
) -> None:
    """Write all patches of a slide."""
    slide = job.slide
    image, inst_map = annotations.read_slide(slide)
    # Classes are painted by instances, after all that is done to these.
    of_nucleus = annotations.read_classes_of(slide, inst_map, classes)
    pieces = patches.extract_patches(*zoomed(job, image, inst_map), patch_size, stride, mode)
    for index, (piece, instances) in zip(itertools.count(job.first), pieces):
        if resize:
            piece, instances = patches.resized(piece, instances, resize, resize)
        class_map = cell_classes.painted(instances, of_nucleus) if classes else None
        if mode == "mirror":
            instances = patches.parted(instances)
        files = patches.patch_files(out / slide.split, slide.name, index, bool(classes))
        patches.save_patch(files, piece, instances, class_map)


def check_out(raw: Path, out: Path, slides: Iterable[Slide]) -> None:
    """Refuse an OUT that is a file, or where patches would lie among the raw data."""
    check_place(out, "OUT")
    if out.resolve() == raw.resolve():
        raise ValueError(f"OUT: {out} is RAW itself; choose another folder")
    splits = [(out / split).resolve() for split in (TRAIN_SPLIT, TEST_SPLIT)]
    targets = [out.resolve(), *(split / name for split in splits for name in folders(True))]
    paths = (path for slide in slides for path in (slide.image, slide.annotation, slide.class_mask) if path)
    read_from = {path.parent.resolve() for path in paths}
    within = any(not read_from.isdisjoint((target, *target.parents)) for target in targets)
    if within or any(slide.folder.resolve() in splits for slide in slides):
        raise ValueError(f"OUT: patches in {out} would lie among the raw data; choose another folder")


def read_manifest(out: Path) -> dict | None:
    path = out / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = read_json(path)
        return {"settings": dict(manifest["settings"]), "patches": {k: dict(v) for k, v in manifest["patches"].items()}}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not readable; choose another OUT or delete this one") from error


def check_manifest(out: Path, settings: dict, classes: list[CellClass]) -> None:
    """Refuse to mix patches of two settings in one folder."""
    manifest = read_manifest(out)
    if manifest is None:
        return
    if (cell_classes.read_classes(out) if (out / cell_classes.TABLE).exists() else []) != classes:
        raise ValueError(f"{out} was prepared with other classes of cells; choose another OUT or delete it")
    for name, value in settings.items():
        before = manifest["settings"].get(name)
        if before != value:
            raise ValueError(
                f"--{name} is {value}, but {out} was prepared with {before}; choose another OUT or delete it"
            )


def check_recorded_slides(out: Path, counts: Counts, classes: bool) -> None:
    """Refuse to leave behind patches of an earlier run, or to overwrite what it did not write."""
    manifest = read_manifest(out) or {"patches": {}}
    for split, stems in counts.items():
        for stem in stems.keys() - manifest["patches"].get(split, {}).keys():
            for index in range(stems[stem]):
                for path in patches.patch_files(out / split, stem, index, classes).values():
                    if os.path.lexists(path):
                        raise ValueError(f"{path} is there but not by this command; choose another OUT or delete it")
    for split, stems in manifest["patches"].items():
        for stem, before in stems.items():
            now = counts.get(split, {}).get(stem, 0)
            if now != before:
                raise ValueError(
                    f"{out} holds {before} patches of slide {stem} in {split}, this run would make {now}; "
                    f"choose another OUT or delete it"
                )


def folders(classes: bool) -> list[str]:
    """The folders of a split."""
    return [*patches.SUFFIXES, *([cell_classes.FOLDER] if classes else [])]


def make_folders(out: Path, counts: Counts, classes: bool) -> None:
    for split, stems in counts.items():
        for name in folders(classes) if stems else ():
            (out / split / name).mkdir(parents=True, exist_ok=True)


def write_manifest(out: Path, facts: dict, counts: Counts, complete: bool) -> None:
    content = {**facts, "complete": complete, "patches": counts}
    write_text(out / MANIFEST, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
