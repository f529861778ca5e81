"""The decode, slimming and MLP kernels in plain torch, for tests of what goes on around them: the interpreter takes
tenths of a second for each step. Like the kernels they read lengths from the tensors on the device only, and write in
place. Slimming is torch's own; that the kernels leave the same cache is for test_slimming.py."""

import torch

from h2optimizer import attention
from h2optimizer.attention import rotate
from h2optimizer.backends import ATTENTION_BACKENDS
from h2optimizer.kernels import decode, mlp
from h2optimizer.slimming import KernelSlimmer
from utils.slimming import TorchSlimmer


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


@torch.no_grad()  # a kernel has no gradients
def run_silu_and_multiply(gate_up):
    assert gate_up.is_contiguous()
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate).to(gate_up.dtype).float() * up).to(gate_up.dtype)


def install(monkeypatch):
    """Let the triton backend run on these instead of its kernels."""
    doubles = {decode: (append, decode_attention), mlp: (run_silu_and_multiply,)}
    for module, functions in doubles.items():
        for double in functions:
            monkeypatch.setattr(module, double.__name__, double)
    for method in ("pick", "slim"):
        monkeypatch.setattr(KernelSlimmer, method, getattr(TorchSlimmer, method))
    monkeypatch.setitem(ATTENTION_BACKENDS, "triton", attention.sdpa_attention)
