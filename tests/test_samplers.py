"""Sampling by name: sample k is the same in whatever company, and every argument acts."""

import numpy as np
import pytest
import torch as th

from guided_diffusion.samplers import SAMPLERS, Denoised, SampleNoise, Schedule, make_schedule, sample, sample_seed
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.unet import UNetModel

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


def draw(name, diffusion, model, y, indices, seed=5, s=1.5, **options):
    return sample(name, diffusion, model, y[indices], s=s, channels=CHANNELS, seed=seed, indices=indices, **options)


# A batch of another size is computed by other kernels, so the model's output differs in its last bits. A model that
# predicts noise has them multiplied by up to 1 / sqrt(abar), 2000 at the end of this schedule: half a grey level.
@pytest.mark.parametrize("predict_xstart, tolerance", [(True, 1e-4), (False, 0.5 / 127.5)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_k_does_not_depend_on_its_batch(name, predict_xstart, tolerance, model, y):
    diffusion = make_diffusion(predict_xstart=predict_xstart)
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


@pytest.mark.parametrize("predict_xstart", [False, True])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_ddpm_and_ddim_are_those_of_the_loops(predict_xstart, learn_sigma, model, y):
    diffusion = make_diffusion(predict_xstart=predict_xstart, learn_sigma=learn_sigma, rescale_timesteps=True)
    half = model if learn_sigma else lambda x, t, y: model(x, t, y=y)[:, :CHANNELS]
    noise = SampleNoise(5, [0])
    start = noise(th.empty(1, CHANNELS, SIZE, SIZE))
    options = dict(noise=start, device="cpu", model_kwargs={"y": y[:1], "s": 1.5})
    deterministic = diffusion.ddim_sample_loop(half, start.shape, **options)
    ancestral = diffusion.p_sample_loop(half, start.shape, noise_fn=noise, **options)
    tolerance = 1e-4 if predict_xstart else 0.5 / 127.5
    th.testing.assert_close(draw("ddim", diffusion, half, y, [0]), deterministic, rtol=0, atol=tolerance)
    th.testing.assert_close(draw("ddpm", diffusion, half, y, [0]), ancestral, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SAMPLERS)
def test_clip_denoised(name, diffusion, model, y):
    assert draw(name, diffusion, model, 9 * y, [0, 1]).abs().max() <= 1
    assert draw(name, diffusion, model, 9 * y, [0, 1], clip_denoised=False).abs().max() > 1


def test_unknown_sampler(diffusion, model, y):
    with pytest.raises(ValueError, match=r"unknown --sampler euler.*ddpm, ddim"):
        draw("euler", diffusion, model, y, [0])


# ---- noise ----


def test_noise_of_a_sample_is_its_own_generators():
    generators = [th.Generator().manual_seed(sample_seed(3, index)) for index in (7, 4)]
    noise = SampleNoise(3, [7, 4])
    for shape in [(1, 2, 2), (3,)]:  # successive draws go on in each stream
        expected = th.stack([th.randn(shape, generator=g) for g in generators])
        assert th.equal(noise.draw(shape), expected)
    like = th.zeros(2, 3, 2, dtype=th.bfloat16)
    assert th.equal(noise(like), th.stack([th.randn(3, 2, generator=g) for g in generators]))


def test_noise_is_standard_normal_and_uncorrelated():
    n = 4000
    draws = SampleNoise(0, range(8)).draw((n,))
    bound = 5 / n**0.5
    assert draws.mean(1).abs().max() < bound
    covariance = draws.cov()
    assert (covariance - th.eye(8)).abs().max() < bound * 2**0.5


def test_sample_seeds_are_distinct():
    grid = [sample_seed(seed, index) for seed in range(40) for index in range(250)]
    assert len(set(grid)) == len(grid)
    assert min(grid) >= 0
    assert max(grid) < 2**63
    assert sample_seed(1, 2) != sample_seed(2, 1)
    assert sample_seed(3, 4) == sample_seed(3, 4)
    # Well mixed: every bit is set about half of the time.
    for bit in range(63):
        share = sum(value >> bit & 1 for value in grid) / len(grid)
        assert abs(share - 0.5) < 5 * 0.5 / len(grid) ** 0.5


# ---- exact oracles: data whose optimal denoiser is known ----

MEAN, STD = 0.3, 0.4


def oracle_schedule(steps, low=-4.0, high=9.0):
    """Points evenly spaced in lambda on a variance-preserving path."""
    lambdas = np.linspace(low, high, steps)
    alphas = 1 / np.sqrt(1 + np.exp(-2 * lambdas))
    return Schedule(np.arange(steps)[::-1], np.append(alphas, 1.0), np.append(np.sqrt(1 - alphas**2), 0.0))


def gaussian_denoiser(x, schedule, i):
    """E[x_0 | x_t] where x_0 is N(MEAN, STD^2)."""
    alpha, sigma = schedule.alphas[i], schedule.sigmas[i]
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return Denoised(MEAN + gain * (x - alpha * MEAN))


def mixture_denoiser(x, schedule, i):
    """E[x_0 | x_t] where x_0 is -0.8 with probability 0.3 and 0.5 with 0.7, each blurred by 0.05."""
    alpha, sigma = schedule.alphas[i], schedule.sigmas[i]
    variance = alpha**2 * 0.05**2 + sigma**2
    centres, weights = th.tensor([-0.8, 0.5], dtype=x.dtype), th.tensor([0.3, 0.7], dtype=x.dtype)
    distance = x[..., None] - alpha * centres
    share = (weights.log() - distance**2 / (2 * variance)).softmax(dim=-1)
    return Denoised((share * (centres + alpha * 0.05**2 / variance * distance)).sum(dim=-1))


def solve(name, schedule, denoiser=gaussian_denoiser, count=50_000, **options):
    generator = th.Generator().manual_seed(0)
    x = th.randn(count, generator=generator, dtype=th.float64)
    noise = lambda like: th.randn(like.shape, generator=generator, dtype=like.dtype)  # noqa: E731
    return x, SAMPLERS[name](denoiser, x, schedule, noise, lambda i, x_start: None, **options)


def ode_error(name, steps):
    """The largest distance from the probability flow's exact solution for Gaussian data."""
    schedule = oracle_schedule(steps)
    x, end = solve(name, schedule, count=200)
    alpha, sigma = schedule.alphas[0], schedule.sigmas[0]
    exact = MEAN + STD * (x - alpha * MEAN) / np.sqrt(alpha**2 * STD**2 + sigma**2)
    return float((end - exact).abs().max())


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("unipc", 2)])
def test_error_falls_at_the_order(name, order):
    errors = [ode_error(name, steps) for steps in (20, 40, 80, 160)]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert rates[-1] > order - 0.2, (errors, rates)
    assert order > 1 or rates[-1] < 1.2


def test_higher_orders_beat_ddim_at_25_steps():
    first = ode_error("ddim", 25)
    assert ode_error("dpmpp_2m", 25) < first / 3 and ode_error("unipc", 25) < first / 3


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_first_order_is_ddim(name):
    # The first step and the last are of first order; two steps have no others.
    schedule = oracle_schedule(2)
    _, ours = solve(name, schedule, count=100)
    _, ddim = solve("ddim", schedule, count=100)
    if name == "dpmpp_2m":
        th.testing.assert_close(ours, ddim)
    one = oracle_schedule(1)
    th.testing.assert_close(solve(name, one, count=100)[1], solve("ddim", one, count=100)[1])


@pytest.mark.parametrize("ratio", [1.4, 1.9, 2.1, 5.0])
def test_steps_too_long_to_extrapolate_are_of_first_order(ratio):
    """The second step is `ratio` times as long as the first: beyond 2, only where it begins may matter."""
    length = 0.8
    lambdas = np.array([-1.0, -1.0 + length, -1.0 + length * (1 + ratio)])
    alphas = 1 / np.sqrt(1 + np.exp(-2 * lambdas))
    schedule = Schedule(np.arange(3)[::-1], np.append(alphas, 1.0), np.append(np.sqrt(1 - alphas**2), 0.0))
    seen = []
    for first in (0.0, 0.7):  # x_0 as it is predicted before the first step

        def denoiser(x, schedule, i, first=first):
            if i == 2:
                seen.append(x)
            return Denoised(th.full_like(x, (first, 0.2, 0.1)[i]))

        # The first step leads to 0 from here, whatever is predicted: both come to the second from the same place.
        start = th.zeros(4, dtype=th.float64)
        start += alphas[1] * np.expm1(-length) * first / (schedule.sigmas[1] / schedule.sigmas[0])
        SAMPLERS["dpmpp_2m"](denoiser, start, schedule, th.randn_like, lambda i, x_start: None)
    assert th.allclose(*seen, atol=1e-12) == (ratio > 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_mean_and_variance_of_a_gaussian(name):
    _, end = solve(name, oracle_schedule(300, high=7.0))
    assert abs(float(end.mean()) - MEAN) < 0.01
    assert abs(float(end.std()) - STD) < 0.01


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_keeps_the_variance(eta):
    _, end = solve("ddim", oracle_schedule(300, high=7.0), eta=eta)
    assert abs(float(end.mean()) - MEAN) < 0.01 and abs(float(end.std()) - STD) < 0.01


def test_ddim_with_eta_one_is_ddpm_with_the_smaller_variance():
    schedule = oracle_schedule(30)
    generators = [th.Generator().manual_seed(1) for _ in range(2)]
    x = th.randn(50, dtype=th.float64)
    smaller = lambda x, schedule, i: Denoised(  # noqa: E731
        gaussian_denoiser(x, schedule, i).x_start, th.zeros_like(x)
    )
    noises = [lambda like, g=g: th.randn(like.shape, generator=g, dtype=like.dtype) for g in generators]
    ddim = SAMPLERS["ddim"](gaussian_denoiser, x, schedule, noises[0], lambda *_: None, eta=1.0)
    ddpm = SAMPLERS["ddpm"](smaller, x, schedule, noises[1], lambda *_: None)
    th.testing.assert_close(ddim, ddpm)


@pytest.mark.parametrize("name", SAMPLERS)
def test_both_modes_of_a_mixture(name):
    _, end = solve(name, oracle_schedule(200, high=7.0), mixture_denoiser, count=20_000)
    right = end > 0
    assert abs(float(right.double().mean()) - 0.7) < 0.02
    assert abs(float(end[right].mean()) - 0.5) < 0.01 and abs(float(end[~right].mean()) + 0.8) < 0.01


# ---- schedules ----


def test_even_schedule_stops_short_of_the_cosine_end():
    diffusion = make_diffusion(steps=1000, timestep_respacing="")
    schedule = make_schedule("dpmpp_2m", diffusion, 25)
    assert len(schedule) == 25 and schedule.times[-1] == 0 and (np.diff(schedule.times) < 0).all()
    assert -5.2 < -5.1 <= schedule.lambdas[0] < -4.9
    assert schedule.alphas[-1] == 1 and schedule.sigmas[-1] == 0 and schedule.lambdas[-1] == np.inf
    assert make_schedule("ddim", diffusion, 25).times[0] == 999
    assert len(make_schedule("unipc", diffusion, 1)) == 1


def test_own_respacing():
    diffusion = make_diffusion(steps=1000, timestep_respacing="ddim25")
    assert make_schedule("dpmpp_2m", diffusion).times.tolist() == list(range(960, -1, -40))


@pytest.mark.parametrize("steps", [-1, 1001])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match=f"--num_steps {steps} is out of range"):
        make_schedule("ddpm", make_diffusion(steps=1000, timestep_respacing=""), steps)


# ---- guidance by noise level ----


def test_guidance_acts_inside_its_interval_alone(diffusion, model, y):
    schedule = make_schedule("ddim", diffusion)
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


def test_steps_even_in_lambda():
    diffusion = make_diffusion(steps=1000, timestep_respacing="")
    schedule = make_schedule("dpmpp_2m_sde", diffusion, 25)
    gaps = np.diff(schedule.lambdas[:-1])
    assert schedule.times[-1] == 0 and gaps.max() < 1.5 * gaps.min()
    for steps in (1, 2, 100, 500, 900):
        times = Schedule.even_in_lambda(diffusion.base_alphas_cumprod, steps).times
        assert len(times) == steps and (np.diff(times) < 0).all() and times.min() >= 0
    lambdas = schedule.lambdas
    most = int((0.5 * np.log(diffusion.base_alphas_cumprod / (1 - diffusion.base_alphas_cumprod)) >= -5.1).sum())
    assert lambdas[0] >= -5.1
    assert Schedule.even_in_lambda(diffusion.base_alphas_cumprod, most).times.tolist() == list(range(most - 1, -1, -1))
    with pytest.raises(ValueError, match=f"--num_steps {most + 1} is out of range: give 1 to {most}"):
        Schedule.even_in_lambda(diffusion.base_alphas_cumprod, most + 1)
