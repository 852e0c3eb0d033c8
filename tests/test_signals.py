"""A request to stop is remembered, raised or left to others; each with real signals."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from guided_diffusion import signals
from guided_diffusion.signals import Stopped, StopRequest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_is_remembered_by_name(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.name == signal.Signals(number).name
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_is_raised(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop, signals.raised():
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert (stop.value.code, stop.value.name) == (128 + number, signal.Signals(number).name)
    assert signal.getsignal(number) == before


def test_what_watches_for_errors_meanwhile_stays(monkeypatch):
    """As mpi does, in a program that cli.run runs."""
    before = sys.excepthook
    with signals.raised():
        pass
    assert sys.excepthook is before
    watch = lambda kind, error, trace: None  # noqa: E731
    with signals.raised():
        monkeypatch.setattr(sys, "excepthook", watch)
    assert sys.excepthook is watch


def test_a_stop_that_is_remembered_is_not_raised():
    with signals.raised(), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.name == "SIGTERM"


@pytest.mark.parametrize("handled", [StopRequest, signals.raised])
def test_outside_the_main_thread_nothing_is_handled(handled):
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    seen = []

    def body():
        with handled() as stop:
            seen.append((bool(stop), [signal.getsignal(number) for number in signals.SIGNALS]))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def start(body: str) -> subprocess.Popen:
    script = "import os, signal, sys, time\nfrom guided_diffusion import signals\n" + textwrap.dedent(body)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_ctrl_c_ends_at_once():
    """One that a terminal sends and a launcher passes on is one, though it comes twice."""
    process = start(
        """
        with signals.StopRequest() as stop:
            print("ready", flush=True)
            while not stop:
                time.sleep(0.01)
            time.sleep(0.3)
            print("asked", flush=True)
            time.sleep(20)
        """
    )
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    assert process.stderr.read() == "stopped at once, by a second SIGINT\n"


WORKERS = """
import torch as th

class Slow(th.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, k):
        time.sleep(0.02)
        return k

def batches():
    yield from th.utils.data.DataLoader(Slow(), num_workers=2{init})

"""


def test_workers_leave_a_request_to_those_they_work_for():
    """All processes are told, as by a terminal or a cluster: what workers make is still used, and then they end."""
    process = start(
        WORKERS.format(init=", worker_init_fn=signals.leave_to_parent")
        + """
with signals.raised():
    data = batches()
    with signals.held():
        next(data)
    with signals.StopRequest() as stop:
        print("ready", flush=True)
        while not stop:
            next(data)
        for _ in range(20):
            next(data)
print("saved", flush=True)
"""
    )
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 0
    assert (process.stdout.read(), process.stderr.read()) == ("saved\n", "")


def test_a_request_before_workers_have_begun():
    """It waits for no worker, and ends none."""
    process = start(
        """
from guided_diffusion import data_stream
prepare = data_stream._prepare_worker
data_stream._prepare_worker = lambda worker: (time.sleep(1), prepare(worker))
with signals.raised(), signals.StopRequest() as stop:
    data = data_stream.read_batches(list(range(100)), [[k] for k in range(100)], 2)
    print("ready", flush=True)
    made = [next(data) for _ in range(20)]
    data.close()
print("saved" if stop else "not asked", flush=True)
"""
    )
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(20) == 0
    assert (process.stdout.read(), process.stderr.read()) == ("saved\n", "")


@pytest.mark.parametrize(
    ("number", "init"), [(signal.SIGINT, ""), (signal.SIGTERM, ", worker_init_fn=signals.leave_to_parent")]
)
def test_workers_add_nothing_to_the_line(number, init):
    """Nor need they be prepared for Ctrl-C."""
    process = start(
        WORKERS.format(init=init)
        + """
from guided_diffusion import cli
def main():
    data = batches()
    next(data)
    print("ready", flush=True)
    for _ in data:
        pass
cli.run(main)
"""
    )
    os.killpg(process.pid, number)
    assert process.wait(20) == 128 + number
    assert process.stderr.read() == f"stopped by {signal.Signals(number).name}\n"


def test_stops_with_the_process_that_started_it(tmp_path):
    child = f"""
import os, signal, time
from pathlib import Path
from guided_diffusion import signals
with signals.StopRequest() as stop:
    signals.end_with_parent(signal.SIGTERM, os.getppid())
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
Path({str(tmp_path / "told")!r}).write_text(stop.name)
"""
    parent = start(f"import subprocess\nsubprocess.run([sys.executable, '-c', {child!r}])")
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while not (tmp_path / "told").exists() or not (tmp_path / "told").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (tmp_path / "told").read_text() == "SIGTERM"
