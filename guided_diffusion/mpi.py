"""
MPI, as far as processes need it to find each other and to part. Knows nothing of torch.

A process that ends well finalises MPI. One that fails does not, so that nobody waits for it: on one node its launcher
sees that it died. On several, MPICH's mpiexec would let the others wait, so there it aborts the job itself.
"""

import atexit
import os
import sys
import time
import warnings
from types import TracebackType
from typing import Any

from . import environment

_exit_code = 0  # what this process will end with, as far as is known; not 0 once it has failed
_several_nodes = False


def start() -> tuple[Any, Any]:
    """
    :return: the communicator of all processes, and that of those on this node.
    :raises ValueError: where MPI and the launcher do not know of the same processes.
    """
    global _several_nodes
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another MPI's launcher: the checks say so
        from mpi4py import MPI

    if not MPI.Is_initialized():
        environment.check_mpi_library(os.environ, MPI.Get_library_version())
        MPI.Init_thread()
        _watch_the_end()
    environment.check_mpi_size(os.environ, MPI.COMM_WORLD.Get_size())
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    _several_nodes = node.Get_size() < MPI.COMM_WORLD.Get_size()
    return MPI.COMM_WORLD, node


def _watch_the_end() -> None:
    report = sys.excepthook

    def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        global _exit_code
        _exit_code = 1
        report(kind, error, trace)

    sys.excepthook = fail
    atexit.register(_end)


def _end() -> None:
    if not _exit_code:
        finalize()
    elif _several_nodes and (mpi := _running()):
        mpi.COMM_WORLD.Abort(_exit_code)


def all_leave(timeout_s: float, exit_code: int) -> bool | None:
    """
    Leave after a failure, together with all other processes.

    :param exit_code: what this one ends with.
    :return: whether all did so within the time; None where there are no others, or MPI was never started.
    """
    global _exit_code
    _exit_code = exit_code
    mpi = _running()
    if not mpi or mpi.COMM_WORLD.Get_size() == 1:
        finalize()
        return None
    everyone = mpi.COMM_WORLD.Ibarrier()
    deadline = time.monotonic() + timeout_s
    while not everyone.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    finalize()
    return True


def finalize() -> None:
    """End MPI, where it was started. Collective."""
    mpi = _running()
    if mpi:
        mpi.Finalize()


def _running() -> Any:
    """mpi4py's MPI module, if this process has started it and not ended it yet; else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi and mpi.Is_initialized() and not mpi.Is_finalized() else None
