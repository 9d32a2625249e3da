"""Whether attention gain goes with exact match, over models tuned in their first layers: the paper's Figure 13."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require

COLUMNS = ("target", "model", "gain", "em", "r", "r_low", "r_high")


def correlation_figure(table: pd.DataFrame) -> go.Figure:
    """EM against the attention gain on the context and on the answer, a mark per tuned model; the paper's Figure 13.

    Args:
        table: one row per model and target with the columns `target` ("context", "answer"), `model` (its name), `gain`,
            `em`, and the same in every row of a target: `r` (Pearson), `r_low`, `r_high`.

    Raises:
        MoELensError: a column is missing or the table is empty.
    """
    table = require(table, COLUMNS, figure="correlation_figure")
    targets = list(dict.fromkeys(table["target"]))
    figure = make_subplots(1, len(targets), shared_yaxes=True, horizontal_spacing=0.05)
    for column, (target, look) in enumerate(style.looks(targets).items(), start=1):
        figure.add_trace(_marks(table[table["target"] == target], look), row=1, col=column)
        figure.update_xaxes(title_text=f"attention gain: {target}", tickformat="+.0%", nticks=5, row=1, col=column)
    figure.update_yaxes(range=[0, 1.08], dtick=0.2)
    figure.update_yaxes(title_text="exact match (EM)", col=1)
    told = [
        f"{target}: r = {part['r'].iloc[0]:.2f} [{part['r_low'].iloc[0]:.2f}, {part['r_high'].iloc[0]:.2f}]"
        for target, part in table.groupby("target", sort=False)
    ]
    return style.dress(
        figure,
        title=_title(table),
        subtitle=f"{table['model'].nunique()} models; {'; '.join(told)} (95 % intervals)",
        plot_height=320,
    )


SECTIONS = {
    "correlation.parquet": Section(
        "Does attention gain go with exact match",
        "Models tuned in their first layers, the base model at 0 (Figure 13).",
        draw=correlation_figure,
        place=110,
    ),
}


def _marks(part: pd.DataFrame, look: style.Look) -> go.Scatter:
    """The models of one target, their names above the marks."""
    return go.Scatter(
        x=part["gain"],
        y=part["em"],
        mode="markers+text",
        text=part["model"],
        textposition="top center",
        textfont={"size": 13},
        cliponaxis=False,
        marker={**look.mark, "size": 12},
        hovertext=style.hover(part),
        hoverinfo="text",
        showlegend=False,
    )


def _title(table: pd.DataFrame) -> str:
    """Whether EM goes with the gain on each target; sure means that the interval of r leaves out 0."""
    told = []
    for target, part in table.groupby("target", sort=False):
        r, low, high = (part[name].iloc[0] for name in ("r", "r_low", "r_high"))
        sure = "rises" if low > 0 else "falls" if high < 0 else "goes neither way for sure"
        told.append(f"{sure} with attention to the {target} (r = {r:.2f})")
    return f"EM {', '.join(told)}"
