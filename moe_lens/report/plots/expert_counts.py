"""How many experts have to learn: exact match by the number of experts trained per layer, the paper's Table 5."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.plots.answer_scores import VARIANTS
from moe_lens.report.section import Section
from moe_lens.report.tables import over_seeds, require


def sizes_figure(table: pd.DataFrame) -> go.Figure:
    """EM over the number of experts that learn in each layer, a panel per task, a line per choice of experts.

    Args:
        table: one row per variant, size and task with the columns `variant`, `size`, `task`, `em`, `em_low`, `em_high`;
            of the variant "base" one row per task, drawn as a line. With a column `seed`, several rows become their
            mean, the bars reaching from the lowest to the highest seed.

    Raises:
        MoELensError: a column is missing, the table is empty, or a point stands there twice.
    """
    keys = ("variant", "size", "task")
    table = require(table, (*keys, "em", "em_low", "em_high"), figure="sizes_figure")
    table = over_seeds(table, keys, ["em"], figure="sizes_figure")
    tuned, base = table[table["variant"] != "base"], table[table["variant"] == "base"]
    tasks = list(dict.fromkeys(table["task"]))
    figure = make_subplots(1, len(tasks), shared_yaxes=True, subplot_titles=tasks, horizontal_spacing=0.05)
    for variant, look in style.looks(tuned["variant"], VARIANTS).items():
        for column, task in enumerate(tasks, start=1):
            part = tuned[(tuned["variant"] == variant) & (tuned["task"] == task)]
            _draw_sizes(figure, part.sort_values("size"), look, column, name=variant)
    for column, task in enumerate(tasks, start=1):
        _draw_base(figure, base[base["task"] == task], column)
    names = [str(number) for number in sorted(set(tuned["size"]))]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=names, title_text="experts per layer")
    figure.update_yaxes(range=[0, 1.02], dtick=0.2)
    figure.update_yaxes(title_text="exact match (EM)", col=1)
    return style.dress(figure, title=_title(tuned), subtitle=style.bars(table, ["em"]), plot_height=300, headings=True)


SECTIONS = {
    "sizes.parquet": Section(
        "How many experts have to learn",
        "Exact match by the number of experts per layer that are trained, those of CEFT and random ones (Table 5).",
        draw=sizes_figure,
        place=130,
    ),
}


def _draw_sizes(figure: go.Figure, part: pd.DataFrame, look: style.Look, column: int, *, name: str) -> None:
    """One choice of experts on one task: a line over the sizes, with the intervals."""
    line = go.Scatter(
        x=part["size"].astype(str),
        y=part["em"],
        error_y=style.error_bars(part, "em"),
        mode="lines+markers",
        name=name,
        showlegend=column == 1,
        marker={**look.mark, "size": 10},
        line=look.line,
        hovertext=style.hover(part),
        hoverinfo="text",
    )
    figure.add_trace(line, row=1, col=column)


def _draw_base(figure: go.Figure, base: pd.DataFrame, column: int) -> None:
    """The base model's EM on one task as a dashed line, and its name in the legend."""
    line = {"color": style.GREY, "width": 2, "dash": "dash"}
    for em in base["em"]:
        figure.add_hline(em, line=line, row=1, col=column)
        figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name="base", showlegend=column == 1)


def _title(tuned: pd.DataFrame) -> str:
    """Which choice and number of experts reaches most on each task."""
    named = tuned.assign(name=tuned["variant"] + " of " + tuned["size"].astype(str))
    best = [
        f"on {task} for {style.ranked(part.set_index('name')['em'])[0]}"
        for task, part in named.groupby("task", sort=False)
    ]
    return f"EM is highest {', '.join(best)}"
