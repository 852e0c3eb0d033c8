#!/usr/bin/env bash
# Does it help? A segmenter trained on a share of the real slides; on those and synthetic patches of their structures,
# filtered and not; with plain colour augmentation in place of those, and on top of them. Each share and seed has a
# diffusion model of its own, which has seen that share's slides alone, but for those held out, by which segmenters are
# chosen; all segmenters of a share and seed train for the same steps with the same slides held out, and are tested on
# the same whole test slides.
#
#   bash scripts/experiment.sh RAW OUT [CONFIG]
#
# CONFIG (default experiment/experiment.conf beside this script) holds all settings. Writes OUT/results.csv,
# OUT/results.md, a table, and OUT/results.png, F1 over the share, a line a variant; after each share and seed, of what
# is there by then. OUT/config is a copy of CONFIG.
#
# Snakemake runs it, by experiment/experiment.smk; its flags go at the end. pipeline.sh says which, and what is done
# anew, or goes on, where the same command is run again. Shares and seeds are done at once, each on a GPU, or on a CPU
# core where there is none. From the environment:
#   NPROC 1: GPUs of one training; TIME_LIMIT as in pipeline.sh;
#   CELLS="f10-s0 f10-s1" does these shares and seeds alone, so that several jobs can divide them; CELLS=none makes the
#   patches that all need, which comes first.
set -euo pipefail
NPROC=${NPROC:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"

need 2 "bash scripts/experiment.sh RAW OUT [CONFIG] [flags of snakemake ...]" "$@"
raw=$1 target=$2 config=$ROOT/scripts/experiment/experiment.conf
shift 2
if (($#)) && [[ $1 != -* ]]; then
    config=$1
    shift
fi
need_file "$config" CONFIG
[[ -d $raw ]] || die "RAW $raw is not a folder: give the one the archives were unpacked in"
[[ ! -e $target || -d $target ]] || die "OUT $target is a file: give a folder"
# shellcheck source=experiment/experiment.conf
source "$config"
cells=()
for fraction in $FRACTIONS; do
    for seed in $SEEDS; do
        cells+=("f$fraction-s$seed")
    done
done
for cell in ${CELLS:-}; do
    [[ " none ${cells[*]} " == *" $cell "* ]] || die "CELLS names $cell: choose of ${cells[*]}, or none"
done
case $APPEARANCES in all | share) ;; *) die "APPEARANCES=$APPEARANCES in $config: give all or share" ;; esac
STRUCTURES=${STRUCTURES:-real}
check_structures
export CELLS=${CELLS:-${cells[*]}} FRACTIONS SEEDS VAL_SHARE NPROC APPEARANCES STRUCTURES
export DIFFUSION_STEPS DIFFUSION_BATCH MAX_EPOCHS EMA_RATE SAMPLES S
for name in PATCH TEST MODEL DIFFUSION SAMPLE FILTER SEGMENTER PLAIN COLOUR; do
    declare -n flags_of=${name}_FLAGS
    printf -v "SDM_${name}_FLAGS" '%q ' "${flags_of[@]}"
    export "SDM_${name}_FLAGS"
done
# First of all, so that what cannot be trained shows before days of training do.
"${PYTHON:-python}" "$ROOT/scripts/experiment/plan.py" "$raw"
mkdir -p "$target"
cp -- "$config" "$target/config"
workflow experiment/experiment.smk "$raw" "$target" --test_slides --parallel "$(wc -w <<<"$CELLS")" "$@"
