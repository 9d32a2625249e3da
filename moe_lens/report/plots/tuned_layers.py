"""Which layers have to be tuned: exact match after router tuning of some layers only, the paper's Figure 11."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.errors import MoELensError
from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import over_seeds, require

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
    table = require(table, ("kind", "layer", "em", "em_low", "em_high"), figure="layers_figure")
    table = over_seeds(table, ("kind", "layer"), ["em"], figure="layers_figure")
    kinds = [kind for kind in KINDS if (table["kind"] == kind).any()]
    if not kinds:
        raise MoELensError(f"layers_figure got no tuned layer: no row's kind is {' or '.join(map(repr, KINDS))}")
    titles = [KINDS[kind] for kind in kinds]
    figure = make_subplots(1, len(kinds), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.05)
    for column, kind in enumerate(kinds, start=1):
        _draw_layers(figure, table[table["kind"] == kind].sort_values("layer"), column)
    for em in table.loc[table["kind"] == "base", "em"]:
        _draw_base(figure, em)
    figure.update_yaxes(range=[0, 1.02], dtick=0.2)
    figure.update_yaxes(title_text="exact match (EM)", col=1)
    return style.dress(figure, title=_title(table), subtitle=style.bars(table, ["em"]), plot_height=300, headings=True)


SECTIONS = {
    "layers.parquet": Section(
        "Which layers have to be tuned",
        "Exact match after tuning the routers of one layer, or of all layers up to one (Figure 11).",
        draw=layers_figure,
        place=100,
    ),
}


def _draw_layers(figure: go.Figure, part: pd.DataFrame, column: int) -> None:
    """One panel: a bar per layer with its interval, as many layers named as can be read."""
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


def _draw_base(figure: go.Figure, em: float) -> None:
    """The base model as a dashed line through all panels, and its name in the legend."""
    line = {"color": style.GREY, "width": 2, "dash": "dash"}
    figure.add_hline(em, line=line)
    figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name=f"base ({em:.2f})")


def _title(table: pd.DataFrame) -> str:
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
