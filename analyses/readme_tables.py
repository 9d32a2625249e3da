"""The tables of docs/organism.md and docs/cost.md, as Markdown, from what was measured; each option is one.

python analyses/readme_tables.py --tasks RUN/conflict/tasks.parquet --tasks RUN/planted/tasks.parquet \
    --methods RUN/table3/tasks.parquet --sizes RUN/table5/sizes.parquet --layers RUN/figure11/layers.parquet \
    --costs RUN/training_cost/summary.parquet
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens import MoELensError
from moe_lens.commands import console
from moe_lens.paper.markdown import markdown, over_seeds
from moe_lens.results import read_provenance, read_table

SHARE = (0.0, 1.0)


def wide(paths: Sequence[Path], keys: list[str], columns: list[str]) -> str:
    """Rows by the keys; of each model's table a column for every task and measure (EM, and answers from memory)."""
    parts = []
    for path in paths:
        table, model = read_table(path), read_provenance(path)["model"]
        long = table.melt([*keys, *columns, "seed"], ["em", "memory"], "measure").dropna(subset="value")
        long["measure"] = long["measure"].map({"em": "", "memory": " from memory"})
        values = long.groupby([*keys, *columns, "measure"], sort=False, dropna=False)["value"]
        cells = values.agg(over_seeds, bounds=SHARE)
        cells = cells.unstack([*columns, "measure"], sort=False)
        parts.append(cells.set_axis([f"`{model}` {' '.join(label[:-1])}{label[-1]}" for label in cells], axis=1))
    found = pd.concat(parts, axis=1).fillna("–").reset_index()
    return markdown([found.columns, *found.to_numpy()])


def main(
    tasks: Annotated[list[Path], Option(help="tasks.parquet of moe_lens.organism.measure, one per model.")] = (),
    methods: Annotated[list[Path], Option(help="tasks.parquet of table3_methods.py, one per model.")] = (),
    sizes: Annotated[list[Path], Option(help="sizes.parquet of table5_expert_count.py, one per model.")] = (),
    layers: Annotated[list[Path], Option(help="layers.parquet of figure11_layers.py, one per model.")] = (),
    costs: Annotated[list[Path], Option(help="summary.parquet of training_cost.py or interventions.py.")] = (),
) -> None:
    """Print the tables: means over seeds with their interval, or the lowest and highest of fewer than five seeds."""
    if not any((tasks, methods, sizes, layers, costs)):
        raise MoELensError("give saved tables to print by --tasks, --methods, --sizes, --layers or --costs")
    kinds = (tasks, ["task"], ["variant"]), (methods, ["variant"], ["task"])
    for paths, keys, columns in (*kinds, (sizes, ["variant", "size"], ["task"]), (layers, ["kind", "layer"], ["task"])):
        if paths:
            print(wide(paths, keys, columns) + "\n")
    forms = {"learning_rate": "g", "trainable": ",.0f", "seconds": ".0f"}
    for path in methods:
        rows = [["variant", "learning rate", "trained parameters", "seconds"]]
        trained = read_table(path).dropna(subset="trainable").drop_duplicates(["variant", "seed"])
        for name, part in trained.groupby("variant", sort=False):
            rows.append([name, *(over_seeds(part[column], form) for column, form in forms.items())])
        print(f"{read_provenance(path)['model']}\n\n{markdown(rows)}\n")
    for table in map(read_table, costs):
        print(markdown([table.columns.str.replace("_", " "), *table.to_numpy()]) + "\n")


if __name__ == "__main__":
    console.run(main)
