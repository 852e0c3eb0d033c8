"""One stage: what it seals and clears away, which GPUs it gets, what tells its failure; and what a run decides."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guided_diffusion import cli, failures, files
from scripts.workflow import choose_clusters, run

ROOT = Path(__file__).resolve().parents[2]
STAGE = ROOT / "scripts" / "workflow" / "stage.py"


def start(folder: Path, name: str, *words: str, **environment: str) -> subprocess.Popen:
    """Start a stage: flags, --, command."""
    command = [sys.executable, STAGE, name, "--log", "logs/log", *words]
    env = {"PATH": os.environ["PATH"], **environment}
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def stage(folder: Path, name: str, *words: str, **environment: str) -> tuple[int, str]:
    process = start(folder, name, *words, **environment)
    return process.wait(timeout=60), process.stderr.read()


def test_a_seal_names_files_and_what_they_were_made_with(tmp_path):
    assert stage(
        tmp_path, "one", "--makes", "a", "--settings=x", "--", "bash", "-c", "mkdir a; echo 1 >a/b; touch a/.lock"
    ) == (0, "")
    seal = json.loads((tmp_path / "stages/one.json").read_text())
    assert seal["made_with"] == {"settings": "x", "given": {}} and not seal["resumes"]
    assert seal["files"] == {"a/b": [2, "4355a46b19d348dc2f57c046f8ef63d4538ebb936000f3c9ee954a27460dd865"]}
    assert run.stages_without_files(tmp_path) == []
    (tmp_path / "a/b").write_text("123")
    assert run.stages_without_files(tmp_path) == ["one"]


def test_files_that_have_gone_are_found_in_the_order_of_the_stages(tmp_path):
    for name, given in (("zero", []), ("middle", ["stages/zero.json"]), ("also", ["stages/middle.json"])):
        assert stage(tmp_path, name, "--makes", name, "--given", *given, "--", "touch", name) == (0, "")
        (tmp_path / name).unlink()
    assert run.stages_without_files(tmp_path) == ["zero", "middle", "also"]


@pytest.mark.parametrize("resumes", [False, True])
def test_room_is_made_where_something_else_was_begun(tmp_path, resumes):
    flags = ["--makes", "model", *(["--resumes"] if resumes else [])]
    add = ["--", "bash", "-c", "mkdir -p model; echo x >>model/steps"]
    for settings, lines in (("a", 1), ("a", 2), ("b", 1)):
        code, said = stage(tmp_path, "train", *flags, f"--settings={settings}", *add)
        assert code == 0 and len((tmp_path / "model/steps").read_text().split()) == lines
    assert ("is now replaced/model.1" in said) == resumes
    assert (tmp_path / "replaced/model.1/steps").exists() == resumes


def test_what_ends_without_its_goal(tmp_path):
    code, said = stage(tmp_path, "train", "--makes", "m", "--seals", "m/*.pt", "--", "mkdir", "m")
    assert code == 2 and said == "error: train ended without m/*.pt: remove m to have it made anew\n"
    assert not (tmp_path / "stages/train.json").exists()
    # Whoever was asked to stop, the stage or its program: trainings save and end well, other programs by the signal.
    for end in ("exit 75", "mkdir -p m; echo stopped by SIGTERM at step 1, saved", "kill $$"):
        code, _ = stage(tmp_path, "train", "--makes", "m", "--seals", "m/*.pt", "--", "bash", "-c", end)
        assert code == cli.NOT_FINISHED, end


def test_warnings_are_said_once(tmp_path):
    script = "echo 0 holds all; for i in 1 2; do echo WARNING: 0 holds all; done"
    assert stage(tmp_path, "clusters", "--", "bash", "-c", script) == (0, "clusters: WARNING: 0 holds all\n")


def test_why_a_run_failed(tmp_path):
    def fail(name: str, script: str, of: str = "this") -> None:
        code, _ = stage(tmp_path, name, "--log", f"logs/{name}.log", "--", "bash", "-c", script, SDM_RUN=of)
        assert code

    def told() -> tuple[int, str]:
        return failures.report(tmp_path, "this", 1)

    fail("long", "echo error: an older one; exit 2", of="an older one")
    fail("long", "exit 75")
    assert told() == (cli.NOT_FINISHED, "long: not finished, the same command goes on\n")
    fail("bug", "echo Traceback; echo KeyError; exit 1")
    assert told() == (1, f"Traceback\nKeyError\nbug failed with exit code 1, see {tmp_path}/logs/bug.log\n")
    fail("late", "echo error: no nuclei; echo error: not fine-tuned: late; exit 2")
    code, said = told()
    assert code == 2 and said.endswith(f"\nerror: late: no nuclei ({tmp_path}/logs/late.log)\n") and "older" not in said
    fail("bug", "echo usage; exit 2")  # no word of ours
    (tmp_path / "stages/late.failed").unlink()
    assert told()[0] == 1
    assert failures.report(tmp_path, "another", 1) == (1, "")
    assert stage(tmp_path, "bug", "--", "true")[0] == 0 and not (tmp_path / "stages/bug.failed").exists()


def test_a_mistake_is_not_tried_again_in_one_run(tmp_path):
    count = ["bash", "-c", "echo >>tries; echo 'error: no' >&2; exit $0"]
    for code, of, tries in (("2", "a", 1), ("2", "a", 1), ("2", "b", 2), ("75", "c", 3), ("75", "c", 4), ("2", "", 5)):
        assert stage(tmp_path, "one", "--", *count, code, SDM_RUN=of)[0] == int(code)
        assert (tmp_path / "tries").read_text() == tries * "\n"


def test_stages_at_once_get_gpus_of_their_own(tmp_path):
    """Two of three that need two GPUs each wait, since there are three."""
    show = ["--", "bash", "-c", 'echo "$CUDA_VISIBLE_DEVICES" >$0; sleep 1']
    began = time.monotonic()
    stages = [
        start(tmp_path, name, "--makes", name, "--gpus", count, *show, name, SDM_GPUS="0,GPU-b,2")
        for name, count in (("a", "1"), ("b", "2"), ("c", "2"))
    ]
    assert [process.wait(timeout=60) for process in stages] == [0, 0, 0]
    given = [set((tmp_path / name).read_text().strip().split(",")) for name in "abc"]
    assert [len(names) for names in given] == [1, 2, 2] and set.union(*given) <= {"0", "GPU-b", "2"}
    assert time.monotonic() - began > 2  # b and c cannot run at once
    # In a job of Slurm's these are the job's; where each stage is a job, its own are shown to it.
    for name, gpus in (("d", "0"), ("e", "")):
        code, _ = stage(tmp_path, name, "--makes", name, "--gpus", "1", *show, name, SDM_GPUS=gpus, SLURM_JOB_ID="7")
        assert code == 0 and (tmp_path / name).read_text() == f"{gpus}\n"
    assert (tmp_path / "stages/locks" / f"gpu-{socket.gethostname()}-7-0").is_dir()


def test_who_waits_for_several_gpus_keeps_none_of_them(tmp_path):
    """Else two that each keep what the other one lacks would wait for ever."""
    places = [tmp_path / "stages/locks" / f"gpu-{socket.gethostname()}-{name}" for name in "01"]
    with files.locked(places[1], "GPU"):
        process = start(tmp_path, "two", "--gpus", "2", "--", "true", SDM_GPUS="0,1")
        while not (places[0] / files.LOCK).exists():
            time.sleep(0.01)
        had = False
        for _ in range(500):
            with contextlib.suppress(ValueError), files.locked(places[0], "GPU"):
                had = True
                break
            time.sleep(0.01)
        assert had and process.poll() is None
    assert process.wait(timeout=60) == 0


def test_a_command_that_outlives_its_stage_keeps_others_out(tmp_path):
    words = ["--makes", "a", "--", "bash", "-c", "trap '' TERM; mkdir a; for i in {1..40}; do sleep 0.1; done; >a/late"]
    first = start(tmp_path, "one", "--settings=old", *words)
    while not (tmp_path / "a").exists():
        time.sleep(0.01)
    first.kill()
    first.wait()
    again = ["--settings=new", "--makes", "a", "--", "mkdir", "a"]
    code, said = stage(tmp_path, "one", *again)
    assert (code, said) == (2, "error: stage one was killed, and its command is still running: wait for its end\n")
    while not (tmp_path / "a/late").exists():
        time.sleep(0.01)
    while (code := stage(tmp_path, "one", *again)[0]) == 2:  # its last moment
        pass
    assert code == 0 and list((tmp_path / "a").iterdir()) == []


def test_a_stage_that_is_stopped_while_it_waits_for_a_gpu_is_not_finished(tmp_path):
    with files.locked(tmp_path / "stages/locks" / f"gpu-{socket.gethostname()}-0", "GPU"):
        process = start(tmp_path, "one", "--gpus", "1", "--", "false", SDM_GPUS="0", SDM_RUN="this")
        while not (tmp_path / "stages/locks/one" / files.LOCK).exists():
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=60) == cli.NOT_FINISHED
    assert failures.report(tmp_path, "this", 1)[0] == cli.NOT_FINISHED


@pytest.mark.parametrize(
    ("gpus", "processes", "parallel", "each", "cores"),
    [("", "", 1, "0", 8), ("", "", 3, "0", 2), ("0,1", "2", 1, "2", 8), ("0,1", "1", 12, "1", 4)],
)
def test_what_a_training_takes(monkeypatch, tmp_path, gpus, processes, parallel, each, cores):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n" + "".join(f"echo GPU {name}: A\n" for name in gpus.split(",") if name))
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.setenv("NPROC", processes)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = run.settings(parallel, remote=False)
    assert (found["SDM_GPUS_EACH"], found["SDM_CORES"], found["SDM_GPUS"]) == (each, str(cores), gpus)
    found = run.settings(parallel, remote=True)  # which says nothing of the machine that submits
    assert (found["SDM_GPUS"], found["SDM_GPUS_EACH"], found["SDM_CORES"]) == (
        "",
        processes or "1",
        str(4 * int(processes or 1)),
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run.settings(parallel, remote=False)["SDM_CORES"] == "3"


def test_a_queues_profile_decides_how_often_a_job_goes_on():
    parser = pytest.importorskip("snakemake.cli").get_argument_parser([str(ROOT / "scripts/profiles/slurm")])
    assert parser.parse_args(run.ENGINE).retries == 10


def test_the_largest_cluster_or_those_that_are_named(tmp_path):
    for label, count in (("-1", 5), ("0", 2), ("1", 3)):
        folder = tmp_path / label / "MoNuSegTrainingData" / "images"
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.png").touch()
    for labels, expected in (([], ["1"]), (["0", "-1"], ["0", "-1"])):
        choose_clusters.main([str(tmp_path), str(tmp_path / "out"), *labels])
        assert json.loads((tmp_path / "out").read_text()) == expected
    with pytest.raises(ValueError, match="has no training patches of 2"):
        choose_clusters.main([str(tmp_path), str(tmp_path / "new"), "2"])
    assert not (tmp_path / "new").exists()
