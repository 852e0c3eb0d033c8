"""A mistake is one line and exit code 2, a request to stop one line and its own; a bug keeps its traceback."""

import logging
import os
import signal
import time

import pytest

from guided_diffusion import cli


def fail(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("error", [ValueError("--x 1\n is wrong"), FileNotFoundError("gone"), ImportError("pip it")])
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
