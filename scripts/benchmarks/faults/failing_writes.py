"""A disk that fails at one write of a program: that ends in one line, what was whole stays, and the same command then
ends as if nothing had happened."""

import builtins
import errno
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .toy import STAGES, Stage
from .trials import Bench, Trial, differing, emptied, leftovers, snapshot

SHARES = 24  # writes that are tried of each program, evenly over all
# Which fail: from then on, as where a disk is full or a folder is not one's own any more, or once.
LASTING = {"ENOSPC": True, "EACCES": True, "EIO": False}
MAKING = {"os.mkdir": 0, "os.rename": 1, "os.symlink": 1, "os.link": 1}  # audit event -> which argument it makes
REPLACING = ("prepare", "import", "clusters", "assembly", "export")  # which make their output anew, and put it in place


class Disk:
    """
    A disk in a process of its own, whose writes below a folder are counted, and fail from one on.

    :param out: what is written; what lies beside it and is called alike is on the disk, too.
    :param first: the number of the write that fails; 0 is none. :param name: of the error.
    :param report: a file that gets a byte a write.
    """

    def __init__(self, out: Path, first: int = 0, name: str = "EIO", report: Path | None = None) -> None:
        self.places = tuple(str(out.with_name(f"{dot}{out.stem}")) for dot in ("", "."))
        self.first, self.name, self.report = first, name, report
        self.done = itertools.count(1)

    def install(self) -> None:
        """Have all that Python writes in this process, and in those that it forks, go to this disk."""
        self.opening, self.counter = builtins.open, self.report and os.open(self.report, os.O_CREAT | os.O_WRONLY)
        sys.addaudithook(self.audit)
        builtins.open = io.open = self.open
        os.fsync = partial(self.sync, os.fsync)

    def write(self) -> None:
        """:raises OSError: where this write fails."""
        number = next(self.done)
        if self.counter:
            os.write(self.counter, b".")
        if self.first and (number == self.first or (number > self.first and LASTING[self.name])):
            code = getattr(errno, self.name)
            raise OSError(code, os.strerror(code))

    def holds(self, path: object) -> bool:
        """:return: whether a path is on this disk."""
        return isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(
            self.places
        )

    def audit(self, event: str, arguments: tuple) -> None:
        """What Python calls before it opens, makes or moves."""
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self.holds(path):
                self.write()
        elif event in MAKING and self.holds(arguments[MAKING[event]]):
            self.write()

    def open(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        """As the built-in one."""
        if not set(mode) & set("wax+") or not self.holds(file):
            return self.opening(file, mode, buffering, encoding, errors, newline, closefd, opener)
        disk = self

        class Raw(io.FileIO):
            def write(self, data):
                disk.write()
                return super().write(data)

        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)

    def sync(self, real: Callable[[int], None], descriptor: int) -> None:
        if self.holds(os.readlink(f"/proc/self/fd/{descriptor}")):
            self.write()
        real(descriptor)


def trials(bench: Bench) -> Iterator[Trial]:
    """:return: a trial of each program, error and share of its writes; of programs that replace, also over an output
    that is whole."""
    for part in range(SHARES):
        for name, stage in STAGES.items():
            for error in LASTING:
                for over in (False, True) if name in REPLACING else (False,):
                    where = f"{part}/{SHARES} of its writes" + (", over a whole output" if over else "")
                    yield f"{name}: {error} at {where}", partial(judge, bench, stage, error, part / SHARES, over)


def judge(bench: Bench, stage: Stage, error: str, share: float, over: bool, folder: Path) -> list[str]:
    """
    Run a stage on a disk that fails, then on one that does not.

    :param share: of its writes before the one that fails. :param over: an earlier output is there.
    """
    whole, count = counted(bench, stage, folder)
    out = stage.prepare(bench.toy, folder)
    if over:
        bench.run(stage, folder)
    before = snapshot(out)
    done = bench.run(stage, folder, harm=Disk(out, 1 + int(share * count), error).install)
    found = snapshot(out)
    complaints = [] if done.code == 0 and found == whole else done.refused()
    if over and found != whole:
        complaints += differing({name: found.get(name, "gone") for name in before}, before, "what was whole")
    again = bench.run(stage, folder)
    return [*complaints, *again.well(), *differing(snapshot(out), whole, "afterwards"), *leftovers(folder, out)]


_COUNTED: dict[Stage, tuple[dict[str, str], int]] = {}


def counted(bench: Bench, stage: Stage, folder: Path) -> tuple[dict[str, str], int]:
    """:return: what a stage makes on a good disk, in the folder, which is empty before and after; and its writes."""
    if stage not in _COUNTED:
        bench.provide(stage)
        out, report = stage.prepare(bench.toy, folder), folder / "writes"
        done = bench.run(stage, folder, harm=Disk(out, report=report).install)
        if done.code:
            raise ValueError(f"{stage.command} failed by itself: {done.last()}")
        _COUNTED[stage] = snapshot(out), report.stat().st_size
        emptied(folder)
    return _COUNTED[stage]
