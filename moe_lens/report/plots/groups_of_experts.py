"""Groups of experts that are selected together: how clear-cut they are, in the texts they are from and in others."""

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots.layer_curves import curves_figure
from moe_lens.report.section import Section
from moe_lens.report.tables import require

NUMBERS = {"modularity": "modularity", "held_out": "in other<br>texts"}


def groups_figure(table: pd.DataFrame) -> go.Figure:
    """The modularity of each layer's groups over layers: in the texts that they were found in, and in others.

    Args:
        table: what `expert_groups` gave, with `variant` and `data` where they take several values.
    """
    table = require(table, ("layer", "expert", "group", *NUMBERS), figure="groups_figure")
    keys = [name for name in ("variant", "data", "layer") if name in table]
    layers = table.drop_duplicates(keys)[[*keys, *NUMBERS]]
    return curves_figure(layers, NUMBERS, title="How clear-cut groups of experts are, by layer")


SECTIONS = {
    "groups.parquet": Section(
        "Groups of experts",
        "Experts of a layer that are selected together more than their use alone makes them (Louvain). Noise has "
        "groups, too: what counts is the modularity in other texts, which is then 0.",
        draw=groups_figure,
        place=59,
    ),
}
