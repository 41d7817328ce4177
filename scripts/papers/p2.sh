#!/usr/bin/env bash
# Basu et al. 2024 (arXiv:2406.04236): causal traces, attention contributions, failure prediction, MultEdit.
# Usage: scripts/papers/p2.sh [MODEL] [DATA] [--plan]; by default the run that learned facts about flags (see
# scripts/causal.sh) and nano/data: only what a model knows can be traced.
# QUESTIONS=16: questions that are traced, and edits that are made.
# Writes runs/papers/p2/index.html and table.md. Two cores: minutes, printed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/papers/common.sh p2 "$@"
model="${places[0]:-runs/flags}" data="${places[1]:-nano/data}"
limit="${QUESTIONS:-16}"
kinds='[flag_country,flag_capital,flag_continent]'

run trace-w1 trace "$model" --questions "$data/constraints.json" --kinds "$kinds" --convention p2 --ask 120 \
    --limit "$limit" --parts '[trace,flow,knockout,predictor]' --knocking.edges '[image->last,constraint->last]' \
    --flow '[image_late->constraint,image_early->constraint,constraint->last,image->last]' "${precision[@]}"
run trace-w5 trace "$model" --questions "$data/constraints.json" --kinds "$kinds" --convention p2 --tracing.width 5 \
    --ask 120 --limit "$limit" --parts '[trace]' "${precision[@]}"
run edit-released edit "$model" --edits "$data/edits.json" --convention p2 --limit "$limit" --control false
run edit-clamp4 edit "$model" --edits "$data/edits.json" --convention p2 --clamp 4 --limit "$limit" --control false
finish
