"""The U-Net with its costly layers in their textbook form, the baseline that benchmarks compare with; and the count of
arithmetic that holds for both."""

import types

import torch as th
import torch.nn.functional as F
from torch.utils import flop_counter

from guided_diffusion.nn import GROUPS
from guided_diffusion.spade import SPADEGroupNorm
from guided_diffusion.unet import AttentionBlock, UNetModel


def make_plain(model: UNetModel) -> UNetModel:
    """
    Give SPADE and attention their textbook form: gamma and beta by a convolution each, the condition resized at every
    use, attention as matrix products with its softmax in fp32. The numbers stay. So do the sums in place of residual
    blocks.

    :return: the model.
    """
    for layer in model.modules():
        if isinstance(layer, SPADEGroupNorm):
            layer.forward = types.MethodType(_spade, layer)
        elif isinstance(layer, AttentionBlock):
            layer._forward = types.MethodType(_attention, layer)
    return model


def arithmetic() -> flop_counter.FlopCounterMode:
    """:return: a context whose get_total_flops() also counts the attention of CPUs, which torch leaves out."""
    ops = th.ops.aten
    attention = {
        ops._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    return flop_counter.FlopCounterMode(display=False, custom_mapping=attention)


def _attention_flops(*shapes: object, **others: object) -> int:
    return flop_counter.sdpa_flop_count(*shapes[:3])  # of query, key and value


def _attention_backward_flops(*shapes: object, **others: object) -> int:
    return flop_counter.sdpa_backward_flop_count(*shapes[:4])  # of the output's gradient, query, key and value


def _spade(layer: SPADEGroupNorm, x: th.Tensor, y: th.Tensor) -> th.Tensor:
    y = y if th.is_tensor(y) else max(y.values(), key=th.numel)
    hidden = layer.mlp_shared(F.interpolate(y, size=x.shape[2:], mode="nearest"))
    normed = F.group_norm(x.float(), GROUPS).to(x.dtype)
    gamma, beta = (
        F.conv2d(hidden, head.weight.to(x.dtype), head.bias.to(x.dtype), padding=1)
        for head in (layer.mlp_gamma, layer.mlp_beta)
    )
    return normed * (1 + gamma) + beta


def _attention(layer: AttentionBlock, x: th.Tensor) -> th.Tensor:
    qkv = layer.qkv(layer.norm(x).flatten(2))
    if layer.use_new_attention_order:
        q, k, v = qkv.unflatten(1, (3, layer.num_heads, -1)).unbind(1)
    else:
        q, k, v = qkv.unflatten(1, (layer.num_heads, 3, -1)).unbind(2)
    scale = q.shape[2] ** -0.25  # on both sides, so that half precision does not overflow
    weights = ((q * scale).transpose(2, 3) @ (k * scale)).float().softmax(dim=-1).to(v.dtype)
    attended = (v @ weights.transpose(2, 3)).reshape(len(x), x.shape[1], -1)
    return x + layer.proj_out(attended).view(x.shape)
