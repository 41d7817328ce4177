#!/usr/bin/env bash
# Tao et al. 2024 (arXiv:2402.17304): entailment and object recognition, probed at each layer.
# Usage: scripts/papers/p1.sh [MODEL] [DATA] [--plan]; by default the quickstart's model and nano/data.
# IMAGES=200: pictures that are read.
# Writes runs/papers/p1/index.html and table.md. Two cores: minutes, printed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/papers/common.sh p1 "$@"
model="${places[0]:-runs/quickstart/model}" data="${places[1]:-nano/data}"

run inspect inspect "$model" --probes "$data/probes.json" --images "${IMAGES:-200}" --measures '[block_influence]' \
    --probing.selectivity true --select false "${precision[@]}"
finish
