"""The process group: alone, and with several processes by each launcher."""

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch as th
import torch.distributed as dist
from forked import Child

from guided_diffusion import dist_util, environment

ROOT = Path(__file__).resolve().parents[1]
MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
LAUNCHERS = {
    "mpiexec": lambda n: [MPIEXEC, "-n", str(n), sys.executable],
    "torchrun": lambda n: [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"],
}


def namespaces() -> bool:
    """Whether this machine lets a test have networks of its own."""
    return bool(shutil.which("unshare")) and not subprocess.run(["unshare", "--net", "true"]).returncode


def launch(tmp_path, launcher, n, body, timeout=120):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom guided_diffusion import cli, dist_util\nimport torch as th\n" + textwrap.dedent(body)
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*LAUNCHERS[launcher](n), str(script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, cwd=tmp_path)


def test_alone():
    assert (dist_util.rank(), dist_util.world_size(), dist_util.local_rank()) == (0, 1, 0)
    assert dist_util.all_gather("x") == ["x"]
    assert dist_util.broadcast_bytes(b"abc") == b"abc"
    assert dist_util.agree(lambda: 3) == 3
    with pytest.raises(ValueError, match="mine"):
        dist_util.agree(lambda: int("x") if 0 else (_ for _ in ()).throw(ValueError("mine")))
    assert dist_util.dev().type in ("cpu", "cuda")
    values = [th.ones(2)]
    dist_util.sync_params(values)
    dist_util.barrier()
    assert values[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("gpus", "backend"),
    [(["a", "b"], "cpu:gloo,cuda:nccl"), (["a"], "cpu:gloo,cuda:nccl"), (["a", "a"], "gloo"), (["a", None], "gloo")],
)
def test_nccl_wants_a_gpu_for_each(gpus, backend):
    assert dist_util._backend(dist_util._all_differ(gpus)) == backend


@pytest.mark.parametrize(("other", "own"), [(f"{socket.gethostname()} a", False), ("elsewhere a", True), ("", False)])
def test_torchrun_looks_whether_all_have_a_gpu_of_their_own(monkeypatch, other, own):
    """As they have not with --device cuda:1."""
    store, joined = dist.HashStore(), []
    dist.PrefixStore("gpus", store).set("1", other)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist_util, "_gpu", lambda: "a")
    monkeypatch.setattr(dist_util, "_join", lambda *args: joined.append(args[-1]))
    dist_util._meet_by_torchrun(environment.Place(0, 2, 0, 2))
    assert joined == [own]


def test_processes_that_share_a_gpu_are_told(monkeypatch, capsys):
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(atexit, "register", lambda function: None)  # or what is forked from here would end a group
    monkeypatch.setattr(dist_util, "_store", None)
    monkeypatch.setattr(dist_util, "_gpu", lambda: "a")
    for own, told in ((True, 0), (False, 1)):
        dist_util._join(dist.HashStore(), 0, 2, own)
        assert capsys.readouterr().err.count("WARNING: of 2 processes several share a GPU") == told


def run_alone(tmp_path, body, prefix=(), **env):
    """Run a script without a launcher; :return: its exit code, and its output as lines."""
    script = tmp_path / "alone.py"
    script.write_text(
        "from guided_diffusion import cli, dist_util\nimport torch as th\nimport torch.distributed as dist\n"
        + textwrap.dedent(body)
    )
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")}
    env = {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    run = subprocess.run(
        [*prefix, sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    return run.returncode, run.stdout.splitlines(), run.stderr.splitlines()


GROUP_OF_ONE = """
dist_util.setup_dist()
values = [th.ones(2)]
dist_util.sync_params(values)
th.save({"w": values[0]}, "w.pt")
assert dist_util.load_state_dict("w.pt", map_location="cpu")["w"].tolist() == [1, 1]
assert (dist_util.rank(), dist_util.world_size(), list(dist_util.deal(2))) == (0, 1, [0, 1])
print(dist.is_initialized() and (dist.get_rank(), dist.get_world_size()))
dist_util.shutdown()
print(dist.is_initialized())
"""


def test_a_process_alone_is_a_group_of_one(tmp_path):
    """As scripts written against guided-diffusion expect."""
    assert run_alone(tmp_path, GROUP_OF_ONE) == (0, ["(0, 1)", "False"], [])


def test_without_any_network_a_process_is_alone(tmp_path):
    if not namespaces():
        pytest.skip("network namespaces are not allowed here")
    assert run_alone(tmp_path, GROUP_OF_ONE, ["unshare", "--net"]) == (0, ["False", "False"], [])


def meet(argv):
    dist_util.setup_dist()


@pytest.mark.parametrize(
    "env",
    [
        dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_LOCAL_RANK="0"),
        dict(SLURM_NTASKS="3", SLURM_PROCID="2"),
    ],
)
def test_a_launcher_that_mpi_does_not_know(tmp_path, env):
    """Each process would take itself for rank 0 of 1, and all would write to one folder."""
    assert Child(meet, [], tmp_path / "log", **env).wait() == 2
    error = (tmp_path / "log.err").read_text()
    assert error.startswith("error: ") and "each would train alone" in error and error.count("\n") == 1, error


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_collectives(tmp_path, launcher):
    """Of pieces of work, each goes to one rank; one that is slow holds up nobody. Every deal begins at 0."""
    run = launch(
        tmp_path,
        launcher,
        3,
        """
        import time
        dist_util.setup_dist()
        rank, size = dist_util.rank(), dist_util.world_size()
        assert dist_util.launched_rank() == dist_util.local_rank() == rank
        assert dist_util.all_gather({"rank": rank}) == [{"rank": i} for i in range(size)]
        assert dist_util.broadcast_bytes(b"x" * 1000 if rank == 0 else None) == b"x" * 1000
        assert dist_util.broadcast_bytes(b"" if rank == 0 else None) == b""
        params = [th.full((3,), float(rank))]
        dist_util.sync_params(params)
        assert params[0].tolist() == [0, 0, 0]
        if rank == 0:
            th.save({"w": th.arange(3)}, "only rank 0 has it.pt")
        path = "only rank 0 has it.pt" if rank == 0 else "elsewhere.pt"
        assert dist_util.load_state_dict(path, map_location="cpu")["w"].tolist() == [0, 1, 2]
        try:
            dist_util.load_state_dict("missing.pt" if rank == 0 else path)
        except (FileNotFoundError, ValueError) as error:
            assert "missing.pt" in str(error)
        else:
            raise AssertionError
        def fails_on_the_last():
            if rank == size - 1:
                raise ImportError("only here")
        try:
            dist_util.agree(fails_on_the_last)
        except (ValueError, ImportError) as error:
            assert str(error) == "only here"
        else:
            raise AssertionError
        dist_util.barrier()
        for count in (40, 0, 1, 40):
            taken = []
            for k in dist_util.deal(count):
                taken.append(k)
                time.sleep(0.5 if rank == 1 else 0.01)
            all_taken = dist_util.all_gather(taken)
            assert sorted(sum(all_taken, [])) == list(range(count)), all_taken
            assert taken == sorted(taken)
            assert rank != 1 or len(taken) <= 2, taken
        open(f"done{rank}", "w").close()
        dist_util.shutdown()
        """,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done0", "done1", "done2"]


def test_work_is_dealt_out_alone():
    assert [list(dist_util.deal(count)) for count in (3, 0, 3)] == [[0, 1, 2], [], [0, 1, 2]]


@pytest.mark.slow
def test_no_wait_has_a_limit(tmp_path):
    """Where groups have a moment by default, a rank may keep the others waiting for longer. And a script need not say
    goodbye: those written against guided-diffusion never leave the group."""
    run = launch(
        tmp_path,
        "mpiexec",
        2,
        """
        import datetime, time
        import torch.distributed as dist
        import torch.distributed.distributed_c10d as c10d
        c10d.default_pg_timeout = datetime.timedelta(seconds=0.2)
        dist_util.setup_dist()
        for wait in (
            dist_util.barrier,
            lambda: dist_util.all_gather("x"),
            lambda: dist_util.any_rank(False),
            lambda: dist_util.broadcast_bytes(b"x"),
            lambda: dist_util.sync_params([th.ones(2)]),
        ):
            time.sleep(0.5 if dist_util.rank() == 1 else 0)
            wait()
        """,
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_script_that_just_ends_ends_its_group_before_the_interpreter(tmp_path, launcher):
    """Also where another rank is not at its end yet; what has been registered first is called last."""
    run = launch(
        tmp_path,
        launcher,
        2,
        """
        import atexit, time
        atexit.register(lambda: print("a group" if th.distributed.is_initialized() else "no group"))
        dist_util.setup_dist()
        dist_util.all_gather(th.ones(1000))
        time.sleep(dist_util.rank())
        """,
        timeout=120,
    )
    assert run.returncode == 0 and run.stdout.count("no group") == 2, run  # their lines may run together


@pytest.mark.slow
def test_a_mistake_of_all_passes_its_exit_code_on(tmp_path):
    run = launch(
        tmp_path,
        "mpiexec",
        2,
        """
        def main():
            dist_util.setup_dist()
            raise ValueError("all alike")
        cli.run(main, dist_util.launched_rank, dist_util.leave)
        """,
    )
    assert run.returncode == 2 and run.stderr.count("error: all alike") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [("mpiexec", 0), ("mpiexec", 1), ("torchrun", 1)])
def test_a_mistake_of_one_rank_is_told_and_ends_the_job(tmp_path, launcher, rank):
    """Rank 0 meets it while the others wait for it, or another rank while rank 0 waits."""
    run = launch(
        tmp_path,
        launcher,
        2,
        f"""
        def main():
            dist_util.setup_dist()
            if dist_util.rank() == {rank}:
                raise OSError("the disk of rank {rank} is full")
            dist_util.barrier()
            dist_util.barrier()
        cli.run(main, dist_util.launched_rank, lambda: dist_util.leave(1))
        """,
        timeout=60,
    )
    assert run.returncode != 0
    assert run.stderr.count(f"error: the disk of rank {rank} is full") == 1, run.stderr


@pytest.mark.slow
def test_two_nodes_by_mpi(tmp_path, monkeypatch):
    """MPICH can take one host for two: ranks then meet at the first one's address, and count within their own."""
    if namespaces():
        pytest.skip("test_two_hosts shows it of two networks")
    monkeypatch.setenv("MPIR_CVAR_NUM_CLIQUES", "2")
    run = launch(
        tmp_path,
        "mpiexec",
        3,
        """
        dist_util.setup_dist()
        ranks = sorted(dist_util.all_gather((dist_util.rank(), dist_util.local_rank())))
        open(f"ranks{dist_util.rank()}", "w").write(str(ranks))
        dist_util.shutdown()
        """,
    )
    assert run.returncode == 0, run.stderr
    told = {(tmp_path / f"ranks{rank}").read_text() for rank in range(3)}
    assert told == {"[(0, 0), (1, 0), (2, 1)]"}


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_waits_for_the_others_can_be_stopped(rank):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    environment = {**os.environ, **place, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
    code = (
        "from guided_diffusion import cli, dist_util\ndef main():\n print(flush=True)\n dist_util.setup_dist('cpu')\n"
    )
    command = [sys.executable, "-c", f"{code}cli.run(main)"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as waits:
        waits.stdout.readline()
        time.sleep(1)
        waits.terminate()
        try:
            assert waits.wait(5) == -signal.SIGTERM
        finally:
            waits.kill()
