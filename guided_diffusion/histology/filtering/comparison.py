"""
Which real patches a sample is compared with, and what follows from it: AUROC, threshold, weights, what to keep.

How far a patch lies from those of other slides says first how unlike them its own slide is. So a sample is scored
without the slides of its structure and its appearance, and compared with real patches of these very slides, scored
without the same ones: of samples that are as good as real patches, half of such pairs go either way. Slides are left
out by folds, so that there are at most 55 ways to score, however many slides. Owns that rule and those of keeping. Sees
arrays: nothing of files.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch as th

from ...slides import ranked
from .patchcore import Memory

MODES = ("threshold", "weights", "top_n", "useful")
SHARE = 0.1  # of the slides in a fold


def deal_folds(slides: Sequence[str], share: float, seed: int) -> np.ndarray:
    """
    :param slides: names, each once. :param share: of them in a fold; there are 3 folds at least, of 3 slides or more.
    :return: [S] int64, the fold of each.
    """
    count = min(len(slides), max(3, round(1 / share)))
    place = {slide: number for number, slide in enumerate(ranked(slides, seed))}
    return np.array([place[slide] % count for slide in slides])


@dataclass(frozen=True)
class Origins:
    """
    Where samples come from, as what they are scored without.

    :param slides: [N x 2] int64, the real slides of structure and appearance, rising; -1 for one that is not known, or
        the second of equals.
    :param groups: [G x 2] int64, what there is of folds to leave out, written alike; group: [N] int64, each sample's.
    """

    slides: np.ndarray
    groups: np.ndarray
    group: np.ndarray

    @classmethod
    def of(cls, names: Sequence[tuple[str, str]], known: Sequence[str], folds: np.ndarray) -> "Origins":
        """
        :param names: the slides that each sample's structure and appearance come from.
        :param known: the real patches' slides; folds: theirs. Samples of none of them are dealt to the folds in turn.
        """
        number = {name: index for index, name in enumerate(known)}
        slides = np.array([_pair(number.get(name, -1) for name in pair) for pair in names])
        turn = np.arange(len(names)) % (folds.max() + 1)
        left = np.where(slides < 0, -1, folds[slides])
        left[(slides < 0).all(1), 1] = turn[(slides < 0).all(1)]
        groups, group = np.unique([_pair(row) for row in left.tolist()], axis=0, return_inverse=True)
        return cls(slides, groups, group.reshape(-1))

    @property
    def unknown(self) -> np.ndarray:
        """[N] bool: neither slide is known."""
        return (self.slides < 0).all(1)


def _pair(numbers: Iterable[int]) -> list[int]:
    """Two numbers as a set, written as a pair: [-1, 3] for 3 and 3."""
    row = sorted(set(numbers))
    return row if len(row) == 2 else [-1, *row]


@dataclass(frozen=True)
class Comparison:
    """
    Samples' scores beside those of real patches.

    :param scores: [N] float64, of the samples.
    :param kind: [N] int64: samples of equal slides and folds have the same real patches beside them.
    :param real: their scores, an array a kind.
    """

    scores: np.ndarray
    kind: np.ndarray
    real: Sequence[np.ndarray]

    @cached_property
    def ranks(self) -> np.ndarray:
        """[N] float64: the share of its real patches that a sample scores higher than, ties counting half."""
        ranks = np.empty(len(self.scores))
        for number, real in enumerate(self.real):
            ordered, own = np.sort(real), self.kind == number
            sides = [np.searchsorted(ordered, self.scores[own], side) for side in ("left", "right")]
            ranks[own] = np.mean(sides, axis=0) / len(real)
        return ranks

    def auroc(self, chosen: np.ndarray | slice = slice(None)) -> float:
        """:return: the chance that a sample scores higher than a real patch of its slides: 0.5 cannot be told apart."""
        return float(self.ranks[chosen].mean())

    @cached_property
    def pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """The real patches' scores of all kinds, and weights by which each sample counts the same; these sum to 1."""
        share = np.bincount(self.kind, minlength=len(self.real)) / len(self.kind)
        weights = [np.full(len(real), part / len(real)) for part, real in zip(share, self.real)]
        return np.concatenate(self.real), np.concatenate(weights)

    def quantile(self, q: float | Sequence[float]) -> np.ndarray:
        """:return: quantiles of the pooled scores of real patches."""
        scores, weights = self.pooled
        return np.quantile(scores, q, weights=weights, method="inverted_cdf")


def compare(
    memory: Memory,
    scores: np.ndarray,
    origins: Origins,
    features: th.Tensor,
    slides: np.ndarray,
    folds: np.ndarray,
    reweight: bool = False,
) -> Comparison:
    """
    Score the real patches as the samples were. A sample of no known slide is compared with all of the fold left out.

    :param scores: [N] float64, of the samples.
    :param features: [M x P x D], of the real patches; slides: [M] int64, theirs; folds: [S], of the slides.
    """
    kinds, kind = np.unique(np.column_stack([origins.group, origins.slides]), axis=0, return_inverse=True)
    found = []
    for left_out, own in zip(origins.groups, _beside(origins, kinds, slides, folds)):
        needed = np.unique(np.concatenate(own))
        rows = th.from_numpy(needed).to(features.device)
        core = memory.without(left_out.tolist())
        real = np.concatenate([core.score(part, reweight).double().cpu().numpy() for part in features[rows].split(256)])
        found += [real[np.searchsorted(needed, members)] for members in own]
    return Comparison(scores, kind.reshape(-1), found)


def _beside(origins: Origins, kinds: np.ndarray, slides: np.ndarray, folds: np.ndarray) -> Iterator[list[np.ndarray]]:
    """For each group, the real patches that samples of its kinds, [K x 3]: group and slides, are compared with."""
    for number, left_out in enumerate(origins.groups):
        pairs = kinds[kinds[:, 0] == number, 1:]
        yield [
            np.flatnonzero(np.isin(slides, pair) if (pair >= 0).any() else np.isin(folds[slides], left_out))
            for pair in pairs
        ]


def score(
    memory: Memory, origins: Origins, rows: np.ndarray, features: th.Tensor, reweight: bool = False
) -> np.ndarray:
    """
    :param rows: [B] int64, which of the samples these are; features: [B x P x D], theirs.
    :return: [B] float64 scores.
    """
    scores = np.empty(len(rows))
    for group in np.unique(origins.group[rows]):
        own = origins.group[rows] == group
        core = memory.without(origins.groups[group].tolist())
        scores[own] = core.score(features[th.from_numpy(own).to(features.device)], reweight).double().cpu().numpy()
    return scores


# ---- what to keep ----


def weights(scores: np.ndarray, quantile: float) -> np.ndarray:
    """
    Turn scores into chances of being drawn: clipped at a quantile, scaled to [0, 1], 1 - s, divided by the sum.

    :param scores: an [N] array; those at or above the quantile get weight 0, the least the largest.
    :param quantile: in (0, 1]; 1 clips nothing.
    :return: an [N] float64 array with sum 1; equal weights where all clipped scores are equal.
    """
    clipped = np.minimum(scores, np.quantile(scores, quantile)).astype(np.float64)
    spread = clipped.max() - clipped.min()
    weight = 1 - (clipped - clipped.min()) / spread if spread > 0 else np.ones(len(clipped))
    return weight / weight.sum()


def keep(mode: str, scores: np.ndarray, weight: np.ndarray, threshold: float, top_n: int | None) -> np.ndarray:
    """
    :param mode: threshold keeps scores up to it; so does useful, of which agreement then takes a part; weights keeps
        what has a weight above 0; top_n the lowest, of equals the first.
    :return: an [N] bool array.
    """
    if mode in ("threshold", "useful"):
        return scores <= threshold
    if mode == "weights":
        return weight > 0
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(scores, kind="stable")[:top_n]] = True
    return kept
