"""How large a paired difference is, how sure, and what is left of it when many are tested at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control

from moe_lens.errors import MoELensError
from moe_lens.metrics.resampling import Interval, bootstrap_interval, bounds_of_differences, paired_permutation_p


@dataclass(frozen=True)
class Comparison:
    """What `compare` found about two paired samples a and b.

    difference: mean(a) - mean(b) with its interval; for scores of 0 or 1 this is the risk difference.
    cohens_d: the difference in standard deviations of the paired differences. p: of the paired permutation test.
    """

    difference: Interval
    cohens_d: float
    p: float


def compare(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    bounds: tuple[float, float] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """The difference of the paired samples `a`, `b` [sample]: its interval, effect size and p-value.

    bounds: of the difference; None for (-1, 1) where all values are 0 or 1, else `UNBOUNDED`. See `bootstrap_interval`.
    resamples: of the bootstrap and of the permutation test.
    Raises MoELensError for different lengths, no values, or values that are not finite.
    """
    p = paired_permutation_p(a, b, permutations=resamples, seed=seed)
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    bounds = bounds or bounds_of_differences(np.asarray(a), np.asarray(b))
    interval = bootstrap_interval(differences, bounds=bounds, resamples=resamples, seed=seed)
    return Comparison(interval, cohens_d(differences), p)


def cohens_d(differences: Sequence[float] | np.ndarray) -> float:
    """The mean of paired differences [sample] over their standard deviation (n - 1): Cohen's d for pairs, d_z.

    0 where all are 0; NaN for a single pair, and where all are the same but not 0, whose d has no bound.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if not differences.any():
        return 0.0
    if differences.size < 2 or np.ptp(differences) == 0:
        return float("nan")
    return float(differences.mean() / differences.std(ddof=1))


def benjamini_hochberg(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """q-values [test]: calling all tests with q <= x holds the expected share of false ones among them below x.

    Benjamini and Hochberg (1995), for tests that are independent or positively dependent.
    """
    q: np.ndarray = false_discovery_control(_checked(p_values), method="bh")
    return q


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjusted p-values [test]: calling all tests with one <= x holds the chance of any false one below x.

    Holm (1979), whatever the dependence between the tests.

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    p = _checked(p_values)
    order = np.argsort(p, kind="stable")
    rising = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(rising, 1)
    return adjusted


def _checked(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or p.size == 0 or not ((p >= 0) & (p <= 1)).all():
        raise MoELensError(f"expected one or more p-values between 0 and 1; got {p_values!r}")
    return p
