"""Divergences and likelihoods against torch.distributions, sums over all bins, and limits."""

import math

import pytest
import torch as th
from torch.distributions import Normal, kl_divergence

from guided_diffusion.losses import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, normal_kl

BINS = th.arange(256, dtype=th.float64) / 127.5 - 1


def normals(seed, n=64):
    g = th.Generator().manual_seed(seed)
    mean, logvar = (th.randn(n, generator=g, dtype=th.float64) for _ in range(2))
    return mean, 2 * logvar


def test_normal_kl_is_the_closed_form():
    (m1, v1), (m2, v2) = normals(0), normals(1)
    expected = kl_divergence(Normal(m1, (v1 / 2).exp()), Normal(m2, (v2 / 2).exp()))
    th.testing.assert_close(normal_kl(m1, v1, m2, v2), expected, rtol=1e-10, atol=1e-10)


def test_normal_kl_is_directed_and_zero_on_itself():
    (m1, v1), (m2, v2) = normals(0), normals(1)
    assert th.equal(normal_kl(m1, v1, m1, v1), th.zeros_like(m1))
    assert not th.allclose(normal_kl(m1, v1, m2, v2), normal_kl(m2, v2, m1, v1))
    assert (normal_kl(m1, v1, m2, v2) >= 0).all()


def test_normal_kl_takes_scalars_and_broadcasts():
    mean, logvar = th.tensor([[0.5], [-2.0]]), th.tensor([0.0, 1.0, -1.0])
    expected = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    th.testing.assert_close(normal_kl(mean, logvar, 0.0, 0.0), expected)
    assert expected.shape == (2, 3)


def test_normal_kl_is_the_mean_log_ratio():
    p, q = Normal(0.3, 0.5), Normal(-0.2, 0.8)
    # Quadrature over +-8 standard deviations: the definition, by brute force.
    x = th.linspace(0.3 - 4, 0.3 + 4, 20_001, dtype=th.float64)
    integral = th.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x)
    ours = normal_kl(
        th.tensor(0.3, dtype=th.float64), 2 * math.log(0.5), th.tensor(-0.2, dtype=th.float64), 2 * math.log(0.8)
    )
    th.testing.assert_close(ours, integral, rtol=1e-6, atol=0)


def test_cdf_is_close_to_the_exact_one():
    x = th.linspace(-6, 6, 2001, dtype=th.float64)
    ours = approx_standard_normal_cdf(x)
    assert (ours - Normal(0.0, 1.0).cdf(x)).abs().max() < 3e-4
    th.testing.assert_close(ours + approx_standard_normal_cdf(-x), th.ones_like(x))
    assert (ours.diff() >= 0).all()


@pytest.mark.parametrize("mean", [-1.4, -1.0, 0.0, 0.313, 0.9, 2.0])
@pytest.mark.parametrize("scale", [0.01, 0.2, 3.0])
def test_likelihood_sums_to_one_over_the_bins(mean, scale):
    means, log_scales = th.full_like(BINS, mean), th.full_like(BINS, math.log(scale))
    mass = discretized_gaussian_log_likelihood(BINS, means=means, log_scales=log_scales).exp()
    # Each bin is clamped from below at 1e-12.
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)


def test_likelihood_of_a_bin_is_the_gaussians_mass_in_it():
    mean, scale = 0.1, 0.3
    log_mass = discretized_gaussian_log_likelihood(
        BINS, means=th.full_like(BINS, mean), log_scales=th.full_like(BINS, math.log(scale))
    )
    gauss = Normal(th.tensor(mean, dtype=th.float64), scale)
    upper, lower = gauss.cdf(BINS + 1 / 255), gauss.cdf(BINS - 1 / 255)
    upper[-1], lower[0] = 1, 0
    # The tanh approximation's density is off by 4e-4 at most, so a bin's mass by that times 2 / 255 / scale.
    assert (log_mass.exp() - (upper - lower)).abs()[1:-1].max() < 1e-3 * 2 / 255 / scale
    assert (log_mass.exp() - (upper - lower)).abs()[[0, -1]].max() < 3e-4


def test_likelihood_is_finite_at_the_extremes():
    x = th.tensor([-1.0, 1.0, 0.0, -1.0, 1.0])
    means = th.tensor([-50.0, 50.0, 50.0, 1.0, -1.0]).requires_grad_()
    log_scales = th.full((5,), -7.0).requires_grad_()
    out = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    floor = math.log(1e-12)
    th.testing.assert_close(out.detach(), th.tensor([0.0, 0.0, floor, floor, floor]), atol=1e-5, rtol=0)
    out.sum().backward()
    assert means.grad.isfinite().all()
    assert log_scales.grad.isfinite().all()
