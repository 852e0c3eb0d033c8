#!/usr/bin/env bash
# All stages: slides -> patches -> features -> clusters -> a pretrained model -> fine-tuned ones -> samples -> those
# that look real -> a training set for a segmenter, OUT/set.
#
#   bash scripts/pipeline.sh RAW OUT           RAW as scripts/prepare_monuseg.py reads it
#   bash scripts/pipeline.sh RAW OUT --toy     in minutes on a CPU, with a tiny model; RAW is drawn where it is missing
#
# Snakemake runs them, by pipeline.smk; its flags go at the end: --dry-run says what would be done and why, --cores 4,
# --retries 2, --executor slurm --profile scripts/profiles/slurm. OUT/logs has a log of each stage. What is finished is
# left alone; what was stopped goes on; where slides or settings change, or a file has gone, the stages concerned are
# done anew. A training or samples of other settings are not deleted for that, but moved to OUT/replaced.
# From the environment, with the default:
#   CLUSTERS: labels to fine-tune on, the largest one if empty; PRETRAIN_STEPS, FINETUNE_STEPS 50000;
#   ITERATIONS "030000 040000 050000", S_VALUES "1.3 1.4 1.5 1.6": the sweep; RATIO 1: synthetic patches a real one;
#   STRUCTURES real: whose nuclei samples show; recombine: layouts made of the nuclei of a cluster's real ones; both:
#   half of the samples each (docs/pipeline.md);
#   CLASSES: K, one more than the largest id in RAW's classes.json: models take the classes of cells, and samples have
#   them (docs/data.md); no classes if empty;
#   UNLABELLED: folders of images without masks that the trainings learn from as well, none if empty (docs/training.md);
#   DATA_LICENCE: of RAW, in words, for the cards of models and set (docs/pipeline.md);
#   RECIPE v, where the other launchers have reference;
#   BACKBONE efficientnet_lite0; TIME_LIMIT: seconds, after which all is stopped with exit code 75, to go on with the
#   same command. flags.sh lists what else the environment sets.
set -euo pipefail
toy='' flags=()
for argument in "${@:3}"; do
    if [[ $argument == --toy ]]; then
        toy=1
    else
        flags+=("$argument")
    fi
done
if [[ -n $toy ]]; then
    : "${PRETRAIN_STEPS:=20}" "${FINETUNE_STEPS:=20}" "${ITERATIONS:=000010 000020}" "${S_VALUES:=1.3 1.5}"
    : "${NUM_SAMPLES:=8}" "${BATCH_SIZE:=8}" "${SAVE_INTERVAL:=10}" "${NUM_STEPS:=5}" "${RATIO:=0.1}"
    : "${IMAGE_SIZE:=16}"
    export NUM_SAMPLES BATCH_SIZE SAVE_INTERVAL NUM_STEPS IMAGE_SIZE
fi
RECIPE=${RECIPE:-v}
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"

need 2 "bash scripts/pipeline.sh RAW OUT [--toy] [flags of snakemake ...]" "$@"
need_python
raw=$1 out=$2
[[ -n $toy || -d $raw ]] || die "RAW $raw is not a folder: give the one the archives were unpacked in"

# What would show only after days of training.
export ITERATIONS=${ITERATIONS:-030000 040000 050000} S_VALUES=${S_VALUES:-1.3 1.4 1.5 1.6}
for name in PRETRAIN_STEPS FINETUNE_STEPS SAVE_INTERVAL; do
    [[ ${!name:-1} =~ ^0*[1-9][0-9]*$ ]] || die "$name=${!name} is not a number of steps"
done
# In base 10, for bash reads 050000 as octal.
export PRETRAIN_STEPS=$((10#${PRETRAIN_STEPS:-50000})) FINETUNE_STEPS=$((10#${FINETUNE_STEPS:-50000}))
save_interval=$((10#${SAVE_INTERVAL:-5000}))
for iteration in $ITERATIONS; do
    [[ $iteration =~ ^0*[1-9][0-9]*$ ]] || die "ITERATIONS: $iteration is not a number of steps"
    steps=$((10#$iteration))
    ((steps <= FINETUNE_STEPS)) || die "ITERATIONS: $iteration comes after FINETUNE_STEPS=$FINETUNE_STEPS: give less"
    ((steps % save_interval == 0 || steps == FINETUNE_STEPS)) \
        || die "ITERATIONS: $iteration is no multiple of SAVE_INTERVAL=$save_interval: there will be no such checkpoint"
done

export STRUCTURES=${STRUCTURES:-real}
check_structures
[[ ${NUM_SAMPLES:-1000} =~ ^[0-9]+$ ]] || die "NUM_SAMPLES=$NUM_SAMPLES is not a number of samples"
case $STRUCTURES in real) least=0 ;; recombine) least=1 ;; both) least=2 ;; esac
((10#${NUM_SAMPLES:-1000} >= least)) \
    || die "STRUCTURES=$STRUCTURES with NUM_SAMPLES=$NUM_SAMPLES: give $least samples at least"

[[ ${CLASSES:-2} =~ ^0*[1-9][0-9]*$ ]] || die "CLASSES=$CLASSES is not a number of classes"

export CLUSTERS=${CLUSTERS:-} BACKBONE=${BACKBONE:-efficientnet_lite0} RATIO=${RATIO:-1} EMA_RATE=${EMA_RATE:-0.9999}
absolute_backbone
[[ $EMA_RATE =~ ^0?\.[0-9]*[1-9]0*$ ]] || die "EMA_RATE=$EMA_RATE is not one rate between 0 and 1, such as 0.9999"
# As training names its checkpoints: 0.99 for .990.
EMA_RATE=0.${EMA_RATE#*.}
while [[ $EMA_RATE == *0 ]]; do EMA_RATE=${EMA_RATE%0}; done
export SDM_PATCH_FLAGS="--patch_size 128 --stride 128" SDM_CLUSTER_FLAGS="--reduce pca --cluster kmeans"
export SDM_FILTER_FLAGS='' SDM_MODEL_FLAGS=${RECIPE_FLAGS[*]} SDM_TRAIN_FLAGS=''
if [[ -n $toy ]]; then
    EMA_RATE=0.9
    SDM_PATCH_FLAGS="--patch_size 64 --stride 64 --resize 16"
    SDM_CLUSTER_FLAGS="--reduce pca --cluster kmeans --n_clusters 2"
    SDM_FILTER_FLAGS="--mode top_n --top_n 12" # nothing that such a model makes would pass
    SDM_MODEL_FLAGS+=" --num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --num_head_channels 16"
    SDM_MODEL_FLAGS+=" --attention_resolutions 8 --num_workers 0"
    SDM_TRAIN_FLAGS="--lr 5e-4 --val_interval 10 --use_checkpoint False --preview_samples 1 "
fi
SDM_TRAIN_FLAGS+="--ema_rate $EMA_RATE"
[[ -z ${CLASSES:-} ]] || SDM_MODEL_FLAGS+=" --class_cond True --num_classes $CLASSES"
[[ $RATIO == all || $RATIO =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ && ${RATIO%%[eE]*} =~ [1-9] ]] \
    || die "RATIO=$RATIO: give a number above 0, such as 1 or 0.5, or all"
read -ra flags_of_model <<<"$SDM_MODEL_FLAGS"
read -ra flags_of_training <<<"$SDM_TRAIN_FLAGS"
read -ra s_values <<<"$S_VALUES"
check_flags image_train.py "${MODEL_FLAGS[@]}" "${CONDITION_FLAGS[@]}" "${TRAIN_FLAGS[@]}" "${flags_of_model[@]}" \
    "${flags_of_training[@]}"
check_flags image_sample.py "${MODEL_FLAGS[@]}" "${CONDITION_FLAGS[@]}" "${SAMPLE_FLAGS[@]}" "${flags_of_model[@]}" \
    --s "$(join "${s_values[@]}")"

if [[ -n $toy && ! -d $raw ]] && ! is_dry_run "${flags[@]}"; then
    # Aside, since half a RAW would pass for a whole one; what a kill left of it is drawn over.
    "${PYTHON:-python}" "$ROOT/scripts/make_toy_monuseg.py" "${raw%/}.part"
    mv -- "${raw%/}.part" "$raw"
fi
workflow pipeline.smk "$raw" "$out" "${flags[@]}"
