#!/usr/bin/env bash
# Make .venv in the repository's root, with what requirements.txt names.
#
#   bash scripts/setup.sh             what the programs and the tests need
#   bash scripts/setup.sh workflow    and requirements-workflow.txt, for pipeline.sh and experiment.sh, which call this
#   bash scripts/setup.sh readers     and requirements-readers.txt, which tests read exported sets with
#
# PYTHON (default python3) makes it. Where .venv is up to date nothing happens; changed requirements are installed over
# it; a .venv of this script's whose making was interrupted is made anew. setup.stamp in it tells which is the case: it
# says "unfinished", or holds the checksums of the requirements that are installed.
set -euo pipefail

die() {
    echo "error: $*" >&2
    exit 2
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
wanted=(requirements.txt)
for word; do
    case $word in
        workflow | readers) wanted+=("requirements-$word.txt") ;;
        *) die "$word is unknown: give workflow, readers, both or nothing" ;;
    esac
done
venv=$root/.venv
stamp=$venv/setup.stamp
python=${PYTHON:-python3}

# Where two are started at once, as by the tests and the demo, the second waits for the first.
exec {lock}<"$root/requirements.txt"
flock "$lock"

installed=
[[ ! -f $stamp ]] || installed=$(<"$stamp")
missing=()
for name in "${wanted[@]}"; do
    [[ $'\n'$installed$'\n' == *$'\n'"$name $(sha256sum <"$root/$name")"$'\n'* ]] || missing+=("$name")
done
if ((${#missing[@]} == 0)) && [[ -x $venv/bin/python ]]; then
    exit 0
fi

made=$venv
[[ -e $venv ]] || made=$root
[[ -w $made ]] || die "$made is not yours to write to, and .venv lacks ${missing[*]}: have its owner run this"
if [[ ! -x $venv/bin/python || $installed == unfinished ]]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || die "$python is not Python 3.11 or newer: set PYTHON to one that is"
    echo "setup: making .venv with $python"
    mkdir -p "$venv"
    echo unfinished >"$stamp"
    # Half of an environment cannot be trusted. What has no stamp is somebody else's, and stays.
    [[ -z $installed ]] || find "$venv" -mindepth 1 ! -name setup.stamp -delete
    "$python" -m venv "$venv" || die "$python made no .venv: on Debian and Ubuntu this takes the package python3-venv"
    missing=("${wanted[@]}")
else
    # Until it is done, this .venv answers to no requirements, old or new.
    rm -f "$stamp"
fi

for name in "${missing[@]}"; do
    echo "setup: installing $name into .venv, which takes some minutes the first time"
    "$venv/bin/python" -m pip install --disable-pip-version-check --requirement "$root/$name" \
        || die "pip could not install $name, for the reason above: run this again once it is mended"
done
{
    for name in "${wanted[@]}"; do
        echo "$name $(sha256sum <"$root/$name")"
    done
    # What else is installed stays so.
    while read -r name sum; do
        [[ $name != requirements-* || " ${wanted[*]} " == *" $name "* ]] || echo "$name $sum"
    done <<<"$installed"
} >"$stamp.part"
mv "$stamp.part" "$stamp"
