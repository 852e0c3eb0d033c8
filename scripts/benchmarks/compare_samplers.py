"""Measure how near each sampler, in a few steps, comes to the full ancestral chain of the same model.

    python scripts/benchmarks/compare_samplers.py
        --model_path M --data_dir DATA [flags of image_sample.py] [--num_samples 32]

The chain is run twice on the same conditions, with different noise; then every sampler once, with the second run's.
Each is compared with the first run, sample by sample:
  colours    the Wasserstein distance between the two images' values, averaged over channels, in grey levels;
  agreement  the difference of how well darkness tells nuclei from background by the instance mask, as area under the
             ROC curve.
A sampler that is no farther from the first run than the second run is cannot be told from the chain by these.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch as th
from scipy.stats import rankdata, wasserstein_distance
from torch.utils.data import default_collate

import image_sample
from guided_diffusion import checkpoint, cli, dist_util
from guided_diffusion.fp16_util import compute_dtype
from guided_diffusion.image_datasets import load_dataset
from guided_diffusion.samplers import SAMPLERS
from guided_diffusion.sampling_plan import SamplingPlan, process_for, to_uint8
from guided_diffusion.script_util import (
    args_to_dict,
    condition_spec,
    create_model_and_diffusion,
    data_defaults,
    model_and_diffusion_defaults,
)
from guided_diffusion.sweep import parse_scales


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


@th.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Sample, compare, print a table."""
    args, (model_path, *_) = image_sample.resolve(sys.argv[1:] if argv is None else argv)
    spec = condition_spec(vars(args))
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    checkpoint.load_weights(model, model_path)
    device = dist_util.dev()
    model.to(device).eval().convert_to(compute_dtype(args.use_fp16, device, args.precision), weights=True)
    dataset = load_dataset(
        spec=spec,
        is_train=args.use_train,
        image_size=args.image_size,
        **args_to_dict(args, data_defaults().keys() - {"num_workers"}),
    )
    count = min(args.num_samples, len(dataset))
    _, cond = default_collate([dataset[0, k] for k in range(count)])
    cond = {key: cond[key].to(device) for key in ("label", "instance", "col_map")}
    insts = cond["instance"][:, 0].cpu().numpy()
    y = spec.assemble(cond)
    null, y = model.modulations(spec.null(y[:1])), model.modulations(y)
    options = dict(s=parse_scales(args.s)[0].s, null=null, channels=args.in_channels, seed=args.seed)

    def run(name: str, steps: int, first: int) -> np.ndarray:
        plan = SamplingPlan(name, process_for(name, diffusion, steps), **options)
        return to_uint8(plan.sample(model, y, range(first, first + count), progress=True))

    steps = args.num_steps or 25
    chain = run("ddpm", 0, 0)
    runs = {f"ddpm, {diffusion.num_timesteps} steps, again": run("ddpm", 0, count)}
    for name in SAMPLERS:
        runs[f"{name}, {steps} steps"] = run(name, steps, count)

    own = np.array([nuclei_agreement(a, inst) for a, inst in zip(chain, insts)])
    print(f"{count} samples, s = {args.s}; the chain itself has a mean area of {np.nanmean(own):.3f}")
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
