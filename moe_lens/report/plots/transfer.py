"""The transfer of tuning from task to task: the paper's Figure 5."""

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require, require_once

COLUMNS = ("trained", "task", "em_gain", "em_gain_low", "em_gain_high")


def transfer_figure(table: pd.DataFrame) -> go.Figure:
    """A square map: the gain in EM over the base model, of tuning on the row's task, on the column's.

    Args:
        table: one row per pair with the columns `trained`, `task`, `em_gain` (difference of shares), `em_gain_low`
            and `em_gain_high`. More columns show up under the pointer.

    Raises:
        MoELensError: a column is missing, the table is empty, or a pair stands there twice.
    """
    table = require(table, COLUMNS, figure="transfer_figure")
    require_once(table, ("trained", "task"), figure="transfer_figure")
    rows, columns = list(dict.fromkeys(table["trained"])), list(dict.fromkeys(table["task"]))
    cells = table.assign(text=style.hover(table)).pivot(index="trained", columns="task").loc[rows[::-1]]
    figure = go.Figure(_map(cells, columns))
    for row in rows[::-1]:
        for column in columns:
            _write_gain(figure, row, column, *(cells.loc[row, (name, column)] for name in COLUMNS[2:]))
    figure.update_xaxes(title_text="answered", showgrid=False, ticks="", showline=False)
    figure.update_yaxes(title_text="tuned on", showgrid=False, ticks="", showline=False)
    return style.dress(
        figure,
        title=_title(table),
        subtitle="exact match minus that of the base model; bold: the 95 % interval leaves out 0",
        plot_height=90 * len(rows),
        below=90,
    )


SECTIONS = {
    "transfer.parquet": Section(
        "Does it carry over",
        "Routers tuned on one task and tried on the others (the paper's Figure 5).",
        draw=transfer_figure,
        place=50,
    ),
}


def _map(cells: pd.DataFrame, columns: list[str]) -> go.Heatmap:
    """The gains as colours, the rows of `cells` from below."""
    return go.Heatmap(
        x=columns,
        y=list(cells.index),
        z=cells["em_gain"][columns].to_numpy(),
        zmin=-1,
        zmax=1,
        colorscale=style.DIVERGING,
        xgap=2,
        ygap=2,
        hovertext=cells["text"][columns].to_numpy(),
        hoverinfo="text",
        showlegend=False,
        colorbar={"title": {"text": "EM gain", "side": "right"}, "thickness": 14, "outlinewidth": 0, "nticks": 5},
    )


def _write_gain(figure: go.Figure, row: str, column: str, gain: float, low: float, high: float) -> None:
    """A cell's gain in numbers, bold where its interval leaves out 0."""
    figure.add_annotation(
        x=column,
        y=row,
        text=f"<b>{gain:+z.2f}</b>" if low > 0 or high < 0 else f"{gain:+z.2f}",
        showarrow=False,
        font={"color": "white" if abs(gain) > 0.6 else style.INK},
    )


def _title(table: pd.DataFrame) -> str:
    """How many pairs of different tasks gain, and how many lose, by more than their intervals."""
    others = table[table["trained"] != table["task"]]
    gains, losses = int((others["em_gain_low"] > 0).sum()), int((others["em_gain_high"] < 0).sum())
    return f"Of {len(others)} transfers to another task {gains} gain and {losses} lose for sure"
