#!/usr/bin/env bash
# Run the tests in the .venv that setup.sh makes: all but those marked slow, or those asked for.
#
#   bash scripts/test.sh [arguments of pytest ...]
#   bash scripts/test.sh -m "slow or not slow"       all, as .ci/run does
#
# Paths are the repository's: tests/test_unet.py. TEST_PROCESSES (default 2) processes share the work.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
cd -- "$root"
export PATH=$root/.venv/bin:$PATH
exec .venv/bin/python -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist worksteal -m "not slow" "$@"
