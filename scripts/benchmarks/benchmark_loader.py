"""Measure how many patches a second the data loader gives, with HV map, colour map and edges.

    python scripts/benchmarks/benchmark_loader.py
        [--num_workers 0 1 2] [--batch_size 64] [--windows 9] [--batches 16] [--threads 1]

The data are toy slides, drawn into a temporary folder: 128 px patches without augmentation, and 256 px ones with it,
from which random 128 px crops are cut, flipped and turned. Every batch goes to the training device, and the condition
is assembled there, edges included, as in training. A rate is the median over windows of --batches batches, after a
warm-up of six epochs or two windows, whichever is longer, in which workers fill their memory; the share of the slowest
to the fastest window says how quiet the machine was.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch as th
from PIL import Image
from tqdm.auto import tqdm

from guided_diffusion import cli
from guided_diffusion.conditioning import ConditionSpec, as_signed
from guided_diffusion.data_stream import stream
from guided_diffusion.devices import find_device
from guided_diffusion.histology.slides.toy import draw_slide
from guided_diffusion.image_datasets import load_dataset
from guided_diffusion.options import check_ranges

SPEC = ConditionSpec(use_hv_map=True, use_col_map=True, num_classes=6)
IMAGE_SIZE = 128
WARM_UP = 6  # epochs, after which each of two workers has read all but 1.6 % of the files once
SLIDE_SIZE = 1280  # px: 100 patches of 128 px, 25 of 256


def write_patches(root: Path, slides: int, sizes: tuple[int, ...]) -> float:
    """
    Draw toy slides and cut each into patches: root/SIZE holds those of each size, in MoNuSeg's layout.

    :return: the mean number of nuclei in a patch of the first size, cut ones included.
    """
    nuclei = []
    for number in tqdm(range(slides), desc="drawing", unit="slide"):
        slide = draw_slide([0, number], SLIDE_SIZE, number)
        for size in sizes:
            folders = [root / str(size) / "MoNuSegTrainingData" / name for name in ("images", "inst_masks")]
            corners = [(r, c) for r in range(0, SLIDE_SIZE, size) for c in range(0, SLIDE_SIZE, size)]
            for patch, (row, column) in enumerate(corners):
                where = slice(row, row + size), slice(column, column + size)
                for folder, array, suffix in zip(folders, (slide.image, slide.inst_map), ("png", "tif")):
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array[where]).save(folder / f"slide{number}_{patch:03d}.{suffix}")
                if size == sizes[0]:
                    nuclei.append(len(np.unique(slide.inst_map[where])) - 1)
    return float(np.mean(nuclei))


def consume(data: Iterator[tuple[th.Tensor, dict]], batches: int, device: th.device) -> float:
    """Take batches as training does; :return: the seconds they took."""
    began = time.perf_counter()
    for _ in range(batches):
        images, cond = next(data)
        as_signed(images.to(device, non_blocking=True))
        SPEC.assemble({k: v.to(device, non_blocking=True) for k, v in cond.items() if th.is_tensor(v)})
    if device.type == "cuda":
        th.cuda.synchronize()
    return time.perf_counter() - began


def create_argparser() -> argparse.ArgumentParser:
    """:return: a parser of every flag, with its default."""
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument(
        "--num_workers", "--workers", type=int, nargs="+", default=[0, 1, 2], help="to measure one by one"
    )
    parser.add_argument("--batch_size", "--batch", type=int, default=64, help="patches a batch")
    parser.add_argument("--windows", type=int, default=9, help="over which the median is taken")
    parser.add_argument("--batches", type=int, default=16, help="batches a window")
    parser.add_argument("--threads", type=int, default=1, help="of this process; more compete with the workers")
    parser.add_argument("--slides", type=int, default=4, help="toy slides to draw, each of 100 patches of 128 px")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    args = create_argparser().parse_args(argv)
    fewest = args.slides * (SLIDE_SIZE // (2 * IMAGE_SIZE)) ** 2
    least = "[1, inf)"
    check_ranges(vars(args), slides=least, windows=least, batches=least, threads=least, batch_size=f"[1, {fewest}]")
    for workers in args.num_workers:
        check_ranges({"num_workers": workers}, num_workers="[0, inf)")
    th.set_num_threads(args.threads)
    device = find_device()
    with tempfile.TemporaryDirectory() as root:
        nuclei = write_patches(Path(root), args.slides, (IMAGE_SIZE, 2 * IMAGE_SIZE))
        print(
            f"{IMAGE_SIZE} px, {nuclei:.0f} nuclei a patch, batch {args.batch_size}, {device.type}, "
            f"{th.get_num_threads()} threads"
        )
        print("| augment | source | workers | patches/s | slowest / fastest window |\n|---|---|---|---|---|")
        for augment in (False, True):
            size = IMAGE_SIZE * (2 if augment else 1)
            count = args.slides * (SLIDE_SIZE // size) ** 2
            for workers in args.num_workers:
                dataset = load_dataset(
                    data_dir=f"{root}/{size}",
                    dataset_mode="monuseg",
                    image_size=IMAGE_SIZE,
                    spec=SPEC,
                    augment=augment,
                    ids=False,
                )
                data = stream(dataset, args.batch_size, num_workers=workers)
                consume(data, max(2 * args.batches, -(-WARM_UP * count // args.batch_size)), device)
                seconds = [consume(data, args.batches, device) for _ in range(args.windows)]
                rates = args.batch_size * args.batches / np.array(seconds)
                print(
                    f"| {'yes' if augment else 'no'} | {count} of {size} px | {workers} | {np.median(rates):.0f} | "
                    f"{rates.min() / rates.max():.2f} |"
                )
                del data  # its workers end here


if __name__ == "__main__":
    cli.run(main)
