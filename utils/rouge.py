"""ROUGE-1/2/L F-measures (Lin 2004) with stemming, from the rouge-score package."""

import re
import unicodedata

import numpy as np

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


class Rouge:
    """Scores summaries against references."""

    def __init__(self):
        from rouge_score.rouge_scorer import RougeScorer  # takes seconds, so only when scores are needed

        self._scorer = RougeScorer(ROUGE_TYPES, tokenizer=EveryScript())

    def score(self, reference: str, summary: str) -> dict[str, float]:
        """F-measures in [0, 1] of one summary, keyed by ROUGE type."""
        return {name: score.fmeasure for name, score in self._scorer.score(reference, summary).items()}


class EveryScript:
    """Words of every script, stemmed. rouge-score's own tokenizer keeps only the letters a to z.

    In scripts without spaces between words, each character with its marks is a word. Texts with ASCII letters only give
    the same tokens as rouge-score's tokenizer.
    """

    def __init__(self):
        from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        # Remove symbols before NFKC turns some into letters (the trade mark sign): rouge-score counts none.
        text = "".join(char if _is_of_word(char) else " " for char in INSIDE_WORDS.sub("", text))
        words: list[str] = []
        before = ""  # the base character for a mark
        for char in unicodedata.normalize("NFKC", text).lower():
            if unicodedata.category(char).startswith("M"):
                if before:
                    words[-1] += char
            elif not _is_of_word(char):
                before = ""
            else:
                if before and not WITHOUT_SPACES.match(char) and not WITHOUT_SPACES.match(before):
                    words[-1] += char
                else:
                    words.append(char)
                before = char
        return [self._stem(word) if len(word) > 3 else word for word in words]


INSIDE_WORDS = re.compile(
    "[\u00ad\u200c\u200d\ufe00-\ufe0f]"
)  # soft hyphen, joiners, variants: no letters of their own
# Han, kana, bopomofo; Thai, Lao; Burmese; Khmer; Tai; Balinese; Javanese
WITHOUT_SPACES = re.compile(
    "[\u3005-\u3007\u3021-\u3029\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"
    "\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9df]"
)


def _is_of_word(char: str) -> bool:
    """A letter, a mark, or a digit of any script; superscripts and fractions are symbols."""
    kind = unicodedata.category(char)
    return kind[0] == "L" or kind in ("Mn", "Mc", "Nd", "Nl")


def is_found(reference: str, text: str) -> bool:
    """Whether a text contains a reference of one word or number, whatever its case; 12,345 is 12345."""
    reference, text = (re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", of).casefold() for of in (reference.strip(), text))
    return re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", text) is not None


def mean_with_interval(values, weights=None, samples: int = 1000) -> dict[str, float]:
    """Mean of one value per request, with the 95 % percentile bootstrap interval over requests (seeded).

    With `weights`, one per request, the mean is sum(values) / sum(weights): for sums over tokens, the mean per token.
    """
    values = np.asarray(values)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights)
    drawn = np.random.default_rng(0).integers(len(values), size=(samples, len(values)))
    totals = weights[drawn].sum(axis=1)
    means = values[drawn].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.sum() / weights.sum()), "low": float(low), "high": float(high)}
