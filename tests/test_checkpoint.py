"""Checkpoints: names, safe reading, and which run wrote them."""

import os
import pickle
import zipfile

import pytest
import torch as th
from torch import nn

from guided_diffusion import checkpoint, trained_flags


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("model040000.pt", 40_000),
        ("run/ema_0.9999_040000.pt", 40_000),
        ("model1234567.pt", 1_234_567),
        ("gs://bucket/run/model000005.pt", 5),
        ("best.pt", 0),
    ],
)
def test_step_from_name(name, step):
    assert checkpoint.parse_step(name) == step


def test_names():
    assert checkpoint.model_name(500) == "model000500.pt"
    assert checkpoint.ema_name(0.9999, 500) == "ema_0.9999_000500.pt"
    assert checkpoint.opt_name(500) == "opt000500.pt"


def test_round_trip(tmp_path):
    state = {"a": th.rand(3), "b": th.arange(4)}
    checkpoint.save(state, str(tmp_path), "model000001.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["model000001.pt"]
    read = checkpoint.load(str(tmp_path / "model000001.pt"))
    assert all(th.equal(read[key], state[key]) for key in state)
    assert th.load(tmp_path / "model000001.pt", weights_only=True).keys() == state.keys()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    checkpoint.save({"a": th.ones(1)}, str(tmp_path), "m.pt")
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"a": lambda: 0}, str(tmp_path), "m.pt")
    assert checkpoint.load(str(tmp_path / "m.pt"))["a"] == 1


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_run",)


def test_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    th.save({"a": Evil()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": Evil()}))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ValueError, match=f"{name} holds more than tensors .*refused"):
            checkpoint.load(str(tmp_path / name))
    assert not (tmp_path / "evil_was_run").exists()


def test_broken_files(tmp_path):
    th.save({"a": th.rand(1000)}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "facts.json").write_text('{"settings": {}}')
    for name in ("cut.pt", "empty.pt", "text.pt", "facts.json"):
        with pytest.raises(ValueError, match=rf"{name} is truncated or no checkpoint"):
            checkpoint.load(str(tmp_path / name))
    th.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state_dict"):
        checkpoint.load(str(tmp_path / "list.pt"))
    for missing in (tmp_path / "none.pt", tmp_path, ""):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            checkpoint.load(str(missing))


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = str(tmp_path / "m.pt")
    th.save(nn.Linear(3, 4).state_dict(), path)
    target = nn.Linear(3, 4)
    checkpoint.load_weights(target, path)
    assert th.equal(target.weight, checkpoint.load(path)["weight"])
    with pytest.raises(ValueError, match=r"weight is \[4, 3\] there and \[5, 3\]"):
        checkpoint.load_weights(nn.Linear(3, 5), path)
    with pytest.raises(ValueError, match="has bias, which this configuration has not"):
        checkpoint.load_weights(nn.Linear(3, 4, bias=False), path)
    th.save({"weight": target.weight.data}, path)
    with pytest.raises(ValueError, match="has no bias"):
        checkpoint.load_weights(target, path)


def test_a_file_says_which_run_wrote_it_and_loads_as_any_other(tmp_path):
    state = {"b": th.rand(300), "a": th.arange(4)}
    for name, run_id in (("one.pt", "ab12"), ("two.pt", "cd34"), ("none.pt", "")):
        checkpoint.save(state, str(tmp_path), name, run_id)
        assert checkpoint.run_of(str(tmp_path / name)) == run_id
        for options in ({}, {"mmap": True}):
            read = th.load(tmp_path / name, weights_only=True, **options)
            assert list(read) == list(state) and all(th.equal(read[key], state[key]) for key in state)
        assert checkpoint.is_whole(str(tmp_path / name))
    assert zipfile.ZipFile(tmp_path / "one.pt").testzip() is None
    th.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert checkpoint.run_of(str(tmp_path / "old.pt")) == "" and checkpoint.is_whole(str(tmp_path / "old.pt"))
    model = th.nn.Linear(2, 1)
    th.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    checkpoint.check_weights(model, str(tmp_path / "old.pt"))


def test_equal_contents_are_told_wherever_they_lie(tmp_path):
    contents = {}
    for name, value, run_id in (("a.pt", 1.0, "ab12"), ("b.pt", 1.0, "cd34"), ("c.pt", 2.0, "ab12")):
        checkpoint.save({"w": th.full((10,), value)}, str(tmp_path), name, run_id)
        contents[name] = checkpoint.content_id(str(tmp_path / name))
    assert contents["a.pt"] == contents["b.pt"] != contents["c.pt"]


def test_what_cannot_be_read_is_not_taken_for_spoilt_or_missing(tmp_path):
    """/proc/self/mem is a file whose reading fails: Input/output error, as of a broken disk."""
    path = tmp_path / "model000001.pt"
    path.symlink_to("/proc/self/mem")
    folder = tmp_path / "model000002.pt"
    folder.mkdir()
    for function in (checkpoint.is_whole, lambda path: checkpoint.parse(path, path), checkpoint.load):
        with pytest.raises(OSError, match="Input/output error"):
            function(str(path))
    with pytest.raises(IsADirectoryError):
        checkpoint.is_whole(str(folder))
    (tmp_path / "config.json").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        trained_flags.load_config(str(path))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links"):
        checkpoint.exists(str(loop))
    assert not checkpoint.exists(str(folder)) and not checkpoint.exists(str(tmp_path / "none" / "a.pt"))


@pytest.mark.parametrize(
    ("name", "step"),
    [("run/model000020.pt", 20), ("model.pt", 0), ("modelbest.pt", 0), ("ema_0.9_000020.pt", 0), ("", 0)],
)
def test_what_is_gone_on_from_is_a_model_of_a_step(name, step):
    assert checkpoint.resume_step(name) == step


def test_samples_seen(tmp_path):
    checkpoint.save({"w": th.zeros(1)}, str(tmp_path), "model000005.pt")
    path = str(tmp_path / "model000005.pt")
    assert checkpoint.samples_seen("", 8) == 0 and checkpoint.samples_seen(path, 8) == 40
    checkpoint.save({"samples": 17}, str(tmp_path), checkpoint.state_name(5))
    assert checkpoint.samples_seen(path, 8) == 17
    assert checkpoint.samples_seen(str(tmp_path / "ema_0.9_000005.pt"), 8) == 0
