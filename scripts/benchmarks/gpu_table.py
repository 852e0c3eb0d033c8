"""
Make the table of what scripts/gpu_check.sh ran: python scripts/benchmarks/gpu_table.py OUT DEVICE

OUT holds parts.csv, a row a part: its name, seconds, exit code; of each training a folder with config.json and
progress.csv; and sampling.log, of benchmark_sampling.py. The table has the columns of README's "What it costs".
"""

import argparse
import csv
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from guided_diffusion import cli

HEAD = ("device", "training: flags", "memory", "images a second", "sampling, 25 steps")
SHOWN = ("batch_size", "microbatch", "precision", "use_fp16", "use_checkpoint")  # of a training's flags
PLAIN = ("-1", "", False)  # their defaults
SAMPLER, STEPS = "dpmpp_2m_sde", "25"


def table(out: Path, device: str) -> str:
    """:return: a table in Markdown, a row a training, and below it what failed. :param out: see above."""
    runs = sorted(path.parent for path in out.glob("*/progress.csv"))
    sampled = sampling(out / "sampling.log")
    rows = [HEAD, ("---",) * len(HEAD), *((device, *training(run), sampled) for run in runs)]
    lines = ["|" + "|".join(row) + "|" if row[0] == "---" else f"| {' | '.join(row)} |" for row in rows]
    with open(out / "parts.csv", newline="") as file:
        parts = list(csv.reader(file))
    lines += ["", *(f"{name}: {seconds} s, {_outcome(out, name, code)}" for name, seconds, code in parts)]
    return "\n".join(lines) + "\n"


def training(run: Path) -> tuple[str, str, str]:
    """
    :param run: the folder of a training.
    :return: its flags, the most memory that it took, and its images a second: the median of its rows but the first, in
        which cuDNN tries its kernels.
    """
    config = json.loads((run / "config.json").read_text())
    flags = " ".join(f"--{name} {config[name]}" for name in SHOWN if config[name] not in PLAIN)
    with open(run / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    memory = max((float(row["peak_memory_mib"]) for row in rows), default=0.0)
    speeds = [float(row["images_per_s"]) for row in rows[1:]]
    speed = f"{statistics.median(speeds):.3g} (measured)" if speeds else "too few steps"
    return f"`{flags}`", f"{memory / 2**10:.1f} GiB (measured)", speed


def sampling(log: Path) -> str:
    """:return: how long benchmark_sampling.py took an image in the steps that README speaks of, and how it computed."""
    text = log.read_text() if log.exists() else ""
    ways = re.findall(r"^\| (.+) \| steps \|", text, re.M)
    speeds = re.findall(rf"^\| {SAMPLER} \| {STEPS} \| [\d.]+ \| ([\d.]+) \|", text, re.M)
    if not ways or not speeds or not float(speeds[-1]):
        return "failed"
    return f"{1 / float(speeds[-1]):.2g} s an image ({ways[-1]}, measured)"


def _outcome(out: Path, name: str, code: str) -> str:
    return "done" if code == "0" else f"failed with exit code {code}: see {out / name}.log"


def create_argparser() -> argparse.ArgumentParser:
    """:return: a parser of every flag, with its default."""
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="what gpu_check.sh wrote")
    parser.add_argument("device", metavar="DEVICE", help="what to call the GPU")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    args = create_argparser().parse_args(argv)
    if not (args.out / "parts.csv").is_file():
        raise ValueError(f"{args.out} has no parts.csv: give the folder that scripts/gpu_check.sh wrote to")
    print(table(args.out, args.device), end="")


if __name__ == "__main__":
    cli.run(main)
