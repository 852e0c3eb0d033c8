"""What training and sampling ask of a GPU, by one that computes nothing: how many launches, and that nothing waits for
it or mixes its tensors with the CPU's."""

import itertools

import numpy as np
import pytest
import torch as th
from conftest import TINY
from fake_gpu import GPU, Launches, Waits, fake_gpu

import image_train
from guided_diffusion import logger
from guided_diffusion.checkpointer import Checkpointer
from guided_diffusion.condition_cache import ConditionCache
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.resample import SCHEDULE_SAMPLERS, create_named_schedule_sampler
from guided_diffusion.samplers import SAMPLERS
from guided_diffusion.sampling_plan import SamplingPlan, process_for
from guided_diffusion.script_util import (
    args_to_dict,
    condition_spec,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_options import TrainOptions
from guided_diffusion.train_util import TrainLoop

README = (
    "--image_size 128 --attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True "
    "--noise_schedule cosine --num_channels 128 --num_head_channels 32 --num_res_blocks 2 --resblock_updown True "
    "--use_scale_shift_norm True --num_classes 6 --use_hv_map True --use_col_map True "
    "--drop_rate 0.2 --use_checkpoint True"
).split()

LAUNCHES = 2984  # of a training step


def make_model(args, dtype):
    """:return: a model on the fake GPU, and its diffusion process."""
    with GPU:
        model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    model.convert_to(dtype)
    return model, diffusion


def make_loop(flags, dtype, **options):
    """:return: a training loop on the fake GPU."""
    args = image_train.create_argparser().parse_args(flags)
    model, diffusion = make_model(args, dtype)
    options = TrainOptions(drop_rate=args.drop_rate, **options)
    return TrainLoop(model=model, diffusion=diffusion, spec=condition_spec(vars(args)), data=iter(()), options=options)


def batch(count, size):
    """What the loader gives, in the CPU's memory."""
    label, edge = th.zeros(count, 2, size, size), th.zeros(count, 1, size, size, dtype=th.bool)
    images = th.zeros(2, count, 3, size, size, dtype=th.uint8)
    return images[0], dict(label=label, edge=edge, col_map=images[1], index=th.arange(count))


@pytest.mark.slow
def test_launches_of_a_step():
    """At the README's flags, with activations computed again; without what only the first step makes or uploads."""
    with fake_gpu():
        loop = make_loop(README, th.float16, batch_size=8)
        for p in loop.model.parameters():
            p.grad = th.empty_like(p)
        loop.opt.step()
        x, t = th.empty(1, 3, 128, 128, device=GPU), th.zeros(1, dtype=th.long, device=GPU)
        loop.diffusion.training_losses(lambda x, t: th.cat([x, x], dim=1), x, t)
        with Launches() as launches:
            loop.run_step(*batch(8, 128))
    assert launches.counts.total() == LAUNCHES <= 3000, launches.counts.most_common()


@pytest.mark.parametrize(
    ("dtype", "flags", "options"),
    [
        (
            th.float32,
            "--dropout 0.1 --use_checkpoint True --mark_unknown True --drop_rate 0.2",
            dict(microbatch="auto"),
        ),
        (th.bfloat16, "--resblock_updown False", dict(lr_anneal_steps=100)),
        (th.float16, "--drop_rate 0.2", dict(microbatch="2", ema_rate="0.9,0.99", grad_clip=1.0)),
    ],
)
def test_no_step_of_training_waits(dtype, flags, options, tmp_path, monkeypatch):
    """But those that end with a row of the log, or with a look whether training makes sense."""
    monkeypatch.setattr("guided_diffusion.train_util.CHECK_INTERVAL", 3)
    with fake_gpu(), logger.scoped_configure(str(tmp_path), ["csv"]), Checkpointer(str(tmp_path), 0) as checkpointer:
        loop = make_loop([*TINY, *flags.split()], dtype, batch_size=4, log_interval=3, max_steps=4, **options)
        loop.checkpointer, loop.saved_step = checkpointer, 4
        with Waits() as waits:
            before = []
            loop.data = (before.append(len(waits.found)) or batch(4, 16) for _ in itertools.count())
            loop._run_until(stop=False)
    first, second, third = np.diff(before)
    assert first == second == 0 < third


def make_batch(spec, n, size, ids=False):
    """What the loader gives of a condition."""
    hv = th.zeros(n, 2, size, size) if spec.use_hv_map else th.zeros(n, 1, size, size, dtype=th.int32)
    instance, unknown = th.zeros(n, 1, size, size, dtype=th.int32), th.zeros(n, 1, dtype=th.bool)
    cond = dict(label=hv, classes=instance.byte(), col_map=th.zeros(n, 3, size, size, dtype=th.uint8), unknown=unknown)
    return {**cond, "instance": instance} if ids else {**cond, "edge": instance.bool()}


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        dict(use_hv_map=True, use_col_map=True, num_classes=6, mark_unknown=True),
        dict(num_classes=1, no_instance=True),
        dict(class_cond=True, num_classes=5, use_col_map=True),
        dict(class_cond=True, num_classes=5, use_hv_map=True, mark_unknown=True),
    ],
)
def test_conditions_are_assembled_where_their_parts_are(flags, ids):
    spec = ConditionSpec(**flags)
    with fake_gpu():
        cond = {name: part.to(GPU) for name, part in make_batch(spec, 2, 16, ids).items()}
        with Waits() as waits:
            y = spec.assemble(cond)
            made = [y, spec.drop(y, cond["unknown"][:, 0]), spec.null(y), *spec.split(y).values()]
            made += [spec.null(y, keep_colour=True)] if spec.use_col_map else []
        assert all(tensor.device == GPU for tensor in made) and waits.found == []


@pytest.mark.parametrize(
    ("loss", "predicted", "variance"),
    [
        (LossType.MSE, ModelMeanType.EPSILON, ModelVarType.FIXED_LARGE),
        (LossType.RESCALED_MSE, ModelMeanType.VELOCITY, ModelVarType.LEARNED_RANGE),
        (LossType.KL, ModelMeanType.PREVIOUS_X, ModelVarType.LEARNED),
        (LossType.RESCALED_KL, ModelMeanType.START_X, ModelVarType.FIXED_SMALL),
    ],
)
def test_losses_and_chains_wait_for_nothing(loss, predicted, variance):
    options = dict(model_mean_type=predicted, model_var_type=variance, min_snr_gamma=5.0, rescale_timesteps=True)
    diffusion = GaussianDiffusion(betas=np.linspace(0.1, 0.3, 3), loss_type=loss, **options)
    doubled = 1 + diffusion.learns_variance
    with fake_gpu():
        x, t = th.empty(2, 3, 8, 8, device=GPU), th.zeros(2, dtype=th.long, device=GPU)

        def model(x, t, y=None):
            return th.cat([x] * doubled, dim=1)

        with Waits() as waits:
            made = [*diffusion.training_losses(model, x, t).values(), *diffusion.calc_bpd_loop(model, x).values()]
            made += [loop(model, x.shape, noise=x) for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop)]
            made += diffusion.ddim_reverse_sample(model, x, t).values()
        assert all(tensor.device == GPU for tensor in made) and waits.found == []


@pytest.mark.parametrize("name", SCHEDULE_SAMPLERS)
def test_timesteps_are_drawn_without_waiting(name):
    sampler = create_named_schedule_sampler(name, 10)
    with fake_gpu(), Waits() as waits:
        t, weights = sampler.sample(4, GPU, np.random.default_rng(0))
        assert t.device == weights.device == GPU and waits.found == []


@pytest.fixture(scope="module")
def tiny():
    """A model to sample from, its process and its condition's layout."""
    args = image_train.create_argparser().parse_args([*TINY, "--mark_unknown", "True"])
    with fake_gpu():
        return *make_model(args, th.float16), condition_spec(vars(args))


PATCHES, FIELDS, ANEW = ({}, [(16, 16)]), ({}, [(16, 24), (16, 16)]), (dict(keep_colour=True, mode="off"), [(16, 16)])


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [*((name, *PATCHES) for name in SAMPLERS), ("ddpm", *FIELDS), ("ddim", *ANEW)],
)
def test_no_step_of_sampling_waits(tiny, name, options, sizes):
    """Patches and fields, with conditions convolved once and without, guided at some steps."""
    model, diffusion, spec = tiny
    plan = SamplingPlan(name, process_for(name, diffusion, 3), s=1.5, interval=(0.0, 2.0))
    with fake_gpu(), th.inference_mode():
        cache = ConditionCache(model, spec, GPU, batch_size=2, **options)
        ys = [th.empty(1, spec.channels, *shape, device=GPU) for shape in sizes]
        sample = cache.fields(ys, 0.5) if len(ys) > 1 else cache.patches(*ys)
        assert cache.on == (not options)
        with Waits() as waits:
            made = sample(plan, range(len(ys)), False)
        assert [x.shape[2:] for x in made] == [y.shape[2:] for y in ys]
        assert all(x.device == GPU for x in made) and waits.found == []
