"""
Run a workflow of Snakemake in OUT, for pipeline.sh and experiment.sh.

    python scripts/workflow/run.py WORKFLOW.smk RAW OUT [--test_slides] [--parallel N] [flags of snakemake ...]

Settings come from the environment, see the callers. What is known here before anything is written: whether RAW holds
slides, and whether they have changed, by their content; which files of finished stages have gone, so that those are
made again. With --keep-going, a stage that fails then is left out with what builds on it, and the others go on.
TIME_LIMIT ends the run after these seconds. A limit, SIGTERM, SIGUSR1 or Ctrl-C reaches all running stages, which
save what they can; then the exit code is 75, and the same command goes on. Where a stage refuses what a user gave, its
line comes last, and the exit code is 2.
"""

import contextlib
import getpass
import graphlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from functools import partial
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from guided_diffusion import cell_classes, cli, failures, files, processes, signals
from guided_diffusion.histology.slides.annotations import TEST_SPLIT, Slide, find_slides
from guided_diffusion.image_files import EXTENSIONS
from guided_diffusion.slides import TABLE
from guided_diffusion.unlabelled import folder_names

# The outputs of jobs are seals, whose content decides. Another version of a program does not redo days of training.
ENGINE = (
    "--rerun-triggers mtime params input --max-checksum-file-size 1000000000 --rerun-incomplete --nolock "
    "--quiet host progress"
).split()
# Flags of snakemake that run nothing.
LOOKS = {"--report", "--dag", "--rulegraph", "--filegraph", "--d3dag", "--summary", "-S", "--detailed-summary", "-D"}
LOOKS |= {"--list-rules", "-l", "--list-target-rules", "--lt", "--touch", "-t", "--unlock", "--help", "-h", "--version"}
REMOTE = {"--executor", "-e", "--profile"}
PLACES = {"--cores", "-c", "--jobs", "-j"}
KEEP_GOING = {"--keep-going", "-k"}
REMOTE_CORES = 4  # that a job of a queue asks for, for each of its GPUs: a training and what reads its data
GRACE = 60  # seconds from a limit to the end of what does not stop


def main(argv: list[str] | None = None) -> None:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("workflow", metavar="WORKFLOW.smk", type=Path)
    parser.add_argument("raw", metavar="RAW", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--test_slides", action="store_true", help="RAW must hold some")
    parser.add_argument("--parallel", type=int, default=1, help="stages that may share the machine")
    args, flags = parser.parse_known_args(argv)
    limit = os.environ.get("TIME_LIMIT") or None
    if limit is not None and not (limit.isdecimal() and int(limit)):
        raise ValueError(f"TIME_LIMIT={limit} is not a number of seconds")
    without_masks = os.environ.get("UNLABELLED", "")
    inputs = [args.raw, *map(Path, folder_names(without_masks))]
    files.check_apart(args.out, inputs, args.out / "patches", "OUT")
    names = {flag.partition("=")[0] for flag in flags}
    slides = find_slides(args.raw) if args.raw.exists() else []
    if args.test_slides and not any(slide.split == TEST_SPLIT for slide in slides):
        raise ValueError(f"RAW {args.raw} has no test slides: the experiment needs some")
    resources = settings(args.parallel, remote=bool(names & REMOTE))
    environment = {"SDM_RAW": str(args.raw.absolute()), "SDM_SLIDES": checksum(args.raw, slides), **resources}
    environment |= images_without_masks(without_masks)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(args.workflow.resolve())]
    command += ["--directory", str(args.out), *ENGINE]
    command += ["--nocolor"] if os.environ.get("NO_COLOR") else []
    if not names & (REMOTE | PLACES):
        command += ["--cores", environment["SDM_ALL_CORES"]]
    if not names & REMOTE and environment["SDM_GPUS"]:
        command += ["--resources", f"gpu={len(environment['SDM_GPUS'].split(','))}"]
    runner = Runner(args.out, {**os.environ, **environment}, int(limit) if limit else None, bool(names & REMOTE))
    gone = [] if names & LOOKS else stages_without_files(args.out)
    left_out = make_again(gone, runner, [*command, *flags], bool(names & KEEP_GOING)) if gone else []
    runner.run([*command, *flags, *left_out])
    runner.finish()


def make_again(gone: list[str], runner: "Runner", command: list[str], keep_going: bool) -> list[str]:
    """
    Run finished stages whose files have gone, in their order.

    :param command: the engine's, of the run; keep_going: whether a failure does not end it.
    :return: flags of the engine that leave out the stages that failed, with what builds on them.
    """
    needed, left_out = runner.outputs(command), []
    for name in gone:
        seal = f"stages/{name}.json"
        if seal in needed:
            # By itself: what builds on it is done anew only where something else is made this time.
            print(f"files of {name} have gone: they are made again", flush=True)
            if not runner.run([*command, *left_out, "--forcerun", seal, "--until", seal]):
                if not keep_going:
                    runner.finish()
                left_out += [seal] if left_out else ["--omit-from", seal]
    return left_out


def settings(parallel: int, remote: bool) -> dict[str, str]:
    """:return: what a stage takes of the machine, for wiring.py and stage.py, as variables of the environment."""
    cores = len(os.sched_getaffinity(0))
    each = int(os.environ.get("NPROC") or 1)
    if remote:  # whatever this machine has
        gpus: list[str] = []
        each = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else each
        shared = REMOTE_CORES * max(1, each)
    else:
        gpus = visible_gpus()
        each = min(each, len(gpus))
        shared = max(1, cores // (len(gpus) // each if each else parallel))
    return {
        "SDM_GPUS": ",".join(gpus),
        "SDM_GPUS_EACH": str(each),
        "SDM_ALL_CORES": str(cores),
        "SDM_CORES": os.environ.get("OMP_NUM_THREADS") or str(shared),
        # Threads that wait do so asleep: where anything else runs beside, spinning would slow training tenfold.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY") or "PASSIVE",
        "LOGNAME": user(),
    }


def user() -> str:
    """:return: who runs this, which the engine asks for: by a number where the machine knows no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container that is run with --user
        return str(os.getuid())


def images_without_masks(folders: str) -> dict[str, str]:
    """
    :param folders: UNLABELLED, a folder or several with commas between them.
    :return: UNLABELLED for stages, which run in OUT; and SDM_UNLABELLED, a checksum of names and sizes, so that the
        folders may move.
    """
    if not folders:
        return {"SDM_UNLABELLED": ""}
    names = folder_names(folders)
    for name in names:
        if not files.is_remote(name) and not os.path.isdir(name):
            raise FileNotFoundError(f"UNLABELLED={folders}: {name!r} is not a folder: give one of images")
    listed = [files.fingerprint(files.list_files(name, EXTENSIONS)) for name in names]
    paths = [name if files.is_remote(name) else os.path.abspath(name) for name in names]
    return {"UNLABELLED": ",".join(paths), "SDM_UNLABELLED": " ".join(listed)}


def checksum(raw: Path, slides: list[Slide]) -> str:
    """:return: a checksum of the names, in their folder, and the content of slides."""
    total = hashlib.sha256()
    files = {path for slide in slides for path in (slide.image, slide.annotation, slide.class_mask) if path}
    facts = {raw / name for name in (TABLE, cell_classes.TABLE) if (raw / name).exists()}
    for path in sorted(files | (facts if slides else set())):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(raw)} {content}\n".encode())
    return total.hexdigest()


def visible_gpus() -> list[str]:
    """:return: the GPUs that CUDA_VISIBLE_DEVICES names, or all; none where the driver knows of none."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    count = sum(line.startswith("GPU ") for line in found.splitlines())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if chosen is None else [name for name in chosen.split(",") if name]


def stages_without_files(out: Path) -> list[str]:
    """:return: finished stages some of whose files are missing, or of another size; each after those it builds on."""
    seals = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (out / "stages").glob("*.json")}
    order = graphlib.TopologicalSorter({name: seal["made_with"]["given"] for name, seal in seals.items()})
    return [name for name in order.static_order() if name in seals and not is_whole(seals[name]["files"], out)]


def is_whole(listing: dict[str, tuple[int, str]], out: Path) -> bool:
    """:return: whether the files of a seal are there, by their sizes."""
    try:
        return all((out / name).lstat().st_size == size for name, (size, _) in listing.items())
    except (FileNotFoundError, NotADirectoryError):
        return False


class Runner:
    """Runs the engine in a folder; a signal or the limit ends it and the stages that it runs."""

    def __init__(self, out: Path, environment: dict[str, str], limit: int | None, remote: bool) -> None:
        self.out, self.remote, self.name = out, remote, uuid.uuid4().hex
        self.environment = {**environment, failures.RUN: self.name}
        self.end = time.monotonic() + limit if limit else float("inf")
        self.stopped = ""
        self._told = False  # whether the engine knows that it is to stop
        self._since = math.inf  # when it was told
        self._code = 0  # of the last command that failed
        self._child: subprocess.Popen | None = None
        for number in signals.heeded():
            signal.signal(number, self._signalled)

    def run(self, command: list[str]) -> bool:
        """:return: whether the command ends well. :raises SystemExit: where it was stopped."""
        if not self.stopped:
            # A session of its own, so that the terminal's Ctrl-C reaches it once, from here.
            self._child = subprocess.Popen(
                command,
                env=self.environment,
                start_new_session=True,
                preexec_fn=partial(signals.end_with_parent, signal.SIGKILL, os.getpid()),
            )
            if self.stopped and not self._told:  # before the engine was known
                self._tell()
        code = self._wait() if self._child else 1
        self._child = None
        if code and self.stopped:
            print(f"{self.stopped}: not finished, the same command goes on", flush=True)
            sys.exit(cli.NOT_FINISHED)
        self._code = (code if code >= 0 else 128 - code) or self._code
        return not code

    def finish(self) -> None:
        """Say what failed, if anything did. :raises SystemExit: then."""
        if self._code:
            code, text = failures.report(self.out, self.name, self._code)
            sys.stderr.write(text)
            sys.exit(code)

    def outputs(self, command: list[str]) -> set[str]:
        """:return: the outputs of all jobs that have been or would be run, as far as the engine can say."""
        command = [*command, "--summary", "--quiet", "all"]
        table = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, text=True).stdout
        return {line.partition("\t")[0] for line in table.splitlines()}

    def _wait(self) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return processes.wait(self._child, self.end - time.monotonic())
        self._stop(f"TIME_LIMIT={os.environ['TIME_LIMIT']} is over")
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._child.wait(GRACE)
        self._kill()
        return self._child.wait()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        # A closed terminal hangs up twice, and a cluster may say that it ends what a limit has ended.
        if not self.stopped:
            self._stop(signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() > self._since + signals.ONE_CTRL_C_S:
            self._kill()

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        if self._child:
            self._tell()

    def _tell(self) -> None:
        """The engine starts nothing more then, and waits for its jobs, which get the signal, too."""
        self._told, self._since = True, time.monotonic()
        self._send(signal.SIGTERM)
        if self.remote:
            self._child.send_signal(signal.SIGINT)  # it cancels the jobs that it has queued

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    def _kill(self) -> None:
        """All of the engine's session, for the commands of stages are groups of their own."""
        for entry in os.listdir("/proc") if self._child else ():
            with contextlib.suppress(ValueError, OSError):
                if os.getsid(int(entry)) == self._child.pid:
                    os.kill(int(entry), signal.SIGKILL)


if __name__ == "__main__":
    cli.run(main)
