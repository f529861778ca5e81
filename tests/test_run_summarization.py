"""run_summarization.py as its users run it: what results hold, each flag, and bad input."""

import dataclasses
import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import run_summarization
from checkpoints import make_requests, write_requests
from h2optimizer import H2OConfig, H2OLlamaForCausalLM, batching
from h2optimizer.utils.cache import HHCache
from summaries import (  # noqa: F401
    H2O,
    ON_GPU,
    WINDOW,
    alone,
    assert_same_results,
    both_caches,
    caches,
    checkpoint,
    no_model,
    refused,
    run,
    tokenizer,
    tokens_of,
)

# What a result holds


@both_caches
def test_schema_of_results_and_metrics(run, flags):
    """A key that is missing, renamed or of another type breaks whoever reads the files; DESIGN.md names them."""
    requests = make_requests(3, max_tokens=5, stop=["###"], note="kept")
    outcome = run(requests, *flags, "--batch_size", "2")
    assert [result["request"] for result in outcome.results] == requests
    assert [result["index"] for result in outcome.results] == [0, 1, 2]
    for result in outcome.results:
        (choice,) = result["result"]["choices"]
        assert set(choice) == {"text", "finish_reason", "logprobs"} and isinstance(choice["text"], str)
        assert choice["finish_reason"] == "length" and set(choice["logprobs"]) == {"tokens", "token_logprobs"}
        assert len(tokens_of(choice)) == len(choice["logprobs"]["token_logprobs"]) == 5
        assert all(logprob < 0 for logprob in choice["logprobs"]["token_logprobs"])
        assert set(result["rouge"]) == {"rouge1", "rouge2", "rougeL"}
        assert set(result["cache"]) == {"tokens_seen", "slots_kept", "slimmings", "kv_bytes"}
        timing = result["result"]["request_time"]
        names = {"latency", "time_to_first_token", "time_per_output_token", "decode_time", "wall_time", "batch_size"}
        tokens = {"prompt_tokens_computed", "prompt_tokens_shared"}
        assert set(timing) == names | tokens and all(timing[name] > 0 for name in names)
        after_first = timing["latency"] - timing["time_to_first_token"]
        assert timing["time_per_output_token"] == pytest.approx(after_first / 4)
        assert result["tokens_generated"] == result["tokens_emitted"] == 5
    assert sorted(result["result"]["request_time"]["batch_size"] for result in outcome.results) == [1, 2, 2]

    metrics = outcome.metrics
    assert metrics["requests"] == 3 and metrics["tokens_generated"] == metrics["tokens_emitted"] == 15
    assert metrics["prompt_tokens_computed"] == sum(r["cache"]["tokens_seen"] - 4 for r in outcome.results)
    assert metrics["prompt_tokens_shared"] == 0 and metrics["share_prefixes"] is True
    assert metrics["rouge_unit"] == "F-measure from 0 to 1"
    for name, interval in metrics["rouge"].items():
        scores = [result["rouge"][name] for result in outcome.results]
        assert interval["mean"] == pytest.approx(sum(scores) / 3)
        assert interval["low"] <= interval["mean"] <= interval["high"]
    kv_bytes = [result["cache"]["kv_bytes"] for result in outcome.results]
    assert metrics["kv_bytes_per_request"] == pytest.approx(sum(kv_bytes) / 3)
    assert metrics["requests_evicted_from"] == (3 if flags else 0)
    wall_times = [result["result"]["request_time"]["wall_time"] for result in outcome.results]
    assert metrics["seconds"] == pytest.approx(sum(wall_times))
    assert metrics["tokens_per_second"] == pytest.approx(15 / metrics["seconds"])
    assert metrics["requests_per_second"] == pytest.approx(3 / metrics["seconds"])
    decoding = sum(result["result"]["request_time"]["decode_time"] for result in outcome.results)
    assert metrics["decode_tokens_per_second"] == pytest.approx(12 / decoding) and decoding < metrics["seconds"]
    assert metrics["peak_memory_bytes"] > 50 * 2**20, "torch alone takes more"
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["batch_size"] == 2 and metrics["skipped_lines"] == 0 and metrics["input_path"].endswith("in.jsonl")
    assert metrics["attention_backend"] == ("sdpa" if flags else None)
    settings = metrics["settings"]
    assert settings["--seed"] == 42 and settings["--enable_h2o_generation"] is bool(flags)
    if flags:
        assert settings["--num_window_length"] == 24 and settings["--update_interval"] == 4
        assert len(settings) == 11 + len(dataclasses.fields(H2OConfig)), "every flag of the cache stands in the file"


def test_single_tokens_have_no_time_per_token(run):
    """A summary of one token would count as infinitely fast in the mean over requests."""
    requests = make_requests(2, max_tokens=1) + make_requests(1, max_tokens=9)
    outcome = run(requests)
    times = [result["result"]["request_time"]["time_per_output_token"] for result in outcome.results]
    assert times[:2] == [None, None] and outcome.metrics["time_per_output_token"] == times[2] > 0
    none = run(requests, "--sample_num", "2", output="none")
    assert none.metrics["time_per_output_token"] is none.metrics["decode_tokens_per_second"] is None
    shown = {line[:22].strip(): line[22:].split()[0] for line in none.stdout.splitlines()[1:]}
    assert shown["time per token"] == shown["decoding"] == "-" != shown["overall"]


@both_caches
def test_wall_times_add_up_to_the_run(run, monkeypatch, flags):
    """Seconds counted for each row of a batch, or not at all: of a prefill, of steps that a result waits for, of a
    batch that memory did not suffice for, or of results from before an interruption."""
    takes = {"_prefill": 8.0, "_decode": 1.0}
    now, tried = 0.0, 0

    def slow(name):
        original = getattr(batching.Batcher, name)

        def wait(self, *args):
            nonlocal now, tried
            now += takes[name]
            tried += name == "_prefill"
            if tried == 1:
                raise ON_GPU
            return original(self, *args)

        monkeypatch.setattr(batching.Batcher, name, wait)

    for name in takes:
        slow(name)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    requests = make_requests(6)
    for i, request in enumerate(requests):
        request["max_tokens"] = 3 + 5 * i
    outcome = run(requests, *flags, "--batch_size", "4")
    assert tried > 1 and outcome.metrics["seconds"] == pytest.approx(now)

    kept = outcome.path.read_bytes().splitlines(keepends=True)[:3]
    before = sum(json.loads(line)["result"]["request_time"]["wall_time"] for line in kept)
    outcome.path.write_bytes(b"".join(kept))
    now = 0.0
    resumed = run(requests, *flags, "--batch_size", "4")
    assert now > 8 and resumed.metrics["seconds"] == pytest.approx(before + now)


def test_table_on_stdout(run):
    """The figures people copy into a paper: 0 to 100, which the heading says, where the file holds 0 to 1; an
    interval of one request; a speed that does not say whether prefill is in it."""
    request = make_requests(1, max_tokens=30)[0]
    said = run([request]).texts[0]
    outcome = run([request | {"summary_gt": said}], "--overwrite")  # scores 1 against itself
    assert re.match(r"ROUGE, 0 to 100 \(.*0 to 1\).*one request has no interval", outcome.stdout)
    assert re.search(r"^ROUGE-1 +100\.00$", outcome.stdout, re.M), outcome.stdout
    assert outcome.metrics["rouge"]["rouge1"]["mean"] == 1
    assert re.search(r"^requests +1 +0 with slots dropped$", outcome.stdout, re.M)
    prompt = outcome.metrics["prompt_tokens_computed"]
    assert re.search(rf"^prompt tokens +{prompt} +computed, 0 shared$", outcome.stdout, re.M)
    speed, rate = (outcome.metrics[name] for name in ("decode_tokens_per_second", "requests_per_second"))
    assert re.search(rf"^decoding +{speed:.1f} tokens/s .*without prefill$", outcome.stdout, re.M)
    assert re.search(rf"^overall +{rate:.3g} requests/s +with prefill$", outcome.stdout, re.M)
    two = run([request | {"summary_gt": said}, request], output="two").stdout
    assert re.search(r"^ROUGE-L +[\d.]+ +\[[\d.]+, 100\.00\]$", two, re.M) and "over 2 requests" in two


@pytest.mark.parametrize("temperature, batch_size", [(0, "4"), (0.8, "1")])
def test_token_logprobs_are_those_of_the_emitted_tokens_under_the_same_cache(
    run, checkpoint, tokenizer, temperature, batch_size
):
    """The predecessor wrote each step's greatest log-probability; others write them after temperature and top-p."""
    sampled = {"temperature": 0.8, "top_p": 0.9} if temperature else {}
    outcome = run(make_requests(4, max_tokens=20, **sampled), *H2O, "--batch_size", batch_size)
    model = H2OLlamaForCausalLM.from_pretrained(checkpoint, h2o=H2OConfig(**WINDOW)).eval()
    greedy = 0
    for result in outcome.results:
        (choice,) = result["result"]["choices"]
        emitted = tokenizer.convert_tokens_to_ids(tokens_of(choice))
        cache, replayed = HHCache(model.h2o), []
        fed = tokenizer(result["request"]["article"])["input_ids"]
        for token in emitted:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([fed]), past_key_values=cache).logits[0, -1]
            replayed.append(logits.log_softmax(-1)[token].item())
            greedy += int(logits.argmax()) == token
            fed = [token]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(replayed, abs=1e-4)
        assert choice["text"] == tokenizer.decode(emitted)
        assert result["cache"]["slots_kept"] == cache.lengths[0]
        assert result["cache"]["slimmings"] == cache.evictions[0] > 2
    assert greedy == 80 if temperature == 0 else 20 < greedy < 80


@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_full_cache_baseline_is_stock_llama(run, checkpoint, tokenizer, batch_size):
    """A baseline with another cache, mask or position would make H2O's loss of quality look smaller or greater."""
    outcome = run(make_requests(4, max_tokens=20), "--batch_size", batch_size)
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    for result in outcome.results:
        (choice,) = result["result"]["choices"]
        emitted = tokenizer.convert_tokens_to_ids(tokens_of(choice))
        inputs = tokenizer(result["request"]["article"], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        stock = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, length:].tolist()
        assert emitted == stock
        assert choice["text"] == tokenizer.decode(stock)
        with torch.no_grad():
            logprobs = model(torch.cat([inputs["input_ids"], torch.tensor([stock])], dim=1)).logits.log_softmax(-1)
        expected = [logprobs[0, length - 1 + i, token].item() for i, token in enumerate(stock)]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
        seen = length + 19  # the last token is never fed
        nbytes = seen * 2 * 2 * 2 * 8 * 4  # keys and values, layers, KV heads, head_dim, float32
        assert result["cache"] == {"tokens_seen": seen, "slots_kept": seen, "slimmings": 0, "kv_bytes": nbytes}


def test_cache_statistics_prove_eviction(run, tokenizer):
    """Counted by hand for one row: a cache that never slims, or counts for the wrong row, would still summarise."""
    requests = make_requests(6, max_tokens=1) + make_requests(6, max_tokens=14)
    requests.append({"article": "one", "summary_gt": "one", "max_tokens": 30})  # grows from below the window
    outcome = run(requests, *H2O, "--batch_size", "5")
    for result in outcome.results:
        seen = len(tokenizer(result["request"]["article"])["input_ids"])
        slimmings, slots = int(seen > 24), min(seen, 24)
        for step in range(1, result["request"]["max_tokens"]):
            seen, slots = seen + 1, slots + 1
            if step % 4 == 0 and slots > 24:
                slimmings, slots = slimmings + 1, 24
        nbytes = 2 * 2 * (24 + 4) * (2 * 8 * 4 + 4 + 4)  # layers, KV heads, slots; keys, values, mass, positions
        expected = {"tokens_seen": seen, "slots_kept": slots, "slimmings": slimmings, "kv_bytes": nbytes}
        assert result["cache"] == expected, result["index"]
    assert outcome.results[-1]["cache"]["slimmings"] > 0 and outcome.results[-1]["cache"]["tokens_seen"] < 40


# Flags


EVERY_FLAG = {
    "window_length": ("--num_window_length 20", 20),
    "num_heavy_hitters": ("--num_heavy_hitter_tokens 7", 7),
    "head_budgets": ("--head_budgets plan.json", ((15, 15), (18, 32))),
    "update_interval": ("--update_interval 3", 3),
    "slimming": ("--slimming mask", "mask"),
    "backend": ("--backend eager", "eager"),
    "score": ("--score random", "random"),
    "score_seed": ("--score_seed 5", 5),
    "score_every_step": ("--no-score_every_step", False),
    "score_decay": ("--score_decay 0.5", 0.5),
    "score_norm": ("--score_norm mean", "mean"),
    "score_queries": ("--score_queries 9", 9),
    "group_reduce": ("--group_reduce first", "first"),
    "position_rolling": ("--enable_position_rolling", True),
    "slots": ("--slots int8", "int8"),
    "prefill_chunk": ("--prefill_chunk 11", 11),
    "capture": ("--no-capture", False),
}


def test_every_flag_reaches_the_cache(run, caches):
    """A flag that is parsed and then forgotten; a field of H2OConfig without a flag."""
    assert set(EVERY_FLAG) == {field.name for field in dataclasses.fields(H2OConfig)}
    together = {name: of_field for name, of_field in EVERY_FLAG.items() if name != "head_budgets"}  # slims in place
    given = [word for flag, _ in together.values() for word in flag.split()]
    run(make_requests(1, max_tokens=6), "--enable_h2o_generation", *given)
    assert len(caches) == 2
    for cache in caches:
        assert cache.h2o == H2OConfig(**{name: value for name, (_, value) in together.items()})
        assert cache.layers[0].keys.shape[2] == 20 + 3
    assert all(getattr(H2OConfig(), name) != value for name, (_, value) in EVERY_FLAG.items()), "tells nothing"


PLAN = {"windows": [[1, 1], [2, 7]]}
PLANNED = "--enable_h2o_generation --num_window_length 20 --num_heavy_hitter_tokens 7 --head_budgets".split()


def test_plan_reaches_the_cache(run, caches, tmp_path):
    """A plan that is read and forgotten, or that a resumed run takes for another one."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    requests = make_requests(2, max_tokens=6)
    first = run(requests, *PLANNED, str(plan))
    table = EVERY_FLAG["head_budgets"][1]
    assert {cache.h2o for cache in caches} == {H2OConfig(window_length=20, num_heavy_hitters=7, head_budgets=table)}
    assert {result["cache"]["slots_kept"] for result in first.results} <= set(range(20, 36))
    assert "2 of 2 results exist already" in " ".join(run(requests, *PLANNED, str(plan)).stderr)


@pytest.mark.parametrize(
    "plan, words",
    [
        (None, ["--head_budgets ", "plan.json: cannot be read (No such file"]),
        ("{}", ["--head_budgets ", "plan.json: not a plan of head budgets"]),
        ({"windows": [[1, 1, 2], [1, 1, 2]]}, ["--head_budgets ", "plan.json: budgets for 2 layers of 3 KV heads"]),
        (
            {"widths": [4], "losses": [[[1.0], [2.0]], [[3.0], [4.0]]], "model": "other", "weights": "0" * 16},
            ["--head_budgets ", "plan.json: measured on another model (other, "],
        ),
    ],
)
def test_plan_that_does_not_fit(refused, no_model, tmp_path, plan, words):
    """A plan of another model that is used without a word, or refused after the model is loaded."""
    path = tmp_path / "plan.json"
    if plan is not None:
        path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    refused(make_requests(1), *PLANNED, str(path), words=words)


def test_plan_without_slots_to_divide(refused, no_model, tmp_path):
    """Heads that keep fewer slots than the newest ones, in a message that names no flag."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN))
    words = ["--num_window_length=20: 19 of its slots", "give at least 21, or raise num_heavy_hitter_tokens"]
    refused(make_requests(1), *PLANNED, str(path), "--num_heavy_hitter_tokens", "1", words=words)


def test_no_capture_changes_no_text(run):
    """A way of decoding that is kept for the case that graphs fail, and fails itself."""
    requests = make_requests(3, max_tokens=20)
    plain = run(requests, *H2O, output="plain")
    outcome = run(requests, *H2O, "--no-capture", "--batch_size", "2")
    assert_same_results(outcome, plain)
    assert outcome.metrics["settings"]["--capture"] is False


def test_flag_of_the_default_value_reaches_the_cache(run, caches, monkeypatch):
    """`if args.flag:` drops 0, False and "all", which then silently take an edited default."""
    edited = dict(num_heavy_hitters=3, score_every_step=False, score_decay=0.9, score_queries=4, position_rolling=True)
    edited["prefill_chunk"] = 5
    fields = [(name, type(value), dataclasses.field(default=value)) for name, value in edited.items()]
    monkeypatch.setattr(
        "h2optimizer.flags.H2OConfig", dataclasses.make_dataclass("H2OConfig", fields, bases=(H2OConfig,), frozen=True)
    )
    flags = "--num_heavy_hitter_tokens 0 --score_every_step --score_decay 0 --score_queries all --prefill_chunk all"
    run(make_requests(1, max_tokens=2), "--enable_h2o_generation", "--no-enable_position_rolling", *flags.split())
    h2o = caches[0].h2o
    assert (h2o.num_heavy_hitters, h2o.score_every_step, h2o.score_decay) == (0, True, 0.0)
    assert h2o.score_queries is None and h2o.position_rolling is False and h2o.prefill_chunk is None


def test_editing_a_default_is_enough(run, caches, monkeypatch):
    """argparse defaults that repeat H2OConfig's would win over the edited file."""
    run(make_requests(1, max_tokens=2), "--enable_h2o_generation", output="unedited")
    edited = [("window_length", int, 20), ("update_interval", int, 2), ("score", str, "sink")]
    fields = [(name, kind, dataclasses.field(default=value)) for name, kind, value in edited]
    monkeypatch.setattr(
        "h2optimizer.flags.H2OConfig", dataclasses.make_dataclass("H2OConfig", fields, bases=(H2OConfig,), frozen=True)
    )
    outcome = run(make_requests(1, max_tokens=2), "--enable_h2o_generation", "--update_interval", "5")
    assert caches[0].h2o == H2OConfig()
    h2o = caches[-1].h2o
    assert (h2o.window_length, h2o.update_interval, h2o.score) == (20, 5, "sink"), "the flag given wins, only that one"
    assert outcome.metrics["settings"]["--num_window_length"] == 20


def test_cache_flags_change_the_text(run):
    """A cache that is made and not used: heavy hitters, local attention and full cache would all say the same."""
    requests = make_requests(2, max_tokens=30)
    variants = [[], H2O, [*H2O, "--num_heavy_hitter_tokens", "0"], [*H2O, "--enable_position_rolling"]]
    texts = [tuple(run(requests, *flags, output=f"{i}.jsonl").texts) for i, flags in enumerate(variants)]
    assert len(set(texts)) == len(texts)


def test_wide_window_is_the_full_cache(run):
    """With nothing to drop, both models say the same: weights, positions or padding of the H2O path are right."""
    requests = make_requests(4, max_tokens=20)
    wide = run(requests, "--enable_h2o_generation", "--num_window_length", "256", "--batch_size", "4", output="wide")
    assert wide.texts == run(requests).texts
    assert wide.metrics["requests_evicted_from"] == 0


def test_sample_num_takes_the_first_requests(run):
    """The last ones, or one too many."""
    requests = make_requests(4, max_tokens=3)
    outcome = run(requests, "--sample_num", "2")
    assert [result["request"] for result in outcome.results] == requests[:2]
    assert len(run(requests, "--sample_num", "9", output="all").results) == 4


# Bad input


def test_bad_lines(refused, run, tmp_path, monkeypatch):
    """The line is named before a model loads; --skip_bad_requests goes on and says how many."""
    good = make_requests(2, max_tokens=2)
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(good[0]), "{", '{"article": "a"}', json.dumps(good[1]), json.dumps(good[0] | {"n": "2"})]
    path.write_text("\n".join(lines))
    with monkeypatch.context() as patch:
        patch.setattr(run_summarization, "load_model", lambda *args: pytest.fail("a model was loaded"))
        refused(path, words=["bad.jsonl, line 2", "not JSON", "--skip_bad_requests"])
    outcome = run(path, "--skip_bad_requests")
    assert outcome.stderr == [f"warning: 3 bad lines of {path} skipped"]
    assert [result["request"] for result in outcome.results] == good and outcome.metrics["skipped_lines"] == 3


@pytest.mark.parametrize("flags", [[], ["--skip_bad_requests"]])
def test_files_without_requests(refused, no_model, tmp_path, flags):
    """Means over nothing."""
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    refused(path, *flags, words="has no requests")
    path.write_text("bad\n")
    refused(path, *flags, words="1 bad lines" if flags else "line 1")


def test_input_that_cannot_be_read(refused, no_model, tmp_path):
    """A missing file or a folder, before the model loads; no results file is left behind for it."""
    outcome = refused(tmp_path / "none.jsonl", words=["--input-path", "none.jsonl", "No such file"])
    refused(tmp_path, words=["--input-path", "Is a directory"])
    assert not outcome.path.exists()


@pytest.mark.parametrize("output", ["file/out.jsonl", "file/deeper/out.jsonl", ".", "/proc/out.jsonl", "/dev/null"])
def test_output_that_cannot_be_written(refused, no_model, tmp_path, output):
    """After an hour of decoding is too late; and root must not lose /dev/null to the final rename."""
    (tmp_path / "file").write_text("")
    refused(make_requests(1), output=output, words="--output-path")
    assert not Path("/dev/null").is_file()


def test_output_folder_is_made(run, tmp_path):
    """A new folder for a new experiment is no error."""
    outcome = run(make_requests(1, max_tokens=2), output="new/deep/a.b")
    assert len(outcome.results) == 1 and (tmp_path / "new/deep/a.b.metrics.json").exists()


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_input_path_as_output_path_keeps_the_requests(refused, no_model, tmp_path, flags):
    """A user in a hurry completes the same name twice."""
    before = write_requests(tmp_path / "in.jsonl", make_requests(2)).read_bytes()
    refused(tmp_path / "in.jsonl", *flags, output="in.jsonl", words=["--output-path", "--input-path"])
    assert (tmp_path / "in.jsonl").read_bytes() == before


BAD_FLAGS = {
    "--num_window_length 1": "--num_window_length=1",
    "--num_window_length 0": "--num_window_length=0",
    "--num_window_length 8 --num_heavy_hitter_tokens 8": "--num_heavy_hitter_tokens=8: must be less than num_window",
    "--num_heavy_hitter_tokens 256": "--num_heavy_hitter_tokens=256",
    "--num_heavy_hitter_tokens -2": "--num_heavy_hitter_tokens=-2",
    "--update_interval 0": "--update_interval=0",
    "--update_interval -4": "--update_interval=-4",
    "--score_decay 1.1": "--score_decay=1.1",
    "--score_decay -0.1": "--score_decay=-0.1",
    "--score_decay nan": "--score_decay=nan",
    "--score_queries 0": "--score_queries",
    "--score_queries some": "--score_queries",
    "--prefill_chunk 0": "--prefill_chunk",
    "--prefill_chunk none": "--prefill_chunk",
    "--score_seed 4294967296": "--score_seed",
    "--score best": "--score",
    "--slimming h": "--slimming",
    "--backend fast": "--backend",
    "--backend flash_attn": "set --no-score_every_step, so that only steps that slim need them",
    "--backend flash_attn --no-score_every_step": "--backend flash_attn needs a CUDA device",
    "--score_norm max": "--score_norm",
    "--group_reduce last": "--group_reduce",
    "--num_window_length 2.5": "--num_window_length",
    "--num_window_length": "--num_window_length",
    "--sample_num 0": "--sample_num",
    "--sample_num -1": "--sample_num",
    "--batch_size 0": "--batch_size",
    "--batch_size many": "--batch_size",
    "--seed -1": "--seed",
    "--seed 99999999999999999999": "--seed",
    "--dtype int8": "--dtype",
    "--device gpu": "--device gpu",
    "--device meta": "--device meta",
    "--device 0": "--device 0",
    "--num_window 64": "unrecognized argument --num_window; did you mean --num_window_length?",
    "--greed": "unrecognized argument --greed; did you mean --greedy?",
    "stray": "unrecognized argument stray",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flag(refused, no_model, tmp_path, flags):
    """One line that names the flag as the user typed it, before a model loads; no abbreviation is guessed."""
    outcome = refused(make_requests(1), "--enable_h2o_generation", *flags.split(), words=BAD_FLAGS[flags])
    assert not outcome.path.exists()


def test_usage_errors_take_one_line(capsys):
    """argparse prints a usage of twenty lines before its error."""
    assert run_summarization.main(["--input-path"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--input-path" in line


@pytest.mark.parametrize("flag", [flag for flag, _ in EVERY_FLAG.values()] + ["--score_queries all"])
def test_cache_flag_without_h2o_generation(refused, no_model, flag):
    """A baseline in the belief that it was H2O: the flags would do nothing."""
    refused(make_requests(1), *flag.split(), words=[flag.split()[0].replace("no-", ""), "--enable_h2o_generation"])


# What a user in a hurry feeds it


def test_windows_file_of_unicode(run, tmp_path):
    """Byte order mark, CR LF, and text beyond ASCII, which must come back as it was."""
    requests = [
        {"article": "Ein Wörterbuch für 日本語 🙂 \u2028 und\r\nmehr", "summary_gt": "Ω\x7f", "max_tokens": 3},
        {"article": "word", "summary_gt": "word", "max_tokens": 3},
    ]
    path = tmp_path / "windows.jsonl"
    lines = "\r\n".join(json.dumps(request, ensure_ascii=False) for request in requests)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    outcome = run(path, *H2O, "--batch_size", "2")
    raw = outcome.path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["request"] for line in raw[:-1]] == requests and raw[-1] == ""
    assert outcome.stderr == []


def test_requests_from_a_pipe(run, tmp_path):
    """`--input-path <(head -2 requests.jsonl)` can be read once only."""
    reading, writing = os.pipe()
    os.write(writing, "".join(json.dumps(request) + "\n" for request in make_requests(2, max_tokens=2)).encode())
    os.close(writing)
    try:
        assert len(run(Path(f"/dev/fd/{reading}")).results) == 2
    finally:
        os.close(reading)


def test_window_far_beyond_memory(run):
    """ "No limit" as a window: its slots are allocated at once, and the CPU's error is no OutOfMemoryError."""
    outcome = run(make_requests(1), "--enable_h2o_generation", "--num_window_length", "2000000000", code=2)
    (line,) = outcome.stderr
    assert "does not fit into memory" in line and "smaller window" in line
