"""A tiny checkpoint (a Llama unless told) with its own tokenizer, and request files, for the tests of the command line.

Everything is made here from seeded, made-up words: nothing is downloaded, and no text of a data set is used.
"""

import functools
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

POSITIONS = 256


@functools.cache
def made_up_text(sentences: int, seed: int = 0) -> str:
    """Sentences of 4 to 9 words of one to three syllables."""
    draw = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(200)]
    made = (" ".join(draw.choices(words, k=draw.randint(4, 9))).capitalize() + "." for _ in range(sentences))
    return " ".join(made)


def make_tokenizer(folder: Path, **special) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, without a padding token; <s> and </s> unless `special` tokens are given."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([made_up_text(50, seed) for seed in range(5)], trainer)
    special = special or {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_checkpoint(folder: Path, **config) -> Path:
    """Two layers of random weights so large that float32 decides the tokens.

    Left to itself it says printable ASCII only, and never <s> or </s>, so that a text is the concatenation of its
    tokens and a test decides where it ends. `model_type` names another family than Llama.
    """
    vocab = make_tokenizer(folder).get_vocab()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            **{
                "model_type": "llama",
                "vocab_size": len(vocab),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": POSITIONS,
                "initializer_range": 0.4,
                "pad_token_id": None,
                "bos_token_id": vocab["<s>"],
                "eos_token_id": vocab["</s>"],
                **config,
            }
        )
    )
    quiet = [index for token, index in vocab.items() if token in ("<s>", "</s>") or not token.strip("Ġ").isascii()]
    with torch.no_grad():
        model.lm_head.weight[quiet] = 0.0  # far below the greatest of the other logits
    model.save_pretrained(folder)
    return folder


def make_requests(count: int, **fields) -> list[dict]:
    """Requests whose prompts differ in length, longer and shorter ones mixed; `fields` go into each."""
    return [
        {
            "article": f"###\nArticle: {made_up_text(1 + (5 * i) % 4, seed=i)}\n\nSummarize the above article.\n",
            "summary_gt": made_up_text(1, seed=1000 + i),
            **fields,
        }
        for i in range(count)
    ]


def write_requests(path: Path, requests: list[dict]) -> Path:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
    return path
