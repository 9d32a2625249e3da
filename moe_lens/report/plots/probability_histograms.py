"""Histograms of router probabilities and entropies, layer by layer, beside the Dirichlet of the same moments."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import named_together, require, require_once

VALUES = {
    "each": "of any expert",
    "largest": "largest of a token",
    "entropy": "entropy of a token, highest = 1",
}


def histograms_figure(table: pd.DataFrame) -> go.Figure:
    """The cumulative share of values, one line per layer, in a panel for each of VALUES; the fit dotted.

    Args:
        table: what `RouterHistograms.histograms` gave; of several variants and data sets the first is drawn.
    """
    table = require(table, ("layer", "value", "high", "share", "fitted"), figure="histograms_figure")
    names = named_together(table, ("variant", "data"))
    table = table[names == names.iloc[0]]
    require_once(table, ("layer", "value", "high"), figure="histograms_figure")
    figure = make_subplots(len(VALUES), 1, vertical_spacing=0.11, subplot_titles=list(VALUES.values()))
    for row, value in enumerate(VALUES, start=1):
        layers = [str(layer) for layer in sorted(table["layer"].unique())]
        for layer, look in style.ordered_looks(layers).items():
            own = table[(table["value"] == value) & (table["layer"].astype(str) == layer)]
            for column, dash in (("share", "solid"), ("fitted", "dot")):
                if own[column].notna().all():
                    figure.add_scatter(
                        x=own["high"], y=own[column].cumsum(), mode="lines", row=row, col=1, name=f"layer {layer}",
                        line={"color": look.colour, "width": 1.5, "dash": dash}, showlegend=False,
                        hovertemplate=f"layer {layer}, {column}: %{{y:.3f}} up to %{{x:.3f}}<extra></extra>",
                    )  # fmt: skip
        figure.update_yaxes(title_text="share below", range=[0, 1.02], row=row, col=1)
    figure.update_xaxes(type="log", range=[-4, 0], dtick=1, exponentformat="power", row=1, col=1)
    of = f", {names.iloc[0]}" if names.nunique() > 1 else ""
    subtitle = f"{table['layer'].nunique()} layers from light to dark{of}; dotted: Dirichlet of the same moments"
    title = "How router probabilities are spread"
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=720, headings=True)


SECTIONS = {
    "histograms.parquet": Section(
        "How router probabilities are spread",
        "The share of router probabilities below a value, of all experts at all tokens and of each token's "
        "largest, and of each token's entropy over experts.",
        draw=histograms_figure,
        place=57,
    ),
}
