#!/usr/bin/env bash
# The README's first command: sets up .venv and runs the command line with the heavy-hitter cache and without it, on
# requests and a small random Llama made on the spot: a proof that everything is in place, not of good summaries.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements.txt
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
.venv/bin/python - "$out" <<'PY'
import json, random, sys
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

out, draw = Path(sys.argv[1]), random.Random(0)
words = "the town council voted on a new bridge after heavy rain closed old road near harbour school said mayor".split()
with (out / "requests.jsonl").open("w") as file:
    for _ in range(8):
        article = " ".join(draw.choices(words, k=400)).capitalize() + "."
        prompt = f"###\nArticle: {article}\n\nSummarize the above article in 1 sentence.\n"
        request = {"article": prompt, "summary_gt": " ".join(draw.choices(words, k=12)), "max_tokens": 32, "stop": ["###"]}
        file.write(json.dumps(request) + "\n")
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator([" ".join(words)], trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(out / "model")
shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2)
LlamaForCausalLM(LlamaConfig(vocab_size=len(bpe.get_vocab()), bos_token_id=0, eos_token_id=1, **shape)).save_pretrained(
    out / "model"
)
PY
run=(.venv/bin/python run_summarization.py --input-path "$out/requests.jsonl" --model-name "$out/model" --batch_size 4)
echo "full cache" && "${run[@]}" --output-path "$out/full.jsonl"
echo "heavy-hitter cache, 128 slots" && "${run[@]}" --output-path "$out/h2o.jsonl" --enable_h2o_generation --num_window_length 128
