#!/usr/bin/env bash
# What causes the answers, after scripts/quickstart.sh: a run that learns facts about flags, a trace of what it knows,
# and edits of it. Two cores, no GPU; about an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh nano

python -m lightning_mm.nano.data nano/data
common=(-c configs/data/nano.yaml -c configs/trainer/cpu.yaml)
if grep -qs -e amx_bf16 -e avx512_bf16 /proc/cpuinfo; then
    common+=(--trainer.precision bf16-mixed)
fi
if [ ! -d runs/flags/checkpoints ]; then
    lightning-mm fit --model.backbone.path runs/quickstart/model "${common[@]}" -c configs/nano/flags.yaml \
        --run.name flags
fi
rm -rf runs/trace-flags runs/edit-flags
lightning-mm trace runs/flags --questions nano/data/constraints.json \
    --kinds '[flag_country,flag_capital,flag_continent]' --name trace-flags
lightning-mm edit runs/flags --edits nano/data/edits.json --limit 24 --control true --data nano/data/val.json \
    --name edit-flags
