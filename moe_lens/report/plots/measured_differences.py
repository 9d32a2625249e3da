"""What two models differ by, measure by measure: over layers, as a map of experts, or of pairs of them."""

from textwrap import wrap

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots.expert_pairs import pairs_figure
from moe_lens.report.plots.layer_curves import curves_figure
from moe_lens.report.plots.usage_maps import usage_figure
from moe_lens.report.section import Section
from moe_lens.report.tables import named_together, require

ENDS = ("difference", "difference_low", "difference_high")
NAMING = ("variant", "data", "number", "target", "step", "tokens")
"""The columns that tell what a difference is of."""


def differences_figure(table: pd.DataFrame) -> go.Figure:
    """The second model minus the first; the title counts the differences whose interval leaves 0 out.

    Args:
        table: one row per difference with the columns `layer`, ENDS, perhaps `expert` and `other`, and NAMING.

    Raises:
        MoELensError: a column is missing, or the table is empty.
    """
    table = require(table, ("layer", *ENDS), figure="differences_figure")
    names, title = named_together(table, NAMING), counted(table)
    if "other" in table:
        return pairs_figure(table.assign(data=names), value="difference", label="difference", title=title)
    if "expert" in table:
        return usage_figure(table.assign(panel=names, score=table["difference"]), label="difference", title=title)
    series = [name for name in NAMING if name in table and name not in ("variant", "data", "number")]
    wide, labels = _by_number(table)
    return curves_figure(wide, labels, title=title, series=series, zero=True)


def _by_number(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """The table with columns for each number's difference and its ends, since they have units of their own; labels."""
    if "number" not in table:
        return table, {"difference": "difference"}
    keys = [name for name in (*NAMING, "layer") if name in table and name != "number"]
    wide = table.pivot(index=keys, columns="number", values=list(ENDS))
    wide.columns = [f"{number}{end.removeprefix('difference')}" for end, number in wide.columns]
    labels = {number: "<br>".join(wrap(number.replace("_", " "), 14)) for number in dict.fromkeys(table["number"])}
    return wide.reset_index(), labels


def counted(table: pd.DataFrame) -> str:
    """How many differences have an interval without 0, and how many would by chance."""
    low, high = table["difference_low"], table["difference_high"]
    known, apart = int((low.notna() & high.notna()).sum()), int(((low > 0) | (high < 0)).sum())
    if not known:
        return f"{len(table)} differences, of none of which an interval is known"
    return f"{apart} of {known} differences have a 95 % interval without 0; about {known / 20:.0f} would by chance"


SECTIONS = {
    "difference-*.parquet": Section(
        "What the models differ by",
        "The second model minus the first on the same examples, with 95 % intervals over examples or groups of them. "
        "Each interval stands for itself: among many some leave 0 out by chance.",
        draw=differences_figure,
        place=54,
    ),
}
