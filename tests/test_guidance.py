"""Guidance against its formula on a linear model, and how often it asks the model."""

import pytest
import torch as th

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.guidance import GuidedModel


class Linear:
    """A model whose every output channel is its own linear function of x, t and y; it counts its calls."""

    def __init__(self, channels, learn_sigma):
        self.outputs = channels * (2 if learn_sigma else 1)
        g = th.Generator().manual_seed(channels)
        self.of_x = th.randn(self.outputs, channels, generator=g)
        self.of_y = th.randn(self.outputs, 2, generator=g)
        self.calls = 0

    def __call__(self, x, t, y):
        self.calls += 1
        from_y = th.einsum("oc,nchw->nohw", self.of_y, y)
        return th.einsum("oc,nchw->nohw", self.of_x, x) + t.view(-1, 1, 1, 1) + from_y


def inputs(channels):
    g = th.Generator().manual_seed(7)
    return th.randn(2, channels, 3, 3, generator=g), th.tensor([3.0, 9.0]), th.randn(2, 2, 3, 3, generator=g)


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_formula(channels, learn_sigma):
    model, (x, t, y), s = Linear(channels, learn_sigma), inputs(channels), 2.5
    kept = x.clone(), t.clone(), y.clone()
    out = GuidedModel(model, s)(x, t, y=y)
    assert model.calls == 2
    # The model is linear in y, so guiding its prediction is the same as scaling what y adds to it; and only to it.
    scale = th.ones(model.outputs)
    scale[:channels] = s
    null = model(x, t, th.zeros_like(y))
    th.testing.assert_close(out, null + scale[:, None, None] * (model(x, t, y) - null))
    assert all(th.equal(a, b) for a, b in zip((x, t, y), kept))


@pytest.mark.parametrize("s", [1, 1.0, 0.5, 0.0, -3.0])
def test_no_guidance_costs_one_call(s):
    model, (x, t, y) = Linear(3, True), inputs(3)
    out = GuidedModel(model, s)(x, t, y=y)
    assert model.calls == 1
    assert th.equal(out, model(x, t, y))


def test_just_above_one_guides():
    model, (x, t, y) = Linear(3, False), inputs(3)
    out = GuidedModel(model, 1.001)(x, t, y)
    assert model.calls == 2
    assert not th.equal(out, model(x, t, y))
    th.testing.assert_close(out, model(x, t, y), rtol=0, atol=0.02)


@pytest.mark.parametrize("s, calls", [(None, 1), (0.5, 1), (1.0, 1), (2.0, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_diffusion_guides_by_model_kwargs(channels, s, calls):
    diffusion = GaussianDiffusion(
        betas=[0.01, 0.02, 0.03],
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED,
        loss_type=LossType.MSE,
    )
    model, (x, _, y), t = Linear(channels, True), inputs(channels), th.tensor([1, 2])
    kwargs = {"y": y} if s is None else {"y": y, "s": s}
    out = diffusion.p_mean_variance(model, x, t, clip_denoised=False, model_kwargs=kwargs)
    assert model.calls == calls

    conditional, null = model(x, t, y), model(x, t, 0 * y)
    factor = s if calls == 2 else 1.0
    eps = (null + factor * (conditional - null))[:, :channels]
    abar = th.tensor([0.99 * 0.98, 0.99 * 0.98 * 0.97]).view(-1, 1, 1, 1)
    th.testing.assert_close(out["pred_xstart"], (x - (1 - abar).sqrt() * eps) / abar.sqrt(), rtol=1e-4, atol=1e-4)
    assert th.equal(out["log_variance"], conditional[:, channels:])


def test_guide_takes_the_place_of_the_null_branch():
    strong = lambda x, t, y: 3 * x + y.mean()  # noqa: E731
    weak = lambda x, t, y: 2 * x + y.mean()  # noqa: E731
    x, t, y = th.rand(2, 3, 4, 4), th.zeros(2), th.rand(2, 6, 4, 4)
    th.testing.assert_close(GuidedModel(strong, 2.0, guide=weak)(x, t, y), 4 * x + y.mean())
    # It is shown what null says, which sampling uses to give it its own modulations of y.
    th.testing.assert_close(GuidedModel(strong, 2.0, 0 * y, weak)(x, t, y), 4 * x + 2 * y.mean())


def test_modulations_have_no_zeros():
    y = object()
    assert GuidedModel(lambda x, t, y: y, 1.0)(None, None, y) is y
    with pytest.raises(ValueError, match="null"):
        GuidedModel(lambda x, t, y: y, 1.5)(None, None, y)
