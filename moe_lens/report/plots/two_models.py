"""What two models have of one another: experts matched one to one, and how far their signatures are apart."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.plots.layer_curves import curves_figure
from moe_lens.report.section import Section
from moe_lens.report.tables import named_together, require

OF = {"similarity": "of the match", "same": "of the same number", "average": "of any two"}
APART = {"distance": "of the models", "same": "by the same number", "floor": "of halves of texts"}


def matches_figure(table: pd.DataFrame) -> go.Figure:
    """The mean similarity of matched experts over layers and data sets, beside the same number's and of any two.

    Args:
        table: rows of `matches_table`, with `variant` and `data` where they take several values.
    """
    table = require(table, ("layer", "by", "expert", "match", "moved", *OF), figure="matches_figure")
    keys = [name for name in ("variant", "by", "layer") if name in table]
    means = table.groupby(keys, as_index=False)[list(OF)].mean()
    long = means.melt(id_vars=keys, var_name="of", value_name="alike")
    long["of"] = long["of"].map(OF)
    stay = int((~table["moved"]).sum())
    title = f"{stay} of {len(table)} experts match the one of the same number"
    return curves_figure(long, {"alike": "similarity"}, title=title, series=("by", "of"))


def signatures_figure(table: pd.DataFrame) -> go.Figure:
    """The distance of two models' signatures over layers, a panel for each profile, beside what texts alone bring.

    Args:
        table: what `signature_distance` gave, with `variant` where there are several.
    """
    table = require(table, ("layer", "profile", *APART), figure="signatures_figure")
    profiles, names = list(dict.fromkeys(table["profile"])), named_together(table, ("variant",))
    figure = make_subplots(len(profiles), 1, shared_xaxes=True, vertical_spacing=0.16, subplot_titles=profiles)
    keys = [f"{told}{name and ', ' + name}" for name in dict.fromkeys(names) for told in APART.values()]
    known = style.looks(keys, repeat=True)
    for row, profile in enumerate(profiles, start=1):
        for name, part in table[table["profile"] == profile].groupby(names, sort=False):
            for column, told in APART.items():
                look = known[f"{told}{name and ', ' + str(name)}"]
                figure.add_scatter(
                    x=part["layer"], y=part[column], mode="lines+markers", line=look.line, marker=look.mark,
                    name=f"{told}{name and ', ' + str(name)}", showlegend=row == 1, row=row, col=1,
                    hovertext=style.hover(part), hoverinfo="text",
                )  # fmt: skip
    figure.update_yaxes(title_text="distance", rangemode="tozero")
    layers = sorted(set(table["layer"]))
    figure.update_xaxes(tickvals=layers[:: -(-len(layers) // 12)])
    figure.update_xaxes(title_text="layer", row=len(profiles), col=1)
    over = int((table["distance"] > table["floor"]).sum())
    title = "How far the signatures of both models are apart, by layer"
    subtitle = (
        f"{table['layer'].nunique()} layers; Wasserstein distance, experts matched; in {over} of {len(table)} cases "
        "above that of halves of the texts (no test)"
    )
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=420, headings=True)


SECTIONS = {
    "matching.parquet": Section(
        "Which expert is which, by their tokens",
        "Experts of both models matched one to one by the tokens that select them: a cosine, 1 for the same tokens.",
        draw=matches_figure,
        place=46,
    ),
    "portraits.parquet": Section(
        "Which expert is which, by their weights and outputs",
        "Experts of both models matched one to one by the cosine of router rows, and by that of mean outputs: these "
        "mean something where one model was made of the other.",
        draw=matches_figure,
        place=49,
    ),
    "signatures.parquet": Section(
        "How far signatures are apart",
        "What experts are used for, whatever their numbers: their rates on each data set (specialisation), and how "
        "often they are selected with others (collaboration). Halves of the texts are apart by chance.",
        draw=signatures_figure,
        place=43,
    ),
}
