"""Bootstrap and permutation: against exact enumeration, against theory, and in time."""

import itertools
import time

import numpy as np
import pytest

from moe_lens.errors import MoELensError
from moe_lens.metrics import UNBOUNDED, Interval, bootstrap_interval, paired_permutation_p, ratio_interval, resampling
from moe_lens.metrics.resampling import drawn_means

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


@pytest.mark.parametrize(
    ("ones", "n", "low", "high"),
    [(0, 200, 0, 0.0182754), (50, 50, 0.9288783, 1), (8, 10, 0.4439045, 0.9747893), (1, 50, 0.0005063, 0.1064695)],
)
def test_the_interval_of_a_share_is_clopper_and_pearsons(ones, n, low, high):
    """Against R's binom.test, to seven digits; the interval of a share of 0 or 1 is not a point."""
    found = bootstrap_interval(np.arange(n) < ones)
    assert found == bootstrap_interval(np.arange(n) < ones, bounds=(0, 1))
    assert found.mean == ones / n
    assert [found.low, found.high] == pytest.approx([low, high], abs=1e-6)


def test_the_interval_of_other_values_is_the_shares_in_the_limit_of_0_and_1():
    """The resampled and the exact way meet: one value barely off 1, which the exact way does not take."""
    values = (np.arange(40) < 12).astype(float)
    exact = bootstrap_interval(values, bounds=(0, 1))
    drawn = bootstrap_interval(np.where(np.arange(40) == 0, 1 - 1e-7, values), bounds=(0, 1), resamples=100_000)
    assert [drawn.low, drawn.high] == pytest.approx([exact.low, exact.high], abs=0.002)


def test_pairs_that_never_differ_leave_open_what_so_few_can_hide():
    found = bootstrap_interval(np.zeros(50), bounds=(-1, 1), resamples=50_000)
    assert [found.low, found.high] == pytest.approx([0.025 ** (1 / 50) - 1, 1 - 0.025 ** (1 / 50)], abs=0.003)


def test_bounds_scale_the_interval_and_hold_the_values():
    values = np.array([0.1, 0.4, 0.4, 0.9, 0.2])
    unit, wide = bootstrap_interval(values, bounds=(0, 1)), bootstrap_interval(10 * values - 3, bounds=(-3, 7))
    assert [wide.low, wide.high] == pytest.approx([10 * unit.low - 3, 10 * unit.high - 3])
    with pytest.raises(MoELensError, match=r"values from 0 to 0\.5; got 0\.1 to 0\.9"):
        bootstrap_interval(values, bounds=(0, 0.5))


@pytest.mark.parametrize("values", [[0.3], [0.0] * 200, [0.0] * 9 + [1.0]])
def test_without_bounds_too_few_or_equal_values_tell_no_interval(values):
    found = bootstrap_interval(values, bounds=UNBOUNDED)
    assert np.isnan([found.low, found.high]).any()


def test_without_bounds_a_few_unlike_values_have_students_interval():
    found = bootstrap_interval([1.0, 2.0, 4.0])
    reach = 4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)  # t with 2 degrees of freedom, 97.5 %
    assert found.mean - found.low == pytest.approx(reach)
    assert found.high - found.mean >= reach - 1e-6


def test_without_bounds_a_skewed_sample_reaches_further_to_its_long_side_and_never_less_than_students():
    values = np.random.default_rng(0).lognormal(0, 1, 40)
    found = bootstrap_interval(values)
    student = 2.022691 * values.std(ddof=1) / np.sqrt(40)  # t with 39 degrees of freedom, 97.5 %
    assert found.high - found.mean > 1.1 * student
    assert found.mean - found.low == pytest.approx(student)


def test_the_rate_of_equal_texts_is_that_of_their_number_and_its_interval_not_a_point():
    low, high = ratio_interval(np.zeros((30, 2)), np.full(30, 7.0), resamples=20_000)
    assert low.tolist() == [0, 0]
    assert high == pytest.approx([1 - 0.025 ** (1 / 30)] * 2, abs=0.005)


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
    a, b = COINS + 0.5 * np.roll(COINS, 1), np.roll(COINS, 1).astype(float)
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


def test_the_reach_of_two_seeds_is_students_and_a_single_one_has_none():
    assert resampling.mean_reach([1.0, 3.0]) == pytest.approx(12.7062, rel=1e-5)  # t(0.975, 1) * sqrt(2) / sqrt(2)
    assert np.isnan(resampling.mean_reach([1.0]))


def test_draws_of_a_mean_have_the_ends_of_its_interval_also_where_it_is_skewed_and_none_where_there_are_none():
    sample = np.random.default_rng(0).exponential(size=40)
    interval, drawn = bootstrap_interval(sample, bounds=UNBOUNDED, seed=2), drawn_means(sample, seed=2)
    assert np.quantile(drawn, [0.025, 0.5, 0.975]) == pytest.approx(
        [interval.low, interval.mean, interval.high], abs=0.01
    )
    assert interval.high - interval.mean > 1.2 * (interval.mean - interval.low), "not skewed"
    assert np.isnan(drawn_means(np.ones(9))).all()
