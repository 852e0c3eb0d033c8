#!/usr/bin/env bash
# Does it help? A segmenter trained on a share of the real slides; on those and synthetic patches of their structures,
# filtered and not; with plain colour augmentation in place of those, and on top of them. Each share and seed has a
# diffusion model of its own, which has seen that share's slides alone; all segmenters are tested on the same whole test
# slides.
#
#   bash scripts/experiment.sh RAW OUT [CONFIG]
#
# CONFIG (default experiment.conf beside this script) holds all settings. Writes OUT/results.csv, OUT/results.md, a
# table, and OUT/results.png, F1 over the share, a line a variant; after each share and seed, of what is there by then.
# TIME_LIMIT=540 stops after so many seconds; the same command goes on where it was, as it does after a kill.
# CELLS="f10-s0 f10-s1" does these shares and seeds alone, so that several GPUs or jobs can divide them; CELLS=none
# makes the patches that all need, which comes first.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"
source "$ROOT/scripts/stages.sh"

need 2 "bash scripts/experiment.sh RAW OUT [CONFIG]" "$@"
raw=$(realpath -ms -- "$1") out=$(realpath -ms -- "$2") config=${3:-$ROOT/scripts/experiment.conf}
need_file "$config" CONFIG
[[ -d $raw ]] || die "RAW $raw is not a folder: give the one the archives were unpacked in"
if [[ -f $out/config ]] && ! cmp -s "$config" "$out/config"; then
    die "OUT $out was begun with another CONFIG, kept there as config: give another OUT"
fi
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
begin_stages "$out"
cp -- "$config" "$out/config"
python=${PYTHON:-python}

# segmenter VARIANT DATA FLAGS...: train one on a data folder, and test it. No later stage needs it.
segmenter() {
    local variant=$1 data=$2 before=$before
    shift 2
    resumed "$name-$variant-train" "$here/$variant/result.json" "$python" "$ROOT/scripts/train_segmenter.py" "$data" \
        --out "$here/$variant" --seed "$seed" "${SEGMENTER_FLAGS[@]}" "$@"
    stage "$name-$variant-test" "$here/$variant/test/metrics.json" "$python" "$ROOT/scripts/segment.py" \
        "$here/$variant/segmenter.pt" "$test/images" --truth "$test/inst_masks" --out "$here/$variant/test"
}

# mix VARIANT SYNTHETIC: make $here/VARIANT-set of the real slides and synthetic patches.
mix() {
    stage "$name-$1-set" "$here/$1-set/manifest.csv" "$python" "$ROOT/scripts/assemble_set.py" \
        --real "$here/slides" --synthetic "$2" --out "$here/$1-set" --seed "$seed" --ratio all
}

stage patches "$out/patches/prepare.json" "$python" "$ROOT/scripts/prepare_monuseg.py" \
    "$raw" "$out/patches" "${PATCH_FLAGS[@]}"
stage test "$out/test/prepare.json" "$python" "$ROOT/scripts/prepare_monuseg.py" "$raw" "$out/test" "${TEST_FLAGS[@]}"
test=$out/test/MoNuSegTestData
[[ -d $test ]] || die "RAW $raw has no test slides: the experiment needs some"

trunk=$before
for name in ${CELLS:-${cells[@]}}; do
    [[ $name != none ]] || continue
    before=$trunk
    here=$out/$name fraction=${name#f} seed=${name##*-s}
    fraction=${fraction%-s*}
    stage "$name-slides" "$here/slides/MoNuSegTrainingData" "$python" "$ROOT/scripts/subset_slides.py" \
        "$out/patches" "$here/slides" --percent "$fraction" --seed "$seed"
    segmenter real "$here/slides" "${PLAIN_FLAGS[@]}"
    segmenter colour "$here/slides" "${COLOUR_FLAGS[@]}"

    model=$here/model/ema_${EMA_RATE}_$(printf %06d "$DIFFUSION_STEPS").pt
    OPENAI_LOGDIR=$here/model resumed "$name-model" "$model" \
        "${LAUNCH[@]}" "$ROOT/image_train.py" --data_dir "$here/slides" \
        "${MODEL_FLAGS[@]}" "${DIFFUSION_FLAGS[@]}" --ema_rate "$EMA_RATE" \
        --max_steps "$DIFFUSION_STEPS" --seed "$seed" --val_split none
    # Fewer samples than structures: some of every slide, where --num_samples alone would take the first slides'.
    structures=("$here"/slides/MoNuSegTrainingData/images/*)
    subsample=()
    if ((SAMPLES > 0 && SAMPLES < ${#structures[@]})); then
        subsample=(--subsample "0.$(printf %06d $(((2 * SAMPLES + 1) * 500000 / ${#structures[@]})))")
    fi
    resumed "$name-samples" "$here/samples/grid.png" "${LAUNCH[@]}" "$ROOT/image_sample.py" \
        --model_path "$model" --data_dir "$here/slides" --use_train True --results_path "$here/samples" \
        --num_samples "$SAMPLES" "${subsample[@]}" --s "$S" --seed "$seed" "${SAMPLE_FLAGS[@]}"
    stage "$name-filter" "$here/ood/report.json" "$python" "$ROOT/scripts/filter_ood.py" \
        --real "$here/slides" --synthetic "$here/samples" --out "$here/ood" --seed "$seed" "${FILTER_FLAGS[@]}"
    filtered=$before
    mix unfiltered "$here/samples"
    segmenter unfiltered "$here/unfiltered-set" "${PLAIN_FLAGS[@]}"
    if compgen -G "$here/ood/kept/samples/*.png" >/dev/null; then
        before=$filtered
        mix filtered "$here/ood/kept"
        segmenter filtered "$here/filtered-set" "${PLAIN_FLAGS[@]}"
        segmenter filtered-colour "$here/filtered-set" "${COLOUR_FLAGS[@]}"
    else
        echo "[$name] the filter kept no sample: nothing to train on besides the real ones"
    fi
    "$python" "$ROOT/scripts/experiment_results.py" "$out"
done
if [[ -f $out/results.md ]]; then
    echo "look at $out/results.png and $out/results.md"
fi
