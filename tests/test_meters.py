"""Means by quarter of the timesteps, and the clock of the training loop."""

import json
import math
import textwrap
import time
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch as th

from guided_diffusion.meters import LossMeter, StepClock


def test_means_by_quarter_since_the_last_reading():
    meter = LossMeter(8)
    meter.add(th.tensor([0, 1, 3]), {"mse": th.tensor([1.0, 3.0, 5.0])})
    meter.add(th.tensor([7]), {"mse": th.tensor([7.0]), "vb": th.tensor([2.0])})
    assert meter.read() == {"mse": 4.0, "mse_q0": 2.0, "mse_q1": 5.0, "mse_q3": 7.0, "vb": 2.0, "vb_q3": 2.0}
    assert meter.read() == {}


def test_weighted_means_are_over_the_weights():
    """Of samples drawn by importance, each quarter's mean is that of its losses, however often it is drawn."""
    meter, losses = LossMeter(4), th.tensor([0.54, 0.14, 0.07, 0.05])
    t = th.tensor([0] * 27 + [1] * 7 + [2] * 4 + [3] * 2)
    meter.add(t, {"mse": losses[t]}, weights=0.2 / losses[t])
    means = meter.read()
    assert [means[f"mse_q{i}"] for i in range(4)] == pytest.approx(losses.tolist())
    assert means["mse"] == pytest.approx(40 / (1 / losses[t]).sum().item())


def test_strictly_what_is_not_finite_counts_as_infinite():
    meter = LossMeter(4, strict=True)
    meter.add(th.tensor([0, 0, 1, 3]), {"mse": th.tensor([1.0, math.nan, -math.inf, 3.0]), "vb": th.ones(4)})
    means = meter.read()
    assert [means[f"mse_q{i}"] for i in (0, 1, 3)] == [math.inf, math.inf, 3] and means["mse"] == math.inf
    assert means["vb"] == 1
    meter.add(th.tensor([2]), {"mse": th.tensor([math.nan])}, weights=th.tensor([0.5]))
    assert meter.read() == {"mse": math.inf, "mse_q2": math.inf}


def test_a_rank_without_losses_reads_the_same_means(quick, tmp_path):
    script = textwrap.dedent(f"""
        import json, sys, torch as th, torch.distributed as dist
        from guided_diffusion.meters import LossMeter
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
        meter = LossMeter(4)
        if rank == 0:
            meter.add(th.tensor([1, 3]), {{"mse": th.tensor([2.0, 4.0])}}, weights=th.tensor([1.0, 3.0]))
        print(json.dumps(meter.read()))
        dist.destroy_process_group()
    """)
    root = Path(__file__).parents[1]
    ranks = [Popen([quick, "-c", script, str(rank)], stdout=PIPE, text=True, cwd=root) for rank in range(2)]
    answers = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in ranks]
    assert answers[0] == answers[1] == {"mse": 3.5, "mse_q1": 2.0, "mse_q3": 4.0}


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
