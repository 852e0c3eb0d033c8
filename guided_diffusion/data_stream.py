"""Batches without end: one seeded stream of samples, shared out over ranks, made by worker processes. Knows a data set
only as what makes samples by their keys."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch as th
from torch.utils.data import DataLoader, Dataset, Sampler

from . import dist_util, signals

PREFETCH = 2  # batches that each worker prepares ahead

Key = tuple[int, int]  # (epoch, index)
Room = dict[str, th.Tensor]


class BatchSource(Protocol):
    """What a stream needs of a data set; see image_datasets.NucleiDataset."""

    def __len__(self) -> int: ...

    def prepare(self) -> None: ...

    def room(self, count: int) -> Room: ...

    def write(self, keys: list[Key], room: Room) -> None: ...

    def finish(self, keys: list[Key], room: Room, pin: bool = False) -> tuple[th.Tensor, dict]: ...


class StreamSampler(Sampler):
    """
    One endless stream of keys for all ranks: epoch after epoch, each its own seeded permutation.

    Rank r takes positions r, r + W, r + 2W, ... of the stream, so what a step sees does not depend on how many ranks
    share it, and a resumed run goes on at any position.

    :param length: the number of items.
    :param start: the position of the stream to begin at, for all ranks together.
    :param shuffle: permute; else every epoch is in order.
    """

    def __init__(
        self, length: int, *, rank: int = 0, world_size: int = 1, seed: int = 0, start: int = 0, shuffle: bool = True
    ) -> None:
        self.length = length
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start = start
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.start + self.rank
        current, order = -1, np.arange(self.length)
        while True:
            epoch, place = divmod(position, self.length)
            if self.shuffle and epoch != current:
                # The third number keeps these draws apart from every sample's.
                order = np.random.default_rng([self.seed, epoch, self.length]).permutation(self.length)
                current = epoch
            yield epoch, int(order[place])
            position += self.world_size


def stream(
    dataset: BatchSource,
    batch_size: int,
    *,
    deterministic: bool = False,
    start: int = 0,
    num_workers: int = 0,
    seed: int = 0,
) -> Iterator[tuple[th.Tensor, dict]]:
    """
    Make an endless iterator over this rank's batches of a data set.

    :param dataset: makes the samples.
    :param batch_size: samples a batch, on this rank.
    :param deterministic: go through the items in order rather than shuffled.
    :param start: how many samples all ranks together have already seen.
    :param num_workers: processes that read and prepare; 0 does it in this one.
    :return: what dataset.finish gives.
    :raises ValueError: where a rank has not as many images as a batch, or workers lack shared memory.
    """
    rank, world_size = dist_util.rank(), dist_util.world_size()
    shard = len(dataset) // world_size
    if shard < 1:
        raise ValueError(f"{world_size} ranks but only {len(dataset)} images: start at most {len(dataset)} ranks")
    if not 1 <= batch_size <= shard:
        raise ValueError(
            f"--batch_size {batch_size} is out of range: each of {world_size} ranks has {shard} of {len(dataset)} "
            f"images; give 1 to {shard}"
        )
    if num_workers > 1:
        dataset.prepare()
    sampler = StreamSampler(
        len(dataset), rank=rank, world_size=world_size, seed=seed, start=start, shuffle=not deterministic
    )
    # When the loader asks for a batch, at most the last one it gave out is still to be finished, besides those ahead.
    rooms = [dataset.room(batch_size) for _ in range(num_workers * PREFETCH + 1)]
    if num_workers:
        _share(rooms, num_workers)
    loader = DataLoader(
        _Writer(dataset, rooms),
        batch_size=None,
        sampler=_orders(iter(sampler), batch_size, len(rooms)),
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=signals.leave_to_parent,
    )
    return _finished(dataset, rooms, iter(loader))


# ---- from workers to this process ----

# Fresh shared memory costs more than all the work on a sample, so there are a few rooms for a batch each, used in turn.
# Workers leave compact parts there; this process makes them the tensors of a batch.


@dataclass(frozen=True)
class _Order:
    """What a worker is to do: make these samples, in this room."""

    room: int
    keys: list[Key]


class _Writer(Dataset):
    """Carries out orders."""

    def __init__(self, dataset: BatchSource, rooms: list[Room]) -> None:
        self.dataset = dataset
        self.rooms = rooms

    def __getitem__(self, order: _Order) -> _Order:
        self.dataset.write(order.keys, self.rooms[order.room])
        return order


def _orders(keys: Iterator[Key], batch_size: int, rooms: int) -> Iterator[_Order]:
    for number in itertools.count():
        yield _Order(number % rooms, list(itertools.islice(keys, batch_size)))


def _share(rooms: list[Room], num_workers: int) -> None:
    """Move rooms into memory that worker processes see."""
    tensors = [tensor for room in rooms for tensor in room.values()]
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise ValueError(
            f"--num_workers {num_workers}: no {sum(tensor.nbytes for tensor in tensors) >> 20} MiB of shared memory "
            f"({error}): give --num_workers 0, a smaller --batch_size, or the container a larger --shm-size"
        ) from None


def _as_it_is(order: _Order) -> _Order:
    return order


def _finished(dataset: BatchSource, rooms: list[Room], orders: Iterator[_Order]) -> Iterator[tuple[th.Tensor, dict]]:
    pin = dist_util.dev().type == "cuda"
    for order in orders:
        yield dataset.finish(order.keys, rooms[order.room], pin)
