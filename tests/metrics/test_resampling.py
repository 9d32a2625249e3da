"""Bootstrap and permutation: against exact enumeration, against theory, and in time."""

import itertools
import time

import numpy as np
import pytest

from moe_lens.errors import MoELensError
from moe_lens.metrics import Interval, bootstrap_interval, paired_permutation_p, resampling

COINS = np.random.default_rng(3).random(1000) < 0.45


def exact_p(differences) -> float:
    """The two-sided sign-flip p-value over all 2^n assignments."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(differences))
    ]
    return sum(total >= observed - 1e-12 for total in sums) / len(sums)


def test_an_interval_prints_as_mean_and_ends():
    assert str(Interval(0.45, 0.412, 0.488)) == "0.45 [0.41, 0.49]"
    assert str(Interval(-0.001, -0.2, 0.0)) == "0.00 [-0.20, 0.00]"


def test_bootstrap_of_two_values_has_the_three_means_it_can_have():
    assert bootstrap_interval([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == Interval(0.5, 0.5, 0.5)
    assert bootstrap_interval([0.3]) == Interval(0.3, 0.3, 0.3)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bootstrap_of_many_values_agrees_with_the_normal_approximation(level):
    interval = bootstrap_interval(COINS, level=level)
    z = {0.8: 1.2816, 0.95: 1.96}[level]
    half = z * COINS.std() / np.sqrt(COINS.size)
    assert interval.mean == pytest.approx(COINS.mean())
    assert interval.low == pytest.approx(COINS.mean() - half, abs=0.002)
    assert interval.high == pytest.approx(COINS.mean() + half, abs=0.002)


@pytest.mark.parametrize(
    "differences",
    [[1] * 5, [1, 1, 1, -1, 0, 0], [0.3, -0.1, 0.2, 0.25, 0.05, 0.4, -0.2], [0, 0, 0], [0.1] * 8 + [-0.8]],
)
def test_permutation_p_agrees_with_the_exact_enumeration(differences):
    p = paired_permutation_p(differences, np.zeros(len(differences)), permutations=40_000)
    assert p == pytest.approx(exact_p(differences), abs=0.01)


def test_permutation_p_counts_the_observed_order_and_is_two_sided():
    better, worse = np.ones(60), np.zeros(60)
    assert paired_permutation_p(better, worse, permutations=999) == 1 / 1000
    assert paired_permutation_p(worse, better, permutations=999) == 1 / 1000
    assert paired_permutation_p(better, better) == 1.0


def test_permutation_p_uses_the_pairing():
    base = np.random.default_rng(0).normal(0, 100, size=50)
    assert paired_permutation_p(base + 1, base) < 0.001


def test_results_depend_on_the_seed_only_and_not_on_the_chunks(monkeypatch):
    a, b = COINS.astype(float), np.roll(COINS, 1).astype(float)
    whole = bootstrap_interval(a, resamples=500, seed=4), paired_permutation_p(a, b, permutations=500, seed=4)
    assert bootstrap_interval(a, resamples=500, seed=5) != whole[0]
    monkeypatch.setattr(resampling, "CHUNK_CELLS", 7_000)
    assert bootstrap_interval(a, resamples=500, seed=4) == whole[0]
    assert paired_permutation_p(a, b, permutations=500, seed=4) == whole[1]


def test_ten_thousand_resamples_of_a_thousand_values_take_under_a_second():
    start = time.perf_counter()
    bootstrap_interval(COINS)
    paired_permutation_p(COINS, ~COINS)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_values_that_have_no_mean_are_refused(values):
    with pytest.raises(MoELensError, match="finite numbers"):
        bootstrap_interval(values)
    with pytest.raises(MoELensError, match="finite numbers"):
        paired_permutation_p(values, values)


def test_unequal_pairs_and_senseless_levels_are_refused():
    with pytest.raises(MoELensError, match="got 2 and 3"):
        paired_permutation_p([1, 2], [1, 2, 3])
    with pytest.raises(MoELensError, match="got 95"):
        bootstrap_interval([1.0], level=95)
