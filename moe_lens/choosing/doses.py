"""Which strength of an intervention to take: the best on held-out examples of those that spare what is to be spared."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from moe_lens.causal.evaluation import UNMASKED, q_values
from moe_lens.choosing.controls import CONTROL
from moe_lens.choosing.masking import MEAN, Masked
from moe_lens.metrics import bootstrap_interval

KEPT = 0.95
"""The share of its unmasked EM that every spared task has to keep."""


@dataclass(frozen=True)
class Candidate:
    """One strength of one thing, as answers name it.

    of: what it is a strength of, such as a set of experts; several saved interventions may be alternatives of one.
    distance: how far the strength is from the one that changes nothing.
    """

    name: str
    of: str
    strength: float
    distance: float


def dose_table(
    answers: pd.DataFrame,
    candidates: Sequence[Candidate],
    *,
    targets: Sequence[str],
    spared: Sequence[str],
    seed: int = 0,
) -> pd.DataFrame:
    """One row per candidate and task, with what it does there and whether it is the one to take.

    answers: of several tasks, as `joined` gives them, of every candidate and of the model as it is.

    Columns: set (what it is a strength of), intervention, strength, task, role ("target" or "spared"), n, unmasked and
    em (mean EM), em_low, em_high, kept (em over unmasked; empty where that is 0), keeps (of a spared task: whether that
    is at least `KEPT`; where the unmasked EM is 0 there is nothing to keep), and chosen. Of each set chosen is the
    candidate with the highest mean EM over the targets, of those of which every spared task keeps, and which is above
    that of the model as it is; of equals the one nearest to changing nothing.
    """
    means = answers.groupby(["task", "intervention"])["em"].mean()
    rows = []
    for one in candidates:
        for task in (*targets, *spared):
            own = answers[(answers["task"] == task) & (answers["intervention"] == one.name)]
            interval = bootstrap_interval(own["em"].to_numpy(), bounds=(0, 1), seed=seed)
            before, em = float(means[task, UNMASKED]), float(means[task, one.name])
            row = {"set": one.of, "intervention": one.name, "strength": one.strength, "task": task}
            row |= {"role": "target" if task in targets else "spared", "n": len(own), "unmasked": before}
            row |= {"em": em, "em_low": interval.low, "em_high": interval.high}
            rows.append(row | {"kept": em / before if before else None, "keeps": em >= KEPT * before - 1e-12})
    table = pd.DataFrame(rows)
    table["keeps"] = table["keeps"].where(table["role"] == "spared")
    chosen = {one.name for one in _best(means, candidates, targets, spared).values()}
    return table.astype({"kept": float}).assign(chosen=table["intervention"].isin(chosen))


def _best(
    means: pd.Series, candidates: Sequence[Candidate], targets: Sequence[str], spared: Sequence[str]
) -> dict[str, Candidate]:
    """By what it is a strength of, the candidate to take; nothing where none is better than doing nothing."""

    def target(name: str) -> float:
        return round(sum(float(means[task, name]) for task in targets) / len(targets), 12)

    found: dict[str, Candidate] = {}
    for one in sorted(candidates, key=lambda one: (-target(one.name), one.distance)):
        keeps = all(means[task, one.name] >= KEPT * means[task, UNMASKED] - 1e-12 for task in spared)
        if keeps and target(one.name) > target(UNMASKED):
            found.setdefault(one.of, one)
    return found


def merged(found: Sequence[Masked]) -> Masked:
    """Runs of different interventions on the same tasks as one; the model as it is, which is in each, once."""

    def together(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
        first, *others = parts
        return pd.concat([first, *(one[one["intervention"] != UNMASKED] for one in others)], ignore_index=True)

    rows = together([one.rows for one in found])
    if "p_value" in rows:
        own = rows["p_value"].where(~rows["family"].isin([CONTROL, MEAN]))
        rows["q_value"] = own.groupby(rows["task"]).transform(q_values)
    more = [one.summary for one in found if one.summary is not None]
    return Masked(together([one.answers for one in found]), rows, together(more) if more else None)
