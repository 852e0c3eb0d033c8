#!/usr/bin/env bash
# The whole road in minutes, on two cores: slides -> patches -> labelled samples of the model in weights/, and a
# picture; then a small model is trained on the patches, and makes samples and a picture, too.
#
#   bash scripts/demo.sh                        with toy slides, so without any download
#   RAW=path/to/MoNuSeg bash scripts/demo.sh    with the real ones: the folder the archives were unpacked in
#
# From the environment, with the default: STEPS 300 (of training), DEMO_DIR (demo_output in the repository's root),
# PYTHON (see setup.sh). All is made anew each time, in DEMO_DIR/toy or DEMO_DIR/real.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"

python=$ROOT/.venv/bin/python
raw=${RAW:-}
steps=${STEPS:-300}
samples=12
sampling_steps=25
demo=${DEMO_DIR:-$ROOT/demo_output}
work=$demo/toy
if [[ -n $raw ]]; then
    work=$demo/real
    [[ -d $raw ]] || die "RAW=$raw is not a folder: give the one the MoNuSeg archives were unpacked in"
fi
[[ $steps =~ ^[1-9][0-9]*$ ]] || die "STEPS=$steps is not a number of training steps"

# fresh FOLDER: make it, or empty it of what an earlier demo wrote; what is somebody else's stays.
fresh() {
    if [[ -e $1 && ! -e $1/.demo && -n $(ls -A "$1") ]]; then
        die "$1 is there but not by this script: move it away, or set DEMO_DIR to another folder"
    fi
    make_folder "$1" DEMO_DIR
    touch "$1/.demo"
    find "$1" -mindepth 1 ! -name .demo -delete
}

# stage TEXT COMMAND...: say what comes, do it, say how long it took.
stage=0
stage() {
    local began=$SECONDS
    stage=$((stage + 1))
    echo "[$stage/5] $1"
    forwarding "${@:2}"
    [[ -z $stopped ]] || exit 143
    echo "      took $((SECONDS - began)) s"
}

# Threads that wait do so asleep: where anything else runs beside, spinning would slow training tenfold.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

bash "$ROOT/scripts/setup.sh"
for folder in patches painted model samples; do
    fresh "$work/$folder"
done

if [[ -n $raw ]]; then
    stage "taking the slides in $raw" true
else
    raw=$work/raw
    fresh "$raw"
    stage "drawing toy slides, with known nuclei" "$python" "$ROOT/scripts/make_toy_monuseg.py" "$raw"
fi

stage "preparing patches of 128 px, reduced to 64 px" \
    "$python" "$ROOT/scripts/prepare_monuseg.py" "$raw" "$work/patches" --patch_size 128 --stride 64 --resize 64

# Structures and appearances that training has not seen, where the slides include test slides.
use_train=True
[[ ! -d $work/patches/MoNuSegTestData ]] || use_train=False
sample_flags=(
    --data_dir "$work/patches" --use_train "$use_train" --match_struct True --s 1.5
    --sampler dpmpp_2m_sde --num_steps "$sampling_steps" --num_samples "$samples" --batch_size "$samples"
)
weights=("$ROOT"/weights/ema_*.pt)
stage "painting $samples patches with the model in weights/, in $sampling_steps steps" \
    "$python" "$ROOT/image_sample.py" --model_path "${weights[0]}" --results_path "$work/painted" "${sample_flags[@]}" \
    --appearance_dir "$ROOT/weights/appearances" # in stains that it knows

# It is small, and learns from crops of the patches.
model_flags=(
    --image_size 32 --num_channels 32 --channel_mult 1,2,2 --num_res_blocks 1 --num_head_channels 32
    --attention_resolutions 8 --resblock_updown True --use_scale_shift_norm True --use_fp16 True
    --noise_schedule cosine --learn_sigma False --predict_v True --loss_weights min_snr --spade_channels 32
    --num_classes 6 --use_hv_map True --use_col_map True
)
stage "training a small model for $steps steps, of up to 1 s each on two cores" \
    env OPENAI_LOGDIR="$work/model" OPENAI_LOG_FORMAT=log,csv \
    "$python" "$ROOT/image_train.py" --data_dir "$work/patches" "${model_flags[@]}" \
    --lr 1e-3 --batch_size 8 --ema_rate 0.99 --drop_rate 0.1 --max_steps "$steps"

stage "sampling $samples patches of 32 px from it" \
    "$python" "$ROOT/image_sample.py" --model_path "$work/model/ema_0.99_$(printf %06d "$steps").pt" \
    --results_path "$work/samples" "${model_flags[@]}" "${sample_flags[@]}"

echo "all of it took $SECONDS s. The pictures, of the model in weights/ and of the one just trained:"
echo "$work/painted/grid.png"
echo "$work/samples/grid.png"
