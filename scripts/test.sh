#!/usr/bin/env bash
# The README's test command: sets up .venv, lints, and tests: what a wheel installs, a short part with the oldest
# transformers that pyproject.toml allows, and all with the newest. Arguments go to pytest (e.g. -m gpu), which then runs
# once, and alone.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh tests/requirements.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS=1  # of each of the two processes: their threads would wait for each other
pytest=(-m pytest -n 2 --timeout 900)  # for what hangs; nothing else is short of time on a busy machine
if [ $# -eq 0 ]; then
  bash scripts/test_wheel.sh
  source scripts/setup_oldest.sh
  echo "transformers $version: cache, model and generate, with one grouping of heads"
  model=(tests/test_{cache,against_oracle,against_stock,config,model,padding,prefill_chunks,training}.py)
  "$oldest" "${pytest[@]}" "${model[@]}" -k 'not mha and not mqa and not any_script and not any_combination'
  echo "the newest transformers: everything"
fi
.venv/bin/python "${pytest[@]}" --dist loadfile --no-loadscope-reorder "$@"
