"""Memory that runs out, and Ctrl-C, at any moment of a run."""

import pytest

from checkpoints import made_up_text, make_requests
from h2optimizer import H2OLlamaForCausalLM, batching, decoder, decoding, sampling, sharing
from h2optimizer.utils.cache import HHCache
from h2optimizer.utils.results import ResultsFile
from summaries import (  # noqa: F401
    H2O,
    ON_GPU,
    Outcome,
    alone,
    assert_same_results,
    both_caches,
    checkpoint,
    run,
    tokenizer,
    ways_to_ask,
)


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
        "out of memory with 8 sequences: continuing with 4",
        "out of memory with 4 sequences: continuing with 2",
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
        (sampling.RowSampler, "__init__", 1, H2O),
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
        "out of memory with 4 sequences: continuing with 2"
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


@both_caches
def test_memory_that_snapshots_alone_exceed(run, monkeypatch, flags):
    """A run that ends, though every request fits into memory by itself."""
    monkeypatch.setattr(sharing, "LEAST_SAVED", 1)
    requests = make_requests(4, max_tokens=4)
    for request in requests:
        request["article"] = made_up_text(4) + request["article"]
    expected = run(requests, *flags, "--no-share_prefixes", output="expected")
    for kind in (decoding.BoundedDecoding, decoding.FullDecoding):
        monkeypatch.setattr(kind, "snapshot", fails(kind.snapshot, [], at=1))
        monkeypatch.setattr(kind, "snapshot", fails(kind.snapshot, [], at=1))
    outcome = run(requests, *flags, "--batch_size", "2")
    assert_same_results(outcome, expected)
    assert [line for line in outcome.stderr if "out of memory" in line] == [
        "out of memory with 2 sequences: continuing with 1",
        "out of memory with 1 sequences: continuing without shared prefixes",
    ]


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
