"""
Processes that a program starts: they end with it, and get the signals that were meant for it, or share its work.

Knows nothing of what they do.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import FrameType
from typing import IO, TypeVar

from . import signals

Item = TypeVar("Item")
Result = TypeVar("Result")

_WAITING = 8  # results of each worker that may wait until they are asked for: memory does not grow with the items


def run(command: list[str], output: IO[str], environment: dict[str, str], keep: Sequence[int] = ()) -> tuple[int, bool]:
    """
    Run a command to its end. Signals to this process go to it, and it decides what to do; it gets SIGTERM where this
    process is killed.

    :param output: what it prints goes there.
    :param environment: variables on top of this process's. :param keep: descriptors that it keeps open.
    :return: its exit code, as a shell would give it, and whether a signal came.
    """
    received: list[int] = []
    early: list[int] = []  # before the child was known
    child: subprocess.Popen | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    for number in signals.heeded():
        signal.signal(number, forward)
    child = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        pass_fds=keep,
        process_group=0,  # what is sent to this one's whole group reaches it once, from here
        preexec_fn=partial(signals.end_with_parent, signal.SIGTERM, os.getpid()),
    )
    for number in early[-1:]:
        child.send_signal(number)
    code = wait(child)
    return code if code >= 0 else 128 - code, bool(received)


def wait(child: subprocess.Popen, seconds: float = math.inf) -> int:
    """
    Wait for a process in turns of a second: a handler does not run where a signal comes just before a wait without end.

    :return: its exit code. :raises subprocess.TimeoutExpired: where it has not ended after so many seconds.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 1:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=1)
    return child.wait(timeout=max(0.0, left))


def each(task: Callable[[Item], Result], items: Sequence[Item], workers: int, fork: bool = False) -> Iterator[Result]:
    """
    Unlike multiprocessing.Pool, this ends where a worker does, and ends its workers without a signal: a handler of
    Python's, which forked ones inherit, does not run where a signal comes just before a wait.

    :param task: what is done with an item; it and the items can be pickled.
    :param workers: processes; with one, or one item, it is done in this process.
    :param fork: workers begin as copies of this process, and have what it has read; not where other threads hold locks.
    :return: the result of every item, in order. The first error ends it.
    :raises ChildProcessError: where a worker was ended from outside.
    """
    count = min(workers, len(items))
    if count <= 1:
        yield from map(task, items)
        return
    context = multiprocessing.get_context("fork" if fork else "spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(),)) as pool:
        waiting: deque[Future] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(task, item))
                if len(waiting) > _WAITING * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ChildProcessError("a worker process was ended, as where memory runs out: run it again") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker(parent: int) -> None:
    signals.leave_to_parent()
    signals.end_with_parent(signal.SIGKILL, parent)
