# The stages of scripts/pipeline.sh, which calls this, with settings in the environment and in OUT.
#
# The output of a rule is the seal of its stage (scripts/workflow/stage.py), never the folder that it makes: the engine
# deletes the outputs of a job that failed, and a training has to go on from its files. params.settings decides what a
# stage makes, params.amount how much of it. No path in either is absolute, so that OUT may move.
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir).parent))
from scripts.workflow.wiring import (
    CORES,
    GPUS,
    ONE_GPU,
    PYTHON,
    RAW,
    SLIDES,
    UNLABELLED,
    make_structures,
    script,
    stage,
    step,
    word,
)

PATCHES, CLUSTERS = "patches", "patches/clusters"
FLAGS = {name: os.environ[f"SDM_{name}_FLAGS"] for name in ("PATCH", "CLUSTER", "FILTER", "MODEL", "TRAIN")}
PRETRAIN_STEPS, FINETUNE_STEPS = int(os.environ["PRETRAIN_STEPS"]), int(os.environ["FINETUNE_STEPS"])
RATE = os.environ["EMA_RATE"]
NUM_SAMPLES = int(os.environ.get("NUM_SAMPLES") or 1000)  # of each checkpoint and s, as in flags.sh
# The kinds of samples, which are also their folders: of real structures, of made ones, or of both.
STRUCTURES = {"real": ("samples",), "recombine": ("made",), "both": ("samples", "made")}[os.environ["STRUCTURES"]]


def divide(samples):
    """Kind -> how many of some samples are of it; an odd one is of a real structure."""
    half = samples // len(STRUCTURES)
    return {"samples": samples - half * (len(STRUCTURES) > 1), "made": half}


def environment(*names):
    """What these variables are, for the record; the launchers read them for themselves."""
    return " ".join(f"{name}={os.environ.get(name, '')}" for name in names)


def trained_with():
    """What train.sh and finetune.sh read; a total batch size only where one is given, as records of before have none."""
    total = ["TOTAL_BATCH_SIZE"] if os.environ.get("TOTAL_BATCH_SIZE") else []
    return environment("IMAGE_SIZE", "BATCH_SIZE", "LR", *total) + UNLABELLED


def averages(folder, *steps):
    """The checkpoints of a training after a number of steps."""
    return [f"{folder}/ema_{RATE}_{number:06d}.pt" for number in steps]


def chosen(pattern):
    """An input function: the seals of the chosen clusters, which are known once the patches have been clustered."""
    return lambda wildcards: expand(pattern, label=json.loads(Path(checkpoints.labels.get().output[0]).read_text()))


wildcard_constraints:
    label="[^/]+",
    kind="samples|made",


localrules:
    all,
    labels,


rule all:
    input:
        "stages/set.json",


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
            PATCHES,
            f"{PYTHON} {script('scripts/prepare_monuseg.py')} {RAW} {PATCHES} {FLAGS['PATCH']}",
            given="",
            seals=[f"{PATCHES}/prepare.json", f"{PATCHES}/MoNuSegT*Data"],
        )


rule features:
    input:
        "stages/patches.json",
    output:
        "stages/features.json",
    log:
        "logs/features.log",
    params:
        settings=os.environ["BACKBONE"],
    resources:
        gpu=ONE_GPU,
    threads: CORES
    shell:
        stage(
            "features",
            "features.npz",
            f"{PYTHON} {script('scripts/extract_features.py')} {PATCHES}/MoNuSegT*Data --root {PATCHES}"
            " --backbone {params.settings:q} --results_path features.npz",
        )


rule clusters:
    input:
        "stages/patches.json",
        "stages/features.json",
    output:
        "stages/clusters.json",
    log:
        "logs/clusters.log",
    params:
        settings=FLAGS["CLUSTER"],
    resources:
        gpu=0,
    threads: CORES
    shell:
        stage(
            "clusters",
            CLUSTERS,
            f"{PYTHON} {script('scripts/cluster_patches.py')} {PATCHES} --features features.npz --out_name clusters"
            f" {FLAGS['CLUSTER']}",
        )


checkpoint labels:
    input:
        "stages/clusters.json",
    output:
        "stages/labels",
    log:
        "logs/labels.log",
    params:
        labels=os.environ["CLUSTERS"],
    shell:
        step(
            "labels",
            f"{word(sys.executable)} {script('scripts/workflow/choose_clusters.py')} {CLUSTERS}"
            " {output} {params.labels}",
        )


rule pretrain:
    input:
        "stages/patches.json",
        # Pretraining needs no clusters, but a label that is not there should show before days of it, not after.
        labels=ancient("stages/labels"),
    output:
        "stages/pretrain.json",
    log:
        "logs/pretrain.log",
    params:
        settings=f"{FLAGS['MODEL']} {FLAGS['TRAIN']} {trained_with()}",
        amount=PRETRAIN_STEPS,
    resources:
        gpu=GPUS,
    threads: CORES
    shell:
        stage(
            "pretrain",
            "pretrain",
            f"env OPENAI_LOGDIR=pretrain bash {script('scripts/train.sh')} {PATCHES}"
            f" --max_steps {PRETRAIN_STEPS} {FLAGS['MODEL']} {FLAGS['TRAIN']}",
            given="{input[0]}",
            seals=averages("pretrain", PRETRAIN_STEPS),
            resumes=True,
        )


ITERATIONS = {int(steps) for steps in os.environ["ITERATIONS"].split()}
SWEPT = sorted(ITERATIONS | {FINETUNE_STEPS})
# What sampling draws last; with one checkpoint and one s there is no sweep.
SCALES = {f"{float(s):g}" for s in os.environ["S_VALUES"].split()}
PICTURE = "sweep.png" if len(ITERATIONS) * len(SCALES) > 1 else "grid.png"


rule finetune:
    input:
        "stages/clusters.json",
        "stages/pretrain.json",
    output:
        "stages/finetune-{label}.json",
    log:
        "logs/finetune-{label}.log",
    params:
        settings=f"{PRETRAIN_STEPS} {FLAGS['MODEL']} {FLAGS['TRAIN']} {trained_with()}",
        amount=SWEPT,
    resources:
        gpu=GPUS,
    threads: CORES
    shell:
        stage(
            "finetune-{wildcards.label:q}",
            "finetune-clus{wildcards.label:q}",
            f"env OPENAI_LOGDIR=finetune bash {script('scripts/finetune.sh')} {CLUSTERS}"
            f" {averages('pretrain', PRETRAIN_STEPS)[0]} {{wildcards.label:q}} --"
            f" --max_steps {FINETUNE_STEPS} {FLAGS['MODEL']} {FLAGS['TRAIN']}",
            seals=averages("finetune-clus{wildcards.label:q}", *SWEPT),
            resumes=True,
        )


rule structures:
    input:
        "stages/clusters.json",
    output:
        "stages/structures-{label}.json",
    log:
        "logs/structures-{label}.log",
    params:
        settings=f"{divide(NUM_SAMPLES)['made']} {environment('IMAGE_SIZE')}",
    resources:
        gpu=0,
    threads: CORES
    shell:
        stage(
            "structures-{wildcards.label:q}",
            "structures/{wildcards.label:q}",
            make_structures(
                f"{CLUSTERS}/{{wildcards.label:q}}",
                "structures/{wildcards.label:q}",
                divide(NUM_SAMPLES)["made"],
                os.environ.get("IMAGE_SIZE") or 128,
            ),
        )


# Samples of real structures, and of made ones.
rule samples:
    input:
        "stages/clusters.json",
        "stages/finetune-{label}.json",
        lambda wildcards: [f"stages/structures-{wildcards.label}.json"] if wildcards.kind == "made" else [],
    output:
        "stages/{kind}-{label}.json",
    log:
        "logs/{kind}-{label}.log",
    params:
        settings=FLAGS["MODEL"]
        + " "
        + environment("ITERATIONS", "S_VALUES", "EMA_RATE", "KIND", "IMAGE_SIZE", "SAMPLER", "NUM_STEPS"),
        amount=lambda wildcards: divide(NUM_SAMPLES)[wildcards.kind],
        structures=lambda wildcards: (
            f"--structure_dir structures/{shlex.quote(wildcards.label)}" if wildcards.kind == "made" else ""
        ),
    resources:
        gpu=GPUS,
    threads: CORES
    shell:
        stage(
            "{wildcards.kind}-{wildcards.label:q}",
            "{wildcards.kind}/{wildcards.label:q}",
            f"bash {script('scripts/sample.sh')} {CLUSTERS}/{{wildcards.label:q}} finetune-clus{{wildcards.label:q}}"
            f" {{wildcards.kind}}/{{wildcards.label:q}} {FLAGS['MODEL']} --num_samples {{params.amount}}"
            " {params.structures}",
            seals=[f"{{wildcards.kind}}/{{wildcards.label:q}}/{PICTURE}", "{wildcards.kind}/{wildcards.label:q}"],
            resumes=True,
        )


rule filter:
    input:
        "stages/patches.json",
        *(chosen(f"stages/{kind}-{{label}}.json") for kind in STRUCTURES),
    output:
        "stages/filter.json",
    log:
        "logs/filter.log",
    params:
        settings=f"{os.environ['BACKBONE']} {FLAGS['FILTER']}",
        samples=lambda wildcards, input: [Path(seal).stem.replace("-", "/", 1) for seal in input[1:]],
        backbone=os.environ["BACKBONE"],
    resources:
        gpu=ONE_GPU,
    threads: CORES
    shell:
        stage(
            "filter",
            "filtered",
            f"{PYTHON} {script('scripts/filter_ood.py')} --data_dir {PATCHES} --synthetic {{params.samples:q}}"
            f" --results_path filtered --backbone {{params.backbone:q}} {FLAGS['FILTER']}",
        )


rule set:
    input:
        "stages/patches.json",
        "stages/filter.json",
    output:
        "stages/set.json",
    log:
        "logs/set.log",
    params:
        settings=os.environ["RATIO"],
    resources:
        gpu=0,
    shell:
        stage(
            "set",
            "set",
            f"{PYTHON} {script('scripts/assemble_set.py')} --data_dir {PATCHES} --synthetic filtered/kept"
            " --results_path set --ratio {params.settings:q}",
        )
