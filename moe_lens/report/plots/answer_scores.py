"""The comparison of models: exact match of each model variant on each task, or other scores of each."""

import textwrap

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
LETTERS = 60
"""About as many as have room below the axis."""
ALPHA = 0.05
"""The corrected p-value below which a difference is told from none."""
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
    groups = table[["metric", "task"]].drop_duplicates()
    wrapped = names.map(lambda name: "<br>".join(textwrap.wrap(name, LETTERS // len(groups), break_long_words=False)))
    label = wrapped if len(tasks) == 1 else wrapped + "<br>" + table["task"]
    table = table.assign(label=label).rename(columns={"mean": "score", "low": "score_low", "high": "score_high"})
    figure = _bars(table, x="label", y="score")
    figure.update_yaxes(title_text="score")
    first = table[table["label"] == table["label"].iloc[0]]
    what = names.iloc[0] if len(tasks) == 1 else f"{names.iloc[0]} on {tasks[0]}"
    title = _highest(what, first.set_index("variant"), "score")
    subtitle = f"{', '.join(tasks)}: {table['n'].max()} answers; bars: 95 % intervals"
    lines = label.str.count("<br>").max()
    return style.dress(figure, title=title, subtitle=subtitle, plot_height=300, below=44 + 26 * lines)


def summary_figure(table: pd.DataFrame) -> go.Figure:
    """Scores as bars, metrics along the axis, a bar for the model as it is and one under each intervention.

    With several tasks each metric stands once per task. Drawn are those that lie in [0, 1], where there are any; else
    all, such as log-probabilities.

    Args:
        table: what `causal.summary_table` gives: `intervention`, `metric`, `n`, `mean`, `low`, `high`, and of
            interventions `q_value`.

    Raises:
        MoELensError: a column is missing, or the table is empty.
    """
    columns = ("intervention", "metric", "n", "mean", "low", "high")
    table = require(table, columns, figure="summary_figure").dropna(subset=["mean"])
    shares = table[table.groupby("metric")["mean"].transform(lambda own: own.between(0, 1).all())]
    drawn = shares if len(shares) else table
    names = {"intervention": "variant", "mean": "score", "low": "score_low", "high": "score_high"}
    label = drawn["metric"].map(METRICS).fillna(drawn["metric"])
    several = "task" in drawn and drawn["task"].nunique() > 1
    label = label + "<br>" + drawn["task"] if several else label
    figure = _bars(drawn.rename(columns=names).assign(label=label), x="label", y="score", repeat=True)
    figure.update_yaxes(title_text="score")
    if shares.empty:
        figure.update_yaxes(range=None, dtick=None)
    figure.update_layout(showlegend=drawn["intervention"].nunique() > 1)
    subtitle = f"{style.counts(drawn['n'])} answers; bars: 95 % intervals"
    return style.dress(figure, title=_drops(table), subtitle=subtitle, plot_height=300, below=44 + 26 * several)


def _drops(table: pd.DataFrame) -> str:
    """How many drops are told from none, or that nothing was compared."""
    if "q_value" not in table or table["q_value"].isna().all():
        return "Scores of the model as it is, compared with nothing"
    tested = table["q_value"].dropna()
    return f"{(tested < ALPHA).sum()} of {len(tested)} differences from the model as it is have q < {ALPHA}"


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
        "have it, with its 95 % interval, and where experts are masked by how much it drops. The figure's "
        "title counts the differences that a permutation test tells from chance, corrected for their number.",
        draw=summary_figure,
        place=15,
    ),
    "answers.parquet": Section(
        "Single answers",
        "What the model answered to each question, as it is (none) and under each intervention, with every score; gold "
        "is what is right, original_answer what memory says.",
        draw=None,
        place=17,
    ),
    "metrics.parquet": Section(
        "Other scores",
        "The same answers by other scores: those of summaries (Table 9), a judge's (Table 8), or without context "
        "(Table 10).",
        draw=metrics_figure,
        place=20,
    ),
}


def _bars(table: pd.DataFrame, *, x: str, y: str, repeat: bool = False) -> go.Figure:
    """Groups of bars along `x`, one per variant, each with the interval of `y`."""
    figure = go.Figure()
    for variant, look in style.looks(table["variant"], VARIANTS, repeat=repeat).items():
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
    """Which variant answers a task best; of several tasks no mean, in which one's gain hides another's loss."""
    if table["variant"].nunique() == 1:
        return f"EM is {table['em'].min():.2f} to {table['em'].max():.2f} over the tasks"
    if table["task"].nunique() == 1:
        return _highest("EM", table.set_index("variant"), "em")
    least, most = table.loc[table["em"].idxmin()], table.loc[table["em"].idxmax()]
    ends = [f"{row['em']:.2f} ({row['variant']} on {row['task']})" for row in (least, most)]
    return f"EM by task, from {ends[0]} to {ends[1]}"


def _highest(what: str, rows: pd.DataFrame, score: str) -> str:
    """Which variants have the highest score and which the next, those together that look alike, and how sure that is.

    rows: by variant, with the score and its interval.
    """
    first, *rest = style.ranked(rows[score])
    if not rest:
        return f"{what} is {rows[score].max():.2f} for all"
    best, others = rows.loc[rows[score].idxmax()], rows[rows[score].round(2) < round(rows[score].max(), 2)]
    overlap = (others[f"{score}_high"] >= best[f"{score}_low"]).any()
    return f"{what} is highest for {first}, then {rest[0]}{'; intervals overlap' if overlap else ''}"
