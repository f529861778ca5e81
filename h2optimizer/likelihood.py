"""Log-likelihoods through the model's own cache: contexts are prefilled, continuations are fed token by token.

A single forward over both would attend to every token and give any bounded cache the full cache's score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from h2optimizer.decoding import decoding_of
from h2optimizer.fidelity import ForcedDecode, Prefill
from h2optimizer.sharing import SharedPrefixes, most_snapshot_bytes
from h2optimizer.utils.memory import halving

SHARING = 16  # rows for continuations of one context, whatever the batch size: they share its prefill

Pair = tuple[list[int], list[int]]  # the tokens of a context and of its continuation, neither empty


class LogLikelihood(NamedTuple):
    """The score of a continuation after its context."""

    logprob: float  # nats, summed over its tokens
    greedy: bool  # whether each of them is the most probable one
    # Tokens scored after the cache had dropped slots; never the first, unless chunks of its context were slimmed.
    after_eviction: int


def log_likelihoods(
    model,
    pairs: list[Pair],
    pad_token_id: int = 0,
    dtype: torch.dtype | None = None,
    prefill: Prefill | None = None,
) -> list[LogLikelihood]:
    """Score continuations of any length together. Equal contexts are prefilled once.

    Args: dtype: of log-probabilities; prefill: of the contexts, see ForcedDecode.
    """
    lengths = [len(continuation) for _, continuation in pairs]
    steps = max(lengths)
    said = [continuation + [pad_token_id] * (steps - len(continuation)) for _, continuation in pairs]
    said = torch.tensor(said, device=model.device)
    forced = ForcedDecode(model, [context for context, _ in pairs], pad_token_id, prefill=prefill)
    logprobs, greedy = [], []
    h2o = getattr(model, "h2o", None)  # None: the full cache
    after_eviction = [int(h2o is not None and h2o.schedule.evicts_in_prefill(len(context))) for context, _ in pairs]
    for step in range(steps):
        if step:
            for row, evictions in enumerate(getattr(forced.cache, "evictions", ())):
                after_eviction[row] += evictions > 0 and step < lengths[row]
            forced.feed(said[:, step - 1])
        scores = forced.logits.log_softmax(-1, dtype=dtype)
        logprobs.append(scores.gather(1, said[:, step, None])[:, 0])
        greedy.append(scores.argmax(-1) == said[:, step])
    table = zip(
        torch.stack(logprobs, 1).tolist(), torch.stack(greedy, 1).tolist(), lengths, after_eviction, strict=True
    )
    return [LogLikelihood(sum(row[:n]), all(same[:n]), after) for row, same, n, after in table]


def log_likelihoods_in_batches(
    model,
    pairs: list[Pair],
    contexts: int,
    pad_token_id: int = 0,
    dtype: torch.dtype | None = None,
    snapshots: int | None = None,
    counts: Counter | None = None,
) -> Iterator[tuple[int, LogLikelihood]]:
    """Each pair's index and log-likelihood, batch by batch. A batch is halved if memory runs out; one row raises.

    A beginning that many contexts share is computed once, and these contexts come together.

    Args:
        contexts: most contexts in a batch.
        snapshots: bytes for such beginnings, as for a Batcher.
        counts: grows by `prompt_tokens_computed` and `prompt_tokens_shared`, tokens of the pairs' contexts.
    """
    counts = Counter() if counts is None else counts
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0], -len(pairs[i][1])))
    snapshots = most_snapshot_bytes(model) if snapshots is None else snapshots
    rows, decoding = max(contexts, SHARING), decoding_of(model, pad_token_id=pad_token_id)
    prefixes = SharedPrefixes(decoding, [pairs[i][0] for i in order], rows, snapshots)

    def computed(batch: list[int], rows: int) -> Iterator[tuple[int, LogLikelihood]]:
        """Compute at most `rows` rows at a time, removing finished ones from `batch`, numbers of `prefixes`."""
        while batch:
            numbers = batch[:rows]
            indices, prefill = [order[number] for number in numbers], partial(prefixes.prefill, prompts=numbers)
            before = prefixes.counts
            found = log_likelihoods(model, [pairs[i] for i in indices], pad_token_id, dtype, prefill)
            counts.update(prefixes.counts - before)
            yield from zip(indices, found, strict=True)
            del batch[:rows]

    for batch in _batches([pairs[order[number]][0] for number in prefixes.order], contexts):
        yield from halving(partial(computed, [prefixes.order[at] for at in batch]), len(batch))


def _batches(contexts: list[list[int]], at_once: int) -> list[list[int]]:
    """Indices of contexts, equal ones of which are neighbours, in batches of at most `at_once` different contexts and
    max(at_once, SHARING) rows."""
    batches: list[list[int]] = []
    held = 0  # contexts in the last batch
    for i, context in enumerate(contexts):
        new = not batches or context != contexts[batches[-1][-1]]
        if not batches or held + new > at_once or len(batches[-1]) == max(at_once, SHARING):
            batches.append([])
            held, new = 0, True
        batches[-1].append(i)
        held += new
    return batches
