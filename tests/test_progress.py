"""How progress looks where nobody watches."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from guided_diffusion import progress

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that have passed, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.std, "time", lambda: now[0])
    monkeypatch.setattr(progress.std.tqdm, "monitor_interval", 0)
    return now


def told(text: str) -> list[int]:
    """:return: how much is done, by each line."""
    lines = text.splitlines()
    assert all(line.startswith("work: ") for line in lines), lines
    return [int(line.split("|")[2].split("/")[0]) for line in lines]


@pytest.mark.parametrize("how", ["iterable", "update"])
def test_a_line_every_half_minute_and_at_the_end(clock, capsys, how):
    """100 things of a second each; figures beside the bar and lines printed between add none."""
    if how == "iterable":
        for _ in progress.bar(range(100), "work"):
            clock[0] += 1
    else:
        with progress.bar(desc="work", total=100) as bar:
            for number in range(100):
                clock[0] += 1
                bar.update()
                bar.set_postfix(loss=number)
                progress.write("a line")
    out, err = capsys.readouterr()
    counts = told(err)
    assert len(counts) == 4 and counts[-1] == 100 and out.splitlines() == ["a line"] * (100 * (how == "update"))
    assert all(later - count >= 30 for count, later in zip([0, *counts], counts[:-1]))


def test_the_rate_is_that_of_the_work(clock, capsys):
    """Also where some lines fall due and others are asked for, as when work gets slower."""
    with progress.bar(desc="work", total=2000) as bar:
        for number in range(2000):
            clock[0] += 0.1 if number < 600 else 0.25
            bar.update()
            if number % 10 == 9:
                bar.set_postfix(loss=number)
    rates = [float(line.split(", ")[1].removesuffix("it/s")) for line in capsys.readouterr().err.splitlines()]
    assert len(rates) > 8 and all(4 <= rate <= 10 for rate in rates), rates


def test_short_work(clock, capsys):
    """Says that it has ended, unless it is a part of other work; what broke off says how far it came."""
    for leave in (True, False):
        list(progress.bar(range(5), "work", leave=leave))
    assert told(capsys.readouterr().err) == [5]
    with pytest.raises(ValueError), progress.bar(desc="work", total=5) as bar:
        bar.update(3)
        raise ValueError
    assert told(capsys.readouterr().err) == [3]
    list(progress.bar(range(5), "work", disable=True))
    assert told(capsys.readouterr().err) == []


def test_no_program_draws_bars_of_its_own():
    """They would be thousands of lines in a cluster's log."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "guided_diffusion").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    ours = [path for path in paths if "benchmarks" not in path.parts]
    drawing = [path.relative_to(ROOT) for path in ours if re.search(r"\btqdm\(", path.read_text())]
    assert drawing == [Path("guided_diffusion/progress.py")]


def test_the_end_is_said_once(clock, capsys):
    """Where the last line fell due with the last piece of work."""
    for _ in progress.bar(range(2), "work"):
        clock[0] += 31
    assert told(capsys.readouterr().err) == [1, 2]


def test_no_stderr_no_progress(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)  # as Python has it where it was closed
    assert list(progress.bar(range(3), "work")) == [0, 1, 2]


def in_a_terminal(code: str, columns: int) -> str:
    """:return: what a program shows in a terminal so wide."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    with subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=writer, cwd=ROOT):
        os.close(writer)
        shown = b""
        with contextlib.suppress(OSError):  # its end, in a terminal
            while part := os.read(reader, 4096):
                shown += part
    os.close(reader)
    return shown.decode()


def test_a_narrow_terminal():
    """A bar is redrawn in its line, which it never outgrows."""
    code = "import time\nfrom guided_diffusion import progress\n"
    code += "for _ in progress.bar(range(4), 'a long description'): time.sleep(0.15)"
    shown = in_a_terminal(code, 30)
    lines = [line for line in re.split(r"[\r\n]+|\x1b\[A", shown) if line]
    assert len(lines) > 3 and "100%" in lines[-1] and max(map(len, lines)) <= 30, lines
    assert not re.search(r"\x1b\[[\d;]*m", shown)  # no colours, with or without NO_COLOR
