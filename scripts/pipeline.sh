#!/usr/bin/env bash
# All stages, one after the other: slides -> patches -> features -> clusters -> a pretrained model -> fine-tuned ones ->
# samples -> those that look real -> a training set for a segmenter, OUT/set.
#
#   bash scripts/pipeline.sh RAW OUT           RAW as scripts/prepare_monuseg.py reads it
#   bash scripts/pipeline.sh RAW OUT --toy     in minutes on a CPU, with a tiny model; RAW is drawn where it is missing
#
# A stage whose output is whole is skipped; one that was stopped goes on. With other settings a stage is done anew, and
# so are those after it, but for trainings and samples: what the old settings made has to be removed by hand.
# From the environment, with the default:
#   CLUSTERS: labels to fine-tune on, the largest one if empty; PRETRAIN_STEPS, FINETUNE_STEPS 50000;
#   ITERATIONS "030000 040000 050000", S_VALUES "1.3 1.4 1.5 1.6": the sweep; RATIO 1: synthetic patches a real one;
#   BACKBONE efficientnet_lite0. flags.sh and stages.sh list what else the environment sets.
set -euo pipefail
toy=
for argument in "$@"; do
    [[ $argument != --toy ]] || toy=1
done
if [[ -n $toy ]]; then
    : "${PRETRAIN_STEPS:=20}" "${FINETUNE_STEPS:=20}" "${ITERATIONS:=000010 000020}" "${S_VALUES:=1.3 1.5}"
    : "${NUM_SAMPLES:=8}" "${BATCH_SIZE:=8}" "${SAVE_INTERVAL:=10}" "${NUM_STEPS:=5}" "${RATIO:=0.1}"
    export NUM_SAMPLES BATCH_SIZE SAVE_INTERVAL NUM_STEPS
fi
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"
source "$ROOT/scripts/stages.sh"

need 2 "bash scripts/pipeline.sh RAW OUT [--toy]" "$@"
(($# == 2 + ${toy:-0})) || die "usage: bash scripts/pipeline.sh RAW OUT [--toy]"
raw=$(realpath -ms -- "$1") out=$(realpath -ms -- "$2")
python=${PYTHON:-python}
backbone=${BACKBONE:-efficientnet_lite0}
patch_flags=(--patch_size 128 --stride 128)
cluster_flags=(--reduce umap --cluster hdbscan)
filter_flags=() model_flags=()
rate=${EMA_RATE:-0.9999}
[[ -z $toy ]] || rate=0.9
train_flags=(--ema_rate "$rate")
if [[ -n $toy ]]; then
    patch_flags=(--patch_size 64 --stride 64 --resize 16)
    cluster_flags=(--reduce pca --cluster kmeans --n_clusters 2)
    filter_flags=(--mode top_n --top_n 12) # nothing that such a model makes would pass
    model_flags=(
        --image_size 16 --num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --num_head_channels 16
        --attention_resolutions 8 --learn_sigma False --predict_xstart True --num_workers 0
    )
    train_flags+=(--lr 5e-4 --val_interval 10 --use_checkpoint False --preview_samples 1)
fi
[[ -n $toy || -d $raw ]] || die "RAW $raw is not a folder: give the one the archives were unpacked in"

# What else would show only after days of training.
export ITERATIONS=${ITERATIONS:-030000 040000 050000} S_VALUES=${S_VALUES:-1.3 1.4 1.5 1.6} EMA_RATE=$rate
for name in PRETRAIN_STEPS FINETUNE_STEPS SAVE_INTERVAL; do
    [[ ${!name:-1} =~ ^0*[1-9][0-9]*$ ]] || die "$name=${!name} is not a number of steps"
done
# In base 10, for bash reads 050000 as octal.
pretrain_steps=$((10#${PRETRAIN_STEPS:-50000})) finetune_steps=$((10#${FINETUNE_STEPS:-50000}))
save_interval=$((10#${SAVE_INTERVAL:-5000}))
for iteration in $ITERATIONS; do
    [[ $iteration =~ ^0*[1-9][0-9]*$ ]] || die "ITERATIONS: $iteration is not a number of steps"
    steps=$((10#$iteration))
    ((steps <= finetune_steps)) || die "ITERATIONS: $iteration comes after FINETUNE_STEPS=$finetune_steps: give less"
    ((steps % save_interval == 0 || steps == finetune_steps)) \
        || die "ITERATIONS: $iteration is no multiple of SAVE_INTERVAL=$save_interval: there will be no such checkpoint"
done
begin_stages "$out"

if [[ ! -d $raw ]]; then
    # Aside, since half a RAW would pass for a whole one; what a kill left of it is drawn over.
    "$python" "$ROOT/scripts/make_toy_monuseg.py" "$raw.part"
    mv -- "$raw.part" "$raw"
fi
patches=$out/patches features=$out/features.npz clusters=$out/patches/clusters
stage patches "$patches/prepare.json" "$python" "$ROOT/scripts/prepare_monuseg.py" "$raw" "$patches" "${patch_flags[@]}"
prepared=$before
splits=("$patches/MoNuSegTrainingData")
[[ ! -d $patches/MoNuSegTestData ]] || splits+=("$patches/MoNuSegTestData")
stage features "$features" "$python" "$ROOT/scripts/extract_features.py" "${splits[@]}" \
    --root "$patches" --backbone "$backbone" --out "$features"
stage clusters "$clusters/scores.json" "$python" "$ROOT/scripts/cluster_patches.py" "$patches" \
    --features "$features" --name clusters "${cluster_flags[@]}"
clustered=$before

# largest: the label of the cluster with the most training patches; noise, -1, is none.
largest() {
    local folder label count most=0 found=
    for folder in "$clusters"/*/MoNuSegTrainingData/images; do
        label=$(basename -- "${folder%/MoNuSegTrainingData/images}")
        count=$(find "$folder" -name '*.png' | wc -l)
        if [[ $label != -1 ]] && ((count > most)); then
            most=$count found=$label
        fi
    done
    [[ -n $found ]] || die "$clusters has no cluster: choose other settings"
    echo "$found"
}
read -ra labels <<<"${CLUSTERS:-$(largest)}"
for label in "${labels[@]}"; do
    [[ -d $clusters/$label/MoNuSegTrainingData ]] || die "CLUSTERS: $clusters has no training patches of $label"
done

pretrained=$out/pretrain/ema_${rate}_$(printf %06d "$pretrain_steps").pt
trained_with="IMAGE_SIZE=${IMAGE_SIZE:-} BATCH_SIZE=${BATCH_SIZE:-} LR=${LR:-}"
sampled_with="ITERATIONS=$ITERATIONS S_VALUES=$S_VALUES EMA_RATE=$rate KIND=${KIND:-} IMAGE_SIZE=${IMAGE_SIZE:-}"
sampled_with+=" SAMPLER=${SAMPLER:-} NUM_STEPS=${NUM_STEPS:-} NUM_SAMPLES=${NUM_SAMPLES:-}"
before=$prepared # pretraining needs no clusters
settings=$trained_with OPENAI_LOGDIR=$out/pretrain resumed pretrain "$pretrained" \
    bash "$ROOT/scripts/train.sh" "$patches" \
    --max_steps "$pretrain_steps" "${model_flags[@]}" "${train_flags[@]}"
trunk="$clustered $before" branches=() sampled=()
for label in "${labels[@]}"; do
    before=$trunk
    tuned=$out/finetune-clus$label
    # Not result.json, which a training that was stopped leaves, too.
    last=$tuned/ema_${rate}_$(printf %06d "$finetune_steps").pt
    settings=$trained_with OPENAI_LOGDIR=$out/finetune resumed "finetune-$label" "$last" \
        bash "$ROOT/scripts/finetune.sh" "$clusters" "$pretrained" "$label" -- \
        --max_steps "$finetune_steps" "${model_flags[@]}" "${train_flags[@]}"
    settings=$sampled_with resumed "samples-$label" "$out/samples/$label/sweep.png" \
        bash "$ROOT/scripts/sample.sh" "$clusters/$label" "$tuned" "$out/samples/$label" "${model_flags[@]}"
    sampled+=("$out/samples/$label")
    branches+=("$before")
done
before=${branches[*]}
stage filter "$out/filtered/report.json" "$python" "$ROOT/scripts/filter_ood.py" --real "$patches" \
    --synthetic "${sampled[@]}" --out "$out/filtered" --backbone "$backbone" "${filter_flags[@]}"
stage set "$out/set/manifest.csv" "$python" "$ROOT/scripts/assemble_set.py" --real "$patches" \
    --synthetic "$out/filtered/kept" --out "$out/set" --ratio "${RATIO:-1}"
echo "labelled patches, real and synthetic: $out/set"
