"""
Measure synthetic patches against real ones, or predicted nuclei against true ones.

    python scripts/evaluate.py --data_dir DATA --synthetic RESULTS... --results_path DIR [--backbone NAME]
        [--model_path SEGMENTER]
    python scripts/evaluate.py --predicted MASKS --truth MASKS --results_path DIR

DATA holds MoNuSegTrainingData, which the synthetic patches are held against, and may hold MoNuSegTestData. Beside every
figure stands real against real: half of the training patches against the other half, of the same slides, which is the
floor; and the test patches, of other slides. RESULTS are folders of image_sample.py, or a sweep's; samples that are
larger than the real patches are cut into such, but for their colours.
With a SEGMENTER that knows classes of nuclei, and class_masks beside inst_masks, agreement is measured by classes, too.
Writes metrics.json, metrics.png (over s and checkpoints for a sweep), copies.png where samples look copied from
training, and prints a table.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from guided_diffusion import cell_classes, cli, magnification, progress
from guided_diffusion.bridge import load_backbone
from guided_diffusion.devices import PRECISIONS, UNSCALED, find_device
from guided_diffusion.files import check_place, claimed, nfc, write_json, writing
from guided_diffusion.histology.evaluation import image_metrics, instance_metrics, mask_folders, runs
from guided_diffusion.histology.evaluation import report as evaluation_report
from guided_diffusion.histology.evaluation.evaluator import (
    BY_FEATURES,
    METRICS,
    Evaluator,
    Figures,
    PatchSet,
    halves,
)
from guided_diffusion.histology.features.backbones import Backbone
from guided_diffusion.histology.segmenter.agreement import estimate, structure_metric
from guided_diffusion.histology.segmenter.decoding import Segmenter, load_segmenter
from guided_diffusion.histology.segmenter.net import ADAPT
from guided_diffusion.histology.slides.annotations import TEST_SPLIT
from guided_diffusion.image_files import read_image, read_inst_mask, read_mask
from guided_diffusion.images import REAL, Item, list_items
from guided_diffusion.options import SIZE, check_ranges
from guided_diffusion.slides import slides_of, without_number
from guided_diffusion.windows import tiles

FEWEST = 4  # training patches, so that in either half each has another one beside it
SAME, OTHER = "real, same slides", "real, other slides"


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    runs.add_run_flags(parser, "data folder with training and test patches", "folder to write to", required=False)
    parser.add_argument("--predicted", type=Path, help="folder of predicted instance masks")
    parser.add_argument("--truth", type=Path, help="folder of true instance masks of the same stems")
    parser.add_argument("--metrics", default=",".join(METRICS), help="some of these")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="as in extract_features.py")
    parser.add_argument(
        "--model_path",
        "--segmenter",
        metavar="MODEL",
        type=Path,
        help="model of train_segmenter.py, for structure agreement",
    )
    parser.add_argument("--adapt", type=float, default=ADAPT, help="of --model_path, as in segment.py")
    parser.add_argument("--limit", type=int, default=0, help="patches of each set to measure at most; 0: all")
    parser.add_argument("--batch_size", type=int, default=32, help="patches a forward pass")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="of subsets")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    metrics = check(args)
    if args.truth:
        compare_masks(args)
        return
    device, segmenter = find_device(args.device), None
    if "structure" in metrics:
        segmenter = load_segmenter(args.model_path, device, adapt=args.adapt)
    every_train_item, every_held_out_item = real_items(args.real, bool(segmenter and segmenter.classes))
    train_items, held_out_items = spread(every_train_item, args.limit), spread(every_held_out_item, args.limit)
    if "copies" in metrics and len(train_items) < FEWEST:
        raise ValueError(
            f"--metrics copies takes {FEWEST} training patches or more, and --data_dir {args.real} has "
            f"{len(train_items)}, or --limit says so: leave it out"
        )
    found = runs.find_runs(args.synthetic)
    if args.out.resolve() in {run.path.resolve() for run in found}:
        raise ValueError(f"--results_path {args.out} is a folder of --synthetic: give another")
    if segmenter:
        for item in held_out_items:
            if how := segmenter.knows(item.stem, item.slide):
                raise ValueError(f"--model_path {how}, which is to set the floor: give another")
        if line := magnification.mismatch(f"--model_path {args.model_path}", segmenter.mpp, args.real):
            print(line)
    backbone = None
    if set(metrics) & set(BY_FEATURES):
        backbone = load_backbone(args.backbone, device, PRECISIONS[args.precision])
    train = real_set("real, training", train_items, backbone, args.batch_size)
    held_out = real_set(OTHER, held_out_items, backbone, args.batch_size, segmenter) if held_out_items else None
    known, size = by_name([*every_train_item, *every_held_out_item]), train.images.shape[1:3]
    sets = [synthetic_set(run, backbone, args, known, size, segmenter) for run in found]

    structure = structure_metric(segmenter) if segmenter else None
    half, other_half = halves(train, args.seed)
    floor = Evaluator(half, metrics, seed=args.seed).figures(other_half)
    evaluator = Evaluator(train, metrics, structure, args.seed)
    real = {SAME: floor, **({OTHER: evaluator.figures(held_out)} if held_out else {})}
    figures = {patches.name: evaluator.figures(patches) for patches in sets}
    with claimed(args.out, "--results_path"):
        report(args, metrics, real, figures, found, backbone)
        if "copies" in metrics:
            draw_copies(evaluator, sets, train_items, args.out / "copies.png")


def check(args: argparse.Namespace) -> list[str]:
    """:return: the metrics to take. :raises ValueError: where flags are out of range or contradict each other."""
    if bool(args.predicted) != bool(args.truth) or bool(args.real) != bool(args.synthetic):
        raise ValueError("give --data_dir with --synthetic, or --predicted with --truth")
    if bool(args.real) == bool(args.truth):
        raise ValueError("give either --data_dir and --synthetic, or --predicted and --truth")
    for name in ("backbone", "model_path", "adapt", "limit", "metrics") if args.truth else ():
        if getattr(args, name) != create_argparser().get_default(name):
            raise ValueError(f"--{name} {getattr(args, name)} is not for --predicted and --truth: leave it out")
    metrics = [metric.strip() for metric in args.metrics.split(",") if metric.strip()]
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown --metrics {metric}: choose some of {', '.join(METRICS)}")
    if not metrics:
        raise ValueError(f"--metrics {args.metrics!r} names none: choose some of {', '.join(METRICS)}")
    if args.model_path and "structure" not in metrics:
        raise ValueError(f"--model_path {args.model_path} is of the metric structure: leave it out, or add that one")
    if "structure" in metrics and not args.model_path:
        if args.metrics != ",".join(METRICS):
            raise ValueError("--metrics structure needs --model_path, a model of scripts/train_segmenter.py")
        metrics.remove("structure")
    if args.precision not in UNSCALED:
        raise ValueError(f"unknown --precision {args.precision}: choose one of {', '.join(UNSCALED)}")
    check_ranges(vars(args), batch_size=SIZE, limit="[0, inf)", seed="[0, inf)", adapt="[0, 1]")
    check_place(args.out)
    return metrics


# ---- reading ----


def real_items(data: Path, classes: bool) -> tuple[list[Item], list[Item]]:
    """
    :param classes: see list_items.
    :return: the training and the test patches, or none; :raises ValueError: where a slide is on both sides.
    """
    train = list_items(str(data), "monuseg", classes=classes)
    test = list_items(str(data), "monuseg", False, classes) if (data / TEST_SPLIT).exists() else []
    both = {item.slide for item in train} & {item.slide for item in test}
    if both:
        raise ValueError(
            f"--data_dir {data} has slide {min(both)} among training and test patches, which are to be of "
            "other slides: move it to one side"
        )
    return train, test


def by_name(items: Sequence[Item]) -> dict[str, Item]:
    """:return: the items by their images' names, as manifests know them; none of a name that comes twice."""
    names = [PurePath(item.stem).name for item in items]
    counts = Counter(names)
    return {name: item for name, item in zip(names, items) if counts[name] == 1}


def spread(items: Sequence, limit: int) -> list:
    """At most `limit` of the items, evenly spread; 0 means all."""
    if not limit or len(items) <= limit:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def read_pair(image: str | Path, mask: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """An image, [H x W x 3] uint8, and its instance map, which must be of its size."""
    pixels, ids = read_image(image), read_inst_mask(mask)
    if ids.shape != pixels.shape[:2]:
        raise ValueError(
            f"{mask} is {ids.shape[1]} x {ids.shape[0]} px, its image {image} {pixels.shape[1]} x {pixels.shape[0]}: "
            "they must be of one size"
        )
    return pixels, ids


def stacked(arrays: Sequence[np.ndarray], names: Sequence[object]) -> np.ndarray:
    """:raises ValueError: where sizes differ, naming the first file that is unlike the first."""
    for array, name in zip(arrays, names):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"{name} is {array.shape[1]} x {array.shape[0]} px, {names[0]} {arrays[0].shape[1]} x "
                f"{arrays[0].shape[0]}: all must be patches of one size"
            )
    return np.stack(arrays)


def embed(name: str, images: np.ndarray, backbone: Backbone | None, batch_size: int) -> np.ndarray:
    """:return: the features of all images, [N x D]; none, [N x 0], without a backbone."""
    if backbone is None:
        return np.empty((len(images), 0), np.float32)
    starts = progress.bar(range(0, len(images), batch_size), f"{name}: features", leave=False, delay=2)
    return np.concatenate([backbone.embed(images[start : start + batch_size]) for start in starts])


def classes_in(
    masks: Sequence[str | Path], inst_maps: Sequence[np.ndarray], segmenter: Segmenter | None
) -> list[Mapping[int, int]] | None:
    """
    :param masks: paths of those of classes, with a folder above theirs, whether they are there or not, all in one
        folder; inst_maps: theirs.
    :return: the class of each nucleus by its id; None where there is no such folder, or no segmenter that knows any.
    :raises ValueError: where the segmenter knows other classes.
    """
    folder = str(masks[0]).rpartition(f"/{cell_classes.FOLDER}/")[0]
    if not (folder and segmenter and segmenter.classes and Path(folder, cell_classes.FOLDER).is_dir()):
        return None
    segmenter.check_classes(cell_classes.of_mask(str(masks[0])), folder)
    known = cell_classes.ids_of(segmenter.classes)
    return [cell_classes.of_nuclei(ids, read_mask(mask), known, str(mask)) for mask, ids in zip(masks, inst_maps)]


def real_set(
    name: str, items: list[Item], backbone: Backbone | None, batch_size: int, segmenter: Segmenter | None = None
) -> PatchSet:
    """:param segmenter: that names the classes of their nuclei."""
    for item in items:
        if item.inst_mask is None:
            raise ValueError(f"{item.image} has no instance mask in inst_masks: evaluation needs one")
    bar = progress.bar(items, f"{name}: reading", leave=False, delay=2)
    pairs = [read_pair(item.image, item.inst_mask) for item in bar]
    images = stacked([image for image, _ in pairs], [item.image for item in items])
    inst_maps = np.stack([inst_map for _, inst_map in pairs])
    stems = [PurePath(item.stem).name for item in items]
    features = embed(name, images, backbone, batch_size)
    classes = classes_in([str(item.class_mask) for item in items], inst_maps, segmenter)
    slides = [item.slide for item in items]
    return PatchSet(name, images, inst_maps, features, slides, structures=stems, classes=classes)


def synthetic_set(
    run: runs.Run,
    backbone: Backbone | None,
    args: argparse.Namespace,
    real: dict[str, Item],
    size: tuple[int, int],
    segmenter: Segmenter | None,
) -> PatchSet:
    """
    :param real: stem -> real patch. :param size: height and width of these; larger samples are cut into such.
    :param segmenter: with one, look for the real patches that have the samples' structures, and for classes.
    """
    samples = spread(run.samples, args.limit)
    pairs = [
        read_pair(sample.sample, sample.inst_mask)
        for sample in progress.bar(samples, f"{run.name}: reading", leave=False, delay=2)
    ]
    coloured = None
    if all(sample.appearance for sample in samples):
        coloured = [(image, read_image(sample.appearance)) for sample, (image, _) in zip(samples, pairs)]
    class_masks = [run.path.absolute() / cell_classes.FOLDER / f"{sample.stem}.png" for sample in samples]
    classes = classes_in(class_masks, [inst_map for _, inst_map in pairs], segmenter)
    cuts = spread(cut(samples, pairs, size), args.limit)
    images, inst_maps = (np.stack([pairs[number][kind][part] for number, part in cuts]) for kind in (0, 1))
    conditions = [condition(samples[number], part) for number, part in cuts]
    samples = [samples[number] for number, _ in cuts]
    structures = [nfc(PurePath(sample.row.get("structure", sample.stem)).stem) for sample in samples]
    slides = {name: item.slide for name, item in real.items()}
    kinds = [sample.row.get("structure_kind") or REAL for sample in samples]
    originals = find_originals([real.get(stem) for stem in structures], inst_maps) if segmenter else None
    return PatchSet(
        name=run.name,
        images=images,
        inst_maps=inst_maps,
        features=embed(run.name, images, backbone, args.batch_size),
        slides=[pooled_with(sample, kind, slides) for sample, kind in zip(samples, kinds)],
        coloured=coloured,
        conditions=conditions,
        originals=originals,
        structures=structures,
        kinds=kinds,
        classes=classes and [classes[number] for number, _ in cuts],
    )


def pooled_with(sample: runs.Sample, kind: str, known: dict[str, str]) -> str:
    """
    :param kind: of its structure; known: see runs.slides_of_sample.
    :return: the slide whose figures a sample counts for. A structure that was made is of none, and would be a slide of
        its own, whose few nuclei weigh as much as all of a real one: there it is the appearance's.
    """
    structure, appearance = runs.slides_of_sample(sample, known)
    return (structure if kind == REAL else appearance) or without_number(sample.stem)


def cut(
    samples: Sequence[runs.Sample], pairs: Sequence[tuple[np.ndarray, np.ndarray]], size: tuple[int, int]
) -> list[tuple[int, tuple[slice, slice]]]:
    """
    :param pairs: image and instance map of each sample. :param size: height and width of patches.
    :return: the number of a sample and the rows and columns of a patch, for all patches that cover the samples.
    :raises ValueError: where a sample is smaller than a patch.
    """
    for sample, (image, _) in zip(samples, pairs):
        if min(np.subtract(image.shape[:2], size)) < 0:
            raise ValueError(
                f"{sample.sample} is {image.shape[1]} x {image.shape[0]} px, the patches of --data_dir {size[1]} x "
                f"{size[0]}: prepare patches of the samples' size"
            )
    return [(number, part) for number, (image, _) in enumerate(pairs) for part in tiles(image.shape[:2], size)]


def condition(sample: runs.Sample, part: tuple[slice, slice]) -> str:
    """A name for what a patch of a sample was made from."""
    structure = nfc(PurePath(sample.row.get("structure", sample.stem)).stem)
    return f"{structure} {sample.row.get('appearance', sample.stem)} {part[0].start} {part[1].start}"


def find_originals(items: Sequence[Item | None], inst_maps: np.ndarray) -> np.ndarray | None:
    """
    Read the real patches whose nuclei samples should show.

    :param items: a sample's real patch, None where there is none of its structure's name.
    :param inst_maps: [N x H x W], the samples' nuclei.
    :return: [N x H x W x 3] uint8; None unless every sample has one, and its mask is the sample's.
    """
    images = []
    for item, inst_map in zip(items, inst_maps):
        if item is None:
            return None
        image, own = read_pair(item.image, item.inst_mask)
        if not np.array_equal(own > 0, inst_map > 0):
            return None
        images.append(image)
    return np.stack(images)


# ---- writing ----


def report(
    args: argparse.Namespace,
    metrics: list[str],
    real: dict[str, Figures],
    figures: dict[str, Figures],
    found: list[runs.Run],
    backbone: Backbone | None,
) -> None:
    """Write metrics.json and metrics.png, and print the table."""
    rows = {**real, **figures}
    if "frechet" in metrics and any(row["frechet"] is None for row in rows.values()):
        needed = image_metrics.images_for_covariance(backbone.embed(np.zeros((1, 64, 64, 3), np.uint8)).shape[1])
        print(f"frechet: left out where either side has fewer than {needed} patches; kid takes any number")
    write_json(
        args.out / "metrics.json",
        {
            "settings": {
                "real": str(args.real),
                "backbone": backbone.name if backbone else None,
                "weight_hash": backbone.weight_hash if backbone else None,
                "segmenter": str(args.model_path) if args.model_path else None,
                "adapt": args.adapt,
                "seed": args.seed,
                "limit": args.limit,
            },
            "floor": evaluation_report.as_json(real[SAME]),
            "other_slides": evaluation_report.as_json(real[OTHER]) if OTHER in real else None,
            "runs": {name: evaluation_report.as_json(row) for name, row in figures.items()},
        },
    )
    places = {run.name: place(run) for run in found}
    with writing(args.out / "metrics.png") as file:
        evaluation_report.draw_figures(real, figures, places, file)
    print(evaluation_report.table(rows))
    print(f"look at {args.out / 'metrics.png'}")


def place(run: runs.Run) -> tuple[str, float | None]:
    """:return: the checkpoint and the s of a run, by its manifest; its name and None where samples differ in them."""
    try:
        ((checkpoint, s),) = {(sample.row["checkpoint"], float(sample.row["s"])) for sample in run.samples}
    except (KeyError, ValueError):
        return run.name, None
    return PurePath(checkpoint).stem, s


def draw_copies(evaluator: Evaluator, sets: list[PatchSet], items: list[Item], path: Path) -> None:
    """
    Draw the samples that look copied beside the patches they look copied from: those found by pixels, the closest
    first, then those found by features alone.
    """
    pairs = []
    for patches in sets:
        found = evaluator.neighbours(patches)
        pixels = evaluator.copied_by_pixels(found)
        for i in np.flatnonzero(evaluator.copied(found)):
            if pixels[i]:
                j, what, distance = found.by_pixels[i], "pixels", found.pixel_distance[i]
            else:
                j, what, distance = found.by_features[i], "features", found.feature_distance[i]
            caption = f"{patches.name} | {items[j].stem}\n{what} {distance:.3f}"
            pairs.append(((what != "pixels", distance), (patches.images[i], evaluator.train.images[j], caption)))
    path.unlink(missing_ok=True)
    if pairs:
        with writing(path) as file:
            evaluation_report.draw_pairs([pair for _, pair in sorted(pairs, key=lambda pair: pair[0])], file)
        print(f"{len(pairs)} samples lie nearer to a training patch than 99 % of these to each other: look at {path}")


# ---- masks ----


def compare_masks(args: argparse.Namespace) -> None:
    """Measure predicted instance masks against true ones of the same stems; write metrics.json and print the means."""
    tallies = mask_folders.compare(args.truth, args.predicted)
    means = instance_metrics.summarise(list(tallies.values()), slides_of(args.truth, list(tallies)), args.seed)
    images = {nfc(Path(path).stem): own.figures() for path, own in tallies.items()}
    with claimed(args.out, "--results_path"):
        write_json(args.out / "metrics.json", {"mean": means, "images": images})
    print(evaluation_report.table({name: {"mean": estimate(mean)} for name, mean in means.items()}))


if __name__ == "__main__":
    cli.run(main)
