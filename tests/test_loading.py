"""Checkpoints as they are published, chats, and checkpoints that cannot be used."""

import json
import logging
import shutil
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex
from tokenizers.normalizers import Replace
from transformers import AutoTokenizer, GPT2Config

import run_summarization
from checkpoints import make_checkpoint, make_requests, make_tokenizer
from summaries import H2O, alone, both_caches, checkpoint, instruct_model, no_model, refused, run, tokenizer, tokens_of  # noqa: F401


def test_tokenizer_without_padding_or_eos_token(run, checkpoint, tmp_path):
    """Tokenizers of Llama checkpoints have no padding token, some no EOS either: pad() raises."""
    assert AutoTokenizer.from_pretrained(checkpoint).pad_token is None
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    make_tokenizer(bare, unk_token="<s>")
    assert AutoTokenizer.from_pretrained(bare).eos_token is None
    requests = make_requests(4, max_tokens=6)
    assert run(requests, "--batch_size", "4", model=bare).texts == run(requests, "--overwrite").texts


def test_dtype(run, monkeypatch):
    """--dtype that is parsed and not passed on."""
    loaded = []
    original = run_summarization.load_model

    def load_model(*args):
        loaded.append(original(*args)[0].dtype)
        return original(*args)

    monkeypatch.setattr(run_summarization, "load_model", load_model)
    for dtype in ("auto", "bfloat16"):
        run(make_requests(1, max_tokens=2), *H2O, "--dtype", dtype, output=dtype)
    assert loaded == [torch.float32, torch.bfloat16]


def test_article_that_begins_with_bos(run, checkpoint, tmp_path):
    """Two of them: Llama has never seen that. In a chat the template puts its own."""
    folder, requests = instruct_model(checkpoint, tmp_path / "instruct"), make_requests(2, max_tokens=4)
    begun = [request | {"article": "<s>" + request["article"]} for request in requests]
    for flags in ([], ["--chat"]):
        outcomes = [run(of, *flags, "--overwrite", model=folder) for of in (requests, begun)]
        plain, other = ([result["cache"]["tokens_seen"] for result in outcome.results] for outcome in outcomes)
        assert plain == other and outcomes[0].texts == outcomes[1].texts


def test_article_without_a_token(refused, monkeypatch):
    """A prompt of no column, which no model takes."""
    encode = AutoTokenizer.from_pretrained

    def drops_all(*args, **kwargs):
        tokenizer = encode(*args, **kwargs)
        tokenizer.backend_tokenizer.normalizer = Replace(Regex("."), "")
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", drops_all)
    refused([{"article": "aa", "summary_gt": "b"}], words="request 0: its article has no tokens in the tokenizer of")


# Chats


@both_caches
def test_chat_wraps_requests_in_the_template(run, checkpoint, tmp_path, flags):
    """A template that is not used, a text that begins twice, or one that runs past the end of the assistant's turn."""
    requests = make_requests(3, max_tokens=12)
    model = instruct_model(checkpoint, tmp_path / "instruct")
    wrapped = [request | {"article": f"[user] {request['article']}\n[assistant] "} for request in requests]
    expected = run(wrapped, *flags, model=model, output="wrapped")
    chat = run(requests, *flags, "--chat", model=model)
    assert chat.texts == expected.texts != run(requests, *flags, model=model, output="plain").texts
    assert [r["cache"]["tokens_seen"] for r in chat.results] == [r["cache"]["tokens_seen"] for r in expected.results]

    said = chat.choices[0]["logprobs"]["tokens"]
    ends = instruct_model(checkpoint, tmp_path / "ends", eos=said[4])
    until = said[: said.index(said[4])]
    ended = run(requests, *flags, "--chat", model=ends, output="ended").choices[0]
    assert (ended["logprobs"]["tokens"], ended["finish_reason"]) == (until, "stop")
    unended = run(wrapped, *flags, model=ends, output="unended").choices[0]  # the checkpoint's settings do not list it
    assert unended["logprobs"]["tokens"] == said


def test_chat_without_a_template_that_works(refused, checkpoint, tmp_path):
    """Base models in the words of a chat, or a traceback out of a template."""
    refused(make_requests(1), "--chat", words=["--chat: the tokenizer of", "no chat template"])
    broken = instruct_model(checkpoint, tmp_path / "broken", "{{ raise_exception('only\nsystem') }}")
    refused(make_requests(1), "--chat", model=broken, words=["--chat: the chat template of", "only system"])
    silent = instruct_model(checkpoint, tmp_path / "silent", "{{ '' }}")
    refused(
        make_requests(1),
        "--chat",
        model=silent,
        output="silent.jsonl",
        words=["--chat: the chat template of", "no text"],
    )


# Checkpoints as they are published


PUBLISHED = {
    "Llama 1": {"rope_theta": 10000.0, "num_key_value_heads": None},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "Llama 3.1": {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "longrope": {"rope_scaling": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
                 "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}},
}  # fmt: skip

NO_TYPE = "has no config.json that names a model_type"


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_published_checkpoints(run, tmp_path, published):
    """A rope_scaling of the checkpoint's config.json that only one of the two caches follows, or neither; or the second
    of the end-of-sequence tokens that config.json alone lists."""
    model, heads = tmp_path / "model", 4 if "num_key_value_heads" in published else 2
    make_checkpoint(model, num_key_value_heads=heads, max_position_embeddings=32)
    path, requests = model / "config.json", make_requests(2, max_tokens=8)
    config = json.loads(path.read_text())
    (model / "generation_config.json").unlink()
    unscaled = run(requests, model=model, output="unscaled.jsonl").texts
    config.pop("rope_parameters")
    config = {name: value for name, value in (config | published).items() if value is not None}
    path.write_text(json.dumps(config))
    full = run(requests, model=model, output="full.jsonl")
    assert (full.texts == unscaled) == ("rope_scaling" not in published)
    wide = [*H2O, "--num_window_length", "256"]
    assert run(requests, *wide, model=model, output="wide.jsonl").texts == full.texts

    said = tokens_of(full.choices[0])
    vocab = AutoTokenizer.from_pretrained(model).get_vocab()
    path.write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], vocab[said[3]]]}))
    ended = run(requests, *wide, model=model, output="ended.jsonl").choices[0]
    assert (tokens_of(ended), ended["finish_reason"]) == (said[: said.index(said[3])], "stop")


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_cuda_asked_for_and_absent(refused, no_model, monkeypatch, device):
    """A traceback out of CUDA's initialisation, after the model was read."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(make_requests(1), "--device", device, words=[f"--device {device}", "--device cpu"])


# Checkpoints that cannot be used


def broken(folder: Path, how: str) -> Path:
    """Damages a copy of the checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "gpt2":
        GPT2Config().save_pretrained(folder)
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "no weights":
        weights.unlink()
    elif how == "weights of a smaller model":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif how == "weights of another shape":
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    elif how == "weights of a larger model":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    elif how == "NaN":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how.startswith("adapter"):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nobody/none"}')
        if how == "adapter alone":
            weights.unlink()
            (folder / "config.json").unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif how == "truncated tokenizer":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])
    elif how == "config is not JSON":
        (folder / "config.json").write_text("{")
    elif how == "config is a list":
        (folder / "config.json").write_text("[]")
    elif how == "config with a wrong type":
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "32"}))
    elif how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "no folder":
        shutil.rmtree(folder)
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    {
        "gpt2": "a gpt2 checkpoint; H2Optimizer runs llama, mistral, qwen2, qwen3 and smollm3; to add a family, copy ",
        "truncated weights": "cannot be loaded",
        "empty weights": "cannot be loaded",
        "no weights": "model.safetensors",
        "weights of a smaller model": "9 weights are missing or have the wrong shape",
        "weights of another shape": "6 weights are missing or have the wrong shape, first model.layers.0.mlp.down",
        "weights of a larger model": "9 weights have no place in the model that config.json describes, first",
        "NaN": "1 weight holds NaN or infinity in float32, first model.layers.1.mlp.up_proj.weight",
        "adapter beside": "holds an adapter (adapter_config.json)",
        "adapter alone": "holds an adapter (adapter_config.json)",
        "no tokenizer": "tokenizer",
        "truncated tokenizer": "cannot be loaded",
        "config is not JSON": "config.json",
        "config is a list": NO_TYPE,
        "config with a wrong type": "hidden_size",
        "empty folder": NO_TYPE,
        "no folder": "cannot be loaded",
    }.items(),
)
@both_caches
def test_checkpoint_that_cannot_be_used(refused, checkpoint, tmp_path, how, words, flags):
    """A traceback from one of four libraries; or weights that transformers fills at random without a word."""
    folder = broken(shutil.copytree(checkpoint, tmp_path / "broken"), how)
    refused(make_requests(1), *flags, model=folder, words=[f"--model-name {folder}", words])


def test_tied_weights_are_not_missing(run, tmp_path):
    """Small Llamas tie lm_head to the embedding and do not store it."""
    model = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    assert len(run(make_requests(1, max_tokens=2), *H2O, model=model).texts) == 1


def test_tokenizer_of_another_model(refused, checkpoint, tmp_path):
    """An index error from the embedding, on a GPU a device-side assert that names nothing."""
    small = make_checkpoint(tmp_path / "small", vocab_size=300)
    refused(make_requests(1), model=small, words=["--model-name", "300 tokens", "belongs to the model"])


@pytest.mark.parametrize("config, words", [
    ({"model_type": "tomorrows"}, ("a tomorrows checkpoint; H2Optimizer runs llama,", "copy h2optimizer/mistral.py")),
    ({"hidden_size": 8}, NO_TYPE), ({"model_type": ["llama"]}, NO_TYPE),
])  # fmt: skip
def test_family_that_transformers_does_not_know(refused, tmp_path, config, words):
    """A line about versions of transformers in place of the families that work."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(make_requests(1), model=tmp_path, words=words)


def test_model_name_of_no_file(refused):
    """A traceback."""
    for flags in ((), H2O):
        refused(make_requests(1), *flags, model="x" * 300, words="File name too long")


def test_model_name_that_is_nowhere(refused):
    """Offline, a name that is neither a folder nor in the cache; and what a stray slash or space makes of one."""
    for name in ("nobody/no-such-model", "nosuchmodel", "a b", ""):
        refused(make_requests(1), model=name, words=f"--model-name {name}: cannot be loaded")


def test_model_name_with_the_hub_out_of_reach(refused, monkeypatch):
    """huggingface_hub tries six times over 23 s and logs twelve lines; one is enough."""
    logged, waits = [], []
    handler = logging.Handler()
    handler.emit = logged.append
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", waits.append)
    logging.getLogger("huggingface_hub").addHandler(handler)
    with socket.socket() as deaf:  # holds a port, and does not listen there
        deaf.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        try:
            refused(make_requests(1), model="nobody/no-such-model", words="nobody/no-such-model: cannot be loaded")
        finally:
            logging.getLogger("huggingface_hub").removeHandler(handler)
    assert len(waits) > 1, "nobody tried"
    assert not logged


ODD = {
    "sliding window": ({"config.json": {"sliding_window": 16}}, "sliding_window"),
    "no token": (
        {"generation_config.json": {"eos_token_id": 10**9}},
        "eos_token_id 1000000000 is not one of the model's tokens",
    ),
    "nested": (
        {"generation_config.json": {"eos_token_id": [[2]]}},
        "eos_token_id [2] is not one of the model's tokens",
    ),
    "negative": ({"generation_config.json": {"eos_token_id": -1}}, "eos_token_id -1 is not one of the model's tokens"),
}


@both_caches
@pytest.mark.parametrize("settings, said", ODD.values(), ids=ODD)
def test_settings_that_no_llama_has(refused, checkpoint, tmp_path, flags, settings, said):
    """A window that only transformers' full cache follows, or texts that never end."""
    refused(make_requests(1), *flags, model=with_settings(checkpoint, tmp_path, settings), words=["--model-name", said])


@both_caches
@pytest.mark.parametrize("field", ["output_attentions", "output_hidden_states", "return_dict"])
def test_outputs_that_a_checkpoint_asks_for(run, checkpoint, tmp_path, flags, field):
    """What is returned is the caller's to say."""
    requests = make_requests(2, max_tokens=4)
    odd = with_settings(checkpoint, tmp_path, {"config.json": {field: field != "return_dict"}})
    assert run(requests, *flags, model=odd).texts == run(requests, *flags, "--overwrite").texts


def test_tokenizer_that_fails(refused, monkeypatch):
    """Another library's exception, for a tokenizer that lacks a part."""
    original = run_summarization.load_model

    def load_model(*args):
        model, tokenizer = original(*args)

        def fail(*args, **kwargs):
            raise Exception("Missing [UNK]")

        monkeypatch.setattr(type(tokenizer), "__call__", fail)
        return model, tokenizer

    monkeypatch.setattr(run_summarization, "load_model", load_model)
    refused(make_requests(1), words=["--model-name", "its tokenizer fails", "Missing [UNK]"])


def with_settings(checkpoint: Path, folder: Path, settings: dict[str, dict]) -> Path:
    """A copy of the checkpoint whose JSON files have other values of some fields."""
    copy = shutil.copytree(checkpoint, folder / "odd")
    for name, fields in settings.items():
        path = copy / name
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(known | fields))
    return copy
