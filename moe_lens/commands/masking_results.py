"""What a masking command leaves: the tables and the figure of a run, and its rows on the console."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.choosing.controls import CONTROL
from moe_lens.choosing.masking import Masked, write_masked
from moe_lens.choosing.verdicts import selectivity
from moe_lens.commands import console
from moe_lens.commands.masking_tasks import Tasks
from moe_lens.metrics import Metric, metrics_named
from moe_lens.report.plots import doses_figure, masking_figure, selectivity_figure
from moe_lens.results import write_table

SHOWN = (
    "intervention", "size", "n", "em", "em_low", "em_high", "memory", "em_drop", "q_value", "usage",
    "control_usage", "below_random", "below_random_low", "below_random_high", "random_p", "rank",
)  # fmt: skip
DOSES = (
    "set", "strength", "n", "em", "em_low", "em_high", "memory", "em_drop", "q_value", "usage",
    "control_usage", "below_random", "below_random_low", "below_random_high", "random_p",
)  # fmt: skip
SCORES = (
    "task", "intervention", "metric", "n", "mean", "low", "high", "drop", "below_random", "below_random_low",
    "below_random_high",
)  # fmt: skip
MATRIX = (
    "set", "strength", "metric", "measure", "task", "role", "measured_on", "unmasked", "score", "effect", "effect_low",
    "effect_high", "ratio", "ratio_high", "verdict",
)  # fmt: skip


def leave_masked(found: Masked, out: Path, made_by: dict[str, Any], *, title: str) -> None:
    """Write the tables and the figure of a masking run to `out`, and print its rows, the random sets as their mean."""
    files = write_masked(found, out, made_by)
    dosed = "doses.parquet" in files
    drawn, name = (doses_figure, "doses.html") if dosed else (masking_figure, "figure3.html")
    files += [path.name for path in console.save_figure(drawn(found.rows), out / name)]
    rows = found.rows[found.rows["family"] != CONTROL]
    several = ["task"] if "task" in rows and rows["task"].nunique() > 1 else []
    columns = [*several, *(name for name in (DOSES if dosed else SHOWN) if name in rows)]
    console.show(rows, columns, title=title)
    if found.summary is not None:
        console.show(found.summary, [name for name in SCORES if name in found.summary], title="Other scores")
    console.say(f"written to {out}: {', '.join(files)}")


def leave_selectivity(
    found: Masked, tasks: Tasks, out: Path, made_by: dict[str, Any], metrics: Sequence[Metric], *, seed: int
) -> None:
    """Write the matrix of interventions and tasks to `out` with its figure, and print it; by EM and more metrics."""
    judged = [
        selectivity(
            found.answers,
            found.rows,
            targets=tasks.targets,
            spared=tasks.spared,
            metric=metric,
            summary=found.summary,
            seed=seed,
        )
        for metric in metrics_named(["em", *metrics])
    ]
    table = pd.concat(judged, ignore_index=True)
    write_table(table, out / "selectivity.parquet", made_by)
    pages = console.save_figure(selectivity_figure(table), out / "selectivity.html")
    columns = MATRIX if metrics else [name for name in MATRIX if name not in ("metric", "measure")]
    console.show(table, columns, title="What is lost of each task's score, and how selective that is")
    console.say(f"written to {out}: selectivity.parquet, {', '.join(path.name for path in pages)}")
