"""Pure formulas: scores of answers, the uncertainty of means and differences, and how well scores rank experts."""

from moe_lens.metrics.answers import exact_match, f1, normalize_answer
from moe_lens.metrics.comparisons import Comparison, benjamini_hochberg, cohens_d, compare, holm
from moe_lens.metrics.divergence import expert_overlap, routing_divergence
from moe_lens.metrics.gains import answer_probability_gain, attention_gain, paired_gain
from moe_lens.metrics.ranking import auc, precision_at, rank_correlation
from moe_lens.metrics.resampling import (
    Interval,
    bootstrap_interval,
    paired_permutation_p,
    permutation_p_values,
    seeds_interval,
)

__all__ = [
    "Comparison", "Interval", "answer_probability_gain", "attention_gain", "auc", "benjamini_hochberg",
    "bootstrap_interval", "cohens_d", "compare", "exact_match", "expert_overlap", "f1", "holm", "normalize_answer",
    "paired_gain", "paired_permutation_p", "permutation_p_values", "precision_at", "rank_correlation",
    "routing_divergence", "seeds_interval",
]
