"""Runs that are killed, and results that are there: what is resumed, refused and kept."""

import dataclasses
import json
import resource
import runpy
import shutil
import signal
import sys

import pytest

import run_summarization
from checkpoints import made_up_text, make_requests
from forks import Fork, stop_while_writing
from h2optimizer import H2OConfig, batching, sharing
from h2optimizer.utils.results import ResultsFile
from summaries import (  # noqa: F401
    H2O,
    ROOT,
    SAMPLED,
    TEMPLATE,
    alone,
    assert_same_results,
    both_caches,
    checkpoint,
    instruct_model,
    metrics_path,
    no_model,
    refused,
    run,
)

# Crashes


def killed_while_writing(results: int, folder, checkpoint, flags: list[str]) -> bytes:
    """A run of folder/in.jsonl, killed inside the line after so many results. Returns what it has written."""
    argv = ["--input-path", folder / "in.jsonl", "--output-path", folder / "out.jsonl", "--model-name", checkpoint]

    def work(fork):
        stop_while_writing(results, fork.stop)
        return run_summarization.main([*map(str, argv), "--device", "cpu", *flags])

    fork = Fork(work, folder)
    fork.await_mark()
    assert fork.kill() == -signal.SIGKILL
    return (folder / "out.jsonl").read_bytes()


@pytest.mark.parametrize("batch_size", ["1", "4"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_killed_run_goes_on_as_if_nothing_had_happened(run, checkpoint, tmp_path, sampled, batch_size):
    """kill -9 inside a line, in the middle of a batch: a request lost, twice or out of order, or other samples."""
    requests = make_requests(10, max_tokens=10, **(SAMPLED if sampled else {}))
    flags = [*H2O, "--batch_size", batch_size]
    uninterrupted = run(requests, *flags, output="uninterrupted.jsonl")
    left = killed_while_writing(6, tmp_path, checkpoint, flags)
    assert left.count(b"\n") == 6 and not left.endswith(b"\n")
    resumed = run(requests, *flags)
    assert [result["request"] for result in resumed.results] == requests
    assert_same_results(resumed, uninterrupted)
    assert "6 of 10 results exist already" in resumed.stderr
    kept = sorted((json.loads(line) for line in left.splitlines()[:-1]), key=lambda result: result["index"])
    again = {result["index"]: result for result in resumed.results}
    assert [again[result["index"]] for result in kept] == kept, "what was there was written anew"
    assert resumed.metrics["rouge"] == uninterrupted.metrics["rouge"]
    assert resumed.metrics["tokens_generated"] == uninterrupted.metrics["tokens_generated"] == 100


@both_caches
def test_killed_where_requests_share_a_beginning(run, checkpoint, tmp_path, monkeypatch, flags):
    """Requests that were left of those who shared it, with none to compute it; results out of order."""
    monkeypatch.setattr(sharing, "LEAST_SAVED", 1)
    requests = make_requests(10, max_tokens=10)
    for i, request in enumerate(requests):
        request["article"] = made_up_text(4, seed=i % 3) + request["article"]
    flags = [*flags, "--batch_size", "3"]
    uninterrupted = run(requests, *flags, output="uninterrupted.jsonl")
    killed_while_writing(4, tmp_path, checkpoint, flags)
    resumed = run(requests, *flags)
    assert "4 of 10 results exist already" in resumed.stderr
    assert_same_results(resumed, uninterrupted)
    for outcome in (resumed, uninterrupted):
        tokens = sum(result["cache"]["tokens_seen"] - 9 for result in outcome.results)
        assert outcome.metrics["prompt_tokens_shared"] > 0
        assert outcome.metrics["prompt_tokens_computed"] + outcome.metrics["prompt_tokens_shared"] == tokens


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
    assert second.stdout == first.stdout and second.stderr == ["3 of 3 results exist already"]
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


# Results that are there


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
    "--quantize": [*H2O, "--quantize", "torchao-int8"],
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
        "h2optimizer.flags.H2OConfig", dataclasses.make_dataclass("H2OConfig", fields, bases=(H2OConfig,), frozen=True)
    )
    refused(requests, "--enable_h2o_generation", words="--update_interval is 2, but 16")


def test_results_of_a_setting_that_is_gone(run, refused):
    """Advice to pass a flag that the program does not have."""
    requests = make_requests(2, max_tokens=3)
    first = run(requests, *H2O)
    metrics = json.loads(metrics_path(first.path).read_text())
    metrics["settings"]["--compile"] = False
    metrics_path(first.path).write_text(json.dumps(metrics))
    outcome = refused(requests, *H2O, words=["--compile is False in the results at ", "no setting here", "--overwrite"])
    assert "the same value" not in outcome.stderr[0]


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


def test_overwrite_with_a_wrong_model_keeps_the_results(run, refused):
    """Nothing is lost by bad input, not even with --overwrite."""
    requests = make_requests(2, max_tokens=3)
    first = run(requests)
    before = first.files
    refused(requests, "--overwrite", model="nobody/misspelt", words="--model-name")
    assert first.files == before


EDITS = {
    "another index": (lambda result: result.update(index=99), "its index is 99"),
    "index true": (lambda result: result.update(index=True), "its index is True"),
    "another request": (lambda result: result.update(index=1), "is not request 1"),
    "edited request": (lambda result: result["request"].update(article="another"), "is not request 0"),
    "no scores": (lambda result: result.pop("rouge"), "it is incomplete"),
    "no count": (lambda result: result.update(tokens_generated=None), "it is incomplete"),
    "no cache": (lambda result: result.update(cache={}), "it is incomplete"),
}


@pytest.mark.parametrize("change, said", EDITS.values(), ids=EDITS)
def test_results_that_were_edited_are_refused(run, refused, change, said):
    """Another request's result that is kept as this one's, or a KeyError after all others have been decoded."""
    outcome = run(make_requests(3, max_tokens=2))
    result = json.loads(outcome.lines[0])
    change(result)
    outcome.path.write_text(json.dumps(result) + "\n")
    before = outcome.path.read_bytes()
    refused(make_requests(3, max_tokens=2), words=["out.jsonl, line 1", said])
    assert outcome.path.read_bytes() == before


def test_metrics_that_were_edited_are_computed_anew(run):
    """A table of a finished run that fails where the file has lost a part."""
    outcome = run(make_requests(2, max_tokens=2))
    edited = {"settings": outcome.metrics["settings"], "requests": 2}
    metrics_path(outcome.path).write_text(json.dumps(edited))
    again = run(make_requests(2, max_tokens=2))
    assert again.metrics["rouge"] == outcome.metrics["rouge"] and again.stdout.startswith("ROUGE")


def test_results_do_not_share_their_metrics(run, refused):
    """out and out.jsonl, whose metrics would be one file."""
    run(make_requests(2, max_tokens=2))
    refused(make_requests(2, max_tokens=2), output="out", words="would replace that of out.jsonl")
