"""What training costs and what more of it buys: trainable parameters (Figure 9), the number of experts (Table 5)."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.errors import MoELensError
from moe_lens.report.plots import style
from moe_lens.report.plots.answer_scores import VARIANTS


def parameters_figure(table: pd.DataFrame) -> go.Figure:
    """Trainable parameters of each method as bars on a logarithmic axis, the share of all written at their ends.

    Args:
        table: one row per model and method with the columns `model`, `method`, `trainable` and `total`.

    Raises:
        MoELensError: a column is missing, the table is empty, or a method stands twice for a model.
    """
    table = style.require(table, ("model", "method", "trainable", "total"), figure="parameters_figure")
    style.require_once(table, ("model", "method"), figure="parameters_figure")
    models = list(dict.fromkeys(table["model"]))
    figure = go.Figure()
    for method, look in style.looks(table["method"], VARIANTS).items():
        part = table[table["method"] == method]
        figure.add_bar(
            y=part["model"],
            x=part["trainable"],
            orientation="h",
            name=method,
            marker=look.bar,
            text=[f"{size(n)} ({n / total:.1%})" for n, total in zip(part["trainable"], part["total"], strict=True)],
            textposition="outside",
            textfont={"size": 14},
            cliponaxis=False,
            hovertext=style.hover(part),
            hoverinfo="text",
        )
    figure.update_layout(bargap=0.25, barmode="group")
    low, high = table["trainable"].min(), table["trainable"].max()
    figure.update_xaxes(type="log", range=[len(str(int(low))) - 2, len(str(int(high))) + 0.9])
    figure.update_xaxes(title_text="trainable parameters", exponentformat="power", dtick=1)
    figure.update_yaxes(categoryorder="array", categoryarray=models[::-1], showgrid=False, ticks="")
    return style.dress(
        figure,
        title=_title(table),
        subtitle="on a logarithmic scale; in brackets the share of the model's parameters",
        plot_height=60 + 40 * len(table),
        below=84,
    )


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
    table = style.require(table, (*keys, "em", "em_low", "em_high"), figure="sizes_figure")
    table = style.over_seeds(table, keys, ["em"], figure="sizes_figure")
    tuned, tasks = table[table["variant"] != "base"], list(dict.fromkeys(table["task"]))
    sizes = sorted(set(tuned["size"]))
    figure = make_subplots(1, len(tasks), shared_yaxes=True, subplot_titles=tasks, horizontal_spacing=0.05)
    for variant, look in style.looks(tuned["variant"], VARIANTS).items():
        for column, task in enumerate(tasks, start=1):
            part = tuned[(tuned["variant"] == variant) & (tuned["task"] == task)].sort_values("size")
            line = go.Scatter(
                x=part["size"].astype(str),
                y=part["em"],
                error_y=style.error_bars(part, "em"),
                mode="lines+markers",
                name=variant,
                showlegend=column == 1,
                marker={**look.mark, "size": 10},
                line=look.line,
                hovertext=style.hover(part),
                hoverinfo="text",
            )
            figure.add_trace(line, row=1, col=column)
    for column, task in enumerate(tasks, start=1):
        for _, base in table[(table["variant"] == "base") & (table["task"] == task)].iterrows():
            line = {"color": style.GREY, "width": 2, "dash": "dash"}
            figure.add_hline(base["em"], line=line, row=1, col=column)
            figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name="base", showlegend=column == 1)
    names = [str(number) for number in sizes]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=names, title_text="experts per layer")
    figure.update_yaxes(range=[0, 1.02], dtick=0.2)
    figure.update_yaxes(title_text="exact match (EM)", col=1)
    named = tuned.assign(name=tuned["variant"] + " of " + tuned["size"].astype(str))
    best = [
        f"on {task} for {style.ranked(part.set_index('name')['em'])[0]}"
        for task, part in named.groupby("task", sort=False)
    ]
    title = f"EM is highest {', '.join(best)}"
    return style.dress(figure, title=title, subtitle=style.bars(table, ["em"]), plot_height=300, headings=True)


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
    table = style.require(table, (*keys, "em", "em_low", "em_high"), figure="tradeoff_figure")
    table = style.over_seeds(table, keys, ["em"], figure="tradeoff_figure")
    tasks = list(dict.fromkeys(table["task"]))
    if len(tasks) != 2:
        raise MoELensError(f"tradeoff_figure takes two tasks, the learned one first; this table has {tasks}")
    learned, kept = (table[table["task"] == task].sort_values("learning_rate") for task in tasks)
    points = learned.merge(kept, on=["variant", "learning_rate"], suffixes=("_learned", "_kept"))
    figure = go.Figure()
    for variant, look in style.looks(table["variant"], VARIANTS).items():
        part = points[points["variant"] == variant]
        learned, kept = (_of_task(part, side) for side in ("learned", "kept"))
        figure.add_scatter(
            x=learned["em"],
            y=kept["em"],
            error_x=style.error_bars(learned, "em"),
            error_y=style.error_bars(kept, "em"),
            mode="lines+markers",
            name=variant,
            cliponaxis=False,
            marker={**look.mark, "size": [9 + 5 * step for step in range(len(part))], "opacity": 1},
            line=look.line,
            hovertext=style.hover(part),
            hoverinfo="text",
        )
    figure.update_xaxes(title_text=f"EM on {tasks[0]}: learned", range=[0, 1.02], dtick=0.2)
    figure.update_yaxes(title_text=f"EM on {tasks[1]}: kept", range=[0, 1.02], dtick=0.2)
    subtitle = f"a mark per learning rate, larger for higher ones; {style.bars(table, ['em'])}"
    return style.dress(figure, title=_tradeoff_title(points), subtitle=subtitle, plot_height=360)


def _of_task(points: pd.DataFrame, side: str) -> pd.DataFrame:
    """em, em_low and em_high of one of the two tasks."""
    return pd.DataFrame({name: points[f"{name}_{side}"] for name in ("em", "em_low", "em_high")})


def _tradeoff_title(points: pd.DataFrame) -> str:
    """Which tuned variants learn most and which keep most, each at its best rate."""
    best = points[points["variant"] != "base"].groupby("variant", sort=False)[["em_learned", "em_kept"]].max()
    if best.empty:
        return "What the base model knows of both tasks"
    most_learned, most_kept = (style.ranked(best[name])[0] for name in best)
    return f"Most is learned by {most_learned}, most kept by {most_kept}, each at its best rate"


def size(count: float) -> str:
    """A number of parameters as people write it: 8192 is 8.2K, 6.9e9 is 6.9B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(int(count))


def _title(table: pd.DataFrame) -> str:
    """The share of the parameters that the methods train which do not train all."""
    shares = (table["trainable"] / table["total"]).groupby(table["method"], sort=False).mean()
    parts = [f"{name} {share:.1%}" for name, share in shares.items() if share < 1]
    return f"Share of the parameters trained: {', '.join(parts)}" if parts else "Every method trains all parameters"
