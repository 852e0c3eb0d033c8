# The stages of scripts/experiment.sh, which calls this, with settings in the environment and in OUT.
# See pipeline.smk for what outputs and params are.
#
# A cell is a track, a share and a seed, TRACK-fSHARE-sSEED; a variant is what one of its segmenters is trained on.
# Kinds are the patches that variants add to real ones, each a results folder, made once a cell for the largest ratio.
import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir).parents[1]))
from guided_diffusion.histology.experiment import protocol
from scripts.experiment.plan import FLAGS as PROGRAMS
from scripts.experiment.plan import chosen, diffusion_steps, from_environment, patch_side, settings_of
from scripts.workflow.wiring import (
    CORES,
    GPUS,
    LAUNCH,
    ONE_GPU,
    PYTHON,
    RAW,
    SLIDES,
    make_structures,
    script,
    stage,
    step,
)

VARIANTS, ALL_CELLS = from_environment()
CELLS = [cell.name for cell in chosen(ALL_CELLS, os.environ["CELLS"])]
CHOICES = {variant.choice: variant for variant in VARIANTS.values() if variant.choice}
FLAGS = {name: os.environ[f"SDM_{name}_FLAGS"] for name in PROGRAMS}
BATCH, RATE, VAL_SHARE = (os.environ[name] for name in ("DIFFUSION_BATCH", "EMA_RATE", "VAL_SHARE"))
SIDE, SCALE, CLUSTERS = patch_side(FLAGS["PATCH"]), os.environ["S"], "patches/clusters"
TRAIN = "MoNuSegTrainingData/images"
CELL = "{wildcards.cell}"  # in a shell command
MODEL = f"{CELL}/model/ema_{RATE}_{{params.steps}}.pt"
RIVALS = script("scripts/experiment/rival_samples.py")


include: "inputs.smk"


wildcard_constraints:
    cell=names(ALL_CELLS),
    variants="[0-9a-f]+",
    variant=names(VARIANTS),
    judge=names(VARIANTS),
    choice=names(CHOICES),


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
            f"{PYTHON} {script('scripts/prepare_monuseg.py')} {RAW} patches {FLAGS['PATCH']}",
            given="",
            seals=["patches/prepare.json", "patches/MoNuSegT*Data"],
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
            f"{PYTHON} {script('scripts/prepare_monuseg.py')} {RAW} test {FLAGS['TEST']}",
            given="",
        )


# Of track patches alone.
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
            f"{PYTHON} {script('scripts/extract_features.py')} patches/MoNuSegT*Data --root patches"
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
            f"{PYTHON} {script('scripts/cluster_patches.py')} patches --features features.npz --out_name clusters"
            f" {FLAGS['CLUSTER']}",
        )


rule split:
    input:
        "stages/patches.json",
        lambda wildcards: ["stages/clusters.json"] if cell_of(wildcards).track == "patches" else [],
    output:
        "stages/{cell}-split.json",
    log:
        "logs/{cell}-split.log",
    params:
        settings=lambda wildcards: f"{VAL_SHARE} {os.environ['CLUSTER']}",
        choice=lambda wildcards: "--track {0.track} --percent {0.share:g} --seed {0.seed}".format(cell_of(wildcards)),
        cluster=lambda wildcards: (
            f"--clusters {CLUSTERS} --cluster={shlex.quote(os.environ['CLUSTER'])}"
            if cell_of(wildcards).track == "patches"
            else ""
        ),
    resources:
        gpu=0,
    shell:
        stage(
            f"{CELL}-split",
            f"{CELL}/split",
            f"{PYTHON} {script('scripts/experiment/subset_slides.py')} patches {CELL}/split"
            f" {{params.choice}} --val_share {VAL_SHARE} {{params.cluster}}",
        )


rule model:
    input:
        "stages/{cell}-split.json",
    output:
        "stages/{cell}-model.json",
    log:
        "logs/{cell}-model.log",
    params:
        # Over other steps the learning rate falls otherwise: such a model is another one, and made anew.
        settings=lambda wildcards: f"{steps(wildcards)} {FLAGS['MODEL']} {FLAGS['DIFFUSION']} {BATCH} {RATE}",
        steps=steps,
        data=data_seen,
        seed=lambda wildcards: cell_of(wildcards).seed,
        unlabelled=lambda wildcards: (
            f"--unlabelled_dir {wildcards.cell}/split/unlabelled"
            if cell_of(wildcards).track == "masks" and there(wildcards, "split/unlabelled")
            else ""
        ),
    resources:
        gpu=GPUS,
    threads: CORES
    shell:
        stage(
            f"{CELL}-model",
            f"{CELL}/model",
            f"env OPENAI_LOGDIR={CELL}/model {LAUNCH} {script('image_train.py')} --data_dir {{params.data}}"
            f" {{params.unlabelled}} {FLAGS['MODEL']} {FLAGS['DIFFUSION']} --total_batch_size {BATCH}"
            f" --ema_rate {RATE} --lr_anneal_steps {{params.steps}} --seed {{params.seed}} --val_split none",
            seals=[MODEL],
            resumes=True,
        )


rule structures:
    input:
        "stages/{cell}-split.json",
    output:
        "stages/{cell}-structures.json",
    log:
        "logs/{cell}-structures.log",
    params:
        settings=str(SIDE),
        amount=amount("made", "structures/inst_masks"),
        seed=lambda wildcards: cell_of(wildcards).seed,
    resources:
        gpu=0,
    threads: CORES
    shell:
        stage(
            f"{CELL}-structures",
            f"{CELL}/structures",
            make_structures(f"{CELL}/split/seen", f"{CELL}/structures", "{params.amount}", SIDE)
            + " --seed {params.seed}",
            resumes=True,
        )


# Samples of the share's structures, of made ones, and of those of slides that the share does not have.
rule samples:
    input:
        "stages/{cell}-split.json",
        "stages/{cell}-model.json",
        lambda wildcards: [f"stages/{wildcards.cell}-structures.json"] if wildcards.kind == "made" else [],
    output:
        "stages/{cell}-{kind}.json",
    wildcard_constraints:
        kind="samples|made|layouts",
    log:
        "logs/{cell}-{kind}.log",
    params:
        settings=lambda wildcards: " ".join(
            [steps(wildcards), FLAGS["MODEL"], SCALE, FLAGS["SAMPLE"], colours(wildcards)]
        ),
        steps=steps,
        amount=amount(),
        seed=lambda wildcards: cell_of(wildcards).seed,
        data=lambda wildcards: f"{wildcards.cell}/split/{'others' if wildcards.kind == 'layouts' else 'seen'}",
        colours=colours,
        structures=lambda wildcards: (
            f"--structure_dir {wildcards.cell}/structures" if wildcards.kind == "made" else ""
        ),
    resources:
        gpu=GPUS,
    threads: CORES
    shell:
        stage(
            f"{CELL}-{{wildcards.kind}}",
            f"{CELL}/{{wildcards.kind}}",
            f"{LAUNCH} {script('image_sample.py')} --model_path {MODEL} --data_dir {{params.data}}"
            f" --use_train True --results_path {CELL}/{{wildcards.kind}} --num_samples {{params.amount}} --s {SCALE}"
            f" --seed {{params.seed}} {FLAGS['SAMPLE']} {{params.colours}} {{params.structures}}",
            seals=[f"{CELL}/{{wildcards.kind}}/grid.png", f"{CELL}/{{wildcards.kind}}"],
            resumes=True,
        )


# Real patches in the place of samples: with other slides' colours, and those of unseen slides with their masks.
rule rival:
    input:
        "stages/{cell}-split.json",
    output:
        "stages/{cell}-{kind}.json",
    wildcard_constraints:
        kind="transfer|unseen",
    log:
        "logs/{cell}-{kind}.log",
    params:
        settings=lambda wildcards: amount()(wildcards),
        seed=lambda wildcards: cell_of(wildcards).seed,
    resources:
        gpu=0,
    threads: CORES
    shell:
        stage(
            f"{CELL}-{{wildcards.kind}}",
            f"{CELL}/{{wildcards.kind}}",
            f"{PYTHON} {RIVALS} {{wildcards.kind}} {CELL}/split --results_path {CELL}/{{wildcards.kind}}"
            " --count {params.settings} --seed {params.seed}",
        )


rule pseudo:
    input:
        "stages/test.json",
        "stages/{cell}-split.json",
        "stages/{cell}-{judge}-train.json",
    output:
        "stages/{cell}-pseudo-{judge}.json",
    log:
        "logs/{cell}-pseudo-{judge}.log",
    params:
        settings=lambda wildcards: amount(f"pseudo-{wildcards.judge}")(wildcards),
    resources:
        gpu=ONE_GPU,
    threads: CORES
    shell:
        stage(
            f"{CELL}-pseudo-{{wildcards.judge}}",
            f"{CELL}/pseudo-{{wildcards.judge}}",
            f"{PYTHON} {RIVALS} pseudo {CELL}/split --results_path {CELL}/pseudo-{{wildcards.judge}}"
            f" --count {{params.settings}} --model_path {CELL}/segmenters/{{wildcards.judge}}/segmenter.pt"
            " --slides_dir test/MoNuSegTrainingData/images",
        )


# Beside images of all training slides but held-out ones; it looks at no masks.
checkpoint filter:
    input:
        "stages/{cell}-split.json",
        kinds_of(lambda wildcards: CHOICES[wildcards.choice]),
        lambda wildcards: (
            [f"stages/{wildcards.cell}-{CHOICES[wildcards.choice].judge}-train.json"]
            if CHOICES[wildcards.choice].judge
            else []
        ),
    output:
        "stages/{cell}-{choice}-filter.json",
    log:
        "logs/{cell}-{choice}-filter.log",
    params:
        settings=flags_of_filter,
        samples=lambda wildcards: [f"{wildcards.cell}/{kind}" for kind in CHOICES[wildcards.choice].kinds],
        seed=lambda wildcards: cell_of(wildcards).seed,
    resources:
        gpu=ONE_GPU,
    threads: CORES
    shell:
        stage(
            f"{CELL}-{{wildcards.choice}}-filter",
            f"{CELL}/filters/{{wildcards.choice}}",
            f"{PYTHON} {script('scripts/filter_ood.py')} --data_dir {CELL}/split/colours"
            f" --synthetic {{params.samples}} --results_path {CELL}/filters/{{wildcards.choice}}"
            " --seed {params.seed} {params.settings}",
        )


rule mix:
    input:
        "stages/{cell}-split.json",
        seals_of_set,
    output:
        "stages/{cell}-{variant}-set.json",
    log:
        "logs/{cell}-{variant}-set.log",
    params:
        settings=ratio,
        synthetic=added,
        # A choice at random of some variant's size is another one than that of the same size by its ratio.
        seed=lambda wildcards: cell_of(wildcards).seed + 1000 * bool(VARIANTS[wildcards.variant].size),
    resources:
        gpu=0,
    shell:
        stage(
            f"{CELL}-{{wildcards.variant}}-set",
            f"{CELL}/sets/{{wildcards.variant}}",
            f"{PYTHON} {script('scripts/assemble_set.py')} --data_dir {CELL}/split"
            f" --synthetic {{params.synthetic}} --results_path {CELL}/sets/{{wildcards.variant}}"
            " --seed {params.seed} --ratio {params.settings}",
        )


rule segmenter:
    input:
        lambda wildcards: f"stages/{wildcards.cell}-{data_of(wildcards)[1]}.json",
    output:
        "stages/{cell}-{variant}-train.json",
    log:
        "logs/{cell}-{variant}-train.log",
    params:
        settings=how,
        data=lambda wildcards: f"{wildcards.cell}/{data_of(wildcards)[0]}",
        seed=lambda wildcards: cell_of(wildcards).seed,
    resources:
        gpu=ONE_GPU,
    threads: CORES
    shell:
        stage(
            f"{CELL}-{{wildcards.variant}}-train",
            f"{CELL}/segmenters/{{wildcards.variant}}",
            f"{PYTHON} {script('scripts/train_segmenter.py')} {{params.data}}"
            f" --results_path {CELL}/segmenters/{{wildcards.variant}}"
            f" --seed {{params.seed}} --val_share {VAL_SHARE} {{params.settings}}",
            seals=[f"{CELL}/segmenters/{{wildcards.variant}}/{name}" for name in ("segmenter.pt", "result.json")],
            resumes=True,
        )


rule tested:
    input:
        "stages/test.json",
        "stages/{cell}-{variant}-train.json",
    output:
        "stages/{cell}-{variant}-test.json",
    log:
        "logs/{cell}-{variant}-test.log",
    params:
        # By which the results know figures of another configuration.
        settings=lambda wildcards: settings_of(wildcards.variant, VARIANTS),
    resources:
        gpu=ONE_GPU,
    threads: CORES
    shell:
        stage(
            f"{CELL}-{{wildcards.variant}}-test",
            f"{CELL}/segmenters/{{wildcards.variant}}/test",
            f"{PYTHON} {script('scripts/segment.py')} {CELL}/segmenters/{{wildcards.variant}}/segmenter.pt"
            " test/MoNuSegTestData/images --truth test/MoNuSegTestData/inst_masks"
            f" --results_path {CELL}/segmenters/{{wildcards.variant}}/test",
        )


# Of what is there by then: after each cell, and once more for all. With other variants a cell is another job, since the
# engine does not look at what a finished one lacks while a filter decides on some of it.
SUM_UP = f"{PYTHON} {script('scripts/experiment/experiment_results.py')} ."


rule cell:
    input:
        tests_of,
    output:
        touch("stages/{cell}.{variants}"),
    log:
        "logs/{cell}-{variants}-results.log",
    shell:
        step(f"{CELL}-results", SUM_UP)


rule results:
    input:
        [f"stages/{cell}.{variants_of(cell)}" for cell in CELLS],
    output:
        "results.csv",
        "results.md",
        "results.png",
    log:
        "logs/results.log",
    shell:
        step("results", SUM_UP)
