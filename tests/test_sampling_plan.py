"""A plan of sampling: sample k is the same in whatever company, and every argument acts."""

import functools
import sys

import numpy as np
import pytest
import torch as th

from guided_diffusion.samplers import SAMPLERS, SampleNoise
from guided_diffusion.sampling_plan import SamplingPlan, process_for
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.unet import UNetModel
from guided_diffusion.windows import Fields

CHANNELS, SIZE = 3, 16


@pytest.fixture(scope="module")
def model():
    """A tiny U-Net with learned variance, none of whose layers is zero."""
    with th.random.fork_rng(), th.no_grad():
        th.manual_seed(0)
        net = UNetModel(
            image_size=SIZE,
            in_channels=CHANNELS,
            model_channels=32,
            out_channels=2 * CHANNELS,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=(1, 1),
            num_classes=2,
            num_heads=2,
            dropout=0.5,
        )
        for p in net.parameters():
            p.add_(0.05 * th.randn(p.shape))
    return net.eval()


def make_diffusion(**changes):
    flags = dict(steps=100, learn_sigma=True, noise_schedule="cosine", timestep_respacing="8")
    return create_gaussian_diffusion(**{**flags, **changes})


@pytest.fixture(scope="module")
def diffusion():
    return make_diffusion()


@pytest.fixture(scope="module")
def y():
    """The conditions of samples 0 ... 3."""
    return th.randn(4, 2, SIZE, SIZE, generator=th.Generator().manual_seed(1))


def draw(name, diffusion, model, y, indices, **options):
    plan = SamplingPlan(name, diffusion, **{"s": 1.5, "seed": 5, **options})
    return plan.sample(model, y[indices], indices)


# A batch of another size is computed by other kernels, so the model's output differs in its last bits. A model that
# predicts noise has them multiplied by up to 1 / sqrt(abar), 2000 at the end of this schedule: half a grey level.
@pytest.mark.parametrize("predict_xstart, tolerance", [(True, 1e-4), (False, 0.5 / 127.5)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_k_does_not_depend_on_its_batch(name, predict_xstart, tolerance, model, y):
    diffusion = make_diffusion(predict_xstart=predict_xstart, timestep_respacing="4")
    together = draw(name, diffusion, model, y, [0, 1, 2, 3])
    assert together.shape == (4, CHANNELS, SIZE, SIZE)
    assert together.dtype == th.float32
    for indices in ([2], [3, 2, 1, 0], [1, 3]):
        th.testing.assert_close(draw(name, diffusion, model, y, indices), together[indices], rtol=0, atol=tolerance)
    # The samples do differ from one another, and not only by their conditions.
    same_condition = draw(name, diffusion, model, y[:1].expand(4, -1, -1, -1), [0, 1, 2, 3])
    for i in range(4):
        for j in range(i):
            assert (together[i] - together[j]).abs().max() > 0.1
            assert (same_condition[i] - same_condition[j]).abs().max() > 0.1


def test_sampling_leaves_the_global_generator_alone(diffusion, model, y):
    before = th.get_rng_state()
    draw("ddpm", diffusion, model, y, [0])
    assert th.equal(th.get_rng_state(), before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_seed_scale_and_condition_act(name, diffusion, model, y):
    first = draw(name, diffusion, model, y, [0])
    assert th.equal(draw(name, diffusion, model, y, [0]), first)
    for other in (
        draw(name, diffusion, model, y, [0], seed=6),
        draw(name, diffusion, model, y, [0], s=3.0),
        draw(name, diffusion, model, -y, [0]),
    ):
        assert (other - first).abs().max() > 1e-3
    assert th.equal(draw(name, diffusion, model, y, [0], s=1.0), draw(name, diffusion, model, y, [0], s=0.3))


@pytest.mark.parametrize("learn_sigma, sigma_small", [(True, False), (False, False), (False, True)])
def test_ddpm_and_ddim_are_those_of_the_reference(learn_sigma, sigma_small, model, y):
    """The same chains by the reference's calls."""
    diffusion = make_diffusion(learn_sigma=learn_sigma, sigma_small=sigma_small, rescale_timesteps=True)
    half = model if learn_sigma else lambda x, t, y: model(x, t, y=y)[:, :CHANNELS]
    start = SampleNoise(5, [0]).draw((CHANNELS, SIZE, SIZE))
    options = dict(device="cpu", model_kwargs={"y": y[:1], "s": 1.5})
    assert th.equal(
        draw("ddim", diffusion, half, y, [0]), diffusion.ddim_sample_loop(half, start.shape, start, **options)
    )

    noise = SampleNoise(5, [0])
    x = noise.draw((CHANNELS, SIZE, SIZE))
    for i in reversed(range(diffusion.num_timesteps)):
        t = th.tensor([i])
        with th.no_grad():
            out = diffusion.p_mean_variance(half, x, t, model_kwargs=options["model_kwargs"])
        x = out["mean"] + (i > 0) * (0.5 * out["log_variance"]).exp() * noise(x)
    assert th.equal(draw("ddpm", diffusion, half, y, [0]), x)


@pytest.mark.parametrize("s", [1.0, 1.7])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_model_predicts_makes_no_difference(name, s, y):
    """One estimate of the image, told as itself, as noise and as v: equal samples, but for the fp32 of the tables."""
    told = {}
    for kind in ("predict_xstart", "predict_v", ""):
        flags = dict(noise_schedule="linear", rescale_timesteps=True, **({kind: True} if kind else {}))
        diffusion = make_diffusion(**flags)

        def model(x, t, y, kind=kind, levels=diffusion.base_alphas_cumprod):
            x, level = x.double(), th.from_numpy(levels)[(t / 10).round().long()].view(-1, 1, 1, 1)
            x_start = 0.8 * (y.mean((1, 2, 3), keepdim=True) + x).sin() + 0.4 * x.flip(1)
            eps = (x - level.sqrt() * x_start) / (1 - level).sqrt()
            v = level.sqrt() * eps - (1 - level).sqrt() * x_start
            prediction = {"predict_xstart": x_start, "predict_v": v, "": eps}[kind]
            return th.cat([prediction, x.cos()], dim=1)

        told[kind] = draw(name, diffusion, model, y, [0, 1], s=s)
    assert told[""].std() > 0.1
    th.testing.assert_close(told["predict_v"], told["predict_xstart"], rtol=0, atol=1e-6)
    th.testing.assert_close(told["predict_v"], told[""], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_clip_denoised(name, diffusion, model, y):
    assert draw(name, diffusion, model, 9 * y, [0, 1]).abs().max() <= 1
    assert draw(name, diffusion, model, 9 * y, [0, 1], clip_denoised=False).abs().max() > 1


def test_fewer_steps_are_those_of_a_spaced_process(model, y):
    diffusion = make_diffusion(timestep_respacing="")
    for name in ("ddpm", "ddim"):
        spaced = make_diffusion(timestep_respacing="7")
        plan = SamplingPlan(name, process_for(name, diffusion, 7))
        assert plan.process.timestep_map == spaced.timestep_map and len(plan) == 7
        expected = SamplingPlan(name, spaced).sample(model, y[:1], [0])
        th.testing.assert_close(plan.sample(model, y[:1], [0]), expected)
    assert process_for("ddpm", diffusion) is diffusion


def test_progress_shows_steps(diffusion, model, y, capsys, monkeypatch):
    plan = SamplingPlan("ddim", diffusion)
    quiet = plan.sample(model, y[:1], [0])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert th.equal(plan.sample(model, y[:1], [0], progress=True), quiet)
    assert "/8" in capsys.readouterr().err


# ---- steps ----


def test_steps_of_each_sampler():
    diffusion = make_diffusion(steps=1000, timestep_respacing="")
    process = process_for("dpmpp_2m", diffusion, 25)
    assert process.num_timesteps == 25 and process.timestep_map[0] == 0
    # Multi-step samplers stop short of the cosine schedule's end.
    assert -5.1 <= process.schedule.lambdas[0] < -4.9
    assert process_for("ddim", diffusion, 25).timestep_map[-1] == 999
    assert process_for("unipc", diffusion, 1).num_timesteps == 1
    own = make_diffusion(steps=1000, timestep_respacing="ddim25")
    assert process_for("dpmpp_2m", own).timestep_map == list(range(0, 1000, 40))


@pytest.mark.parametrize(
    "name, steps, message",
    [
        ("ddpm", -1, "--num_steps -1 is out of range: give 1 to 1000"),
        ("ddpm", 1001, "--num_steps 1001 is out of range: give 1 to 1000"),
        ("euler", 0, r"unknown --sampler euler.*ddpm, ddim"),
    ],
)
def test_mistakes(name, steps, message):
    with pytest.raises(ValueError, match=message):
        process_for(name, make_diffusion(steps=1000, timestep_respacing=""), steps)


# ---- guidance by noise level ----


def test_guidance_acts_inside_its_interval_alone(diffusion, model, y):
    schedule = diffusion.schedule
    levels = schedule.sigmas[:-1] / schedule.alphas[:-1]
    low, high = float(levels[5]), float(levels[2])
    counting_model = Counting(model)
    inside = draw("ddim", diffusion, counting_model, y, [0], s=2.0, interval=(low, high))
    assert counting_model.calls == len(schedule) + 4  # the second branch runs at levels 2, 3, 4 and 5
    everywhere = draw("ddim", diffusion, model, y, [0], s=2.0)
    nowhere = draw("ddim", diffusion, model, y, [0], s=2.0, interval=(1e9, 2e9))
    assert th.equal(nowhere, draw("ddim", diffusion, model, y, [0], s=1.0))
    assert not th.equal(inside, everywhere) and not th.equal(inside, nowhere)
    assert th.equal(everywhere, draw("ddim", diffusion, model, y, [0], s=2.0, interval=(0.0, np.inf)))


class Counting:
    """A model that counts its evaluations."""

    def __init__(self, model):
        self.model = model
        self.calls = 0

    def __call__(self, x, t, y):
        self.calls += 1
        return self.model(x, t, y=y)


def test_a_model_as_its_own_guide_changes_nothing(diffusion, model, y):
    guided = draw("ddim", diffusion, model, y, [0], s=3.0, guide=model)
    th.testing.assert_close(guided, draw("ddim", diffusion, model, y, [0], s=1.0), rtol=0, atol=0.5 / 127.5)


def test_null_condition_that_keeps_a_part(diffusion, model, y):
    kept = y.clone()
    kept[:, 0] = 0
    partly = draw("ddim", diffusion, model, y, [0, 1], s=3.0, null=kept[:2])
    assert not th.equal(partly, draw("ddim", diffusion, model, y, [0, 1], s=3.0))
    same = draw("ddim", diffusion, model, y, [0, 1], s=3.0, null=y[:2])
    th.testing.assert_close(same, draw("ddim", diffusion, model, y, [0, 1], s=1.0), rtol=0, atol=0.5 / 127.5)


# ---- fields ----


def draw_fields(name, diffusion, model, ys, numbers, batch_size=3, turned=False, **options):
    """Fields of these [C x H x W] conditions, guided."""
    plan = SamplingPlan(name, diffusion, **{"s": 1.5, "seed": 5, **options})
    fields = Fields([y.shape[1:] for y in ys], SIZE, 0.5, batch_size)
    if turned:
        fields.batches = [batch[::-1] for batch in fields.batches[::-1]]
    null = th.zeros(1, *ys[0].shape[:1], SIZE, SIZE)
    return plan.sample_fields(model, fields, lambda batch: (fields.cut(ys, batch), null), numbers)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_field_of_one_window_is_a_patch(name, diffusion, model, y):
    patches = draw(name, diffusion, model, y, [0, 1], null=th.zeros_like(y[:1]))
    fields = draw_fields(name, diffusion, model, list(y[:2]), [0, 1])
    assert th.equal(th.stack(fields), patches)


@pytest.mark.parametrize(
    ("name", "guidance"),
    [("ddpm", {"s": 1.0}), ("dpmpp_2m_sde", {"s": 1.0}), ("ddpm", {"s": 2.0, "interval": (0.1, 5.0)})],
)
def test_a_field_depends_on_neither_company_nor_order(name, guidance, model):
    diffusion = make_diffusion(predict_xstart=True, timestep_respacing="3")
    generator = th.Generator().manual_seed(2)
    ys = [th.randn(2, *shape, generator=generator) for shape in ((24, 23), (16, 16))]
    sample = functools.partial(draw_fields, name, diffusion, model, **guidance)
    together = sample(ys, [7, 2])
    if "interval" in guidance:
        assert (draw_fields(name, diffusion, model, ys, [7, 2], s=2.0)[0] - together[0]).abs().max() > 1e-3
    assert [field.shape for field in together] == [(CHANNELS, 24, 23), (CHANNELS, 16, 16)]
    for other in (
        sample(ys, [7, 2], batch_size=100),
        sample(ys, [7, 2], turned=True),
        sample(ys[::-1], [2, 7], batch_size=1)[::-1],
        [*sample(ys[:1], [7]), *sample(ys[1:], [2])],
    ):
        for field, same in zip(together, other):
            th.testing.assert_close(field, same, rtol=0, atol=1e-5)
    assert (sample(ys[:1], [8])[0] - together[0]).abs().max() > 0.1


def test_what_a_field_costs(diffusion):
    cost = SamplingPlan("ddim", diffusion).cost_of_fields(16, 0.5)["denoiser_calls_a_pixel"]
    assert cost == {"16 px": 8, "32 px": 18, "64 px": 24.5, "128 px": 28.1}
