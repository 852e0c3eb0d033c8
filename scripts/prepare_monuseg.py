"""
Cut the raw MoNuSeg archives into the patches that training reads.

    python scripts/prepare_monuseg.py RAW OUT [--patch_size 128] [--stride 128] [--mode valid|mirror] [--resize N]
        [--mpp 0.5] [--slide_mpp NAME=0.5,...]

RAW is the folder the archives were unpacked in: `Tissue Images` (or `images`) beside `Annotations` (or `inst_masks`
where there is no XML), or .tif and .xml side by side, at most three folders deep and in any mixture.
OUT becomes {MoNuSegTrainingData,MoNuSegTestData}/{images,bin_masks,inst_masks}/STEM_###.png|tif, and prepare.json says
their micrometres a pixel. All input is checked before anything is written. Running it again writes the same bytes;
nothing it did not write is touched.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from guided_diffusion import cli, magnification
from guided_diffusion.files import write_text
from guided_diffusion.histology.slides import annotations, patches, scales
from guided_diffusion.histology.slides.annotations import TEST_SPLIT, TRAIN_SPLIT, Slide
from guided_diffusion.processes import each
from guided_diffusion.slides import MANIFEST

Counts = dict[str, dict[str, int]]


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if args.num_workers < 1:
        raise ValueError(f"--num_workers is {args.num_workers}; give at least 1")
    if args.resize is not None and args.resize < 1:
        raise ValueError(f"--resize is {args.resize}; give a side of at least 1 px, or leave it out")
    if args.mpp is not None:
        magnification.check(args.mpp, "--mpp is")
    patches.mirror_margins(args.patch_size, args.stride, args.mode)
    slides = annotations.find_slides(args.raw)
    check_out(args.raw, args.out, slides)
    known = scales.read_scales(slides, args.slide_mpp)
    mpp_of = scales.nominal_scales(known)
    cut = {name: getattr(args, name) for name in ("patch_size", "stride", "mode")}
    settings = {**cut, "resize": args.resize, "mpp": args.mpp, "slide_mpp": args.slide_mpp or None}
    check_manifest(args.out, settings)
    for line in scales.in_words(known, args.mpp):
        print(line)

    zooms = scales.zooms(mpp_of, args.mpp)
    check = partial(count_patches, zooms=zooms, **cut)
    counts: Counts = {TRAIN_SPLIT: {}, TEST_SPLIT: {}}
    checks = each(check, slides, args.num_workers)
    remarks = []
    for slide, (count, remark) in zip(slides, tqdm(checks, "checking", len(slides), leave=False, disable=None)):
        counts[slide.split][slide.stem] = count
        remarks += [remark] if remark else []
    check_recorded_slides(args.out, counts)

    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)
    make_folders(args.out, counts)
    # The manifest goes first, so that what an interrupted run leaves is not taken for a finished set of other settings.
    zoom = args.patch_size / (args.resize or args.patch_size)
    facts = {"settings": settings, "mpp": (args.mpp or scales.common(mpp_of)) * zoom, "slides_mpp": known}
    write_manifest(args.out, facts, counts, complete=False)
    write = partial(write_patches, out=args.out, zooms=zooms, resize=args.resize, **cut)
    for _ in tqdm(each(write, slides, args.num_workers), "slides", len(slides), mininterval=1):
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


def read_at(slide: Slide, zoom: float) -> tuple[np.ndarray, np.ndarray]:
    """A slide's image and instance map, at `zoom` times its size."""
    image, inst_map = annotations.read_slide(slide)
    height, width = (max(1, round(side * zoom)) for side in inst_map.shape)
    return (image, inst_map) if inst_map.shape == (height, width) else patches.resized(image, inst_map, width, height)


def count_patches(slide: Slide, patch_size: int, stride: int, mode: str, zooms: dict[str, float]) -> tuple[int, str]:
    """Read a slide for no other purpose than to meet all its errors; its number of patches, and what is odd in it."""
    image, _ = read_at(slide, zooms[slide.stem])
    try:
        return patches.patch_count(*image.shape[:2], patch_size, stride, mode), remark_on(slide)
    except ValueError as error:
        raise ValueError(f"{slide.image}: {error}") from error


def remark_on(slide: Slide) -> str:
    """What is odd in a slide's outlines, but no mistake for certain; "" where nothing is."""
    if slide.annotation.suffix.lower() not in annotations.XML_SUFFIXES:
        return ""
    polygons = annotations.read_polygons(slide.annotation)
    frame = annotations.frame_among(polygons)
    if frame is None:
        return ""
    return (
        f"{slide.annotation}: region {frame[0]} of {len(polygons)} lies around {frame[1]} of the others, and counts "
        "as a nucleus: remove it if it is a frame"
    )


def write_patches(
    slide: Slide, out: Path, patch_size: int, stride: int, mode: str, zooms: dict[str, float], resize: int | None
) -> int:
    """Write all patches of a slide; their number."""
    index = -1
    pieces = patches.extract_patches(*read_at(slide, zooms[slide.stem]), patch_size, stride, mode)
    for index, (image, inst_map) in enumerate(pieces):
        if resize:
            image, inst_map = patches.resized(image, inst_map, resize, resize)
        if mode == "mirror":
            inst_map = patches.parted(inst_map)
        patches.save_patch(patches.patch_files(out / slide.split, slide.stem, index), image, inst_map)
    return index + 1


def check_out(raw: Path, out: Path, slides: Iterable[Slide]) -> None:
    """Refuse an OUT that is a file, or where patches would lie among the raw data."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT: {out} is a file; give a folder")
    if out.resolve() == raw.resolve():
        raise ValueError(f"OUT: {out} is RAW itself; choose another folder")
    splits = [(out / split).resolve() for split in (TRAIN_SPLIT, TEST_SPLIT)]
    targets = [out.resolve(), *(split / name for split in splits for name in patches.SUFFIXES)]
    read_from = {path.parent.resolve() for slide in slides for path in (slide.image, slide.annotation)}
    within = any(not read_from.isdisjoint((target, *target.parents)) for target in targets)
    if within or any(slide.folder.resolve() in splits for slide in slides):
        raise ValueError(f"OUT: patches in {out} would lie among the raw data; choose another folder")


def read_manifest(out: Path) -> dict | None:
    path = out / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(manifest["settings"]), "patches": {k: dict(v) for k, v in manifest["patches"].items()}}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not readable; choose another OUT or delete this one") from error


def check_manifest(out: Path, settings: dict) -> None:
    """Refuse to mix patches of two settings in one folder."""
    manifest = read_manifest(out)
    if manifest is None:
        return
    for name, value in settings.items():
        before = manifest["settings"].get(name)
        if before != value:
            raise ValueError(
                f"--{name} is {value}, but {out} was prepared with {before}; choose another OUT or delete it"
            )


def check_recorded_slides(out: Path, counts: Counts) -> None:
    """Refuse to leave behind patches of an earlier run, or to overwrite what it did not write."""
    manifest = read_manifest(out) or {"patches": {}}
    for split, stems in counts.items():
        for stem in stems.keys() - manifest["patches"].get(split, {}).keys():
            for index in range(stems[stem]):
                for path in patches.patch_files(out / split, stem, index).values():
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


def make_folders(out: Path, counts: Counts) -> None:
    for split, stems in counts.items():
        for name in patches.SUFFIXES if stems else ():
            (out / split / name).mkdir(parents=True, exist_ok=True)


def write_manifest(out: Path, facts: dict, counts: Counts, complete: bool) -> None:
    content = {**facts, "complete": complete, "patches": counts}
    write_text(out / MANIFEST, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
