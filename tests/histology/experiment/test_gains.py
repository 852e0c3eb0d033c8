"""Gains with their intervals and tests, against exact ones and worked examples."""

import itertools

import numpy as np
import pytest
from scipy import stats

from guided_diffusion.histology.experiment import gains


def test_gains_are_paired_by_seed_and_slide():
    own = {0: {"a": 0.5, "b": 0.7}, 1: {"b": 0.6, "a": 0.9}, 3: {"a": 1.0, "b": 1.0}}
    other = {1: {"a": 0.4, "b": 0.4}, 0: {"a": 0.4, "b": 0.5}}
    assert gains.differences(own, other) == pytest.approx(np.array([[0.1, 0.2], [0.5, 0.2]]))
    assert gains.gain(gains.differences(own, other)) == (pytest.approx(0.25), None, None, None)  # of two seeds
    with pytest.raises(ValueError, match="tested on different ones"):
        gains.differences(own, {0: {"a": 0.4}})


def test_the_interval_is_that_of_all_resamples():
    """Where slides differ far more than seeds."""
    found = np.array([[0.9, -0.4, 0.2], [0.88, -0.39, 0.2], [0.9, -0.41, 0.21]])
    # All 27 draws of three seeds with all 27 of three slides, which all seeds share.
    draws = [list(draw) for draw in itertools.product(range(3), repeat=3)]
    exact = np.array([found[np.ix_(seeds, slides)].mean() for seeds in draws for slides in draws])
    one = gains.gain(found)
    assert one.mean == pytest.approx(found.mean())
    assert (one.low, one.high) == pytest.approx(np.quantile(exact, (0.025, 0.975)), abs=0.006)
    assert one.p == pytest.approx(2 * (exact <= 0).mean(), abs=0.02)
    assert gains.gain(found) == one and gains.gain(found, seed=1) != one
    assert gains.gain(-found).p == one.p and gains.gain(np.zeros((3, 3))).p == 1


def test_without_differences_between_seeds_it_is_the_bootstrap_of_slides():
    row = np.random.default_rng(0).normal(0.1, 0.2, 14)
    one = gains.gain(np.tile(row, (5, 1)))
    own = stats.bootstrap((row,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    assert (one.low, one.high) == pytest.approx((own.low, own.high), abs=0.004)


def test_few_seeds_are_few():
    """Without a gain, where seeds differ, there are no more than so many false ones, and intervals hold the truth."""
    rng, tries = np.random.default_rng(0), 400
    found = [gains.gain(rng.normal(0, 0.02, (5, 1)) + rng.normal(0, 0.01, (5, 14)), seed) for seed in range(tries)]
    assert sum(one.p <= 0.05 for one in found) <= 0.07 * tries
    assert sum(one.p <= 0.004 for one in found) <= 0.012 * tries
    assert sum(one.low <= 0 <= one.high for one in found) >= 0.93 * tries
    real = gains.gain(rng.normal(0.05, 0.02, (5, 1)) + rng.normal(0, 0.01, (5, 14)))
    assert real.p < 0.05 and real.low > 0


def test_holm():
    # The smallest times four, the next times three, and none below one before it.
    assert gains.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert gains.holm([0.5, 0.9]) == [1, 1] and gains.holm([]) == []
