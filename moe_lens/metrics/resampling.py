"""How sure a mean or a difference of means is: intervals that are honest at the edges, paired permutation tests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta
from scipy.stats import t as student

from moe_lens.errors import MoELensError
from moe_lens.metrics.bounds import UNBOUNDED

CHUNK_CELLS = 1_000_000
"""Resampled values held at once; bounds memory at some tens of megabytes, does not change results."""

SUPPORTING = 5
"""Trainings that a claim about trainings needs at least."""


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval.

    >>> print(Interval(0.45, 0.412, 0.488))
    0.45 [0.41, 0.49]
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:z.2f} [{self.low:z.2f}, {self.high:z.2f}]"


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of `values` [sample] with its interval over samples, which is never of no width.

    bounds: the least and the most that any value can be, such as (0, 1) of a score or (-1, 1) of a difference of two;
        None for (0, 1) where all values are 0 or 1, else `UNBOUNDED`.

    Each end is that of a Bayesian bootstrap of the values and one more at that bound (Gaffke 2005): for values of 0 and
    1 exactly Clopper and Pearson's interval of a share, and about as sure as it says wherever it was tried
    (`analyses/benchmarks/coverage.py`). Without bounds it is the studentised bootstrap's (Efron 1979), which skewed
    values need, and nowhere narrower than Student's; its ends are NaN where the values tell nothing of their spread:
    all, or all but a few, are equal.

    Raises MoELensError for no values, values that are not finite or not within the bounds, or a level outside (0, 1).
    """
    sample = _vector(values)
    tail = _tail(level)
    least, most = bounds or bounds_of(sample)
    if (least, most) == UNBOUNDED:
        return Interval(float(sample.mean()), *_studentised(sample, tail, resamples, seed))
    if sample.min() < least - 1e-9 or sample.max() > most + 1e-9:
        raise MoELensError(f"expected values from {least:g} to {most:g}; got {sample.min():g} to {sample.max():g}")
    scaled = ((sample - least) / (most - least)).clip(0, 1)
    low, high = (least + (most - least) * end for end in _bounded(scaled, tail, resamples, seed))
    return Interval(float(sample.mean()), low, high)


def ratio_interval(
    above: np.ndarray, below: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The ends [...] of intervals of sum(above) / sum(below), a share of tokens, over examples.

    above: [example, ...], from 0 to below: [example]. As `bootstrap_interval` with bounds, an example counting by its
    tokens, and the one more at each bound having as many as the mean one.
    """
    tail = _tail(level)
    low, high = resampled_rates(above, below, resamples=resamples, seed=seed)
    return np.quantile(low, tail, axis=0), np.quantile(high, 1 - tail, axis=0)


def resampled_rates(
    above: np.ndarray, below: np.ndarray, *, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """sum(above) / sum(below) under the weights of a Bayesian bootstrap, [resample, ...], as in `ratio_interval`.

    Once with one more example whose rate is 0, and once with one whose rate is 1. Equal seeds draw equal weights.
    """
    n, more = len(below), below.mean()
    rng = np.random.default_rng(seed)
    low, high = [], []
    for rows in chunks(resamples, n):
        weights, own = rng.standard_exponential((rows, n)), rng.standard_exponential(rows) * more
        tokens, counts = weights @ below + own, weights @ above.reshape(n, -1)
        low.append(counts / tokens[:, None])
        high.append((counts + own[:, None]) / tokens[:, None])
    shape = (resamples, *above.shape[1:])
    return np.concatenate(low).reshape(shape), np.concatenate(high).reshape(shape)


def seeds_interval(
    values: Sequence[Sequence[float]] | np.ndarray,
    *,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of `values` [seed, sample] with an interval that is uncertain about both seeds and samples.

    The same samples are answered under every seed of a training (or under every one of some sets of experts). The reach
    of Student's interval over the seeds' means and that of `bootstrap_interval` over the samples' add up as the sides
    of a right angle do (MOVER: Zou and Donner 2008). With one seed it is the interval over samples alone, and says
    nothing of other seeds; with fewer than five it is wide, and supports no claim about trainings.
    Raises MoELensError for anything but a full table of finite numbers within the bounds, or a level outside (0, 1).
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise MoELensError(f"expected finite numbers [seed, sample]; got shape {table.shape}")
    bounds = bounds or bounds_of(table)
    over_samples = bootstrap_interval(table.mean(axis=0), bounds=bounds, level=level, resamples=resamples, seed=seed)
    if len(table) == 1:
        return over_samples
    mean, reach = over_samples.mean, mean_reach(table.mean(axis=1), level=level)
    low = mean - np.hypot(reach, mean - over_samples.low)
    high = mean + np.hypot(reach, over_samples.high - mean)
    return Interval(mean, max(low, bounds[0]), min(high, bounds[1]))


def drawn_means(
    values: Sequence[float] | np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> np.ndarray:
    """Draws [resample] of the mean of `values` [sample] without bounds, so that what is made of means has an interval.

    They are Student's, each half stretched to the end of `bootstrap_interval`, which are their quantiles. NaN where
    that has no ends.
    """
    interval, tail = bootstrap_interval(values, bounds=UNBOUNDED, level=level, seed=seed), _tail(level)
    if not np.isfinite([interval.low, interval.high]).all():
        return np.full(resamples, np.nan)
    away = np.random.default_rng(seed).standard_t(len(values) - 1, resamples)
    low, high = np.quantile(away, [tail, 1 - tail])
    below, above = (interval.low - interval.mean) / low, (interval.high - interval.mean) / high
    found: np.ndarray = interval.mean + away * np.where(away < 0, below, above)
    return found


def bounds_of(*samples: np.ndarray) -> tuple[float, float]:
    """Of values of which nothing else is said: those of a share where all are 0 or 1, else none."""
    return (0.0, 1.0) if all(np.isin(sample, (0, 1)).all() for sample in samples) else UNBOUNDED


def bounds_of_differences(*samples: np.ndarray) -> tuple[float, float]:
    """Of differences between such values."""
    return (-1.0, 1.0) if bounds_of(*samples) == (0, 1) else UNBOUNDED


def mean_reach(values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> float:
    """How far Student's interval reaches to both sides of the mean of `values` [seed]; NaN for a single one."""
    sample = _vector(values)
    if sample.size < 2:
        return float("nan")
    quantile = student.ppf(1 - _tail(level), sample.size - 1)
    return float(quantile * sample.std(ddof=1) / np.sqrt(sample.size))


def paired_permutation_p(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of mean(a) = mean(b) for paired samples `a`, `b` [sample].

    Under the null each pair may be swapped, so the signs of the differences are drawn at random. The
    observed order counts as one draw, (1 + count) / (1 + permutations): no p-value is ever 0
    (Phipson and Smyth 2010).
    Raises MoELensError for different lengths, no values, or values that are not finite.
    """
    first, second = _vector(a), _vector(b)
    if first.size != second.size:
        raise MoELensError(f"paired samples must be equally many; got {first.size} and {second.size}")
    return float(permutation_p_values((first - second)[:, None], permutations=permutations, seed=seed)[0])


def permutation_p_values(differences: np.ndarray, *, permutations: int | None = None, seed: int = 0) -> np.ndarray:
    """The p-values [test] of `paired_permutation_p` for many tests on the same pairs: differences [sample, test].

    permutations: by default 10,000, or 100 for every test if that is more. The smallest p-value is about their
        inverse, and a correction for n tests multiplies it by up to n: with fewer, a single real effect among many
        tests could never show.
    Raises MoELensError for anything but a full table of finite numbers.
    """
    table = np.asarray(differences, dtype=np.float64)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise MoELensError(f"expected finite differences [sample, test]; got shape {table.shape}")
    samples, tests = table.shape
    permutations = permutations or max(10_000, 100 * tests)
    total = table.sum(axis=0)
    least = np.abs(total) - 1e-9 * np.abs(table).sum(axis=0)  # equal up to rounding counts as reached
    rng = np.random.default_rng(seed)
    reached = np.zeros(tests, dtype=np.int64)
    for rows in chunks(permutations, max(samples, tests)):
        bits = rng.integers(0, 256, size=(rows, -(-samples // 8)), dtype=np.uint8)
        kept = np.unpackbits(bits, axis=1, count=samples).astype(np.float64)
        reached += np.count_nonzero(np.abs(2 * (kept @ table) - total) >= least, axis=0)
    return (1 + reached) / (1 + permutations)


def _tail(level: float) -> float:
    """The probability left out on each side."""
    if not 0 < level < 1:
        raise MoELensError(f"the level is a probability between 0 and 1; got {level}")
    return (1 - level) / 2


def _bounded(sample: np.ndarray, tail: float, resamples: int, seed: int) -> tuple[float, float]:
    """The interval of the mean of values in [0, 1]: by the beta distribution where all are 0 or 1, else by resampling.

    Equal values share one weight, so that few different ones, as of paired 0 and 1, take no time.
    """
    values, counts = np.unique(sample, return_counts=True)
    if np.isin(values, (0, 1)).all():
        ones, n = int(sample.sum()), sample.size
        low = beta.ppf(tail, ones, n - ones + 1) if ones else 0.0
        return float(low), float(beta.ppf(1 - tail, ones + 1, n - ones)) if ones < n else 1.0
    rng = np.random.default_rng(seed)
    low_means, high_means = [], []
    for rows in chunks(resamples, values.size):
        weights = rng.standard_gamma(counts, size=(rows, values.size))
        own = rng.standard_exponential(rows)
        total = weights.sum(1) + own
        low_means.append(weights @ values / total)
        high_means.append((weights @ values + own) / total)
    low, high = np.quantile(np.concatenate(low_means), tail), np.quantile(np.concatenate(high_means), 1 - tail)
    return float(low), float(high)


def _studentised(sample: np.ndarray, tail: float, resamples: int, seed: int) -> tuple[float, float]:
    """The ends of the studentised bootstrap's interval, or Student's where that reaches further.

    Where resamples have no spread too often to know them it is Student's for a few unlike values, and NaN for others.
    """
    n, deviation = sample.size, float(sample.std(ddof=1)) if sample.size > 1 else 0.0
    if deviation <= 1e-12 * np.abs(sample).max():
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    found = []
    for rows in chunks(resamples, n):
        drawn = sample[rng.integers(0, n, size=(rows, n), dtype=np.int32)]
        above, spread = drawn.mean(axis=1) - sample.mean(), drawn.std(axis=1, ddof=1)
        flat = spread <= 1e-12 * deviation
        found.append(np.where(flat, np.copysign(np.inf, above), above / np.where(flat, 1, spread)))
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail], method="inverted_cdf")
    at_least = student.ppf(1 - tail, n - 1) / np.sqrt(n)
    unknown = at_least if np.unique(sample).size == n else np.nan
    below, above = (deviation * (max(end, at_least) if np.isfinite(end) else unknown) for end in (high, -low))
    return float(sample.mean() - below), float(sample.mean() + above)


def _vector(values: Sequence[float] | np.ndarray) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0 or not np.isfinite(vector).all():
        raise MoELensError(f"expected finite numbers, one per sample; got shape {vector.shape}: {vector}")
    return vector


def chunks(rows: int, width: int) -> Iterator[int]:
    """Numbers of rows, summing to `rows`, of at most `CHUNK_CELLS` cells each."""
    step = max(1, CHUNK_CELLS // width)
    for done in range(0, rows, step):
        yield min(step, rows - done)
