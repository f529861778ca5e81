"""The Triton kernels against plain loops in float64: on a CPU in Triton's interpreter, on a GPU with -m gpu.

What no row uses (slots past its length, padding columns) is NaN in every test: a kernel that so much as multiplies it
by a probability of zero shows it. The interpreter computes bf16 wrongly, so a CPU tests float32 and float16 only.
"""

import dataclasses
import itertools

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kernel_cases
from conftest import SCALING, assert_close, make_step, own_columns, plain_attention
from h2optimizer.attention import Inputs, attention_after_prefix, eager_attention, rotate
from kernel_cases import cases, on_each_device

pytest.importorskip("triton")
from h2optimizer.kernels import decode, prefill
from h2optimizer.utils.int8_slots import quantize

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
HEADS = {
    "mha": (3, 1),
    "gqa3": (2, 3),
    "gqa4": (2, 4),
    "gqa8": (2, 8),
    "mqa": (1, 4),
    "mqa32": (1, 32),
}  # KV heads, heads per KV head
ONE = (1, 1)
UNTOUCHED = -7.0  # mass and count past a row's length, to be found as they were

# the interpreter computes both sides of a tl.where
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN slice):RuntimeWarning")
placed = kernel_cases.placed  # autouse


# States


def as_slots(states):
    return states.contiguous()


def as_model(states):
    """Strides of what a model's projections give: [B, n, H, D], transposed."""
    return states.transpose(1, 2).contiguous().transpose(1, 2)


def off_alignment(states):
    """One element past an address that 16 divides."""
    return states.new_empty(states.numel() + 1)[1:].view(states.shape).copy_(states)


def apart(states):
    """Room for as much again between two heads."""
    return states.repeat_interleave(2, dim=1)[:, ::2]


def make_states(step, heads, dim, dtype, device, layout=as_model, slots=None):
    """Random query [B, Hq, columns, D], key and value [B, Hkv, slots or step.width, D], NaN where a row has none."""
    (kv_heads, group), batch_size = HEADS.get(heads, heads), len(step.start)
    generator = torch.Generator().manual_seed(dim)
    query = torch.randn(batch_size, kv_heads * group, step.columns, dim, generator=generator) * 4 / dim**0.5
    key, value = torch.randn(2, batch_size, kv_heads, slots or step.width, dim, generator=generator)
    for b, (start, new) in enumerate(zip(step.start, step.new, strict=True)):
        key[b, :, start + new :] = value[b, :, start + new :] = query[b, :, new:] = torch.nan
    return tuple(layout(states.to(device, dtype)) for states in (query, key, value))


def plain_lse(query, key, step):
    """Log-sum-exp of each query's logits in float64; 0 in padding columns."""
    query, key = query.double().cpu(), key.double().cpu()
    lse = torch.zeros(query.shape[:3], dtype=torch.float64)
    for b, head in itertools.product(range(len(step.start)), range(query.shape[1])):
        for i in range(step.new[b]):
            logits = (
                key[b, head * key.shape[1] // query.shape[1], : step.start[b] + i + 1] @ query[b, head, i] * SCALING
            )
            highest = logits.max()
            lse[b, head, i] = highest + (logits - highest).exp().sum().log()
    return lse


def assert_output(output, expected, states, step, rope=None):
    """float32: within 2e-5 of the largest magnitude; half: at most twice the eager reference's own error."""
    assert output.dtype == states[0].dtype and output.shape == states[0].shape
    own, own_expected = own_columns(output, step).double().cpu(), own_columns(expected, step)
    if output.dtype == FP32:
        return assert_close(own, own_expected, what="output")
    clean = [s[:, :, : step.width].nan_to_num() for s in states]
    eager = own_columns(eager_attention(Inputs(*clean, step, SCALING, "sum", rope=rope))[0], step).double().cpu()
    error, allowed = ((each - own_expected).abs().max().item() for each in (own, eager))
    assert error <= 2 * allowed + 1e-6, f"output: off by {error:.3g}, the eager reference by {allowed:.3g}"


# Several tokens


def check_prefill(step, states, first_head=False):
    """Output, log-sum-exp and mass of both prefill kernels; returns them."""
    query, key, _ = states
    expected, expected_mass = plain_attention(*states, step, "first" if first_head else "sum")
    spans = step.spans(query.device)
    output, lse = prefill.attention_with_lse(*states, spans, SCALING)
    assert lse.dtype == FP32 and lse.shape == query.shape[:3]
    assert_output(output, expected, states, step)
    assert_close(own_columns(lse, step), own_columns(plain_lse(query, key, step), step), 1e-5, "log-sum-exp")
    mass = prefill.attention_mass(query, key, lse, spans, SCALING, first_head)
    assert mass.dtype == FP32
    assert_close(mass, expected_mass, 1e-5, "mass")
    for b, (start, new) in enumerate(zip(step.start, step.new, strict=True)):
        assert not mass[b, :, start + new :].any(), f"row {b}: mass where it has no slot"
        assert not mass[b][:, expected_mass[b].sum(0) == 0].any(), f"row {b}: mass that no scored query gave"
    return output, lse, mass


SPANS = {
    "prefill": dict(start=[0, 0], new=[40, 40]),
    "ragged": dict(start=[0, 0, 0], new=[75, 1, 34]),
    "last queries": dict(start=[0, 0, 0], new=[34, 3, 10], score_queries=5),
    "chunk": dict(start=[40, 40], new=[33, 33]),
    "ragged chunk": dict(start=[66, 5, 0, 31], new=[3, 33, 21, 0]),
}
SOME = [
    ("prefill", (1, 2), 64, FP32, True),
    ("ragged", (2, 2), 64, FP16, False),
    ("ragged chunk", (2, 2), 16, FP32, True),
    ("last queries", (1, 3), 96, FP32, False),
    ("ragged chunk", (1, 2), 128, FP16, False),
    ("chunk", (1, 8), 16, FP16, True),
    ("last queries", (2, 1), 80, FP16, False),
    ("ragged", (1, 1), 256, FP16, False),
]
EVERY = [
    *itertools.product(SPANS, HEADS, [64], [FP32, BF16], [False, True]),
    *itertools.product(["ragged chunk", "last queries"], HEADS, [96, 128], [FP32, BF16], [False]),
    *itertools.product(["ragged chunk"], HEADS, [64], [FP16], [False]),
    *itertools.product(["ragged chunk"], ["gqa3"], [16, 80, 256], [FP32, FP16, BF16], [False, True]),
]


@cases("case, heads, dim, dtype, first_head", SOME, EVERY)
def test_attention_and_mass_of_several_tokens(device, case, heads, dim, dtype, first_head):
    """Keys of another row or KV head, a head_dim that is no power of two cut short, scored queries that begin at the
    wrong column, logits or sums rounded to half, or what is unused that comes in."""
    step = make_step(**SPANS[case])
    check_prefill(step, make_states(step, heads, dim, dtype, device), first_head)


AFTER_PREFIX = {  # tokens of the prefix, and the rows' own
    "one token": (1, [40, 40]),
    "ragged": (66, [3, 33, 21]),
    "one row": (33, [35]),
    "last queries": (17, [34, 6, 10], 5),
    "tiles": (128, [64, 1, 128]),
}


@cases(
    "case, heads, dim, dtype, first_head",
    [
        ("one token", (2, 1), 64, FP16, False),
        ("ragged", (1, 2), 16, FP32, True),
        ("one row", (2, 2), 16, FP32, False),
        ("last queries", (1, 3), 96, FP16, False),
        ("tiles", (1, 2), 80, FP16, True),
    ],
    [
        *itertools.product(AFTER_PREFIX, HEADS, [64, 128], [FP32, BF16], [False]),
        *itertools.product(["ragged", "last queries"], ["gqa3"], [16, 80, 256], [FP32, FP16, BF16], [True]),
    ],
)
def test_attention_and_mass_after_a_shared_prefix(device, case, heads, dim, dtype, first_head):
    """Keys of the prefix that a row counts as its own or sees too few of, log-sum-exps merged with those of another row
    or head, mass by the log-sum-exp of one part alone, or padding that takes part."""
    shared, new, *score_queries = AFTER_PREFIX[case]
    step = make_step([shared] * len(new), new, score_queries=score_queries[0] if score_queries else None)
    states = make_states(step, heads, dim, dtype, device)
    if device == "cuda":  # cuDNN multiplies what is hidden by zero
        states = tuple(of.nan_to_num(nan=100.0) for of in states)
    query, key, value = states
    for of in (key, value):
        of[:, :, :shared] = of[:1, :, :shared].clone()
    reduce = "first" if first_head else "sum"
    expected, expected_mass = plain_attention(*states, step, reduce)
    prefix = tuple(of[:1, :, :shared].contiguous() for of in (key, value))
    inputs = Inputs(query, key[:, :, shared:], value[:, :, shared:], step, SCALING, reduce, prefix=prefix)
    output, mass = attention_after_prefix(inputs)
    assert_output(output, expected, states, step)
    assert_close(mass, expected_mass, 1e-5 if dtype == FP32 else 1e-4, "mass")
    for b, n in enumerate(new):
        assert not mass[b, :, shared + n :].any(), f"row {b}: mass where it has no slot"
    unscored = inputs._replace(step=dataclasses.replace(step, scored=False))
    assert torch.equal(attention_after_prefix(unscored)[0][0, :, : new[0]], output[0, :, : new[0]])


def edges(sizes):
    """Lengths at which tiles of these sizes begin, end or overflow."""
    return sorted({1} | {size + off for size in sizes for off in (-1, 0, 1)})


def fewer(dtype):
    """Slots that rows hold, and tokens that they bring."""
    return ([0, *edges([16])], [1, 16, 17, 30, 33]) if dtype == FP32 else ([0, 63, 128], [1, 65, 190])


def all_edges(dtype):
    size = 16 if dtype == FP32 else 64
    return [0, *edges([size, 2 * size])], [*edges([size, 2 * size, 3 * size]), 2 * size - 2, 3 * size - 2]


@cases("dtype, spans_of", [(FP32, fewer), (FP16, fewer)], [(FP32, all_edges), (FP16, all_edges), (BF16, all_edges)])
def test_every_edge_of_a_tile(device, dtype, spans_of):
    """Off by one where a row's start, its tokens, the first scored one or the diagonal meet the end of a tile: one row
    for each start and number of tokens, so that all of them are ragged to each other."""
    starts, news = spans_of(dtype)
    start, new = map(list, zip(*itertools.product(starts, news), strict=True))
    step = make_step(start, new)
    step.first_scored = [[0, n - 1, max(0, n - 33), n // 2][b % 4] for b, n in enumerate(new)]
    check_prefill(step, make_states(step, ONE, 16, dtype, device))


def run_prefill(step, states):
    """What of output, log-sum-exp and mass is defined."""
    spans = step.spans(states[0].device)
    output, lse = prefill.attention_with_lse(*states, spans, SCALING)
    mass = prefill.attention_mass(*states[:2], lse, spans, SCALING, False)
    return own_columns(output, step), own_columns(lse, step), mass


@cases(
    "dtype, layout",
    [(FP32, off_alignment), (FP16, as_slots)],
    itertools.product([FP32, FP16, BF16], [off_alignment, as_slots]),
)
def test_strides_do_not_show(device, dtype, layout):
    """Strides or an address that a tensor descriptor cannot take, or strides of one tensor used for another."""
    step = make_step([33, 0], [3, 35])
    states = make_states(step, (2, 1), 80, dtype, device)
    query, key, value = (layout(tensor) for tensor in states)
    expected = run_prefill(step, states)
    for mixed in ((query, key, value), (query, states[1], value)):
        for result, wanted in zip(run_prefill(step, mixed), expected, strict=True):
            assert torch.equal(result, wanted)


@on_each_device
def test_two_runs_give_the_same_bits(device):
    """Sums in an order that changes from run to run: the same prompt would keep other slots."""
    step = make_step([66, 5], [3, 33])
    states = make_states(step, ONE, 64, FP16, device)
    for first, second in zip(run_prefill(step, states), run_prefill(step, states), strict=True):
        assert torch.equal(first, second)


@on_each_device
def test_a_broken_row_is_alone(device):
    """NaN in one row's states that reaches the other rows, or that is taken for a number in its own."""
    step = make_step([33, 5, 0], [3, 35, 33])
    clean = make_states(step, ONE, 16, FP32, device)
    results = []
    for broken in (None, 0, 1, 2):
        states = [tensor.clone() for tensor in clean]
        for tensor in states if broken is not None else ():
            tensor[broken, :, 0] = torch.nan  # one query, and one key that they all see
        spans = step.spans(clean[0].device)
        output, lse = prefill.attention_with_lse(*states, spans, SCALING)
        results.append((output, lse, prefill.attention_mass(*states[:2], lse, spans, SCALING, False)))
    for broken, (output, lse, mass) in enumerate(results[1:]):
        new, length = step.new[broken], step.start[broken] + step.new[broken]
        for states in (output[broken, :, :new], lse[broken, :, :new], mass[broken, :, :length]):
            assert states.isnan().all()
        for b in {0, 1, 2} - {broken}:
            assert torch.equal(output[b, :, : step.new[b]], results[0][0][b, :, : step.new[b]])
            assert torch.equal(lse[b, :, : step.new[b]], results[0][1][b, :, : step.new[b]])
            assert torch.equal(mass[b], results[0][2][b])


# One token


class Spy:
    """Stands for a kernel and keeps the constants of its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append(constants)
            return self.kernel[grid](*args, **constants)

        return launch


@pytest.fixture
def planned(monkeypatch):
    """force(shares, programs, in_memory): how decode_attention divides its work; returns the launches' constants."""

    def force(shares, programs, in_memory=False):
        spy = Spy(decode._decode_kernel)
        monkeypatch.setattr(decode, "_decode_kernel", spy)
        monkeypatch.setattr(decode, "_processors", lambda device: shares * programs)
        if in_memory:
            monkeypatch.setattr(decode, "MOST_KEPT", 0)
        return spy.launches

    return force


WAYS = [(1, False, FP16), (1, True, FP32), (2, False, FP32)]  # logits kept, in memory, and of several shares


def decode_step(lengths):
    return make_step([length - 1 for length in lengths], [1] * len(lengths), decode=True)


def make_tables(rows, dim, dtype, device):
    """cos and sin [rows, D] as Llama's, and NaN where they end."""
    frequency = 10000 ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.arange(rows)[:, None] * frequency
    tables = [torch.cat([f(angle), f(angle)], dim=-1).to(device, dtype) for f in (torch.cos, torch.sin)]
    return tuple(torch.cat([table, table.new_full((3, dim), torch.nan)])[:rows] for table in tables)


def check_decode(
    lengths, slots, heads, dim, dtype, device, *, decay=0.5, first_head=False, rope=False, layout=as_slots, int8=False
):
    """Output, mass and count of a decode step, and that nothing else is written."""
    step, (kv_heads, _), lengths_on = decode_step(lengths), HEADS[heads], torch.tensor(lengths, dtype=torch.int32)
    query, key, value = make_states(step, heads, dim, dtype, device, layout, slots)
    stored, scales = [key, value], ()
    if int8:  # what is stored, in float64
        stored, scales = zip(*(quantize(states) for states in stored), strict=True)
        key, value = (of.double() * by.double()[..., None] for of, by in zip(stored, scales, strict=True))
    tables, seen_key = None, key
    if rope:  # the reference rotates first, with the kernel's rounding: once, after float32
        tables = make_tables(max(lengths), dim, dtype, device)
        seen_key = key.clone()
        seen_key[:, :, : step.width] = rotate(key[:, :, : step.width].float(), *(t.float() for t in tables)).to(dtype)
    expected, received = plain_attention(query, seen_key, value, step, "first" if first_head else "sum")
    before = torch.rand(2, len(lengths), kv_heads, slots, generator=torch.Generator().manual_seed(1))
    filled = (torch.arange(slots) < lengths_on[:, None])[:, None].expand(before.shape[1:])
    before[:, ~filled] = UNTOUCHED
    mass, count = before.clone().to(device)
    given = [states.nan_to_num() for states in stored]
    output = decode.decode_attention(
        query, *stored, lengths_on.to(device), SCALING, mass=mass, count=count, decay=decay, first_head=first_head,
        rope=tables, scales=scales,
    )  # fmt: skip
    assert_output(output, expected, (query, key.to(dtype), value.to(dtype)), step, tables)
    rounds_else = rope and dtype != FP32 and (device == "cuda" or int8)  # by FMA, or before the scale
    rounded = 4 * torch.finfo(dtype).eps if rounds_else else 1e-5
    if int8 and not rope and dtype != FP32:
        rounded = 5e-5  # queries in 16 bits
    assert_close(mass.cpu()[filled], (before[0] * decay + received)[filled], rounded, "mass")
    assert_close(count.cpu()[filled], (before[1] * decay + 1)[filled], 1e-6, "count")
    assert (mass.cpu()[~filled] == UNTOUCHED).all() and (count.cpu()[~filled] == UNTOUCHED).all(), "past a row's length"
    assert all(torch.equal(states.nan_to_num(), before) for states, before in zip(stored, given, strict=True))


# Shares, whether logits go to memory, slots, and what follows: slots of a tile, shares, and the tiles whose logits are
# kept in registers, 2**n of them and those beyond. float32 keeps none.
KEPT = {
    "one tile": (1, False, 30, (32, 1, 1, 0)),
    "a power of two": (1, False, 125, (32, 1, 4, 0)),
    "17 tiles": (1, False, 541, (32, 1, 16, 1)),
    "21 tiles": (1, False, 669, (32, 1, 16, 8)),
    "21 large tiles": (1, False, 1341, (64, 1, 16, 8)),
}
IN_MEMORY = {
    "in memory": (1, True, 150, (64, 1, 0, 0)),
    "2 shares": (2, False, 150, (64, 2, 0, 0)),
    "8 shares": (8, False, 700, (64, 8, 0, 0)),
    "64 shares, most of them empty": (64, False, 4100, (64, 64, 0, 0)),
    "more shares than tiles": (64, False, 150, (64, 2, 0, 0)),
    "too many for registers": (1, False, 700, (64, 1, 0, 0)),
}
OF_WIDE_GROUPS = {"21 large tiles": "gqa8", "too many for registers": "mqa32"}
PLANS = KEPT | IN_MEMORY


@cases(
    "plan, heads, dtype",
    [
        ("one tile", "gqa3", FP16),
        *itertools.product(["a power of two", "17 tiles", "21 tiles"], ["mqa"], [FP16]),
        *((plan, heads, FP16) for plan, heads in OF_WIDE_GROUPS.items()),
        *itertools.product(["in memory", "2 shares"], ["gqa3"], [FP32]),
        *itertools.product(["more shares than tiles", "64 shares, most of them empty"], ["mqa"], [FP32]),
        ("8 shares", "mqa", FP16),
    ],
    [
        *itertools.product([plan for plan in PLANS if plan not in OF_WIDE_GROUPS], ["gqa3", "gqa4"], [BF16]),
        *((plan, heads, BF16) for plan, heads in OF_WIDE_GROUPS.items()),
        *itertools.product([plan for plan in IN_MEMORY if plan not in OF_WIDE_GROUPS], ["gqa3", "gqa4"], [FP32]),
        *itertools.product(["17 tiles", "8 shares"], [heads for heads in HEADS if heads != "mqa32"], [FP16]),
    ],
)
def test_however_the_slots_are_divided(planned, device, plan, heads, dtype):
    """A tail that is dropped, a share without slots, logits kept at another tile's place, or partial results that are
    combined with the wrong weights."""
    shares, in_memory, slots, expected = PLANS[plan]
    size = expected[0]
    lengths = [slots, 1, max(1, slots - size), min(size + 1, slots)][: 2 if slots > 600 and device == "cpu" else 4]
    launches = planned(shares, len(lengths) * HEADS[heads][0], in_memory)
    check_decode(lengths, slots, heads, 64, dtype, device)
    (launch,) = launches
    assert tuple(launch[name] for name in ("BN", "SPLIT", "TILES", "MORE_TILES")) == expected


@cases(
    "shares, in_memory, dtype",
    [(1, False, FP16), (1, True, FP32), (2, False, FP32)],
    itertools.product([1, 2, 8], [False, True], [FP32, FP16, BF16]),
)
def test_every_length_up_to_the_capacity(planned, device, shares, in_memory, dtype):
    """Off by one at any length: a row for each, from 1 to as many as there are slots (on a CPU only around the
    ends of a tile)."""
    slots = 600 if device == "cuda" else 66 if shares > 1 else 34
    lengths = [n for n in range(1, slots + 1) if device == "cuda" or n < 3 or (n + 1) % 16 < 3]
    planned(shares, len(lengths), in_memory)
    check_decode(lengths, slots, "mqa", 256, dtype, device)


@cases(
    "dim, heads, dtype, first_head, shares",
    [
        (64, "mha", FP16, False, 1),
        (96, "gqa4", FP32, True, 2),
        (128, "gqa8", FP16, True, 1),
        (16, "gqa8", FP32, False, 1),
        (80, "mqa", FP16, False, 2),
        (128, "gqa3", FP32, True, 1),
        (16, "mqa", FP16, True, 2),
    ],
    [
        *itertools.product([64, 96, 128], HEADS, [FP32, BF16], [False], [1]),
        *itertools.product([16, 80], ["gqa3"], [FP32, BF16, FP16], [False], [1, 2]),
        *itertools.product([128], HEADS, [FP16], [True], [1, 2]),
    ],
)
def test_heads_and_head_dims(planned, device, dim, heads, dtype, first_head, shares):
    """Query heads that read another KV head, mass of padding heads or of all heads where the first is wanted, a
    head_dim that is no power of two cut short."""
    planned(shares, 3 * HEADS[heads][0])
    check_decode([70, 129, 3], 130, heads, dim, dtype, device, first_head=first_head)


@cases(
    "dim, heads, dtype, shares",
    [(64, "gqa4", FP32, 1), (80, "gqa3", FP32, 2), (128, "mha", FP16, 1), (16, "mqa", FP32, 1), (96, "gqa8", FP16, 2)],
    [
        *itertools.product([64, 96, 128], ["gqa3", "gqa4"], [FP32, BF16], [1, 8]),
        *itertools.product([16, 80], ["gqa3"], [FP32, FP16, BF16], [1]),
    ],
)
def test_keys_rotated_when_used(planned, device, dim, heads, dtype, shares):
    """A rotation by another slot's angle or with halves exchanged, or tables that are read past their last row."""
    planned(shares, 3 * HEADS[heads][0])
    check_decode([70, 129, 3], 140, heads, dim, dtype, device, rope=True)


@cases(
    "dim, heads, dtype, rope, shares, slots",
    [
        (64, "gqa4", FP16, False, 1, 1100),
        (128, "gqa3", FP16, False, 1, 130),
        (80, "gqa8", FP32, False, 2, 150),
        (16, "mqa", FP32, False, 1, 70),
        (16, "mha", FP16, False, 2, 150),
        (64, "gqa3", FP16, True, 1, 130),
        (96, "mqa", FP32, True, 2, 150),
    ],
    [
        *itertools.product([64, 128], HEADS, [BF16], [False], [1, 8], [700]),
        *itertools.product([16, 80, 96], ["gqa3", "gqa4"], [FP32, FP16, BF16], [False], [1, 2], [150]),
        *itertools.product([64, 80, 128], ["gqa4"], [FP32, FP16, BF16], [True], [1, 8], [700]),
        *itertools.product([128], ["gqa4"], [BF16], [False], [1], [1040, 2100]),
    ],
)
def test_keys_and_values_of_8_bits(planned, device, dim, heads, dtype, rope, shares, slots):
    """Low and high bytes exchanged or without their sign, a scale of another slot, of the key for the value, or none, a
    scale of NaN past a row's length that comes in, or small probabilities that float16 has no room for."""
    planned(shares, 3 * HEADS[heads][0])
    lengths = [slots, 3, 65] if device == "cuda" or slots < 600 else [slots]
    check_decode(lengths, slots, heads, dim, dtype, device, rope=rope, int8=True)


@cases(
    "shares, dtype, decay",
    [(1, FP16, 0.9), (2, FP32, 0.9), (1, FP16, 0.0), (2, FP32, 1.0)],
    [(*how, decay) for how in ((1, FP16), (2, FP32)) for decay in (1.0, 0.0, 0.9)],
)
def test_mass_decays_before_the_addition(planned, device, shares, dtype, decay):
    """Decay of what is just being added, no decay, or a count that decays in another way."""
    planned(shares, 2 * HEADS["gqa3"][0])
    check_decode([70, 9], 140, "gqa3", 16, dtype, device, decay=decay)


@cases(
    "dtype, layout",
    [(FP32, as_model), (FP16, off_alignment), (FP32, apart)],
    itertools.product([FP32, FP16, BF16], [as_model, off_alignment, apart]),
)
def test_strides_do_not_show_in_a_decode_step(planned, device, dtype, layout):
    """Strides of slots taken for granted, or loads that need an aligned address."""
    planned(1, 6)
    check_decode([70, 9, 130], 140, "gqa3", 80, dtype, device, layout=layout)


@on_each_device
@pytest.mark.parametrize("shares", [1, 2])
def test_views_of_the_slots_are_enough(planned, device, shares):
    """The width of a view taken for the distance between heads."""
    planned(shares, 6)
    step, lengths = decode_step([70, 9, 30]), torch.tensor([70, 9, 30], dtype=torch.int32, device=device)
    query, key, value = make_states(step, "gqa3", 64, FP32, device, as_slots, 140)
    outputs = [
        decode.decode_attention(query, key[:, :, :width], value[:, :, :width], lengths, SCALING) for width in (140, 70)
    ]
    assert_close(outputs[1], plain_attention(query, key, value, step, "sum")[0])
    assert_close(outputs[1], outputs[0])


@on_each_device
@pytest.mark.parametrize("shares, in_memory, dtype", WAYS)
def test_two_decode_steps_give_the_same_bits(planned, device, shares, in_memory, dtype):
    """Sums in an order that changes from run to run."""
    planned(shares, 2, in_memory)
    step, lengths = decode_step([150, 17]), torch.tensor([150, 17], dtype=torch.int32, device=device)
    states, results = make_states(step, "mqa", 256, dtype, device, as_slots, 160), []
    for _ in range(2):
        mass = torch.zeros(2, 1, 160, device=device)
        results.append((decode.decode_attention(*states, lengths, SCALING, mass=mass), mass))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@on_each_device
@pytest.mark.parametrize("shares, in_memory, dtype, rope", [(*WAYS[0], False), (*WAYS[1], True), (*WAYS[2], True)])
def test_output_and_mass_do_not_depend_on_what_is_asked(planned, device, shares, in_memory, dtype, rope):
    """A count that shows in the mass, or a step that is not scored with another output: N would change what is
    computed."""
    planned(shares, 2, in_memory)
    step, lengths = decode_step([70, 9]), torch.tensor([70, 9], dtype=torch.int32, device=device)
    states = make_states(step, "mqa", 64, dtype, device, as_slots, 140)
    added, tables = torch.zeros(3, 2, 1, 140, device=device), make_tables(70, 64, dtype, device) if rope else None
    outputs = [
        decode.decode_attention(*states, lengths, SCALING, rope=tables, **asked)
        for asked in ({"mass": added[0], "count": added[1]}, {"mass": added[2]}, {})
    ]
    assert torch.equal(added[0], added[2])
    for output in outputs[1:]:  # another tile rounds in another place
        assert_close(output, outputs[0], torch.finfo(dtype).eps * 8)


@on_each_device
@pytest.mark.parametrize("shares, in_memory, dtype", WAYS)
def test_a_broken_row_is_alone_in_a_decode_step(planned, device, shares, in_memory, dtype):
    """NaN in one slot of a row that reaches the other rows, or that is taken for a number in its own."""
    planned(shares, 3, in_memory)
    step, lengths = decode_step([70, 9, 150]), torch.tensor([70, 9, 150], dtype=torch.int32, device=device)
    clean = make_states(step, "mqa", 64, dtype, device, as_slots, 160)
    results = []
    for broken, name in ((None, None), (0, 0), (1, 1), (2, 2)):  # a row's query, a key, a value
        states = [tensor.clone() for tensor in clean]
        if broken is not None:
            states[name][broken, :, 0] = torch.nan
        mass = torch.zeros(3, 1, 160, device=device)
        results.append((decode.decode_attention(*states, lengths, SCALING, mass=mass), mass))
    for broken, (output, mass) in enumerate(results[1:]):
        others = [b for b in range(3) if b != broken]
        assert torch.equal(output[others], results[0][0][others]) and torch.equal(mass[others], results[0][1][others])
        assert output[broken].isnan().all()
        assert mass[broken].isnan().any() == (broken < 2)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("shares, in_memory", [(1, False), (1, True), (8, False)])
def test_a_captured_step_follows_the_lengths_on_the_device(planned, device, shares, in_memory, rope):
    """Lengths, or anything that follows from them, that are fixed when a graph is captured."""
    planned(shares, 4, in_memory)
    slots = 600
    query, key, value = make_states(decode_step([slots, slots]), "gqa3", 64, BF16, device, as_slots, slots)
    tables = make_tables(slots, 64, BF16, device) if rope else None
    lengths = torch.tensor([3, 40], dtype=torch.int32, device=device)
    mass, count = torch.zeros(2, 2, 2, slots, device=device)

    def step():
        return decode.decode_attention(
            query, key, value, lengths, SCALING, mass=mass, count=count, decay=0.5, rope=tables
        )

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for now in ([3, 40], [577, 1], [64, 65], [600, 600], [1, 300]):
        lengths.copy_(torch.tensor(now))
        results = []
        for run in (graph.replay, step):
            mass.fill_(0.25), count.fill_(1.0)
            output = run()
            torch.cuda.synchronize()
            results.append([each.clone() for each in (captured if output is None else output, mass, count)])
        for replayed, eager in zip(*results, strict=True):
            assert torch.equal(replayed, eager), f"lengths {now}"
        received = mass - 0.125
        for b, length in enumerate(now):
            assert_close(received[b, :, :length].sum(), 2 * 3.0, 1e-4, "three heads in each of two groups")


# What comes before it: rotation and append


def check_append(lengths, slots, heads, dim, dtype, device, *, rolling=False, one_row=False, layout=as_slots):
    """Exactly what apply_rotary_pos_emb and two assignments leave, where the device rounds as torch does."""
    (kv_heads, group), batch = HEADS[heads], len(lengths)
    generator = torch.Generator().manual_seed(dim)
    merged = torch.randn(batch, 1, (group + 2) * kv_heads * dim, generator=generator).to(device, dtype)
    parts = merged.split([group * kv_heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)  # as MergedLinear's
    query, key, value = (part.view(batch, 1, -1, dim).transpose(1, 2) for part in parts)
    query, key, value = (states if layout is None else layout(states) for states in (query, key, value))
    at = torch.tensor(lengths, device=device) - 1
    tables = make_tables(slots + 99, dim, dtype, device)
    if rolling:
        cos, sin = (table[:slots] for table in tables)
        turns = [table[at] for table in (cos, sin)]
    else:
        cos, sin = (table[57:58] if one_row else table[at + 57] for table in tables)
        turns = [table.expand(batch, -1) for table in (cos, sin)]
    expected_query, turned_key = apply_rotary_pos_emb(query, key, *(table[:, None] for table in turns))
    before = torch.randn(2, batch, kv_heads, slots, dim, generator=generator).to(device, dtype)
    expected = before.clone()
    row = torch.arange(batch, device=device)
    expected[0][row, :, at] = (key if rolling else turned_key)[:, :, 0]
    expected[1][row, :, at] = value[:, :, 0]
    given = [states.clone() for states in (query, key, value)]
    keys, values = before.clone()
    rotated = decode.append(query, key, value, cos, sin, keys, values, at.int() + 1, rolling)
    assert rotated.shape == query.shape and rotated.dtype == dtype
    assert torch.equal(rotated, expected_query), "queries"
    assert torch.equal(keys, expected[0]), "keys"
    assert torch.equal(values, expected[1]), "values"
    for states, as_given in zip((query, key, value), given, strict=True):
        assert torch.equal(states, as_given), "what was given is not written"


@cases(
    "heads, dim, dtype",
    [("mha", 16, FP32), ("gqa3", 80, FP16), ("mqa", 80, FP32), ("gqa3", 128, FP16)],
    itertools.product(HEADS, [16, 64, 80, 96, 128, 256], [FP32, FP16, BF16]),
)
@pytest.mark.parametrize("how", ["a row each", "one row", "rolling"])
def test_appended_and_rotated(device, heads, dim, dtype, how):
    """Halves exchanged, another head's or row's angle, a rounding that torch does not do (the uncaptured steps would
    part from it), a key that is rotated twice or never, or anything written beside the slot."""
    check_append([7, 1, 20], 20, heads, dim, dtype, device, rolling=how == "rolling", one_row=how == "one row",
                 layout=None)  # fmt: skip


@cases("heads, dim, dtype", [("gqa3", 80, FP32), ("mqa", 16, FP16)],
       itertools.product(["gqa3", "mqa"], [16, 80, 128, 256], [FP32, FP16, BF16]))  # fmt: skip
@pytest.mark.parametrize("rolling", [False, True])
def test_appended_in_8_bits(device, heads, dim, dtype, rolling):
    """A scale of the unrotated key where the rotated one is stored, of half a head, or at another slot; rounding down;
    a vector of zeros that divides by zero, or a NaN that is lost."""
    (kv_heads, group), slots = HEADS[heads], 9
    lengths = torch.tensor([7, 0, 1, 9], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(dim)
    query, key, value = (
        torch.randn(4, h, 1, dim, generator=generator).to(device, dtype) for h in (kv_heads * group, kv_heads, kv_heads)
    )
    value[2, 0], value[3, 0, 0, 5] = 0, torch.nan
    cos, sin = make_tables(slots, dim, dtype, device) if rolling else make_tables(4, dim, dtype, device)
    keys, values = torch.full((2, 4, kv_heads, slots, dim), 11, dtype=torch.int8, device=device)
    scales, norms = torch.full((2, 4, kv_heads, slots), UNTOUCHED, device=device), torch.zeros(4, kv_heads, slots)
    norms = norms.to(device)
    plain = [torch.zeros(4, kv_heads, slots, dim, dtype=dtype, device=device) for _ in range(2)]
    decode.append(query, key, value, cos, sin, *plain, lengths, rolling)
    decode.append(query, key, value, cos, sin, keys, values, lengths, rolling, norms, scales=tuple(scales))
    for b, length in enumerate(lengths.tolist()):
        for numbers, by, exact in zip((keys, values), scales, plain, strict=True):
            others = torch.arange(slots, device=device) != length - 1
            assert (numbers[b][:, others] == 11).all() and (by[b][:, others] == UNTOUCHED).all(), "beside the slot"
            if not length:
                continue
            expected, wanted = quantize(exact[b, :, length - 1])
            assert_close(by[b, :, length - 1].nan_to_num(), wanted.nan_to_num(), 1e-6, "scale")
            assert torch.equal(by[b, :, length - 1].isnan(), wanted.isnan())
            sound = ~wanted.isnan()
            apart = (numbers[b, :, length - 1].int() - expected.int())[sound].abs()
            assert (apart <= (device == "cuda")).all(), "numbers"
    assert_close(norms[0, :, 6], value[0, :, 0].float().norm(dim=-1), 1e-6, "norms")


@cases(
    "dtype, layout",
    [(FP32, as_slots), (FP16, as_model), (FP32, off_alignment)],
    itertools.product([FP32, FP16, BF16], [as_slots, as_model, off_alignment]),
)
def test_strides_do_not_show_in_an_append(device, dtype, layout):
    """Strides of the merged product taken for granted."""
    check_append([7, 1, 20], 20, "gqa3", 80, dtype, device, layout=layout)


@cases(
    "decay, first_head, counted, rolling",
    [(0.5, False, True, True), (1.0, True, False, False)],
    [(*asked, rolling) for asked in ((0.5, False, True), (1.0, True, False)) for rolling in (False, True)],
)
def test_a_decode_step_is_its_parts(device, decay, first_head, counted, rolling):
    """An argument that the step hands on to the wrong place."""
    step, lengths = decode_step([7, 1, 20]), torch.tensor([7, 1, 20], dtype=torch.int32, device=device)
    query, keys, values = make_states(step, "gqa3", 16, FP32, device, as_slots, 24)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    key, value = torch.randn(2, 3, 2, 1, 16, generator=torch.Generator().manual_seed(2)).to(device)
    tables = make_tables(24, 16, FP32, device)
    cos, sin = tables if rolling else (table[[6, 0, 19]] for table in tables)
    projected = [states.transpose(1, 2).reshape(len(states), 1, -1) for states in (query, key, value)]
    whole = [torch.cat(projected, dim=-1)]
    step_tables = [table[None] if rolling else table[:, None] for table in (cos, sin)]
    results = []
    for states in (None, projected, whole):
        own_keys, own_values = keys.clone(), values.clone()
        mass, count = torch.ones(2, 3, 2, 24, device=device)
        count = count if counted else None
        if states is None:
            rotated = decode.append(query, key, value, cos, sin, own_keys, own_values, lengths, rolling)
            output = decode.decode_attention(
                rotated, own_keys, own_values, lengths, SCALING, mass=mass, count=count, decay=decay,
                first_head=first_head, rope=(cos, sin) if rolling else None,
            )  # fmt: skip
        else:
            of_heads = lengths[:, None].expand(3, 2)
            output = decode.decode_step(
                states, *step_tables, own_keys, own_values, mass, count, None, of_heads, None, [], SCALING, decay,
                first_head, rolling, None, None,
            ).view(3, 1, -1, 16).transpose(1, 2)  # fmt: skip
        results.append([output, own_keys, own_values, mass] + [count] * counted)
    for result in results[1:]:
        for each, expected in zip(result, results[0], strict=True):
            assert torch.equal(each, expected)
    assert not torch.equal(results[0][3], torch.ones_like(results[0][3]))


# Heads with capacities of their own


CAPACITIES = (5, 70, 200)


def uneven_states(dtype, device):
    """Slots of three heads one after the other, lengths of two rows [2, 3], and mass; NaN past a head's end."""
    generator = torch.Generator().manual_seed(5)
    offsets = torch.tensor([0, *itertools.accumulate(CAPACITIES)], dtype=torch.int32)
    lengths = torch.tensor([[5, 33, 200], [1, 70, 64]], dtype=torch.int32)
    keys, values = torch.randn(2, 2, sum(CAPACITIES), 16, generator=generator).to(dtype)
    for b, h in itertools.product(range(2), range(3)):
        keys[b, offsets[h] + lengths[b, h] : offsets[h + 1]] = torch.nan
        values[b, offsets[h] + lengths[b, h] : offsets[h + 1]] = torch.nan
    mass = torch.rand(2, sum(CAPACITIES), generator=generator)
    return [states.to(device) for states in (keys, values, lengths, offsets, mass)]


@cases(
    "dtype, processors, rope, scored",
    [(FP16, 132, False, True), (FP16, 1, True, True), (FP32, 132, True, True), (FP16, 2, False, False)],
    [(dtype, processors, *asked) for dtype in (FP32, FP16, BF16) for processors in (1, 2, 132)
     for asked in ((False, True), (True, True), (False, False))],
)  # fmt: skip
def test_heads_of_their_own_capacities_attend_as_alone(monkeypatch, device, dtype, processors, rope, scored):
    """Another head's slots, length or mass, or a share of a long head's slots that is lost or counted twice."""
    monkeypatch.setattr(decode, "_processors", lambda device: processors)
    decode._divide.cache_clear()
    keys, values, lengths, offsets, mass = uneven_states(dtype, device)
    query = torch.randn(2, 12, 1, 16, generator=torch.Generator().manual_seed(6)).to(device, dtype)
    tables = make_tables(200, 16, dtype, device) if rope else None
    added, count = mass.clone(), mass.clone()
    wanted = {"mass": added, "count": count, "decay": 0.5} if scored else {}
    output = decode.decode_attention(
        query, keys, values, lengths, SCALING, rope=tables, offsets=offsets, capacities=CAPACITIES, **wanted
    )
    decode._divide.cache_clear()
    for h, (begin, capacity) in enumerate(zip(offsets.tolist(), CAPACITIES, strict=False)):
        there = slice(begin, begin + capacity)
        own, own_count = (mass[:, None, there].clone() for _ in range(2))
        wanted = {"mass": own, "count": own_count, "decay": 0.5} if scored else {}
        alone = decode.decode_attention(
            query[:, 4 * h : 4 * h + 4], keys[:, None, there], values[:, None, there], lengths[:, h].contiguous(),
            SCALING, rope=tables, **wanted,
        )  # fmt: skip
        assert_close(output[:, 4 * h : 4 * h + 4], alone, 8 * torch.finfo(dtype).eps, f"head {h}")
        if scored:
            assert_close(added[:, there], own[:, 0], 1e-3 if dtype != FP32 else 1e-5, f"mass of head {h}")
            assert torch.equal(count[:, there], own_count[:, 0])


@cases(
    "dtype, processors, rope",
    [(FP32, 132, False), (FP16, 1, False), (FP16, 132, True)],
    [(dtype, *how) for dtype in (FP32, FP16, BF16) for how in ((1, False), (132, False), (132, True))],
)
def test_heads_of_their_own_capacities_in_8_bits(monkeypatch, device, dtype, processors, rope):
    """Scales of another head, or counted from the row's first slot in every head."""
    monkeypatch.setattr(decode, "_processors", lambda device: processors)
    decode._divide.cache_clear()
    keys, values, lengths, offsets, mass = uneven_states(dtype, device)
    query = torch.randn(2, 12, 1, 16, generator=torch.Generator().manual_seed(6)).to(device, dtype)
    (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
    exact = [of.float() * by[..., None] for of, by in ((keys, key_scales), (values, value_scales))]
    of_heads = {
        "offsets": offsets,
        "capacities": CAPACITIES,
        "rope": make_tables(200, 16, FP32, device) if rope else None,
    }
    expected_mass = mass.clone()
    expected = decode.decode_attention(query.float(), *exact, lengths, SCALING, mass=expected_mass, **of_heads)
    if rope:
        of_heads["rope"] = tuple(table.to(dtype) for table in of_heads["rope"])
    output = decode.decode_attention(
        query, keys, values, lengths, SCALING, mass=mass, scales=(key_scales, value_scales), **of_heads
    )
    decode._divide.cache_clear()
    tolerance = 1e-5 if dtype == FP32 else 8 * torch.finfo(dtype).eps
    assert_close(output, expected, tolerance)
    assert_close(mass.nan_to_num(), expected_mass.nan_to_num(), tolerance)


@cases("dtype, rolling", [(FP32, False), (FP16, True)], itertools.product([FP32, FP16, BF16], [False, True]))
def test_heads_of_their_own_capacities_append_as_alone(device, dtype, rolling):
    """A token in another head's slots, a norm that is not its value's, or a token that a row does not bring."""
    keys, values, lengths, offsets, norms = uneven_states(dtype, device)
    lengths[0] = 0
    generator = torch.Generator().manual_seed(7)
    query, key, value = (torch.randn(2, h, 1, 16, generator=generator).to(device, dtype) for h in (12, 3, 3))
    cos, sin = make_tables(200, 16, dtype, device) if rolling else make_tables(2, 16, dtype, device)
    before = [states.clone() for states in (keys, values, norms)]
    decode.append(query, key, value, cos, sin, keys, values, lengths, rolling, norms, offsets)
    for h, (begin, capacity) in enumerate(zip(offsets.tolist(), CAPACITIES, strict=False)):
        there, of_head = slice(begin, begin + capacity), lengths[:, h].contiguous()
        alone = [states[:, None, there].contiguous() for states in before]
        part = (query[:, 4 * h : 4 * h + 4], key[:, h : h + 1], value[:, h : h + 1])
        decode.append(*part, cos, sin, alone[0], alone[1], of_head, rolling, alone[2])
        for states, expected in zip((keys, values, norms), alone, strict=True):
            assert torch.equal(states[:, there].nan_to_num(), expected[:, 0].nan_to_num())
        norm = value[1, h, 0].float().norm()
        assert_close(norms[1, begin + of_head[1] - 1], norm, 1e-6)
