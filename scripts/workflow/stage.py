"""
Run one stage of a workflow, in the folder of its run, and seal what it made: what the rules of the .smk files call.

    python scripts/workflow/stage.py NAME [--makes PATH] [--seals PATTERN ...] [--settings TEXT] [--given SEAL ...]
        [--resumes] [--gpus N] --log FILE -- COMMAND ...

stages/NAME.json, the seal, lists the files that the stage made, with sizes and checksums, and what they were made with.
By its content the engine sees whether the stages after it have to be done anew, and run.py whether a file has gone.
stages/NAME.begun says what the stage was last begun with. Where that is not what it is to be begun with now, PATH makes
room: what --resumes made, perhaps days of training, moves to replaced/; anything else can be made again, and is
deleted. Where it is, the command goes on from what lies there. Without --makes nothing is sealed or cleared away.

What the command warns of is said here, too. A signal goes to the command, which is waited for. Exit code 75: not
finished yet, the same stage goes on; also where the signal came to the command alone. stages/NAME.failed tells why it
failed, see guided_diffusion/failures.py.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from guided_diffusion import cli, failures, files, processes, signals

STAGES = Path("stages")
REPLACED = Path("replaced")
LOCKS = STAGES / "locks"
JOB = os.environ.get("SLURM_JOB_ID", "")


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    signals.end_with_parent(signal.SIGTERM, os.getppid())
    if failures.is_final(STAGES, args.name):  # an engine that tries again, as on a queue, would only repeat it
        sys.exit(cli.MISTAKE)
    failures.path_of(STAGES, args.name).unlink(missing_ok=True)
    try:
        code, printed = attempt(args)
    except (ValueError, OSError) as error:
        failures.write(STAGES, args.name, cli.MISTAKE, f"error: {' '.join(str(error).split())}", args.log)
        raise
    except signals.Stopped:  # while it waited for a GPU, or cleared the way
        code, printed = cli.NOT_FINISHED, ""
    for line in dict.fromkeys(printed.splitlines()):
        if line.startswith("WARNING: "):
            sys.stderr.write(f"{args.name}: {line}\n")
    if code:
        failures.write(STAGES, args.name, code, printed, args.log)
    sys.exit(code)


def attempt(args: argparse.Namespace) -> tuple[int, str]:
    """:return: the exit code of the stage, and what its command printed."""
    key = {"settings": args.settings, "given": {seal.stem: made_with(seal) for seal in args.given}}
    with files.locked(LOCKS / args.name, "stage"), shared_lock(args.name) as lock, gpus(args.gpus) as environment:
        if args.makes:
            make_room(args.name, args.makes, key, args.resumes)
        args.log.parent.mkdir(parents=True, exist_ok=True)
        with open(args.log, "a+", encoding="utf-8", errors="replace") as log:
            log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(args.command)}\n")
            log.flush()
            start = log.tell()
            code, stopped = processes.run(args.command, log, environment, [lock])
            log.seek(start)
            printed = log.read()
        # As the programs say, whichever process the signal came to.
        stopped = stopped or any(line.startswith("stopped by ") for line in printed.splitlines())
        patterns = args.seals or [args.makes.as_posix()] if args.makes else []
        found = {pattern: find(pattern) for pattern in patterns}
        missing = [pattern for pattern, paths in found.items() if not paths]
        if code == 0 and missing and not stopped:
            raise FileNotFoundError(f"{args.name} ended without {missing[0]}: remove {args.makes} to have it made anew")
        if (code == 0 and missing) or code - 128 in signals.SIGNALS:  # it has saved, or has nothing to save
            code = cli.NOT_FINISHED
        if code == 0 and args.makes:
            seal = {
                "resumes": args.resumes,
                "made_with": key,
                "files": listing(path for paths in found.values() for path in paths),
            }
            files.write_json(STAGES / f"{args.name}.json", seal)
    return code, printed


@contextlib.contextmanager
def shared_lock(name: str) -> Iterator[int]:
    """
    A lock that a stage's command has too: what outlives a stage that was killed must not write among what the next one
    makes.

    :return: its file's descriptor, for the command to keep.
    :raises ValueError: where a command has it still.
    """
    with open(LOCKS / name / "command", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"stage {name} was killed, and its command is still running: wait for its end") from None
        except OSError:
            pass  # no locks here
        yield file.fileno()


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("name", metavar="NAME", help="the seal is stages/NAME.json")
    parser.add_argument("--makes", type=Path, help="file or folder that the stage makes, alone")
    parser.add_argument("--seals", metavar="PATTERN", nargs="+", help="what of it must be there in the end, if not all")
    parser.add_argument("--settings", default="", help="what decides what is made, but for how much of it")
    parser.add_argument("--given", type=Path, nargs="*", default=[], help="seals of the stages that it builds on")
    parser.add_argument("--resumes", action="store_true", help="never delete what it made")
    parser.add_argument("--gpus", type=int, default=0, help="how many of SDM_GPUS to keep for the command alone")
    parser.add_argument("--log", type=Path, required=True, help="what the command prints is added to it")
    parser.add_argument("command", metavar="COMMAND", nargs="+", help="after --")
    return parser


def made_with(seal: Path) -> str:
    """
    :return: a checksum of what a stage has made, by its files; of one that resumes, of what it was made with, since
        more steps of a training are no other training.
    """
    content = json.loads(seal.read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(content["made_with" if content["resumes"] else "files"]).encode()).hexdigest()


def make_room(name: str, makes: Path, key: dict[str, Any], resumes: bool) -> None:
    """Clear the way, unless what is there was begun with the same key; note the key."""
    record = STAGES / f"{name}.begun"
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"settings": None, "given": {}}
    if before != key and os.path.lexists(makes):
        if resumes:
            REPLACED.mkdir(exist_ok=True)
            places = (REPLACED / f"{'-'.join(makes.parts)}.{number}" for number in range(1, sys.maxsize))
            place = next(path for path in places if not os.path.lexists(path))
            makes.rename(place)
            reason = f"other settings ({before['settings']})" if before["settings"] != key["settings"] else "other data"
            sys.stderr.write(f"{name} begins anew: what was there was made with {reason}, and is now {place}\n")
        elif makes.is_dir() and not makes.is_symlink():
            shutil.rmtree(makes)
        else:
            makes.unlink()
    files.write_json(record, key)


@contextlib.contextmanager
def gpus(count: int) -> Iterator[dict[str, str]]:
    """
    Wait for GPUs that no other stage on this machine has, and keep them while the with block lasts.

    :return: the environment that shows them to a command: none where SDM_GPUS names none, as where a queue shows each
        job its own.
    """
    known = [name for name in os.environ.get("SDM_GPUS", "").split(",") if name]
    if not known or not count:
        yield {}
        return
    while True:
        with contextlib.ExitStack() as stack:
            held: list[str] = []
            for name in known:
                # Two jobs of Slurm on one machine may each call another GPU 0.
                place = LOCKS / "-".join(["gpu", socket.gethostname(), *filter(None, [JOB]), name])
                with contextlib.suppress(ValueError):
                    if len(held) < count:
                        stack.enter_context(files.locked(place, "GPU"))
                        held.append(name)
            if len(held) == min(count, len(known)):
                yield {"CUDA_VISIBLE_DEVICES": ",".join(held)}
                return
        # Given back meanwhile: two that each keep what the other one lacks would wait for ever.
        time.sleep(random.uniform(0.5, 1.5))


def find(pattern: str) -> list[Path]:
    """The paths that a pattern names; a path that is there is no pattern, whatever brackets it has."""
    return [Path(pattern)] if os.path.lexists(pattern) else sorted(Path().glob(pattern))


def listing(paths: Iterable[Path]) -> dict[str, list]:
    """:return: path -> size in bytes, of links of the link, and SHA-256, of files and of all files in folders."""
    found = {}
    for path in paths:
        inner = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in inner:
            if not file.name.startswith("."):
                with open(file, "rb") as stream:
                    checksum = hashlib.file_digest(stream, "sha256").hexdigest()
                found[file.as_posix()] = [file.lstat().st_size, checksum]
    return found


if __name__ == "__main__":
    cli.run(main)
