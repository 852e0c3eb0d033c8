import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
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


def test_all_that_git_knows_reaches_the_build():
    """What is copied one by one, for the layers, and then the whole: programs, and what the tests look at."""
    assert copied()[-1] == "." and "requirements.txt" in copied()
    for path in copied()[:-1]:
        assert (ROOT / path).exists(), path
    for path in ROOT.rglob("*"):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("guided_diffusion", "scripts", "tests", "docs", "images", ".ci", "README.md"):
            assert "__pycache__" in relative.parts or path.suffix == ".pyc" or not ignored(str(relative)), relative


@pytest.mark.parametrize(
    "path", [".git", ".venv/bin/python", "data/raw/a.tif", "OUTPUT/model.pt", "demo_output/toy", "a/__pycache__/b.pyc"]
)
def test_no_history_data_or_results(path):
    assert ignored(path)


def test_all_that_git_ignores_stays_out():
    for line in (ROOT / ".gitignore").read_text().split():
        assert ignored(line.strip("/").replace("*", "a")), line


def test_setup_installs_all_that_is_pinned():
    commands = [command.strip() for text in arguments("RUN") for command in text.split("&&")]
    assert not [command for command in commands if "pip install" in command]
    assert "PIP_NO_CACHE_DIR=1 bash scripts/setup.sh workflow" in commands
    requirements = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-workflow.txt").read_text()
    for package in ("torch", "mpi4py", "mpich", "pytest", "snakemake"):
        assert re.search(rf"^{package}==[\d.]+$", requirements, re.M)


def test_runs_as_a_user_who_owns_the_project():
    (user,) = arguments("USER")
    assert user not in ("root", "0")
    assert any(f"useradd --create-home {user}" in text for text in arguments("RUN"))
    assert all(f"--chown={user}:{user}" in text for text in arguments("COPY"))


def test_an_init_hands_signals_to_any_command():
    """So `docker run IMAGE bash scripts/train.sh DATA` works, and saves at `docker stop`."""
    assert [json.loads(text) for text in arguments("ENTRYPOINT")] == [["tini", "--"]]
    assert [json.loads(text) for text in arguments("CMD")] == [["bash"]]
    assert any("tini" in text for text in arguments("RUN"))


def test_the_compiler_of_compile_is_brought():
    """A runtime image has none, and the container's user may not install one."""
    installed = re.findall(r"apt-get install (.*?)&&", " ".join(arguments("RUN")))
    assert {"g++", "python3-dev"} <= set(" ".join(installed).split())


def variables() -> dict[str, str]:
    return dict(word.split("=", 1) for text in arguments("ENV") for word in shlex.split(text))


def test_environment_is_where_setup_looks():
    (folder,) = arguments("WORKDIR")
    assert any(f"PATH={folder}/.venv/bin:$PATH" in text for text in arguments("ENV"))
    assert any("-m venv --system-site-packages .venv" in text for text in arguments("RUN"))


def test_any_user_may_write_where_caches_and_results_go():
    made = " ".join(arguments("RUN")).partition("--mode=1777 ")[2].split()
    assert {"OUTPUT", "RESULTS", "demo_output", variables()["XDG_CACHE_HOME"]} <= set(made)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="takes another user")
def test_another_user_without_a_home(tmp_path):
    """Who may read all, and write to none of it: what caches itself is imported, and tests are found."""
    environment = {name: value for name, value in variables().items() if "CACHE" in name or "CONFIG" in name}
    environment = {name: value.replace("/tmp", str(tmp_path)) for name, value in environment.items()}
    tmp_path.chmod(0o777)
    package = tmp_path / "packages" / "cached.py"
    package.parent.mkdir()
    package.write_text("import numba\n\n@numba.njit(cache=True)\ndef one():\n    return 1\n")
    environment |= {"HOME": "/", "PATH": os.environ["PATH"], "PYTHONPATH": str(package.parent)}
    user = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
    user += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    imports = "import umap, matplotlib.pyplot, pytest, sys; from scripts.workflow import run; print(run.user()); "
    imports += "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests/test_dist_util.py']))"
    # UMAP is compiled as it is imported, as `cached` is when it is called, but for a minute.
    for words, rest in (("import cached; cached.one()", {}), (imports, {"NUMBA_DISABLE_JIT": "1"})):
        run = subprocess.run(
            [*user, sys.executable, "-c", words], cwd=ROOT, env={**environment, **rest}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert any(Path(environment["NUMBA_CACHE_DIR"]).rglob("cached.one-*.nbi"))
