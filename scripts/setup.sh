#!/usr/bin/env bash
# Make .venv in the repository's root, with what requirements.txt names: bash scripts/setup.sh
#
# PYTHON (default python3) makes it. Where .venv is up to date nothing happens; a changed requirements.txt is installed
# over it; a .venv of this script's whose making was interrupted is made anew. setup.stamp in it tells which is the
# case: it says "unfinished", or holds the checksum of the requirements that are installed.
set -euo pipefail

die() {
    echo "error: $*" >&2
    exit 2
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
requirements=$root/requirements.txt
venv=$root/.venv
stamp=$venv/setup.stamp
python=${PYTHON:-python3}

# Where two are started at once, as by the tests and the demo, the second waits for the first.
exec {lock}<"$requirements"
flock "$lock"

checksum=$(sha256sum <"$requirements")
installed=
[[ ! -f $stamp ]] || installed=$(<"$stamp")
if [[ $installed == "$checksum" && -x $venv/bin/python ]]; then
    exit 0
fi

if [[ ! -x $venv/bin/python || $installed == unfinished ]]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || die "$python is not Python 3.11 or newer: set PYTHON to one that is"
    echo "setup: making .venv with $python"
    mkdir -p "$venv"
    echo unfinished >"$stamp"
    # Half of an environment cannot be trusted. What has no stamp is somebody else's, and stays.
    [[ -z $installed ]] || find "$venv" -mindepth 1 ! -name setup.stamp -delete
    "$python" -m venv "$venv" || die "$python made no .venv: on Debian and Ubuntu this takes the package python3-venv"
else
    # Until it is done, this .venv answers to no requirements, old or new.
    rm -f "$stamp"
fi

echo "setup: installing requirements.txt into .venv, which takes some minutes the first time"
"$venv/bin/python" -m pip install --disable-pip-version-check --requirement "$requirements" \
    || die "pip could not install requirements.txt, for the reason above: run this again once it is mended"
echo "$checksum" >"$stamp.part"
mv "$stamp.part" "$stamp"
