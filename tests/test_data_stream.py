"""The order of the data, and that workers and ranks change nothing about it."""

import itertools

import pytest
import torch as th
from conftest import assert_same_batch

from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.data_stream import StreamSampler, stream
from guided_diffusion.image_datasets import load_data, load_dataset

SPEC = ConditionSpec(use_hv_map=True, use_col_map=True, num_classes=6)


def dataset(data_dir, **options):
    defaults = dict(data_dir=str(data_dir), dataset_mode="monuseg", image_size=32, spec=SPEC)
    return load_dataset(**{**defaults, **options})


def batches(data_dir, count, **options):
    defaults = dict(data_dir=str(data_dir), dataset_mode="monuseg", image_size=32, spec=SPEC, batch_size=4)
    return list(itertools.islice(load_data(**{**defaults, **options}), count))


def keys(count, **options):
    return list(itertools.islice(StreamSampler(7, **options), count))


def test_each_epoch_is_its_own_permutation():
    stream_keys = keys(21, seed=3)
    epochs = [[index for epoch, index in stream_keys if epoch == e] for e in range(3)]
    assert all(sorted(order) == list(range(7)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    assert keys(21, seed=3) == stream_keys != keys(21, seed=4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_stream(world_size):
    shares = [keys(6, rank=rank, world_size=world_size, seed=1) for rank in range(world_size)]
    merged = [share[i] for i in range(6) for share in shares]
    assert merged == keys(6 * world_size, seed=1)


def test_a_stream_can_begin_anywhere():
    assert keys(10, seed=1, start=9) == keys(19, seed=1)[9:]


def test_in_order_when_deterministic():
    assert [index for _, index in keys(9, shuffle=False)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]


@pytest.mark.parametrize("augment", [False, True])
def test_workers_change_nothing(data_dir, augment):
    """Not in more batches than there are rooms for in shared memory, either, all of them kept."""
    alone, helped = (batches(data_dir, 13, num_workers=workers, augment=augment) for workers in (0, 2))
    for batch, other in zip(alone, helped, strict=True):
        assert_same_batch(batch, other)


def test_no_shared_memory(data_dir, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(th.Tensor, "share_memory_", refuse)
    with pytest.raises(ValueError, match="--num_workers 1: .*No space left on device.*give --num_workers 0"):
        batches(data_dir, 1, num_workers=1)


def test_a_set_smaller_than_twice_the_batch_goes_on_for_ever(data_dir):
    assert len(batches(data_dir, 5, batch_size=8)) == 5


@pytest.mark.parametrize("batch_size", [0, 9])
def test_batch_must_fit_the_shard(data_dir, batch_size):
    with pytest.raises(ValueError, match=f"--batch_size {batch_size} .*give 1 to 8"):
        stream(dataset(data_dir), batch_size)
