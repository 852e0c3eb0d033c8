#!/usr/bin/env bash
# Train the model in weights/, which demo.sh paints with: 64 px patches of the 2018 Data Science Bowl's stained tissue.
#
#   bash scripts/make_weights.sh RAW OUT [WEIGHTS]
#
# RAW is a folder of slides that prepare_monuseg.py reads; WEIGHTS, by default OUT/weights, is made of the best
# checkpoint. Every STEP (1000) steps 216 samples are made with structures and colours of RAW's test slides, and their
# kernel distance to these is measured: OUT/marks.csv. Training ends where none of PATIENCE (2) marks in a row is 3 %
# below the best before, or at MAX_STEPS (20000): some hours of two CPU cores; the same command goes on. The images in
# weights/appearances, whose colours demo.sh takes, are samples of the last mark, chosen by eye; add their sums.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"

need 2 "bash scripts/make_weights.sh RAW OUT [WEIGHTS]" "$@"
need_python
raw=$1 out=$2 weights=${3:-$2/weights}
every=${STEP:-1000} patience=${PATIENCE:-2} most=${MAX_STEPS:-20000}
for number in "$every" "$patience" "$most"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || die "STEP, PATIENCE and MAX_STEPS are whole numbers above 0, not $number"
done
python=${LAUNCH[*]: -1}
export OPENAI_LOGDIR=$out/model OPENAI_LOG_FORMAT=log,csv

# run PROGRAM ...: one of the project's programs, to its end; a stop goes to it.
run() {
    forwarding "$python" "$ROOT/$1" "${@:2}"
    [[ -z $stopped ]] || exit 75
}

[[ -d $raw ]] || die "RAW $raw is not a folder: give one of slides"
((most % every == 0)) || die "MAX_STEPS=$most is no multiple of STEP=$every: there would be no last mark"
make_folder "$out" OUT
run scripts/prepare_monuseg.py "$raw" "$out/patches" --patch_size 128 --stride 64 --resize 64
# The test slides, where samples take structures and colours from, and what they are held against.
mkdir -p "$out/tests"
cp "$out/patches/prepare.json" "$out/tests"
ln -sfn ../patches/MoNuSegTestData "$out/tests/MoNuSegTrainingData"
train_flags=(
    --data_dir "$out/patches" --val_split none --data_licence "${DATA_LICENCE:-CC0}"
    --image_size 64 --num_channels 32 --channel_mult 1,1,2,2 --num_res_blocks 1 --num_head_channels 32
    --attention_resolutions 8 --resblock_updown True --use_scale_shift_norm True --use_fp16 True
    --noise_schedule cosine --learn_sigma False --predict_v True --spade_channels 24
    --num_classes 6 --use_hv_map True --use_col_map True --augment True --stain_jitter 0.5 --drop_rate 0.1
    --lr 1e-3 --batch_size 8 --ema_rate 0.999 --num_workers 0 --save_interval "$every"
)

# measure STEPS: sample and measure at a mark; FOLDER/figures.csv says kernel distance and colour error.
measure() {
    local folder=$out/marks/$1 checkpoint
    checkpoint=$OPENAI_LOGDIR/ema_0.999_$(printf %06d "$1").pt
    mkdir -p "$folder"
    cp "$OPENAI_LOGDIR/card.md" "$OPENAI_LOGDIR/config.json" "$checkpoint" "$folder"
    run image_sample.py --model_path "$checkpoint" --data_dir "$out/tests" --results_path "$folder/samples" \
        --use_train True --match_struct True --s 1.5 --sampler dpmpp_2m_sde --num_steps 25 \
        --num_samples 216 --batch_size 18 --num_workers 0
    run scripts/evaluate.py --data_dir "$out/tests" --synthetic "$folder/samples" \
        --results_path "$folder/evaluation" --metrics kid,colour
    "$python" - "$folder" "$1" <<'PYTHON'
import json, os, sys
folder, steps = sys.argv[1:]
(found,) = json.load(open(f"{folder}/evaluation/metrics.json"))["runs"].values()
with open(f"{folder}/figures.part", "w") as file:
    file.write(f"{steps},{found['kid']['value']:.4f},{found['colour_od']:.4f}\n")
os.replace(f"{folder}/figures.part", f"{folder}/figures.csv")
PYTHON
}

best=0 best_kid=inf since=0
for ((steps = every; steps <= most && since < patience; steps += every)); do
    if [[ ! -f $out/marks/$steps/figures.csv ]]; then
        run image_train.py "${train_flags[@]}" --max_steps "$steps"
        ! stopped_early "$OPENAI_LOGDIR" || exit 75
        measure "$steps"
    fi
    IFS=, read -r _ kid colour <"$out/marks/$steps/figures.csv"
    echo "step $steps: kernel distance $kid, colour error $colour"
    if [[ $best_kid == inf ]] || awk "BEGIN { exit !($kid < 0.97 * $best_kid) }"; then
        best=$steps best_kid=$kid since=0
    else
        since=$((since + 1))
    fi
done

{
    echo "steps,kernel distance,colour error"
    sort -n "$out"/marks/*/figures.csv
} >"$out/marks.csv"
{
    printf '## Figures\n\n'
    printf 'The data are stained tissue of the 2018 Data Science Bowl (Caicedo et al. 2019, BBBC038, CC0).\n'
    printf '216 samples with structures and colours of the test slides, which it has not seen, in 25 steps of\n'
    printf 'dpmpp_2m_sde at s = 1.5, held against patches of these slides. Step %s is this one.\n\n' "$best"
    printf '| steps | kernel distance | colour error, optical density |\n|---|---|---|\n'
    tail -n +2 "$out/marks.csv" | sed 's/,/ | /g; s/.*/| & |/'
} >"$out/figures.md"
run scripts/publish_model.py "$out/marks/$best/ema_0.999_$(printf %06d "$best").pt" "$weights" \
    --figures "$out/figures.md"
