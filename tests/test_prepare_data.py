"""scripts/prepare_data.py: exact prompts, where shots come from, and one line for every bad input. No network."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "prepare_data.py"
ROWS = [{"article": f"Article number {i}.", "summary": f"Summary {i}."} for i in range(12)]


@pytest.fixture(scope="module")
def prepare_data():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """A hub call that slips past a patched load_dataset fails at once; the user's cache stays as it is."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(prepare_data, capsys, tmp_path):
    """Runs main, asserts success and the last line on stdout, returns the requests."""

    def run(*flags, output=None):
        output = output or tmp_path / "made" / "requests.jsonl"
        assert prepare_data.main([*map(str, flags), "--output-path", str(output), "--overwrite"]) == 0
        requests = [json.loads(line) for line in output.read_text().splitlines()]
        assert capsys.readouterr().out.splitlines()[-1] == f"wrote {len(requests)} requests to {output}"
        return requests

    return run


@pytest.fixture
def hub(monkeypatch):
    """Replaces load_dataset by splits in memory, {split: rows}; returns (splits, calls)."""
    import datasets

    splits, calls = {}, []

    def load_dataset(*name, split):
        calls.append((*name, split))
        return datasets.Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return splits, calls


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import datasets

        dataset = datasets.Dataset.from_list(rows)
        dataset.to_csv(path) if path.suffix == ".csv" else dataset.to_parquet(path)
    return path


def fields(request):
    return {key: value for key, value in request.items() if key not in ("article", "summary_gt")}


def shots_of(request):
    """Article texts of the examples, which are all the prompt's articles but the last."""
    return [part.split("\n")[0] for part in request["article"].split("###\nArticle: ")[1:-1]]


def test_zero_shot_xsum(hub, run):
    """A prompt that differs by one newline from H2O's scores differently; so does an unjoined line in a text."""
    splits, calls = hub
    document = "First line.\nSecond  line. \r\n\n Third: \u00e9.\n"
    splits["test"] = [{"document": document, "summary": " A\nsummary.", "id": "1"}]
    (request,) = run("--dataset", "xsum")
    assert calls == [("EdinburghNLP/xsum", "test")]
    assert request["article"] == (
        "###\nArticle: First line. Second  line. Third: \u00e9.\n\nSummarize the above article in 1 sentence.\n"
    )
    assert request["summary_gt"] == "A summary."
    assert fields(request) == {"logprobs": 1, "max_tokens": 64, "n": 1, "stop": ["###"], "temperature": 0.3, "top_p": 1}


def test_three_shots_cnn_dailymail(hub, run):
    splits, calls = hub
    splits["validation"] = [{"article": "Own.", "highlights": "One .\nTwo ."}]
    splits["train"] = [{"article": f"Train {i}.", "highlights": f"First {i} .\nSecond {i} ."} for i in range(3)]
    flags = ["--dataset", "cnn_dailymail", "--shots", 3, "--split", "validation"]
    (request,) = run(*flags)
    assert calls == [("abisee/cnn_dailymail", "3.0.0", split) for split in ("validation", "train")]
    ask = "\n\nSummarize the above article in 3 sentences.\n"
    order = [int(shot.removeprefix("Train ").removesuffix(".")) for shot in shots_of(request)]
    assert sorted(order) == [0, 1, 2]
    assert (
        request["article"]
        == "".join(f"###\nArticle: Train {i}.{ask}First {i} . Second {i} .\n\n" for i in order)
        + f"###\nArticle: Own.{ask}"
    )
    assert request["summary_gt"] == "One . Two ."
    assert request["max_tokens"] == 128
    (request,) = run(*flags, "--max_tokens", 7, "--temperature", 0)
    assert (request["max_tokens"], request["temperature"]) == (7, 0)


def test_articles_in_one_prompt(run, tmp_path):
    """A reference of another article than the one asked for, or --sample_num that counts rows."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    requests = run("--input-path", path, "--articles", 5)
    assert len(requests) == 2 and requests[:1] == run("--input-path", path, "--articles", 5, "--sample_num", 1)
    for i, request in enumerate(requests):
        parts = [f"Article {j + 1}: Article number {5 * i + j}." for j in range(5)]
        assert request["article"] == "\n\n".join([*parts, f"Summarize article {i + 1} in two sentences."])
        assert request["summary_gt"] == f"Summary {5 * i + i}."
        assert fields(request) == {
            "logprobs": 1, "max_tokens": 64, "n": 1, "stop": ["###"], "temperature": 0.3, "top_p": 1,
        }  # fmt: skip


def test_needles(run, tmp_path):
    """Numbers that depend on --sample_num, a question that always asks for the same depth."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    flags = ["--input-path", path, "--articles", 3, "--needles", 2]
    requests = run(*flags)
    assert requests[:3] == run(*flags, "--sample_num", 3) and requests != run(*flags, "--seed", 1)
    for i, request in enumerate(requests):
        hidden = dict(re.findall(r"The pass number of (\w+) is (\d+)\.", request["article"]))
        (asked,) = re.findall(
            r"\n\nWhat is the pass number of (\w+)\? Answer with the number alone\.\n$", request["article"]
        )
        assert list(hidden).index(asked) == i % 2 and hidden[asked] == request["summary_gt"]
        assert request["article"].startswith(f"Article 1: Article number {3 * i}.")
        assert re.fullmatch(rf"row {3 * i}, depth 0\.\d\d", request["id"]) and request["max_tokens"] == 16
    (alone, *_) = run("--input-path", path, "--needles", 1, "--max_tokens", 5)
    assert alone["article"].startswith("Article number 0. The pass number of") and alone["max_tokens"] == 5


@pytest.mark.parametrize("flags, said", [
    (["--articles", "13"], "--articles 13: there are 12 rows; give fewer, or more rows"),
    (["--needles", "17"], "--needles 17: must be at most 16"),
    (["--needles", "1", "--shots", "2"], "--shots 2: goes with neither --articles nor --needles"),
])  # fmt: skip
def test_long_prompts_that_cannot_be_made(prepare_data, tmp_path, capsys, flags, said):
    """A file without requests, or shots that are left out without a word."""
    path, output = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    assert prepare_data.main(["--input-path", str(path), "--output-path", str(output), *flags]) == 2
    assert said in capsys.readouterr().err and not output.exists()


def test_hub_shots_are_seeded_by_row(hub, run):
    """One generator for the whole file would make a row's shots depend on sample_num and on skipped rows."""
    splits, _ = hub
    splits["train"] = [{"document": f"Train {i}.", "summary": f"S {i}."} for i in range(50)]
    splits["test"] = [{"document": f"Test {i}.", "summary": f"S {i}."} for i in range(40)]
    requests = run("--shots", 5)
    assert requests == run("--shots", 5)
    assert requests[:4] == run("--shots", 5, "--sample_num", 4)
    assert len(run("--shots", 5, "--sample_num", 4000)) == 40
    splits["test"][0]["document"] = ""
    assert requests[1:] == run("--shots", 5)
    assert requests[1:] != run("--shots", 5, "--seed", 1)
    drawn = [shots_of(request) for request in requests]
    assert all(len(set(shots)) == 5 for shots in drawn)
    assert len({shot for shots in drawn for shot in shots}) > 40  # of 50: the whole train split is drawn from


def test_hub_shots_never_show_the_answer(hub, run):
    """With --split train a row could be drawn as its own shot; unusable train rows could leave an empty example."""
    splits, _ = hub
    usable = [{"document": f"Train {i}.", "summary": f"S {i}."} for i in range(4)]
    splits["train"] = [
        usable[0],
        {"document": " \n", "summary": "S."},
        *usable[1:],
        usable[1],
        {"document": "D.", "summary": None},
    ]
    requests = run("--shots", 3, "--split", "train")
    assert len(requests) == 5
    for request in requests:
        own = request["article"].split("###\nArticle: ")[-1].split("\n")[0]
        assert sorted([own, *shots_of(request)]) == [row["document"] for row in usable]


def test_fixed_shots_are_the_same_for_all(hub, run):
    """Shots in another order, which would share nothing; one that is asked for; those of another seed."""
    splits, _ = hub
    splits["train"] = [{"document": f"Train {i}.", "summary": f"S {i}."} for i in range(9)]
    splits["test"] = [{"document": f"T{'rain' if i < 4 else 'est'} {i}.", "summary": f"S {i}."} for i in range(8)]
    requests = run("--shots", 3, "--fixed_shots")
    (shots,) = {tuple(shots_of(request)) for request in requests}
    assert len(set(shots)) == 3 and set(shots) <= {f"Train {i}." for i in range(4, 9)}
    assert requests == run("--shots", 3, "--fixed_shots")
    assert {tuple(shots_of(run("--shots", 3, "--fixed_shots", "--seed", i)[0])) for i in range(5)} > {shots}


def test_fixed_local_shots(run, tmp_path):
    """Shots in an order of each request's own, or other rows set aside."""
    path = write(tmp_path / "in.jsonl", ROWS)
    fixed, drawn = run("--input-path", path, "--shots", 3, "--fixed_shots"), run("--input-path", path, "--shots", 3)
    assert len({tuple(shots_of(request)) for request in fixed}) == 1
    assert set(shots_of(fixed[0])) == set(shots_of(drawn[0]))
    assert [request["summary_gt"] for request in fixed] == [request["summary_gt"] for request in drawn]


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl", "json", "CSV"])
def test_local_formats(run, tmp_path, ending):
    rows = [
        {"id": 3, "article": 'A, "b"\nc.', "highlights": "NA"},
        {"id": 4, "article": "null", "highlights": "D .\nE ."},
    ]
    path = write(tmp_path / f"rows.{ending.lower()}", rows).rename(tmp_path / f"in [1] rows.{ending}")
    requests = run("--input-path", path, "--dataset", "cnn_dailymail")
    ask = "\n\nSummarize the above article in 3 sentences.\n"
    assert [request["article"] for request in requests] == [f'###\nArticle: A, "b" c.{ask}', f"###\nArticle: null{ask}"]
    assert [request["summary_gt"] for request in requests] == ["NA", "D . E ."]


@pytest.mark.parametrize(
    "columns, flags",
    [
        (("document", "summary"), []),
        (("article", "highlights"), []),
        (("body", "abstract"), ["--article_column", "body", "--summary_column", "abstract"]),
        (("document", "abstract"), ["--summary_column", "abstract"]),
    ],
)
def test_columns(run, tmp_path, columns, flags):
    path = write(tmp_path / "in.jsonl", [{columns[0]: "Text.", columns[1]: "Short.", "title": "T"}])
    (request,) = run("--input-path", path, *flags)
    assert request["article"] == "###\nArticle: Text.\n\nSummarize the above article in 1 sentence.\n"
    assert request["summary_gt"] == "Short."


def test_local_shots_are_no_requests(run, tmp_path):
    """A row that is shown as a shot and asked again, itself or as its copy, would be answered by copying."""
    path = write(tmp_path / "in.jsonl", ROWS + ROWS)
    requests = run("--input-path", path, "--shots", 3)
    shown = {shot for request in requests for shot in shots_of(request)}
    asked = [request["article"].split("###\nArticle: ")[-1].split("\n")[0] for request in requests]
    assert len(shown) == 3 and len(asked) == 18 and not shown & set(asked)
    assert {shots for request in requests if (shots := tuple(shots_of(request)))} > {tuple(shots_of(requests[0]))}
    assert requests == run("--input-path", path, "--shots", 3)
    assert requests[:5] == run("--input-path", path, "--shots", 3, "--sample_num", 5)
    reseeded = run("--input-path", path, "--shots", 3, "--seed", 1)
    assert shown != {shot for request in reseeded for shot in shots_of(request)}
    assert len(run("--input-path", write(tmp_path / "least.jsonl", ROWS[:4]), "--shots", 3)) == 1


def test_empty_rows_are_counted(prepare_data, capsys, tmp_path):
    empty = [{"article": "A.", "summary": None}, {"article": " \n", "summary": "S."}, {"article": "A."}]
    path = write(tmp_path / "in.jsonl", [ROWS[0], *empty, ROWS[1]])
    assert prepare_data.main(["--input-path", str(path), "--output-path", str(tmp_path / "out.jsonl")]) == 0
    captured = capsys.readouterr()
    assert captured.err == "skipped 3 rows with an empty article or summary\n"
    assert captured.out == f"wrote 2 requests to {tmp_path / 'out.jsonl'}\n"


def test_output_is_whole_or_untouched(prepare_data, run, tmp_path, monkeypatch):
    """A reader, or the next run, must never meet the first half of a file."""
    path, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    output.write_text("old\n")

    def fail(fields):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "request_line", fail)
        assert prepare_data.main(["--input-path", str(path), "--output-path", str(output), "--overwrite"]) == 130
    assert output.read_text() == "old\n"
    (tmp_path / "link.jsonl").symlink_to(output)
    assert len(run("--input-path", path, output=tmp_path / "link.jsonl")) == 12
    assert (tmp_path / "link.jsonl").is_symlink() and len(output.read_text().splitlines()) == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "in.jsonl", "link.jsonl", "out.jsonl"]


GOOD = '{"article": "A.", "summary": "S."}\n'
BAD_FILES = {
    "missing": ("none.csv", None, [], ["none.csv", "No such file"]),
    "empty": ("in.jsonl", "", [], ["in.jsonl", "empty"]),
    "blank": ("in.json", " \n\n", [], ["in.json", "empty"]),
    "ending": ("in.txt", GOOD, [], ["in.txt", "'.txt'", ".parquet, .csv, .jsonl, .json"]),
    "no ending": ("in", GOOD, [], ["unknown ending", ".parquet"]),
    "cut jsonl": ("in.jsonl", GOOD + GOOD[:20], [], ["in.jsonl", "JSON parse error", "well-formed .jsonl"]),
    "not json": ("in.json", "article", [], ["in.json", "well-formed .json"]),
    "no rows json": ("in.json", "[]", [], ["in.json", "at least one row"]),
    "ragged csv": ("in.csv", "article,summary\na,b\nc,d,e\n", [], ["in.csv", "line 3", "well-formed .csv"]),
    "shifted csv": ("in.csv", "article,summary\na,b,c\nd,e,f\n", [], ["in.csv", "Length of header"]),
    "open quote csv": ("in.csv", 'article,summary\n"a,b\nc,d\n', [], ["in.csv", "well-formed .csv"]),
    "no rows csv": ("in.csv", "article,summary\n", [], ["in.csv", "at least one row"]),
    "not parquet": ("in.parquet", "PAR0 and so on", [], ["in.parquet", "well-formed .parquet"]),
    "latin-1 csv": ("in.csv", b"article,summary\n\xe9,b\n", [], ["in.csv", "UTF-8", "well-formed .csv"]),
    "requests": (
        "in.jsonl",
        '{"article": "A.", "summary_gt": "S."}\n',
        [],
        ["in.jsonl", "article, summary_gt", "--summary_column"],
    ),
    "ambiguous": ("in.jsonl", '{"article": "A.", "document": "B.", "summary": "S."}\n', [], ["--article_column"]),
    "column": (
        "in.jsonl",
        GOOD,
        ["--article_column", "body"],
        ["in.jsonl", "body", "article, summary", "--article_column"],
    ),
    "numbers": ("in.jsonl", '{"article": 3, "summary": "S."}\n', [], ["column article", "int64", "--article_column"]),
    "mixed": ("in.jsonl", GOOD + '{"article": 3, "summary": "S."}\n', [], ["column article", "--article_column"]),
    "lists": ("in.jsonl", '{"article": ["A."], "summary": "S."}\n', [], ["column article", "--article_column"]),
    "nulls": ("in.jsonl", '{"article": "A.", "summary": null}\n', [], ["in.jsonl", "no row has both"]),
    "few rows": (
        "in.jsonl",
        GOOD * 5 + GOOD.replace("A.", "B."),
        ["--shots", "2"],
        ["in.jsonl", "--shots 2", "at least 3", "has 2"],
    ),
    "split": ("in.jsonl", GOOD, ["--split", "train"], ["--split train", "local file"]),
}
BAD_FLAGS = [
    (["--sample_num", "0"], ["--sample_num", "'0'"]),
    (["--sample_num", "many"], ["--sample_num", "many"]),
    (["--shots", "-1"], ["--shots", "'-1'"]),
    (["--max_tokens", "0"], ["--max_tokens", "'0'"]),
    (["--temperature", "nan"], ["--temperature=nan"]),
    (["--temperature", "1e-9"], ["--temperature=1e-09", "0.001"]),
    (["--dataset", "gigaword"], ["--dataset", "gigaword", "cnn_dailymail"]),
    (["--fixed_shots"], ["--fixed_shots", "--shots"]),
    (["--nonsense"], ["--nonsense", "--help"]),
]


@pytest.fixture
def fails(prepare_data, capsys, tmp_path):
    """Runs main, asserts status 2, one line on stderr that names everything in `says`, and no output left behind."""

    def fails(flags, says, output=tmp_path / "out" / "out.jsonl"):
        before = sorted(tmp_path.glob("out*"))
        assert prepare_data.main([*map(str, flags), "--output-path", str(output)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ")
        assert len(captured.err.splitlines()) == 1, captured.err
        assert not [part for part in says if part not in captured.err], captured.err
        assert sorted(tmp_path.glob("out*")) == before

    return fails


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(fails, tmp_path, case):
    name, content, flags, says = BAD_FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(["--input-path", tmp_path / name, *flags], says)


@pytest.mark.parametrize("flags, says", BAD_FLAGS)
def test_bad_flag(fails, flags, says):
    fails(flags, says)


def test_bad_paths(fails, prepare_data, capsys, tmp_path, monkeypatch):
    path = write(tmp_path / "in.jsonl", ROWS)
    (tmp_path / "folder.csv").mkdir()
    fails(["--input-path", tmp_path / "folder.csv"], ["folder.csv", "directory"])
    fails(["--input-path", path, "--overwrite"], ["folder.csv", "is a folder"], tmp_path / "folder.csv")
    fails(["--input-path", path, "--overwrite"], ["in.jsonl", "is the input"], path)
    fails(["--input-path", path], ["in.jsonl/out.jsonl", "cannot be written"], path / "out.jsonl")
    fails(["--input-path", path], ["--output-path", "a name of more than"], tmp_path / ("x" * 300))
    (tmp_path / "kept.jsonl").write_text("kept\n")
    fails(["--input-path", path], ["kept.jsonl", "--overwrite"], tmp_path / "kept.jsonl")
    assert (tmp_path / "kept.jsonl").read_text() == "kept\n"
    assert prepare_data.main(["--input-path", str(path)]) == 2
    assert "--output-path" in capsys.readouterr().err

    def denied(self, *args, **kwargs):  # root may read and write everything, so permissions cannot be tested with chmod
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prepare_data.Path, "open", denied)
    fails(["--input-path", path], ["in.jsonl", "Permission denied"])


def test_hub_out_of_reach(fails, monkeypatch):
    import datasets

    def load_dataset(*name, split):
        raise ConnectionError(f"Couldn't reach {name[0]!r}\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fails(["--dataset", "xsum"], ["EdinburghNLP/xsum", "Couldn't reach", "download the file elsewhere", "--input-path"])


def test_train_split_too_small(fails, hub, tmp_path):
    splits, _ = hub
    splits["test"] = [{"document": "D.", "summary": "S."}]
    splits["train"] = [{"document": "D.", "summary": "S."}, {"document": "E.", "summary": "S."}]
    (tmp_path / "out").mkdir()
    fails(["--shots", "3"], ["--shots 3", "only 1 rows"])
    assert not list((tmp_path / "out").iterdir())


def test_as_a_program(tmp_path):
    """The libraries' own log lines and progress bars must not add to the one line; nor may a traceback."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(SCRIPT), "--output-path", str(tmp_path / "out.jsonl")]
    hub = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (hub.returncode, hub.stdout, len(hub.stderr.splitlines())) == (2, "", 1), hub.stderr
    assert "EdinburghNLP/xsum" in hub.stderr and "--input-path" in hub.stderr
    (tmp_path / "in.jsonl").write_text(GOOD + GOOD[:20])
    command += ["--input-path", "in.jsonl"]
    cut = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (cut.returncode, cut.stdout, len(cut.stderr.splitlines())) == (2, "", 1), cut.stderr
    (tmp_path / "in.jsonl").write_text(GOOD)
    good = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (good.returncode, good.stdout, good.stderr) == (0, f"wrote 1 requests to {tmp_path / 'out.jsonl'}\n", "")
