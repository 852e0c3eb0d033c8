"""
Gains of one segmenter over another: paired by seed and slide, with intervals and tests of whether they are chance.

Owns the bootstrap and the correction for many tests. Knows no files, and not what was trained on what.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from ... import streams

RESAMPLES = 10_000
LEAST_SEEDS = 3  # with fewer, a resample of seeds says nothing of others

Figures = Mapping[int, Mapping[str, float]]  # seed -> slide -> a figure


class Gain(NamedTuple):
    """
    A mean gain over seeds and slides.

    :param low: and high: of its 95 % interval; None of fewer than LEAST_SEEDS seeds or two slides.
    :param p: of no gain, two-sided, in (0, 1]; None as the interval.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None


def differences(own: Figures, other: Figures) -> np.ndarray:
    """
    :return: an [S x T] array, own minus other, of the seeds and slides that both have, sorted.
    :raises ValueError: where the slides of these seeds differ.
    """
    seeds = sorted(own.keys() & other.keys())
    slides = {frozenset(figures[seed]) for figures in (own, other) for seed in seeds}
    if len(slides) > 1:
        raise ValueError(
            "gains are paired by slide, and these segmenters were tested on different ones: test them anew"
        )
    order = sorted(next(iter(slides), ()))
    return np.array([[own[seed][slide] - other[seed][slide] for slide in order] for seed in seeds]).reshape(
        len(seeds), len(order)
    )


def gain(found: np.ndarray, seed: int = 0) -> Gain:
    """
    Average gains, with a hierarchical bootstrap, seeds being drawn with replacement, then slides, and Student's t.

    All seeds are tested on the same slides, so that one draw of slides serves all seeds of a resample (the pigeonhole
    bootstrap: Owen, Annals of Applied Statistics 2007): slides drawn anew for each would pass for as many times more
    slides than there are. The p-value is twice the smaller share of resampled means on one side of 0 (Efron and
    Tibshirani 1993, chapter 15), which a resample more keeps from 0.

    Where few seeds differ more than slides do, resamples of these few are too much alike: of five seeds without a gain
    6 % have one sign all, and then no resample has the other. Student's t of the seeds' means knows how few they are,
    but nothing of slides. So the interval reaches as far as the farther of the two, and p is the larger one.

    :param found: an [S x T] array of differences, by seed and slide.
    :param seed: of the draws.
    """
    mean = float(found.mean()) if found.size else float("nan")
    seeds, slides = found.shape
    if seeds < LEAST_SEEDS or slides < 2:
        return Gain(mean, None, None, None)
    rng = streams.rng("bootstrap of gains", seed)
    # A resample's mean is a product of how often each seed and each slide was drawn.
    weights = [rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count for count in (seeds, slides)]
    means = np.einsum("rs,st,rt->r", weights[0], found, weights[1])
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    side = min((means <= 0).sum(), (means >= 0).sum())
    p = float(min(1, 2 * (side + 1) / (RESAMPLES + 1)))
    error = float(found.mean(axis=1).std(ddof=1)) / seeds**0.5
    if error > 1e-12:  # else seeds do not differ, and t says nothing
        reach = error * float(stats.t.ppf(0.975, seeds - 1))
        low, high = min(low, mean - reach), max(high, mean + reach)
        p = max(p, float(2 * stats.t.sf(abs(mean) / error, seeds - 1)))
    return Gain(mean, low, high, p)


def holm(values: Sequence[float]) -> list[float]:
    """
    Correct p-values for how many there are (Holm, Scandinavian Journal of Statistics 1979).

    :return: in the order of `values`, what is to be compared with the level at which one false gain among all is borne.
    """
    order = np.argsort(values, kind="stable")
    corrected = np.array([values[i] * (len(values) - rank) for rank, i in enumerate(order)])
    found = np.empty(len(values))
    found[order] = np.minimum(1, np.maximum.accumulate(corrected))
    return found.tolist()
