"""What stands on the page of each expert, made of the atlas's tables and of runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.report.atlas.run_numbers import RunNumbers

MOST = 12
"""Rows of each list on a page."""
OCCURRENCES = 10
"""So often a token has to be in the data to be listed by its share."""
TOKEN = "token_id text tokens selected specialisation"
PATH = "probability rate lift lift_low lift_high"
TOLD = "token token_low token_high bigram bigram_low bigram_high"

Key = tuple[int, int]
Rows = list[list[Any]]


@dataclass(frozen=True)
class ExpertPages:
    """The pages of all experts, ((layer, expert), page) in rising order; a page has a list of rows for each part.

    tables: of the atlas, by name; what those would say that a model has not is an empty list. runs: by name.
    """

    tables: Mapping[str, pd.DataFrame]
    runs: Mapping[str, RunNumbers] = field(default_factory=dict)

    @cached_property
    def experts(self) -> list[Key]:
        """All of them, (layer, expert) in rising order."""
        pairs = self.tables["rates"][["layer", "expert"]].drop_duplicates().sort_values(["layer", "expert"])
        return list(pairs.itertuples(index=False, name=None))

    def __post_init__(self) -> None:
        known = set(self.experts)
        for name, run in self.runs.items():
            if unknown := sorted(run.experts - known):
                layer, expert = unknown[0]
                raise MoELensError(
                    f"the run {name} has numbers of layer {layer}, expert {expert}, and this model has no such expert; "
                    "give runs of the model that the atlas is of"
                )

    def __iter__(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        parts, doses = self._parts(), self._doses()
        for key in self.experts:
            yield key, {name: rows.get(key, []) for name, rows in parts.items()} | {"doses": doses.get(key, [])}

    def _parts(self) -> dict[str, dict[Key, Rows]]:
        """By part of the page and expert its rows, the first ones first."""
        tokens, paths = self._table("tokens"), self._table("paths")
        return {
            "use": by_expert(self._table("rates"), "data rate rate_low rate_high weight first tokens"),
            "label": by_expert(_said(self._table("labels")), "label by"),
            "saliency": by_expert(self._table("saliency"), "reap"),
            "told": by_expert(self._table("baseline"), TOLD),
            "contexts": by_expert(
                _ordered(self._table("contexts"), rank=True), "data id position weight place texts weights"
            ),
            "often": by_expert(_ordered(tokens, selected=False, token_id=True), TOKEN, MOST),
            "mostly": by_expert(
                _ordered(_above(tokens, "tokens", OCCURRENCES - 1), specialisation=False, selected=False), TOKEN, MOST
            ),
            "written": by_expert(
                _ordered(self._table("written"), read=False, rank=True), "token_id text excess logit read"
            ),
            "partners": by_expert(
                self._partners(), "other probability probability_low probability_high rate lift", MOST
            ),
            "outputs": by_expert(_alike(self._table("outputs")), "other together similarity", MOST),
            "routers": by_expert(_alike(self._table("routers")), "other similarity", MOST),
            "after": by_expert(_surest(paths, "lift_low"), f"next_layer other {PATH}", MOST),
            "before": by_expert(_surest(paths, "lift_low"), f"layer expert {PATH}", MOST, of=("next_layer", "other")),
            "scores": by_expert(self._scores(), "run name score score_low score_high rank among"),
        }

    def _table(self, name: str) -> pd.DataFrame:
        """A table of the atlas; an empty one where the model has none."""
        return self.tables.get(name, pd.DataFrame())

    def _partners(self) -> pd.DataFrame:
        """Pairs of which the first one's tokens surely take the other more often than all tokens do."""
        pairs, rates = self._table("partners"), self.tables["rates"]
        if pairs.empty:
            return pairs
        every = rates[rates["data"] == ""][["layer", "expert", "rate"]].rename(columns={"expert": "other"})
        pairs = pairs.merge(every, on=["layer", "other"], how="left")
        own = pairs["rate"].where(pairs["rate"] > 0)
        return _surest(pairs.assign(lift=pairs["probability"] / own, sure=pairs["probability_low"] / own), "sure")

    def _scores(self) -> pd.DataFrame:
        """The scores of all runs, with the rank of each expert in its layer."""
        parts = [run.scores.assign(run=name) for name, run in self.runs.items() if len(run.scores)]
        if not parts:
            return pd.DataFrame()
        table = pd.concat(parts, ignore_index=True)
        by_layer = table.groupby(["run", "name", "layer"])["score"]
        ranks = by_layer.rank(ascending=False, method="min")
        return table.assign(rank=ranks, among=by_layer.transform("size"))

    def _doses(self) -> dict[Key, list[dict[str, Any]]]:
        """The dose curves of the sets that an expert is in, each with what random sets and the unmasked model give."""
        found: dict[Key, list[dict[str, Any]]] = {}
        for name, run in self.runs.items():
            tasks = run.doses["task"].fillna("") if "task" in run.doses else pd.Series("", index=run.doses.index)
            for one, experts in run.sets.items():
                for task, rows in run.doses.groupby(tasks, sort=False):
                    curve = {"run": name, "set": one, "task": task, **_curve(rows, one)}
                    for key in ExpertSet.parse(experts):
                        found.setdefault(key, []).append(curve)
        return found


def _said(labels: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a label."""
    return labels if labels.empty else labels[labels["label"] != ""]


def by_expert(
    table: pd.DataFrame, columns: str, most: int | None = None, *, of: tuple[str, str] = ("layer", "expert")
) -> dict[Key, Rows]:
    """The rows of each expert, in the table's order, as lists of these columns; no more than `most` of each.

    of: the columns that name the expert. None of an empty table.
    """
    found: dict[Key, Rows] = {}
    if table.empty:
        return found
    keys = zip(*(table[name].tolist() for name in of), strict=True)
    for key, row in zip(keys, zip(*(table[name].tolist() for name in columns.split()), strict=True), strict=True):
        own = found.setdefault(key, [])
        if most is None or len(own) < most:
            own.append([short(value) for value in row])
    return found


def records(table: pd.DataFrame, columns: str) -> Rows:
    """The rows of these columns as lists, numbers with four digits."""
    return [[short(value) for value in row] for row in table[columns.split()].itertuples(index=False, name=None)]


def short(value: Any) -> Any:
    """A value as JSON has it, with four digits; NaN is nothing."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, list | np.ndarray):
        return [short(one) for one in value]
    number = float(value)
    if number != number:
        return None
    return int(number) if number.is_integer() else float(f"{number:.4g}")


def _ordered(table: pd.DataFrame, **rising: bool) -> pd.DataFrame:
    """The table by these columns, rising or falling; of equal rows those that come first."""
    return table if table.empty else table.sort_values(list(rising), ascending=list(rising.values()), kind="stable")


def _above(table: pd.DataFrame, column: str, least: float) -> pd.DataFrame:
    """The rows whose value is above `least`."""
    return table if table.empty else table[table[column] > least]


def _surest(table: pd.DataFrame, low: str) -> pd.DataFrame:
    """The rows of ratios that are above 1 with their whole interval, from the highest low end down."""
    return _ordered(_above(table, low, 1), **{low: False})


def _alike(table: pd.DataFrame) -> pd.DataFrame:
    """Pairs that have a similarity, the most alike first."""
    return _ordered(_above(table, "similarity", -np.inf), similarity=False)


def _curve(rows: pd.DataFrame, name: str) -> dict[str, Any]:
    """A set's exact match by strength, beside the lowest and the highest of random sets and the unmasked model."""
    dosed = rows[rows["strength"].notna()].sort_values("strength", kind="stable")
    own, chance = dosed[dosed["set"] == name], dosed[dosed["family"] == "random"]
    unmasked = rows.loc[rows["family"] == "none", "em"]
    return {
        "mode": str(own["mode"].iloc[0]) if len(own) else "",
        "experts": str(own["experts"].iloc[0]) if len(own) else "",
        "points": records(own, "strength em em_low em_high"),
        "random": records(chance.groupby("strength")["em"].agg(["min", "max"]).reset_index(), "strength min max"),
        "unmasked": short(unmasked.iloc[0]) if len(unmasked) else None,
    }
