#!/usr/bin/env bash
# The main job, from nothing: real weights, real pictures, layers 25%-50% trained beside the connector, and its control:
# the connector alone, continued for as many steps. Then an exported model that answers, and a report.
# Two cores, no GPU, no account; about 10 minutes with AMX. A second run reuses .venv, model and data.
set -euo pipefail
steps=100      # optimizer steps of each of the two; 300 is what the whole study takes (configs/study/nano.yaml)
questions=50   # asked of each of sixteen types

cd "$(dirname "$0")/.."
started=$(date +%s)
# Seconds of a step of 6 pictures with up to 5 questions each, in tenths: the connector alone, the layers beside it.
if grep -qs amx_bf16 /proc/cpuinfo; then
    precision=bf16-mixed tenths=$((10 + 12)) rest=260 # this processor multiplies bfloat16 matrices in hardware
elif grep -qs avx512_bf16 /proc/cpuinfo; then
    precision=bf16-mixed tenths=$((18 + 23)) rest=420 # twice as fast as float32 there, a step takes two thirds
else
    precision=32-true tenths=$((20 + 24)) rest=420
fi
echo "expected: about $(((rest + steps * tenths / 10 + 59) / 60)) minutes on two cores in $precision, and one or two more where .venv is new"

source scripts/setup.sh nano
python -m lightning_mm.nano.model nano/model --connector pretrained # what a first stage left: scripts/nano_connector.sh
python -m lightning_mm.nano.data nano/data                          # without the photo cut-outs, which are 161 MB

out=runs/quickstart
rm -rf "$out"
mkdir -p "$out"
cat > "$out/machine.yaml" << END
options: {trainer.precision: $precision}
stage2: {steps: $steps}
questions_per_type: $questions
END
echo; echo "== connector continued, and layers 25%-50% with the connector: $steps steps each from one model, same rows, same order"
lightning-mm study -c configs/study/quickstart.yaml -c "$out/machine.yaml" --out "$out"
lightning-mm export "$out/work/seed0/middle/fit" --out "$out/model"

picture=$(python scripts/summary.py "$out" --picture nano/data/test.json)
question="Is this an animal, food, a vehicle or a household object?"
echo; echo "$picture: $question"
python scripts/ask.py "$out/model" "$picture" "$question"

took=$(($(date +%s) - started))
echo; python scripts/summary.py "$out" --seconds "$took" --json "$out/quickstart.json"
echo "report: $PWD/$out/study.html  (took $took s)"
