"""
Do to the programs what the worst day does, and count what they survive.

    python scripts/benchmarks/soak.py OUT [--kinds bad_flags,...] [--count N | --scale 0.1] [--only TEXT] [--seed 0]

Every trial runs a program on toy inputs, with a tiny model, in a process of its own, and does it some harm:

    bad_flags        every flag of every program with a value of the wrong type, out of range, and empty
    bad_files        every kind of file that is read, cut off, empty, of another kind, or a folder
    two_runs         a second run in the folder of one, outputs that nobody takes, a rank that stands still
    kill_training    SIGKILL of a training with workers, validation and unlabelled images, of 1 and 2 ranks, half of
                     them inside a save; kill_sampling: of samplings, a sweep of 2 ranks, fields; kill_stages: of others
    failing_writes   EIO, ENOSPC and EACCES at writes of each stage, one after the other
    hostile          pickles, bombs of several kinds, entities, names and links that lead elsewhere

Writes OUT/trials.csv, a row a trial, and OUT/trials.md, a table of how many held, which it prints. What held leaves
nothing behind, and the folder of what did not is OUT/failed/KIND-NUMBER, until the next soak there. Equal seeds make
equal trials, but a moment is never quite the same. --count takes so many of each kind, chosen at random, and --scale a
share of them; --only takes those whose names hold a text, as to see one again that did not hold. A kill that came too
late is no trial. The exit code is 1 where a trial did not hold. Linux only.
"""

import argparse
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import quick_python
from faults import bad_files, bad_flags, failing_writes, killed, two_runs
from faults.trials import Bench, Missed, Trial, children, emptied, orphans

from guided_diffusion import cli
from guided_diffusion.files import csv_text, locked, write_text

KINDS: dict[str, Callable[[Bench, random.Random], Iterator[Trial]]] = {
    "bad_flags": lambda bench, rng: bad_flags.trials(bench),
    "bad_files": lambda bench, rng: bad_files.spoilt(bench),
    "hostile": lambda bench, rng: bad_files.hostile_files(bench),
    "failing_writes": lambda bench, rng: failing_writes.trials(bench),
    "two_runs": lambda bench, rng: two_runs.trials(bench),
    "kill_training": killed.training,
    "kill_sampling": killed.sampling,
    "kill_stages": killed.others,
}
FIELDS = ("kind", "trial", "seconds", "missed", "fault")


def create_argparser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of these")
    parser.add_argument("--count", type=int, help="trials of each kind")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the trials, above 0")
    parser.add_argument("--only", default="", metavar="TEXT", help="trials whose names hold this")
    parser.add_argument("--seed", type=int, default=0, help="of moments and choices")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown --kinds {unknown[0]}: choose some of {', '.join(KINDS)}")
    if (args.count is not None and args.count < 1) or not 0 < args.scale <= 1:
        raise ValueError(f"--count {args.count} must be at least 1, and --scale {args.scale} lie in (0, 1]")
    args.out = args.out.resolve()
    with locked(args.out, "OUT"):
        os.environ["OMP_NUM_THREADS"] = "1"
        shutil.rmtree(args.out / "failed", ignore_errors=True)
        quick_python.load()
        bench, rows = Bench(args.out / "toy"), []
        for kind in kinds:
            rng = random.Random(args.seed)
            trials = [trial for trial in KINDS[kind](bench, rng) if args.only in trial[0]]
            count = args.count or math.ceil(args.scale * len(trials))
            for number, trial in enumerate(rng.sample(trials, min(count, len(trials)))):
                rows.append(attempt(args.out, kind, number, trial))
                write_text(args.out / "trials.csv", csv_text(FIELDS, rows))
                write_text(args.out / "trials.md", as_markdown(rows))
        shutil.rmtree(args.out / "work", ignore_errors=True)
    if not rows:
        raise ValueError(f"--only {args.only}: no trial of {args.kinds} has that in its name")
    print(as_markdown(rows), end="")
    sys.exit(any(row["fault"] for row in rows))


def attempt(out: Path, kind: str, number: int, trial: Trial) -> dict[str, object]:
    """Make a trial; :return: its row. The folder of one that did not hold is kept."""
    name, harm = trial
    folder, begun, missed = emptied(out / "work"), time.monotonic(), False
    before = children()
    try:
        complaints = harm(folder)
    except Missed:
        complaints, missed = [], True
    complaints += orphans(before)
    seconds = time.monotonic() - begun
    if complaints:
        kept = emptied(out / "failed" / f"{kind}-{number}")
        os.replace(folder, kept)
        print(f"{kept}: {name}: {'; '.join(complaints)}", flush=True)
    return dict(kind=kind, trial=name, seconds=round(seconds, 1), missed=missed, fault="; ".join(complaints))


def as_markdown(rows: Sequence[dict[str, object]]) -> str:
    """:return: a table: how many trials of each kind there were, and how many held; and what did not."""
    lines = ["| what | trials | held |", "|---|---|---|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        faults = [row["fault"] for row in rows if row["kind"] == kind and not row["missed"]]
        lines.append(f"| `{kind}` | {len(faults)} | {sum(not fault for fault in faults)} |")
    failed = [f"- {row['kind']}: {row['trial']}: {row['fault']}" for row in rows if row["fault"]]
    return "\n".join([*lines, *([""] if failed else []), *failed]) + "\n"


if __name__ == "__main__":
    cli.run(main)
