"""Means by quarter of the timesteps, and the clock of the training loop."""

import time

import pytest
import torch as th

from guided_diffusion.meters import LossMeter, StepClock


def test_means_by_quarter_since_the_last_reading():
    meter = LossMeter(8)
    meter.add(th.tensor([0, 1, 3]), {"mse": th.tensor([1.0, 3.0, 5.0])})
    meter.add(th.tensor([7]), {"mse": th.tensor([7.0]), "vb": th.tensor([2.0])})
    assert meter.read() == {"mse": 4.0, "mse_q0": 2.0, "mse_q1": 5.0, "mse_q3": 7.0, "vb": 2.0, "vb_q3": 2.0}
    assert meter.read() == {}


def test_losses_that_are_not_finite_do_not_spoil_the_mean():
    meter = LossMeter(4)
    meter.add(th.tensor([0, 0, 3]), {"mse": th.tensor([1.0, float("nan"), float("inf")])})
    assert meter.read() == {"mse": 1.0, "mse_q0": 1.0}
    meter.add(th.tensor([0]), {"mse": th.tensor([float("nan")])})
    assert meter.read() == {}


def test_losses_may_carry_gradients_and_other_dtypes():
    meter = LossMeter(4)
    meter.add(th.tensor([2]), {"mse": th.ones(1, dtype=th.bfloat16, requires_grad=True)})
    assert meter.read() == {"mse": 1.0, "mse_q2": 1.0}


def test_clock():
    clock = StepClock(samples=100)
    with clock.waiting():
        time.sleep(0.02)
    with clock.paused():
        time.sleep(0.2)
    row = clock.read(110)
    assert row["data_wait"] == pytest.approx(1, abs=0.2) and row["images_per_s"] > 10 / 0.15
    time.sleep(0.01)
    assert clock.read(110) == {"images_per_s": 0.0, "data_wait": 0.0}
