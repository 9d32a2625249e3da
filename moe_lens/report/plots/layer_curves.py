"""Numbers of layers: a line for each variant and data set over the layers, with the bands of their intervals."""

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import named_together, require, require_once

GAP = 46  # pixels between two panels


def curves_figure(
    table: pd.DataFrame, numbers: Mapping[str, str], *, title: str, series: Sequence[str] = (), zero: bool = False
) -> go.Figure:
    """A panel for each of the numbers, one below the other, in which each line is a variant and data set.

    Args:
        table: one row per line and layer with the column `layer` and each number with its interval in NAME_low and
            _high, where that has one; `variant` and `data` tell lines apart where they take several values.
        numbers: column -> the axis's title. title: what is seen.
        series: more columns that tell lines apart, such as `target`. zero: whether 0 is drawn, for differences.

    Raises:
        MoELensError: a column is missing, the table is empty, or a line has two rows for a layer.
    """
    table = require(table, ("layer", *numbers, *series), figure="curves_figure")
    table = table.assign(line=named_together(table, ("variant", "data", *series)))
    require_once(table, ("line", "layer"), figure="curves_figure")
    height = 200 if len(numbers) > 1 else 300
    inner = len(numbers) * (height + GAP) - GAP
    figure = make_subplots(len(numbers), 1, shared_xaxes=True, vertical_spacing=GAP / inner if len(numbers) > 1 else 0)
    for row, (number, label) in enumerate(numbers.items(), start=1):
        for name, look in style.looks(table["line"], repeat=True).items():
            _draw(figure, table[table["line"] == name].sort_values("layer"), number, name, look, row)
        constant = table[number].max() - table[number].min() < 1e-9  # which plotly would draw amid -1 to 1
        figure.update_yaxes(title_text=label, rangemode="tozero" if constant else None, row=row, col=1)
    if zero:
        figure.add_hline(0, line={"color": style.INK, "width": 1, "dash": "dot"})
    layers = sorted(set(table["layer"]))
    figure.update_xaxes(tickvals=layers[:: -(-len(layers) // 12)])
    figure.update_xaxes(title_text="layer", row=len(numbers), col=1)
    figure.update_layout(showlegend=table["line"].nunique() > 1)
    banded = any(f"{number}_low" in table and table[f"{number}_low"].notna().any() for number in numbers)
    subtitle = f"{table['layer'].nunique()} layers; {'bands: 95 % intervals over texts' if banded else 'no intervals'}"
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=inner)


def _draw(figure: go.Figure, part: pd.DataFrame, number: str, name: str, look: style.Look, row: int) -> None:
    """One line with its band."""
    if f"{number}_low" in part:
        ends = [*part[f"{number}_high"], *part[f"{number}_low"][::-1]]
        band = go.Scatter(
            x=[*part["layer"], *part["layer"][::-1]], y=ends, fill="toself", mode="lines", line={"width": 0},
            fillcolor=style.translucent(look.colour, 0.18), hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        figure.add_trace(band, row=row, col=1)
    line = go.Scatter(
        x=part["layer"], y=part[number], mode="lines+markers", name=name or number, marker=look.mark | {"size": 8},
        line=look.line, hovertext=style.hover(part.drop(columns="line")), hoverinfo="text", showlegend=row == 1,
        legendgroup=name,
    )  # fmt: skip
    figure.add_trace(line, row=row, col=1)


SECTIONS = {
    "load.parquet": Section(
        "How evenly experts are loaded",
        "Entropy of the routers' softmax (how unsure a router is of its choice) and the largest expert's share of the "
        "selections, times the number of experts: 1 where the load is even.",
        draw=partial(
            curves_figure,
            numbers={"entropy": "router entropy<br>(bits)", "max_load": "largest share,<br>even = 1"},
            title="How sure the routers are, and how even the load, by layer",
        ),
        place=31,
    ),
    "spread.parquet": Section(
        "How far apart router logits are",
        "Their standard deviation around a token's mean, in which a bias can be given, and the share of tokens at "
        "which one expert has nearly all of the softmax.",
        draw=partial(
            curves_figure,
            numbers={"sd": "sd of the<br>logits", "saturated": "saturated<br>tokens"},
            title="How far apart router logits are, by layer",
        ),
        place=32,
    ),
    "margins.parquet": Section(
        "How decided the routers are",
        "The logit of the last expert that a token selects minus that of the first it does not, in standard deviations "
        "of its logits, and the share of tokens for which it is below a tenth of one.",
        draw=partial(
            curves_figure,
            numbers={"margin_sd": "margin (sd)", "close": "close calls"},
            title="By how much the last expert is chosen, by layer",
        ),
        place=55,
    ),
    "dirichlet.parquet": Section(
        "How concentrated router probabilities are",
        "The concentration of the Dirichlet distribution with the moments of the routers' softmax: small where each "
        "token goes to few experts. The distance (Cramer-von Mises, at most 1/3) says how far it is from the data.",
        draw=partial(
            curves_figure,
            numbers={"concentration": "concentration", "distance": "distance of<br>the fit"},
            title="The Dirichlet distribution of router probabilities, by layer",
        ),
        place=56,
    ),
    "affinity.parquet": Section(
        "Whether experts that are asked for alike are selected together",
        "The rank correlation, over pairs of experts, of the cosine of their router rows with their co-activation; "
        "and how often an expert's tokens select the one of the most alike row, beside all others.",
        draw=partial(
            curves_figure,
            numbers={
                "correlation": "rank<br>correlation",
                "nearest": "P(nearest<br>other)",
                "average": "P(any<br>other)",
            },
            title="Router rows beside co-activation, by layer",
        ),
        place=58,
    ),
    "shared.parquet": Section(
        "How shared and routed experts divide the work",
        "Of the norms of what both add to a token, the share of the shared experts, and the cosine of the two.",
        draw=partial(
            curves_figure,
            numbers={"share": "share of the<br>shared", "cosine": "cosine"},
            title="The shared experts' share of what experts add, by layer",
        ),
        place=67,
    ),
    "attention.parquet": Section(
        "What the last token of the prompt attends to",
        "The share of its attention that the context and the answer's tokens in it get, mean over heads (Eq. 9).",
        draw=partial(
            curves_figure,
            numbers={"mass": "attention"},
            title="Attention to the context and to the answer in it, by layer",
            series=("target",),
        ),
        place=71,
    ),
    "answer.parquet": Section(
        "Where the answer becomes likely",
        "Probability of the gold answer after each layer, by the logit lens: of its first token, and of all jointly. "
        "Where it is small its logarithm tells more.",
        draw=partial(
            curves_figure,
            numbers={"probability": "probability", "log_probability": "log-probability<br>(nats)"},
            title="The answer's probability after each layer",
            series=("tokens",),
        ),
        place=81,
    ),
    "saturation.parquet": Section(
        "How much of the routing two models share",
        "The share of a token's experts that both models select; expected is what random choices would share.",
        draw=partial(
            curves_figure,
            numbers={"saturation": "shared experts"},
            title="The share of a token's experts that both models select, by layer",
        ),
        place=33,
    ),
    "divergence.parquet": Section(
        "How differently two models route",
        "Jensen-Shannon divergence, in bits, of an example's use of experts in both models: 0 where it is the same.",
        draw=partial(
            curves_figure,
            numbers={"divergence": "divergence (bits)"},
            title="How differently both models use experts, by layer",
        ),
        place=34,
    ),
}
