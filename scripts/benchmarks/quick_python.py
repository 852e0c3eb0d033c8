"""
An interpreter for the programs of this repository that needs no seconds to start, where a test is about how they work
together and starts dozens: given as PYTHON, it has them run in processes that are forked from one that has imported all
that they need, and has done nothing yet. Given as ENGINE, it does so for the engine, too, and for all that this starts;
but what is sent to the engine's process group does not reach these.

A program gets the command line, folder, environment, input and outputs of its caller, and the signals that are sent to
that. Where the caller is killed, it is killed, too.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("prepare_monuseg", "extract_features", "cluster_patches", "filter_ood", "assemble_set", "train_segmenter")
PROGRAMS += ("segment", "summarise_runs", "make_structures", "evaluate", "export_set", "import_dataset")
PROGRAMS += ("make_toy_monuseg",)
PROGRAMS += tuple(f"experiment.{name}" for name in ("subset_slides", "rival_samples", "experiment_results", "plan"))
PROGRAMS += tuple(f"workflow.{name}" for name in ("run", "stage", "choose_clusters"))
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def quick_python(folder: Path) -> Iterator[Path]:
    """:param folder: an empty one. :return: the path of the interpreter, which works while the with block lasts."""
    place, program = folder / "socket", folder / "python"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, __file__, "serve", place], env=env, stdout=subprocess.PIPE)
    try:
        server.stdout.readline()  # it listens
        words = shlex.join([sys.executable, "-SE", __file__, str(place)])
        program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        program.chmod(0o755)
        yield program
    finally:
        server.kill()
        server.wait()


# ---- the caller's side ----


def call(place: str, argv: list[str]) -> NoReturn:
    """Have a program run, hand on signals, and end as it does."""
    link = socket.socket(socket.AF_UNIX)
    link.connect(place)
    request = json.dumps([argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(link, [len(request).to_bytes(4, "big")], [0, 1, 2])
    link.sendall(request)
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: link.send(bytes([number])))
    answer = link.recv(4)
    code = int.from_bytes(answer, "big", signed=True) if len(answer) == 4 else 1
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# ---- the server's side ----


def load() -> None:
    """Import all that programs need, and do nothing."""
    sys.path.insert(0, str(ROOT))
    for name in ("torch._dynamo", "image_train", "image_sample", *(f"scripts.{name}" for name in PROGRAMS)):
        importlib.import_module(name)
    gc.freeze()  # so that no collection copies the memory that processes share


def serve(place: str) -> NoReturn:
    """Import all, then fork for each caller."""
    load()
    with contextlib.suppress(ImportError):
        importlib.import_module("snakemake.cli").get_argument_parser()  # which imports the executors
    sys.executable = str(Path(place).with_name("python"))
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    print(flush=True)
    while True:
        link, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            attend(link)
        link.close()


def attend(link: socket.socket) -> NoReturn:
    """Run one caller's program in a process of its own."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, descriptors, _, _ = socket.recv_fds(link, 4, 3)
    text = b""
    while len(text) < int.from_bytes(size, "big"):
        part = link.recv(2**16)
        if not part:  # the caller has gone
            os._exit(1)
        text += part
    child = os.fork()
    if child == 0:
        link.close()
        run(*json.loads(text), descriptors)
    for descriptor in (0, 1, 2, *descriptors):  # a caller reads its outputs to their end
        os.close(descriptor)

    def hand_on() -> None:
        while numbers := link.recv(64):
            for number in numbers:
                os.kill(child, number)
        os.kill(child, signal.SIGKILL)

    threading.Thread(target=hand_on, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        link.send(code.to_bytes(4, "big", signed=True))
    os._exit(0)


def run(argv: list[str], folder: str, environment: dict[str, str], descriptors: list[int]) -> NoReturn:
    """Become the program."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    code: object = 0
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
            sys.exit()
        if argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            exec(argv[1], {"__name__": "__main__"})
            sys.exit()
        # As the main module by both names, so that processes that the program spawns can send it objects of its own.
        module = types.ModuleType("__main__")
        module.__file__ = os.path.abspath(argv[0])
        sys.modules["__main__"] = sys.modules["__mp_main__"] = module
        exec(compile(Path(argv[0]).read_bytes(), module.__file__, "exec"), module.__dict__)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    # What an interpreter does at its end, but for taking all apart, which would take longer than most programs.
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:
        os._exit(120)  # as an interpreter does
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "serve" else call(sys.argv[1], sys.argv[2:])
