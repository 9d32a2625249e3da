"""How scores do on one tuned model of the organism: against both truths, and by what masking their experts leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import process_time

import pandas as pd

from moe_lens.causal.sweep import single_expert_effects
from moe_lens.choosing.controls import CONTROL
from moe_lens.choosing.masking import mask
from moe_lens.choosing.measuring import Models, score_tables
from moe_lens.choosing.planted import has_planted, planted_experts
from moe_lens.choosing.scores import Score
from moe_lens.choosing.selection import Given, Ground, Planted, Selection, Top, choices
from moe_lens.data import Example
from moe_lens.experts import ExpertSet
from moe_lens.lens.lens import MoELens
from moe_lens.metrics import auc, precision_at, rank_correlation_interval

STRONGEST = "strongest"
"""What the experts with the largest exact effects are called."""


@dataclass(frozen=True)
class Measured:
    """Scores of every expert, columns layer, expert, score, and the CPU seconds that each takes alone; by name."""

    tables: Mapping[str, pd.DataFrame]
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, scores: Sequence[Score], models: Models, examples: Sequence[Example]) -> "Measured":
        tables: dict[str, pd.DataFrame] = {}
        seconds = {}
        for score in scores:
            before = process_time()
            tables |= score_tables([score], models, examples)
            seconds[score.name] = process_time() - before
        return cls(tables, seconds)

    def and_also(self, other: "Measured") -> "Measured":
        return Measured({**self.tables, **other.tables}, {**self.seconds, **other.seconds})


def compared(
    lens: MoELens,
    model: str,
    scores: Sequence[Score],
    measured: Measured,
    dev: Sequence[Example],
    test: Sequence[Example],
    *,
    size: int,
    controls: int,
) -> dict[str, pd.DataFrame]:
    """Tables of one tuned model: scores, a row for each; effects, of every single expert on dev; masks, sets' on test.

    Columns of scores: score, about, seconds, spearman with _low and _high (rank correlation with the effects), where
    experts are planted auc and precision at `size`, then those of `masking_rows` for its highest experts zero-masked.
    """
    planted = planted_experts(model) if has_planted(model) else None
    effects = single_expert_effects(lens, dev)
    wanted: list[Selection] = [Top(score, size) for score in scores]
    wanted.append(Given(ExpertSet.top(effects, size, score="effect"), called=STRONGEST))
    wanted += [] if planted is None else [Planted()]
    chosen = choices(wanted, Ground(lens.architecture, model, measured.tables))
    rows, found = mask(lens, test, chosen, controls=controls, max_new_tokens=8).rows, []
    for score in scores:
        table = measured.tables[score.name]
        exact = rank_correlation_interval(table, effects)
        row = {"score": score.name, "about": score.about, "seconds": measured.seconds[score.name]}
        row |= {"spearman": exact.mean, "spearman_low": exact.low, "spearman_high": exact.high}
        if planted is not None:
            row |= {"auc": auc(table, planted), "precision": precision_at(table, planted, size)}
        [masked] = rows[rows["intervention"] == f"{score.name}:{size}"].to_dict("records")
        found.append(row | masked)
    masks = rows[rows["family"].isin(["none", "chosen", "planted", CONTROL])]
    return {"scores": pd.DataFrame(found), "effects": effects, "masks": masks}
