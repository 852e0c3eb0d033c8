"""A request to stop is remembered inside the block and has its usual effect outside it."""

import os
import signal
import threading

import pytest

from guided_diffusion.signals import StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_is_remembered_by_name(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.name == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_outside_the_main_thread_nothing_is_handled():
    before = signal.getsignal(signal.SIGTERM)
    stops = []

    def body():
        with StopRequest() as stop:
            stops.append((bool(stop), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert stops == [(False, before)]
