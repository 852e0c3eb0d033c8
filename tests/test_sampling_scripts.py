"""A script for sampling as users of guided-diffusion's forks have it, by the reference's calls alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from reference_numbers import CONFIGS, fill, inputs

from guided_diffusion.script_util import create_model_and_diffusion

SCRIPT = """
import argparse

import numpy as np
import torch as th
import torch.distributed as dist

from guided_diffusion import dist_util, logger
from guided_diffusion.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def main():
    flags = dict(model_path="", condition="", out="", s=1.5)
    flags.update(num_samples=3, batch_size=2, use_ddim=False, clip_denoised=True)
    assert isinstance(NUM_CLASSES, int)
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {**flags, **model_and_diffusion_defaults()})
    args = parser.parse_args()
    dist_util.setup_dist()
    logger.configure()
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
    model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
    model.to(dist_util.dev())
    if args.use_fp16:
        model.convert_to_fp16()
    model.eval()
    y = th.from_numpy(np.load(args.condition)).to(dist_util.dev())
    loop = diffusion.ddim_sample_loop if args.use_ddim else diffusion.p_sample_loop
    th.manual_seed(0)
    batches = []
    while len(batches) * args.batch_size < args.num_samples:
        shape = (args.batch_size, 3, args.image_size, args.image_size)
        sample = loop(model, shape, clip_denoised=args.clip_denoised, model_kwargs=dict(y=y, s=args.s), progress=True)
        sample = ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()
        gathered = [th.zeros_like(sample) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, sample)
        batches.extend(part.cpu().numpy() for part in gathered)
        logger.log(f"created {len(batches) * args.batch_size} samples")
    if dist.get_rank() == 0:
        np.savez(args.out, np.concatenate(batches)[: args.num_samples])
    dist.barrier()


main()
"""


@pytest.mark.parametrize("use_ddim", [False, True])
def test_sampling(tmp_path, use_ddim):
    config = {**CONFIGS["custom_mult"], "timestep_respacing": "4"}
    model, diffusion = create_model_and_diffusion(**config)
    th.save(fill(model).eval().state_dict(), tmp_path / "model000001.pt")
    _, y, _ = inputs("custom_mult")
    np.save(tmp_path / "y.npy", y.numpy())
    (tmp_path / "sample.py").write_text(SCRIPT)
    own = dict(model_path="model000001.pt", condition="y.npy", out="samples.npz", use_ddim=use_ddim)
    flags = [text for name, value in {**own, **config}.items() for text in (f"--{name}", str(value))]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "sample.py", *flags],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(root), "OPENAI_LOGDIR": str(tmp_path / "log"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "created 4 samples" in done.stdout and "4/4" in done.stderr

    loop = diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop
    th.manual_seed(0)
    batches = [loop(model, (2, 3, 32, 32), model_kwargs={"y": y, "s": 1.5}) for _ in range(2)]
    expected = ((th.cat(batches)[:3] + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    samples = np.load(tmp_path / "samples.npz")["arr_0"]
    assert samples.dtype == np.uint8 and np.abs(samples - expected).max() <= 1
    assert samples.std() > 10
