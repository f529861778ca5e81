#!/usr/bin/env bash
# The XSum table of H2O's llama recipe (ROUGE-2 by KV budget): H2O as published, N = 1, beside the published figures.
# Needs a CUDA GPU and the weights. Run the same command again to resume. Paths are relative to the repository's root.
#
#   bash scripts/reproduce_h2o_table.sh [model …]    # names on the hub or folders (the recipe's three)
#
# BUDGETS        slots kept, or "full" for the full cache, separated by spaces (64 128 256 512 1024 full)
# REQUESTS       number of requests, from the top of the file (500, as in the recipe)
# REQUESTS_FILE  a file of requests, such as the recipe's own (XSum with three examples per prompt, made if missing)
# BATCH_SIZE     sequences decoded together (auto)
# GREEDY=1       decode greedily, whatever the requests ask for; needs its own OUT
# OUT            folder of the results (out/h2o_table); use another one for other requests
# PYTHON_BIN     an interpreter that has the packages (by default, .venv is set up)
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON_BIN:-}" ]; then
  source scripts/setup.sh requirements.txt
  PYTHON_BIN=.venv/bin/python
fi
[ $# -gt 0 ] || set -- meta-llama/Llama-2-7b-hf meta-llama/Llama-2-13b-hf meta-llama/Meta-Llama-3-8B
out=${OUT:-out/h2o_table}
read -ra budgets <<< "${BUDGETS:-64 128 256 512 1024 full}"
[ ${#budgets[@]} -gt 0 ] || { echo 'error: BUDGETS: is empty; give slots, or full, separated by spaces' >&2; exit 2; }
for budget in "${budgets[@]}"; do # before hours of work on earlier ones
  [[ $budget =~ ^(full|[1-9][0-9]*)$ ]] || { echo "error: BUDGETS: $budget: must be slots, or full" >&2; exit 2; }
done
requests=${REQUESTS_FILE:-data/xsum_3shot.jsonl}
if [ -z "${REQUESTS_FILE:-}" ] && [ ! -e "$requests" ]; then
  "$PYTHON_BIN" scripts/prepare_data.py --dataset xsum --shots 3 --output-path "$requests" >&2
fi
flags=(--input-path "$requests" --sample_num "${REQUESTS:-500}" --batch_size "${BATCH_SIZE:-auto}")
[ -z "${GREEDY:-}" ] || flags+=(--greedy)

ended=() # model, budget and results of each run that has ended
summarize() { # model, budget
  local path="$out/${1//\//_}/$2.jsonl" h2o=()
  [ "$2" = full ] || h2o=(--enable_h2o_generation --num_window_length "$2" --update_interval 1)
  echo "$1, $2" >&2
  "$PYTHON_BIN" run_summarization.py --model-name "$1" --output-path "$path" "${flags[@]}" "${h2o[@]}" > /dev/null \
    || return
  ended+=("$1" "$2" "$path")
}
status=0
for model in "$@"; do
  for budget in "${budgets[@]}"; do
    # `set -e` would exit without the table of finished runs
    summarize "$model" "$budget" || { status=$?; break 2; }
  done
done
[ ${#ended[@]} -gt 0 ] || exit "$status"

"$PYTHON_BIN" - "${ended[@]}" <<'PY'
import json, sys
from pathlib import Path

from h2optimizer.utils import cli

# meta-llama/llama-cookbook, H2O, README.md: "Expected results on XSUM (Rouge-2 score)"
BUDGETS = ("64", "128", "256", "512", "1024", "full")
PUBLISHED = {
    "Llama-2-7b-hf": (0.0439, 0.1127, 0.1148, 0.1182, 0.1170, 0.1164),
    "Llama-2-13b-hf": (0.1180, 0.1217, 0.1243, 0.1291, 0.1302, 0.1332),
    "Meta-Llama-3-8B": (0.1107, 0.1189, 0.1200, 0.1347, 0.1290, 0.1311),
}

def table():
    arguments = iter(sys.argv[1:])
    latest = None
    for model, budget, path in zip(arguments, arguments, arguments):
        if model != latest:
            print(f"{model}\n{'KV budget':9}  requests  evicted from  {'ours':>6}  {'95 %':>15}  {'theirs':>6}  difference")
            latest = model
        results = Path(path)
        metrics = json.loads(results.with_suffix(".metrics.json").read_text())
        rouge = {name: 100 * value for name, value in metrics["rouge"]["rouge2"].items()}
        published = dict(zip(BUDGETS, PUBLISHED.get(Path(model).name, ()))).get(budget)
        theirs = f"{100 * published:6.2f}" if published else f"{'-':>6}"
        difference = f"{rouge['mean'] - 100 * published:+10.2f}" if published else f"{'-':>10}"
        interval = f"[{rouge['low']:.2f}, {rouge['high']:.2f}]"
        ours = f"{metrics['requests']:8}  {metrics['requests_evicted_from']:12}  {rouge['mean']:6.2f}  {interval:>15}"
        print(f"{budget:9}  {ours}  {theirs}  {difference}")

    settings = metrics["settings"]
    requests = [json.loads(line)["request"] for line in results.read_text().splitlines()]
    asked = sorted({(request.get("temperature") or 0, request.get("top_p") or 1) for request in requests})
    if settings["--greedy"]:
        asked = [(0, 1)]
    how = "; ".join(f"sampled (temperature {t}, top_p {p}, seed {settings['--seed']})" if t else "greedy" for t, p in asked)
    print(
        "\nROUGE-2 F in points. Theirs: by the rouge package, on sampled text of prompts of about 2k tokens, float16,"
        f"\nwithout a beginning-of-sequence token. Ours: by rouge-score, with stemming, on text that is {how}."
        "\nScorers, samples and prompts differ, so expect a difference: compare the budgets within a column."
    )


sys.exit(cli.run(table, "the results are kept; run the same command again to resume"))
PY
exit "$status"
