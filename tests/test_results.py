"""utils/results.py: result files that survive, and fingerprints of what a run depends on."""

import json
import os
import resource

import huggingface_hub
import pytest

from h2optimizer.utils.requests import InputError, read_requests
from h2optimizer.utils.results import JsonlFile, ResultsFile, checkpoint_fingerprint
from test_requests import LINE, refused

SETTINGS = {"--seed": 1, "--num_window_length": 64}


def result(index: int) -> dict:
    return {"index": index, "text": f"summary {index} ü"}


def results_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def interrupted(path, *indices):
    """A results file that a run left behind when it was killed."""
    output = ResultsFile(path, SETTINGS)
    output.start()
    for index in indices:
        output.append(result(index))
    output._file.close()


def test_a_result_is_on_disk_before_the_next_begins(tmp_path):
    """Results that stay in a buffer die with the process."""
    output = ResultsFile(tmp_path / "o.jsonl", SETTINGS)
    output.start()
    for n in range(3):
        output.append(result(n))
        assert results_of(output.path) == [result(i) for i in range(n + 1)]


def test_finish_puts_results_in_order_with_their_metrics(tmp_path):
    """Batches end in order of length; the file must end in the order of the requests."""
    output = ResultsFile(tmp_path / "new" / "folder" / "o.jsonl", SETTINGS)
    output.start()
    for index in (2, 0, 1):
        output.append(result(index))
    output.finish({"requests": 3})
    assert results_of(output.path) == [result(0), result(1), result(2)]
    assert json.loads((output.path.parent / "o.metrics.json").read_text()) == {"settings": SETTINGS, "requests": 3}
    assert sorted(path.name for path in output.path.parent.iterdir()) == ["o.jsonl", "o.metrics.json"], "litter"


@pytest.mark.parametrize("cut", [1, 10, 23])
def test_line_cut_short_is_dropped(tmp_path, cut):
    """A process killed while it writes leaves half a line, which must neither be read nor joined to the next one."""
    path = tmp_path / "o.jsonl"
    interrupted(path, 4, 2)
    line = json.dumps(result(3), ensure_ascii=False).encode() + b"\n"
    with path.open("ab") as file:
        file.write(line[:cut])
    output = ResultsFile(path, SETTINGS)
    assert list(output.results) == [4, 2]
    output.start()
    output.append(result(3))
    assert results_of(path) == [result(4), result(2), result(3)]


def test_character_cut_in_half_is_dropped(tmp_path):
    """A cut inside a UTF-8 sequence raises UnicodeDecodeError where lines are read as text."""
    path = tmp_path / "o.jsonl"
    interrupted(path, 0, 1)
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.rindex("ü".encode()) + 1])
    assert list(ResultsFile(path, SETTINGS).results) == [0]


@pytest.mark.parametrize(
    "change", [{"--num_window_length": 32}, {"--seed": 2}, {"--new_flag": 1}], ids=lambda change: next(iter(change))
)
def test_other_settings_are_refused_by_flag(tmp_path, change):
    """Results of two settings in one file would be one meaningless ROUGE; what is there stays as it is."""
    path = tmp_path / "o.jsonl"
    interrupted(path, 0)
    before = path.read_bytes(), (tmp_path / "o.metrics.json").read_bytes()
    refused(lambda: ResultsFile(path, SETTINGS | change), next(iter(change)), "--overwrite")
    assert (path.read_bytes(), (tmp_path / "o.metrics.json").read_bytes()) == before


def test_setting_that_is_gone_is_refused(tmp_path):
    """A flag of the earlier run that the new one has not differs as well."""
    interrupted(tmp_path / "o.jsonl", 0)
    refused(lambda: ResultsFile(tmp_path / "o.jsonl", {"--seed": 1}), "--num_window_length is 64", "no setting here")


@pytest.mark.parametrize("metrics", [None, "{", "[]", "{}", '{"settings": [1]}', b"\xff\xfe"])
def test_results_without_usable_settings_are_refused(tmp_path, metrics):
    """Whatever stands at --output-path may be precious: without settings it is not ours to go on with."""
    path = tmp_path / "o.jsonl"
    interrupted(path, 0)
    (tmp_path / "o.metrics.json").unlink()
    if metrics is not None:
        (tmp_path / "o.metrics.json").write_bytes(metrics if isinstance(metrics, bytes) else metrics.encode())
    before = path.read_bytes()
    refused(lambda: ResultsFile(path, SETTINGS), "o.metrics.json", "--overwrite")
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["no json", "[1]", '{"text": "no index"}'])
def test_foreign_line_is_refused(tmp_path, line):
    """A whole line that is no result is no crash of ours: dropping it could lose what the user put there."""
    path = tmp_path / "o.jsonl"
    interrupted(path, 0)
    with path.open("a") as file:
        file.write(line + "\n")
    before = path.read_bytes()
    refused(lambda: ResultsFile(path, SETTINGS), "line 2", "--overwrite")
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["my notes", "my notes\nand more", "\0"])
def test_file_of_something_else_is_not_cut(tmp_path, content):
    """A foreign file without an end of line was taken for a line that a crash cut short, and emptied."""
    path = tmp_path / "cells.jsonl"
    path.write_text(content)
    refused(lambda: JsonlFile(path, "index", "result").resume("choose another path"), "line 1", "choose another path")
    assert path.read_text() == content


def test_entry_that_lacks_its_end_of_line_alone_is_kept(tmp_path):
    """What an editor saves without the last end of line, which was dropped and decoded again."""
    path = tmp_path / "o.jsonl"
    interrupted(path, 4, 2)
    path.write_bytes(path.read_bytes()[:-1])
    output = ResultsFile(path, SETTINGS)
    output.append(result(3))
    assert results_of(path) == [result(4), result(2), result(3)]


def test_command_without_the_flag_does_not_name_it(tmp_path):
    """A way out, --skip_bad_requests, that scripts/ablate.py does not have."""
    path = tmp_path / "requests.jsonl"
    path.write_text("{\n")
    with pytest.raises(InputError, match=r"fix the line$"):
        read_requests(path, None)


def test_overwrite_waits_until_the_run_starts(tmp_path):
    """--overwrite with a misspelt model name must not cost the results that are there."""
    path = tmp_path / "o.jsonl"
    interrupted(path, 0, 1)
    output = ResultsFile(path, {"--seed": 9}, overwrite=True)
    assert output.results == {} and results_of(path) == [result(0), result(1)]
    output.start()
    assert path.read_bytes() == b""
    output.append(result(5))
    assert results_of(path) == [result(5)]


def test_second_run_on_the_same_file_is_refused(tmp_path):
    """Two runs that append to one file would mix lines; --overwrite must not empty it under the other."""
    path = tmp_path / "o.jsonl"
    first = ResultsFile(path, SETTINGS)
    first.start()
    first.append(result(0))
    for overwrite in (False, True):
        refused(lambda overwrite=overwrite: ResultsFile(path, SETTINGS, overwrite), "another run")
    assert results_of(path) == [result(0)]
    first.finish({})
    assert list(ResultsFile(path, SETTINGS).results) == [0], "free again once it ended"


def test_paths_that_cannot_be_written(tmp_path):
    """Each is one line before the model loads, and a device is not replaced by a file."""
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "o.metrics.json").mkdir()
    for path in ("file/o.jsonl", "file/deeper/o.jsonl", ".", "/", "pipe", "/proc/o.jsonl", "x" * 300):
        refused(lambda path=path: ResultsFile(tmp_path / path, SETTINGS), "--output-path")
    refused(lambda: ResultsFile(tmp_path / "o.jsonl", SETTINGS), "o.metrics.json")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("output", ["in.jsonl", "hardlink.jsonl", "symlink.jsonl", "./folder/../in.jsonl"])
def test_input_is_never_the_output(tmp_path, output, overwrite):
    """A user in a hurry completes the same name twice; the requests must survive, --overwrite or not."""
    source = tmp_path / "in.jsonl"
    source.write_text(LINE)
    (tmp_path / "folder").mkdir()
    os.link(source, tmp_path / "hardlink.jsonl")
    (tmp_path / "symlink.jsonl").symlink_to(source)
    refused(lambda: ResultsFile(tmp_path / output, SETTINGS, overwrite, source), "--input-path")
    assert source.read_text() == LINE


def test_input_is_never_the_metrics(tmp_path):
    """The metrics file is written without being asked for by name."""
    source = tmp_path / "o.metrics.json"
    source.write_text(LINE)
    refused(lambda: ResultsFile(tmp_path / "o.jsonl", SETTINGS, True, source), "--input-path")
    assert source.read_text() == LINE


def test_metrics_of_names_with_dots_do_not_collide(tmp_path):
    """with_suffix cuts decay0.9 and decay0.95 to the same decay0.metrics.json."""
    for name in ("decay0.9", "decay0.95", "a.b.jsonl", "a.jsonl"):
        ResultsFile(tmp_path / name, {"--name": name}).start()
    for metrics, name in [
        ("decay0.9.metrics.json", "decay0.9"),
        ("decay0.95.metrics.json", "decay0.95"),
        ("a.b.metrics.json", "a.b.jsonl"),
        ("a.metrics.json", "a.jsonl"),
    ]:
        assert json.loads((tmp_path / metrics).read_text())["settings"] == {"--name": name}


def test_link_to_results_stays_a_link(tmp_path):
    """os.replace on a link leaves the unordered results where the link led, and a file in its place."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "o.jsonl").symlink_to(tmp_path / "scratch" / "real.jsonl")
    output = ResultsFile(tmp_path / "o.jsonl", SETTINGS)
    output.start()
    for index in (1, 0):
        output.append(result(index))
    output.finish({})
    assert (tmp_path / "o.jsonl").is_symlink()
    assert results_of(tmp_path / "scratch" / "real.jsonl") == [result(0), result(1)]


def test_disk_that_fills_up_keeps_what_is_there(tmp_path):
    """OSError from a write is one line, and the next run goes on after the last whole result."""
    path = tmp_path / "o.jsonl"
    output = ResultsFile(path, SETTINGS)
    output.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a full disk, for this process
    try:
        with pytest.raises(InputError, match=r"--output-path .*cannot be written .*are kept"):
            for index in range(100):
                output.append(result(index) | {"filling": "x" * 70})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    whole = path.read_bytes().count(b"\n")
    assert 5 < whole == len(output.results) < 15
    del output
    assert len(ResultsFile(path, SETTINGS).results) in (whole, whole + 1)  # closing may have written the rest


def test_failing_finish_keeps_results_and_leaves_no_scratch(tmp_path, monkeypatch):
    """A disk that is full at the very end, where a second copy is written to bring results into order."""
    path = tmp_path / "o.jsonl"
    interrupted(path, 1, 0)
    output = ResultsFile(path, SETTINGS)

    def replace(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    refused(lambda: output.finish({}), "--output-path", "No space left", "are kept")
    monkeypatch.undo()
    assert results_of(path) == [result(1), result(0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "o.metrics.json"], "litter"


def test_numbers_that_json_has_no_names_for(tmp_path):
    """A bare NaN or Infinity in results or metrics, which no other program reads."""
    path = tmp_path / "o.jsonl"
    output = ResultsFile(path, {"--seed": 1})
    output.start()
    output.append({"index": 0, "figures": [1.5, float("nan"), {"a": (float("-inf"), "NaN")}]})
    output.finish({"mean": float("inf"), "versions": {}})

    def strict(name):
        raise AssertionError(name)

    assert json.loads(path.read_text(), parse_constant=strict)["figures"] == [1.5, None, {"a": [None, "NaN"]}]
    assert json.loads((tmp_path / "o.metrics.json").read_text(), parse_constant=strict)["mean"] is None


# Checkpoints


def test_fingerprint_of_a_checkpoint(tmp_path):
    """Weights that differ past the first MiB, in a shard elsewhere, or in the last bytes; a tokenizer's merges."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**26 + 2**20)  # sparse: nothing is written
    (tmp_path / "merges.txt").write_text("a b")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "1.safetensors").write_bytes(b"1")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shards/1.safetensors"}}')
    (tmp_path / "notes.md").write_text("a")
    seen = [checkpoint_fingerprint(tmp_path)]
    for name, place in (
        ("model.safetensors", 2**26 + 2**20 - 1),
        ("model.safetensors", 2**25),
        ("shards/1.safetensors", 0),
        ("merges.txt", 2),
    ):
        with (tmp_path / name).open("r+b") as file:
            file.seek(place)
            file.write(b"x" * min(2**15, os.path.getsize(tmp_path / name) - place))
        seen.append(checkpoint_fingerprint(str(tmp_path)))
    assert len(set(seen)) == 5 and None not in seen
    (tmp_path / "notes.md").write_text("b")
    (tmp_path / "head_budgets.json").write_text("{}")  # a plan that names this fingerprint
    assert checkpoint_fingerprint(tmp_path) == seen[-1], "what decides no text"
    (tmp_path / "other.index.json").write_text("[]")
    assert checkpoint_fingerprint(tmp_path) not in seen


def test_fingerprint_of_a_name_on_the_hub(tmp_path, monkeypatch):
    """A repository that was changed between a run and its resumption."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert checkpoint_fingerprint("some/llama") is None
    repository, commit = tmp_path / "models--some--llama", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    assert checkpoint_fingerprint("some/llama") == commit
