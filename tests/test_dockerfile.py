import fnmatch
import json
import re
import shlex
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, comments dropped and continued lines joined."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def arguments(name: str) -> list[str]:
    return [text for instruction, text in instructions() if instruction == name]


def copied() -> list[str]:
    """Every path of the repository that is copied."""
    return [word for text in arguments("COPY") for word in shlex.split(text)[:-1] if not word.startswith("--")]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path, or a folder it lies in, out of the build; it has no exceptions (!)."""
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [rule.strip("/") for rule in rules if rule and not rule.startswith("#")]
    path = PurePosixPath(path)
    for part in (path, *path.parents[:-1]):
        for rule in rules:
            deep = rule.startswith("**/") and fnmatch.fnmatchcase(part.name, rule[3:])
            if deep or ("/" not in rule and fnmatch.fnmatchcase(str(part), rule)):
                return True
    return False


def test_base_is_pinned():
    (base,) = arguments("FROM")
    image, _, tag = base.partition(":")
    assert re.fullmatch(r"[a-z0-9/_-]+", image)
    assert re.match(r"\d+\.\d+\.\d+-", tag)
    assert "cuda" in base


def test_base_holds_the_torch_that_is_pinned():
    (base,) = arguments("FROM")
    (pinned,) = re.findall(r"^torch==([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert base.startswith(f"pytorch/pytorch:{pinned}-cuda")


def test_copied_paths_exist_and_reach_the_build():
    assert {"requirements.txt", "guided_diffusion", "scripts", "image_train.py", "image_sample.py"} <= set(copied())
    for path in copied():
        assert (ROOT / path).exists(), path
        assert not ignored(path), path


def test_programs_come_whole():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("guided_diffusion/**/*.py"), *ROOT.glob("scripts/*")]:
        relative = path.relative_to(ROOT)
        if "__pycache__" not in relative.parts:
            assert relative.parts[0] in copied()
            assert not ignored(str(relative)), relative


@pytest.mark.parametrize(
    "path", [".git", ".venv/bin/python", "data/raw/a.tif", "OUTPUT/model.pt", "demo_output/toy", "a/__pycache__/b.pyc"]
)
def test_no_history_data_or_results(path):
    assert ignored(path)


def test_all_that_git_ignores_stays_out():
    for line in (ROOT / ".gitignore").read_text().split():
        assert ignored(line.strip("/").replace("*", "a")), line


def test_requirements_are_all_that_pip_installs():
    commands = [command.strip() for text in arguments("RUN") for command in text.split("&&")]
    (install,) = [command for command in commands if "pip" in command]
    words = shlex.split(install)
    rest = [word for word in words[words.index("install") + 1 :] if word != "--no-cache-dir"]
    assert rest == ["--requirement", "requirements.txt"]
    requirements = (ROOT / "requirements.txt").read_text()
    for package in ("torch", "mpi4py", "mpich"):
        assert re.search(rf"^{package}==[\d.]+$", requirements, re.M)


def test_runs_as_a_user_who_owns_the_project():
    (user,) = arguments("USER")
    assert user not in ("root", "0")
    assert any(f"useradd --create-home {user}" in text for text in arguments("RUN"))
    assert all(f"--chown={user}:{user}" in text for text in arguments("COPY"))


def test_bash_is_the_command():
    """So `docker run IMAGE bash` works, no entry point may be in its way."""
    assert [json.loads(text) for text in arguments("CMD")] == [["bash"]]
    assert not arguments("ENTRYPOINT")


def test_environment_is_where_setup_looks():
    (folder,) = arguments("WORKDIR")
    assert any(f"PATH={folder}/.venv/bin:$PATH" in text for text in arguments("ENV"))
    assert any("-m venv --system-site-packages .venv" in text for text in arguments("RUN"))
