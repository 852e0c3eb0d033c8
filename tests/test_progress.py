"""How progress looks where nobody watches."""

import subprocess

import pytest

from guided_diffusion import progress


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
    command = ["git", "grep", "-nE", r"\btqdm\(", "--", "*.py", ":!tests", ":!scripts/benchmarks"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    assert [line for line in found if not line.startswith("guided_diffusion/progress.py")] == []
