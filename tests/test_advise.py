"""scripts/advise.py: its predictions beside what was measured, its break-even points from both sides, one line for
every wrong flag."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import make_llamas, prompt
from h2optimizer import H2OConfig
from h2optimizer.flags import DEMO_MODEL
from h2optimizer.utils.cache import HHCache
from h2optimizer.utils.costs import held_weights, read_weights, row_held, row_read, slot_bytes, slots_read, weight_flops
from test_benchmarks import load

FULL, H2O = "full cache", "H2O"
DEMO_PLAN = DEMO_MODEL / "head_budgets.json"

# Measured on one NVIDIA H200 with the 8b shape, window 1,024, N = 16, after 32k tokens: milliseconds a step, largest
# batches. scripts/README.md, "Decode": the tables of steps alone and of the largest batches.
STEPS = [
    (H2O, 1, 4.24),
    (H2O, 256, 14.57),
    (H2O, 920, 47.6),
    (FULL, 29, 36.0),  # appended to in place
]
LARGEST = {FULL: 29, H2O: 921}
# The same GPU and shape, but bound by the host, or copying the cache to append to it: (tokens before, batch, ms) of
# stock Llama and of peers. They do not compare, but a prediction above them would be wrong.
STOCK = [
    (32768, 1, 18.3),  # static cache, generate
    (32768, 1, 23.1),  # DynamicCache, generate
    (32768, 29, 109.0),  # DynamicCache
    (2048, 1, 8.2),  # static cache, generate
    (1024, 1, 6.2),  # static cache of 1,088 slots, the compiled forward alone
    (2048, 256, 122.6),  # in place, eager
]


@pytest.fixture(scope="module")
def script():
    return load("advise")


@pytest.fixture
def advise(script, capsys):
    """Runs the script with --json; returns what it says."""

    def advise(*flags):
        assert script.main([*map(str, flags), "--json"]) == 0
        return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return advise


def row(report, cache, batch):
    (found,) = (r for r in report["rows"] if (r["cache"], r["batch"]) == (cache, batch))
    return found


@pytest.mark.parametrize("cache, batch, measured", STEPS)
def test_measured_steps_lie_in_the_stated_band(advise, cache, batch, measured):
    """A byte counted twice, a unit mixed up, or matrices whose multiplication is forgotten: the band is what the
    script tells its readers, 1.0 to 1.2 times `ms`; the datasheet's floor is below all."""
    report = advise("--context", 32768, "--batch", batch, "--new_tokens", 66)
    predicted = row(report, cache, batch)
    assert 0.97 < measured / predicted["ms"] < 1.25
    assert predicted["floor_ms"] < predicted["ms"]
    assert predicted["tokens_per_s"] == pytest.approx(1e3 * batch / predicted["ms"])


def test_largest_batches_are_those_that_fitted(advise):
    """Memory in GB for GiB, weights without the embedding, or slots without their mass and positions."""
    rows = advise("--context", 32768, "--new_tokens", 66)["rows"]
    for cache, measured in LARGEST.items():
        assert next(r["largest"] for r in rows if r["cache"] == cache) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("context, batch, measured", STOCK)
def test_nothing_was_faster_than_the_full_caches_prediction(advise, context, batch, measured):
    """A bound that a real step undercuts."""
    assert row(advise("--context", context, "--batch", batch), FULL, batch)["ms"] < measured


def test_verdicts(advise):
    """A gain where weights are nearly all that is read, where nothing is evicted, or where nothing fits."""
    no_gain = advise("--context", 2048)
    assert no_gain["verdict"] == "no gain" and "weights are 98%" in no_gain["reason"]
    for context, tokens, reason in (1000, 25, "nothing is evicted"), (1024, 64, "window holds the whole prompt"):
        report = advise("--context", context, "--new_tokens", tokens)
        assert report["verdict"] == "no gain" and reason in report["reason"]
    assert advise("--context", 1000, "--new_tokens", 25)["pays_from_batch"] is None
    assert "nothing is evicted" not in advise("--context", 1000, "--new_tokens", 26)["reason"]
    gain = advise("--context", 32768, "--batch", 16)
    assert gain["verdict"] == "gain" and "shorter" in gain["reason"]
    only_h2o = advise("--context", 32768, "--batch", 30)
    assert only_h2o["verdict"] == "gain" and "not with the full cache, which fits 29" in only_h2o["reason"]
    assert row(only_h2o, FULL, 30)["fits"] == "no" and row(only_h2o, H2O, 30)["fits"] == "yes"
    neither = advise("--context", 32768, "--batch", 5000)
    assert neither["verdict"] == "does not fit" and neither["pays_from_context"] is None
    long = advise("--context", 32768, "--window_length", 30000, "--update_interval", 5000, "--batch", 29)
    assert long["verdict"] == "no gain" and "--num_window_length" in long["reason"]


@pytest.mark.parametrize("flags", [
    ("--context", 2048),
    ("--context", 4096, "--batch", 4, "--gpu", "a100-40", "--window_length", 512, "--update_interval", 1),
    ("--context", 1100, "--batch", 300),  # multiplying bounds the weights: rows no longer add to the gain
    ("--context", 2048, "--gpu", "L4", "--weight_bits", 4, "--gain", 0.3),
    ("--context", 600, "--new_tokens", 4000, "--batch", 8, "--gpu", "RTX 5090"),
    ("--context", 2048, "--shape", "tiny", "--window_length", 64),
], ids=str)  # fmt: skip
def test_break_even_points_from_both_sides(advise, flags):
    """A search that stops beside the point, or one that a verdict which wavers leads astray."""
    report = advise(*flags)
    assert report["pays_from_batch"] and report["pays_from_context"]
    for flag, point in ("--batch", report["pays_from_batch"]), ("--context", report["pays_from_context"]):
        assert advise(*flags, flag, point)["verdict"] == "gain"
        if point > 1:
            assert advise(*flags, flag, point - 1)["verdict"] == "no gain"
            assert advise(*flags, flag, max(1, point // 2))["verdict"] == "no gain"
    assert advise(*flags, "--context", 2 * report["pays_from_context"])["verdict"] == "gain"


def test_gain_is_where_the_steps_are_that_much_shorter(advise):
    """A threshold that is taken of the wrong step, or not at all."""
    report = advise("--context", 32768)
    shorter = 1 - row(report, H2O, 1)["ms"] / row(report, FULL, 1)["ms"]
    assert advise("--context", 32768, "--gain", shorter - 0.001)["verdict"] == "gain"
    assert advise("--context", 32768, "--gain", shorter + 0.001)["verdict"] == "no gain"


@pytest.mark.parametrize("flags", [(), ("--context", 2048, "--gpus", 2), ("--bandwidth", 3, "--memory", 80)], ids=str)
def test_words_and_json_say_the_same(script, advise, capsys, flags):
    """JSON behind a table for people, or words around JSON for programs; figures of one that the other lacks."""
    report = advise(*flags)
    assert script.main([*map(str, flags)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"{report['verdict']}: {report['reason']}" and "{" not in out
    assert f"pays from batch: {report['pays_from_batch']}, at this context" in lines
    header = next(i for i, line in enumerate(lines) if line.startswith("cache "))
    table = [re.split("  +", line) for line in lines[header : header + 1 + len(report["rows"])]]
    for shown, row in zip(table[1:], report["rows"], strict=True):
        assert dict(zip(table[0], shown, strict=True))["tokens_per_s"] == f"{row['tokens_per_s']:,.0f}"
    assert lines[header + len(table)] == ""


CONFIGS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_counts_are_those_of_a_model_that_ran(config):
    """KV heads taken for query heads, hidden_size / heads for head_dim, a tied head that is not read, a bias left out,
    or memory that the cache does not have."""
    model = make_llamas(**config).h2o
    heads, head_dim = model.config.num_key_value_heads, config.get("head_dim", 16)
    assert slot_bytes(model.config, 4) == 2 * 2 * heads * head_dim * 4
    assert row_read(model.config, 4, 20, 1) == 21 * slot_bytes(model.config, 4)

    model.h2o = H2OConfig(window_length=8, update_interval=2)
    cache = HHCache(model.h2o)
    with torch.no_grad():
        model(torch.tensor([prompt(20)]), past_key_values=cache)
    others = 8 * model.config.vocab_size + 4 * heads * (8 + 1)  # logits, and what slimming picks
    assert row_held(model.config, 4, 20, model.h2o) == cache.nbytes + others

    embedding = model.config.vocab_size * 64
    attention, bias = 64 * 4 * head_dim * 2 + 64 * heads * head_dim * 2, (4 + 2 * heads) * head_dim + 64
    matrices = 2 * (attention + 3 * 64 * 128)
    others = 5 * 64 + ("attention_bias" in config) * 2 * bias
    assert read_weights(model) == 4 * (matrices + embedding + others)
    assert held_weights(model) == 4 * (matrices + (1 if "tie_word_embeddings" in config else 2) * embedding + others)
    assert weight_flops(model) == 2 * (matrices + embedding)
    stock = LlamaForCausalLM(model.config)  # whose projections stand apart
    assert held_weights(stock, 4) == held_weights(stock) - matrices * 4 + matrices // 2


@pytest.mark.parametrize("window, interval", [(16, 4), (16, 1), (5, 7), (40, 3)])
def test_slots_are_counted_as_they_come(window, interval):
    """A closed form that forgets the first steps of a prompt shorter than the window, or a last part of an interval."""
    h2o = H2OConfig(window_length=window, update_interval=interval)
    for tokens in range(1, 50):
        length, slots = min(tokens, window), []
        for step in range(1, 30):
            slots.append(length := length + 1)
            if step % interval == 0:
                length = min(length, window)
            assert slots_read(tokens, step, h2o) == sum(slots) / step


def test_sliding_layers_hold_what_they_see(advise, script, capsys, checkpoint):
    """A gain over tokens that the full cache does not hold either; a window that no program would run."""
    mistral = {"model_type": "mistral", "sliding_window": 1000}
    flags = ("--model-name", checkpoint(**mistral), "--num_window_length", 900, "--new_tokens", 2, "--context")
    reads = [row(advise(*flags, context), FULL, 1)["cache_GB"] for context in (400, 999, 5000)]
    assert reads[1] == reads[2] == pytest.approx(reads[0] * 1000 / 401)
    mixed = mistral | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
    slides = ["full_attention", "sliding_attention"]
    checkpoint(**mixed, layer_types=slides)  # the same folder
    assert row(advise(*flags, 5000), FULL, 1)["cache_GB"] == pytest.approx(reads[0] * (5001 + 1000) / 2 / 401)
    wide = ("--model-name", checkpoint(**mistral), "--num_window_length", 985)
    fails(script, capsys, wide, ("its attention slides over 1000 tokens, fewer than window_length=985",))


PLAN = {"windows": [[12, 2, 3, 3], [4, 8, 4, 4]]}


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    return tmp_path / "plan.json"


@pytest.mark.parametrize("score", ["mass", "value_mass"])
def test_bytes_of_a_plan_are_those_that_a_cache_holds(plan, score):
    """Heads padded to the longest, or the norms of values left out."""
    model = make_llamas(num_key_value_heads=4).h2o
    model.h2o = H2OConfig(window_length=8, update_interval=2, score=score, head_budgets=str(plan))
    cache = HHCache(model.h2o)
    with torch.no_grad():
        model(torch.tensor([prompt(20)]), past_key_values=cache)
    picked = max(sum(layer) for layer in model.h2o.head_budgets) + 4 * 2  # one layer at a time
    assert row_held(model.config, 4, 20, model.h2o) == cache.nbytes + 8 * model.config.vocab_size + 4 * picked


def test_plan_is_advised_on_like_even_budgets(advise, script, capsys, checkpoint, plan):
    """A plan that is ignored: heads whose window holds the prompt do not fill it, and read less than the mean."""
    flags = ("--model-name", checkpoint(num_key_value_heads=4), "--context", 40, "--num_window_length", 32)
    even, uneven = advise(*flags), advise(*flags, "--head_budgets", plan)
    assert even["head_budgets"] is None
    found = uneven["head_budgets"]
    assert found["plan"] == str(plan) and found["smallest"] < 32 < 40 < found["largest"]
    assert row(uneven, H2O, 1)["cache_GB"] < row(even, H2O, 1)["cache_GB"]
    assert row(uneven, H2O, 1)["held_GiB"] == pytest.approx(row(even, H2O, 1)["held_GiB"], rel=1e-3)
    short = ("--context", found["smallest"] + 1, "--new_tokens", 2)
    assert "nothing is evicted: the window" in advise(*flags, *short)["reason"]
    assert "nothing is evicted" not in advise(*flags, "--head_budgets", plan, *short)["reason"]
    assert script.main([*map(str, flags), "--head_budgets", str(plan)]) == 0
    assert f"{plan}: windows of {found['smallest']} to {found['largest']} slots" in capsys.readouterr().out


def test_of_several_gpus_the_one_with_most_slots_counts(script, plan):
    """Rows that fit on average, but not where the heads that remember lie."""
    h2o = H2OConfig(window_length=8, update_interval=2, num_heavy_hitters=7, head_budgets=str(plan))
    heads = [sum(layer[head] + 2 for layer in h2o.head_budgets) for head in range(4)]
    assert script.largest_part(h2o, 1) == 1
    assert script.largest_part(h2o, 2) == (heads[0] + heads[1]) / sum(heads) > 0.5
    assert script.largest_part(H2OConfig(), 2) == script.largest_part(None, 2) == 0.5


def test_plan_from_shorter_prompts_is_warned_of(script, capsys):
    """Advice that leaves out that a plan saves less there; a warning on prompts like the plan's own."""
    flags = ["--model-name", str(DEMO_MODEL), "--head_budgets", str(DEMO_PLAN), "--num_window_length", "128"]
    for context, warned in ("1000", False), ("1900", True):
        assert script.main([*flags, "--context", context]) == 0
        assert ("measured on prompts of 898 tokens" in capsys.readouterr().out) == warned


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with nothing but a config."""

    def checkpoint(**fields):
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        ).to_dict()
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"} | fields))
        return tmp_path

    return checkpoint


def test_dtype_comes_from_the_config(advise, checkpoint):
    """A bf16 checkpoint that is taken for float32, or a flag that does not overrule it."""
    weights = {}
    for dtype in "bfloat16", "float32", None:
        report = advise("--model-name", checkpoint(dtype=dtype), "--context", 2048)
        weights[dtype] = report["rows"][0]["weights_GB"]
    assert weights["float32"] == 2 * weights["bfloat16"] and weights[None] == weights["bfloat16"]
    report = advise("--model-name", checkpoint(dtype="float32"), "--dtype", "float16")
    assert report["rows"][0]["weights_GB"] == weights["bfloat16"]


def fails(script, capsys, flags, says):
    assert script.main([str(flag) for flag in flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not [part for part in says if part not in captured.err], captured.err


@pytest.mark.parametrize("flags, says", [
    (("--gpu", "V100"), ("--gpu", "H100 SXM", "--bandwidth")),
    (("--gpu", "h100"), ("--gpu", "H100 SXM, H100 PCIe, H100 NVL")),
    (("--gpu", ""), ("--gpu",)),
    (("--bandwidth", "3"), ("--bandwidth", "--memory", "--gpu")),
    (("--tflops", "900"), ("--tflops", "--gpu")),
    (("--memory", "0"), ("--memory",)),
    (("--memory", "8"), ("--memory", "--gpu")),
    (("--bandwidth", "3350", "--memory", "80"), ("--bandwidth 3350", "between")),
    (("--memory", "8", "--gpu", "h200"), ("weights alone need 15.0 of 7.6 usable GiB", "--weight_bits 4")),
    (("--memory", "15.8", "--gpu", "h200", "--window_length", "9000"), ("weights alone need", "--num_window_length")),
    (("--context", "0"), ("--context",)),
    (("--context", "9" * 30), ("--context", "at most")),
    (("--batch", "1.5"), ("--batch",)),
    (("--new_tokens", "1"), ("--new_tokens 1", "prefill")),
    (("--window_length", "1"), ("--num_window_length",)),
    (("--num_window_length", "9" * 30), ("--num_window_length", "below 2**31")),
    (("--score", "nonsense"), ("--score",)),
    (("--head_budgets", "/nowhere.json"), ("--head_budgets /nowhere.json", "calibrate.py")),
    (("--head_budgets", str(DEMO_PLAN)), ("5 layers of 4 KV heads", "the model has 32 layers of 8 KV heads")),
    (("--update_interval", "0"), ("--update_interval",)),
    (("--weight_bits", "3"), ("--weight_bits",)),
    (("--share", "1.1"), ("--share",)),
    (("--gain", "1"), ("--gain",)),
    (("--gpus", "3"), ("--gpus 3", "8 KV heads")),
    (("--shape", "7b"), ("--shape",)),
    (("--shape", "8b", "--model-name", "."), ("--model-name", "--shape")),
    (("--model-name", ""), ("--model-name",)),
    (("--model-name", "/nowhere"), ("--model-name /nowhere",)),
    (("--nonsense",), ("--nonsense",)),
], ids=str)  # fmt: skip
def test_wrong_flags_get_one_line(script, capsys, flags, says):
    """A traceback, or a line that does not say which flag to change."""
    fails(script, capsys, flags, says)


@pytest.mark.parametrize("fields, says", [
    ({"model_type": "gpt2"}, ("gpt2", "runs llama, mistral")),
    ({"num_attention_heads": 5}, ("--model-name",)),
    ({"num_hidden_layers": 0}, ("--model-name", "num_hidden_layers=0")),
    ({"hidden_act": "none such"}, ("--model-name", "none such")),
    ({"dtype": "float64"}, ("float64", "--dtype")),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantised", "--weight_bits")),
], ids=str)  # fmt: skip
def test_wrong_configs_get_one_line(script, capsys, checkpoint, fields, says):
    """Predictions for a model that H2Optimizer does not run, or for other weights than there are."""
    fails(script, capsys, ("--model-name", checkpoint(**fields)), says)
