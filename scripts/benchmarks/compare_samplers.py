"""Measure how near each sampler, in a few steps, comes to the full ancestral chain of the same model.

    python scripts/benchmarks/compare_samplers.py
        --model_path M --data_dir DATA [--num_samples 32] [--num_steps 25] [flags of image_sample.py]

The chain is run twice on the conditions that image_sample.py would take, with different noise; then every sampler once,
with the second run's. Each is compared with the first run, sample by sample:
  colours    the Wasserstein distance between the two images' values, averaged over channels, in grey levels;
  agreement  the difference of how well darkness tells nuclei from background by the instance mask, as area under the
             ROC curve.
A sampler that is no farther from the first run than the second run is cannot be told from the chain by these. One
checkpoint and one guidance scale; nothing is written.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch as th
from scipy.stats import rankdata, wasserstein_distance
from torch.utils.data import default_collate

import image_sample
from guided_diffusion import checkpoint, cli, dist_util
from guided_diffusion.condition_cache import ConditionCache, SampleFn
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.draws import own_draw
from guided_diffusion.options import add_flags
from guided_diffusion.samplers import SAMPLERS
from guided_diffusion.sampling_plan import SamplingPlan, process_for, to_uint8
from guided_diffusion.script_util import (
    args_to_dict,
    condition_spec,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.sweep import parse_interval, parse_scales
from guided_diffusion.unet import UNetModel


def colour_distance(a: np.ndarray, b: np.ndarray) -> float:
    """:return: grey levels between two [H x W x C] uint8 images' values, wherever they lie."""
    return float(np.mean([wasserstein_distance(a[..., c].ravel(), b[..., c].ravel()) for c in range(a.shape[2])]))


def nuclei_agreement(image: np.ndarray, inst: np.ndarray) -> float:
    """:return: area under the ROC curve of darkness as a sign of nuclei; NaN where all is nucleus or nothing is."""
    inside = inst.ravel() > 0
    n, m = inside.sum(), (~inside).sum()
    if n == 0 or m == 0:
        return float("nan")
    ranks = rankdata(-image.mean(axis=2).ravel())
    return float((ranks[inside].sum() - n * (n + 1) / 2) / (n * m))


def create_argparser() -> argparse.ArgumentParser:
    """:return: a parser of every flag, with its default."""
    parser = cli.FlagParser(description=__doc__)
    add_flags(parser, image_sample.FLAGS)
    parser.set_defaults(num_samples=32, batch_size=32, num_steps=25)
    return parser


def check(args: argparse.Namespace, checkpoints: list[str]) -> None:
    """:raises ValueError: where a flag has a value that image_sample.py refuses, or asks for what is not compared."""
    image_sample.check(args)
    if len(checkpoints) > 1 or len(parse_scales(args.s)) > 1 or args.field:
        raise ValueError("give one --model_path, one --s, no --field: samplers are compared on one model's patches")
    if args.sampler or args.use_ddim:
        raise ValueError("leave out --sampler and --use_ddim: all samplers are compared")


@th.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Sample, compare, print a table."""
    args, checkpoints = image_sample.resolve(argv, create_argparser())
    check(args, checkpoints)
    dist_util.setup_dist(args.device)
    spec = condition_spec(vars(args))
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    checkpoint.load_weights(model, checkpoints[0])
    image_sample.ready(model, args)
    scale, guide = parse_scales(args.s)[0].s, image_sample.load_guide(args)
    batches = list(load_batches(args, spec, model, guide, checkpoints[0], scale))
    insts = [inst for _, _, parts in batches for inst in parts]
    count = len(insts)
    interval = parse_interval(args.guidance_interval)
    how = args_to_dict(args, ["seed", "clip_denoised"])
    base = SamplingPlan("ddpm", diffusion, scale, guide=guide, interval=interval, channels=args.in_channels, **how)

    def run(name: str, steps: int, first: int) -> np.ndarray:
        plan = dataclasses.replace(base, sampler=name, process=process_for(name, diffusion, steps))
        return np.concatenate(
            [to_uint8(sample(plan, [first + k for k in numbers], True)[0]) for sample, numbers, _ in batches]
        )

    steps = args.num_steps
    chain = run("ddpm", 0, 0)
    runs = {f"ddpm, {diffusion.num_timesteps} steps, again": run("ddpm", 0, count)}
    for name in SAMPLERS:
        runs[f"{name}, {steps or diffusion.num_timesteps} steps"] = run(name, steps, count)
    report(chain, runs, insts, args.s)


def load_batches(
    args: argparse.Namespace,
    spec: ConditionSpec,
    model: UNetModel,
    guide: UNetModel | None,
    path: str,
    scale: float,
) -> Iterator[tuple[SampleFn, list[int], np.ndarray]]:
    """:return: of batches of conditions, as image_sample.py takes them: what samples, the numbers, instance maps."""
    dataset = image_sample.load_conditions(args, spec)
    draw = own_draw([item.slide for item in dataset.items], dataset.pair, args.seed, path, scale, args.first)
    device = dist_util.dev()
    how = dict(batch_size=args.batch_size, mode=args.spade_cache, keep_colour=args.null_condition == "keep_colour")
    cache = ConditionCache(model, spec, device, **how, guide=guide)
    count = args.num_samples or len(dataset)
    for start in range(0, count, args.batch_size):
        numbers = list(range(start, min(start + args.batch_size, count)))
        _, cond = default_collate([dataset[draw.key(k)] for k in numbers])
        y = spec.assemble({name: value.to(device) for name, value in cond.items() if th.is_tensor(value)})
        yield cache.patches(y), numbers, cond["instance"][:, 0].numpy()


def report(chain: np.ndarray, runs: dict[str, np.ndarray], insts: list[np.ndarray], s: str) -> None:
    """Print the table. :param chain: [N x H x W x C] uint8, which each of the runs is compared with."""
    own = np.array([nuclei_agreement(a, inst) for a, inst in zip(chain, insts)])
    print(f"{len(chain)} samples, s = {s}; the chain itself has a mean area of {np.nanmean(own):.3f}")
    print("| sampler | colours | over the chain's own | agreement | over the chain's own | mean area |")
    print("|---|---|---|---|---|---|")
    base = None
    for name, images in runs.items():
        colours = np.mean([colour_distance(a, b) for a, b in zip(chain, images)])
        areas = np.array([nuclei_agreement(b, inst) for b, inst in zip(images, insts)])
        agreement = np.nanmean(np.abs(areas - own))
        base = base or (colours, agreement)
        print(
            f"| {name} | {colours:.2f} | {colours / base[0]:.2f} | {agreement:.4f} | {agreement / base[1]:.2f} | "
            f"{np.nanmean(areas):.3f} |"
        )


if __name__ == "__main__":
    cli.run(main)
