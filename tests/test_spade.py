"""SPADE against a re-computation from its formula, step by step, in float64."""

import pytest
import torch as th

from guided_diffusion.spade import SPADEGroupNorm


def make(channels=64, cond_channels=5, seed=0):
    """A layer with all parameters, biases too, drawn at random."""
    layer = SPADEGroupNorm(channels, cond_channels)
    g = th.Generator().manual_seed(seed)
    with th.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.1, generator=g)
    return layer


def normal(*shape, seed=1):
    return th.randn(shape, generator=th.Generator().manual_seed(seed))


def convolve(x, layer):
    """A 3 x 3 convolution with zero padding, as nine shifted matrix products."""
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    h, w = x.shape[2:]
    padded = th.zeros(*x.shape[:2], h + 2, w + 2, dtype=th.float64)
    padded[:, :, 1:-1, 1:-1] = x
    out = bias.view(1, -1, 1, 1).expand(len(x), -1, h, w).clone()
    for i in range(3):
        for j in range(3):
            out += th.einsum("oc,nchw->nohw", weight[:, :, i, j], padded[:, :, i : i + h, j : j + w])
    return out


def nearest(y, h, w):
    rows, columns = th.arange(h) * y.shape[2] // h, th.arange(w) * y.shape[3] // w
    return y[:, :, rows][:, :, :, columns]


def recompute(layer, x, y):
    x, y = x.double(), y.double()
    h, w = x.shape[2:]
    grouped = x.view(len(x), 32, -1)
    variance, mean = th.var_mean(grouped, dim=2, correction=0, keepdim=True)
    normed = ((grouped - mean) / (variance + 1e-5).sqrt()).view(x.shape)
    hidden = convolve(nearest(y, h, w), layer.mlp_shared[0]).clamp(min=0)
    return normed * (1 + convolve(hidden, layer.mlp_gamma)) + convolve(hidden, layer.mlp_beta)


@pytest.mark.parametrize("cond_size", [(8, 12), (16, 24), (4, 6), (12, 18)])
def test_formula_at_any_size_of_the_condition(cond_size):
    layer, x, y = make(), normal(2, 64, 8, 12) * 3 + 1, normal(2, 5, *cond_size, seed=2)
    th.testing.assert_close(layer(x, y).double(), recompute(layer, x, y), rtol=1e-4, atol=1e-4)


def test_condition_is_shrunk_by_nearest_neighbour():
    layer, x, y = make(cond_channels=1), normal(1, 64, 4, 4), normal(1, 1, 8, 8, seed=2)
    expected = layer(x, y[:, :, ::2, ::2])
    assert th.equal(layer(x, y), expected)
    y[:, :, 1::2] = 100  # rows that nearest neighbour passes over
    assert th.equal(layer(x, y), expected)


def test_null_condition_leaves_the_biases():
    layer, x = make(), normal(2, 64, 6, 6)
    out = layer(x, th.zeros(2, 5, 6, 6))
    with th.no_grad():
        layer.mlp_shared[0].weight.fill_(3)
    assert th.equal(layer(x, th.zeros(2, 5, 6, 6)), out)
    assert not th.equal(layer(x, th.ones(2, 5, 6, 6)), out)
    with th.no_grad():
        layer.mlp_shared[0].bias.zero_()
    scale, beta = layer.modulation(th.zeros(2, 5, 6, 6), (6, 6))
    assert th.equal(scale, 1 + layer.mlp_gamma.bias.view(1, -1, 1, 1).expand(2, -1, 6, 6))
    assert th.equal(beta, layer.mlp_beta.bias.view(1, -1, 1, 1).expand(2, -1, 6, 6))


def test_modulation_is_what_the_condition_adds():
    layer, x, y = make(), normal(2, 64, 6, 6), normal(2, 5, 6, 6, seed=2)
    scale, beta = layer.modulation(y, (6, 6))
    assert scale.shape == beta.shape == (2, 64, 6, 6)
    th.testing.assert_close(layer(x, y), th.nn.functional.group_norm(x, 32) * scale + beta)


def test_bf16_input_and_fp32_parameters():
    layer, x, y = make(), 256 + 8 * normal(2, 64, 16, 16), normal(2, 5, 16, 16, seed=2)
    x, y = x.to(th.bfloat16), y.to(th.bfloat16)
    out = layer(x, y)
    assert out.dtype == th.bfloat16
    assert {p.dtype for p in layer.parameters()} == {th.float32}
    # The offset of 256 would cost the variance its digits, were the statistics not fp32.
    th.testing.assert_close(out.double(), recompute(layer, x, y), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {th.float32}


@pytest.mark.parametrize(("given", "hidden"), [((), 128), ((24,), 24)])
def test_no_affine_parameters_and_the_keys_of_checkpoints(given, hidden):
    shapes = {name: tuple(p.shape) for name, p in SPADEGroupNorm(96, 7, *given).state_dict().items()}
    assert shapes == {
        "mlp_shared.0.weight": (hidden, 7, 3, 3),
        "mlp_shared.0.bias": (hidden,),
        "mlp_gamma.weight": (96, hidden, 3, 3),
        "mlp_gamma.bias": (96,),
        "mlp_beta.weight": (96, hidden, 3, 3),
        "mlp_beta.bias": (96,),
    }
