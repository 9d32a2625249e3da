"""What routing tells of where texts are from: information of experts, and clusters of examples, beside chance."""

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style
from moe_lens.report.plots.layer_curves import curves_figure
from moe_lens.report.section import Section
from moe_lens.report.tables import named_together, require, require_once


def information_figure(table: pd.DataFrame) -> go.Figure:
    """The information of expert and data set over layers, beside that of examples dealt to data sets at random.

    Args:
        table: what `domain_information` gave, with `variant` where there are several.
    """
    columns = ("layer", "information", "chance", "chance_high", "domains", "p_value")
    table = require(table, columns, figure="information_figure")
    measured = table[[name for name in ("variant", "layer", "information") if name in table]].assign(of="the data sets")
    dealt = table.assign(information=table["chance"], information_low=0.0, information_high=table["chance_high"])
    both = pd.concat([measured, dealt[[*measured.columns.drop("of"), "information_low", "information_high"]]])
    both["of"] = both["of"].fillna("dealt at random")
    apart = int((table["p_value"] <= 0.05).sum())
    title = f"Experts tell data sets apart in {apart} of {len(table)} layers (p <= 0.05 each)"
    figure = curves_figure(both, {"information": "bits"}, title=title, series=("of",))
    count = int(table["domains"].max())
    subtitle = f"{count} data sets; band: 95 % of random deals of whole examples"
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=300)


def agreement_of_clusters(table: pd.DataFrame) -> go.Figure:
    """How far clusters agree with data sets, for all layers together and each alone.

    Args:
        table: what `routing_clusters` gave, with `variant` where there are several.
    """
    table = require(table, ("layers", "nmi", "ari", "chance", "p_value"), figure="agreement_of_clusters")
    table = table.assign(variant=named_together(table, ("variant",)))
    require_once(table, ("variant", "layers"), figure="agreement_of_clusters")
    figure = go.Figure()
    for name, look in style.looks(table["variant"]).items():
        own = table[table["variant"] == name]
        for measure in ("nmi", "ari"):
            figure.add_scatter(
                x=own["layers"], y=own[measure], mode="markers", name=f"{measure.upper()}{name and ', ' + name}",
                marker=look.mark | {"size": 11, "symbol": "circle" if measure == "nmi" else "diamond-open"},
                hovertext=style.hover(own), hoverinfo="text",
            )  # fmt: skip
    chance = table[table["variant"] == table["variant"].iloc[0]]
    line = {"color": style.INK, "width": 1, "dash": "dot"}
    figure.add_scatter(x=chance["layers"], y=chance["chance"], mode="lines", line=line, name="NMI by chance")
    figure.update_xaxes(title_text="layer", type="category")
    figure.update_yaxes(title_text="agreement", range=[-0.05, 1.05])
    whole = table[table["layers"] == "all"].iloc[0]
    title = f"Clusters of routing and data sets: NMI {whole['nmi']:.2f} over all layers (p = {whole['p_value']:.2g})"
    return style.dress(figure, title=title, subtitle=f"{whole['examples']} examples, k-means", plot_height=300)


SECTIONS = {
    "information.parquet": Section(
        "How much experts tell of the data set",
        "Mutual information of expert and data set, the data sets counting alike: at most log2 of their number. Chance "
        "deals whole examples, since the tokens of a text go together.",
        draw=information_figure,
        place=63,
    ),
    "clustering.parquet": Section(
        "Whether clusters of routing are data sets",
        "Clusters of examples by their use of experts, found without the data sets, compared with these: NMI and ARI "
        "are 1 where both are the same; by chance ARI is 0.",
        draw=agreement_of_clusters,
        place=64,
    ),
}
