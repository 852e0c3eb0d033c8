"""Runs programs, each forked from a process that has imported all, and tells whether one ended as it must. Knows no
fault."""

import contextlib
import ctypes
import hashlib
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from quick_python import ROOT, run

from .toy import Stage, provide

MISTAKE = 2  # the exit code of what a user can mend
HANG = 120  # seconds after which a program hangs that takes one or two by itself
PR_SET_CHILD_SUBREAPER = 36  # of prctl
# What no second run writes alike: times, and the number of a run.
PASSING = re.compile(rb'"seconds": [\d.]+|"id": "\w{16}"')
# Logs, a lock that nobody holds, and pictures that are drawn after a checkpoint, which a kill may leave out.
SKIPPED = re.compile(r"(^|/)(previews/.*|\.lock|log.*\.txt|progress.*\.csv)$")

Trial = tuple[str, Callable[[Path], list[str]]]  # its name, and what takes an empty folder and gives complaints


class Missed(Exception):
    """The harm came too late: this was no trial."""


@dataclass(frozen=True)
class Done:
    """
    How a program ended.

    :param code: its exit code, or minus the signal's number; None where it hung and was killed.
    :param err: its stderr. :param memory: the most that it, or one of its children, held, in MiB.
    """

    code: int | None
    err: str
    memory: float

    def well(self) -> list[str]:
        """:return: complaints where it did not end well."""
        return [] if self.code == 0 else [f"exit code {self.code}: {self.last()}"]

    def refused(self) -> list[str]:
        """:return: complaints where it did not end by one line and exit code 2."""
        lines = re.split(r"[\r\n]+", self.err)
        errors = [line for line in lines if line.startswith("error: ")]
        if self.code == MISTAKE and len(errors) == 1 and self.last() == errors[0] and "Traceback" not in self.err:
            return []
        return [f"exit code {self.code}, {len(errors)} error lines: {self.last()}"]

    def last(self) -> str:
        """:return: the last line of stderr."""
        return next((line for line in reversed(re.split(r"[\r\n]+", self.err)) if line.strip()), "")


class Running:
    """A program that runs. :param said: the file of its stderr."""

    def __init__(self, pid: int, said: Path) -> None:
        self.pid, self.said, self.descriptor = pid, said, os.pidfd_open(pid)

    def alive(self, seconds: float = 0) -> bool:
        """Wait so long at most; :return: whether it still runs."""
        return not select.select([self.descriptor], [], [], seconds)[0]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, but to no child of it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self, seconds: float = HANG) -> Done:
        """Wait for its end; it is killed where that does not come."""
        hangs = self.alive(seconds)
        if hangs:
            self.kill()
        _, status, used = os.wait4(self.pid, 0)
        os.close(self.descriptor)
        code = None if hangs else os.waitstatus_to_exitcode(status)
        return Done(code, self.said.read_text(errors="replace"), used.ru_maxrss / 1024)


class Bench:
    """
    Where programs are run. The process that makes it must have imported all (quick_python.load), and have one thread.

    :param toy: the folder of the inputs.
    """

    def __init__(self, toy: Path) -> None:
        self.toy = toy
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of a trial become children of this process

    def start(
        self,
        stage: Stage,
        folder: Path,
        extra: Sequence[str] = (),
        harm: Callable[[], object] = lambda: None,
        stdout: int | None = None,
        said: str = "said",
        **environment: str,
    ) -> Running:
        """
        Start a stage, which makes folder/NAME. What it says goes to files beside that.

        :param extra: flags at the end. :param harm: is called in the program's process before it begins.
        :param stdout: a descriptor for it. :param said: what to call the files of its outputs.
        """
        out = folder / stage.name
        environment = {"OPENAI_LOGDIR": str(out), "OPENAI_LOG_FORMAT": "log,csv", **environment}
        err = folder / f"{said}.err"
        pid = os.fork()
        if pid == 0:
            program, *words = [*stage.words(self.toy, out), *extra]
            become([str(ROOT / program), *words], {**os.environ, **environment}, err, harm, stdout)
        return Running(pid, err)

    def run(self, stage: Stage, folder: Path, extra: Sequence[str] = (), **options) -> Done:
        """Run a stage to its end; parameters as start's."""
        return self.start(stage, folder, extra, **options).end()

    def provide(self, stage: Stage) -> None:
        """Have the inputs of a stage ready."""

        def make(source: Stage, path: Path) -> None:
            folder = emptied(self.toy.parent / "work")
            source.prepare(self.toy, folder)
            done = self.run(source, folder)
            if done.code:
                raise ValueError(f"{source.command} failed: {done.err}")
            os.replace(folder / source.name, path)

        provide(stage, self.toy, make)


def become(
    words: list[str], environment: dict[str, str], said: Path, harm: Callable[[], object], stdout: int | None
) -> NoReturn:
    """Have this process, which was forked for it, be a program in the trial's folder, where `said` lies."""
    os.setsid()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # which a test's runner may have replaced
    err = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    out = os.open(said.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if stdout is None else stdout
    harm()
    run(words, str(said.parent), environment, [os.open(os.devnull, os.O_RDONLY), out, err])


def limit_memory() -> None:
    """Let no program take the machine's memory."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))


def orphans(before: set[int], seconds: float = 10) -> list[str]:
    """
    :param before: the children that this process had before the trial.
    :return: a complaint of processes that the trial left behind, which are killed; none of it may run any more.
    """
    deadline = time.monotonic() + seconds
    left = children() - before
    while left and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)
        time.sleep(0.02)
        left = children() - before
    for process in left:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return [f"{len(left)} processes were left behind"] if left else []


def children() -> set[int]:
    """:return: the processes whose parent this one is."""
    return {int(word) for path in Path("/proc/self/task").glob("*/children") for word in path.read_text().split()}


def snapshot(folder: Path) -> dict[str, str]:
    """:return: path below a folder, or of a file -> a digest of it, for all but what holds times; links by target."""
    paths = sorted(folder.rglob("*")) if folder.is_dir() else [folder] if folder.exists() else []
    found = {}
    for path in paths:
        name = str(path.relative_to(folder.parent))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file() and not SKIPPED.search(name):
            found[name] = digest(path)
    return found


def digest(path: Path) -> str:
    """:return: of what a file holds, but for what no second run writes alike, which an archive has in its comment."""
    if path.suffix == ".pt":
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            return str([(entry.filename, entry.CRC) for entry in archive.infolist()])
    return hashlib.sha256(PASSING.sub(b"", path.read_bytes())).hexdigest()


def stamps(folder: Path) -> dict[str, str]:
    """:return: as snapshot, by time and size: quicker, for what nothing may touch."""
    return {str(p): f"{p.lstat().st_mtime_ns} {p.lstat().st_size}" for p in folder.rglob("*")}


def differing(found: Mapping[str, str], expected: Mapping[str, str], what: str) -> list[str]:
    """:return: a complaint that names some of the paths whose content is not what was expected."""
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return [f"{what}: {len(names)} files differ: {', '.join(names[:3])}"] if names else []


def leftovers(folder: Path, out: Path) -> list[str]:
    """:return: a complaint of what lies beside an output that is whole."""
    names = sorted(path.name for path in folder.iterdir())
    strangers = [name for name in names if name != out.name and not name.startswith("said")]
    return [f"beside the output: {', '.join(strangers)}"] if strangers else []


@contextlib.contextmanager
def untouched(folder: Path, complaints: list[str], what: str) -> Iterator[None]:
    """Complain where something in a folder changes while the with block lasts."""
    before = stamps(folder)
    yield
    complaints += differing(stamps(folder), before, what)


def emptied(folder: Path) -> Path:
    """:return: a folder, empty now."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
