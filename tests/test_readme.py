"""What the README and docs/ say of flags: they exist, their table is true, and a command's flags fit each other."""

import re
import shlex
from pathlib import Path

import flag_table
import pytest

import image_sample
import image_train
from guided_diffusion.script_util import condition_spec

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
PARSERS = {"image_train.py": image_train.create_argparser(), "image_sample.py": image_sample.create_argparser()}


def commands() -> list[list[str]]:
    """The words of every command in a shell block, continued lines joined."""
    blocks = re.findall(r"```shell\n(.*?)```", TEXT, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("script", PARSERS)
def test_commands_parse_and_their_condition_fits(script):
    found = [words for words in commands() if script in words]
    assert found
    for words in found:
        flags = vars(PARSERS[script].parse_args(words[words.index(script) + 1 :]))
        channels = condition_spec(flags).channels
        assert flags["class_cond"] or channels == flags["num_classes"]


def test_flags_md_says_what_the_flags_are():
    assert flag_table.PAGE.read_text() == flag_table.page(), "run python -m tests.flag_table"
    for script, letter in (("image_train.py", "t"), ("image_sample.py", "s")):
        rows = re.findall(rf"^\| `--(\w+)`[ +]*\|[^|]*\|[^|]*\|[ ts]*{letter}[ ts]*\|", flag_table.tables(), re.M)
        assert sorted(rows) == sorted(vars(PARSERS[script].parse_args([])))


def test_every_flag_written_out_is_known():
    known = {action.dest for parser in PARSERS.values() for action in parser._actions}
    sources = "".join(
        path.read_text() for folder in ("scripts", "guided_diffusion") for path in (ROOT / folder).rglob("*.py")
    )
    known |= set(re.findall(r"\"--(\w+)\"", sources))
    others = {"gpus", "rm", "name", "nproc_per_node", "shm", "toy", "user", "init", "time"}
    others |= {"dry", "cores", "retries", "report", "profile", "keep"}  # of snakemake
    others |= {"mem", "signal", "mpi"}  # of Slurm
    others |= {"gpu", "train", "dir", "test_dir", "min_train_masks", "config"}  # of the tools that export.md names
    for flag in set(re.findall(r"--([a-z]\w+)", TEXT)) - others:
        assert flag in known, flag
