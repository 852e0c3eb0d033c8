"""How a sweep's work is cut into batches and dealt to the ranks. Knows sample numbers and data sets, no models."""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch as th
from torch.utils.data import Dataset, default_collate

from . import dist_util
from .data_stream import Key, read_batches

# A batch's data: images and conditions, collated as far as they are of one size.
Groups = list[tuple[th.Tensor, dict]]


@dataclass(frozen=True)
class Batch:
    """
    What one rank samples at a time.

    :param checkpoint: with which weights.
    :param numbers: the sample numbers.
    :param wanted: guidance scale -> those of the numbers that are left to sample with it; the scales have one condition
        a number, and share what it costs.
    :param before: how many samples the batches before this one make.
    """

    checkpoint: str
    numbers: Sequence[int]
    wanted: Mapping[Hashable, Set[int]]
    before: int

    def __len__(self) -> int:
        return sum(map(len, self.wanted.values()))


def cut(
    pending: Mapping[tuple[str, Hashable], Set[int]], batch_size: int, ranks: int = 1, alike: bool = True
) -> list[Batch]:
    """
    Cut work into batches, small enough that no rank stays without.

    :param pending: (checkpoint, guidance scale) -> the samples that are left.
    :param batch_size: samples a batch, at most.
    :param ranks: how many share the work.
    :param alike: a number stands for the same condition whatever the scale.
    :return: the batches, by checkpoint in the order given.
    """
    groups: dict[tuple, dict[Hashable, Set[int]]] = {}
    for path in dict.fromkeys(path for path, _ in pending):
        for (other, scale), numbers in pending.items():
            if other == path:
                groups.setdefault((path,) if alike else (path, scale), {})[scale] = numbers
    batches: list[Batch] = []
    for (checkpoint, *_), left in groups.items():
        numbers = sorted(set().union(*left.values()))
        size = max(1, min(batch_size, -(-len(numbers) // ranks)))
        for first in range(0, len(numbers), size):
            part = numbers[first : first + size]
            wanted = {scale: own for scale in left if (own := left[scale] & set(part))}
            before = batches[-1].before + len(batches[-1]) if batches else 0
            batches.append(Batch(checkpoint, part, wanted, before))
    return batches


def dealt(
    batches: Sequence[Batch],
    dataset: Dataset,
    num_workers: int,
    key: Callable[[Batch, int], Key],
    apart: bool = False,
) -> Iterator[tuple[Batch, Groups]]:
    """
    Take batches, with their data, as this rank gets free. Collective, but no rank waits for another.

    Processes that read ahead hold what they have read for this rank. So they only do where enough is left for all.

    :param batches: the same on every rank.
    :param num_workers: processes that read ahead.
    :param key: what the data set gives the condition of a batch's sample for.
    :param apart: samples may differ in size, and each is a group of its own; else a batch is one.
    :return: an iterator over batches, in order, each with the data set's images and conditions.
    """
    ranks = dist_util.world_size()
    last = (num_workers + 1) * ranks if num_workers and ranks > 1 else 0
    shared = max(0, len(batches) - last)
    yield from _loaded(batches[:shared], dataset, num_workers, key, apart)
    yield from _loaded(batches[shared:], dataset, 0, key, apart)


def _loaded(
    batches: Sequence[Batch], dataset: Dataset, num_workers: int, key: Callable[[Batch, int], Key], apart: bool
) -> Iterator[tuple[Batch, Groups]]:
    own: deque[Batch] = deque()

    def keys() -> Iterator[list[Key]]:
        for place in dist_util.deal(len(batches)):
            own.append(batches[place])
            yield [key(batches[place], k) for k in batches[place].numbers]

    if batches:
        collate = _apart if apart else _together
        for groups in read_batches(dataset, keys(), num_workers, ahead=1, collate=collate):
            yield own.popleft(), groups


def _together(samples: list) -> Groups:
    return [default_collate(samples)]


def _apart(samples: list) -> Groups:
    return [default_collate([sample]) for sample in samples]
