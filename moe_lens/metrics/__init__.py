"""Pure formulas: scores of answers, and the uncertainty of their means and differences."""

from moe_lens.metrics.answers import exact_match, f1, normalize_answer
from moe_lens.metrics.resampling import Interval, bootstrap_interval, paired_permutation_p

__all__ = ["Interval", "bootstrap_interval", "exact_match", "f1", "normalize_answer", "paired_permutation_p"]
