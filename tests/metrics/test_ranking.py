"""How scores are compared with a truth about experts: hand-computed cases."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, rankdata

from moe_lens import ExpertSet, MoELensError
from moe_lens.metrics import auc, precision_at, rank_correlation, rank_correlation_interval


def table(*layers: list[float], column: str = "score") -> pd.DataFrame:
    rows = [(layer, expert, value) for layer, values in enumerate(layers) for expert, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["layer", "expert", column])


def test_auc_counts_pairs_within_layers_and_averages_over_them():
    scores = table([4, 3, 2, 1], [1, 2, 3, 4])
    assert auc(scores, ExpertSet.of({0: [0, 1]})) == 1.0
    assert auc(scores, ExpertSet.of({0: [0, 2]})) == 0.75  # 3 of 4 pairs in order
    assert auc(scores, ExpertSet.of({0: [0, 1], 1: [0, 1]})) == 0.5  # 1 and 0
    assert auc(table([1, 1, 1]), ExpertSet.of({0: [0]})) == 0.5


def test_precision_is_the_share_of_the_highest_that_are_true():
    assert precision_at(table([4, 3, 2, 1]), ExpertSet.of({0: [0, 3]}), 2) == 0.5
    assert precision_at(table([4, 3], [1, 2]), ExpertSet.of({1: [1]}), 1) == 1.0


def test_rank_correlation_is_spearmans_within_layers():
    effects = table([1, 2, 4, 8], [8, 4, 2, 1], column="effect")
    assert rank_correlation(table([1, 2, 3, 4], [4, 3, 2, 1]), effects) == pytest.approx(1.0)
    assert rank_correlation(table([1, 2, 3, 4], [1, 2, 3, 4]), effects) == pytest.approx(0.0)
    assert np.isnan(rank_correlation(table([1, 1, 1, 1]), table([1, 2, 3, 4], column="effect")))


def test_the_interval_of_a_rank_correlation_is_fishers_of_the_ranks_wider_by_fieller():
    rng = np.random.default_rng(0)
    scores, effects = rng.normal(size=(2, 30))
    found = rank_correlation_interval(table(scores), table(effects, column="effect"))
    of_ranks = pearsonr(rankdata(scores), rankdata(effects))
    ends = np.arctanh([found.low, found.mean, found.high]), np.arctanh(of_ranks.confidence_interval())
    assert found.mean == pytest.approx(of_ranks.statistic)
    assert ends[0][[0, 2]] - ends[0][1] == pytest.approx((ends[1] - ends[0][1]) * np.sqrt(1.06), rel=1e-3)
    twice = rank_correlation_interval(table(scores, scores), table(effects, effects, column="effect"))
    assert np.diff(np.arctanh([twice.low, twice.high])) == pytest.approx(np.diff(ends[0][[0, 2]]) / np.sqrt(2))


@pytest.mark.slow
def test_the_interval_of_a_rank_correlation_holds_the_truth_as_often_as_it_says():
    rng, held, truth = np.random.default_rng(0), 0, 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman's of a normal r = 0.6
    for _ in range(400):
        scores = rng.normal(size=(4, 16))
        effects = 0.6 * scores + 0.8 * rng.normal(size=scores.shape)
        found = rank_correlation_interval(table(*scores), table(*effects, column="effect"))
        held += found.low <= truth <= found.high
    assert 0.93 <= held / 400 <= 0.98


def test_of_few_experts_a_rank_correlation_has_no_interval():
    found = rank_correlation_interval(table([1, 2, 3]), table([3, 2, 1], column="effect"))
    assert found.mean == pytest.approx(-1.0)
    assert np.isnan([found.low, found.high]).all()


def test_different_experts_cannot_be_compared():
    with pytest.raises(MoELensError, match="same experts"):
        rank_correlation(table([1, 2, 3]), table([1, 2], column="effect"))
    with pytest.raises(MoELensError, match="layer 2"):
        auc(table([1, 2]), ExpertSet.of({2: [0]}))
