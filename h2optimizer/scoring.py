"""Log-likelihoods through the model's own cache: contexts are prefilled, what follows them is fed token by token.

One forward over both would attend to every token: to a bounded cache's score, whatever its window, the full cache's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from h2optimizer.batching import is_out_of_memory
from h2optimizer.fidelity import ForcedDecode
from utils.bench import free_memory

SHARING = 16  # rows that continuations of one context may take whatever the batch size: they share its prefill

Pair = tuple[list[int], list[int]]  # the tokens of a context and of its continuation, neither empty


class Score(NamedTuple):
    """Of a continuation after its context."""

    logprob: float  # nats, the sum of its tokens
    greedy: bool  # whether each of them is the most probable one
    after_eviction: (
        int  # how many came after the cache had dropped slots: not the first, but where chunks of its context did
    )


def score(model, pairs: list[Pair], pad_token_id: int = 0, dtype: torch.dtype | None = None) -> list[Score]:
    """Continuations of any lengths side by side; equal contexts are prefilled once. `dtype`: of log-probabilities."""
    lengths = [len(continuation) for _, continuation in pairs]
    steps = max(lengths)
    said = [continuation + [pad_token_id] * (steps - len(continuation)) for _, continuation in pairs]
    said = torch.tensor(said, device=model.device)
    forced = ForcedDecode(model, [context for context, _ in pairs], pad_token_id)
    logprobs, greedy = [], []
    after_eviction = [int(_evicts_in_prefill(getattr(model, "h2o", None), len(context))) for context, _ in pairs]
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
    return [Score(sum(row[:n]), all(same[:n]), after) for row, same, n, after in table]


def _evicts_in_prefill(h2o, tokens: int) -> bool:
    """Whether slots are dropped before the last chunk of a context of so many tokens; `h2o` None is the full cache."""
    if h2o is None or h2o.prefill_chunk is None:
        return False
    return (tokens - 1) // h2o.prefill_chunk * h2o.prefill_chunk > h2o.window_length


def score_in_batches(
    model, pairs: list[Pair], contexts: int, pad_token_id: int = 0, dtype: torch.dtype | None = None
) -> Iterator[tuple[int, Score]]:
    """Each pair's index and score, batch by batch: up to `contexts` contexts, the longest first, equal ones together.

    A batch has up to max(contexts, SHARING) rows. Where memory runs out it is halved; of one row that raises.
    """
    batches: list[list[int]] = []
    held = 0  # contexts in the last batch
    for i in sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0], -len(pairs[i][1]))):
        new = not batches or pairs[i][0] != pairs[batches[-1][-1]][0]
        if not batches or held + new > contexts or len(batches[-1]) == max(contexts, SHARING):
            batches.append([])
            held, new = 0, True
        batches[-1].append(i)
        held += new
    batches.reverse()
    while batches:
        batch = batches.pop()
        try:
            scores = score(model, [pairs[i] for i in batch], pad_token_id, dtype)
        except RuntimeError as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            scores = None
        if scores is None:  # handled here, where the traceback no longer holds the tensors
            free_memory(compiled=False)
            half = (len(batch) + 1) // 2
            batches += [batch[half:], batch[:half]]
        else:
            yield from zip(batch, scores, strict=True)
