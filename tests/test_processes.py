"""A process that is started gets the signals that were meant for what started it, and ends with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guided_diffusion import processes, signals

ROOT = Path(__file__).resolve().parents[1]
# Starts a shell that notes SIGTERM, and ends with its exit code.
STARTS = """
import sys
from guided_diffusion import processes
command = "trap 'echo told; exit 7' TERM; echo begun; for ((i = 0; i < 200; i++)); do sleep 0.05; done"
print(*processes.run(["bash", "-c", command], sys.stdout, {"NAME": "value"}), flush=True)
"""


@pytest.mark.parametrize(
    ("number", "group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGKILL, False)]
)
def test_signals_reach_what_was_started(number, group):
    """Once, where they go to this process alone or to its group; SIGTERM, where it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "begun\n"
    (os.killpg if group else os.kill)(process.pid, number)
    rest = process.communicate(timeout=10)[0]  # the end of both
    assert rest == "told\n" + ("" if number == signal.SIGKILL else "7 True\n")


def test_a_signal_before_what_was_started_is_known_reaches_it(tmp_path, monkeypatch):
    class Early(subprocess.Popen):
        def __init__(self, *words, **options):
            super().__init__(*words, **options)
            os.kill(os.getpid(), signal.SIGUSR1)

    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    monkeypatch.setattr(subprocess, "Popen", Early)
    try:
        with open(tmp_path / "log", "w") as log:
            assert processes.run(["sleep", "60"], log, {}) == (128 + signal.SIGUSR1, True)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_no_wait_is_without_end():
    """In which no handler would run for a signal that came just before it."""
    turns = []

    class Child:
        def wait(self, timeout):
            turns.append(timeout)
            if len(turns) < 3:
                raise subprocess.TimeoutExpired("command", timeout)
            return 7

    assert processes.wait(Child()) == 7 and turns == [1, 1, 1]
    turns.clear()
    with pytest.raises(subprocess.TimeoutExpired):
        processes.wait(Child(), seconds=0.5)
    assert len(turns) == 1 and 0.4 < turns[0] <= 0.5


def test_code_and_environment(tmp_path):
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    try:
        with open(tmp_path / "log", "w") as log:
            assert processes.run(["bash", "-c", "echo $NAME; exit 3"], log, {"NAME": "value"}) == (3, False)
            began = time.monotonic()
            assert processes.run(["bash", "-c", "kill -9 $$"], log, {}) == (137, False)
        assert (tmp_path / "log").read_text() == "value\n" and time.monotonic() - began < 5
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def square(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number**2


@pytest.mark.parametrize(("workers", "fork"), [(1, False), (2, False), (2, True)])
def test_each_is_in_order_and_ends_with_the_first_error(workers, fork):
    assert list(processes.each(square, range(100), workers, fork)) == [k**2 for k in range(100)]
    assert list(processes.each(square, [], workers, fork)) == []
    with pytest.raises(ValueError, match="-1 is negative"):
        list(processes.each(square, [3, -1, 5, -2], workers, fork))


# Says the numbers of its workers, and then waits for them.
WAITS = """
import os, sys, time
from guided_diffusion import cli, processes
def work(number, seconds=60):
    os.write(1, b"%d\\n" % os.getpid())  # at once, so that those of two are never mixed
    time.sleep(seconds)
if __name__ == "__main__":
    cli.run(lambda: list(processes.each(work, [1, 2], 2, fork=sys.argv[1] == "fork")))
else:
    work(0, 0.5)  # in a worker that is no copy, as long as it begins
"""


@pytest.mark.parametrize(("ended", "begins"), [("worker", "fork"), ("program", "fork"), ("program", "spawn")])
def test_no_process_waits_for_one_that_was_killed(ended, begins, tmp_path):
    """Neither the program for a worker, which is said in one line, nor, for ever, a worker for the program."""
    (tmp_path / "waits.py").write_text(WAITS)
    program = subprocess.Popen(
        [sys.executable, tmp_path / "waits.py", begins],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = [int(program.stdout.readline()) for _ in range(2)]
    os.kill(workers[0] if ended == "worker" else program.pid, signal.SIGKILL)
    out, err = program.communicate(timeout=20)  # the end of all three: each has these pipes
    if ended == "worker":
        assert program.returncode == 2 and err.startswith("error: a worker process was ended") and err.count("\n") == 1
    else:
        assert out == "" and "Traceback" not in err  # Python tells of semaphores that it tidies up


def test_each_waits_for_who_takes_the_results():
    """Of many items only a few are done ahead."""

    class Many:
        taken = 0

        def __len__(self):
            return 10**9

        def __iter__(self):
            while True:
                self.taken += 1
                yield self.taken

    many = Many()
    results = processes.each(square, many, 2)
    assert next(results) == 1 and many.taken < 100
    results.close()
