"""The README's tables of the organism, as Markdown, from the tables that its measurements saved.

python analyses/readme_tables.py RUN/conflict/tasks.parquet RUN/planted/tasks.parquet RUN/which_score/scores.parquet
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Argument

from moe_lens import console
from moe_lens.results import read_table

COLUMNS = {"auc": "AUC", "precision": "precision at 4", "spearman": "rank correlation", "em": "EM left"}


def over_seeds(values: pd.Series) -> str:
    """The mean over seeds with the lowest and the highest, or the one value there is."""
    if len(values) == 1:
        return f"{values.iloc[0]:.2f}"
    return f"{values.mean():.2f} ({values.min():.2f} to {values.max():.2f})"


def markdown(rows: list[list[str]]) -> str:
    """Rows, the first of them the head, as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main(
    conflict: Annotated[Path, Argument(help="tasks.parquet of `organism`.")],
    planted: Annotated[Path, Argument(help="tasks.parquet of `organism:planted`.")],
    scores: Annotated[Path, Argument(help="scores.parquet of analyses/which_score.py on `organism:planted`.")],
) -> None:
    """Print the tables."""
    head = ["task", *(f"`{name}` {when}" for name in ("organism", "organism:planted") for when in ("base", "tuned"))]
    rows = [head]
    models = [read_table(conflict), read_table(planted)]
    for task in dict.fromkeys(models[0]["task"]):
        parts = [table[table["task"] == task] for table in models]
        cells = [
            over_seeds(part[part["variant"] == variant]["em"]) for part in parts for variant in ("base", "router-tuned")
        ]
        rows.append([f"`{task}`", *cells])
        if parts[0]["memory"].notna().all():
            cells = [
                over_seeds(part[part["variant"] == v]["memory"]) for part in parts for v in ("base", "router-tuned")
            ]
            rows.append([f"`{task}`, answered from memory", *cells])
    print(markdown(rows) + "\n")
    rows = [["score", "what is counted", *COLUMNS.values()]]
    for name, part in read_table(scores).groupby("score", sort=False):
        rows.append([f"`{name}`", part["about"].iloc[0], *(over_seeds(part[column]) for column in COLUMNS)])
    print(markdown(rows))


if __name__ == "__main__":
    console.run(main)
