"""Measure what training's savings bring, each row against a plain loop in the same run.

    python scripts/benchmarks/benchmark_training.py
        [--config tiny|small|readme] [--batch_size 2 8] [--max_steps 4] [--repeats 3] [--compile True]

The plain loop computes in fp32 on a CPU and in fp16 on a GPU, in NCHW, with SPADE and attention in their textbook form
(plain_path.py), attention always checkpointed, weights cast at every use, optimiser and averages looping over tensors,
and batches made in the main thread as they are needed; freed memory is the C library's business. One way at a time is
in memory: each repeat builds them all in turn, and times are medians over the repeats, so that a busy machine slows all
rows alike.
"""

import argparse
import contextlib
import gc
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch as th
from PIL import Image
from plain_path import arithmetic, make_plain
from tqdm.auto import tqdm

from guided_diffusion import cli, logger
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.data_stream import stream
from guided_diffusion.devices import find_device, has_bf16, keep_memory, prepare_training
from guided_diffusion.ema import Ema
from guided_diffusion.histology.slides.toy import draw_slide
from guided_diffusion.image_datasets import load_dataset
from guided_diffusion.options import check_ranges
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults, str2bool
from guided_diffusion.train_options import TrainOptions
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.unet import AttentionBlock, UNetModel

CONFIGS = {
    "tiny": dict(image_size=64, num_channels=32, num_res_blocks=1, attention_resolutions="8", channel_mult="1,1"),
    "small": dict(image_size=64, num_channels=64, num_res_blocks=2, attention_resolutions="32,16,8"),
    "readme": dict(image_size=128, num_channels=128, num_res_blocks=2, attention_resolutions="32,16,8"),
}
SPEC = ConditionSpec(use_hv_map=True, use_col_map=True, num_classes=6)
# Dense bf16 or fp16 operations a second of known cards, without sparsity, to state a share of.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


class PlainLoop(TrainLoop):
    """The loop with optimiser, averages and casts tensor by tensor, waiting for the device after every step."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.model.parameters_cast = contextlib.nullcontext
        self.opt = th.optim.AdamW(self.model.parameters(), lr=self.options.lr, foreach=False, fused=False)
        self.averages = [PlainEma(self.model, rate) for rate in self.options.ema_rates]

    def run_step(self, batch: th.Tensor, cond: dict) -> None:
        super().run_step(batch, cond)
        self.meter.read()


class PlainEma(Ema):
    """An average that moves tensor by tensor."""

    @th.no_grad()
    def update(self, step: int, taken: th.Tensor | None = None) -> None:
        for average, p in zip(self.params, self.model.parameters()):
            average.mul_(self.rate).add_(p, alpha=1 - self.rate)


@dataclass
class Way:
    """
    One way to train, and what was measured of it.

    :param textbook: SPADE and attention in their textbook form, attention always checkpointed.
    :param plain_loop: by PlainLoop.
    :param keep_memory: see devices.keep_memory.
    :param workers: processes that make batches.
    """

    name: str
    dtype: th.dtype
    textbook: bool = False
    plain_loop: bool = False
    keep_memory: bool = True
    channels_last: bool = True
    workers: int = 1
    compiled: bool = False
    seconds: list[float] = field(default_factory=list)  # a step
    waits: list[float] = field(default_factory=list)  # the share of them that is waiting for data
    memory: float = 0.0  # MiB
    flops: int = 0  # of a step, forward and backward

    def make_model(self, config: dict, device: th.device) -> UNetModel:
        """:return: a U-Net to train; the same weights for every call."""
        th.manual_seed(0)
        model, _ = create_model_and_diffusion(**model_flags(config))
        model.place(device, self.compiled)
        model.convert_to(self.dtype)
        if self.textbook:
            make_plain(model)
            for layer in model.modules():
                if isinstance(layer, AttentionBlock):
                    layer.use_checkpoint = True
        return model.to(memory_format=th.channels_last if self.channels_last else th.contiguous_format)


@dataclass
class Bench:
    """What all ways train on."""

    config: dict
    batch: int
    data_dir: str
    device: th.device

    def measure(self, way: Way, steps: int) -> None:
        """Build one way, time some steps of it, and let go of it."""
        keep_memory(way.keep_memory)
        _, diffusion = create_model_and_diffusion(**model_flags(self.config))
        size = self.config["image_size"]
        dataset = load_dataset(data_dir=self.data_dir, dataset_mode="monuseg", spec=SPEC, image_size=size, ids=False)
        loop = (PlainLoop if way.plain_loop else TrainLoop)(
            model=way.make_model(self.config, self.device),
            diffusion=diffusion,
            spec=SPEC,
            data=stream(dataset, self.batch, num_workers=way.workers),
            options=TrainOptions(batch_size=self.batch, drop_rate=0.2),
        )
        loop.run_step(*next(loop.data))  # which warms up, and compiles
        with arithmetic() as counter:
            loop.run_step(*next(loop.data))
        way.flops = counter.get_total_flops()
        if self.device.type == "cuda":
            th.cuda.reset_peak_memory_stats()
            th.cuda.synchronize()  # or the rest of the steps above would be timed, too
        began, waited = time.perf_counter(), 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            batch, cond = next(loop.data)
            waited += time.perf_counter() - asked
            loop.run_step(batch, cond)
        loop.meter.read()
        if self.device.type == "cuda":
            th.cuda.synchronize()
            way.memory = th.cuda.max_memory_allocated() / 2**20
        took = time.perf_counter() - began
        way.seconds.append(took / steps)
        way.waits.append(waited / took)


def model_flags(config: dict) -> dict:
    """:return: all flags of a model of the README's kind."""
    flags = dict(num_classes=6, learn_sigma=True, resblock_updown=True, num_head_channels=32, noise_schedule="cosine")
    return {**model_and_diffusion_defaults(), **flags, **config}


def write_patches(root: Path, size: int, count: int = 64) -> str:
    """Draw toy tissue in patches of a size; :return: the data folder."""
    for number in range(count):
        slide = draw_slide([0, number], size, number)
        for name, array, suffix in (("images", slide.image, "png"), ("inst_masks", slide.inst_map, "tif")):
            folder = root / "MoNuSegTrainingData" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / f"slide{number}_000.{suffix}")
    return str(root)


def ways_to_measure(device: th.device, compiled: bool) -> list[Way]:
    """:return: the plain way first."""
    plain = th.float16 if device.type == "cuda" else th.float32
    name = str(plain).removeprefix("torch.")
    as_was = dict(keep_memory=False, channels_last=False, workers=0)
    ways = [
        Way(f"plain {name}", plain, textbook=True, plain_loop=True, **as_was),
        Way("+ our layers, attention kept", plain, plain_loop=True, **as_was),
        Way("+ fused optimiser and averages", plain, **as_was),
        Way("+ memory kept", plain, channels_last=False, workers=0),
        Way("+ data in a worker", plain, channels_last=False),
        Way("+ channels_last", plain),
    ]
    half = [th.bfloat16] if has_bf16(device) else []
    for dtype in half:
        ways += [Way("bfloat16", dtype, channels_last=False), Way("bfloat16, channels_last", dtype)]
    if not half:
        print("no bfloat16 rows: this CPU has no units for it")
    for dtype in dict.fromkeys((plain, *half)) if compiled else ():
        ways.append(Way(f"{str(dtype).removeprefix('torch.')}, channels_last, compiled", dtype, compiled=True))
    return ways


def create_argparser() -> argparse.ArgumentParser:
    """:return: a parser of every flag, with its default."""
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("--config", choices=CONFIGS, default="small", help="the model to measure")
    parser.add_argument(
        "--batch_size", "--batch", type=int, nargs="+", default=[2, 8], help="images a step, a table each"
    )
    parser.add_argument("--max_steps", "--steps", type=int, default=4, help="of each way in a repeat")
    parser.add_argument("--repeats", type=int, default=3, help="over which the median is taken")
    parser.add_argument(
        "--compile", type=str2bool, nargs="?", const=True, default=False, help="measure compiled models, too"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    args = create_argparser().parse_args(argv)
    check_ranges(vars(args), max_steps="[1, inf)", repeats="[1, inf)")
    for batch in args.batch_size:
        check_ranges({"batch_size": batch}, batch_size="[1, inf)")
    logger.set_level(logger.ERROR)
    device = find_device()
    prepare_training(device)
    config = CONFIGS[args.config]
    with tempfile.TemporaryDirectory() as folder:
        data_dir = write_patches(Path(folder), config["image_size"], max(64, *args.batch_size))
        for batch in args.batch_size:
            ways = ways_to_measure(device, args.compile)
            bench = Bench(config, batch, data_dir, device)
            for way in tqdm(ways * args.repeats, unit="way"):
                bench.measure(way, args.max_steps)
                th._dynamo.reset()  # a compiled model stays in memory until then
                gc.collect()  # as do a loop and its workers, which know each other
            report(ways, args.config, batch)


def report(ways: list[Way], config: str, batch: int) -> None:
    """Print the table of a batch size."""
    card = th.cuda.get_device_name() if th.cuda.is_available() else "cpu"
    peak = next((value for key, value in PEAK.items() if key in card), None)
    flops = ways[2].flops
    base = float(np.median(ways[0].seconds))
    print(f"training, {config} configuration, batch {batch}, {card}, {th.get_num_threads()} threads")
    print(f"{flops / batch / 1e9:.0f} GFLOP an image, forward and backward")
    print("| way | images/s | s a step | times plain | data wait | peak memory | share of peak |")
    print("|---|---|---|---|---|---|---|")
    for way in ways:
        seconds = float(np.median(way.seconds))
        memory = f"{way.memory:.0f} MiB" if way.memory else "-"
        share = f"{flops / seconds / peak:.1%}" if peak else "-"
        print(
            f"| {way.name} | {batch / seconds:.2f} | {seconds:.3f} | {base / seconds:.2f} | "
            f"{np.median(way.waits):.1%} | {memory} | {share} |"
        )
    print()


if __name__ == "__main__":
    cli.run(main)
