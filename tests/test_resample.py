"""Timestep samplers: exact expectations, the learned distribution's formula, and one sampler on all ranks."""

import json
import textwrap
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
import torch as th

from guided_diffusion.resample import (
    SCHEDULE_SAMPLERS,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from guided_diffusion.script_util import create_gaussian_diffusion


class Fixed(ScheduleSampler):
    """A sampler with given weights, which need not sum to one."""

    def __init__(self, weights):
        self._weights = np.array(weights, dtype=np.float64)

    def weights(self):
        return self._weights


def filled(num_timesteps=4, history=3, seed=0):
    """A loss-aware sampler with a full history, and that history."""
    sampler = LossSecondMomentResampler(num_timesteps, history_per_term=history)
    losses = np.random.default_rng(seed).uniform(0.1, 2, (num_timesteps, history))
    for column in losses.T:
        sampler.update_with_all_losses(list(range(num_timesteps)), column.tolist())
    return sampler, losses


def second_moment_formula(losses, uniform_prob=0.001):
    rms = np.sqrt(np.square(losses).mean(axis=1))
    return (1 - uniform_prob) * rms / rms.sum() + uniform_prob / len(losses)


@pytest.mark.parametrize("sampler", [UniformSampler(4), Fixed([1, 2, 3, 10]), filled()[0]])
def test_importance_weights_keep_the_expected_loss(sampler):
    p = sampler.weights() / sampler.weights().sum()
    t, factors = sampler.sample(4000, rng=np.random.default_rng(0))
    factor_of = {int(step): float(factor) for step, factor in zip(t, factors)}
    assert set(factor_of) == {0, 1, 2, 3}
    loss = np.array([3.0, -1.0, 0.5, 7.0])
    # The expectation over p of factor * loss, exactly: what uniform sampling gives.
    expectation = sum(p[step] * factor_of[step] * loss[step] for step in range(4))
    assert expectation == pytest.approx(loss.mean(), rel=1e-6)


def test_draws_follow_the_weights():
    n = 20_000
    p = np.array([0.1, 0.2, 0.3, 0.4])
    t, _ = Fixed(5 * p).sample(n, rng=np.random.default_rng(1))
    counts = np.bincount(t.numpy(), minlength=4)
    assert np.abs(counts - n * p).max() < 5 * np.sqrt(n * 0.25)


def test_uniform_factors_are_one():
    t, factors = UniformSampler(1000).sample(64, rng=np.random.default_rng(0))
    assert t.dtype == th.int64
    assert factors.dtype == th.float32
    assert t.shape == factors.shape == (64,)
    th.testing.assert_close(factors, th.ones(64))
    assert t.min() >= 0 and t.max() < 1000


def test_equal_rng_gives_equal_draws():
    sampler = filled()[0]
    first, second, other = (sampler.sample(50, rng=np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert th.equal(first[0], second[0])
    assert th.equal(first[1], second[1])
    assert not th.equal(first[0], other[0])


def test_draws_leave_numpys_global_generator_alone():
    before = np.random.get_state()[1].copy()
    UniformSampler(10).sample(5)
    assert (np.random.get_state()[1] == before).all()


def test_second_moment_is_uniform_until_full():
    sampler = LossSecondMomentResampler(3, history_per_term=2)
    for t, loss in [(0, 5.0), (0, 6.0), (0, 7.0), (1, 1.0), (1, 1.0), (2, 3.0)]:
        sampler.update_with_all_losses([t], [loss])
        assert sampler.weights().tolist() == [1, 1, 1]
    sampler.update_with_all_losses([2], [4.0])
    expected = second_moment_formula(np.array([[6.0, 7.0], [1.0, 1.0], [3.0, 4.0]]))
    np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-12)


def test_second_moment_formula_and_uniform_share():
    sampler, losses = filled(num_timesteps=5, history=4)
    np.testing.assert_allclose(sampler.weights(), second_moment_formula(losses), rtol=1e-12)
    assert sampler.weights().sum() == pytest.approx(1)

    starved = LossSecondMomentResampler(2, history_per_term=1, uniform_prob=0.2)
    starved.update_with_all_losses([0, 1], [0.0, 9.0])
    np.testing.assert_allclose(starved.weights(), [0.1, 0.9], rtol=1e-12)


def test_second_moment_forgets_the_oldest():
    sampler, losses = filled(num_timesteps=3, history=3)
    for loss in (10.0, 20.0, 30.0, 40.0):
        sampler.update_with_all_losses([1], [loss])
    losses[1] = [20.0, 30.0, 40.0]
    np.testing.assert_allclose(sampler.weights(), second_moment_formula(losses), rtol=1e-12)


def test_second_moment_passes_over_what_is_not_finite():
    sampler, losses = filled()
    sampler.update_with_all_losses([0, 1], [float("nan"), float("inf")])
    np.testing.assert_allclose(sampler.weights(), second_moment_formula(losses), rtol=1e-12)


def test_second_moment_takes_repeats_within_one_update():
    one, other = filled()[0], filled()[0]
    one.update_with_all_losses([2, 0, 2, 2], [1.0, 2.0, 3.0, 4.0])
    for t, loss in [(2, 1.0), (0, 2.0), (2, 3.0), (2, 4.0)]:
        other.update_with_all_losses([t], [loss])
    assert one.weights().tolist() == other.weights().tolist()


def test_a_sampler_that_does_not_learn_takes_losses_and_stays_the_same():
    sampler = UniformSampler(4)
    sampler.update_with_local_losses(th.tensor([1, 3]), th.tensor([0.5, 4.0]))
    assert sampler.weights().tolist() == [1, 1, 1, 1]


def test_local_losses_without_a_process_group():
    local, everywhere = filled()[0], filled()[0]
    local.update_with_local_losses(th.tensor([1, 3]), th.tensor([0.5, 4.0]))
    everywhere.update_with_all_losses([1, 3], [0.5, 4.0])
    assert local.weights().tolist() == everywhere.weights().tolist()


def test_ranks_share_their_losses_in_turns(quick, tmp_path):
    """Two processes with unequal numbers of losses end with the weights of one that saw the whole batch in order."""
    script = textwrap.dedent(f"""
        import sys, torch as th, torch.distributed as dist
        from guided_diffusion.resample import LossSecondMomentResampler
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
        sampler = LossSecondMomentResampler(2, history_per_term=2)
        t, losses = ([0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0]) if rank == 0 else ([0, 0], [5.0, 7.0])
        sampler.update_with_local_losses(th.tensor(t), th.tensor(losses))
        print(sampler.weights().tolist())
        dist.destroy_process_group()
    """)
    root = Path(__file__).parents[1]
    ranks = [Popen([quick, "-c", script, str(rank)], stdout=PIPE, text=True, cwd=root) for rank in range(2)]
    answers = [process.communicate(timeout=60)[0].strip().splitlines()[-1] for process in ranks]
    # Timestep 0 has two slots, and sees 1, 5, 2, 7.
    expected = second_moment_formula(np.array([[2.0, 7.0], [3.0, 4.0]]))
    assert answers[0] == answers[1]
    np.testing.assert_allclose(json.loads(answers[0]), expected, rtol=1e-12)


def test_what_was_learnt_is_taken_up():
    sampler, fresh = filled()[0], LossSecondMomentResampler(4, history_per_term=3)
    state = sampler.state_dict()
    sampler.update_with_all_losses([0], [1.0])  # what is taken afterwards does not show in the state
    fresh.load_state_dict(state)
    fresh.update_with_all_losses([0], [1.0])
    draws = [one.sample(50, rng=np.random.default_rng(0)) for one in (sampler, fresh)]
    assert th.equal(draws[0][0], draws[1][0]) and th.equal(draws[0][1], draws[1][1])
    assert sampler.state_dict().keys() == {"history", "counts"} and UniformSampler(4).state_dict() == {}
    UniformSampler(4).load_state_dict({})


def test_what_another_sampler_learnt_is_refused():
    learnt = filled()[0].state_dict()
    others = (UniformSampler(4), LossSecondMomentResampler(5, history_per_term=3), LossSecondMomentResampler(4))
    for sampler in others:
        with pytest.raises(ValueError, match="--schedule_sampler"):
            sampler.load_state_dict(learnt)
    with pytest.raises(ValueError, match="--schedule_sampler"):
        filled()[0].load_state_dict({})


def test_names():
    samplers = {name: create_named_schedule_sampler(name, 7) for name in SCHEDULE_SAMPLERS}
    assert isinstance(samplers["uniform"], UniformSampler)
    assert isinstance(samplers["loss-second-moment"], LossSecondMomentResampler)
    assert all(len(sampler.weights()) == 7 for sampler in samplers.values())
    process = create_gaussian_diffusion(steps=100, timestep_respacing="6")
    for sampler in (
        *(create_named_schedule_sampler(name, process) for name in SCHEDULE_SAMPLERS),
        UniformSampler(process),
        LossSecondMomentResampler(process, history_per_term=2),
    ):
        assert len(sampler.weights()) == 6
    with pytest.raises(ValueError, match=r"--schedule_sampler gauss.*uniform, loss-second-moment"):
        create_named_schedule_sampler("gauss", 7)
