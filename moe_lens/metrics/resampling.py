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
    if not 0 < level < 1:
        raise MoELensError(f"the level is a probability between 0 and 1; got {level}")
    rng = np.random.default_rng(seed)
    means = np.concatenate([
        sample[rng.integers(0, sample.size, size=(rows, sample.size), dtype=np.int32)].mean(axis=1)
        for rows in _chunks(resamples, sample.size)
    ])
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(sample.mean()), float(low), float(high))


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
    differences = first - second
    observed = abs(differences.sum())
    rounding = 1e-9 * np.abs(differences).sum()
    rng = np.random.default_rng(seed)
    count = 0
    for rows in _chunks(permutations, differences.size):
        bits = rng.integers(0, 256, size=(rows, -(-differences.size // 8)), dtype=np.uint8)
        kept = np.unpackbits(bits, axis=1, count=differences.size).astype(np.float64)
        sums = 2 * (kept @ differences) - differences.sum()
        count += int(np.count_nonzero(np.abs(sums) >= observed - rounding))
    return (1 + count) / (1 + permutations)


def _vector(values: Sequence[float] | np.ndarray) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0 or not np.isfinite(vector).all():
        raise MoELensError(f"expected finite numbers, one per sample; got shape {vector.shape}: {vector}")
    return vector


def _chunks(rows: int, width: int) -> Iterator[int]:
    """Numbers of rows, summing to `rows`, of at most `CHUNK_CELLS` cells each."""
    step = max(1, CHUNK_CELLS // width)
    for done in range(0, rows, step):
        yield min(step, rows - done)
