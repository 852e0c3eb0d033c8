#!/usr/bin/env bash
# Make the synthetic set: sample from several checkpoints of one run, each at several guidance scales, as one job.
#
#   bash scripts/sample.sh DATA MODEL_DIR OUT_DIR [flags of image_sample.py ...]
#
# From the environment, with the default: ITERATIONS "030000 040000 050000", S_VALUES "1.3 1.4 1.5 1.6",
# KIND ema (the average of the weights at EMA_RATE, 0.9999) or model (the weights themselves).
# Fills OUT_DIR/MODEL_sS for each pair, and draws OUT_DIR/sweep.png; a single pair fills OUT_DIR itself. Stopped at any
# moment and started again with the same command, it goes on where it was. flags.sh lists what else the environment
# sets.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"

need 3 "bash scripts/sample.sh DATA MODEL_DIR OUT_DIR [flags of image_sample.py ...]" "$@"
need_python
data=$1 model_dir=${2%/} out_dir=$3
shift 3
read -ra iterations <<<"${ITERATIONS:-030000 040000 050000}"
read -ra s_values <<<"${S_VALUES:-1.3 1.4 1.5 1.6}"
case ${KIND:=ema} in
    model) stem=model ;;
    ema) stem=ema_${EMA_RATE:-0.9999}_ ;;
    *) die "KIND=$KIND is neither ema nor model" ;;
esac

checkpoints=()
for iteration in "${iterations[@]}"; do
    [[ $iteration =~ ^[0-9]+$ ]] || die "ITERATIONS: $iteration is not a number of steps"
    checkpoint=$model_dir/$stem$(printf %06d "$((10#$iteration))").pt
    need_file "$checkpoint" checkpoint
    checkpoints+=("$checkpoint")
done

exec "${LAUNCH[@]}" "$ROOT/image_sample.py" --data_dir "$data" "${DATA_FLAGS[@]}" \
    "${MODEL_FLAGS[@]}" "${CONDITION_FLAGS[@]}" "${SAMPLE_FLAGS[@]}" \
    --model_path "$(join "${checkpoints[@]}")" --s "$(join "${s_values[@]}")" --results_path "$out_dir" "$@"
