"""ROUGE-1/2/L F-measures (Lin 2004) with stemming, through the rouge-score package."""

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


class Rouge:
    """Scores summaries against references."""

    def __init__(self):
        self._scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)

    def score(self, reference: str, summary: str) -> dict[str, float]:
        """F-measures in [0, 1] of one summary, by ROUGE type."""
        return {name: score.fmeasure for name, score in self._scorer.score(reference, summary).items()}


def mean_with_interval(values: list[float], samples: int = 1000) -> dict[str, float]:
    """Mean of one value a request, with the 95 % percentile bootstrap interval over requests (seeded)."""
    values = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(values), size=(samples, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
