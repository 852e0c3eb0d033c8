# The stages of scripts/experiment.sh, which calls this, with settings in the environment and in OUT.
# See pipeline.smk for what outputs and params are.
#
# A cell is a share of the slides and a seed, fFRACTION-sSEED; a variant is what its segmenter is trained on.
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir).parents[1]))
from scripts.experiment.plan import diffusion_steps, image_size
from scripts.workflow.wiring import (
    CORES,
    GPUS,
    LAUNCH,
    ONE_GPU,
    PYTHON,
    RAW,
    SLIDES,
    STRUCTURES,
    divide,
    make_structures,
    script,
    stage,
    step,
)

CELLS = [cell for cell in os.environ["CELLS"].split() if cell != "none"]
NAMES = ("PATCH", "TEST", "MODEL", "DIFFUSION", "SAMPLE", "FILTER", "SEGMENTER", "PLAIN", "COLOUR")
FLAGS = {name: os.environ[f"SDM_{name}_FLAGS"] for name in NAMES}
BATCH, RATE, VAL_SHARE = (os.environ[name] for name in ("DIFFUSION_BATCH", "EMA_RATE", "VAL_SHARE"))
IMAGE_SIZE = image_size(FLAGS["MODEL"])
SAMPLES, SCALE = int(os.environ["SAMPLES"]), os.environ["S"]
# set -> the results folders in the cell that it takes, and the stages that make them.
SYNTHETIC = {"unfiltered": (STRUCTURES, STRUCTURES), "filtered": (("ood/kept",), ("filter",))}
# A cell in the names of files, and in a shell command.
NAME, CELL = "f{fraction}-s{seed}", "f{wildcards.fraction}-s{wildcards.seed}"
MODEL = f"{CELL}/model/ema_{RATE}_{{params.steps}}.pt"
APPEARANCES = os.environ["APPEARANCES"]
COLOURS = {"all": f"--appearance_dir {CELL}/slides/colours", "share": ""}[APPEARANCES]
# variant -> the data folder in the cell, and how to augment it.
VARIANTS = {
    "real": ("slides", "PLAIN"),
    "colour": ("slides", "COLOUR"),
    "unfiltered": ("unfiltered-set", "PLAIN"),
    "filtered": ("filtered-set", "PLAIN"),
    "filtered-colour": ("filtered-set", "COLOUR"),
}


def tests(*names):
    return [f"stages/{NAME}-{name}-test.json" for name in names]


def tests_of_filtered(wildcards):
    """An input function: none where the filter kept no sample, so that there is nothing to train on."""
    seal = json.loads(Path(checkpoints.filter.get(**wildcards).output[0]).read_text())
    kept = any("/ood/kept/samples/" in name for name in seal["files"])
    return [path.format(**wildcards) for path in tests("filtered", "filtered-colour")] if kept else []


def seen(wildcards):
    """How many patches the cell's diffusion model sees; none before they are there."""
    images = Path(f"f{wildcards.fraction}-s{wildcards.seed}", "slides/seen/MoNuSegTrainingData/images")
    return sum(1 for _ in images.iterdir()) if images.is_dir() else 0


def steps(wildcards):
    """Of the cell's diffusion model, as its files name them."""
    return f"{diffusion_steps(seen(wildcards)):06d}"


def count(kind):
    """An input function: how many samples there are to be of a kind."""
    return lambda wildcards: divide(SAMPLES or seen(wildcards))[kind or wildcards.kind]


wildcard_constraints:
    fraction=r"[\d.]+",
    seed=r"\d+",
    variant="|".join(VARIANTS),
    which="unfiltered|filtered",
    kind="samples|made",


rule all:
    input:
        "results.csv" if CELLS else ["stages/patches.json", "stages/test.json"],


rule patches:
    output:
        "stages/patches.json",
    log:
        "logs/patches.log",
    params:
        settings=f"{SLIDES} {FLAGS['PATCH']}",
    resources:
        gpu=0,
    threads: 2
    shell:
        stage(
            "patches",
            "patches",
            f"{PYTHON} {script('scripts/prepare_monuseg.py')} {shlex.quote(RAW)} patches {FLAGS['PATCH']}",
            given="",
        )


rule test:
    output:
        "stages/test.json",
    log:
        "logs/test.log",
    params:
        settings=f"{SLIDES} {FLAGS['TEST']}",
    resources:
        gpu=0,
    threads: 2
    shell:
        stage(
            "test",
            "test",
            f"{PYTHON} {script('scripts/prepare_monuseg.py')} {shlex.quote(RAW)} test {FLAGS['TEST']}",
            given="",
        )


rule slides:
    input:
        "stages/patches.json",
    output:
        f"stages/{NAME}-slides.json",
    log:
        f"logs/{NAME}-slides.log",
    params:
        settings=VAL_SHARE,
    resources:
        gpu=0,
    shell:
        stage(
            f"{CELL}-slides",
            f"{CELL}/slides",
            f"{PYTHON} {script('scripts/experiment/subset_slides.py')} patches {CELL}/slides"
            " --percent {wildcards.fraction} --seed {wildcards.seed} --val_share {params.settings}",
        )


rule model:
    input:
        f"stages/{NAME}-slides.json",
    output:
        f"stages/{NAME}-model.json",
    log:
        f"logs/{NAME}-model.log",
    params:
        settings=f"{FLAGS['MODEL']} {FLAGS['DIFFUSION']} {BATCH} {RATE}",
        steps=steps,
    resources:
        gpu=GPUS,
    threads: CORES
    shell:
        stage(
            f"{CELL}-model",
            f"{CELL}/model",
            f"env OPENAI_LOGDIR={CELL}/model {LAUNCH} {script('image_train.py')} --data_dir {CELL}/slides/seen"
            f" {FLAGS['MODEL']} {FLAGS['DIFFUSION']} --total_batch_size {BATCH} --ema_rate {RATE}"
            " --max_steps {params.steps} --seed {wildcards.seed} --val_split none",
            seals=[MODEL],
            resumes=True,
        )


rule structures:
    input:
        f"stages/{NAME}-slides.json",
    output:
        f"stages/{NAME}-structures.json",
    log:
        f"logs/{NAME}-structures.log",
    params:
        settings=lambda wildcards: f"{count('made')(wildcards)} {IMAGE_SIZE}",
        amount=count("made"),
    resources:
        gpu=0,
    threads: CORES
    shell:
        stage(
            f"{CELL}-structures",
            f"{CELL}/structures",
            make_structures(f"{CELL}/slides/seen", f"{CELL}/structures", "{params.amount}", IMAGE_SIZE)
            + " --seed {wildcards.seed}",
        )


# Samples of real structures, and of made ones.
rule samples:
    input:
        f"stages/{NAME}-slides.json",
        f"stages/{NAME}-model.json",
        lambda wildcards: [f"stages/{NAME}-structures.json".format(**wildcards)] if wildcards.kind == "made" else [],
    output:
        f"stages/{NAME}-{{kind}}.json",
    log:
        f"logs/{NAME}-{{kind}}.log",
    params:
        settings=lambda wildcards: f"{steps(wildcards)} {FLAGS['MODEL']} {SCALE} {FLAGS['SAMPLE']} {APPEARANCES}",
        steps=steps,
        amount=count(""),
        structures=lambda wildcards: (
            f"--structure_dir f{wildcards.fraction}-s{wildcards.seed}/structures" if wildcards.kind == "made" else ""
        ),
    resources:
        gpu=GPUS,
    threads: CORES
    shell:
        stage(
            f"{CELL}-{{wildcards.kind}}",
            f"{CELL}/{{wildcards.kind}}",
            f"{LAUNCH} {script('image_sample.py')} --model_path {MODEL} --data_dir {CELL}/slides/seen"
            f" --use_train True --results_path {CELL}/{{wildcards.kind}} --num_samples {{params.amount}} --s {SCALE}"
            f" --seed {{wildcards.seed}} {FLAGS['SAMPLE']} {COLOURS} {{params.structures}}",
            seals=[f"{CELL}/{{wildcards.kind}}/grid.png", f"{CELL}/{{wildcards.kind}}"],
            resumes=True,
        )


checkpoint filter:
    input:
        f"stages/{NAME}-slides.json",
        *(f"stages/{NAME}-{kind}.json" for kind in STRUCTURES),
    output:
        f"stages/{NAME}-filter.json",
    log:
        f"logs/{NAME}-filter.log",
    params:
        settings=FLAGS["FILTER"],
    resources:
        gpu=ONE_GPU,
    threads: CORES
    shell:
        stage(
            f"{CELL}-filter",
            f"{CELL}/ood",
            f"{PYTHON} {script('scripts/filter_ood.py')} --data_dir {CELL}/slides"
            f" --synthetic {' '.join(f'{CELL}/{kind}' for kind in STRUCTURES)}"
            f" --results_path {CELL}/ood --seed {{wildcards.seed}} {FLAGS['FILTER']}",
        )


rule mix:
    input:
        f"stages/{NAME}-slides.json",
        lambda wildcards: [f"stages/{NAME}-{name}.json".format(**wildcards) for name in SYNTHETIC[wildcards.which][1]],
    output:
        f"stages/{NAME}-{{which}}-set.json",
    log:
        f"logs/{NAME}-{{which}}-set.log",
    params:
        settings="all",
        synthetic=lambda wildcards: [
            f"f{wildcards.fraction}-s{wildcards.seed}/{folder}" for folder in SYNTHETIC[wildcards.which][0]
        ],
    resources:
        gpu=0,
    shell:
        stage(
            f"{CELL}-{{wildcards.which}}-set",
            f"{CELL}/{{wildcards.which}}-set",
            f"{PYTHON} {script('scripts/assemble_set.py')} --data_dir {CELL}/slides"
            f" --synthetic {{params.synthetic}} --results_path {CELL}/{{wildcards.which}}-set"
            " --seed {wildcards.seed} --ratio {params.settings}",
        )


rule segmenter:
    input:
        lambda wildcards: f"stages/{NAME}-{VARIANTS[wildcards.variant][0]}.json".format(**wildcards),
    output:
        f"stages/{NAME}-{{variant}}-train.json",
    log:
        f"logs/{NAME}-{{variant}}-train.log",
    params:
        settings=lambda wildcards: f"{FLAGS['SEGMENTER']} {FLAGS[VARIANTS[wildcards.variant][1]]}",
        data=lambda wildcards: VARIANTS[wildcards.variant][0],
    resources:
        gpu=ONE_GPU,
    threads: CORES
    shell:
        stage(
            f"{CELL}-{{wildcards.variant}}-train",
            f"{CELL}/{{wildcards.variant}}",
            f"{PYTHON} {script('scripts/train_segmenter.py')} {CELL}/{{params.data}}"
            f" --results_path {CELL}/{{wildcards.variant}}"
            f" --seed {{wildcards.seed}} --val_share {VAL_SHARE} {{params.settings}}",
            seals=[f"{CELL}/{{wildcards.variant}}/{name}" for name in ("segmenter.pt", "result.json")],
            resumes=True,
        )


rule tested:
    input:
        "stages/test.json",
        f"stages/{NAME}-{{variant}}-train.json",
    output:
        f"stages/{NAME}-{{variant}}-test.json",
    log:
        f"logs/{NAME}-{{variant}}-test.log",
    params:
        settings="",
    resources:
        gpu=ONE_GPU,
    threads: CORES
    shell:
        stage(
            f"{CELL}-{{wildcards.variant}}-test",
            f"{CELL}/{{wildcards.variant}}/test",
            f"{PYTHON} {script('scripts/segment.py')} {CELL}/{{wildcards.variant}}/segmenter.pt"
            " test/MoNuSegTestData/images --truth test/MoNuSegTestData/inst_masks"
            f" --results_path {CELL}/{{wildcards.variant}}/test",
        )


# Of what is there by then: after each cell, and once more for all.
SUM_UP = f"{PYTHON} {script('scripts/experiment/experiment_results.py')} ."


rule cell:
    input:
        tests("real", "colour", "unfiltered"),
        tests_of_filtered,
    output:
        touch(f"stages/{NAME}"),
    log:
        f"logs/{NAME}-results.log",
    shell:
        step(f"{CELL}-results", SUM_UP)


rule results:
    input:
        expand("stages/{cell}", cell=CELLS),
    output:
        "results.csv",
        "results.md",
        "results.png",
    log:
        "logs/results.log",
    shell:
        step("results", SUM_UP)
