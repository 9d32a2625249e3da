"""The paper's published numbers, put beside one's own of the same model, variant, task and metric."""

from functools import cache
from importlib.resources import files

import pandas as pd

from moe_lens.errors import MoELensError

KEYS = ("variant", "task", "trained_on", "size")
PAPER, SOURCE = "paper", "published in"
"""How columns with published values are called, such as "em, paper", and the one with their table's number."""


@cache
def published() -> pd.DataFrame:
    """Columns item (such as table1), model, variant, task, trained_on, size, metric, value; shares of 1, not of 100."""
    with (files("moe_lens") / "paper" / "published.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file, keep_default_na=False, dtype={"size": str})
    return table.assign(value=table["value"] / 100)


def published_of(item: str, model: str) -> pd.DataFrame:
    """The rows of `published` for an item and a model, which its id or its folder's name tells.

    Raises MoELensError for a model or an item that the paper has no numbers of.
    """
    table = published()
    names = [name for name in table["model"].unique() if name.lower() in model.lower()]
    if not names:
        raise MoELensError(
            f"--beside paper: the paper has no numbers of {model}; it has those of "
            f"{', '.join(table['model'].unique())}, which the id or folder of --model has to name"
        )
    of_item = table[table["item"] == item]
    found = of_item[of_item["model"] == names[0]]
    if found.empty:
        others = ", ".join(of_item["model"].unique()) or "none of its models"
        raise MoELensError(f"--beside paper: {item} has numbers of {others}, and not of {names[0]}")
    return found


def beside_paper(table: pd.DataFrame, item: str, model: str, trained_on: str = "") -> pd.DataFrame:
    """The table with the paper's values and the number of their table; missing where the paper has none.

    table: a row per variant and task with a column per metric, or a row per metric with its mean; with or without size,
        the number of experts. trained_on: the first task, where all are trained on that one.
    Raises MoELensError as `published_of`.
    """
    known = published_of(item, model)
    values = {tuple(row): value for *row, value in known[[*KEYS, "metric", "value"]].itertuples(index=False)}
    told = {key[2] for key in values} != {""}
    keys = [_key(row, _data_set(trained_on) if told else "") for row in table.to_dict("records")]
    found = table.copy()
    if "metric" in table:
        metrics = {PAPER: list(table["metric"])}
    else:
        metrics = {f"{name}, {PAPER}": [name] * len(table) for name in known["metric"].unique() if name in table}
    for column, names in metrics.items():
        found[column] = [values.get((*key, name)) for key, name in zip(keys, names, strict=True)]
    return found.assign(**{SOURCE: item.replace("table", "Table ")})


def _key(row: dict[str, object], trained_on: str) -> tuple[str, str, str, str]:
    """The row's place among the published values; ESFT by either score is the paper's, which does not say by which."""
    variant = str(row["variant"])
    variant = "ESFT" if variant.startswith("ESFT-") else variant
    return variant, _data_set(str(row["task"])), trained_on, str(row.get("size", ""))


def _data_set(task: str) -> str:
    """The name of a data set, wherever it is read from."""
    return task.partition(":")[0].partition("@")[0]
