"""How sure a mean or a difference of means is: bootstrap intervals and paired permutation tests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_lens.errors import MoELensError

CHUNK_CELLS = 1_000_000
"""Resampled values held at once; bounds memory at some tens of megabytes, does not change results."""


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
    values: Sequence[float] | np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of `values` [sample] with its percentile bootstrap interval over samples (Efron 1979).

    Raises MoELensError for no values, values that are not finite, or a level outside (0, 1).
    """
    sample = _vector(values)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            sample[rng.integers(0, sample.size, size=(rows, sample.size), dtype=np.int32)].mean(axis=1)
            for rows in chunks(resamples, sample.size)
        ]
    )
    return _interval(sample.mean(), means, level)


def seeds_interval(
    values: Sequence[Sequence[float]] | np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of `values` [seed, sample] with an interval that is uncertain about both seeds and samples.

    The same samples are answered under every seed (of a training, say), so each resample draws seeds and samples
    independently and takes the mean over the drawn ones (the pigeonhole bootstrap: Owen 2007). With one seed this is
    the interval over samples alone; with fewer than about five, that over seeds is a lower bound.
    Raises MoELensError for anything but a full table of finite numbers, or a level outside (0, 1).
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise MoELensError(f"expected finite numbers [seed, sample]; got shape {table.shape}")
    rng = np.random.default_rng(seed)
    n_seeds, n_samples = table.shape
    chosen = rng.integers(0, n_seeds, size=(resamples, n_seeds))
    means = np.concatenate(
        [(_counts(rng, rows, n_samples) @ table.T / n_samples) for rows in chunks(resamples, n_samples)]
    )  # [resample, seed]
    return _interval(table.mean(), np.take_along_axis(means, chosen, axis=1).mean(axis=1), level)


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


def _interval(mean: float, resampled: np.ndarray, level: float) -> Interval:
    """The mean with the quantiles of its resampled values [resample] that hold `level` between them."""
    if not 0 < level < 1:
        raise MoELensError(f"the level is a probability between 0 and 1; got {level}")
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(mean), float(low), float(high))


def _counts(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """How often each of n things is drawn in n draws with replacement, float64 [row, n]."""
    drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


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
