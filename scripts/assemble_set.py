"""
Make a training set of real and synthetic patches.

    python scripts/assemble_set.py --data_dir DATA --synthetic KEPT... --results_path OUT --ratio R
        [--weighted True] [--copy True] [--evaluation EVALUATION]

OUT becomes a data folder: MoNuSegTrainingData/{images,bin_masks,inst_masks} with all of DATA's training patches and
R times as many synthetic ones (--ratio all, or more than there are: all there are), MoNuSegTestData as it is in DATA,
slides.csv, manifest.csv, which says of every patch where it came from, and card.md, which sums that up: what there is,
which models made it, whether copies were looked for (--evaluation, the folder of evaluate.py), licences. KEPT is the
kept/ of filter_ood.py, another results folder, or a sweep. Of samples that share structure, appearance and noise, as a
sweep with --same_noise True makes them, one is taken.

A synthetic patch is named SLIDE_NUMBER after the slide of its appearance, which slides.csv says, too, so that it is
held out with that slide. Its structure may come from another one: the manifest's columns slide and structure_slide name
both. Run again, it replaces OUT as a whole.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from guided_diffusion import cards, cell_classes, cli, progress, trained_flags
from guided_diffusion.files import check_apart, is_remote, list_files, read_json, replace_folder, write_text
from guided_diffusion.histology.assembly import (
    Synthetic,
    check_sizes,
    draw,
    is_kept,
    name_synthetic,
    triple,
    without_classes,
    write_set,
)
from guided_diffusion.histology.evaluation.runs import Sample, add_run_flags, find_runs
from guided_diffusion.histology.features.cluster_folders import Patch, list_patches
from guided_diffusion.histology.slides.annotations import TRAIN_SPLIT
from guided_diffusion.image_files import check_image
from guided_diffusion.options import str2bool

RECORD = "assemble.json"


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    ratio = parse_ratio(args.ratio)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must not be negative")
    check_apart(args.out, [args.real, *args.synthetic], args.out)
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / RECORD).is_file():
        raise ValueError(f"--results_path {args.out} holds what this command did not make: give another folder")
    patches = list_patches(args.real)
    real = [patch for patch in patches if patch.split == TRAIN_SPLIT]
    for patch in real:
        if "inst_masks" not in patch.files:
            raise ValueError(
                f"--data_dir {args.real} has no {TRAIN_SPLIT}/inst_masks: give a folder of prepare_monuseg.py"
            )
    for folder in args.synthetic:
        check_kept(folder)
    samples = [sample for run in find_runs(args.synthetic) for sample in run.samples]
    copies = read_copies(args.evaluation)
    count = None if ratio is None else round(ratio * len(real))
    chosen = draw(samples, count, args.weighted, args.seed)
    if not chosen:
        raise ValueError(f"--ratio {args.ratio} takes none of the {len(samples)} samples in --synthetic: give more")
    synthetic = name_synthetic(chosen, patches)
    check_untested(patches, synthetic)
    check_sizes(real[0], synthetic)

    filtered = said_by_filter(args.synthetic)

    distinct = count_distinct(chosen)
    settings = {name: getattr(args, name) for name in ("ratio", "weighted", "seed", "copy")}
    with progress.bar(desc="writing", total=len(real) + len(synthetic), unit="patch", leave=False) as bar:

        def fill(folder: Path) -> None:
            write_set(folder, args.real, patches, synthetic, args.copy, bar.update)
            facts = {**describe(patches, synthetic, folder), **filtered, "copies": copies}
            write_text(folder / cards.NAME, cards.data_sheet(facts, licences(chosen)))
            made = {"settings": settings, "real": len(real), "synthetic": len(synthetic), "distinct": distinct}
            write_text(folder / RECORD, json.dumps(made, indent=1) + "\n")

        replace_folder(args.out, fill, "--results_path")
    print(f"{args.out}: {len(real)} real and {len(synthetic)} synthetic training patches")
    print("of " + ", ".join(f"{number} {what}" for what, number in distinct.items()))
    unclassed, total = without_classes(real, synthetic), len(real) + len(synthetic)
    if 0 < unclassed < total:
        print(f"classes of cells are left out: {unclassed} of {total} patches have no {cell_classes.FOLDER}")
    if count is not None and len(chosen) < count:
        others = "" if len(chosen) == len(samples) else f"; the others of {len(samples)} repeat one, or weigh 0"
        print(f"--ratio {args.ratio} asks for {count} synthetic patches; there are {len(chosen)}{others}")


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    add_run_flags(parser, "data folder of real patches", "data folder to make")
    parser.add_argument("--ratio", required=True, help="synthetic patches for each real one, such as 0.5, or all")
    parser.add_argument("--weighted", type=str2bool, default=False, help="draw by the weights of filter_ood.py")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--copy", type=str2bool, default=False, help="copy files instead of linking them")
    parser.add_argument(
        "--evaluation",
        metavar="EVALUATION",
        type=Path,
        help="folder of evaluate.py, whose count of copies the card says",
    )
    return parser


def check_kept(folder: Path) -> None:
    """:raises ValueError: where a folder is what a filter has kept, and it has kept nothing."""
    if is_kept(folder) and not list_files(folder / "samples", (".png",)):
        raise ValueError(
            f"--synthetic {folder} is empty: the filter kept no sample, see {folder.parent / 'report.json'}; "
            "raise its --tau, or sample from a better model"
        )


def check_untested(patches: Sequence[Patch], synthetic: Sequence[Synthetic]) -> None:
    """:raises ValueError: where a sample is made of a test slide, which nothing may learn from."""
    trained = {patch.slide for patch in patches if patch.split == TRAIN_SPLIT}
    test = {patch.slide for patch in patches} - trained
    for item in synthetic:
        if tested := sorted({item.slide, item.structure_slide} & test):
            raise ValueError(
                f"{item.sample.sample} is made of {tested[0]}, a test slide of --data_dir: sample with --use_train True"
            )


def describe(patches: Sequence[Patch], synthetic: Sequence[Synthetic], folder: Path) -> dict[str, str]:
    """:return: what is in a set, as its card says it: what -> how much."""
    training = [patch for patch in patches if patch.split == TRAIN_SPLIT]
    test = [patch for patch in patches if patch.split != TRAIN_SPLIT]
    rows = [item.sample.row for item in synthetic]
    scales: dict[str, set[str]] = {}
    for row in rows:
        scales.setdefault(PurePath(row.get("checkpoint") or cards.UNKNOWN).name, set()).add(row.get("s") or "?")
    width, height = check_image(training[0].image)
    classes = cell_classes.read_classes(folder) if (folder / cell_classes.TABLE).exists() else []
    return {
        "training": f"{len(training)} real patches of {len({patch.slide for patch in training})} slides, and "
        f"{len(synthetic)} synthetic ones with the colours of {len({item.slide for item in synthetic})} slides",
        "test": f"{len(test)} real patches of {len({patch.slide for patch in test})} slides",
        "size": f"{width} x {height} px",
        "classes": ", ".join(item.name for item in classes) or "none",
        "made by": ", ".join(f"{name} (s = {', '.join(sorted(values))})" for name, values in sorted(scales.items())),
        "distinct": ", ".join(f"{n} {what}" for what, n in count_distinct([item.sample for item in synthetic]).items()),
    }


def said_by_filter(folders: Sequence[Path]) -> dict[str, str]:
    """
    :return: what the filter did, for the card, where folders are what it has kept and its report lies above them.
    :raises ValueError: where a report is damaged.
    """
    lines = []
    for folder in filter(is_kept, folders):
        path = folder.parent / "report.json"
        try:
            report = read_json(path)
            lines.append(f"kept {report['kept']} of {report['synthetic']} samples, AUROC {report['auroc']:.3f}")
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not what filter_ood.py wrote: run it again, or remove it") from None
    return {"filter": "; ".join(lines) or "none"}


def read_copies(folder: Path | None) -> str:
    """
    :param folder: what evaluate.py wrote; None where nobody looked.
    :return: which share of the samples look like copies of training patches, in words.
    :raises ValueError: where that is not said there.
    """
    if folder is None:
        return "not looked for"
    path = folder / "metrics.json"
    try:
        figures = read_json(path)
        shares = {name: float(run["copies"]) for name, run in figures["runs"].items()}
        real = float(figures["floor"]["copies"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--evaluation {path} says nothing of copies: give the folder of evaluate.py") from None
    runs = ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())
    return f"{runs} look like a training patch; of real patches of the same slides {real:.1%} do"


def licences(samples: Sequence[Sample]) -> list[str]:
    """:return: the licences of the data that the samples' models learnt from, by config.json beside the checkpoints."""

    def each() -> Iterator[str]:
        for path in sorted({sample.row.get("checkpoint") or "" for sample in samples}):
            with contextlib.suppress(OSError, ValueError):
                config = (trained_flags.load_config(path) if path and not is_remote(path) else None) or {}
                yield str(config.get("data_licence") or cards.UNKNOWN)

    return list(dict.fromkeys(each()))


def count_distinct(samples: Sequence[Sample]) -> dict[str, int]:
    """:return: how many structures, appearances, and triples of these and noise the samples come from."""
    triples = [triple(sample) for sample in samples]
    structures, appearances, _ = (len(set(part)) for part in zip(*triples))
    return {"structures": structures, "appearances": appearances, "triples": len(set(triples))}


def parse_ratio(text: str) -> float | None:
    """:return: the number in a --ratio, None for all."""
    if text == "all":
        return None
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < math.inf:
        raise ValueError(f"--ratio {text}: give a number above 0, such as 1 or 0.5, or all")
    return ratio


if __name__ == "__main__":
    cli.run(main)
