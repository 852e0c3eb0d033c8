"""Batches without end: one seeded stream of samples, shared out over ranks, read by worker processes. Knows a data set
only as what gives samples by their keys."""

import contextlib
import errno
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch as th
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

from . import data_util, dist_util, signals, streams

PREFETCH = 2  # batches that each worker prepares ahead

Key = tuple[int, ...]  # (epoch, index), and what else a data set knows


class Source(Protocol):
    """
    What a stream needs of a data set; see image_datasets.NucleiDataset. Of those numbered from 0, `len` have masks, and
    the `unlabelled` after them have none. Of the former `weights` say how often each comes; None: as often as others.
    """

    unlabelled: int
    weights: np.ndarray | None

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> tuple: ...

    def share_memory(self, processes: int) -> None: ...


def unlabelled_before(position: int, share: float) -> int:
    """
    :param position: a number of samples of the stream, from its start.
    :param share: of them that are unlabelled, meant as the decimal number that it is written as.
    :return: how many of them are; any run of n samples has share * n, rounded up or down.
    """
    exact = Fraction(str(share))
    return position * exact.numerator // exact.denominator


class StreamSampler(Sampler):
    """
    One endless stream of keys for all ranks: epoch after epoch, each its own seeded permutation. Labelled and
    unlabelled samples have epochs of their own, and take turns as evenly as the share lets them.

    Rank r takes positions r, r + W, r + 2W, ... of the stream, so what a step sees does not depend on how many ranks
    share it, and a resumed run goes on at any position.

    :param length: the number of items.
    :param unlabelled: of those without masks, which are numbered after them; share: of the samples that they are.
    :param start: the position of the stream to begin at, for all ranks together.
    :param shuffle: permute; else every epoch is in order.
    :param weights: an [N] array: an epoch has an item as often as its weight is of their mean, rounded up or down, each
        time with a key of its own; None: once.
    """

    def __init__(
        self,
        length: int,
        *,
        unlabelled: int = 0,
        share: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start: int = 0,
        shuffle: bool = True,
        weights: np.ndarray | None = None,
    ) -> None:
        self.length = length
        self.unlabelled = unlabelled
        self.share = share
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start = start
        self.shuffle = shuffle
        self.weights = weights

    def __iter__(self) -> Iterator[Key]:
        labelled = _Epochs(self.length, self.shuffle and "order of the data", self.seed, self.weights)
        unlabelled = _Epochs(self.unlabelled, self.shuffle and "order of the images without masks", self.seed)
        for position in itertools.count(self.start + self.rank, self.world_size):
            before, after = (unlabelled_before(p, self.share) for p in (position, position + 1))
            if after > before:
                epoch, index = unlabelled[before]
                yield epoch, self.length + index
            else:
                yield labelled[position - before]


class _Epochs:
    """
    Items over and over: the n-th of this list without end is an epoch and an index; with weights, by which an epoch may
    have an item several times, n and an index, lest all that is drawn for these be the same.

    :param length: the number of items.
    :param purpose: of the stream that permutes each epoch; "" or False leaves them in order.
    :param weights: see StreamSampler.
    """

    def __init__(self, length: int, purpose: str | bool, seed: int, weights: np.ndarray | None = None) -> None:
        self.length = length
        self.purpose = purpose
        self.seed = seed
        self.weights = weights
        self.epoch, self.order = -1, np.arange(length)  # the latest permutation

    def __getitem__(self, number: int) -> Key:
        epoch, place = divmod(number, self.length)
        if self.purpose and epoch != self.epoch:
            rng = streams.rng(self.purpose, self.seed, epoch)
            plain = self.weights is None
            self.epoch, self.order = (
                epoch,
                rng.permutation(self.length) if plain else data_util.repeated(self.weights, rng),
            )
        return epoch if self.weights is None else number, int(self.order[place])


def stream(
    dataset: Source,
    batch_size: int,
    *,
    deterministic: bool = False,
    start: int = 0,
    num_workers: int = 0,
    seed: int = 0,
    unlabelled_share: float = 0.0,
) -> Iterator[tuple[th.Tensor, dict]]:
    """
    Make an endless iterator over this rank's batches of a data set.

    :param dataset: gives a sample for a key.
    :param batch_size: samples a batch, on this rank.
    :param deterministic: go through the items in order rather than shuffled.
    :param start: how many samples all ranks together have already seen.
    :param num_workers: see read_batches.
    :param unlabelled_share: of the samples of all ranks together, see StreamSampler.
    :return: see read_batches.
    :raises ValueError: where a rank has not as many images as a batch.
    """
    rank, world_size = dist_util.rank(), dist_util.world_size()
    unlabelled = dataset.unlabelled if unlabelled_share else 0
    images = len(dataset) + unlabelled
    shard = images // world_size
    if shard < 1:
        raise ValueError(f"{world_size} ranks but only {images} images: start at most {images} ranks")
    if not 1 <= batch_size <= shard:
        raise ValueError(
            f"--batch_size {batch_size} is out of range: each of {world_size} ranks has {shard} of {images} "
            f"images; give 1 to {shard}" + (", or --total_batch_size" if world_size > 1 else "")
        )
    mixed = dict(unlabelled=unlabelled, share=unlabelled_share if unlabelled else 0.0)
    place = dict(rank=rank, world_size=world_size, seed=seed, start=start)
    sampler = StreamSampler(len(dataset), **mixed, **place, shuffle=not deterministic, weights=dataset.weights)
    return read_batches(dataset, BatchSampler(sampler, batch_size, drop_last=False), num_workers)


def read_batches(
    dataset: Dataset,
    batches: Iterable[list[Key]],
    num_workers: int,
    ahead: int = PREFETCH,
    collate: Callable[[list], Any] = default_collate,
) -> Iterator[Any]:
    """
    Read batches, in their order; what is the matter with a file shows when its batch is due.

    :param batches: the keys of each.
    :param num_workers: processes that read and prepare; 0 does it in this one. They end with the iterator, or with this
        process.
    :param ahead: batches that each worker prepares before they are asked for.
    :param collate: makes a batch of the samples.
    :return: what the samples are, collated; in page-locked memory where there are GPUs.
    :raises ValueError, OSError: by the data set; ValueError where workers lack shared memory.
    """
    loader = DataLoader(
        _Reported(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        prefetch_factor=ahead if num_workers else None,
        collate_fn=functools.partial(_collate, collate),
        worker_init_fn=_prepare_worker,
        multiprocessing_context="fork" if num_workers else None,  # whatever Python's default: see signals
        pin_memory=dist_util.dev().type == "cuda",
        generator=th.Generator(),  # else the loader draws from the global one
    )
    with contextlib.ExitStack() as closing:
        try:
            with signals.held():
                reader = iter(loader)
            if num_workers:
                # By name, since an error's traceback would keep the reader, and with it the workers, for good.
                closing.callback(reader._shutdown_workers)
            for batch in reader:
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        except (RuntimeError, OSError) as error:
            full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "shared memory" in str(error)
            if not num_workers or not full:
                raise
            raise ValueError(
                f"--num_workers {num_workers}: shared memory is full: give --num_workers 0, a smaller --batch_size, or "
                "the container a larger --shm-size"
            ) from None


class _Reported(Dataset):
    """
    A data set whose mistakes are values: raised in a worker, they would come with its traceback in their text.

    :param dataset: the data set.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Key) -> tuple | Exception:
        try:
            return self.dataset[key]
        except (ValueError, OSError) as error:
            return error


def _collate(collate: Callable[[list], Any], samples: list) -> Any:
    return next((sample for sample in samples if isinstance(sample, Exception)), None) or collate(samples)


def _prepare_worker(worker: int) -> None:
    signals.leave_to_parent(worker)
    info = th.utils.data.get_worker_info()
    share_memory = getattr(info.dataset.dataset, "share_memory", None)
    if share_memory:
        share_memory(info.num_workers)
