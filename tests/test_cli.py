"""A mistake is one line and exit code 2, a request to stop one line and its own; a bug keeps its traceback."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch as th

from guided_diffusion import cli


def fail(error):
    def main():
        raise error

    return main


MISTAKES = [ValueError("--x 1\n is wrong"), FileNotFoundError("gone"), ImportError("pip it"), MemoryError("4 TiB")]


@pytest.mark.parametrize("error", MISTAKES)
def test_one_line_and_exit_code(capsys, error):
    left = []
    with pytest.raises(SystemExit) as stop:
        cli.run(fail(error), leave=lambda: left.append(True))
    assert stop.value.code == 2 and left == [True]
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: {' '.join(str(error).split())}\n"


def test_what_modules_warn_of_is_said_as_logger_says_it(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    cli.run(lambda: logging.getLogger("guided_diffusion.slides").warning("slides are guessed"))
    assert capsys.readouterr() == ("", "WARNING: slides are guessed\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_is_one_line_and_the_usual_exit_code(capsys, number):
    def main():
        os.kill(os.getpid(), number)
        time.sleep(10)

    left = []
    with pytest.raises(SystemExit) as stop:
        cli.run(main, leave=lambda: left.append(True))
    assert stop.value.code == 128 + number and left == [True]
    assert capsys.readouterr().err == f"stopped by {signal.Signals(number).name}\n"


def test_other_ranks_are_silent(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(fail(ValueError("x")), rank=lambda: 1)
    assert stop.value.code == 2 and capsys.readouterr().err == ""


def test_bugs_keep_their_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        cli.run(fail(ZeroDivisionError()))
    monkeypatch.setenv("SDM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x"):
        cli.run(fail(ValueError("x")))


def test_a_rank_that_is_alone_with_its_mistake_tells_it(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(fail(ValueError("x")), rank=lambda: 1, leave=lambda: False)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: x\n"


def test_memory_that_is_out_is_said_where_python_does_not(capsys):
    for main in (fail(MemoryError()), lambda: th.empty(10**17)):
        with pytest.raises(SystemExit):
            cli.run(main)
        assert capsys.readouterr().err == "error: there is not enough memory\n"
    with pytest.raises(SystemExit) as stop:
        cli.run(fail(th.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of")))
    line = "error: CUDA out of memory: docs/troubleshooting.md says what takes less\n"
    assert stop.value.code == 2 and capsys.readouterr().err == line
    with pytest.raises(RuntimeError, match="else"):
        cli.run(fail(RuntimeError("something else")))


@pytest.mark.parametrize("text", [str(2**63), str(-(2**63) - 1), "1" + 25 * "0"])
def test_numbers_of_more_than_64_bits_are_no_flags(text):
    parser = cli.FlagParser()
    parser.add_argument("--seed", type=int)
    assert parser.parse_args([f"--seed={2**63 - 1}"]).seed == 2**63 - 1
    with pytest.raises(ValueError, match=f"--seed: {text} has more than 64 bits"):
        parser.parse_args([f"--seed={text}"])


def test_an_empty_path_is_not_the_current_folder():
    parser = cli.FlagParser()
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(["--out", "."]).out == Path()
    with pytest.raises(ValueError, match="--out: it is empty: give a path"):
        parser.parse_args(["--out", ""])


PRINTING = """
import sys
from guided_diffusion import cli
cli.run(lambda: print("x" * int(sys.argv[1])))
"""


@pytest.mark.parametrize("size", [1, 100_000])  # which is written at the end, and before it
@pytest.mark.parametrize(("place", "reason"), [("/dev/full", "No space left on device"), ("", "Broken pipe")])
def test_what_is_printed_must_arrive(place, reason, size):
    """In a full disk, or in a pipe whose reader has gone."""
    reader, pipe = os.pipe()
    os.close(reader)
    with open(place, "w") if place else os.fdopen(pipe, "w") as out:
        command = [sys.executable, "-c", PRINTING, str(size)]
        env = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, env=env)
    said = "the standard output cannot be written:" if size == 1 else ""
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.endswith(f"{reason}\n")
