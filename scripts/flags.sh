# shellcheck shell=bash
# shellcheck disable=SC2034 # those who source it use them
# The launchers' shared flags and functions, which all but setup.sh and test.sh source.
#
# The arrays hold the README's 128 px configuration. From the environment, with the default:
#   IMAGE_SIZE 128, BATCH_SIZE 8 a GPU (sampling: 16), TOTAL_BATCH_SIZE: in place of it, on all GPUs of a training,
#   UNLABELLED: folders of images without masks that trainings learn from as well (DIR or DIR,DIR; none),
#   DATA_LICENCE: under which licence the data are, for the cards of models and sets (unknown),
#   RECIPE reference: README's; v: learns more in the same time (docs/training.md); of training and sampling alike,
#   LR 1e-4, SAVE_INTERVAL 5000, MAX_STEPS 0: no end (finetune.sh: 50000),
#   NUM_SAMPLES 1000, S 1.5 (sample_single.sh), SAMPLER dpmpp_2m_sde, NUM_STEPS 25,
#   ITERATIONS, S_VALUES, KIND, EMA_RATE (see sample.sh);
#   OUT OUTPUT: the folder of all training runs, OPENAI_LOGDIR $OUT/SDM-MoNuSeg: that of this one, OPENAI_LOG_FORMAT;
#   NPROC: processes, one a GPU, or 1 where there is none; MPIEXEC "mpiexec": the launcher with its own flags, if any;
#   PYTHON: the active virtual environment's, else that of setup.sh, else python.
# Any other flag goes at the end of a launcher's command line, where it wins over those here.
#
# Whoever only launches becomes the program, by exec; whoever waits hands it the signals, by forwarding. Exit code 75:
# what was stopped has saved, and the same command goes on.
#
# No launcher changes the directory, so that a relative path means what it means to the caller.
set -euo pipefail

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# die MESSAGE: a user's mistake ends in one line and exit code 2, as in the programs.
die() {
    echo "error: $*" >&2
    exit 2
}

# need COUNT USAGE ARGUMENT...: stop with the usage unless COUNT arguments come first and none of them is a flag.
need() {
    local count=$1 usage=$2 i
    shift 2
    for ((i = 1; i <= count; i++)); do
        if [[ -z ${!i:-} || ${!i} == -* ]]; then
            echo "usage: $usage" >&2
            exit 2
        fi
    done
}

# need_python: stop where there is none to launch.
need_python() {
    command -v -- "${PYTHON:-python}" >/dev/null \
        || die "${PYTHON:+PYTHON=}${PYTHON:-python} is not a program: run scripts/setup.sh, or set PYTHON to one"
}

# need_file PATH WHAT: stop unless there is such a file; a URL is left to the program that reads it.
need_file() {
    [[ $1 == *://* || -f $1 ]] || die "$2 $1 is not a file: check the path"
}

# join ITEM...: with commas between them.
join() {
    local IFS=,
    echo "$*"
}

# make_folder PATH WHAT: make it, with those above it; or stop.
make_folder() {
    { mkdir -p -- "$1" 2>/dev/null && [[ -w $1 ]]; } || die "$2 $1 cannot be made or written to: give another folder"
}

# check_flags PROGRAM FLAG...: stop, with its one line, unless a program takes these flags.
check_flags() {
    "${PYTHON:-python}" "$ROOT/$1" --dry_run True "${@:2}" >/dev/null || exit $?
}

# forwarding COMMAND...: run it to its end. Signals to this shell go to it as SIGTERM, at which the programs save, and
# set `stopped`: without that, bash would end and leave it behind.
stopped=
forwarding() {
    local child='' interrupted='' status=0
    trap 'stopped=1 interrupted=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP USR1
    "$@" &
    child=$!
    [[ -z $stopped ]] || kill -TERM "$child" 2>/dev/null || true
    while
        interrupted='' status=0
        wait "$child" || status=$?
        [[ -n $interrupted ]]
    do :; done
    trap - TERM INT HUP USR1
    return "$status"
}

# stopped_early RUN: whether a training that ended well was asked to stop, whichever of its processes heard it.
stopped_early() {
    local reached wanted
    reached=$(number_in "$1/result.json" step) wanted=$(number_in "$1/config.json" max_steps)
    [[ -n $reached && -n $wanted ]] && ((reached < wanted))
}

# number_in FILE NAME: a whole number that a JSON file says; nothing where it does not.
number_in() { sed -n "s/^ *\"$2\": \([0-9]*\),*$/\1/p" "$1" 2>/dev/null || true; }

# One process a GPU that may be used, by CUDA_VISIBLE_DEVICES if that is set; without a GPU, one. Of GPUs that are cut
# into parts (MIG) CUDA shows a process one part alone.
count_processes() {
    local gpus
    mapfile -t gpus < <(nvidia-smi -L 2>/dev/null | grep -E '^GPU |^ +MIG ')
    [[ ${gpus[*]} != *MIG* ]] || gpus=()
    if ((${#gpus[@]})) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    fi
    echo "$((${#gpus[@]} > 1 ? ${#gpus[@]} : 1))"
}

if [[ -z ${PYTHON:-}${VIRTUAL_ENV:-} && -x $ROOT/.venv/bin/python ]]; then
    PATH=$ROOT/.venv/bin:$PATH
fi
NPROC=${NPROC:-$(count_processes)}
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC is not a number of processes"
LAUNCH=("${PYTHON:-python}")
if ((NPROC > 1)); then
    read -ra mpiexec <<<"${MPIEXEC:-mpiexec}"
    command -v "${mpiexec[0]}" >/dev/null \
        || die "NPROC=$NPROC needs ${mpiexec[0]}: activate setup.sh's .venv, or set MPIEXEC"
    LAUNCH=("${mpiexec[@]}" -n "$NPROC" "${LAUNCH[@]}")
fi

OUT=${OUT:-OUTPUT}
export OPENAI_LOGDIR=${OPENAI_LOGDIR:-$OUT/SDM-MoNuSeg}
export OPENAI_LOG_FORMAT=${OPENAI_LOG_FORMAT:-stdout,log,csv,tensorboard}

MODEL_FLAGS=(
    --image_size "${IMAGE_SIZE:-128}" --num_channels 128 --num_head_channels 32 --num_res_blocks 2
    --attention_resolutions 32,16,8 --resblock_updown True --use_scale_shift_norm True --use_fp16 True
    --diffusion_steps 1000 --noise_schedule cosine --learn_sigma True
)
case ${RECIPE:=reference} in
    reference) RECIPE_FLAGS=() ;;
    v) RECIPE_FLAGS=(--learn_sigma False --predict_v True --loss_weights min_snr) ;;
    *) die "RECIPE=$RECIPE is neither reference nor v" ;;
esac
MODEL_FLAGS+=("${RECIPE_FLAGS[@]}")
# HV map, colour map and instance edges: 2 + 3 + 1 channels.
CONDITION_FLAGS=(--num_classes 6 --class_cond False --use_hv_map True --use_col_map True --no_instance False)
DATA_FLAGS=(--dataset_mode monuseg)
TRAIN_FLAGS=(
    --lr "${LR:-1e-4}" --batch_size "${BATCH_SIZE:-8}" --use_checkpoint True --save_interval "${SAVE_INTERVAL:-5000}"
)
[[ -z ${TOTAL_BATCH_SIZE:-} ]] || TRAIN_FLAGS+=(--total_batch_size "$TOTAL_BATCH_SIZE")
[[ -z ${UNLABELLED:-} ]] || TRAIN_FLAGS+=(--unlabelled_dir "$UNLABELLED")
[[ -z ${DATA_LICENCE:-} ]] || TRAIN_FLAGS+=(--data_licence "$DATA_LICENCE")
# Structures come from the training set; each takes the appearance of an image with nuclei of like size and area.
SAMPLE_FLAGS=(
    --use_train True --shuffle_masks False --match_struct True --match_app False
    --batch_size "${BATCH_SIZE:-16}" --num_samples "${NUM_SAMPLES:-1000}"
    --sampler "${SAMPLER:-dpmpp_2m_sde}" --num_steps "${NUM_STEPS:-25}"
)

# check_structures: stop unless STRUCTURES, of a workflow, is one of its kinds.
check_structures() {
    [[ $STRUCTURES =~ ^(real|recombine|both)$ ]] || die "STRUCTURES=$STRUCTURES: give real, recombine or both"
}

# is_dry_run [flags of snakemake ...]: whether they ask what would be done, and nothing is to be written.
is_dry_run() {
    local flag
    for flag; do
        [[ ! $flag =~ ^(-[A-Za-z]*n[A-Za-z]*|--dry.*)$ ]] || return 0
    done
    return 1
}

# absolute_backbone: a path in BACKBONE, of a model's folder or file, means what it means here, wherever stages run.
absolute_backbone() {
    [[ ${BACKBONE:-} == *:* && ${BACKBONE#*:} != /* && -e ${BACKBONE#*:} ]] || return 0
    BACKBONE=${BACKBONE%%:*}:$(realpath -s -- "${BACKBONE#*:}")
}

# workflow FILE.smk RAW OUT [flags of run.py and snakemake ...]: run a workflow, in place of this shell.
workflow() {
    local python pinned
    python=$(command -v -- "${PYTHON:-python}")
    pinned=$(sed -n 's/^snakemake==//p' "$ROOT/requirements-workflow.txt")
    if [[ -z ${ENGINE:-} ]]; then
        ENGINE=$python
        if ! "$python" -c "import importlib.metadata as m; assert m.version('snakemake') == '$pinned'" 2>/dev/null; then
            bash "$ROOT/scripts/setup.sh" workflow
            ENGINE=$ROOT/.venv/bin/python
        fi
    fi
    # Stages run in OUT.
    LAUNCH[-1]=$(realpath -s -- "$python")
    printf -v SDM_PYTHON '%q' "${LAUNCH[-1]}"
    printf -v SDM_LAUNCH '%q ' "${LAUNCH[@]}"
    export SDM_PYTHON SDM_LAUNCH NPROC PYTHON=${LAUNCH[-1]}
    exec "$ENGINE" "$ROOT/scripts/workflow/run.py" "$ROOT/scripts/$1" "${@:2}"
}
