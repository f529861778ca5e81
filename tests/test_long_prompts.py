"""utils/long_prompts.py: several articles in one prompt, and numbers hidden in it."""

import json
import random
import re

import pytest

from h2optimizer.utils.cli import InputError
from h2optimizer.utils.long_prompts import NAMES, join_articles, needle_prompt
from h2optimizer.utils.requests import Request

TEXT = " ".join(f"Sentence {i} has 1.5 commas, more or less." for i in range(40))
HIDDEN = re.compile(r" The pass number of (\w+) is (\d+)\.")


def request_of(article: str, index: int = 0) -> Request:
    return Request.from_line(json.dumps({"article": article, "summary_gt": str(index)}), index)


def test_articles_of_a_long_prompt():
    """Instructions of each article left in the middle, a summary of another article than the one asked for, a rest that
    makes a shorter prompt."""
    prompts = [f"###\nArticle: body {i}\n\nSummarize the above article in 1 sentence.\n" for i in range(4)]
    joined = join_articles([request_of(article, i) for i, article in enumerate([*prompts, "bare"])], 2)
    asks = "Article 1: body {}\n\nArticle 2: body {}\n\nSummarize article {} in two sentences."
    assert [request.article for request in joined] == [asks.format(0, 1, 1), asks.format(2, 3, 2)]
    assert [(request.index, request.summary_gt) for request in joined] == [(0, "0"), (1, "3")]
    assert join_articles([request_of("bare")], 1)[0].article.startswith("Article 1: bare\n\n")


def test_articles_that_cannot_be_joined():
    """A prompt of no article, or one whose examples count as articles."""
    with pytest.raises(InputError, match="--articles 2: there are 1 requests"):
        join_articles([request_of("a b")], 2)
    shot = "###\nArticle: a\n\nSummarize the above article in 1 sentence.\nb\n\n"
    with pytest.raises(InputError, match=r"request 0 .* 0-shot"):
        join_articles([request_of(2 * shot)], 1)


@pytest.mark.parametrize("needles", [1, 4, len(NAMES)])
def test_needles(needles):
    """A question about another number than the reference, a sentence within a sentence, or all needles at one depth."""
    asked = needles - 1
    needle = needle_prompt(TEXT, needles, asked, random.Random(3))
    text, question = needle.prompt.split("\n\n")
    assert HIDDEN.sub("", text) == TEXT
    hidden = list(HIDDEN.finditer(text))
    names, numbers = ([match[group] for match in hidden] for group in (1, 2))
    assert len(set(names)) == len(set(numbers)) == needles
    assert question == f"What is the pass number of {names[asked]}? Answer with the number alone.\n"
    assert needle.answer == numbers[asked]
    assert all(text[match.start() - 1] == "." and text[match.end() :][:1] in ("", " ") for match in hidden)
    for i, match in enumerate(hidden):
        assert match.start() / len(text) == pytest.approx((i + 0.5) / needles, abs=0.05)
    assert needle.depth == pytest.approx((asked + 0.5) / needles, abs=0.05)
    assert needle == needle_prompt(TEXT, needles, asked, random.Random(3))
    assert needle.answer != needle_prompt(TEXT, needles, asked, random.Random(4)).answer


def test_needles_in_a_text_without_sentences():
    """An index error, or a needle that is lost."""
    needle = needle_prompt("one long line", 3, 1, random.Random(0))
    assert needle.prompt.startswith("one long line The pass number of") and len(HIDDEN.findall(needle.prompt)) == 3
