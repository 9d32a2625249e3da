"""What returns of a choice when the data are drawn anew, and how far two choices agree."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from moe_lens import ExpertSet
from moe_lens.choosing.agreement import agreement_table, returning


def table(*layers: list[float]) -> pd.DataFrame:
    rows = [(layer, expert, score) for layer, scores in enumerate(layers) for expert, score in enumerate(scores)]
    return pd.DataFrame(rows, columns=["layer", "expert", "score"])


def test_all_returns_where_all_parts_say_the_same_and_less_where_they_do_not():
    same = [table([3, 2, 1, 0], [0, 1, 2, 3])] * 5
    assert returning(same, 2, resamples=50).tolist() == [1.0] * 50
    # The first part is for expert 0, five others are faintly for expert 1, so 0 leads when the first one is drawn.
    split = [table([10.0, 0.0])] + [table([0.0, 0.1])] * 5
    found = returning(split, 1, resamples=400)
    assert set(found) == {0.0, 1.0}
    assert found.mean() == pytest.approx(1 - (5 / 6) ** 6, abs=0.07)
    assert np.array_equal(found, returning(split, 1, resamples=400))
    assert not np.array_equal(found, returning(split, 1, resamples=400, seed=1))


def test_scores_agree_by_their_ranks_in_a_layer_and_by_the_experts_of_their_sets():
    tables = {"a": table([3, 2, 1], [1, 2, 3]), "b": table([3, 1, 2], [9, 8, 7]), "c": table([3, 2, 1], [1, 2, 3])}
    sets = {name: ExpertSet.top(one, 1) for name, one in tables.items()}
    found = agreement_table(tables, sets).set_index(["first", "second"])
    assert list(found.index) == [("a", "b"), ("a", "c"), ("b", "c")]
    ranks = [spearmanr([3, 2, 1], [3, 1, 2]).statistic, spearmanr([1, 2, 3], [9, 8, 7]).statistic]
    assert found.loc[("a", "b"), "rank_correlation"] == pytest.approx(np.mean(ranks))
    assert found.loc[("a", "c")].tolist() == [1.0, 1.0]
    assert found.loc[("a", "b"), "jaccard"] == 1 / 3  # expert 0 of layer 0, of three in all
