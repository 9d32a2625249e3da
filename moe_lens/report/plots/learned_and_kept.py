"""What a method learns of one task and keeps of another, at each of its learning rates."""

import pandas as pd
import plotly.graph_objects as go

from moe_lens.errors import MoELensError
from moe_lens.report.plots import style
from moe_lens.report.plots.answer_scores import VARIANTS
from moe_lens.report.section import Section
from moe_lens.report.tables import over_seeds, require


def tradeoff_figure(table: pd.DataFrame) -> go.Figure:
    """What is kept of one task over what is learned of another: a line per variant, a mark per learning rate.

    Args:
        table: one row per variant, learning rate and task with the columns `variant`, `learning_rate`, `task` (two: the
            one learned, then the one that may be forgotten), `em`, `em_low`, `em_high`; of the variant "base", where
            `learning_rate` is missing, one row per task. With a column `seed`, several rows become their mean, the
            bars reaching from the lowest to the highest seed.

    Raises:
        MoELensError: a column is missing, the table is empty, there are not two tasks, or a point stands there twice.
    """
    keys = ("variant", "learning_rate", "task")
    table = require(table, (*keys, "em", "em_low", "em_high"), figure="tradeoff_figure")
    table = over_seeds(table, keys, ["em"], figure="tradeoff_figure")
    tasks = list(dict.fromkeys(table["task"]))
    if len(tasks) != 2:
        raise MoELensError(f"tradeoff_figure takes two tasks, the learned one first; this table has {tasks}")
    learned, kept = (table[table["task"] == task].sort_values("learning_rate") for task in tasks)
    points = learned.merge(kept, on=["variant", "learning_rate"], suffixes=("_learned", "_kept"))
    figure = go.Figure()
    for variant, look in style.looks(table["variant"], VARIANTS).items():
        figure.add_trace(_course(points[points["variant"] == variant], look, name=variant))
    figure.update_xaxes(title_text=f"EM on {tasks[0]}: learned", range=[0, 1.02], dtick=0.2)
    figure.update_yaxes(title_text=f"EM on {tasks[1]}: kept", range=[0, 1.02], dtick=0.2)
    subtitle = f"a mark per learning rate, larger for higher ones; {style.bars(table, ['em'])}"
    return style.dress(figure, title=_title(points), subtitle=subtitle, plot_height=360)


SECTIONS = {
    "tradeoff.parquet": Section(
        "What is learned, and what is kept",
        "Exact match on the task trained on and on one that may be forgotten, at each method's learning rates.",
        draw=tradeoff_figure,
        place=140,
    ),
}


def _course(points: pd.DataFrame, look: style.Look, *, name: str) -> go.Scatter:
    """One variant's marks by rising learning rate, with the intervals of both tasks."""
    learned, kept = (_of_task(points, side) for side in ("learned", "kept"))
    return go.Scatter(
        x=learned["em"],
        y=kept["em"],
        error_x=style.error_bars(learned, "em"),
        error_y=style.error_bars(kept, "em"),
        mode="lines+markers",
        name=name,
        cliponaxis=False,
        marker={**look.mark, "size": [9 + 5 * step for step in range(len(points))], "opacity": 1},
        line=look.line,
        hovertext=style.hover(points),
        hoverinfo="text",
    )


def _of_task(points: pd.DataFrame, side: str) -> pd.DataFrame:
    """em, em_low and em_high of one of the two tasks."""
    return pd.DataFrame({name: points[f"{name}_{side}"] for name in ("em", "em_low", "em_high")})


def _title(points: pd.DataFrame) -> str:
    """Which tuned variants learn most and which keep most, each at its best rate."""
    best = points[points["variant"] != "base"].groupby("variant", sort=False)[["em_learned", "em_kept"]].max()
    if best.empty:
        return "What the base model knows of both tasks"
    most_learned, most_kept = (style.ranked(best[name])[0] for name in best)
    return f"Most is learned by {most_learned}, most kept by {most_kept}, each at its best rate"
