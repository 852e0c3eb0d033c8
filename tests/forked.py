"""
A program in a process of its own that needs no seconds to start.

It is forked from a server that has imported what the programs need and done nothing yet: so it inherits no threads,
which do not survive a fork. torch imports _dynamo with the first optimiser.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from guided_diffusion import cli, dist_util

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["image_train", "image_sample", "torch._dynamo"])


def _run(main: Callable[[list[str]], None], argv: list[str], log: Path, env: dict[str, str]) -> None:
    os.setsid()
    os.environ |= env
    with open(log.with_suffix(".out"), "a") as out, open(log.with_suffix(".err"), "a") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = out, err
        # Nobody launched it who would pass its exit code on: a moment is enough for others to end by themselves.
        cli.run(lambda: main(argv), dist_util.launched_rank, lambda: dist_util.leave(0.2))


class Child:
    """
    main(argv) in a process and session of its own, as the entry scripts run it.

    :param log: what it prints is added to the files of this name that end in .out and .err.
    :param env: variables of its environment.
    """

    def __init__(self, main: Callable[[list[str]], None], argv: list[str], log: Path, **env: str) -> None:
        self.process = SERVER.Process(target=_run, args=(main, argv, log, env))
        self.process.start()
        self.pid = self.process.pid

    def wait(self) -> int | None:
        """:return: its exit code; None where it takes too long."""
        self.process.join(600)
        return self.process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> None:
        """As a terminal and a cluster do: the process and the workers that read for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def until(self, condition: Callable[[], bool], seconds: float = 60, pause: float = 0.005) -> bool:
        """Wait until something holds; :return: whether the process is still running then."""
        deadline = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < deadline and not condition():
            time.sleep(pause)
        return self.process.is_alive()


def start_ranks(count: int, main: Callable[[list[str]], None], argv: list[str], log: Path, **env: str) -> list[Child]:
    """Processes that meet as the workers of torchrun do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    place["LOCAL_WORLD_SIZE"] = str(count)
    return [Child(main, argv, log, RANK=str(k), LOCAL_RANK=str(k), **place, **env) for k in range(count)]
