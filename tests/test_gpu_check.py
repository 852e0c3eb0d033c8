"""gpu_check.sh without a GPU: what it refuses, what it would run, by a Python that only notes it, and its table."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import check_program

from scripts.benchmarks import gpu_table

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = """| float16, channels_last | steps | s a batch | images/s | times the plain chain |
|---|---|---|---|---|
| ddim | 25 | 2.0 | 8.000 | 70 |
| dpmpp_2m_sde | 25 | 3.2 | 5.000 | 60 |
"""
# Answers what the script asks, trains and samples as FAIL says, and has the real one make the table.
STUB = """#!/bin/sh
case "$*" in
    *find_spec*) exit ;;
    *get_device_properties*) echo "80 NVIDIA A100-SXM4" ;;
    *gpu_table.py*) exec {python} "$@" ;;
    *) printf '%s\\037' "$@" >>{record}; printf '\\036' >>{record} ;;
esac
case "$*" in
    *benchmark_sampling*) printf '%s\\n' '{sampling}' ;;
    *image_train*)
        mkdir "$OPENAI_LOGDIR" && cp {run}/* "$OPENAI_LOGDIR"
        if [ "${{OPENAI_LOGDIR##*/}}" = "$FAIL" ]; then echo "error: no memory" >&2; exit 2; fi ;;
esac
"""


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def write_run(folder, rows=3, **flags):
    """What a training leaves: images a second are 100, 10, 20, ..."""
    folder.mkdir()
    config = {"batch_size": 8, "microbatch": "-1", "precision": "", "use_fp16": False, "use_checkpoint": True, **flags}
    (folder / "config.json").write_text(json.dumps(config))
    speeds = [100, 10, 20, 30][:rows]
    lines = [f"{5 * k},{speed},{2048 + k}" for k, speed in enumerate(speeds)]
    (folder / "progress.csv").write_text("\n".join(["step,images_per_s,peak_memory_mib", *lines, ""]))


def check(tmp_path, *arguments, **env):
    """:return: exit code, lines on stdout, lines on stderr."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    write_program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    run = subprocess.run(
        ["bash", ROOT / "scripts" / "gpu_check.sh", *arguments],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return run.returncode, run.stdout.splitlines(), run.stderr.splitlines()


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ([], {}, "usage: bash scripts/gpu_check.sh OUT"),
        (["out", "--more"], {}, "error: gpu_check.sh takes one folder, not also --more"),
        (["bin"], {}, "error: bin is there already: give a new folder"),
        (["out"], {"RAW": "none"}, "error: RAW=none is not a folder: .*"),
        (["out"], {}, "error: there is no GPU here: .*"),
        (["out"], {"PYTHON": "no-python"}, "error: no-python does not run: .*"),
        (["out"], {"PYTHON": "./bare"}, "error: ./bare lacks torch numpy .* pytest: .*"),
        (["out"], {"PYTHON": sys.executable}, "error: --device cuda: there is no GPU.*"),
    ],
)
def test_refused_in_one_line(tmp_path, arguments, env, message):
    write_program(tmp_path / "bare", f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    code, out, err = check(tmp_path, *arguments, **env)
    said = [line for line in err if "command not found" not in line]  # which bash says of a PYTHON that is none
    assert code == 2 and out == [] and len(said) == 1 and re.fullmatch(message, said[0]), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fail", ["", "auto"])
def test_what_is_run_and_what_is_left(tmp_path, fail):
    write_run(tmp_path / "run")
    record = tmp_path / "record"
    stub = STUB.format(python=sys.executable, record=record, sampling=SAMPLING, run=tmp_path / "run")
    code, out, _ = check(tmp_path, "out", PYTHON=write_program(tmp_path / "python", stub), FAIL=fail)
    assert code == (1 if fail else 0)
    table = (tmp_path / "out" / "gpu.md").read_text().splitlines()
    assert out[-len(table) :] == table and len([line for line in table if line.startswith("| NVIDIA A100")]) == 3
    assert [line.split(": ")[0] for line in table if "failed" in line] == ([fail] if fail else [])
    limits = [int(line.split()[-2]) for line in out[: -len(table)]]
    assert len(limits) == 9 and sum(limits) + 3 * 20 <= 540  # with what trainings may take to save
    calls = [call.split("\037")[:-1] for call in record.read_text().split("\036")[:-1]]
    for program, *arguments in calls[2:]:
        check_program(Path(program), arguments, whole=True)
    trained = [call for call in calls if "image_train.py" in call[0]]
    assert [call[call.index("--data_dir") + 1] for call in trained] == [str(tmp_path / "out" / "patches")] * 3


def test_the_table_has_the_readmes_columns(tmp_path):
    write_run(tmp_path / "one", use_fp16=True)
    write_run(tmp_path / "two", rows=1, batch_size=64, microbatch="auto", precision="bf16", use_checkpoint=False)
    (tmp_path / "sampling.log").write_text(SAMPLING)
    (tmp_path / "parts.csv").write_text("tests,12,0\ntwo,40,137\n")
    memory, sampled = "2.0 GiB (measured)", "0.2 s an image (float16, channels_last, measured)"
    assert gpu_table.table(tmp_path, "A").splitlines() == [
        next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| device |")),
        "|---|---|---|---|---|",
        f"| A | `--batch_size 8 --use_fp16 True --use_checkpoint True` | {memory} | 15 (measured) | {sampled} |",
        f"| A | `--batch_size 64 --microbatch auto --precision bf16` | {memory} | too few steps | {sampled} |",
        "",
        "tests: 12 s, done",
        f"two: 40 s, failed with exit code 137: see {tmp_path / 'two.log'}",
    ]
    (tmp_path / "sampling.log").unlink()
    assert gpu_table.table(tmp_path, "A").count("| failed |") == 2
    with pytest.raises(ValueError, match=r"has no parts\.csv: give the folder that scripts/gpu_check.sh wrote to"):
        gpu_table.main([str(tmp_path / "one"), "H200"])
