"""Log-likelihoods and divergences of Gaussians, elementwise and in nats. Knows nothing of diffusion."""

import math

import torch as th


def normal_kl(mean1: th.Tensor, logvar1: th.Tensor, mean2: th.Tensor, logvar2: th.Tensor) -> th.Tensor:
    """
    KL divergence of N(mean1, exp(logvar1)) from N(mean2, exp(logvar2)), elementwise; all shapes broadcast.

    :return: nats, of the broadcast shape.
    """
    logvar1, logvar2 = (th.as_tensor(v, dtype=mean1.dtype, device=mean1.device) for v in (logvar1, logvar2))
    difference = logvar2 - logvar1
    return 0.5 * (difference - 1 + th.exp(-difference) + (mean1 - mean2) ** 2 * th.exp(-logvar2))


def approx_standard_normal_cdf(x: th.Tensor) -> th.Tensor:
    """
    The tanh approximation of the standard normal's cumulative distribution function (Page 1977).

    The exact one would do as well, but published likelihoods of this model family use this one.
    """
    return 0.5 * (1 + th.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: th.Tensor, *, means: th.Tensor, log_scales: th.Tensor) -> th.Tensor:
    """
    Log-probability that a Gaussian gives to the 1/255-wide bin round each 8-bit value (Ho et al. 2020, equation 13).

    :param x: 8-bit values mapped to [-1, 1]; the two outermost bins reach to infinity.
    :param means: the Gaussian's means, shaped as x.
    :param log_scales: the logarithms of its standard deviations, shaped as x.
    :return: nats, shaped as x.
    """
    centred = x - means
    inverse_scale = th.exp(-log_scales)
    cdf_upper = approx_standard_normal_cdf(inverse_scale * (centred + 1 / 255))
    cdf_lower = approx_standard_normal_cdf(inverse_scale * (centred - 1 / 255))
    bin_mass = th.where(x < -0.999, cdf_upper, th.where(x > 0.999, 1 - cdf_lower, cdf_upper - cdf_lower))
    return bin_mass.clamp(min=1e-12).log()
