"""Measure how long a training with many images without masks takes to its first step, and its memory over an epoch.

    python scripts/benchmarks/benchmark_startup.py [--images 100000] [--num_workers 2] [--batch_size 64] [--folder F]

The images are 128 px crops of a toy slide, written into a temporary folder, or into F, where they stay for the next
time, of as many or more. image_train.py is started on them with a small model, as a process of its own; time counts
from there to the first line of its log. Then one epoch is read as training reads it, and memory is that of the reading
process and its workers together, pages that they share counted once (proportional set size).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from guided_diffusion import cli
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.data_stream import stream
from guided_diffusion.histology.slides.toy import draw_slide
from guided_diffusion.image_datasets import load_dataset
from guided_diffusion.options import check_ranges

SPEC = ConditionSpec(use_hv_map=True, use_col_map=True, num_classes=6, mark_unknown=True)
IMAGE_SIZE, SLIDE_SIZE = 128, 1024  # px
SHARE = 0.99  # of the samples that have no masks, in the epoch
MODEL = (
    "--num_channels 32 --channel_mult 1,1,1,1,1 --num_res_blocks 1 --attention_resolutions 8 --num_head_channels 16 "
    "--num_classes 6 --use_hv_map True --use_col_map True --max_steps 1 --log_interval 1 --preview_samples 0"
).split()


def write_labelled(root: Path) -> Path:
    """Cut a toy slide into patches with masks; :return: the folder of images without masks beside them."""
    slide = draw_slide([0, 0], SLIDE_SIZE, 0)
    corners = [(r, c) for r in range(0, SLIDE_SIZE, IMAGE_SIZE) for c in range(0, SLIDE_SIZE, IMAGE_SIZE)]
    for name, array, suffix in (("images", slide.image, "png"), ("inst_masks", slide.inst_map, "tif")):
        folder = root / "MoNuSegTrainingData" / name
        folder.mkdir(parents=True, exist_ok=True)
        for patch, (row, column) in enumerate(corners):
            crop = array[row : row + IMAGE_SIZE, column : column + IMAGE_SIZE]
            Image.fromarray(crop).save(folder / f"slide_{patch:03d}.{suffix}")
    (root / "unlabelled").mkdir(exist_ok=True)
    return root / "unlabelled"


def write_unlabelled(folder: Path, count: int) -> None:
    """
    Write those that are not there yet, each a random crop of another toy slide in slightly other colours.

    :raises ValueError: where there are more.
    """
    there = len(list(folder.iterdir()))
    if there > count:
        raise ValueError(f"{folder} holds {there} images already: give --images {there} or more, or another --folder")
    slide = draw_slide([1, 0], SLIDE_SIZE, 1).image
    for number in tqdm(range(count), desc="drawing", unit="image"):
        path = folder / f"{number // 1000:03d}-{number % 1000:03d}.png"
        if not path.exists():
            rng = np.random.default_rng(number)
            row, column = rng.integers(0, SLIDE_SIZE - IMAGE_SIZE, 2)
            crop = slide[row : row + IMAGE_SIZE, column : column + IMAGE_SIZE] * rng.uniform(0.9, 1, 3)
            Image.fromarray(crop.astype(np.uint8)).save(path, compress_level=1)


def seconds_to_first_step(root: Path, unlabelled: Path, num_workers: int) -> float:
    """Start a training; :return: the seconds until it has logged its first step."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "image_train.py"), "--data_dir", str(root), *MODEL]
        command += ["--unlabelled_dir", str(unlabelled), "--image_size", str(IMAGE_SIZE)]
        command += ["--num_workers", str(num_workers), "--batch_size", "4"]
        log = Path(out, "log.txt")
        began = time.perf_counter()
        environment = {**os.environ, "OPENAI_LOGDIR": out, "OPENAI_LOG_FORMAT": "log"}
        training = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while training.poll() is None and not (log.exists() and "\nstep " in log.read_text()):
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        _, errors = training.communicate()
        if training.returncode:
            raise ValueError(f"image_train.py failed: {errors.splitlines()[-1]}")
    return seconds


def memory_mib() -> float:
    """:return: the proportional set size of this process and its children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    sizes = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in ("self", *children)]
    return sum(int(text.split("\nPss:")[1].split()[0]) for text in sizes) / 1024


def create_argparser() -> argparse.ArgumentParser:
    """:return: a parser of every flag, with its default."""
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="images without masks")
    parser.add_argument("--num_workers", "--workers", type=int, default=2, help="processes that read")
    parser.add_argument("--batch_size", "--batch", type=int, default=64, help="of the epoch that is read")
    parser.add_argument("--folder", type=Path, help="where to write the images; else a temporary one")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write, measure, print."""
    args = create_argparser().parse_args(argv)
    check_ranges(vars(args), images="[1, inf)", batch_size="[1, inf)", num_workers="[0, inf)")
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        unlabelled = write_labelled(root)
        write_unlabelled(unlabelled, args.images)
        seconds = seconds_to_first_step(root, unlabelled, args.num_workers)
        print(f"{args.images} images without masks: the first step ends {seconds:.1f} s after the start", flush=True)
        folders = dict(data_dir=str(root), unlabelled_dir=str(unlabelled), dataset_mode="monuseg")
        dataset = load_dataset(**folders, image_size=IMAGE_SIZE, spec=SPEC, ids=False)
        data = stream(dataset, args.batch_size, num_workers=args.num_workers, unlabelled_share=SHARE)
        batches = max(10, int(args.images / SHARE / args.batch_size))
        tenths = {round(share * batches / 10) for share in range(1, 11)}
        print("| share of the epoch | memory, MiB | images/s |\n|---|---|---|")
        began = time.perf_counter()
        for number in range(batches + 1):
            next(data)
            if number in tenths:
                rate = number * args.batch_size / (time.perf_counter() - began)
                print(f"| {number / batches:.0%} | {memory_mib():.0f} | {rate:.0f} |", flush=True)
        data.close()


if __name__ == "__main__":
    cli.run(main)
