"""The pipeline through Slurm's queue, with stand-ins for its programs, where Slurm can be started on this machine."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_pipeline import ALL, OF_A_USER, Toy, raw, steps, toy, wait_for  # noqa: F401

from guided_diffusion import cli

ROOT = Path(__file__).resolve().parents[2]
# Where a job, whose environment has no SLURM_CONF any more, looks for it.
CONF = Path(os.sep, "etc", "slurm", "slurm.conf")
ONE_NODE = """
ClusterName=one
SlurmctldHost={host}
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
NodeName={host} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""
QUEUE = (
    f"--profile {ROOT}/scripts/profiles/slurm --slurm-init-seconds-before-status-checks 2 --latency-wait 5 "
    "--slurm-status-command squeue --slurm-no-account --default-resources runtime=10 mem_mb=500 "
    "--set-threads pretrain=1 finetune=1"
).split()


@pytest.fixture
def queue(tmp_path) -> Iterator[None]:
    """A cluster of this machine alone."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "srun") if shutil.which(name) is None]
    if missing or os.geteuid() != 0 or CONF.exists():
        pytest.skip("takes root, slurmctld, slurmd and munge, and no cluster that this machine is part of")
    started = []
    try:
        if subprocess.run("munge -n | unmunge", shell=True, capture_output=True).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            started.append(
                subprocess.Popen(["setpriv", "--reuid", "munge", "--clear-groups", "munged", "-F", "--force"])
            )
        for name in ("state", "spool"):
            (tmp_path / name).mkdir()
        CONF.write_text(ONE_NODE.format(folder=tmp_path, host=socket.gethostname()))
        started += [subprocess.Popen(["slurmctld", "-D", "-c"]), subprocess.Popen(["slurmd", "-D"])]
        for _ in range(100):
            if "idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
                break
            time.sleep(0.3)
        else:
            pytest.skip("Slurm does not start here")
        yield
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=60)
        CONF.unlink(missing_ok=True)


@pytest.mark.slow
def test_stages_go_through_the_queue_and_a_cancelled_training_saves(queue, toy, raw, tmp_path):  # noqa: F811
    out, quiet = tmp_path / "out", {"CUDA_VISIBLE_DEVICES": "", "STEP_SECONDS": "1", **OF_A_USER}
    process = toy.start(raw, "out", "--toy", *QUEUE, **quiet)
    wait_for((out / "pretrain/steps").exists, process, seconds=300)
    assert "R" in subprocess.run(["squeue", "-h", "-o", "%t"], capture_output=True, text=True).stdout.split()
    process.terminate()
    text = process.communicate(timeout=120)[0]
    assert process.returncode == cli.NOT_FINISHED, text
    assert toy.stages() == ALL[:4] and text.count("has been submitted with SLURM jobid") == 4
    wait_for((out / "pretrain/state").exists, None)
    before = steps(out / "pretrain")
    assert toy.done(raw, "out") == ALL[3:] and steps(out / "pretrain") == list(range(1, 21)) and len(before) < 20
