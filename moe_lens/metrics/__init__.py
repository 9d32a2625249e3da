"""Pure formulas: scores of answers, what is uncertain, how experts rank, and how models differ in saved tables."""

from moe_lens.metrics.activation import domain_specialisation, risk_difference
from moe_lens.metrics.catalogue import METRICS, Metric, metrics_named
from moe_lens.metrics.comparisons import Comparison, benjamini_hochberg, cohens_d, compare, holm
from moe_lens.metrics.divergence import expert_overlap, routing_divergence
from moe_lens.metrics.gains import answer_probability_gain, attention_gain, paired_gain
from moe_lens.metrics.maps import routing_map, separability
from moe_lens.metrics.matching import exact_match, f1, normalize_answer
from moe_lens.metrics.ranking import auc, precision_at, rank_correlation
from moe_lens.metrics.resampling import (
    Interval,
    bootstrap_interval,
    paired_permutation_p,
    permutation_p_values,
    seeds_interval,
)
from moe_lens.metrics.saturation import router_saturation

__all__ = [
    "METRICS",
    "Comparison",
    "Interval",
    "Metric",
    "answer_probability_gain",
    "attention_gain",
    "auc",
    "benjamini_hochberg",
    "bootstrap_interval",
    "cohens_d",
    "compare",
    "domain_specialisation",
    "exact_match",
    "expert_overlap",
    "f1",
    "holm",
    "metrics_named",
    "normalize_answer",
    "paired_gain",
    "paired_permutation_p",
    "permutation_p_values",
    "precision_at",
    "rank_correlation",
    "risk_difference",
    "router_saturation",
    "routing_divergence",
    "routing_map",
    "seeds_interval",
    "separability",
]
