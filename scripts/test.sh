#!/usr/bin/env bash
# Run the tests, all or those asked for, in the .venv that setup.sh makes.
#
#   bash scripts/test.sh [arguments of pytest ...]
#
# Paths are the repository's: tests/test_unet.py. TEST_PROCESSES (default 2) of them share the work.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
cd -- "$root"
export PATH=$root/.venv/bin:$PATH
exec .venv/bin/python -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist worksteal "$@"
