"""Copies made once: layers compute with them what they compute without, and gradients reach the parameters."""

import pytest
import torch as th
from torch import nn

from guided_diffusion.casting import Casting, casts_kept
from guided_diffusion.nn import Conv2d
from guided_diffusion.spade import SPADEGroupNorm


class Net(nn.Module):
    """A convolution, and a layer that computes with what it joins of two."""

    def __init__(self):
        super().__init__()
        th.manual_seed(0)
        self.conv, self.spade, self.unused = Conv2d(3, 32, 3, padding=1), SPADEGroupNorm(32, 2, 8), Conv2d(1, 1, 1)

    def forward(self, x, y):
        return self.spade(self.conv(x), y)


def gradients(net, kept, dtype, batches):
    """Of some backward passes, added up; and the outputs."""
    net.zero_grad()
    outs = []
    with casts_kept([net.conv, net.spade, net.unused] if kept else [], dtype):
        for seed in range(batches):
            generator = th.Generator().manual_seed(seed)
            x, y = (th.randn(2, channels, 8, 8, generator=generator).to(dtype) for channels in (3, 2))
            outs.append(net(x, y))
            outs[-1].float().square().sum().backward()
    return outs, [p.grad for p in net.parameters()]


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float64])
@pytest.mark.parametrize("batches", [1, 3])
def test_results_are_those_of_casts_at_every_use(batches, dtype):
    net = Net()
    outs, grads = gradients(net, False, dtype, batches)
    kept_outs, kept_grads = gradients(net, True, dtype, batches)
    assert all(th.equal(a, b) for a, b in zip(outs, kept_outs))
    assert all(a.dtype == th.float32 and th.equal(a, b) for a, b in zip(grads[:-2], kept_grads[:-2]))
    assert grads[-2:] == kept_grads[-2:] == [None, None]
    assert all(grad.any() for grad in grads[:-2])


def test_casts_are_made_once_and_let_go():
    net = Net()
    with pytest.raises(ZeroDivisionError), casts_kept([net], th.bfloat16):
        first = net.conv.operands(th.bfloat16)
        assert net.conv.operands(th.bfloat16) is first
        assert [p.dtype for p in net.conv.operands(th.float32)] == [th.float32] * 2
        raise ZeroDivisionError
    assert net.conv.operands(th.bfloat16) is not first
    assert not any("kept" in vars(layer) for layer in net.modules())
    assert isinstance(net.spade, Casting) and len(net.state_dict()) == 10


def test_layouts_in_memory_stay():
    net = Net().to(memory_format=th.channels_last)
    with casts_kept([net], th.bfloat16):
        weights = [layer.operands(th.bfloat16)[0] for layer in (net.conv, net.spade)]
    assert all(weight.is_contiguous(memory_format=th.channels_last) for weight in weights)
    assert th.equal(weights[1], th.cat([net.spade.mlp_gamma.weight, net.spade.mlp_beta.weight]).bfloat16())
