#!/usr/bin/env bash
# Palacios et al. 2026 (arXiv:2606.03871): where picture and word meet, before and after tuning; transplants.
# Usage: scripts/papers/p3.sh [BASE] [TUNED] [DATA] [--plan]; by default the nano model, the quickstart's and nano/data.
# IMAGES=300: pictures that are read.
# Writes runs/papers/p3/index.html and table.md. Two cores: minutes, printed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/papers/common.sh p3 "$@"
base="${places[0]:-nano/model}" tuned="${places[1]:-runs/quickstart/model}"
data="${places[2]:-nano/data}"
measures='[overlap,overlap_matrix,cka_biased,svcca,distance_correlation,id_correlation,id_gride,entropy_unit_rows,token_cosine,gap_auc]'

run inspect inspect "$base" --against "$tuned" --probes "$data/probes.json" --images "${IMAGES:-300}" --neighbours 30 \
    --both_last true --svcca_variance 0.95 --measures "$measures" --probing.probes '[]' --text_only false --select false \
    "${precision[@]}"
run transplant trace "$base" --against "$tuned" --questions "$data/constraints.json" --data "$data/val.json" \
    --parts '[]' --limit 1 --transplant.width 1 --transplant.step 2 --batch_size 16 --batches 8 \
    "${precision[@]}"
finish
