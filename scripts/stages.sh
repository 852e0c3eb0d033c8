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

# stage NAME OUTPUT COMMAND...: run a command unless it has been run as it stands, and its output is there.
stage() {
    local name=$1 output=$2 status=0 left
    local record=$stages/$name
    shift 2
    if [[ -e $output && -f $record && $(<"$record") == "$*" ]]; then
        return
    fi
    rm -f "$record"
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
    echo "$*" >"$record"
}

out_of_time() {
    echo "TIME_LIMIT=$TIME_LIMIT is over: the same command goes on"
    exit 0
}
