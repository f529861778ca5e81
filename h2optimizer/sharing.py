"""Snapshots of the beginnings that prompts share: each is computed once, before the first prompt that needs it."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import torch

from h2optimizer.decoding import BoundedDecoding, FullDecoding
from h2optimizer.utils.costs import head_dim
from h2optimizer.utils.memory import total_memory
from h2optimizer.utils.prefix_tree import PrefixTree

LEAST_TOKENS = 16  # of a beginning, beyond those of the one that it is computed from
# Tokens that a beginning must save. It adds two forwards: its own, and that of the prompts that continue from it, which
# others cannot be in. On a GPU each takes as long as some 500 tokens do, however few it has.
LEAST_SAVED = 1024
MEMORY_SHARE = 16  # snapshots take at most this part of a device's memory


class SharedPrefixes:
    """Snapshots for prompts that come in `order`, each dropped with the last prompt that needs it.

    Args:
        decoding: computes the snapshots.
        prompts: all of them; below, a prompt is its index here.
        rows: sequences decoded at once. As many equal prompts are computed together anyway.
        most_bytes: of all snapshots at any time; 0 shares nothing and keeps the given order.

    Attributes:
        order: the prompts so that those who share a beginning, and equal ones, are together.
        counts: tokens of the prompts that joined so far: `prompt_tokens_computed`, and `prompt_tokens_shared`, which
            other prompts had computed.
    """

    def __init__(self, decoding: BoundedDecoding | FullDecoding, prompts: list[list[int]], rows: int, most_bytes: int):
        self._decoding, self._prompts = decoding, prompts
        share = most_bytes > 0 and decoding.can_share
        groups = _of_equal(prompts, rows) if share else [[i] for i in range(len(prompts))]
        self._tree = tree = _tree(decoding, [prompts[group[0]] for group in groups], most_bytes if share else 0)
        self.order = [i for group in tree.order for i in groups[group]]
        self._beginning_of = {i: tree.beginning_of[at] for at, group in enumerate(groups) for i in group}
        self._left = Counter(self._beginning_of.values()) + Counter(tree.parents)  # prompts and beginnings that need it
        self._held: dict[int, object] = {}
        self.counts = Counter()

    def beginning_of(self, prompt: int) -> int | None:
        """The beginning that a prompt continues from, as a number; None for none."""
        return self._beginning_of[prompt]

    def tokens_of(self, prompt: int) -> int:
        """How many tokens the beginning of a prompt has."""
        return self._length(self._beginning_of[prompt])

    def join(
        self, decoding: BoundedDecoding | FullDecoding, prompts: list[int], rows: list[int], of_rows: int
    ) -> tuple[torch.Tensor, list[int]]:
        """Let prompts of one beginning join `rows` of another decoding of the same model.

        Returns: logits as `decoding.join`, and how many tokens were computed for each prompt; the others were shared.
        """
        beginning = self._beginning_of[prompts[0]]
        snapshot, added = self._snapshot(beginning, prompts[0])
        logits = decoding.join([self._prompts[prompt] for prompt in prompts], rows, of_rows, snapshot)
        self._release(beginning, len(prompts))
        return logits, self._count(prompts, added)

    def prefill(self, decoding: BoundedDecoding | FullDecoding, prompts: list[int]) -> torch.Tensor:
        """Start a decoding with one row per prompt: logits [n, vocabulary] of the next tokens.

        The prompts must be neighbours in `order`.
        """
        groups = [list(group) for _, group in groupby(prompts, self.beginning_of)]
        if groups == [prompts] and self._beginning_of[prompts[0]] is None:
            self._count(prompts)
            return decoding.prefill([self._prompts[prompt] for prompt in prompts])
        decoding.drop()
        rows = iter(range(len(prompts)))
        logits = [self.join(decoding, group, [next(rows) for _ in group], len(prompts))[0] for group in groups]
        return torch.cat(logits)

    def _count(self, prompts: list[int], added: int = 0) -> list[int]:
        """Tokens computed for each of these prompts of one beginning; `added` are those of new snapshots."""
        seen, computed = set(), []
        for prompt in prompts:
            tokens = tuple(self._prompts[prompt])
            computed.append(0 if tokens in seen else len(tokens) - self.tokens_of(prompt))
            seen.add(tokens)
        computed[0] += added
        shared = sum(len(self._prompts[prompt]) for prompt in prompts) - sum(computed)
        self.counts = self.counts + Counter(prompt_tokens_computed=sum(computed), prompt_tokens_shared=shared)
        return computed

    def _length(self, beginning: int | None) -> int:
        return 0 if beginning is None else self._tree.beginnings[beginning].length

    def _snapshot(self, beginning: int | None, prompt: int) -> tuple[object, int]:
        """The snapshot of a prompt's beginning, None for none, and how many tokens had to be computed for it."""
        if beginning is None:
            return None, 0
        added = 0
        if beginning not in self._held:
            parent = self._tree.parents[beginning]
            tokens = self._prompts[prompt][self._length(parent) : self._length(beginning)]
            shorter, added = self._snapshot(parent, prompt)
            self._held[beginning] = self._decoding.snapshot(tokens, shorter)
            self._release(parent)
            added += len(tokens)
        return self._held[beginning], added

    def _release(self, beginning: int | None, prompts: int = 1) -> None:
        """So many that needed the snapshot have been computed; it is dropped if no other does."""
        if beginning is not None:
            self._left[beginning] -= prompts
            if self._left[beginning] <= 0:
                self._held.pop(beginning, None)


def _of_equal(prompts: list[list[int]], rows: int) -> list[list[int]]:
    """Groups of equal prompts, at most `rows` in each, in the order of their first."""
    equal: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        equal.setdefault(tuple(prompt), []).append(i)
    return sorted(group[at : at + rows] for group in equal.values() for at in range(0, len(group), rows))


def _tree(decoding: BoundedDecoding | FullDecoding, prompts: list[list[int]], most_bytes: int) -> PrefixTree:
    most_tokens = most_bytes // bytes_per_token(decoding.model)
    return PrefixTree(prompts, LEAST_TOKENS, LEAST_SAVED, most_tokens, decoding.least_own)


def bytes_per_token(model) -> int:
    """Bytes of a snapshot per token: keys and values, and at most three float32 that rank them."""
    config = model.config
    return config.num_hidden_layers * config.num_key_value_heads * (2 * head_dim(config) * model.dtype.itemsize + 12)


def common_beginning(decoding: BoundedDecoding | FullDecoding, prompts: list[list[int]], most_bytes: int) -> list[int]:
    """The tokens with which all prompts begin, if it is worth computing them once; else none."""
    if not (most_bytes and decoding.can_share and prompts):
        return []
    distinct = {tuple(prompt) for prompt in prompts}
    most_tokens = min(min(map(len, distinct)) - decoding.least_own, most_bytes // bytes_per_token(decoding.model))
    first, last = min(distinct)[: max(0, most_tokens)], max(distinct)  # all others are between them
    differ = (i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    common = list(first[: next(differ, len(first))])
    worthwhile = len(common) >= LEAST_TOKENS and len(common) * (len(distinct) - 1) >= LEAST_SAVED
    return common if worthwhile else []


def deal(prompts: list[list[int]], shares: int) -> list[list[int]]:
    """Indices of the prompts for each of several processes, about as many for each, in the given order.

    Prompts that share a beginning go to one process. If they are so many that this would be unfair, they are dealt out
    like all others, and each process computes their beginning.
    """
    tree = PrefixTree(prompts, LEAST_TOKENS, LEAST_SAVED)
    together: dict[tuple, list[int]] = {}
    for i, beginning in enumerate(tree.beginning_of):
        few = beginning is not None and tree.first_of(beginning).members * 4 * shares <= len(prompts)
        together.setdefault(("beginning", id(tree.first_of(beginning))) if few else ("prompt", i), []).append(i)
    dealt: list[list[int]] = [[] for _ in range(shares)]
    for group in together.values():
        min(dealt, key=len).extend(group)
    return [sorted(share) for share in dealt]


def most_snapshot_bytes(model) -> int:
    """Bytes that the snapshots for a model may take at any time."""
    return total_memory(model.device) // MEMORY_SHARE


def snapshot_bytes(
    decoding: BoundedDecoding | FullDecoding, prompts: list[list[int]], rows: int, most_bytes: int
) -> int:
    """The most bytes that a SharedPrefixes of these arguments holds at any time."""
    if not (most_bytes and decoding.can_share):
        return 0
    first = [prompts[group[0]] for group in _of_equal(prompts, rows)]
    return _tree(decoding, first, most_bytes).tokens_held * bytes_per_token(decoding.model)
