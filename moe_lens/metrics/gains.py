"""CAG, AAG and APG: relative gains of one model over another on the same examples (Eqs. 11 and 12)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binom

from moe_lens.errors import MoELensError
from moe_lens.metrics.bounds import UNBOUNDED
from moe_lens.metrics.resampling import Interval, bootstrap_interval


def attention_gain(base: pd.DataFrame, tuned: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """CAG (target "context") and AAG (target "answer") per layer and step: Eq. 11, with the columns of `paired_gain`.

    base, tuned: what `AttentionMass.table` or `.head_table` gave for each model on the same examples; of a table with
    heads the gain is given per head.
    """
    by = [name for name in ("layer", "step", "target", "head") if name in base.columns]
    return paired_gain(base, tuned, value="mass", by=by, resamples=resamples, seed=seed)


def answer_probability_gain(
    base: pd.DataFrame, tuned: pd.DataFrame, *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """APG per layer, of the answer's first token and of all jointly: Eq. 12, with the columns of `paired_gain`.

    base, tuned: what `AnswerProbability.table` gave for each model on the same examples.
    """
    return paired_gain(base, tuned, value="probability", by=["layer", "tokens"], resamples=resamples, seed=seed)


def paired_gain(
    base: pd.DataFrame, tuned: pd.DataFrame, *, value: str, by: Sequence[str], resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One row per group of `by`: how far `value` is higher in `tuned` than in `base`, relative to `base`.

    base, tuned: columns `by`, id and `value`, one row per group and example, the same in both.

    n: examples. base, tuned: means of the value. gain: the mean over examples of (tuned - base) / base, as in Eqs. 11
    and 12. One tiny denominator can rule that mean, so beside it stand median, of the same ratios, and ratio_of_means,
    (mean tuned - mean base) / mean base. Each has its 95 % interval over examples in _low and _high, NaN where too few
    or equal values tell no spread: the studentised bootstrap's, for the median that of order statistics.
    undefined: examples whose base value is 0; they have no ratio and count in ratio_of_means only.

    Raises MoELensError for examples or groups that only one of the tables has, or values below 0 or not finite.
    """
    paired = pair(base, tuned, value=value, by=by)
    rows = []
    for group, part in paired.groupby(list(by), sort=True):
        before, after = (part[f"{value}_{model}"].to_numpy(np.float64) for model in ("base", "tuned"))
        row: dict[str, float] = dict(zip(by, group, strict=True))
        row |= {"n": len(part), "undefined": int((before == 0).sum()), "base": before.mean(), "tuned": after.mean()}
        row |= _with_intervals(before, after, resamples=resamples, seed=seed)
        rows.append(row)
    return pd.DataFrame(rows)


def ratio_of_means(above: np.ndarray, below: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """mean(above) / mean(below) of paired values [sample], with its 95 % interval over samples.

    The interval is `bootstrap_interval`'s of what each sample moves the ratio to, to first order: for a mean below that
    is far from 0 against its own uncertainty. Its ends are NaN where the values tell no spread.
    """
    ratio = above.mean() / below.mean()
    moved = ratio + (above - ratio * below) / below.mean()
    return bootstrap_interval(moved, bounds=UNBOUNDED, resamples=resamples, seed=seed)


def pair(
    first: pd.DataFrame, second: pd.DataFrame, *, value: str, by: Sequence[str], least: float = 0.0
) -> pd.DataFrame:
    """Two models' tables side by side: columns `by`, id, `value`_base, `value`_tuned. least: what no value is below.

    Raises MoELensError for examples or groups that only one of the tables has, that repeat, or for bad values.
    """
    keys = [*by, "id"]
    for name, table in (("base", first), ("tuned", second)):
        if missing := [column for column in (*keys, value) if column not in table.columns]:
            raise MoELensError(f"the {name} model's table has no {', '.join(missing)}; it has {list(table.columns)}")
        if table.duplicated(keys).any():
            raise MoELensError(f"an example's id repeats in the table of the {name} model; give each one of its own")
        values = table[value].to_numpy(np.float64)
        if not (np.isfinite(values) & (values >= least - 1e-6)).all():
            raise MoELensError(f"{value!r} must be finite and at least {least:g} to be compared")
    both = first[[*keys, value]].merge(second[[*keys, value]], on=keys, suffixes=("_base", "_tuned"))
    if not len(both) == len(first) == len(second):
        raise MoELensError(
            f"expected the same examples and layers in both tables; got {len(first)} and {len(second)} rows, "
            f"{len(both)} shared: measure both models on the same examples with the same settings"
        )
    return both


def _with_intervals(before: np.ndarray, after: np.ndarray, *, resamples: int, seed: int) -> dict[str, float]:
    """The three gains of one group [sample] with the ends of their intervals; NaN where undefined."""
    nan = float("nan")
    row = {f"{name}{end}": nan for name in ("gain", "median", "ratio_of_means") for end in ("", "_low", "_high")}
    defined = before != 0
    if not defined.any():
        return row
    ratios = (after[defined] - before[defined]) / before[defined]
    gain = bootstrap_interval(ratios, bounds=UNBOUNDED, resamples=resamples, seed=seed)
    ratio = ratio_of_means(after - before, before, resamples=resamples, seed=seed)
    for name, found in (("gain", gain), ("ratio_of_means", ratio)):
        row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    low, high = _median_interval(ratios)
    return row | {"median": float(np.median(ratios)), "median_low": low, "median_high": high}


def _median_interval(values: np.ndarray) -> tuple[float, float]:
    """Two order statistics that hold the median with a probability of at least 95 %; NaN for less than six values."""
    ordered, n = np.sort(values), len(values)
    outside = int(binom.ppf(0.025, n, 0.5))  # P(Bin <= outside - 1) < 0.025
    return (float(ordered[outside - 1]), float(ordered[n - outside])) if outside else (float("nan"), float("nan"))
