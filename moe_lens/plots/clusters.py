"""The map of routing vectors: the paper's Figure 4."""

import pandas as pd
import plotly.graph_objects as go

from moe_lens.plots import style

COLUMNS = ("task", "x", "y")


def clusters_figure(table: pd.DataFrame) -> go.Figure:
    """A mark per example where t-SNE puts its routing vector, in the colour and shape of its task.

    Args:
        table: one row per example with the columns `task`, `x` and `y`, and optionally `silhouette` and
            `knn_accuracy` (of the vectors before the projection, the same in every row).

    Raises:
        MoELensError: a column is missing or the table is empty.
    """
    table = style.require(table, COLUMNS, figure="clusters_figure")
    tasks = list(dict.fromkeys(table["task"]))
    figure = go.Figure()
    for place, task in enumerate(tasks):
        part = table[table["task"] == task]
        figure.add_scatter(
            x=part["x"],
            y=part["y"],
            mode="markers",
            name=task,
            marker={
                "color": style.CYCLE[place % len(style.CYCLE)],
                "symbol": style.SYMBOLS[place % len(style.SYMBOLS)],
                "size": 7,
                "opacity": 0.75,
            },
            hovertext=style.hover(part),
            hoverinfo="text",
        )
    figure.update_xaxes(showticklabels=False, ticks="", showgrid=False, title_text="t-SNE (axes have no unit)")
    figure.update_yaxes(showticklabels=False, ticks="", showgrid=False)
    numbers = {"silhouette": "silhouette", "knn_accuracy": "nearest neighbours of the same task"}
    said = [f"{text} {table[name].iloc[0]:.2f}" for name, text in numbers.items() if name in table.columns]
    chance = table["task"].value_counts(normalize=True).max()
    subtitle = "; ".join([f"{len(table)} examples", *said, f"chance {chance:.2f}"])
    title = "Which experts an example takes tells its task"
    if "knn_accuracy" in table.columns and table["knn_accuracy"].iloc[0] < chance + 0.1:
        title = "Which experts an example takes hardly tells its task"
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=420, below=44)
