"""The bundled requests and model: what they promise, and what cache policies do to summaries made with them."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import run_summarization
from h2optimizer.flags import DEMO_MODEL, DEMO_REQUESTS

ROOT = Path(__file__).resolve().parents[1]
REQUESTS = [json.loads(line) for line in DEMO_REQUESTS.read_text(encoding="utf-8").splitlines()]
POLICIES = {
    "full": [],
    "n1": ["--update_interval", "1"],
    "n16": ["--update_interval", "16"],
    "sink": ["--update_interval", "1", "--score", "sink"],
    "random": ["--update_interval", "1", "--score", "random"],
    "local": ["--update_interval", "1", "--num_heavy_hitter_tokens", "0"],
}


@pytest.fixture(scope="module")
def prompt_lengths():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    return [len(tokens) for tokens in tokenizer([request["article"] for request in REQUESTS])["input_ids"]]


@pytest.fixture(scope="module")
def rouge2(prompt_lengths, tmp_path_factory):
    """ROUGE-2 F in points of each policy on the first 8 requests, at a window of a quarter of the median prompt."""
    out = tmp_path_factory.mktemp("gate")
    window = str(int(statistics.median(prompt_lengths)) // 4)
    scores = {}
    for policy, flags in POLICIES.items():
        path = out / f"{policy}.jsonl"
        cache = [] if policy == "full" else ["--enable_h2o_generation", "--num_window_length", window, *flags]
        common = ["--output-path", str(path), "--sample_num", "8", "--batch_size", "8", "--greedy"]
        assert run_summarization.main([*common, "--dtype", "float32", "--device", "cpu", *cache]) == 0
        metrics = json.loads(path.with_suffix(".metrics.json").read_text())
        assert metrics["requests_evicted_from"] == (0 if policy == "full" else 8)
        scores[policy] = 100 * metrics["rouge"]["rouge2"]["mean"]
    return scores


def test_full_cache_summarises(rouge2):
    """A damaged model, tokenizer or request file, on which no policy can be judged."""
    assert rouge2["full"] >= 70


def test_heavy_hitters_keep_the_quality_that_recent_slots_lose(rouge2):
    """A cache that keeps the wrong slots, or puts their positions, mass or order wrong, though shapes are right."""
    assert rouge2["n1"] >= 0.9 * rouge2["full"]
    assert rouge2["local"] < 0.6 * rouge2["full"]
    assert rouge2["n1"] > max(rouge2["sink"], rouge2["random"])


def test_rotation_costs_no_quality(rouge2):
    """Skipped steps that lose mass, or slots that are dropped at the wrong step."""
    assert abs(rouge2["n16"] - rouge2["n1"]) <= 2


def test_bundled_requests_are_what_the_script_makes(monkeypatch, tmp_path):
    """A generator that has been changed without its output, so that nobody could make the requests again."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_demo_data

    path = tmp_path / "new" / "demo.jsonl"
    assert make_demo_data.main(["--output-path", str(path)]) == 0
    assert path.read_bytes() == DEMO_REQUESTS.read_bytes()


def test_bundled_requests_have_the_xsum_form(prompt_lengths):
    """Requests that a change of the patterns made too short or too long, or a prompt form that drifted."""
    assert len(REQUESTS) == 200
    assert min(prompt_lengths) >= 600 and max(prompt_lengths) <= 1200
    form = r"(###\nArticle: [^\n]+\n\nSummarize the above article in 1 sentence\.\n([^\n#]+\n\n)?){2,3}"
    assert all(re.fullmatch(form, request["article"]) for request in REQUESTS)
    assert len({request["summary_gt"] for request in REQUESTS}) == 200


def test_test_names_never_occur_in_training(monkeypatch):
    """A model that has learned the names instead of reading them: fresh training documents against all requests."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import random

    from make_demo_data import POOLS, make_request

    rng = random.Random(11)
    names = {name for pool in POOLS["test"].values() for name in pool}
    assert any(name in REQUESTS[0]["article"] for name in names)
    for _ in range(100):
        document = make_request(rng, POOLS["train"], 2)
        assert not names & set(re.findall(r"[A-Z][a-z]+", document["article"] + document["summary_gt"]))


def test_demo_window_is_a_quarter_of_the_median_prompt(prompt_lengths):
    """A window in scripts/demo.sh that new requests have outdated."""
    window = re.search(r"--num_window_length (\d+)", (ROOT / "scripts/demo.sh").read_text())
    assert abs(int(window[1]) - statistics.median(prompt_lengths) / 4) < 1


@pytest.mark.parametrize(
    ("script", "flags", "word"),
    [
        ("make_demo_data", "--requests 0", "--requests"),
        ("make_demo_data", "--output-path /dev/null/a.jsonl", "--output-path"),
        ("train_demo", "--requests /nowhere.jsonl", "--requests /nowhere.jsonl"),
        ("train_demo", "--steps 0", "--steps"),
        ("train_demo", "--hidden_size 100", "--hidden_size"),
        ("train_demo", "--device nowhere", "--device"),
        ("train_demo", "--vocab 100", "--vocab"),
    ],
)
def test_bad_input_of_the_scripts_takes_one_line(monkeypatch, capsys, script, flags, word):
    """A traceback, or a training that ends in one after it has replaced the bundled model."""
    import importlib

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", [script, *flags.split()])
    assert importlib.import_module(script).main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and word in line


def test_model_is_small_and_grouped():
    """A retrained model that outgrew the repository, or lost what tests of GQA and RoPE rely on."""
    folder = DEMO_MODEL
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * 10**6
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert config["num_hidden_layers"] >= 4 and config["num_key_value_heads"] < config["num_attention_heads"]


def test_training_script_runs_on_a_cpu(monkeypatch, tmp_path):
    """A training script that only worked on the day the model was made."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS[:2]))
    flags = (
        "--steps 2 --layers 1 --hidden_size 64 --batch_tokens 2048 --workers 0 --device cpu --log_every 1 --minutes 999"
    )
    output = ["--output", str(tmp_path / "model"), "--requests", str(few), "--tokenizer_documents", "200"]
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # set back, for the script sets it
    import train_demo

    assert train_demo.main([*flags.split(), *output]) == 0
    assert "| 2 |" in (tmp_path / "model" / "MODEL_CARD.md").read_text()
    again = ["--model-name", str(tmp_path / "model"), "--output-path", str(tmp_path / "a.jsonl"), "--sample_num", "1"]
    assert run_summarization.main(again) == 0
