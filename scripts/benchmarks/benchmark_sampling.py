"""Measure what sampling's savings bring, each row against the plain path in the same run.

    python scripts/benchmarks/benchmark_sampling.py
        [--config readme|small] [--batch 2] [--repeats 5] [--compile] [--end_to_end 25]

The plain path is two forward passes of the whole U-Net a step, in fp32 on a CPU and in fp16 on a GPU, with every layer
in its textbook form (plain_path.py). Weights are random: time does not depend on them. Times are medians over
interleaved repeats, so that a busy machine slows all rows alike. --end_to_end also samples one batch with each sampler
at so many steps, and with the plain path a 1000-step chain, of which 10 steps are run and the rest is computed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch as th
from plain_path import make_plain
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from guided_diffusion import cli
from guided_diffusion.fp16_util import has_bf16
from guided_diffusion.guidance import GuidedModel
from guided_diffusion.samplers import SAMPLERS, kept_conditions, make_schedule, sample
from guided_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.unet import UNetModel

CONFIGS = {
    "readme": dict(image_size=128, num_channels=128, num_res_blocks=2, attention_resolutions="32,16,8"),
    "small": dict(image_size=32, num_channels=32, num_res_blocks=1, attention_resolutions="8", channel_mult="1,2,2"),
}
SCALE = 1.5


class Way:
    """
    One way to compute a guided step.

    :param model: the U-Net, as this way needs it.
    :param shared: run the encoder once for both branches.
    :param cached: keep what SPADE layers make of the conditions.
    """

    def __init__(
        self, name: str, model: UNetModel, x: th.Tensor, y: th.Tensor, shared: bool = True, cached: bool = True
    ) -> None:
        self.name = name
        self.x, self.y, self.t = x, y, th.full((len(x),), 500.0, device=x.device)
        self.null = th.zeros_like(y[:1] if shared else y)
        self.model = model
        self.guided = GuidedModel(model if shared else lambda x, t, y: model(x, t, y=y), SCALE, self.null)
        self.cached = cached
        self.seconds: list[float] = []

    def kept(self) -> ExitStack:
        """:return: a with block inside which the caches are open, if this way has them."""
        stack = ExitStack()
        stack.enter_context(kept_conditions(self.model, self.y, self.null, enabled=self.cached))
        return stack

    def step(self) -> th.Tensor:
        """:return: the output of one guided step."""
        return self.guided(self.x, self.t, self.y)


def make_model(
    config: dict, device: th.device, dtype: th.dtype, channels_last: bool = False, compiled: bool = False
) -> UNetModel:
    """:return: a U-Net with random weights, none of them zero; the same for every call."""
    flags = dict(num_classes=6, learn_sigma=True, resblock_updown=True, num_head_channels=32, **config)
    th.manual_seed(0)
    model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **flags})
    for p in model.parameters():
        p.data.add_(0.01 * th.randn_like(p))
    model.eval().place(device, compiled)
    model.convert_to(dtype, weights=dtype != th.float32)
    return model.to(memory_format=th.channels_last if channels_last else th.contiguous_format)


def peak_memory(device: th.device, function: Callable[[], th.Tensor]) -> str:
    """:return: the most memory that a call takes on a GPU, over what was taken before; on a CPU it is not known."""
    if device.type != "cuda":
        return "-"
    th.cuda.reset_peak_memory_stats()
    before = th.cuda.memory_allocated()
    function()
    return f"{(th.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB"


def timed(device: th.device, function: Callable[[], th.Tensor]) -> float:
    """:return: seconds that a call takes."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        th.cuda.synchronize()
    return time.perf_counter() - began


@th.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="readme")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--end_to_end", type=int, nargs="+", default=[], metavar="STEPS")
    args = parser.parse_args(argv)
    config = CONFIGS[args.config]
    device = th.device("cuda" if th.cuda.is_available() else "cpu")
    plain = th.float16 if device.type == "cuda" else th.float32
    generator = th.Generator(device).manual_seed(0)
    shape = (args.batch, 3, config["image_size"], config["image_size"])
    x = th.randn(shape, generator=generator, device=device)
    y = th.randn((args.batch, 6, *shape[2:]), generator=generator, device=device)
    name = str(plain).removeprefix("torch.")
    model = make_model(config, device, plain)
    last = make_model(config, device, plain, channels_last=True)
    ways = [
        Way(f"plain {name}", make_plain(make_model(config, device, plain)), x, y, shared=False, cached=False),
        Way("our layers", model, x, y, shared=False, cached=False),
        Way("+ shared encoder", model, x, y, cached=False),
        Way("+ cached conditions", model, x, y),
        Way("+ channels_last", last, x, y),
    ]
    if has_bf16(device):
        ways.append(Way("bfloat16", make_model(config, device, th.bfloat16), x, y))
        half_last = make_model(config, device, th.bfloat16, channels_last=True)
        ways.append(Way("bfloat16, channels_last", half_last, x, y))
    else:
        print("no bfloat16 rows: this CPU has no units for it")
    if args.compile:
        for dtype in dict.fromkeys((plain, *([th.bfloat16] if has_bf16(device) else []))):
            label = f"{str(dtype).removeprefix('torch.')}, channels_last, compiled"
            ways.append(Way(label, make_model(config, device, dtype, channels_last=True, compiled=True), x, y))

    reference, deviations, flops, memory = ways[0].step(), {}, {}, {}
    with ExitStack() as caches:
        for way in ways:
            caches.enter_context(way.kept())
            deviations[way.name] = float((way.step() - reference).abs().max() / reference.abs().max())
            with FlopCounterMode(display=False) as counter:
                way.step()
            flops[way.name] = counter.get_total_flops() / args.batch
            memory[way.name] = peak_memory(device, way.step)
        for _ in tqdm(range(args.repeats), unit="repeat"):
            for way in ways:
                way.seconds.append(timed(device, way.step))

    base = float(np.median(ways[0].seconds))
    print(
        f"a guided step, {args.config} configuration, batch {args.batch}, {device.type}, {th.get_num_threads()} threads"
    )
    print("| way | GFLOP an image | s a step | images/s at 25 steps | times plain | peak memory | largest deviation |")
    print("|---|---|---|---|---|---|---|")
    for way in ways:
        seconds = float(np.median(way.seconds))
        print(
            f"| {way.name} | {flops[way.name] / 1e9:.0f} | {seconds:.4f} | {args.batch / seconds / 25:.3f} | "
            f"{base / seconds:.2f} | {memory[way.name]} | {deviations[way.name]:.1e} |"
        )
    if args.end_to_end:
        whole_runs(ways, args.batch, device, args.end_to_end)


def whole_runs(ways: list[Way], batch: int, device: th.device, step_counts: list[int]) -> None:
    """Sample a batch with each sampler, in the way that was fastest, and print it over the plain chain."""
    plain, fastest = ways[0], min(ways, key=lambda way: np.median(way.seconds))
    diffusion = create_gaussian_diffusion(learn_sigma=True)
    shape = dict(channels=3, seed=0, indices=range(batch))

    def run(way: Way, name: str, steps: int) -> float:
        model = way.model if way is not plain else lambda x, t, y: way.model(x, t, y=y)
        schedule = make_schedule(name, diffusion, steps)
        y, null = way.y.clone(), way.null.clone()  # as for a new batch: what is kept of them is made anew

        def once() -> th.Tensor:
            with kept_conditions(way.model, y, null, enabled=way.cached):
                return sample(name, diffusion, model, y, null=null, s=SCALE, schedule=schedule, **shape)

        return timed(device, once)

    chain = 100 * run(plain, "ddpm", 10)
    print(f"\n{plain.name}, ddpm, 1000 steps: {chain:.0f} s a batch (100 times what 10 steps took)")
    print(f"| {fastest.name} | steps | s a batch | images/s | times the plain chain |\n|---|---|---|---|---|")
    for name in SAMPLERS:
        for steps in step_counts:
            seconds = run(fastest, name, steps)
            print(f"| {name} | {steps} | {seconds:.1f} | {batch / seconds:.3f} | {chain / seconds:.0f} |")


if __name__ == "__main__":
    cli.run(main)
