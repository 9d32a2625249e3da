"""The comparison of scores: which way of scoring experts finds those that matter."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.errors import MoELensError
from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import over_seeds, require

#: metric -> (axis label, axis range, the value that chance gives)
METRICS = {
    "auc": ("AUC", (0.0, 1.0), 0.5),
    "precision": ("precision<br>at k", (0.0, 1.0), None),
    "em_drop": ("EM drop<br>when masked", None, 0.0),
    "spearman": ("rank corr.<br>with effect", (-1.0, 1.0), 0.0),
    "returned": ("returns on<br>other data", (0.0, 1.0), None),
}


def scores_figure(table: pd.DataFrame, metrics: Sequence[str] | None = None) -> go.Figure:
    """One row of dots per score and one panel per metric, with intervals; best by the first on top.

    Args:
        table: one row per score with the columns `score` (its name) and, for every metric m, `m`, `m_low` and
            `m_high`. With a column `seed`, several rows of a score become their mean, the bars reaching from the
            lowest to the highest seed.
        metrics: the columns to draw, in this order; those without `_low` and `_high` get no bars. Left out,
            it is those of METRICS that the table has or, if it has none, every column that has both.

    Raises:
        MoELensError: a column is missing, no metric is left, or a score stands there twice.
    """
    known = [metric for metric in METRICS if metric in table.columns]
    metrics = list(metrics or known or _with_intervals(table))
    if not metrics:
        raise MoELensError(
            f"scores_figure found no metric: it needs one of {', '.join(METRICS)}, or m, m_low and m_high; "
            f"this table has {', '.join(map(str, table.columns))}"
        )
    table = require(table, ("score", *metrics), figure="scores_figure")
    table = over_seeds(table, ("score",), metrics, figure="scores_figure")
    table = table.sort_values(metrics[0], kind="stable", ignore_index=True)
    figure = make_subplots(1, len(metrics), shared_yaxes=True, horizontal_spacing=0.045)
    for column, metric in enumerate(metrics, start=1):
        _draw_dots(figure, table, metric, column)
        _draw_axis(figure, metric, column)
    figure.update_yaxes(tickvals=list(range(len(table))), ticktext=list(table["score"]), ticks="", showline=False)
    figure.update_yaxes(range=[-0.6, len(table) - 0.4])
    title, subtitle = _words(table, metrics)
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=36 * len(table), below=96)


SECTIONS = {
    "scores.parquet": Section(
        "Which score finds them",
        "Each score ranks the experts; the panels compare its ranking with experts known to matter.",
        draw=scores_figure,
        place=150,
    ),
}


def _with_intervals(table: pd.DataFrame) -> list[str]:
    """The columns m for which m_low and m_high exist."""
    return [m for m in table.columns if {f"{m}_low", f"{m}_high"} <= set(table.columns)]


def _draw_dots(figure: go.Figure, table: pd.DataFrame, metric: str, column: int) -> None:
    """The dots of one metric, a row each, with bars where the table has the interval."""
    trace = go.Scatter(
        x=table[metric],
        y=table.index,
        error_x=style.error_bars(table, metric) if metric in _with_intervals(table) else None,
        mode="markers",
        marker={"color": style.BLUE, "size": 10},
        showlegend=False,
        hovertext=style.hover(table),
        hoverinfo="text",
    )
    figure.add_trace(trace, row=1, col=column)


def _draw_axis(figure: go.Figure, metric: str, column: int) -> None:
    """A metric's label, its whole range where it has one, and a dashed line at what chance gives."""
    label, limits, chance = METRICS.get(metric, (metric.replace("_", " "), None, None))
    figure.update_xaxes(title_text=label, title_font_size=17, tickfont_size=17, row=1, col=column)
    if limits is None:
        figure.update_xaxes(nticks=3, row=1, col=column)
    else:
        figure.update_xaxes(dtick=(limits[1] - limits[0]) / 2, row=1, col=column)
        pad = 0.04 * (limits[1] - limits[0])
        figure.update_xaxes(range=[limits[0] - pad, limits[1] + pad], row=1, col=column)
    if chance is not None:
        figure.add_vline(chance, line={"color": style.GREY, "dash": "dash", "width": 1.5}, row=1, col=column)


def _words(table: pd.DataFrame, metrics: Sequence[str]) -> tuple[str, str]:
    """Title and second line: the best score by the first metric, and how to read the figure."""
    metric = metrics[0]
    label = METRICS.get(metric, (metric.replace("_", " "),))[0].replace("<br>", " ")
    title = f"{label} is highest for {style.ranked(table.set_index('score')[metric])[0]}"
    return title, f"{len(table)} scores of experts; dashed: what chance gives; {style.bars(table, metrics)}"
