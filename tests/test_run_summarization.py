"""run_summarization.py as its users run it: results against independent replays, crashes, and bad input."""

import dataclasses
import json
import logging
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, LlamaForCausalLM, MistralConfig

import run_summarization
from checkpoints import POSITIONS, make_checkpoint, make_requests, make_tokenizer, write_requests
from forks import Fork, stop_while_writing
from h2optimizer import H2OConfig, H2OLlamaForCausalLM, batching, decoder, decoding
from utils.cache import HHCache
from utils.requests import Request, ResultsFile

ROOT = Path(__file__).resolve().parents[1]
WINDOW = dict(window_length=24, num_heavy_hitters=10, update_interval=4)
H2O = ["--enable_h2o_generation", "--num_window_length=24", "--num_heavy_hitter_tokens=10", "--update_interval=4"]
CACHES = {"h2o": H2O, "full": []}
SAMPLED = {"temperature": 0.8, "top_p": 0.9}

both_caches = pytest.mark.parametrize("flags", CACHES.values(), ids=CACHES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No network, no threads of the tokenizer that a fork would miss, and no log level left to other tests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    levels = transformers.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    huggingface_hub.logging.set_verbosity(levels[1])


@dataclasses.dataclass
class Outcome:
    """What a run of the command line left behind, as it was then."""

    stdout: str
    stderr: list[str]  # lines, progress bars not counted
    path: Path  # the results
    lines: list[bytes]
    metrics: dict | None

    @property
    def results(self) -> list[dict]:
        return [json.loads(line) for line in self.lines]

    @property
    def choices(self) -> list[dict]:
        return [choice for result in self.results for choice in result["result"]["choices"]]

    @property
    def texts(self) -> list[str]:
        return [choice["text"] for choice in self.choices]

    @property
    def files(self) -> tuple[bytes, bytes]:
        """Results and metrics as they are on disk now."""
        return self.path.read_bytes(), metrics_path(self.path).read_bytes()


def metrics_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".jsonl") + ".metrics.json")


def assert_same_results(actual: Outcome, expected: Outcome) -> None:
    """The same in everything but times, memory, and log-probabilities by more than rounding."""
    assert len(actual.results) == len(expected.results)
    for pair in zip(actual.results, expected.results, strict=True):
        logprobs = []
        for result in pair:
            del result["result"]["request_time"], result["peak_memory_bytes"]
            choices = result["result"]["choices"]
            logprobs.append([p for choice in choices for p in choice["logprobs"].pop("token_logprobs")])
        assert pair[0] == pair[1]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """run(requests or path, *flags, ...) calls main in this process, on the CPU."""

    def run(requests, *flags, output="out.jsonl", model=checkpoint, code=0) -> Outcome:
        path = write_requests(tmp_path / "in.jsonl", requests) if isinstance(requests, list) else requests
        argv = ["--input-path", path, "--output-path", tmp_path / output, "--model-name", model]
        argv = [*map(str, argv), *([] if "--device" in flags else ["--device", "cpu"]), *flags]
        capsys.readouterr()
        try:
            got = run_summarization.main(argv)
        except SystemExit as stop:
            got = stop.code
        captured = capsys.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", captured.err) if line.strip() and "%|" not in line]
        assert got == code, captured.err
        path = tmp_path / output
        metrics = metrics_path(path)
        return Outcome(
            captured.out,
            lines,
            path,
            path.read_bytes().splitlines() if path.is_file() else [],
            json.loads(metrics.read_text()) if metrics.is_file() else None,
        )

    return run


@pytest.fixture
def refused(run):
    """refused(requests, *flags, words=...): exit 2 and one line on stderr that holds the words."""

    def refused(*args, words, **kwargs) -> Outcome:
        outcome = run(*args, code=2, **kwargs)
        (line,) = outcome.stderr
        assert line.startswith("error: ")
        for word in [words] if isinstance(words, str) else words:
            assert word in line, line
        assert outcome.stdout == ""
        return outcome

    return refused


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test when a model is loaded."""
    monkeypatch.setattr(run_summarization, "load_model", lambda *args: pytest.fail("a model was loaded"))


@pytest.fixture
def script(monkeypatch):
    """script(tokens) lets greedy texts say these tokens, the last one again and again; log-probabilities stay its own.

    Rows that begin later would go on where the others are: for one row, or rows that begin together.
    """
    prefill = batching.Batcher._prefill

    def script(tokens):
        step = 0

        def begins(self, group, rows):
            nonlocal step
            step = 0
            prefill(self, group, rows)

        def choose(logits):
            nonlocal step
            said = torch.full((len(logits),), tokens[min(step, len(tokens) - 1)])
            step += 1
            return said

        monkeypatch.setattr(batching.Batcher, "_prefill", begins)
        monkeypatch.setattr(batching, "choose_greedily", choose)

    return script


@pytest.fixture
def caches(monkeypatch):
    """The HHCaches that a run makes: of each prefill, after the first the one that all rows move into."""
    made = []

    class Recorded(HHCache):
        def __init__(self, h2o):
            super().__init__(h2o)
            made.append(self)

        def with_rows(self, batch_size):
            made.append(super().with_rows(batch_size))
            return made[-1]

    monkeypatch.setattr(decoding, "HHCache", Recorded)
    return made


@pytest.fixture
def prefills(monkeypatch):
    """For each prefill of a run, how many sequences it begins and how many are under way beside them."""
    seen, prefill = [], batching.Batcher._prefill

    def recorded(self, group, rows):
        seen.append((len(group), sum(sequence is not None for sequence in self.rows)))
        prefill(self, group, rows)

    monkeypatch.setattr(batching.Batcher, "_prefill", recorded)
    return seen


def with_generation_config(checkpoint: Path, folder: Path, **settings) -> Path:
    """A copy of the checkpoint with other generation defaults."""
    shutil.copytree(checkpoint, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def says_eos(checkpoint: Path, folder: Path, tokenizer, *tokens: str) -> Path:
    """A copy of the checkpoint for which ordinary tokens end a text too, as Llama 3 has two of them."""
    eos = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(tokens))]
    return with_generation_config(checkpoint, folder, eos_token_id=eos)


def tokens_of(choice: dict) -> list[str]:
    return choice["logprobs"]["tokens"]


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
        assert set(timing) == names and all(timing[name] > 0 for name in names)
        after_first = timing["latency"] - timing["time_to_first_token"]
        assert timing["time_per_output_token"] == pytest.approx(after_first / 4)
        assert result["tokens_generated"] == result["tokens_emitted"] == 5
    assert sorted(result["result"]["request_time"]["batch_size"] for result in outcome.results) == [1, 2, 2]

    metrics = outcome.metrics
    assert metrics["requests"] == 3 and metrics["tokens_generated"] == metrics["tokens_emitted"] == 15
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
    """The figures people copy into a paper: points of 100, which the heading says, where the file holds fractions; an
    interval of one request; a speed that does not say whether prefill is in it."""
    request = make_requests(1, max_tokens=30)[0]
    said = run([request]).texts[0]
    outcome = run([request | {"summary_gt": said}], "--overwrite")  # scores 1 against itself
    assert re.match(r"ROUGE, points of 100 \(.*fractions of 1\).*one request has no interval", outcome.stdout)
    assert re.search(r"^ROUGE-1 +100\.00$", outcome.stdout, re.M), outcome.stdout
    assert outcome.metrics["rouge"]["rouge1"]["mean"] == 1
    assert re.search(r"^requests +1 +0 with slots dropped$", outcome.stdout, re.M)
    speed, rate = (outcome.metrics[name] for name in ("decode_tokens_per_second", "requests_per_second"))
    assert re.search(rf"^decoding +{speed:.1f} tokens/s .*without prefill$", outcome.stdout, re.M)
    assert re.search(rf"^overall +{rate:.3g} requests/s +with prefill$", outcome.stdout, re.M)
    two = run([request | {"summary_gt": said}, request], output="two").stdout
    assert re.search(r"^ROUGE-L +[\d.]+ +\[[\d.]+, 100\.00\]$", two, re.M) and "over 2 requests" in two


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("batch_size", ["1", "4"])
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


# Where a text ends


@both_caches
def test_text_without_stop_string_is_whole(run, tokenizer, flags):
    """The predecessor cut the last character where find returned -1."""
    request = make_requests(1, max_tokens=12)[0]
    free = run([request], *flags)
    kept = run([request | {"stop": ["never said", "###"]}], *flags, "--overwrite")
    assert kept.texts == free.texts and len(tokens_of(kept.choices[0])) == 12
    assert kept.choices[0]["text"] == tokenizer.convert_tokens_to_string(tokens_of(kept.choices[0]))
    assert kept.choices[0]["finish_reason"] == "length"


@both_caches
def test_text_is_cut_at_the_first_stop_string(run, tokenizer, flags):
    """Wherever a stop string begins, in a token or over several, text and tokens end right before it."""
    request = make_requests(1, max_tokens=12)[0]
    free = run([request], *flags).choices[0]
    text, tokens = free["text"], tokens_of(free)
    ends = [len(tokenizer.convert_tokens_to_string(tokens[: i + 1])) for i in range(len(tokens))]
    spanning = 0
    for begin in range(0, len(text) - 3, 3):
        stop = text[begin : begin + 3]
        at = text.find(stop)
        choice = run([request | {"stop": ["never said", stop]}], *flags, "--overwrite").choices[0]
        assert choice["text"] == text[:at] and choice["finish_reason"] == "stop"
        covering = next((i + 1 for i, end in enumerate(ends) if end >= at), 0) if at else 0
        assert tokens_of(choice) == tokens[:covering]
        assert choice["logprobs"]["token_logprobs"] == free["logprobs"]["token_logprobs"][:covering]
        spanning += any(at < end < at + 3 for end in ends)
    assert spanning > 1


def test_earliest_stop_string_cuts_whatever_their_order(run, script, tokenizer):
    """Cutting at the first string of the list, or at the last found, instead of the first in the text."""
    tokens = tokenizer.encode("one two three four")
    script(tokens)
    requests = make_requests(1, max_tokens=len(tokens), stop=["four", "wo t", "two t", "o t", "absent"])
    assert run(requests).texts == ["one "], "all three appear with the same letter"


def test_stop_string_appears_letter_by_letter(run, script, tokenizer):
    """A stop string that is looked for in the last token only is never found."""
    (sharp,) = tokenizer.encode("#")
    script([*tokenizer.encode("fine"), sharp, sharp, sharp, *tokenizer.encode(" and more")])
    outcome = run(make_requests(1, max_tokens=40, stop=["###"]))
    assert outcome.texts == ["fine"] and outcome.choices[0]["finish_reason"] == "stop"
    assert outcome.results[0]["tokens_generated"] == len(tokenizer.encode("fine")) + 3, "decoding went on"


@pytest.mark.parametrize("said", ["naïve 🙂### more", "日本語###", "🙂🙂ab#", "###", "ab\n\n###"])
def test_characters_of_several_tokens_before_the_stop_string(run, script, tokenizer, said):
    """Half an emoji decodes to as many characters as a whole one, so counting characters drops its last token."""
    tokens = tokenizer.encode(said)
    script(tokens)
    stop = "###" if "###" in said else "#"
    choice = run(make_requests(1, max_tokens=len(tokens), stop=[stop])).choices[0]
    assert choice["text"] == said[: said.find(stop)]
    assert tokenizer.convert_tokens_to_string(tokens_of(choice)).startswith(choice["text"])
    assert len(tokens_of(choice)) == len(tokenizer.encode(choice["text"]))
    assert choice["finish_reason"] == "stop"


def test_stop_string_of_characters_of_several_tokens(run, script, tokenizer):
    """A stop string of four bytes a character reaches further back than its length in characters."""
    assert len(tokenizer.encode("🙂")) == 4
    script([*tokenizer.encode("kept"), *tokenizer.encode("🙂🙃🙂")])
    outcome = run(make_requests(1, max_tokens=30, stop=["🙂🙃🙂"]))
    assert outcome.texts == ["kept"] and outcome.choices[0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "said, stop, text",
    [
        ("short</s>long", "</s>", "short"),
        ("sho</s>rt", "ho</s>r", "s"),
        ("sho</s>rt", "ort", "sh"),
        ("a</s>b", "b", "a"),
    ],
)
def test_stop_string_that_names_a_special_token(run, script, checkpoint, tokenizer, tmp_path, said, stop, text):
    """One that is removed from the text before anybody looks, or that stays in it; tokens past it."""
    model = with_generation_config(checkpoint, tmp_path / "endless", eos_token_id=None)
    script(tokenizer.encode(said, add_special_tokens=False))
    choice = run(make_requests(1, max_tokens=40, stop=[stop]), *H2O, model=model).choices[0]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert tokenizer.convert_tokens_to_string(tokens_of(choice)) in (text, text + "o")  # "o</s>" in one text
    assert len(choice["logprobs"]["token_logprobs"]) == len(tokens_of(choice))


def test_stop_string_that_spans_the_eos_token(run, script, tokenizer):
    """The end of a text that the model has ended itself is looked for, too."""
    script([*tokenizer.encode("short", add_special_tokens=False), tokenizer.eos_token_id])
    assert run(make_requests(1, max_tokens=40, stop=["rt</s>"])).texts == ["sho"]


def test_stop_string_in_the_prompt_is_not_the_summarys(run):
    """Prompts of the H2O project begin with their own stop string."""
    request = make_requests(1, max_tokens=8)[0]
    assert request["article"].startswith("###\n")
    outcome = run([request | {"stop": ["###", "Article"]}])
    assert outcome.results[0]["tokens_generated"] == 8 and outcome.texts[0]


def test_empty_stop_list_cuts_nothing(run):
    """min() over no stop strings."""
    requests = make_requests(1, max_tokens=8)
    assert run([requests[0] | {"stop": []}]).texts == run(requests, "--overwrite").texts


@both_caches
def test_eos_ends_a_text_and_is_not_in_it(run, checkpoint, tokenizer, tmp_path, flags):
    """Any of several EOS tokens ends its own row only; the text is all before it, and the reason is "stop"."""
    requests = make_requests(5, max_tokens=25)
    free = run(requests, *flags)
    eos = [tokens_of(free.choices[i])[k] for i, k in ((0, 6), (1, 11), (2, 0))]
    model = says_eos(checkpoint, tmp_path / "eos", tokenizer, *eos)
    ended = run(requests, *flags, "--overwrite", "--batch_size", "5", model=model)
    reasons = []
    for result, choice, before in zip(ended.results, ended.choices, free.choices, strict=True):
        tokens = tokens_of(before)
        end = next((i for i, token in enumerate(tokens) if token in eos), None)
        assert tokens_of(choice) == tokens[:end]
        assert choice["text"] == tokenizer.convert_tokens_to_string(tokens[:end])
        assert choice["finish_reason"] == ("length" if end is None else "stop")
        assert result["tokens_generated"] == (25 if end is None else end + 1)
        assert result["tokens_emitted"] == (25 if end is None else end), "what logprobs hold"
        reasons.append(choice["finish_reason"])
    assert ended.texts[2] == "" and ended.results[2]["rouge"]["rouge1"] == 0, "EOS as the first token: empty, no crash"
    assert len({len(tokens_of(choice)) for choice in ended.choices}) > 2


@both_caches
@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_eos_as_the_first_token(run, script, tokenizer, batch_size, flags):
    """A row that never decodes: means over no step, slots of a neighbour, a row that is not freed."""
    script([tokenizer.eos_token_id])
    requests = make_requests(5, max_tokens=4)
    outcome = run(requests, *flags, "--batch_size", batch_size)
    assert [result["request"] for result in outcome.results] == requests
    for result in outcome.results:
        (choice,) = result["result"]["choices"]
        assert (choice["text"], choice["finish_reason"], tokens_of(choice)) == ("", "stop", [])
        assert choice["logprobs"]["token_logprobs"] == [] and result["tokens_generated"] == 1
        timing = result["result"]["request_time"]
        assert 0 < timing["latency"] == timing["time_to_first_token"] and timing["time_per_output_token"] is None
        length = len(tokenizer(result["request"]["article"])["input_ids"])
        assert result["cache"]["tokens_seen"] == length
        assert result["cache"]["slots_kept"] == (min(length, 24) if flags else length)
    assert outcome.metrics["time_per_output_token"] is None and outcome.metrics["tokens_emitted"] == 0


def test_eos_as_the_last_allowed_token_is_a_stop(run, script, tokenizer):
    """finish_reason is decided by what was said, not by how much."""
    script([*tokenizer.encode("ab"), tokenizer.eos_token_id])
    n = len(tokenizer.encode("ab"))
    assert run(make_requests(1, max_tokens=n + 1)).choices[0]["finish_reason"] == "stop"
    choice = run(make_requests(1, max_tokens=n), "--overwrite").choices[0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")


def test_a_million_tokens_asked_for(run, script, tokenizer):
    """Nothing may be allocated for max_tokens; the text ends where the model ends it."""
    script([*tokenizer.encode("short"), tokenizer.eos_token_id])
    outcome = run(make_requests(2, max_tokens=10**6), *H2O)
    assert outcome.texts == ["short", "short"]
    assert ["2 of 2" in line and "positions" in line for line in outcome.stderr] == [True]


# Batches


@both_caches
def test_batches_change_nothing_and_results_come_in_order(run, checkpoint, tokenizer, tmp_path, flags):
    """Padding, a neighbour that ends earlier, or sorting by length that leaks into the results."""
    requests = make_requests(11)
    for i, request in enumerate(requests):
        request["max_tokens"] = (30, 9, 17)[i % 3]
    alone = run(requests, *flags)
    stop = alone.texts[3][10:13]
    requests[3]["stop"] = requests[4]["stop"] = [stop]
    model = says_eos(checkpoint, tmp_path / "eos", tokenizer, tokens_of(alone.choices[0])[20])
    alone = run(requests, *flags, "--overwrite", model=model)
    together = run(requests, *flags, "--overwrite", "--batch_size", "4", model=model)
    assert [result["request"] for result in together.results] == requests
    assert_same_results(together, alone)
    assert {choice["finish_reason"] for choice in together.choices} == {"stop", "length"}
    assert len({len(tokens_of(choice)) for choice in together.choices}) > 4


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_order_of_decoding(batch_size):
    """A request lost or twice; long prompts late, when memory runs out after hours; requests alike not side by side."""
    requests = [Request.from_line(json.dumps(request), i) for i, request in enumerate(make_requests(10))]
    prompts = [run_summarization.Prompt(request, [0] * (10 + (7 * request.index) % 5)) for request in requests]
    ordered = run_summarization.in_order(prompts, batch_size)
    indices = [prompt.request.index for prompt in ordered]
    assert sorted(indices) == list(range(10))
    if batch_size == 1:
        assert indices == list(range(10)), "no padding to save: the order of the file"
        return
    lengths = [len(prompt.tokens) for prompt in ordered]
    assert lengths == sorted(lengths, reverse=True)
    assert indices[0] < indices[1], "and among the same lengths that of the file"


def test_decoding_follows_the_order(run, tokenizer, monkeypatch):
    """An order that is worked out and not kept to."""
    begun, prefill = [], batching.Batcher._prefill

    def recorded(self, group, rows):
        begun.extend(len(sequence.prompt) for sequence in group)
        prefill(self, group, rows)

    monkeypatch.setattr(batching.Batcher, "_prefill", recorded)
    requests = make_requests(6, max_tokens=2)
    lengths = [len(tokenizer(request["article"])["input_ids"]) for request in requests]
    for batch_size, expected in (("1", lengths), ("2", sorted(lengths, reverse=True))):
        begun.clear()
        run(requests, *H2O, "--batch_size", batch_size, output=batch_size)
        assert begun == expected


@pytest.mark.parametrize("interval", [1, 4, 16])
def test_rows_that_join_get_what_they_get_alone(run, prefills, interval):
    """A row that takes a place in the middle of the others' decoding, with their slots, mass, clock or numbers left
    in it, or whose own slimmings fall on other steps than alone."""
    requests = make_requests(10)
    for i, request in enumerate(requests):
        request |= {"max_tokens": (60, 5, 17, 34)[i % 4]} | (SAMPLED if i % 3 == 0 else {})
    flags = [*H2O, "--update_interval", str(interval)]
    alone = run(requests, *flags, output="alone")
    assert prefills == [(1, 0)] * 10
    prefills.clear()
    outcome = run(requests, *flags, "--batch_size", "3")
    assert_same_results(outcome, alone)
    assert sum(beside > 0 for _, beside in prefills) > 2, "nothing joined"
    assert max(group + beside for group, beside in prefills) == 3
    assert {result["result"]["request_time"]["batch_size"] for result in outcome.results} <= {1, 2, 3}


def test_full_cache_decodes_a_batch_to_its_end(run, prefills):
    """Rows of the full cache all grow: none joins the others."""
    requests = make_requests(7)
    for i, request in enumerate(requests):
        request["max_tokens"] = (20, 5, 17, 9)[i % 4]
    run(requests, "--batch_size", "3")
    assert prefills == [(3, 0), (3, 0), (1, 0)]


@both_caches
def test_more_choices_than_rows(run, prefills, flags):
    """A request whose sequences do not fit into one batch: choices lost, mixed up or drawn twice."""
    requests = make_requests(2, max_tokens=9, n=5, **SAMPLED)
    alone = run(requests, *flags, output="alone")
    assert [len(result["result"]["choices"]) for result in alone.results] == [5, 5]
    assert len(set(alone.texts)) == 10
    for batch_size in ("2", "7"):
        prefills.clear()
        outcome = run(requests, *flags, "--batch_size", batch_size, output=batch_size)
        assert_same_results(outcome, alone)
        assert sum(group for group, _ in prefills) == 10 and max(group for group, _ in prefills) == int(batch_size)
    one = run([request | {"n": 1} for request in requests], *flags, output="one")
    assert one.texts == [alone.texts[0], alone.texts[5]], "the first of n is the only one of one"


def test_automatic_batch_size(run, prefills, monkeypatch):
    """A number taken from the memory that is free, at least one, or more than there are sequences."""
    requests = make_requests(19, max_tokens=2)
    alone = run(requests, *H2O, output="alone")
    prefills.clear()
    outcome = run(requests, *H2O, "--batch_size", "auto")
    assert_same_results(outcome, alone)
    assert prefills[0] == (16, 0) and outcome.metrics["batch_size"] == "auto"
    assert outcome.stderr == ["--batch_size auto: up to 16 sequences at once"]
    prefills.clear()
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    small = run(requests[:3], *H2O, "--batch_size", "auto", output="small")
    assert small.texts == alone.texts[:3] and prefills == [(1, 0)] * 3
    assert small.stderr == ["--batch_size auto: up to 1 sequences at once"]


@pytest.mark.parametrize("batch_size", ["1", "2", "3"])
def test_choices_that_end_in_one_step(run, script, tokenizer, batch_size):
    """A request whose sequences end together was written once for each of them, or before the others were there."""
    script([*tokenizer.encode("the same"), tokenizer.eos_token_id])
    requests = make_requests(3, max_tokens=20, n=2, temperature=1, top_p=1e-6)
    outcome = run(requests, *H2O, "--batch_size", batch_size)
    assert [result["index"] for result in outcome.results] == [0, 1, 2]
    assert [len(result["result"]["choices"]) for result in outcome.results] == [2, 2, 2]


@both_caches
def test_requests_that_sample_do_not_touch_their_neighbours(run, flags):
    """One temperature for the whole batch: greedy requests would be sampled, or the other way round."""
    greedy = make_requests(6, max_tokens=10)
    mixed = [request | (SAMPLED if i % 2 else {}) for i, request in enumerate(greedy)]
    expected, got = run(greedy, *flags), run(mixed, *flags, "--overwrite", "--batch_size", "3")
    assert got.texts[::2] == expected.texts[::2]
    assert all(a != b for a, b in zip(got.texts[1::2], expected.texts[1::2], strict=True))


def test_tokenizer_without_padding_or_eos_token(run, checkpoint, tmp_path):
    """Tokenizers of Llama checkpoints have no padding token, some no EOS either: pad() raises."""
    assert AutoTokenizer.from_pretrained(checkpoint).pad_token is None
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    make_tokenizer(bare, unk_token="<s>")
    assert AutoTokenizer.from_pretrained(bare).eos_token is None
    requests = make_requests(4, max_tokens=6)
    assert run(requests, "--batch_size", "4", model=bare).texts == run(requests, "--overwrite").texts


# Flags

EVERY_FLAG = {
    "window_length": ("--num_window_length 20", 20),
    "num_heavy_hitters": ("--num_heavy_hitter_tokens 7", 7),
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
    "prefill_chunk": ("--prefill_chunk 11", 11),
    "capture": ("--no-capture", False),
    "compile": ("--compile", True),
}


def test_every_flag_reaches_the_cache(run, caches):
    """A flag that is parsed and then forgotten; a field of H2OConfig without a flag."""
    assert set(EVERY_FLAG) == {field.name for field in dataclasses.fields(H2OConfig)}
    together = {name: of_field for name, of_field in EVERY_FLAG.items() if name != "compile"}  # needs capture
    given = [word for flag, _ in together.values() for word in flag.split()]
    run(make_requests(1, max_tokens=6), "--enable_h2o_generation", *given)
    assert len(caches) == 2
    for cache in caches:
        assert cache.h2o == H2OConfig(**{name: value for name, (_, value) in together.items()})
        assert cache.layers[0].keys.shape[2] == 20 + 3
    assert all(getattr(H2OConfig(), name) != value for name, (_, value) in EVERY_FLAG.items()), "tells nothing"


def test_compile_reaches_the_cache():
    """As every flag; what it needs is not here, so nothing is run with it."""
    args = run_summarization.parse_args(["--enable_h2o_generation", "--compile"])
    assert run_summarization.h2o_config(args) == H2OConfig(compile=True)


def test_compile_without_its_kernels(refused, no_model):
    """A flag that is taken and does nothing, or is refused in the words of another file."""
    refused(make_requests(1), "--enable_h2o_generation", "--compile", words=["--compile: ", "--backend triton", "sdpa"])
    for flags in ("--no-capture", "--slimming mask", "--backend eager"):
        outcome = refused(
            make_requests(1),
            *["--enable_h2o_generation", "--compile", *flags.split()],
            words="--compile compiles captured steps of kernels: it needs --capture, --slimming H and --backend auto",
        )
        assert "=" not in outcome.stderr[0] and "'" not in outcome.stderr[0]


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
        run_summarization, "H2OConfig", dataclasses.make_dataclass("H2OConfig", fields, bases=(H2OConfig,), frozen=True)
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
        run_summarization, "H2OConfig", dataclasses.make_dataclass("H2OConfig", fields, bases=(H2OConfig,), frozen=True)
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


def test_dtype(run, monkeypatch):
    """--dtype that is parsed and not passed on."""
    loaded = []
    original = run_summarization.load_model

    def load_model(*args):
        loaded.append(original(*args)[0].dtype)
        return original(*args)

    monkeypatch.setattr(run_summarization, "load_model", load_model)
    for dtype in ("auto", "bfloat16"):
        run(make_requests(1, max_tokens=2), *H2O, "--dtype", dtype, output=dtype)
    assert loaded == [torch.float32, torch.bfloat16]


def test_sample_num_takes_the_first_requests(run):
    """The last ones, or one too many."""
    requests = make_requests(4, max_tokens=3)
    outcome = run(requests, "--sample_num", "2")
    assert [result["request"] for result in outcome.results] == requests[:2]
    assert len(run(requests, "--sample_num", "9", output="all").results) == 4


# Sampling


@both_caches
def test_sampling_follows_the_seed(run, flags):
    """Figures that nobody can reproduce; samples of a request that depend on which requests came before it."""
    requests = make_requests(4, max_tokens=12, **SAMPLED)
    first = run(requests, *flags)
    assert run(requests, *flags, output="again").texts == first.texts
    assert run(requests, *flags, "--sample_num", "2", output="two").texts == first.texts[:2]
    other = run(requests, *flags, "--seed", "7", output="other").texts
    assert all(a != b for a, b in zip(other, first.texts, strict=True))


def ways_to_ask(count: int) -> list[dict]:
    """Requests of every kind side by side: greedy, of several temperatures and choices, with a nucleus and without."""
    settings = [{"temperature": 0.9}, {}, SAMPLED | {"n": 2}, {"temperature": 1.3, "top_p": 0.6}, {"temperature": 0.7}]
    requests = make_requests(count)
    for i, request in enumerate(requests):
        request |= {"max_tokens": (30, 6, 17)[i % 3]} | settings[i % 5]
    return requests


@both_caches
def test_samples_depend_on_seed_request_and_choice_alone(run, flags):
    """Figures that change with the memory of the machine: other samples at another batch size, after an interruption,
    or because requests beside them have a top_p."""
    requests = ways_to_ask(8)
    alone = run(requests, *flags, output="alone")
    for batch_size in ("3", "auto"):
        together = run(requests, *flags, "--batch_size", batch_size, output=f"{batch_size}.jsonl")
        assert_same_results(together, alone)
    lines = together.path.read_bytes().splitlines(keepends=True)
    for kept in ([1, 2, 3, 5, 6, 7], [0, 4]):  # those that are left sample without a nucleus, or most of them with one
        together.path.write_bytes(b"".join(lines[i] for i in kept))
        assert_same_results(run(requests, *flags, "--batch_size", "2", output="auto.jsonl"), alone)
    first = run(requests, *flags, "--sample_num", "1", output="first")
    assert first.texts == alone.texts[:1], "whatever comes after it"


def test_duplicate_requests_are_separate_samples(run):
    """Results kept by prompt would lose one; one seed for all would draw the same sample twice."""
    outcome = run(make_requests(1, max_tokens=12, **SAMPLED) * 3)
    assert len(set(outcome.texts)) == 3


def test_temperature_and_top_p_are_each_requests_own(run):
    """Temperature or top_p that never reaches generate: either one near 0 is greedy, high ones are far from it."""
    request = make_requests(1, max_tokens=12)[0]
    settings = [{}, {"temperature": 0.001}, {"temperature": 1, "top_p": 1e-6}, {"temperature": 1000}, {"top_p": 0.5}]
    outcome = run([request | setting for setting in settings])
    assert outcome.texts[0] == outcome.texts[1] == outcome.texts[2] == outcome.texts[4] != outcome.texts[3]
    logprobs = [choice["logprobs"]["token_logprobs"] for choice in outcome.choices]
    assert sum(logprobs[3]) / len(logprobs[3]) < 2 * sum(logprobs[0]) / 12, "of each token: this one may draw an EOS"
    together = run([request | setting for setting in settings], "--batch_size", "5", output="together")
    assert together.texts == outcome.texts


def test_no_top_k_of_transformers_remains(run, checkpoint, tmp_path):
    """transformers samples among the 50 likeliest tokens by default, and checkpoints bring defaults of their own."""
    model = with_generation_config(
        checkpoint, tmp_path / "opinionated", do_sample=True, top_k=1, temperature=0.1, repetition_penalty=9.0
    )
    requests = make_requests(1, max_tokens=40) + make_requests(1, max_tokens=200, temperature=1000)
    outcome = run(requests, model=model)
    assert outcome.texts[0] == run(requests, output="plain").texts[0]
    assert len(set(tokens_of(outcome.choices[1]))) > 100


@both_caches
def test_n_choices(run, flags):
    """Choices mixed up between requests, or only the first one returned."""
    requests = make_requests(3, max_tokens=12, n=2, **SAMPLED)
    requests[1] |= {"max_tokens": 5}
    outcome = run(requests, *flags, "--batch_size", "2")
    for request, result in zip(requests, outcome.results, strict=True):
        one, other = result["result"]["choices"]
        assert one["text"] != other["text"]
        assert len(tokens_of(one)) == len(tokens_of(other)) == request["max_tokens"]
        assert result["tokens_generated"] == 2 * request["max_tokens"]
        single = run([request | {"n": 1}], *flags, output=f"one{result['index']}").results[0]
        assert result["cache"]["kv_bytes"] == 2 * single["cache"]["kv_bytes"]
        assert result["cache"]["tokens_seen"] == single["cache"]["tokens_seen"]


def test_greedy_choices_are_equal_and_decoded_once(run):
    """n that is ignored without a word at temperature 0, or costs n times as much."""
    requests = make_requests(2, max_tokens=6, n=3, temperature=0)
    outcome = run(requests, *H2O)
    for result in outcome.results:
        one, *others = result["result"]["choices"]
        assert others == [one, one] and result["tokens_generated"] == 6
    assert not outcome.stderr


def test_fields_that_do_nothing_are_warned_of_once(run):
    """A top_k in every request that changes nothing, and nothing says so."""
    asked = [make_requests(1, max_tokens=2)[0], *make_requests(2, max_tokens=2, top_k=5, echo=False)]
    assert run(asked).stderr == ["warning: fields that are not known are ignored: top_k (in 2 of 3 requests)"]


def test_logits_that_are_no_numbers(run, refused, monkeypatch):
    """A text of token 0, and log-probabilities that are NaN, which is no JSON; results before it are kept."""
    load_model, requests = run_summarization.load_model, make_requests(3, max_tokens=5)

    def broken(*args):
        model, tokenizer = load_model(*args)
        forward, calls = model.forward, []

        def overflows(*args, **kwargs):
            calls.append(1)
            outputs = forward(*args, **kwargs)
            if len(calls) > 7:  # the second request's third
                outputs.logits.fill_(torch.nan)
            return outputs

        model.forward = overflows
        return model, tokenizer

    monkeypatch.setattr(run_summarization, "load_model", broken)
    outcome = refused(requests, words=["request 1: the model's logits are NaN after 2 tokens in float32", "--dtype"])
    assert len(outcome.lines) == 1 and b"NaN" not in outcome.lines[0]
    monkeypatch.undo()
    assert len(run(requests).results) == 3


def test_article_that_begins_with_bos(run, checkpoint, tmp_path):
    """Two of them: Llama has never seen that. In a chat the template puts its own."""
    folder, requests = instruct_model(checkpoint, tmp_path / "instruct"), make_requests(2, max_tokens=4)
    begun = [request | {"article": "<s>" + request["article"]} for request in requests]
    for flags in ([], ["--chat"]):
        outcomes = [run(of, *flags, "--overwrite", model=folder) for of in (requests, begun)]
        plain, other = ([result["cache"]["tokens_seen"] for result in outcome.results] for outcome in outcomes)
        assert plain == other and outcomes[0].texts == outcomes[1].texts


def test_article_without_a_token(refused, monkeypatch):
    """A prompt of no column, which no model takes."""
    encode = AutoTokenizer.from_pretrained

    def drops_all(*args, **kwargs):
        tokenizer = encode(*args, **kwargs)
        tokenizer.backend_tokenizer.normalizer = Replace(Regex("."), "")
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", drops_all)
    refused([{"article": "aa", "summary_gt": "b"}], words="request 0: the tokenizer of")


def test_greedy_flag_overrides_what_requests_ask_for(run):
    """--greedy that leaves temperature, top_p or n in force."""
    plain = make_requests(3, max_tokens=10)
    sampled = [request | SAMPLED | {"n": 2} for request in plain]
    outcome = run(sampled, "--greedy", "--batch_size", "3")
    assert outcome.texts == run(plain, output="plain").texts and len(outcome.choices) == 3


# Crashes


@pytest.mark.parametrize("batch_size", ["1", "4"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_killed_run_goes_on_as_if_nothing_had_happened(run, checkpoint, tmp_path, sampled, batch_size):
    """kill -9 inside a line, in the middle of a batch: a request lost, twice or out of order, or other samples."""
    requests = make_requests(10, max_tokens=10, **(SAMPLED if sampled else {}))
    flags = [*H2O, "--batch_size", batch_size]
    uninterrupted = run(requests, *flags, output="uninterrupted.jsonl")
    argv = ["--input-path", tmp_path / "in.jsonl", "--output-path", tmp_path / "out.jsonl", "--model-name", checkpoint]

    def work(fork):
        stop_while_writing(6, fork.stop)
        return run_summarization.main([*map(str, argv), "--device", "cpu", *flags])

    fork = Fork(work, tmp_path)
    fork.await_mark()
    assert fork.kill() == -signal.SIGKILL
    left = (tmp_path / "out.jsonl").read_bytes()
    assert left.count(b"\n") == 6 and not left.endswith(b"\n")
    resumed = run(requests, *flags)
    assert [result["request"] for result in resumed.results] == requests
    assert_same_results(resumed, uninterrupted)
    assert "6 of 10 results are there already" in resumed.stderr
    kept = sorted((json.loads(line) for line in left.splitlines()[:-1]), key=lambda result: result["index"])
    again = {result["index"]: result for result in resumed.results}
    assert [again[result["index"]] for result in kept] == kept, "what was there was written anew"
    assert resumed.metrics["rouge"] == uninterrupted.metrics["rouge"]
    assert resumed.metrics["tokens_generated"] == uninterrupted.metrics["tokens_generated"] == 100


def test_program_killed_then_interrupted_then_finished(run, checkpoint, tmp_path):
    """The program itself, in the middle of a step: kill -9, Ctrl-C with exit code 130, and each time the same command
    resumes."""
    requests = make_requests(8, max_tokens=20)
    uninterrupted = run(requests, *H2O, output="uninterrupted.jsonl")
    output = tmp_path / "out.jsonl"
    argv = ["--input-path", tmp_path / "in.jsonl", "--output-path", output, "--model-name", checkpoint, *H2O]
    argv = [str(ROOT / "run_summarization.py"), *map(str, argv), "--device", "cpu"]

    def program(fork):
        decode = batching.Batcher._decode

        def stops(*args):
            if output.read_bytes().count(b"\n") == stop_after:
                fork.stop()
            return decode(*args)

        batching.Batcher._decode = stops
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")

    for stop_after, sent, status in ((2, signal.SIGKILL, -signal.SIGKILL), (5, signal.SIGINT, 130)):
        fork = Fork(program, tmp_path)
        fork.await_mark()
        fork.send(sent)
        assert fork.status == status and "Traceback" not in fork.stderr
        assert output.read_bytes().count(b"\n") == stop_after
    last = fork.stderr.strip().splitlines()[-1]
    assert "interrupted" in last and str(output) in last
    assert_same_results(run(requests, *H2O), uninterrupted)


def test_second_run_over_a_finished_one(run, request):
    """It prints the table again and touches nothing: its memory and batch size are not those of the figures."""
    requests = make_requests(3, max_tokens=5)
    first = run(requests, *H2O)
    request.getfixturevalue("no_model")
    before = first.files
    second = run(requests, *H2O, "--batch_size", "2")
    assert second.stdout == first.stdout and second.stderr == ["3 of 3 results are there already"]
    assert first.files == before


def test_run_killed_between_last_result_and_metrics(run, monkeypatch, request):
    """All results are there, metrics are not: they are made up for, in order, without a model."""
    requests = make_requests(5, max_tokens=5)

    def finish(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultsFile, "finish", finish)
        run(requests, "--batch_size", "5", code=130)
    request.getfixturevalue("no_model")
    outcome = run(requests, "--batch_size", "5")
    assert [result["index"] for result in outcome.results] == [0, 1, 2, 3, 4]
    assert outcome.metrics["requests"] == 5 and outcome.metrics["peak_memory_bytes"] > 0


# Chats

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def instruct_model(checkpoint, folder, template=TEMPLATE, eos="</s>") -> Path:
    """The checkpoint with a chat template, and a tokenizer that begins each text with <s> as Llama's do."""
    shutil.copytree(checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    tokenizer.save_pretrained(folder)
    return folder


@both_caches
def test_chat_wraps_requests_in_the_template(run, checkpoint, tmp_path, flags):
    """A template that is not used, a text that begins twice, or one that runs past the end of the assistant's turn."""
    requests = make_requests(3, max_tokens=12)
    model = instruct_model(checkpoint, tmp_path / "instruct")
    wrapped = [request | {"article": f"[user] {request['article']}\n[assistant] "} for request in requests]
    expected = run(wrapped, *flags, model=model, output="wrapped")
    chat = run(requests, *flags, "--chat", model=model)
    assert chat.texts == expected.texts != run(requests, *flags, model=model, output="plain").texts
    assert [r["cache"]["tokens_seen"] for r in chat.results] == [r["cache"]["tokens_seen"] for r in expected.results]

    said = chat.choices[0]["logprobs"]["tokens"]
    ends = instruct_model(checkpoint, tmp_path / "ends", eos=said[4])
    until = said[: said.index(said[4])]
    ended = run(requests, *flags, "--chat", model=ends, output="ended").choices[0]
    assert (ended["logprobs"]["tokens"], ended["finish_reason"]) == (until, "stop")
    unended = run(wrapped, *flags, model=ends, output="unended").choices[0]  # the checkpoint's settings do not list it
    assert unended["logprobs"]["tokens"] == said


def test_chat_without_a_template_that_works(refused, checkpoint, tmp_path):
    """Base models in the words of a chat, or a traceback out of a template."""
    refused(make_requests(1), "--chat", words=["--chat: the tokenizer of", "no chat template"])
    broken = instruct_model(checkpoint, tmp_path / "broken", "{{ raise_exception('only\nsystem') }}")
    refused(make_requests(1), "--chat", model=broken, words=["--chat: the chat template of", "only system"])
    silent = instruct_model(checkpoint, tmp_path / "silent", "{{ '' }}")
    refused(
        make_requests(1),
        "--chat",
        model=silent,
        output="silent.jsonl",
        words=["--chat: the chat template of", "no text"],
    )


# Checkpoints as they are published

PUBLISHED = {
    "Llama 1": {"rope_theta": 10000.0, "num_key_value_heads": None},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "Llama 3.1": {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "longrope": {"rope_scaling": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
                 "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}},
}  # fmt: skip


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_published_checkpoints(run, tmp_path, published):
    """A rope_scaling of the checkpoint's config.json that only one of the two caches follows, or neither; or the second
    of the end-of-sequence tokens that config.json alone lists."""
    model, heads = tmp_path / "model", 4 if "num_key_value_heads" in published else 2
    make_checkpoint(model, num_key_value_heads=heads, max_position_embeddings=32)
    path, requests = model / "config.json", make_requests(2, max_tokens=8)
    config = json.loads(path.read_text())
    (model / "generation_config.json").unlink()
    unscaled = run(requests, model=model, output="unscaled.jsonl").texts
    config.pop("rope_parameters")
    config = {name: value for name, value in (config | published).items() if value is not None}
    path.write_text(json.dumps(config))
    full = run(requests, model=model, output="full.jsonl")
    assert (full.texts == unscaled) == ("rope_scaling" not in published)
    wide = [*H2O, "--num_window_length", "256"]
    assert run(requests, *wide, model=model, output="wide.jsonl").texts == full.texts

    said = tokens_of(full.choices[0])
    vocab = AutoTokenizer.from_pretrained(model).get_vocab()
    path.write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], vocab[said[3]]]}))
    ended = run(requests, *wide, model=model, output="ended.jsonl").choices[0]
    assert (tokens_of(ended), ended["finish_reason"]) == (said[: said.index(said[3])], "stop")


CHANGES = {
    "--num_window_length": [*H2O, "--num_window_length", "32"],
    "--num_heavy_hitter_tokens": [*H2O, "--num_heavy_hitter_tokens", "2"],
    "--enable_position_rolling": [*H2O, "--enable_position_rolling"],
    "--score_decay": [*H2O, "--score_decay", "0.5"],
    "--enable_h2o_generation": [],
    "--sample_num": [*H2O, "--sample_num", "2"],
    "--seed": [*H2O, "--seed", "1"],
    "--greedy": [*H2O, "--greedy"],
    "--chat": [*H2O, "--chat"],
    "--dtype": [*H2O, "--dtype", "bfloat16"],
}


def test_resuming_with_other_settings_is_refused_by_flag(run, refused, checkpoint, tmp_path, request):
    """Results of two settings under one ROUGE. Settings, model, and requests that changed in the file."""
    requests = make_requests(3, max_tokens=4)
    first = run(requests, *H2O)
    request.getfixturevalue("no_model")
    before = first.files
    for flag, flags in CHANGES.items():
        refused(requests, *flags, words=[f"error: {flag} is ", "--overwrite"])
    other = shutil.copytree(checkpoint, tmp_path / "other")
    refused(requests, *H2O, model=other, words=["--model-name is ", "other"])
    refused([requests[0] | {"max_tokens": 5}, *requests[1:]], *H2O, words="--input-path is ")
    refused(requests[::-1], *H2O, words="--input-path is ")
    assert first.files == before


def test_replaced_checkpoint_is_refused_on_resuming(run, refused, checkpoint, tmp_path):
    """One file of results from two models that stood at the same place, one after the other."""
    model, requests = shutil.copytree(checkpoint, tmp_path / "model"), make_requests(2, max_tokens=3)
    first = run(requests, *H2O, model=model)
    before = first.files
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 64
    (model / "model.safetensors").write_bytes(weights)
    refused(requests, *H2O, model=model, words=["what --model-name holds is ", "--overwrite"])
    assert first.files == before


def test_replaced_chat_template_is_refused_on_resuming(run, refused, checkpoint, tmp_path):
    """Prompts of two templates in one file of results: transformers keeps a template in a file of its own."""
    model, requests = instruct_model(checkpoint, tmp_path / "model"), make_requests(2, max_tokens=3)
    before = run(requests, *H2O, "--chat", model=model).files
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("user", "human").replace("[", "<"))
    outcome = refused(requests, *H2O, "--chat", model=model, words=["what --model-name holds is ", "--overwrite"])
    assert outcome.files == before


def test_edited_default_is_refused_on_resuming(run, refused, monkeypatch):
    """An edit of llama.py in the middle of a run is a change of settings as well."""
    requests = make_requests(2, max_tokens=3)
    run(requests, "--enable_h2o_generation")
    fields = [("update_interval", int, dataclasses.field(default=2))]
    monkeypatch.setattr(
        run_summarization, "H2OConfig", dataclasses.make_dataclass("H2OConfig", fields, bases=(H2OConfig,), frozen=True)
    )
    refused(requests, "--enable_h2o_generation", words="--update_interval is 2, but 16")


def test_batch_size_may_change_on_resuming(run):
    """Whoever ran out of memory lowers it; that must not cost the results that are there."""
    requests = make_requests(4, max_tokens=5)
    first = run(requests, *H2O, "--batch_size", "4")
    first.path.write_bytes(b"".join(first.path.read_bytes().splitlines(keepends=True)[:2]))
    assert_same_results(run(requests, *H2O, "--batch_size", "2"), first)


def test_overwrite_starts_anew(run):
    """--overwrite that keeps old results, or their settings."""
    run(make_requests(3, max_tokens=4), *H2O)
    outcome = run(make_requests(2, max_tokens=4), "--overwrite")
    assert len(outcome.results) == 2 and outcome.metrics["settings"]["--enable_h2o_generation"] is False


def test_concurrent_run_on_the_same_output_is_refused(run, refused, no_model, tmp_path):
    """Two terminals with the same command: lines of both in one file."""
    other = ResultsFile(tmp_path / "out.jsonl", {})
    for flags in ([], ["--overwrite"]):
        refused(make_requests(1), *flags, words=["--output-path", "another run"])
    other._file.close()


def test_disk_that_fills_up(run):
    """A failing write in the middle is one line; with space again, the same command goes on."""
    requests = make_requests(6, max_tokens=6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3500, hard))  # a full disk, for this process
    try:
        full = run(requests, *H2O, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = full.stderr
    assert line.startswith("error: --output-path") and "cannot be written" in line and "kept" in line
    assert 0 < full.path.read_bytes().count(b"\n") < 6
    assert_same_results(run(requests, *H2O), run(requests, *H2O, output="roomy"))


# Out of memory


@pytest.fixture
def memory(monkeypatch):
    """memory(fits, error) lets a prefill run out of memory where not fits(prompts); returns how many were tried."""

    def memory(fits, error):
        tried, prefill = [], batching.Batcher._prefill

        def limited(self, group, rows):
            tried.append(len(group))
            if not fits([sequence.prompt for sequence in group]):
                raise error
            prefill(self, group, rows)

        monkeypatch.setattr(batching.Batcher, "_prefill", limited)
        return tried

    return memory


ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [ON_GPU, ON_CPU], ids=["gpu", "cpu"])
@both_caches
def test_out_of_memory_halves_the_batch_and_goes_on(run, memory, error, flags):
    """A night's run that dies of one batch; halves that lose, repeat or reorder requests; a limit that is forgotten."""
    requests = make_requests(9, max_tokens=6)
    expected = run(requests, *flags, output="alone")
    tried = memory(lambda prompts: len(prompts) <= 2, error)
    outcome = run(requests, *flags, "--batch_size", "8")
    assert_same_results(outcome, expected)
    assert tried == [8, 4, 2, 2, 2, 2, 1], "each size fails once"
    assert [line for line in outcome.stderr if "out of memory" in line] == [
        "out of memory with 8 sequences: going on with 4",
        "out of memory with 4 sequences: going on with 2",
    ]
    assert outcome.metrics["requests"] == 9


def fails(original, tried: list, at: int):
    """As `original`, but the `at`-th call runs out of memory."""

    def failing(*args, **kwargs):
        tried.append(None)
        if len(tried) == at:
            raise ON_GPU
        return original(*args, **kwargs)

    return failing


UNDISTURBED = {}


def undisturbed(run, *flags) -> Outcome:
    """What eight ways to ask give where nothing fails: run once for all tests."""
    if flags not in UNDISTURBED:
        UNDISTURBED[flags] = run(ways_to_ask(8), *flags, output="expected")
    return UNDISTURBED[flags]


@pytest.mark.parametrize(
    ("owner", "name", "at", "flags"),
    [
        (batching.RowSampler, "__init__", 1, H2O),
        (H2OLlamaForCausalLM, "merge_projections", 1, H2O),
        (HHCache, "with_rows", 1, H2O),
        (HHCache, "take_rows", 3, H2O),
        (decoder.Decoder, "decode", 1, H2O),
        (decoder.Decoder, "decode", 4, H2O),
        (batching.Batcher, "_prefill", 3, H2O),
        (decoding.FullDecoding, "decode", 1, []),
        (decoding.FullDecoding, "decode", 15, []),
    ],
)
def test_out_of_memory_anywhere(run, monkeypatch, owner, name, at, flags):
    """Results, or choices that have ended, that are lost, written twice or sampled otherwise after memory ran out
    while a batch was set up, before its first result, among steps, or when others joined."""
    requests = ways_to_ask(8)
    expected = undisturbed(run, *flags)
    monkeypatch.setattr(owner, name, fails(getattr(owner, name), tried := [], at))
    appended, append = [], ResultsFile.append
    monkeypatch.setattr(ResultsFile, "append", lambda file, result: appended.append(len(tried)) or append(file, result))
    outcome = run(requests, *flags, "--batch_size", "4")
    assert len(tried) > at and len(appended) == 8
    if at > 1:
        assert appended[0] < at < appended[-1], "results before it and after it"
    assert [line for line in outcome.stderr if "out of memory" in line] == [
        "out of memory with 4 sequences: going on with 2"
    ]
    assert_same_results(outcome, expected)


@pytest.mark.parametrize("name", ["_prefill", "_decode"])
def test_interrupted_at_any_moment(run, monkeypatch, name):
    """Ctrl-C in a prefill or a step, taken for an error of the model or of memory, or that loses what had ended."""
    requests = ways_to_ask(8)
    expected = undisturbed(run, *H2O)
    original, calls = getattr(batching.Batcher, name), []

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(batching.Batcher, name, interrupted)
        outcome = run(requests, *H2O, "--batch_size", "3", code=130)
    assert "run the same command again" in outcome.stderr[-1] and 0 < len(outcome.results) < 8
    assert_same_results(run(requests, *H2O, "--batch_size", "3"), expected)


@both_caches
def test_one_request_too_large_keeps_all_results_before_it(run, memory, tokenizer, monkeypatch, flags):
    """A traceback, or a batch's results that are lost with the request of it that does not fit."""
    requests = make_requests(6, max_tokens=6, n=2, temperature=1)
    lengths = [len(tokenizer(request["article"])["input_ids"]) for request in requests]
    order = sorted(range(6), key=lambda i: -lengths[i])
    third = lengths[order[2]]
    memory(lambda prompts: len(prompts) == 1 and len(prompts[0]) != third, ON_GPU)
    outcome = run(requests, *flags, "--batch_size", "6", code=2)
    assert [line.split(":")[0] for line in outcome.stderr] == [
        "out of memory with 6 sequences",
        "out of memory with 3 sequences",
        "out of memory with 2 sequences",
        "error",
    ]
    assert f"request {order[2]} ({third} tokens)" in outcome.stderr[-1]
    assert [result["index"] for result in outcome.results] == order[:2]
    monkeypatch.undo()
    assert len(run(requests, *flags, "--batch_size", "6").results) == 6


def test_first_request_too_large(run, memory, monkeypatch):
    """No result at all: the file must stay one that the same command goes on with."""
    requests = make_requests(2, max_tokens=3)
    memory(lambda prompts: False, ON_CPU)
    outcome = run(requests, *H2O, code=2)
    (line,) = outcome.stderr
    assert "request 0 (" in line and "does not fit" in line and outcome.results == []
    monkeypatch.undo()
    assert len(run(requests, *H2O).results) == 2


def test_other_errors_are_not_taken_for_memory(run, memory):
    """Halving after any RuntimeError would hide a bug behind an hour of retries."""
    memory(lambda prompts: False, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(make_requests(2, max_tokens=2), *H2O, "--batch_size", "2")


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
    refused(path, *flags, words="holds no requests")
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


def test_overwrite_with_a_wrong_model_keeps_the_results(run, refused):
    """Nothing is lost by bad input, not even with --overwrite."""
    requests = make_requests(2, max_tokens=3)
    first = run(requests)
    before = first.files
    refused(requests, "--overwrite", model="nobody/misspelt", words="--model-name")
    assert first.files == before


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
    "--backend flash_attn": "set --no-score_every_step, which leaves them to the steps that slim",
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
    "--window_length 64": "unrecognized argument --window_length; did you mean --num_window_length?",
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


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_cuda_asked_for_and_absent(refused, no_model, monkeypatch, device):
    """A traceback out of CUDA's initialisation, after the model was read."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(make_requests(1), "--device", device, words=[f"--device {device}", "--device cpu"])


@pytest.mark.parametrize("flag", [flag for flag, _ in EVERY_FLAG.values()] + ["--score_queries all"])
def test_cache_flag_without_h2o_generation(refused, no_model, flag):
    """A baseline in the belief that it was H2O: the flags would do nothing."""
    refused(make_requests(1), *flag.split(), words=[flag.split()[0].replace("no-", ""), "--enable_h2o_generation"])


def broken(folder: Path, how: str) -> Path:
    """Damages a copy of the checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "gpt2":
        GPT2Config().save_pretrained(folder)
    elif how == "mistral":
        MistralConfig().save_pretrained(folder)
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "no weights":
        weights.unlink()
    elif how == "weights of a smaller model":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif how == "weights of another shape":
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    elif how == "weights of a larger model":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    elif how == "NaN":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how.startswith("adapter"):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nobody/none"}')
        if how == "adapter alone":
            weights.unlink()
            (folder / "config.json").unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif how == "truncated tokenizer":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])
    elif how == "config is not JSON":
        (folder / "config.json").write_text("{")
    elif how == "config is a list":
        (folder / "config.json").write_text("[]")
    elif how == "config with a wrong type":
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "32"}))
    elif how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "no folder":
        shutil.rmtree(folder)
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    {
        "gpt2": "a gpt2 checkpoint; H2Optimizer runs Llama only",
        "mistral": "a mistral checkpoint",
        "truncated weights": "cannot be loaded",
        "empty weights": "cannot be loaded",
        "no weights": "model.safetensors",
        "weights of a smaller model": "9 weights are missing or have the wrong shape",
        "weights of another shape": "6 weights are missing or have the wrong shape, first model.layers.0.mlp.down",
        "weights of a larger model": "9 weights have no place in the model that config.json describes, first",
        "NaN": "1 weight holds NaN or infinity in float32, first model.layers.1.mlp.up_proj.weight",
        "adapter beside": "holds an adapter (adapter_config.json)",
        "adapter alone": "holds an adapter (adapter_config.json)",
        "no tokenizer": "tokenizer",
        "truncated tokenizer": "cannot be loaded",
        "config is not JSON": "config.json",
        "config is a list": "cannot be loaded",
        "config with a wrong type": "hidden_size",
        "empty folder": "cannot be loaded",
        "no folder": "cannot be loaded",
    }.items(),
)
@both_caches
def test_checkpoint_that_cannot_be_used(refused, checkpoint, tmp_path, how, words, flags):
    """A traceback from one of four libraries; or weights that transformers fills at random without a word."""
    folder = broken(shutil.copytree(checkpoint, tmp_path / "broken"), how)
    refused(make_requests(1), *flags, model=folder, words=[f"--model-name {folder}", words])


def test_tied_weights_are_not_missing(run, tmp_path):
    """Small Llamas tie lm_head to the embedding and do not store it."""
    model = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    assert len(run(make_requests(1, max_tokens=2), *H2O, model=model).texts) == 1


def test_tokenizer_of_another_model(refused, checkpoint, tmp_path):
    """An index error from the embedding, on a GPU a device-side assert that names nothing."""
    small = make_checkpoint(tmp_path / "small", vocab_size=300)
    refused(make_requests(1), model=small, words=["--model-name", "300 tokens", "do not belong together"])


def test_model_name_that_is_nowhere(refused):
    """Offline, a name that is neither a folder nor in the cache; and what a stray slash or space makes of one."""
    for name in ("nobody/no-such-model", "nosuchmodel", "a b", ""):
        refused(make_requests(1), model=name, words=f"--model-name {name}: cannot be loaded")


def test_model_name_with_the_hub_out_of_reach(refused, monkeypatch):
    """huggingface_hub tries six times over 23 s and logs twelve lines; one is enough."""
    logged, waits = [], []
    handler = logging.Handler()
    handler.emit = logged.append
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", waits.append)
    logging.getLogger("huggingface_hub").addHandler(handler)
    with socket.socket() as deaf:  # holds a port, and does not listen there
        deaf.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        try:
            refused(make_requests(1), model="nobody/no-such-model", words="nobody/no-such-model: cannot be loaded")
        finally:
            logging.getLogger("huggingface_hub").removeHandler(handler)
    assert len(waits) > 1, "nobody tried"
    assert not logged


@pytest.mark.parametrize(
    ("flags", "needs"), [(H2O, "prompts with their summaries"), ([*H2O, "--enable_position_rolling"], "prompts are")]
)
def test_prompts_longer_than_the_models_positions(run, tokenizer, flags, needs):
    """Said once, with the count, and the run goes on; rolling keeps decoding, not the prompt, within them."""
    requests = make_requests(2, max_tokens=5)
    long = make_requests(1, max_tokens=5)[0]
    long["article"] *= 8
    length = len(tokenizer(long["article"])["input_ids"])
    assert length > POSITIONS
    outcome = run([long, requests[0], long, requests[1]], *flags, "--batch_size", "2")
    (line,) = outcome.stderr
    rolling = "--enable_position_rolling" in flags
    assert line.startswith("warning: 2 of 4 prompts") and needs in line
    assert f"{POSITIONS} positions" in line and f"needs {length + (0 if rolling else 5)})" in line
    assert len(outcome.results) == 4


def test_summary_that_outgrows_the_models_positions(run, tokenizer):
    """The prompt fits and the summary does not; with rolling it never needs more."""
    request = make_requests(1, max_tokens=POSITIONS)
    assert len(run(request, *H2O, "--sample_num", "1").stderr) == 1
    assert run(request, *H2O, "--enable_position_rolling", output="rolling").stderr == []


def test_chunks_keep_a_long_prompt_within_the_models_positions(run, tokenizer):
    """A warning of what rolling chunks avoid, or none where even window and chunk are too long."""
    (request,) = make_requests(1, max_tokens=POSITIONS)
    request["article"] *= 8
    flags = [*H2O, "--enable_position_rolling", "--prefill_chunk"]
    chunked = run([request], *flags, "40", output="chunked")
    assert chunked.stderr == []
    assert chunked.results[0]["cache"]["slimmings"] > len(tokenizer(request["article"])["input_ids"]) // 40
    (line,) = run([request], *flags, str(POSITIONS), output="wide").stderr
    assert f"needs {POSITIONS + 24}" in line and "--prefill_chunk" in line


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


def test_more_requests_in_a_batch_than_there_are(run):
    """range() and padding with a batch that is never full."""
    assert len(run(make_requests(2, max_tokens=2), *H2O, "--batch_size", "1000000").results) == 2


def test_window_far_beyond_memory(run):
    """ "No limit" as a window: its slots are allocated at once, and the CPU's error is no OutOfMemoryError."""
    outcome = run(make_requests(1), "--enable_h2o_generation", "--num_window_length", "2000000000", code=2)
    (line,) = outcome.stderr
    assert "does not fit into memory" in line and "smaller window" in line
