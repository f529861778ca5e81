"""h2optimizer/attention.py: output and mass of every backend against plain loops in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import (
    BACKENDS,
    GROUPS,
    HEADS,
    SCALING,
    assert_close,
    forward,
    make_states,
    make_step,
    new_cache,
    new_oracle,
    own_columns,
    plain_attention,
    prompt,
)
from h2optimizer import attention
from h2optimizer.attention import Inputs
from h2optimizer.backends import ATTENTION_BACKENDS

CPU_SHARE = 16  # on a CPU the sdpa backend uses this part of BLOCK_BYTES

# start and new tokens of each row, and how many of a row's last queries add mass
STEPS = {
    "prefill": dict(start=[0, 0], new=[9, 9]),
    "ragged prefill": dict(start=[0, 0, 0], new=[9, 1, 5]),
    "prefill, last queries": dict(start=[0, 0], new=[9, 9], score_queries=4),
    "ragged prefill, last queries": dict(start=[0, 0, 0], new=[9, 2, 6], score_queries=4),
    "one token": dict(start=[0, 0], new=[1, 1]),
    "decode": dict(start=[7, 7], new=[1, 1], decode=True),
    "ragged decode": dict(start=[7, 2, 5], new=[1, 1, 1], decode=True),
    "turn": dict(start=[7, 7], new=[5, 5]),
    "ragged turn": dict(start=[7, 2, 0], new=[3, 5, 1]),
    "turn of one row": dict(start=[7, 4], new=[3, 0]),
}


def set_block(monkeypatch, batch_size, width, queries):
    """Let the sdpa backend take this many queries at a time; None leaves its own choice, which is all of these."""
    if queries is not None:
        monkeypatch.setattr(attention, "BLOCK_BYTES", CPU_SHARE * 4 * batch_size * HEADS * width * queries)


@pytest.mark.parametrize("group_reduce", ["sum", "first"])
@pytest.mark.parametrize("queries", [None, 1, 2, 4])
@pytest.mark.parametrize("kv_heads", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_output_and_mass_are_the_plain_loops(monkeypatch, case, kv_heads, queries, group_reduce):
    """A query that sees too far or too short, mass of padding or unscored queries, heads of another group, or blocks
    that overlap, leave a query out or add their mass at the wrong slots."""
    step = make_step(**case)
    query, key, value = make_states(step, kv_heads)
    expected_output, expected_mass = plain_attention(query, key, value, step, group_reduce)
    set_block(monkeypatch, len(step.start), step.width, queries)
    for backend in BACKENDS:
        output, mass = ATTENTION_BACKENDS[backend](Inputs(query, key, value, step, SCALING, group_reduce))
        assert output.shape == query.shape and mass.shape == key.shape[:3] and mass.dtype == torch.float32
        assert_close(own_columns(output, step), own_columns(expected_output, step), what=backend)
        assert_close(mass, expected_mass, what=backend)
        for b, (start, new) in enumerate(zip(step.start, step.new, strict=True)):
            assert not mass[b, :, start + new :].any(), "mass where the row has no slot"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_unscored_steps_are_pure_attention(backend, case):
    """Mass computed where nobody asked, or another output than on scored steps: N would change what is computed."""
    scored, unscored = make_step(**case), make_step(**case, scored=False)
    states = make_states(scored, kv_heads=2)
    expected, _ = ATTENTION_BACKENDS[backend](Inputs(*states, scored, SCALING, "sum"))
    output, mass = ATTENTION_BACKENDS[backend](Inputs(*states, unscored, SCALING, "sum"))
    assert mass is None
    assert_close(own_columns(output, unscored), own_columns(expected, scored))


@pytest.mark.parametrize("queries", [None, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_nan_stays_in_its_row(monkeypatch, backend, case, queries):
    """One broken row that takes the rest of the batch with it."""
    step = make_step(**case)
    set_block(monkeypatch, len(step.start), step.width, queries)
    states = make_states(step, kv_heads=2)
    clean_output, clean_mass = ATTENTION_BACKENDS[backend](Inputs(*states, step, SCALING, "sum"))
    for tensor in states:
        tensor[0] = torch.nan
    output, mass = ATTENTION_BACKENDS[backend](Inputs(*states, step, SCALING, "sum"))
    assert output[0].isnan().any() and mass[0].isnan().any()
    assert_close(output[1:], clean_output[1:])
    assert_close(mass[1:], clean_mass[1:])


HALF = {
    "prefill": dict(start=[0, 0], new=[80, 51]),
    "decode": dict(start=[70, 41], new=[1, 1], decode=True),
    "turn": dict(start=[40], new=[30]),
}


@pytest.mark.parametrize("kv_heads", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HALF.values(), ids=HALF)
def test_half_precision_is_as_good_as_the_eager_reference(monkeypatch, case, dtype, kv_heads):
    """Logits or sums rounded to half on the way: at most twice the error of eager attention, flash-attention's rule,
    and the mass, which is float32, as exact as float32 from the same half-precision states."""
    step = make_step(**case)
    states = make_states(step, kv_heads, dtype)
    exact_output, exact_mass = plain_attention(*states, step, "sum")
    set_block(monkeypatch, len(step.start), step.width, 16)
    errors = {}
    for backend in BACKENDS:
        output, mass = ATTENTION_BACKENDS[backend](Inputs(*states, step, SCALING, "sum"))
        assert output.dtype == dtype and mass.dtype == torch.float32
        assert_close(mass, exact_mass, what=backend)
        errors[backend] = (own_columns(output, step).double() - own_columns(exact_output, step)).abs().max().item()
    assert errors["sdpa"] <= 2 * errors["eager"] + 1e-6
    # The eager reference is worth its name: no worse than plain attention with half-precision products.
    query, key, value = (states[0], *(t.repeat_interleave(HEADS // kv_heads, 1) for t in states[1:]))
    logits = (query @ key.transpose(2, 3) * SCALING).float()
    for b, start in enumerate(step.start):
        unseen = torch.arange(step.width) > start + torch.arange(step.columns)[:, None]
        logits[b].masked_fill_(unseen, -torch.inf)
    naive = own_columns(logits.softmax(-1).to(dtype) @ value, step).double()
    assert errors["eager"] <= (naive - own_columns(exact_output, step)).abs().max().item() + 1e-6


class LargestOutput(TorchDispatchMode):
    """Records the most elements that any operation puts out."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("queries", [32, 64])
def test_blocks_hold_what_block_bytes_says(monkeypatch, queries):
    """Blocks of another size than they are told, for which the tests below would see one block, or only single
    queries."""
    step = make_step([0], [512])
    states = make_states(step, kv_heads=2, head_dim=8)
    set_block(monkeypatch, 1, 512, queries)
    with LargestOutput() as recorded:
        attention.sdpa_attention(Inputs(*states, step, SCALING, "sum"))
    assert recorded.numel == queries * HEADS * 512


@pytest.mark.parametrize("score_queries", [None, 100])
def test_prefill_memory_is_linear_in_the_prompt(monkeypatch, llamas, score_queries):
    """An n x n tensor anywhere in a prefill: 20 GiB at 8k tokens in the predecessor."""

    def largest(backend, n):
        set_block(monkeypatch, 1, n, 8)
        cache = new_cache(window_length=32, backend=backend, score_queries=score_queries)
        with LargestOutput() as recorded:
            forward(llamas.h2o, [prompt(n)], cache)
        assert cache.lengths == [32] and cache.layers[0].slots.mass.sum() > 0
        return recorded.numel

    assert largest("eager", 512) >= 512 * 512, "the recording sees what there is to see"
    assert largest("sdpa", 512) < 512 * 512 / 2
    assert largest("sdpa", 512) <= 2 * largest("sdpa", 256)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("score_queries", [None, 4])
def test_blocks_do_not_show_in_the_model(monkeypatch, llamas, queries, score_queries):
    """Blocks of queries that meet a ragged batch, evicted slots and a second turn, against the oracle row by row."""
    set_block(monkeypatch, 3, 14, queries)
    flags = dict(window_length=8, update_interval=2, score_queries=score_queries, score_norm="mean")
    cache, oracles = new_cache(**flags, backend="sdpa"), [new_oracle(llamas, **flags) for _ in range(3)]
    blocks = [[prompt(14), prompt(5), prompt(9)], [[3], [4], [5]], [prompt(3), prompt(6), prompt(2)], [[6], [7], [8]]]
    for block in blocks:
        for b, logits in enumerate(forward(llamas.h2o, block, cache)):
            assert_close(logits, oracles[b].forward(block[b]))
    for b, oracle in enumerate(oracles):
        for layer_idx, layer in enumerate(cache.layers):
            assert layer.slots.positions[b, :, : oracle.length()].tolist() == oracle.positions(layer_idx)
            assert_close(layer.slots.mass[b, :, : oracle.length()], oracle.mass(layer_idx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_row_of_the_model_is_alone(gqa, backend):
    """NaN in one row of a ragged batch that reaches the others through the cache, padding or an eviction."""
    flags = dict(window_length=8, update_interval=2, backend=backend)
    rows = [prompt(12), prompt(5), prompt(9)]
    logits = {}
    for poisoned in (False, True):
        cache = new_cache(**flags)
        embeddings = [gqa.h2o.model.embed_tokens(torch.tensor(row)).detach() for row in rows]
        if poisoned:
            embeddings[0][4] = torch.nan
        inputs = torch.stack([torch.cat([torch.zeros(12 - len(e), 64), e]) for e in embeddings])
        mask = torch.tensor([[0] * (12 - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            outputs = [gqa.h2o(inputs_embeds=inputs, attention_mask=mask, past_key_values=cache).logits[:, -1]]
            outputs += [gqa.h2o(torch.tensor([[t]] * 3), past_key_values=cache).logits[:, -1] for t in range(1, 8)]
        logits[poisoned] = torch.stack(outputs)
        assert cache.lengths == [9, 9, 9]
    assert logits[True][:, 0].isnan().all() and not logits[False].isnan().any()
    assert_close(logits[True][:, 1:], logits[False][:, 1:])
