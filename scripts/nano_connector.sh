#!/usr/bin/env bash
# Remakes the connector that is shipped with the package: data and model from their packages, stage 1, export, and the two
# files beside the code (weights and provenance). Options go to fit, such as --trainer.precision 32-true.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh nano

python -m lightning_mm.nano.model nano/model --connector new
python -m lightning_mm.nano.data nano/data
rm -rf runs/nano-connector
lightning-mm fit -c configs/model/nano.yaml -c configs/data/nano.yaml -c configs/trainer/cpu.yaml -c configs/nano/connector.yaml \
    --run.name nano-connector "$@"
lightning-mm export runs/nano-connector
python -m lightning_mm.nano.model.pretrained_connector runs/nano-connector/export runs/nano-connector
