"""
Processes that a program starts: they end with it, and get the signals that were meant for it.

Knows nothing of what they do.
"""

import ctypes
import os
import signal
import subprocess
from types import FrameType
from typing import IO

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def end_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends, by SIGKILL even."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def run(command: list[str], output: IO[str], environment: dict[str, str]) -> tuple[int, bool]:
    """
    Run a command to its end. Signals to this process go to it, and it decides what to do; it gets SIGTERM where this
    process is killed.

    :param output: what it prints goes there.
    :param environment: variables on top of this process's.
    :return: its exit code, as a shell would give it, and whether a signal came.
    """
    received: list[int] = []
    child: subprocess.Popen | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    child = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        process_group=0,  # what is sent to this one's whole group reaches it once, from here
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),
    )
    if received:  # before there was a child
        child.send_signal(received[-1])
    code = child.wait()
    return code if code >= 0 else 128 - code, bool(received)
