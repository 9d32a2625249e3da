"""What stands on the page of each expert, made of the atlas's tables and of runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from moe_lens.report.atlas.run_numbers import RunNumbers

MOST = 12
"""Rows of each list on a page."""
OCCURRENCES = 10
"""So often a token has to be in the data to be listed by its share."""

Row = dict[str, Any]
Key = tuple[int, int]


@dataclass(frozen=True)
class ExpertPages:
    """The pages of all experts.

    tables: of the atlas, by name; those that a model has not are missing. runs: by name, what runs say.
    """

    tables: Mapping[str, pd.DataFrame]
    runs: Mapping[str, RunNumbers] = field(default_factory=dict)

    @cached_property
    def experts(self) -> list[Key]:
        """All of them, (layer, expert) in rising order."""
        pairs = self.tables["rates"][["layer", "expert"]].drop_duplicates().sort_values(["layer", "expert"])
        return list(pairs.itertuples(index=False, name=None))

    def __iter__(self) -> Iterator[tuple[Key, Row]]:
        for layer, expert in self.experts:
            key = (layer, expert)
            contexts = self._of("contexts", key).sort_values("rank")
            yield (
                key,
                {
                    "use": records(self._of("rates", key), "data rate rate_low rate_high weight first tokens"),
                    "contexts": records(contexts, "data id position weight place texts weights"),
                    "tokens": self._tokens(key),
                    "written": records(self._of("written", key), "token_id text excess logit"),
                    "partners": self._partners(key),
                    "outputs": self._alike("outputs", key, "other together similarity"),
                    "routers": self._alike("routers", key, "other similarity"),
                    "before": self._paths(
                        "before", key, "before_layer before_expert probability rate lift lift_low lift_high"
                    ),
                    "after": self._paths("after", key, "next_layer other probability rate lift lift_low lift_high"),
                    "told": records(
                        self._of("baseline", key), "token token_low token_high bigram bigram_low bigram_high"
                    ),
                    "saliency": records(self._of("saliency", key), "reap ean"),
                    "scores": self._scores(key),
                    "doses": self._doses(key),
                },
            )

    @cached_property
    def rates(self) -> pd.Series:
        """The rate of each expert over all data sets together, by layer and expert."""
        table = self.tables["rates"]
        return table[table["data"] == ""].set_index(["layer", "expert"])["rate"]

    @cached_property
    def _parts(self) -> dict[str, dict[Key, pd.DataFrame]]:
        """The rows of each expert, of each table."""
        return {
            name: {(int(layer), int(expert)): rows for (layer, expert), rows in table.groupby(["layer", "expert"])}
            for name, table in (self.tables | self._from_paths | self._from_runs).items()
            if "expert" in table
        }

    @property
    def _from_paths(self) -> dict[str, pd.DataFrame]:
        """The paths by the expert from which they lead, and by the one to which they do."""
        if "paths" not in self.tables:
            return {}
        paths = self.tables["paths"]
        names = {"layer": "before_layer", "expert": "before_expert", "next_layer": "layer", "other": "expert"}
        return {"after": paths, "before": paths.rename(columns=names)}

    @cached_property
    def _from_runs(self) -> dict[str, pd.DataFrame]:
        """The scores of all runs, with the rank of each expert in its layer."""
        parts = [run.scores.assign(run=name) for name, run in self.runs.items() if len(run.scores)]
        if not parts:
            return {}
        table = pd.concat(parts, ignore_index=True)
        by_layer = table.groupby(["run", "name", "layer"])["score"]
        return {
            "scores": table.assign(rank=by_layer.rank(ascending=False, method="min"), among=by_layer.transform("size"))
        }

    def _of(self, name: str, key: Key) -> pd.DataFrame:
        """The rows of an expert; none where the table is missing or has none of it."""
        return self._parts.get(name, {}).get(key, pd.DataFrame())

    def _tokens(self, key: Key) -> dict[str, list[Row]]:
        """The tokens that take it, by how often they do, and by the share of their occurrences in which they do."""
        rows, columns = self._of("tokens", key), "token_id text tokens selected specialisation"
        if rows.empty:
            return {"often": [], "mostly": []}
        often = rows.sort_values(["selected", "token_id"], ascending=[False, True])
        frequent = rows[rows["tokens"] >= OCCURRENCES]
        mostly = frequent.sort_values(["specialisation", "selected", "token_id"], ascending=[False, False, True])
        return {"often": records(often.head(MOST), columns), "mostly": records(mostly.head(MOST), columns)}

    def _partners(self, key: Key) -> list[Row]:
        """The experts of the layer that its tokens surely take more often than all tokens do."""
        rows = self._of("partners", key)
        if rows.empty:
            return []
        rows = rows.assign(rate=self.rates.loc[key[0]].loc[rows["other"]].to_numpy())
        rows = rows.assign(lift=rows["probability"] / rows["rate"], sure=rows["probability_low"] / rows["rate"])
        return _highest(rows[rows["sure"] > 1], "sure", "other probability probability_low probability_high rate lift")

    def _alike(self, name: str, key: Key, columns: str) -> list[Row]:
        """The experts of the layer that are most like it, by some similarity."""
        return _highest(self._of(name, key), "similarity", columns)

    def _paths(self, name: str, key: Key, columns: str) -> list[Row]:
        """The experts of the layer before, or after, that its tokens surely take more often than all tokens do."""
        rows = self._of(name, key)
        columns += " probability rate lift lift_low lift_high"
        return [] if rows.empty else _highest(rows[rows["lift_low"] > 1], "lift_low", columns)

    def _scores(self, key: Key) -> list[Row]:
        return records(self._of("scores", key), "run name score score_low score_high rank among")

    def _doses(self, key: Key) -> list[Row]:
        """The dose curves of the sets that it is in, each with what random sets and the unmasked model give."""
        found = []
        for name, run in self.runs.items():
            for one in run.curves_of(*key):
                tasks = run.doses["task"] if "task" in run.doses else pd.Series("", index=run.doses.index)
                for task, rows in run.doses.groupby(tasks.fillna(""), sort=False):
                    found.append({"run": name, "set": one, "task": task, **_curve(rows, one)})
        return found


def _curve(rows: pd.DataFrame, name: str) -> Row:
    """A set's exact match by strength, beside the lowest and the highest of random sets and the unmasked model."""
    own = rows[(rows["set"] == name) & rows["strength"].notna()].sort_values("strength")
    chance = rows[(rows["family"] == "random") & rows["strength"].notna()].groupby("strength")["em"]
    chance = chance.agg(["min", "max"]).reset_index()
    unmasked = rows.loc[rows["family"] == "none", "em"]
    return {
        "mode": str(own["mode"].iloc[0]) if len(own) else "",
        "experts": str(own["experts"].iloc[0]) if len(own) else "",
        "points": records(own, "strength em em_low em_high"),
        "random": records(chance, "strength min max"),
        "unmasked": short(unmasked.iloc[0]) if len(unmasked) else None,
    }


def records(table: pd.DataFrame, columns: str) -> list[list[Any]]:
    """The rows of these columns as lists, numbers with four digits; none of an empty table."""
    if table.empty:
        return []
    return [[short(value) for value in row] for row in table[columns.split()].itertuples(index=False, name=None)]


def short(value: Any) -> Any:
    """A value as JSON has it, with four digits; NaN is nothing."""
    if isinstance(value, str) or value is None:
        return value
    if hasattr(value, "__len__"):
        return [short(one) for one in value]
    number = float(value)
    if number != number:
        return None
    return int(number) if number.is_integer() else float(f"{number:.4g}")


def _highest(rows: pd.DataFrame, by: str, columns: str) -> list[list[Any]]:
    """The rows of the highest values; of equal ones those that come first."""
    if rows.empty:
        return []
    return records(rows[rows[by].notna()].sort_values(by, ascending=False, kind="stable").head(MOST), columns)
