"""
Requests to stop: SIGTERM and SIGUSR1, by which clusters announce that they will end a job, SIGINT, which is Ctrl-C, and
SIGHUP, where a terminal or a connection is closed. Knows nothing of what is stopped.

SIGINT counts also where whoever started the program had it ignored, as shells do for what runs in the background: a
script that is stopped means what it has started. SIGHUP does not: nohup has it ignored, and means it.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# A terminal's Ctrl-C may come twice: by the terminal itself, and passed on by a launcher.
ONE_CTRL_C_S = 1.0


def heeded() -> list[signal.Signals]:
    """:return: those of SIGNALS that this process is to heed."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


class Stopped(SystemExit):
    """A request to stop, as an exception; the exit code is the shell's usual one, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """In a with block, in the main thread, a request to stop is raised as Stopped."""
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Stopped(number)
        # A worker, forked by a library: Ctrl-C reaches it too, and is for the process that it works for.
        if number != signal.SIGINT:
            os._exit(128 + number)

    with _handled_by(stop), _connections_of_workers_may_end(owner):
        yield


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """In a with block, a request ends the process at once: where libraries wait, which hear of none."""
    with _handled_by(signal.SIG_DFL):
        yield


class StopRequest:
    """
    While the with block runs, remembers that this process was asked to stop rather than stopping it; a second Ctrl-C
    ends it at once.

    Outside the main thread, where Python handles no signals, it never is asked.
    """

    def __init__(self) -> None:
        self.name = ""
        self._since = 0.0
        self._handled = _handled_by(self._remember)

    def __bool__(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> "StopRequest":
        self._handled.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handled.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """In a with block inside this one, a request is raised as Stopped, also one that came before."""
        with raised():
            if self:
                raise Stopped(signal.Signals[self.name])
            yield

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = self.name == "SIGINT" and number == signal.SIGINT
        if again and time.monotonic() > self._since + ONE_CTRL_C_S:
            os.write(2, b"stopped at once, by a second SIGINT\n")
            os._exit(128 + number)  # even where a file is being written, which is whole or not at all
        if not again:
            self.name, self._since = signal.Signals(number).name, time.monotonic()


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in heeded()}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextlib.contextmanager
def _connections_of_workers_may_end(owner: int) -> Iterator[None]:
    """
    Workers forked in this block say nothing of a connection that their parent left: a stop may come while it takes a
    tensor from one of them, whose thread for that (multiprocessing.resource_sharer) prints what it did not expect.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() == owner or not isinstance(error, (ConnectionError, EOFError)):
            before(kind, error, trace)

    sys.excepthook = hook
    try:
        yield
    finally:
        if sys.excepthook is hook:  # else it is in use: by mpi, whose own watches for the end of a rank that fails
            sys.excepthook = before


@contextlib.contextmanager
def held() -> Iterator[None]:
    """
    In a with block, requests to stop wait for its end. Processes that are forked in it never take any, if the first
    thing that they do is leave_to_parent: else one that comes before that would end them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(worker: int = 0) -> None:
    """
    Leave requests to stop to the process that this one, a worker, was forked by: clusters and terminals ask all
    processes of a job, and what a worker makes may still be needed. What its parent itself sends ends it.

    :param worker: its number, as DataLoader's worker_init_fn gets it; not used.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def watch() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent(number: int, parent: int) -> None:
    """
    Have the kernel send this process a signal when the one that started it ends, by SIGKILL even.

    :param parent: that one's process id; where it has ended by now, the signal comes at once.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
