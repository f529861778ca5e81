"""h2optimizer/settings.py: the cache's settings beside a checkpoint, and which of them a program takes."""

import json
import os
from fractions import Fraction

import pytest
import torch
from transformers import AutoModelForCausalLM

import run_summarization
from conftest import make_llamas, prompt
from h2optimizer import H2OConfig, H2OLlamaForCausalLM, settings
from h2optimizer.flags import h2o_config
from h2optimizer.settings import SavedSettings
from h2optimizer.utils.cli import InputError
from h2optimizer.utils.results import SETTINGS, checkpoint_fingerprint

TABLE = ((40, 24), (20, 44))
SAVED = H2OConfig(window_length=32, num_heavy_hitters="3/4", head_budgets=TABLE, score="value_mass", score_decay=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder that `save_pretrained` wrote, with the settings SAVED."""
    folder, model = tmp_path_factory.mktemp("saved"), make_llamas().h2o
    model.h2o = SAVED
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of `checkpoint`, whose settings a test may change."""
    for file in checkpoint.iterdir():
        os.link(file, tmp_path / file.name)
    settings = (tmp_path / SETTINGS).read_text()
    (tmp_path / SETTINGS).unlink()
    (tmp_path / SETTINGS).write_text(settings)
    return tmp_path


def program(folder, flags: str, said: list | None = None) -> H2OConfig | None:
    """What a program makes of its command line."""
    args = run_summarization.parse_args(["--model-name", str(folder), *flags.split()])
    return h2o_config(args, say=(said if said is not None else []).append)


def test_settings_travel_with_a_checkpoint(checkpoint):
    """Budgets that are lost with the file of the plan, or a share that becomes a number."""
    assert H2OLlamaForCausalLM.from_pretrained(checkpoint).h2o == SAVED
    assert H2OLlamaForCausalLM.from_pretrained(str(checkpoint), h2o=H2OConfig()).h2o == H2OConfig()
    assert "score" not in (checkpoint / "config.json").read_text()


def test_checkpoint_stays_plain(checkpoint):
    """Stock transformers that stumbles over the file, or weights that count as others because of it."""
    ids = torch.tensor([prompt(9)])
    stock = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(stock).__module__.startswith("transformers.")
    model = H2OLlamaForCausalLM.from_pretrained(checkpoint, h2o=H2OConfig(window_length=64))
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=1e-5, rtol=1e-5)


def test_settings_are_no_part_of_the_weights(copied):
    """A plan of head budgets that is refused because its checkpoint was saved with other settings."""
    before = checkpoint_fingerprint(copied)
    (copied / SETTINGS).write_text("{}")
    assert checkpoint_fingerprint(copied) == before is not None


def test_share_as_a_fraction(tmp_path):
    """A value that JSON has no form for."""
    model = make_llamas().h2o
    model.h2o = H2OConfig(num_heavy_hitters=Fraction(1, 4))
    model.save_pretrained(tmp_path)
    assert H2OLlamaForCausalLM.from_pretrained(tmp_path).h2o.heavy == 64


def test_only_the_main_process_writes(tmp_path):
    """Several processes that replace one file at a time."""
    make_llamas().h2o.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / SETTINGS).exists()


def test_subfolder(checkpoint, tmp_path):
    """Settings of the folder above."""
    (tmp_path / "inner").symlink_to(checkpoint)
    assert H2OLlamaForCausalLM.from_pretrained(tmp_path, subfolder="inner").h2o == SAVED


def test_checkpoint_of_one_file(checkpoint):
    """Settings that are not looked for beside a GGUF file, or a hub that is asked for it."""
    assert SavedSettings.find(checkpoint / "model.safetensors").config(H2OConfig) == SAVED


def test_plan_beside_the_file(copied):
    """A relative path that is looked for where the program was started."""
    (copied / "plan.json").write_text(json.dumps({"windows": [[5, 3], [2, 6]]}))
    settings = {"window_length": 24, "num_heavy_hitters": 16, "head_budgets": "plan.json"}
    (copied / SETTINGS).write_text(json.dumps(settings))
    windows = H2OLlamaForCausalLM.from_pretrained(copied).h2o.head_budgets
    assert windows[0][0] > windows[0][1] and windows[1][0] < windows[1][1]


def test_flags_win_field_by_field(checkpoint):
    """A flag that is ignored, or that drops the other settings of the file."""
    said = []
    h2o = program(checkpoint, "--enable_h2o_generation --update_interval 4 --score mass", said)
    assert (h2o.update_interval, h2o.score) == (4, "mass")
    assert (h2o.window_length, h2o.head_budgets, h2o.score_decay) == (32, TABLE, 0.5)
    (line,) = said
    assert str(checkpoint / SETTINGS) in line and "window_length=32" in line and "score_decay=0.5" in line
    assert line.endswith("not from there: --update_interval, --score")


def test_full_cache_reads_no_settings(checkpoint):
    said = []
    assert program(checkpoint, "", said) is None and not said


def test_budgets_for_another_window(checkpoint):
    """A traceback, or a table that silently no longer has the mean of the window."""
    with pytest.raises(
        InputError, match=rf"{SETTINGS}: head_budgets: .*with --num_window_length given, give --head_budgets too"
    ):
        program(checkpoint, "--enable_h2o_generation --num_window_length 64")
    h2o = program(checkpoint, "--enable_h2o_generation --num_window_length 64 --head_budgets even")
    assert (h2o.window_length, h2o.head_budgets, h2o.score) == (64, "even", "value_mass")


@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.symlink("nowhere", path)], ids=["folder", "dangling link"])
def test_file_that_cannot_be_read(copied, make):
    """Settings that are there and yet ignored without a word."""
    (copied / SETTINGS).unlink()
    make(copied / SETTINGS)
    with pytest.raises(InputError, match=rf"^{copied / SETTINGS}: not settings of a cache \((Is a|No such)"):
        program(copied, "--enable_h2o_generation")


@pytest.mark.parametrize("flags, words", {
    "--num_window_length 20": "num_heavy_hitters=30: .*; with --num_window_length given, give --num_heavy_hitter_t",
    "--num_heavy_hitter_tokens 8 --slimming mask": r"leave out head_budgets, .*\(with .* and --slimming given\)",
}.items())  # fmt: skip
def test_flags_and_settings_that_do_not_go_together(copied, flags, words):
    """A message that blames the flag, or the file, alone."""
    budgets = {} if "slimming" not in flags else {"head_budgets": TABLE}
    (copied / SETTINGS).write_text(json.dumps({"window_length": 32, "num_heavy_hitters": 30} | budgets))
    with pytest.raises(InputError, match=f"^{copied / SETTINGS}: .*{words}"):
        program(copied, f"--enable_h2o_generation {flags}")


@pytest.mark.parametrize("budgets, words", {
    "table": "budgets for 3 layers of 2 KV heads, but the model has 2", "plan": "measured on another model",
}.items())  # fmt: skip
def test_saved_budgets_of_another_model(copied, budgets, words):
    """A plan that another model's weights were measured for, or a checkpoint that is said to be damaged."""
    plan = {"widths": [4, 8], "losses": [[[1, 0.5]] * 2] * 2, "model": "other", "weights": "0" * 16}
    (copied / "plan.json").write_text(json.dumps(plan))
    saved = [[32, 32]] * 3 if budgets == "table" else "plan.json"
    (copied / SETTINGS).write_text(json.dumps({"window_length": 32, "head_budgets": saved}))
    with pytest.raises(InputError, match=f"^{copied}/.*: {words}.*, or give --head_budgets even$"):
        program(copied, "--enable_h2o_generation")
    assert program(copied, "--enable_h2o_generation --head_budgets even").head_budgets == "even"


def test_plan_that_settings_name_is_no_part_of_the_weights(copied):
    """A plan that makes its own checkpoint another one."""
    before = checkpoint_fingerprint(copied)
    plan = {"widths": [4, 8], "losses": [[[1, 0.5]] * 2] * 2, "model": "this", "weights": before[:16]}
    (copied / "plan.json").write_text(json.dumps(plan))
    (copied / SETTINGS).write_text(json.dumps({"window_length": 32, "head_budgets": "plan.json"}))
    assert checkpoint_fingerprint(copied) == before
    assert program(copied, "--enable_h2o_generation").head_budgets != "even"


def test_names_of_no_file(monkeypatch):
    """A traceback for a name that is too long, or a wait for a hub that is asked for the path of a file."""
    monkeypatch.setattr(settings, "cached_file", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    assert SavedSettings.find("folder/model.gguf") is None
    monkeypatch.setattr(settings, "cached_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no such name")))
    assert SavedSettings.find("x" * 300) is None and SavedSettings.find("") is None
    assert checkpoint_fingerprint("x" * 300) is None


def test_bad_flag_beside_good_settings(checkpoint):
    """A message that blames the file."""
    with pytest.raises(InputError, match=r"^--update_interval=0: must be a whole number"):
        program(checkpoint, "--enable_h2o_generation --update_interval 0")


@pytest.mark.parametrize("content, words", {
    "{": "not JSON", "[]": "not a JSON object", '{"windw": 3}': "'windw' is not a field", '{"score": 3}': "score=3",
    '{"window_length": "x"}': "window_length='x'", '{"head_budgets": "no.json"}': "no.json: cannot be read",
    '{"head_budgets": null}': "head_budgets: None", '{"capture": 1}': "capture=1",
    '{"head_budgets": [[256, 256]]}': "budgets for 1 layers of 2 KV heads, but the model has 2 layers of 2 KV heads",
}.items())  # fmt: skip
def test_bad_file_is_named_with_its_field(copied, content, words):
    """A traceback, or a message that leaves the reader to search for the file."""
    (copied / SETTINGS).write_text(content)
    for load in (H2OLlamaForCausalLM.from_pretrained, lambda folder: program(folder, "--enable_h2o_generation")):
        with pytest.raises((ValueError, InputError)) as error:
            load(copied)
        assert str(error.value).startswith(f"{copied / SETTINGS}: ") and words in str(error.value)
        assert "\n" not in str(error.value)
