"""The map of routing vectors: the paper's Figure 4."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require

COLUMNS = ("task", "x", "y", "silhouette", "knn_accuracy", "knn_accuracy_low", "knn_accuracy_high", "chance")
CLEAR = 0.1
"""By how much the lower end of the neighbours' accuracy must exceed chance to be called telling."""


def clusters_figure(table: pd.DataFrame) -> go.Figure:
    """A mark per example where t-SNE puts its routing vector, in the colour and shape of its task.

    Args:
        table: one row per example with the columns `task`, `x`, `y`, and the same in every row of a map: `silhouette`,
            `knn_accuracy`, `knn_accuracy_low`, `knn_accuracy_high` and `chance`, as `metrics.separability` gives them
            for the vectors before the projection (empty for a single task). With a column `panel` (which routers) the
            maps stand side by side.

    Raises:
        MoELensError: a column is missing or the table is empty.
    """
    table = require(table, COLUMNS, figure="clusters_figure")
    table = table if "panel" in table.columns else table.assign(panel="")
    tasks, panels = list(dict.fromkeys(table["task"])), list(dict.fromkeys(table["panel"]))
    figure = make_subplots(1, len(panels), horizontal_spacing=0.02, subplot_titles=panels if any(panels) else None)
    for column, panel in enumerate(panels, start=1):
        for task, look in style.looks(tasks).items():
            part = table[(table["task"] == task) & (table["panel"] == panel)]
            _draw_task(figure, part, look, column, name=task, size=7 if len(panels) == 1 else 5)
    figure.update_xaxes(showticklabels=False, ticks="", showgrid=False, mirror=True)
    figure.update_yaxes(showticklabels=False, ticks="", showgrid=False, mirror=True)
    title, subtitle = _words(table.drop_duplicates("panel"), examples=len(table) // len(panels), tasks=len(tasks))
    figure = style.dress(
        figure,
        title=title,
        subtitle=subtitle,
        plot_height=420 if len(panels) == 1 else 250,
        below=24,
        headings=any(panels),
    )
    figure.update_annotations(font_size=16)  # the headings of panels, which may be three
    return figure.update_layout(legend={"itemsizing": "constant"}, margin={"l": 24})


SECTIONS = {
    "clusters.parquet": Section(
        "Do tasks take different experts",
        "The activation rates of the context-faithful experts, example by example (Figure 4). Silhouette and the share "
        "of nearest neighbours of the same task are taken from the vectors themselves, not from the map.",
        draw=clusters_figure,
        place=60,
    ),
}


def _draw_task(figure: go.Figure, part: pd.DataFrame, look: style.Look, column: int, *, name: str, size: int) -> None:
    """The examples of one task as marks on one map."""
    marks = go.Scatter(
        x=part["x"],
        y=part["y"],
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=column == 1,
        marker={**look.mark, "size": size, "opacity": 0.7},
        hovertext=style.hover(part),
        hoverinfo="text",
    )
    figure.add_trace(marks, row=1, col=column)


def _words(maps: pd.DataFrame, *, examples: int, tasks: int) -> tuple[str, str]:
    """Title and second line: in which maps [one row each] neighbours share the task, and the numbers behind it."""
    if maps["knn_accuracy"].isna().all():
        return "Where t-SNE puts the examples of one task", f"{examples} examples; axes have no unit"
    told = [
        f"{it.panel and it.panel + ': '}[{it.knn_accuracy_low:.2f}, {it.knn_accuracy_high:.2f}], "
        f"silhouette {it.silhouette:.2f}"
        for it in maps.itertuples()
    ]
    subtitle = (
        f"{examples} examples of {tasks} tasks by t-SNE (axes have no unit); vectors before t-SNE: chance "
        f"{maps['chance'].iloc[0]:.2f}; 95 % intervals: {'; '.join(told)}"
    )
    if len(maps) > 1:
        shares = ", ".join(f"{it.knn_accuracy:.2f} with {it.panel}" for it in maps.itertuples())
        return f"Nearest neighbours share the task: {shares}", subtitle
    only = maps.iloc[0]
    tells = "tells" if only["knn_accuracy_low"] > only["chance"] + CLEAR else "hardly tells"
    return f"Which experts an example takes {tells} its task ({only['knn_accuracy']:.2f})", subtitle
