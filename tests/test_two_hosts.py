"""Ranks on two hosts that reach each other by one network alone: namespaces of this machine, where it allows them."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path
from guided_diffusion import cli, dist_util

def main():
    dist_util.setup_dist()
    ranks = dist_util.all_gather((dist_util.rank(), dist_util.local_rank()))
    shares = dist_util.all_gather(list(dist_util.deal(5)))
    assert sorted(sum(shares, [])) == list(range(5))
    Path(f"ranks{dist_util.rank()}").write_text(str(ranks))
    dist_util.shutdown()

cli.run(main, dist_util.launched_rank, dist_util.leave)
"""

# Stands in for ssh: `ssh -x HOST COMMAND` runs the command on the second host.
SSH = """#!/bin/sh
while [ "$1" != 10.99.0.2 ]; do shift; done
shift
exec nsenter --target {process} --net --uts --mount --wd={folder} sh -c "$*"
"""


@dataclass
class Host:
    """A network, a host name and a hosts file of its own, held by a sleeping process."""

    address: str
    folder: Path
    process: subprocess.Popen
    jobs: list[subprocess.Popen] = field(default_factory=list)

    def command(self, *words: str) -> list[str]:
        names = ["--net", "--uts", "--mount", f"--wd={self.folder}"]
        return ["nsenter", "--target", str(self.process.pid), *names, *map(str, words)]

    def start(self, *words: str, **env: str) -> subprocess.Popen:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "GLOO_"))}
        env = {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.jobs.append(subprocess.Popen(self.command(*words), env=env, **pipes))
        return self.jobs[-1]

    def ip(self, *lines: str) -> None:
        for line in lines:
            subprocess.run(self.command("ip", *line.split()), check=True)


def make_host(number: int, folder: Path) -> Host:
    """As Debian installs a host: its own name stands for 127.0.1.1 in its hosts file."""
    hosts = folder / f"hosts{number}"
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 node{number}\n10.99.0.{3 - number} node{3 - number}\n")
    body = f"hostname node{number} && mount --bind {hosts} /etc/hosts && echo ready && exec sleep 300"
    process = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if process.stdout.readline() != "ready\n":
        pytest.skip(f"this machine allows no namespaces: {process.stderr.read().strip()}")
    return Host(f"10.99.0.{number}", folder, process)


@pytest.fixture
def hosts(tmp_path):
    """Two hosts with a cable between them; each also has a bridge that leads nowhere, as Docker makes one."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip", "mount", "hostname"))):
        pytest.skip("needs iproute2 and util-linux")
    (tmp_path / "script.py").write_text(SCRIPT)
    found = []
    try:
        found += [make_host(1, tmp_path), make_host(2, tmp_path)]
        two = found[1].process.pid
        for host in found:
            host.ip("link add bridge type veth peer name nothing")
        found[0].ip(f"link add cable type veth peer name cable netns {two}")
        for host in found:
            host.ip(f"addr add {host.address}/24 dev cable", "link set cable up", "link set lo up")
            host.ip("addr add 10.98.0.1/24 dev bridge", "link set bridge up", "link set nothing up")
        yield found
    finally:
        for host in found:
            for process in (*host.jobs, host.process):
                process.kill()  # of mpiexec, whose ranks end with it
                process.wait()


def told(folder: Path, count: int) -> set[str]:
    return {(folder / f"ranks{rank}").read_text() for rank in range(count)}


def by_mpi(hosts: list[Host], ranks: int, **env: str) -> subprocess.Popen:
    ssh = hosts[0].folder / "ssh"
    ssh.write_text(SSH.format(process=hosts[1].process.pid, folder=hosts[0].folder))
    ssh.chmod(0o755)
    mpiexec = [Path(sys.executable).with_name("mpiexec"), "-launcher", "ssh", "-launcher-exec", ssh]
    mpiexec += ["-hosts", ",".join(host.address for host in hosts), "-ppn", -(-ranks // 2), "-n", ranks]
    return hosts[0].start(*mpiexec, sys.executable, "script.py", **env)


def test_mpiexec(hosts):
    job = by_mpi(hosts, 3)
    assert job.wait(120) == 0, job.stdout.read()
    assert told(hosts[0].folder, 3) == {"[(0, 0), (1, 1), (2, 0)]"}


@pytest.mark.parametrize("env", [{"MASTER_ADDR": "node1", "MASTER_PORT": "29617"}, {"GLOO_SOCKET_IFNAME": "cable"}])
def test_mpiexec_where_the_user_says_how_to_meet(hosts, env):
    job = by_mpi(hosts, 2, **env)
    assert job.wait(120) == 0, job.stdout.read()
    assert told(hosts[0].folder, 2) == {"[(0, 0), (1, 0)]"}


ALONE_WITH_IT = """
import sys
from guided_diffusion import cli, dist_util, mpi

def main():
    world, node = mpi.start()
    if world.Get_rank() == 1:
        raise {error}("rank 1 has no disk")
    world.bcast(None, root=1)

cli.run(main, dist_util.launched_rank, lambda: dist_util.leave(1))
"""


@pytest.mark.parametrize(("error", "code"), [("OSError", 2), ("ZeroDivisionError", 1)])
def test_a_rank_that_fails_alone_ends_the_job(hosts, error, code):
    """The others wait for it by MPI, which they would do without end."""
    (hosts[0].folder / "script.py").write_text(ALONE_WITH_IT.format(error=error))
    job = by_mpi(hosts, 2)
    assert job.wait(60) == code
    assert job.stdout.read().count("rank 1 has no disk\n") == 1


def test_torchrun(hosts):
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
    words += ["--master_addr", hosts[0].address, "--master_port", "29618"]
    jobs = [host.start(*words, "--node_rank", node, "script.py") for node, host in enumerate(hosts)]
    assert [job.wait(120) for job in jobs] == [0, 0], [job.stdout.read() for job in jobs]
    assert told(hosts[0].folder, 4) == {"[(0, 0), (1, 1), (2, 0), (3, 1)]"}
