"""A process that is started gets the signals that were meant for what started it, and ends with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guided_diffusion import processes

ROOT = Path(__file__).resolve().parents[1]
# Starts a shell that notes SIGTERM, and ends with its exit code.
STARTS = """
import sys
from guided_diffusion import processes
command = "trap 'echo told; exit 7' TERM; echo begun; for i in $(seq 200); do sleep 0.05; done"
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


def test_code_and_environment(tmp_path):
    handlers = {number: signal.getsignal(number) for number in processes.FORWARDED}
    try:
        with open(tmp_path / "log", "w") as log:
            assert processes.run(["bash", "-c", "echo $NAME; exit 3"], log, {"NAME": "value"}) == (3, False)
            began = time.monotonic()
            assert processes.run(["bash", "-c", "kill -9 $$"], log, {}) == (137, False)
        assert (tmp_path / "log").read_text() == "value\n" and time.monotonic() - began < 5
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
