"""
Progress of long work: a bar where somebody watches; in a file or a pipe a line now and then.

Owns how progress looks, for all programs; what it says is tqdm's.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import auto, std

INTERVAL = 30.0  # s between lines where nobody watches


def bar(
    iterable: Iterable | None = None, desc: str | None = None, total: int | None = None, **options: Any
) -> std.tqdm:
    """
    Make a bar on stderr; where that is no terminal, a line every half minute and, unless `leave` is False, at the end.

    :param iterable: to go through, if any; else the caller updates the bar.
    :param desc: what is done. :param total: how much of it there is, where the iterable does not say.
    :param options: tqdm's.
    """
    notebook = auto.notebook_tqdm is not std.tqdm  # whose stderr is no terminal either
    if sys.stderr is None:  # it was closed before Python began
        options["disable"] = True
    elif notebook or sys.stderr.isatty():
        return auto.tqdm(iterable, desc, total, **{"dynamic_ncols": True, **options})
    return _Lines(iterable, desc, total, **{**options, "mininterval": INTERVAL, "maxinterval": INTERVAL})


def write(line: str) -> None:
    """Print a line on stdout, above any bar."""
    std.tqdm.write(line)


class _Lines(std.tqdm):
    """A bar in lines, which stay."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Without a delay, tqdm draws at the start. Its smoothed rate takes no account of lines that others asked for,
        # and would be too high; the mean so far is not.
        self._told = -1  # how much was done by the last line
        super().__init__(*args, **{**options, "delay": 1e-9, "smoothing": 0})

    def refresh(self, *args: Any, **options: Any) -> None:
        """Whoever asks for it, not before it is time."""
        now = self._time()
        if now - self.last_print_t >= self.mininterval:
            super().refresh(*args, **options)
            self.last_print_t = now

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:
            self._told = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def clear(self, *args: Any, **options: Any) -> None:
        """Lines are not taken back."""

    def close(self) -> None:
        ended, self.leave = self.leave and not self.disable, False
        super().close()
        if ended and self._told != self.n:
            self.display()
