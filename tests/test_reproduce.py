"""scripts/reproduce_h2o_table.sh on a tiny model and two requests: the table, and what goes wrong."""

import json
import os
import runpy
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import rouge_score.rouge_scorer  # noqa: F401

import run_summarization  # noqa: F401
from checkpoints import make_checkpoint, make_requests, write_requests
from forks import Fork, leave_with

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "reproduce_h2o_table.sh"
MODEL = "Meta-Llama-3-8B"  # a name that has published figures
OFFLINE = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


# What the script takes for an interpreter: Python's scripts run in forks of a fork of the tests, which have imported
# everything. That takes longer than all else here.
CLIENT = """#!{python}
import json, os, socket, sys
if sys.argv[1] == "-":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    socket.send_fds(connection, [json.dumps([os.getcwd(), sys.argv[1:]]).encode()], [0, 1, 2])
    sys.exit(int(connection.recv(16)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    (folder / MODEL).mkdir()
    make_checkpoint(folder / MODEL)
    write_requests(folder / "requests.jsonl", make_requests(2, max_tokens=8, temperature=0.3))
    return folder


def serve(server: socket.socket, parent: int) -> None:
    """Runs the scripts that clients ask for, one after the other, as long as the tests run."""
    os.environ |= OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    server.settimeout(1)
    while os.getppid() == parent:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        connection.setblocking(True)
        data, files, *_ = socket.recv_fds(connection, 2**16, 3)
        if not (child := os.fork()):
            for to, of in enumerate(files):
                os.dup2(of, to)
            leave_with(partial(run_script, *json.loads(data)))
        connection.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        for of in (connection.detach(), *files):
            os.close(of)


def run_script(folder: str, argv: list[str]) -> None:
    os.chdir(folder)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


@pytest.fixture(scope="module")
def imported(folder):
    """Path of a program that takes an interpreter's place."""
    address, client = str(folder / "socket"), folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    parent = os.getpid()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        fork = Fork(lambda fork: serve(server, parent), folder)
    yield str(client)
    fork.kill()


@pytest.fixture(scope="module")
def reproduce(folder, imported):
    """Runs the script on models in the folder, on the CPU: nothing is set up or downloaded."""

    def reproduce(*models, **variables):
        environment = {**os.environ, **OFFLINE, "PYTHON_BIN": imported}
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
    assert again.returncode == 0 and "2 of 2 results exist already" in again.stderr
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
