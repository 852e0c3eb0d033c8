"""The order of the data, and that workers and ranks change nothing about it."""

import itertools
import math
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_batch

from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.data_stream import StreamSampler, stream
from guided_diffusion.image_datasets import load_dataset

ROOT = Path(__file__).resolve().parents[1]
SPEC = ConditionSpec(use_hv_map=True, use_col_map=True, num_classes=6)


def dataset(data_dir, **options):
    defaults = dict(data_dir=str(data_dir), dataset_mode="monuseg", image_size=32, spec=SPEC)
    return load_dataset(**{**defaults, **options})


def batches(data_dir, count, batch_size=4, **options):
    order = {name: options.pop(name) for name in ("num_workers", "start") if name in options}
    return list(itertools.islice(stream(dataset(data_dir, **options), batch_size, **order), count))


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


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_share_without_masks_is_exact(share, world_size):
    """Of the first n samples of all ranks n * share, rounded down: so a step has its share, but for rounding."""
    options = dict(seed=1, unlabelled=4, share=share, world_size=world_size)
    shares = [keys(500, rank=rank, **options) for rank in range(world_size)]
    merged = [share[i] for i in range(500) for share in shares]
    seen = 0
    for n, (_, index) in enumerate(merged, 1):
        seen += index >= 7
        assert seen == math.floor(n * Fraction(str(share)))
    kinds = [[(e, i) for e, i in merged if (i >= 7) == unlabelled] for unlabelled in (False, True)]
    for own, length in zip(kinds, (7, 4)):  # each kind goes through its own epochs, in orders of their own
        orders = [[index for _, index in own[first : first + length]] for first in range(0, len(own), length)]
        assert [epoch for epoch, _ in own] == [k // length for k in range(len(own))]
        assert all(len(set(order)) == len(order) for order in orders)
    assert kinds[0] == keys(len(kinds[0]), seed=1)
    assert keys(30, start=101 * world_size, **options) == shares[0][101:131]


def test_items_come_by_their_weights():
    weights = np.array([1, 1, 1, 1, 1, 1, 8.0])  # half to the others, 4 times their mean to the last
    options = dict(seed=2, weights=weights, unlabelled=3, share=0.2)
    whole = keys(700, **options)
    assert whole[:100] == [
        key for pair in zip(*(keys(50, rank=r, world_size=2, **options) for r in (0, 1))) for key in pair
    ]
    assert keys(30, start=77, **options) == whole[77:107]
    labelled = [key for key in whole if key[1] < 7]
    assert len(set(labelled)) == 560 and [number for number, _ in labelled] == list(range(560))
    for first in range(0, 560, 7):
        assert [index for _, index in labelled[first : first + 7]].count(6) == 4
    counts = np.bincount([index for _, index in labelled], minlength=7)
    assert counts[6] == 320 and (abs(counts[:6] - 40) < 20).all()


def test_in_order_when_deterministic():
    assert [index for _, index in keys(9, shuffle=False)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]


@pytest.mark.parametrize("augment", [False, True])
def test_workers_change_nothing(data_dir, augment):
    alone, helped = (batches(data_dir, 13, num_workers=workers, augment=augment) for workers in (0, 2))
    for batch, other in zip(alone, helped, strict=True):
        assert_same_batch(batch, other)


@pytest.mark.parametrize("kib", [8, 100])
def test_full_shared_memory_is_one_line(data_dir, kib):
    """In a mount namespace of its own, whose /dev/shm has room for no queue, or for no batch."""
    program = f"""
from tests.test_data_stream import batches
from guided_diffusion import cli
cli.run(lambda: batches({str(data_dir)!r}, 2, num_workers=1))
"""
    mount = f"mount -t tmpfs -o size={kib}k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 2 and "error: --num_workers 1: shared memory is full: give" in ended.stderr


def test_a_stream_goes_on_where_it_was(data_dir):
    """A run of 5 batches on one rank, then two ranks with 2 samples each: what they see is what one would have seen."""
    whole = batches(data_dir, 8, augment=True)
    for batch, other in zip(whole[5:], batches(data_dir, 3, augment=True, start=20, num_workers=1), strict=True):
        assert_same_batch(batch, other)


def children():
    """The processes that this one has started and that have not ended."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_closing_leaves_no_worker(data_dir):
    before = children()
    data = stream(dataset(data_dir), 4, num_workers=2)
    next(data)
    assert len(children() - before) == 2
    data.close()
    assert children() == before


def test_workers_die_with_their_parent(data_dir):
    program = f"""
import os
from tests.test_data_stream import dataset, stream
data = stream(dataset({str(data_dir)!r}), 4, num_workers=2)
next(data)
print(open(f"/proc/self/task/{{os.getpid()}}/children").read(), flush=True)
input()
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_set_smaller_than_twice_the_batch_goes_on_for_ever(data_dir):
    assert len(batches(data_dir, 5, batch_size=8)) == 5


@pytest.mark.parametrize("batch_size", [0, 9])
def test_batch_must_fit_the_shard(data_dir, batch_size):
    with pytest.raises(ValueError, match=f"--batch_size {batch_size} .*give 1 to 8"):
        stream(dataset(data_dir), batch_size)
