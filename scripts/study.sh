#!/usr/bin/env bash
# The study on the nano model, from nothing: arms of tuning policies over seeds, measured and compared, in one report.
# Two cores, hours; stop it at any time and call it again: what is measured is kept, and a fit goes on where it was.
# Arguments go to the verb: bash scripts/study.sh --seeds 0 --max_minutes 60
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh nano

python -m lightning_mm.nano.model nano/model-new --connector new
python -m lightning_mm.nano.data nano/data
lightning-mm study -c configs/study/nano.yaml --out runs/study-nano "$@"
