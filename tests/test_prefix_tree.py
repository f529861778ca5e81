"""Which beginnings prompts share: against plain loops over random trees of prompts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h2optimizer.utils.prefix_tree import PrefixTree

PROMPTS = st.lists(st.lists(st.sampled_from([0, 1, 255, 256, 2**32 - 1]), min_size=1, max_size=9), max_size=14)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tokens_of(tree: PrefixTree, prompts: list[list[int]], i: int) -> list[int]:
    """The tokens of beginning i, taken from any prompt that uses it or one that is computed from it."""
    below = {i}
    for child, parent in enumerate(tree.parents):
        if parent in below:
            below.add(child)
    members = [prompt for prompt, of in zip(prompts, tree.beginning_of, strict=True) if of in below]
    length = tree.beginnings[i].length
    assert len({tuple(prompt[:length]) for prompt in members}) == 1, "all members begin with it"
    assert len(members) == tree.beginnings[i].members and len(members) >= 2
    assert all(len(prompt) > length for prompt in members), "a token of each prompt's own is left"
    return members[0][:length]


def computed(tree: PrefixTree, prompts: list[list[int]]) -> int:
    """Tokens of all forwards: each beginning after its parent, and each prompt after its beginning."""
    lengths = [beginning.length for beginning in tree.beginnings]
    of_beginnings = sum(n - (0 if p is None else lengths[p]) for n, p in zip(lengths, tree.parents, strict=True))
    rests = [len(t) - (0 if of is None else lengths[of]) for t, of in zip(prompts, tree.beginning_of, strict=True)]
    return of_beginnings + sum(rests)


@given(prompts=PROMPTS, own=st.integers(1, 3))
def test_all_that_is_shared_is_computed_once(prompts, own):
    """A beginning that is missed, shared by prompts that do not have it, or reaches into a prompt's last tokens."""
    tree = PrefixTree(prompts, least_own=own)
    stems = [prompt[:-own] for prompt in prompts]
    for i, of in enumerate(tree.beginning_of):
        longest = max((common(stems[i], other) for j, other in enumerate(stems) if j != i), default=0)
        assert (0 if of is None else tree.beginnings[of].length) == longest
    rests = sum(len(prompt) - len(stem) for prompt, stem in zip(prompts, stems, strict=True))
    assert computed(tree, prompts) == len({tuple(t[: n + 1]) for t in stems for n in range(len(t))}) + rests


@settings(max_examples=300)
@given(prompts=PROMPTS, tokens=st.integers(1, 4), saved=st.integers(1, 9), most=st.integers(0, 20))
def test_what_is_left_out_and_what_is_saved(prompts, tokens, saved, most):
    """A beginning that costs more than it saves, more tokens held than allowed, or tokens that are miscounted."""
    tree = PrefixTree(prompts, tokens, saved, most)
    assert tree.saved == sum(map(len, prompts)) - computed(tree, prompts)
    for i, (beginning, parent) in enumerate(zip(tree.beginnings, tree.parents, strict=True)):
        whole = tokens_of(tree, prompts, i)
        assert beginning.own >= tokens
        if parent is not None:
            assert parent < i, "a parent is computed first"
            shorter = tokens_of(tree, prompts, parent)
            assert beginning.own == len(whole) - len(shorter) and whole[: len(shorter)] == shorter
        path = [i]
        while tree.parents[path[-1]] is not None:
            path.append(tree.parents[path[-1]])
        held = sum(tree.beginnings[one].length for one in path)
        assert held <= min(most, tree.tokens_held)
    assert bool(tree.tokens_held) == bool(tree.beginnings)


@given(prompts=PROMPTS, saved=st.integers(1, 9))
def test_no_beginning_that_is_left_out_would_have_gained_enough(prompts, saved):
    """One removed because of children that were removed themselves."""
    tree = PrefixTree(prompts, 1, saved)
    for beginning in tree.beginnings:
        children = [other for other in tree.beginnings if other.parent is beginning]
        assert children == sorted(beginning.children, key=tree.beginnings.index)
        assert beginning.own * (beginning.members - 1 - sum(child.members - 1 for child in children)) >= saved


@given(prompts=PROMPTS, saved=st.integers(1, 9))
def test_order_keeps_members_together_and_nothing_else_moves(prompts, saved):
    """A beginning that is needed again after its snapshot was dropped; prompts that share nothing out of order."""
    tree = PrefixTree(prompts, 1, saved)
    assert sorted(tree.order) == list(range(len(prompts)))
    for i, beginning in enumerate(tree.beginnings):
        stem = tokens_of(tree, prompts, i)
        at = [where for where, j in enumerate(tree.order) if prompts[j][:-1][: len(stem)] == stem]
        assert at == list(range(at[0], at[0] + beginning.members))
    alone = [i for i in tree.order if tree.beginning_of[i] is None]
    assert alone == sorted(alone)
    for of in range(len(tree.beginnings)):
        users = [i for i in tree.order if tree.beginning_of[i] == of]
        assert users == sorted(users), "in the given order within a beginning"
    roots = [top(tree, i) for i in tree.order]
    first = {root: min(i for i in tree.order if top(tree, i) == root) for root in roots}
    assert [first[root] for root in roots] == sorted(first[root] for root in roots)


def top(tree: PrefixTree, prompt: int) -> tuple:
    """The shortest beginning that a prompt is computed from, or the prompt itself."""
    of = tree.beginning_of[prompt]
    while of is not None and tree.parents[of] is not None:
        of = tree.parents[of]
    return ("alone", prompt) if of is None else ("shared", of)


def test_a_template_for_all_and_shots_for_some():
    """Nested beginnings that are flattened, or a template whose few tokens nobody else needs."""
    template, shots = list(range(20)), list(range(100, 160))
    plain = [[*template, 200 + i] for i in range(10)]
    with_shots = [[*template, *shots, 300 + i] for i in range(10)]
    tree = PrefixTree([p for pair in zip(plain, with_shots, strict=True) for p in pair], 16, 64)
    assert [(one.length, one.members) for one in tree.beginnings] == [(20, 20), (80, 10)]
    assert tree.parents == [None, 0] and tree.saved == 20 * 19 + 60 * 9
    assert tree.tokens_held == 100
    tree = PrefixTree(with_shots + plain[:1], 16, 64)
    assert [(one.length, one.members) for one in tree.beginnings] == [(80, 10)], "a template saves 20 tokens"


@pytest.mark.parametrize("most, lengths", [(100, [20, 80]), (99, [80]), (80, [80]), (79, [79])])
def test_memory_that_holds_less_than_all(most, lengths):
    """Of two nested beginnings the one that saves less stays, or a long one is given up instead of cut."""
    template, shots = list(range(20)), list(range(100, 160))
    prompts = [[*template, *shots, 300 + i] for i in range(10)] + [[*template, 200 + i] for i in range(10)]
    assert [one.length for one in PrefixTree(prompts, 16, 64, most).beginnings] == lengths
