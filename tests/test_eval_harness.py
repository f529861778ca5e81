"""scripts/eval_harness.py on local tasks and a tiny checkpoint: scores against plain loops, HFLM, and bad input."""

import json
import runpy
import sys
from types import ModuleType

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from checkpoints import POSITIONS, made_up_text, make_checkpoint
from h2optimizer import likelihood, sharing
from h2optimizer.utils.cache import HHCache
from h2optimizer.utils.requests import InputError
from test_benchmarks import SCRIPTS, load

lm_eval = pytest.importorskip("lm_eval")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM  # which needs accelerate
Instance = pytest.importorskip("lm_eval.api.instance").Instance

NARROW = dict(window_length=24, num_heavy_hitters=10, update_interval=4)
FLAGS = ["--enable_h2o_generation", "--num_window_length=24", "--num_heavy_hitter_tokens=10", "--update_interval=4"]
WIDE = dict(window_length=2 * POSITIONS)
TASK = """task: tiny_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
target_delimiter: ""
metric_list: [{{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def harness():
    return load("eval_harness")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks over the same documents, none of which the hub has to do with."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {
            "text": made_up_text(1 + i, seed=i),
            "choices": [" " + made_up_text(1, seed=50 + 3 * i + c) for c in range(3)],
        }
        for i in range(4)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    kinds = {
        "choice": ("multiple_choice", "acc", "mean", 'doc_to_target: 1\ndoc_to_choice: "{{choices}}"'),
        "letter": ("multiple_choice", "acc", "mean", 'doc_to_target: 1\ndoc_to_choice: ["!", "?"]'),
        "text": (
            "generate_until", "exact_match", "mean",
            'doc_to_target: "{{text}}"\ngeneration_kwargs: {until: ["zz"], max_gen_toks: 12, do_sample: false}',
        ),
        "rolling": ("loglikelihood_rolling", "byte_perplexity", "weighted_perplexity", 'doc_to_target: "{{text}}"'),
        "broken": ("generate_until", "exact_match", "mean", 'doc_to_target: "{{no_such_column}}"'),
    }  # fmt: skip
    for name, (kind, metric, aggregation, rest) in kinds.items():
        form = dict(name=name, folder=folder, kind=kind, metric=metric, aggregation=aggregation)
        (folder / f"{name}.yaml").write_text(TASK.format(**form) + rest + "\n")
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch, harness):
    """No network; no index of lm_eval's own tasks nor report on the machine, which take seconds; no log level left."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    manager = harness.TaskManager
    monkeypatch.setattr(harness, "TaskManager", lambda **given: manager(**given | {"include_defaults": False}))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    levels = transformers.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    huggingface_hub.logging.set_verbosity(levels[1])


@pytest.fixture
def make_lm(harness, checkpoint):
    return lambda **settings: harness.H2OLlamaLM(str(checkpoint), device="cpu", **settings)


@pytest.fixture
def evaluate(harness, checkpoint, tasks, tmp_path, capsys):
    """evaluate(names, *flags) calls main in this process; returns the results, stdout and stderr."""

    def evaluate(names, *flags, output="out.json", code=0):
        argv = ["--model-name", checkpoint, "--tasks", names, "--include_path", tasks, "--device", "cpu"]
        got = harness.main([*map(str, [*argv, "--output-path", tmp_path / output]), *flags])
        captured = capsys.readouterr()
        assert got == code, captured.err
        return json.loads((tmp_path / output).read_text()) if not code else None, captured.out, captured.err

    return evaluate


def requests(kind: str, *arguments: tuple, task: str | None = "task") -> list[Instance]:
    return [Instance(kind, {}, args, i, metadata=(task, i, 1)) for i, args in enumerate(arguments)]


def texts(*sentences: int) -> list[str]:
    return [made_up_text(n, seed=10 + i) for i, n in enumerate(sentences)]


def pairs(lm) -> list[tuple[str, str]]:
    """Contexts shared, empty, ending in a space, longer than the positions; continuations of one token and of many."""
    short, middle, long = texts(1, 4, 14)
    assert len(lm.tok_encode(long)) > POSITIONS
    most_probable = lm.model.generate(torch.tensor([lm.tok_encode(middle)]), max_new_tokens=3, do_sample=False)
    said = lm.tok_decode(most_probable[0, len(lm.tok_encode(middle)) :])
    ends = [" " + " ".join(made_up_text(3, seed=20 + n).split()[:n]) for n in (3, 5, 12)]
    shared = [(context, end) for context in (short, middle) for end in ends]
    return [*shared, ("", ends[0]), (middle + " ", ends[1][1:]), (long, ends[1]), (middle, "!"), (middle, said)]


def in_loop(lm, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A continuation's log-probability and greediness by one call of the model after another."""
    cache, total, greedy = HHCache(lm.model.h2o), 0.0, True
    fed = context
    for token in continuation:
        with torch.no_grad():
            logits = lm.model(torch.tensor([fed]), past_key_values=cache).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        greedy &= logits.argmax().item() == token
        fed = [token]
    return total, greedy


def after_eviction(context: int, continuation: int, chunk: int | None) -> int:
    """How many of a continuation's tokens come after NARROW has dropped slots, by counting them."""
    chunk, kept, evicted, after = chunk or context, 0, False, 0
    for begin in range(0, context, chunk):
        before, kept = evicted, kept + min(chunk, context - begin)
        evicted, kept = evicted or kept > 24, min(kept, 24)
    after += before
    for step in range(1, continuation):
        after += evicted
        kept += 1
        if step % 4 == 0:
            evicted, kept = evicted or kept > 24, min(kept, 24)
    return after


def assert_scores(actual, expected) -> None:
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert [logprob for logprob, _ in actual] == pytest.approx([logprob for logprob, _ in expected], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("batch_size, settings", [(3, WIDE), ("auto", dict(full_cache=True))])
def test_wide_window_scores_as_hflm(make_lm, checkpoint, batch_size, settings):
    """A token too many or too few, a row's padding, or a context cut otherwise, where nothing is evicted."""
    lm, hflm = make_lm(batch_size=batch_size, **settings), HFLM(str(checkpoint), device="cpu", dtype="float32")
    asked = requests("loglikelihood", *pairs(lm))
    expected = hflm.loglikelihood(asked, disable_tqdm=True)
    assert_scores(lm.loglikelihood(asked, disable_tqdm=True), expected)
    assert expected[-1][1] and not all(greedy for _, greedy in expected)
    assert lm.evictions["task"]["contexts_cut"] == 1
    assert not lm.evictions["task"]["tokens_after_eviction"]

    asked = requests("loglikelihood_rolling", *((text,) for text in (*texts(1, 5, 20), "")))
    expected = hflm.loglikelihood_rolling(asked, disable_tqdm=True)
    assert lm.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] == 0


@pytest.mark.parametrize("batch_size, rolling, chunk", [(1, False, None), (4, True, None), (4, False, 8)])
def test_narrow_window_scores_as_a_loop(make_lm, batch_size, rolling, chunk):
    """Scores that ignore eviction, as those of one forward over context and continuation do; first tokens that are
    said to be the full cache's where chunks of the context had been evicted, or not to be."""
    lm = make_lm(**NARROW, position_rolling=rolling, batch_size=batch_size, prefill_chunk=chunk)
    asked = [pair for pair in pairs(lm) if pair[0]]
    tokens = [lm._encode_pair(*pair) for pair in asked]
    room = [POSITIONS if rolling else POSITIONS + 1 - len(continuation) for _, continuation in tokens]
    expected = [in_loop(lm, context[-n:], rest) for n, (context, rest) in zip(room, tokens, strict=True)]
    scores = lm.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    assert_scores(scores, expected)

    full = make_lm(full_cache=True).loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    differ = [abs(a - b) > 0.01 for (a, _), (b, _) in zip(scores, full, strict=True)]
    single = [len(continuation) == 1 for _, continuation in tokens]
    assert any(differ) and any(single)
    assert any(d and s for d, s in zip(differ, single, strict=True)) == (chunk is not None)
    after = sum(after_eviction(len(c[-n:]), len(rest), chunk) for n, (c, rest) in zip(room, tokens, strict=True))
    assert lm.evictions["task"]["tokens_after_eviction"] == after > 0


@pytest.mark.parametrize("rolling", [False, True])
def test_documents_stream_through_the_window(make_lm, rolling):
    """Documents scored in one forward, cut, or, with rolled positions, split where they need not be."""
    lm = make_lm(**NARROW, position_rolling=rolling, batch_size=2)
    documents = texts(2, 17)
    scores = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in documents)), True)
    expected = []
    for tokens in map(lm.tok_encode, documents):
        first = tokens if rolling else tokens[:POSITIONS]
        total = in_loop(lm, [lm.prefix_token_id], first)[0]
        if rest := tokens[len(first) :]:
            assert len(rest) < POSITIONS
            total += in_loop(lm, tokens[len(tokens) - POSITIONS - 1 : len(first)], rest)[0]
        expected.append(total)
    assert scores == pytest.approx(expected, rel=1e-5)
    counts = lm.evictions["task"]
    assert counts["tokens"] == sum(len(lm.tok_encode(text)) for text in documents)
    assert counts["documents_split"] == (not rolling)


def test_shared_contexts_are_prefilled_once(make_lm):
    """A question computed anew for each of its choices, also where the batch size is 1."""
    lm, prefilled = make_lm(**NARROW), []

    def note(model, args, kwargs):
        if args[0].shape[1] > 1:
            prefilled.append(tuple(args[0].shape))

    lm.model.register_forward_pre_hook(note, with_kwargs=True)
    short, long = texts(2, 5)
    ends = [" " + made_up_text(1, seed=i) for i in range(4)]
    lm.loglikelihood(requests("loglikelihood", *((text, end) for end in ends for text in (short, long))), True)
    assert prefilled == [(1, len(lm.tok_encode(long))), (1, len(lm.tok_encode(short)))]


@pytest.mark.parametrize("batch_size, settings", [(3, NARROW), (1, dict(full_cache=True))], ids=["h2o", "full"])
def test_what_contexts_share_is_computed_once(make_lm, monkeypatch, settings, batch_size):
    """Shots that change a score or a text when they are shared, or are computed again for each batch."""
    monkeypatch.setattr(sharing, "LEAST_SAVED", 1)
    shots = made_up_text(3, seed=1)
    ends = [" " + made_up_text(1, seed=60 + i) for i in range(3)]
    contexts = [shots + " " + text for text in texts(1, 2, 3)]
    scored = requests("loglikelihood", *((context, end) for context in contexts for end in ends))
    asked = {"until": ["zz"], "max_gen_toks": 12, "do_sample": False}
    made = requests("generate_until", *((context, asked) for context in contexts))
    found, fed = [], []
    for share in (False, True):
        lm, columns = make_lm(**settings, batch_size=batch_size, share_prefixes=share), []
        lm.model.model.register_forward_pre_hook(
            lambda module, args, kwargs, columns=columns: columns.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        scores = lm.loglikelihood(scored, disable_tqdm=True)
        said = lm.generate_until(made, disable_tqdm=True)
        counts = lm.evictions["task"]
        found.append((scores, said))
        fed.append(sum(columns))
        assert (counts["prompt_tokens_shared"] > 0) >= share
    assert_scores(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]
    shared = len(lm.tok_encode(shots))
    assert fed[1] <= fed[0] - 2 * shared, "at least once for the scores, and once for the texts"


def test_sharing_can_be_turned_off(evaluate, harness, monkeypatch):
    """A flag that is read and forgotten."""
    begin, given = harness.CacheLM.__init__, []

    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        given.append(self.snapshots > 0)

    monkeypatch.setattr(harness.CacheLM, "__init__", init)
    shared, *_ = evaluate("tiny_choice", *FLAGS, output="shared.json")
    apart, *_ = evaluate("tiny_choice", *FLAGS, "--no-share_prefixes", output="apart.json")
    assert given == [True, False]
    assert apart["results"] == shared["results"]


def test_contexts_that_are_cut_share_nothing(make_lm, monkeypatch):
    """The beginning of a context that is no longer there, because it is longer than the positions."""
    monkeypatch.setattr(sharing, "LEAST_SAVED", 1)
    contexts = [made_up_text(n, seed=1) + " " + made_up_text(1, seed=2) for n in (4, 30)]
    asked = {"until": ["zz"], "max_gen_toks": 12, "do_sample": False}
    made = requests("generate_until", *((context, asked) for context in contexts))
    for settings in (NARROW, dict(full_cache=True)):
        alone, lm = (make_lm(**settings, batch_size=2, share_prefixes=share) for share in (False, True))
        assert lm.generate_until(made, True) == alone.generate_until(made, True)
        assert lm.evictions["task"]["contexts_cut"] == 1 and not lm.evictions["task"]["prompt_tokens_shared"]


def test_out_of_memory_halves_a_batch(make_lm, monkeypatch):
    """An evaluation that ends, or mixes up its answers, because one batch did not fit."""
    lm, score = make_lm(**NARROW, batch_size=8), likelihood.log_likelihoods
    asked = requests("loglikelihood", *pairs(lm)[:7])
    expected = lm.loglikelihood(asked, disable_tqdm=True)

    def score_two(model, pairs, *args):
        if len(pairs) > 2:
            raise torch.OutOfMemoryError
        return score(model, pairs, *args)

    monkeypatch.setattr(likelihood, "log_likelihoods", score_two)
    assert_scores(lm.loglikelihood(asked, disable_tqdm=True), expected)


def test_generation_is_each_request_alone(make_lm):
    """Padding that changes a text, stop strings or lengths that are ignored, a cache that never evicts."""
    lm, full = make_lm(**NARROW, batch_size=3), make_lm(full_cache=True, batch_size=3)
    contexts, n = texts(1, 2, 5, 9), 24
    alone, evicted = [], 0
    for context in contexts:
        tokens = torch.tensor([lm.tok_encode(context)])
        cache = HHCache(lm.model.h2o)
        output = lm.model.generate(tokens, max_new_tokens=n, do_sample=False, past_key_values=cache)
        alone.append(lm.tok_decode(output[0, tokens.shape[1] :]))
        evicted += cache.evictions[0] > 0
    stop = alone[2][5:8]
    settings = {"until": [stop], "max_gen_toks": n, "do_sample": False}
    asked = requests("generate_until", *((context, settings) for context in contexts))
    got = lm.generate_until(asked, disable_tqdm=True)
    assert got == [text.split(stop)[0] for text in alone] and len(got[2]) <= 5
    assert got != full.generate_until(asked, disable_tqdm=True)
    counts, tokens = lm.evictions["task"], sum(len(lm.tok_encode(context)) for context in contexts)
    assert (counts["texts"], counts["texts_after_eviction"]) == (4, evicted) and evicted > 0
    assert counts["prompt_tokens_computed"] == full.evictions["task"]["prompt_tokens_computed"] == tokens
    assert not full.evictions["task"]["texts"] and not counts["prompt_tokens_shared"]


def test_stop_strings_that_name_special_tokens(make_lm, monkeypatch):
    """Texts that run past them in a batch, as special tokens are removed before HFLM looks."""
    lm = make_lm(**NARROW, batch_size=2)
    said = lm.tok_encode("ab<s>cd<s>ef", add_special_tokens=False)

    def generate(inputs, **kwargs):
        return torch.cat([inputs, torch.tensor([said] * len(inputs))], dim=1)

    monkeypatch.setattr(lm.model, "generate", lambda input_ids, **kwargs: generate(input_ids))
    for until, text in ((["<s>"], "ab"), (["d<s>e"], "abc"), (["bc"], "a"), (["zz"], "abcdef"), (["e", "<s>c"], "ab")):
        settings = {"until": until, "max_gen_toks": 4, "do_sample": False}
        asked = requests("generate_until", *((context, settings) for context in texts(1, 2)))
        assert lm.generate_until(asked, disable_tqdm=True) == [text] * 2
    lm.think_end_token = "d"
    settings = {"until": ["<s>"], "max_gen_toks": 4, "do_sample": False}
    assert lm.generate_until(requests("generate_until", (texts(1)[0], settings)), disable_tqdm=True) == [""]


def test_contexts_that_begin_with_bos(make_lm):
    """HFLM asks the first context of a batch, and the others get two or none."""
    lm = make_lm(**NARROW, batch_size=2)
    bos = ("<s>", lm.tokenizer.bos_token_id)
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    rows = [lm.tok_batch_encode(strings)[0].tolist() for strings in (["ab", "ab"], ["<s>ab", "ab"], ["ab", "<s>ab"])]
    assert rows[0] == rows[1] == rows[2] and rows[0][0].count(bos[1]) == 1


@pytest.mark.parametrize("settings", [NARROW, dict(full_cache=True)])
def test_logits_that_are_no_numbers(make_lm, settings):
    """NaN that a task counts as a wrong answer."""
    lm = make_lm(**settings)
    lm.model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="task task: the model's logits are NaN in float32; pass another --dtype"):
        lm.loglikelihood(requests("loglikelihood", (texts(1)[0], " a")), disable_tqdm=True)


def test_cut_contexts_are_counted(make_lm):
    """A long context whose beginning a generating task never sees, and nothing says so at the end."""
    lm = make_lm(**NARROW, batch_size=2)
    settings = {"until": ["zz"], "max_gen_toks": 4, "do_sample": False}
    lm.generate_until(requests("generate_until", *((text, settings) for text in texts(1, 20))), True)
    assert lm.evictions["task"]["contexts_cut"] == 1


def test_command_line(evaluate, make_lm, tasks, harness, checkpoint, tmp_path):
    """Settings that the file lacks, results that are not the model's, an API that evaluates something else."""
    names = "tiny_choice,tiny_text,tiny_rolling"
    results, out, _ = evaluate(names, *FLAGS, "--batch_size=2", "--log_samples")
    h2o = results["h2o"]
    assert h2o["settings"]["num_window_length"] == 24 and h2o["h2o"]["num_heavy_hitters"] == 10
    assert h2o["versions"].keys() == {"python", "torch", "transformers", "lm_eval"}
    for name, kind in zip(names.split(","), ("tokens", "texts", "tokens"), strict=True):
        assert name in out and h2o["evictions"][name][f"{kind}_after_eviction"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    full, *_ = evaluate(names, output="full.json")
    assert full["h2o"]["h2o"] is None
    rolling = [r["results"]["tiny_rolling"]["byte_perplexity,none"] for r in (results, full)]
    assert rolling[0] != pytest.approx(rolling[1], rel=1e-3)

    model_args = f"pretrained={checkpoint},device=cpu,window_length=24,num_heavy_hitters=10,update_interval=4"
    manager = harness.TaskManager(include_path=tasks)
    by_api = lm_eval.simple_evaluate("h2o_llama", model_args, ["tiny_rolling"], task_manager=manager)
    assert by_api["results"]["tiny_rolling"]["byte_perplexity,none"] == pytest.approx(rolling[0])
    assert len(results["samples"]["tiny_rolling"]) == 4


def test_interrupted_command_goes_on(evaluate, make_lm, harness, monkeypatch):
    """Hours of answers that Ctrl-C throws away, or those of another window, or of the dtype that --dtype auto means on
    another device, that are taken for this one's."""
    flags = [*FLAGS, "--batch_size=16"]
    whole, *_ = evaluate("tiny_choice,tiny_rolling", *flags, output="whole.json")
    scores = likelihood.log_likelihoods_in_batches

    def stop_at_documents(model, pairs, *args):
        if len(pairs[0][0]) == 1:
            raise KeyboardInterrupt
        return scores(model, pairs, *args)

    with monkeypatch.context() as patch:
        patch.setattr("h2optimizer.lm_eval_model.log_likelihoods_in_batches", stop_at_documents)
        _, _, err = evaluate("tiny_choice,tiny_rolling", *flags, code=130)
    assert "run the same command again" in err.splitlines()[-1]
    other, *_ = evaluate("tiny_choice", *flags, "--num_window_length=12")
    assert other["h2o"]["evictions"]["tiny_choice"]["tokens"] > 0
    lm = make_lm(**NARROW, dtype="bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(harness, "load_model", lambda *args: (lm.model, lm.tokenizer))
        half, *_ = evaluate("tiny_choice", *flags, "--overwrite")
    assert half["h2o"]["evictions"]["tiny_choice"]["tokens"] > 0
    again, *_ = evaluate("tiny_choice,tiny_rolling", *flags, "--overwrite")
    assert "tiny_choice" not in again["h2o"]["evictions"]  # its answers were there
    assert again["results"] == whole["results"]


def test_scores_that_no_window_can_change_are_named(evaluate):
    """A window that looks free of cost because each continuation is one token, which prefill decides."""
    _, _, err = evaluate("tiny_letter,tiny_choice", *FLAGS)
    (warning,) = (line for line in err.splitlines() if line.startswith("warning"))
    assert "tiny_letter: nothing came after an eviction" in warning


@pytest.mark.parametrize("names, flags, message", [
    ("no_such_task", (), "--tasks no_such_task: no such task; `lm_eval ls tasks` lists them"),
    ("", (), "--tasks: is empty"),
    ("tiny_text", ("--apply_chat_template",), "--apply_chat_template: the tokenizer of"),
    ("tiny_broken", (), "--tasks tiny_broken: cannot be loaded (UndefinedError"),
    ("tiny_choice", ("--include_path", "/nowhere"), "--include_path /nowhere: no such folder"),
    ("tiny_choice", ("--limit", "1.5"), "--limit: '1.5': must be a whole number of documents"),
    ("tiny_choice", ("--num_fewshot", "-1"), "--num_fewshot: '-1': must be a whole number of at least 0"),
    ("tiny_choice", ("--metadata", "[]"), "--metadata: must be a JSON object"),
    ("tiny_choice", ("--metadata", "{"), "--metadata: must be a JSON object"),
    ("tiny_choice", ("--num_fewshot", "1000"), "--num_fewshot 1000: --tasks tiny_choice cannot make such examples"),
    ("tiny_choice", ("--num_window_length", "24"), "has no effect without --enable_h2o_generation"),
    ("tiny_choice", ("--model-name", "/nowhere"), "--model-name /nowhere: cannot be loaded"),
    ("tiny_choice", ("--output-path", "/proc/x/y.json"), "--output-path: /proc/x/y.json is in /proc"),
    ("tiny_text", ("--max_length", "12"), "task tiny_text: 12 tokens are to follow a context"),
    ("tiny_choice", ("--max_length", "3"), "task tiny_choice: a continuation has"),
])  # fmt: skip
def test_bad_input_is_one_line(evaluate, names, flags, message):
    """A traceback, or minutes of work, before a mistake is named."""
    _, _, err = evaluate(names, *flags, code=2)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert message in line and line == err.splitlines()[-1]


def test_results_are_not_replaced_unasked(evaluate, tmp_path):
    """An evaluation overwritten by the next one."""
    (tmp_path / "out.json").write_text("results of a day")
    _, _, err = evaluate("tiny_letter", code=2)
    assert "exists; pass --overwrite" in err and (tmp_path / "out.json").read_text() == "results of a day"
    evaluate("tiny_letter", "--overwrite")


@pytest.mark.parametrize("settings, message", [
    (dict(windw_length=24), "windw_length: unknown; h2o_llama takes"),
    (dict(full_cache=True, window_length=24), "window_length: has no effect with full_cache"),
])  # fmt: skip
def test_unknown_arguments_of_the_model(make_lm, settings, message):
    """A misspelt flag that HFLM would swallow, so that the default window is evaluated in its place."""
    with pytest.raises(InputError, match=message):
        make_lm(**settings)


@pytest.mark.parametrize("kind, arguments", [
    ("loglikelihood", ("context", "")), ("loglikelihood", ("", "")), ("loglikelihood", ("  ", "x")),
    ("generate_until", ("", {"until": ["x"]})),
])  # fmt: skip
def test_requests_without_tokens_are_named(make_lm, kind, arguments):
    """An assertion or an IndexError of a library in the place of the task's name."""
    lm = make_lm(**NARROW, max_length=300)
    with pytest.raises(InputError, match="task named: a cont"):
        getattr(lm, kind)(requests(kind, arguments, task="named"))


def test_without_lm_eval(monkeypatch, capsys):
    """A traceback where one package is missing."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / "eval_harness.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: lm_eval is not installed: pip install lm_eval\n"


def test_broken_lm_eval(monkeypatch, capsys):
    """A traceback where the package is there, but another version of it than its dependencies fit."""
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.api", ModuleType("lm_eval.api"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", ModuleType("lm_eval.api.registry"))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / "eval_harness.py"), run_name="__main__")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: lm_eval cannot be imported (cannot import name 'register_model'")
