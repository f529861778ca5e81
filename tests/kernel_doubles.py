"""The decode, slimming, layer and float8 kernels in plain torch, for tests of what goes on around them: the interpreter
takes tenths of a second for each step. Like the kernels they read lengths from the tensors on the device only, and
write in place. Slimming is torch's own; that the kernels leave the same cache is for test_slimming.py."""

import itertools

import torch

from h2optimizer import attention
from h2optimizer.attention import rotate
from h2optimizer.backends import ATTENTION_BACKENDS
from h2optimizer.decoder import token_logprobs
from h2optimizer.kernels import decode, float8, layer, logits, mlp, products
from h2optimizer.slimming import KernelSlimmer
from h2optimizer.utils.int8_slots import dequantize, quantize
from h2optimizer.utils.slimming import TorchSlimmer


def of_heads(states, heads, offsets):
    """Views of each head's slots, [B, slots(, D)]; no slots of none."""
    if states is None:
        return [None] * heads
    if offsets is None:
        return list(states.unbind(1))
    return [states[:, begin:end] for begin, end in itertools.pairwise(offsets.tolist())]


def append(query, key, value, cos, sin, keys, values, lengths, rolling, norms=None, offsets=None,
           scales=()):  # fmt: skip
    heads, row, rotated = key.shape[1], torch.arange(len(key)), []
    slots = [of_heads(states, heads, offsets) for states in (keys, values, norms, *(scales or (None, None)))]
    for h, (of_key, of_value, of_norm, *of_scales) in enumerate(zip(*slots, strict=True)):
        at = (lengths[:, h].long() - 1).clamp(min=0)
        there = (lengths[:, h] > 0)[:, None]  # of a row without a token nothing is written
        of_query, turned = query.unflatten(1, (heads, -1))[:, h], key[:, h, 0]
        if cos is not None:
            rope = [(table[at] if rolling else table)[:, None, None] for table in (cos, sin)]
            of_query, turned = rotate(of_query, *rope), turned if rolling else rotate(key, *rope)[:, h, 0]
        rotated.append(of_query)
        for to, new, to_scale in zip((of_key, of_value), (turned, value[:, h, 0]), of_scales, strict=True):
            if scales:
                new, scale = quantize(new)
                to_scale[row, at] = torch.where(there[:, 0], scale, to_scale[row, at])
            to[row, at] = torch.where(there, new, to[row, at])
        if of_norm is not None:
            of_norm[row, at] = torch.where(there[:, 0], value[:, h, 0].float().norm(dim=-1), of_norm[row, at])
    return torch.cat(rotated, dim=1)


def decode_attention(
    query, keys, values, lengths, scaling, *, mass=None, count=None, decay=1.0, first_head=False, rope=None,
    offsets=None, capacities=(), scales=(),
):  # fmt: skip
    heads, outputs = lengths.shape[1], []
    if scales:
        keys, values = (dequantize(*of, query.dtype) for of in zip((keys, values), scales, strict=True))
    slots = [of_heads(states, heads, offsets) for states in (keys, values, mass, count)]
    for h, (key, value, received, counted) in enumerate(zip(*slots, strict=True)):
        if rope is not None:  # tables end with the longest row
            pad = (0, 0, 0, max(0, key.shape[1] - len(rope[0])))
            key = rotate(key, *(torch.nn.functional.pad(table, pad)[: key.shape[1]] for table in rope))
        grouped = query.unflatten(1, (heads, -1))[:, h, :, 0]  # [B, G, D]
        empty = torch.arange(key.shape[1]) >= lengths[:, h, None]
        logits = (grouped @ key.transpose(1, 2) * scaling).masked_fill(empty[:, None], -torch.inf)
        probs = logits.softmax(-1).nan_to_num(0.0)
        of_row = torch.where(lengths[:, h] > 0, decay, 1.0)[:, None]  # a row without a query is left as it is
        if received is not None:
            received.mul_(of_row).add_(probs[:, 0] if first_head else probs.sum(dim=1))
        if counted is not None:
            counted.mul_(of_row).add_(~empty)
        outputs.append(probs @ value)
    return torch.cat(outputs, dim=1)[:, :, None]


@torch.no_grad()  # a kernel has no gradients
def silu_and_multiply(gate_up):
    assert gate_up.is_contiguous()
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate).to(gate_up.dtype).float() * up).to(gate_up.dtype)


def quantize_rows(rows, largest, least):
    top = rows.float().abs().amax(-1, keepdim=True).clamp(min=least)
    return (rows.float() * (largest / top)).to(torch.float8_e4m3fn), top / largest


@torch.no_grad()
def add_and_normalise(residual, branch, weight, eps):
    with torch.inference_mode(False):  # a sum that counts its changes
        summed = torch.empty_like(residual)
    torch.add(residual, branch, out=summed)
    scale = torch.rsqrt(summed.float().square().mean(-1, keepdim=True) + eps)
    return summed, weight * (summed.float() * scale).to(weight.dtype)


@torch.no_grad()
def normalise_heads(states, query_weight, key_weight, query_width, key_width, eps):
    for part, weight in zip(states.split([query_width, key_width, states.shape[-1] - query_width - key_width], -1)[:2],
                            (query_weight, key_weight), strict=True):  # fmt: skip
        heads = part.unflatten(-1, (-1, len(weight)))
        scale = torch.rsqrt(heads.float().square().mean(-1, keepdim=True) + eps)
        heads.copy_(weight * (heads.float() * scale).to(weight.dtype))
    return states


@torch.no_grad()
def turn(states, cos, sin, in_place):
    turned = rotate(states, cos[:, None], sin[:, None])
    return states.copy_(turned) if in_place else turned


@torch.no_grad()
def product(inputs, weight, *, bias=None, norm=None, eps=0.0, gated=False, residual=None, tile=None):
    states = inputs.float()
    if norm is not None:
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps) * norm.float()
    outputs = torch.nn.functional.linear(states, weight.float(), None if bias is None else bias.float())
    if gated:
        gate, up = outputs.chunk(2, dim=-1)
        outputs = torch.nn.functional.silu(gate) * up
    return (outputs if residual is None else residual.float() + outputs).to(inputs.dtype)


def install(monkeypatch):
    """Let the triton backend run on these instead of its kernels."""
    doubles = {
        decode: (append, decode_attention),
        mlp: (silu_and_multiply,),
        layer: (add_and_normalise, normalise_heads),
        float8: (quantize_rows,),
        logits: (token_logprobs,),
        products: (product,),
    }
    for module, functions in doubles.items():
        for double in functions:
            monkeypatch.setattr(module, double.__name__, double)
    monkeypatch.setattr(layer, "rotate", turn)
    for method in ("pick", "slim"):
        monkeypatch.setattr(KernelSlimmer, method, getattr(TorchSlimmer, method))
    monkeypatch.setitem(ATTENTION_BACKENDS, "triton", attention.sdpa_attention)
