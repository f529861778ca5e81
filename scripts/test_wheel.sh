#!/usr/bin/env bash
# Builds the wheel, installs it into an environment that knows nothing of this folder, and uses it there: beside a
# package of the user's that is called `utils` too. scripts/test.sh runs this. What the project needs comes from .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
pip=("$PWD/.venv/bin/python" -m pip --disable-pip-version-check) python=$scratch/empty/bin/python
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

echo "the wheel: in an environment of its own"
mkdir "$scratch/source" # in the tree, an earlier build would add files that are gone
cp -r h2optimizer utils scripts run_summarization.py pyproject.toml README.md LICENSE "$scratch/source"
"${pip[@]}" wheel --quiet --no-deps --wheel-dir "$scratch" "$scratch/source"
.venv/bin/python -m venv --without-pip "$scratch/empty"
"${pip[@]}" --python "$python" install --quiet --no-deps "$scratch"/*.whl
# Only then, and as a mere folder on the path: the link that .venv has to this folder takes no effect there.
packages .venv/bin/python > "$(packages "$python")/needs.pth"

mkdir -p "$scratch/user/utils"
echo 'OWN = True' | tee "$scratch/user/utils/__init__.py" > "$scratch/user/utils/cache.py"
export PATH=$scratch/empty/bin:$PATH OMP_NUM_THREADS=1 TOKENIZER=$PWD/data/demo_model
cd "$scratch/user"
quietly() { "$@" > output.txt 2> messages.txt || { cat output.txt messages.txt; exit 1; }; } # of libraries
quietly "$python" - <<'PY'
import importlib.metadata, io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import utils.cache
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import h2optimizer
import h2optimizer.utils.cache

assert utils.OWN and utils.cache.OWN and h2optimizer.utils.cache is not utils.cache
assert Path(h2optimizer.__file__).is_relative_to(sys.prefix) and h2optimizer.HHCache is h2optimizer.utils.cache.HHCache
assert importlib.metadata.version("h2optimizer") == h2optimizer.__version__
(package,) = importlib.metadata.distributions(name="h2optimizer", path=[str(Path(h2optimizer.__file__).parents[1])])
assert {file.parts[0] for file in package.files} <= {"h2optimizer", "..", f"h2optimizer-{h2optimizer.__version__}.dist-info"}

for command in package.entry_points:
    sys.argv = [f"/bin/{command.name}", "--help"]
    with redirect_stdout(io.StringIO()) as shown:
        try:
            command.load()()
        except SystemExit as end:
            assert not end.code, command
    assert shown.getvalue().startswith(f"usage: {command.name} "), (command, shown.getvalue()[:200])
sys.argv = ["/bin/h2optimizer-summarize"]
with redirect_stderr(io.StringIO()) as said:
    assert package.entry_points["h2optimizer-summarize"].load()() == 2
assert said.getvalue().startswith("error: the following arguments are required: --input-path, --model-name"), said.getvalue()

tokenizer = AutoTokenizer.from_pretrained(os.environ["TOKENIZER"])
heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, bos_token_id=None, eos_token_id=None, **heads)
model = h2optimizer.H2OLlamaForCausalLM(config, h2o=h2optimizer.H2OConfig(window_length=16, update_interval=4))
model.save_pretrained("tiny")
tokenizer.save_pretrained("tiny")
assert not hasattr(AutoModelForCausalLM.from_pretrained("tiny"), "h2o")
request = {"article": "The mayor opened the new bridge on Monday. " * 4, "summary_gt": "A bridge.", "max_tokens": 8}
Path("requests.jsonl").write_text(json.dumps(request) + "\n")
PY
quietly h2optimizer-summarize --model-name tiny --input-path requests.jsonl --output-path out.jsonl --greedy \
  --device cpu --enable_h2o_generation --score streaming_llm
grep -q 'cache settings from tiny/h2o_config.json: window_length=16, update_interval=4; not from there: --score$' messages.txt
"$python" -c 'import json; (of,) = open("out.jsonl"); assert json.loads(of)["cache"]["slots_kept"] < 24, of'
