"""Sampling's savings change nothing: the encoder shared by both branches, and what SPADE layers keep of a condition."""

import pytest
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion.guidance import GuidedModel
from guided_diffusion.samplers import SAMPLERS, kept_conditions, sample
from guided_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.spade import SPADEGroupNorm, cached_condition

TINY = dict(image_size=16, num_channels=32, channel_mult="1,1", num_res_blocks=1, attention_resolutions="8")
README = dict(image_size=128, num_channels=128, num_res_blocks=2, attention_resolutions="32,16,8", num_head_channels=32)


def make_model(**flags):
    flags = dict(learn_sigma=True, resblock_updown=True, num_classes=6, num_heads=1, **flags)
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **flags})[0].eval()


@pytest.fixture(scope="module")
def model():
    net = make_model(**TINY)
    generator = th.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.add_(0.01 * th.randn(p.shape, generator=generator))
    return net


def inputs(n=2, seed=1):
    generator = th.Generator().manual_seed(seed)
    x, y = (th.randn(n, channels, 16, 16, generator=generator) for channels in (3, 6))
    return x, th.arange(n) * 100, y


def plainly(model):
    """The same model without the methods that let its branches share work."""
    return lambda x, t, y: model(x, t, y=y)


@th.no_grad()
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("s", [1.0, 1.5, 2.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_equal_samples(model, name, s, n):
    _, _, y = inputs(n)
    # Predicting x_0: a noise prediction would have fp32's rounding multiplied by the schedule's end.
    diffusion = create_gaussian_diffusion(
        learn_sigma=True, predict_xstart=True, noise_schedule="cosine", timestep_respacing="6"
    )
    options = dict(s=s, channels=3, seed=0, indices=range(n))
    plain = sample(name, diffusion, plainly(model), y, **options)
    null = th.zeros_like(y[:1])
    with kept_conditions(model, y, null):
        quick = sample(name, diffusion, model, y, null=null, **options)
        again = sample(name, diffusion, model, y, null=null, **options)
    largest = float((plain - quick).abs().max() / plain.abs().max())
    assert largest <= 1e-5
    assert th.equal(quick, again)


@th.no_grad()
def test_a_condition_is_convolved_once(model):
    x, t, y = inputs()
    calls = []
    layers = [m for m in model.modules() if isinstance(m, SPADEGroupNorm)]
    hooks = [layer.mlp_shared.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    with cached_condition(model, y):
        model(x, t, y=y)
        assert len(calls) == len(layers)
        model(x, t + 1, y=y)
        assert len(calls) == len(layers)
        model(x, t, y=y.clone())  # another tensor is another condition
        assert len(calls) == 2 * len(layers)
    model(x, t, y=y)
    assert len(calls) == 3 * len(layers)
    for hook in hooks:
        hook.remove()


@th.no_grad()
def test_new_weights_and_new_values_are_seen(model):
    x, t, y = inputs()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with cached_condition(model, y) as cached:
        first = model(x, t, y=y)
        model.load_state_dict({key: 1.1 * value for key, value in state.items()})
        changed = model(x, t, y=y)
        model.load_state_dict(state)
        assert th.equal(model(x, t, y=y), first) and not th.equal(changed, first)
        y += 1
        moved = model(x, t, y=y)
        assert cached.nbytes > 0
    assert th.equal(moved, model(x, t, y=y.clone())) and not th.equal(moved, first)
    assert cached.nbytes == 0 and model.cached_conditions == []


@th.no_grad()
def test_other_dtypes_do_not_mix(model):
    x, t, y = inputs()
    with cached_condition(model, y):
        exact = model(x, t, y=y)
        model.convert_to(th.bfloat16)
        rough = model(x, t, y=y)
        model.convert_to(th.float32)
        assert th.equal(model(x, t, y=y), exact)
    assert not th.equal(rough, exact)


def test_never_in_the_state_dict_nor_under_gradients(model):
    x, t, y = inputs()
    keys = list(model.state_dict())
    with cached_condition(model, y):
        with th.no_grad():
            model(x, t, y=y)
        assert list(model.state_dict()) == keys
        with pytest.raises(RuntimeError, match="inference only"):
            model(x, t, y=y)


@th.no_grad()
def test_null_condition_of_batch_one_serves_all(model):
    x, t, y = inputs(3)
    wide, narrow = (GuidedModel(model, 2.0, null)(x, t, y) for null in (th.zeros_like(y), th.zeros_like(y[:1])))
    th.testing.assert_close(wide, narrow)


class HostSyncs(TorchDispatchMode):
    """Counts what makes a program wait for its device: reading a value, or copying between devices."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (th.ops.aten._local_scalar_dense.default, th.ops.aten.nonzero.default):
            self.found.append(func)
        if func is th.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@th.no_grad()
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits_for_the_device(model, name):
    diffusion = create_gaussian_diffusion(learn_sigma=True, noise_schedule="cosine", timestep_respacing="4")
    _, _, y = inputs()
    null = th.zeros_like(y[:1])
    with kept_conditions(model, y, null), HostSyncs() as syncs:
        sample(name, diffusion, model, y, null=null, s=1.5, channels=3, seed=0, indices=range(2))
    assert syncs.found == []
    with HostSyncs() as syncs:
        float(y.sum())
    assert len(syncs.found) == 1


@pytest.mark.slow
@th.inference_mode()
def test_compiled_is_equal_and_compiled_once():
    """Another condition, another timestep and other weights are no reason to compile again."""
    plain = make_model(**TINY)
    th.manual_seed(0)
    for p in plain.parameters():
        p.add_(0.01 * th.randn_like(p))
    fast = make_model(**TINY)
    fast.load_state_dict(plain.state_dict())
    fast.place(th.device("cpu"), compiled=True)
    for weights in (1.0, 0.9):
        if weights != 1:
            state = {key: weights * value for key, value in plain.state_dict().items()}
            plain.load_state_dict(state)
            fast.load_state_dict(state)
        for seed in (1, 2):
            x, t, y = inputs(seed=seed)
            null = th.zeros_like(y[:1])
            expected = GuidedModel(plain, 1.5, null)(x, t, y)
            with kept_conditions(fast, y, null), th._dynamo.config.patch(error_on_recompile=seed + weights != 2):
                actual = GuidedModel(fast, 1.5, null)(x, t, y)
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@th.no_grad()
def test_floating_point_operations_of_a_guided_step():
    """At the README's configuration a guided step costs at most 0.45 of two plain forward passes."""
    with th.device("meta"):
        model = make_model(**README)
        x, y, t = th.empty(1, 3, 128, 128), th.empty(1, 6, 128, 128), th.empty(1)
        null = th.empty(1, 6, 128, 128)
    guided = GuidedModel(model, 1.5, null)
    plain = flops(lambda: [model(x, t, y=condition) for condition in (y, null)])
    with kept_conditions(model, y, null):
        filling = flops(lambda: guided(x, t, y))
        step = flops(lambda: guided(x, t, y))
    assert plain == pytest.approx(2 * 308e9, rel=0.01)
    assert step <= 0.45 * plain < filling, step / plain
    # And a sample in 25 such steps, the convolutions of its condition included, at most 1/75 of 1000 plain steps.
    assert 75 * (filling + 24 * step) <= 1000 * plain


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@th.no_grad()
def test_memory_of_the_readme_configuration():
    """123.5 MiB an image in fp16."""
    with th.device("meta"):
        model = make_model(**README)
        x, y, t = th.empty(2, 3, 128, 128), th.empty(2, 6, 128, 128), th.empty(2)
    model.convert_to(th.float16)
    with cached_condition(model, y) as cached:
        model(x, t, y=y)
        assert cached.nbytes / len(y) == pytest.approx(123.5 * 2**20, rel=0.001)
        assert cached.nbytes / len(y) == model.modulation_bytes(128)
