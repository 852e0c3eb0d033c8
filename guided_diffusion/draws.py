"""
Which condition and which noise each sample of a folder has: structures spread over the slides, and draws of its own for
each checkpoint and guidance scale. Knows numbers and names of slides, not files or models.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from . import streams


@dataclass(frozen=True)
class Draw:
    """
    What one folder of samples is made of.

    :param order: the items in the order in which samples take them, again and again.
    :param appearances: turn, from 0 -> an [N] int array: the number of the source that lends an item its appearance.
    :param seed: of the noise.
    :param epoch: of the first turn through the items: of what is drawn for a condition, such as jitter.
    """

    order: np.ndarray
    appearances: Callable[[int], np.ndarray]
    seed: int
    epoch: int = 0

    def structure(self, k: int) -> int:
        """:return: the number of the item whose structure sample k has."""
        return int(self.order[k % len(self.order)])

    def source(self, k: int) -> int:
        """:return: the number of the source of its appearance."""
        return int(self.appearances(k // len(self.order))[self.structure(k)])

    def key(self, k: int) -> tuple[int, int, int]:
        """:return: what a data set gives sample k's condition for: (epoch, index, source)."""
        return self.epoch + k // len(self.order), self.structure(k), self.source(k)


def shared_draw(
    slides: Sequence[str], appearance: np.ndarray, pair: Callable[[int], np.ndarray], seed: int, first: bool
) -> Draw:
    """
    Make the draw that all folders of a run share.

    :param slides: the slide of each item.
    :param appearance: an [N] array of each item's source, in the first turn.
    :param pair: seed -> such an array, as another seed chooses it: for the turns after that.
    :param seed: of the run.
    :param first: take the items by name, and each with the same appearance in every turn, as the reference does; else
        spread over the slides.
    """

    @functools.cache
    def appearances(turn: int) -> np.ndarray:
        return appearance if first or not turn else pair(streams.seed(f"turn {turn}", seed))

    return Draw(np.arange(len(slides)) if first else spread(slides, seed), appearances, seed)


def own_draw(
    slides: Sequence[str], pair: Callable[[int], np.ndarray], seed: int, checkpoint: str, s: float, first: bool
) -> Draw:
    """
    Make the draw of one checkpoint and guidance scale, whatever other ones there are. Parameters as shared_draw's, and

    :param checkpoint: its path, whose last part counts; s: the scale.
    """
    own = streams.seed(f"folder of {PurePath(checkpoint).stem} at s = {s:g}", seed)
    return dataclasses.replace(shared_draw(slides, pair(own), pair, own, first), epoch=own)


def spread(slides: Sequence[str], seed: int) -> np.ndarray:
    """
    Order items so that any number of the first ones is spread evenly over slides, and over each slide's items.

    :param slides: the slide of each item.
    :param seed: of the order of the slides, and of each slide's items.
    :return: a permutation of 0 ... N - 1: one item of each slide in turn, as long as it has any.
    """
    shuffled = streams.rng("spread", seed).permutation(len(slides))
    turns: dict[str, int] = {}
    keys = []
    for place, item in enumerate(shuffled):
        turn = turns[slides[item]] = turns.get(slides[item], -1) + 1
        keys.append((turn, place))
    return shuffled[sorted(range(len(keys)), key=keys.__getitem__)]
