"""Checkpoints: names, safe reading, and the configuration beside them."""

import os
import pickle

import pytest
import torch as th
from torch import nn

from guided_diffusion import checkpoint


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
    for name in ("cut.pt", "empty.pt", "text.pt"):
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


def test_config_names_the_first_field_that_differs(tmp_path):
    path = str(tmp_path / "model000001.pt")
    flags = {"image_size": 64, "num_channels": 32, "lr": 1e-4}
    checkpoint.check_config(path, flags)  # nothing is known: nothing is refused
    checkpoint.save_config(str(tmp_path), flags)
    checkpoint.check_config(path, {**flags, "lr": 5e-4})
    with pytest.raises(ValueError, match="--num_channels 32, this run has --num_channels 64"):
        checkpoint.check_config(path, {**flags, "num_channels": 64})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json does not parse"):
        checkpoint.check_config(path, flags)


# ---- finding the newest ----


def write_run(folder, *steps):
    for step in steps:
        for name in (checkpoint.ema_name(0.9, step), checkpoint.opt_name(step), checkpoint.model_name(step)):
            checkpoint.save({"w": th.full((100,), float(step))}, str(folder), name)


def test_the_newest_whole_one_is_found(tmp_path):
    assert checkpoint.find_newest(str(tmp_path / "nowhere")) == checkpoint.find_newest(str(tmp_path)) == ""
    write_run(tmp_path, 5, 20, 1_000_000)
    (tmp_path / "model2000000.pt.part").write_bytes(b"half")
    checkpoint.save({}, str(tmp_path), checkpoint.opt_name(2_000_000))  # killed before the model came
    assert checkpoint.steps(str(tmp_path)) == [5, 20, 1_000_000]
    assert checkpoint.find_newest(str(tmp_path)) == str(tmp_path / "model1000000.pt")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[data.index(bytes(th.full((4,), 20.0).numpy().tobytes())) + 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, empty])
@pytest.mark.parametrize("name", ["model000020.pt", "opt000020.pt", "ema_0.9_000020.pt"])
def test_a_spoilt_one_is_passed_over_with_a_warning(tmp_path, capsys, spoil, name):
    write_run(tmp_path, 5, 20)
    spoil(tmp_path / name)
    assert checkpoint.find_newest(str(tmp_path)) == str(tmp_path / "model000005.pt")
    assert f"{name} is truncated or spoilt" in capsys.readouterr().out


def test_all_of_them_spoilt_is_no_reason_to_begin_anew(tmp_path):
    write_run(tmp_path, 5)
    truncate(tmp_path / "model000005.pt")
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        checkpoint.find_newest(str(tmp_path))


def test_samples_seen(tmp_path):
    write_run(tmp_path, 5)
    path = str(tmp_path / "model000005.pt")
    assert checkpoint.samples_seen("", 8) == 0 and checkpoint.samples_seen(path, 8) == 40
    checkpoint.save({"samples": 17}, str(tmp_path), checkpoint.state_name(5))
    assert checkpoint.samples_seen(path, 8) == 17
