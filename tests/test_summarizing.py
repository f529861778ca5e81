"""The texts that come of requests: where they end, in batches, sampled; against independent replays."""

import json
import os
import re

import pytest
import torch

import run_summarization
from checkpoints import POSITIONS, made_up_text, make_requests
from h2optimizer import batching, sharing, summarizing
from h2optimizer.utils.requests import Request
from summaries import (  # noqa: F401
    H2O,
    SAMPLED,
    alone,
    assert_same_results,
    both_caches,
    checkpoint,
    prefills,
    refused,
    run,
    says_eos,
    script,
    tokenizer,
    tokens_of,
    ways_to_ask,
    with_generation_config,
)

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
    requests = make_requests(7)
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


@pytest.mark.parametrize("batch_size, flags", [("1", H2O), ("3", []), ("auto", H2O)])
def test_beginnings_computed_once_change_no_result(run, monkeypatch, flags, batch_size):
    """Shots whose tokens are read from another request's prompt, out of order, or counted for each request."""
    monkeypatch.setattr(sharing, "LEAST_SAVED", 1)
    requests, shots = ways_to_ask(9), [made_up_text(n, seed=n) for n in (5, 2)]
    for i, request in enumerate(requests):
        request["article"] = shots[0] + shots[1] * (i % 2) + request["article"]
        request["stop"] = ["zz", "e"] if i % 4 == 3 else ["###"]
    alone = run(requests, *flags, "--no-share_prefixes", "--batch_size", batch_size)
    shared = run(requests, *flags, "--batch_size", batch_size, output="shared")
    assert_same_results(shared, alone)
    assert shared.metrics["settings"] == alone.metrics["settings"], "a run may be resumed either way"
    assert (shared.metrics["share_prefixes"], alone.metrics["share_prefixes"]) == (True, False)
    names = "prompt_tokens_computed", "prompt_tokens_shared"
    (computed, saved), (all_computed, equal) = ([of.metrics[name] for name in names] for of in (shared, alone))
    assert computed + saved == all_computed + equal and saved > equal + 8 * 20
    assert re.search(rf"^prompt tokens +{computed} +computed, {saved} shared$", shared.stdout, re.M)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_order_of_decoding(batch_size):
    """A request lost or twice; long prompts late, when memory runs out after hours; requests alike not side by side."""
    requests = [Request.from_line(json.dumps(request), i) for i, request in enumerate(make_requests(10))]
    prompts = [summarizing.Prompt(request, [0] * (10 + (7 * request.index) % 5)) for request in requests]
    ordered = summarizing.decoding_order(prompts, batch_size)
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


@pytest.mark.parametrize("interval", [1, 16])
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
        assert others == [one, one] and result["tokens_generated"] == 6 and result["sequences"] == 1
    assert not outcome.stderr
    seconds = sum(result["result"]["request_time"]["decode_time"] for result in outcome.results)
    assert outcome.metrics["decode_tokens_per_second"] == pytest.approx(2 * (6 - 1) / seconds)


def test_fields_that_do_nothing_are_warned_of_once(run):
    """A top_k in every request that changes nothing, and nothing says so."""
    asked = [make_requests(1, max_tokens=2)[0], *make_requests(2, max_tokens=2, top_k=5, echo=False)]
    assert run(asked).stderr == ["warning: unknown fields are ignored: top_k (in 2 of 3 requests)"]


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


def test_greedy_flag_overrides_what_requests_ask_for(run):
    """--greedy that leaves temperature, top_p or n in force."""
    plain = make_requests(3, max_tokens=10)
    sampled = [request | SAMPLED | {"n": 2} for request in plain]
    outcome = run(sampled, "--greedy", "--batch_size", "3")
    assert outcome.texts == run(plain, output="plain").texts and len(outcome.choices) == 3


# Prompts longer than the model's positions


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
    request = make_requests(1, max_tokens=POSITIONS, stop=["e"])  # so many are asked for, few are said
    assert len(run(request, *H2O, "--sample_num", "1").stderr) == 1
    assert run(request, *H2O, "--enable_position_rolling", output="rolling").stderr == []


def test_chunks_keep_a_long_prompt_within_the_models_positions(run, tokenizer):
    """A warning of what rolling chunks avoid, or none where even window and chunk are too long."""
    (request,) = make_requests(1, max_tokens=POSITIONS, stop=["e"])  # so many are asked for, few are said
    request["article"] *= 8
    flags = [*H2O, "--enable_position_rolling", "--prefill_chunk"]
    chunked = run([request], *flags, "40", output="chunked")
    assert chunked.stderr == []
    assert chunked.results[0]["cache"]["slimmings"] > len(tokenizer(request["article"])["input_ids"]) // 40
    (line,) = run([request], *flags, str(POSITIONS), output="wide").stderr
    assert f"needs {POSITIONS + 24}" in line and "--prefill_chunk" in line


def test_more_requests_in_a_batch_than_there_are(run):
    """range() and padding with a batch that is never full."""
    assert len(run(make_requests(2, max_tokens=2), *H2O, "--batch_size", "1000000").results) == 2
