#!/usr/bin/env bash
# Sample labelled patches from one checkpoint at one guidance scale, S (default 1.5).
#
#   bash scripts/sample_single.sh DATA CHECKPOINT OUT_DIR [flags of image_sample.py ...]
#
# flags.sh lists what else the environment sets.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"

need 3 "bash scripts/sample_single.sh DATA CHECKPOINT OUT_DIR [flags of image_sample.py ...]" "$@"
need_python
data=$1 checkpoint=$2 out_dir=$3
shift 3

exec "${LAUNCH[@]}" "$ROOT/image_sample.py" --data_dir "$data" "${DATA_FLAGS[@]}" \
    "${MODEL_FLAGS[@]}" "${CONDITION_FLAGS[@]}" "${SAMPLE_FLAGS[@]}" \
    --model_path "$checkpoint" --results_path "$out_dir" --s "${S:-1.5}" "$@"
