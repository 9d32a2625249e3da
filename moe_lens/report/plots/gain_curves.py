"""The gain of a tuned model over its base, layer by layer: attention (Figures 6 and 12), answer probability (8)."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require, require_once

#: column -> how it was averaged, the axis of a gain, the axis of times the base
WAYS = {
    "gain": ("mean", "relative gain", "times the base"),
    "ratio_of_means": ("ratio of means, not mean of ratios,", "gain of the mean", "mean, times the base's"),
}
STEEP = 10.0
"""From this gain on (1000 %), a figure shows times the base on a logarithmic axis instead."""


def gains_figure(table: pd.DataFrame, *, what: str, column: str = "gain", ordered: bool = False) -> go.Figure:
    """A line per series over the layers with a band for its interval; with a column `panel`, panels side by side.

    Args:
        table: one row per series and layer (and panel) with the columns `series`, `layer` and the gain with its
            interval (0.5 is 50 % more than the base model), as `metrics.paired_gain` gives them; with a column `n`
            the figure says how many examples there are. More columns show up under the pointer.
        what: what gains, as the title names it.
        column: "gain", the mean of ratios (Eqs. 11 and 12), or "ratio_of_means"; the figure says which.
        ordered: the series follow one another, and their colours go from light to dark.

    Raises:
        MoELensError: a column is missing, the table is empty, or a series has two rows for a layer (and panel).
    """
    columns = ("series", "layer", column, f"{column}_low", f"{column}_high")
    table = require(table, columns, figure="gains_figure")
    table = table if "panel" in table.columns else table.assign(panel="")
    require_once(table, ("panel", "series", "layer"), figure="gains_figure")
    steep = table[column].max() > STEEP
    way, gained, times = WAYS[column]
    panels, series = list(dict.fromkeys(table["panel"])), list(dict.fromkeys(table["series"]))
    figure = make_subplots(1, len(panels), horizontal_spacing=0.12, subplot_titles=panels if any(panels) else None)
    looks = style.ordered_looks(series) if ordered else style.looks(series)
    for place, panel in enumerate(panels, start=1):
        for name, look in looks.items():
            part = table[(table["panel"] == panel) & (table["series"] == name)].sort_values("layer")
            if len(part):
                _draw_series(figure, part, look, place, column=column, base=float(steep))
    _draw_axes(figure, sorted(set(table["layer"])), times if steep else gained, steep=steep)
    n = f" of {style.counts(table['n'])} examples" if "n" in table.columns else ""
    subtitle = f"{way}{n}; bands: 95 % intervals; {'1×' if steep else '0 %'} is the base model"
    title = _title(table.assign(gain=table[column], low=table[f"{column}_low"]), what)
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=300, headings=any(panels))


def attention_gain_figure(table: pd.DataFrame) -> go.Figure:
    """Attention gain over the layers: of both targets (Figure 6), or in panels of a target each, of models of which
    ever more layers were tuned (Figure 12)."""
    return gains_figure(table, what="Attention", ordered="panel" in table.columns)


def probability_gain_figure(table: pd.DataFrame) -> go.Figure:
    """The gain of the answer's probability over the layers (Figure 8), not as in Eq. 12 but as the ratio of means.

    Examples with a base probability near 0 rule Eq. 12's mean of ratios, which is in the table's column `gain`.
    """
    return gains_figure(table, what="The answer's probability", column="ratio_of_means")


SECTIONS = {
    "attention_gain.parquet": Section(
        "Where attention goes",
        "The relative gain of Eq. 11: the mean over examples of (tuned - base) / base. One tiny denominator can rule "
        "that mean; median and ratio_of_means stand beside it.",
        draw=attention_gain_figure,
        place=70,
    ),
    "probability_gain.parquet": Section(
        "How probable the answer becomes",
        "The answer's probability after each layer by the logit lens (Figure 8), as the ratio of means; "
        "the column gain is Eq. 12, a mean of ratios, which examples with a base probability near 0 rule.",
        draw=probability_gain_figure,
        place=90,
    ),
}


def _draw_axes(figure: go.Figure, layers: list[int], gained: str, *, steep: bool) -> None:
    """As many layers named as can be read, what is gained on the other axis, and a line at the base model."""
    figure.update_xaxes(title_text="layer", tickvals=layers[:: -(-len(layers) // 8)], showgrid=False)
    if steep:
        figure.update_yaxes(type="log", dtick=1, ticksuffix="×", exponentformat="none")
    else:
        figure.update_yaxes(tickformat="+.0%", nticks=6)
    figure.update_yaxes(title_text=gained, col=1)
    figure.add_hline(1 if steep else 0, line={"color": style.INK, "width": 1})


def _title(table: pd.DataFrame, what: str) -> str:
    """Where the gain is largest of those whose whole interval is above the base, or that there is none."""
    if table["gain"].isna().all():  # as where attention has a window that ends before the context
        return f"{what} has no gain that is defined, as the base model has nothing there"
    sure = table[table["low"] > 0]
    if sure.empty:
        return f"{what} gains at no layer by more than its interval"
    best = sure.loc[sure["gain"].idxmax()]
    where = f"{best['series']}{best['panel'] and ', ' + best['panel']}"
    gain = f"{1 + best['gain']:.3g} times the base" if best["gain"] > STEEP else f"{best['gain']:+.0%}"
    return f"{what} gains most at layer {best['layer']}, {where}: {gain}"


def _draw_series(
    figure: go.Figure, part: pd.DataFrame, look: style.Look, place: int, *, column: str, base: float
) -> None:
    """One line with its marks in the panel at `place`, its interval as a band behind it; `base`: the base model."""
    name = part["series"].iloc[0]
    band = go.Scatter(
        x=[*part["layer"], *part["layer"][::-1]],
        y=[*(base + part[f"{column}_high"]), *(base + part[f"{column}_low"])[::-1]],
        mode="lines",
        fill="toself",
        fillcolor=style.translucent(look.colour, 0.2),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )
    line = go.Scatter(
        x=part["layer"],
        y=base + part[column],
        mode="lines+markers",
        name=name,
        legendgroup=name,
        showlegend=place == 1,
        line=look.line,
        marker={**look.mark, "size": 10},
        hovertext=style.hover(part),
        hoverinfo="text",
    )
    figure.add_traces([band, line], rows=[1, 1], cols=[place, place])
