"""
Score synthetic patches by how far they are from real ones, and link those that look real.

    python scripts/filter_ood.py --data_dir DATA --synthetic RESULTS... --results_path OUT
        [--backbone efficientnet_lite0] [--mode threshold|weights|top_n|useful] [--tau 0.95] [--top_n N]
        [--quantile 0.95] [--model_path SEGMENTER [--useful_bounds 0.2,0.7]]

A sample is scored (PatchCore, Roth et al. 2022) without the slides of its structure and its appearance, and held
against real patches of these very slides, scored without them too: samples as good as real patches have an AUROC of
0.5, however few the slides. Masks are not looked at, so DATA may be a plain folder of images; give all slides that lent
their colours. A sample larger than the real patches is cut into such: its score is their mean. Modes:

    threshold   keep scores up to the --tau quantile of those real patches' scores
    weights     weight 1 - s of scores clipped at their --quantile and scaled to [0, 1]; keep what has a weight above 0
    top_n       keep the --top_n lowest
    useful      of what threshold keeps, that with which a segmenter agrees in part: from what it has still to learn.
                Its AJI with the sample's mask lies within --useful_bounds

RESULTS is a results folder (samples/ and inst_masks/) or a sweep of them. OUT gets scores.csv (raw scores, comparable
between runs with equal --data_dir, --backbone and --seed), kept/ (a results folder of relative links, with a manifest),
ood.png and, last, report.json. Run again, it replaces these and nothing else.
"""

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch as th

from guided_diffusion import cell_classes, cli, magnification, progress, results
from guided_diffusion.bridge import load_backbone
from guided_diffusion.cell_classes import CellClass
from guided_diffusion.devices import PRECISIONS, UNSCALED, find_device
from guided_diffusion.files import check_apart, claimed, csv_text, list_files, replace_folder, write_bytes, write_text
from guided_diffusion.histology.assembly import Kept, is_kept, write_kept
from guided_diffusion.histology.evaluation.runs import Run, Sample, add_run_flags, find_runs, slides_of_sample
from guided_diffusion.histology.features.backbones import Backbone
from guided_diffusion.histology.filtering import comparison, patchcore
from guided_diffusion.histology.filtering.picture import SHOWN, Scored, draw_scores
from guided_diffusion.histology.segmenter.agreement import agreement_of
from guided_diffusion.histology.segmenter.decoding import Segmenter, load_segmenter
from guided_diffusion.histology.slides.annotations import TRAIN_SPLIT
from guided_diffusion.image_files import EXTENSIONS, check_image, read_image, read_inst_mask
from guided_diffusion.images import check_complete
from guided_diffusion.options import SIZE, check_ranges, str2bool
from guided_diffusion.slides import slides_of
from guided_diffusion.windows import tiles

REPORT = "report.json"
SCORE_FIELDS = ("path", "run", "stem", "score", "weight", "agreement", "kept")


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    bounds = check_flags(args)
    segmenter = load_segmenter(args.model_path, find_device(args.device)) if args.model_path else None
    real = find_real(args.real)
    runs = find_runs(args.synthetic)
    check_out(args)
    classes = shared_classes(runs)
    names = slides_of(args.real, real)
    known, slides = np.unique(names, return_inverse=True)
    folds = comparison.deal_folds(known.tolist(), args.held_out, args.seed)
    samples = [(run, sample) for run in runs for sample in run.samples]
    by_stem = {path.stem: name for path, name in zip(real, names)}
    origins = find_origins([sample for _, sample in samples], by_stem, known.tolist(), folds, args.real)
    if args.top_n is not None and args.top_n > len(samples):
        raise ValueError(f"--top_n {args.top_n} is more than the {len(samples)} samples in --synthetic: give less")
    patches, parts = find_patches(real, [sample.sample for _, sample in samples])
    extractor = Extractor(args)

    features = extractor.all_of(patches, "real")
    memory = fit(features, folds[slides], args)
    scores, worst = score(extractor, memory, parts, origins, args.reweight)
    compared = comparison.compare(memory, scores, origins, features, slides, folds, args.reweight)
    threshold = float(compared.quantile(args.tau))
    weight = comparison.weights(scores, args.quantile)
    kept = comparison.keep(args.mode, scores, weight, threshold, args.top_n)
    agreement, kept = useful(segmenter, bounds, [sample for _, sample in samples], kept)
    judged = [Kept(*pair, float(s), float(w)) for pair, s, w in zip(samples, scores, weight)]

    unknown = int(origins.unknown.sum())
    report = {
        "settings": vars(args),
        "backbone": extractor.backbone.name,
        "weight_hash": extractor.backbone.weight_hash,
        "auroc": compared.auroc(),
        "threshold": threshold,
        "kept": int(kept.sum()),
        "kept_share": float(kept.mean()),
        "synthetic": len(scores),
        "of_unknown_slides": unknown,
        "real": {
            "patches": len(real),
            "slides": len(known),
            "folds": len(memory.banks),
            "bank": sum(map(len, memory.banks)),
            "scores": summary(compared.quantile),
        },
        "runs": by_run([run.name for run, _ in samples], compared, kept),
    }
    picture = draw(extractor, memory, judged, worst, origins, compared, report)
    with claimed(args.out, "--results_path"):
        write_out(args.out, judged, agreement, kept, picture, report, classes, several=len(runs) > 1)
    print(f"{args.out}: kept {kept.sum()} of {len(kept)}, threshold {threshold:.4g}, AUROC {report['auroc']:.3f}")
    if unknown:
        print(
            f"{unknown} samples are of slides that --data_dir {args.real} does not have, and compared with others: for "
            "an AUROC that says something, give patches of theirs, too (no masks needed)"
        )
    if not kept.any():
        print("no sample looks real enough: kept/ is empty")


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    add_run_flags(parser, "data folder, or a folder of images", "folder to write to")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="see extract_features.py; all but stain")
    parser.add_argument("--neighbourhood", type=int, default=patchcore.NEIGHBOURHOOD, help="cells a side")
    parser.add_argument("--stride", type=int, default=patchcore.STRIDE, help="cells between neighbourhoods")
    parser.add_argument("--fraction", type=float, default=0.1, help="share of real vectors in the bank")
    parser.add_argument("--max_bank", type=int, default=50_000, help="vectors in the bank at most")
    parser.add_argument(
        "--val_share",
        "--held_out",
        dest="held_out",
        type=float,
        default=comparison.SHARE,
        help="share of the real slides that are left out with a sample's own",
    )
    parser.add_argument("--mode", default="threshold", help=f"{', '.join(comparison.MODES)}; see above")
    parser.add_argument("--tau", type=float, default=0.95, help="quantile that is the threshold")
    parser.add_argument("--top_n", type=int, help="samples to keep with --mode top_n")
    parser.add_argument("--quantile", type=float, default=0.95, help="scores are clipped at for weights")
    parser.add_argument("--model_path", "--segmenter", metavar="MODEL", type=Path, help="segmenter of --mode useful")
    parser.add_argument("--useful_bounds", default="0.2,0.7", metavar="LOW,HIGH", help="of its AJI, in [0, 1]")
    parser.add_argument("--reweight", type=str2bool, default=False, help="re-weight scores by equation 7 of the paper")
    parser.add_argument("--seed", type=int, default=0, help="of the folds of slides and the projection")
    parser.add_argument("--batch_size", type=int, default=32, help="images at once")
    parser.add_argument("--precision", choices=UNSCALED, default="fp32", help="of the network's products")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    return parser


def check_flags(args: argparse.Namespace) -> tuple[float, float]:
    """:return: the two numbers in --useful_bounds. :raises ValueError: where flags do not go together."""
    if args.mode not in comparison.MODES:
        raise ValueError(f"unknown --mode {args.mode}: choose one of {', '.join(comparison.MODES)}")
    if (args.mode == "top_n") != (args.top_n is not None):
        raise ValueError(
            f"--mode {args.mode} with --top_n {args.top_n}: give --top_n N with --mode top_n, and only there"
        )
    check_ranges(vars(args), batch_size=SIZE, max_bank="[1, inf)", top_n="[1, inf)", seed="[0, inf)")
    check_ranges(vars(args), fraction="(0, 1]", tau="(0, 1]", quantile="(0, 1]")
    check_ranges({"val_share": args.held_out}, val_share="(0, 1)")
    patchcore.check_windows(args.neighbourhood, args.stride)
    if (args.mode == "useful") != (args.model_path is not None):
        raise ValueError(f"--mode {args.mode} with --model_path {args.model_path}: give it with useful, and only there")
    try:
        low, high = map(float, args.useful_bounds.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--useful_bounds {args.useful_bounds}: give two numbers in [0, 1] such as 0.2,0.7")
    return low, high


def check_out(args: argparse.Namespace) -> None:
    """Refuse a --results_path among the inputs, or with a kept/ that another program made."""
    kept = args.out / "kept"
    check_apart(args.out, [args.real, *args.synthetic], kept)
    if os.path.lexists(kept) and not is_kept(kept):
        raise ValueError(f"--results_path {args.out} holds a kept/ that is not of this command: give another folder")


def find_real(folder: Path) -> list[Path]:
    """:return: the training images of a data folder, or the images of a plain one, sorted."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_dir {folder} is not a folder: give a data folder, or a folder of images")
    check_complete(folder, "--data_dir")
    images = folder / TRAIN_SPLIT / "images"
    files = [Path(file) for file in list_files(images if images.is_dir() else folder, EXTENSIONS, images.is_dir())]
    if not files:
        raise ValueError(f"--data_dir {folder} holds no image, nor {TRAIN_SPLIT}/images that does: give real patches")
    return files


def find_origins(
    samples: Sequence[Sample], by_stem: dict[str, str], known: list[str], folds: np.ndarray, real: Path
) -> comparison.Origins:
    """
    :param by_stem: a real patch's name -> its slide.
    :return: which of the real slides the samples come from.
    :raises ValueError: where no slide would be left to compare one with.
    """
    if len(known) < 2:
        raise ValueError(
            f"--data_dir {real} has patches of {len(known)} slide ({known[0]}): samples are compared with other slides "
            "than theirs, so give at least 3"
        )
    pairs = [slides_of_sample(sample, by_stem) for sample in samples]
    # Of a sample without a manifest only the appearance is known.
    pairs = [(structure or appearance, appearance) for structure, appearance in pairs]
    origins = comparison.Origins.of(pairs, known, folds)
    bare = np.flatnonzero((origins.slides >= 0).sum(1) == len(known))
    if len(bare):
        raise ValueError(
            f"{samples[bare[0]].sample} is made of slides {' and '.join(known)}, and --data_dir {real} has no other to "
            "compare it with: give patches of at least 3 slides"
        )
    return origins


@dataclass(frozen=True)
class Patch:
    """An image, or a part of it: its rows and columns."""

    file: Path
    part: tuple[slice, ...] = ()

    def read(self) -> np.ndarray:
        """:return: [H x W x 3] uint8."""
        return read_image(self.file)[self.part]


def find_patches(real: Sequence[Path], synthetic: Sequence[Path]) -> tuple[list[Patch], list[list[Patch]]]:
    """
    :return: the real patches, and for each sample those of their size that cover it: a bank compares like with like.
    :raises ValueError: where a file cannot be read, real patches differ in size, or a sample is smaller than they.
    """
    files = [*real, *synthetic]
    with ThreadPoolExecutor(2) as pool:
        sizes = list(progress.bar(pool.map(check_image, files), "checking", len(files), leave=False))
    for number, (file, found) in enumerate(zip(files, sizes)):
        if found != sizes[0] and (number < len(real) or min(np.subtract(found, sizes[0])) < 0):
            first, other = (" x ".join(map(str, pair)) for pair in (sizes[0], found))
            wanted = "patches must be of one size" if number < len(real) else "a sample must be as large at least"
            raise ValueError(f"{file} is {other} px, {files[0]} {first}: {wanted}")
    cuts = (tiles(found[::-1], sizes[0][::-1]) for found in sizes[len(real) :])
    return list(map(Patch, real)), [[Patch(file, cut) for cut in own] for file, own in zip(synthetic, cuts)]


class Extractor:
    """A backbone and how its maps become local features."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = find_device(args.device)
        self.backbone: Backbone = load_backbone(args.backbone, self.device, PRECISIONS[args.precision])
        self.batch_size = args.batch_size
        self.windows = (args.neighbourhood, args.stride)
        self.grid = (0, 0)

    def batches(self, patches: Sequence[Patch], what: str) -> Iterator[th.Tensor]:
        """:return: [N x P x D] local features, batch by batch, the next one's images being read meanwhile."""
        starts = range(0, len(patches), self.batch_size)
        bar = progress.bar(desc=what, total=len(patches), unit="image", disable=len(patches) <= 2 * SHOWN)
        with ThreadPoolExecutor(2) as pool, bar:
            waiting: deque = deque()
            for start in [*starts, None]:
                if start is not None:
                    some = patches[start : start + self.batch_size]
                    waiting.append((some, [pool.submit(patch.read) for patch in some]))
                while len(waiting) > (1 if start is not None else 0):
                    some, images = waiting.popleft()
                    yield self._features(some, np.stack([image.result() for image in images]))
                    bar.update(len(some))

    def all_of(self, patches: Sequence[Patch], what: str) -> th.Tensor:
        """:return: [N x P x D] local features of all patches."""
        room, filled = th.empty(0), 0
        for batch in self.batches(patches, what):
            if not filled:
                room = th.empty(len(patches), *batch.shape[1:], device=batch.device)
            room[filled : filled + len(batch)] = batch
            filled += len(batch)
        return room

    def _features(self, patches: Sequence[Patch], images: np.ndarray) -> th.Tensor:
        features, self.grid = patchcore.local_features(self.backbone.maps(images), *self.windows)
        bad = ~features.isfinite().flatten(1).all(1)
        if bad.any():
            name = patches[int(bad.nonzero()[0])].file
            raise ValueError(f"the features of {name} are not finite: use --precision fp32, or another --backbone")
        return features


def fit(features: th.Tensor, parts: np.ndarray, args: argparse.Namespace) -> patchcore.Memory:
    """:param parts: [N] int64, the fold of each real patch."""
    total = sum(patchcore.bank_sizes(parts, features.shape[1], args.fraction, args.max_bank))
    with progress.bar(desc="coreset", total=total, unit="vector") as bar:
        return patchcore.Memory.fit(features, parts, args.fraction, args.max_bank, args.seed, bar.update)


def score(
    extractor: Extractor,
    memory: patchcore.Memory,
    parts: Sequence[Sequence[Patch]],
    origins: comparison.Origins,
    reweight: bool,
) -> tuple[np.ndarray, list[Patch]]:
    """
    :param parts: the patches that cover each of N samples.
    :return: an [N] float64 array of the samples' scores, the means of their patches'; and each one's worst patch.
    """
    patches = [patch for own in parts for patch in own]
    sample = np.repeat(np.arange(len(parts)), [len(own) for own in parts])
    order = np.argsort(origins.group[sample], kind="stable")
    found = np.empty(len(patches))
    start = 0
    for batch in extractor.batches([patches[i] for i in order], "synthetic"):
        rows = order[start : start + len(batch)]
        found[rows] = comparison.score(memory, origins, sample[rows], batch, reweight)
        start += len(batch)
    own = np.split(found, np.flatnonzero(np.diff(sample)) + 1)
    return np.array([part.mean() for part in own]), [p[int(f.argmax())] for p, f in zip(parts, own)]


def useful(
    segmenter: Segmenter | None, bounds: tuple[float, float], samples: Sequence[Sample], kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    :param kept: [N] bool, the samples that look real.
    :return: [N] float64, how well the segmenter finds the nuclei of these, in [0, 1], nan of the others; and those of
        them with which it agrees within the bounds. Without a segmenter, all of them.
    """
    agreement = np.full(len(samples), np.nan)
    if segmenter is None:
        return agreement, kept
    if line := magnification.mismatch("--model_path", segmenter.mpp, samples[0].sample.parent):
        print(line)
    for number in progress.bar(np.flatnonzero(kept), "segmenting", leave=False):
        own = samples[number]
        agreement[number] = agreement_of(segmenter, read_image(own.sample), read_inst_mask(own.inst_mask))
    return agreement, (bounds[0] <= agreement) & (agreement <= bounds[1])


def draw(
    extractor: Extractor,
    memory: patchcore.Memory,
    judged: list[Kept],
    worst: Sequence[Patch],
    origins: comparison.Origins,
    compared: comparison.Comparison,
    report: dict,
) -> bytes:
    """Draw ood.png; of a sample of several patches the worst."""
    order = np.argsort(compared.scores, kind="stable")
    ends = []
    for chosen in (order[:SHOWN], order[::-1][:SHOWN]):
        items = [judged[i] for i in chosen]
        patches = [worst[i] for i in chosen]
        cores = [memory.without(origins.groups[origins.group[i]].tolist()) for i in chosen]
        features = extractor.all_of(patches, "maps")
        maps = [core.distances(own[None])[0].cpu().numpy() for core, own in zip(cores, features)]
        captions = [f"{item.run.name[-24:]}\n{item.sample.stem[-24:]}" for item in items]
        parts = zip((patch.read() for patch in patches), maps, (item.score for item in items), captions)
        ends.append([Scored(image, row.reshape(extractor.grid), *rest) for image, row, *rest in parts])
    title = (
        f"{len(judged)} synthetic patches, {report['backbone']}: AUROC against real ones of their slides "
        f"{report['auroc']:.3f}, kept {report['kept']} ({report['kept_share']:.0%})"
    )
    return draw_scores(*compared.pooled, compared.scores, report["threshold"], *ends, title)


def shared_classes(runs: Sequence[Run]) -> list[CellClass] | None:
    """:return: the classes of the samples' cells; None where some have none. :raises ValueError: where they differ."""
    paths = [run.path for run in runs]
    return cell_classes.shared(paths) if all((path / cell_classes.FOLDER).is_dir() for path in paths) else None


def write_out(
    out: Path,
    judged: list[Kept],
    agreement: np.ndarray,
    kept: np.ndarray,
    picture: bytes,
    report: dict,
    classes: list[CellClass] | None,
    several: bool,
) -> None:
    """Write all files, the report last: where it is, the others are of the same run."""
    (out / REPORT).unlink(missing_ok=True)
    chosen = [item for item, keeps in zip(judged, kept) if keeps]
    folders = results.FOLDERS if classes is None else (*results.FOLDERS, cell_classes.FOLDER)

    def write(folder: Path) -> None:
        write_kept(folder, chosen, folders, results.MANIFEST_FIELDS, several)
        if classes:
            cell_classes.write_classes(folder, classes)

    replace_folder(out / "kept", write, "--results_path")
    rows = [
        {
            "path": Path(os.path.relpath(item.sample.sample.absolute(), out.absolute())).as_posix(),
            "run": item.run.name,
            "stem": item.sample.stem,
            "score": item.score,
            "weight": item.weight,
            "agreement": "" if np.isnan(agrees) else float(agrees),
            "kept": bool(keeps),
        }
        for item, agrees, keeps in zip(judged, agreement, kept)
    ]
    write_text(out / "scores.csv", csv_text(SCORE_FIELDS, rows))
    write_bytes(out / "ood.png", picture)
    write_text(out / REPORT, json.dumps(report, indent=1, default=str) + "\n")


def by_run(names: list[str], compared: comparison.Comparison, kept: np.ndarray) -> dict[str, dict]:
    """What report.json says of each run."""
    rows = np.array(names)
    return {
        name: {
            "synthetic": int((rows == name).sum()),
            "kept": int(kept[rows == name].sum()),
            "kept_share": float(kept[rows == name].mean()),
            "auroc": compared.auroc(rows == name),
            "scores": summary(partial(np.quantile, compared.scores[rows == name])),
        }
        for name in dict.fromkeys(names)
    }


def summary(quantile: Callable[[Sequence[float]], np.ndarray]) -> dict[str, float]:
    """:param quantile: gives those of some scores."""
    return dict(zip(("min", "median", "max"), quantile((0, 0.5, 1)).tolist()))


if __name__ == "__main__":
    cli.run(main)
