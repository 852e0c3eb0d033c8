"""Programs that are killed, at any moment or inside a write: the same command ends as if nothing had happened, and no
process and no file is left behind."""

import random
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from .toy import STAGES
from .trials import Bench, Done, Missed, Running, Trial, children, differing, emptied, leftovers, orphans, snapshot

MANY, FEW = 300, 20  # kills of trainings and of samplings; of each other stage
OTHERS = ("prepare", "import", "features", "clusters", "structures", "segmenter", "segment", "filter", "assembly")
OTHERS += ("export", "evaluate", "summary")
LATEST = 0.95  # of the time that it takes undisturbed, at which it is killed at the latest


def training(bench: Bench, rng: random.Random) -> Iterator[Trial]:
    """:return: trials of trainings of one and of two ranks, without and with a process that reads."""
    ways = [(1, "0"), (1, "1"), (2, "1")]
    for number in range(MANY):
        ranks, workers = ways[number // 2 % 3]
        yield from strike(bench, rng, "training", number % 2 > 0, ranks, ["--num_workers", workers])


def sampling(bench: Bench, rng: random.Random) -> Iterator[Trial]:
    """:return: trials of samplings, of a sweep of two ranks, and of fields."""
    for number in range(MANY):
        name, ranks = [("sampling", 1), ("sweep", 2), ("fields", 1)][number // 2 % 3]
        yield from strike(bench, rng, name, number % 2 > 0, ranks)


def others(bench: Bench, rng: random.Random) -> Iterator[Trial]:
    """:return: trials of each other stage."""
    for number in range(FEW):
        for name in OTHERS:
            yield from strike(bench, rng, name, number % 2 > 0)


def strike(
    bench: Bench, rng: random.Random, name: str, inside: bool, ranks: int = 1, extra: Sequence[str] = ()
) -> Iterator[Trial]:
    share, alone = LATEST * rng.random(), ranks > 1 and rng.random() < 0.5
    what = f"{name}{f', {ranks} ranks' if ranks > 1 else ''} {' '.join(extra)} at {share:.2f}"
    what += f"{', inside a write' if inside else ''}{', one rank alone' if alone else ''}"
    yield what, partial(judge, bench, name, share, inside, ranks, alone, extra)


def judge(
    bench: Bench, name: str, share: float, inside: bool, ranks: int, alone: bool, extra: Sequence[str], folder: Path
) -> list[str]:
    """
    Kill a stage, and repeat its command.

    :param share: of its usual time, after which it is killed; inside: while it writes, then.
    :param alone: the last of the ranks is killed alone; the others are asked to stop, as a launcher does then.
    """
    before = children()
    whole, seconds = calm(bench, name, ranks, extra, folder)
    out = STAGES[name].prepare(bench.toy, folder)
    running = start(bench, name, ranks, extra, folder)
    deadline = time.monotonic() + share * seconds
    while time.monotonic() < deadline and running[0].alive(0.01):
        pass
    while inside and running[0].alive() and not any(folder.rglob("*.part")):
        pass
    struck = running[-1].alive()
    for rank in reversed(running):
        rank.kill(signal.SIGTERM if alone and rank is not running[-1] else signal.SIGKILL)
    ended = [rank.end() for rank in running]
    if not struck:
        raise Missed
    complaints = ["the other rank hung"] if any(done.code is None for done in ended) else []
    complaints += orphans(before)
    again = [rank.end() for rank in start(bench, name, ranks, extra, folder)]
    complaints += [line for done in again for line in done.well()]
    return [*complaints, *differing(snapshot(out), whole, "afterwards"), *leftovers(folder, out)]


def start(bench: Bench, name: str, ranks: int, extra: Sequence[str], folder: Path, **options) -> list[Running]:
    """:return: the ranks of a stage, which meet as the workers of torchrun do; one is no rank."""
    if ranks == 1:
        return [bench.start(STAGES[name], folder, extra, **options)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    place |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    numbers = [{"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(ranks)]
    return [bench.start(STAGES[name], folder, extra, said=f"said{k}", **place, **n) for k, n in enumerate(numbers)]


_CALM: dict[tuple, tuple[dict[str, str], float]] = {}


def calm(bench: Bench, name: str, ranks: int, extra: Sequence[str], folder: Path) -> tuple[dict[str, str], float]:
    """:return: what a stage makes undisturbed, in the folder, which is empty before and afterwards; and its seconds."""
    key = (name, ranks, *extra)
    if key not in _CALM:
        bench.provide(STAGES[name])
        out, begun = STAGES[name].prepare(bench.toy, folder), time.monotonic()
        ended: list[Done] = [rank.end() for rank in start(bench, name, ranks, extra, folder)]
        if any(done.code for done in ended):
            raise ValueError(f"{name} failed by itself: {ended[0].last()}")
        _CALM[key] = snapshot(out), time.monotonic() - begun
        emptied(folder)
    return _CALM[key]
