"""Classifier-free guidance as a wrapper round a model. Knows nothing of diffusion steps or of what channels mean."""

from collections.abc import Callable
from typing import Any

import torch as th

Model = Callable[..., th.Tensor]


class GuidedModel:
    """
    A model whose prediction is pushed away from a weaker one (Ho and Salimans 2022, equation 6).

    prediction = weaker + s * (model(y) - weaker). Only the first half of the output, the prediction proper, is guided;
    a learned variance comes from the conditional branch.

    :param model: a callable (x, timesteps, y=y) -> [N x C or 2C x H x W], where x has C channels. If it has a method
        branches(x, timesteps, [y, null]) that gives both outputs at once, that is used.
    :param s: the guidance scale; 1 or less means none, and costs no second evaluation.
    :param null: the condition that the weaker branch is shown, [N or 1 x ...]; zeros if None. Conditions may be tensors
        or what the model makes of them, see UNetModel.modulations.
    :param guide: a weaker model of the same kind, such as an earlier checkpoint, in the place of the null condition
        (autoguidance, Karras et al. 2024); it is shown null, which is y if None.
    """

    def __init__(self, model: Model, s: float, null: Any = None, guide: Model | None = None) -> None:
        self.model = model
        self.s = s
        self.null = null
        self.guide = guide

    def __call__(self, x: th.Tensor, timesteps: th.Tensor, y: Any) -> th.Tensor:
        if self.s <= 1:
            return self.model(x, timesteps, y=y)
        null = self._null(y)
        if self.guide is None and hasattr(self.model, "branches"):
            output, weaker = self.model.branches(x, timesteps, [y, null])
        else:
            output = self.model(x, timesteps, y=y)
            weaker = (self.guide or self.model)(x, timesteps, y=null)
        channels = x.shape[1]
        prediction, variance = output[:, :channels], output[:, channels:]
        return th.cat([th.lerp(weaker[:, :channels], prediction, self.s), variance], dim=1)

    def _null(self, y: Any) -> Any:
        if self.null is not None:
            return self.null
        if th.is_tensor(y):
            return th.zeros_like(y) if self.guide is None else y
        raise ValueError("guidance of modulations needs null: give the null condition's modulations")
