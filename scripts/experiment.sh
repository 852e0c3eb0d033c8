#!/usr/bin/env bash
# Does it help? Segmenters trained on a share of the real patches, alone and with synthetic ones, and with what a lab
# could do instead with the same images; tested on the same whole test slides.
#
#   bash scripts/experiment.sh RAW OUT [CONFIG]
#
# CONFIG (default experiment/experiment.conf beside this script) holds all settings. Its GRID says which cells there
# are, each a track (what the diffusion model sees), a share and a seed; its VARIANTS what the segmenters of a cell are
# trained on: docs/experiment.md explains both. All segmenters of a cell train for the same steps, with the same slides
# held out, by which alone they are chosen. Writes OUT/results.csv, a row a segmenter and slide, OUT/results.md, a table
# a track and share, and OUT/results.png, gains with their intervals; after each cell of what is there by then.
# OUT/config is a copy of CONFIG, OUT/CELL/split/split.csv says which patch has which part in a cell.
#
# Snakemake runs it, by experiment/experiment.smk; its flags go at the end: --dry-run says what would be done, after the
# plan with its hours, which comes first always. pipeline.sh says which others, and what is done anew, or goes on, where
# the same command is run again. Cells are done at once, each on a GPU, or on a CPU core where there is none; where one
# fails, the others go on. From the environment:
#   NPROC 1: GPUs of one training; TIME_LIMIT as in pipeline.sh;
#   CELLS="masks-f10-s0 masks-f10-s1" does these cells alone, so that several jobs can divide them; CELLS=none makes the
#   patches that all need, which comes first.
set -euo pipefail
NPROC=${NPROC:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"

need 2 "bash scripts/experiment.sh RAW OUT [CONFIG] [flags of snakemake ...]" "$@"
need_python
raw=$1 target=$2 config=$ROOT/scripts/experiment/experiment.conf
shift 2
if (($#)) && [[ $1 != -* ]]; then
    config=$1
    shift
fi
need_file "$config" CONFIG
[[ -d $raw ]] || die "RAW $raw is not a folder: give the one the archives were unpacked in"
grep -q '^ *GRID=(' "$config" || die "CONFIG $config has no GRID: begin with a copy of another"
# shellcheck source=experiment/experiment.conf
source "$config"
[[ -n ${GRID:-} && -n ${VARIANTS:-} ]] || die "CONFIG $config has no GRID or no VARIANTS: begin with a copy of another"
absolute_backbone
printf -v SDM_GRID '%s\n' "${GRID[@]}"
printf -v SDM_VARIANTS '%s\n' "${VARIANTS[@]}"
export SDM_GRID SDM_VARIANTS CELLS=${CELLS:-} VAL_SHARE CLUSTER NPROC BACKBONE DIFFUSION_STEPS DIFFUSION_BATCH
export MAX_EPOCHS EMA_RATE S RATES RATES_OF
for name in PATCH TEST CLUSTER MODEL DIFFUSION SAMPLE FILTER PATCHCORE SEGMENTER PLAIN COLOUR; do
    declare -n flags_of=${name}_FLAGS
    words=
    ((${#flags_of[@]} == 0)) || printf -v words '%q ' "${flags_of[@]}"
    declare "SDM_${name}_FLAGS=$words"
    export "SDM_${name}_FLAGS"
done
# First of all, so that what cannot be trained shows before days of training do. What is missing, plan.py says.
check_flags image_train.py "${MODEL_FLAGS[@]}" "${DIFFUSION_FLAGS[@]}" --ema_rate "${EMA_RATE:-0.9999}"
check_flags image_sample.py "${SAMPLE_FLAGS[@]}" --s "${S:-1.5}"
if is_dry_run "$@"; then
    "${PYTHON:-python}" "$ROOT/scripts/experiment/plan.py" "$raw" "$target" --dry_run
    cells=1
else
    "${PYTHON:-python}" "$ROOT/scripts/experiment/plan.py" "$raw" "$target"
    [[ $config -ef $target/config ]] || cp -- "$config" "$target/config"
    cells=$(grep -cE '^ *"(slides|masks|patches)-f' "$target/grid.json" || true) # one a line
fi
workflow experiment/experiment.smk "$raw" "$target" --test_slides --parallel "$((cells ? cells : 1))" --keep-going "$@"
