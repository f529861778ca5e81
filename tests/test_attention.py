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


def set_block(monkeypatch, block):
    """Let the sdpa backend take this many KV heads and queries at a time; None leaves its own choice."""
    if block is not None:
        monkeypatch.setattr(attention, "block_sizes", lambda inputs: block)


@pytest.mark.parametrize("group_reduce", ["sum", "first"])
@pytest.mark.parametrize("block", [None, (12, 1), (3, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("kv_heads", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_output_and_mass_are_the_plain_loops(monkeypatch, case, kv_heads, block, group_reduce):
    """A query that sees too far or too short, mass of padding or unscored queries, heads of another group, or blocks
    that overlap, leave a query out, add their mass at the wrong slots or take another row's start."""
    step = make_step(**case)
    query, key, value = make_states(step, kv_heads)
    expected_output, expected_mass = plain_attention(query, key, value, step, group_reduce)
    set_block(monkeypatch, block)
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


@pytest.mark.parametrize("block", [None, (3, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_nan_stays_in_its_row(monkeypatch, backend, case, block):
    """One broken row that takes the rest of the batch with it."""
    step = make_step(**case)
    set_block(monkeypatch, block)
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
    set_block(monkeypatch, (2, 16))
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


@pytest.mark.parametrize("case", ["prefill", "turn"])
def test_autocast_rounds_no_logits_of_several_tokens(case):
    """Logits rounded to bfloat16 by a user's autocast, and the mass with them."""
    step = make_step(**HALF[case])
    inputs = Inputs(*make_states(step, 2), step, SCALING)
    expected_output, expected_mass = attention.sdpa_attention(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output, mass = attention.sdpa_attention(inputs)
    assert torch.equal(output, expected_output) and torch.equal(mass, expected_mass)


class LogitsComputed(TorchDispatchMode):
    """Counts the logits that products put out, and the calls of SDPA."""

    logits = calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.logits += out.numel() if func is torch.ops.aten.baddbmm.default else 0
        self.calls += "scaled_dot_product" in str(func)
        return out


@pytest.mark.parametrize("case", ["scored", "unscored", "few scored", "training"])
def test_a_prefill_on_a_cpu_computes_its_logits_once(case):
    """A mass pass as long as attention itself, blocks of what the mask hides, blocks instead of SDPA where few queries
    are scored, or n x n probabilities kept for the gradients."""
    n, heads = 512, HEADS
    step = make_step([0], [n], scored=case != "unscored", score_queries=32 if case == "few scored" else None)
    states = make_states(step, kv_heads=2)
    states[0].requires_grad_(case == "training")
    with LogitsComputed() as computed:
        attention.sdpa_attention(Inputs(*states, step, SCALING))
    triangle = heads * n * (n + attention.CPU_QUERIES) // 2
    assert computed.logits == {"unscored": 0, "few scored": heads * 32 * n}.get(case, triangle)
    assert computed.calls == (case != "scored")


class LargestOutput(TorchDispatchMode):
    """Records the most elements that any operation puts out."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("n", [256, 2048])
def test_blocks_fit_in_the_caches(monkeypatch, n):
    """Blocks of another size than the sdpa backend chooses, or of more logits than the caches hold."""
    monkeypatch.setattr(attention, "CACHE_BYTES", 2**20 // torch.get_num_threads())
    step = make_step([0], [n])
    states = make_states(step, kv_heads=2, head_dim=8)
    with LargestOutput() as recorded:
        attention.sdpa_attention(Inputs(*states, step, SCALING, "sum"))
    heads, queries = attention.block_sizes(Inputs(*states, step, SCALING))
    assert recorded.numel == min(heads, 2) * HEADS // 2 * queries * n <= 2**20 // 4
    assert heads >= 2 or n == 2048, "room for all heads of a short prompt"


@pytest.mark.parametrize("score_queries", [None, 100])
def test_prefill_memory_is_linear_in_the_prompt(monkeypatch, gqa, score_queries):
    """An n x n tensor anywhere in a prefill: 20 GiB at 8k tokens in the predecessor."""

    def largest(backend, n):
        set_block(monkeypatch, (2, 8))
        cache = new_cache(window_length=32, backend=backend, score_queries=score_queries)
        with LargestOutput() as recorded:
            forward(gqa.h2o, [prompt(n)], cache)
        assert cache.lengths == [32] and cache.layers[0].slots.mass.sum() > 0
        return recorded.numel

    assert largest("eager", 512) >= 512 * 512, "the recording sees what there is to see"
    assert largest("sdpa", 512) < 512 * 512 / 2
    assert largest("sdpa", 512) <= 2 * largest("sdpa", 256)


@pytest.mark.parametrize("block", [(100, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("score_queries", [None, 4])
def test_blocks_do_not_show_in_the_model(monkeypatch, llamas, block, score_queries):
    """Blocks of queries that meet a ragged batch, evicted slots and a second turn, against the oracle row by row."""
    set_block(monkeypatch, block)
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
