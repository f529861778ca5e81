"""utils/requests.py and utils/rouge.py: what a line may hold, and ROUGE by hand."""

import json
import random

import pytest

from h2optimizer.utils.requests import InputError, Request, read_requests, unheeded
from h2optimizer.utils.results import fingerprint
from h2optimizer.utils.rouge import EveryScript, Rouge, is_found, mean_with_interval

LINE = '{"article": "a b", "summary_gt": "c"}\n'


@pytest.fixture
def read(tmp_path):
    """read(content, ...) writes the bytes to a file and reads its requests."""

    def read(content: bytes | str, *args, **kwargs):
        path = tmp_path / "requests.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_requests(path, *args, **kwargs)

    return read


def line_with(**fields) -> str:
    return json.dumps({"article": "a b", "summary_gt": "c"} | fields) + "\n"


def refused(reading, *expected: str):
    """The call raises an InputError of one line that holds the expected words."""
    with pytest.raises(InputError) as caught:
        reading()
    message = str(caught.value)
    assert "\n" not in message
    for words in expected:
        assert words in message, message


# Requests


def test_defaults_decode_greedily():
    """A line with only its two texts gets 64 tokens, greedy; other defaults would sample ROUGE figures."""
    request = Request.from_line(LINE, 3)
    assert (request.index, request.article, request.summary_gt) == (3, "a b", "c")
    assert (request.max_tokens, request.temperature, request.top_p, request.n) == (64, 0.0, 1.0, 1)
    assert request.stop == ()


def test_fields_are_read_as_given():
    """A field that is dropped or renamed on the way; null stands for "not given" in the H2O project's files."""
    given = {"max_tokens": 7, "temperature": 0.3, "top_p": 0.9, "n": 2, "stop": ["###", "\n\n"], "logprobs": None}
    request = Request.from_line(line_with(**given), 0)
    assert (request.max_tokens, request.temperature, request.top_p, request.n) == (7, 0.3, 0.9, 2)
    assert request.stop == ("###", "\n\n")
    assert request.fields == {"article": "a b", "summary_gt": "c"} | given
    unset = Request.from_line(line_with(max_tokens=None, temperature=None, top_p=None, n=None, stop=None), 0)
    assert (unset.max_tokens, unset.temperature, unset.top_p, unset.n, unset.stop) == (64, 0.0, 1.0, 1, ())


def test_one_stop_string_stands_for_a_list():
    """tuple("###") would make three stop strings of one character."""
    assert Request.from_line(line_with(stop="###"), 0).stop == ("###",)
    assert Request.from_line(line_with(stop=[]), 0).stop == ()


def test_whole_numbers_of_table_programs():
    """pandas writes a column of counts with a gap as 12.0, which is 12."""
    request = Request.from_line(line_with(max_tokens=12.0, n=2.0), 0)
    assert (request.max_tokens, request.n) == (12, 2) and type(request.max_tokens) is type(request.n) is int


def test_fields_that_do_nothing_are_named_once(read):
    """top_k that is ignored without a word; a warning for each line, or for what H2O's and HELM's files hold anyway."""
    harmless = {"logprobs": 1, "echo": False, "best_of": 1, "model": "x", "engine": "y", "request_type": "z", "id": 3}
    harmless |= {"top_k": None, "presence_penalty": 0.0, "top_p": 1, "stop": None, "min_p": None}
    assert unheeded(read(line_with(**harmless))[0]) is None
    asked = line_with(top_k=5) + line_with(top_k=-1) + line_with(**{"min\np": 0.1}, echo=True)
    assert unheeded(read(asked)[0]) == ("warning: unknown fields are ignored: top_k, min p, echo (in 2 of 3 requests)")
    many = unheeded(read(line_with(**{f"f{i}": i for i in range(1000)}))[0])
    assert many.endswith("f9 and 990 more (in 1 of 1 requests)") and len(many) < 200


BAD_LINES = {
    "{": "not JSON",
    "article: a": "not JSON",
    "[" * 100_000: "not JSON",
    '["a", "b"]': "not a JSON object",
    '"article"': "not a JSON object",
    "null": "not a JSON object",
    '{"summary_gt": "c"}': "no text in 'article'",
    '{"article": "a"}': "no text in 'summary_gt'",
    '{"article": " \\n", "summary_gt": "c"}': "no text in 'article'",
    '{"article": "a", "summary_gt": ""}': "no text in 'summary_gt'",
    '{"article": ["a"], "summary_gt": "c"}': "no text in 'article'",
    '{"article": null, "summary_gt": "c"}': "no text in 'article'",
    '{"article": "\\ud83d", "summary_gt": "c"}': "not valid UTF-8",
    line_with(max_tokens=0): "max_tokens=0",
    line_with(max_tokens=-1): "max_tokens=-1",
    line_with(max_tokens=8.5): "max_tokens=8.5",
    line_with(max_tokens=10**9): "max_tokens=1000000000: must be a whole number from 1 to 1,000,000",
    line_with(n=10**9): "n=1000000000: must be a whole number from 1 to 1,000",
    line_with(n=1e300): "n=1000",
    line_with(max_tokens="8"): "max_tokens='8'",
    line_with(max_tokens=True): "max_tokens=True",
    line_with(temperature="0.3"): "temperature='0.3'",
    line_with(temperature=-0.1): "temperature=-0.1",
    line_with(temperature=float("nan")): "contains NaN or infinity",
    line_with(temperature=float("inf")): "contains NaN or infinity",
    line_with(anything={"a": [float("nan")]}): "contains NaN or infinity",
    '{"article": "a", "summary_gt": "c", "seed": 1e999}': "contains NaN or infinity",
    line_with(temperature=1e9): "temperature=1000000000.0",
    line_with(temperature=1e-40): "temperature=1e-40",
    line_with(temperature=10**400): "temperature=1000",
    line_with(top_p=0): "top_p=0",
    line_with(top_p=1.01): "top_p=1.01",
    line_with(top_p=[1]): "top_p=[1]",
    line_with(n=0): "n=0",
    line_with(n=1.5): "n=1.5",
    line_with(stop=""): "stop=''",
    line_with(stop=["#", ""]): "stop=['#', '']",
    line_with(stop=[1]): "stop=[1]",
    line_with(stop={"a": 1}): "stop={'a': 1}",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:50])
def test_bad_line_is_named(read, line):
    """A bad line in the middle of a file must end in its number and the fault, not in a traceback from generate."""
    content = LINE + "\n" + line.strip() + "\n" + LINE
    refused(lambda: read(content), "line 3:", BAD_LINES[line], "--skip_bad_requests")
    requests, skipped = read(content, skip_bad=True)
    assert ([request.index for request in requests], skipped) == ([0, 1], 1)


def test_line_that_is_not_utf8_is_named(read):
    """UnicodeDecodeError would be a traceback, and errors="replace" a summary of other text."""
    refused(lambda: read(LINE.encode() + b'{"article": "caf\xe9", "summary_gt": "c"}\n'), "line 2", "UTF-8")
    refused(lambda: read(LINE.encode("utf-16")), "line 1", "UTF-8")


def test_long_value_is_cut_in_the_message(read):
    """A list of ten thousand stop strings must not fill the terminal."""
    with pytest.raises(InputError) as caught:
        read(line_with(stop=[1] * 10_000))
    assert len(str(caught.value)) < 400


def test_byte_order_mark_and_windows_line_ends(read):
    """Files saved on Windows begin with a byte order mark, which json.loads refuses, and end lines with CR LF."""
    windows = b"\xef\xbb\xbf" + (LINE * 2).replace("\n", "\r\n").encode()
    requests, skipped = read(windows)
    assert [request.fields for request in requests] == [json.loads(LINE)] * 2 and not skipped


def test_last_line_without_newline_counts(read):
    """Editors leave the last newline out; the last request must not be lost."""
    assert len(read(LINE + LINE.strip())[0]) == 2


def test_line_separators_inside_text_do_not_split_a_line(read):
    """str.splitlines splits at U+2028, which JSON allows inside a string."""
    (request,), _ = read('{"article": "a\u2028b \u00fc \U0001f642", "summary_gt": "c"}\n')
    assert request.article == "a\u2028b ü 🙂"


def test_limit_counts_requests_not_lines(read):
    """--sample_num 2 over a blank and a bad line means two requests, and what comes after is not even read."""
    content = "\n" + LINE + "bad\n" + LINE + "never read\n"
    requests, skipped = read(content, skip_bad=True, limit=2)
    assert (len(requests), skipped) == (2, 1)


@pytest.mark.parametrize("content", ["", "\n \n", "bad\nworse\n"])
def test_no_requests_is_an_error(read, content):
    """Means over no requests are NaN; with --skip_bad_requests a file of bad lines comes to the same."""
    refused(lambda: read(content, skip_bad=True), "has no requests")


def test_bad_lines_only_are_counted_in_the_error(read):
    """The user must see that the file was not empty."""
    refused(lambda: read("bad\nworse\n", skip_bad=True), "2 bad lines")


def test_unreadable_input(tmp_path):
    """A missing file and a folder are the user's slip, not a traceback."""
    refused(lambda: read_requests(tmp_path / "none.jsonl"), "--input-path", "No such file")
    refused(lambda: read_requests(tmp_path), "--input-path", "directory")


def test_fingerprint_sees_every_change(read):
    """A file that changed under a resumed run: another text, setting, order or number of requests."""
    one, other = line_with(article="x"), line_with(article="y")
    files = [one + other, other + one, one, one + one + other, one + line_with(article="y", max_tokens=5)]
    assert len({fingerprint(read(content)[0]) for content in files}) == len(files)
    assert fingerprint(read(one)[0]) == fingerprint(read("\n" + one.replace(", ", ",   "))[0]), "only the form differs"


# ROUGE


@pytest.mark.parametrize(
    ("reference", "summary", "expected"),
    [
        # 5 of 6 and of 5 words; 3 of 5 and of 4 pairs; the longest common subsequence has all 5
        ("the cat sat on the mat", "the cat on the mat", (10 / 11, 2 * 0.75 * 0.6 / 1.35, 10 / 11)),
        # the same words; 2 of 3 pairs; "the gunman" or "police killed" in order
        ("police killed the gunman", "the gunman police killed", (1.0, 2 / 3, 0.5)),
        # stems, case and punctuation: run, walk, fast against run, walk
        ("Running, walking fast!", "runs walked", (0.8, 2 / 3, 0.8)),
        ("alpha beta", "gamma delta", (0.0, 0.0, 0.0)),
        ("alpha beta", "", (0.0, 0.0, 0.0)),
        ("alpha", "alpha", (1.0, 0.0, 1.0)),  # one word has no pairs
        # a repeated word counts as often as the reference has it: precision 1/4, recall 1/2
        ("alpha beta", "alpha alpha alpha alpha", (1 / 3, 0.0, 1 / 3)),
    ],
)
def test_rouge_by_hand(reference, summary, expected):
    """Precision or recall for F, no stemming, or a swapped name of ROUGE type."""
    scores = Rouge().score(reference, summary)
    assert list(scores) == ["rouge1", "rouge2", "rougeL"]
    assert tuple(scores.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, words",
    {
        "市议会讨论新图书馆的预算": [*"市议会讨论新图书馆的预算"],
        "2024年に東京タワーへ": ["2024", *"年に東京タワーへ"],
        "iPhone手机!": ["iphon", "手", "机"],
        "ที่นี่ดี": ["ที่", "นี่", "ดี"],
        "Городской совет обсудил бюджет.": ["городской", "совет", "обсудил", "бюджет"],
        "हिन्दी में लिखा": ["हिन्दी", "में", "लिखा"],
        "شهر بزرگ ۱۴۰۳": ["شهر", "بزرگ", "۱۴۰۳"],
        "도서관 예산": ["도서관", "예산"],
        "Cafe\u0301 CAFÉ": ["café", "café"],
        "می\u200cخواهم میخواهم": ["میخواهم", "میخواهم"],  # noqa: RUF001
        "ＡＢＣ ﬁne": ["abc", "fine"],  # noqa: RUF001
        "❤\ufe0f 😀 … – ½ m² ™": ["m"],  # noqa: RUF001
        "don’t — £200": ["don", "t", "200"],  # noqa: RUF001
    }.items(),
)
def test_words_of_every_script(text, words):
    """Letters that rouge-score drops, so that a text scores 0 against itself; marks or forms that part equal words."""
    assert EveryScript().tokenize(text) == words
    if len(words) > 1:
        assert list(Rouge().score(text, text).values()) == [1.0] * 3


def test_ascii_words_are_rouge_scores_own():
    """Scores that no longer compare with published ones."""
    from rouge_score.tokenizers import DefaultTokenizer

    ours, theirs, draw = EveryScript(), DefaultTokenizer(use_stemmer=True), random.Random(0)
    ascii_text = [*map(chr, range(128)), *"aeiou stning" * 20]
    symbols = [*ascii_text, *"’“”–—…£€½²™©❤😀\u2028\u00a0\u20e3"]  # noqa: RUF001
    for alphabet in (ascii_text, symbols):
        for _ in range(500):
            text = "".join(draw.choices(alphabet, k=draw.randint(0, 60)))
            assert ours.tokenize(text) == theirs.tokenize(text), repr(text)
    for word in ("running", "happily", "Generalizations", "skies", "relational"):
        assert ours.tokenize(word) == theirs.tokenize(word)


def test_interval_of_the_mean():
    """A percentile bootstrap over requests: 1.96 standard errors to each side for a fair coin of 400 tosses."""
    stats = mean_with_interval([0.0, 1.0] * 200)
    half_width = 1.96 * 0.5 / 20
    assert stats["mean"] == 0.5
    assert stats["low"] == pytest.approx(0.5 - half_width, abs=0.004)
    assert stats["high"] == pytest.approx(0.5 + half_width, abs=0.004)
    assert stats == mean_with_interval([0.0, 1.0] * 200), "figures in a paper must not move between runs"


def test_interval_of_one_request():
    """A division by n - 1 would be NaN for a single request."""
    assert mean_with_interval([0.25]) == {"mean": 0.25, "low": 0.25, "high": 0.25}


@pytest.mark.parametrize("reference, text, found", [
    ("48213", "The number is 48213.", True), ("48213", "48,213", True), ("48213", "148213 or 482130", False),
    ("48213", "4,8213", False), ("Cedar", "it is CEDAR", True), ("cedar", "cedars", False), ("a.b", "axb", False),
    ("48213", "", False), (" 7 ", "7", True),
])  # fmt: skip
def test_answers_are_found_as_whole_words(reference, text, found):
    """A part of a longer number, or a pattern that is taken for a regular expression."""
    assert is_found(reference, text) == found
