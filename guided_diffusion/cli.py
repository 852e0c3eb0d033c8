"""How a user's mistake or a request to stop ends a program: in one line. Knows nothing of what the programs do."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from . import signals

# The exit code of what was stopped before it was done, and goes on with the same command: sysexits.h's EX_TEMPFAIL.
NOT_FINISHED = 75
MISTAKE = 2  # of what a user can mend
MISTAKES = (ValueError, OSError, ImportError, MemoryError)  # which say so


class FlagFormatter(argparse.RawDescriptionHelpFormatter):
    """Says each flag's default and which of its spellings is deprecated; the usage line names what must be given."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], *rest: Any, **named: Any) -> None:
        shown = [action for action in actions if action.required]
        super().add_usage(usage, [*shown, argparse.Action(["flags"], "flags", nargs=0)], *rest, **named)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.option_strings and action.default not in (None, "", [], argparse.SUPPRESS):
            text += " (default %(default)s)"
        for spelling in action.option_strings[1:]:
            if spelling != "--help":
                text += f"; {spelling}: deprecated spelling"
        return text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, action.option_strings[0].lstrip('-').upper())}"


class FlagParser(argparse.ArgumentParser):
    """
    A parser that raises ValueError, so that a mistyped flag is reported like every other mistake: in one line. Its help
    keeps the description's lines and says defaults; of several spellings of a flag, all but the first are deprecated.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": FlagFormatter, **options})

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """As argparse's; no number of ours has more than 64 bits, which is where NumPy and torch fail, and no path is
        empty, which Python takes for the current folder, and a shell gives for a variable that is not set."""
        value = super()._get_value(action, text)
        if isinstance(value, Path) and not text:
            raise argparse.ArgumentError(action, "it is empty: give a path, or leave it out")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise argparse.ArgumentError(action, f"{text} has more than 64 bits: give a smaller number")
        return value


def run(
    main: Callable[[], None], rank: Callable[[], int] = lambda: 0, leave: Callable[[], bool] = lambda: True
) -> None:
    """
    Run a program; ValueError, OSError, ImportError and MemoryError become one line on stderr and exit code 2.

    By the project's rule these are what a user's mistake or a missing optional package raises, or what the machine has
    too little of. What was printed must arrive, too. A request to stop, see
    signals, ends the program in the same way, with 128 and the signal's number, unless it handles it.
    What modules warn of by Python's logging is printed as logger prints it, with "WARNING: " in front.
    SDM_TRACEBACK=1 in the environment lets them through, for whoever hunts a bug.

    :param main: the program.
    :param rank: gives this process's rank. As a rule all ranks meet the same mistake, and rank 0 prints it.
    :param leave: called before the program ends so, to leave the other ranks; says whether all of them do the same. If
        they do not, this rank prints its own line.
    """
    logging.lastResort.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    try:
        with signals.raised(), _memory_named():
            main()
        _flush()
    except (*MISTAKES, signals.Stopped) as error:
        if os.environ.get("SDM_TRACEBACK") == "1":
            raise
        stopped = isinstance(error, signals.Stopped)
        message = str(error) or "there is not enough memory"  # which MemoryError may leave unsaid
        with contextlib.suppress(OSError):
            _flush()
        line = f"stopped by {error.name}" if stopped else f"error: {' '.join(message.split())}"
        if rank() == 0:
            _report(line)
        if not leave() and rank() != 0:
            _report(line)
        sys.exit(error.code if stopped else MISTAKE)


@contextlib.contextmanager
def _memory_named() -> Iterator[None]:
    """Raise MemoryError where torch says by a RuntimeError, in dozens of lines, that memory is too small."""
    try:
        yield
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            raise MemoryError from error
        if type(error).__name__ == "OutOfMemoryError":  # of a GPU; torch is not imported for it
            raise MemoryError(
                f"{str(error).partition('. ')[0]}: docs/troubleshooting.md says what takes less"
            ) from error
        raise


def _flush() -> None:
    """:raises OSError: where what was printed cannot be written; it is lost then, so that nothing tries again."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, f"the standard output cannot be written: {error.strerror}") from None


def _report(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
