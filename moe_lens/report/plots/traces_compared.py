"""How far two traces agree: by layer, and by how near the router's choice was."""

from functools import partial

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style
from moe_lens.report.plots.layer_curves import curves_figure
from moe_lens.report.section import Section
from moe_lens.report.tables import require


def near_ties_figure(table: pd.DataFrame) -> go.Figure:
    """The share of tokens with another expert over their margin, a line for each layer.

    Args:
        table: one row per layer and bin with the columns `layer`, `bin`, `margin_low`, `margin_high`, `unlike`.

    Raises:
        MoELensError: a column is missing, or the table is empty.
    """
    table = require(table, ("layer", "bin", "margin_low", "margin_high", "unlike"), figure="near_ties_figure")
    figure, names = go.Figure(), table["layer"].astype(str)
    for name, look in style.looks(names, repeat=True).items():
        own = table[names == name].sort_values("bin")
        middle = (own["margin_low"] + own["margin_high"]) / 2
        line = go.Scatter(
            x=middle, y=own["unlike"], mode="lines+markers", name=f"layer {name}", marker=look.mark, line=look.line,
            hovertext=style.hover(own), hoverinfo="text",
        )  # fmt: skip
        figure.add_trace(line)
    figure.update_xaxes(title_text="margin (logits): last selected minus first not selected")
    figure.update_yaxes(title_text="tokens with<br>another expert", rangemode="tozero")
    tokens = int(table.groupby("layer")["tokens"].sum().max()) if "tokens" in table else 0
    title = "How often a token gets another expert, by how near the choice was"
    return style.dress(figure, title=title, subtitle=f"{tokens} tokens, in tenths by margin", plot_height=320)


SECTIONS = {
    "agreement-of-traces.parquet": Section(
        "How far two traces agree",
        "The share of a token's experts that are the same in both traces, and the share of tokens of which all are.",
        draw=partial(
            curves_figure,
            numbers={"agreement": "shared experts", "exact": "tokens with all<br>the same"},
            title="What both traces select alike, by layer",
        ),
        place=76,
    ),
    "near_ties-of-traces.parquet": Section(
        "Near ties",
        "Tokens of each layer in tenths by their margin, the lowest logit of a selected expert minus the highest of "
        "another, and in how many of them an expert differs between the traces.",
        draw=near_ties_figure,
        place=77,
    ),
    "divergence-of-traces.parquet": Section(
        "From which token on traces differ",
        "Of each request, how many generated tokens are alike, and the first token at which an expert differs; -1 for "
        "none.",
        draw=None,
        place=78,
    ),
}
