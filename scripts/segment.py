"""
Find the nuclei of images, and measure how well, where the truth is known.

    python scripts/segment.py MODEL IMAGES --results_path DIR [--truth MASKS] [--flips True] [--centre 400]

MODEL is a segmenter.pt of scripts/train_segmenter.py, or its folder; IMAGES a folder of images of any size. Writes
DIR/inst_masks/STEM.tif (uint16, 0 = background) and DIR/overlays/STEM.png: nuclei outlined in yellow, the true ones in
blue. With --truth, a folder of instance masks of the same stems, also DIR/metrics.json: all metrics per image, per
slide, whose images are pooled, of all images pooled, and the average of the slides, with 95 % intervals by bootstrap
over them. Slides that the model was trained on, or held out to choose its weights by, are refused then.

A model that was trained on classes of nuclei writes DIR/class_masks/STEM.png and DIR/classes.json, too, and outlines
nuclei in their classes' colours. Where class_masks lie beside MASKS, the metrics are of classes, too.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from guided_diffusion import cell_classes, cli, magnification, progress
from guided_diffusion.cell_classes import CellClass
from guided_diffusion.devices import find_device
from guided_diffusion.files import check_place, claimed, write_json, writing
from guided_diffusion.histology.evaluation import class_metrics, instance_metrics
from guided_diffusion.histology.evaluation.class_metrics import ClassTally
from guided_diffusion.histology.evaluation.instance_metrics import Tally
from guided_diffusion.histology.segmenter import data as segmenter_data
from guided_diffusion.histology.segmenter.decoding import Segmenter, load_segmenter, outlined
from guided_diffusion.histology.segmenter.net import ADAPT
from guided_diffusion.image_files import EXTENSIONS, read_image
from guided_diffusion.options import check_ranges, str2bool
from guided_diffusion.slides import slides_of

METRICS = "metrics.json"
FOUND, TRUE = (255, 230, 0), (0, 90, 255)
SHOWN = ("f1@0.5", "aji", "aji+", "pq", "dq", "sq", "dice")


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check_ranges(vars(args), centre="[0, inf)", seed="[0, inf)", adapt="[0, 1]")
    segmenter = load_segmenter(args.model, find_device(args.device), args.flips, args.adapt)
    images = segmenter_data.files_in(args.images)
    if not images:
        raise ValueError(f"IMAGES {args.images} holds no image ({', '.join(EXTENSIONS)})")
    check_out(args, segmenter.classes)
    slides = dict(zip(images, slides_of(args.images, list(images.values())))) if args.truth else {}
    masks = truth_files(args.truth, images, segmenter, slides) if args.truth else None
    class_masks = class_files(args.truth, images, segmenter) if args.truth else None
    files = images, masks, class_masks, segmenter.classes
    for stem in progress.bar(images, "checking", leave=False):
        read(stem, *files)

    if line := magnification.mismatch(f"MODEL {args.model}", segmenter.mpp, args.images):
        print(line)
    with claimed(args.out, "--results_path"):
        tallies = {}
        for stem in progress.bar(images, "segmenting"):
            image, truth, true_class = read(stem, *files)
            image, truth = (array if array is None else centre(array, args.centre) for array in (image, truth))
            found, found_class = segmenter.find(image)
            if class_masks:
                tallies[stem] = class_metrics.tally(truth, true_class, found, found_class, segmenter.classes)
            elif truth is not None:
                tallies[stem] = instance_metrics.tally(truth, found)
            write_pictures(args.out, stem, image, found, truth, found_class, segmenter.classes)
        if segmenter.classes:
            cell_classes.write_classes(args.out, segmenter.classes)
        print(f"{args.out}: {len(images)} images")
        if masks is not None:
            print(table(write_metrics(args, tallies, [slides[stem] for stem in tallies])))


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="segmenter.pt, or the folder that holds it")
    parser.add_argument("images", metavar="IMAGES", type=Path, help="folder of images")
    parser.add_argument(
        "--results_path", "--out", dest="out", metavar="DIR", type=Path, required=True, help="folder to write to"
    )
    parser.add_argument("--truth", metavar="MASKS", type=Path, help="folder of true instance masks of the same stems")
    parser.add_argument("--flips", type=str2bool, default=False, help="average over mirrored images: slower, better")
    parser.add_argument(
        "--adapt",
        type=float,
        default=ADAPT,
        help="share of an image's own statistics in its norms; 0: training's alone",
    )
    parser.add_argument("--centre", type=int, default=0, help="side in px of a central square to take alone; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    return parser


def check_out(args: argparse.Namespace, classes: Sequence[CellClass]) -> None:
    """:raises ValueError: where the folder is none, input would be overwritten, or what is there contradicts it."""
    check_place(args.out)
    folders = ("inst_masks", "overlays", cell_classes.FOLDER)
    written = {args.out.resolve(), *((args.out / name).resolve() for name in folders)}
    for name, folder in (("IMAGES", args.images), ("--truth", args.truth)):
        if folder is not None and folder.resolve() in written:
            raise ValueError(f"--results_path {args.out} would write among {name} {folder}: give another folder")
    if not classes and (args.out / cell_classes.FOLDER).exists():
        raise ValueError(
            f"--results_path {args.out} has {cell_classes.FOLDER}, and MODEL tells no classes: give another folder"
        )


def truth_files(folder: Path, images: dict[str, Path], segmenter: Segmenter, slides: dict[str, str]) -> dict[str, Path]:
    """
    :param slides: stem -> slide.
    :return: stem -> mask, for the images.
    :raises ValueError: where stems differ, or a slide was trained on or chose the weights.
    """
    masks = segmenter_data.files_in(folder)
    segmenter_data.check_partners(images, masks, folder)
    for stem in sorted(masks.keys() - images.keys()):
        raise ValueError(f"{masks[stem]} has no image {stem}.* among IMAGES: add it or remove the mask")
    for stem in images:
        if how := segmenter.knows(stem, slides[stem]):
            raise ValueError(f"MODEL {how} of --truth {folder}: measure on slides it has not seen")
    return masks


def class_files(folder: Path, images: dict[str, Path], segmenter: Segmenter) -> dict[str, Path] | None:
    """
    :param folder: of true instance masks.
    :return: stem -> class mask, for the images; None where there are none, or the model knows no classes.
    :raises ValueError: where an image has none, or the classes are not the model's.
    """
    place = folder.absolute().parent / cell_classes.FOLDER
    if not segmenter.classes or not place.is_dir():
        return None
    class_masks = segmenter_data.files_in(place)
    segmenter_data.check_partners(images, class_masks, place)
    segmenter.check_classes(cell_classes.read_classes(place), str(place))
    return class_masks


def read(
    stem: str,
    images: dict[str, Path],
    masks: dict[str, Path] | None,
    class_masks: dict[str, Path] | None,
    classes: Sequence[CellClass],
) -> tuple[np.ndarray, np.ndarray | None, Mapping[int, int]]:
    """An image, its true instance map where there is one, and the true class of each nucleus by its id."""
    if masks is None:
        return read_image(images[stem]), None, {}
    class_mask = class_masks[stem] if class_masks else None
    example = segmenter_data.read_example(stem, images[stem], masks[stem], class_mask, classes)
    return example.image, example.inst_map, example.of_nucleus


def centre(array: np.ndarray, side: int) -> np.ndarray:
    """The central square; all of the array where the side is 0, and of a smaller side all there is."""
    if not side:
        return array
    row, column = (max(0, (length - side) // 2) for length in array.shape[:2])
    return array[row : row + side, column : column + side]


def write_pictures(
    out: Path,
    stem: str,
    image: np.ndarray,
    found: np.ndarray,
    truth: np.ndarray | None,
    found_class: Mapping[int, int],
    classes: Sequence[CellClass],
) -> None:
    if found.max(initial=0) > np.iinfo(np.uint16).max:
        raise ValueError(f"{stem} has {found.max()} nuclei, more than a uint16 mask can number: cut the image")
    picture = image if truth is None else outlined(image, truth, TRUE)
    files = [(found.astype(np.uint16), out / "inst_masks" / f"{stem}.tif", "TIFF")]
    if classes:
        class_map = cell_classes.painted(found, found_class)
        files.append((class_map, out / cell_classes.FOLDER / f"{stem}.png", "PNG"))
        for one in classes:
            picture = outlined(picture, np.where(class_map == one.id, found, 0), one.colour)
    else:
        picture = outlined(picture, found, FOUND)
    for array, path, kind in (*files, (picture, out / "overlays" / f"{stem}.png", "PNG")):
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path, durable=False) as file:
            Image.fromarray(array).save(file, kind)


def write_metrics(
    args: argparse.Namespace, tallies: dict[str, Tally | ClassTally], slides: list[str]
) -> dict[str, dict]:
    """Write metrics.json, of the images' tallies and their slides. :return: the averages."""
    own = list(tallies.values())
    average = instance_metrics.summarise(own, slides, args.seed)
    facts = {
        "model": str(args.model),
        "adapt": args.adapt,
        "average": average,
        "pooled": instance_metrics.pooled(own).figures(),
        "slides": {slide: part.figures() for slide, part in instance_metrics.by_slide(own, slides).items()},
        "images": {stem: part.figures() for stem, part in tallies.items()},
    }
    write_json(args.out / METRICS, facts)
    return average


def table(average: dict[str, dict[str, float | None]]) -> str:
    shown = [name for name in average if name in SHOWN or name.startswith(("class_", "mpq"))]
    width = max(8, *(len(name) + 1 for name in shown))
    lines = [f"{'':{width}}{'mean':>8}   95 % interval"]
    for name in shown:
        mean, low, high = (average[name][part] for part in ("mean", "low", "high"))
        value = f"{'-':>8}" if mean is None else f"{mean:8.3f}"
        lines.append(f"{name:{width}}{value}   {'-' if low is None else f'{low:.3f} to {high:.3f}'}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
