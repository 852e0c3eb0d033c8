"""
What the rules of both workflows share: how a stage is called, and how much of the machine it takes.

Read by the engine in every process that it starts, on other nodes of a cluster, too; run.py and the callers set the
SDM_ variables, which travel with the environment.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def unformatted(text: str) -> str:
    """:return: a text in which the engine finds no {fields}."""
    return text.replace("{", "{{").replace("}", "}}")


def word(text: str) -> str:
    """:return: a text, such as a path, as a word of a shell in a rule's command."""
    return unformatted(shlex.quote(text))


# A checksum of the slides, so that they may move.
SLIDES = os.environ["SDM_SLIDES"]
# The same of the images without masks, as a part of settings.
UNLABELLED = f" UNLABELLED={os.environ['SDM_UNLABELLED']}" if os.environ["SDM_UNLABELLED"] else ""
# The folder of slides, the interpreter of the programs, and how to start one on several GPUs: as words of a shell.
RAW = word(os.environ["SDM_RAW"])
PYTHON, LAUNCH = (unformatted(os.environ[name]) for name in ("SDM_PYTHON", "SDM_LAUNCH"))
# Cores of a training, GPUs of a training, and of what runs on one.
CORES = int(os.environ["SDM_CORES"])
GPUS = int(os.environ["SDM_GPUS_EACH"])
ONE_GPU = min(1, GPUS)


def script(name: str) -> str:
    """:return: a path in the repository, as a word of a shell."""
    return word(str(ROOT / name))


def make_structures(data: str, out: str, count: int | str, size: int | str) -> str:
    """:return: the command that makes layouts of the nuclei of a data folder; parameters are words of a shell."""
    program = f"{PYTHON} {script('scripts/make_structures.py')} {data} --out {out}"
    return f"{program} --count {count} --size {size} --method recombine"


def stage(
    name: str, makes: str, command: str, *, given: str = "{input}", seals: Sequence[str] = (), resumes: bool = False
) -> str:
    """
    :param name: of its seal, stages/NAME.json, and its log.
    :param makes: the file or folder that it makes, in OUT.
    :param command: words of a shell; they, as all else here, may hold the engine's {fields}.
    :param given: seals of the stages that it builds on.
    :param seals: patterns of what of `makes` must be there in the end, if not all of it.
    :param resumes: whether it goes on from what it made, which is never deleted then.
    :return: the shell command of a rule whose params.settings decides what is made. It is one process, which gets the
        signals that the engine gets.
    """
    flags = ["--makes", makes, "--settings={params.settings:q}", "--gpus", "{resources.gpu}"]
    if given:
        flags += ["--given", given]
    if seals:
        flags += ["--seals", *(f"'{pattern}'" if "*" in pattern else pattern for pattern in seals)]
    if resumes:
        flags += ["--resumes"]
    return step(name, command, *flags)


def step(name: str, command: str, *flags: str) -> str:
    """
    :param name: of its log, and of what tells a failure.
    :param flags: of stage.py; without any, nothing is sealed.
    :return: the shell command of a rule whose output the engine itself looks after.
    """
    words = [word(sys.executable), script("scripts/workflow/stage.py"), name, *flags, "--log", "{log:q}"]
    return f"exec {' '.join(words)} -- {command}"
