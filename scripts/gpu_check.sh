#!/usr/bin/env bash
# What only a GPU can show, in ten minutes at most: the tests marked cuda, the benchmarks at the README's size, short
# trainings on patches of 128 px. Leaves OUT/gpu.md, a table for README's "What it costs", and a log of each part.
#
#   bash scripts/gpu_check.sh OUT                          with toy slides
#   RAW=path/to/MoNuSeg bash scripts/gpu_check.sh OUT      with the real ones: the folder of the unpacked archives
#
# PYTHON, or an active virtual environment, has what requirements.txt names, with any torch from 2.11 on and any Python
# from 3.11 on; else setup.sh makes .venv. One GPU is used, and up to 3 GB of disk, for a checkpoint at a time, which
# goes again. Exit code 1: a part failed, which the table names.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/flags.sh"

need 1 "bash scripts/gpu_check.sh OUT" "$@"
out=$1
raw=${RAW:-}
[[ $# == 1 ]] || die "gpu_check.sh takes one folder, not also $2"
[[ ! -e $out ]] || die "$out is there already: give a new folder"
[[ -z $raw || -d $raw ]] || die "RAW=$raw is not a folder: give the one the MoNuSeg archives were unpacked in"

python=${PYTHON:-python}
if [[ -z ${PYTHON:-}${VIRTUAL_ENV:-} ]]; then
    # Before gigabytes are installed for nothing.
    nvidia-smi -L 2>/dev/null | grep -q '^GPU ' || die "there is no GPU here: this script measures nothing else"
    bash "$ROOT/scripts/setup.sh"
    python=$ROOT/.venv/bin/python
fi
modules=(torch numpy scipy PIL tifffile cv2 blobfile tqdm pytest)
find='import importlib.util, sys; print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))'
missing=$("$python" -c "$find" "${modules[@]}") || die "$python does not run: set PYTHON to one that does"
[[ -z $missing ]] || die "$python lacks $missing: install what requirements.txt names, of torch any from 2.11 on"

export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
ask='from guided_diffusion import cli, devices
import torch as th

def main():
    found = th.cuda.get_device_properties(devices.find_device("cuda"))
    print(found.total_memory >> 30, found.name)

cli.run(main)'
device=$("$python" -c "$ask") || exit 2
read -r memory device <<<"$device"
device="$device, $memory GiB"
make_folder "$out" OUT
out=$(realpath -- "$out")
: >"$out/parts.csv"

# part NAME SECONDS COMMAND...: run it, for so long at most, into OUT/NAME.log. SIGTERM ends a training with 0.
failed=0
part() {
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    echo "$name: up to $limit s"
    forwarding timeout --preserve-status --signal=TERM --kill-after=40 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    [[ -z $stopped ]] || exit 143
    echo "$name,$((SECONDS - began)),$code" >>"$out/parts.csv"
    ((code == 0)) || failed=1
}

# train NAME FLAGS...: the README's model for 40 s; what is measured is the program itself.
train() {
    OPENAI_LOGDIR=$out/$1 OPENAI_LOG_FORMAT=log,csv part "$1" 40 "$python" "$ROOT/image_train.py" --device cuda \
        --data_dir "$out/patches" "${DATA_FLAGS[@]}" "${MODEL_FLAGS[@]}" "${CONDITION_FLAGS[@]}" --drop_rate 0.2 \
        --val_split none --log_interval 5 --num_workers 4 --max_steps 1000000 "${@:2}"
    rm -f -- "$out/$1"/*.pt
}

pytest=("$python" -m pytest -c "$ROOT/pyproject.toml" -p no:cacheprovider "$ROOT/tests/test_cuda.py")
part tests 90 "${pytest[@]}" -m "cuda and not slow"
part compile 70 "${pytest[@]}" -m "cuda and slow"
if [[ -z $raw ]]; then
    raw=$out/toy
    part toy 20 "$python" "$ROOT/scripts/make_toy_monuseg.py" "$raw" --size 512
fi
part patches 40 "$python" "$ROOT/scripts/prepare_monuseg.py" "$raw" "$out/patches" --patch_size 128 --stride 128
bf16=(--precision bf16 --use_fp16 False)
train readme --batch_size 8 --use_checkpoint True
if ((memory > 72)); then
    train batch64 --batch_size 64 "${bf16[@]}"
else
    train batch16 --batch_size 16 "${bf16[@]}"
fi
train auto --batch_size 64 --microbatch auto "${bf16[@]}" --use_checkpoint True
part sampling 70 "$python" "$ROOT/scripts/benchmarks/benchmark_sampling.py" --batch_size 16 --rounds 1 --end_to_end 25
part training 70 "$python" "$ROOT/scripts/benchmarks/benchmark_training.py" --config readme --batch_size 8 --repeats 1

"$python" "$ROOT/scripts/benchmarks/gpu_table.py" "$out" "$device" >"$out/gpu.md"
cat "$out/gpu.md"
exit "$failed"
