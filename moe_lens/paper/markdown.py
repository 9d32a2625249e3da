"""What the tables of the docs are printed with: rows as Markdown, and means over seeds with their spread."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from moe_lens.metrics import METRICS, SUPPORTING, UNBOUNDED, compare, mean_reach
from moe_lens.metrics.bounds import Bounds
from moe_lens.results import read_table

SCORED = ("em", "f1", "contains", "memory", "memory_ratio")
"""The scores of a table of variants, in its order."""


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


def of_answers(folder: Path, base: str = "base") -> str:
    """What variants of a model answer to some tasks, of `folder`/VARIANT/TASK with evaluate's tables, as Markdown.

    Each score that some example has with its 95 % interval; below it by how much it is above that of `base`, paired.
    """
    rows: list[list[str]] = []
    for task in sorted(own.name for own in (folder / base).iterdir()):
        before = read_table(folder / base / task / "answers.parquet").set_index("id")
        for own in sorted(folder.glob(f"*/{task}"), key=lambda own: own.parent.name != base):
            summary = read_table(own / "summary.parquet").set_index("metric")
            names = [str(name) for name in summary.index[summary["n"] > 0]]
            told = [_with_ends(*summary.loc[name, ["mean", "low", "high"]]) for name in names]
            rows += [[f"{task} ({len(before)})", own.parent.name, *_placed(names, told)]]
            if own.parent.name == base:
                continue
            after = read_table(own / "answers.parquet").set_index("id").loc[before.index]
            above = {name: compare(after[name].to_numpy(), before[name].to_numpy(), bounds=(-1, 1)).difference
                     for name in names if METRICS[name].paired}  # fmt: skip
            told = [_with_ends(one.mean, one.low, one.high, "+.3f") for one in above.values()]
            rows += [["", f"above {base}", *_placed([*above], told)]]
    return markdown([["questions", "variant", *SCORED], *rows])


def _with_ends(mean: float, low: float, high: float, form: str = ".3f") -> str:
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _placed(names: Sequence[str], told: Sequence[str]) -> list[str]:
    """What is told of some of SCORED, with a dash for the others."""
    return [dict(zip(names, told, strict=True)).get(name, "–") for name in SCORED]


def markdown(rows: Iterable[Iterable[object]]) -> str:
    """Rows, the first of them the head, as a Markdown table; fractions with three digits."""
    cells = [[format(cell, ".3g") if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    head, *lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|---" * len(cells[0]) + "|", *lines])
