# shellcheck shell=bash
# Stages that are skipped when they are done, sourced after flags.sh by pipeline.sh and experiment.sh.
#
# begin_stages FOLDER comes first; FOLDER/stages then holds what each stage was run with. From the environment:
# TIME_LIMIT stops a run after so many seconds, to go on with the same command, as it would after a kill.
set -euo pipefail

# begin_stages FOLDER: where to remember what has been done.
begin_stages() {
    [[ ! -e $1 || -d $1 ]] || die "OUT $1 is a file: give a folder"
    [[ ${TIME_LIMIT:-1} =~ ^[1-9][0-9]*$ ]] || die "TIME_LIMIT=$TIME_LIMIT is not a number of seconds"
    stages=$1/stages
    mkdir -p "$stages"
}

# What the stages before this one were run with, as a checksum: where that has changed, the stage is done anew. Stages
# that do not need each other can each be given the same one.
before=
# What decides the output of a stage besides its command line.
settings=

# stage NAME OUTPUT COMMAND...: run a command unless it has been run as it stands, after the same stages as now, and its
# output is there.
stage() {
    local name=$1 output=$2 status=0 left record=$stages/$1 what
    shift 2
    what="$(without_launcher "$@") $settings"$'\n'"after $before"
    before=$(cksum <<<"$what")
    if [[ -e $output && -f $record && $(<"$record") == "$what" ]]; then
        return
    fi
    rm -f "$record"
    echo "$what" >"$record.begun"
    echo "[$name] ${*/#"$ROOT/"/}"
    if [[ -z ${TIME_LIMIT:-} ]]; then
        "$@"
    else
        left=$((TIME_LIMIT - SECONDS))
        ((left > 0)) || out_of_time
        # Training saves at SIGTERM; whatever does not stop goes on from its files.
        timeout --kill-after 60 "$left" "$@" || status=$?
        ((SECONDS < TIME_LIMIT || status == 0)) || out_of_time
        ((status == 0)) || exit "$status"
        [[ -e $output ]] || ((SECONDS < TIME_LIMIT)) || out_of_time
    fi
    [[ -e $output ]] || die "stage $name left no $output"
    mv -- "$record.begun" "$record"
}

# resumed NAME FOLDER/FILE COMMAND...: a stage whose command goes on from what it left in FOLDER. It must not with other
# settings, nor where a stage before it has changed; more steps or samples are no other settings.
resumed() {
    local folder=${2%/*} record now
    now="$(without_launcher "${@:3}") $settings"
    for record in "$stages/$1" "$stages/$1.begun"; do
        [[ -e $folder && -f $record ]] || continue
        if [[ $(tail -n 1 "$record") != "after $before" ]]; then
            die "stage $1 was begun before an earlier one changed: remove $folder, or give another OUT"
        elif [[ $(head -n 1 "$record" | without_amounts) != "$(without_amounts <<<"$now")" ]]; then
            die "stage $1 was begun with other settings: remove $folder, or give another OUT"
        fi
    done
    stage "$@"
}

without_amounts() {
    sed -E 's/--max_steps [0-9]+|NUM_SAMPLES=[0-9]*//g'
}

# without_launcher COMMAND...: the command from the project's script on: another count of processes, interpreter or
# place of the project may go on from the same files.
without_launcher() {
    local i
    for ((i = 1; i < $#; i++)); do
        [[ ${!i} != "$ROOT"/*.@(py|sh) ]] || break
    done
    ((i < $#)) || i=1
    local command=${*:i}
    printf '%s\n' "${command/"$ROOT/"/}"
}

out_of_time() {
    echo "TIME_LIMIT=$TIME_LIMIT is over: the same command goes on"
    exit 0
}
