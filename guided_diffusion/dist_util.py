"""The process group: rank, world size, device, and the few collective calls the project needs. Works alone, under
mpiexec (Open MPI, MPICH and what speaks their protocols) and under torchrun. Knows nothing of what is exchanged."""

import atexit
import contextlib
import io
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import blobfile as bf
import torch as th
import torch.distributed as dist
from tqdm import std

from . import cli, devices, environment, mpi, network, progress, signals

T = TypeVar("T")

# How long a rank may keep the others waiting: longer than clusters let jobs run. One that dies ends the job at once, by
# its launcher or by its broken connections, so a limit would only end waits that are meant.
_PATIENCE = timedelta(days=30)

_local_rank = 0
_device: th.device | None = None  # None before setup_dist
_store: dist.Store | None = None  # where the ranks met; None alone, or in a group that others have made
_deals = 0


def setup_dist(device: str = "auto") -> None:
    """
    Join the process group of the launcher, if one started this process, else make one of this process alone; and choose
    the device.

    :param device: auto, cuda or cpu: see devices.find_device.
    :raises ValueError: where processes were started together that do not know of each other; or by devices.find_device.
    """
    global _local_rank
    place = environment.torchrun(os.environ)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun dies of some signals without telling its workers
        signals.end_with_parent(signal.SIGTERM, os.getppid())
    if dist.is_initialized():
        _choose(device)
    elif place and place.size > 1:
        _local_rank = place.local_rank
        _choose(device)
        with signals.at_once():  # there is nothing to save yet
            _meet_by_torchrun(place)
    elif not place and environment.by_mpi(os.environ):
        with signals.at_once():
            _meet_by_mpi(device)
    else:
        _choose(device)
        _stay_alone()


def _choose(device: str) -> None:
    global _device
    _device = devices.find_device(device, _local_rank)


def _stay_alone() -> None:
    """A group of one, for callers of torch.distributed; where not even loopback can be used, there is none."""
    report = sys.excepthook
    with network.gloo_interface("lo"), contextlib.suppress(RuntimeError):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sys.excepthook = report  # torch puts its rank before each line, of which there is one alone


def _meet_by_torchrun(place: environment.Place) -> None:
    interface = "lo"
    if place.local_size < place.size:
        # gloo takes the address of the host's name, which may be 127.0.1.1 there, where no other node finds it.
        interface = network.interface_towards([os.environ.get("MASTER_ADDR", "")])
    with network.gloo_interface(interface):
        store, rank, size = next(dist.rendezvous("env://"))
        gpus = dist.PrefixStore("gpus", store)
        gpus.set(str(rank), f"{socket.gethostname()} {own}" if (own := _gpu()) else "")
        of_all = [gpus.get(str(other)).decode() or None for other in range(size)]
        _join(store, rank, size, _all_differ(of_all))


def _meet_by_mpi(device: str) -> None:
    global _local_rank
    comm, node = mpi.start()
    rank, size = comm.Get_rank(), comm.Get_size()
    _local_rank = node.Get_rank()
    _choose(device)
    if size == 1:
        return _stay_alone()
    one_node = all(comm.allgather(node.Get_size() == size))
    # Some environment show each process all GPUs of its node, others its own alone, as number 0.
    own_gpus = all(comm.allgather(_all_differ(node.allgather(_gpu()))))
    names = comm.allgather(socket.gethostname())
    host = comm.bcast(network.meeting_point(os.environ, names, one_node) if rank == 0 else None, root=0)
    store = _open_store(host, size) if rank == 0 else None
    port = comm.bcast(store.port if store else None, root=0)
    store = store or dist.TCPStore(host, port, size, is_master=False)
    # On rank 0's own node its name may be loopback's: the way to the others tells their common network.
    hosts = [host, *comm.allgather(network.address_towards([host]))]
    with network.gloo_interface("lo" if one_node else network.interface_towards(hosts)):
        _join(store, rank, size, own_gpus)


def _open_store(host: str, size: int) -> dist.TCPStore:
    port = environment.number(os.environ, "MASTER_PORT")
    try:
        return dist.TCPStore(host, port, size, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError:
        raise ValueError(f"MASTER_ADDR={host} MASTER_PORT={port}: rank 0 cannot listen there; leave them out") from None


def _join(store: dist.Store, rank: int, size: int, own_gpus: bool) -> None:
    global _store, _deals
    group = dist.PrefixStore("group", store)
    dist.init_process_group(_backend(own_gpus), store=group, rank=rank, world_size=size, timeout=_PATIENCE)
    if rank == 0 and _gpu() is not None and not own_gpus:
        sys.stderr.write(f"WARNING: of {size} processes several share a GPU, which is slow: start one for each GPU\n")
    _store, _deals = dist.PrefixStore("deals", store), 0
    atexit.register(_end_group)


def _end_group() -> None:
    """
    End the group of a script that comes to its end without shutdown, as those for the reference do: gloo's threads let
    go of tensors, which takes the interpreter, and abort the process where that has ended. Not after an error, nor
    with NCCL, whose end may wait for the others.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo" and not hasattr(sys, "last_type"):
        dist.destroy_process_group()


def _backend(own_gpus: bool) -> str:
    """NCCL where every rank has a GPU of its own, which it insists on; gloo elsewhere."""
    return "cpu:gloo,cuda:nccl" if own_gpus else "gloo"


def _gpu() -> str | None:
    """What tells this process's GPU from all others."""
    return str(th.cuda.get_device_properties(dev()).uuid) if dev().type == "cuda" else None


def _all_differ(gpus: list[str | None]) -> bool:
    return None not in gpus and len(set(gpus)) == len(gpus)


def shutdown() -> None:
    """Leave the process group, at the end of a run that went well. Collective."""
    global _store
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        _store = None
    mpi.finalize()


def leave(timeout_s: float = 10) -> bool:
    """
    Leave after a mistake: in order if all ranks do so within the time, so that the launcher passes their exit code on;
    else without a word, and the launcher then ends the job.

    :return: whether all ranks have left. Under torchrun, which ends the others as soon as one rank has left, whoever
        waits for the whole time is the only one.
    """
    left = mpi.all_leave(timeout_s, exit_code=2)
    if left is None and launched_rank():
        time.sleep(min(timeout_s, 3))
    return bool(left)


def launched_rank() -> int:
    """:return: this process's rank by its environment alone, so also before setup_dist."""
    return environment.rank(os.environ)


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
    """:return: the device this process computes on; before setup_dist, a GPU where torch can use one."""
    return _device or th.device("cuda" if th.cuda.is_available() else "cpu")


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


def load_state_dict(path: str, **options: Any) -> Any:
    """
    Read a file of tensors and plain containers on rank 0, and give its content to all ranks. Collective.

    :param path: a local path or a blobfile URL.
    :param options: torch.load's, such as map_location; weights_only is True unless given.
    :raises OSError: on every rank, where rank 0 cannot read it.
    """

    def read() -> bytes | None:
        if rank():
            return None
        with bf.BlobFile(path, "rb") as file:
            return file.read()

    return th.load(io.BytesIO(broadcast_bytes(agree(read))), **{"weights_only": True, **options})


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


def progress_bar(iterable: Iterable | None = None, **options: Any) -> std.tqdm:
    """:return: a bar that rank 0 shows, see progress.bar."""
    return progress.bar(iterable, disable=rank() != 0, **options)


def agree(function: Callable[[], T]) -> T:
    """
    Call a function on every rank; where it finds a user's mistake on any, raise that on all. Collective.

    :param function: may raise what cli.run takes for a user's mistake, on some ranks only.
    :return: this rank's result.
    """
    result, error = None, None
    try:
        result = function()
    except cli.MISTAKES as caught:
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
