"""The numbers that decide how to train."""

import pytest

from guided_diffusion.train_options import TrainOptions


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"microbatch": "0"}, "--microbatch 0"),
        ({"microbatch": "3", "batch_size": 8}, "--microbatch 3 does not divide --batch_size 8"),
        ({"microbatch": "4", "total_batch_size": 6}, "--microbatch 4 does not divide --total_batch_size 6"),
        ({"microbatch": "few"}, "--microbatch few"),
        ({"keep_checkpoints": "0"}, "--keep_checkpoints 0"),
        ({"keep_checkpoints": "-1"}, "--keep_checkpoints -1"),
        ({"keep_checkpoints": "few"}, "--keep_checkpoints few"),
        ({"ema_rate": ""}, "--ema_rate"),
        ({"ema_rate": "0.9,x"}, "--ema_rate 0.9,x"),
        ({"ema_rate": "1.0"}, "--ema_rate 1.0"),
        ({"lr": 1e308}, "--lr 1e\\+308"),  # after one step of which no weight is finite
        ({"weight_decay": 1e308}, "--weight_decay 1e\\+308"),
    ],
)
def test_options_are_checked(options, flag):
    with pytest.raises(ValueError, match=flag):
        TrainOptions(**options)


def test_last_step():
    assert TrainOptions().last_step is None
    assert TrainOptions(max_steps=5).last_step == 5
    assert TrainOptions(max_steps=5, lr_anneal_steps=3).last_step == 3


def test_microbatches_and_kept_checkpoints():
    assert TrainOptions(batch_size=8).microbatch_size == 8
    assert TrainOptions(batch_size=8, microbatch="2").microbatch_size == 2
    assert TrainOptions(batch_size=8, microbatch="auto").microbatch_size is None
    assert TrainOptions().kept_checkpoints is None and TrainOptions(keep_checkpoints="3").kept_checkpoints == 3


def test_a_total_is_shared_out():
    options = TrainOptions(total_batch_size=24, microbatch="3")
    assert [options.shared_by(ranks).batch_size for ranks in (1, 2, 8)] == [24, 12, 3]
    assert options.shared_by(2).microbatch_size == 3 and TrainOptions(batch_size=5).shared_by(4).batch_size == 5
    with pytest.raises(ValueError, match="--total_batch_size 24 is no multiple of 5 processes: give 25"):
        options.shared_by(5)
    with pytest.raises(ValueError, match="--microbatch 3 does not divide --batch_size 4"):
        options.shared_by(6)
