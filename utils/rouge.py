"""ROUGE-1/2/L F-measures (Lin 2004) with stemming, through the rouge-score package."""

import numpy as np

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


class Rouge:
    """Scores summaries against references."""

    def __init__(self):
        from rouge_score.rouge_scorer import RougeScorer  # takes seconds, which scripts that score nothing do without

        self._scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)

    def score(self, reference: str, summary: str) -> dict[str, float]:
        """F-measures in [0, 1] of one summary, by ROUGE type."""
        return {name: score.fmeasure for name, score in self._scorer.score(reference, summary).items()}


def mean_with_interval(values, weights=None, samples: int = 1000) -> dict[str, float]:
    """Mean of one value a request, with the 95 % percentile bootstrap interval over requests (seeded).

    With `weights`, one a request, the mean is sum(values) / sum(weights): of sums over tokens, say, a token's mean.
    """
    values = np.asarray(values)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights)
    drawn = np.random.default_rng(0).integers(len(values), size=(samples, len(values)))
    totals = weights[drawn].sum(axis=1)
    means = values[drawn].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.sum() / weights.sum()), "low": float(low), "high": float(high)}
