"""Figures: pure functions from tidy tables, with documented columns, to plotly Figures."""

from moe_lens.plots.answers import answers_figure
from moe_lens.plots.masking import masking_figure
from moe_lens.plots.scores import scores_figure
from moe_lens.plots.tuning import tuning_figure
from moe_lens.plots.usage import usage_figure

__all__ = ["answers_figure", "masking_figure", "scores_figure", "tuning_figure", "usage_figure"]
