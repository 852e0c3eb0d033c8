"""The U-Net: every flag acts as it says, layers against their formulas, and mistakes that name their flag."""

import copy
import inspect
import math

import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion.script_util import DEFAULT_CHANNEL_MULT, create_model
from guided_diffusion.unet import AttentionBlock, Downsample, ResBlock, SDMResBlock, UNetModel, Upsample
from guided_diffusion.unet_blocks import downsample, upsample

# Two levels of equal width with attention at the lower one: small, and 32 channels everywhere.
SMALL = dict(
    image_size=16,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="8",
    num_heads=2,
    num_classes=2,
    use_scale_shift_norm=True,
)


def fill(module, seed=0):
    """Draw all parameters at random, by fan-in, so that no zero-initialised branch is silent."""
    g = th.Generator().manual_seed(seed)
    with th.no_grad():
        for p in module.parameters():
            fan_in = math.prod(p.shape[1:]) if p.dim() > 1 else 25
            p.copy_(th.randn(p.shape, generator=g) / fan_in**0.5 + (p.dim() == 1) * (p == 1))
    return module


def make(**changes):
    return fill(create_model(**{**SMALL, **changes})).eval()


def with_weights_of(model, **changes):
    """The same weights in a model with other flags."""
    other = create_model(**{**SMALL, **changes})
    other.load_state_dict(model.state_dict())
    return other.eval()


def normal(*shape, seed=0):
    return th.randn(shape, generator=th.Generator().manual_seed(seed))


def inputs(n=2, size=16, in_channels=3, cond_channels=2):
    return (
        normal(n, in_channels, size, size),
        th.tensor([3, 700, 41, 999][:n]),
        normal(n, cond_channels, size, size, seed=1),
    )


def meta(**changes):
    with th.device("meta"):
        return create_model(**{**SMALL, **changes})


def keys(model):
    return set(model.state_dict())


@pytest.fixture(scope="module")
def small():
    return make()


@pytest.fixture(scope="module")
def small_out(small):
    x, t, y = inputs()
    with th.no_grad():
        return small(x, t, y=y)


# ---- the whole model ----


@th.no_grad()
def test_each_sample_has_its_own_timestep_and_condition(small, small_out):
    x, t, y = inputs()
    for i in range(2):
        one = slice(i, i + 1)
        th.testing.assert_close(small(x[one], t[one], y=y[one]), small_out[one], rtol=1e-4, atol=1e-4)
    for other in (small(x, t.flip(0), y=y), small(x, t, y=y.flip(0)), small(x.flip(0), t, y=y)):
        assert (other - small_out).abs().max() > 1e-2


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("in_channels", [1, 3])
@th.no_grad()
def test_channels(in_channels, learn_sigma):
    model = make(in_channels=in_channels, learn_sigma=learn_sigma)
    x, t, y = inputs(1, in_channels=in_channels)
    assert model.in_channels == in_channels
    assert model(x, t, y=y).shape == (1, in_channels * (2 if learn_sigma else 1), 16, 16)


@pytest.mark.parametrize("size", [32, 48])
@th.no_grad()
def test_any_size_that_divides(size):
    model = make(image_size=size, channel_mult="1,2,2", attention_resolutions=str(size // 4))
    x, t, y = inputs(1, size)
    assert model(x, t, y=y).shape == x.shape
    assert [block[0].out_layers[-1].weight.shape[0] for block in list(model.input_blocks)[1::2]] == [32, 64, 64]


@pytest.mark.parametrize("size", sorted(DEFAULT_CHANNEL_MULT))
def test_default_multipliers(size):
    multipliers = {
        64: [1, 2, 3, 4],
        128: [1, 1, 2, 3, 4],
        256: [1, 1, 2, 2, 4, 4],
        512: [0.5, 1, 1, 2, 2, 4, 4],
    }[size]
    model = meta(image_size=size, num_channels=64, channel_mult="", attention_resolutions="16", resblock_updown=True)
    # One residual block and, but for the last level, one that halves: the first of each level has its width.
    widths = [block[0].out_layers[-1].weight.shape[0] for block in list(model.input_blocks)[1::2]]
    assert widths == [int(64 * mult) for mult in multipliers]
    assert len(model.input_blocks) == len(model.output_blocks) == 2 * len(multipliers)
    attention = [any(isinstance(layer, AttentionBlock) for layer in block) for block in model.input_blocks]
    assert attention.index(True) == 1 + 2 * int(math.log2(size / 16))
    assert sum(attention) == 1


def test_num_res_blocks():
    one, three = meta(), meta(num_res_blocks=3)
    assert [len(m.input_blocks) for m in (one, three)] == [1 + 2 + 1, 1 + 6 + 1]
    assert [len(m.output_blocks) for m in (one, three)] == [4, 8]


@th.no_grad()
def test_encoder_never_sees_the_condition(small):
    x, t, y = inputs()
    features = []

    def keep(module, args, output):
        features.append(output)

    handles = [block.register_forward_hook(keep) for block in small.input_blocks]
    try:
        outs = [small(x, t, y=condition) for condition in (y, -3 * y, 0 * y)]
    finally:
        for handle in handles:
            handle.remove()
    blocks = len(small.input_blocks)
    assert len(features) == 3 * blocks
    for i in range(blocks):
        assert th.equal(features[i], features[i + blocks])
        assert th.equal(features[i], features[i + 2 * blocks])
    assert (outs[0] - outs[1]).abs().max() > 1e-2
    assert (outs[0] - outs[2]).abs().max() > 1e-2


@th.no_grad()
def test_encode_and_decode_are_forward(small, small_out):
    x, t, y = inputs()
    emb = small.embed(t)
    assert emb.shape == (2, 128)
    h, skips = small.encode(x, emb)
    assert len(skips) == len(small.output_blocks)
    kept = [skip.clone() for skip in skips]
    assert th.equal(small.decode(h, skips, emb, y), small_out)
    # decode leaves its arguments as they were: the second branch of guidance uses them again.
    assert len(skips) == len(kept)
    assert all(th.equal(skip, k) for skip, k in zip(skips, kept))
    assert th.equal(small.decode(h, skips, emb, y), small_out)


@th.no_grad()
def test_forward_is_the_u_of_its_blocks(small, small_out):
    x, t, y = inputs()
    frequencies = 10_000 ** (-th.arange(16) / 16)
    angles = t[:, None] * frequencies
    emb = small.time_embed[2](F.silu(small.time_embed[0](th.cat([angles.cos(), angles.sin()], dim=1))))
    levels = [x]
    for block in small.input_blocks:
        levels.append(block(levels[-1], emb, y))
    first, attention, second = small.middle_block
    h = second(attention(first(levels[-1], emb, y)), emb, y)
    for i, block in enumerate(small.output_blocks):
        h = block(th.cat([h, levels[-1 - i]], dim=1), emb, y)
    expected = small.out[2](F.silu(F.group_norm(h, 32, small.out[0].weight, small.out[0].bias)))
    th.testing.assert_close(small_out, expected, rtol=1e-4, atol=1e-3)


def test_output_is_zero_at_first():
    model = create_model(**SMALL)
    x, t, y = inputs()
    assert not model(x, t, y=y).any()
    # Every residual branch starts as the identity, so only the paths round them carry anything.
    for module in model.modules():
        if isinstance(module, (ResBlock, SDMResBlock)):
            assert not module.out_layers[-1].weight.any()
        if isinstance(module, AttentionBlock):
            assert not module.proj_out.weight.any()


# ---- residual blocks and resampling ----


def doubled(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def halved(x):
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))


@pytest.mark.parametrize("resample, move", [(None, lambda x: x), (upsample, doubled), (downsample, halved)])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("out_channels", [32, 64])
@pytest.mark.parametrize("kind", [ResBlock, SDMResBlock])
@th.no_grad()
def test_residual_block_is_the_formula(kind, out_channels, scale_shift, resample, move):
    options = dict(use_scale_shift_norm=scale_shift, use_checkpoint=False, resample=resample)
    extra = {} if kind is ResBlock else {"cond_channels": 2}
    block = fill(kind(32, 16, 0.0, out_channels, **extra, **options)).eval()
    x, emb, y = normal(2, 32, 6, 6), normal(2, 16, seed=1), normal(2, 2, 6, 6, seed=2)

    first, second = (
        (block.in_layers[0], block.out_layers[0])
        if kind is ResBlock
        else (lambda h: block.in_norm(h, y), lambda h: block.out_norm(h, y))
    )
    emb_out = block.emb_layers[1](F.silu(emb))[:, :, None, None]
    h = block.in_layers[-1](move(F.silu(first(x))))
    if scale_shift:
        scale, shift = emb_out[:, :out_channels], emb_out[:, out_channels:]
        h = second(h) * (1 + scale) + shift
    else:
        h = second(h + emb_out)
    skip = move(x) if out_channels == 32 else block.skip_connection(move(x))
    expected = skip + block.out_layers[-1](F.silu(h))
    th.testing.assert_close(block(x, emb, y), expected, rtol=1e-4, atol=1e-4)


@th.no_grad()
def test_plain_resampling_is_the_formula():
    x = normal(1, 32, 6, 6)
    assert th.equal(Upsample(32, use_conv=False)(x), doubled(x))
    th.testing.assert_close(Downsample(32, use_conv=False)(x), halved(x))
    up, down = fill(Upsample(32, use_conv=True)), fill(Downsample(32, use_conv=True))
    th.testing.assert_close(up(x), F.conv2d(doubled(x), up.conv.weight, up.conv.bias, padding=1))
    # A stride of two keeps every other output of the plain convolution.
    th.testing.assert_close(down(x), F.conv2d(x, down.op.weight, down.op.bias, padding=1)[:, :, ::2, ::2])
    assert keys(Upsample(32, use_conv=False)) == keys(Downsample(32, use_conv=False)) == set()


@th.no_grad()
def test_resblock_updown():
    plain, inside = make(resblock_updown=False), make(resblock_updown=True)
    x, t, y = inputs(1)
    assert plain(x, t, y=y).shape == inside(x, t, y=y).shape == x.shape
    of_plain = {f"{layer}.{kind}" for layer in ("input_blocks.2.0.op", "output_blocks.1.2.conv") for kind in KINDS}
    assert keys(plain) - keys(inside) == of_plain
    assert "input_blocks.2.0.in_layers.2.weight" in keys(inside)
    assert "output_blocks.1.2.in_norm.mlp_gamma.weight" in keys(inside)
    assert plain.state_dict()["input_blocks.2.0.op.weight"].shape == (32, 32, 3, 3)
    assert [skip.shape[2] for skip in plain.encode(x, plain.embed(t))[1]] == [16, 16, 8, 8]
    assert [skip.shape[2] for skip in inside.encode(x, inside.embed(t))[1]] == [16, 16, 8, 8]


KINDS = ("weight", "bias")


@th.no_grad()
def test_conv_resample_off():
    model = UNetModel(16, 3, 32, 3, 1, (2,), channel_mult=(1, 1), conv_resample=False, num_classes=2)
    fill(model)
    assert keys(meta(use_scale_shift_norm=False)) - keys(model) == {
        f"{layer}.{kind}" for layer in ("input_blocks.2.0.op", "output_blocks.1.2.conv") for kind in KINDS
    }
    x, t, y = inputs(1)
    emb = model.embed(t)
    h, skips = model.encode(x, emb)
    th.testing.assert_close(skips[2], F.avg_pool2d(skips[1], 2))
    assert model.decode(h, skips, emb, y).shape == x.shape


def test_scale_shift_norm_halves_the_embedding_layers():
    on, off = meta().state_dict(), meta(use_scale_shift_norm=False).state_dict()
    assert on.keys() == off.keys()
    different = {key for key in on if on[key].shape != off[key].shape}
    assert different == {key for key in on if "emb_layers.1" in key}
    assert {on[key].shape[0] for key in different} == {64}
    assert {off[key].shape[0] for key in different} == {32}


# ---- attention ----


def explicit_attention(block, x, new_order):
    """Softmax attention written out, one head after the other."""
    n, channels, height, width = x.shape
    qkv = block.qkv(block.norm(x).flatten(2))
    d = channels // block.num_heads
    heads = []
    for i in range(block.num_heads):
        starts = (
            [part * channels + i * d for part in range(3)] if new_order else [(3 * i + part) * d for part in range(3)]
        )
        q, k, v = (qkv[:, start : start + d] for start in starts)
        weights = th.softmax(th.einsum("ndt,nds->nts", q, k) / d**0.5, dim=2)
        heads.append(th.einsum("nts,nds->ndt", weights, v))
    return x + block.proj_out(th.cat(heads, dim=1)).view(n, channels, height, width)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("options", [dict(num_heads=1), dict(num_heads=4), dict(num_head_channels=8)])
@th.no_grad()
def test_attention_is_softmax_attention(options, new_order):
    block = fill(AttentionBlock(32, **options, use_new_attention_order=new_order))
    x = normal(2, 32, 3, 5)
    th.testing.assert_close(block(x), explicit_attention(block, x, new_order), rtol=1e-4, atol=1e-4)


@th.no_grad()
def test_attention_orders_are_a_permutation_of_the_qkv_channels():
    heads = 4
    legacy = fill(AttentionBlock(32, heads))
    new = AttentionBlock(32, heads, use_new_attention_order=True)
    new.load_state_dict(legacy.state_dict())
    x = normal(2, 32, 4, 4)
    assert (new(x) - legacy(x)).abs().max() > 1e-2
    for p, q in zip(new.qkv.parameters(), legacy.qkv.parameters()):
        p.copy_(q.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2))
    th.testing.assert_close(new(x), legacy(x), rtol=1e-5, atol=1e-5)


@th.no_grad()
def test_new_attention_order_reaches_the_model(small, small_out):
    x, t, y = inputs()
    new = with_weights_of(small, use_new_attention_order=True)
    assert (new(x, t, y=y) - small_out).abs().max() > 1e-3
    heads = SMALL["num_heads"]
    for module in new.modules():
        if isinstance(module, AttentionBlock):
            for p in module.qkv.parameters():
                p.copy_(p.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2))
    th.testing.assert_close(new(x, t, y=y), small_out, rtol=1e-4, atol=1e-4)


@th.no_grad()
def test_num_head_channels_overrules_num_heads(small, small_out):
    x, t, y = inputs()
    # 32 channels everywhere: two heads are heads of 16.
    assert th.equal(with_weights_of(small, num_heads=1, num_head_channels=16)(x, t, y=y), small_out)
    for changes in (dict(num_heads=1), dict(num_heads=4), dict(num_head_channels=8)):
        assert (with_weights_of(small, **changes)(x, t, y=y) - small_out).abs().max() > 1e-3


@th.no_grad()
def test_num_heads_upsample_acts_in_the_decoder_only(small, small_out):
    x, t, y = inputs()
    other = with_weights_of(small, num_heads_upsample=8)
    emb = small.embed(t)
    (h, skips), (other_h, other_skips) = small.encode(x, emb), other.encode(x, emb)
    assert all(th.equal(a, b) for a, b in zip([h, *skips], [other_h, *other_skips]))
    assert other.middle_block[1].num_heads == 2
    assert (other(x, t, y=y) - small_out).abs().max() > 1e-3
    assert th.equal(with_weights_of(small, num_heads_upsample=2)(x, t, y=y), small_out)


def test_attention_resolutions():
    def where(model):
        return {name.removesuffix(".qkv.weight") for name in keys(model) if name.endswith("qkv.weight")}

    assert where(meta(attention_resolutions="")) == {"middle_block.1"}
    assert where(meta(attention_resolutions="8")) == {
        "middle_block.1",
        "input_blocks.3.1",
        "output_blocks.0.1",
        "output_blocks.1.1",
    }
    assert where(meta(attention_resolutions="16")) == {
        "middle_block.1",
        "input_blocks.1.1",
        "output_blocks.2.1",
        "output_blocks.3.1",
    }
    both = where(meta(attention_resolutions="16,8"))
    assert both == where(meta(attention_resolutions="8")) | where(meta(attention_resolutions="16"))


# ---- dropout and checkpointing ----


@th.no_grad()
def test_dropout_acts_in_training_only(small, small_out):
    x, t, y = inputs()
    dropping = with_weights_of(small, dropout=0.4)
    assert th.equal(dropping(x, t, y=y), small_out)
    assert th.equal(copy.deepcopy(small).train()(x, t, y=y), small_out)
    dropping.train()
    outs = []
    for seed in (0, 0, 1):
        th.manual_seed(seed)
        outs.append(dropping(x, t, y=y))
    assert th.equal(outs[0], outs[1])
    assert (outs[0] - outs[2]).abs().max() > 1e-2
    assert (outs[0] - small_out).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [ResBlock, SDMResBlock])
@th.no_grad()
def test_dropout_of_each_kind_of_block(kind):
    """With a last convolution that passes each channel on, what was dropped is exactly zero, the rest scaled up."""
    options = dict(use_scale_shift_norm=False, use_checkpoint=False, resample=None)
    extra = {} if kind is ResBlock else {"cond_channels": 2}
    block = fill(kind(32, 16, 0.25, 32, **extra, **options))
    last = block.out_layers[-1]
    last.bias.zero_()
    last.weight.copy_(th.eye(32)[:, :, None, None] * F.pad(th.ones(1, 1), (1, 1, 1, 1)))
    x, emb, y = normal(2, 32, 16, 16), normal(2, 16, seed=1), normal(2, 2, 16, 16, seed=2)
    whole = block.eval()(x, emb, y) - x
    th.manual_seed(0)
    dropping = block.train()(x, emb, y) - x
    dropped = dropping == 0
    n = dropped.numel()
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / n) ** 0.5)
    th.testing.assert_close(dropping[~dropped], whole[~dropped] / 0.75, rtol=1e-4, atol=1e-5)


def test_use_checkpoint_gives_equal_gradients_and_keeps_no_activations(small):
    x, t, y = inputs()
    results = []
    for use_checkpoint in (False, True):
        model = with_weights_of(small, use_checkpoint=use_checkpoint, dropout=0.3).train()
        calls = {}

        def count(module, args, name, calls=calls):
            calls[name] = calls.get(name, 0) + 1

        for name in ("input_blocks.1.0.in_layers.2", "middle_block.1.qkv", "output_blocks.0.0.in_norm", "out.2"):
            hook = lambda module, args, name=name, count=count: count(module, args, name)  # noqa: E731
            model.get_submodule(name).register_forward_pre_hook(hook)
        th.manual_seed(0)
        out = model(x, t, y=y)
        out.square().mean().backward()
        results.append((out.detach(), [p.grad for p in model.parameters()], list(calls.values())))
    (plain_out, plain_grads, plain_calls), (out, grads, calls) = results
    assert th.equal(out, plain_out)
    for grad, plain in zip(grads, plain_grads):
        th.testing.assert_close(grad, plain, rtol=1e-4, atol=1e-6)
    assert plain_calls == [1, 1, 1, 1]
    assert calls == [2, 2, 2, 1]  # residual blocks and attention again, the output layer once


def test_every_parameter_gets_a_gradient(small):
    x, t, y = inputs()
    model = copy.deepcopy(small).train()
    model(x, t, y=y).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


# ---- dtypes ----


@pytest.mark.parametrize("dtype, tolerance", [(th.float16, 0.01), (th.bfloat16, 0.08)])
@pytest.mark.parametrize("weights", [False, True])
@th.no_grad()
def test_low_precision_is_close_to_fp32(small, small_out, dtype, tolerance, weights):
    x, t, y = inputs()
    model = copy.deepcopy(small)
    model.convert_to(dtype, weights=weights)
    out = model(x, t, y=y)
    assert out.dtype == th.float32
    error = (out - small_out).abs().max() / small_out.abs().max()
    assert 0 < error < tolerance
    assert model.input_blocks[1](x.new_zeros(1, 32, 16, 16).to(dtype), model.embed(t[:1]), None).dtype == dtype


@th.no_grad()
def test_convert_to_fp16_and_back(small, small_out):
    x, t, y = inputs()
    model = copy.deepcopy(small)
    model.convert_to_fp16()
    assert model.dtype == th.float16
    in_half = {name for name, p in model.named_parameters() if p.dtype == th.float16}
    convolutions = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, (th.nn.Conv1d, th.nn.Conv2d)) and name != "out.2"
        for kind in KINDS
    }
    assert in_half == convolutions
    half_out = model(x, t, y=y)
    assert not th.equal(half_out, small_out)
    model.convert_to_fp32()
    assert {p.dtype for p in model.parameters()} == {th.float32}
    assert model.dtype == th.float32
    th.testing.assert_close(model(x, t, y=y), small_out, rtol=0, atol=0.01 * small_out.abs().max().item())


def test_use_fp16_keeps_fp32_parameters():
    model = meta(use_fp16=True)
    assert model.dtype == th.float16
    assert {p.dtype for p in model.parameters()} == {th.float32}
    assert meta().dtype == th.float32


def test_bf16_training_has_fp32_gradients_close_to_fp32s(small):
    x, t, y = inputs()
    grads = []
    for dtype in (th.float32, th.bfloat16):
        model = copy.deepcopy(small).train()
        model.convert_to(dtype)
        model(x, t, y=y).square().mean().backward()
        assert {p.grad.dtype for p in model.parameters()} == {th.float32}
        grads.append(th.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*grads, dim=0) > 0.99


# ---- mistakes ----


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_size=18, channel_mult="1,1,1", attention_resolutions=""), "--image_size 18 .*4"),
        (dict(image_size=0, attention_resolutions=""), "--image_size 0 "),
        (dict(image_size=48, channel_mult=""), "--image_size 48 .*--channel_mult"),
        (dict(num_channels=48), "--num_channels 48 .*32"),
        (dict(num_channels=0), "--num_channels 0 "),
        (dict(channel_mult="1,0.5"), r"--num_channels 32 times 0\.5 of --channel_mult"),
        (dict(channel_mult="1,1.01"), r"--num_channels 32 times 1\.01 of --channel_mult"),
        (dict(channel_mult="1,-1"), "--channel_mult"),
        (dict(channel_mult="1,1e30"), r"--num_channels 32 times 1e\+30 of --channel_mult is over 65536"),
        (dict(channel_mult="1,nan"), "--channel_mult"),
        (dict(channel_mult="1,inf"), "--channel_mult"),
        (dict(channel_mult="1,,2"), "--channel_mult 1,,2 "),
        (dict(channel_mult="one"), "--channel_mult one "),
        (dict(num_heads=3), "--num_heads.* 3 .*32 channels"),
        (dict(num_heads=0), "--num_heads.* 0 "),
        (dict(num_heads=-2), "--num_heads.* -2 "),
        (dict(num_heads_upsample=3), "--num_heads_upsample 3 .*32 channels"),
        (dict(num_heads_upsample=0), "--num_heads_upsample 0 "),
        (dict(num_head_channels=24), "--num_head_channels 24 .*32 channels"),
        (dict(num_head_channels=0), "--num_head_channels 0 "),
        (dict(num_res_blocks=0), "--num_res_blocks 0 "),
        (dict(dropout=1.5), r"--dropout 1\.5 "),
        (dict(dropout=-0.1), r"--dropout -0\.1 "),
        (dict(attention_resolutions="17"), "--attention_resolutions 17: .*--image_size 16"),
        (dict(attention_resolutions="8,0"), "--attention_resolutions 8,0"),
        (dict(attention_resolutions="8;4"), "--attention_resolutions 8;4 "),
    ],
)
def test_mistakes_name_the_flag(changes, message):
    with pytest.raises(ValueError, match=message):
        meta(**changes)


@pytest.mark.parametrize("channels", [1, 3])
def test_wrong_number_of_condition_channels(small, channels):
    x, t, y = inputs(cond_channels=channels)
    with pytest.raises(ValueError, match=f"condition has {channels} channels.*--num_classes .* 2"):
        small(x, t, y=y)


def test_arguments_by_position():
    """As guided-diffusion has them; what comes after channel_mult is rarely given so."""
    order = (
        "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions dropout channel_mult "
        "conv_resample dims num_classes use_checkpoint use_fp16 num_heads num_head_channels num_heads_upsample "
        "use_scale_shift_norm resblock_updown use_new_attention_order"
    ).split()
    parameters = inspect.signature(UNetModel).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == order
    with pytest.raises(ValueError, match="dims 3"):
        UNetModel(16, 3, 32, 3, 1, (2,), 0, (1, 1), True, 3)


def test_attention_sizes_round_down_to_a_level():
    """A size that divides nothing is taken as the reference takes it: image_size // size is the rate."""
    exact, rounded, none = (meta(image_size=40, attention_resolutions=sizes) for sizes in ("20", "16", ""))
    assert keys(exact) == keys(rounded) != keys(none)
