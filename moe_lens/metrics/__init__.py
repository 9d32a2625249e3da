"""Pure formulas: scores of answers, the uncertainty of means and differences, and how well scores rank experts."""

from moe_lens.metrics.answers import exact_match, f1, normalize_answer
from moe_lens.metrics.ranking import auc, precision_at, rank_correlation
from moe_lens.metrics.resampling import Interval, bootstrap_interval, paired_permutation_p

__all__ = [
    "Interval", "auc", "bootstrap_interval", "exact_match", "f1", "normalize_answer", "paired_permutation_p",
    "precision_at", "rank_correlation",
]
