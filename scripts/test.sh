#!/usr/bin/env bash
# The README's test command: sets up .venv, then lints and tests. Further arguments go to pytest (e.g. -m gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh tests/requirements.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS=1  # of each of the two processes: their threads would wait for each other
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout 300 "$@"
