"""H2OLlamaForCausalLM.from_pretrained: checkpoints that transformers loads wrongly without an error."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen2ForCausalLM

from checkpoints import make_checkpoint
from h2optimizer import H2OConfig, H2OLlamaForCausalLM

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "changed")


def with_weights(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def with_config(folder, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(words: str, *args, **kwargs) -> None:
    with pytest.raises(ValueError) as caught:
        H2OLlamaForCausalLM.from_pretrained(*args, **kwargs)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_other_families(folder, checkpoint):
    """Qwen2's biases, or Mistral's window, are dropped, and the model says something else."""
    config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    refused(f"{folder}: a qwen2 checkpoint; H2OLlamaForCausalLM runs Llama only", folder)
    refused("a mistral checkpoint", checkpoint, config=MistralConfig())
    refused("a qwen2 checkpoint", checkpoint, config=str(folder))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers(folder, value, dtype):
    """One number among many, as a damaged file or a training run that has diverged leaves it."""
    with_weights(folder, lambda tensors: tensors[LAYER].view(-1)[-1:].fill_(value))
    refused(f"1 weight holds NaN or infinity in {str(dtype)[6:]}, first {LAYER}", folder, dtype=dtype)


def test_numbers_that_the_dtype_has_no_room_for(folder):
    """Weights that float16 makes infinite."""
    with_weights(folder, lambda tensors: tensors[LAYER].view(-1)[:1].fill_(1e5))
    refused("infinity in float16", folder, dtype=torch.float16)
    H2OLlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_hidden_layers": 1}, "9 weights have no place in the model that config.json describes, first "
         "model.layers.1."),
        ({"num_hidden_layers": 3}, "9 weights are missing or have the wrong shape, first model.layers.2."),
        ({"intermediate_size": 48}, "6 weights are missing or have the wrong shape, first model.layers.0.mlp."),
    ],
)  # fmt: skip
def test_config_of_another_size(folder, settings, words):
    """Layers that are left out, or filled at random."""
    with_config(folder, **settings)
    refused(words, folder)
    refused(words, folder, output_loading_info=True)


def test_weights_that_the_model_has_no_place_for(folder):
    """Biases that config.json does not name are dropped; old buffers and other heads change no logits."""
    with_weights(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    refused("1 weight has no place", folder)

    def harmless(tensors):
        del tensors["model.layers.0.self_attn.q_proj.bias"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["v_head.summary.weight"] = torch.ones(1, 32)

    with_weights(folder, harmless)
    _, loading = H2OLlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert loading["unexpected_keys"] == {"v_head.summary.weight"}


def test_adapter_beside_the_weights(folder):
    """transformers applies it where peft is installed, and else does not, both without a word."""
    (folder / "adapter_config.json").write_text("{}")
    refused("merge_and_unload", folder)
    (folder / "config.json").unlink()
    refused("merge_and_unload", folder)
    refused("merge_and_unload", folder.parent, subfolder=folder.name)
    (folder / "adapter_config.json").unlink()
    with pytest.raises((ValueError, OSError), match=r"config\.json"):  # and no model of a default shape
        H2OLlamaForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text("{}")
    refused("has no config.json that names a model_type", folder)


def test_what_loads_as_before(folder, checkpoint):
    """Shards, tied weights, a config or weights in memory, and shapes that the caller expects to differ."""
    whole = H2OLlamaForCausalLM.from_pretrained(checkpoint, h2o=H2OConfig(window_length=8))
    assert whole.h2o.window_length == 8
    whole.save_pretrained(folder / "shards", max_shard_size="40KB")
    assert len([*(folder / "shards").glob("*.safetensors")]) > 1
    config = LlamaConfig.from_pretrained(checkpoint)
    for again in (
        H2OLlamaForCausalLM.from_pretrained(folder / "shards"),
        H2OLlamaForCausalLM.from_pretrained(folder, subfolder="shards"),
        H2OLlamaForCausalLM.from_pretrained(checkpoint, config=config, device_map={"": "cpu"}),
        H2OLlamaForCausalLM.from_pretrained(None, config=config, state_dict=whole.state_dict()),
    ):
        assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))
    with_config(folder, vocab_size=300)
    refused("2 weights are missing or have the wrong shape", folder)
    assert H2OLlamaForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True).config.vocab_size == 300
    tied = make_checkpoint(folder / "tied", tie_word_embeddings=True)
    H2OLlamaForCausalLM.from_pretrained(tied)
