#!/usr/bin/env bash
# Pretrain on a whole data set.
#
#   bash scripts/train.sh DATA [flags of image_train.py ...]
#
# DATA holds MoNuSegTrainingData. Checkpoints and logs go to OPENAI_LOGDIR. UNLABELLED=DIR learns from images without
# masks as well, see docs/training.md. flags.sh lists what else the environment sets.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"

need 1 "bash scripts/train.sh DATA [flags of image_train.py ...]" "$@"
need_python
data=$1
shift

exec "${LAUNCH[@]}" "$ROOT/image_train.py" --data_dir "$data" "${DATA_FLAGS[@]}" \
    "${MODEL_FLAGS[@]}" "${CONDITION_FLAGS[@]}" "${TRAIN_FLAGS[@]}" --max_steps "${MAX_STEPS:-0}" "$@"
