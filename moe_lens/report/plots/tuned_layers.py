"""Router tuning of some layers only (Figure 11), and what attention gains by it (Figure 13)."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.errors import MoELensError
from moe_lens.report.plots import style

KINDS = {"single": "only this layer", "first": "this layer and all below"}


def layers_figure(table: pd.DataFrame) -> go.Figure:
    """EM over the tuned layer: alone in the left panel, with all layers below it in the right; the base as a line.

    Args:
        table: one row per tuned model with the columns `kind` ("base", "single", "first"), `layer` (the only one or the
            highest one tuned; not read for the base), `em`, `em_low`, `em_high`. With a column `seed`, several rows of
            a model become their mean, the bars reaching from the lowest to the highest seed.

    Raises:
        MoELensError: a column is missing, no layer was tuned, or a model stands there twice.
    """
    table = style.require(table, ("kind", "layer", "em", "em_low", "em_high"), figure="layers_figure")
    table = style.over_seeds(table, ("kind", "layer"), ["em"], figure="layers_figure")
    kinds = [kind for kind in KINDS if (table["kind"] == kind).any()]
    if not kinds:
        raise MoELensError(f"layers_figure got no tuned layer: no row's kind is {' or '.join(map(repr, KINDS))}")
    titles = [KINDS[kind] for kind in kinds]
    figure = make_subplots(1, len(kinds), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.05)
    for column, kind in enumerate(kinds, start=1):
        part = table[table["kind"] == kind].sort_values("layer")
        bars = go.Bar(
            x=part["layer"],
            y=part["em"],
            error_y=style.error_bars(part, "em"),
            marker={"color": style.VERMILLION},
            name="router-tuned",
            showlegend=column == 1,
            hovertext=style.hover(part),
            hoverinfo="text",
        )
        figure.add_trace(bars, row=1, col=column)
        named = sorted(set(part["layer"]))
        figure.update_xaxes(title_text="layer", tickvals=named[:: -(-len(named) // 8)], showgrid=False, col=column)
    for _, base in table[table["kind"] == "base"].iterrows():
        figure.add_hline(base["em"], line={"color": style.GREY, "width": 2, "dash": "dash"})
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="lines",
            line={"color": style.GREY, "width": 2, "dash": "dash"},
            name=f"base ({base['em']:.2f})",
        )
    figure.update_yaxes(range=[0, 1.02], dtick=0.2)
    figure.update_yaxes(title_text="exact match (EM)", col=1)
    return style.dress(
        figure,
        title=_layers_title(table),
        subtitle=style.bars(table, ["em"]),
        plot_height=300,
        headings=True,
    )


def _layers_title(table: pd.DataFrame) -> str:
    """What the best single layer reaches, and what all layers together."""
    single, first = (table[table["kind"] == kind] for kind in ("single", "first"))
    parts = []
    if len(single):
        best = single.loc[single["em"].idxmax()]
        parts.append(f"the routers of layer {best['layer']:g} alone reach EM {best['em']:.2f}")
    if len(first):
        parts.append(f"those of all {len(first)} layers {first.loc[first['layer'].idxmax(), 'em']:.2f}")
    title = ", ".join(parts)
    return title[0].upper() + title[1:]


def correlation_figure(table: pd.DataFrame) -> go.Figure:
    """EM against the attention gain on the context and on the answer, a mark per tuned model; the paper's Figure 13.

    Args:
        table: one row per model and target with the columns `target` ("context", "answer"), `model` (its name), `gain`,
            `em`, and the same in every row of a target: `r` (Pearson), `r_low`, `r_high`.

    Raises:
        MoELensError: a column is missing or the table is empty.
    """
    columns = ("target", "model", "gain", "em", "r", "r_low", "r_high")
    table = style.require(table, columns, figure="correlation_figure")
    targets = list(dict.fromkeys(table["target"]))
    figure = make_subplots(1, len(targets), shared_yaxes=True, horizontal_spacing=0.05)
    for column, (target, look) in enumerate(style.looks(targets).items(), start=1):
        part = table[table["target"] == target]
        marks = go.Scatter(
            x=part["gain"],
            y=part["em"],
            mode="markers+text",
            text=part["model"],
            textposition="top center",
            textfont={"size": 13},
            cliponaxis=False,
            marker={**look.mark, "size": 12},
            hovertext=style.hover(part),
            hoverinfo="text",
            showlegend=False,
        )
        figure.add_trace(marks, row=1, col=column)
        figure.update_xaxes(title_text=f"attention gain: {target}", tickformat="+.0%", nticks=5, row=1, col=column)
    told = [
        f"{target}: r = {part['r'].iloc[0]:.2f} [{part['r_low'].iloc[0]:.2f}, {part['r_high'].iloc[0]:.2f}]"
        for target, part in table.groupby("target", sort=False)
    ]
    figure.update_yaxes(range=[0, 1.08], dtick=0.2)
    figure.update_yaxes(title_text="exact match (EM)", col=1)
    return style.dress(
        figure,
        title=_correlation_title(table),
        subtitle=f"{table['model'].nunique()} models; {'; '.join(told)} (95 % intervals)",
        plot_height=320,
    )


def _correlation_title(table: pd.DataFrame) -> str:
    """Whether EM goes with the gain on each target; sure means that the interval of r leaves out 0."""
    told = []
    for target, part in table.groupby("target", sort=False):
        r, low, high = (part[name].iloc[0] for name in ("r", "r_low", "r_high"))
        sure = "rises" if low > 0 else "falls" if high < 0 else "goes neither way for sure"
        told.append(f"{sure} with attention to the {target} (r = {r:.2f})")
    return f"EM {', '.join(told)}"
