"""The map of experts: a score of every expert of every layer, with a choice of experts outlined."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import named_together, require, require_once

COLUMNS = ("layer", "expert", "score")
CELL = {"tall": 30, "flat": 13}  # pixels per layer, for models of few and of many layers
GAP = 62  # pixels between two maps


def usage_figure(
    table: pd.DataFrame,
    marks: pd.DataFrame | None = None,
    *,
    label: str = "context-dependence ratio",
    marks_label: str = "marked",
    title: str | None = None,
) -> go.Figure:
    """A heat map, layer by expert, of a score; with a column `panel`, one map below the other.

    Panels without negative scores share one colour scale from 0; a panel with negative scores (a gain) gets
    its own, white at 0.

    Args:
        table: one row per layer and expert (and panel) with the columns `layer` (absolute index), `expert`,
            `score` and, if there are several maps, `panel` (its heading).
        marks: experts to outline, on every panel: the columns `layer` and `expert`.
        label: what the score is, for title and colour bar.
        marks_label: what the outlined experts are, for the legend.
        title: what is seen; by default where the score is highest.

    Raises:
        MoELensError: a column is missing, the table is empty, or an expert has two scores in one panel.
    """
    table = require(table, COLUMNS, figure="usage_figure")
    table = table if "panel" in table.columns else table.assign(panel="")
    require_once(table, ("panel", "layer", "expert"), figure="usage_figure")
    panels, layers = list(dict.fromkeys(table["panel"])), sorted(set(table["layer"]))
    map_height = max(110, len(layers) * CELL["tall" if len(layers) <= 8 else "flat"])
    inner = len(panels) * (map_height + GAP) - GAP
    headings = panels if any(panels) else None
    figure = make_subplots(len(panels), 1, shared_xaxes=True, vertical_spacing=GAP / inner, subplot_titles=headings)
    top = _shared_top(table)
    for row, (_, part) in enumerate(table.groupby("panel", sort=False), start=1):
        _draw_map(figure, part, row, layers=layers, top=top, length=map_height)
        if marks is not None:
            _draw_outlines(figure, marks, row, layers=layers, name=marks_label)
    _draw_axes(figure, layers, int(table["expert"].max()), rows=len(panels))
    title = title or f"{label[:1].upper()}{label[1:]} is highest for {_highest(table)}"
    subtitle = f"{table['layer'].nunique()} layers, {table['expert'].nunique()} experts each"
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=inner, headings=any(panels))


def _usage_map(table: pd.DataFrame) -> go.Figure:
    """The map of experts, one for each variant and data set; those with True in a column `planted` are outlined."""
    table = with_panels(table)
    if "planted" not in table.columns:
        return usage_figure(table)
    planted = table.loc[table["planted"], ["layer", "expert"]].drop_duplicates()
    return usage_figure(table, planted, marks_label="planted") if len(planted) else usage_figure(table)


def with_panels(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column `panel` that tells variants and data sets apart, where it has several and no such one."""
    names = named_together(table, ("variant", "data"))
    return table.assign(panel=names) if "panel" not in table.columns and names.any() else table


def _score_map(table: pd.DataFrame) -> go.Figure:
    """The map of one named score, the name standing in the column `name`."""
    require(table, ("name",), figure="the map of a score")
    return usage_figure(table, label=f"score {table['name'].iloc[0]}")


SECTIONS = {
    "usage.parquet": Section(
        "Which experts are used",
        "How often each router selects each expert. A router's ratios sum to 1 within a layer.",
        draw=_usage_map,
        place=30,
    ),
    "score-*.parquet": Section(
        "How a score ranks the experts",
        "A score by which experts were chosen: the highest of each layer.",
        draw=_score_map,
        place=160,
    ),
}


def _shared_top(table: pd.DataFrame) -> float:
    """The end of the colour scale that the panels without negative scores share."""
    spans = table.groupby("panel")["score"].agg(["min", "max"])
    return float(spans.loc[spans["min"] >= 0, "max"].max())


def _draw_map(figure: go.Figure, part: pd.DataFrame, row: int, *, layers: list[int], top: float, length: int) -> None:
    """One panel's cells, `layers` from below, and a colour bar beside it as long as the panel is tall."""
    gain = part["score"].min() < 0
    reach = part["score"].abs().max()
    cells = part.assign(text=style.hover(part)).pivot(index="layer", columns="expert").reindex(layers)
    heat = go.Heatmap(
        x=cells["score"].columns,
        y=list(range(len(layers))),
        z=cells["score"].to_numpy(),
        zmin=-reach if gain else 0,
        zmax=reach if gain else top,
        colorscale=style.DIVERGING if gain else style.SEQUENTIAL,
        xgap=1,
        ygap=1,
        hovertext=cells["text"].fillna("not in the table").to_numpy(),
        hoverinfo="text",
        showlegend=False,
        colorbar={
            "y": np.mean(figure.get_subplot(row, 1).yaxis.domain),
            "len": length + 16,
            "lenmode": "pixels",
            "thickness": 14,
            "nticks": 4,
            "outlinewidth": 0,
            "tickfont": {"size": 15},
        },
    )
    figure.add_trace(heat, row=row, col=1)


def _draw_outlines(figure: go.Figure, marks: pd.DataFrame, row: int, *, layers: list[int], name: str) -> None:
    """A frame around each marked cell: one line, broken between the frames."""
    require(marks, ("layer", "expert"), figure="usage_figure's marks")
    x: list[float | None] = []
    y: list[float | None] = []
    for layer, expert in zip(marks["layer"], marks["expert"], strict=True):
        if layer in layers:
            place = layers.index(layer)
            x += [expert - 0.5, expert + 0.5, expert + 0.5, expert - 0.5, expert - 0.5, None]
            y += [place - 0.5, place - 0.5, place + 0.5, place + 0.5, place - 0.5, None]
    line = {"color": style.BLACK, "width": 2.5}
    trace = go.Scatter(x=x, y=y, mode="lines", line=line, name=name, showlegend=row == 1, hoverinfo="skip")
    figure.add_trace(trace, row=row, col=1)


def _draw_axes(figure: go.Figure, layers: list[int], last_expert: int, *, rows: int) -> None:
    """Whole numbers on both axes, as many as can be read; the experts' name only below the lowest panel."""
    figure.update_xaxes(dtick=2 ** max(0, (last_expert // 18).bit_length()), tick0=0, ticks="")
    figure.update_xaxes(title_text="expert", row=rows, col=1)
    named = range(0, len(layers), -(-len(layers) // 8))
    figure.update_yaxes(tickvals=list(named), ticktext=[layers[place] for place in named])
    figure.update_yaxes(title_text="layer")
    figure.update_xaxes(showgrid=False, showline=False)
    figure.update_yaxes(showgrid=False, showline=False)


def _highest(table: pd.DataFrame) -> str:
    """Which expert has the highest score, or how many that look alike."""
    printed = table["score"].astype(float).map(style.number)
    value = printed[table["score"].idxmax()]
    best = table[printed == value]
    if len(best) > 1:
        return f"{len(best)} experts alike ({value})"
    only = best.iloc[0]
    return f"layer {only['layer']}, expert {only['expert']}{only['panel'] and ', ' + only['panel']} ({value})"
