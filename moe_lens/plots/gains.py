"""The gain of a tuned model over its base, layer by layer: attention (Figures 6 and 12), answer probability (8)."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.plots import style

COLUMNS = ("series", "layer", "gain", "gain_low", "gain_high")
STEEP = 10.0
"""From this gain on (1000 %), a figure shows times the base on a logarithmic axis instead."""


def gains_figure(table: pd.DataFrame, *, what: str, axis: str = "relative gain") -> go.Figure:
    """A line per series over the layers with a band for its interval; with a column `panel`, panels side by side.

    Args:
        table: one row per series and layer (and panel) with the columns `series`, `layer`, `gain`, `gain_low`,
            `gain_high` (0.5 is 50 % more than the base model). More columns show up under the pointer.
        what: what gains, as the title names it. axis: what is gained.

    Raises:
        MoELensError: a column is missing, the table is empty, or a series has two rows for a layer (and panel).
    """
    table = style.require(table, COLUMNS, figure="gains_figure")
    table = table if "panel" in table.columns else table.assign(panel="")
    style.require_once(table, ("panel", "series", "layer"), figure="gains_figure")
    steep = table["gain"].max() > STEEP
    panels, series = list(dict.fromkeys(table["panel"])), list(dict.fromkeys(table["series"]))
    figure = make_subplots(1, len(panels), horizontal_spacing=0.12, subplot_titles=panels if any(panels) else None)
    for column, panel in enumerate(panels, start=1):
        for place, name in enumerate(series):
            part = table[(table["panel"] == panel) & (table["series"] == name)].sort_values("layer")
            if len(part):
                _draw_series(figure, part, name, place, column, base=float(steep))
    layers = sorted(set(table["layer"]))
    named = layers[:: -(-len(layers) // 8)]
    figure.update_xaxes(title_text="layer", tickvals=named, showgrid=False)
    if steep:
        figure.update_yaxes(type="log", dtick=1, ticksuffix="×", exponentformat="none")
    else:
        figure.update_yaxes(tickformat="+.0%", nticks=6)
    figure.update_yaxes(title_text="times the base" if steep else axis, col=1)
    base = 1 if steep else 0
    figure.add_hline(base, line={"color": style.INK, "width": 1})
    n = f" of {table['n'].iloc[0]} examples" if "n" in table.columns else ""
    subtitle = f"mean{n}; bands: 95 % intervals; {'1×' if steep else '0 %'} is the base model"
    return style.dress(
        figure, title=_title(table, what), subtitle=subtitle, plot_height=300, headings=any(panels)
    )


def _title(table: pd.DataFrame, what: str) -> str:
    """Where the gain is largest, or that there is none."""
    best = table.loc[table["gain"].idxmax()]
    if best["gain"] <= 0:
        return f"{what} does not gain at any layer"
    where = f"{best['series']}{best['panel'] and ', ' + best['panel']}"
    gain = f"{1 + best['gain']:.3g} times the base" if best["gain"] > STEEP else f"{best['gain']:+.0%}"
    return f"{what} gains most at layer {best['layer']}, {where}: {gain}"


def _draw_series(figure: go.Figure, part: pd.DataFrame, name: str, place: int, column: int, *, base: float) -> None:
    """One line with its marks, and its interval as a band behind it; the base model lies at `base`."""
    colour, symbol = style.CYCLE[place % len(style.CYCLE)], style.SYMBOLS[place % len(style.SYMBOLS)]
    band = go.Scatter(
        x=[*part["layer"], *part["layer"][::-1]],
        y=[*(base + part["gain_high"]), *(base + part["gain_low"])[::-1]],
        mode="lines",
        fill="toself",
        fillcolor=style.translucent(colour, 0.2),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )
    line = go.Scatter(
        x=part["layer"],
        y=base + part["gain"],
        mode="lines+markers",
        name=name,
        legendgroup=name,
        showlegend=column == 1,
        line={"color": colour, "width": 2.5},
        marker={"symbol": symbol, "size": 10},
        hovertext=style.hover(part),
        hoverinfo="text",
    )
    figure.add_traces([band, line], rows=[1, 1], cols=[column, column])
