"""Beginnings that prompts share: a prefix tree over tokens, reduced to the beginnings worth computing once."""

from __future__ import annotations

import heapq
import itertools
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Beginning:
    """A beginning that several prompts share."""

    length: int  # tokens, from the start of the prompt
    first: int  # the prompts that begin with it are neighbours in lexicographic order: the first,
    last: int  # and the last of them
    parent: Beginning | None = None  # the next shorter shared beginning, from which it is computed
    children: list[Beginning] = field(default_factory=list)

    @property
    def members(self) -> int:
        """How many prompts begin with it."""
        return self.last - self.first + 1

    @property
    def own(self) -> int:
        """Tokens that its parent lacks."""
        return self.length - (self.parent.length if self.parent else 0)

    @property
    def gain(self) -> int:
        """Tokens saved by computing it, rather than computing each of its children from its parent."""
        return self.own * (self.members - 1 - sum(child.members - 1 for child in self.children))

    @property
    def path(self) -> list[Beginning]:
        """It and the beginnings that it is computed from, longest first."""
        path = [self]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        return path

    @property
    def held(self) -> int:
        """Tokens of its path, each beginning counted whole."""
        return sum(beginning.length for beginning in self.path)

    def detach(self) -> list[Beginning]:
        """Remove it from the tree: its children are computed from its parent. Returns all whose gain has grown."""
        for child in self.children:
            child.parent = self.parent
        if self.parent is not None:
            self.parent.children.remove(self)
            self.parent.children += self.children
        return self.children + ([self.parent] if self.parent else [])


class PrefixTree:
    """Which beginnings of these prompts are computed once, and for which prompts.

    The last tokens of a prompt are never in a shared beginning, so every prompt has tokens of its own to compute.

    Args:
        prompts: tokens from 0 to 2**32 - 1, none empty. Equal prompts count as often as they are given.
        least_tokens: a beginning adds at least so many tokens to the one that it is computed from.
        least_saved: and saves at least so many.
        most_tokens: of a beginning and all those that it is computed from, each counted whole.
        least_own: last tokens of each prompt that stay its own, at least 1.

    Attributes:
        beginnings: those to compute, each after its parent.
        parents: for each beginning, the index of the one that it is computed from, or None.
        beginning_of: for each prompt, the index of its longest one; None if it shares none.
        order: indices of the prompts so that those of a beginning are together. Beginnings, and prompts that share
            nothing, come in the given order, a beginning where its first prompt would.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        least_tokens: int = 1,
        least_saved: int = 1,
        most_tokens: int = sys.maxsize,
        least_own: int = 1,
    ):
        keys = [_key(prompt[:-least_own]) for prompt in prompts]
        place = sorted(range(len(prompts)), key=keys.__getitem__)  # lexicographic: those who share are neighbours
        shared = [min(_common(keys[a], keys[b]), most_tokens) for a, b in itertools.pairwise(place)]
        kept = self.beginnings = _within(_worthwhile(_intervals(shared), least_tokens, least_saved), most_tokens)
        index = {id(beginning): i for i, beginning in enumerate(kept)}
        self.parents = [None if one.parent is None else index[id(one.parent)] for one in kept]
        at: list[int | None] = [None] * len(prompts)
        for i, beginning in enumerate(kept):  # longer ones come later
            at[beginning.first : beginning.last + 1] = [i] * beginning.members
        self.beginning_of: list[int | None] = [None] * len(prompts)
        for where, prompt in enumerate(place):
            self.beginning_of[prompt] = at[where]
        earliest = [min(place[beginning.first : beginning.last + 1]) for beginning in kept]
        paths = [tuple(earliest[index[id(one)]] for one in reversed(beginning.path)) for beginning in kept]
        rank = [(*(() if i is None else paths[i]), prompt) for prompt, i in enumerate(self.beginning_of)]
        self.order = sorted(range(len(prompts)), key=rank.__getitem__)

    def first_of(self, beginning: int) -> Beginning:
        """The shortest beginning from which this one is computed, or itself."""
        return self.beginnings[beginning].path[-1]

    @property
    def saved(self) -> int:
        """Tokens of all prompts that need not be computed."""
        return sum(beginning.own * (beginning.members - 1) for beginning in self.beginnings)

    @property
    def tokens_held(self) -> int:
        """The most tokens of beginnings that must be held at once if prompts come in `order`."""
        return max((beginning.held for beginning in self.beginnings), default=0)


def _key(tokens: Sequence[int]) -> bytes:
    """Tokens in bytes that sort as they do."""
    tokens = array("I", tokens)
    if sys.byteorder == "little":
        tokens.byteswap()
    return tokens.tobytes()


def _common(a: bytes, b: bytes) -> int:
    """How many tokens two keys have in common at the beginning."""
    size = min(len(a), len(b))
    differ = np.frombuffer(a, np.uint32, size // 4) != np.frombuffer(b, np.uint32, size // 4)
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size // 4


def _intervals(shared: list[int]) -> list[Beginning]:
    """All beginnings that at least two prompts share, each after its parent.

    `shared[i]` is what the prompts i and i + 1 in lexicographic order have in common. See Abouelhoda, Kurtz and
    Ohlebusch, "Replacing suffix trees with enhanced suffix arrays", 2004: these are the lcp-intervals.
    """
    found, open_ = [], []  # open_: (length, first prompt), growing
    for i, length in enumerate([*shared, 0]):
        first = i
        while open_ and open_[-1][0] > length:
            ended, first = open_.pop()
            found.append(Beginning(ended, first, i))
        if length and (not open_ or open_[-1][0] < length):
            open_.append((length, first))
    found.sort(key=lambda beginning: (beginning.first, beginning.length))
    above: list[Beginning] = []
    for beginning in found:
        while above and above[-1].last < beginning.last:
            above.pop()
        if above:
            beginning.parent = above[-1]
            above[-1].children.append(beginning)
        above.append(beginning)
    return found


def _worthwhile(found: list[Beginning], least_tokens: int, least_saved: int) -> list[Beginning]:
    """Without beginnings that are too short or gain too little, the least gain first: each raises that of others."""

    def fails(beginning: Beginning) -> bool:
        return beginning.own < least_tokens or beginning.gain < least_saved

    removed: set[int] = set()
    numbers = {id(beginning): i for i, beginning in enumerate(found)}
    doubtful = [(beginning.gain, i) for i, beginning in enumerate(found) if fails(beginning)]
    heapq.heapify(doubtful)
    while doubtful:
        gain, i = heapq.heappop(doubtful)
        if i in removed or gain != found[i].gain or not fails(found[i]):
            continue  # gone already, or its gain has grown since
        removed.add(i)
        for grown in found[i].detach():
            if fails(grown):
                heapq.heappush(doubtful, (grown.gain, numbers[id(grown)]))
    return [beginning for i, beginning in enumerate(found) if i not in removed]


def _within(kept: list[Beginning], most_tokens: int) -> list[Beginning]:
    """Without so many beginnings that no path holds more than `most_tokens`; those that gain least are left out."""
    removed: set[int] = set()
    for beginning in kept:
        while id(beginning) not in removed and beginning.held > most_tokens:
            least = min(beginning.path, key=lambda one: one.gain)
            removed.add(id(least))
            least.detach()
    return [beginning for beginning in kept if id(beginning) not in removed]
