"""Measure fields that image_sample.py --field True has made: whether windows can be told in them, whether batches and
the order of windows matter, and what memory they take.

    python scripts/benchmarks/measure_fields.py RESULTS [--side PX] [--memory 256,1024] [--picture field.jpg]

RESULTS is a results folder, whose run.json names checkpoint and flags. Prints
  seams     the mean difference of neighbouring pixels across the borders of windows, over that elsewhere; beside it the
            same of the real images that lent their colours and are of the fields' size, which have no windows;
  equality  the largest difference of a --side px part of the first field, sampled with the run's own checkpoint, when
            windows are denoised in batches of 3 rather than 16, and in reverse order; the image's range is 2;
  memory    the largest resident memory in one step of fields of these sides, above that of one of 4 windows. The model
            is left out, which sees a batch of windows whatever the field; so are cached conditions, which are kept as
            far as memory allows and no farther.
--picture draws the first field: its nuclei's outlines, the field, and, small, the image that lent its colours.
"""

import argparse
import json
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch as th
from PIL import Image

from guided_diffusion import checkpoint, cli, files
from guided_diffusion.conditioning import instance_edges
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.histology.evaluation.runs import Sample, find_runs
from guided_diffusion.image_files import read_image, read_inst_mask
from guided_diffusion.pictures import GAP
from guided_diffusion.results import RUN
from guided_diffusion.sampling_plan import SamplingPlan, process_for
from guided_diffusion.script_util import condition_spec, create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.sweep import find_checkpoints, parse_scales
from guided_diffusion.unet import UNetModel
from guided_diffusion.windows import Fields, count_windows, starts


def load_parts(flags: dict) -> tuple[UNetModel, GaussianDiffusion]:
    """:return: the run's model, without its weights, and diffusion process."""
    return create_model_and_diffusion(**{n: flags[n] for n in model_and_diffusion_defaults() if n in flags})


def load(flags: dict) -> tuple[UNetModel, SamplingPlan]:
    """:return: the run's model and how it sampled, at its first guidance scale."""
    model, diffusion = load_parts(flags)
    checkpoint.load_weights(model, find_checkpoints(flags["model_path"])[0])
    model.place(th.device("cpu"))
    process = process_for(flags["sampler"], diffusion, flags["num_steps"])
    scale = parse_scales(flags["s"])[0].s
    return model.eval(), SamplingPlan(flags["sampler"], process, scale, channels=flags["in_channels"])


def border_ratio(image: np.ndarray, size: int, overlap: float) -> float:
    """Of an [H x W x C] image: across borders of windows over elsewhere, rows and columns alike."""
    ratios = []
    for side in (0, 1):
        length = image.shape[side]
        places = starts(length, size, overlap)
        borders = sorted({edge - 1 for place in places for edge in (place, place + size)} - {-1, length - 1})
        steps = np.abs(np.diff(image.astype(float), axis=side)).mean(axis=(1 - side, 2))
        ratios.append(steps[borders].mean() / np.delete(steps, borders).mean() if borders else np.nan)
    return float(np.mean(ratios))


def print_seams(samples: Sequence[Sample], flags: dict) -> None:
    print("| field | px | seams | seams of the real image |\n|---|---|---|---|")
    windows = flags["image_size"], flags["window_overlap"]
    for sample in samples:
        made, real = read_image(sample.sample), read_image(sample.appearance)
        control = f"{border_ratio(real, *windows):.3f}" if real.shape == made.shape else ""
        size = f"{made.shape[1]} x {made.shape[0]}"
        print(f"| {sample.stem} | {size} | {border_ratio(made, *windows):.3f} | {control} |")


def print_equality(sample: Sample, flags: dict, side: int) -> None:
    model, plan = load(flags)
    spec = condition_spec(flags)
    inst_map, image = read_inst_mask(sample.inst_mask)[:side, :side], read_image(sample.appearance)
    generator = th.Generator().manual_seed(0)
    parts = spec.encode(image.transpose(2, 0, 1), inst_map > 0, inst_map, generator)
    y = spec.assemble({name: th.from_numpy(part)[None] for name, part in parts.items()})[0]
    null = spec.null(th.empty(1, spec.channels, model.image_size, model.image_size))

    def field(batch_size: int, reverse: bool = False) -> th.Tensor:
        fields = Fields([y.shape[1:]], model.image_size, flags["window_overlap"], batch_size)
        if reverse:
            fields.batches = [batch[::-1] for batch in fields.batches[::-1]]
        (made,) = plan.sample_fields(model, fields, lambda batch: (fields.cut([y], batch), null), [0], progress=True)
        return made

    first = field(16)
    others = {"in batches of 3": field(3), "in reverse order": field(16, reverse=True)}
    for what, other in others.items():
        print(f"{side} px field, windows {what}: largest difference {float((first - other).abs().max()):.1e}")


def draw(sample: Sample, path: Path) -> None:
    """Draw a field beside its structure and its appearance."""
    made, real = (Image.fromarray(read_image(file)) for file in (sample.sample, sample.appearance))
    real.thumbnail((made.width // 4, made.height // 4))
    picture = Image.new("RGB", (2 * made.width + real.width + 2 * GAP, made.height), "white")
    picture.paste(Image.fromarray(instance_edges(read_inst_mask(sample.inst_mask))), (0, 0))
    picture.paste(made, (made.width + GAP, 0))
    picture.paste(real, (2 * (made.width + GAP), 0))
    with files.writing(path) as file:
        picture.save(file, format="JPEG", quality=85)


def peak(flags: dict, side: int) -> tuple[int, int]:
    """:return: the largest resident memory in bytes after one step of a field of 4 windows, and of one of this side."""
    _, diffusion = load_parts(flags)
    plan = SamplingPlan(flags["sampler"], process_for("ddim", diffusion, 1), channels=flags["in_channels"])
    outputs = 2 * flags["in_channels"] if flags["learn_sigma"] else flags["in_channels"]
    used = []
    for one in (3 * flags["image_size"] // 2, side):
        fields = Fields([(one, one)], flags["image_size"], flags["window_overlap"], 16)
        y = th.zeros(condition_spec(flags).channels, one, one)
        plan.sample_fields(
            lambda x, t, y: y[:, :1].expand(-1, outputs, -1, -1),
            fields,
            lambda batch, fields=fields, y=y: (fields.cut([y], batch), None),
            [0],
            progress=True,
        )
        used.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return used[0], used[1]


def print_memory(flags: dict, sides: Sequence[int]) -> None:
    print("| side, px | windows | memory, MiB | bytes a pixel |\n|---|---|---|---|")
    for side in sides:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # whose peak is of this side alone
            alone, used = fresh.submit(peak, flags, side).result()
        count = count_windows(side, side, flags["image_size"], flags["window_overlap"])
        print(f"| {side} | {count} | {(used - alone) / 2**20:.1f} | {(used - alone) / side**2:.0f} |")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("results", metavar="RESULTS", type=Path, help="results folder of --field True")
    parser.add_argument("--side", type=int, help="px of the part that is sampled again, else two windows'; 0: none")
    parser.add_argument("--memory", default="256,1024", help="sides of fields, in px; empty: none")
    parser.add_argument("--picture", type=Path, help="file to draw to")
    args: argparse.Namespace = parser.parse_args(argv)
    runs = find_runs([args.results])
    if len(runs) > 1:
        raise ValueError(f"{args.results} holds {len(runs)} folders of samples: give one of them")
    flags = json.loads((args.results / RUN).read_text())
    if not flags["field"]:
        raise ValueError(f"{args.results} holds no fields: sample with --field True")
    size, (run,) = flags["image_size"], runs
    side = 2 * size if args.side is None else args.side
    sides = parse_sides(args.memory)
    if (side and side < size) or any(one < size for one in sides):
        raise ValueError(f"--side {side} and --memory {args.memory} must be at least a window's {size} px")
    print_seams(run.samples, flags)
    print()
    if args.picture:
        draw(run.samples[0], args.picture)
    if side:
        print_equality(run.samples[0], flags, side)
    if sides:
        print_memory(flags, sides)


def parse_sides(text: str) -> list[int]:
    """:return: the numbers of --memory; :raises ValueError: where one is none."""
    parts = text.split(",") if text else []
    for part in parts:
        if not part.isdecimal():
            raise ValueError(f"--memory {text}: {part!r} is not a number of px")
    return list(map(int, parts))


if __name__ == "__main__":
    cli.run(main)
