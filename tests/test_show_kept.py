"""scripts/show_kept.py: the page holds what the cache held, any text is safe in it, bad input is one line."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from checkpoints import make_checkpoint, make_requests, make_tokenizer, write_requests
from h2optimizer.decoding import BoundedDecoding
from h2optimizer.flags import DEMO_MODEL
from h2optimizer.loading import load_model
from h2optimizer.summarizing import tokenize
from h2optimizer.utils.ablation import unpack
from h2optimizer.utils.requests import Request
from h2optimizer.utils.results import PLAN
from test_benchmarks import load

UGLY = '</script><b>"it\'s" & 🦙 <!-- é\n\n  漢字 \ufffd {{data}} \u2028end'
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def script():
    return load("show_kept")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def show(script, checkpoint, tmp_path):
    """Runs the script on three requests; returns the page's data."""
    lines = make_requests(3, max_tokens=12)
    lines[1]["article"] = UGLY * 2
    requests = write_requests(tmp_path / "requests.jsonl", lines)

    def show(*flags):
        output = tmp_path / "kept.html"
        where = ["--model-name", checkpoint, "--input-path", requests, "--output-path", output, "--device", "cpu"]
        assert script.main([*map(str, [*where, "--overwrite", *flags])]) == 0
        return data_of(output)

    return show


def data_of(page):
    """What a browser finds in the page's script element of data: it ends at the first </script."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script', page.read_text(), re.DOTALL)
    return json.loads(text)


def positions_at_each_step(checkpoint, h2o, prompt, text):
    """[steps][layer][head] sets of the tokens that a cache holds before each step from 1, the step's own included."""
    model, _ = load_model(str(checkpoint), h2o, torch.device("cpu"))
    decoding, steps = BoundedDecoding(model), []
    decoding.prefill([prompt])
    for step, token in enumerate(text[:-1]):
        own = len(prompt) + step
        steps.append([[{*head.tolist(), own} - {-1} for head in decoding.cache.positions(i)[0]] for i in range(2)])
        decoding.feed(torch.tensor([[token]]))
    return steps


@pytest.mark.parametrize("policy", ["mass:3,update_interval=2", "streaming_llm", "mass:0"])
def test_last_held_is_what_the_cache_held(show, script, checkpoint, policy):
    """A step too early or too late, another policy's cache, layers and heads in another order."""
    data = show("--policies", "sink", policy, "--num_window_length", "16", "--update_interval", "3")
    args = script.parse_args(["--policies", policy, "--num_window_length", "16", "--update_interval", "3"])
    (h2o,) = script.configs_of(args, torch.device("cpu")).values()
    model, tokenizer = load_model(str(checkpoint), h2o, torch.device("cpu"))
    request = Request.from_line(json.dumps(make_requests(1, max_tokens=12)[0]), 0)
    (prompt,) = tokenize([request], tokenizer, model, str(checkpoint))
    ids = torch.tensor([prompt.tokens])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
    text = text[len(prompt.tokens) :].tolist()
    shown = data["policies"][1]
    assert "".join(shown["pieces"]) == tokenizer.decode(text)
    last_held = unpack(shown["last_held"])
    assert last_held.shape == (2, 2, len(prompt.tokens) + len(text) - 1)
    for step, layers in enumerate(positions_at_each_step(checkpoint, h2o, prompt.tokens, text), 1):
        for layer, heads in enumerate(layers):
            for head, tokens in enumerate(heads):
                fed = last_held[layer, head, : len(prompt.tokens) + step]
                assert set((fed >= step).nonzero()[0].tolist()) == tokens
    assert len(shown["mass_lost"]) == len(text) - 1 and all(len(layers) == 2 for layers in shown["mass_lost"])


def test_whole_window_is_the_full_cache(show):
    """A difference that is not there, or tokens that are not held though nothing is evicted."""
    data = show("--policies", "mass", "--num_window_length", "512")
    (shown,) = data["policies"]
    assert (shown["differs"], shown["agreement"]) == (None, 1.0) and shown["kl"] == pytest.approx(0, abs=1e-5)
    assert (unpack(shown["last_held"]) == len(shown["pieces"]) - 1).all()
    assert shown["pieces"] == data["full"]["pieces"]
    assert shown["slots"] == data["full"]["slots"] == len(data["prompt"]) + len(shown["pieces"]) - 1
    assert data["slot_bytes"] * 4 * data["full"]["slots"] == data["full"]["bytes"]  # 2 layers of 2 heads


def test_first_difference(script):
    """A text that goes on where the other ends is different, too."""
    for tokens, others, wanted in (
        ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([1, 2], [1], 1),
    ):  # fmt: skip
        assert script.first_difference(tokens, others) == wanted


def test_any_text_is_safe(show):
    """The text ends the script element or is lost, in pieces of characters or as a mark of the template."""
    data = show("--request", "1", "--num_window_length", "16", "--max_tokens", "3")
    assert "".join(data["prompt"]).removeprefix("<s>") == UGLY * 2
    assert len(data["full"]["pieces"]) == 3


def test_pieces(script, tmp_path):
    """A part of a character is shown as a replacement character, or swallows its neighbours."""
    tokenizer = make_tokenizer(tmp_path)
    tokens = tokenizer("a 🦙 é", add_special_tokens=False)["input_ids"]
    pieces = script.pieces_of(tokens, tokenizer)
    assert len(pieces) == len(tokens) and "".join(pieces) == "a 🦙 é"
    at = pieces.index("🦙")
    assert pieces[at - 3 : at] == [""] * 3 and pieces[0] == "a"
    broken = script.pieces_of(tokens[:4], tokenizer)  # ends within the llama
    assert len(broken) == 4 and "".join(broken).startswith("a \ufffd")


def test_policies_are_flags(script):
    """A flag of one policy that reaches another, or flags for all that do not."""
    policies = ["mass", "random:5,score_seed=7", "mass,enable_position_rolling,num_window_length=64"]
    args = script.parse_args(["--num_window_length", "32", "--score_norm", "mean", "--policies", *policies])
    configs = script.configs_of(args, torch.device("cpu"))
    assert list(configs) == policies
    mass, random, rolling = configs.values()
    assert (mass.score, mass.heavy, mass.window_length, mass.score_norm) == ("mass", 16, 32, "mean")
    assert (random.score, random.heavy, random.score_seed, random.window_length) == ("random", 5, 7, 32)
    assert (rolling.window_length, rolling.position_rolling, rolling.score_seed) == (64, True, 0)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--policies", "mess"], r"--policies mess: argument --score: invalid choice: 'mess'"),
        (["--policies", "mass:many"], r"--policies mass:many: --num_heavy_hitter_tokens='many': must be a"),
        (["--policies", "mass:300"], r"--policies mass:300: --num_heavy_hitter_tokens=300: must be less than"),
        (["--policies", "mass,window=8"], r"--policies mass,window=8: unrecognized argument --window"),
        (["--policies", "mass,output-path=x"], r"--policies mass,output-path=x: unrecognized argument"),
        (["--score", "mass"], r"--score: --policies names the scores; leave it out"),
        (["--request", "3"], r"--request 3: the requests of .*requests.jsonl are 0 to 2"),
        (["--max_tokens", "32768"], r"--request 0: asks for 32,768 tokens, a page holds 32,767; pass a --max_tokens"),
        (["--chat"], r"--chat: the tokenizer of .* has no chat template"),
        (["--policies", "mass,head_budgets=none.json"], r".*: --head_budgets none\.json: cannot be read \(No"),
        (
            ["--policies", f"mass,head_budgets={DEMO_MODEL / PLAN}"],
            r"--policies mass,head_budgets=.*json: --head_budgets .*json: budgets for 5 layers of 4 KV heads, but the",
        ),
    ],
)  # fmt: skip
def test_one_line_for_bad_input(script, checkpoint, tmp_path, capsys, flags, said):
    requests = write_requests(tmp_path / "requests.jsonl", make_requests(3, max_tokens=2))
    output = tmp_path / "kept.html"
    where = ["--model-name", checkpoint, "--input-path", requests, "--output-path", output, "--device", "cpu"]
    assert script.main([*map(str, where), *flags]) == 2
    assert re.match(f"error: {said}", capsys.readouterr().err.splitlines()[-1])
    assert not output.exists()


def test_heads_with_windows_of_their_own(show, tmp_path, capsys):
    """A caption that gives each head the mean, or even heads that are said to differ."""
    (tmp_path / "plan.json").write_text('{"windows": [[1, 2], [3, 6]]}')
    policies = ["mass", f"value_mass:3/4,head_budgets={tmp_path / 'plan.json'}"]
    even, planned = show("--num_window_length", 16, "--update_interval", 1, "--policies", *policies)["policies"]
    assert even["even"] and not planned["even"]
    assert (planned["window"], planned["heavy"], planned["recent"], planned["slots"]) == (16, 12, 4, 16)
    said = capsys.readouterr().err
    assert "window 16, 8 heavy, N = 1" in said and "window 16, 12 heavy on average, N = 1" in said


def test_bytes_of_8_bit_slots(show, script):
    """Slots of 8 bits that are counted as if they were the full cache's, or that no caption tells apart."""
    plain, stored = show("--policies", "mass", "mass,slots=int8", "--num_window_length", 16)["policies"]
    assert (plain["slot_bytes"], stored["slot_bytes"]) == (2 * 8 * 4, 2 * (8 + 4))  # a head_dim of 8; float32, int8
    assert stored["label"] == f"{plain['label']}, slots of 8 bits"
    assert "held * this.slot_bytes" in script.PAGE.read_text()


def test_sliding_attention_of_a_later_policy(script, tmp_path, capsys):
    """A traceback after the work of earlier policies."""
    requests = write_requests(tmp_path / "requests.jsonl", make_requests(1, max_tokens=2))
    folder = make_checkpoint(tmp_path / "slides", model_type="mistral", sliding_window=40)
    flags = ["--model-name", folder, "--input-path", requests, "--output-path", tmp_path / "kept.html"]
    policies = ["mass,num_window_length=16", "mass,num_window_length=30"]
    assert script.main([*map(str, flags), "--device", "cpu", "--policies", *policies]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --model-name {folder}: its attention slides over 40 tokens, fewer than window_")


def test_an_existing_file_is_kept(script, checkpoint, tmp_path, capsys):
    """A page, or the requests themselves, replaced without a word."""
    requests = write_requests(tmp_path / "requests.jsonl", make_requests(1))
    page = tmp_path / "kept.html"
    page.write_text("mine")
    flags = ["--model-name", str(checkpoint), "--input-path", str(requests)]
    assert script.main([*flags, "--output-path", str(page)]) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err and page.read_text() == "mine"
    before = requests.read_text()
    assert script.main([*flags, "--output-path", str(requests), "--overwrite"]) == 2
    assert "is the --input-path" in capsys.readouterr().err and requests.read_text() == before


def test_page_needs_no_network(script):
    assert not re.search(r"https?://|@import|\bsrc=|fetch\(", script.PAGE.read_text())
    assert script.PAGE.read_text().count(script.DATA_MARK) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_it(show, tmp_path):
    """An error in the page's script, text read as HTML, or shades that are not those of the data."""
    (tmp_path / "plan.json").write_text('{"windows": [[1, 2], [3, 6]]}')
    policies = ["mass", f"mass,head_budgets={tmp_path / 'plan.json'}"]
    flags = ["--policies", *policies, "--num_window_length", "16", "--max_tokens", "8"]
    data = show("--request", "1", *flags, "--update_interval", "1")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "kept.html").as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "data-ready" in drawn
    body = drawn[: drawn.index('<script type="application/json"')]
    assert "<b>" not in body
    prompt = len(data["prompt"])
    columns = body.split("<article")[2:]  # the first is the full cache's
    for i, (policy, column) in enumerate(zip(data["policies"], columns, strict=True)):
        shades = dict(re.findall(r'<span data-token="(\d+)" class="s(\d)', column.split(f'id="policy-{i}-prompt"')[1]))
        held = (unpack(policy["last_held"]) >= 1).reshape(4, -1)[:, : prompt + 1]  # the page opens at step 1
        by_heads = held.sum(axis=0)[:prompt]
        assert [int(shades[str(token)]) for token in range(prompt)] == [[0, 3, 4, 5, 6][heads] for heads in by_heads]
        slots = held.sum(axis=1)
        assert re.findall(r'title="layer (\d), KV head (\d): holds (\d+) of', column)[:4] == [
            (str(head // 2), str(head % 2), str(slots[head])) for head in (0, 2, 1, 3)
        ]  # layers side by side
        told = re.search(r"<dt>Held</dt><dd>(\d+) of \d+ a head, \d+ %(.*?)</dd>", column)
        assert (int(told[1]), told[2]) == (round(slots.mean()), f" ({slots.min()} to {slots.max()})" if i else "")
