"""Sets of checkpoints: the newest whole one of a run, and what is taken up from beside a model."""

import pytest
import torch as th

from guided_diffusion import checkpoint
from guided_diffusion.checkpoint_sets import find_newest, prune, steps, take_up


def write_set(folder, step, run_id="", value=None):
    for name in (checkpoint.ema_name(0.9, step), checkpoint.opt_name(step), checkpoint.model_name(step)):
        checkpoint.save({"w": th.full((100,), float(value or step))}, str(folder), name, run_id)


def test_the_newest_whole_one_is_found(tmp_path):
    assert find_newest(str(tmp_path / "nowhere")) == find_newest(str(tmp_path)) == ""
    for step in (5, 20, 1_000_000):
        write_set(tmp_path, step)
    (tmp_path / ".model2000000.pt.7.part").write_bytes(b"half")
    (tmp_path / "modelbest.pt").symlink_to("model000005.pt")
    checkpoint.save({}, str(tmp_path), checkpoint.opt_name(2_000_000))  # killed before the model came
    assert steps(str(tmp_path)) == [5, 20, 1_000_000]
    assert find_newest(str(tmp_path)) == str(tmp_path / "model1000000.pt")


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
    write_set(tmp_path, 5, "ab12")
    write_set(tmp_path, 20, "ab12")
    spoil(tmp_path / name)
    assert find_newest(str(tmp_path)) == str(tmp_path / "model000005.pt")
    assert f"{name} is truncated or corrupt" in capsys.readouterr().out


def test_files_of_two_runs_are_no_set(tmp_path, capsys):
    write_set(tmp_path, 5, "ab12")
    write_set(tmp_path, 20, "ab12")
    checkpoint.save({"w": th.zeros(100)}, str(tmp_path), "opt000020.pt", "cd34")
    assert find_newest(str(tmp_path)) == str(tmp_path / "model000005.pt")
    warning = capsys.readouterr().out
    assert "model000020.pt" in warning and "opt000020.pt are of two runs" in warning
    with pytest.raises(ValueError, match="opt000020.pt are of two runs"):
        take_up(str(tmp_path / "model000020.pt"), {})
    checkpoint.save({"w": th.zeros(100)}, str(tmp_path), "opt000020.pt")  # of a run that does not say which it is
    assert find_newest(str(tmp_path)) == str(tmp_path / "model000020.pt")


def test_sets_of_another_run_are_passed_over_with_a_warning(tmp_path, capsys):
    write_set(tmp_path, 5, "ab12")
    write_set(tmp_path, 20, "cd34")
    assert find_newest(str(tmp_path)) == str(tmp_path / "model000020.pt")
    assert find_newest(str(tmp_path), "ab12") == str(tmp_path / "model000005.pt")
    assert "model000020.pt is of another run" in capsys.readouterr().out
    assert find_newest(str(tmp_path), "ef56") == ""


def test_all_of_them_spoilt_is_no_reason_to_begin_anew(tmp_path):
    write_set(tmp_path, 5)
    truncate(tmp_path / "model000005.pt")
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        find_newest(str(tmp_path))


@pytest.mark.parametrize("name", ["model000020.pt", "opt000020.pt"])
def test_one_that_cannot_be_read_is_no_reason_to_go_back(tmp_path, name):
    write_set(tmp_path, 5)
    write_set(tmp_path, 20)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        find_newest(str(tmp_path))


def test_the_newest_stay(tmp_path):
    for step in (2, 9, 10, 1_000_000):
        write_set(tmp_path, step)
    (tmp_path / "ema_0.9_000001.pt").write_bytes(b"of a model that was deleted by a killed run")
    (tmp_path / "notes.pt").write_bytes(b"mine")
    prune(str(tmp_path), keep=2, newest=10)  # by a run that went back
    assert steps(str(tmp_path)) == [9, 10] and len(list(tmp_path.iterdir())) == 2 * 3 + 1


def test_what_lies_beside_a_model_is_taken_up_and_named(tmp_path):
    write_set(tmp_path, 5)
    taken = {}

    def take(state, path):
        taken[path] = float(state["w"][0])

    names = ("ema_0.9_000005.pt", "opt000005.pt", "state000005.pt")
    line = take_up(str(tmp_path / "model000005.pt"), dict.fromkeys(names, take))
    assert taken == {str(tmp_path / name): 5 for name in names[:2]}
    assert line == (
        f"going on from {tmp_path}/model000005.pt: weights, ema_0.9_000005.pt, opt000005.pt; "
        "there is no state000005.pt: begun anew"
    )
    for name in ("model.pt", "ema_0.9_000005.pt"):
        line = take_up(str(tmp_path / name), dict.fromkeys(names, take))
        assert len(taken) == 2 and f"at step 0 with the weights of {tmp_path / name}, and nothing else" in line
