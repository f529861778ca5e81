#!/usr/bin/env bash
# The README's first command: sets up .venv, summarises bundled requests with the bundled model under several cache
# policies, and prints one table. The window is a quarter of the median prompt. REQUESTS says how many (40).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements.txt
out=out/demo
names=()
summarize() { # name, flags
  echo "$1" >&2
  names+=("$1")
  .venv/bin/python run_summarization.py --output-path "$out/$1.jsonl" --overwrite --sample_num "${REQUESTS:-40}" \
    --batch_size 8 --greedy "${@:2}" > /dev/null
}
h2o=(--enable_h2o_generation --num_window_length 224)
summarize "full cache"
summarize "H2O, N = 1" "${h2o[@]}" --update_interval 1
summarize "H2O, N = 16" "${h2o[@]}" --update_interval 16
summarize "StreamingLLM (4 sinks)" "${h2o[@]}" --update_interval 1 --score streaming_llm
summarize "sink + recent" "${h2o[@]}" --update_interval 1 --score sink
summarize "recent only" "${h2o[@]}" --update_interval 1 --num_heavy_hitter_tokens 0
.venv/bin/python - "$out" "${names[@]}" <<'PY'
import json, sys
from pathlib import Path

from h2optimizer.utils import cli


def table():
    print(f"{'ROUGE: 0 to 100':22}  ROUGE-1  ROUGE-2  ROUGE-L  KV MiB per request  slots kept  decode tokens/s")
    for name in sys.argv[2:]:
        m = json.loads(Path(sys.argv[1], f"{name}.metrics.json").read_text())
        rouge = "  ".join(f"{100 * m['rouge'][kind]['mean']:7.2f}" for kind in ("rouge1", "rouge2", "rougeL"))
        kv, slots, speed = m["kv_bytes_per_request"] / 2**20, m["slots_kept_per_request"], m["decode_tokens_per_second"]
        print(f"{name:22}  {rouge}  {kv:18.2f}  {slots:10.0f}  {speed:15.0f}")


sys.exit(cli.run(table, "the results are kept"))
PY
