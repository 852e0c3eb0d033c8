"""Exponential moving averages of a model's parameters. Knows nothing of training or of files."""

import contextlib
from collections.abc import Iterator, Mapping

import torch as th
from torch import nn

from .nn import update_ema


class Ema:
    """
    The average of a model's parameters at one rate; it begins as they are. The U-Net has no buffers, nor has this.

    :param model: on its device, with parameters in fp32.
    :param rate: the share of the average that stays at a step, in (0, 1).
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.model = model
        self.rate = rate
        self.params = [p.detach().clone() for p in model.parameters()]

    def update(self, step: int, taken: th.Tensor | None = None) -> None:
        """
        Move towards the parameters as they are now.

        :param step: how many steps came before this one. Until they outweigh it the rate is lower: an average that
            began n steps ago must not remember more than those.
        :param taken: a 0-d boolean tensor on the device: at False, of a step that was skipped, nothing moves.
        """
        update_ema(self.params, self.model.parameters(), min(self.rate, (1 + step) / (10 + step)), taken)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model have the averages for the length of a with block; and dropout off."""
        own = [p.data for p in self.model.parameters()]
        training = self.model.training
        self._swap(self.params)
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)
            self._swap(own)

    def _swap(self, values: list[th.Tensor]) -> None:
        for p, value in zip(self.model.parameters(), values):
            p.data = value

    def state_dict(self) -> dict[str, th.Tensor]:
        """:return: the averages by the names of the model's own state_dict, in its order."""
        return {name: value for (name, _), value in zip(self.model.named_parameters(), self.params)}

    @th.no_grad()
    def load_state_dict(self, state: Mapping[str, th.Tensor]) -> None:
        """Take averages up, by name; they must fit."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])
