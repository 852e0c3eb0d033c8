"""The soak in short, and that it sees what does not hold."""

import csv
import ctypes
import errno
import os
import pickle
import random
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soak
from faults import failing_writes, hostile, killed, trials
from faults.bad_flags import refuse
from faults.toy import Stage
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CHEAP = "bad_flags,bad_files,hostile,failing_writes,two_runs,kill_stages"


@pytest.mark.slow
def test_what_there_is_time_for_holds(quick, tmp_path):
    command = [quick, "scripts/benchmarks/soak.py", tmp_path / "out", "--count", "2", "--kinds", CHEAP]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "out/trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == [kind for kind in CHEAP.split(",") for _ in range(2)]
    assert not all(row["missed"] == "True" for row in rows if row["kind"] == "kill_stages")
    assert not (tmp_path / "out/failed").exists()
    assert done.stdout == (tmp_path / "out/trials.md").read_text()


@pytest.mark.parametrize("kinds", ["storms", ""])
def test_unknown_kinds(tmp_path, kinds):
    with pytest.raises(ValueError, match=f"unknown --kinds {kinds}: choose some of bad_flags, "):
        soak.main([str(tmp_path / "out"), "--kinds", kinds])
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_trial_has(quick, tmp_path):
    command = [quick, "scripts/benchmarks/soak.py", tmp_path / "out", "--kinds", "hostile,two_runs", "--only", "storm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --only storm: no trial of hostile,two_runs has that in its name\n"


def test_every_program_has_flags_to_spoil():
    found = [flag for name in ("toy", "prepare", "import") for flag, _ in soak.bad_flags.cases(name)]
    assert {"--size", "--patch_size", "--format", "--mpp"} <= {*found}


@pytest.fixture
def bench(tmp_path) -> Iterator[trials.Bench]:
    (tmp_path / "toy").mkdir()
    yield trials.Bench(tmp_path / "toy")
    ctypes.CDLL(None).prctl(trials.PR_SET_CHILD_SUBREAPER, 0)  # other tests' orphans are no children of this process


def stage(tmp_path, text):
    (tmp_path / "program.py").write_text(f"import os, sys, time\nout = sys.argv[1]\n{text}")
    return Stage(f"{tmp_path}/program.py {{out}}")


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("sys.exit('error: no')", ["exit code 1, 1 error lines: error: no"]),
        ("print('error: no', file=sys.stderr); sys.exit(2)", []),
        ("print('error: no\\nmore', file=sys.stderr); sys.exit(2)", ["exit code 2, 1 error lines: more"]),
        ("1 / 0", ["exit code 1, 0 error lines: ZeroDivisionError: division by zero"]),
        ("os.mkdir(out); print('error: no', file=sys.stderr); sys.exit(2)", ["out was made"]),
        (
            "open(os.path.abspath(f'{out}/../../toy/x'), 'w'); print('error: no', file=sys.stderr); sys.exit(2)",
            ["inputs: 1 files differ"],
        ),
    ],
)
def test_what_is_no_refusal(bench, tmp_path, text, complaints):
    found = refuse(bench, stage(tmp_path, text), [], False, trials.emptied(tmp_path / "work"))
    assert len(found) == len(complaints) and all(map(str.startswith, found, complaints)), found


def test_processes_that_are_left_behind_are_seen(bench, tmp_path):
    """And others, that were there before, stay."""
    with subprocess.Popen(["sleep", "60"]) as other:
        before = trials.children()
        done = bench.run(stage(tmp_path, "if os.fork() == 0: time.sleep(60)"), trials.emptied(tmp_path / "work"))
        assert done.code == 0
        assert trials.orphans(before, seconds=0.2) == ["1 processes were left behind"] and trials.orphans(before) == []
        assert other.poll() is None
        other.kill()


WRITING = """
os.makedirs(out, exist_ok=True)
try:
    for k in range(3):
        with open(f"{out}/.{k}", "w") as file:
            file.write("x")
        os.replace(f"{out}/.{k}", f"{out}/{k}")
except OSError as error:
    KEEP
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.parametrize(
    ("error", "keep"),
    [("EIO", ""), ("EACCES", ""), ("ENOSPC", ""), ("ENOSPC", "import shutil; shutil.rmtree(out); os.mkdir(out)")],
)
def test_each_write_fails_in_turn(bench, tmp_path, error, keep):
    """A folder, and the opening, writing and naming of three files are ten; what is deleted at an error is missed."""
    program = stage(tmp_path, WRITING.replace("KEEP", keep))
    found = []
    for number in range(0, 10, 3 if keep else 1):
        folder = trials.emptied(tmp_path / "work")
        found.append(failing_writes.judge(bench, program, error, number / 10, True, folder))
    assert failing_writes.counted(bench, program, tmp_path / "work")[1] == 10
    assert any(found) == bool(keep), found


def test_a_disk_fails_at_the_write_that_was_named(tmp_path):
    """In a process of its own, which the disk stays in."""
    for name, lasts in failing_writes.LASTING.items():
        pid = os.fork()
        if pid == 0:
            failing_writes.Disk(tmp_path / "out", 3, name).install()
            codes = []
            for k in range(4):
                try:
                    (tmp_path / f"out{k}").mkdir()
                    codes.append(0)
                except OSError as error:
                    codes.append(error.errno)
            code = getattr(errno, name)
            os._exit(codes != [0, 0, code, code if lasts else 0])
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        for path in tmp_path.iterdir():
            path.rmdir()


def test_a_kill_that_changes_what_is_made_is_seen(bench, tmp_path, monkeypatch):
    """A program that goes on after what it finds, and adds to it."""
    text = "os.makedirs(out, exist_ok=True)\nopen(f'{out}/{len(os.listdir(out))}', 'w')\ntime.sleep(0.5)"
    monkeypatch.setitem(killed.STAGES, "adding", stage(tmp_path, text))
    found = killed.judge(bench, "adding", 0.5, False, 1, False, (), trials.emptied(tmp_path / "work"))
    assert found == ["afterwards: 1 files differ: out/1"]


def test_hostile_files_are_what_they_say(tmp_path):
    """Else they would be refused for another reason."""
    path = tmp_path / "file"
    hostile.pickled(path, tmp_path)
    pickle.loads(path.read_bytes())
    assert (tmp_path / hostile.MARKER).exists()
    hostile.zip_bomb(path, tmp_path)
    with zipfile.ZipFile(path) as archive, archive.open("features.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0) and path.stat().st_size < 2**23
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        assert np.prod(shape) * dtype.itemsize == 3 * hostile.GIB and file.read(2**20) == bytes(2**20)
    for make in (hostile.png_bomb, hostile.tiff_bomb):
        make(path, tmp_path)
        assert Image.open(path).size == (hostile.SIDE, hostile.SIDE)


def test_the_table_says_how_many_trials_there_are():
    table = re.findall(r"^\| `(\w+)` \| (\d+) \| \d+ \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    there = {kind: len(list(make(None, random.Random(0)))) for kind, make in soak.KINDS.items()}
    assert {kind: int(count) for kind, count in table} == there


def test_a_soak_names_what_did_not_hold(tmp_path, capsys):
    rows = [
        soak.attempt(tmp_path, "kind", 0, ("good", lambda folder: [])),
        soak.attempt(tmp_path, "kind", 1, ("bad", lambda folder: [f"it broke {(folder / 'x').write_text('')}"])),
    ]
    assert soak.as_markdown(rows).splitlines()[2:] == ["| `kind` | 2 | 1 |", "", "- kind: bad: it broke 0"]
    assert (tmp_path / "failed/kind-1/x").exists() and not (tmp_path / "failed/kind-0").exists()
    assert "it broke" in capsys.readouterr().out
