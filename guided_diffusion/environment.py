"""What the environment says about processes that were started together. Pure functions of a mapping, os.environ as a
rule; knows nothing of MPI, of torch or of what the processes do."""

from collections.abc import Mapping
from dataclasses import dataclass

# In order of trust: who runs torchrun inside a job of mpiexec or srun means torchrun's ranks.
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI's; MPICH's, Intel MPI's and srun --mpi=pmi2's


@dataclass(frozen=True)
class Place:
    """A process's number, from 0, and how many there are: in all, and on its node."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def rank(env: Mapping[str, str]) -> int:
    """:return: this process's number among those that were started with it; 0 where nothing is said."""
    return next((int(env[name]) for name in _RANKS if env.get(name, "").isdecimal()), 0)


def number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    """
    :return: the number in a variable, or the default where it is not set.
    :raises ValueError: where it is something else.
    """
    text = env.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name}={text} in the environment is not a number: what starts the processes sets it")
    return int(text)


def torchrun(env: Mapping[str, str]) -> Place | None:
    """
    :return: what torchrun, or whoever sets its variables, says; None where it started nothing.
    :raises ValueError: where that is no number, or where what started torchrun's agents started more of them than have
        met: each would train alone.
    """
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    size = number(env, "WORLD_SIZE", 1)
    agents = number(env, "GROUP_WORLD_SIZE", size)  # torchrun's own processes; without any, each rank stands for itself
    name, started = max(_started(env).items(), key=lambda item: item[1], default=("", 1))
    if started > agents:
        raise ValueError(_alone(_says(name, started), f"torchrun's variables know of {agents}, with WORLD_SIZE={size}"))
    local = "LOCAL_RANK" if "LOCAL_RANK" in env else "SLURM_LOCALID"  # where a user's script says the former alone
    return Place(number(env, "RANK"), size, number(env, local), number(env, "LOCAL_WORLD_SIZE", 1))


def by_mpi(env: Mapping[str, str]) -> bool:
    """:return: whether MPI has to be asked who else was started."""
    return "PMIX_RANK" in env or any(name in env for name in _MPI_SIZES) or _slurm_tasks(env) > 1


def check_mpi_library(env: Mapping[str, str], version: str) -> None:
    """
    Check that MPI speaks the launcher's protocol, before it is started: an MPICH that does not would end the process.

    :param version: what the library says of itself.
    :raises ValueError: where it does not.
    """
    name = next((name for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK") if name in env), "")
    if name and "PMI_SIZE" not in env and "MPICH" in version and "pmix" not in version:
        launcher = f"{name}={env[name]} is of a launcher that speaks PMIx, as Open MPI's mpirun and srun --mpi=pmix do"
        raise ValueError(_alone(launcher, "mpi4py's MPI is an MPICH without it"))


def check_mpi_size(env: Mapping[str, str], size: int) -> None:
    """
    Check that MPI and what started this process mean the same job.

    :param size: how many processes met in MPI's world.
    :raises ValueError: where others were started than have met: each would train alone, into one folder.
    """
    started = _started(env)
    least = number(env, "PMIX_RANK") + 1  # PMIx puts a rank into the environment, and no size
    if size < least:
        started.setdefault("PMIX_RANK", least)
    # Launchers nest, so where MPI sees several, one of those named must have started these; where it sees one alone,
    # none may have started more.
    if (size not in started.values() if size > 1 else max(started.values(), default=1) > 1) and started:
        name, most = max(started.items(), key=lambda item: item[1])
        raise ValueError(_alone(_says(name, most), f"MPI knows of {size}"))


def _started(env: Mapping[str, str]) -> dict[str, int]:
    """Variable -> how many processes a launcher says it has started."""
    started = {name: number(env, name) for name in _MPI_SIZES if name in env}
    # Slurm's word counts last: mpiexec in a job of several nodes has srun start a helper on each, which starts ranks.
    return started or {name: tasks for name, tasks in [("SLURM_NTASKS", _slurm_tasks(env))] if tasks > 1}


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """
    How many tasks srun started this one with; 1 where it started none.

    SLURM_STEP_NUM_TASKS is srun's, of the step. SLURM_NTASKS alone says nothing: the script of a batch job has it, too,
    though it runs once, with SLURM_PROCID=0. A SLURM_PROCID above 0, however, only a task of several can have.
    """
    if "SLURM_STEP_NUM_TASKS" in env:
        return number(env, "SLURM_STEP_NUM_TASKS")
    place = number(env, "SLURM_PROCID")
    return max(number(env, "SLURM_NTASKS"), place + 1) if place else 1


def _says(name: str, started: int) -> str:
    least = "at least " if name == "PMIX_RANK" else ""
    return f"{name} says that {least}{started} processes were started"


def _alone(launcher: str, others: str) -> str:
    return (
        f"{launcher}, but {others}: each would train alone, into one folder; start them by the mpiexec that pip "
        "installs with mpi4py, or by torchrun (under srun: by --mpi=pmi2, or one torchrun a node)"
    )
