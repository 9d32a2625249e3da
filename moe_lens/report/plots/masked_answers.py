"""The causal figure: the exact match that is left when chosen, planted or random experts are masked."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.errors import MoELensError
from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require

COLUMNS = ("intervention", "family", "size", "mode", "em", "em_low", "em_high", "n")

#: The families that look the same in every figure; any other is a score's name.
FAMILIES = {
    "ce": style.Look(style.VERMILLION, "circle"),
    "oe": style.Look(style.BLUE, "square"),
    "planted": style.Look(style.GREEN, "star"),
    "random mean": style.Look(style.GREY, "diamond"),
}
NOT_TOLD = 0.05
"""The p-value from which on a set is not told from random ones."""
#: How families are written.
NAMES = {"ce": "CE", "oe": "OE", "random mean": "random (mean of sets)"}


def masking_figure(rows: pd.DataFrame) -> go.Figure:
    """EM after masking `size` experts per layer, by the way they were chosen; the paper's Figure 3.

    `size` is on the x axis; the second line names the masking mode. The row without masking is a line with a band; each
    random set is a small dot, their mean a diamond (without bars where the table has no row for it and it is
    taken here); bars are the rows' intervals.

    Args:
        rows: one row per intervention with the columns `intervention` (its name), `family` ("none" for the
            unmasked run, "ce", "oe", "planted", "random", "random mean", or another score's name), `size`
            (experts masked per layer), `mode` ("zero", "renormalize", "reroute" or "force", the same in all rows; not
            read where family is "none"), `em`, `em_low`, `em_high` (shares in [0, 1]) and `n` (examples).
            With `below_random`, its ends and `random_p` of `masking_rows`, the second line says how a set compares with
            random ones. With `task` the first one is drawn. Rows of saved interventions are drawn where no sets are
            masked. More columns show up under the pointer.

    Raises:
        MoELensError: a column is missing, or there are several modes or different unmasked runs.
    """
    rows = require(rows, COLUMNS, figure="masking_figure")
    rows = rows[rows["task"] == rows["task"].iloc[0]] if "task" in rows else rows
    if rows["family"].isin(["none", "saved"]).all():
        return _without_sets(rows)
    rows = rows[rows["family"] != "saved"]
    masked, unmasked = _sides(rows)
    sizes, figure = sorted(set(masked["size"])), go.Figure()
    if not unmasked.empty:
        _draw_unmasked(figure, unmasked, edges=(-0.5, len(sizes) - 0.5))
    _draw_families(figure, masked, sizes)
    figure.update_xaxes(tickvals=list(range(len(sizes))), ticktext=[f"{size:g}" for size in sizes])
    figure.update_xaxes(range=[-0.5, len(sizes) - 0.5], showgrid=False)
    figure.update_xaxes(title_text="experts masked per layer")
    for border in range(1, len(sizes)):
        figure.add_vline(border - 0.5, line={"color": style.FAINT, "width": 1.5})
    figure.update_yaxes(range=[0, 1.02], dtick=0.2)
    figure.update_yaxes(title_text="exact match (EM)")
    return style.dress(
        figure,
        title=_title(masked, unmasked),
        subtitle=_summary(masked, unmasked),
        plot_height=330,
    )


SECTIONS = {
    "masking.parquet": Section(
        "Do they cause it",
        "What is left of exact match when experts are masked. zero: their gating weight becomes 0; "
        "renormalize: the other weights are then rescaled to the old sum; reroute: they are taken away "
        "before the selection, so that the next expert steps in. A set of experts matters if masking it "
        "costs more than masking random sets of the same size: how much more, with its 95 % interval over sets and "
        "examples, and the p-value of its being one of them, stands in the second line and under the pointer.",
        draw=masking_figure,
        place=40,
    ),
}


def _without_sets(rows: pd.DataFrame) -> go.Figure:
    """Where no sets are masked: the model as it is and each saved intervention, beside each other."""
    names = ["without", *rows["intervention"].iloc[1:]]
    marks = go.Scatter(
        x=names, y=rows["em"], error_y=style.error_bars(rows, "em"), mode="markers", marker={"size": 11},
        showlegend=False, hovertext=style.hover(rows), hoverinfo="text",
    )  # fmt: skip
    figure = go.Figure(marks)
    figure.update_yaxes(range=[-0.02, 1.02], dtick=0.2, title_text="exact match (EM)")
    told = "EM of the model as it is and under each intervention" if len(rows) > 1 else "EM of the model as it is"
    subtitle = f"{style.counts(rows['n'])} examples; bars: 95 % intervals"
    return style.dress(figure, title=told, subtitle=subtitle, plot_height=330)


def _sides(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The masked runs, with the means of their random sets, and the unmasked run: one row or none."""
    masked = _with_random_means(rows[rows["family"] != "none"])
    unmasked = rows[rows["family"] == "none"].drop_duplicates(["em", "em_low", "em_high"])
    if len(unmasked) > 1:
        names = ", ".join(unmasked["intervention"])
        raise MoELensError(f"masking_figure compares with one unmasked run, but got {len(unmasked)}: {names}")
    if masked["mode"].nunique() > 1:
        modes = ", ".join(masked["mode"].unique())
        raise MoELensError(f"masking_figure shows one mode, but got {modes}; draw the rows of each alone")
    return masked, unmasked


def _with_random_means(masked: pd.DataFrame) -> pd.DataFrame:
    """The rows, with the mean of the random sets of each size added where the table has none."""
    sets = masked[masked["family"] == "random"]
    if sets.empty or "random mean" in set(masked["family"]):
        return masked
    means = sets.groupby(["mode", "size"], as_index=False, sort=False).agg(em=("em", "mean"), n=("n", "max"))
    means = means.assign(intervention="mean of the random sets", family="random mean")
    return pd.concat([masked, means.assign(em_low=means["em"], em_high=means["em"])], ignore_index=True)


def _draw_families(figure: go.Figure, masked: pd.DataFrame, sizes: list[float]) -> None:
    """Every family a little beside the next one: CE, OE, then other scores as they come, planted, random."""
    rank = {"ce": 0, "oe": 1, "planted": 3, "random mean": 4}
    families = sorted(dict.fromkeys(masked["family"]), key=lambda family: rank.get(family, 2))
    looks = style.looks([family for family in families if family != "random"], FAMILIES, repeat=True)
    step = min(0.13, 0.64 / len(looks)) if looks else 0.13
    for place, (family, look) in enumerate(looks.items()):
        offset = step * (place - (len(looks) - 1) / 2)
        if family == "random mean":
            _draw_random_sets(figure, masked, sizes=sizes, offset=offset, width=0.8 * step)
        part = masked[masked["family"] == family].sort_values("size", kind="stable")
        trace = go.Scatter(
            x=part["size"].map(sizes.index) + offset,
            y=part["em"],
            error_y=style.error_bars(part, "em"),
            mode="lines+markers",
            name=NAMES.get(family, family),
            marker={**look.mark, "size": 11},
            line={**look.line, "dash": "dot"} if family == "random mean" else look.line,
            hovertext=style.hover(part),
            hoverinfo="text",
        )
        figure.add_trace(trace)


def _draw_unmasked(figure: go.Figure, unmasked: pd.DataFrame, *, edges: tuple[float, float]) -> None:
    """The run without masking: a line over the whole figure, its interval as a band."""
    row = unmasked.iloc[0]
    band = go.Scatter(
        x=[edges[0], edges[1], edges[1], edges[0]],
        y=[row["em_low"], row["em_low"], row["em_high"], row["em_high"]],
        fill="toself",
        fillcolor=style.translucent(style.BLACK, 0.1),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )
    line = go.Scatter(
        x=list(edges),
        y=[row["em"]] * 2,
        mode="lines",
        name="unmasked",
        line={"color": style.BLACK, "width": 2, "dash": "dash"},
        hovertext=style.hover(unmasked) * 2,
        hoverinfo="text",
    )
    figure.add_traces([band, line])


def _draw_random_sets(
    figure: go.Figure, masked: pd.DataFrame, *, sizes: list[float], offset: float, width: float
) -> None:
    """Every random set as a faint dot; the dots of a size are spread over `width`, always in the same way."""
    part = masked[masked["family"] == "random"]
    spread = (np.arange(len(part)) * 0.618 % 1 - 0.5) * width  # golden ratio: neighbours fall apart
    trace = go.Scatter(
        x=part["size"].map(sizes.index) + offset + spread,
        y=part["em"],
        mode="markers",
        marker={"color": style.translucent(style.GREY, 0.55), "symbol": "circle", "size": 5},
        showlegend=False,
        hovertext=style.hover(part),
        hoverinfo="text",
    )
    figure.add_trace(trace)


def _title(masked: pd.DataFrame, unmasked: pd.DataFrame) -> str:
    """What the set that costs most at the largest size leaves, beside random sets, and the test of both."""
    chosen = masked[(masked["size"] == masked["size"].max()) & ~masked["family"].isin(["random", "random mean"])]
    if chosen.empty:
        return "EM with random experts masked"
    worst = chosen.loc[chosen["em"].idxmin()]
    name = NAMES.get(worst["family"], worst["family"])
    of = f" of {unmasked['em'].iloc[0]:.2f}" if len(unmasked) else ""
    alike = masked[masked["size"] == worst["size"]].groupby("family")["em"]
    mean, sets = (alike.get_group(one) if one in alike.groups else None for one in ("random mean", "random"))
    random = "; not compared with random sets"
    if mean is not None:
        random = f"; random sets {mean.mean():.2f}{_tested(worst, [] if sets is None else sets)}"
    return f"EM {worst['em']:.2f}{of} with {worst['size']:g} {name} experts per layer masked{random}"


def _tested(row: pd.Series, random: Sequence[float]) -> str:
    """The p-value of a set's being one of the random ones, whose EMs are given, and in words where that is likely."""
    p = row.get("random_p", np.nan)
    if pd.isna(p):
        return ", not tested"
    if p < NOT_TOLD:
        return f" (p = {p:.2g})"
    if len(random) and row["em"] < min(random) and p <= 1.001 / (len(random) + 1):
        return f" (p = {p:.2g}, the least that {len(random)} can give)"
    return f" (p = {p:.2g}: not told from them)"


def _below_random(rows: pd.DataFrame, family: str) -> str:
    """How much lower than under random sets the EM of a family's one set is, where the table says it."""
    row = rows[rows["family"] == family]
    if len(row) != 1 or "below_random" not in row or row["below_random"].isna().all():
        return ""
    below, low, high, p = row[["below_random", "below_random_low", "below_random_high", "random_p"]].iloc[0]
    return f" ({below:z.2f} [{low:z.2f}, {high:z.2f}] below random, p = {p:.2g})"


def _summary(masked: pd.DataFrame, unmasked: pd.DataFrame) -> str:
    """What is left at the largest size, as the figure's second line."""
    largest = masked["size"].max()
    first = masked[masked["size"] == largest]
    words = {"ce": "CE", "oe": "OE", "planted": "planted", "random mean": "random (mean)"}
    left = [
        f"{words[family]} {first.loc[first['family'] == family, 'em'].mean():.2f}{_below_random(first, family)}"
        for family in words
        if family in set(first["family"])
    ]
    whole = [f"unmasked {em:.2f}" for em in unmasked["em"]]
    return (
        f"{largest:g} per layer masked ({first['mode'].iloc[0]}): EM {', '.join(left + whole)}; "
        f"{style.counts(masked['n'])} examples; bars and band: 95 % intervals"
    )
