"""What finders' experts leave of the answers when they are masked, beside random sets, one panel for each model."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require, require_once

RANDOM, NOTHING = "random sets", "nothing masked"
"""The rows drawn as lines, to which all others are compared."""


def left_figure(table: pd.DataFrame) -> go.Figure:
    """One row of dots per finder, those that leave least on top, and one panel per model.

    Args:
        table: columns model, finder, em, em_low, em_high; the rows of the finders RANDOM and NOTHING become lines.

    Raises:
        MoELensError: a column is missing, or a finder stands there twice for a model.
    """
    columns = ("model", "finder", "em", "em_low", "em_high")
    table = require(table, columns, figure="left_figure")
    require_once(table, ("model", "finder"), figure="left_figure")
    models, own = list(table["model"].unique()), table[~table["finder"].isin([RANDOM, NOTHING])]
    order = own.groupby("finder")["em"].mean().sort_values(ascending=False, kind="stable").index
    figure = make_subplots(1, len(models), shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=models)
    for column, model in enumerate(models, start=1):
        rows, lines = own[own["model"] == model], table[table["model"] == model].set_index("finder")["em"]
        figure.add_trace(_dots(rows, order), row=1, col=column)
        for name, dash in ((RANDOM, "dash"), (NOTHING, "dot")):
            if name in lines:
                line = {"color": style.GREY, "dash": dash, "width": 1.5}
                figure.add_vline(lines[name], line=line, row=1, col=column)
        figure.update_xaxes(title_text="EM left", range=[-0.04, 1.04], dtick=0.5, row=1, col=column)
    figure.update_xaxes(title_font_size=17, tickfont_size=17)
    figure.update_yaxes(tickvals=list(range(len(order))), ticktext=list(order), ticks="", tickfont_size=15)
    figure.update_yaxes(range=[-0.6, len(order) - 0.4])
    subtitle = "dashed: random sets; dotted: nothing masked; bars: 95 % intervals"
    of_all = [name for name in order if (own["finder"] == name).sum() == len(models)]
    title = f"{(of_all or list(order))[-1]} leaves least" + (", mean of the models" if len(models) > 1 else "")
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=30 * len(order), below=80, headings=True)


SECTIONS = {
    "left.parquet": Section(
        "What masking leaves",
        "Each finder's experts are masked; the less is still answered, the more of those that matter it found.",
        draw=left_figure,
        place=154,
    ),
}


def _dots(rows: pd.DataFrame, order: pd.Index) -> go.Scatter:
    """The dots of one model, at their finders' places."""
    return go.Scatter(
        x=rows["em"],
        y=order.get_indexer(rows["finder"]),
        error_x=style.error_bars(rows, "em"),
        mode="markers",
        marker={"color": style.BLUE, "size": 10},
        showlegend=False,
        hovertext=style.hover(rows),
        hoverinfo="text",
    )
