#!/usr/bin/env bash
# All checks: lint, types, import contracts, docs build, tests. Creates .venv on the first call.
# Usage: scripts/test.sh [--fast] [PYTEST ARGUMENT...]
#   --fast   leave out the slow tests (tests/slow.txt)
set -euo pipefail
cd "$(dirname "$0")/.."
tests=()
if [ "${1:-}" = --fast ]; then
    tests=(-m "not slow")
    shift
fi
source scripts/setup.sh nano,test
bash scripts/browser.sh
ruff check lightning_mm tests scripts examples
ruff format --check lightning_mm tests scripts examples
mypy
lint-imports
bash scripts/docs.sh
# One thread per worker: two processes that each use all cores are slower than two that share them.
OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --durations=80 --durations-min=3 "${tests[@]}" "$@"
if [ $# -eq 0 ]; then
    # It sends signals to its own process, which is not that of a worker.
    OMP_NUM_THREADS=1 pytest "${tests[@]}" tests/training/test_run_ends.py
fi
