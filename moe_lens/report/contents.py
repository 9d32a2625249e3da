"""The tables that a report knows: what its page says about each, and the function that draws it."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import (
    answers_figure,
    clusters_figure,
    correlation_figure,
    gains_figure,
    layers_figure,
    masking_figure,
    metrics_figure,
    parameters_figure,
    scores_figure,
    sizes_figure,
    style,
    tradeoff_figure,
    transfer_figure,
    tuning_figure,
    usage_figure,
)
from moe_lens.report.views import View, attention_view


@dataclass(frozen=True)
class Section:
    """What the page says about a known table, and the function that draws it, if it is drawn."""

    heading: str
    sentence: str
    draw: Callable[[pd.DataFrame], go.Figure | View] | None


def _usage_figure(table: pd.DataFrame) -> go.Figure:
    """The map of experts; those with True in a column `planted` are outlined."""
    if "planted" not in table.columns:
        return usage_figure(table)
    planted = table.loc[table["planted"], ["layer", "expert"]].drop_duplicates()
    return usage_figure(table, planted, marks_label="planted")


def _score_figure(table: pd.DataFrame) -> go.Figure:
    """The map of one named score, the name standing in the column `name`."""
    style.require(table, ("name",), figure="the map of a score")
    return usage_figure(table, label=f"score {table['name'].iloc[0]}")


def attention_gain_figure(table: pd.DataFrame) -> go.Figure:
    """Attention gain over the layers: of both targets (Figure 6), or in panels of a target each, of models of which
    ever more layers were tuned (Figure 12)."""
    return gains_figure(table, what="Attention", ordered="panel" in table.columns)


def probability_gain_figure(table: pd.DataFrame) -> go.Figure:
    """The gain of the answer's probability over the layers (Figure 8), not as in Eq. 12 but as the ratio of means.

    Examples with a base probability near 0 rule Eq. 12's mean of ratios, which is in the table's column `gain`.
    """
    return gains_figure(table, what="The answer's probability", column="ratio_of_means")


def attention_case_view(table: pd.DataFrame) -> View:
    """The first case of a table of several."""
    style.require(table, ("case", "model", "note"), figure="the attention of a case")
    case = table[table["case"] == table["case"].iloc[0]]
    base, tuned = (case[case["model"] == model] for model in ("base", "tuned"))
    return attention_view(base, tuned, note=case["note"].iloc[0])


#: Known tables by (a pattern of) their file name, in the order of the page.
SECTIONS = {
    "tasks.parquet": Section(
        "Answers",
        "Exact match of each model variant on each task.",
        answers_figure,
    ),
    "metrics.parquet": Section(
        "Other scores",
        "The same answers by other scores: those of summaries (Table 9), a judge's (Table 8), or without context "
        "(Table 10).",
        metrics_figure,
    ),
    "usage.parquet": Section(
        "Which experts are used",
        "How often each router selects each expert. A router's ratios sum to 1 within a layer.",
        _usage_figure,
    ),
    "masking.parquet": Section(
        "Do they cause it",
        "What is left of exact match when experts are masked. zero: their gating weight becomes 0; "
        "renormalize: the other weights are then rescaled to the old sum; reroute: they are taken away "
        "before the selection, so that the next expert steps in. A set of experts matters if masking it "
        "costs more than masking random sets of the same size.",
        masking_figure,
    ),
    "transfer.parquet": Section(
        "Does it carry over",
        "Routers tuned on one task and tried on the others (the paper's Figure 5).",
        transfer_figure,
    ),
    "clusters.parquet": Section(
        "Do tasks take different experts",
        "The activation rates of the context-faithful experts, example by example (Figure 4). Silhouette and the share "
        "of nearest neighbours of the same task are taken from the vectors themselves, not from the map.",
        clusters_figure,
    ),
    "attention_gain.parquet": Section(
        "Where attention goes",
        "The relative gain of Eq. 11: the mean over examples of (tuned - base) / base. One tiny denominator can rule "
        "that mean; median and ratio_of_means stand beside it.",
        attention_gain_figure,
    ),
    "attention_case.parquet": Section(
        "One case",
        "A prompt that tuning set right (Figures 7 and 14), its tokens coloured by the gain in attention.",
        attention_case_view,
    ),
    "probability_gain.parquet": Section(
        "How probable the answer becomes",
        "The answer's probability after each layer by the logit lens (Figure 8), as the ratio of means; "
        "the column gain is Eq. 12, a mean of ratios, which examples with a base probability near 0 rule.",
        probability_gain_figure,
    ),
    "layers.parquet": Section(
        "Which layers have to be tuned",
        "Exact match after tuning the routers of one layer, or of all layers up to one (Figure 11).",
        layers_figure,
    ),
    "correlation.parquet": Section(
        "Does attention gain go with exact match",
        "Models tuned in their first layers, the base model at 0 (Figure 13).",
        correlation_figure,
    ),
    "parameters.parquet": Section(
        "What training costs",
        "Trainable parameters of each method (Figure 9).",
        parameters_figure,
    ),
    "sizes.parquet": Section(
        "How many experts have to learn",
        "Exact match by the number of experts per layer that are trained, those of CEFT and random ones (Table 5).",
        sizes_figure,
    ),
    "tradeoff.parquet": Section(
        "What is learned, and what is kept",
        "Exact match on the task trained on and on one that may be forgotten, at each method's learning rates.",
        tradeoff_figure,
    ),
    "scores.parquet": Section(
        "Which score finds them",
        "Each score ranks the experts; the panels compare its ranking with experts known to matter.",
        scores_figure,
    ),
    "score-*.parquet": Section(
        "How a score ranks the experts",
        "A score by which experts were chosen: the highest of each layer.",
        _score_figure,
    ),
    "tuning.parquet": Section(
        "Training",
        "Loss on the answers and learning rate at every step.",
        tuning_figure,
    ),
    "learning_rates.parquet": Section(
        "Learning rates tried",
        "The rate that did best on the dev data was kept.",
        None,
    ),
}
