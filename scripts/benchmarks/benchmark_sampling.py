"""Measure what sampling's savings bring, each row against the plain path in the same run.

    python scripts/benchmarks/benchmark_sampling.py
        [--config readme|small|tiny] [--batch_size 2] [--repeats 3] [--rounds 2] [--compile True] [--end_to_end 25]

The plain path is two forward passes of the whole U-Net a step, in fp32 on a CPU and in fp16 on a GPU, with SPADE and
attention in their textbook form (plain_path.py). Weights are random: time does not depend on them. One way at a time is
in memory: each round builds them all in turn, and times are medians over all rounds, so that a busy machine slows all
rows alike. --end_to_end also samples one batch with each sampler at that many steps, and with the plain path a
1000-step chain, of which 10 steps are run and the rest is computed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch as th
from plain_path import arithmetic, make_plain
from tqdm.auto import tqdm

from guided_diffusion import cli
from guided_diffusion.devices import find_device, has_bf16
from guided_diffusion.guidance import GuidedModel, Model
from guided_diffusion.options import check_ranges
from guided_diffusion.samplers import SAMPLERS
from guided_diffusion.sampling_plan import SamplingPlan, process_for
from guided_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    str2bool,
)
from guided_diffusion.spade import Condition

CONFIGS = {
    "tiny": dict(image_size=16, num_channels=32, num_res_blocks=1, attention_resolutions="8", channel_mult="1,1"),
    "readme": dict(image_size=128, num_channels=128, num_res_blocks=2, attention_resolutions="32,16,8"),
    "small": dict(image_size=32, num_channels=32, num_res_blocks=1, attention_resolutions="8", channel_mult="1,2,2"),
}
SCALE = 1.5


@dataclass
class Way:
    """
    One way to compute a guided step, and what was measured of it.

    :param textbook: SPADE and attention in their textbook form.
    :param shared: run the encoder once for both branches, and the null condition as one image, whatever the batch.
    :param cached: convolve the conditions once for all steps.
    """

    name: str
    dtype: th.dtype
    textbook: bool = False
    shared: bool = True
    cached: bool = True
    channels_last: bool = False
    compiled: bool = False
    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    memory: str = "-"
    deviation: float = 0.0

    def make_model(self, config: dict, device: th.device) -> Model:
        """:return: a U-Net with random weights, none of them zero; the same for every call."""
        flags = dict(num_classes=6, learn_sigma=True, resblock_updown=True, num_head_channels=32, **config)
        th.manual_seed(0)
        model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **flags})
        for p in model.parameters():
            p.data.add_(0.01 * th.randn_like(p))
        model.eval().place(device, self.compiled)
        model.convert_to(self.dtype, weights=self.dtype != th.float32)
        model.to(memory_format=th.channels_last if self.channels_last else th.contiguous_format)
        if self.textbook:
            make_plain(model)
        return model if self.shared else lambda x, t, y: model(x, t, y=y)

    def conditions(self, model: Model, y: th.Tensor) -> tuple[Condition, Condition]:
        """:return: the condition and the null condition as this way shows them to the model."""
        null = th.zeros_like(y[:1] if self.shared else y)
        return (model.modulations(y), model.modulations(null)) if self.cached else (y, null)


@dataclass
class Bench:
    """Inputs, the same for all ways; x is [N x 3 x S x S] noise, y an [N x 6 x S x S] condition."""

    config: dict
    device: th.device
    x: th.Tensor
    y: th.Tensor
    reference: th.Tensor | None = None  # the first way's output

    def measure(self, way: Way, repeats: int) -> None:
        """Build one way, time some steps of it, and let go of it."""
        model = way.make_model(self.config, self.device)
        y, null = way.conditions(model, self.y)
        guided, t = GuidedModel(model, SCALE, null), th.full((len(self.x),), 500.0, device=self.device)
        output = guided(self.x, t, y)  # which warms up, and compiles
        self.reference = output if self.reference is None else self.reference
        way.deviation = float((output - self.reference).abs().max() / self.reference.abs().max())
        with arithmetic() as counter:
            guided(self.x, t, y)
        way.flops = counter.get_total_flops()
        if self.device.type == "cuda":
            th.cuda.reset_peak_memory_stats()
        way.seconds += [self.timed(lambda: guided(self.x, t, y)) for _ in range(repeats)]
        if self.device.type == "cuda":
            way.memory = f"{th.cuda.max_memory_allocated() / 2**20:.0f} MiB"

    def timed(self, function: Callable[[], th.Tensor]) -> float:
        """:return: seconds that a call takes."""
        if self.device.type == "cuda":
            th.cuda.synchronize()  # or the rest of what went before would be timed, too
        began = time.perf_counter()
        function()
        if self.device.type == "cuda":
            th.cuda.synchronize()
        return time.perf_counter() - began

    def sample(self, way: Way, runs: list[tuple[str, int]]) -> list[float]:
        """:return: seconds for one batch, its conditions included, by each of some samplers and numbers of steps."""
        model, diffusion = way.make_model(self.config, self.device), create_gaussian_diffusion(learn_sigma=True)

        def once(name: str, steps: int) -> th.Tensor:
            y, null = way.conditions(model, self.y)
            plan = SamplingPlan(name, process_for(name, diffusion, steps), SCALE, null)
            return plan.sample(model, y, range(len(self.y)))

        once("ddim", 1)  # warms up, and compiles
        return [self.timed(partial(once, name, steps)) for name, steps in runs]


def ways_to_measure(device: th.device, compiled: bool) -> list[Way]:
    """:return: the plain way first."""
    plain = th.float16 if device.type == "cuda" else th.float32
    name = str(plain).removeprefix("torch.")
    ways = [
        Way(f"plain {name}", plain, textbook=True, shared=False, cached=False),
        Way("our layers", plain, shared=False, cached=False),
        Way("+ shared encoder", plain, cached=False),
        Way("+ cached conditions", plain),
        Way("+ channels_last", plain, channels_last=True),
    ]
    half = [th.bfloat16] if has_bf16(device) else []
    for dtype in half:
        ways += [Way("bfloat16", dtype), Way("bfloat16, channels_last", dtype, channels_last=True)]
    if not half:
        print("no bfloat16 rows: this CPU has no units for it")
    for dtype in dict.fromkeys((plain, *half)) if compiled else ():
        label = f"{str(dtype).removeprefix('torch.')}, channels_last, compiled"
        ways.append(Way(label, dtype, channels_last=True, compiled=True))
    return ways


def create_argparser() -> argparse.ArgumentParser:
    """:return: a parser of every flag, with its default."""
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("--config", choices=CONFIGS, default="readme", help="the model to measure")
    parser.add_argument("--batch_size", "--batch", type=int, default=2, help="images a step")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each way in a round")
    parser.add_argument("--rounds", type=int, default=2, help="over all ways")
    parser.add_argument(
        "--compile", type=str2bool, nargs="?", const=True, default=False, help="measure compiled models, too"
    )
    parser.add_argument(
        "--end_to_end", type=int, nargs="+", default=[], metavar="STEPS", help="also sample one batch in these steps"
    )
    return parser


@th.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    args = create_argparser().parse_args(argv)
    check_ranges(vars(args), batch_size="[1, inf)", repeats="[1, inf)", rounds="[1, inf)")
    for steps in args.end_to_end:
        check_ranges({"end_to_end": steps}, end_to_end="[1, 1000]")
    config = CONFIGS[args.config]
    device = find_device()
    size = config["image_size"]
    generator = th.Generator(device).manual_seed(0)
    noise = th.randn(args.batch_size, 9, size, size, generator=generator, device=device)
    bench = Bench(config, device, noise[:, :3], noise[:, 3:])
    ways = ways_to_measure(device, args.compile)
    for way in tqdm(ways * args.rounds, unit="way"):
        bench.measure(way, args.repeats)
        th._dynamo.reset()  # a compiled model stays in memory until then

    base = float(np.median(ways[0].seconds))
    print(
        f"a guided step, {args.config} configuration, batch {args.batch_size}, {device.type}, "
        f"{th.get_num_threads()} threads"
    )
    print("| way | GFLOP an image | s a step | images/s at 25 steps | times plain | peak memory | largest deviation |")
    print("|---|---|---|---|---|---|---|")
    for way in ways:
        seconds = float(np.median(way.seconds))
        print(
            f"| {way.name} | {way.flops / args.batch_size / 1e9:.3g} | {seconds:.4f} | "
            f"{args.batch_size / seconds / 25:.3f} | {base / seconds:.2f} | {way.memory} | {way.deviation:.1e} |"
        )
    if args.end_to_end:
        whole_runs(bench, ways, args.end_to_end)


def whole_runs(bench: Bench, ways: list[Way], step_counts: list[int]) -> None:
    """Sample a batch with each sampler, in the way that was fastest, and print it over the plain chain."""
    plain, fastest = ways[0], min(ways, key=lambda way: np.median(way.seconds))
    batch = len(bench.x)
    chain = 100 * bench.sample(plain, [("ddpm", 10)])[0]
    print(f"\n{plain.name}, ddpm, 1000 steps: {chain:.0f} s a batch (100 times what 10 steps took)")
    print(f"| {fastest.name} | steps | s a batch | images/s | times the plain chain |\n|---|---|---|---|---|")
    runs = [(name, steps) for name in SAMPLERS for steps in step_counts]
    for (name, steps), seconds in zip(runs, bench.sample(fastest, runs)):
        print(f"| {name} | {steps} | {seconds:.1f} | {batch / seconds:.3f} | {chain / seconds:.0f} |")


if __name__ == "__main__":
    cli.run(main)
