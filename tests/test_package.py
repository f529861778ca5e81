"""One package under two names in a clone, and what its imports cost. scripts/test_wheel.sh tests what is installed."""

import importlib
import pickle
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import h2optimizer
from h2optimizer import commands

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(*argv, cwd=ROOT) -> str:
    """What Python prints."""
    ended = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("first, second", [("utils", "h2optimizer.utils"), ("h2optimizer.utils", "utils")])
def test_both_names_give_the_same_modules(first, second):
    """A cache that is no instance of HHCache, because its module was loaded a second time under another name."""
    code = f"""
import importlib, pickle
a, b = (importlib.import_module(name + ".requests") for name in ({first!r}, {second!r}))
assert a is b and a.__name__ == a.__spec__.name == "h2optimizer.utils.requests", (a, b)
from {first} import cli as a
from {second} import cli as b
import {first} as c, {second} as d
assert a is b and c is d
request = pickle.loads(pickle.dumps(a.InputError("bad")))
assert type(request) is b.InputError and importlib.reload(a) is b
"""
    python("-c", code)


def test_pickles_under_either_name():
    """Objects that another process cannot load, or loads as others."""
    old = importlib.import_module("utils.cli").InputError
    new = importlib.import_module("h2optimizer.utils.cli").InputError
    by_old_name = b"cutils.cli\nInputError\n."
    assert old is new is pickle.loads(by_old_name) and b"h2optimizer.utils.cli" in pickle.dumps(new)


def test_names_of_no_module():
    """A module that is said to exist where there is none."""
    code = """
import importlib.util, utils
for name in ("utils", "h2optimizer.utils"):
    assert importlib.util.find_spec(name + ".nothing") is None
    assert importlib.util.find_spec(name + ".cli").origin.endswith("cli.py")
"""
    python("-c", code)


@pytest.mark.parametrize("name", ["utils.rouge", "h2optimizer.utils.rouge"])
def test_modules_run_under_either_name(name):
    """A loader that cannot say what a module's code is, as python -m, runpy and debuggers ask."""
    assert python("-m", name) == ""


def test_both_names_at_once():
    """A thread that gets a second module, or waits for ever, while others import the same ones."""
    code = """
import importlib, sys, threading
modules = ["cli", "rouge", "requests", "figures", "results", "schedule"]
def load(*names):
    for name in names: importlib.import_module(name)
threads = [threading.Thread(target=load, args=["h2optimizer.utils." + module]) for module in modules]
threads.append(threading.Thread(target=load, args=["utils." + module for module in modules]))
sys.setswitchinterval(1e-6)
for thread in threads: thread.start()
for thread in threads: thread.join()
for module in modules:
    both = [importlib.import_module(f"{package}.{module}") for package in ("utils", "h2optimizer.utils")]
    assert both[0] is both[1] is getattr(importlib.import_module("utils"), module), module
    assert both[0].__spec__.name == "h2optimizer.utils." + module
"""
    python("-c", code)


def test_own_package_called_utils(tmp_path):
    """A user's `utils` that is hidden by this project's, or breaks it."""
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").write_text("OWN = True\n")
    (tmp_path / "utils" / "cache.py").write_text("OWN = True\n")
    code = f"""
import sys, utils
sys.path.append({str(ROOT)!r})
import h2optimizer.utils.cache, utils.cache
assert utils.OWN and utils.cache.OWN and h2optimizer.HHCache is h2optimizer.utils.cache.HHCache
"""
    python("-c", code, cwd=tmp_path)


def test_import_takes_no_time():
    """Seconds of torch's import before a program handles Ctrl-C."""
    code = "import sys, h2optimizer.utils.cli, h2optimizer.commands; print(*sys.modules)"
    slow = {"torch", "transformers", "numpy"}
    assert not slow & {name.split(".")[0] for name in python("-c", code).split()}


def test_exports():
    for name in h2optimizer.__all__:
        assert getattr(h2optimizer, name).__name__ == name and name in dir(h2optimizer)
    with pytest.raises(AttributeError, match="'h2optimizer' has no attribute 'nothing'"):
        h2optimizer.nothing  # noqa: B018


def test_each_command_has_its_program():
    """A program that cannot be started where the project is installed, or a command without one."""
    started = {}
    for command, entry in PROJECT["project"]["scripts"].items():
        module, name = entry.split(":")
        assert module == commands.__name__ and command == f"h2optimizer-{name.replace('_', '-')}"
        (started[name],) = getattr(commands, name).args
    programs = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    beside = {
        "kvpress_presses",
        "make_demo_data",
        "train_demo",
        "build_package",
    }  # started by another one, or of a clone only
    assert started == {"summarize": "run_summarization"} | {name: f"scripts.{name}" for name in programs - beside}


def test_extra_for_gguf_files():
    """An installation with the extra whose first GGUF file asks for one more package."""
    assert {"gguf", "accelerate"} <= set(PROJECT["project"]["optional-dependencies"]["gguf"])


def test_command_shows_its_own_name(monkeypatch, tmp_path, capsys):
    """A usage line that names a file which a user of the command does not have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/bin/h2optimizer-advise", "--help"])
    with pytest.raises(SystemExit, match="0"):
        commands.advise()
    assert capsys.readouterr().out.startswith("usage: h2optimizer-advise ")


def test_module_can_be_started(monkeypatch, capsys):
    """torchrun -m, for installed packages: what Python does for -m, in this process."""
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    monkeypatch.delitem(sys.modules, "h2optimizer.run_summarization", raising=False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("h2optimizer.run_summarization", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.startswith("usage: ")
