"""Spaced processes against the base process, and which timesteps the model is shown."""

import numpy as np
import pytest
import torch as th

from guided_diffusion.gaussian_diffusion import (
    NOISE_SCHEDULES,
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SpacedDiffusion, respaced, space_timesteps

OPTIONS = dict(
    model_mean_type=ModelMeanType.EPSILON,
    model_var_type=ModelVarType.LEARNED_RANGE,
    loss_type=LossType.RESCALED_MSE,
    min_snr_gamma=5.0,
)


def spaced(kept, schedule="linear", steps=100, **options):
    return SpacedDiffusion(kept, betas=get_named_beta_schedule(schedule, steps), **{**OPTIONS, **options})


class Recorder:
    """A model that notes the timesteps it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, t):
        self.seen.append(t)
        return th.cat([0.1 * x, 0 * x], dim=1)


# ---- space_timesteps ----


def test_sections_by_hand():
    # One section from 0 to 9 in 4 steps: 0, 3, 6, 9.
    assert space_timesteps(10, "4") == {0, 3, 6, 9}
    # Sections 0..3, 4..6, 7..9: the remainder goes to the first ones.
    assert space_timesteps(10, "2,1,3") == {0, 3, 4, 7, 8, 9}
    assert space_timesteps(10, [2, 1, 3]) == space_timesteps(10, "2, 1, 3")
    # 0, 2.25, 4.5, 6.75, 9, halves to even.
    assert space_timesteps(10, "5") == {0, 2, 4, 7, 9}


def test_strides_by_hand():
    assert space_timesteps(10, "ddim5") == {0, 2, 4, 6, 8}
    assert space_timesteps(10, "ddim4") == {0, 3, 6, 9}
    assert space_timesteps(10, "ddim10") == set(range(10))
    assert space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))


@pytest.mark.parametrize("counts", ["1", "7", "250", "999", "1000", "10,15,20", "1,333,1"])
def test_counts_and_ends(counts):
    kept = space_timesteps(1000, counts)
    per_section = [int(count) for count in counts.split(",")]
    assert len(kept) == sum(per_section)
    assert min(kept) == 0
    assert max(kept) < 1000
    if per_section[-1] > 1:
        assert max(kept) == 999


@pytest.mark.parametrize(
    "counts",
    ["ddim7", "ddim0", "ddim11", "ddim-2", "ddim", "ddimx", "0", "11", "-1", "6,5", "5,0", "x", "5,", "2.5", " "],
)
def test_mistakes_name_the_flag(counts):
    with pytest.raises(ValueError) as caught:
        space_timesteps(10, counts)
    assert str(caught.value).startswith(f"--timestep_respacing {counts}")


# ---- SpacedDiffusion ----

TABLES = [name for name, value in vars(spaced(range(100))).items() if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_keeping_every_step_changes_nothing(schedule):
    betas = get_named_beta_schedule(schedule, 100)
    base, same = GaussianDiffusion(betas=betas, **OPTIONS), spaced(space_timesteps(100, "100"), schedule)
    assert len(TABLES) >= 15
    for table in TABLES:
        np.testing.assert_allclose(getattr(same, table), getattr(base, table), rtol=1e-9, atol=1e-12, err_msg=table)
    t = th.arange(100)
    assert th.equal(same.model_timesteps(t), base.model_timesteps(t))
    for name in ("model_mean_type", "model_var_type", "loss_type", "num_timesteps", "rescale_timesteps"):
        assert getattr(same, name) == getattr(base, name)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("counts", ["7", "10,5", "ddim20", "1"])
def test_marginals_are_kept(schedule, counts):
    kept = sorted(space_timesteps(100, counts))
    betas = get_named_beta_schedule(schedule, 100)
    short = spaced(kept, schedule)
    assert short.num_timesteps == len(kept)
    np.testing.assert_allclose(short.alphas_cumprod, np.cumprod(1 - betas)[kept], rtol=1e-9)
    base = GaussianDiffusion(betas=betas, **OPTIONS)
    x_start, noise = th.randn(2, len(kept), 1, 2, 2, generator=th.Generator().manual_seed(0))
    th.testing.assert_close(
        short.q_sample(x_start, th.arange(len(kept)), noise), base.q_sample(x_start, th.tensor(kept), noise)
    )


def test_ddim_step_jumps_between_kept_steps():
    """A step from base time 60 to 20, from the base's own levels."""
    short, abar = spaced([5, 20, 60]), np.cumprod(1 - get_named_beta_schedule("linear", 100))
    x, eps = th.randn(2, 1, 1, 3, 3, generator=th.Generator().manual_seed(0))
    out = short.ddim_sample(lambda x, t: th.cat([eps, eps], 1), x, th.tensor([2]), clip_denoised=False)
    x_start = (x - (1 - abar[60]) ** 0.5 * eps) / abar[60] ** 0.5
    expected = abar[20] ** 0.5 * x_start + (1 - abar[20]) ** 0.5 * eps
    th.testing.assert_close(out["sample"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_model_sees_the_base_timesteps(loop, rescale):
    kept = [3, 10, 11, 90]
    short, model, asked = spaced(kept, steps=250, rescale_timesteps=rescale), Recorder(), []
    getattr(short, loop)(model, (2, 1, 2, 2), cond_fn=lambda x, t: (asked.append(t), 0 * x)[1], device="cpu")
    expected = [4 * k for k in kept] if rescale else kept
    assert [t.tolist() for t in model.seen] == [[k, k] for k in reversed(expected)]
    assert all(t.dtype == (th.float32 if rescale else th.int64) for t in model.seen)
    assert all(th.equal(a, b) for a, b in zip(asked, model.seen, strict=True))


def test_model_sees_the_base_timesteps_in_training():
    short, x, t = spaced([3, 10, 90]), th.zeros(3, 1, 2, 2), th.tensor([2, 0, 1])
    for loss_type in LossType:
        short.loss_type, model = loss_type, Recorder()
        short.training_losses(model, x, t)
        assert [seen.tolist() for seen in model.seen] == [[90, 3, 10]]
    model = Recorder()
    short.calc_bpd_loop(model, x)
    assert [seen[0].item() for seen in model.seen] == [90, 10, 3]


def test_order_and_repeats_of_the_kept_steps_do_not_matter():
    assert spaced([60, 5, 20, 5]).timestep_map == spaced({5, 20, 60}).timestep_map == [5, 20, 60]


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_respaced_goes_by_the_base_process(schedule):
    """Also from a process that is spaced itself."""
    direct = spaced([5, 20, 60], schedule, rescale_timesteps=True)
    again = respaced(spaced([3, 90], schedule, rescale_timesteps=True), [60, 5, 20])
    assert again.timestep_map == direct.timestep_map and again.original_num_steps == 100
    for table in TABLES:
        np.testing.assert_allclose(getattr(again, table), getattr(direct, table), rtol=1e-9, err_msg=table)
    assert {name: getattr(again, name) for name in OPTIONS} == OPTIONS and again.rescale_timesteps


@pytest.mark.parametrize("rescale", [False, True])
def test_training_works_after_sampling_in_inference_mode(rescale):
    short = spaced([3, 10, 90], rescale_timesteps=rescale)
    weight = th.tensor(0.5, requires_grad=True)

    def model(x, t):
        return th.cat([weight * t.view(-1, 1, 1, 1) * x, 0 * x], dim=1)  # keeps t for the backward pass

    with th.inference_mode():
        short.p_sample_loop(model, (1, 1, 2, 2), device="cpu")
    short.training_losses(model, th.ones(1, 1, 2, 2), th.tensor([1]))["loss"].sum().backward()
    assert weight.grad.isfinite()
