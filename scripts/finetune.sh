#!/usr/bin/env bash
# Fine-tune a pretrained model on clusters, one after the other.
#
#   bash scripts/finetune.sh DATA CHECKPOINT [LABEL ...] [-- flags of image_train.py ...]
#
# A cluster is a folder DATA/LABEL that holds MoNuSegTrainingData. Without labels: all of them; or DATA alone, where it
# holds MoNuSegTrainingData itself. Each starts from CHECKPOINT's weights, runs MAX_STEPS steps (default 50000) and
# writes to OPENAI_LOGDIR-clusLABEL. The same command again goes on where it was. OPENAI_LOGDIR-finetune.csv sums up:
# cluster, images, steps, best validation loss, and the checkpoint to sample from. Where a cluster fails, the others are
# tuned before the command fails, too. UNLABELLED=DIR learns from images without masks as well, see docs/training.md.
# flags.sh lists what else the environment sets.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"

need 2 "bash scripts/finetune.sh DATA CHECKPOINT [LABEL ...] [-- flags of image_train.py ...]" "$@"
need_python
data=${1%/}
checkpoint=$2
shift 2

labels=() folders=()
while (($#)) && [[ $1 != -- ]]; do
    [[ $1 != --* ]] || die "$1 comes before --: write DATA CHECKPOINT [LABEL ...] -- $*"
    labels+=("$1")
    folders+=("$data/$1")
    shift
done
[[ ${1-} != -- ]] || shift

if ((${#labels[@]} == 0)) && [[ -d $data/MoNuSegTrainingData ]]; then
    labels=("$(basename -- "$(CDPATH='' cd -- "$data" && pwd)")")
    folders=("$data")
elif ((${#labels[@]} == 0)); then
    for split in "$data"/*/MoNuSegTrainingData; do
        [[ -d $split ]] || die "$data has neither MoNuSegTrainingData nor a LABEL/MoNuSegTrainingData: check the path"
        folders+=("${split%/*}")
        labels+=("$(basename -- "${split%/*}")")
    done
fi
for folder in "${folders[@]}"; do
    [[ $folder == *://* || -d $folder/MoNuSegTrainingData ]] \
        || die "$folder has no MoNuSegTrainingData: check DATA and LABEL"
done
need_file "$checkpoint" checkpoint
train_flags=(
    "${DATA_FLAGS[@]}" "${MODEL_FLAGS[@]}" "${CONDITION_FLAGS[@]}" "${TRAIN_FLAGS[@]}" --drop_rate .2
    --max_steps "${MAX_STEPS:-50000}"
)
check_flags image_train.py "${train_flags[@]}" "$@" # once, and not for each cluster

runs=() failed=() code=0
for i in "${!labels[@]}"; do
    echo "cluster ${labels[i]} ($((i + 1)) of ${#labels[@]})"
    # A label such as 6/10ss, a subset of a cluster, makes one name.
    run=$OPENAI_LOGDIR-clus${labels[i]//\//_}
    status=0
    OPENAI_LOGDIR=$run forwarding \
        "${LAUNCH[@]}" "$ROOT/image_train.py" --data_dir "${folders[i]}" "${train_flags[@]}" \
        --init_checkpoint "$checkpoint" "$@" || status=$?
    if [[ -n $stopped ]] || ((status == 75)) || { ((status == 0)) && stopped_early "$run"; }; then
        echo "stopped: the same command goes on"
        exit 75
    fi
    if ((status)); then
        echo "cluster ${labels[i]} failed" >&2
        failed+=("${labels[i]}") code=$status
        continue
    fi
    runs+=("${labels[i]}=$run")
    "${PYTHON:-python}" "$ROOT/scripts/summarise_runs.py" -- "$OPENAI_LOGDIR-finetune.csv" "${runs[@]}"
done
((${#runs[@]} == 0)) || echo "summary: $OPENAI_LOGDIR-finetune.csv"
if ((code)); then
    echo "error: not fine-tuned: ${failed[*]}" >&2
    exit "$code"
fi
