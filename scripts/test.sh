#!/usr/bin/env bash
# All checks: lint, types, import layers, tests. Makes its own .venv on the first call.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh nano,test
ruff check lightning_mm tests scripts
ruff format --check lightning_mm tests scripts
mypy
lint-imports
# One thread per worker: two processes that each use all cores are slower than two that share them.
OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile "$@"
