#!/usr/bin/env bash
# What `pip install lightning-mm` gives someone: the wheel in a new environment without constraints, and every door from
# a folder that is no clone. torch comes first, as a CPU build; all else is what pip chooses within pyproject's bounds.
# Usage: scripts/clean_install.sh [EXTRA PIP REQUIREMENT...]   such as transformers==5.17.0, to try another version
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip=("$work/env/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install torch=="$(sed -n 's/^torch==//p' constraints.txt)"
"${pip[@]}" wheel --no-deps --wheel-dir "$work" .
"${pip[@]}" install "$work"/lightning_mm-*.whl "$@"
"$work/env/bin/pip" freeze | grep -E '^(lightning|peft|torch|transformers)=='

unset PYTHONPATH
export PATH="$work/env/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" HF_HUB_OFFLINE=1
mkdir "$work/elsewhere" && cd "$work/elsewhere"
python -m lightning_mm.testing tiny > /dev/null
fit=(-c trainer/cpu.yaml --model.backbone.path tiny/model --data.train tiny/train.json --data.val tiny/val.json)
brief=(--trainer.max_steps 2 --data.batch_size 4 --evaluation.before false --evaluation.after false)
step() { echo "== $*"; "$@" > log 2>&1 || { cat log; echo "FAILED: $*"; exit 1; }; }
step lightning-mm fit "${fit[@]}" "${brief[@]}" -c tuning/full.yaml --run.name full
step lightning-mm fit "${fit[@]}" "${brief[@]}" -c tuning/lora-middle.yaml --run.name lora
step lightning-mm plan "${fit[@]}" --model.tuning LoRAOnMiddle
step lightning-mm export runs/full
step lightning-mm export runs/lora --format adapter
step lightning-mm inspect runs/full/export --probes tiny/probes.json --images 24
test -s runs/full/report.html
step python -c "from lightning_mm import MMModule, LoRAOnMiddle; print(MMModule('tiny/model', LoRAOnMiddle('25%-50%')))"
echo "clean install: all steps passed"
