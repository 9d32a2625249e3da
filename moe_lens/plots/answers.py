"""The comparison of models: exact match of each model variant on each task."""

import pandas as pd
import plotly.graph_objects as go

from moe_lens.plots import style

COLUMNS = ("variant", "task", "em", "em_low", "em_high")
#: The model variants that have a colour of their own, so that it is the same in every figure.
VARIANTS = {
    "base": style.GREY,
    "router-tuned": style.VERMILLION,
    "CEFT": style.GREEN,
    "ESFT": style.SKY,
    "FFT": style.BLUE,
}
SPARE = (style.PURPLE, style.ORANGE, style.YELLOW, style.BLACK)


def answers_figure(table: pd.DataFrame) -> go.Figure:
    """EM as bars: tasks along the axis, a bar for each model variant, with its interval.

    Args:
        table: one row per variant and task with the columns `variant`, `task`, `em`, `em_low` and `em_high`
            (shares in [0, 1]). With a column `seed`, several rows of a variant and task become their mean,
            the bars reaching from the lowest to the highest seed. More columns show up under the pointer.

    Raises:
        MoELensError: a column is missing, the table is empty, or a variant has two rows for one task
            (and seed).
    """
    table = style.require(table, COLUMNS, figure="answers_figure")
    table = style.over_seeds(table, ("variant", "task"), ["em"], figure="answers_figure")
    variants, tasks = list(dict.fromkeys(table["variant"])), list(dict.fromkeys(table["task"]))
    spare = iter(SPARE * len(variants))
    figure = go.Figure()
    for variant in variants:
        part = table[table["variant"] == variant]
        colour = VARIANTS[variant] if variant in VARIANTS else next(spare)
        figure.add_bar(
            x=part["task"],
            y=part["em"],
            error_y=style.error_bars(part, "em"),
            name=variant,
            marker={"color": colour},
            hovertext=style.hover(part),
            hoverinfo="text",
        )
    figure.update_layout(bargap=0.25, bargroupgap=0.06)
    figure.update_xaxes(categoryorder="array", categoryarray=tasks, showgrid=False, ticks="")
    figure.update_yaxes(title_text="exact match (EM)", range=[0, 1.02], dtick=0.2)
    subtitle = f"{len(variants)} model variants on {len(tasks)} tasks; {style.bars(table, ['em'])}"
    return style.dress(figure, title=_title(table), subtitle=subtitle, plot_height=300, below=44)


def _title(table: pd.DataFrame) -> str:
    """Which variant answers best on average over the tasks that all variants have."""
    wide = table.pivot(index="task", columns="variant", values="em").dropna()
    if wide.empty or wide.shape[1] == 1:
        return f"EM is {table['em'].min():.2f} to {table['em'].max():.2f} over the tasks"
    means = wide.mean().sort_values(ascending=False, kind="stable")
    on = "" if len(wide) == 1 else " on average"
    return f"{means.index[0]} answers best{on}: EM {means.iloc[0]:.2f}, {means.index[1]} {means.iloc[1]:.2f}"
