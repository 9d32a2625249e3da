"""Figures: pure functions from tidy tables, with documented columns, to plotly Figures."""

from moe_lens.plots.answers import answers_figure, metrics_figure
from moe_lens.plots.clusters import clusters_figure
from moe_lens.plots.gains import gains_figure
from moe_lens.plots.layers import correlation_figure, layers_figure
from moe_lens.plots.masking import masking_figure
from moe_lens.plots.methods import parameters_figure, sizes_figure, tradeoff_figure
from moe_lens.plots.scores import scores_figure
from moe_lens.plots.transfer import transfer_figure
from moe_lens.plots.tuning import tuning_figure
from moe_lens.plots.usage import usage_figure

__all__ = [
    "answers_figure",
    "clusters_figure",
    "correlation_figure",
    "gains_figure",
    "layers_figure",
    "masking_figure",
    "metrics_figure",
    "parameters_figure",
    "scores_figure",
    "sizes_figure",
    "tradeoff_figure",
    "transfer_figure",
    "tuning_figure",
    "usage_figure",
]
