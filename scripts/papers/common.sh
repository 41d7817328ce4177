#!/usr/bin/env bash
# What the three scripts share: arguments, setup, the clock, and a log of the commands. Sourced, with the paper's name.
# Options: --plan (or --seven_b): no run here; print the commands for LLaVA-1.5-7B, what was checked of its shape on the
# meta device, and what they cost on an H100.
set -euo pipefail
paper="$1"; shift
only_plan=false
places=()
for argument in "$@"; do
    case "$argument" in
    --plan | --seven_b) only_plan=true ;;
    --*) echo "There is no option $argument: there are --plan and --seven_b." >&2; exit 2 ;;
    *) places+=("$argument") ;;
    esac
done
source scripts/setup.sh nano
out="runs/papers/$paper"
precision=()
if grep -qs 'amx_bf16\|avx512_bf16' /proc/cpuinfo; then
    precision=(--bf16 true)  # forward passes in bfloat16 where the processor multiplies it in hardware
fi
mkdir -p "$out"
export PYTHONPATH="$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}"
started=$(date +%s)

# run NAME ARGUMENTS: lightning-mm with its folder under the paper's, logged.
run() {
    local name="$1"; shift
    rm -rf "${out:?}/$name"
    echo "lightning-mm $* --root $out --name $name" | tee -a "$out/commands.txt"
    python -m lightning_mm "$@" --root "$out" --name "$name" > "$out/$name.log" 2>&1 || { cat "$out/$name.log" >&2; exit 1; }
    echo "    $(( $(date +%s) - started )) s"
}

# finish: the page, and how long all took.
finish() {
    python -m paper_pages.seven_b "$paper" --folder "$out" > "$out/seven_b.log" 2>&1
    python scripts/paper_page.py "$paper" --folder "$out"
    echo "took $(( $(date +%s) - started )) s"
}

if $only_plan; then
    python -m paper_pages.seven_b "$paper" --folder "$out"
    exit 0
fi
rm -f "$out/commands.txt"
