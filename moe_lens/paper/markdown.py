"""What the tables of the docs are printed with: rows as Markdown, and means over seeds with their spread."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from moe_lens.metrics import SUPPORTING, UNBOUNDED, mean_reach
from moe_lens.metrics.bounds import Bounds


def over_seeds(values: pd.Series, form: str = ".2f", *, bounds: Bounds = UNBOUNDED) -> str:
    """The mean over seeds, where they differ as printed with Student's 95 % interval: "0.30 [0.10, 0.50]".

    Of fewer than five seeds with the lowest and the highest that was seen, "0.20 (0.10 to 0.30)": others may well lie
    outside. bounds: beyond which no value can lie, nor an end.
    """
    mean, low, high = values.mean(), values.min(), values.max()
    if low == high or len(values) < SUPPORTING:
        told = [format(value, form) for value in (mean, low, high)]
        return told[0] if told[1] == told[2] else f"{told[0]} ({told[1]} to {told[2]})"
    reach = mean_reach(values)
    return f"{mean:{form}} [{max(mean - reach, bounds[0]):{form}}, {min(mean + reach, bounds[1]):{form}}]"


def of_rivals(table: pd.DataFrame) -> str:
    """Table 11 (`rivals_table`) as Markdown: a row per method, with what it keeps of other tasks beside.

    EM with its 95 % interval; training is wall time, an answer CPU time on the first task.
    """
    first, *others = dict.fromkeys(table["task"])
    rows = [["method", "chosen", f"`{first}` EM", "F1", "from memory"]]
    rows[0] += [*(f"`{task}` EM" for task in others), "seconds to train", "per answer"]
    for name, part in table.groupby("variant", sort=False):
        of = part.set_index("task")
        em = [f"{row.em:.2f} [{row.em_low:.2f}, {row.em_high:.2f}]" for row in of.itertuples()]
        seconds = of.at[first, "training_seconds"]
        trained = "–" if pd.isna(seconds) else f"{seconds:.0f}"
        scores = [f"{of.at[first, column]:.2f}" for column in ("f1", "memory")]
        row = [name, of.at[first, "chosen"] or "–", em[0], *scores, *em[1:], trained]
        rows.append([*row, f"{of.at[first, 'answer_seconds']:.3f}"])
    return markdown(rows)


def of_variants(table: pd.DataFrame) -> str:
    """`variants_table` as Markdown: each score with its 95 % interval, and how far it is above earlier variants'."""
    metrics, rows = [*dict.fromkeys(table["metric"])], []
    variants = [*dict.fromkeys(table["variant"])]
    for (task, variant), part in table.groupby(["task", "variant"], sort=False):
        of, before = part.set_index("metric"), variants[variants.index(variant) - 1]
        for column, names in (
            ("mean", (f"{task} ({of['n'].max()})", variant)),
            ("above", ("", f"above {variants[0]}")),
            ("further", ("", f"above {before}")),
        ):
            known = of[of[column].notna()] if column in of else of[:0]
            ends = (column, *(("low", "high") if column == "mean" else (f"{column}_low", f"{column}_high")))
            form = ".3f" if column == "mean" else "+.3f"
            told = {name: _with_ends(known.loc[name], ends, form) for name in known.index}
            if told:
                rows.append([*names, *(told.get(name, "–") for name in metrics)])
    return markdown([["questions", "variant", *metrics], *rows])


def of_masked(rows: pd.DataFrame, summary: pd.DataFrame) -> str:
    """What `intervene` leaves (masking or doses, and summary) as Markdown: of each data set a row per set of experts.

    Of EM and each score of the summary its mean, and how far it is below the mean under random sets, with the 95 %
    interval of that.
    """
    em = rows[rows["family"] != "random"].rename(columns={"em": "mean"}).assign(metric="em")
    every = pd.concat([em, summary], ignore_index=True)
    metrics, told = [*dict.fromkeys(every["metric"])], []
    for (task, name), part in every.groupby(["task", "intervention"], sort=False):
        of = part.set_index("metric")
        row = [f"{Path(task).name} ({of['n'].max()})", name]
        for metric in metrics:
            one = of.loc[metric] if metric in of.index else pd.Series({"mean": None, "below_random": None})
            below = ("below_random", "below_random_low", "below_random_high")
            row.append("–" if pd.isna(one["mean"]) else format(one["mean"], ".3f"))
            row.append("–" if pd.isna(one["below_random"]) else _with_ends(one, below, "+.3f"))
        told.append(row)
    return markdown([["questions", "experts", *(word for name in metrics for word in (name, "below random"))], *told])


def _with_ends(row: pd.Series, columns: Sequence[str], form: str) -> str:
    mean, low, high = (format(row[name], form) for name in columns)
    return f"{mean} [{low}, {high}]"


def markdown(rows: Iterable[Iterable[object]]) -> str:
    """Rows, the first of them the head, as a Markdown table; fractions with three digits."""
    cells = [[format(cell, ".3g") if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    head, *lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|---" * len(cells[0]) + "|", *lines])
