"""Effect sizes, seeds and many comparisons: against values worked by hand, theory, and simulated truth."""

import time

import numpy as np
import pytest

from moe_lens.errors import MoELensError
from moe_lens.metrics import (
    benjamini_hochberg,
    bootstrap_interval,
    cohens_d,
    compare,
    holm,
    paired_permutation_p,
    permutation_p_values,
    seeds_interval,
)

RNG = np.random.default_rng(11)
# The fifteen p-values of Benjamini and Hochberg (1995), section 4: four are significant at 0.05, Bonferroni's three.
P_1995 = [
    0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0,
]  # fmt: skip


def test_benjamini_hochberg_finds_the_four_of_its_papers_example():
    q = benjamini_hochberg(P_1995)
    assert np.flatnonzero(q <= 0.05).tolist() == [0, 1, 2, 3]
    assert q[3] == pytest.approx(0.0095 * 15 / 4)
    assert q[4] == pytest.approx(0.0201 * 15 / 5)
    assert q[5] == pytest.approx(0.0298 * 15 / 7)  # not 0.0278 * 15 / 6: a later one is smaller


def test_holm_steps_down_and_undoes_the_order():
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert np.flatnonzero(holm(P_1995) <= 0.05).tolist() == [0, 1, 2]
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([0.0, 1.0]).tolist() == [0, 1]


def test_holm_keeps_the_chance_of_any_false_call():
    false = [bool((holm(p) <= 0.05).any()) for p in RNG.random((4000, 20))]
    assert 0.03 < np.mean(false) < 0.065
    assert np.mean([(p <= 0.05).any() for p in RNG.random((4000, 20))]) > 0.5  # what it protects from


@pytest.mark.parametrize("p_values", [[], [0.1, 1.2], [-0.1], [float("nan")], [[0.1]]])
@pytest.mark.parametrize("correct", [holm, benjamini_hochberg])
def test_what_is_no_p_value_is_refused(correct, p_values):
    with pytest.raises(MoELensError, match="p-values"):
        correct(p_values)


def test_cohens_d_is_the_mean_in_standard_deviations():
    assert cohens_d([1, 2, 3]) == pytest.approx(2.0)
    assert cohens_d([0, 0]) == 0
    assert np.isnan(cohens_d([1, 1]))
    assert np.isnan(cohens_d([1]))


def test_a_comparison_of_yes_and_no_is_the_risk_difference():
    a, b = np.array([1, 1, 1, 0, 1, 0]), np.array([0, 1, 0, 0, 1, 0])
    found = compare(a, b, resamples=20_000)
    assert found.difference.mean == pytest.approx(2 / 6)
    assert found.difference == bootstrap_interval(a - b, bounds=(-1, 1), resamples=20_000)
    assert found.cohens_d == pytest.approx((2 / 6) / np.std(a - b, ddof=1))
    assert found.p == pytest.approx(0.5, abs=0.02)  # two pairs differ: 2 of 4 signs are as extreme


def test_p_values_of_many_tests_are_those_of_each():
    differences = RNG.normal(0.2, 1, size=(30, 5))
    together = permutation_p_values(differences, permutations=5000, seed=3)
    alone = [paired_permutation_p(d, np.zeros(30), permutations=5000, seed=3) for d in differences.T]
    assert together == pytest.approx(alone, abs=0)


def test_one_real_effect_among_many_tests_survives_the_correction():
    differences = RNG.normal(0, 1, size=(60, 400))
    differences[:, 7] += 2
    q = benjamini_hochberg(permutation_p_values(differences))
    assert np.flatnonzero(q <= 0.05).tolist() == [7]
    with pytest.raises(MoELensError, match="sample, test"):
        permutation_p_values(differences[:, 0])


def test_the_interval_over_one_seed_is_the_one_over_samples():
    values = (RNG.random(400) < 0.3).astype(float)
    assert seeds_interval(values[None], bounds=(0, 1)) == bootstrap_interval(values, bounds=(0, 1))


def test_the_interval_over_seeds_has_both_variances():
    """Values seed + sample: the reaches of both intervals, in closed form, are the sides of a right angle."""
    seeds, samples = RNG.normal(0, 1, size=8), RNG.normal(0, 3, size=90)
    interval = seeds_interval(seeds[:, None] + samples)
    over_seeds = 2.364624 * seeds.std(ddof=1) / np.sqrt(8)  # Student's t with 7 degrees of freedom, 97.5 %
    over_samples = 1.99 * samples.std(ddof=1) / np.sqrt(90)
    assert interval.mean == pytest.approx(seeds.mean() + samples.mean())
    assert interval.high - interval.low == pytest.approx(2 * np.hypot(over_seeds, over_samples), rel=0.04)


def test_equal_answers_under_all_seeds_leave_the_examples_uncertainty():
    interval = seeds_interval(np.ones((5, 50)), bounds=(0, 1))
    assert (interval.mean, interval.high) == (1, 1)
    assert interval.low == pytest.approx(0.025 ** (1 / 50))  # Clopper and Pearson's, of 50 of 50


def test_tables_of_seeds_that_are_not_full_are_refused():
    for values in ([1.0, 2.0], [[]], [[1.0, float("nan")]]):
        with pytest.raises(MoELensError, match="seed, sample"):
            seeds_interval(values)


def test_ten_thousand_resamples_of_five_seeds_of_a_thousand_take_under_a_second():
    start = time.process_time()
    seeds_interval(RNG.random((5, 1000)))
    assert time.process_time() - start < 1
