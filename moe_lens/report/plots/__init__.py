"""Figures: pure functions from tidy tables, with documented columns, to plotly Figures."""

from moe_lens.report.plots.answer_scores import answers_figure, metrics_figure
from moe_lens.report.plots.clusters import clusters_figure
from moe_lens.report.plots.dose_choice import dose_choice_figure
from moe_lens.report.plots.dose_curves import doses_figure
from moe_lens.report.plots.expert_counts import sizes_figure
from moe_lens.report.plots.gain_correlation import correlation_figure
from moe_lens.report.plots.gain_curves import gains_figure
from moe_lens.report.plots.learned_and_kept import tradeoff_figure
from moe_lens.report.plots.masked_answers import masking_figure
from moe_lens.report.plots.parameter_counts import parameters_figure
from moe_lens.report.plots.patching_maps import patching_figure
from moe_lens.report.plots.score_agreement import agreement_figure
from moe_lens.report.plots.score_comparison import scores_figure
from moe_lens.report.plots.selectivity_matrix import selectivity_figure
from moe_lens.report.plots.single_experts import single_experts_figure
from moe_lens.report.plots.training_course import tuning_figure
from moe_lens.report.plots.transfer import transfer_figure
from moe_lens.report.plots.tuned_layers import layers_figure
from moe_lens.report.plots.usage_maps import usage_figure
from moe_lens.report.plots.what_is_left import left_figure

__all__ = [
    "agreement_figure",
    "answers_figure",
    "clusters_figure",
    "correlation_figure",
    "dose_choice_figure",
    "doses_figure",
    "gains_figure",
    "layers_figure",
    "left_figure",
    "masking_figure",
    "metrics_figure",
    "parameters_figure",
    "patching_figure",
    "scores_figure",
    "selectivity_figure",
    "single_experts_figure",
    "sizes_figure",
    "tradeoff_figure",
    "transfer_figure",
    "tuning_figure",
    "usage_figure",
]
