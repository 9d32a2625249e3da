"""The patching map: how far values of another run, put in at each place, move the answers towards that run's."""

import html

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style
from moe_lens.report.plots.usage_maps import CELL
from moe_lens.report.section import Section
from moe_lens.report.tables import require, require_once

COLUMNS = (
    "layer", "position", "what", "metric", "n", "unpatched", "source", "effect", "effect_low", "effect_high",
    "normalised", "normalised_low", "normalised_high", "q_value",
)  # fmt: skip
UNITS = {"logit_difference": ", nats", "answer_log_probability": ", nats"}
CERTAIN = 0.05
"""The q-value up to which a cell is framed."""


def patching_figure(table: pd.DataFrame) -> go.Figure:
    """A heat map: experts by layer, or layers by position, positions in their order from above.

    Colours say the normalised effect, or, where the two runs do not differ for certain, the plain one; white is none.
    Cells with q <= 0.05 are framed. Of few cells each says its value and interval.

    Args:
        table: one row per cell, as `causal.patching_map` gives them: with a column `expert`, a map over experts; with
            `token`, positions are named by it.

    Raises:
        MoELensError: a column is missing, or a cell has two rows.
    """
    table = require(table, COLUMNS, figure="patching_figure")
    of_experts = "expert" in table
    keys = ("layer", "expert") if of_experts else ("position", "layer")
    require_once(table, keys, figure="patching_figure")
    shown = "normalised" if table["normalised"].notna().any() else "effect"
    rows, columns = (list(dict.fromkeys(table[key])) for key in keys)
    rows, columns = (sorted(rows) if of_experts else rows), sorted(columns)
    placed = table.assign(y=table[keys[0]].map(rows.index), x=table[keys[1]].map(columns.index))
    figure = go.Figure(_cells(placed, shown, len(rows), len(columns)))
    _frame(figure, placed[placed["q_value"] <= CERTAIN])
    if _is_small(table):
        _write(figure, placed, shown)
    names = rows if of_experts else [_name(table[table["position"] == row].iloc[0]) for row in rows]
    every = -(-len(rows) // 8) if of_experts else 1
    ticks = list(range(0, len(rows), every))
    figure.update_yaxes(tickvals=ticks, ticktext=[names[y] for y in ticks], showgrid=False, showline=False, ticks="")
    figure.update_yaxes(range=[-0.5, len(rows) - 0.5] if of_experts else [len(rows) - 0.5, -0.5])
    figure.update_yaxes(title_text="layer" if of_experts else None, tickfont={"size": 13 if "token" in table else 18})
    every = 2 ** max(0, ((len(columns) - 1) // 18).bit_length())
    figure.update_xaxes(tickvals=list(range(0, len(columns), every)), ticktext=columns[::every])
    figure.update_xaxes(title_text=keys[1], showgrid=False, showline=False, ticks="", range=[-0.5, len(columns) - 0.5])
    if of_experts:
        height = len(rows) * CELL["tall" if len(rows) <= 8 else "flat"]
    else:
        height = len(rows) * (18 if "token" in table else 50)
    title, subtitle = _title(table, shown, keys), _subtitle(table, shown)
    style.dress(figure, title=title, subtitle=subtitle, plot_height=max(110, height))
    figure.update_annotations(font_size=13)
    return figure


SECTIONS = {
    "patching.parquet": Section(
        "Where does what another run knows come in",
        "Values of another run (the source), put into this one at one place after the other. normalised: by how much "
        "of the difference of the two runs' scores the answers move; 0 is the unpatched run, 1 the source; it is "
        "missing where the runs do not differ for certain. q_value: of the test of no effect, corrected for the number "
        "of places.",
        draw=patching_figure,
        place=48,
    ),
}


def _is_small(table: pd.DataFrame) -> bool:
    """Whether each cell has room for its number."""
    return "token" not in table and "expert" not in table and table["layer"].nunique() <= 6


def _cells(placed: pd.DataFrame, shown: str, rows: int, columns: int) -> go.Heatmap:
    """The cells with their colour bar; what is not in the table stays grey."""
    safe = placed.assign(token=placed["token"].map(_visible)) if "token" in placed else placed
    placed = placed.assign(text=style.hover(safe.drop(columns=["x", "y"])))
    places = {"index": range(rows), "columns": range(columns)}
    cells = placed.pivot(index="y", columns="x", values=shown).reindex(**places)
    texts = placed.pivot(index="y", columns="x", values="text").reindex(**places).fillna("not in the table")
    reach = 1.0 if shown == "normalised" else float(placed[shown].abs().max()) or 1.0
    return go.Heatmap(
        z=cells.to_numpy(), x=list(range(columns)), y=list(range(rows)), zmin=-reach, zmax=reach,
        colorscale=style.DIVERGING, xgap=1, ygap=1, hovertext=texts.to_numpy(), hoverinfo="text", showlegend=False,
        colorbar={"thickness": 14, "nticks": 5, "outlinewidth": 0, "tickfont": {"size": 15}},
    )  # fmt: skip


def _frame(figure: go.Figure, certain: pd.DataFrame) -> None:
    """A frame around each of these cells: one line, broken between the frames."""
    x: list[float | None] = []
    y: list[float | None] = []
    for cell in certain.itertuples():
        x += [cell.x - 0.45, cell.x + 0.45, cell.x + 0.45, cell.x - 0.45, cell.x - 0.45, None]
        y += [cell.y - 0.45, cell.y - 0.45, cell.y + 0.45, cell.y + 0.45, cell.y - 0.45, None]
    if x:
        line = {"color": style.BLACK, "width": 1.5}
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines", line=line, name=f"q ≤ {CERTAIN}", hoverinfo="skip"))
        figure.update_traces(showlegend=True, selector={"mode": "lines"})


def _write(figure: go.Figure, placed: pd.DataFrame, shown: str) -> None:
    """Each cell's value and, where it is known, its interval."""
    reach = 1.0 if shown == "normalised" else placed[shown].abs().max()
    for cell in placed.to_dict("records"):
        if pd.notna(cell[shown]):
            low, high = cell[f"{shown}_low"], cell[f"{shown}_high"]
            text = f"{cell[shown]:z.2f}" + (f"<br>[{low:z.2f}, {high:z.2f}]" if pd.notna(low) else "")
            ink = "white" if abs(cell[shown]) > 0.55 * reach else style.INK
            figure.add_annotation(x=cell["x"], y=cell["y"], text=text, showarrow=False, font={"color": ink})


def _visible(token: object) -> str:
    """A token's text as a figure can write it; empty for none."""
    return html.escape(token.replace("\n", "\\n")) if isinstance(token, str) else ""


def _name(row: pd.Series) -> str:
    """What a position is called: by its token, if it has one."""
    return _visible(row.get("token")) or str(row["position"])


def _title(table: pd.DataFrame, shown: str, keys: tuple[str, str]) -> str:
    """The place that moves the answers furthest, of those that do so for certain."""
    certain = table[table["q_value"] <= CERTAIN]
    if certain.empty:
        return f"Patching {table['what'].iloc[0]} moves {table['metric'].iloc[0]} for certain nowhere"
    most = certain.loc[certain[shown].abs().idxmax()]
    place = f"expert {most['expert']}" if "expert" in keys else _name(most)
    moved = f"{most[shown]:.0%} of the way" if shown == "normalised" else f"by {most[shown]:+.2f}"
    return f"{most['what']} of layer {most['layer']}, {place}, moves {most['metric']} {moved}"


def _subtitle(table: pd.DataFrame, shown: str) -> str:
    """What the ends of the scale are, and of how many examples."""
    ends = f"unpatched {table['unpatched'].mean():z.2f}, source {table['source'].mean():z.2f}"
    metric = table["metric"].iloc[0]
    unit = f"{metric}{UNITS.get(metric, '')}"
    scale = f"0: {ends.replace(', ', ', 1: ')} ({unit})" if shown == "normalised" else f"effect on {unit}; {ends}"
    brackets = "; brackets: 95 % intervals" if _is_small(table) else ""
    at = f"; at {table['position'].iloc[0]}" if "expert" in table else ""
    return f"{scale}{at}; {style.counts(table['n'])} examples{brackets}"
