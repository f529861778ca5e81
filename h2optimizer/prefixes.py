"""Shared prefixes: a beginning that several prompts share is computed once, and each prompt continues from it.

Mass is a sum over queries, so that of a prefix' own queries can be computed before what follows is known. A forward
that continues from a `Prefix` gives the slots of a forward of the whole prompts, up to the order of sums.
"""

from __future__ import annotations

import weakref

import torch

from h2optimizer.utils.cache import HHCache
from h2optimizer.utils.memory import to_device
from h2optimizer.utils.prefix import LayerPrefix, Prefix, fault_of, least_own_tokens

__all__ = ["Prefix", "can_share", "least_own_tokens", "prefill_prefix", "prefix_first"]

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # RoPE types whose frequencies depend on the largest position


def can_share(model_or_h2o) -> bool:
    """Whether prompts can share prefixes exactly, with a model or with the settings of an H2OConfig.

    They cannot with `prefill_chunk`, and with RoPE types whose frequencies depend on the length of the whole prompt.
    `score_decay` does not matter: mass decays once a forward, and the prefix is part of the first. With
    `score_queries`, at least that many tokens must follow: see `least_own_tokens`.
    """
    return _fault(model_or_h2o) is None


@torch.inference_mode(False)  # a prefix outlives the caller's inference mode
@torch.no_grad()
def prefill_prefix(model, ids, prefix: Prefix | None = None) -> Prefix:
    """`H2OForCausalLM.prefill_prefix`."""
    if (fault := _fault(model)) is not None:
        raise ValueError(f"prefill_prefix: {fault}")
    ids = torch.as_tensor(ids)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise ValueError(f"prefill_prefix: ids {tuple(ids.shape)}: give the tokens of one row, at least one")
    model.merge_projections()
    cache = _Recorder(model.h2o, prefix)
    model.fill_slots(cache, to_device(ids, model.device)[None])
    tokens = (() if prefix is None else prefix.tokens) + tuple(ids.tolist())
    return Prefix(model.h2o, tokens, tuple(cache.recorded), weakref.ref(model))


def prefix_first(input_ids: torch.Tensor, real: torch.Tensor, prefix: tuple[int, ...]) -> torch.Tensor:
    """The order of columns, int64 [B, columns], in which each row begins with the prefix and all else keeps its order.

    Args: input_ids: whole prompts [B, columns]; real: bool [B, columns] on the host, which columns are tokens.

    Raises: ValueError unless the tokens of each row begin with the prefix, and at least one more follows.
    """
    columns, first = torch.arange(real.shape[1]), len(prefix)
    order = torch.where(real & (real.cumsum(dim=1) <= first), columns, columns + len(columns)).argsort(dim=1)
    beginnings, tokens = input_ids.cpu().gather(1, order)[:, :first], torch.tensor(prefix)
    for row, count in enumerate(real.sum(dim=1).tolist()):
        if count <= first:
            raise ValueError(
                f"prefix: has {first} tokens, but row {row} only {count}: give whole prompts of at least one token more"
            )
        if not torch.equal(beginnings[row], tokens):
            at = int((beginnings[row] != tokens).nonzero()[0])
            raise ValueError(
                f"prefix: row {row} differs from it at token {at}: give whole prompts that begin with the prefix"
            )
    return order


def _fault(model_or_h2o) -> str | None:
    """Why prefixes cannot be shared exactly, and the way out; None if they can."""
    model = model_or_h2o if isinstance(model_or_h2o, torch.nn.Module) else None
    h2o = model_or_h2o if model is None else getattr(model, "h2o", None)
    if h2o is not None and (fault := fault_of(h2o)) is not None:
        return fault
    rope_type = "" if model is None else model.model.rotary_emb.rope_type
    if any(name in rope_type for name in LENGTH_DEPENDENT_ROPE):
        return f"RoPE type {rope_type} is not shared, as its frequencies depend on the length of the whole prompt"
    return None


class _Recorder(HHCache):
    """An empty cache that records its forward in place of slimming."""

    def __init__(self, h2o, prefix: Prefix | None):
        super().__init__(h2o, prefix)
        self.recorded: list[LayerPrefix] = []

    def least_own_tokens(self) -> int:
        return 1  # more tokens follow these

    def first_scored(self, new: list[int], later: list[int]) -> list[int]:
        # the queries that `score_queries` counts are among the tokens to come
        return super().first_scored(new, later) if self.h2o.score_queries is None else new

    def slim(self, layer_idx: int) -> None:
        self.recorded.append(self.layers[layer_idx].snapshot())
