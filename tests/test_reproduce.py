"""scripts/reproduce_h2o_table.sh on a tiny model and two requests: the table, and what goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import make_checkpoint, make_requests, write_requests

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "reproduce_h2o_table.sh"
MODEL = "Meta-Llama-3-8B"  # a name that has published figures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    (folder / MODEL).mkdir()
    make_checkpoint(folder / MODEL)
    write_requests(folder / "requests.jsonl", make_requests(2, max_tokens=8, temperature=0.3))
    return folder


@pytest.fixture(scope="module")
def reproduce(folder):
    """Runs the script on models in the folder, on the CPU, with this interpreter: nothing is set up or downloaded."""

    def reproduce(*models, **variables):
        environment = {**os.environ, "PYTHON_BIN": sys.executable, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environment |= {"OUT": str(folder / "out"), "REQUESTS_FILE": str(folder / "requests.jsonl"), **variables}
        command = ["bash", str(SCRIPT), *(str(folder / model) for model in models)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return reproduce


def test_table(reproduce, folder):
    """A budget that runs under another, an interval other than 1, a difference that is taken from the wrong row; an
    error that is swallowed, or that takes the table away."""
    done = reproduce(MODEL, "nowhere", BUDGETS="64 full")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: --model-name ") and "nowhere" in last and "nowhere" not in done.stdout
    lines = done.stdout.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.split()[:1] in (["64"], ["full"])}
    for budget, published in (("64", 11.07), ("full", 13.11)):
        (path,) = folder.glob(f"out/*{MODEL}/{budget}.metrics.json")
        metrics = json.loads(path.read_text())
        ours, settings = 100 * metrics["rouge"]["rouge2"]["mean"], metrics["settings"]
        assert rows[budget][1] == "2" and rows[budget][3] == f"{ours:.2f}"
        assert rows[budget][-2:] == [f"{published:.2f}", f"{ours - published:+.2f}"]
        h2o = (settings.get("--num_window_length"), settings.get("--update_interval"))
        assert h2o == ((None, None) if budget == "full" else (int(budget), 1))
    assert "rouge package" in done.stdout and "temperature 0.3, top_p 1, seed 42" in done.stdout
    again = reproduce(MODEL, BUDGETS="64 40")  # goes on; a budget without a published figure
    assert again.returncode == 0 and "2 of 2 results are there already" in again.stderr
    rows = {line.split()[0]: line.split() for line in again.stdout.splitlines() if line[:2].isdigit()}
    assert rows["40"][-2:] == ["-", "-"] and rows["64"] == next(line.split() for line in lines if line[:2] == "64")


@pytest.mark.parametrize("variables, says", [
    ({"REQUESTS_FILE": "/nowhere.jsonl"}, "--input-path /nowhere.jsonl"),
    ({"BUDGETS": " "}, "BUDGETS"),
    ({"BUDGETS": "64 1k"}, "BUDGETS: 1k"),
])  # fmt: skip
def test_bad_input_takes_one_line(reproduce, variables, says):
    """A wrong file, for which another one is downloaded, or a status of 0 with no table."""
    failed = reproduce(MODEL, OUT="/nowhere", **variables)
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert (failed.returncode, failed.stdout, len(errors)) == (2, "", 1) and says in errors[0]
    assert "Traceback" not in failed.stderr
