"""The U-Net computed without any of our savings: the baseline that the benchmarks compare with."""

import types

import torch as th
import torch.nn.functional as F

from guided_diffusion.nn import GROUPS
from guided_diffusion.spade import SPADEGroupNorm
from guided_diffusion.unet import AttentionBlock, UNetModel


def make_plain(model: UNetModel) -> UNetModel:
    """
    Give a model's layers their textbook form: gamma and beta by a convolution each, attention as matrix products with
    its softmax in fp32, norms in fp32, no memory used twice. The numbers stay.

    :return: the model.
    """
    for layer in model.modules():
        if isinstance(layer, SPADEGroupNorm):
            layer.forward = types.MethodType(_spade, layer)
        elif isinstance(layer, AttentionBlock):
            layer._forward = types.MethodType(_attention, layer)
    return model


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
