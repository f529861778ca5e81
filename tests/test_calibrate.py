"""What cuts of heads cost, against a loop over masked stock Llamas, and scripts/calibrate.py as its user runs it."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig

from checkpoints import make_checkpoint, make_requests, write_requests
from conftest import GROUPS, make_llamas, prompt
from h2optimizer import calibration
from h2optimizer.calibration import Calibrator, JointElimination, head_cuts
from h2optimizer.flags import DEMO_MODEL, DEMO_REQUESTS
from h2optimizer.utils.budgets import HeadBudgets, MeasuredBudgets
from h2optimizer.utils.requests import read_requests
from h2optimizer.utils.results import PLAN, checkpoint_fingerprint
from test_benchmarks import load

PROMPT, TOKENS, RECENT = prompt(30), 9, 5


# The measurement, without what measures it


def greedy(stock, tokens: int) -> list[int]:
    ids = torch.tensor([PROMPT])
    said = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return said[0, len(PROMPT) :].tolist()


def attention_of(stock, text: list[int]) -> torch.Tensor:
    """[layers, KV heads, queries, tokens] of prompt and fed text: attention of a group's heads, summed."""
    before = stock.config._attn_implementation
    stock.set_attn_implementation("eager")
    attentions = stock(torch.tensor([PROMPT + text[:-1]]), output_attentions=True, use_cache=False).attentions
    stock.set_attn_implementation(before)  # the model is all tests'
    kv_heads = stock.config.num_key_value_heads
    return torch.stack([of[0].unflatten(0, (kv_heads, -1)).sum(dim=1) for of in attentions]).detach()


def logprobs_of(stock, text: list[int], gone: dict[tuple[int, int], list[set[int]]]) -> torch.Tensor:
    """Of the text's tokens but the first, where its queries do not see the tokens `gone`, by layer and KV head."""
    ids, n = torch.tensor([PROMPT + text[:-1]]), len(PROMPT)
    heads, group = (
        stock.config.num_attention_heads,
        stock.config.num_attention_heads // stock.config.num_key_value_heads,
    )
    handles = []
    for layer_idx, layer in enumerate(stock.model.layers):
        hidden = torch.ones(heads, ids.shape[1], ids.shape[1]).triu(1).bool()
        for (of_layer, head), of_queries in gone.items():
            for query, tokens in enumerate(of_queries if of_layer == layer_idx else ()):
                hidden[head * group : (head + 1) * group, n + query, sorted(tokens)] = True
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[None]

        def with_mask(module, args, kwargs, mask=mask):
            return args, kwargs | {"attention_mask": mask}

        handles.append(layer.self_attn.register_forward_pre_hook(with_mask, with_kwargs=True))
    try:
        return stock(ids, use_cache=False).logits[0, n:].double().log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


def gone_of(attention: torch.Tensor, width: int, recent: int = RECENT, decay: float = 1.0) -> list[set[int]]:
    """For each query of the text, the tokens that one head, of this attention [queries, tokens], has dropped by then.

    A window of `width` beside the newest, slimmed after the prompt and after each token.
    """
    n = len(PROMPT)
    there, mass, gone = list(range(n)), attention[:n].double().sum(dim=0).tolist(), []
    for token in range(n, len(attention)):
        old = there[: max(0, len(there) - recent)]
        for slot in sorted(old, key=lambda slot: -mass[slot])[width:]:
            there.remove(slot)
        gone.append(set(range(token)) - set(there))
        there.append(token)
        given = attention[token].double().tolist()
        grown = sum(given) / sum(given[slot] for slot in there)
        mass = [of * decay for of in mass]
        for slot in there:
            mass[slot] += given[slot] * grown
    return gone


def divergence(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return (wanted.exp() * (wanted - got)).sum().item()


@torch.no_grad()
def slow_losses(stock, text: list[int], widths: list[int], recent: int = RECENT, decay: float = 1.0) -> torch.Tensor:
    attention, wanted = attention_of(stock, text), logprobs_of(stock, text, {})
    losses = torch.zeros(*attention.shape[:2], len(widths), dtype=torch.float64)
    for layer in range(losses.shape[0]):
        for head in range(losses.shape[1]):
            for at, width in enumerate(widths):
                gone = {(layer, head): gone_of(attention[layer, head], width, recent, decay)}
                losses[layer, head, at] = divergence(wanted, logprobs_of(stock, text, gone))
    return losses


@pytest.mark.parametrize("kv_heads", GROUPS.values(), ids=GROUPS)
def test_losses_are_those_of_masked_stock_llama(kv_heads):
    """A cut of another head, layer or slot than meant; a window slimmed after the prompt alone, or without the mass of
    the text's queries; a divergence of the first token, or the wrong way round; a wide window that costs something."""
    llamas, widths = make_llamas(num_key_value_heads=kv_heads, num_hidden_layers=3), [4, 11, 28, 64]
    text = greedy(llamas.stock, TOKENS)
    losses, tokens = Calibrator(llamas.h2o, head_cuts(widths, "mass", RECENT), TOKENS).losses(PROMPT)
    expected = slow_losses(llamas.stock, text, widths)
    assert tokens == TOKENS - 1 and losses.shape == (3, kv_heads, 4)
    assert expected[..., :2].min() > 1e-3 and expected[..., 2].any() and not losses[..., 3:].any()
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("recent", "decay"), [(1, 1.0), (11, 1.0), (3, 0.1)])
def test_newest_slots_beside_a_width(gqa, recent, decay):
    """A width that holds the newest slots as well, or a number of them that grows with it; mass that never decays."""
    text = greedy(gqa.stock, TOKENS)
    losses, _ = Calibrator(gqa.h2o, head_cuts([4, 12], "mass", recent, decay), TOKENS).losses(PROMPT)
    expected = slow_losses(gqa.stock, text, [4, 12], recent, decay)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)
    if decay != 1.0:
        assert (losses - slow_losses(gqa.stock, text, [4, 12], recent)).abs().max() > 1e-3


def test_where_memory_runs_out_fewer_variants_go_together(gqa, monkeypatch):
    """Variants that are lost, or measured twice, when a batch of them is too large."""
    calibrator = Calibrator(gqa.h2o, head_cuts([4, 8, 11, 16], "mass", RECENT), TOKENS)
    whole, _ = calibrator.losses(PROMPT)
    divergence, sizes, ticks = calibration.ForcedText.divergence, [], []

    def small(self, layer_idx, heads, cuts):
        sizes.append(len(heads))
        if len(heads) > 3:
            raise torch.OutOfMemoryError("too many")
        return divergence(self, layer_idx, heads, cuts)

    monkeypatch.setattr(calibration.ForcedText, "divergence", small)
    calibrator.tick = ticks.append
    again, _ = calibrator.losses(PROMPT)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2] and sum(ticks) == 16
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-6)


def test_text_that_says_nothing(gqa):
    """A text of one token, which the prefill decides, counted as if it were predicted."""
    losses, tokens = Calibrator(gqa.h2o, head_cuts([4], "mass", RECENT), TOKENS).losses(
        PROMPT, end=lambda text: text[:1]
    )
    assert tokens == 0 and not losses.any()


# Windows that shrink together


def test_cuts_beside_other_cuts_are_those_of_masked_stock_llama(gqa):
    """A head measured beside whole ones, or beside the windows of an earlier round; one cut in place of another."""
    text = greedy(gqa.stock, TOKENS)
    attention, windows = attention_of(gqa.stock, text), [[8, 40], [12, 4]]

    def slow(windows) -> float:
        gone = {(i, h): gone_of(attention[i, h], windows[i][h]) for i in (0, 1) for h in (0, 1)}
        return divergence(logprobs_of(gqa.stock, text, {}), logprobs_of(gqa.stock, text, gone))

    def cuts(windows):
        return [[calibrator.cut_to(width) for width in of_layer] for of_layer in windows]

    calibrator = Calibrator(gqa.h2o, head_cuts([8], "mass", RECENT), TOKENS)
    forced = calibrator.forced(PROMPT)
    for held in ([[30, 30], [30, 30]], windows):
        base = forced.hold(cuts(held)).item()
        assert base == pytest.approx(slow(held), rel=1e-3, abs=1e-5)
    (narrow,) = cuts([[4, 16]])
    got = calibrator.divergences(forced, [[(0, narrow[0]), (1, narrow[1])], [(0, narrow[0])]])
    expected = [slow([[4, 40], [12, 4]]), slow([[8, 16], [12, 4]]), slow([[8, 40], [4, 4]])]
    assert got.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_slots_are_taken_where_it_costs_least(gqa):
    """Slots taken from the dearest head, too many or too few, or given back."""
    calibrator = Calibrator(gqa.h2o, head_cuts([8], "mass", RECENT), TOKENS)
    forced = calibrator.forced(PROMPT)
    joint, before = JointElimination(calibrator, [forced], ((24, 24), (24, 24))), [24] * 4
    cost, layer, head, width = joint._cheapest()[0]
    assert [cost] == [min(of[0] for of in joint._cheapest())] and width in (16, 12)
    first = joint.to(23)
    assert first[layer][head] == 20 and sum(map(sum, first)) == 92, "four slots, all of the cheapest head"
    for window in (16, 9, 4):
        slots = [slots for of_layer in joint.to(window) for slots in of_layer]
        assert sum(slots) == 4 * window and all(now <= then for now, then in zip(slots, before, strict=True))
        before = slots
    assert before == [4] * 4


# The script


@pytest.fixture(scope="module")
def calibrate():
    return load("calibrate")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A tiny checkpoint and five requests."""
    folder = tmp_path_factory.mktemp("lab")
    requests = make_requests(5)
    requests[1]["stop"] = ["a"]
    return SimpleNamespace(
        model=make_checkpoint(folder / "model"), requests=write_requests(folder / "requests.jsonl", requests)
    )


@pytest.fixture
def run(calibrate, lab, tmp_path, capsys, monkeypatch):
    """Runs the script on the lab; returns its errors, what it said, and the plan."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def run(*flags, output="plan.json", code=0):
        path = tmp_path / output
        common = ["--model-name", lab.model, "--input-path", lab.requests, "--output-path", path, "--device", "cpu"]
        common += ["--texts", 3, "--max_new_tokens", 6, "--widths", "8,16", "--score", "mass"]
        common += ["--recent", 4]
        assert calibrate.main([*map(str, common), *map(str, flags)]) == code
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if line.startswith(("error", "interrupted"))]
        plan = HeadBudgets.load(path) if path.exists() and not code else None
        return SimpleNamespace(errors=errors, err=said.err, out=said.out, path=path, plan=plan)

    return run


def test_plan_says_what_it_was_measured_on(run, lab):
    """A plan of other requests, settings or weights than it says, and one that no other program can check."""
    plan = run("--first", 1).plan
    assert isinstance(plan, MeasuredBudgets) and plan.shape == (2, 2) and plan.widths == (8, 16)
    assert (plan.score, plan.recent, plan.model, len(plan.texts)) == ("mass", 4, "model", 3)
    assert checkpoint_fingerprint(lab.model).startswith(plan.weights)
    assert max(loss for layer in plan.losses for head in layer for loss in head) > 1e-3
    assert sum(map(sum, plan.windows(20))) == 80
    shifted, same = run("--first", 2, output="b.json").plan, run("--first", 1, output="c.json").plan
    assert shifted.texts[:2] == plan.texts[1:] and shifted.losses != plan.losses
    assert same.losses == plan.losses


def test_mean_is_over_all_tokens(calibrate):
    """Texts that count alike whatever their length."""
    settings = {
        "--score": "mass",
        "--recent": 4,
        "--model-name": "m",
        "weights": None,
        "requests": [],
    }
    entries = [
        {"tokens": tokens, "prompt_tokens": 10 * tokens, "losses": [[[loss]]]} for tokens, loss in ((1, 0.5), (3, 7.5))
    ]
    plan = calibrate.plan_of(entries, [8], settings)
    assert plan.losses == (((2.0,),),) and plan.prompt_tokens == 20
    with pytest.raises(calibrate.InputError, match="every text ends with its first token"):
        calibrate.plan_of([{"tokens": 0, "prompt_tokens": 10, "losses": [[[0.0]]]}], [8], settings)


def test_killed_measurement_goes_on_to_the_same_plan(run, calibrate, monkeypatch):
    """A text that is measured again, lost or taken from another measurement after a kill while its line is written."""
    whole, append, done = run(), calibrate.JsonlFile.append, []

    def torn(self, entry):
        if len(done) == 2:
            self._file.write(json.dumps(entry).encode()[:200])
            self._file.flush()
            raise KeyboardInterrupt
        append(self, entry)
        done.append(entry)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate.JsonlFile, "append", torn)
        killed = run(output="killed.json", code=130)
    assert "run the same command again" in killed.errors[0] and not killed.path.exists()
    measured, losses = [], Calibrator.losses
    monkeypatch.setattr(
        calibrate.Calibrator, "losses", lambda self, tokens, end: measured.append(tokens) or losses(self, tokens, end)
    )
    again = run(output="killed.json")
    assert len(measured) == 1 and "2 of 3 texts are already measured" in again.err
    assert again.path.read_text() == whole.path.read_text()
    assert not list(again.path.parent.glob("*.texts")), "losses that are in the plan are left behind"
    assert run(output="killed.json").out == again.out and len(measured) == 1, "the plan itself is shown again"


def test_refined_windows_resume_as_well(run, calibrate, monkeypatch):
    """Windows that are measured again after a kill, or that do not join those of the losses."""
    monkeypatch.setattr(calibrate, "LEAST_WIDTH", 8)
    whole = run("--refine")
    assert len(whole.plan.refined) > 2 and whole.plan.refined != run(output="plain.json").plan.refined
    widest = sum(map(sum, whole.plan.refined[-1])) // 4
    assert whole.plan.windows(widest) == run(output="plain.json").plan.windows(widest)
    to, done = JointElimination.to, []

    def killed(self, window):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(window)
        return to(self, window)

    with monkeypatch.context() as patch:
        patch.setattr(JointElimination, "to", killed)
        run("--refine", output="killed.json", code=130)
    again = []
    monkeypatch.setattr(JointElimination, "to", lambda self, window: again.append(window) or to(self, window))
    assert run("--refine", output="killed.json").path.read_text() == whole.path.read_text()
    assert done and again and max(again) < min(done)


def test_other_settings_are_other_losses(run):
    """Losses of other widths or texts that a resumed command goes on with, and a plan that is replaced unasked."""
    before = run()
    for flags, name in (
        (["--widths", "8"], "--widths"),
        (["--max_new_tokens", 5], "--max_new_tokens"),
        (["--texts", 2], "requests"),
    ):
        (said,) = run(*flags, code=2).errors
        assert f"a plan of other settings ({name} differs); choose another --output-path, or pass --overwrite" in said
    assert run(*flags, "--overwrite").plan.texts == before.plan.texts[:2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--widths", "400,500"], "--widths 400,500: the longest prompt has only"),
        (["--widths", "0,8"], "argument --widths: '0': must be a whole number of at least 1"),
        (["--widths", "8,x"], "argument --widths: 'x': must be a whole number of at least 1"),
        (["--recent", "0"], "argument --recent: '0': must be a whole number of at least 1"),
        (["--recent", "400"], "and --recent takes 400 of them; give smaller numbers"),
        (["--texts", "9"], "has 5 requests; --first 0 and --texts 9 ask for more"),
        (["--score", "mas"], "argument --score: invalid choice: 'mas'"),
        (["--figure", "plan.txt"], "argument --figure: plan.txt: must end in .png, .svg, .pdf"),
        (["--chat"], "--chat: the tokenizer of"),
    ],
)
def test_what_does_not_fit_together_is_one_line(run, flags, message):
    """A traceback, or a plan that is written all the same."""
    outcome = run(*flags, code=2)
    (said,) = outcome.errors
    assert message in said and not outcome.path.exists()


def test_plan_is_not_written_over_something_else(run, lab, tmp_path):
    """A file of requests, or anyone's, replaced by a plan."""
    (tmp_path / "plan.json").write_text("mine")
    (said,) = run(code=2).errors
    assert "exists and is not a plan" in said and (tmp_path / "plan.json").read_text() == "mine"
    requests = shutil.copy(lab.requests, tmp_path / "requests.jsonl")
    (said,) = run("--input-path", requests, "--overwrite", output="requests.jsonl", code=2).errors
    assert "is the --input-path" in said


def test_settings_are_refused_before_a_model_is_loaded(run, calibrate, monkeypatch):
    """Minutes of loading before a word about a flag."""
    monkeypatch.setattr(calibrate, "load_model", lambda *args: pytest.fail("it was loaded"))
    assert "2**31" in run("--recent", 2**31, code=2).errors[0]


def test_default_widths_reach_the_longest_prompt(run):
    """Long prompts whose losses are extrapolated from narrow cuts."""
    plan = run("--widths", "").plan
    longest = max(plan.widths)
    assert plan.widths[:2] == (16, 32) and longest >= plan.prompt_tokens / 2


def test_figure(run, tmp_path):
    """A figure that no program opens, or that is not drawn of a plan that exists."""
    pytest.importorskip("matplotlib")
    run()
    run("--figure", tmp_path / "figures/plan.png")
    assert (tmp_path / "figures/plan.png").read_bytes().startswith(b"\x89PNG")


def test_bundled_plan_is_the_bundled_models():
    """A plan that a new model, or new requests, have outdated."""
    plan = HeadBudgets.load(DEMO_MODEL / PLAN)
    plan.check_model(LlamaConfig.from_pretrained(DEMO_MODEL), checkpoint_fingerprint(DEMO_MODEL))
    assert plan.refined and not plan.calibrated_on(read_requests(DEMO_REQUESTS)[0])
    assert sum(map(sum, plan.windows(112))) == 112 * 20
