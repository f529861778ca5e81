"""Loss and gradients against plain Llama, gradient checkpointing, and peft's tuned prompts."""

import copy

import pytest
import torch
from transformers import DynamicCache

from conftest import assert_close, left_pad, new_cache, prompt, set_checkpointing, with_flags
from h2optimizer.utils.cache import CACHE_ARGUMENT, HHCache


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_loss_and_gradients_are_stock_llamas(gqa, side):
    """Mass summed for a cache that nobody keeps, and padded columns that see the row's later tokens: of a left-padded
    batch they decide what the first token costs."""
    model, rows = with_flags(gqa, window_length=8), torch.tensor([prompt(12), prompt(12, 1)])
    mask = torch.ones_like(rows)
    mask[0, {"left": slice(5), "right": slice(7, None), "holes": slice(3, 8)}[side]] = 0
    labels, losses, gradients = rows.masked_fill(mask == 0, -100), [], []
    for llama in (gqa.stock, model):
        llama.zero_grad()
        outputs = llama(rows, attention_mask=mask, labels=labels)
        outputs.loss.backward()
        losses.append(outputs.loss)
        gradients.append(torch.cat([p.grad.flatten() for p in llama.parameters()]))
        llama.zero_grad()
    assert outputs[CACHE_ARGUMENT] is None if CACHE_ARGUMENT in outputs else True
    assert_close(losses[1], losses[0], 1e-6)
    assert_close(gradients[1], gradients[0], 1e-5)
    if side == "left":  # with a cache, too, where padding comes before all tokens
        wide = with_flags(gqa, window_length=64)
        assert_close(wide(rows, attention_mask=mask, labels=labels, use_cache=True).loss, losses[0], 1e-5)


def test_gradients_reach_a_later_turns_own_keys(gqa):
    """Keys and values of a second turn that are cached under no_grad and attended to without a gradient."""
    model = with_flags(gqa, window_length=64)
    first, turn = torch.tensor([prompt(9)]), torch.tensor([prompt(5)])
    norms = []
    for llama, cache in ((gqa.stock, DynamicCache()), (model, HHCache(model.h2o))):
        with torch.no_grad():
            llama(first, **{CACHE_ARGUMENT: cache})
        llama.zero_grad()
        llama(turn, labels=turn, **{CACHE_ARGUMENT: cache}).loss.backward()
        norms.append([p.grad.norm() for name, p in llama.named_parameters() if "layers.0.self_attn" in name])
        llama.zero_grad()
    assert_close(torch.stack(norms[1]), torch.stack(norms[0]), 1e-4)


@pytest.mark.parametrize("flags", [{"window_length": 8, "update_interval": 1}, {"window_length": 64}], ids=str)
@pytest.mark.parametrize("lengths", [(12, 12), (12, 5)], ids=["alike", "ragged"])
def test_gradients_of_a_decode_step(gqa, flags, lengths):
    """Slots that a step writes to before its gradients are computed, or a step whose own keys have none."""
    rows = [prompt(length) for length in lengths]
    gradients = []
    for llama, cache in (
        (gqa.stock, DynamicCache(config=gqa.stock.config)),
        (with_flags(gqa, **flags), new_cache(**flags)),
    ):
        inputs = left_pad(rows)
        with torch.no_grad():
            llama(**inputs, **{CACHE_ARGUMENT: cache})
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], dim=1)
        llama.zero_grad()
        logits = llama(torch.tensor([[5], [7]]), attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits
        logits.sum().backward()
        gradients.append([p.grad.clone() for name, p in llama.named_parameters() if "k_proj" in name])
        llama.zero_grad()
    assert all(gradient.any() for gradient in gradients[1])
    if flags["window_length"] == 64:
        for ours, theirs in zip(*gradients[::-1], strict=True):
            assert_close(ours, theirs, 1e-4)


def test_gradient_checkpointing_goes_without_a_cache(gqa):
    """A cache that checkpointed layers never see, and attention under a mask that is no mask."""
    model, ids, losses = with_flags(gqa, window_length=8), torch.tensor([prompt(12)]), []
    for llama in (gqa.stock, model):
        set_checkpointing(llama, True)
        llama.train()
        losses.append(llama(ids, labels=ids).loss)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, past_key_values=HHCache(model.h2o))
    for llama in (gqa.stock, model):
        set_checkpointing(llama, False)
        llama.eval()
    assert_close(losses[1], losses[0], 1e-5)


# peft


@pytest.mark.parametrize("padded", [False, True])
def test_prompt_tuning(gqa, padded):
    """peft's virtual tokens before a left-padded prompt: a mask with holes, and no positions."""
    peft = pytest.importorskip("peft")
    rows = [prompt(12), prompt(5)] if padded else [prompt(12), prompt(12, 1)]
    tuned = []
    for llama in (gqa.stock, with_flags(gqa, window_length=64)):
        torch.manual_seed(0)
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        tuned.append(peft.get_peft_model(copy.deepcopy(llama), settings).eval())
    prefix = tuned[1].get_prompt(batch_size=2)
    assert torch.equal(prefix, tuned[0].get_prompt(batch_size=2))
    inputs = left_pad(rows)
    tokens = tuned[1].generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:].tolist()
    # what stock Llama says after the same embeddings, token by token, without a cache
    embeds = torch.cat([prefix, gqa.stock.get_input_embeddings()(inputs["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), inputs["attention_mask"]], dim=1)
    expected = []
    with torch.no_grad():
        for _ in range(5):
            logits = gqa.stock(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, -1]
            expected.append(logits.argmax(-1))
            embeds = torch.cat([embeds, gqa.stock.get_input_embeddings()(expected[-1][:, None])], dim=1)
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    assert tokens == torch.stack(expected, dim=1).tolist()


def test_prompt_tuning_of_rows_that_end(gqa):
    """Virtual tokens that peft puts before the mask of a step in which a row has ended."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(with_flags(gqa, window_length=64)), settings).eval()
    rows = [prompt(12), prompt(5)]
    free = model.generate(**left_pad(rows), max_new_tokens=6, do_sample=False)[:, -6:].tolist()
    ends = next(token for token in free[0] if token not in free[1])
    ended = model.generate(**left_pad(rows), max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=0)
    end = free[0].index(ends) + 1
    assert ended[:, -6:].tolist() == [free[0][:end] + [0] * (6 - end), free[1]]


def test_prefix_tuning_is_refused(gqa):
    """Keys and values without tokens, in a cache of their own: a full one, without a word."""
    peft = pytest.importorskip("peft")
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(with_flags(gqa, window_length=8)), settings).eval()
    with pytest.raises(ValueError, match="PREFIX_TUNING"):
        model.generate(**left_pad([prompt(5)]), max_new_tokens=2)
