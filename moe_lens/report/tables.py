"""What a figure asks of its table: columns, rows, one row per mark, names, and several seeds as one row."""

from collections.abc import Iterable, Sequence

import pandas as pd

from moe_lens.errors import MoELensError


def require(table: pd.DataFrame, columns: Iterable[str], *, figure: str) -> pd.DataFrame:
    """The table, its rows numbered anew; MoELensError says which columns it lacks, or that it is empty."""
    columns = tuple(columns)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise MoELensError(
            f"{figure} needs the columns {', '.join(columns)}; this table has no {', '.join(missing)} "
            f"(it has {', '.join(map(str, table.columns)) or 'no columns'})"
        )
    if table.empty:
        raise MoELensError(f"{figure} got a table without rows; nothing can be drawn")
    return table.reset_index(drop=True)


def require_once(table: pd.DataFrame, keys: Sequence[str], *, figure: str) -> None:
    """MoELensError where two rows share the keys: one would be drawn upon the other."""
    repeated = table[table.duplicated(list(keys))]
    if not repeated.empty:
        first = ", ".join(f"{key} {repeated[key].iloc[0]}" for key in keys)
        raise MoELensError(f"{figure} takes one row per {' and '.join(keys)}, but {first} stands there twice")


def named_together(table: pd.DataFrame, columns: Iterable[str]) -> pd.Series:
    """For each row the values of these columns as one name; of columns that are missing or always the same none."""
    telling = [name for name in columns if name in table.columns and table[name].nunique() > 1]
    if not telling:
        return pd.Series("", index=table.index)
    first, *others = (table[name].astype(str) for name in telling)
    return first.str.cat(others, sep=", ") if others else first


def over_seeds(table: pd.DataFrame, keys: Sequence[str], metrics: Sequence[str], *, figure: str) -> pd.DataFrame:
    """One row per combination of the keys: of several seeds their mean, lowest and highest as its interval.

    A combination with one row keeps that row and its interval. The column `seeds` counts the rows; without a
    column `seed`, or where every combination has one row, the table comes back as it is. MoELensError where
    two rows share the keys and the seed.
    """
    if "seed" not in table.columns:
        require_once(table, keys, figure=figure)
        return table
    require_once(table, (*keys, "seed"), figure=figure)
    if not table.duplicated(list(keys)).any():
        return table
    rows = []
    for _, part in table.groupby(list(keys), sort=False, dropna=False):
        row = part.iloc[0].drop("seed").to_dict() | {"seeds": len(part)}
        if len(part) > 1:
            row |= {metric: part[metric].mean() for metric in metrics}
            row |= {f"{metric}_low": part[metric].min() for metric in metrics}
            row |= {f"{metric}_high": part[metric].max() for metric in metrics}
        rows.append(row)
    return pd.DataFrame(rows)


def with_short_tasks(table: pd.DataFrame) -> pd.DataFrame:
    """The table with tasks that are paths called by their last parts, where these tell them apart."""
    if "task" not in table:
        return table
    tasks = table["task"].dropna().astype(str).unique()
    short = {task: task.rstrip("/").rpartition("/")[2] for task in tasks}
    if len(set(short.values())) < len(short):
        return table
    return table.assign(task=table["task"].map(short))
