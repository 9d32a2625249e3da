from .activation import domain_specialisation as domain_specialisation, risk_difference as risk_difference
from .catalogue import METRICS as METRICS, Metric as Metric, metrics_named as metrics_named
from .comparisons import Comparison as Comparison, benjamini_hochberg as benjamini_hochberg, cohens_d as cohens_d, compare as compare, holm as holm
from .divergence import expert_overlap as expert_overlap, routing_divergence as routing_divergence
from .gains import answer_probability_gain as answer_probability_gain, attention_gain as attention_gain, paired_gain as paired_gain
from .maps import routing_map as routing_map, separability as separability
from .matching import exact_match as exact_match, f1 as f1, normalize_answer as normalize_answer
from .ranking import auc as auc, precision_at as precision_at, rank_correlation as rank_correlation
from .resampling import Interval as Interval, bootstrap_interval as bootstrap_interval, paired_permutation_p as paired_permutation_p, permutation_p_values as permutation_p_values, seeds_interval as seeds_interval
from .saturation import router_saturation as router_saturation
