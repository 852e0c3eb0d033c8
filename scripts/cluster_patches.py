"""
Sort a data folder's patches into clusters, each of them a data folder of its own.

    python scripts/cluster_patches.py DATA --features FILE.npz [--reduce pca|umap|none] [--cluster kmeans|hdbscan|gmm]
    python scripts/cluster_patches.py DATA --cluster slide

DATA/NAME gets LABEL/{MoNuSegTrainingData,MoNuSegTestData}/{images,bin_masks,inst_masks}, relative links or, with
--copy True, copies; clusters.csv, scores.json and clusters.png. Everything is fitted on the training patches, test
patches are assigned; label -1 is noise. With --trials K, K seeds are tried and the best silhouette wins. --subset
25,10,05,02 makes LABEL/25ss, LABEL/10ss, ...: that many per cent of a cluster's training patches, each drawn from the
one before, with all its test patches. Any LABEL, and any LABEL/NNss, is a --data_dir; finetune.sh takes DATA/NAME.

Run again, it replaces the folder as a whole, unless there is anything in it that it did not put there.
"""

import argparse
import csv
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from guided_diffusion import cli, progress
from guided_diffusion.histology.features.cluster_folders import (
    Patch,
    check_replaceable,
    list_patches,
    plan,
    write_clusters,
)
from guided_diffusion.histology.features.cluster_picture import by_size, draw_clusters
from guided_diffusion.histology.features.clustering import (
    NOISE,
    Clustering,
    Options,
    best_of,
    silhouette,
    subset_cascade,
)
from guided_diffusion.histology.features.embeddings import Features, load_features
from guided_diffusion.histology.slides.annotations import TEST_SPLIT, TRAIN_SPLIT
from guided_diffusion.image_files import read_image
from guided_diffusion.options import COUNT, check_ranges, str2bool

LARGE = 0.4  # of the training patches
OWN_FILES = ("clusters.csv", "scores.json", "clusters.png")


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    options, percents = check(args)
    args.data = Path(os.path.abspath(args.data))
    patches = list_patches(args.data)
    features = load_features(args.features) if args.features else None
    vectors = features.of([patch.image for patch in patches]) if features else None
    is_test = np.array([patch.split == TEST_SPLIT for patch in patches])
    folder = args.data / (args.out_name or default_name(args, options, features, patches))
    check_replaceable(folder, OWN_FILES)

    best, scores = None, {}
    if args.cluster == "slide":
        labels = [patch.slide for patch in patches]
    else:
        with progress.bar(total=args.trials, desc="clustering", unit="trial") as bar:
            seeds = range(args.seed, args.seed + args.trials)
            best, trials = best_of(vectors[~is_test], vectors[is_test], options, seeds, bar.update)
        labels = [*best.train_labels, *best.test_labels]
        scores = describe(best, trials, vectors[~is_test], features)
    train_sizes = Counter(label for label, patch in zip(labels, patches) if patch.split == TRAIN_SPLIT)
    subsets = {label: subset_cascade(size, percents, args.seed) for label, size in train_sizes.items()}
    points = np.concatenate([best.train, best.test]) if best else np.zeros((len(patches), 0))
    picture = draw_clusters(
        points,
        labels,
        is_test,
        lambda i: read_image(patches[i].image),
        f"{folder.name}: {len(patches)} patches",
        args.seed,
    )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    sizes = {name: size_of(labels, patches, name) for name in by_size(np.array(labels))[0]}
    summary = json.dumps({**scores, "sizes": sizes, "settings": settings}, indent=1) + "\n"
    contents = (table(patches, labels, args.data).encode(), summary.encode(), picture)
    entries = plan(patches, labels, subsets, args.copy)
    with progress.bar(total=len(entries), desc="writing", unit="file", leave=False) as bar:
        write_clusters(folder, entries, dict(zip(OWN_FILES, contents)), args.copy, bar.update)
    report(folder, labels, scores, subsets, percents)
    warn_of_lopsided(labels, patches)


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", type=Path, help="folder that prepare_monuseg.py made")
    parser.add_argument("--features", type=Path, help="file of extract_features.py; --cluster slide needs none")
    parser.add_argument("--reduce", default="pca", help="pca, umap or none")
    parser.add_argument("--cluster", default="kmeans", help="kmeans, hdbscan, gmm or slide")
    parser.add_argument("--n_components", type=int, default=3, help="dimensions to reduce to")
    parser.add_argument("--n_clusters", type=int, default=6, help="of kmeans and gmm")
    parser.add_argument("--min_samples", type=int, default=10, help="of hdbscan")
    parser.add_argument("--min_cluster_size", type=int, default=50, help="of hdbscan, in patches")
    parser.add_argument("--trials", type=int, default=1, help="seeds to try, from --seed on")
    parser.add_argument("--subset", default="", metavar="25,10,05,02", help="per cents of each cluster's patches")
    parser.add_argument("--copy", type=str2bool, default=False, help="True: copies in place of links")
    parser.add_argument("--seed", type=int, default=42, help="of all random choices")
    parser.add_argument("--out_name", "--name", default="", help="folder in DATA; empty: named after the settings")
    return parser


def check(args: argparse.Namespace) -> tuple[Options | None, list[int]]:
    """:return: how to cluster, None for slides, and the subsets' per cents, falling."""
    names = ("reduce", "n_components", "n_clusters", "min_samples", "min_cluster_size")
    by_slide = args.cluster == "slide"
    check_used(args)
    options = None if by_slide else Options(cluster=args.cluster, **{name: getattr(args, name) for name in names})
    if not by_slide and args.features is None:
        raise ValueError(f"--cluster {args.cluster} needs --features: make them with scripts/extract_features.py")
    check_ranges(vars(args), trials=COUNT)
    if not 0 <= args.seed < 2**32 - args.trials:
        raise ValueError(f"--seed {args.seed} is out of range: give 0 to {2**32 - args.trials - 1}")
    if args.out_name in (".", "..", TRAIN_SPLIT, TEST_SPLIT) or "/" in args.out_name:
        raise ValueError(f"--out_name {args.out_name} is no name for a folder in {args.data}")
    percents = args.subset.split(",") if args.subset else []
    if not all(re.fullmatch("[0-9]{1,2}", text) and int(text) for text in percents):
        raise ValueError(f"--subset {args.subset} does not parse: give per cents from 1 to 99, such as 25,10,05,02")
    return options, sorted({int(text) for text in percents}, reverse=True)


def check_used(args: argparse.Namespace) -> None:
    """Refuse flags that would change nothing."""
    unused = {
        "hdbscan": ("n_clusters",),
        "kmeans": ("min_samples", "min_cluster_size"),
        "gmm": ("min_samples", "min_cluster_size"),
        "slide": ("features", "reduce", "n_components", "n_clusters", "min_samples", "min_cluster_size", "trials"),
    }
    flags = [("cluster", name) for name in unused.get(args.cluster, ())]
    if args.reduce == "none":
        flags.append(("reduce", "n_components"))
    for flag, name in flags:
        if getattr(args, name) != create_argparser().get_default(name):
            raise ValueError(
                f"--{flag} {getattr(args, flag)} makes no use of --{name} {getattr(args, name)}: leave it out"
            )


def default_name(
    args: argparse.Namespace, options: Options | None, features: Features | None, patches: Sequence[Patch]
) -> str:
    """Name the folder as the reference does: PREPROCESSING (_ is none), backbone, reduction, clustering, version."""
    if options is None:
        count = {split: len({p.slide for p in patches if p.split == split}) for split in (TRAIN_SPLIT, TEST_SPLIT)}
        return f"names_{count[TRAIN_SPLIT]}_{count[TEST_SPLIT]}"
    kind, colon, rest = features.backbone.partition(":")
    backbone = re.sub(r"[^\w.-]+", "_", f"{kind}_{PurePath(rest).name}" if colon else kind)
    return f"__{backbone}_{options.name.format(seed=args.seed)}_v1.0"


def describe(best: Clustering, trials: Sequence[Clustering], train: np.ndarray, features: Features) -> dict:
    """Scores of a clustering, for scores.json."""
    return dict(
        silhouette=best.silhouette,
        silhouette_of_features=silhouette(train, best.train_labels),
        clusters=len(set(best.train_labels) - {NOISE}),
        noise_share=dict(train=noise_share(best.train_labels), test=noise_share(best.test_labels)),
        seed=best.seed,
        trials=[
            dict(
                seed=trial.seed,
                silhouette=trial.silhouette,
                clusters=len(set(trial.train_labels) - {NOISE}),
                noise_share=noise_share(trial.train_labels),
            )
            for trial in trials
        ],
        backbone=features.backbone,
        weight_hash=features.weight_hash,
    )


def noise_share(labels: Sequence[str]) -> float | None:
    return sum(label == NOISE for label in labels) / len(labels) if labels else None


def size_of(labels: Sequence[str], patches: Sequence[Patch], name: str) -> dict[str, int]:
    """A cluster's patches by split, and of how many slides the training ones are."""
    own = [patch for label, patch in zip(labels, patches) if label == name]
    train = [patch.slide for patch in own if patch.split == TRAIN_SPLIT]
    return {"train": len(train), "test": len(own) - len(train), "slides": len(set(train))}


def table(patches: Sequence[Patch], labels: Sequence[str], data: Path) -> str:
    """clusters.csv: a row a patch."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "split", "slide", "label"])
    for patch, label in zip(patches, labels):
        rows.writerow([patch.image.relative_to(data).as_posix(), patch.split, patch.slide, label])
    return text.getvalue()


def report(folder: Path, labels: Sequence[str], scores: dict, subsets: dict, percents: Sequence[int]) -> None:
    count = len(set(labels) - {NOISE})
    noise = f", {sum(label == NOISE for label in labels)} of {len(labels)} patches noise" if NOISE in labels else ""
    score = scores.get("silhouette")
    print(f"{folder}: {count} clusters{noise}" + (f", silhouette {score:.3f}" if score is not None else ""))
    for label, shares in sorted(subsets.items()):
        if len(shares) < len(percents):
            print(f"{label} is too small for {', '.join(f'{percent:02d}ss' for percent in percents[len(shares) :])}")


def warn_of_lopsided(labels: Sequence[str], patches: Sequence[Patch]) -> None:
    """Say where fine-tuning on a cluster would repeat pretraining, or learn one slide."""
    train = [(label, patch.slide) for label, patch in zip(labels, patches) if patch.split == TRAIN_SPLIT]
    sizes = Counter(label for label, _ in train if label != NOISE)
    for label, size in sizes.most_common():
        slides = {slide for other, slide in train if other == label}
        if size > LARGE * len(train):
            share = f"{size / len(train):.0%} of the training patches"
            print(f"WARNING: {label} holds {share}: fine-tuning on it repeats pretraining")
        if len(slides) == 1 and len(sizes) < len({slide for _, slide in train}):
            print(f"WARNING: {label} is of slide {min(slides)} alone")


if __name__ == "__main__":
    cli.run(main)
