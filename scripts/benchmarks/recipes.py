"""
Which recipe learns most in the same time? Trains small models for equal CPU time and measures their samples.

    python scripts/benchmarks/recipes.py RAW OUT [--recipes x,v ...] [--seeds 0,1,2] [--minutes 5,10,20] [--jobs 2]

The model is that of scripts/experiment/experiment_cpu.conf, on patches of its own size; MODEL and what stands beside it
say what all recipes have in common. A minute is one of process time of one thread that has the machine to itself. First
the cost of each recipe's step is measured, in one process in turn, the least of several rounds: OUT/costs.csv. A run is
trained for as many steps as --minutes pay for, whatever else the machine does meanwhile, and its averaged weights are
sampled from. Most recipes are trained on 24 of MoNuSeg's training slides and measured on the other 6, which --seed
chooses; those of three slides, with or without images of the other 27, on the 14 test slides. Structures and colours of
the samples are those of slides that no training saw, and so are the real patches that they are compared with. The
agreement is by a segmenter trained on the annotated slides that are not measured on.

Writes OUT/recipes.csv, a row a run and mark, OUT/recipes.md, means over the seeds, and OUT/recipes.png. What stands in
the first, of as many steps as OUT/costs.csv says, is not measured again, and what was broken off goes on. With
recipes.csv and costs.csv of docs/results/ in it, a new OUT goes on with these.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch as th

import image_train
from guided_diffusion import checkpoint_sets, cli, logger, magnification, signals
from guided_diffusion.data_stream import stream
from guided_diffusion.devices import keep_memory
from guided_diffusion.figures import save_png
from guided_diffusion.files import csv_text, leading, locked, replace_folder, write_json, write_text, writing
from guided_diffusion.fp16_util import compute_dtype
from guided_diffusion.histology.features.cluster_folders import list_patches
from guided_diffusion.histology.slides.annotations import TEST_SPLIT, TRAIN_SPLIT, find_slides
from guided_diffusion.script_util import (
    args_to_dict,
    condition_spec,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.slides import write_table
from guided_diffusion.train_options import TrainOptions
from guided_diffusion.train_util import TrainLoop

ROOT = Path(__file__).resolve().parents[2]
PATCHES = "--patch_size 64 --stride 64 --resize 32"
MODEL = (
    "--image_size 32 --num_channels 32 --channel_mult 1,2,2 --num_res_blocks 1 --num_head_channels 32"
    " --attention_resolutions 8 --resblock_updown True --use_scale_shift_norm True --noise_schedule cosine"
    " --learn_sigma False --predict_v True --spade_channels 32 --num_classes 6 --use_hv_map True --use_col_map True"
)
# fp32: the same on any CPU, and such small models take longer in bf16.
TRAINING = (
    "--lr 1e-3 --batch_size 4 --ema_rate 0.995 --use_fp16 False --drop_rate 0.1 --augment True --stain_jitter 0.5"
)
SAMPLING = (
    "--s 1.5 --match_struct True --sampler dpmpp_2m_sde --num_steps 25 --guidance_interval 0.5,10 --batch_size 32"
    " --use_fp16 False"
)
SAMPLES = 256
SEGMENTER = "--max_steps 500 --batch_size 32 --crop 32 --val_share 0"
HELD = 0.2  # share of the slides that is measured on
FEW = 0.1  # share of the slides that has masks, where only a few have
WIDE = "--spade_channels 128"  # as wide as the reference's; MODEL has 32
EPS = "--predict_v False --learn_sigma True"  # the reference's
X = "--predict_v False --predict_xstart True"
MIN_SNR = "--loss_weights min_snr"


@dataclass(frozen=True)
class Recipe:
    """
    How a model is trained.

    :param flags: of image_train.py, on top of the configuration's.
    :param few: train on a few of the training slides, and measure on the test slides.
    :param unlabelled: train on the images of the other training slides, too.
    """

    flags: str = ""
    few: bool = False
    unlabelled: bool = False


OLD = "x"  # what the configuration had before; its figures at the last mark are what others are to reach
RECIPES = {
    "eps": Recipe(f"{EPS} {WIDE}"),
    "eps+min_snr": Recipe(f"{EPS} {WIDE} {MIN_SNR}"),
    OLD: Recipe(f"{X} {WIDE}"),
    "x+min_snr": Recipe(f"{X} {WIDE} {MIN_SNR}"),
    "x+dropout": Recipe(f"{X} {WIDE} --dropout 0.1"),
    "x+spade64": Recipe(f"{X} --spade_channels 64"),
    "x+spade32": Recipe(X),
    "v": Recipe(WIDE),
    "v+min_snr": Recipe(f"{WIDE} {MIN_SNR}"),
    "v+spade32": Recipe(),
    "v+spade32+min_snr": Recipe(MIN_SNR),
    "few": Recipe(MIN_SNR, few=True),
    "few+unlabelled": Recipe(MIN_SNR, few=True, unlabelled=True),
}
# Column of the table -> its title, and whether less is better.
FIGURES = {
    "kid": ("kernel distance", True),
    "colour_od": ("colour error, optical density", True),
    "f1": ("agreement, F1", False),
    "auroc": ("filter's AUROC", True),
}
ROUNDS, STEPS = 5, 8  # of steps, by which their cost is measured
COLUMNS = ("recipe", "seed", "minutes", "steps", *FIGURES, "f1_real")


class Run(NamedTuple):
    """A recipe's training with one seed; minutes -> steps at which it is measured; and where."""

    recipe: str
    seed: int
    marks: dict[float, int]
    out: Path


def main(argv: list[str] | None = None) -> None:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("raw", metavar="RAW", type=Path, help="folder of the unpacked archives")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="some of these")
    parser.add_argument("--seeds", default="0,1,2", help="of the initial weights, and of which slides are measured on")
    parser.add_argument("--minutes", default="5,10,20", help="of process time, at which runs are measured")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one core")
    args = parser.parse_args(argv)
    names = args.recipes.split(",")
    for name in names:
        if name not in RECIPES:
            raise ValueError(f"unknown --recipes {name}: choose some of {', '.join(RECIPES)}")
    minutes = tuple(sorted(float(number) for number in listed("--minutes", args.minutes, r"\d+(\.\d+)?")))
    seeds = [int(seed) for seed in listed("--seeds", args.seeds, r"\d+")]
    if min(*minutes, args.jobs) <= 0:
        raise ValueError("--minutes and --jobs must be above 0")
    find_slides(args.raw)  # which raises where there are none
    try:
        with locked(args.out, "OUT"):
            work(args, names, seeds, minutes)
    except ProgramFailed as failed:
        line, code = failed.args
        sys.stderr.write(f"error: {line}\n")
        sys.exit(code)


def work(args: argparse.Namespace, names: list[str], seeds: list[int], minutes: tuple[float, ...]) -> None:
    """Train and measure what OUT lacks, and write it. :raises ProgramFailed: where a program that it runs fails."""
    # Seed by seed, so that what there is after each compares.
    pairs = [(name, seed) for seed in seeds for name in names]
    if not (args.out / "costs.csv").exists():
        prepare(args.raw, args.out, pairs)
    costs = read_costs(args.out)
    steps = {name: {mark: max(1, round(60 * mark / costs[name])) for mark in minutes} for name in names}
    rows = [row for row in read_rows(args.out) if is_current(row, steps)]
    done = {(row["recipe"], int(row["seed"]), float(row["minutes"])) for row in rows}
    runs = [
        Run(name, seed, marks, args.out)
        for name, seed in pairs
        if (marks := {mark: count for mark, count in steps[name].items() if (name, seed, mark) not in done})
    ]
    if runs:
        prepare(args.raw, args.out, [run[:2] for run in runs])
    # All work is done by programs that threads wait for, and that are told to stop when this process ends.
    with ThreadPool(args.jobs) as pool:
        for found in pool.imap_unordered(train_and_measure, runs):
            rows += found
            write_rows(args.out, rows)
    write_text(args.out / "recipes.md", as_markdown(rows))
    with writing(args.out / "recipes.png") as file:
        draw(rows, file)
    print(as_markdown(rows))


def is_current(row: dict[str, object], steps: dict[str, dict[float, int]]) -> bool:
    """:return: whether a row is of as many steps as its minutes pay for, or of what is not asked for."""
    now = steps.get(row["recipe"], {}).get(float(row["minutes"]))
    return now is None or now == int(row["steps"])


def listed(flag: str, text: str, pattern: str) -> list[str]:
    """:return: the numbers of a flag, with commas between them; :raises ValueError: where one does not fit."""
    for number in text.split(","):
        if not re.fullmatch(pattern, number):
            raise ValueError(f"{flag} {text}: {number!r} is not a number that it takes: give some such as 1,2")
    return text.split(",")


# ---- data ----


def prepare(raw: Path, out: Path, wanted: Sequence[tuple[str, int]]) -> None:
    """Make what runs, of recipes with seeds, share: patches, folders of slides, and segmenters that judge samples."""
    log = out / "prepare.log"
    patches = out / "patches"
    # Folders are there whole or not at all.
    if not patches.exists():
        call(log, "scripts/prepare_monuseg.py", raw, patches, *PATCHES.split())
    if not unseen(out, True, 0).exists():
        link_tests(patches, unseen(out, True, 0))
    for few, seed in sorted({(RECIPES[name].few, seed) for name, seed in wanted}):
        folder = out / f"{'few' if few else 'many'}-s{seed}"
        share, held = (FEW, 0) if few else (1, HELD)
        flags = ["--subsample", share, "--seed", seed, "--val_share", held]
        if not folder.exists():
            call(log, "scripts/experiment/subset_slides.py", patches, folder, *flags)
        data = patches if few else folder / "seen"
        call(log, "scripts/train_segmenter.py", data, "--results_path", segmenter(out, few, seed), *SEGMENTER.split())


def unseen(out: Path, few: bool, seed: int) -> Path:
    """:return: the data folder that a run is measured on, as training patches."""
    return out / "tests" if few else out / f"many-s{seed}" / "held"


def segmenter(out: Path, few: bool, seed: int) -> Path:
    """:return: the folder of the segmenter that judges a run: one for all that are measured on the test slides."""
    return out / ("segmenter-few" if few else f"segmenter-many-s{seed}")


def link_tests(patches: Path, folder: Path) -> None:
    """Make a data folder whose training patches are another one's test patches."""

    def fill(aside: Path) -> None:
        magnification.pass_on(patches, aside)
        tests = [patch for patch in list_patches(patches) if patch.split == TEST_SPLIT]
        write_table(aside, [(patch.file.replace(TEST_SPLIT, TRAIN_SPLIT, 1), patch.slide) for patch in tests])
        (aside / TRAIN_SPLIT).symlink_to(leading(patches / TEST_SPLIT, aside / TRAIN_SPLIT))

    replace_folder(folder, fill, "OUT")


class ProgramFailed(RuntimeError):
    """A program ended otherwise than well: one line that names it and its log; its exit code, as a shell gives it."""


def call(log: Path, script: str, *words: object, **more: str) -> None:
    """Run one of the project's programs on one thread. :raises ProgramFailed: where it fails."""
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, words)],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more},
            preexec_fn=partial(signals.end_with_parent, signal.SIGTERM, os.getpid()),  # at which trainings save
        )
    if code := done.returncode if done.returncode >= 0 else 128 - done.returncode:
        raise ProgramFailed(f"{script} failed with exit code {code}, see {log}", code)


def training_words(recipe: Recipe, data: Path, seed: int) -> list[str]:
    """:return: the command line of image_train.py, but for how long. :param data: of subset_slides.py."""
    words = ["--data_dir", data / "seen", *MODEL.split(), *TRAINING.split(), "--seed", seed, "--val_split", "none"]
    words += ["--num_workers", 0, "--save_interval", 1 << 40, *recipe.flags.split()]
    if recipe.unlabelled:
        words += ["--unlabelled_dir", data / "unlabelled"]
    return [str(word) for word in words]


# ---- what a step costs ----


def read_costs(out: Path) -> dict[str, float]:
    """:return: recipe -> seconds of process time a step, measured where OUT does not say them."""
    if not (out / "costs.csv").exists():
        data = next(path.parent for path in sorted(out.glob("*-s*/seen")))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            found = fresh.submit(measure_costs, data).result()
        text = "".join(f"{name},{seconds:.4f}\n" for name, seconds in found.items())
        write_text(out / "costs.csv", f"recipe,seconds\n{text}")
    with open(out / "costs.csv", newline="", encoding="utf-8") as file:
        costs = {row["recipe"]: float(row["seconds"]) for row in csv.DictReader(file)}
    if missing := sorted(RECIPES.keys() - costs.keys()):
        raise ValueError(f"{out / 'costs.csv'} does not say what {missing[0]} costs: remove it, and all are measured")
    return costs


def measure_costs(data: Path) -> dict[str, float]:
    """:return: recipe -> seconds of process time a step. Those of few slides cost what their recipe does with many."""
    th.set_num_threads(1)
    logger.set_level(logger.ERROR)
    keep_memory()
    loops = {recipe.flags: make_loop(training_words(recipe, data, 0)) for recipe in RECIPES.values() if not recipe.few}
    least = dict.fromkeys(loops, np.inf)
    for _ in range(ROUNDS):
        for flags, loop in loops.items():
            loop.run_step(*next(loop.data))
            began = time.process_time()
            for _ in range(STEPS):
                loop.run_step(*next(loop.data))
            least[flags] = min(least[flags], (time.process_time() - began) / STEPS)
    return {name: least[recipe.flags] for name, recipe in RECIPES.items()}


def make_loop(words: list[str]) -> TrainLoop:
    """:return: what image_train.py makes of its flags, on the CPU."""
    args, _ = image_train.resolve(words)
    device, spec = th.device("cpu"), condition_spec(vars(args))
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    model.place(device, training=True)
    model.convert_to(compute_dtype(args.use_fp16, device, args.precision))
    seen, _ = image_train.load_parts(args, spec)
    data = stream(seen, args.batch_size, num_workers=0)
    options = TrainOptions.read(vars(args))
    return TrainLoop(model=model, diffusion=diffusion, data=data, spec=spec, options=options)


# ---- one run ----


def train_and_measure(run: Run) -> list[dict[str, object]]:
    """:return: the rows of a run, one a mark."""
    recipe = RECIPES[run.recipe]
    folder = run.out / "runs" / f"{run.recipe}-s{run.seed}"
    (folder / "model").mkdir(parents=True, exist_ok=True)
    words = training_words(recipe, run.out / f"{'few' if recipe.few else 'many'}-s{run.seed}", run.seed)
    rows = []
    for minutes, steps in run.marks.items():
        known = folder / f"at-{minutes:g}.json"
        figures = json.loads(known.read_text()) if known.exists() else {}
        if figures.get("steps") != steps:
            if max(checkpoint_sets.steps(str(folder / "model")), default=0) > steps:
                shutil.rmtree(folder / "model")  # which went on to a later mark: anew, it comes past this one
                (folder / "model").mkdir()
            places = dict(OPENAI_LOGDIR=str(folder / "model"), OPENAI_LOG_FORMAT="log")
            call(folder / "train.log", "image_train.py", *words, "--max_steps", steps, **places)
            state = json.loads((folder / "model/result.json").read_text())
            figures = {"steps": steps, **measure(run, Path(state["checkpoint"]), folder / f"at-{minutes:g}")}
            write_json(known, figures)
        rows.append({"recipe": run.recipe, "seed": run.seed, "minutes": minutes, **figures})
    return rows


def measure(run: Run, checkpoint: Path, folder: Path) -> dict[str, float]:
    """Sample with conditions of unseen slides, and measure the samples. :return: figure -> value."""
    shutil.rmtree(folder, ignore_errors=True)  # what was broken off
    folder.mkdir()
    log = folder / "log.txt"
    few = RECIPES[run.recipe].few
    real = unseen(run.out, few, run.seed)
    words = ["--model_path", checkpoint, "--data_dir", real, "--use_train", "True", "--num_samples", SAMPLES]
    words += [*SAMPLING.split(), "--seed", run.seed, "--num_workers", 0]
    call(log, "image_sample.py", *words, "--results_path", folder / "samples")
    words = ["--data_dir", real, "--synthetic", folder / "samples"]
    judge = ["--metrics", "kid,colour,structure", "--model_path", segmenter(run.out, few, run.seed)]
    call(log, "scripts/evaluate.py", *words, "--results_path", folder / "evaluation", *judge)
    call(log, "scripts/filter_ood.py", *words, "--results_path", folder / "filter")
    (found,) = json.loads((folder / "evaluation/metrics.json").read_text())["runs"].values()
    auroc = json.loads((folder / "filter/report.json").read_text())["auroc"]
    f1, f1_real = (found[name]["value"] for name in ("f1", "f1_originals"))
    return dict(kid=found["kid"]["value"], colour_od=found["colour_od"], f1=f1, auroc=auroc, f1_real=f1_real)


# ---- results ----


def read_rows(out: Path) -> list[dict[str, object]]:
    if not (out / "recipes.csv").exists():
        return []
    with open(out / "recipes.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(out: Path, rows: list[dict[str, object]]) -> None:
    write_text(out / "recipes.csv", csv_text(COLUMNS, rows))


def seeds_of(rows: list[dict[str, object]], recipe: str) -> set[int]:
    """The seeds that a recipe has rows of: numbers, also where rows were read from a file."""
    return {int(row["seed"]) for row in rows if row["recipe"] == recipe}


def means(rows: list[dict[str, object]], recipe: str, figure: str) -> dict[float, float]:
    """:return: minutes -> a figure's mean over the recipe's seeds, where all of them have been measured."""
    own = [(float(row["minutes"]), float(row[figure])) for row in rows if row["recipe"] == recipe]
    seeds = len(seeds_of(rows, recipe))
    marks = {mark: [value for at, value in own if at == mark] for mark in sorted({at for at, _ in own})}
    return {mark: float(np.mean(values)) for mark, values in marks.items() if len(values) == seeds}


def reached(rows: list[dict[str, object]], recipe: str) -> str:
    """:return: the first mark at which a recipe's kernel distance and colour error are OLD's at the last one."""
    goals = [max(means(rows, OLD, figure).items(), default=(0, -np.inf))[1] for figure in ("kid", "colour_od")]
    own = [means(rows, recipe, figure) for figure in ("kid", "colour_od")]
    return next((f"{mark:g}" for mark in own[0] if all(part[mark] <= goal for part, goal in zip(own, goals))), "")


def as_markdown(rows: list[dict[str, object]]) -> str:
    """A table: a line a recipe; a cell holds the means over the seeds at the marks, in order."""
    marks = sorted({float(row["minutes"]) for row in rows})
    titles = ["recipe", "seeds", "steps", *(title for title, _ in FIGURES.values()), f"minutes to what {OLD} has"]
    lines = [
        f"After {' / '.join(f'{mark:g}' for mark in marks)} minutes:",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for recipe in RECIPES:
        seeds = len(seeds_of(rows, recipe))
        if seeds:
            steps = max(int(row["steps"]) for row in rows if row["recipe"] == recipe)
            values = [means(rows, recipe, name) for name in FIGURES]
            cells = [" / ".join(f"{own[mark]:.3f}" if mark in own else "-" for mark in marks) for own in values]
            goal = "" if RECIPES[recipe].few else reached(rows, recipe)
            lines.append(f"| {' | '.join([recipe, str(seeds), str(steps), *cells, goal])} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, object]], file: io.BufferedIOBase) -> None:
    """Draw each figure over the minutes, a line a recipe; those of a few slides are dashed, of one seed faint."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    for number, (name, (title, less)) in enumerate(FIGURES.items()):
        axes = figure.add_subplot(2, 2, number + 1)
        for index, (recipe, what) in enumerate(RECIPES.items()):
            values = means(rows, recipe, name)
            if values:
                (line,) = axes.plot(list(values), list(values.values()), "--" if what.few else "-", marker="o")
                line.set(color=colormaps["tab20"](index % 20), label=recipe)
                line.set_alpha(0.4 if len(seeds_of(rows, recipe)) == 1 else 1)
        axes.set(title=f"{title} ({'lower' if less else 'higher'} is better)", xlabel="minutes of one core")
        axes.set_ylim(bottom=0 if less else None)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_png(figure, file)


if __name__ == "__main__":
    cli.run(main)
