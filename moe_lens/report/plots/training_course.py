"""The course of a training run: loss, dev score and learning rate over its steps."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.errors import MoELensError
from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require

DEV_SCORES = {"dev_em": "dev EM", "dev_f1": "dev F1", "dev_log_likelihood": "dev log-likelihood"}
SHARES = ("dev_em", "dev_f1")


def tuning_figure(log: pd.DataFrame) -> go.Figure:
    """Loss, dev score (where it was measured) and learning rate over the steps, one above the other.

    Args:
        log: one row per optimizer step with the columns `step`, `loss` (such as mean nats per answer token)
            and `learning_rate`, and optionally one of `dev_em`, `dev_f1` (shares in [0, 1]) and `dev_log_likelihood`
            (mean nats per answer token), empty where it was not measured.

    Raises:
        MoELensError: a column is missing, there are several dev scores, or the log has no rows.
    """
    log = require(log, ("step", "loss", "learning_rate"), figure="tuning_figure")
    measured = [column for column in DEV_SCORES if column in log.columns and log[column].notna().any()]
    if len(measured) > 1:
        raise MoELensError(f"a run is measured by one dev score; the log has {', '.join(measured)}")
    heights = [0.46, 0.3, 0.24] if measured else [0.65, 0.35]
    figure = make_subplots(len(heights), 1, shared_xaxes=True, vertical_spacing=0.06, row_heights=heights)
    _draw_course(figure, log, 1, column="loss", colour=style.BLUE)
    _draw_course(figure, log, len(heights), column="learning_rate", colour=style.GREY)
    figure.update_xaxes(title_text="step", row=len(heights), col=1)
    figure.update_yaxes(title_text="loss", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="learning<br>rate", exponentformat="power", nticks=4, row=len(heights), col=1)
    figure.update_yaxes(rangemode="tozero", row=len(heights), col=1)
    losses = log["loss"]
    title = f"The loss goes from {losses.iloc[0]:.2f} to {losses.iloc[-1]:.2f} in training"
    subtitle = f"{len(log)} steps logged"
    for column in measured:
        best = _draw_marks(figure, log.dropna(subset=[column]), column)
        subtitle += f"; best {DEV_SCORES[column]} {best[column]:.2f} after step {best['step']:g} (star)"
    height = 420 if measured else 300
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=height)


SECTIONS = {
    "tuning.parquet": Section(
        "Training",
        "What training minimises and the learning rate at every step.",
        draw=tuning_figure,
        place=170,
    ),
    "learning_rates.parquet": Section(
        "Learning rates tried",
        "The rate that did best on the dev data was kept.",
        draw=None,
        place=180,
    ),
}


def _draw_course(figure: go.Figure, log: pd.DataFrame, row: int, *, column: str, colour: str) -> None:
    """One quantity of every step as a line."""
    trace = go.Scatter(
        x=log["step"],
        y=log[column],
        mode="lines",
        line={"color": colour, "width": 2},
        showlegend=False,
        hovertext=style.hover(log),
        hoverinfo="text",
    )
    figure.add_trace(trace, row=row, col=1)


def _draw_marks(figure: go.Figure, evaluated: pd.DataFrame, column: str) -> pd.Series:
    """A dev score as marks, the best one (the first of equals) a star; gives that one's row."""
    best = evaluated[column].idxmax()
    chosen = evaluated.index == best
    trace = go.Scatter(
        x=evaluated["step"],
        y=evaluated[column],
        mode="lines+markers",
        line={"color": style.VERMILLION, "width": 1.5, "dash": "dot"},
        marker={
            "color": style.VERMILLION,
            "opacity": 1,
            "symbol": ["star" if it else "circle" for it in chosen],
            "size": [17 if it else 9 for it in chosen],
        },
        showlegend=False,
        hovertext=style.hover(evaluated),
        hoverinfo="text",
    )
    figure.add_trace(trace, row=2, col=1)
    figure.update_yaxes(title_text=DEV_SCORES[column].replace("-", "-<br>"), row=2, col=1)
    if column in SHARES:
        figure.update_yaxes(range=[-0.05, 1.08], dtick=0.5, row=2, col=1)
    return evaluated.loc[best]
