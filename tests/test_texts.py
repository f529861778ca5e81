"""h2optimizer/texts.py: where a text begins, and where its stop strings end it."""

import pytest
from tokenizers import AddedToken

from checkpoints import make_tokenizer
from h2optimizer.texts import Stops, one_bos

END, HEADER, PAD = "<|eot_id|>", "<|header|>", "<|pad|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Special tokens as Llama 3 has them: most are in no list of the tokenizer's own."""
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("t"))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in (END, HEADER, PAD)])
    return tokenizer


def tokens_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "said, stops, text",
    [
        ("the end###more", ["###"], "the end"),
        ("the end###more", ["more", "nd#", "zz"], "the e"),
        ("the end", ["zz", END], None),
        (f"the end{END}more", [END], "the end"),
        (f"{END}more", [END], ""),
        (f"the end{END}more", ["more"], "the end"),  # as read: no special tokens
        (f"the end{END}more", [f"d{END}m"], "the en"),
        (f"the end{END}more", [f"{END}m"], "the end"),
        (f"the{PAD} end{PAD}{END}more", [f"nd{END}"], "the e"),  # others between, which nobody reads
        (f"the{PAD} end{END}", [END, "end"], "the "),  # the first, whichever kind
        (f"the{PAD} end{END}", ["zz"], None),
        (f"a{PAD}bcd", ["abc"], ""),  # said across a token that is not read
        (f"the end{HEADER}x{END}", [f"{HEADER}x{END}"], "the end"),
        (f"the end{HEADER}{END}", [f"{HEADER}x{END}"], None),
        (f"the end{PAD}{HEADER}", [">", "|", "pad"], None),  # within a special token there is no text
        (f"naïve 😀{END}", [END], "naïve 😀"),
        (f"naïve 😀{END}", ["😀"], "naïve "),
        ("x</s>y", ["</s>"], "x"),
        ("x<s>y", ["</s>", "<s>y"], "x"),
    ],
)
def test_text_ends_before_its_first_stop_string(tokenizer, said, stops, text):
    """Stop strings that name special tokens and never match; text that holds one; tokens that make up something else;
    a match that is noticed late."""
    tokens, stops = tokens_of(tokenizer, said), Stops(tokenizer, tuple(stops))
    first, noticed = stops.first(tokens), [stops.said(tokens[:n]) for n in range(1, len(tokens) + 1)]
    if text is None:
        assert first is None and not any(noticed)
        return
    assert first[0] == text and not any(string in first[0] for string in stops.strings)
    assert tokenizer.decode(tokens[: first[1]], skip_special_tokens=True).startswith(text)
    if first[1]:
        assert not tokenizer.decode(tokens[: first[1] - 1], skip_special_tokens=True).startswith(text)
    at = noticed.index(True)
    assert stops.first(tokens[: at + 1]) == first and all(noticed[at:]) and stops.first(tokens[:at]) is None


def test_padding_of_any_length_before_a_stop_string(tokenizer):
    """A look at the last tokens alone, none of which is text."""
    tokens = [*tokens_of(tokenizer, "the end#"), *tokens_of(tokenizer, PAD) * 500, *tokens_of(tokenizer, "##")]
    stops = Stops(tokenizer, ("###",))
    assert stops.said(tokens) and not stops.said(tokens[:-2]) and stops.first(tokens)[0] == "the end"


def test_letters_that_may_begin_a_stop_string(tokenizer):
    """A stream that prints the beginning of one, or waits with what cannot be."""
    stops = Stops(tokenizer, ("###", f"ab{END}c", END))
    for text, held in (("x", 0), ("x#", 1), ("x##", 2), ("#x", 0), ("xa", 1), ("xab", 2), ("xb", 0), ("", 0)):
        assert stops.held(text) == held, text
    assert Stops(tokenizer, ()).held("x") == Stops(tokenizer, (END,)).held("<|eot") - 5 == 0


def test_one_bos(tokenizer):
    """Llama reads a doubled BOS as something it has never seen."""
    bos = tokenizer.bos_token_id
    assert one_bos([bos, bos, 5], tokenizer) == [bos, 5] and one_bos([bos, 5, bos], tokenizer) == [bos, 5, bos]
    assert one_bos([], tokenizer) == []
