"""Sampling's savings change nothing: the encoder shared by both branches, and conditions convolved once."""

import pytest
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion.guidance import GuidedModel
from guided_diffusion.samplers import SAMPLERS
from guided_diffusion.sampling_plan import SamplingPlan
from guided_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.spade import SPADEGroupNorm

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
    plain = SamplingPlan(name, diffusion, s).sample(plainly(model), y, range(n))
    quick = SamplingPlan(name, diffusion, s, model.modulations(th.zeros_like(y[:1])))
    kept = model.modulations(y)
    first = quick.sample(model, kept, range(n))
    assert (plain - first).abs().max() <= 1e-5 * plain.abs().max()
    assert th.equal(first, quick.sample(model, kept, range(n)))


def test_the_reference_calls_take_modulations(model):
    diffusion = create_gaussian_diffusion(
        learn_sigma=True, predict_xstart=True, noise_schedule="cosine", timestep_respacing="6"
    )
    x, _, y = inputs()
    with th.no_grad():
        kept = dict(y=model.modulations(y), null=model.modulations(0 * y[:1]))
    for loop in (diffusion.ddim_sample_loop, diffusion.p_sample_loop):
        images = []
        for kwargs in (dict(y=y), kept):
            th.manual_seed(0)
            images.append(loop(model, x.shape, noise=x, model_kwargs=dict(kwargs, s=1.5)))
        th.testing.assert_close(*images, rtol=0, atol=1e-5)


@th.no_grad()
def test_a_condition_is_convolved_once(model):
    x, t, y = inputs()
    calls = []
    layers = [m for m in model.modules() if isinstance(m, SPADEGroupNorm)]
    hooks = [layer.mlp_shared.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    kept = model.modulations(y)
    assert len(calls) == len(layers)
    for i in range(3):
        model(x, t + i, y=kept)
    model.branches(x, t, [kept, kept])
    assert len(calls) == len(layers)
    model(x, t, y=y)
    assert len(calls) == 2 * len(layers)
    for hook in hooks:
        hook.remove()


@th.no_grad()
def test_a_value_stays_as_it_was_made(model):
    """The model keeps nothing of it, and later changes of condition, weights or dtype do not reach it."""
    x, t, y = inputs()
    before = set(vars(model)), list(model.state_dict())
    kept = model.modulations(y)
    copies = {layer: [part.clone() for part in parts] for layer, parts in kept.layers.items()}
    first = model(x, t, y=kept)
    assert th.equal(first, model(x, t, y=y))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict({key: 1.1 * value for key, value in state.items()})
    y += 1
    assert all(th.equal(a, b) for layer, parts in kept.layers.items() for a, b in zip(parts, copies[layer]))
    assert not th.equal(model(x, t, y=kept), first)
    model.load_state_dict(state)
    assert th.equal(model(x, t, y=kept), first)
    assert (set(vars(model)), list(model.state_dict())) == before


def test_gradients_go_through(model):
    x, t, y = inputs()
    parameters = [p for name, p in model.named_parameters() if "mlp_gamma" in name]
    gradients = []
    for condition in (y, model.modulations(y)):
        gradients.append(th.autograd.grad(model(x, t, y=condition).square().sum(), parameters))
    for ours, theirs in zip(*gradients):
        th.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("channels", [5, 7])
def test_mistakes(model, channels):
    x, t, y = inputs()
    with pytest.raises(ValueError, match="another model's"):
        make_model(**TINY)(x, t, y=model.modulations(y))
    with pytest.raises(ValueError, match=f"{channels} channels.*--num_classes"):
        model.modulations(th.zeros(1, channels, 16, 16))


@th.no_grad()
def test_null_condition_of_batch_one_serves_all(model):
    x, t, y = inputs(3)
    nulls = th.zeros_like(y), th.zeros_like(y[:1]), model.modulations(th.zeros_like(y[:1]))
    wide, *narrow = (GuidedModel(model, 2.0, null)(x, t, y) for null in nulls)
    for other in narrow:
        th.testing.assert_close(wide, other)


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
    plan = SamplingPlan(name, diffusion, 1.5, model.modulations(th.zeros_like(y[:1])))
    kept = model.modulations(y)
    with HostSyncs() as syncs:
        plan.sample(model, kept, range(2))
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
            with th._dynamo.config.patch(error_on_recompile=seed + weights != 2):
                actual = GuidedModel(fast, 1.5, fast.modulations(null))(x, t, fast.modulations(y))
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@th.no_grad()
def test_floating_point_operations_of_a_guided_step():
    """At the README's configuration a guided step costs 0.44 of two plain forward passes."""
    with th.device("meta"):
        model = make_model(**README)
        x, y, t = th.empty(1, 3, 128, 128), th.empty(1, 6, 128, 128), th.empty(1)
        null = th.empty(1, 6, 128, 128)
    plain = flops(lambda: [model(x, t, y=condition) for condition in (y, null)])
    making = flops(lambda: [model.modulations(condition) for condition in (y, null)])
    kept, guided = model.modulations(y), GuidedModel(model, 1.5, model.modulations(null))
    step = flops(lambda: guided(x, t, kept))
    assert plain == pytest.approx(2 * 308e9, rel=0.01)
    assert step == pytest.approx(0.443 * plain, rel=0.001)
    # A first guided step without modulations costs what making them and a step with them cost.
    assert flops(lambda: GuidedModel(model, 1.5, null)(x, t, y)) == making + step
    # And a sample in 25 such steps, the convolutions of its condition included, at most 1/75 of 1000 plain steps.
    assert 75 * (making + 25 * step) <= 1000 * plain


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@th.no_grad()
def test_memory_of_the_readme_configuration():
    """123.5 MiB an image in fp16."""
    with th.device("meta"):
        model = make_model(**README)
        y = th.empty(2, 6, 128, 128)
    model.convert_to(th.float16)
    kept = model.modulations(y)
    assert kept.shape == y.shape and kept.device == y.device
    assert kept.nbytes / len(y) == pytest.approx(123.5 * 2**20, rel=0.001)
    assert kept.nbytes / len(y) == model.modulation_bytes(128)
