"""What training costs in memory: the trainable parameters of each method, the paper's Figure 9."""

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style
from moe_lens.report.plots.answer_scores import VARIANTS
from moe_lens.report.section import Section
from moe_lens.report.tables import require, require_once


def parameters_figure(table: pd.DataFrame) -> go.Figure:
    """Trainable parameters of each method as bars on a logarithmic axis, the share of all written at their ends.

    Args:
        table: one row per model and method with the columns `model`, `method`, `trainable` and `total`.

    Raises:
        MoELensError: a column is missing, the table is empty, or a method stands twice for a model.
    """
    table = require(table, ("model", "method", "trainable", "total"), figure="parameters_figure")
    require_once(table, ("model", "method"), figure="parameters_figure")
    figure = go.Figure()
    for method, look in style.looks(table["method"], VARIANTS).items():
        figure.add_trace(_bars(table[table["method"] == method], look, name=method))
    figure.update_layout(bargap=0.25, barmode="group")
    low, high = table["trainable"].min(), table["trainable"].max()
    figure.update_xaxes(type="log", range=[len(str(int(low))) - 2, len(str(int(high))) + 0.9])
    figure.update_xaxes(title_text="trainable parameters", exponentformat="power", dtick=1)
    models = list(dict.fromkeys(table["model"]))
    figure.update_yaxes(categoryorder="array", categoryarray=models[::-1], showgrid=False, ticks="")
    return style.dress(
        figure,
        title=_title(table),
        subtitle="on a logarithmic scale; in brackets the share of the model's parameters",
        plot_height=60 + 40 * len(table),
        below=84,
    )


SECTIONS = {
    "parameters.parquet": Section(
        "What training costs",
        "Trainable parameters of each method (Figure 9).",
        draw=parameters_figure,
        place=120,
    ),
}


def size(count: float) -> str:
    """A number of parameters as people write it: 8192 is 8.2K, 6.9e9 is 6.9B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(int(count))


def _bars(part: pd.DataFrame, look: style.Look, *, name: str) -> go.Bar:
    """One method's bars, a model each."""
    return go.Bar(
        y=part["model"],
        x=part["trainable"],
        orientation="h",
        name=name,
        marker=look.bar,
        text=[f"{size(n)} ({n / total:.1%})" for n, total in zip(part["trainable"], part["total"], strict=True)],
        textposition="outside",
        textfont={"size": 14},
        cliponaxis=False,
        hovertext=style.hover(part),
        hoverinfo="text",
    )


def _title(table: pd.DataFrame) -> str:
    """The share of the parameters that the methods train which do not train all."""
    shares = (table["trainable"] / table["total"]).groupby(table["method"], sort=False).mean()
    parts = [f"{name} {share:.1%}" for name, share in shares.items() if share < 1]
    return f"Share of the parameters trained: {', '.join(parts)}" if parts else "Every method trains all parameters"
