"""utils/cli.py: what every program's flags, paths, streams and signals do at their edges."""

import argparse
import ast
import gc
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from tqdm import tqdm

from h2optimizer.utils import cli
from h2optimizer.utils.requests import json_object, read_lines, read_requests, read_text

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.name for path in (ROOT / "scripts").glob("*.py")} - {"build_package.py"}  # which setuptools runs
PROGRAMS = ["run_summarization.py", *(f"scripts/{name}" for name in sorted(SCRIPTS))]


def load(program: str):
    """A program's names, without running it."""
    spec = importlib.util.spec_from_file_location(f"edges_of_{Path(program).stem}", ROOT / program)
    sys.modules[spec.name] = loaded = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(loaded)
    return loaded


def error_of(capsys) -> str:
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# Every program


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_goes_through_run(program):
    """A program that ends in its own way at Ctrl-C, a closed pipe or a full device, or in a traceback while it imports
    what is slow."""
    tree = ast.parse((ROOT / program).read_text())
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    calls = [ast.unparse(node.func) for node in ast.walk(main) if isinstance(node, ast.Call)]
    assert "cli.run" in calls
    imported = []
    for node in tree.body:
        if isinstance(node, ast.If) and "cli.begin()" in ast.unparse(node):
            break
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported += [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
    else:
        pytest.fail("cli.begin() is not called")
    packages = {name.split(".")[0] for name in imported}
    assert packages <= sys.stdlib_module_names | {"h2optimizer"} and imported[-1] == "h2optimizer.utils"


@pytest.fixture(scope="module")
def programs():
    return {program: load(program) for program in PROGRAMS if program != "scripts/eval_harness.py"}


ASKED = {"scripts/prepare_data.py": ["--output-path", "out.jsonl"], "scripts/plot_ablation.py": ["--input-path", "x"]}


def test_slip_of_the_finger_is_answered_with_the_nearest_flag(programs, capsys):
    """A list of thirty flags to search, or a flag that is taken for another by its beginning."""
    for program, loaded in programs.items():
        assert loaded.main(["--hepl"]) == 2, program
        assert "unrecognized argument --hepl; did you mean --help?" in error_of(capsys)
    slips = {
        "run_summarization.py": "--batch_sise --batch-sise=2 -batch_size --num_window_lenght --outputpath",
        "scripts/prepare_data.py": "--output-pth --sample_mun --temprature",
        "scripts/advise.py": "--windw_length=3 --modelname",
    }
    for program, flags in slips.items():
        for flag in flags.split():
            assert programs[program].main([flag]) == 2
            assert "did you mean --" in error_of(capsys)


def test_text_that_is_no_utf8_in_a_flag(programs, capsys):
    """Bytes of another encoding, which end in a traceback wherever they are printed, hashed or saved."""
    for program, loaded in programs.items():
        assert loaded.main(["--output-path", os.fsdecode(b"caf\xe9.jsonl")]) == 2, program
        assert cli.NOT_TEXT in error_of(capsys)


def closed_pipe() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


full_device = partial(open, "/dev/full", "w")
FULL = "error: the standard output cannot be written (No space left on device); redirect it\n"


@pytest.mark.parametrize("opened, status, said", [(closed_pipe, 141, ""), (full_device, 2, FULL)])
def test_help_that_cannot_be_printed(programs, monkeypatch, capsys, opened, status, said):
    """Exit status 120 and `Exception ignored`, from the interpreter's end."""
    for program, loaded in programs.items():
        with opened() as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert loaded.main(["--help"]) == status, program
            stdout.flush()  # as the interpreter does at its end
        assert capsys.readouterr().err == said


OUTPUTS = {
    "run_summarization.py": "--output-path",
    "scripts/ablate.py": "--output-path",
    "scripts/make_demo_data.py": "--output_path",
    "scripts/plot_ablation.py": "--output-path",
    "scripts/prepare_data.py": "--output-path",
    "scripts/run_streaming.py": "--report",
    "scripts/train_demo.py": "--output",
}


@pytest.mark.parametrize("path, words", {
    "/dev/stdout": "/dev/stdout is", "/dev/null": "/dev/null is", "/dev/new.jsonl": "is in /dev",
    "out.jsonl.gz": "leave out .gz", "out.ZST": "leave out .ZST", "": "''", "n" * 250: "more than 200 bytes",
    "new\nline/x.xz": r"new\nline/x.xz would not be compressed",
}.items())  # fmt: skip
def test_output_that_is_no_place_for_results(programs, monkeypatch, tmp_path, capsys, path, words):
    """Hours of work for a device, or for a file whose name says that it is compressed."""
    monkeypatch.chdir(tmp_path)
    for program, flag in OUTPUTS.items():
        assert programs[program].main([f"{flag}={path}"]) == 2
        line = error_of(capsys)
        assert words in line and flag.replace("output_path", "output-path") in line, (program, line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["new/", ".", "..", "folder", "a/.."])
def test_output_file_that_is_a_folder(tmp_path, monkeypatch, path):
    """`--output-path new/`, whose slash pathlib forgets, and results in a file called new."""
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder"):
        cli.output_file(path)


def test_outputs_that_can_be_written(tmp_path, monkeypatch):
    """A check that refuses what works."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("")
    (tmp_path / "link").symlink_to("not_there.jsonl")
    for path in ("out.jsonl", "a/b/c", "there.jsonl", "link", "/dev/shm/out.jsonl", "gz", "caf\xe9.jsonl", "dev/x"):
        assert cli.output_file(path) == Path(path)
    for path in ("figures", "new/", ".", str(tmp_path)):
        assert cli.output_folder(path) == Path(path)


@pytest.mark.parametrize("program, same, argv", [
    ("run_summarization.py", "num_window_length", ["--num-window-length", "32"]),
    ("run_summarization.py", "num_window_length", ["--num_window-length=32"]),
    ("run_summarization.py", "enable_position_rolling", ["--no_enable_position-rolling"]),
    ("run_summarization.py", "output_path", ["--output_path=a_b-c"]),
    ("scripts/ablate.py", "window_length", ["--num-window-length", "32", "64"]),
    ("scripts/bench_decode.py", "static", ["--no_static"]),
    ("scripts/advise.py", "model_name", ["--model_name", "a_b"]),
])  # fmt: skip
def test_dashes_and_underscores_are_the_same(programs, program, same, argv):
    """A flag that one program spells --output-path and the user --output_path; values keep theirs."""
    expected = {"num_window_length": 32, "enable_position_rolling": False, "output_path": Path("a_b-c"),
                "window_length": [32, 64], "static": False, "model_name": "a_b"}  # fmt: skip
    assert getattr(programs[program].parse_args(argv), same) == expected[same]


def test_help_names_a_flag_once(programs, capsys):
    """Both spellings of thirty flags."""
    for program, loaded in programs.items():
        with pytest.raises(SystemExit, match="0"):
            loaded.parse_args([*ASKED.get(program, []), "--help"])
        shown = capsys.readouterr().out.split("\n\n", 1)[1]
        flags = [line.split()[0].rstrip(",") for line in shown.splitlines() if line.startswith("  --")]
        plain = [flag.replace("_", "-") for flag in flags]
        assert flags and len(set(plain)) == len(plain), program


@pytest.mark.parametrize("kind, text, value", [
    (cli.count, "12", 12), (cli.count, "0", None), (cli.count, "-1", None), (cli.count, "9" * 5000, None),
    (cli.count, "1e3", None), (cli.count, str(10**13), None), (cli.count_or_zero, "0", 0),
    (cli.count_or_zero, "-1", None), (cli.count_or_auto, "auto", "auto"), (cli.count_or_auto, "all", None),
    (cli.count_or_all, "3", 3), (cli.seed, "0", 0), (cli.seed, str(2**32), None), (cli.seed, "x", None),
    (cli.positive, "nan", None), (cli.positive, "inf", None), (cli.positive, "0", None), (cli.positive, "1e-3", 1e-3),
    (cli.counts, "1,2", [1, 2]), (cli.counts, "", []), (cli.counts, "1,", None),
    (cli.sizes("a", "b"), "1x2,3x4", [(1, 2), (3, 4)]), (cli.sizes("a"), "1x2", None), (cli.sizes("a"), "0", None),
])  # fmt: skip
def test_argument_types(kind, text, value):
    """ValueErrors of int, which argparse answers with the name of a function; numbers that no one can have meant."""
    if value is not None:
        assert kind(text) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert "must be" in str(error.value) and len(str(error.value)) < 250


# Streams


@pytest.mark.parametrize("text, said", {
    "a\nb": r"a\nb", "a\r\x1b[2Jb": r"a\r\x1b[2Jb", "a\u2028b": r"a\u2028b", "a\udcffb": r"a\udcffb",
    "café, 日本語, …": "café, 日本語, …",
}.items())  # fmt: skip
def test_error_is_one_line(capsys, text, said):
    """A newline in a path, which splits an error in two; a terminal that a file name repaints."""

    def work():
        raise cli.InputError(f"--input-path {text}: cannot be read")

    assert cli.run(work, "x") == 2
    assert capsys.readouterr().err == f"error: --input-path {said}: cannot be read\n"


@pytest.mark.parametrize("opened", [closed_pipe, full_device])
@pytest.mark.parametrize("draw", [
    lambda: list(tqdm(range(3), mininterval=0)), lambda: tqdm.write("a", file=sys.stderr), lambda: cli.say("a"),
    lambda: print("a", file=sys.stderr, flush=True),
], ids=["bar", "bar's write", "say", "print"])  # fmt: skip
def test_stderr_that_takes_nothing_never_stops_the_work(monkeypatch, capsys, opened, draw):
    """A progress bar that cannot be drawn, and the night's work with it."""

    def work():
        for _ in range(3):
            draw()
        print("done")

    with opened() as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert cli.run(work, "x") == 0
        stderr.flush()  # as the interpreter does at its end
    assert capsys.readouterr().out == "done\n"


def test_closed_standard_streams(monkeypatch):
    """`>&- 2>&-`, which Python says by None: print(file=None) would write messages to the standard output."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.run(lambda: (print("a"), cli.say("b"), list(tqdm(range(2))))[0], "x") == 0
    assert sys.stdout is None and sys.stderr is None


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("opened, status, said", [(closed_pipe, 141, ""), (full_device, 2, FULL)])
def test_stdout_that_takes_nothing(monkeypatch, capsys, opened, status, said, flush):
    """A traceback of BrokenPipeError under `| head`; what is said while the program ends, which fails once more."""
    ended = []

    def work():
        try:
            print("a", flush=flush)
        finally:
            print("b", flush=flush)
            ended.append(True)

    with opened() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.run(work, "x") == status and ended
        stdout.flush()
    assert capsys.readouterr().err == said


def test_other_full_device_is_not_taken_for_stdout():
    """A bug, or a file that nobody has guarded, said to be the standard output's."""
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w") as full:
        cli.run(lambda: print("a", file=full, flush=True), "x")
        with suppress(OSError):
            full.close()


def test_files_are_closed_when_the_work_has_failed():
    """A lock that a failed run keeps, so that the next one in the same process is refused."""

    class File:
        """As a JsonlFile, closed when nothing refers to it."""

    def work():
        file = File()
        held.append(weakref.ref(file))
        try:
            raise OSError
        except OSError:
            raise cli.InputError("x") from None

    held = []
    gc.disable()
    try:
        assert cli.run(work, "x") == 2 and held[0]() is None
    finally:
        gc.enable()


# Signals


@pytest.fixture(autouse=True)
def heard():
    """Tests that were started in the background of a shell script have inherited an ignored Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_work_in_one_line(capsys, signum, status):
    """SIGTERM that loses what was held; the second one of `timeout`, which cuts off what is still written."""
    held = []

    def work():
        try:
            signal.raise_signal(signum)
        finally:
            signal.raise_signal(signum)
            held.append("written")

    before = [signal.getsignal(number) for number in cli.STOPPING]
    assert cli.run(work, "it is kept") == status and held
    assert capsys.readouterr().err == "interrupted: it is kept\n"
    assert [signal.getsignal(number) for number in cli.STOPPING] == before


def test_signal_that_was_to_be_ignored(monkeypatch):
    """nohup, and a background job of a shell script, end at Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli.run(lambda: signal.raise_signal(signal.SIGINT), "x") == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_pool_that_ends_its_workers_by_sigterm(capfd):
    """Tracebacks of forked workers, which inherit what the program does at SIGTERM."""

    def work():
        if (child := os.fork()) == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM

    assert cli.run(work, "x") == 0
    assert not capfd.readouterr().err


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_imports(signum, status):
    """A traceback through torch's import, of a user who has seen a wrong flag."""
    code = (
        "from h2optimizer.utils import cli; cli.begin(); print('importing', flush=True); import time; time.sleep(600)"
    )
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    try:
        program.stdout.readline()
        program.send_signal(signum)
        _, stderr = program.communicate(timeout=600)
    finally:
        program.kill()
    assert (program.returncode, stderr) == (status, "interrupted\n")


def test_file_does_not_take_the_number_of_a_closed_stream(tmp_path):
    """`2>&-`: the results get number 2, and the libraries' messages stand among them."""
    code = "from h2optimizer.utils import cli; cli.begin(); import sys; print(open(sys.argv[1], 'w').fileno())"
    command = f'"{sys.executable}" -c "{code}" {tmp_path / "results"} 2>&-'
    assert int(subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, check=True).stdout) > 2


# Inputs


def test_line_without_an_end(tmp_path):
    """A line of 100 MB that is parsed for minutes; one without an end, which takes all memory."""
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    for endless in (path, Path("/dev/zero")):
        for read in (read_requests, lambda path: list(read_lines(path, "--flag"))):
            with pytest.raises(cli.InputError, match=r"line 1: longer than 16 MiB; give"):
                read(endless)
        with pytest.raises(cli.InputError, match="larger than 16 MiB"):
            read_text(endless, "--grid")


LINE = json.dumps({"article": "a", "summary_gt": "b", "prompt": "c"})
NO_TEXT = {
    "utf-16": LINE.encode("utf-16"), "without a mark": LINE.encode("utf-16-le"), "latin-1": b'{"prompt": "\xe9"}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}', "half as a key": b'{"\\udc80": 1}', "binary": bytes(range(256)),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TEXT)
def test_line_that_is_no_text(name):
    """Four messages for the same fault, or a traceback where the text is printed."""
    with pytest.raises(ValueError, match=cli.NOT_TEXT):
        json_object(NO_TEXT[name])


INPUTS = {
    "run_summarization.py": ["--input-path"], "scripts/ablate.py": ["--input-path", "--grid"],
    "scripts/plot_ablation.py": ["--input-path"], "scripts/prepare_data.py": ["--output-path=o --input-path"],
    "scripts/run_streaming.py": ["--input-path", "--report=r.jsonl --beside"], "scripts/train_demo.py": ["--requests"],
}  # fmt: skip


@pytest.mark.parametrize("content", ["missing", "folder", "empty", "binary", "utf-16", "new\nline"])
def test_input_that_cannot_be_read(programs, tmp_path, monkeypatch, capsys, content):
    """A traceback out of one of the readers."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"{content}.jsonl"
    if content == "folder":
        path.mkdir()
    elif content not in ("missing", "new\nline"):
        path.write_bytes({"empty": b"", "binary": os.urandom(500), "utf-16": LINE.encode("utf-16")}[content])
    for program, flags in INPUTS.items():
        for flag in flags:
            assert programs[program].main([*flag.split(), path.name]) == 2, (program, flag)
            line = error_of(capsys)
            assert path.stem.replace("\n", r"\n") in line, line
            if content == "utf-16" and "beside" not in flag and program != "scripts/plot_ablation.py":
                assert cli.NOT_TEXT in line
    assert not [left for left in tmp_path.iterdir() if left.name != path.name]


def test_prepared_requests_are_those_that_run(programs, tmp_path, monkeypatch, capsys):
    """A file of requests that the next program refuses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"document": "A bridge.", "summary": "Bridge."}\n')
    for flags in ("--temperature 1e-9", "--temperature nan", "--temperature 1e9"):
        argv = ["--input-path", "in.jsonl", "--output-path", "out.jsonl", *flags.split()]
        assert programs["scripts/prepare_data.py"].main(argv) == 2
        assert "--temperature" in error_of(capsys) and not (tmp_path / "out.jsonl").exists()


def test_flags_of_one_meaning_have_one_error(programs, capsys):
    """--temperature 1e-9 that two programs explain in two ways."""
    said = set()
    for program in ("scripts/prepare_data.py", "scripts/run_streaming.py"):
        assert programs[program].main([*ASKED.get(program, []), "--temperature", "1e-9"]) == 2
        said.add(error_of(capsys))
    assert len(said) == 1
    said = set()
    for program, loaded in programs.items():
        assert loaded.main([*ASKED.get(program, []), "--seed", "-1"]) == 2
        if "unrecognized" not in (line := error_of(capsys)):
            said.add(line)
    assert len(said) == 1


# Scripts of the shell


def test_shell_scripts_go_through_run():
    """A traceback of the table that a shell script prints, under `| head`."""
    for script in ("demo.sh", "reproduce_h2o_table.sh"):
        text = (ROOT / "scripts" / script).read_text()
        assert text.count("<<'PY'") == text.count("cli.run(") == 1, script
