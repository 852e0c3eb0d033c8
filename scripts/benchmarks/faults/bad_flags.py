"""Every flag of every program with a value of the wrong type, out of range, and empty: one line, exit code 2, and
nothing written. What is tried follows from the parsers."""

import argparse
import runpy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .toy import STAGES, Stage
from .trials import ROOT, Bench, Trial, differing, leftovers, limit_memory, stamps, untouched

# Stages that between them have every program once, each at its quickest.
PROGRAMS = ("toy", "prepare", "import", "features", "clusters", "structures", "segmenter", "segment", "training")
PROGRAMS += ("sampling", "filter", "assembly", "export", "evaluate", "publish", "subset", "rival")
HUGE = "1" + 25 * "0"  # which a flag without a limit may take: it must not end in a traceback, or without memory
# Flag -> values that are no mistakes. Empty is the same as left out where that is the default, which is not tried.
FINE: dict[str, set[str]] = {
    "data_licence": {"", "nonsense"},  # any words
    "attention_resolutions": {""},  # nowhere
    "results_path": {"nonsense"},  # names of folders that are not there yet
    "out_name": {"nonsense"},
}


def values(action: argparse.Action) -> Iterator[str]:
    """:return: what a flag must not be given, by its type."""
    kind = getattr(action.type, "__name__", "str")
    if action.default != "":
        yield ""
    yield "/dev/null/x" if kind == "Path" else "nonsense"
    if kind in ("int", "float"):
        yield from ("-7", HUGE, "nan")
    if kind == "float":
        yield from ("inf", "1e999")


def cases(name: str) -> Iterator[tuple[str, str]]:
    """:return: flags with their dashes, and values, of the program of a stage."""
    program = ROOT / STAGES[name].command.split()[0]
    parser = runpy.run_path(str(program))["create_argparser"]()
    for action in parser._actions:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            continue
        flag = action.option_strings[0]
        for value in values(action):
            if value not in FINE.get(flag.lstrip("-"), ()):
                yield flag, value


def trials(bench: Bench) -> Iterator[Trial]:
    """:return: a trial of each case."""
    for name in PROGRAMS:
        for flag, value in cases(name):
            yield f"{name} {flag} {value!r}", partial(refuse, bench, STAGES[name], [f"{flag}={value}"], value == HUGE)


def refuse(bench: Bench, stage: Stage, extra: list[str], may: bool, folder: Path) -> list[str]:
    """:return: complaints, unless the stage refuses flags, and has changed nothing; or, where it may, ends well."""
    bench.provide(stage)
    out = stage.prepare(bench.toy, folder)
    complaints: list[str] = []
    with untouched(bench.toy, complaints, "inputs"):
        before = stamps(out)
        done = bench.run(stage, folder, extra, harm=limit_memory)
    if may and not done.well():
        return complaints
    if out.exists() and not stage.seed:
        complaints.append(f"{out.name} was made")
    return [*done.refused(), *complaints, *differing(stamps(out), before, "outputs"), *leftovers(folder, out)]
