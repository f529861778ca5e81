"""scripts/reproduce_h2o_table.sh on the bundled model and two requests: the table, going on, and what goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import run_summarization

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "reproduce_h2o_table.sh"
MODEL = "Meta-Llama-3-8B"  # a name that has published figures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    (folder / MODEL).symlink_to(run_summarization.DEMO_MODEL)
    return folder


@pytest.fixture(scope="module")
def reproduce(folder):
    """Runs the script on models in the folder, on the CPU, with this interpreter: nothing is set up or downloaded."""

    def reproduce(*models, **variables):
        environment = {**os.environ, "PYTHON_BIN": sys.executable, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environment |= {"OUT": str(folder / "out"), "REQUESTS_FILE": str(run_summarization.DEMO_REQUESTS)}
        environment |= {"REQUESTS": "2", **variables}
        command = ["bash", str(SCRIPT), *(str(folder / model) for model in models)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return reproduce


@pytest.fixture(scope="module")
def first(reproduce):
    return reproduce(MODEL, BUDGETS="64 40 full")


def results(folder, budget):
    (path,) = folder.glob(f"out/*{MODEL}/{budget}.jsonl")
    return path


def test_table(first, folder):
    """A budget that runs under another, an interval other than 1, or a difference that is taken from the wrong row."""
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.split()[:1] in (["64"], ["40"], ["full"])}
    for budget, published in (("64", 11.07), ("40", None), ("full", 13.11)):
        metrics = json.loads(results(folder, budget).with_suffix(".metrics.json").read_text())
        ours, settings = 100 * metrics["rouge"]["rouge2"]["mean"], metrics["settings"]
        expected = [f"{published:.2f}", f"{ours - published:+.2f}"] if published else ["-", "-"]
        assert rows[budget][1] == "2" and rows[budget][3] == f"{ours:.2f}" and rows[budget][-2:] == expected
        h2o = (settings.get("--num_window_length"), settings.get("--update_interval"))
        assert h2o == ((None, None) if budget == "full" else (int(budget), 1))
    assert "rouge package" in first.stdout and "temperature 0.3, top_p 1, seed 42" in first.stdout


def test_goes_on_and_keeps_what_is_there_when_a_model_is_wrong(first, reproduce, folder):
    """A second run that computes anew, an error that is swallowed, or a table that one wrong model takes away."""
    before = results(folder, "64").read_bytes()
    again = reproduce(MODEL, "nowhere", BUDGETS="64")
    assert again.returncode == 2
    assert "2 of 2 results are there already" in again.stderr
    last = again.stderr.splitlines()[-1]
    assert last.startswith("error: --model-name ") and "nowhere" in last
    row = next(line for line in first.stdout.splitlines() if line.startswith("64 "))
    assert row in again.stdout.splitlines() and "nowhere" not in again.stdout
    assert results(folder, "64").read_bytes() == before


@pytest.mark.parametrize("variables, says", [
    ({"REQUESTS_FILE": "/nowhere.jsonl"}, "--input-path /nowhere.jsonl"),
    ({"BUDGETS": " "}, "BUDGETS"),
])  # fmt: skip
def test_bad_input_takes_one_line(reproduce, variables, says):
    """A wrong file, for which another one is downloaded, or a status of 0 with no table."""
    failed = reproduce(MODEL, OUT="/nowhere", **variables)
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert (failed.returncode, failed.stdout, len(errors)) == (2, "", 1) and says in errors[0]
    assert "Traceback" not in failed.stderr
