"""Layer primitives against formulas written out, and their dtypes."""

import math

import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from guided_diffusion.nn import (
    Conv1d,
    Conv2d,
    GroupNorm32,
    checkpoint,
    mean_flat,
    modulate,
    normalization,
    timestep_embedding,
    update_ema,
    zero_module,
)


def generator(seed=0):
    return th.Generator().manual_seed(seed)


# ---- timestep_embedding ----


@pytest.mark.parametrize("dim", [6, 7, 32])
def test_timestep_embedding_is_the_formula(dim):
    times = [0, 1, 37, 999, 0.25]
    half = dim // 2
    expected = [
        [math.cos(t * 10_000 ** (-i / half)) for i in range(half)]
        + [math.sin(t * 10_000 ** (-i / half)) for i in range(half)]
        + [0.0] * (dim % 2)
        for t in times
    ]
    embedding = timestep_embedding(th.tensor(times), dim)
    assert embedding.dtype == th.float32
    # fp32 angles up to 999 are good to 999 * 2**-24
    th.testing.assert_close(embedding, th.tensor(expected), rtol=0, atol=2e-4)


def test_timestep_embedding_of_integers_and_floats_agree():
    t = th.tensor([0, 3, 500])
    assert th.equal(timestep_embedding(t, 16), timestep_embedding(t.float(), 16))


def test_timestep_embedding_max_period():
    # Two frequencies: 1 and 1 / sqrt(max_period).
    embedding = timestep_embedding(th.tensor([5.0]), 4, max_period=100)
    th.testing.assert_close(embedding[0], th.tensor([math.cos(5), math.cos(0.5), math.sin(5), math.sin(0.5)]))


# ---- layers and dtypes ----


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
@pytest.mark.parametrize("layer, shape", [(Conv1d(4, 6, 1), (2, 4, 5)), (Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5))])
def test_convolutions_compute_in_the_input_dtype(layer, shape, dtype):
    x = th.randn(shape, generator=generator()).to(dtype).requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.float().pow(2).sum().backward()

    # The oracle holds its weights in that dtype, as a converted model would.
    weight, bias = (p.detach().to(dtype).requires_grad_() for p in (layer.weight, layer.bias))
    x2 = x.detach().requires_grad_()
    convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    expected = convolve(x2, weight, bias, padding=layer.padding)
    expected.float().pow(2).sum().backward()

    assert out.dtype == dtype
    assert th.equal(out, expected)
    assert x.grad.dtype == dtype
    assert th.equal(x.grad, x2.grad)
    for ours, theirs in ((layer.weight, weight), (layer.bias, bias)):
        assert ours.dtype == ours.grad.dtype == th.float32
        assert th.equal(ours.grad, theirs.grad.float())


def test_group_norm_statistics_are_fp32():
    # An offset of 256 leaves bf16 steps of 2: squares summed in bf16 would lose the variance altogether.
    x = (256 + 8 * th.randn(2, 32, 16, 16, generator=generator())).to(th.bfloat16)
    norm = GroupNorm32(32, 32)
    with th.no_grad():
        norm.weight.normal_(generator=generator(1))
        norm.bias.normal_(generator=generator(2))
    wide = x.double()
    standard = (wide - wide.mean((2, 3), keepdim=True)) / (wide.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    affine = standard * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    out = norm(x)
    assert out.dtype == th.bfloat16
    assert norm.weight.dtype == th.float32
    # Only the last rounding, to 8 bits of mantissa, separates them.
    th.testing.assert_close(out.double(), affine.detach(), rtol=2**-8, atol=2e-4)


def test_normalization_has_32_groups():
    x = th.randn(1, 64, 3, 3, generator=generator())
    th.testing.assert_close(normalization(64)(x), F.group_norm(x, 32))
    with pytest.raises(ValueError):
        normalization(48)


def test_modulation_is_the_formula_with_its_gradients():
    h, scale, shift = (th.randn(shape, dtype=th.float64) for shape in ((2, 3, 4, 4), (2, 3, 1, 1), (1, 3, 4, 4)))
    tensors = [tensor.requires_grad_() for tensor in (h, scale, shift)]
    out = modulate(*tensors)
    th.testing.assert_close(out, h * scale + shift)
    upstream = th.randn_like(out)
    expected = th.autograd.grad(h * scale + shift, tensors, upstream)
    th.testing.assert_close(th.autograd.grad(out, tensors, upstream), expected)
    with th.no_grad():
        place = h.clone()
        assert modulate(place, scale, shift) is place and th.allclose(place, out)


def test_zero_module():
    layer = Conv2d(3, 4, 3)
    assert zero_module(layer) is layer
    assert all(not p.any() for p in layer.parameters())


# ---- small functions ----


def test_mean_flat():
    x = th.arange(24.0).view(2, 3, 2, 2)
    assert mean_flat(x).tolist() == [5.5, 17.5]
    assert mean_flat(th.tensor([[1.0], [3.0]])).tolist() == [1.0, 3.0]


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9999, 1.0])
def test_update_ema_is_the_formula(rate):
    shapes = [(3,), (2, 4), ()]
    before = [th.randn(s, generator=generator(i)) for i, s in enumerate(shapes)]
    source = [nn.Parameter(th.randn(s, generator=generator(9 + i))) for i, s in enumerate(shapes)]
    target = [b.clone() for b in before]
    update_ema(iter(target), iter(source), rate)
    for t, b, s in zip(target, before, source):
        expected = rate * b.double() + (1 - rate) * s.detach().double()
        th.testing.assert_close(t.double(), expected, rtol=1e-6, atol=1e-6)
        assert not t.requires_grad


def test_update_ema_default_rate_and_trainable_targets():
    target, source = [nn.Parameter(th.ones(2))], [nn.Parameter(th.zeros(2))]
    update_ema(target, source)
    th.testing.assert_close(target[0].detach(), th.full((2,), 0.99))
    assert target[0].requires_grad
    assert source[0].tolist() == [0.0, 0.0]


def test_update_ema_only_where_something_moved():
    source = [th.randn(s, generator=generator(i)) for i, s in enumerate([(3,), (2, 4), ()])]
    before = [th.randn(x.shape, generator=generator(9)) for x in source]
    stayed, moved, plain = ([b.clone() for b in before] for _ in range(3))
    update_ema(stayed, source, 0.9, th.tensor(False))
    update_ema(moved, source, 0.9, th.tensor(True))
    update_ema(plain, source, 0.9)
    assert all(th.equal(a, b) for a, b in zip(stayed, before))
    th.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-7)
    assert not th.equal(moved[0], before[0])


# ---- checkpoint ----


class Counted(nn.Module):
    """A little network that counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 5), nn.Tanh())
        self.calls = 0

    def forward(self, x, z):
        self.calls += 1
        return self.layers(x) * z


def run_counted(enabled, grad=True):
    """:return: (output, gradients of inputs and parameters, forward passes, how many activations autograd kept)."""
    th.manual_seed(0)
    module = Counted()
    x, z = (th.randn(3, 5, generator=generator(i)).requires_grad_() for i in range(2))
    kept = []
    hooks = th.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t)
    with th.set_grad_enabled(grad), hooks:
        out = checkpoint(module, enabled, x, z)
    given = {t.data_ptr() for t in (x, z, *module.parameters())}
    saved = len(set(kept) - given)
    if not grad:
        return out, [], module.calls, saved
    out.sin().sum().backward()
    return out.detach(), [p.grad for p in (x, z, *module.parameters())], module.calls, saved


def test_checkpoint_changes_memory_and_nothing_else():
    plain_out, plain_grads, plain_calls, plain_saved = run_counted(False)
    out, grads, calls, saved = run_counted(True)
    assert th.equal(out, plain_out)
    for grad, plain in zip(grads, plain_grads, strict=True):
        assert th.equal(grad, plain)  # the dropout's mask is drawn alike the second time
    assert (plain_calls, calls) == (1, 2)
    assert plain_saved >= 4  # two tanh, the dropout's mask and its output
    assert saved == 0


def test_checkpoint_without_gradients_calls_once():
    out, _, calls, _ = run_counted(True, grad=False)
    assert calls == 1
    assert not out.requires_grad


def test_checkpoint_passes_none_through():
    w = th.tensor(2.0, requires_grad=True)
    checkpoint(lambda a, nothing: a**2 if nothing is None else a, True, w, None).backward()
    assert w.grad.item() == 4
