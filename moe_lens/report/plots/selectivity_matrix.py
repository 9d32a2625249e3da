"""The selectivity matrix: the share of each task's score that each intervention costs, with a verdict."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import require, require_once

COLUMNS = (
    "intervention", "metric", "measure", "task", "role", "unmasked", "effect", "effect_low", "effect_high", "ratio",
    "ratio_low", "ratio_high", "verdict", "n",
)  # fmt: skip

WIDTH_PER_TASK = 150
"""Pixels that each task after the third adds, so that its effect's interval finds room, and the verdict's beside it."""


def selectivity_figure(table: pd.DataFrame) -> go.Figure:
    """A row per intervention and metric, a column per task, targets first; cells say the effect, its end the verdict.

    Shares of a score have the whole scale of colours, drops in a metric's own unit that up to the metric's largest.

    Args:
        table: one row per intervention, metric and task, as `choosing.selectivity` gives them.

    Raises:
        MoELensError: a column is missing, or an intervention has two rows for a metric and task.
    """
    table = require(table, COLUMNS, figure="selectivity_figure")
    require_once(table, ("intervention", "metric", "task"), figure="selectivity_figure")
    table = _with_colour(table)
    names, roles = list(dict.fromkeys(table["intervention"])), dict(zip(table["task"], table["role"], strict=True))
    tasks = sorted(roles, key=lambda task: roles[task] != "target")
    cells = table.pivot(index="intervention", columns="task", values="colour").loc[names, tasks]
    keys = zip(table["intervention"], table["task"], strict=True)
    told = dict(zip(keys, style.hover(table), strict=True))
    figure = go.Figure(
        go.Heatmap(
            z=cells.to_numpy(), x=list(range(len(tasks))), y=list(range(len(names))), colorscale=style.DIVERGING,
            zmin=-1, zmax=1, xgap=3, ygap=3, showscale=False, hoverinfo="text",
            hovertext=[[told[name, task] for task in tasks] for name in names],
        )
    )  # fmt: skip
    for row in table.itertuples():
        place = {"x": tasks.index(row.task), "y": names.index(row.intervention)}
        strong = abs(row.colour) > 0.55
        figure.add_annotation(
            text=_cell(row), showarrow=False, font={"color": "white" if strong else style.INK}, **place
        )
    verdicts = table.drop_duplicates("intervention").set_index("intervention")
    for y, name in enumerate(names):
        text = _end(verdicts.loc[name])
        figure.add_annotation(text=text, x=len(tasks) - 0.45, y=y, showarrow=False, xanchor="left", align="left")
    _axes(figure, [f"{task}<br>({roles[task]})" for task in tasks], names)
    style.dress(figure, title=_title(verdicts), subtitle=_subtitle(table), plot_height=max(120, 62 * len(names)))
    figure.update_annotations(font_size=13)
    figure.update_layout(width=style.WIDTH + WIDTH_PER_TASK * max(0, len(tasks) - 3))
    figure.update_xaxes(tickfont_size=15)
    figure.update_yaxes(tickfont_size=15)
    return figure


SECTIONS = {
    "selectivity.parquet": Section(
        "Does it cost one ability and spare the others",
        "The share of each task's score without the intervention that is lost under it (below 0: gained), with its "
        "95 % interval; of scores without bounds, such as log-probabilities, the change in their own unit. "
        "selective: every target loses more than under random sets of the same size, and the worst spared task loses "
        "at most a third of what the weakest target loses, with the whole interval of that ratio; "
        "not certain: the interval goes beyond.",
        draw=selectivity_figure,
        place=47,
    ),
}


def _axes(figure: go.Figure, tasks: list[str], names: list[str]) -> None:
    """A column per task, with room for the verdicts behind the last, and a row per intervention from above."""
    plain = {"showgrid": False, "ticks": "", "showline": False}
    figure.update_xaxes(tickvals=list(range(len(tasks))), ticktext=tasks, side="bottom", **plain)
    figure.update_xaxes(range=[-0.5, len(tasks) - 0.5 + 0.62 * len(tasks)])
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, **plain)
    figure.update_yaxes(range=[len(names) - 0.5, -0.5])


def _with_colour(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the effect as a part of the scale of colours; of several metrics both are in the row's name."""
    largest = table.groupby("metric")["effect"].transform(lambda effect: effect.abs().max()).replace(0, 1)
    colour = table["effect"].where(table["measure"] == "share", table["effect"] / largest)
    if table["metric"].nunique() > 1:
        table = table.assign(intervention=table["intervention"] + "<br>" + table["metric"])
    return table.assign(colour=colour)


def _cell(row: Any) -> str:
    """The effect and its interval: a share in per cent, a drop in the metric's unit."""
    effect, low, high = row.effect, row.effect_low, row.effect_high
    if row.measure == "drop":
        return f"{-effect:+.2f}<br>[{-high:+.2f}, {-low:+.2f}]".replace("[+nan, +nan]", "[–, –]")
    return "–" if pd.isna(effect) else f"{effect:.0%}<br>[{low:.0%}, {high:.0%}]".replace("%, ", ", ")


def _end(row: pd.Series) -> str:
    """The verdict with the ratio that it goes by."""
    if pd.isna(row["ratio"]):
        return f"{row['verdict']}"
    high = "∞" if row["ratio_high"] == float("inf") else f"{row['ratio_high']:z.2f}"
    return f"<b>{row['verdict']}</b><br>ratio {row['ratio']:z.2f} [{row['ratio_low']:z.2f}, {high}]"


def _title(verdicts: pd.DataFrame) -> str:
    """Which interventions are selective."""
    found = list(verdicts.index[verdicts["verdict"] == "selective"])
    if not found:
        return "No intervention is certain to be selective"
    found = [name.replace("<br>", " by ") for name in found]
    return f"{', '.join(found[:3])}{' and others' * (len(found) > 3)} {'is' if len(found) == 1 else 'are'} selective"


def _measures(table: pd.DataFrame) -> str:
    """What cells say."""
    drops = sorted(set(table.loc[table["measure"] == "drop", "metric"]))
    return "share of the score" + (f", or of {', '.join(drops)} the amount (shown as its change)," if drops else "")


def _subtitle(table: pd.DataFrame) -> str:
    return (
        f"{_measures(table)} that is lost; ratio: the worst spared task's over the weakest target's; "
        f"{style.counts(table['n'])} examples per task; brackets: 95 % intervals"
    )
