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
from moe_lens.metrics import metrics_named
from moe_lens.metrics.catalogue import OF_MEMORY, Metric, Named
from moe_lens.metrics.resampling import bounds_of, chunks, drawn_means

THRESHOLD = 1 / 3
"""The most that the worst spared task may lose, as a part of what the target loses."""
RESAMPLES = 10_000
SHARE, DROP = "share", "drop"
"""The measures of what is lost: as a share of the unmasked score, or as the difference to it."""
NO_VERDICT = dict.fromkeys(OF_MEMORY, "it counts answers from memory, of which a mask of an ability makes more")
"""The metrics on which selectivity has no meaning, and why."""
COPIED = ("intervention", "set", "family", "mode", "strength", "positions", "steps", "measured_on")
RANDOM = ("below_random", "below_random_low", "below_random_high", "random_p")


@dataclass(frozen=True)
class Lost:
    """What an intervention costs of a task's score; low, high: under every resampling."""

    effect: float
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def share(cls, unmasked: np.ndarray, masked: np.ndarray, *, seed: Sequence[int]) -> "Lost":
        """The share of a score, of paired ones in [0, 1], [example]: 1 - sum(masked) / sum(unmasked).

        With its Bayesian bootstrap over examples; as in `bootstrap_interval` one more example stands at each end: wrong
        before and right after for the low end, right before and wrong after for the high one. So an interval has a
        width where no example changed.
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

    @classmethod
    def drop(cls, unmasked: np.ndarray, masked: np.ndarray, *, seed: Sequence[int]) -> "Lost":
        """How much lower the mean of paired scores without bounds, [example], is, in their own unit."""
        one = int(np.random.default_rng(seed).integers(2**31))
        drawn = drawn_means(unmasked - masked, resamples=RESAMPLES, seed=one)
        return cls(float((unmasked - masked).mean()), drawn, drawn)

    def interval(self) -> tuple[float, float]:
        """The ends of its 95 % interval."""
        return float(np.quantile(self.low, 0.025)), float(np.quantile(self.high, 0.975))


def selectivity(
    answers: pd.DataFrame,
    rows: pd.DataFrame,
    *,
    targets: Sequence[str],
    spared: Sequence[str],
    metric: Named = "em",
    summary: pd.DataFrame | None = None,
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per intervention that is no control, and task, with what it costs there and how selective it is.

    answers, rows: of several tasks, as `joined` gives them. targets: the tasks of the one ability that is to be hit.
    spared: those that are not. metric: by which it is judged, higher being better; of another than EM `summary`, too.
    Of a metric from 0 to a bound what is lost is the "share" of the unmasked score; of one without bounds, such as a
    log-probability, whose 0 means nothing, it is the "drop" of the mean in the metric's own unit, in which tasks are
    compared. Examples without the score, masked or not, are left out.

    Columns: those that say which intervention; metric; measure, "share" or "drop"; task; role, "target" or "spared"; n;
    unmasked and score, the mean score; effect, what is lost, with _low and _high; those of `against_random`; and of the
    whole intervention ratio, the worst spared effect over the weakest target's, with _low and _high; worst, that
    spared task; and verdict:

    - "selective": every target's effect is above the random sets' (its interval over sets and examples is above 0)
      and the ratio with its whole interval is at most `threshold`;
    - "selective, not certain": the same, but the interval of the ratio goes beyond, or is not known;
    - "not selective": the ratio is above it; "as random sets": a target's effect is not above theirs;
    - "no random sets" to compare with; "nothing to lose": a share of an unmasked score of 0.

    Raises MoELensError for a metric that has no meaning here, and for a task without any example that has it.
    """
    _check_tasks(answers, targets, spared)
    [judged] = check_judged([metric])
    compared = _compared(rows, summary, judged.name)
    measure, most = _measure(judged, answers[judged.name])
    places = answers.groupby(["task", "intervention"]).cumcount()  # each is answered in the same order
    whole = {
        task: part.pivot(index="place", columns="intervention", values=judged.name)
        for task, part in answers.assign(place=places).groupby("task")
    }
    measured = Lost.share if measure == SHARE else Lost.drop
    chosen = compared[~compared["family"].isin([CONTROL, MEAN, UNMASKED])]
    found = []
    for name in dict.fromkeys(chosen["intervention"]):
        own = chosen[chosen["intervention"] == name].set_index("task")
        scores = {task: _paired(whole[task], name, task, judged.name) for task in (*targets, *spared)}
        lost = {
            task: measured(pair[UNMASKED].to_numpy() / most, pair[name].to_numpy() / most, seed=(seed, place))
            for place, (task, pair) in enumerate(scores.items())
        }
        verdict = _verdict(lost, own, targets, spared, threshold)
        for task, one in lost.items():
            about = {column: own.loc[task, column] for column in COPIED if column in own}
            about |= {"metric": judged.name, "measure": measure, "task": task}
            about |= {"role": "target" if task in targets else "spared", "n": len(scores[task])}
            about |= {"unmasked": scores[task][UNMASKED].mean(), "score": scores[task][name].mean()}
            about |= dict(zip(("effect", "effect_low", "effect_high"), (one.effect, *one.interval()), strict=True))
            found.append(about | {column: own.loc[task].get(column, np.nan) for column in RANDOM} | verdict)
    return pd.DataFrame(found)


def check_judged(metrics: Sequence[Named]) -> list[Metric]:
    """The metrics; MoELensError, naming it, for one on which a verdict of selectivity has no meaning."""
    found = metrics_named(metrics)
    for metric in found:
        if metric.name in NO_VERDICT:
            raise MoELensError(
                f"there is no verdict of selectivity on {metric.name}: {NO_VERDICT[metric.name]}; leave it out of "
                "--metrics, it stands in the tables anyway, or leave --spare out"
            )
    return found


def _measure(metric: Metric, scores: pd.Series) -> tuple[str, float]:
    """How what is lost of a metric is measured, and the most that a score can be, 1 where there is no bound."""
    least, most = metric.bounds or bounds_of(scores.dropna().to_numpy())
    return (SHARE, most) if least == 0 and np.isfinite(most) else (DROP, 1.0)


def _compared(rows: pd.DataFrame, summary: pd.DataFrame | None, metric: str) -> pd.DataFrame:
    """The rows with the comparison of a metric with random sets: for EM their own, else the summary's."""
    if metric == "em":
        return rows
    own = pd.DataFrame() if summary is None else summary[summary["metric"] == metric]
    if own.empty:
        raise MoELensError(f"a verdict on {metric} needs the summary of it; run the masks with metrics=[{metric!r}]")
    known = [name for name in RANDOM if name in own]
    bare = rows.drop(columns=[name for name in RANDOM if name in rows])
    return bare.merge(own[["task", "intervention", *known]], on=["task", "intervention"], how="left")


def _paired(scores: pd.DataFrame, name: str, task: str, metric: str) -> pd.DataFrame:
    """The scores of a task's examples that have one unmasked and under an intervention."""
    found = scores[[UNMASKED, name]].dropna()
    if found.empty:
        raise MoELensError(f"no example of {task} has a {metric}, so nothing can be said of what is lost there")
    return found


def _verdict(
    lost: Mapping[str, Lost], rows: pd.DataFrame, targets: Sequence[str], spared: Sequence[str], threshold: float
) -> dict[str, Any]:
    """The ratio, its interval, the worst spared task and the verdict of one intervention."""
    nothing = {"ratio": np.nan, "ratio_low": np.nan, "ratio_high": np.nan, "worst": None}
    if any(np.isnan(one.effect) for one in lost.values()):
        return nothing | {"verdict": "nothing to lose"}
    worst = max(spared, key=lambda task: lost[task].effect)
    hit = min(lost[task].effect for task in targets)
    ratio = lost[worst].effect / hit if hit > 0 else np.nan
    low = _over(np.max([lost[task].low for task in spared], 0), np.min([lost[task].high for task in targets], 0))
    high = _over(np.max([lost[task].high for task in spared], 0), np.min([lost[task].low for task in targets], 0))
    ends = np.quantile(low, 0.025, method="lower"), np.quantile(high, 0.975, method="higher")
    told = {"ratio": ratio, "ratio_low": float(ends[0]), "ratio_high": float(ends[1])} if hit > 0 else nothing
    verdict = _word(rows.loc[list(targets)], ratio, float(ends[1]), threshold)
    return told | {"worst": worst, "verdict": verdict}


def _word(targets: pd.DataFrame, ratio: float, high: float, threshold: float) -> str:
    """The verdict where there is something to lose; targets: their rows; high: the ratio's upper end."""
    above = targets.reindex(columns=["below_random", "below_random_low"])
    if above["below_random"].isna().any():
        return "no random sets"
    if not (above["below_random_low"] > 0).all() or np.isnan(ratio):
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
