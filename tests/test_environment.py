"""
What launchers put into the environment, and what follows from it. The variables are those seen with MPICH 5.0.2, Open
MPI 4.1.4, Slurm 22.05 (in salloc's shell, a batch script, tasks of srun) and torchrun 2.13.
"""

import pytest

from guided_diffusion import environment

ALONE = {"HOME": "/", "CUDA_VISIBLE_DEVICES": "0"}
MPICH = dict(PMI_RANK="1", PMI_SIZE="2", PMI_FD="9", MPI_LOCALNRANKS="2", MPI_LOCALRANKID="1")
OPEN_MPI = dict(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2", PMIX_RANK="1", PMIX_NAMESPACE="1")
SALLOC = dict(SLURM_JOB_ID="7", SLURM_NTASKS="2", SLURM_NPROCS="2", SLURM_TASKS_PER_NODE="2")
BATCH = {**SALLOC, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = {**BATCH, "SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
ONE_TASK = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}  # srun --pty bash: a shell in a larger job
TORCHRUN = dict(RANK="9", WORLD_SIZE="16", LOCAL_RANK="1", LOCAL_WORLD_SIZE="8", GROUP_RANK="1", GROUP_WORLD_SIZE="2")


@pytest.mark.parametrize(
    ("env", "rank"),
    [
        (ALONE, 0),
        (MPICH, 1),
        (OPEN_MPI, 1),
        (BATCH, 0),
        (SRUN, 1),
        ({**SRUN, **TORCHRUN}, 9),
        ({"PMI_RANK": "one"}, 0),
    ],
)
def test_rank(env, rank):
    assert environment.rank(env) == rank


@pytest.mark.parametrize(
    ("env", "asked"),
    [
        (ALONE, False),
        (SALLOC, False),
        (BATCH, False),
        (ONE_TASK, False),
        (MPICH, True),
        (OPEN_MPI, True),
        (SRUN, True),
        ({**SRUN, "SLURM_PROCID": "0"}, True),
        ({"PMIX_RANK": "0"}, True),
    ],
)
def test_when_mpi_is_asked(env, asked):
    assert environment.by_mpi(env) == asked


@pytest.mark.parametrize(
    ("env", "size"),
    [
        (MPICH, 2),
        (OPEN_MPI, 2),
        (dict(PMI_SIZE="1", PMI_RANK="0"), 1),
        (dict(PMIX_RANK="2"), 3),  # PMIx tells no size
        (dict(PMIX_RANK="0"), 1),
        (SRUN, 2),  # srun --mpi=..., with an MPI that speaks its protocol
        ({**SRUN, "PMIX_RANK": "1"}, 2),
        ({**BATCH, **MPICH}, 2),  # mpiexec in a batch job
        ({**ONE_TASK, **MPICH, "PMI_SIZE": "8"}, 8),  # and in a shell by srun --pty
        ({**SRUN, **MPICH, "PMI_SIZE": "8"}, 8),  # on two nodes: srun started a helper of mpiexec on each
        ({**OPEN_MPI, **MPICH, "PMI_SIZE": "4"}, 4),  # MPICH's launcher inside Open MPI's
    ],
)
def test_mpi_and_launcher_mean_the_same(env, size):
    environment.check_mpi_size(env, size)


@pytest.mark.parametrize(
    ("env", "size", "name"),
    [
        (OPEN_MPI, 1, "OMPI_COMM_WORLD_SIZE says that 2"),  # Open MPI's mpirun, and the MPICH of pip
        (MPICH, 1, "PMI_SIZE says that 2"),
        (MPICH, 3, "PMI_SIZE says that 2"),
        (dict(PMIX_RANK="1"), 1, "PMIX_RANK says that at least 2"),
        (SRUN, 1, "SLURM_NTASKS says that 2"),  # srun without --mpi, or with one that MPI does not speak
        ({**SRUN, "SLURM_PROCID": "0"}, 1, "SLURM_NTASKS says that 2"),
        ({**SRUN, "PMIX_RANK": "1"}, 1, "SLURM_NTASKS says that 2"),
        (dict(SLURM_PROCID="2", SLURM_NTASKS="3"), 1, "SLURM_NTASKS says that 3"),
        (dict(SLURM_PROCID="2"), 1, "SLURM_NTASKS says that 3"),
        ({**OPEN_MPI, "PMI_SIZE": "1"}, 1, "OMPI_COMM_WORLD_SIZE says that 2"),
    ],
)
def test_processes_that_do_not_know_of_each_other(env, size, name):
    with pytest.raises(ValueError, match=rf"{name} processes .* MPI knows of {size}: each would train alone"):
        environment.check_mpi_size(env, size)


PIPS = "MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ucx,ofi --with-pm=hydra:gforker\n"
WITH_PMIX = PIPS.replace("--with-pm=", "--with-pmix=/usr --with-pm=")


@pytest.mark.parametrize(
    ("env", "version", "speaks"),
    [
        (MPICH, PIPS, True),
        (SRUN, PIPS, True),
        (OPEN_MPI, "Open MPI v4.1.4", True),
        (OPEN_MPI, WITH_PMIX, True),
        ({**OPEN_MPI, **MPICH}, PIPS, True),
        (OPEN_MPI, PIPS, False),
        ({**SRUN, "PMIX_RANK": "0"}, PIPS, False),
    ],
)
def test_mpi_speaks_the_launchers_protocol(env, version, speaks):
    if speaks:
        environment.check_mpi_library(env, version)
    else:
        with pytest.raises(ValueError, match=r"speaks PMIx.* is an MPICH without it: each would train alone"):
            environment.check_mpi_library(env, version)


def test_torchrun():
    assert environment.torchrun(ALONE) is None and environment.torchrun({"RANK": "1"}) is None
    assert environment.torchrun(TORCHRUN) == environment.Place(rank=9, size=16, local_rank=1, local_size=8)
    assert environment.torchrun({"RANK": "1", "WORLD_SIZE": "2"}) == environment.Place(1, 2, 0, 1)
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "SLURM_LOCALID": "1"}
    assert environment.torchrun(by_hand) == environment.Place(1, 2, 1, 1)
    # srun or mpiexec may start the agents, one a node, or ranks to which a script gives torchrun's names.
    for outer in (SRUN, OPEN_MPI):
        environment.torchrun({**outer, **TORCHRUN})
        environment.torchrun({**outer, "RANK": "1", "WORLD_SIZE": "2"})
        with pytest.raises(ValueError, match=r"torchrun's variables know of 1, with WORLD_SIZE=8: each would"):
            environment.torchrun({**outer, **TORCHRUN, "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"})
    environment.torchrun({**BATCH, **TORCHRUN, "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"})
    with pytest.raises(ValueError, match="WORLD_SIZE=two in the environment is not a number"):
        environment.torchrun({"RANK": "1", "WORLD_SIZE": "two"})
