"""Numbers that examples have, group by group of a table: their means, and how the means of two models differ."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_lens.metrics.bounds import Bounds
from moe_lens.metrics.gains import pair
from moe_lens.metrics.resampling import bootstrap_interval


def example_means(
    table: pd.DataFrame,
    *,
    value: str,
    by: Sequence[str],
    bounds: Bounds = (0, 1),
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per group of `by`: its columns, n (examples), the mean of `value` with its 95 % interval in _low, _high.

    table: a row per example and group; the value lies within the bounds, but for rounding.
    """
    rows = []
    for group, part in table.groupby(list(by), sort=True):
        values = part[value].to_numpy(np.float64).clip(*bounds)
        interval = bootstrap_interval(values, bounds=bounds, resamples=resamples, seed=seed)
        row = dict(zip(by, group, strict=True)) | {"n": len(part)}
        rows.append(row | {value: interval.mean, f"{value}_low": interval.low, f"{value}_high": interval.high})
    return pd.DataFrame(rows)


def paired_difference(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    value: str,
    by: Sequence[str],
    bounds: Bounds = (0, 1),
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per group of `by`: its columns, n, first and second (means of `value`), difference and its interval.

    first, second: as `example_means` takes them, two models' of the same examples. difference: second minus first, its
        95 % interval over examples in difference_low and _high.
    Raises MoELensError for examples or groups that only one of the tables has.
    """
    rows, reach = [], bounds[1] - bounds[0]
    paired = pair(first, second, value=value, by=by, least=bounds[0])
    for group, part in paired.groupby(list(by), sort=True):
        before, after = (part[f"{value}_{model}"].to_numpy(np.float64).clip(*bounds) for model in ("base", "tuned"))
        interval = bootstrap_interval(after - before, bounds=(-reach, reach), resamples=resamples, seed=seed)
        row = dict(zip(by, group, strict=True)) | {"n": len(part), "first": before.mean(), "second": after.mean()}
        row |= {"difference": interval.mean, "difference_low": interval.low, "difference_high": interval.high}
        rows.append(row)
    return pd.DataFrame(rows)
