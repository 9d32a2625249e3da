"""What the routers do over one training: entropy, load, dead experts and drift, a line for each layer."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require, require_once

NUMBERS = {
    "drift": "drift",
    "entropy": "entropy<br>(bits)",
    "max_load": "largest<br>share",
    "unused": "unused<br>experts",
}


def routing_course_figure(table: pd.DataFrame) -> go.Figure:
    """A panel for each of NUMBERS over the steps of a training.

    Args:
        table: one row per step and layer with the columns `step`, `layer` and NUMBERS, as `tune` writes them.
    """
    table = require(table, ("step", "layer", *NUMBERS), figure="routing_course_figure")
    require_once(table, ("step", "layer"), figure="routing_course_figure")
    figure = make_subplots(len(NUMBERS), 1, shared_xaxes=True, vertical_spacing=0.05)
    layers = [str(layer) for layer in sorted(set(table["layer"]))]
    for row, (name, label) in enumerate(NUMBERS.items(), start=1):
        for layer, look in style.ordered_looks(layers).items():
            own = table[table["layer"].astype(str) == layer].sort_values("step")
            figure.add_scatter(
                x=own["step"], y=own[name], mode="lines+markers", name=f"layer {layer}", legendgroup=layer, row=row,
                col=1, line={"color": look.colour, "width": 1.5}, marker={"size": 5}, hovertext=style.hover(own),
                hoverinfo="text", showlegend=row == 1 and len(layers) <= 8,
            )  # fmt: skip
        figure.update_yaxes(title_text=label, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title_text="step", row=len(NUMBERS), col=1)
    last = table[table["step"] == table["step"].max()]
    title = f"In training {last['drift'].mean():.0%} of the selected experts change"
    subtitle = f"{len(layers)} layers from light to dark; {int(last['unused'].sum())} experts unused at the end"
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=560)


SECTIONS = {
    "routing_course.parquet": Section(
        "What the routers do in training",
        "On some of the dev examples, at the start and whenever these were measured: the share of the selected experts "
        "that were not selected at the start, the routers' entropy, the largest expert's load (1 where it is even) and "
        "experts that no token selects.",
        draw=routing_course_figure,
        place=165,
    ),
}
