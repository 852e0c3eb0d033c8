"""The writer thread."""

import threading

import pytest

from guided_diffusion.background import BackgroundWriter


def test_writer_keeps_order_and_waits():
    done = []
    with BackgroundWriter(waiting=2) as writer:
        for i in range(20):
            writer(lambda i=i: done.append((i, threading.current_thread().name)))
    assert done == [(i, "writer_0") for i in range(20)]


def test_writer_raises_what_a_job_raised():
    def fail():
        raise OSError("disk full")

    done = []
    with pytest.raises(OSError, match="disk full"), BackgroundWriter() as writer:
        writer(fail)
        writer(lambda: done.append(1))
    assert done == []
