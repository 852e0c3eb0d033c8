"""Training that is killed, asked to stop, starved of disk or of a rank: nothing is lost, and nothing hangs."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import TINY, write_images, write_patches
from forked import Child, start_ranks

import image_train

ROOT = Path(__file__).resolve().parents[1]
MPIEXEC = [str(Path(sys.executable).with_name("mpiexec")), "-n", "2", sys.executable]
EVERYTHING = (
    "--lr 1e-3 --batch_size 4 --ema_rate 0.9,0.99 --drop_rate 0.3 --augment True --dropout 0.1 --diffusion_steps 20 "
    "--schedule_sampler loss-second-moment --preview_samples 1 --log_interval 3 --use_checkpoint False "
    "--unlabelled_share 0.3"
).split()


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """A data set of three slides, so that one is held out, and images without masks."""
    folder = tmp_path_factory.mktemp("slides")
    write_patches(folder / "MoNuSegTrainingData", count=12)
    write_images(folder / "unlabelled", count=5)
    return folder


def command(data_dir, *flags):
    return ["--data_dir", str(data_dir), "--unlabelled_dir", f"{data_dir}/unlabelled", *TINY, *EVERYTHING, *flags]


@pytest.fixture(scope="module")
def argv(slides) -> list[str]:
    """The flags of a short run, twelve steps long, as most tests here disturb one."""
    return command(slides, *"--max_steps 12 --save_interval 3 --val_interval 6 --log_interval 1".split())


@pytest.fixture(scope="module")
def calm(argv, tmp_path_factory) -> Path:
    """What that run writes where nothing disturbs it."""
    out = tmp_path_factory.mktemp("calm") / "out"
    assert start(out, argv).wait() == 0, read(out.with_suffix(".err"))
    return out


def start(out: Path, argv: list[str]) -> Child:
    return Child(image_train.main, argv, out, OPENAI_LOGDIR=str(out), OPENAI_LOG_FORMAT="log")


def two_ranks(out: Path, argv: list[str]) -> list[Child]:
    return start_ranks(2, image_train.main, argv, out, OPENAI_LOGDIR=str(out), OPENAI_LOG_FORMAT="log")


def until_it_steps(child: Child, out: Path) -> bool:
    return child.until(lambda: "\nstep " in read(out / "log.txt"))


def flat(value, key=""):
    """Path -> tensor or number, of a nested state."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in flat(part, f"{key}/{name}").items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{key}/{i}").items()}
    return {key: value}


def assert_same_checkpoints(a: Path, b: Path, step: int):
    names = sorted(path.name for path in a.glob(f"*{step:06d}.pt"))
    assert len(names) == 5 and names == sorted(path.name for path in b.glob(f"*{step:06d}.pt"))
    for name in names:
        one, two = (flat(th.load(folder / name, weights_only=True)) for folder in (a, b))
        assert one.keys() == two.keys()
        for key in one:
            same = th.equal(one[key], two[key]) if th.is_tensor(one[key]) else one[key] == two[key]
            assert same, (name, key)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def newest(out: Path) -> str:
    return max((path.name for path in out.glob("model[0-9]*.pt")), default="")


@pytest.mark.slow
def test_killed_again_and_again(slides, tmp_path):
    """SIGKILL at random moments, half of them inside a save; to the last bit what an undisturbed run gives."""
    argv = command(
        slides, *"--max_steps 24 --save_interval 1 --keep_checkpoints 2 --val_interval 7 --preview_samples 0".split()
    )
    calm, out = tmp_path / "calm", tmp_path / "out"
    assert start(calm, argv).wait() == 0
    rng = np.random.default_rng(0)
    inside, at = 0, []
    for kills in range(8):
        child = start(out, argv)
        before = newest(out)
        # Some progress first, or it would take for ever; then inside a save, or at any moment of a step.
        child.until(lambda: newest(out) != before)  # noqa: B023
        if kills % 2:
            child.until(lambda: any(out.glob("*.part")), pause=0.0005)
        else:
            time.sleep(0.03 * rng.random())
        child.kill()
        code = child.wait()
        inside += any(out.glob("*.part"))
        at.append(newest(out))
        assert code == -signal.SIGKILL, read(out.with_suffix(".err"))
    assert start(out, argv).wait() == 0
    assert inside >= 2, (inside, at)
    assert_same_checkpoints(calm, out, 24)
    assert len(list(out.glob("model[0-9]*.pt"))) == 2
    for card in ("card.md", "best/card.md"):
        assert (calm / card).read_bytes() == (out / card).read_bytes()
    best = {path.name for path in (calm / "best").glob("*.pt")}
    assert best == {path.name for path in (out / "best").glob("*.pt")} and len(best) == 5


@pytest.mark.slow
def test_two_ranks_killed_and_resumed(argv, tmp_path):
    assert [child.wait() for child in two_ranks(tmp_path / "calm", argv)] == [0, 0]
    disturbed = two_ranks(tmp_path / "out", argv)
    assert disturbed[0].until((tmp_path / "out" / "model000006.pt").exists)
    for child in disturbed:
        child.kill()
        child.wait()
    assert not (tmp_path / "out" / "model000012.pt").exists()
    assert [child.wait() for child in two_ranks(tmp_path / "out", argv)] == [0, 0]
    assert_same_checkpoints(tmp_path / "calm", tmp_path / "out", 12)


@pytest.mark.slow
def test_one_of_two_ranks_is_asked_to_stop(argv, tmp_path):
    """All stop after the same step, and save."""
    first, second = two_ranks(tmp_path / "out", argv)
    assert until_it_steps(first, tmp_path / "out")
    second.kill(signal.SIGUSR1)
    assert [first.wait(), second.wait()] == [0, 0]
    assert "stopped by a signal at step " in read(tmp_path / "out" / "log.txt")
    assert not (tmp_path / "out" / "model000012.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on_later(argv, calm, tmp_path, number):
    """The workers that read are asked, too, and leave it to the training."""
    out = tmp_path / "out"
    child = start(out, [*argv, "--save_interval", "100", "--num_workers", "1"])
    assert until_it_steps(child, out)
    child.kill(number)
    assert child.wait() == 0
    (model,) = out.glob("model[0-9]*.pt")
    step = int(model.stem[5:])
    assert 1 <= step < 12
    line = f"stopped by {number.name} at step {step}, saved: the same command goes on"
    assert line in read(out / "log.txt")
    assert start(out, argv).wait() == 0
    assert f"going on from {model}" in read(out / "log.txt")
    assert_same_checkpoints(calm, out, 12)


def start_job(launcher: list[str], out: Path, argv: list[str]) -> subprocess.Popen:
    """Start training by a launcher, in a session of its own."""
    env = {**os.environ, "OPENAI_LOGDIR": str(out), "OPENAI_LOG_FORMAT": "log", "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*launcher, "image_train.py", *argv], cwd=ROOT, env=env, start_new_session=True, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_mpiexec_and_its_ranks_are_asked_to_stop(slides, tmp_path, number):
    """As a terminal and a cluster do: the launcher, the ranks, and the workers that read."""
    argv = command(slides, "--save_interval", "100000", "--num_workers", "1")
    job = start_job(MPIEXEC, tmp_path / "out", argv)
    wait_for_ranks(tmp_path / "out", slides)
    os.killpg(job.pid, number)
    assert job.wait(60) == 0, job.stderr.read()
    assert len(list((tmp_path / "out").glob("model*.pt"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_is_asked_to_stop(slides, tmp_path, number):
    """It passes SIGTERM on, and dies of others; its workers save and stop all the same."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = start_job(launcher, tmp_path / "out", command(slides, "--save_interval", "100000"))
    ranks = wait_for_ranks(tmp_path / "out", slides)
    job.send_signal(number)
    assert job.wait(60) == (1 if number == signal.SIGTERM else -number)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{rank}/cmdline").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(list((tmp_path / "out").glob("model*.pt"))) == 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert re.search(r"stopped by SIGTERM at step \d+, saved: the same command goes on", log)


def wait_for_ranks(out: Path, data_dir: Path) -> list[int]:
    """Wait until training logs; :return: the process numbers of its ranks."""
    deadline = time.monotonic() + 90
    while "\nstep " not in read(out / "log.txt"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if "image_train.py" in words[1:3] and str(data_dir) in words:  # torchrun puts -u before it
                ranks.append(int(folder.name))
    return sorted(ranks)


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_job_down(slides, tmp_path):
    argv = [*MPIEXEC, "image_train.py", *command(slides)]
    env = {**os.environ, "OPENAI_LOGDIR": str(tmp_path / "out"), "OPENAI_LOG_FORMAT": "log", "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ranks = wait_for_ranks(tmp_path / "out", slides)
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    assert job.wait(60) != 0
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{rank}/cmdline").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_runs_in_one_folder(argv, calm, tmp_path):
    """The second, however it came about, is refused in one line; the first goes on undisturbed."""
    out = tmp_path / "out"
    ones = [start(out, argv) for _ in range(2)]  # at once: the folder is not there yet
    assert any(until_it_steps(child, out) for child in ones)
    late = start(out, argv)
    assert sorted(child.wait() for child in (*ones, late)) == [0, 2, 2]
    (first,) = (child for child in ones if child.process.exitcode == 0)
    errors = re.findall("error: (.*)", read(out.with_suffix(".err")))  # maybe behind the first one's progress bar
    assert len(errors) == 2
    assert all(f"OPENAI_LOGDIR {out} is in use by process {first.pid} on" in error for error in errors)
    assert_same_checkpoints(calm, out, 12)
    assert len(read(out / "log.txt").split("\nstep ")) == len(read(calm / "log.txt").split("\nstep "))


def test_a_full_disk_keeps_the_last_checkpoint(argv, calm, small_disk):
    """There is room for two and a half: those of step 3, of the best step, and of step 6."""
    size = sum(path.stat().st_size for path in calm.glob("*000003.pt"))
    disk = small_disk(int(2.5 * size) // 1024)
    child = start(disk / "out", argv)
    assert child.wait() == 2
    errors = [line for line in read(disk / "out.err").splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and re.search(r"cannot write .*000006\.pt: No space left on device", errors[0])
    assert (disk / "out" / "model000003.pt").exists() and not any((disk / "out").glob("*.part"))
    subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(disk)], check=True)
    assert start(disk / "out", [*argv, "--max_steps", "6"]).wait() == 0
    assert_same_checkpoints(calm, disk / "out", 6)


def test_a_spoilt_checkpoint_costs_the_steps_since_the_one_before(argv, calm, tmp_path):
    out = tmp_path / "out"
    assert start(out, [*argv, "--max_steps", "6"]).wait() == 0
    with open(out / "opt000006.pt", "r+b") as file:
        file.truncate(1000)
    assert start(out, [*argv, "--max_steps", "9"]).wait() == 0
    assert f"going on from {out / 'model000003.pt'}" in read(out / "log.txt")
    assert_same_checkpoints(calm, out, 9)
