"""Selectivity: whether an intervention costs one ability and spares others, as a matrix of interventions and tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.causal.evaluation import UNMASKED
from moe_lens.choosing.controls import CONTROL
from moe_lens.choosing.masking import MEAN
from moe_lens.errors import MoELensError
from moe_lens.metrics.resampling import chunks

THRESHOLD = 1 / 3
"""The most that the worst spared task may lose, as a part of what the target loses."""
RESAMPLES = 10_000
COPIED = ("intervention", "set", "family", "mode", "strength", "positions", "steps", "measured_on")
RANDOM = ("below_random", "below_random_low", "below_random_high", "random_p")


@dataclass(frozen=True)
class Lost:
    """The share of a task's unmasked score that an intervention costs; low, high: under every resampling."""

    share: float
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, unmasked: np.ndarray, masked: np.ndarray, *, seed: Sequence[int]) -> "Lost":
        """Of paired scores [example]: 1 - sum(masked) / sum(unmasked), with its Bayesian bootstrap over examples.

        As in `bootstrap_interval` one more example stands at each end: wrong before and right after for the low end,
        right before and wrong after for the high one. So an interval has a width where no example changed.
        """
        if not unmasked.sum():
            nothing = np.full(RESAMPLES, np.nan)
            return cls(float("nan"), nothing, nothing)
        rng = np.random.default_rng(seed)
        low, high = [], []
        for rows in chunks(RESAMPLES, len(unmasked)):
            weights, own = rng.standard_exponential((rows, len(unmasked))), rng.standard_exponential(rows)
            lost, whole = weights @ (unmasked - masked), weights @ unmasked
            low.append((lost - own) / whole)
            high.append((lost + own) / (whole + own))
        return cls(float(1 - masked.sum() / unmasked.sum()), np.concatenate(low), np.concatenate(high))

    def interval(self) -> tuple[float, float]:
        """The ends of its 95 % interval."""
        return float(np.quantile(self.low, 0.025)), float(np.quantile(self.high, 0.975))


def selectivity(
    answers: pd.DataFrame,
    rows: pd.DataFrame,
    *,
    targets: Sequence[str],
    spared: Sequence[str],
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per intervention that is no control, and task, with what it costs there and how selective it is.

    answers, rows: of several tasks, as `joined` gives them. targets: the tasks of the one ability that is to be hit.
    spared: those that are not.

    Columns: those that say which intervention; task; role, "target" or "spared"; unmasked and score, the mean EM;
    effect, the share of the unmasked score that is lost, with _low and _high; those of `against_random`; and of the
    whole intervention ratio, the worst spared effect over the weakest target's, with _low and _high; worst, that
    spared task; and verdict:

    - "selective": every target's effect is above the random sets' (its interval over sets and examples is above 0)
      and the ratio with its whole interval is at most `threshold`;
    - "selective, not certain": the same, but the interval of the ratio goes beyond;
    - "not selective": the ratio is above it; "as random sets": a target's effect is not above theirs;
    - "no random sets" to compare with; "nothing to lose": the unmasked score of a task is 0.
    """
    _check_tasks(answers, targets, spared)
    places = answers.groupby(["task", "intervention"]).cumcount()  # each is answered in the same order
    whole = {
        task: part.pivot(index="place", columns="intervention", values="em")
        for task, part in answers.assign(place=places).groupby("task")
    }
    chosen = rows[~rows["family"].isin([CONTROL, MEAN, UNMASKED])]
    found = []
    for name in dict.fromkeys(chosen["intervention"]):
        own = chosen[chosen["intervention"] == name].set_index("task")
        lost = {
            task: Lost.of(whole[task][UNMASKED].to_numpy(), whole[task][name].to_numpy(), seed=(seed, place))
            for place, task in enumerate((*targets, *spared))
        }
        verdict = _verdict(lost, own, targets, spared, threshold)
        for task, one in lost.items():
            row = own.loc[task]
            low, high = one.interval()
            about = {column: row[column] for column in COPIED if column in row}
            about |= {"task": task, "role": "target" if task in targets else "spared"}
            scores = whole[task]
            about |= {"n": len(scores), "unmasked": scores[UNMASKED].mean(), "score": scores[name].mean()}
            about |= {"effect": one.share, "effect_low": low, "effect_high": high}
            found.append(about | {column: row.get(column, np.nan) for column in RANDOM} | verdict)
    return pd.DataFrame(found)


def _verdict(
    lost: Mapping[str, Lost], rows: pd.DataFrame, targets: Sequence[str], spared: Sequence[str], threshold: float
) -> dict[str, Any]:
    """The ratio, its interval, the worst spared task and the verdict of one intervention."""
    nothing = {"ratio": np.nan, "ratio_low": np.nan, "ratio_high": np.nan, "worst": None}
    if any(np.isnan(one.share) for one in lost.values()):
        return nothing | {"verdict": "nothing to lose"}
    worst = max(spared, key=lambda task: lost[task].share)
    hit = min(lost[task].share for task in targets)
    ratio = lost[worst].share / hit if hit > 0 else np.nan
    low = _over(np.max([lost[task].low for task in spared], 0), np.min([lost[task].high for task in targets], 0))
    high = _over(np.max([lost[task].high for task in spared], 0), np.min([lost[task].low for task in targets], 0))
    ends = np.quantile(low, 0.025, method="lower"), np.quantile(high, 0.975, method="higher")
    told = {"ratio": ratio, "ratio_low": float(ends[0]), "ratio_high": float(ends[1])} if hit > 0 else nothing
    verdict = _word(rows.loc[list(targets)], ratio, float(ends[1]), threshold)
    return told | {"worst": worst, "verdict": verdict}


def _word(targets: pd.DataFrame, ratio: float, high: float, threshold: float) -> str:
    """The verdict where there is something to lose; targets: their rows; high: the ratio's upper end."""
    above = targets.reindex(columns=["below_random_low"])["below_random_low"]
    if above.isna().any():
        return "no random sets"
    if (above <= 0).any() or np.isnan(ratio):
        return "as random sets"
    if ratio > threshold:
        return "not selective"
    return "selective" if high <= threshold else "selective, not certain"


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Ratios of effects; endless where the target may have lost nothing."""
    found: np.ndarray = np.divide(above, below, out=np.full_like(above, np.inf), where=below > 0)
    return found


def _check_tasks(answers: pd.DataFrame, targets: Sequence[str], spared: Sequence[str]) -> None:
    """MoELensError unless each task is on one side, both have one, and all are answered."""
    both = [task for task in targets if task in spared]
    missing = [task for task in (*targets, *spared) if task not in set(answers["task"])]
    if both or missing or not targets or not spared:
        raise MoELensError(
            f"expected targets and spared tasks of their own, all answered; got targets {list(targets)}, spared "
            f"{list(spared)}, answered {sorted(set(answers['task']))}"
        )
