"""Pairs of experts: a square map of a layer's experts by each other, with a slider over the layers."""

from functools import partial

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import named_together, require, require_once

SIDE = 420  # pixels


def pairs_figure(table: pd.DataFrame, *, value: str, label: str, title: str) -> go.Figure:
    """Expert by expert, one layer of one variant and data set at a time, which a slider below chooses.

    Args:
        table: one row per ordered pair with the columns `layer`, `expert`, `other` and the value; `variant` and `data`
            where they take several values.
        value: the column. label: what it is, under the pointer. title: what is seen.

    Raises:
        MoELensError: a column is missing, the table is empty, or a pair has two values in a layer.
    """
    table = require(table, ("layer", "expert", "other", value), figure="pairs_figure")
    table = table.assign(map="layer " + table["layer"].astype(str) + _after(named_together(table, ("variant", "data"))))
    require_once(table, ("map", "expert", "other"), figure="pairs_figure")
    low, size = table[value].min() < 0, 1 + int(table[["expert", "other"]].max(axis=None))
    reach = float(table[value].abs().max()) or 1.0
    figure, names = go.Figure(), list(dict.fromkeys(table["map"]))
    for name in names:
        own = table[table["map"] == name]
        cells = np.full((size, size), np.nan, dtype=np.float32)
        cells[own["expert"], own["other"]] = own[value]
        figure.add_heatmap(
            z=cells, zmin=-reach if low else 0, zmax=reach, visible=name == names[0], name=name, hoverongaps=False,
            colorscale=style.DIVERGING if low else style.SEQUENTIAL, colorbar={"thickness": 14, "outlinewidth": 0},
            showlegend=False,
            hovertemplate=f"{name}<br>expert %{{y}}, other %{{x}}<br>{label}: %{{z:.3f}}<extra></extra>",
        )  # fmt: skip
    steps = [
        {"label": name, "method": "restyle", "args": ["visible", [name == own for own in names]]} for name in names
    ]
    if len(names) > 1:
        slider = {"steps": steps, "currentvalue": {"font": {"size": 16}}, "pad": {"t": 64}, "font": {"size": 1}}
        figure.update_layout(sliders=[slider | {"tickcolor": "white"}])
    figure.update_xaxes(title_text="other expert", showgrid=False, constrain="domain")
    figure.update_yaxes(title_text="expert", showgrid=False, autorange="reversed", scaleanchor="x", constrain="domain")
    subtitle = f"{table['layer'].nunique()} layers of {size} experts; {label}"
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=SIDE, below=130 if len(names) > 1 else 70)


def _after(names: pd.Series) -> pd.Series:
    """The names behind a comma, nothing for an empty one."""
    return names.map(lambda name: f", {name}" if name else "")


SECTIONS = {
    "coactivation.parquet": Section(
        "Which experts are selected together",
        "How probable it is that a token that selects an expert (row) selects the other one too (column); over the "
        "others of an expert it sums to k - 1.",
        draw=partial(
            pairs_figure,
            value="probability",
            label="P(other | expert)",
            title="Which experts are selected together",
        ),
        place=35,
    ),
    "paths.parquet": Section(
        "Which experts follow which",
        "How much oftener a token that selects an expert (row) selects one of the next MoE layer (column) than all "
        "tokens do: 1 where layers choose independently of each other.",
        draw=partial(
            pairs_figure,
            value="lift",
            label="P(next | expert) / P(next)",
            title="Which experts of the next layer follow",
        ),
        place=61,
    ),
    "similarity.parquet": Section(
        "How alike experts' outputs are",
        "The mean cosine of what two experts put out for the tokens that select both; blank where there are none.",
        draw=partial(
            pairs_figure, value="similarity", label="cosine of the outputs", title="How alike experts' outputs are"
        ),
        place=36,
    ),
    "weights.parquet": Section(
        "How alike experts' weights are",
        "The cosine of all weights of two experts. A high value shows kinship; a low one does not show difference: "
        "inner units may stand in another order.",
        draw=partial(
            pairs_figure, value="similarity", label="cosine of the weights", title="How alike experts' weights are"
        ),
        place=37,
    ),
}
