"""Two runs at once in one folder, a rank that stands still, and an output that nobody takes: the second is refused in
one line, the first goes on undisturbed, and nothing hangs."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .killed import calm, start
from .toy import STAGES
from .trials import Bench, Trial, differing, emptied, leftovers, snapshot

LOCKED = ("training", "sampling", "sweep", "segmenter", "structures", "prepare", "import", "clusters", "assembly")
LOCKED += ("export", "segment", "features", "filter", "evaluate")
TRIES = 5  # to find the first at work in its folder
TALKING = ("prepare", "assembly", "evaluate", "training", "sampling")  # which print
STILL = 120  # seconds that a rank stands still
PROMPT = 60  # seconds in which a program ends after what held it up has gone


def trials(bench: Bench) -> Iterator[Trial]:
    """:return: trials of each stage that has its folder to itself, and of each way to lose an output."""
    for name in LOCKED:
        yield f"{name} twice", partial(twice, bench, name)
    for name in TALKING:
        yield f"{name} into a full disk", partial(unheard, bench, name, "/dev/full")
        yield f"{name} into a pipe that nobody reads", partial(unheard, bench, name, "")
    yield "training into a full pipe that is read later", partial(read_late, bench)
    for name in ("training", "sweep"):
        yield f"{name}, 2 ranks, one of which stands still", partial(still, bench, name)


def twice(bench: Bench, name: str, folder: Path) -> list[str]:
    """Have the first stand still as soon as it has its folder, and start a second; :return: complaints."""
    whole, _ = calm(bench, name, 1, (), folder)
    for _ in range(TRIES):
        out = STAGES[name].prepare(bench.toy, emptied(folder))
        first = bench.start(STAGES[name], folder)
        while first.alive() and not holds(folder):
            pass
        first.kill(signal.SIGSTOP)
        if first.alive():
            break
        first.end()
    else:
        return ["it was never seen to have its folder to itself"]
    time.sleep(0.1)
    second = bench.run(STAGES[name], folder, said="said2")
    first.kill(signal.SIGCONT)
    return [*second.refused(), *first.end().well(), *differing(snapshot(out), whole, "the first's")]


def holds(folder: Path) -> bool:
    """:return: whether a run has a folder, which it notes in the lock's file when it has it."""
    return any(path.stat().st_size for path in folder.rglob(".lock"))


def unheard(bench: Bench, name: str, place: str, folder: Path) -> list[str]:
    """What is printed cannot be written, to a place or to a pipe whose reader has gone; :return: complaints."""
    whole, _ = calm(bench, name, 1, (), folder)
    out = STAGES[name].prepare(bench.toy, folder)
    if place:
        stdout = os.open(place, os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    done = bench.run(STAGES[name], folder, stdout=stdout, OPENAI_LOG_FORMAT="stdout,log")
    os.close(stdout)
    again = bench.run(STAGES[name], folder)
    return [*done.refused(), *again.well(), *differing(snapshot(out), whole, "afterwards"), *leftovers(folder, out)]


def read_late(bench: Bench, folder: Path) -> list[str]:
    """The pipe is full when a training begins, and read after a while; :return: complaints."""
    whole, seconds = calm(bench, "training", 1, (), folder)
    out = STAGES["training"].prepare(bench.toy, folder)
    reader, stdout = os.pipe()
    fcntl.fcntl(stdout, fcntl.F_SETPIPE_SZ, 4096)
    os.write(stdout, bytes(4096))
    running = bench.start(STAGES["training"], folder, stdout=stdout, OPENAI_LOG_FORMAT="stdout,log,csv")
    os.close(stdout)
    waits = running.alive(5 + 2 * seconds)
    with open(reader, "rb") as file:
        file.read()
    done = running.end(PROMPT + seconds)
    return [*([] if waits else ["it did not wait"]), *done.well(), *differing(snapshot(out), whole, "afterwards")]


def still(bench: Bench, name: str, folder: Path) -> list[str]:
    """The second rank stands still for a while; :return: complaints, unless all goes on then."""
    whole, seconds = calm(bench, name, 2, (), folder)
    out = STAGES[name].prepare(bench.toy, folder)
    running = start(bench, name, 2, (), folder)
    while running[0].alive(0.01) and not any(out.rglob("*")):
        pass
    running[1].kill(signal.SIGSTOP)
    running[0].alive(STILL)
    running[1].kill(signal.SIGCONT)
    done = [rank.end(PROMPT + 2 * seconds) for rank in running]
    return [*(line for one in done for line in one.well()), *differing(snapshot(out), whole, "afterwards")]
