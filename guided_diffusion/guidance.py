"""Classifier-free guidance as a wrapper round a model. Knows nothing of diffusion steps or of what channels mean."""

from collections.abc import Callable

import torch as th

Model = Callable[..., th.Tensor]


class GuidedModel:
    """
    A model whose prediction is pushed away from that of the null condition (Ho and Salimans 2022, equation 6).

    prediction = model(null) + s * (model(y) - model(null)). Only the first half of the output, the prediction proper,
    is guided; a learned variance comes from the conditional branch.

    :param model: a callable (x, timesteps, y=y) -> [N x C or 2C x H x W], where x has C channels. If it has a method
        branches(x, timesteps, [y, null]) that gives both outputs at once, that is used.
    :param s: the guidance scale; 1 or less means none, and costs no second evaluation.
    :param null: the null condition, [N or 1 x ...]; zeros if None.
    :param guide: a weaker model of the same kind, such as an earlier checkpoint, to push away from instead of the null
        condition; it sees y (autoguidance, Karras et al. 2024).
    """

    def __init__(self, model: Model, s: float, null: th.Tensor | None = None, guide: Model | None = None) -> None:
        self.model = model
        self.s = s
        self.null = null
        self.guide = guide

    def __call__(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor) -> th.Tensor:
        if self.s <= 1:
            return self.model(x, timesteps, y=y)
        null = th.zeros_like(y) if self.null is None else self.null
        if self.guide is not None:
            output, null_output = self.model(x, timesteps, y=y), self.guide(x, timesteps, y=y)
        elif hasattr(self.model, "branches"):
            output, null_output = self.model.branches(x, timesteps, [y, null])
        else:
            output, null_output = (self.model(x, timesteps, y=condition) for condition in (y, null))
        channels = x.shape[1]
        prediction, variance = output[:, :channels], output[:, channels:]
        return th.cat([th.lerp(null_output[:, :channels], prediction, self.s), variance], dim=1)
