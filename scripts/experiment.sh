#!/usr/bin/env bash
# Does it help? A segmenter trained on a share of the real slides; on those and synthetic patches made from them,
# filtered and not; and on those with plain colour augmentation. Each share and seed has a diffusion model of its own,
# which has seen that share's slides alone; all segmenters are tested on the same whole test slides.
#
#   bash scripts/experiment.sh RAW OUT [CONFIG]
#
# CONFIG (default experiment.conf beside this script) holds all settings. Writes OUT/results.csv, OUT/results.md, a table,
# and OUT/results.png, F1 over the share, a line a variant; after each segmenter, of what is there by then.
# TIME_LIMIT=540 stops after so many seconds; the same command goes on where it was, as it does after a kill.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"
source "$ROOT/scripts/stages.sh"

need 2 "bash scripts/experiment.sh RAW OUT [CONFIG]" "$@"
raw=${1%/} out=${2%/} config=${3:-$ROOT/scripts/experiment.conf}
need_file "$config" CONFIG
[[ -d $raw ]] || die "RAW $raw is not a folder: give the one the archives were unpacked in"
if [[ -f $out/config ]] && ! cmp -s "$config" "$out/config"; then
    die "OUT $out was begun with another CONFIG, kept there as config: give another OUT"
fi
source "$config"
begin_stages "$out"
cp -- "$config" "$out/config"
python=${PYTHON:-python}

# segmenter VARIANT DATA FLAGS...: train one on a data folder, test it, and draw the results that there are by now.
segmenter() {
    local variant=$1 data=$2
    shift 2
    stage "$name-$variant-train" "$here/$variant/result.json" "$python" "$ROOT/scripts/train_segmenter.py" "$data" \
        --out "$here/$variant" --seed "$seed" "${SEGMENTER_FLAGS[@]}" "$@"
    stage "$name-$variant-test" "$here/$variant/test/metrics.json" "$python" "$ROOT/scripts/segment.py" \
        "$here/$variant/segmenter.pt" "$test/images" --truth "$test/inst_masks" --out "$here/$variant/test"
    "$python" "$ROOT/scripts/experiment_results.py" "$out"
}

stage patches "$out/patches/prepare.json" "$python" "$ROOT/scripts/prepare_monuseg.py" \
    "$raw" "$out/patches" "${PATCH_FLAGS[@]}"
stage test "$out/test/prepare.json" "$python" "$ROOT/scripts/prepare_monuseg.py" "$raw" "$out/test" "${TEST_FLAGS[@]}"
test=$out/test/MoNuSegTestData
[[ -d $test ]] || die "RAW $raw has no test slides: the experiment needs some"

for seed in $SEEDS; do
    for fraction in $FRACTIONS; do
        name=f$fraction-s$seed here=$out/f$fraction-s$seed
        stage "$name-real" "$here/real/MoNuSegTrainingData" "$python" "$ROOT/scripts/subset_slides.py" \
            "$out/patches" "$here/real" --percent "$fraction" --seed "$seed"
        segmenter real "$here/real" "${PLAIN_FLAGS[@]}"
        segmenter colour "$here/real" "${COLOUR_FLAGS[@]}"

        count=$(find "$here/real/MoNuSegTrainingData/images/" -name '*.png' | wc -l)
        samples=$(((count * SAMPLES_PER_100_REAL + 99) / 100))
        OPENAI_LOGDIR=$here/model stage "$name-model" "$here/model/ema_${EMA_RATE}_$(printf %06d "$DIFFUSION_STEPS").pt" \
            "${LAUNCH[@]}" "$ROOT/image_train.py" --data_dir "$here/real" "${MODEL_FLAGS[@]}" "${DIFFUSION_FLAGS[@]}" \
            --ema_rate "$EMA_RATE" --max_steps "$DIFFUSION_STEPS" --seed "$seed" --val_split none
        stage "$name-samples" "$here/samples/grid.png" "${LAUNCH[@]}" "$ROOT/image_sample.py" \
            --model_path "$here/model/ema_${EMA_RATE}_$(printf %06d "$DIFFUSION_STEPS").pt" --data_dir "$here/real" \
            --use_train True --results_path "$here/samples" --num_samples "$samples" --s "$S" --seed "$seed" \
            "${SAMPLE_FLAGS[@]}"
        stage "$name-filter" "$here/filtered/report.json" "$python" "$ROOT/scripts/filter_ood.py" --real "$here/real" \
            --synthetic "$here/samples" --out "$here/filtered" --seed "$seed" "${FILTER_FLAGS[@]}"
        stage "$name-with-filtered" "$here/with_filtered/manifest.csv" "$python" "$ROOT/scripts/assemble_set.py" \
            --real "$here/real" --synthetic "$here/filtered/kept" --out "$here/with_filtered" --seed "$seed" --ratio all
        stage "$name-with-all" "$here/with_all/manifest.csv" "$python" "$ROOT/scripts/assemble_set.py" \
            --real "$here/real" --synthetic "$here/samples" --out "$here/with_all" --seed "$seed" --ratio all
        segmenter filtered "$here/with_filtered" "${PLAIN_FLAGS[@]}"
        segmenter unfiltered "$here/with_all" "${PLAIN_FLAGS[@]}"
    done
done
echo "look at $out/results.png and $out/results.md"
