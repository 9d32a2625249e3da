"""How far scores agree: the share of experts that two of them both choose, and the correlation of their ranks."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require, require_once


def agreement_figure(table: pd.DataFrame) -> go.Figure:
    """A square for each pair: below the diagonal the Jaccard index of both sets, above it the rank correlation.

    Args:
        table: one row per pair of scores with the columns `first`, `second`, `rank_correlation` and `jaccard`.

    Raises:
        MoELensError: a column is missing, or a pair stands there twice.
    """
    table = require(table, ("first", "second", "rank_correlation", "jaccard"), figure="agreement_figure")
    require_once(table, ("first", "second"), figure="agreement_figure")
    names = list(dict.fromkeys([*table["first"], *table["second"]]))
    cells = np.full((len(names), len(names)), np.nan)
    for row in table.itertuples():
        first, second = names.index(row.first), names.index(row.second)
        cells[second, first], cells[first, second] = row.jaccard, row.rank_correlation
    figure = go.Figure(
        go.Heatmap(
            z=cells, x=names, y=names, colorscale=style.DIVERGING, zmin=-1, zmax=1, xgap=2, ygap=2, showscale=False,
            texttemplate="%{z:.2f}" if len(names) <= 12 else None, textfont={"size": 13}, hoverongaps=False,
        )
    )  # fmt: skip
    figure.update_xaxes(showgrid=False, ticks="", showline=False, tickangle=-40, tickfont_size=14)
    figure.update_yaxes(showgrid=False, ticks="", showline=False, autorange="reversed", tickfont_size=14)
    closest = table.loc[table["jaccard"].idxmax()]
    return style.dress(
        figure,
        title=f"{closest['first']} and {closest['second']} choose most alike ({closest['jaccard']:.2f})",
        subtitle="below the diagonal: experts that both choose over all that one of them chooses; above: rank "
        "correlation over the experts of a layer, mean over layers",
        plot_height=max(240, 26 * len(names)),
        below=130,
    )


SECTIONS = {
    "agreement.parquet": Section(
        "Do the ways of finding experts agree",
        "For each pair of scores, how many experts their sets share, and how alike they rank the experts of a layer.",
        draw=agreement_figure,
        place=152,
    ),
}
