"""The comparison of models: exact match of each model variant on each task, or other scores of each."""

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.report.tables import over_seeds, require, require_once

COLUMNS = ("variant", "task", "em", "em_low", "em_high")
#: The model variants that look the same in every figure; those of one method share a colour.
VARIANTS = {
    "base": style.Look(style.GREY, "circle"),
    "router-tuned": style.Look(style.VERMILLION, "square"),
    "CEFT": style.Look(style.GREEN, "diamond"),
    "CEFT, ce-last": style.Look(style.GREEN, "diamond", "/"),
    "ESFT": style.Look(style.SKY, "triangle-up"),
    "ESFT-token": style.Look(style.SKY, "triangle-up"),
    "ESFT-gate": style.Look(style.SKY, "triangle-up", "/"),
    "random experts": style.Look(style.ORANGE, "x"),
    "planted experts": style.Look(style.PURPLE, "star"),
    "FFT": style.Look(style.BLUE, "triangle-down"),
}
#: How metrics are written.
METRICS = {
    "em": "EM", "f1": "F1", "bleu": "sentence BLEU", "corpus_bleu": "BLEU",
    "accuracy_over_groups": "accuracy, mean over groups", "meteor": "METEOR", "rouge_l": "ROUGE-L",
    "acc_llm": "judge's accuracy",
}  # fmt: skip


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
    table = require(table, COLUMNS, figure="answers_figure")
    table = over_seeds(table, ("variant", "task"), ["em"], figure="answers_figure")
    figure = _bars(table, x="task", y="em")
    figure.update_yaxes(title_text="exact match (EM)")
    variants, tasks = (table[column].nunique() for column in ("variant", "task"))
    subtitle = f"{variants} model variants on {tasks} {'task' if tasks == 1 else 'tasks'}; {style.bars(table, ['em'])}"
    return style.dress(figure, title=_title(table), subtitle=subtitle, plot_height=300, below=44)


def metrics_figure(table: pd.DataFrame) -> go.Figure:
    """Several scores of the same answers as bars: metrics along the axis, a bar for each model variant.

    Args:
        table: one row per variant, metric and task with the columns `variant`, `metric`, `task`, `n` (answers that have
            the score), and `mean`, `low`, `high` (in [0, 1]). With several tasks each metric stands once per task.

    Raises:
        MoELensError: a column is missing, the table is empty, or a variant has two rows for a metric and task.
    """
    columns = ("variant", "metric", "task", "n", "mean", "low", "high")
    table = require(table, columns, figure="metrics_figure")
    require_once(table, ("variant", "metric", "task"), figure="metrics_figure")
    names = table["metric"].map(METRICS).fillna(table["metric"])
    tasks = list(dict.fromkeys(table["task"]))
    label = names if len(tasks) == 1 else names + "<br>" + table["task"]
    table = table.assign(label=label).rename(columns={"mean": "score", "low": "score_low", "high": "score_high"})
    figure = _bars(table, x="label", y="score")
    figure.update_yaxes(title_text="score")
    first = table[table["label"] == table["label"].iloc[0]]
    title = _highest(first["label"].iloc[0].replace("<br>", " on "), first.set_index("variant")["score"])
    subtitle = f"{', '.join(tasks)}: {table['n'].max()} answers; bars: 95 % intervals"
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=300, below=44 + 26 * (len(tasks) > 1))


SECTIONS = {
    "tasks.parquet": Section(
        "Answers",
        "Exact match of each model variant on each task.",
        draw=answers_figure,
        place=10,
    ),
    "summary.parquet": Section(
        "Scores",
        "Each score of the answers, as the model is (none) and with experts masked: its mean over the n answers that "
        "have it, with its 95 % interval, and where experts are masked by how much it drops.",
        draw=None,
        place=15,
    ),
    "metrics.parquet": Section(
        "Other scores",
        "The same answers by other scores: those of summaries (Table 9), a judge's (Table 8), or without context "
        "(Table 10).",
        draw=metrics_figure,
        place=20,
    ),
}


def _bars(table: pd.DataFrame, *, x: str, y: str) -> go.Figure:
    """Groups of bars along `x`, one per variant, each with the interval of `y`."""
    figure = go.Figure()
    for variant, look in style.looks(table["variant"], VARIANTS).items():
        part = table[table["variant"] == variant]
        figure.add_bar(
            x=part[x],
            y=part[y],
            error_y=style.error_bars(part, y),
            name=variant,
            marker=look.bar,
            hovertext=style.hover(part),
            hoverinfo="text",
        )
    figure.update_layout(bargap=0.25, bargroupgap=0.06)
    figure.update_xaxes(categoryorder="array", categoryarray=list(dict.fromkeys(table[x])), showgrid=False, ticks="")
    return figure.update_yaxes(range=[0, 1.02], dtick=0.2)


def _title(table: pd.DataFrame) -> str:
    """Which variant answers best on average over the tasks that all variants have."""
    wide = table.pivot(index="task", columns="variant", values="em").dropna()
    if wide.empty or wide.shape[1] == 1:
        return f"EM is {table['em'].min():.2f} to {table['em'].max():.2f} over the tasks"
    return _highest("EM" if len(wide) == 1 else "Mean EM", wide.mean())


def _highest(what: str, scores: pd.Series) -> str:
    """Which variants have the highest score and which the next, those together that look alike."""
    first, *rest = style.ranked(scores)
    if not rest:
        return f"{what} is {scores.max():.2f} for all"
    return f"{what} is highest for {first}, then {rest[0]}"
