"""Long prompts: several articles in one, and facts hidden in them that the prompt asks for ("needles")."""

from __future__ import annotations

import bisect
import json
import random
import re
from typing import NamedTuple, TypeVar

from h2optimizer.utils.cli import InputError
from h2optimizer.utils.requests import Request

T = TypeVar("T")

SHOT = "###\nArticle: "  # opens each article of a prompt, as H2O's files have it
PROMPT = re.compile(f"{SHOT}(.*?)\n\nSummarize the above article in [^\n]*\n?", re.DOTALL)
NAMES = """Amber Birch Cedar Dahlia Elder Fennel Ginger Hazel Indigo Juniper Larkspur Maple Nutmeg Olive Poppy
    Saffron""".split()


def in_groups(items: list[T], articles: int, of: str) -> list[list[T]]:
    """So many at once; a rest that is too small is left out. Raises InputError where there are fewer `of` them."""
    if len(items) < articles:
        raise InputError(f"--articles {articles}: there are {len(items)} {of}; give fewer, or more {of}")
    return [items[i * articles : (i + 1) * articles] for i in range(len(items) // articles)]


def numbered(articles: list[str]) -> str:
    return "\n\n".join(f"Article {number}: {article}" for number, article in enumerate(articles, 1))


def summary_prompt(articles: list[str], asked: int) -> str:
    """The articles, and a request for a summary of number `asked`, from 0."""
    return f"{numbered(articles)}\n\nSummarize article {asked + 1} in two sentences."


def join_articles(requests: list[Request], articles: int) -> list[Request]:
    """Long prompts from short ones: so many articles, one after the other, and a summary of one of them is asked for.

    Each request is in one prompt; a rest that is too small for another prompt is left out. Prompt i asks for its
    article i modulo `articles`, and takes the reference summary and the settings from that article's request.

    Raises: InputError where there are fewer requests, or one has several articles (few-shot prompts).
    """
    joined = []
    for i, group in enumerate(in_groups(requests, articles, "requests")):
        asked = i % articles
        prompt = summary_prompt([_article_alone(request) for request in group], asked)
        joined.append(Request.from_line(json.dumps(group[asked].fields | {"article": prompt}), i))
    return joined


def _article_alone(request: Request) -> str:
    """Without what asks for its summary. Raises InputError for several articles."""
    if request.article.count(SHOT) > 1:
        raise InputError(f"--articles: request {request.index} has several articles already; give 0-shot requests")
    match = PROMPT.fullmatch(request.article)
    return (match[1] if match else request.article).strip()


class Needle(NamedTuple):
    """A prompt that asks for a hidden number."""

    prompt: str
    answer: str
    depth: float  # of the asked number in the text: 0 at its beginning, 1 at its end


def needle_prompt(text: str, needles: int, asked: int, generator: random.Random) -> Needle:
    """Hide `needles` sentences "The pass number of … is …." in a text, and ask for the number of one, from 0.

    The sentences stand between others, in the middles of equal parts of the text. Names and numbers are drawn. This is
    the retrieval test that long-context work calls needle in a haystack, with several needles as in RULER (arXiv
    2404.06654).
    """
    names = generator.sample(NAMES, needles)
    numbers = generator.sample(range(10_000, 100_000), needles)
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", text)] or [len(text)]
    places = [_nearest(ends, (needle + 0.5) / needles * len(text)) for needle in range(needles)]
    parts, before = [], 0
    for place, name, number in zip(places, names, numbers, strict=True):
        parts.append(f"{text[before:place]} The pass number of {name} is {number}.")
        before = place
    question = f"What is the pass number of {names[asked]}? Answer with the number alone.\n"
    return Needle(f"{''.join(parts)}{text[before:]}\n\n{question}", str(numbers[asked]), places[asked] / len(text))


def _nearest(places: list[int], wanted: float) -> int:
    """Of places in ascending order."""
    right = min(bisect.bisect_left(places, wanted), len(places) - 1)
    return min(places[max(right - 1, 0) : right + 1], key=lambda place: abs(place - wanted))
