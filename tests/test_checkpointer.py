"""One run's checkpoints in its folder: written in the background, locked, the same run or another, and the best."""

import json
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch as th

from guided_diffusion import checkpoint
from guided_diffusion.checkpoint_sets import steps
from guided_diffusion.checkpointer import Checkpointer, snapshot

ROOT = Path(__file__).resolve().parents[1]


def states(step, value=0.0):
    names = (checkpoint.ema_name(0.9, step), checkpoint.opt_name(step), checkpoint.state_name(step))
    return {name: {"w": th.full((3,), value)} for name in (*names, checkpoint.model_name(step))}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.fixture
def open_folder(tmp_path):
    """Gives checkpointers of one folder; each closes the one before, as the end of a run does."""
    opened = []

    def make(folder=tmp_path / "run", begin=True, **options) -> Checkpointer:
        if opened:
            opened.pop().__exit__(None, None, None)
        opened.append(Checkpointer(str(folder), **options).__enter__())
        if begin:
            opened[0].begin(config={"lr": 1})
        return opened[0]

    yield make
    if opened:
        opened[0]._pool.shutdown()
        opened[0]._lock.close()


# ---- writing ----


def test_what_is_written_is_what_was_there_when_save_was_called(open_folder, tmp_path):
    run, files = open_folder(), states(1, 5.0)
    run.save(files)
    for state in files.values():
        state["w"].zero_()
    run.wait()
    assert names(tmp_path / "run") == sorted([*files, "config.json"])
    for name in files:
        assert checkpoint.load(str(tmp_path / "run" / name))["w"].tolist() == [5, 5, 5]
        assert checkpoint.run_of(str(tmp_path / "run" / name)) == run.run_id != ""


def test_saving_does_not_hold_up_the_caller_and_one_set_is_under_way_at_most(open_folder, tmp_path):
    run, gate, running = open_folder(), threading.Event(), []
    run.save(states(1), lambda: gate.wait(10))
    began = time.monotonic()
    threading.Timer(0.3, gate.set).start()
    running.append(gate.is_set())
    run.save_best(1, 0.5, lambda: states(1))  # the best is written beside it
    assert time.monotonic() - began < 0.25
    run.save(states(2))
    assert running == [False] and time.monotonic() - began >= 0.25
    run.wait()
    assert steps(str(tmp_path / "run")) == [1, 2]


def test_the_newest_stay(open_folder, tmp_path):
    run = open_folder(keep=2)
    for step in (2, 10, 1_000_000):
        run.save(states(step))
    run.wait()
    assert names(tmp_path / "run") == sorted([*states(10), *states(1_000_000), "config.json"])


def test_the_model_that_vouches_for_what_is_overwritten_goes_first(open_folder, tmp_path):
    """A run that dies while it writes a step that is there already leaves no set of two halves."""
    run = open_folder()
    for step, value in ((1, 1.0), (2, 2.0)):
        run.save(states(step, value))
    run.wait()
    again = states(2, 3.0)
    again["opt000002.pt"] = {"w": lambda: "nothing that can be written"}
    run.save(again)
    with pytest.raises(Exception, match="pickle"):
        run.wait()
    assert checkpoint.load(str(tmp_path / "run" / "ema_0.9_000002.pt"))["w"][0] == 3
    assert steps(str(tmp_path / "run")) == [1]


def test_leftovers_of_a_killed_run_go(open_folder, tmp_path):
    (tmp_path / "run" / "best").mkdir(parents=True)
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):
        (folder / ".model000003.pt.77.part").write_bytes(b"half")
        (folder / "else.part").write_bytes(b"mine")
    open_folder(begin=False)
    assert names(tmp_path / "run") == ["best", "else.part"] and names(tmp_path / "run" / "best") == ["else.part"]


def test_a_full_disk_leaves_what_was_there_and_is_reported_once(small_disk):
    disk = small_disk(64)
    with Checkpointer(str(disk)) as run:
        run.begin()
        run.save(states(1))
        run.wait()
        run.save({"opt000002.pt": {"w": th.zeros(100_000)}, "model000002.pt": {"w": th.zeros(3)}})
        with pytest.raises(OSError, match="cannot write .*opt000002.pt: No space left on device"):
            run.wait()
        run.check()
    assert names(disk) == sorted(states(1))


def test_the_end_of_the_block_waits_and_reports(tmp_path):
    with Checkpointer(str(tmp_path / "run")) as run:
        run.begin()
        run.save(states(1), lambda: time.sleep(0.1))
    assert steps(str(tmp_path / "run")) == [1] and not (tmp_path / "run" / "config.json").exists()
    (tmp_path / "run" / "best").write_text("in the way")
    for error, expected in ((None, OSError), (ZeroDivisionError, ZeroDivisionError)):
        with pytest.raises(expected), Checkpointer(str(tmp_path / "run")) as run:
            run.save_best(2, 0.5, lambda: states(2))
            if error:
                raise error


def test_snapshot():
    w = th.arange(24.0).view(1, 2, 3, 4).to(memory_format=th.channels_last)
    state = {"a": w, "b": [w, (1, "x")], "c": {"d": w[:, :1]}}
    copy = snapshot(state)
    w.zero_()
    assert copy["a"].is_contiguous() and copy["a"].flatten().tolist() == list(range(24))
    assert copy["b"][0].sum() == 276 and copy["b"][1] == [1, "x"] and copy["c"]["d"].shape == (1, 1, 3, 4)


# ---- one run a folder ----

FLAGS = {
    "data_dir": "data",
    "seed": 0,
    "lr": 0.1,
    "channel_mult": "1,2",
    "init_checkpoint": "",
    "resume_checkpoint": "",
}
FACTS = {"data": "d1", "held_out": "h1"}


def trained(open_folder, step=4, wanted="", **flags) -> Checkpointer:
    """A run that goes to a step, from what its folder holds or from `wanted`."""
    run = open_folder(begin=False)
    flags = {**FLAGS, "resume_checkpoint": wanted, **flags}
    run.find(wanted, flags, {"lr"}, FACTS)
    run.begin(config=flags)
    run.save(states(step))
    run.wait()
    return run


def test_another_process_is_kept_out(open_folder, quick, tmp_path):
    open_folder()
    script = "import sys\nfrom guided_diffusion.checkpointer import Checkpointer\nwith Checkpointer(sys.argv[1]): pass"
    command = [quick, "-c", script, str(tmp_path / "run")]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert second.returncode and "OPENAI_LOGDIR" in second.stderr and "in use by process" in second.stderr


def test_one_that_came_and_went_between_looking_and_beginning_is_noticed(open_folder, tmp_path):
    early = Checkpointer(str(tmp_path / "run")).__enter__()  # the folder is not there yet
    assert early.find("", FLAGS, (), FACTS) == ""
    trained(open_folder).__exit__(None, None, None)
    with pytest.raises(ValueError, match="another run has ended in .* meanwhile"):
        early.begin()
    early.__exit__(None, None, None)


def test_the_same_command_goes_on_with_the_same_run(open_folder, tmp_path):
    first = trained(open_folder)
    run = open_folder(begin=False)
    assert run.find("", {**FLAGS, "lr": 0.2, "channel_mult": "1,2.0"}, {"lr"}, FACTS) == str(
        tmp_path / "run" / "model000004.pt"
    )
    run.begin(config=FLAGS)
    assert run.run_id == first.run_id and run.changes == ["--lr 0.2, before it was 0.1"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["id"] == first.run_id


def test_a_flag_that_came_later_had_its_default(open_folder, tmp_path):
    trained(open_folder)
    run, newest = open_folder(begin=False), str(tmp_path / "run" / "model000004.pt")
    assert run.find("", {**FLAGS, "new": False}, (), FACTS, {"new": False}) == newest
    with pytest.raises(ValueError, match="has a run with --new False, this one has --new True"):
        run.find("", {**FLAGS, "new": True}, (), FACTS, {"new": False})


@pytest.mark.parametrize(
    ("flags", "facts", "message"),
    [
        ({"seed": 1}, {}, "has a run with --seed 0, this one has --seed 1"),
        ({"init_checkpoint": "p.pt"}, {}, "with --init_checkpoint '', this one has --init_checkpoint 'p.pt'"),
        ({"data_dir": "other"}, {"data": "d2"}, "--data_dir other does not hold the images .* in data"),
        ({}, {"data": "d2"}, "--data_dir data does not hold the images"),
        ({}, {"held_out": "h2"}, "--data_dir data does not hold the images"),
    ],
)
def test_another_run_is_refused(open_folder, tmp_path, flags, facts, message):
    trained(open_folder)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=f"{message}.*give .*another OPENAI_LOGDIR"):
        open_folder(begin=False).find("", {**FLAGS, **flags}, {"lr"}, {**FACTS, **facts})
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_what_has_moved_is_the_same(open_folder, tmp_path):
    """Images and weights to begin with are told by what they are, not by where they lie."""
    paths = [str(tmp_path / name / "p.pt") for name in ("before", "after", "other")]
    for path, value in zip(paths, (1.0, 1.0, 2.0)):
        Path(path).parent.mkdir()
        checkpoint.save({"w": th.full((3,), value)}, str(Path(path).parent), "p.pt")
    trained(open_folder, init_checkpoint=paths[0])
    moved = {**FLAGS, "data_dir": "moved", "init_checkpoint": paths[1]}
    assert open_folder(begin=False).find("", moved, {"lr"}, FACTS)
    with pytest.raises(ValueError, match="--init_checkpoint"):
        open_folder(begin=False).find("", {**moved, "init_checkpoint": paths[2]}, {"lr"}, FACTS)
    Path(paths[0]).unlink()  # no longer needed
    assert open_folder(begin=False).find("", {**FLAGS, "init_checkpoint": paths[0]}, {"lr"}, FACTS)


def test_a_model_given_by_hand_wins_but_the_same_command_goes_on(open_folder, tmp_path):
    first = trained(open_folder, 4)
    trained(open_folder, 6)
    back = str(tmp_path / "run" / "model000004.pt")
    run = open_folder(begin=False)
    flags = {**FLAGS, "resume_checkpoint": back}
    assert run.find(back, flags, {"lr"}, FACTS) == back
    run.begin(config=flags)
    # Killed before it has saved anything, it begins there again, not at step 6 of the run before.
    run = open_folder(begin=False)
    assert run.find(back, flags, {"lr"}, FACTS) == back
    run.begin(config=flags)
    assert run.run_id != first.run_id
    run.save(states(5))
    run.wait()
    run = open_folder(begin=False)
    assert run.find(back, flags, {"lr"}, FACTS) == str(tmp_path / "run" / "model000005.pt")
    run = open_folder(begin=False)
    assert run.find("", FLAGS, {"lr"}, FACTS) == str(tmp_path / "run" / "model000005.pt")


def test_a_folder_that_says_nothing_is_gone_on_with(open_folder, tmp_path):
    """As the reference leaves it."""
    (tmp_path / "run").mkdir()
    for name, state in states(3).items():
        checkpoint.save(state, str(tmp_path / "run"), name)
    run = open_folder(begin=False)
    assert run.find("", FLAGS, {"lr"}, FACTS) == str(tmp_path / "run" / "model000003.pt")
    run.begin(config=FLAGS)
    run.save(states(4))
    run.wait()
    assert open_folder(begin=False).find("", FLAGS, {"lr"}, FACTS) == str(tmp_path / "run" / "model000004.pt")


# ---- the best ----


def test_the_best_is_what_lies_in_its_folder(open_folder, tmp_path):
    run = trained(open_folder)
    assert run.best == {}
    run.begin(config=FLAGS, card=lambda step, best: f"{step} {best}")
    for step, val_loss in ((2, 0.5), (4, 0.25)):
        run.save_best(step, val_loss, lambda step=step: states(step))
        run.wait()
    folder = tmp_path / "run"
    assert names(folder / "best") == sorted([*states(4), "config.json", "card.md"])
    run.save(states(5))
    run.wait()
    best = {"step": 4, "val_loss": 0.25}
    assert [(place / "card.md").read_text() for place in (folder / "best", folder)] == [f"4 {best}", f"5 {best}"]
    links = {path.name: path.resolve().name for path in folder.iterdir() if path.is_symlink()}
    assert links == {
        "modelbest.pt": "model000004.pt",
        "ema_0.9_best.pt": "ema_0.9_000004.pt",
        "optbest.pt": "opt000004.pt",
    }
    assert {checkpoint.run_of(str(folder / link)) for link in links} == {run.run_id}
    # A run that was killed right after, before it saved anything else, knows it again.
    assert trained(open_folder).best == {"step": 4, "val_loss": 0.25}
    (folder / "best" / "model000004.pt").unlink()
    assert trained(open_folder).best == {}


def test_links_to_averages_that_are_gone_go(open_folder, tmp_path):
    run = trained(open_folder)
    run.save_best(2, 0.5, lambda: states(2))
    run.wait()
    of_another_rate = {name.replace("ema_0.9_", "ema_0.5_"): state for name, state in states(4).items()}
    run.save_best(4, 0.25, lambda: of_another_rate)
    run.wait()
    links = [path for path in (tmp_path / "run").iterdir() if path.is_symlink()]
    assert {path.name for path in links} == {"modelbest.pt", "ema_0.5_best.pt", "optbest.pt"}
    assert all(path.exists() for path in links)


def test_the_best_of_the_run_that_this_one_left_is_not_its_own(open_folder, tmp_path):
    trained(open_folder, 4).save_best(6, 0.25, lambda: states(6))
    run = trained(open_folder, 5, wanted=str(tmp_path / "run" / "model000004.pt"))
    assert run.best == {}
    run.save_best(5, 0.5, lambda: states(5))
    run.wait()
    assert (tmp_path / "run" / "modelbest.pt").resolve().name == "model000005.pt"


def test_the_best_counts_on_the_same_held_out_samples_alone(open_folder, tmp_path):
    trained(open_folder).save_best(4, 0.25, lambda: states(4))
    (tmp_path / "run" / "config.json").unlink()  # or the folder would be refused
    run = open_folder(begin=False)
    run.find("", FLAGS, {"lr"}, {**FACTS, "held_out": "h2"})
    run.begin(config=FLAGS)
    assert run.best == {}
