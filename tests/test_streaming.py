"""Streams: one cache across turns against a plain loop over the model; scripts/run_streaming.py as its users run it."""

import gc
import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

from checkpoints import made_up_text, make_checkpoint
from conftest import forward, prompt
from h2optimizer import H2OConfig
from h2optimizer.loading import load_model
from h2optimizer.sampling import sample_rows
from h2optimizer.streaming import Stream
from h2optimizer.texts import Stops
from h2optimizer.utils.cache import CACHE_ARGUMENT, HHCache
from summaries import instruct_model
from test_benchmarks import load

SMALL = dict(window_length=16, num_heavy_hitters=6, update_interval=4)
TURNS = [prompt(23), prompt(4, 1), prompt(1, 1), prompt(9, 2)]
TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<s>be brief\n{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>\n{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@torch.no_grad()
def in_loop(model, turns, said, piece):
    """Replies and log-likelihoods of what is given, by one call of the model after another; the cache they leave."""
    h2o = getattr(model, "h2o", None)
    cache = DynamicCache(config=model.config) if h2o is None else HHCache(h2o)
    everything, replies, nll, scored, before = [], [], [], [], None
    for turn in turns:
        tokens, skip = (replies[-1][-1:] if replies else []) + turn, 1
        nll.append(0.0)
        scored.append(len(tokens) - 1)
        for begin in range(0, len(tokens), piece):
            part = tokens[begin : begin + piece]
            if h2o is not None:
                cache.evict_for_space(len(part))
            logits = model(torch.tensor([part]), **{CACHE_ARGUMENT: cache}).logits[0].double()
            for token, scores in zip(part, [before, *logits[:-1]], strict=True):
                nll[-1] -= 0.0 if skip else scores.log_softmax(-1)[token].item()
                skip = 0
            before = logits[-1]
            everything += part
        replies.append([int(before.argmax())])
        while len(replies[-1]) < said:
            logits = model(torch.tensor([replies[-1][-1:]]), **{CACHE_ARGUMENT: cache}).logits[0, -1]
            everything.append(replies[-1][-1])
            replies[-1].append(int(logits.argmax()))
    return replies, nll, scored, cache, everything


@pytest.mark.parametrize(
    "flags", [{}, {"position_rolling": True}, {"prefill_chunk": 3, "score": "sink"}, None], ids=str
)
def test_turns_over_one_cache(gqa, flags):
    """A last token that is fed twice or never, room that is not made, scores of the wrong token or after a reply."""
    model = gqa.stock
    if flags is not None:
        model, gqa.h2o.h2o = gqa.h2o, H2OConfig(**SMALL, **flags)
    stream = Stream(model, set())
    piece = stream.piece
    assert piece == (512 if flags is None else flags.get("prefill_chunk", 5))
    replies, nll, scored, cache, everything = in_loop(model, TURNS, 11, piece)
    for turn, reply, loss, tokens in zip(TURNS, replies, nll, scored, strict=True):
        got = stream.feed(turn)
        assert got[1] == tokens and got[0] == pytest.approx(loss, rel=1e-4, abs=1e-4)
        assert [token for token, _ in stream.say(11)] == reply
    assert stream.fed == len(everything) and stream.pending == replies[-1][-1]
    if flags is None:
        assert stream.slots == stream.fed == stream.cache.get_seq_length()
        assert stream.kv_bytes == stream.fed * 2 * 2 * 2 * 16 * 4
        whole = model(torch.tensor([everything])).logits[0]  # the cache in its pieces is the whole text's
        assert int(whole[-1].argmax()) == replies[-1][-1]
    else:
        assert stream.cache.lengths == cache.lengths and stream.slots == cache.lengths[0] <= 20
        assert torch.equal(stream.cache.positions(1), cache.positions(1)) and stream.kv_bytes == cache.nbytes


def test_reply_ends_at_an_eos_token_or_where_it_is_cut(gqa):
    """A reply that runs on; a token that was taken away and is fed, or the next one scored by logits of before it."""
    gqa.h2o.h2o = H2OConfig(**SMALL)

    def reply(stream):
        stream.feed(TURNS[0])
        return [token for token, _ in stream.say(12)]

    whole = reply(Stream(gqa.h2o, set()))
    ended = Stream(gqa.h2o, {eos := whole[5]})
    assert reply(ended) == whole[: whole.index(eos) + 1] and ended.pending == eos
    ended.pending, fed = None, ended.fed
    assert ended.feed([3, 4, 5])[1] == 2 and ended.fed == fed + 3


def test_samples_are_the_seeds(gqa):
    """A temperature or top_p that is not used, a number drawn once for several tokens, a generator of torch's."""
    gqa.h2o.h2o = H2OConfig(**SMALL)
    stream, cache, random = Stream(gqa.h2o, set(), 1.5, 0.6, seed=7), HHCache(gqa.h2o.h2o), np.random.default_rng((7,))
    settings, last = (torch.tensor([1.5]), torch.tensor([0.6])), []
    for turn in (TURNS[3], TURNS[1]):
        stream.feed(turn)
        reply, tokens, fed = [token for token, _ in stream.say(9)], last + turn, []
        for begin in range(0, len(tokens), 5):
            cache.evict_for_space(len(tokens[begin : begin + 5]))
            (logits,) = forward(gqa.h2o, [tokens[begin : begin + 5]], cache)
        for token in reply:
            number = torch.tensor([[random.random(dtype=np.float32)]])
            assert sample_rows(logits[-1:], *settings, number, nucleus=True).item() == token
            if len(fed) < len(reply) - 1:
                fed.append(token)
                (logits,) = forward(gqa.h2o, [[token]], cache)
        last = reply[-1:]


# The command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def script():
    return load("run_streaming")


@pytest.fixture
def streamed(script, checkpoint, tmp_path, capsys, monkeypatch):
    """streamed(lines or text of the standard input, *flags): exit status, stdout, lines of stderr, lines of the report.
    `streams` holds the streams that were made."""

    def run(given, *flags):
        path = tmp_path / "in.jsonl"
        if isinstance(given, str):
            path = "-"
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode(errors="surrogateescape"))))
        elif given is not None:
            path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in given))
        argv = ["--input-path", path, "--model-name", checkpoint, "--device", "cpu", "--max_tokens", 9, *flags]
        code = script.main([*map(str, argv)])
        out, err = capsys.readouterr()
        err = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
        report = tmp_path / "report.jsonl"
        return code, out, err, [json.loads(line) for line in report.open()] if report.exists() else []

    run.streams, made = [], script.Stream.__init__
    monkeypatch.setattr(
        script.Stream, "__init__", lambda stream, *args: made(stream, *args) or run.streams.append(stream)
    )
    return run


FLAGS = ["--enable_h2o_generation", "--num_window_length=16", "--num_heavy_hitter_tokens=6", "--update_interval=4"]
ROLLING = [*FLAGS, "--enable_position_rolling"]
TEXTS = [made_up_text(2, seed) for seed in range(4)]


def test_every_form_of_input(streamed, tokenizer):
    """A form whose turns are not all fed, in their order, or one cache for each; what is said and not printed."""
    forms = [
        [{"question_id": 1, "category": "x", "turns": TEXTS[:2]}, "", {"turns": TEXTS[2:]}],
        [{"prompt": text} for text in TEXTS],
        [{"article": text, "summary_gt": "x", "max_tokens": 9} for text in TEXTS],
        "".join(f"{text}\n" for text in [*TEXTS[:2], "", *TEXTS[2:], "/quit", "more"]),
    ]
    printed = []
    for form in forms:
        code, out, err, _ = streamed(form, *ROLLING)
        assert code == 0 and not err
        printed.append([line for line in out.splitlines() if not line.startswith(">>> ")])
    assert printed[0] == printed[1] == printed[2] == printed[3] and len(printed[0]) == 4
    model = streamed.streams[0].model
    stream = Stream(model, set())
    for text, line in zip(TEXTS, printed[0], strict=True):
        stream.feed(tokenizer(text)["input_ids"])
        assert tokenizer.decode([token for token, _ in stream.say(9)]) == line
    assert [stream.fed] * 4 == [each.fed for each in streamed.streams[:4]]


def test_replies_end_where_their_turn_says(streamed, script, tokenizer, monkeypatch):
    """max_tokens or stop strings of a request that do nothing; a stop string that is fed with the next turn."""
    _, out, _, _ = streamed([{"prompt": TEXTS[0]}], *FLAGS)
    reply = out.splitlines()[1]
    stop = reply[4:6]
    assert reply.index(stop) == 4
    said, say = [], script.Stream.say

    def counted(stream, tokens):
        said.append(0)
        for each in say(stream, tokens):
            said[-1] += 1
            yield each

    monkeypatch.setattr(script.Stream, "say", counted)
    _, out, _, _ = streamed(
        [{"prompt": TEXTS[0], "stop": [stop]}, {"prompt": TEXTS[1], "max_tokens": 2}, {"prompt": TEXTS[2]}], *FLAGS
    )
    assert streamed.streams[-1].fed == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS[:3]) + sum(said) - 2
    assert said == [said[0], 2, 9] and said[0] < 9  # not fed: the token that brought the stop string, and the last
    _, first, _, second, _, third = out.splitlines()
    assert first == reply[:4]
    assert len(tokenizer(second)["input_ids"]) <= 2 < len(third)


def test_stop_strings_are_not_printed(streamed, script, tokenizer, monkeypatch):
    """One that names a special token and is never seen; one whose first letters are printed before it is complete; a
    text that is held back and never shown."""
    said = tokenizer.encode("one two#<s>## three# four", add_special_tokens=False)
    monkeypatch.setattr(script.Stream, "say", lambda stream, tokens: ((token, -1.0) for token in said))
    for stop, shown in {
        "###": "one two",
        "<s>": "one two#",
        "o#<s>#": "one tw",
        "# four": "one two### three",
        "never": "one two### three# four",
    }.items():
        for flags in ([], ["--quiet"]):
            code, out, _, _ = streamed([{"prompt": TEXTS[0], "stop": stop}], *FLAGS, *flags)
            assert code == 0 and out.splitlines() == ([] if flags else [f">>> {TEXTS[0]}", shown])


def test_chat_is_the_templates_own_conversation(streamed, script, checkpoint, tokenizer, monkeypatch):
    """A later turn with the template's beginning once more, a reply that is not closed, or is closed twice."""
    fed, feed = [], script.Stream.feed

    def noted(stream, tokens):
        if stream.pending is not None or not stream.fed:  # a turn begins
            fed.append([])
        fed[-1] += tokens
        return feed(stream, tokens)

    monkeypatch.setattr(script.Stream, "feed", noted)
    code, _, err, _ = streamed([{"turns": TEXTS[:3]}], *ROLLING, "--chat")
    assert code == 2 and "--chat: " in err[-1] and "template" in err[-1]
    monkeypatch.setattr(script, "load_model", lambda *args: (model, with_template))
    h2o = script.h2o_config(script.parse_args(ROLLING))
    model, with_template = load_model(str(checkpoint), h2o, torch.device("cpu"))
    with_template.chat_template = TEMPLATE
    code, out, err, _ = streamed([{"turns": TEXTS[:3]}], *ROLLING, "--chat")
    assert code == 0 and not err
    replies = [line for line in out.splitlines() if not line.startswith(">>> ")]
    messages = []
    for text, reply in zip(TEXTS, replies, strict=False):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    expected = with_template.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    given = [tokenizer.decode(tokens) for tokens in fed]
    assert "".join(text + reply for text, reply in zip(given, [*replies[:2], ""], strict=True)) == expected
    eos = tokenizer.eos_token_id
    wording = script.Wording(with_template, "x", chat=True)
    assert wording.closing[0] == eos
    stream = Stream(model, {eos, 7})
    for pending, left in ((eos, eos), (7, None), (8, 8), (None, None)):
        stream.pending = pending
        assert wording.close(stream) == wording.closing[pending == eos :] and stream.pending == left
    with_template.chat_template = "{{ messages | length }}" + TEMPLATE
    code, _, err, _ = streamed([{"turns": TEXTS[:3]}], *ROLLING, "--chat")
    assert code == 2 and "rewrites earlier turns" in err[-1]


def test_report_says_what_passed(streamed, script, checkpoint, tokenizer, tmp_path):
    """Perplexities of other tokens, or means of means; tokens that no line counts; a figure that is not drawn."""
    flags = ["--report", tmp_path / "report.jsonl", "--stream_tokens", 600, "--quiet"]
    code, out, err, (head, *lines, end) = streamed([{"prompt": text} for text in TEXTS], *ROLLING, *flags)
    assert code == 0 and end["ended"] is None
    assert head == {"stream": "H2O, 6 heavy, window 16, N = 4, rolling", "model": checkpoint.name}
    assert script.read_report(tmp_path / "report.jsonl")[0] == f"{checkpoint.name}: {head['stream']}"
    names = [script.stream_name(h2o) for h2o in (None, H2OConfig(), H2OConfig(score="streaming_llm"))]
    assert names == ["full cache", *(f"{of}, window 256, N = 16" for of in ("H2O", "StreamingLLM (4 sinks)"))]
    stream = streamed.streams[0]
    turns = [tokenizer(text)["input_ids"] for text in TEXTS]
    given = sum(line["given"] for line in lines)
    assert end["tokens"] == lines[-1]["tokens"] == given + sum(line["said"] for line in lines) >= 600
    passed = (turns * 9)[: sum(line["said"] for line in lines) // 9]
    _, nll, scored, *_ = in_loop(stream.model, passed, 9, 5)
    assert given == sum(map(len, passed)) == sum(scored) + 1
    total = sum(math.log(line["perplexity_given"]) * line["scored_given"] for line in lines if line["scored_given"])
    assert total == pytest.approx(sum(nll), rel=1e-4) and sum(line["scored_given"] for line in lines) == sum(scored)
    timed = {kind: sum(line[f"timed_{kind}"] for line in lines) for kind in ("given", "said")}
    assert timed == {"given": given + len(passed) - 1, "said": 8 * len(passed)}  # a reply's last is fed as it is given
    assert all(line["slots"] <= 20 and line["kv_bytes"] == stream.kv_bytes for line in lines)
    assert all(line["ms_said"] > 0 for line in lines if line["timed_said"]) and lines[0]["memory_bytes"] > 2**20
    assert [line.split("  ")[0] for line in out.splitlines()[1:]] == ["second tenth", "last tenth", "ratio"]
    assert err[-1].startswith("figures: ")
    for kind in ("png", "svg"):
        assert (tmp_path / f"report.{kind}").stat().st_size > 5000
    code, _, err, _ = streamed(
        [{"prompt": text} for text in TEXTS], "--report", tmp_path / "full.jsonl", "--beside", tmp_path / "report.jsonl"
    )
    assert code == 0 and "full cache" in (tmp_path / "full.svg").read_text()
    assert "window 16" in (tmp_path / "full.svg").read_text()


@pytest.mark.parametrize("flags, status", [([], 0), (ROLLING, 2)], ids=["full", "h2o"])
def test_memory_that_ends(streamed, script, monkeypatch, tmp_path, flags, status):
    """The baseline's end as a traceback, or one that takes the report along."""
    feed, fed = script.Stream.feed, []

    def fails(stream, tokens):
        fed.append(tokens)
        if len(fed) == 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        return feed(stream, tokens)

    monkeypatch.setattr(script.Stream, "feed", fails)
    report = ["--report", tmp_path / "report.jsonl", "--report_every", 10]
    code, _, err, (_, *lines, end) = streamed([{"prompt": text} for text in TEXTS], *flags, *report)
    said = 0 if flags else 18  # with the cache of 16 slots the first turn is fed in pieces of 5
    assert code == status and lines[-1]["tokens"] == end["tokens"] == sum(map(len, fed[:2])) + said
    (line,) = (line for line in err if "out of memory after" in line)
    assert f"out of memory after {end['tokens']} tokens" in line and "KV cache" in line and end["ended"] in line
    assert line.startswith("full cache: " if status == 0 else "error: ")


def test_interrupted_stream_keeps_its_report(streamed, script, monkeypatch, tmp_path):
    """Ctrl-C that loses what was measured."""
    say = script.Stream.say

    def interrupted(stream, tokens):
        yield from say(stream, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(script.Stream, "say", interrupted)
    code, _, err, (_, line, end) = streamed([{"prompt": TEXTS[0]}], *FLAGS, "--report", tmp_path / "report.jsonl")
    assert code == 130 and err[-1].startswith("interrupted: ") and line["said"] == 3
    assert end["tokens"] == line["given"] + 3


@pytest.mark.parametrize("failure, status, said", [
    (KeyboardInterrupt(), 130, "interrupted: "), (IndexError("a bug"), None, ""), (None, 2, "error: --report: "),
])  # fmt: skip
def test_figure_that_cannot_be_drawn(streamed, script, tokenizer, monkeypatch, tmp_path, failure, status, said):
    """Hours of a stream that are lost with a figure; one that hides what had failed before."""
    monkeypatch.setattr(script, "pictures_of", lambda report: [tmp_path / "nowhere" / "report.png"])
    say = script.Stream.say

    def fails(stream, tokens):
        yield from say(stream, tokens)
        if failure is not None:
            raise failure

    monkeypatch.setattr(script.Stream, "say", fails)
    given = [{"prompt": TEXTS[0]}], *FLAGS, "--report", tmp_path / "report.jsonl"
    if status is None:
        with pytest.raises(IndexError, match="a bug"):
            streamed(*given)
        lines = [json.loads(line) for line in (tmp_path / "report.jsonl").open()]
    else:
        code, _, err, lines = streamed(*given)
        assert code == status and len(err) == 1 and err[0].startswith(said)
    assert len(lines) == 3
    tokens = tokenizer(TEXTS[0])["input_ids"]
    _, (nll,), (scored,), *_ = in_loop(streamed.streams[0].model, [tokens], 9, 5)
    assert lines[1]["given"] == len(tokens) == scored + 1  # nothing stands before the first
    assert lines[1]["perplexity_given"] == pytest.approx(math.exp(nll / scored), rel=1e-4)


def test_positions_that_run_out_are_said_once(streamed):
    """A stream past the trained positions in silence, or a warning where rolling keeps below them."""
    lines = [{"prompt": text} for text in TEXTS]
    for flags, warnings in ((FLAGS, 1), ([], 1), (ROLLING, 0)):
        _, _, err, _ = streamed(lines, *flags, "--stream_tokens", "270", "--quiet")
        assert len([line for line in err if line.startswith("warning: ")]) == warnings
    _, _, err, _ = streamed(lines, *ROLLING, "--num_window_length", "300")  # the stream is shorter
    assert err[0].startswith("warning: window and interval need 304 positions, the model has 256;")


@pytest.mark.parametrize("lines, flags, words", [
    (["{"], [], "in.jsonl, line 1: not JSON"),
    ([{"prompt": "a"}, [1]], [], "in.jsonl, line 2: not a JSON object"),
    ([{"text": "a"}], [], "line 1: has none of turns (a list), prompt, article"),
    ([{"turns": []}], [], "line 1: 'turns' must be a list of texts"),
    ([{"turns": ["a", 3]}], [], "line 1: 'turns' must be a list of texts"),
    ([{"prompt": " "}], [], "line 1: 'prompt' must be a text"),
    ([{"prompt": "a", "stop": [""]}], [], "line 1: stop=['']: must be"),
    ([{"prompt": "a", "stop": ""}], [], "line 1: stop='': must be"),
    ([{"prompt": "a", "stop": 0}], [], "line 1: stop=0: must be"),
    ([{"prompt": "a", "max_tokens": 0}], [], "line 1: max_tokens=0: must be"),
    ([], [], "holds no turns"),
    (None, [], "in.jsonl: cannot be read"),
    ([{"prompt": "a"}], ["--temperature", "-1"], "--temperature"),
    ([{"prompt": "a"}], ["--temperature", "1e-39"], "--temperature"),
    ([{"prompt": "a"}], ["--top_p", "0"], "--top_p"),
    ([{"prompt": "a"}], ["--beside", "x.jsonl"], "--beside"),
    ([{"prompt": "a"}], ["--report", "/nowhere/r.jsonl", "--beside", "/nowhere/y.jsonl"], "--beside /nowhere/y.jsonl"),
    ([{"prompt": "a"}], ["--report", "/proc/r.jsonl"], "--report: /proc/r.jsonl is in /proc"),
    ([{"prompt": "a"}], ["--report", "/dev/null", "--overwrite"], "--report: /dev/null is not a regular file"),
    ([{"prompt": "a"}], ["--report", "."], "--report: . is a folder"),
    ([{"prompt": "a"}], ["--report", "r.png"], "--report r.png: this name is for a figure"),
    (['{"prompt": "\\ud800"}'], [], "line 1: is not valid UTF-8 text"),
    ([{"prompt": "a"}], ["--num_window_length", "16"], "--num_window_length: has no effect without"),
    ("a\n", ["--stream_tokens", "9"], "--stream_tokens repeats a file"),
])  # fmt: skip
def test_bad_input_is_one_line(streamed, lines, flags, words):
    """A traceback, or a line that does not say what to put right."""
    code, out, err, _ = streamed(lines, *flags)
    assert code == 2 and not out and len(err) == 1
    assert err[0].startswith("error: ") and words in err[0]


def test_only_what_opens_a_conversation_begins_as_a_text(script, checkpoint, tmp_path):
    """BOS in the middle of a conversation, or none at its beginning."""
    tokenizer = AutoTokenizer.from_pretrained(instruct_model(checkpoint, tmp_path / "begins"))
    (path := tmp_path / "in.jsonl").write_text('{"turns": ["a b", "a b"]}\n{"prompt": "a b"}\n')
    turns = [script.Wording(tokenizer, "x", chat=False).tokens(turn, False) for turn in script.read_turns(path)]
    assert turns[0] == turns[2] == [tokenizer.bos_token_id, *turns[1]] and tokenizer.bos_token_id not in turns[1]


def test_tenths(script, capsys):
    """The first tenth for the second, which is warmer; means of blocks that hold few tokens and many alike."""
    lines = [{"tokens": n, "given": 100, "perplexity_given": 8.0, "ms_given": 1.0} for n in range(40)]
    for n, line in enumerate(lines):
        line |= {
            "timed_given": 100,
            "scored_given": 100,
            "timed_said": 1 + n % 2,
            "ms_said": 6.0 if n % 2 else 3.0,
            "memory_bytes": 2**20 * (n + 1),
            "slots": 7,
        }
        line["perplexity_given"] *= 4 if n in (36, 38) else 1
    script.print_tenths(lines)
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["perplexity_given", "ms_given", "ms_said", "memory_MiB", "slots"]
    assert rows[0][2:] == ["8.000", "1.000", "5.000", "6.5", "7.0"] and rows[1][2:5] == ["16.000", "1.000", "5.000"]
    assert rows[2] == ["ratio", "2.000", "1.000", "1.000", f"{38.5 / 6.5:.1f}", "1.0"]
    script.print_tenths(lines[:19])
    assert not capsys.readouterr().out


def test_standard_inputs_that_are_odd(streamed, script, monkeypatch):
    """A chat that one stray byte ends, or that has nobody to talk to."""
    code, out, err, _ = streamed("a \udcff b\n", *FLAGS)
    assert code == 0 and out.strip() and not err
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(script.InputError, match="--input-path -: the standard input is closed"):
        next(script.typed_turns())


def test_chat_of_another_system(streamed, checkpoint, tmp_path, monkeypatch):
    """BOS left out after an empty first line; a byte order mark, or the return of a line's end, that is fed."""
    fed, feed = [], Stream.feed
    monkeypatch.setattr(Stream, "feed", lambda stream, tokens: fed.append(tokens) or feed(stream, tokens))
    model = ["--model-name", instruct_model(checkpoint, tmp_path / "begins")]
    assert streamed("a b\na b\n", *model)[0] == streamed("\ufeff\r\na b\r\na b\r\n", *model)[0] == 0
    bos = AutoTokenizer.from_pretrained(model[1]).bos_token_id
    assert fed[0] == [bos, *fed[1]] and fed[:2] == fed[2:] and bos not in fed[1]


def test_report_replaces_nothing_else(streamed, tmp_path):
    """--overwrite that takes the input, or the report to compare with; figures that go without it."""
    given, report = [{"prompt": TEXTS[0]}], tmp_path / "report.jsonl"
    code, _, err, lines = streamed(given, "--report", tmp_path / "in.jsonl", "--overwrite")
    assert code == 2 and "is also given as --input-path" in err[0] and not lines
    assert json.loads((tmp_path / "in.jsonl").read_text()) == given[0]
    assert streamed(given, "--report", report)[0] == 0
    before = report.read_text()
    code, _, err, _ = streamed(given, "--report", report, "--overwrite", "--beside", report)
    assert code == 2 and "is also given as --beside" in err[0] and report.read_text() == before
    code, _, err, _ = streamed(given, "--report", tmp_path / "report.other")
    assert code == 2 and "report.png exists" in err[0] and not (tmp_path / "report.other").exists()
    assert streamed(given, "--report", report, "--overwrite")[0] == 0


@pytest.mark.parametrize("line", [
    {"tokens": "a", "memory_bytes": 1, "slots": 3},
    {"tokens": 1, "memory_bytes": 1, "slots": 3, "perplexity_given": None},
    {"tokens": 1, "memory_bytes": 1, "slots": 3, "perplexity_given": math.nan},
    {"tokens": 10**400, "memory_bytes": 1, "slots": 3},
    "[" * 100_000,
], ids=["text", "null", "NaN", "huge", "deep"])  # fmt: skip
def test_other_report_that_is_none(streamed, tmp_path, line):
    """A traceback, at the end of the stream, of what was to be drawn beside it."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"stream": "x"}\n' + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    flags = ["--report", tmp_path / "report.jsonl", "--beside", other]
    code, out, err, lines = streamed([{"prompt": TEXTS[0]}], *flags)
    assert code == 2 and not out and not lines and err[0].endswith("not a report of this script; leave it out")


def test_model_that_says_no_number(streamed, script, monkeypatch, tmp_path):
    """NaN in a report, which is no JSON; tokens that mean nothing, said to the end."""
    load_model = script.load_model

    def broken(*args):
        model, tokenizer = load_model(*args)
        model.model.norm.weight.data.fill_(math.nan)
        return model, tokenizer

    monkeypatch.setattr(script, "load_model", broken)
    code, _, err, (_, *lines, _) = streamed([{"prompt": TEXTS[0]}], *FLAGS, "--report", tmp_path / "report.jsonl")
    assert code == 2 and "error: the model's logits are NaN in float32 after" in err[-1] and lines
    assert not any("perplexity" in key for line in lines for key in line)


def test_turns_without_a_token(streamed, script, monkeypatch):
    """A stream that goes round for ever and never comes on."""
    monkeypatch.setattr(script.Wording, "tokens", lambda *args, **kwargs: [])
    code, _, err, _ = streamed([{"prompt": TEXTS[0]}], "--stream_tokens", "10", "--quiet")
    assert code == 2 and err[-1].startswith("error: --input-path ") and "no turn has any token" in err[-1]


def test_long_reply_is_printed_as_it_is(script, tokenizer, capsys):
    """Letters lost, or said twice, where what has been printed is forgotten; all of it decoded again for each token."""
    text = "".join(f"{made_up_text(1, seed)} naïve 😀 {'x' * (seed % 70)} " for seed in range(40)).strip()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    printer, longest = script.Printer(tokenizer, Stops(tokenizer, ())), 0
    for token in tokens:
        printer.put(torch.tensor([token]))
        longest = max(longest, len(printer.token_cache))
    printer.end()
    assert capsys.readouterr().out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    assert len(tokens) > 1000 and longest < 200


def test_letters_that_the_terminal_does_not_know(script, checkpoint, tmp_path, monkeypatch):
    """A chat that ends at the first of them."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "café"}))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    argv = ["--input-path", tmp_path / "in.jsonl", "--model-name", checkpoint, "--device", "cpu", "--max_tokens", 2]
    assert script.main([*map(str, argv)]) == 0
    assert sys.stdout.buffer.getvalue().startswith(b">>> caf?\n")


def test_nothing_grows_with_the_stream(gqa):
    """Lists, plans, masks or decoders that are kept turn after turn."""
    gqa.h2o.h2o = H2OConfig(**SMALL, position_rolling=True)
    stream = Stream(gqa.h2o, set())
    objects = []
    for turn in range(36):
        stream.feed(TURNS[turn % 4])
        list(stream.say(3))
        if turn % 12 == 11:
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert objects[2] - objects[1] < 12
    assert stream.cache.evictions[0] > 50 and stream.fed > 400


def test_fields_of_a_turn_that_do_nothing_are_said_once(tmp_path, capsys):
    """An n that is ignored without a word. Temperatures are the flags' to say, and a reference asks for nothing."""
    module, path = load("run_streaming"), tmp_path / "turns.jsonl"
    turn = {"prompt": "One.", "temperature": 0.5, "reference": "x"}
    path.write_text("".join(json.dumps(turn | more) + "\n" for more in ({}, {"n": 3}, {"n": 1})))
    assert len(module.read_turns(path)) == 3
    assert capsys.readouterr().err == "warning: unknown fields are ignored: n (in 1 of 3 requests)\n"
