"""What the model answers to one question with each expert alone in its layer (Figure 1), as a map of experts."""

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require, require_once

COLOURS = {"context": style.GREEN, "memory": style.VERMILLION, "other": style.FAINT}


def single_experts_figure(table: pd.DataFrame) -> go.Figure:
    """A mark per layer and expert, coloured by whose answer comes out with it alone; the two chosen are named.

    table: one row per layer and expert with the columns `layer`, `expert`, `says` ("context", "memory" or "other"),
    `prediction`, `chosen`, and the same in every row `question`, `answer`, `memory`, `as_it_is`.
    Raises MoELensError for a column that is missing, an empty table, or an expert that stands twice.
    """
    columns = ("layer", "expert", "says", "prediction", "chosen", "question", "answer", "memory", "as_it_is")
    table = require(table, columns, figure="single_experts_figure")
    require_once(table, ("layer", "expert"), figure="single_experts_figure")
    figure = go.Figure()
    for says, colour in COLOURS.items():
        part = table[table["says"] == says]
        figure.add_scatter(
            x=part["expert"],
            y=part["layer"],
            mode="markers",
            name=f"{says}'s answer" if says != "other" else "another",
            marker={"color": colour, "symbol": "square", "size": 24, "line": {"color": style.INK, "width": 1}},
            hovertext=style.hover(part[["layer", "expert", "prediction", "says"]]),
            hoverinfo="text",
        )
    pair = table[table["chosen"]]
    figure.add_scatter(
        x=pair["expert"],
        y=pair["layer"],
        mode="markers",
        name="the two of the title",
        marker={"color": style.INK, "symbol": "circle-open", "size": 14, "line": {"width": 3}},
        hoverinfo="skip",
    )
    layers = sorted(set(table["layer"]))
    figure.update_xaxes(title_text="expert alone in its layer", showgrid=False)
    figure.update_yaxes(
        title_text="layer", tickvals=layers[:: -(-len(layers) // 12)], autorange="reversed", showgrid=False
    )
    first = table.iloc[0]
    said = [f"expert {row.expert} “{row.prediction}”" for row in pair.sort_values("says").itertuples()]
    title = f"Alone in layer {pair['layer'].iloc[0]}: {', '.join(said)}"
    subtitle = (
        f"{first['question']} Context: {first['answer']}; memory: {first['memory']}; as it is the model says "
        f"“{first['as_it_is']}”"
    )
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=max(160, 44 * len(layers)))


SECTIONS = {
    "two_experts.parquet": Section(
        "Two experts",
        "One question, answered with each expert alone in its layer (Figure 1): a case picked for showing both.",
        draw=single_experts_figure,
        place=75,
    ),
}
