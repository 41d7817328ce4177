#!/usr/bin/env bash
# The main job, from nothing: real weights, real pictures, two training stages, an exported model that answers.
# Two cores, no GPU, no account; about 9 minutes with AMX after the downloads, up to four times that without. A second run reuses .venv, model and data.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
source scripts/setup.sh nano

python -m lightning_mm.nano.model nano/model
python -m lightning_mm.nano.data nano/data

common=(-c configs/data/nano.yaml -c configs/trainer/cpu.yaml)
# Where the processor multiplies bfloat16 matrices in hardware, a step takes two thirds of the time.
if grep -qs amx_bf16 /proc/cpuinfo; then
    echo "trainer.precision: bf16-mixed (this processor has AMX)"
    common+=(--trainer.precision bf16-mixed)
fi
rm -rf runs/quickstart-connector runs/quickstart-middle

echo; echo "== stage 1: ConnectorOnly. The connector is new: nothing else can learn before it points at the right words."
lightning-mm fit -c configs/model/nano.yaml "${common[@]}" -c configs/quickstart/connector.yaml \
    --run.name quickstart-connector
lightning-mm export runs/quickstart-connector

echo; echo "== stage 2: IntermediateOnly, layers 25%-50%: where vision meets language in the models of 2606.03871."
lightning-mm fit --model.backbone.path runs/quickstart-connector/export "${common[@]}" \
    -c configs/quickstart/middle.yaml --run.name quickstart-middle
lightning-mm export runs/quickstart-middle

echo; python scripts/summary.py runs/quickstart-connector runs/quickstart-middle
picture=runs/quickstart-middle/samples/0000-0.png
question="Is this an animal, food, a vehicle or a household object?"
echo; echo "$picture: $question"
python scripts/ask.py runs/quickstart-middle/export "$picture" "$question"
took=$(( $(date +%s) - started ))
echo; python scripts/summary.py --looks runs/quickstart-middle "$took"
echo "report: $PWD/runs/quickstart-middle/report.html  (took $took s)"
