"""README and docs/: links, anchors, pictures and paths lead somewhere, and programs take the commands."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from guided_diffusion.histology.formats.data_sets import FORMATS
from guided_diffusion.histology.formats.writers.layouts import LAYOUTS
from guided_diffusion.samplers import SAMPLERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = {"run_train.py", "run_cellvit.py", "config.py", "extract_patches.py"}  # of the tools that export.md names
ROOMS = {"guided_diffusion", "scripts", "tests", "docs", ".ci"}  # a path that begins so is one of the repository
# Launchers that hand the flags at their end on: to a program of ours, or to Snakemake.
HANDED_ON = {
    **dict.fromkeys(("train.sh", "finetune.sh"), "image_train"),
    **dict.fromkeys(("sample.sh", "sample_single.sh"), "image_sample"),
}
SNAKEMAKE = {"--toy", "--dry-run", "--cores", "--retries", "--report", "--profile"}


def without_blocks(page: Path) -> str:
    """A page's text but for its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    names = []
    for heading in re.findall(r"^#+ (.+)$", without_blocks(page), re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.append(name + (f"-{names.count(name)}" if name in names else ""))
    return set(names)


def code(page: Path) -> list[str]:
    """What stands between backticks in a page, without line breaks."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", without_blocks(page))]


def blocks(page: Path) -> list[str]:
    """The commands of a page's shell blocks, continued lines joined."""
    found = re.findall(r"^```shell\n(.*?)^```", page.read_text(), re.S | re.M)
    return [line for block in found for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_a_heading_has_github_s_anchor(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Why this, and not `that`?\n## A_b-c\n```shell\n# no heading\n```\n## A_b-c\n")
    assert anchors(page) == {"why-this-and-not-that", "a_b-c", "a_b-c-1"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", without_blocks(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.is_relative_to(ROOT) and place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_pictures_are_whole_and_shown():
    shown = set()
    for page in PAGES:
        for alt, target in re.findall(r"!\[([^]]*)\]\(([^)\s]+)\)", page.read_text()):
            assert alt, f"{page.name}: {target} says nothing to those who do not see it"
            with Image.open(page.parent / target) as picture:
                picture.verify()
            shown.add((page.parent / target).resolve())
    assert shown == set((ROOT / "images").iterdir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_programs_exist(page):
    words = {word.strip(",;:()[]") for text in [*code(page), *blocks(page)] for word in text.split()}
    for word in words:
        if word.split("/")[0] in ROOMS and "/" in word:
            assert any(ROOT.glob(word)), word
        elif re.fullmatch(r"[\w/]+\.(py|sh|smk|conf)", word) and Path(word).name not in FOREIGN:
            places = [ROOT.glob(word), *((ROOT / room).rglob(word) for room in ("scripts", "guided_diffusion"))]
            assert any(map(any, places)), word


def test_commands_are_ones_that_the_programs_take():
    checked = [check_command(command, whole=True) for page in PAGES for command in blocks(page)]
    assert sum(checked) > 20
    mentioned = [check_command(text, whole=False) for page in PAGES for text in code(page)]
    assert sum(mentioned) > 12


@pytest.mark.parametrize(
    "command",
    [
        "python scripts/evaluate.py --no_such_flag 1",
        "python scripts/train_segmenter.py DATA --results_path OUT --max_steps many",
        "python scripts/segment.py --results_path FOUND",
        "bash scripts/train.sh DATA --no_such_flag 1",
        "bash scripts/sample_single.sh DATA",
        "bash scripts/pipeline.sh RAW OUT --no_such_flag",
        "NO_SUCH_SETTING=1 bash scripts/demo.sh",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, ValueError)):
        check_command(command, whole=True)


def check_command(text: str, whole: bool) -> bool:
    """
    Check a command's settings, flags, their values, and, if whole, how many arguments it has.

    :return: whether it is one of ours.
    :raises AssertionError: where it is not as its program takes it; ValueError: the program's own.
    """
    words = shlex.split(text, comments=True) if whole else text.split()
    found = [find_program(word) for word in words]
    place = next((i for i, program in enumerate(found) if program), None)
    if place is None or not (whole or words[place + 1 :]):
        return False
    sources = [*(ROOT / "scripts").glob("*.sh"), ROOT / "guided_diffusion" / "logger.py"]
    settings = "\n".join(path.read_text() for path in sources)
    for word in words[:place]:
        setting = re.match(r"([A-Z_]+)=", word)
        assert not setting or re.search(rf"\b{setting[1]}\b", settings), text
    check = check_program if found[place].suffix == ".py" else check_launcher
    check(found[place], words[place + 1 :], whole)
    return True


def check_program(program: Path, arguments: list[str], whole: bool) -> None:
    """Have a program's own parser read its arguments."""
    sys.path.append(str(program.parent))  # as it is when the program is run
    parser = importlib.import_module(".".join(program.relative_to(ROOT).with_suffix("").parts)).create_argparser()
    for action in parser._actions:
        action.required = action.required and whole
    parser.parse_args(arguments)


def check_launcher(script: Path, arguments: list[str], whole: bool) -> None:
    """Check that a shell script gets the arguments that it needs, and flags of the program that it hands them on to."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    needed = re.search(r"^need (\d)", script.read_text(), re.M)
    assert not (whole and needed) or first >= int(needed[1]), f"{script.name} needs {needed[1]}"
    known = SNAKEMAKE if script.name in ("pipeline.sh", "experiment.sh") else set()
    if script.name in HANDED_ON:
        known = importlib.import_module(HANDED_ON[script.name]).create_argparser()._option_string_actions
    unknown = {word.partition("=")[0] for word in arguments if word.startswith("--")} - set(known)
    assert not unknown, f"{script.name}: {unknown}"


def find_program(word: str) -> Path | None:
    """The program of this repository that a word of a command names, with or without its folder."""
    if not re.fullmatch(r"[\w/]+\.(py|sh)", word):
        return None
    return next((path for path in (ROOT / word, *(ROOT / "scripts").rglob(word)) if path.is_file()), None)


# ---- troubleshooting.md ----


def said(tree: ast.AST) -> str:
    """A string of Python's syntax tree, with ... for what is filled in."""
    if isinstance(tree, ast.Constant):
        return str(tree.value)
    if isinstance(tree, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in tree.values)
    return "..."


def everything_said() -> list[str]:
    """All strings of our programs; of shell scripts, their lines."""
    folders = [ROOT / "guided_diffusion", ROOT / "scripts"]
    paths = [*ROOT.glob("image_*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    trees = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    strings = [said(node) for node in trees if isinstance(node, (ast.Constant, ast.JoinedStr))]
    return strings + [line for path in (ROOT / "scripts").glob("*.sh") for line in path.read_text().splitlines()]


def quoted_errors() -> list[str]:
    """The lines that troubleshooting.md quotes as a program's: in the first column, but for what others say."""
    rows = re.findall(r"^\| (.*?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    lines = [line for row in rows for line in re.findall(r"`([^`]+)`", row)]
    return [line for line in lines if line not in ("CUDA out of memory", "Killed", "docker stop")]


def test_troubleshooting_quotes_what_programs_say():
    texts, lines = everything_said(), quoted_errors()
    assert len(lines) > 50
    texts = [text for text in texts if " " in text]
    for line in lines:
        # By its own words, in their order, in one string; a shell's ${name} and Python's {name} are what differs.
        pieces = [piece for piece in re.split(r" ?\.\.\. ?", line) if piece.strip(" ,:;()")]
        found = [text for text in texts if all(piece in text for piece in pieces)]
        assert any(re.search(".*".join(map(re.escape, pieces)), text) for text in found), line


# ---- developing.md ----

EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "developing.md").read_text(), re.S | re.M)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: re.findall(r"^(?:class|def) (\w+)", text, re.M)[-1])
def test_worked_examples_work(example, tmp_path, monkeypatch):
    """Each in a folder of its own; what it registers is taken back."""
    assert len(example.splitlines()) < 30 and "assert" in example
    known = [dict(registry) for registry in (SAMPLERS, FORMATS, LAYOUTS)]
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(example, "developing.md", "exec"), {"__name__": "example"})
    finally:
        for registry, before in zip((SAMPLERS, FORMATS, LAYOUTS), known):
            registry.clear()
            registry.update(before)
