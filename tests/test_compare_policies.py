"""scripts/compare_policies.py as its user runs it, and scripts/kvpress_presses.py, which runs presses for it.

kvpress itself is not needed: a folder with another kvpress stands in for its environment.
"""

import json
import os
import re
import signal
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from checkpoints import make_checkpoint, make_requests, write_requests
from h2optimizer import H2OConfig
from h2optimizer.flags import DEMO_MODEL
from h2optimizer.utils.budgets import MeasuredBudgets, request_fingerprint
from h2optimizer.utils.cache import CACHE_ARGUMENT
from h2optimizer.utils.cli import InputError
from h2optimizer.utils.figures import spread
from h2optimizer.utils.policy_figure import draw_policies, label_of
from h2optimizer.utils.requests import read_requests
from h2optimizer.utils.results import PLAN
from h2optimizer.utils.rouge import mean_with_interval
from test_benchmarks import load

RUNNER = """
import json, sys
for line in sys.stdin:
    job = json.loads(line)
    for press, budget in job["cuts"]:
        result = {"request": job["request"], "press": press, "budget": budget}
        if press == "LagKV":
            result["error"] = "AssertionError: too short"
        else:
            tokens = len(job["text"]) - 1
            result |= {"tokens": tokens, "agreed": tokens - 1, "kl": 0.5 * tokens * (job["request"] + 1), "nll": 1.0}
            said = job["text"] if job["max_tokens"] else None
            result |= {"slots_kept": budget + tokens, "kv_bytes": 2**20, "said": said}
        print(json.dumps(result), flush=True)
    if STOP:
        sys.exit("ValueError: no more")
"""


@pytest.fixture(scope="module")
def script():
    return load("compare_policies")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A tiny checkpoint and four requests of 8 tokens."""
    folder = tmp_path_factory.mktemp("lab")
    requests = write_requests(folder / "requests.jsonl", make_requests(4, max_tokens=8))
    return SimpleNamespace(model=make_checkpoint(folder / "model"), requests=requests)


@pytest.fixture
def kvpress(script, tmp_path, monkeypatch):
    """kvpress(stop=False): a folder that looks like its environment, and a runner that gives known numbers."""

    def make(stop: bool = False) -> str:
        folder = tmp_path / "environment"
        for name, version in {"kvpress": "0.5", "transformers": "4.57"}.items():
            info = folder / f"{name}-{version}.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        runner = tmp_path / "runner.py"
        runner.write_text(RUNNER.replace("STOP", str(stop)))
        monkeypatch.setattr(script, "RUNNER", runner)
        return str(folder)

    return make


@pytest.fixture
def compared(script, lab, tmp_path, capsys, monkeypatch):
    """compared(*flags) runs the script on the lab; its status, stderr, table, lines and metrics."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def run(*flags, code=0):
        path = tmp_path / "out.jsonl"
        common = ["--model-name", str(lab.model), "--input-path", str(lab.requests), "--output-path", str(path)]
        assert script.main([*common, "--batch_size", "3", "--device", "cpu", "--window_length", "12", *flags]) == code
        said = capsys.readouterr()
        metrics = tmp_path / "out.metrics.json"
        return SimpleNamespace(
            err=said.err,
            errors=[line for line in said.err.splitlines() if line.startswith(("error", "left out", "interrupted"))],
            table=said.out.partition("\n\n")[0].splitlines(),
            lines=[json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [],
            rows=json.loads(metrics.read_text()).get("rows") if metrics.exists() else None,
            path=path,
        )

    return run


@pytest.fixture
def no_model(script, monkeypatch):
    monkeypatch.setattr(script, "load_model", lambda *args: pytest.fail("a model was loaded"))


def test_policies_beside_presses(compared, kvpress):
    """A press' numbers under another request, means that do not weigh by tokens, a window's meaning that is not said,
    rows that are not sorted by what they lose."""
    of = compared("--policies", "mass", "sink:4", "--kvpress", kvpress(), "--presses", "TOVA", "LagKV")
    rows = {row["policy"]: row for row in of.rows}
    assert next(iter(rows)) == "full cache" and len(of.rows) == 4 and len(of.lines) == 4 * 4
    losses = [row["kl"]["mean"] for row in of.rows]
    assert losses == sorted(losses) and losses[0] == 0.0 and losses[1] > 0.0
    tokens = [len(line["text"]) - 1 for line in of.lines if line["policy"] == "full cache"]
    kl = [0.5 * n * (i + 1) for i, n in enumerate(tokens)]
    tova = rows["kvpress TOVA"]
    assert tova["kl"] == mean_with_interval(kl, tokens) and tova["kl"]["mean"] == pytest.approx(sum(kl) / sum(tokens))
    assert tova["top1"]["mean"] == pytest.approx((sum(tokens) - 4) / sum(tokens))
    assert tova["window holds"] == "prompt" and rows["mass"]["window holds"] == "prompt + text"
    assert rows["mass"]["slots_kept"] == 12 < rows["full cache"]["slots_kept"]
    (error,) = of.errors
    assert re.fullmatch(r"left out: kvpress LagKV at 12: 0 of 4 requests \(request \d: Assert.*: too short\)", error)
    assert of.table[0].split()[:3] == ["policy", "window", "N"] and len(of.table) == 5


def test_whole_window_loses_nothing(compared):
    """Texts of another cache, or tokens that are fed a place too late."""
    of = compared("--window_length", "300", "--policies", "mass")
    full, ours = of.rows
    assert ours["kl"]["mean"] == pytest.approx(0.0, abs=1e-5) and ours["top1"]["mean"] == 1.0
    assert ours["slots_kept"] == full["slots_kept"]


def test_resuming_measures_what_is_missing(compared, kvpress, script, monkeypatch):
    """Figures measured twice, a model loaded for nothing, a press' failure that loses what others gave."""
    flags = ["--policies", "mass", "--presses", "TOVA", "Random", "--kvpress"]
    of = compared(*flags, kvpress(stop=True), code=2)
    assert "ended with status 1 (ValueError: no more)" in of.errors[0] and "are kept" in of.errors[0]
    measured = {line["index"] for line in of.lines}
    assert len(measured) == 4 + 4 + 2
    monkeypatch.setattr(script, "compare", lambda *args: pytest.fail("measured again"))
    whole = compared(*flags, kvpress())
    assert "10 of 16 results are there already" in whole.err and len(whole.lines) == 16
    assert measured < {line["index"] for line in whole.lines}
    monkeypatch.setattr(script, "load_model", lambda *args: pytest.fail("a model was loaded"))
    again = compared(*flags, kvpress())
    assert again.table == whole.table and again.lines == whole.lines


@pytest.mark.parametrize("flags", [["--max_tokens", "5"], ["--rouge"], ["--articles", "2"], ["--dtype", "bfloat16"]])
def test_other_settings_are_refused(compared, flags):
    """Results of other texts in one table; --overwrite is the way out."""
    before = compared("--policies", "mass")
    (error,) = compared("--policies", "mass", *flags, code=2).errors
    assert flags[0] in error or "--input-path" in error
    assert before.lines == compared("--policies", "mass").lines
    assert compared("--policies", "mass", *flags, "--overwrite").lines != before.lines


def test_rouge_of_own_texts(compared, kvpress):
    """ROUGE of the text that was fed: equal for every policy."""
    of = compared("--rouge", "--policies", "mass:0", "--presses", "TOVA", "--kvpress", kvpress())
    rows = {row["policy"]: row for row in of.rows}
    assert rows["kvpress TOVA"]["rouge1"] == rows["full cache"]["rouge1"]  # that runner says the full cache's text
    assert rows["mass:0"]["rouge1"] != rows["full cache"]["rouge1"]
    assert "ROUGE-2" in of.table[0]


def test_share_of_texts_that_hold_the_answer(compared, lab, tmp_path):
    """ROUGE of numbers, which longer answers lower, or another policy's texts that are searched."""
    flags = ["--rouge", "--policies", "mass:0", "--overwrite"]
    full = {line["request"]: line for line in compared(*flags).lines if line["window"] is None}
    said = AutoTokenizer.from_pretrained(lab.model)
    requests = make_requests(4, max_tokens=8)
    for i, request in enumerate(requests):
        words = re.findall(r"\w+", said.decode(full[i]["text"]))
        request["summary_gt"] = words[0] if i and words else "nowhere"
    other = write_requests(tmp_path / "answers.jsonl", requests)
    of = compared(*flags, "--input-path", str(other))
    found = {row["policy"]: row["found"]["mean"] for row in of.rows}
    assert found["full cache"] == 75.0 > found["mass:0"]
    assert "found %" in of.table[0] and "ROUGE-2" not in of.table[0]
    other = write_requests(other, [*requests[1:], requests[0] | {"summary_gt": "two words"}])
    assert "found %" not in compared(*flags, "--input-path", str(other)).table[0]


def test_8_bit_slots_beside_the_models_dtype(script):
    """Policies that run once only, or a policy's own slots that are overruled."""
    assert script.with_slots("mass:3/4", ["auto", "int8"]) == ["mass:3/4", "mass:3/4,slots=int8"]
    assert script.with_slots("mass,slots=int8", None) == ["mass,slots=int8"]
    with pytest.raises(InputError, match="names its own slots"):
        script.with_slots("mass,slots=int8", ["auto"])
    cells = script.cells_of(script.parse_args(["--slots", "auto", "int8"]), torch.device("cpu"))
    assert [(cell.label, cell.h2o.slots) for cell in cells[1:]][::3] == [("mass", "auto"), ("mass,slots=int8", "int8")]


def test_figure(compared, kvpress, script, monkeypatch, tmp_path):
    """Results measured again for a figure; lines that miss a policy or a press, or figures that no program opens."""
    pytest.importorskip("matplotlib")
    flags = ["--window_length", "8", "12", "--policies", "mass", "sink:4", "--presses", "TOVA", "--kvpress", kvpress()]
    rows = compared(*flags).rows
    monkeypatch.setattr(script, "load_model", lambda *args: pytest.fail("a model was loaded"))
    figures = {name: tmp_path / "figures" / name for name in ("kl.png", "kl.svg", "kl.pdf")}
    for path in figures.values():
        compared(*flags, "--figure", str(path))
    for name, start in {"kl.png": b"\x89PNG", "kl.svg": b"<?xml", "kl.pdf": b"%PDF"}.items():
        assert figures[name].read_bytes().startswith(start)
    (ax,) = draw_policies(rows, "tiny").axes
    labels = {text.get_text(): text for text in ax.texts}
    assert {"mass", "sink:4", "kvpress TOVA", "8", "12"} <= set(labels)
    for bars in ax.containers:
        x, y = bars.lines[0].get_data()
        policy = next(name for name, text in labels.items() if text.get_color() == bars.lines[0].get_color())
        of = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["window"])
        assert list(x) == [row["kv_bytes"] / 2**20 for row in of] and list(y) == [row["kl"]["mean"] for row in of]
        spans = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
        assert spans == [pytest.approx([row["kl"]["low"], row["kl"]["high"]]) for row in of]


def test_bytes_of_tiny_caches(script):
    """Ticks of seven digits."""
    kl = {"mean": 1.0, "low": 0.9, "high": 1.1}
    rows = [
        {"policy": "mass", "window": window, "N": 1, "window holds": "prompt + text", "requests": 2, "kl": kl}
        | {"kv_bytes": window * 512.0}
        for window in (16, 64)
    ]
    (ax,) = draw_policies(rows, "tiny").axes
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert "0.0156" in labels and max(map(len, labels)) <= 7


def test_labels_of_lines():
    """A label that is a path, or two lines of one name; labels that lie on one another or in another order."""
    assert label_of("value_mass:3/4,head_budgets=/tmp/a/plan.json", 16, True) == (
        "value_mass:3/4, head_budgets=plan.json, N = 16"
    )
    assert label_of("mass", 1, False) == "mass" and label_of("kvpress TOVA", None, True) == "kvpress TOVA"
    heights = spread([0.99, 0.5, 0.98, 0.1], 0.1, 0.0, 1.0)
    assert heights == pytest.approx([1.0, 0.5, 0.9, 0.1])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--figure", "kl.txt"], "argument --figure: kl.txt: must end in .png, .svg, .pdf"),
        (["--policies", "mas"], "--policies mas: argument --score"),
        (["--policies", "mass,heavy=3"], "--policies mass,heavy=3: unrecognized argument"),
        (["--policies", "mass,num_window_length=8"], "pass --window_length 8"),
        (["--policies", "mass:12"], "--policies mass:12: --num_heavy_hitter_tokens"),
        (["--policies", "mass,head_budgets=none.json"], "--head_budgets none.json: cannot be read"),
        (["--policies", f"mass,head_budgets={DEMO_MODEL / PLAN}"], "budgets for 5 layers of 4 KV heads, but the model"),
        (["--policies"], "none given"),
        (["--presses", "TOVA"], "pass --kvpress"),
        (["--kvpress", "/nonexistent"], "kvpress is not installed there"),
        (["--articles", "9"], "--articles 9"),
    ],
)
def test_bad_flags(compared, no_model, flags, words):
    """A traceback, or a line that comes after a model was loaded."""
    (error,) = compared(*flags, code=2).errors
    assert words in error


def test_plan_that_saw_the_requests(compared, lab, tmp_path):
    """A plan judged on its own texts without a word, also where --max_tokens changes the requests."""
    requests, _ = read_requests(lab.requests, None, None)
    plan = MeasuredBudgets(
        widths=(4, 8),
        losses=(((1.0, 0.5), (0.1, 0.0)), ((0.1, 0.1), (0.2, 0.0))),
        texts=tuple(map(request_fingerprint, requests[:3])),
    )
    plan.save(tmp_path / "plan.json")
    policy = f"mass,head_budgets={tmp_path / 'plan.json'}"
    of = compared("--policies", "mass", policy, "--max_tokens", "5")
    (warning,) = [line for line in of.err.splitlines() if line.startswith("warning")]
    assert "plan.json was measured on 3 of these 4 requests; a plan is no fair test on its own texts" in warning
    rows = {row["policy"]: row for row in of.rows}
    assert rows[policy]["slots_kept"] == rows["mass"]["slots_kept"] == 12
    assert rows[policy]["kl"] != rows["mass"]["kl"]


def test_interruption_ends_the_runner(compared, kvpress, script, tmp_path):
    """A runner that goes on after Ctrl-C with nobody to read it."""
    folder = kvpress()
    script.RUNNER.write_text(
        "import os, signal, time\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)\n"
    )
    of = compared("--policies", "mass", "--presses", "TOVA", "--kvpress", folder, code=128 + signal.SIGTERM)
    assert "run the same command again to resume" in of.errors[0] and len(of.lines) == 8
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# Presses


@dataclass
class Newest:
    """A press that keeps the newest of each layer's slots; with `steps`, one less in each layer."""

    compression_ratio: float
    steps: int = 0

    def __call__(self, model):
        press, hooks = self, []

        def cut(module, args, kwargs, output):
            layer = kwargs[CACHE_ARGUMENT].layers[module.layer_idx]
            kept = int(layer.keys.shape[2] * (1 - press.compression_ratio)) - press.steps * module.layer_idx
            layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]

        class Cutting:
            def __enter__(self):
                hooks.extend(
                    layer.self_attn.register_forward_hook(cut, with_kwargs=True) for layer in model.model.layers
                )

            def __exit__(self, *error):
                for hook in hooks:
                    hook.remove()

        return Cutting()


@pytest.fixture
def runner(monkeypatch):
    """The runner over a kvpress whose presses keep the newest slots, PyramidKV with fewer in later layers."""
    monkeypatch.setitem(sys.modules, "datasets", None)  # restored when the runner's stand-ins go
    monkeypatch.setitem(sys.modules, "fire", None)
    presses = types.ModuleType("kvpress")
    presses.TOVAPress = Newest
    presses.PyramidKVPress = lambda compression_ratio: Newest(compression_ratio, steps=1)
    monkeypatch.setitem(sys.modules, "kvpress", presses)
    return load("kvpress_presses")


def test_runner_and_script_name_the_same_presses(script, runner):
    assert tuple(runner.PRESSES) == script.PRESSES


@pytest.mark.parametrize("name, kept", [("TOVA", (12, 12)), ("PyramidKV", (12, 11))])
def test_press_by_hand(runner, lab, name, kept):
    """A text that begins at another position than after the prompt, a budget that loses a slot to rounding, and a mask
    by the first layer's length, which lets shorter layers see what comes later."""
    model = LlamaForCausalLM.from_pretrained(lab.model, dtype=torch.float32).eval()
    prompt, text = list(range(5, 36)), [40, 41, 42, 43]
    job = {"request": 0, "prompt": prompt, "text": text, "cuts": [[name, 12], [name, 31]]}
    with torch.inference_mode():
        wanted = model(torch.tensor([prompt + text])).logits[0, 31:-1].double().log_softmax(-1)
        job |= {"max_tokens": 3, "eos": [], "nll": -sum(wanted[i, text[i + 1]].item() for i in range(3))}
        cut, whole = runner.results(model, job)
        got = token_by_token(model, prompt, text[:-1], kept).double().log_softmax(-1)
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert cut["kl"] == pytest.approx((wanted.exp() * (wanted - got)).sum().item(), rel=1e-4)
    assert cut["agreed"] == (wanted.argmax(-1) == got.argmax(-1)).sum()
    assert cut["nll"] == pytest.approx(-sum(got[i, text[i + 1]].item() for i in range(3)), rel=1e-4)
    assert (cut["tokens"], cut["slots_kept"]) == (3, 3 + sum(kept) / 2)
    assert cut["kv_bytes"] == 2 * 4 * 2 * 8 * (sum(kept) + 6)  # K and V, float32, two heads of 8
    assert whole["kl"] == pytest.approx(0.0, abs=1e-5) and whole["agreed"] == 3
    assert whole["said"] == greedy[0, 31:].tolist() and cut["said"][0] == whole["said"][0]


def token_by_token(model, prompt: list[int], text: list[int], kept: tuple[int, ...]) -> torch.Tensor:
    """Logits after each text token over the newest slots of the prompt in each layer, one token a step."""
    cache = model(torch.tensor([prompt])).past_key_values
    for layer, slots in zip(cache.layers, kept, strict=True):
        layer.keys, layer.values = layer.keys[:, :, -slots:], layer.values[:, :, -slots:]
    logits = []
    for place, token in enumerate(text, len(prompt)):
        inputs = {"position_ids": torch.tensor([[place]]), CACHE_ARGUMENT: cache}
        logits.append(model(torch.tensor([[token]]), **inputs).logits[0, -1])
    return torch.stack(logits)


def test_press_that_fails(runner, lab):
    """One press that ends all."""
    model = LlamaForCausalLM.from_pretrained(lab.model).eval()
    job = {"request": 2, "prompt": list(range(20)), "text": [1, 2], "max_tokens": 0, "eos": []}
    with torch.inference_mode():
        logits = model(torch.tensor([job["prompt"] + [1]])).logits[0, -1]
        job["nll"] = -logits.log_softmax(-1)[2].item()
        failed, done = runner.results(model, job | {"cuts": [["KeyDiff", 8], ["TOVA", 8]]})
    assert "AttributeError" in failed["error"] and failed["press"] == "KeyDiff" and failed["budget"] == 8
    assert done["tokens"] == 1 and done["said"] is None


def test_checkpoint_that_is_read_in_another_way(runner, lab):
    """A table of presses on another model: an older transformers that misses a setting takes its default."""
    model = LlamaForCausalLM.from_pretrained(lab.model).eval()
    job = {"request": 0, "prompt": list(range(20)), "text": [1, 2], "max_tokens": 0, "eos": [], "nll": -1.0}
    with torch.inference_mode():
        (refused,) = runner.results(model, job | {"cuts": [["TOVA", 8]]})
    assert "reads the checkpoint in another way" in refused["error"] and "kl" not in refused
    llama3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    config = runner.with_old_names(SimpleNamespace(rope_parameters=llama3, rope_theta=1e4, rope_scaling=None))
    assert config.rope_theta == 5e5 and config.rope_scaling == {"rope_type": "llama3", "factor": 8.0}
    plain = SimpleNamespace(rope_parameters={"rope_theta": 1e5, "rope_type": "default"}, rope_scaling=None)
    assert runner.with_old_names(plain).rope_theta == 1e5 and plain.rope_scaling is None
    older = SimpleNamespace(rope_theta=1e6)
    assert runner.with_old_names(older).rope_theta == 1e6


def test_label_is_the_policy(script):
    """Settings that do not reach the cache, or two windows under one name."""
    cells = [script.Cell("mass", w, H2OConfig(window_length=w)) for w in (12, 16)]
    assert len({cell.name for cell in cells} | {script.Cell("full cache").name}) == 3
    h2o = script.config_of("sink:4,no-score_every_step", 12, 2, torch.device("cpu"))
    assert (h2o.score, h2o.num_heavy_hitters, h2o.score_every_step, h2o.update_interval) == ("sink", 4, False, 2)
