"""The diffusion process against Bayes' rule, Gaussian data with its optimal denoiser, and losses by hand."""

import math

import numpy as np
import pytest
import torch as th
from torch import nn
from torch.distributions import Normal, kl_divergence

from guided_diffusion.gaussian_diffusion import (
    NOISE_SCHEDULES,
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.losses import discretized_gaussian_log_likelihood

MEAN_TYPES = list(ModelMeanType)
VAR_TYPES = list(ModelVarType)
LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


def process(
    steps=100,
    schedule="linear",
    mean_type=ModelMeanType.EPSILON,
    var_type=ModelVarType.FIXED_SMALL,
    loss_type=LossType.MSE,
    rescale_timesteps=False,
    **options,
):
    return GaussianDiffusion(
        betas=get_named_beta_schedule(schedule, steps),
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        **options,
    )


def normal(*shape, seed=0):
    return th.randn(shape, generator=th.Generator().manual_seed(seed))


def column(values, t):
    """Values of a float64 table at steps t, as an [N x 1 x 1 x 1] tensor."""
    return th.from_numpy(np.asarray(values))[t].view(-1, 1, 1, 1)


class Facts:
    """
    What a schedule implies, from Bayes' rule alone, in float64.

    q(x_{t-1} | x_t, x_0) is the product of the prior N(sqrt(abar_{t-1}) x_0, 1 - abar_{t-1}) and of the likelihood
    N(x_t; sqrt(alpha_t) x_{t-1}, beta_t). At the first step the prior is a point.
    """

    def __init__(self, betas):
        alphas = 1 - betas
        self.betas = betas
        self.abar = np.exp(np.cumsum(np.log(alphas)))
        self.abar_prev = np.concatenate([[1.0], self.abar[:-1]])
        prior = np.append(np.inf, 1 / (1 - self.abar_prev[1:]))  # precisions
        self.post_variance = 1 / (prior + alphas / betas)
        self.coef_start = np.append(1, np.sqrt(self.abar_prev[1:]) * prior[1:] * self.post_variance[1:])
        self.coef_t = np.sqrt(alphas) / betas * self.post_variance
        # What the first step, whose variance is zero, counts as where a logarithm is needed.
        self.clipped_log_variance = np.log(np.append(self.post_variance[1], self.post_variance[1:]))

    def previous_x(self, x_start, x_t, t):
        return column(self.coef_start, t) * x_start + column(self.coef_t, t) * x_t


class Oracle:
    """
    The optimal model of data that is N(mu, sigma^2) in every pixel, or of one known image x_0 (sigma = 0).

    :param diffusion: tells what to predict, and in which form to give the exact variance of p(x_{t-1} | x_t).
    """

    def __init__(self, diffusion, mu, sigma):
        self.diffusion, self.mu, self.sigma = diffusion, mu, sigma
        self.facts = Facts(diffusion.betas)

    def __call__(self, x, t):
        facts, x = self.facts, x.double()
        abar, abar_prev, beta = (column(v, t) for v in (facts.abar, facts.abar_prev, facts.betas))
        marginal = abar * self.sigma**2 + 1 - abar
        x_start = self.mu + self.sigma**2 * abar.sqrt() / marginal * (x - abar.sqrt() * self.mu)
        prediction = {
            ModelMeanType.START_X: x_start,
            ModelMeanType.EPSILON: (x - abar.sqrt() * x_start) / (1 - abar).sqrt(),
            ModelMeanType.VELOCITY: (abar.sqrt() * x - x_start) / (1 - abar).sqrt(),
            ModelMeanType.PREVIOUS_X: facts.previous_x(x_start, x, t),
        }[self.diffusion.model_mean_type]
        if self.diffusion.model_var_type not in LEARNED:
            return prediction.float()
        variance = (abar_prev * self.sigma**2 + 1 - abar_prev) * beta / marginal
        values = variance.log()
        if self.diffusion.model_var_type == ModelVarType.LEARNED_RANGE:
            low = column(facts.clipped_log_variance, t)
            values = 2 * (values - low) / (beta.log() - low) - 1
        return th.cat([prediction, values.expand_as(x)], dim=1).float()


@pytest.mark.parametrize("betas", [[0.0, 0.1], [-0.1], [0.5, 1.1], [[0.1, 0.2]], [float("nan")]])
def test_bad_betas(betas):
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(
            betas=np.array(betas),
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.FIXED_SMALL,
            loss_type=LossType.MSE,
        )


# ---- q ----


def test_q_sample_is_many_single_steps_of_noise():
    diffusion = process(steps=50)
    x_start = normal(1, 2, 3, 3)
    mean, variance = x_start.double(), 0.0
    for i, beta in enumerate(diffusion.betas):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        t = th.tensor([i])
        got_mean, got_variance, got_log = diffusion.q_mean_variance(x_start, t)
        th.testing.assert_close(got_mean.double(), mean, rtol=1e-5, atol=1e-6)
        assert got_variance.item() == pytest.approx(variance, rel=1e-5)
        assert got_log.item() == pytest.approx(math.log(variance), rel=1e-5)
        noise = normal(1, 2, 3, 3, seed=i)
        sample = diffusion.q_sample(x_start, t, noise)
        th.testing.assert_close(sample.double(), mean + math.sqrt(variance) * noise, rtol=1e-5, atol=1e-5)


def test_q_sample_draws_standard_normal_noise():
    diffusion, n = process(steps=100), 20_000
    th.manual_seed(0)
    x_t = diffusion.q_sample(th.full((1, 1, 1, n), 0.7), th.tensor([60]))
    abar = np.cumprod(1 - diffusion.betas)[60]
    assert x_t.mean().item() == pytest.approx(0.7 * math.sqrt(abar), abs=4 * math.sqrt((1 - abar) / n))
    assert x_t.var().item() == pytest.approx(1 - abar, rel=4 * math.sqrt(2 / n))


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_posterior_by_bayes(schedule):
    diffusion = process(200, schedule)
    facts = Facts(diffusion.betas)
    np.testing.assert_allclose(diffusion.posterior_variance, facts.post_variance, rtol=1e-9)
    np.testing.assert_allclose(diffusion.posterior_mean_coef1, facts.coef_start, rtol=1e-9)
    np.testing.assert_allclose(diffusion.posterior_mean_coef2, facts.coef_t, rtol=1e-9)
    assert facts.post_variance[0] == facts.coef_t[0] == 0
    np.testing.assert_allclose(diffusion.posterior_log_variance_clipped, facts.clipped_log_variance, rtol=1e-9)

    t = th.tensor([0, 1, 150])
    x_start, x_t = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    expected = facts.previous_x(x_start.double(), x_t.double(), t)
    th.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)
    th.testing.assert_close(variance.double(), column(facts.post_variance, t), rtol=1e-6, atol=0)
    th.testing.assert_close(log_variance.double(), column(facts.clipped_log_variance, t), rtol=1e-6, atol=0)


def test_posterior_on_a_grid():
    """The same by brute force: multiply the two densities on a grid, normalise, take moments."""
    diffusion, t, x_start, x_t = process(100), 40, 0.6, -0.3
    abar_prev = np.prod(1 - diffusion.betas[:t])
    x_prev = np.linspace(-8, 8, 200_001)
    log_density = -((x_prev - math.sqrt(abar_prev) * x_start) ** 2) / (2 * (1 - abar_prev))
    log_density -= (x_t - math.sqrt(1 - diffusion.betas[t]) * x_prev) ** 2 / (2 * diffusion.betas[t])
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = (density * x_prev).sum()
    ours = diffusion.posterior_mean_coef1[t] * x_start + diffusion.posterior_mean_coef2[t] * x_t
    assert ours == pytest.approx(mean, rel=1e-9)
    assert diffusion.posterior_variance[t] == pytest.approx((density * (x_prev - mean) ** 2).sum(), rel=1e-6)


# ---- p ----


def test_kinds_of_prediction_agree():
    x, t = normal(4, 2, 3, 3), th.tensor([0, 1, 30, 99])
    outs = {}
    for mean_type in MEAN_TYPES:
        diffusion = process(mean_type=mean_type)
        outs[mean_type] = diffusion.p_mean_variance(Oracle(diffusion, 0.2, 0.5), x, t, clip_denoised=False)
    for out in outs.values():
        for key in ("mean", "variance", "log_variance", "pred_xstart"):
            assert out[key].shape == x.shape
            th.testing.assert_close(out[key], outs[ModelMeanType.START_X][key], rtol=1e-3, atol=2e-4)
    # And they are right: the optimal denoiser's formula, written out for one pixel.
    abar = np.prod(1 - process().betas[:31])
    best = 0.2 + 0.25 * math.sqrt(abar) / (0.25 * abar + 1 - abar) * (x[2, 0, 0, 0].item() - math.sqrt(abar) * 0.2)
    assert outs[ModelMeanType.EPSILON]["pred_xstart"][2, 0, 0, 0].item() == pytest.approx(best, abs=1e-5)


def test_velocity_by_hand():
    """alpha = .8, sigma = .6, x_0 = .5, noise = -1: x_t = -.2, and v = .8 * -1 - .6 * .5."""
    diffusion = GaussianDiffusion(
        betas=np.array([0.36]),
        model_mean_type=ModelMeanType.VELOCITY,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
    )
    x_start, noise, t = th.full((1, 1, 1, 1), 0.5), th.full((1, 1, 1, 1), -1.0), th.tensor([0])
    x_t = diffusion.q_sample(x_start, t, noise)
    assert x_t.item() == pytest.approx(-0.2)
    out = diffusion.p_mean_variance(lambda x, t: th.full_like(x, -1.1), x_t, t)
    assert out["pred_xstart"].item() == pytest.approx(0.5)
    assert diffusion._predict_eps_from_xstart(x_t, t, out["pred_xstart"]).item() == pytest.approx(-1)
    losses = diffusion.training_losses(lambda x, t: th.zeros_like(x), x_start, t, noise=noise)
    assert losses["loss"].item() == pytest.approx(1.1**2)


def test_variance_of_each_kind():
    x, t = normal(3, 1, 2, 2), th.tensor([0, 1, 70])
    facts = Facts(process().betas)
    small = facts.clipped_log_variance
    large = np.append(small[0], np.log(facts.betas[1:]))
    halves = normal(3, 2, 2, 2, seed=1)
    values = halves[:, 1:].double()
    share = (values + 1) / 2
    expected = {
        ModelVarType.FIXED_SMALL: column(small, t).expand_as(values),
        ModelVarType.FIXED_LARGE: column(large, t).expand_as(values),
        ModelVarType.LEARNED: values,
        ModelVarType.LEARNED_RANGE: share * column(np.log(facts.betas), t) + (1 - share) * column(small, t),
    }
    for var_type, log_variance in expected.items():
        diffusion = process(var_type=var_type)
        output = halves if var_type in LEARNED else halves[:, :1]
        out = diffusion.p_mean_variance(lambda x, t, output=output: output, x, t)
        th.testing.assert_close(out["log_variance"].double(), log_variance, rtol=1e-5, atol=1e-5)
        later = slice(1, None)  # FIXED_SMALL's first variance is truly zero: only its logarithm is clipped
        th.testing.assert_close(out["variance"][later].double(), log_variance[later].exp(), rtol=1e-4, atol=0)
    assert process().p_mean_variance(lambda x, t: x, x, t)["variance"][0].max() == 0


def test_clip_denoised_and_denoised_fn():
    diffusion = process(mean_type=ModelMeanType.START_X)
    x, t = normal(2, 1, 2, 2), th.tensor([10, 50])

    def predict(value, **options):
        out = diffusion.p_mean_variance(lambda x, t: th.full_like(x, value), x, t, **options)
        seen = out["pred_xstart"].unique().item()
        mean, _, _ = diffusion.q_posterior_mean_variance(th.full_like(x, seen), x, t)
        assert th.equal(out["mean"], mean)  # what was changed reaches the step
        return seen

    assert predict(1.5) == 1
    assert predict(-7) == -1
    assert predict(1.5, clip_denoised=False) == 1.5
    assert predict(0.5, denoised_fn=lambda x: x / 2) == 0.25
    assert predict(1.5, denoised_fn=lambda x: 10 * x) == 1  # clipped last
    assert predict(1.5, denoised_fn=lambda x: 10 * x, clip_denoised=False) == 15


# ---- sampling ----


def sampled_moments(diffusion, sampler, n, **options):
    mu, sigma = 0.4, 0.5
    shape = (1, 1, 1, n)  # pixels are independent: one image is n samples
    th.manual_seed(0)
    loop = getattr(diffusion, sampler)
    samples = loop(Oracle(diffusion, mu, sigma), shape, clip_denoised=False, device="cpu", **options)
    return (samples.mean().item() - mu) / sigma, samples.var().item() / sigma**2


# How far the variance of the discrete chain itself is from the data's, at these step counts and sigma = 0.5: from the
# recursion var <- A_t^2 var + w_t^2 of a linear model, in float64.
BIAS = {ModelVarType.FIXED_SMALL: 0.031, ModelVarType.FIXED_LARGE: 0.007}


@pytest.mark.parametrize("var_type", VAR_TYPES)
@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_ancestral_chain_reaches_the_data(mean_type, var_type):
    n = 10_000
    diffusion = process(250, "cosine", mean_type, var_type)
    mean_error, variance_ratio = sampled_moments(diffusion, "p_sample_loop", n)
    assert abs(mean_error) < 4 / math.sqrt(n)
    assert abs(variance_ratio - 1) < 4 * math.sqrt(2 / n) + BIAS.get(var_type, 0.001)


@pytest.mark.parametrize("eta, bias", [(0.0, 0.004), (1.0, 0.009)])
@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_ddim_chain_reaches_the_data(mean_type, eta, bias):
    n = 10_000
    diffusion = process(1000, "cosine", mean_type)
    mean_error, variance_ratio = sampled_moments(diffusion, "ddim_sample_loop", n, eta=eta)
    assert abs(mean_error) < 4 / math.sqrt(n)
    assert abs(variance_ratio - 1) < 4 * math.sqrt(2 / n) + bias


def test_large_variance_is_exact_for_standard_normal_data():
    """Then p(x_{t-1} | x_t) has variance beta at every step, so that very few steps suffice."""
    diffusion, n = process(25, "cosine", var_type=ModelVarType.FIXED_LARGE), 50_000
    th.manual_seed(0)
    oracle = Oracle(diffusion, 0.0, 1.0)
    *_, before_last, last = diffusion.p_sample_loop_progressive(oracle, (1, 1, 1, n), clip_denoised=False, device="cpu")
    assert before_last["sample"].mean().item() == pytest.approx(0, abs=4 / math.sqrt(n))
    assert before_last["sample"].var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    # The last step is the mean of x_0 given x at the first noise level, without noise.
    th.testing.assert_close(last["sample"], math.sqrt(1 - diffusion.betas[0]) * before_last["sample"])


def test_ddim_follows_the_probability_flow():
    """Noise z goes to mu + sigma (z - sqrt(abar) mu) / sqrt(abar sigma^2 + 1 - abar), the ODE's own solution."""
    diffusion = process(1000, "cosine")
    z = th.linspace(-3, 3, 13).view(1, 1, 1, 13)
    samples = diffusion.ddim_sample_loop(Oracle(diffusion, 0.4, 0.5), z.shape, noise=z, clip_denoised=False)
    th.testing.assert_close(samples, 0.4 + 0.5 * z, rtol=0, atol=4e-3)


@pytest.mark.parametrize("step", ["p_sample", "ddim_sample"])
def test_noise_of_a_step_and_none_at_the_first(step):
    diffusion = process(var_type=ModelVarType.FIXED_LARGE)
    x, t = normal(3, 2, 2, 2), th.tensor([0, 1, 60])
    options = {"eta": 1.0} if step == "ddim_sample" else {}
    th.manual_seed(5)
    out = getattr(diffusion, step)(Oracle(diffusion, 0.0, 0.5), x, t, clip_denoised=False, **options)
    th.manual_seed(5)
    noise = th.randn_like(x)
    # DDIM's own variance is the posterior's; FIXED_LARGE is for the ancestral step.
    facts = Facts(diffusion.betas)
    variance = facts.betas if step == "p_sample" else facts.post_variance
    mean = facts.previous_x(out["pred_xstart"].double(), x.double(), t)
    expected = mean + column(variance, t).sqrt() * noise * (t > 0).view(-1, 1, 1, 1)
    th.testing.assert_close(out["sample"].double(), expected, rtol=1e-4, atol=1e-5)


def test_ddim_without_eta_draws_nothing_and_is_the_formula():
    diffusion = process()
    x, t, eps = normal(2, 1, 3, 3), th.tensor([1, 70]), normal(2, 1, 3, 3, seed=1)
    state = th.get_rng_state()
    out = diffusion.ddim_sample(lambda x, t: eps, x, t, clip_denoised=False)
    assert th.equal(th.get_rng_state(), state)
    facts = Facts(diffusion.betas)
    abar, abar_prev = column(facts.abar, t), column(facts.abar_prev, t)
    x_start = (x.double() - (1 - abar).sqrt() * eps) / abar.sqrt()
    th.testing.assert_close(out["pred_xstart"].double(), x_start, rtol=1e-4, atol=1e-4)
    expected = abar_prev.sqrt() * x_start + (1 - abar_prev).sqrt() * eps
    th.testing.assert_close(out["sample"].double(), expected, rtol=1e-4, atol=1e-4)


def test_ddim_reverse_sample_inverts_ddim_sample():
    diffusion = process(steps=60)
    x, eps = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)

    def model(x, t):
        return eps

    for i in range(59):
        t = th.full((2,), i)
        up = diffusion.ddim_reverse_sample(model, x, t, clip_denoised=False)
        down = diffusion.ddim_sample(model, up["sample"], t + 1, clip_denoised=False)
        assert (up["sample"] - x).abs().max() > 1e-3
        th.testing.assert_close(down["sample"], x, rtol=1e-4, atol=1e-4)
        th.testing.assert_close(down["pred_xstart"], up["pred_xstart"], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"eta 0\.5"):
        diffusion.ddim_reverse_sample(model, x, t, eta=0.5)
    # Beyond the last step there is only noise.
    last = diffusion.ddim_reverse_sample(model, x, th.full((2,), 59), clip_denoised=False)
    th.testing.assert_close(last["sample"], eps, rtol=1e-4, atol=1e-4)


class Recorder(nn.Module):
    """A model that predicts a little of what it sees, and notes the timesteps it is shown."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(th.tensor(0.1))
        self.seen = []

    def forward(self, x, t, weight=1.0):
        self.seen.append(t)
        return weight * self.weight * x


@pytest.mark.parametrize("eta", [None, 0.0, 0.7])
def test_loops_are_their_steps_repeated(eta):
    """And take their arguments by position in the reference's order; eta None is the ancestral chain."""
    diffusion, shape, shift = process(steps=30, var_type=ModelVarType.FIXED_LARGE), (2, 1, 2, 2), 0.1
    model, noise, seen = Recorder(), normal(2, 1, 2, 2), []

    def shifted(x_start):
        return x_start + shift

    def cond_fn(x, t, **kwargs):
        seen.append((t.tolist(), kwargs))
        return -x

    name, last = ("p_sample", ()) if eta is None else ("ddim_sample", (eta,))
    step, loop, progressive = (getattr(diffusion, name + suffix) for suffix in ("", "_loop", "_loop_progressive"))
    kwargs = {"weight": 1.0}
    th.manual_seed(0)
    x = noise
    for i in range(29, -1, -1):
        x = step(model, x, th.full((2,), i), False, shifted, cond_fn, kwargs, *last)["sample"]
    assert seen == [([i, i], kwargs) for i in range(29, -1, -1)] == [(t.tolist(), kwargs) for t in model.seen]
    for run in (loop, progressive):
        th.manual_seed(0)
        out = run(model, shape, noise, False, shifted, cond_fn, kwargs, "cpu", False, *last)
        if run is progressive:
            steps = list(out)
            assert len(steps) == 30 and not any(step["sample"].requires_grad for step in steps)
            out = steps[-1]["sample"]
        th.testing.assert_close(out, x)
    # Without noise, x_T is drawn on the model's own device.
    th.manual_seed(1)
    drawn = loop(model, shape, None, False, shifted, cond_fn, kwargs, None, False, *last)
    th.manual_seed(1)
    given = loop(model, shape, th.randn(shape), False, shifted, cond_fn, kwargs, None, False, *last)
    assert th.equal(drawn, given) and not th.equal(drawn, out)


@pytest.mark.parametrize("sampler, bias", [("p_sample_loop", 0.03), ("ddim_sample_loop", 0.01)])
def test_cond_fn_steers_to_the_tilted_data(sampler, bias):
    """Of data N(mu, sigma^2) weighted by exp(c x_0), which is N(mu + c sigma^2, sigma^2)."""
    diffusion, c, sigma = process(1000, "cosine"), 1.5, 0.5
    abar = th.from_numpy(np.cumprod(1 - diffusion.betas)).float()

    def cond_fn(x, t):
        level = abar[t].view(-1, 1, 1, 1)
        return (c * sigma**2 * level.sqrt() / (level * sigma**2 + 1 - level)).expand_as(x)

    mean_error, variance_ratio = sampled_moments(diffusion, sampler, 10_000, cond_fn=cond_fn)
    assert mean_error == pytest.approx(c * sigma, abs=0.04 + bias)
    assert abs(variance_ratio - 1) < 4 * math.sqrt(2 / 10_000) + bias


def test_loop_starts_from_the_noise_it_is_given():
    diffusion, noise = process(steps=30), normal(2, 1, 2, 2)
    seen = []

    def model(x, t):
        seen.append(x)
        return x

    next(diffusion.p_sample_loop_progressive(model, noise.shape, noise=noise))
    assert th.equal(seen[0], noise)


@pytest.mark.parametrize("rescale", [False, True])
def test_timesteps_that_the_model_sees(rescale):
    diffusion = process(steps=250, rescale_timesteps=rescale)
    model, x, t = Recorder(), normal(3, 1, 2, 2), th.tensor([0, 7, 249])
    diffusion.p_mean_variance(model, x, t)
    diffusion.training_losses(model, x, t)
    for seen in model.seen:
        assert seen.dtype == (th.float32 if rescale else th.int64)
        assert seen.tolist() == ([0, 28, 996] if rescale else [0, 7, 249])
    assert len(model.seen) == 2


def test_model_kwargs_reach_the_model_and_stay_as_they_are():
    diffusion, kwargs = process(), {"y": th.ones(1, 1, 2, 2), "s": 1.0}
    seen = []

    def model(x, t, **given):
        seen.append(given)
        return x

    diffusion.p_mean_variance(model, normal(1, 1, 2, 2), th.tensor([3]), model_kwargs=kwargs)
    assert set(seen[0]) == {"y"}
    assert set(kwargs) == {"y", "s"}


def test_training_works_after_sampling_in_inference_mode():
    diffusion, model = process(steps=30), Recorder()
    with th.inference_mode():
        diffusion.p_sample_loop(model, (1, 1, 2, 2))
    diffusion.training_losses(model, normal(1, 1, 2, 2), th.tensor([4]))["loss"].sum().backward()
    assert model.weight.grad.isfinite()


# ---- losses ----


def pixels(*shape, seed=0):
    """8-bit images in [-1, 1]."""
    generator = th.Generator().manual_seed(seed)
    return th.randint(0, 256, shape, generator=generator) / 127.5 - 1


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_mse_by_hand(mean_type):
    diffusion = process(mean_type=mean_type)
    x_start, noise, output = pixels(3, 2, 3, 3), normal(3, 2, 3, 3), normal(3, 2, 3, 3, seed=1)
    t = th.tensor([0, 5, 80])
    seen = []
    losses = diffusion.training_losses(lambda x, t: (seen.append(x), output)[1], x_start, t, noise=noise)
    facts = Facts(diffusion.betas)
    abar = column(facts.abar, t)
    x_t = abar.sqrt() * x_start + (1 - abar).sqrt() * noise
    th.testing.assert_close(seen[0].double(), x_t, rtol=1e-5, atol=1e-5)
    target = {
        ModelMeanType.EPSILON: noise.double(),
        ModelMeanType.VELOCITY: abar.sqrt() * noise.double() - (1 - abar).sqrt() * x_start.double(),
        ModelMeanType.START_X: x_start.double(),
        ModelMeanType.PREVIOUS_X: facts.previous_x(x_start.double(), x_t, t),
    }[mean_type]
    expected = (target - output).pow(2).mean((1, 2, 3))
    th.testing.assert_close(losses["mse"].double(), expected, rtol=1e-4, atol=1e-5)
    assert set(losses) == {"mse", "loss"}
    assert th.equal(losses["loss"], losses["mse"])


@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.LEARNED_RANGE])
@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_min_snr_is_one_loss_of_the_image_whatever_is_predicted(mean_type, var_type):
    """min(SNR, gamma) times the squared error of x_0; the variance's term, and mse in the log, have no weight."""
    gamma, t = 2.0, th.tensor([0, 5, 30, 99])
    diffusion = process(100, "cosine", mean_type, var_type, min_snr_gamma=gamma)
    x_start, error, noise = pixels(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1), normal(4, 2, 3, 3)
    facts = Facts(diffusion.betas)
    abar = column(facts.abar, t)

    def model(x, t):
        x_0 = x_start.double() + error
        prediction = {
            ModelMeanType.START_X: x_0,
            ModelMeanType.EPSILON: (x - abar.sqrt() * x_0) / (1 - abar).sqrt(),
            ModelMeanType.VELOCITY: (abar.sqrt() * x - x_0) / (1 - abar).sqrt(),
            ModelMeanType.PREVIOUS_X: facts.previous_x(x_0, x.double(), t),
        }[mean_type]
        return th.cat([prediction, error], dim=1) if var_type in LEARNED else prediction

    losses = diffusion.training_losses(model, x_start, t, noise=noise)
    snr = facts.abar[t] / (1 - facts.abar[t])
    assert snr.min() < gamma < snr.max()
    expected = th.from_numpy(np.minimum(snr, gamma)) * error.double().pow(2).mean((1, 2, 3))
    th.testing.assert_close(losses["loss"].double() - losses.get("vb", 0), expected, rtol=1e-4, atol=1e-5)
    plain = process(100, "cosine", mean_type, var_type).training_losses(model, x_start, t, noise=noise)
    assert all(th.equal(losses[name], plain[name]) for name in plain.keys() - {"loss"})


def vb_by_hand(diffusion, x_start, x_t, t, mean, log_variance):
    """Bits per dimension of each sample, in float64, from torch.distributions."""
    facts = Facts(diffusion.betas)
    bits = []
    for i, step in enumerate(t.tolist()):
        m, log_v = mean[i].double(), log_variance[i].double()
        if step == 0:
            nats = -discretized_gaussian_log_likelihood(x_start[i].double(), means=m, log_scales=log_v / 2)
        else:
            true_mean = facts.previous_x(x_start[i : i + 1].double(), x_t[i : i + 1].double(), t[i : i + 1])[0]
            truth = Normal(true_mean, math.sqrt(facts.post_variance[step]))
            nats = kl_divergence(truth, Normal(m, (log_v / 2).exp()))
        bits.append(nats.mean() / math.log(2))
    return th.stack(bits)


LOSS_FACTOR = {LossType.KL: 1, LossType.RESCALED_KL: 100, LossType.MSE: 1, LossType.RESCALED_MSE: 100 / 1000}


@pytest.mark.parametrize("loss_type", list(LossType))
def test_variational_bound_by_hand(loss_type):
    diffusion = process(100, mean_type=ModelMeanType.START_X, var_type=ModelVarType.LEARNED_RANGE, loss_type=loss_type)
    x_start, noise, t = pixels(4, 1, 3, 3), normal(4, 1, 3, 3), th.tensor([0, 1, 40, 99])
    # Predictions beyond [-1, 1]: the bound in training is of what was predicted, not of what clipping makes of it.
    prediction, values = 2 * normal(4, 1, 3, 3, seed=1), normal(4, 1, 3, 3, seed=2)
    x_t = diffusion.q_sample(x_start, t, noise)
    losses = diffusion.training_losses(lambda x, t: th.cat([prediction, values], 1), x_start, t, noise=noise)

    facts = Facts(diffusion.betas)
    share = (values.double() + 1) / 2
    log_variance = share * column(np.log(facts.betas), t) + (1 - share) * column(facts.clipped_log_variance, t)
    mean = facts.previous_x(prediction.double(), x_t.double(), t)
    expected = LOSS_FACTOR[loss_type] * vb_by_hand(diffusion, x_start, x_t, t, mean, log_variance)
    if loss_type.is_vb():
        assert set(losses) == {"loss"}
        th.testing.assert_close(losses["loss"].double(), expected, rtol=1e-3, atol=1e-3)
    else:
        assert set(losses) == {"loss", "mse", "vb"}
        th.testing.assert_close(losses["vb"].double(), expected, rtol=1e-3, atol=1e-3)
        th.testing.assert_close(losses["mse"], (prediction - x_start).pow(2).mean((1, 2, 3)))
        assert th.equal(losses["loss"], losses["mse"] + losses["vb"])


@pytest.mark.parametrize("loss_type", list(LossType))
def test_bound_trains_the_variance_only_unless_it_is_the_loss(loss_type):
    diffusion = process(var_type=ModelVarType.LEARNED_RANGE, loss_type=loss_type)
    x_start, noise, t = pixels(2, 1, 3, 3), normal(2, 1, 3, 3), th.tensor([0, 40])
    output = normal(2, 2, 3, 3, seed=1).requires_grad_()
    losses = diffusion.training_losses(lambda x, t: output, x_start, t, noise=noise)
    losses["loss"].sum().backward()
    of_prediction, of_variance = output.grad.chunk(2, dim=1)
    mse_gradient = 2 * (output.detach()[:, :1] - noise) / 9
    if loss_type.is_vb():
        assert not th.allclose(of_prediction, mse_gradient, rtol=1e-2, atol=1e-3)
        assert of_prediction.abs().min() > 0
    else:
        th.testing.assert_close(of_prediction, mse_gradient)
    assert of_variance.abs().min() > 0


@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, *LEARNED])
@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_bound_is_zero_where_the_model_is_the_posterior(mean_type, var_type):
    diffusion = process(100, "cosine", mean_type, var_type, loss_type=LossType.KL)
    x_start, t = pixels(5, 1, 3, 3), th.tensor([1, 2, 30, 60, 90])
    knowing = Oracle(diffusion, x_start.double(), 0.0)
    exact = diffusion.training_losses(knowing, x_start, t, noise=normal(5, 1, 3, 3))["loss"]
    assert exact.abs().max() < 1e-4
    wrong = Oracle(diffusion, x_start.double() + 0.1, 0.0)
    off = diffusion.training_losses(wrong, x_start, t, noise=normal(5, 1, 3, 3))["loss"]
    # A mean that is off by d costs d^2 / (2 variance) nats.
    facts = Facts(diffusion.betas)
    expected = (0.1 * facts.coef_start[t]) ** 2 / (2 * facts.post_variance[t]) / math.log(2)
    np.testing.assert_allclose(off, expected, rtol=2e-2, atol=2e-4)


def test_calc_bpd_loop():
    diffusion = process(24, "cosine", ModelMeanType.START_X)
    x_start = pixels(2, 1, 3, 3)
    out = diffusion.calc_bpd_loop(lambda x, t, y: x_start + y, x_start, model_kwargs={"y": 0.0})
    assert out["vb"].shape == out["mse"].shape == out["xstart_mse"].shape == (2, 24)
    th.testing.assert_close(out["total_bpd"], out["vb"].sum(1) + out["prior_bpd"])

    facts = Facts(diffusion.betas)
    end = Normal(x_start.double() * math.sqrt(facts.abar[-1]), math.sqrt(1 - facts.abar[-1]))
    prior = kl_divergence(end, Normal(0.0, 1.0)).mean((1, 2, 3)) / math.log(2)
    th.testing.assert_close(out["prior_bpd"].double(), prior, rtol=1e-3, atol=1e-6)

    # The model knows the image: nothing is left to code but the decoder's rounding, and the noise is known too.
    assert out["xstart_mse"].max() == 0
    assert out["mse"].max() < 1e-4
    assert out["vb"][:, 1:].abs().max() < 1e-4
    log_scale = th.full_like(x_start, 0.5 * math.log(facts.post_variance[1]))
    decoder = -discretized_gaussian_log_likelihood(x_start, means=x_start, log_scales=log_scale).mean((1, 2, 3))
    th.testing.assert_close(out["vb"][:, 0], decoder / math.log(2), rtol=1e-3, atol=1e-4)


def test_calc_bpd_loop_orders_steps_and_clips():
    diffusion = process(24, "cosine", ModelMeanType.START_X)
    x_start = pixels(2, 1, 3, 3)

    def model(x, t):
        return x_start + 0.01 * t.view(-1, 1, 1, 1) + 3 * (t == 23).view(-1, 1, 1, 1)

    out = diffusion.calc_bpd_loop(model, x_start, clip_denoised=False)
    expected = (0.01 * th.arange(24) + 3 * (th.arange(24) == 23)) ** 2
    th.testing.assert_close(out["xstart_mse"], expected.expand(2, 24), rtol=1e-3, atol=1e-6)
    clipped = diffusion.calc_bpd_loop(model, x_start)["xstart_mse"][:, -1]
    th.testing.assert_close(clipped, (1 - x_start).pow(2).mean((1, 2, 3)))


def test_unused_conditions_are_not_needed():
    losses = process().training_losses(lambda x, t: x, pixels(1, 1, 2, 2), th.tensor([3]))
    assert losses["loss"].shape == (1,)
