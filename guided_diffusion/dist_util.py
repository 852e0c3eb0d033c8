"""The process group: rank, world size, device, and the few collective calls the project needs. Works alone, under
mpiexec (Open MPI, MPICH and what speaks their protocols) and under torchrun. Knows nothing of what is exchanged."""

import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch as th
import torch.distributed as dist
from tqdm.auto import tqdm

T = TypeVar("T")

# What launchers tell their processes, in order of trust.
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE")

# How long a rank may keep the others waiting: longer than clusters let jobs run. One that dies ends the job at once, by
# its launcher or by its broken connections, so a limit would only end waits that are meant.
_PATIENCE = timedelta(days=30)

_local_rank = 0
_store: dist.Store | None = None  # where the ranks met; None alone, or in a group that others have made
_deals = 0


def setup_dist() -> None:
    """Join the process group of the launcher, if one started this process; else stay alone. Picks the GPU."""
    global _local_rank
    if dist.is_initialized():
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if int(os.environ["WORLD_SIZE"]) > 1:
            store, rank, size = next(dist.rendezvous("env://"))
            _join(store, rank, size, own_gpus=local_size <= th.cuda.device_count())
    elif any(name in os.environ for name in _MPI_VARIABLES):
        _setup_from_mpi()
    if th.cuda.is_available():
        th.cuda.set_device(dev())


def _setup_from_mpi() -> None:
    global _local_rank
    import mpi4py

    # A rank that ends without finalising takes the job down: the launcher sees that it died. shutdown() finalises.
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    _local_rank = node.Get_rank()
    if comm.Get_size() == 1:
        return
    one_node = node.Get_size() == comm.Get_size()
    if one_node:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    host = comm.bcast("127.0.0.1" if one_node else _own_address(), root=0)
    store = None
    if comm.Get_rank() == 0:
        store = dist.TCPStore(host, 0, comm.Get_size(), is_master=True, wait_for_workers=False)
    port = comm.bcast(store.port if store else None, root=0)
    store = store or dist.TCPStore(host, port, comm.Get_size(), is_master=False)
    # Some launchers show each process all GPUs of its node, others its own alone, as number 0.
    own_gpus = comm.allreduce(_all_differ(node.allgather(_gpu())), op=MPI.LAND)
    _join(store, comm.Get_rank(), comm.Get_size(), own_gpus)


def _join(store: dist.Store, rank: int, size: int, own_gpus: bool) -> None:
    global _store, _deals
    group = dist.PrefixStore("group", store)
    dist.init_process_group(_backend(own_gpus), store=group, rank=rank, world_size=size, timeout=_PATIENCE)
    _store, _deals = dist.PrefixStore("deals", store), 0


def _own_address() -> str:
    """The address of the interface that leads to other hosts; no packet is sent to find it out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def _backend(own_gpus: bool) -> str:
    """NCCL where every rank has a GPU of its own, which it insists on; gloo elsewhere."""
    return "cpu:gloo,cuda:nccl" if own_gpus else "gloo"


def _gpu() -> str | None:
    """What tells this process's GPU from all others."""
    return str(th.cuda.get_device_properties(dev()).uuid) if th.cuda.is_available() else None


def _all_differ(gpus: list[str | None]) -> bool:
    return None not in gpus and len(set(gpus)) == len(gpus)


def shutdown() -> None:
    """Leave the process group, at the end of a run that went well. Collective."""
    global _store
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        _store = None
    mpi = _running_mpi()
    if mpi:
        mpi.Finalize()


def leave(timeout_s: float = 10) -> bool:
    """
    Leave after a mistake: in order if all ranks do so within the time, so that the launcher passes their exit code on;
    else without a farewell, whereupon it ends the job.

    :return: whether all ranks have left. Under torchrun, which ends the others as soon as one rank has left, whoever
        waits for the whole time is the only one.
    """
    mpi = _running_mpi()
    if not mpi:
        if launched_rank():
            time.sleep(min(timeout_s, 3))
        return False
    everyone = mpi.COMM_WORLD.Ibarrier()
    deadline = time.monotonic() + timeout_s
    while not everyone.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    mpi.Finalize()
    return True


def _running_mpi() -> Any:
    """mpi4py's MPI module, if this process has started it and not ended it yet; else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi and mpi.Is_initialized() and not mpi.Is_finalized() else None


def launched_rank() -> int:
    """:return: this process's rank by its environment alone, so also before setup_dist."""
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)


def rank() -> int:
    """:return: this process's number in the group, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """:return: the number of processes in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """:return: this process's number among those of its node, from 0."""
    return _local_rank


def dev() -> th.device:
    """:return: the device this process computes on."""
    if th.cuda.is_available():
        return th.device("cuda", _local_rank % th.cuda.device_count())
    return th.device("cpu")


def sync_params(params: Iterable[th.Tensor]) -> None:
    """Overwrite tensors, in place, with rank 0's. Collective."""
    if world_size() > 1:
        for p in params:
            dist.broadcast(p.data, src=0)


def all_gather(value: Any) -> list[Any]:
    """:return: every rank's value, a picklable object, in rank order. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """:return: whether any rank's flag is set, on every rank; no GPU waits for it. Collective."""
    if world_size() == 1:
        return flag
    flags = th.tensor([int(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def broadcast_bytes(data: bytes | None) -> bytes:
    """:return: rank 0's bytes on every rank; other ranks pass None. Collective."""
    if world_size() == 1:
        return data
    size = th.tensor([len(data) if rank() == 0 else 0])
    dist.broadcast(size, src=0)
    if not size:
        return b""
    buffer = th.empty(int(size), dtype=th.uint8)
    if rank() == 0:
        buffer.copy_(th.frombuffer(bytearray(data), dtype=th.uint8))
    dist.broadcast(buffer, src=0)
    return buffer.numpy().tobytes()


def barrier() -> None:
    """Wait until every rank is here, however long that takes; no GPU waits."""
    any_rank(False)


def deal(count: int) -> Iterator[int]:
    """
    Deal out pieces of work to the ranks as they get free: no rank waits for another.

    All ranks must call it in the same order with the same count; they need not take all that they could.

    :return: an iterator over this rank's numbers, rising. Each of range(count) goes to one rank, the next that asks.
    """
    global _deals
    if _store is None:
        return iter(range(rank(), count, world_size()))
    _deals += 1
    store, name = _store, str(_deals)
    tickets = (store.add(name, 1) - 1 for _ in itertools.count())
    return itertools.takewhile(lambda ticket: ticket < count, tickets)


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """
    Make a bar that rank 0 shows; where stderr is a file rather than a terminal, a line every half minute.

    :param options: tqdm's.
    """
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(iterable, disable=rank() != 0, mininterval=interval, maxinterval=interval, **options)


def agree(function: Callable[[], T]) -> T:
    """
    Call a function on every rank; where it finds a user's mistake on any, raise that on all. Collective.

    :param function: may raise ValueError or OSError, on some ranks only.
    :return: this rank's result.
    """
    result, error = None, None
    try:
        result = function()
    except (ValueError, OSError) as caught:
        error = caught
    messages = [message for message in all_gather(None if error is None else str(error)) if message is not None]
    if error is not None and messages[0] == str(error):
        raise error
    if messages:
        raise ValueError(messages[0]) from error
    return result


def from_rank_0(function: Callable[[], T]) -> T:
    """:return: what a function gives on rank 0 alone, a picklable object; its mistake is raised on all. Collective."""
    return all_gather(agree(lambda: function() if rank() == 0 else None))[0]
