"""The process group: alone, and with several processes by each launcher."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch as th

from guided_diffusion import dist_util

ROOT = Path(__file__).resolve().parents[1]
MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
LAUNCHERS = {
    "mpiexec": lambda n: [MPIEXEC, "-n", str(n), sys.executable],
    "torchrun": lambda n: [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"],
}


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


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, 0), ({"RANK": "3"}, 3), ({"PMI_RANK": "2"}, 2), ({"OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}, 1)],
)
def test_rank_before_the_group_exists(monkeypatch, environment, rank):
    for name in ("RANK", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert dist_util.launched_rank() == rank


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("n", [1, 3])
def test_collectives(tmp_path, launcher, n):
    run = launch(
        tmp_path,
        launcher,
        n,
        """
        dist_util.setup_dist()
        rank, size = dist_util.rank(), dist_util.world_size()
        assert dist_util.launched_rank() == dist_util.local_rank() == rank
        assert dist_util.all_gather({"rank": rank}) == [{"rank": i} for i in range(size)]
        assert dist_util.broadcast_bytes(b"x" * 1000 if rank == 0 else None) == b"x" * 1000
        assert dist_util.broadcast_bytes(b"" if rank == 0 else None) == b""
        params = [th.full((3,), float(rank))]
        dist_util.sync_params(params)
        assert params[0].tolist() == [0, 0, 0]
        def fails_on_the_last():
            if rank == size - 1:
                raise FileNotFoundError("only here")
        try:
            dist_util.agree(fails_on_the_last)
        except (ValueError, FileNotFoundError) as error:
            assert str(error) == "only here"
        else:
            raise AssertionError
        dist_util.barrier()
        open(f"done{rank}", "w").close()
        dist_util.shutdown()
        """,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in tmp_path.glob("done*")) == [f"done{i}" for i in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("n", [1, 3])
def test_work_is_dealt_out_as_ranks_get_free(tmp_path, launcher, n):
    """Each piece goes to one rank; one that is slow holds up nobody. Every deal begins at 0."""
    run = launch(
        tmp_path,
        launcher,
        n,
        """
        import time
        dist_util.setup_dist()
        rank, size = dist_util.rank(), dist_util.world_size()
        for count in (40, 0, 1, 40):
            taken = []
            for k in dist_util.deal(count):
                taken.append(k)
                time.sleep(1 if rank == 1 else 0.01)
            all_taken = dist_util.all_gather(taken)
            assert sorted(sum(all_taken, [])) == list(range(count)), all_taken
            assert taken == sorted(taken)
            assert rank != 1 or len(taken) <= 2, taken
        open(f"done{rank}", "w").close()
        dist_util.shutdown()
        """,
    )
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.glob("done*"))) == n


def test_work_is_dealt_out_alone():
    assert [list(dist_util.deal(count)) for count in (3, 0, 3)] == [[0, 1, 2], [], [0, 1, 2]]


@pytest.mark.slow
def test_no_wait_has_a_limit(tmp_path):
    """Where groups have one second by default, a rank may keep the others waiting for longer."""
    run = launch(
        tmp_path,
        "mpiexec",
        2,
        """
        import datetime, time
        import torch.distributed as dist
        import torch.distributed.distributed_c10d as c10d
        c10d.default_pg_timeout = datetime.timedelta(seconds=1)
        dist_util.setup_dist()
        for wait in (
            dist_util.barrier,
            lambda: dist_util.all_gather("x"),
            lambda: dist_util.any_rank(False),
            lambda: dist_util.broadcast_bytes(b"x"),
            lambda: dist_util.sync_params([th.ones(2)]),
            dist_util.shutdown,
        ):
            time.sleep(2 if dist_util.rank() == 1 else 0)
            wait()
        """,
    )
    assert run.returncode == 0, run.stderr


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
def test_a_rank_that_dies_ends_the_job(tmp_path):
    run = launch(
        tmp_path,
        "mpiexec",
        2,
        """
        dist_util.setup_dist()
        if dist_util.rank() == 1:
            raise ZeroDivisionError("rank 1 has a bug")
        dist_util.barrier()
        """,
        timeout=60,
    )
    assert run.returncode != 0 and "rank 1 has a bug" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_one_rank_is_told_and_ends_the_job(tmp_path, launcher, rank):
    """Rank 0 meets it while the others wait for it, or another rank while rank 0 waits."""
    run = launch(
        tmp_path,
        launcher,
        3,
        f"""
        def main():
            dist_util.setup_dist()
            if dist_util.rank() == {rank}:
                raise OSError("the disk of rank {rank} is full")
            dist_util.barrier()
            dist_util.barrier()
        cli.run(main, dist_util.launched_rank, dist_util.leave)
        """,
        timeout=60,
    )
    assert run.returncode != 0
    assert run.stderr.count(f"error: the disk of rank {rank} is full") == 1, run.stderr


@pytest.mark.slow
def test_two_nodes(tmp_path):
    """Two agents of torchrun, as on two hosts, agree on a rendezvous and train as one job of four ranks."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from guided_diffusion import dist_util\n"
        "dist_util.setup_dist()\n"
        "ranks = sorted(dist_util.all_gather((dist_util.rank(), dist_util.local_rank())))\n"
        "Path(f'ranks{dist_util.rank()}').write_text(str(ranks))\n"  # what four print to one pipe may mix
        "dist_util.shutdown()\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen([*command, "--node_rank", str(node), str(script)], env=env, cwd=tmp_path) for node in range(2)
    ]
    assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    told = [(tmp_path / f"ranks{rank}").read_text() for rank in range(4)]
    assert told == ["[(0, 0), (1, 1), (2, 0), (3, 1)]"] * 4


@pytest.mark.slow
def test_two_nodes_by_mpi(tmp_path, monkeypatch):
    """MPICH can take one host for two: ranks then meet at the first one's address, and count within their own."""
    monkeypatch.setenv("MPIR_CVAR_NUM_CLIQUES", "2")
    run = launch(
        tmp_path,
        "mpiexec",
        4,
        """
        dist_util.setup_dist()
        ranks = sorted(dist_util.all_gather((dist_util.rank(), dist_util.local_rank())))
        open(f"ranks{dist_util.rank()}", "w").write(str(ranks))
        dist_util.shutdown()
        """,
    )
    assert run.returncode == 0, run.stderr
    told = {(tmp_path / f"ranks{rank}").read_text() for rank in range(4)}
    assert told == {"[(0, 0), (1, 0), (2, 1), (3, 1)]"}
