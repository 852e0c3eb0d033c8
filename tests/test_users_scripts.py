"""Scripts that users of guided-diffusion's modules have, written here anew: they run, on one rank and on several."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import TINY
from torch.utils.data import default_collate

import image_sample
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.image_datasets import load_dataset
from guided_diffusion.sampling_plan import to_uint8
from guided_diffusion.script_util import condition_spec, create_model_and_diffusion, model_and_diffusion_defaults

ROOT = Path(__file__).resolve().parents[1]

SAMPLING = """
import argparse
import os

import numpy as np
import torch as th
import torch.distributed as dist

from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import load_data
from guided_diffusion.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    condition_spec,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

defaults = dict(data_dir="", model_path="", batches=2, batch_size=2, use_ddim=False, s=1.0, use_hv_map=False)
defaults.update(model_and_diffusion_defaults())
parser = argparse.ArgumentParser()
add_dict_to_argparser(parser, defaults)
args = parser.parse_args()

assert isinstance(NUM_CLASSES, int)
dist_util.setup_dist()
logger.configure()
model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
model.to(dist_util.dev())
if args.use_fp16:
    model.convert_to_fp16()
model.eval()

spec = condition_spec(vars(args))
patches = load_data(
    data_dir=args.data_dir,
    dataset_mode="monuseg",
    batch_size=args.batch_size,
    image_size=args.image_size,
    deterministic=True,
    spec=spec,
)
sample_loop = diffusion.ddim_sample_loop if args.use_ddim else diffusion.p_sample_loop
collected, names = [], []
for number in range(args.batches):
    real, cond = next(patches)
    y = spec.assemble(cond).to(dist_util.dev())
    th.manual_seed(100 * dist.get_rank() + number)
    made = sample_loop(
        model,
        (args.batch_size, args.in_channels, args.image_size, args.image_size),
        noise=th.randn(real.shape, device=dist_util.dev()) if args.use_ddim else None,
        clip_denoised=True,
        model_kwargs={"y": y, "s": args.s},
        device=dist_util.dev(),
        progress=number == 0,
    )
    pixels = ((made + 1) * 127.5).round().clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()
    everyone = [th.empty_like(pixels) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, pixels)
    collected += [part.cpu().numpy() for part in everyone]
    names += dist_util.all_gather([os.path.basename(path) for path in cond["path"]])
    logger.log(f"batch {number} of {args.batches}")

if dist.get_rank() == 0:
    np.savez(os.path.join(logger.get_dir(), "made.npz"), pixels=np.stack(collected), names=np.array(names))
dist.barrier()
logger.log("sampling is done")
"""


@pytest.fixture
def model_path(tmp_path) -> str:
    model, _ = create_model_and_diffusion(**flags(model_and_diffusion_defaults()))
    generator = th.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.add_(0.02 * th.randn(p.shape, generator=generator))
    th.save(model.state_dict(), tmp_path / "ema_0.9999_000007.pt")
    return str(tmp_path / "ema_0.9999_000007.pt")


def flags(names):
    args = image_sample.create_argparser().parse_args([*TINY, "--timestep_respacing", "4"])
    return {name: getattr(args, name) for name in names}


def launch(script, ranks, folder, *arguments):
    """Run a user's script; :return: its log folder."""
    (folder / "script.py").write_text(script)
    mpiexec = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)] if ranks > 1 else []
    env = {**os.environ, "OPENAI_LOGDIR": str(folder / "log"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*mpiexec, sys.executable, str(folder / "script.py"), *arguments]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return folder / "log"


def textbook_ddim(model, diffusion, y, noise, s):
    """DDIM with guidance, by the equations."""
    x, levels = noise, [*diffusion.alphas_cumprod, 1.0]
    for i in reversed(range(len(levels) - 1)):
        t = th.full((len(x),), diffusion.timestep_map[i])
        with th.no_grad():
            eps, eps_null = (model(x, t, y=condition)[:, :3] for condition in (y, th.zeros_like(y)))
        eps = eps_null + s * (eps - eps_null)
        x_start = ((x - (1 - levels[i]) ** 0.5 * eps) / levels[i] ** 0.5).clamp(-1, 1)
        eps = (x - levels[i] ** 0.5 * x_start) / (1 - levels[i]) ** 0.5
        before = levels[i - 1]  # of the image, at i = 0
        x = before**0.5 * x_start + (1 - before) ** 0.5 * eps
    return x


@pytest.mark.parametrize(("ranks", "use_ddim"), [(1, True), (2, True), (1, False)])
def test_sampling(data_dir, model_path, tmp_path, ranks, use_ddim):
    arguments = [*TINY[: TINY.index("--num_workers")], "--timestep_respacing", "4", "--s", "1.5"]
    arguments += ["--use_ddim", str(use_ddim)]
    log = launch(SAMPLING, ranks, tmp_path, "--data_dir", str(data_dir), "--model_path", model_path, *arguments)
    assert "sampling is done" in (log / "log.txt").read_text()
    made = np.load(log / "made.npz")
    assert made["pixels"].shape == (2 * ranks, 2, 16, 16, 3) and len(set(made["names"].ravel())) == 4 * ranks
    model, diffusion = create_model_and_diffusion(**flags(model_and_diffusion_defaults()))
    model.load_state_dict(th.load(model_path, weights_only=True))
    spec = condition_spec(flags(ConditionSpec.flags()))
    dataset = load_dataset(data_dir=str(data_dir), dataset_mode="monuseg", image_size=16, spec=spec)
    places = {Path(item.image).name: i for i, item in enumerate(dataset.items)}
    for row, (pixels, names) in enumerate(zip(made["pixels"], made["names"])):
        number, rank = divmod(row, ranks)
        _, cond = default_collate([dataset[0, places[name]] for name in names])
        th.manual_seed(100 * rank + number)
        y = spec.assemble(cond)
        if use_ddim:
            expected = textbook_ddim(model.eval(), diffusion, y, th.randn(2, 3, 16, 16), 1.5)
        else:  # in its numbers held by test_gaussian_diffusion; draws are torch's global ones, as there
            expected = diffusion.p_sample_loop(model.eval(), (2, 3, 16, 16), model_kwargs={"y": y, "s": 1.5})
        assert np.abs(to_uint8(expected).astype(int) - pixels).max() <= 1 and pixels.std() > 10
