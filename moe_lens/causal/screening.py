"""Sweeps of the most promising experts alone: attribution says which, a random sample of the others what is missed."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from moe_lens.causal.attributing import Attribution, attribution
from moe_lens.causal.sweep import WITH_END, single_expert_effects
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions import MODES
from moe_lens.lens.lens import MoELens
from moe_lens.metrics.catalogue import METRICS, Named
from moe_lens.progress import write

STRONGEST = 1 / 8
"""The share of all experts, by exact effect, of which it is said how many were found."""
TARGETS: dict[Named, str] = {WITH_END: "answer", METRICS["logit_difference"]: "logit_difference"}
"""The target of attribution by metric."""


@dataclass(frozen=True)
class Screened:
    """Exact effects of a part of all experts.

    effects: as `single_expert_effects` gives them, with attribution's `score`, and `chosen`: True for the experts that
        scored highest, False for the random sample of the others. n_experts: how many there are in all.
    recall: the share of the strongest eighth of all experts that is among the chosen, as the sample says; with its 95 %
        interval, see `recall_interval`.
    """

    effects: pd.DataFrame
    n_experts: int
    recall: float
    recall_low: float
    recall_high: float

    def __str__(self) -> str:
        chosen = int(self.effects["chosen"].sum())
        return (
            f"{chosen} of {self.n_experts} experts measured for their attribution, and {len(self.effects) - chosen} of "
            f"the others at random, by which {self.recall:.0%} [{self.recall_low:.0%}, {self.recall_high:.0%}] of the "
            "strongest eighth are among the former"
        )


def screened_effects(
    lens: MoELens,
    examples: Sequence[Example],
    *,
    share: float = 3 / 8,
    sample: int = 16,
    mode: str = "zero",
    metric: Named = WITH_END,
    batch_size: int | None = None,
    out: Path | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> Screened:
    """Exact effects of the `share` of all experts with the highest attribution, and of a random `sample` of the rest.

    mode: zero, renormalize or reroute. metric: by default the log-probability of the first gold answer,
    end-of-sequence included; or logit_difference. The rest as in `single_expert_effects`. What was found is printed.
    """
    named = METRICS.get(metric, metric) if isinstance(metric, str) else metric
    if mode not in MODES or named not in TARGETS:
        raise MoELensError(
            "attribution ranks experts by what silencing them costs log_probability or logit_difference, in the modes "
            f"{', '.join(MODES)}; got {getattr(named, 'name', named)!r} and {mode!r}: take single_expert_effects"
        )
    if not 0 < share <= 1 or sample < 1:
        raise MoELensError(f"expected a share above 0 and at most 1, and a sample of 1 or more; got {share}, {sample}")
    way = Attribution(target=TARGETS[named])
    [scores] = attribution(lens, examples, way, batch_size=batch_size, progress=progress)
    ranked = scores.sort_values("score", ascending=False, kind="stable", ignore_index=True)
    n_chosen = ceil(share * len(ranked))
    rest = np.random.default_rng(seed).permutation(np.arange(n_chosen, len(ranked)))[:sample]
    asked = ranked.iloc[[*range(n_chosen), *sorted(rest)]][["layer", "expert", "score"]]
    asked = asked.assign(chosen=[place < n_chosen for place in asked.index]).reset_index(drop=True)
    measured = single_expert_effects(
        lens, examples, mode=mode, metric=named, only=list(zip(asked["layer"], asked["expert"], strict=True)),
        batch_size=batch_size, out=out, progress=progress, seed=seed,
    )  # fmt: skip
    effects = measured.merge(asked, on=["layer", "expert"], how="left", validate="one_to_one")
    found = Screened(effects, len(ranked), recall(effects, len(ranked)), *recall_interval(effects, len(ranked)))
    write(str(found))
    return found


def recall(effects: pd.DataFrame, n_experts: int) -> float:
    """The share of the strongest eighth of all experts that is chosen; each of the sample stands for several others."""
    chosen = effects["chosen"].to_numpy()
    others = n_experts - int(chosen.sum())
    weight = np.where(chosen, 1.0, others / max(1, int((~chosen).sum())))
    order = np.argsort(-effects["effect"].to_numpy(), kind="stable")
    wanted = ceil(STRONGEST * n_experts)
    before = np.cumsum(weight[order]) - weight[order]
    counted = np.minimum(weight[order], np.maximum(0.0, wanted - before))
    return float(counted[chosen[order]].sum() / wanted)


def recall_interval(effects: pd.DataFrame, n_experts: int) -> tuple[float, float]:
    """The 95 % interval of `recall`: what the random sample leaves open about the experts that were not measured.

    The j-th strongest of the chosen is among the strongest `wanted` of all as long as at most wanted - j of the others
    are stronger; how many are is bounded by how many of the sample are, exactly: Clopper and Pearson's interval, for a
    sample without replacement. What is uncertain about the effects themselves is not in it.
    """
    chosen, value = effects["chosen"].to_numpy(), effects["effect"].to_numpy()
    wanted, others = ceil(STRONGEST * n_experts), n_experts - int(chosen.sum())
    sample, own = value[~chosen], np.sort(value[chosen])[::-1][:wanted]
    stronger = [_bounds(int((sample > one).sum()), len(sample), others) for one in own]
    reached = [[bound[end] <= wanted - place for place, bound in enumerate(stronger, 1)] for end in (1, 0)]
    low, high = (sum(one) / wanted for one in reached)
    return low, high


def _bounds(found: int, sample: int, others: int) -> tuple[int, int]:
    """The fewest and the most of all `others` that may be what `found` of a random sample of them are, 95 %."""
    if not others:
        return 0, 0
    counts = np.arange(others + 1)
    few, many = hypergeom.cdf(found, others, counts, sample), hypergeom.sf(found - 1, others, counts, sample)
    possible = counts[(few > 0.025) & (many > 0.025)]
    return int(possible[0]), int(possible[-1])
