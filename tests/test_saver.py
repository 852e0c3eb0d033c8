"""Checkpoints written in the background: snapshots, order, how many stay, and what a failure looks like."""

import json
import threading
import time

import pytest
import torch as th

from guided_diffusion import checkpoint
from guided_diffusion.saver import Saver, snapshot


def states(step, value=0.0):
    names = (checkpoint.ema_name(0.9, step), checkpoint.opt_name(step), checkpoint.state_name(step))
    return {name: {"w": th.full((3,), value)} for name in (*names, checkpoint.model_name(step))}


def test_what_is_written_is_what_was_there_when_save_was_called(tmp_path):
    saver = Saver(str(tmp_path / "run"))
    files = states(1, 5.0)
    saver.save(files)
    for state in files.values():
        state["w"].zero_()
    saver.wait()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(files)
    for name in files:
        assert checkpoint.load(str(tmp_path / "run" / name))["w"].tolist() == [5, 5, 5]


def test_saving_does_not_hold_up_the_caller_and_one_set_is_under_way_at_most(tmp_path):
    saver, gate, running = Saver(str(tmp_path)), threading.Event(), []
    saver.save(states(1), lambda: gate.wait(10))
    began = time.monotonic()
    threading.Timer(0.3, gate.set).start()
    running.append(gate.is_set())
    saver.save(states(2))
    assert running == [False] and time.monotonic() - began >= 0.25
    saver.wait()
    assert checkpoint.steps(str(tmp_path)) == [1, 2]


def test_the_newest_stay(tmp_path):
    (tmp_path / "ema_0.9_000001.pt").write_bytes(b"of a model that was deleted by a killed run")
    (tmp_path / "notes.pt").write_bytes(b"mine")
    saver = Saver(str(tmp_path), keep=2)
    for step in (2, 10, 1_000_000):
        saver.save(states(step))
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*states(10), *states(1_000_000), "notes.pt"])


def test_a_run_that_went_back_keeps_what_it_wrote(tmp_path):
    saver = Saver(str(tmp_path), keep=1)
    for step in (9, 6):
        saver.save(states(step))
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(states(6))


def test_leftovers_of_a_killed_run_go(tmp_path):
    (tmp_path / "model000003.pt.part").write_bytes(b"half")
    (tmp_path / "else.part").write_bytes(b"mine")
    Saver(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["else.part"]


def test_ranks_that_clean_up_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.os, "listdir", lambda folder: ["model000003.pt.part"])  # gone since
    Saver(str(tmp_path))


def test_config_lies_beside_the_first_set(tmp_path):
    saver = Saver(str(tmp_path / "best"), 1, {"image_size": 16})
    assert not (tmp_path / "best").exists()
    saver.save(states(4))
    saver.wait()
    assert json.loads((tmp_path / "best" / "config.json").read_text()) == {"image_size": 16}


def test_a_full_disk_leaves_what_was_there_and_is_reported_once(small_disk):
    disk = small_disk(64)
    saver = Saver(str(disk))
    saver.save(states(1))
    saver.wait()
    saver.save({"opt000002.pt": {"w": th.zeros(100_000)}, "model000002.pt": {"w": th.zeros(3)}})
    with pytest.raises(OSError, match="cannot write .*opt000002.pt: No space left on device"):
        saver.wait()
    saver.check()
    assert sorted(path.name for path in disk.iterdir()) == sorted(states(1))


def test_snapshot():
    w = th.arange(24.0).view(1, 2, 3, 4).to(memory_format=th.channels_last)
    state = {"a": w, "b": [w, (1, "x")], "c": {"d": w[:, :1]}}
    copy = snapshot(state)
    w.zero_()
    assert copy["a"].is_contiguous() and copy["a"].flatten().tolist() == list(range(24))
    assert copy["b"][0].sum() == 276 and copy["b"][1] == [1, "x"] and copy["c"]["d"].shape == (1, 1, 3, 4)


def test_the_end_of_the_block_waits_and_reports(tmp_path):
    with Saver(str(tmp_path)) as saver:
        saver.save(states(1), lambda: time.sleep(0.1))
    assert checkpoint.steps(str(tmp_path)) == [1]
    (tmp_path / "file").write_text("in the way")
    for error, expected in ((None, OSError), (ZeroDivisionError, ZeroDivisionError)):
        with pytest.raises(expected), Saver(str(tmp_path / "file" / "run")) as saver:
            saver.save(states(2))
            if error:
                raise error
