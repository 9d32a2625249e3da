"""What the command that makes an atlas does: one pass over each data set, and the tables that the site is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.commands import console
from moe_lens.data import Example
from moe_lens.errors import MoELensError, NotFiniteError
from moe_lens.lens.lens import MoELens
from moe_lens.lens.needs import Statistic
from moe_lens.lens.positions import Positions
from moe_lens.report.views.tokens import token_texts
from moe_lens.results import read_if_made_by, write_table
from moe_lens.statistics import (
    ActivationRates,
    CoActivation,
    ExpertPaths,
    ExpertSaliency,
    ExpertVocabulary,
    OutputSimilarity,
    TokenBaseline,
    TopContexts,
    VocabularySpecialisation,
    router_similarity,
)

LAST = "left_out"
"""The table that is written last: which ones this model has not, and why."""


@dataclass(frozen=True)
class Atlas:
    """What an atlas is made of, measured in one pass over each data set. contexts: how many are kept of each."""

    lens: MoELens
    positions: Positions
    contexts: int

    def tables(self, out: Path, made_by: dict[str, Any], data: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
        """The tables by name; where all are there already, made in the same way, they are read."""
        left_out = read_if_made_by(out / f"{LAST}.parquet", made_by)
        names = {*self._shared(), "rates", "contexts", "routers"} - set([] if left_out is None else left_out["name"])
        read = {name: read_if_made_by(out / f"{name}.parquet", made_by) for name in sorted(names)}
        found = {name: table for name, table in read.items() if table is not None}
        if left_out is None or len(found) < len(names):
            found, left_out = self._measured(data)
            for name, table in found.items():
                write_table(table, out / f"{name}.parquet", made_by)
            write_table(left_out, out / f"{LAST}.parquet", made_by)
        for name, reason in left_out.itertuples(index=False):
            console.note(f"left out {name}: {reason}")
        return {**found, LAST: left_out}

    def _measured(self, data: Mapping[str, Sequence[Example]]) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
        first = next(iter(data.values()))[:1]
        reasons: dict[str, str] = {}
        shared: dict[str, Statistic] = {}
        for name, make in self._shared().items():
            if (reason := _refusal(partial(self._tried, make, first))) is None:
                shared[name] = make()
            else:
                reasons[name] = reason
        every, rates, contexts = ActivationRates(self.positions), [], []
        for task, examples in data.items():
            own, top = ActivationRates(self.positions), TopContexts(self.contexts, positions=self.positions)
            self.lens.measure(examples, own, top, *shared.values())
            rates.append(own.table().assign(data=task))
            contexts.append(self._texts(top.table()).assign(data=task))
            every.merge(own)
        found = {"rates": pd.concat([every.table().assign(data=""), *rates], ignore_index=True)}
        found["contexts"] = pd.concat(contexts, ignore_index=True)
        tables = {name: statistic.table for name, statistic in shared.items()}
        for name, make in {**tables, "routers": lambda: router_similarity(self.lens)}.items():
            if (reason := _refusal(partial(_keep, found, name, make))) is not None:
                reasons[name] = reason
        for name in ("tokens", "written"):
            if name in found:
                found[name] = found[name].assign(text=self._alone(found[name]["token_id"]))
        return found, pd.DataFrame(reasons.items(), columns=["name", "reason"], dtype=object)

    def _shared(self) -> dict[str, Callable[[], Statistic]]:
        """Statistics over all data sets together, by the name of their table."""
        positions, head = self.positions, self.lens.module.get_submodule(self.lens.architecture.head)
        return {
            "tokens": lambda: VocabularySpecialisation(positions=positions),
            "baseline": lambda: TokenBaseline(positions),
            "partners": lambda: CoActivation(positions),
            "paths": lambda: ExpertPaths(positions),
            "saliency": lambda: ExpertSaliency(positions),
            "outputs": lambda: OutputSimilarity(positions),
            "written": lambda: ExpertVocabulary(head, top=12, positions=positions),
        }

    def _tried(self, make: Callable[[], Statistic], examples: Sequence[Example]) -> None:
        """Measures it on a few examples; MoELensError where the model does not have it."""
        self.lens.measure(examples, make(), progress=False)

    def _texts(self, contexts: pd.DataFrame) -> pd.DataFrame:
        """The contexts with the text of each token."""
        return contexts.assign(texts=[token_texts(ids, self.lens.tokenizer) for ids in contexts["token_ids"]])

    def _alone(self, token_ids: pd.Series) -> pd.Series:
        """The text of each token by itself."""
        texts = {token: token_texts([int(token)], self.lens.tokenizer)[0] for token in token_ids.unique()}
        return token_ids.map(texts)


def _keep(found: dict[str, pd.DataFrame], name: str, make: Callable[[], pd.DataFrame]) -> None:
    """Puts the table that is made among those found."""
    found[name] = make()


def _refusal(measure: Callable[[], object]) -> str | None:
    """Why this model does not have it; None where it does."""
    try:
        measure()
    except NotFiniteError:
        raise
    except MoELensError as refusal:
        return str(refusal)
    return None
