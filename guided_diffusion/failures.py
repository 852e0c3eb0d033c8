"""
What a stage of a workflow that failed leaves for the run that it is of, in stages/NAME.failed; how that run ends.

A stage may run on another node, and the engine says no more than that one failed. Knows nothing of what stages do.
"""

import json
import os
from pathlib import Path

from . import cli, files

RUN = "SDM_RUN"  # in the environment: which run a stage belongs to
LINES = 50  # of what a program printed


def path_of(stages: Path, name: str) -> Path:
    return stages / f"{name}.failed"


def write(stages: Path, name: str, code: int, printed: str, log: Path) -> None:
    """
    Leave word of a failure.

    :param stages: the folder of all seals.
    :param code: the stage's exit code.
    :param printed: what its command printed this time. Its first line "error: ..." is the cause: those that follow
        come from whoever called that program.
    :param log: where that and all before is.
    """
    lines = printed.splitlines()
    error = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    told = {"run": os.environ.get(RUN, ""), "code": code, "error": error, "log": str(log), "end": lines[-LINES:]}
    files.write_json(path_of(stages, name), told)


def is_final(stages: Path, name: str) -> bool:
    """:return: whether this stage has failed in this run already, in a way that only a user can mend."""
    path, run = path_of(stages, name), os.environ.get(RUN)
    if not (run and path.exists()):
        return False
    told = json.loads(path.read_text(encoding="utf-8"))
    return told["run"] == run and told["code"] == cli.MISTAKE


def report(out: Path, run: str, code: int) -> tuple[int, str]:
    """
    Find out why a run failed.

    :param run: what RUN was in its environment.
    :param code: the engine's exit code.
    :return: the exit code of the run, MISTAKE where a stage ended so, NOT_FINISHED where all did, else the engine's;
        and what is to be said last: users' mistakes in a line each, before them what anything else printed.
    """
    found = sorted((out / "stages").glob("*.failed"), key=lambda path: path.stat().st_mtime)
    failed = {path.name.removesuffix(".failed"): json.loads(path.read_text(encoding="utf-8")) for path in found}
    failed = {name: told for name, told in failed.items() if told["run"] == run}
    mistaken = {name: told for name, told in failed.items() if told["code"] == cli.MISTAKE and told["error"]}
    unfinished = [name for name, told in failed.items() if told["code"] == cli.NOT_FINISHED]
    lines = []
    for name, told in failed.items():
        if name not in mistaken and name not in unfinished:
            lines += [*told["end"], f"{name} failed with exit code {told['code']}, see {out / told['log']}"]
    lines += [f"error: {name}: {told['error']} ({out / told['log']})" for name, told in mistaken.items()]
    if mistaken:
        code = cli.MISTAKE
    elif unfinished and len(unfinished) == len(failed):
        code = cli.NOT_FINISHED
        lines.append(f"{', '.join(unfinished)}: not finished, the same command goes on")
    return code, "".join(f"{line}\n" for line in lines)
