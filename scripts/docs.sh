#!/usr/bin/env bash
# Builds the docs site, with warnings as errors, and needs no network: open site/index.html.
# Usage: scripts/docs.sh [FOLDER]   in an environment with `pip install -e '.[docs]'`; the folder is site by default
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true
site=$(realpath -m "${1:-site}")
python -m mkdocs build --strict --site-dir "$site"  # --quiet would drop warnings before --strict counts them
if grep -rlE '<(script|img|iframe|source)[^>]* src="https?:|<link[^>]* rel="(stylesheet|preload|preconnect)"[^>]* href="https?:' "$site" --include='*.html'; then
    echo "error: these pages load something from a network" >&2
    exit 1
fi
