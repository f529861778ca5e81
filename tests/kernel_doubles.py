"""The decode, slimming and MLP kernels in plain torch, for tests of what goes on around them: the interpreter takes
tenths of a second for each step. Like the kernels they read lengths from the tensors on the device only, and write in
place."""

import torch

from h2optimizer import attention
from h2optimizer.attention import rotate
from h2optimizer.backends import ATTENTION_BACKENDS
from h2optimizer.kernels import decode, mlp, slimming
from utils.slimming import select_slots


def append(query, key, value, cos, sin, keys, values, lengths, rolling):
    at, row = (lengths.long() - 1).clamp(min=0), torch.arange(len(lengths))
    there = (lengths > 0)[:, None, None]  # of a row without a token nothing is written
    rope = [(table[at] if rolling else table)[:, None, None] for table in (cos, sin)]
    keys[row, :, at] = torch.where(there, (key if rolling else rotate(key, *rope))[:, :, 0], keys[row, :, at])
    values[row, :, at] = torch.where(there, value[:, :, 0], values[row, :, at])
    return rotate(query, *rope)


def decode_attention(
    query, keys, values, lengths, scaling, *, mass=None, count=None, decay=1.0, first_head=False, rope=None
):
    if rope is not None:  # tables end with the longest row
        pad = (0, 0, 0, max(0, keys.shape[2] - len(rope[0])))
        keys = rotate(keys, *(torch.nn.functional.pad(table, pad)[: keys.shape[2]] for table in rope))
    grouped = query.view(len(query), keys.shape[1], -1, query.shape[-1])  # [B, Hkv, G, D]
    empty = torch.arange(keys.shape[2]) >= lengths[:, None, None, None]
    probs = (grouped @ keys.transpose(2, 3) * scaling).masked_fill(empty, -torch.inf).softmax(-1).nan_to_num(0.0)
    decay = torch.where(lengths > 0, decay, 1.0)[:, None, None]  # a row without a query is left as it is
    if mass is not None:
        mass.mul_(decay).add_(probs[:, :, 0] if first_head else probs.sum(dim=2))
    if count is not None:
        count.mul_(decay).add_(~empty[:, 0])
    return (probs @ values).view(query.shape)


def select(
    positions, mass, count, source_mass, source_count, width, mirror, kept, heavy, recent, rank, salt=0, move=True,
    order=None,
):  # fmt: skip
    lengths, seen = mirror.long()[:, :, None, None].unbind(0)  # [B, 1, 1]
    capacity, window, slot = positions.shape[2], heavy + recent, torch.arange(max(width, positions.shape[2]))
    age = lengths - slot[:width]
    score = -slot[:width].float().expand(*positions.shape[:2], -1) if rank == "oldest" else source_mass
    score = score / source_count.clamp(min=1e-30) if rank == "mean" else score
    score = order if rank == "order" else score
    keep = select_slots(score, age <= 0, (age > 0) & (age <= recent), window)
    keep = torch.where(torch.arange(keep.shape[2]) < lengths, keep, torch.arange(keep.shape[2]))
    slimming.hand_over(torch.nn.functional.pad(keep, (0, window - keep.shape[2])), kept)
    if not move:
        return
    left = lengths.clamp(max=window)
    filled = slot[:capacity] < left
    old = torch.nn.functional.pad(positions, (0, len(slot) - capacity))
    old = torch.where(slot < capacity, old, seen - lengths + slot)
    for slots, source, tail in (
        (positions, old[..., :width], seen - left + slot[:capacity]),
        (mass, source_mass, 0.0),
        (count, source_count, 0.0),
    ):
        if slots is not None:
            moved = torch.nn.functional.pad(source.gather(2, keep), (0, capacity - keep.shape[2]))
            slots.copy_(torch.where(filled, moved.to(slots.dtype), tail))


def compact(keys, values, source_keys, source_values, mirror, kept, window):
    left = mirror[0].clamp(max=window)[:, None, None, None]
    for slots, source in ((keys, source_keys), (values, source_values)):
        n = min(window, source.shape[2])
        at = kept[..., :n].long().clamp(max=source.shape[2] - 1)[..., None].expand(*kept.shape[:2], n, slots.shape[3])
        slots[:, :, :n] = torch.where(torch.arange(n)[:, None] < left, source.gather(2, at), slots[:, :, :n])


@torch.no_grad()  # a kernel has no gradients
def run_silu_and_multiply(gate_up):
    assert gate_up.is_contiguous()
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate).to(gate_up.dtype).float() * up).to(gate_up.dtype)


def install(monkeypatch):
    """Let the triton backend run on these instead of its kernels."""
    doubles = {decode: (append, decode_attention), slimming: (select, compact), mlp: (run_silu_and_multiply,)}
    for module, functions in doubles.items():
        for double in functions:
            monkeypatch.setattr(module, double.__name__, double)
    monkeypatch.setitem(ATTENTION_BACKENDS, "triton", attention.sdpa_attention)
