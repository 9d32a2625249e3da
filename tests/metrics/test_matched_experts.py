"""Experts of two models matched one to one, and the distance of what they are used for: by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wasserstein_distance

from moe_lens.errors import MoELensError
from moe_lens.metrics.matched_experts import match_experts, matched_by_tokens, matches_table, signature_distance


def chosen(experts: list[tuple[int, ...]], *, texts: int = 4) -> pd.DataFrame:
    """Tokens of several texts in turn that select these experts of layer 2."""
    rows = [
        (f"t{place % texts}", 2, place // texts, rank, expert)
        for place, own in enumerate(experts)
        for rank, expert in enumerate(own)
    ]
    return pd.DataFrame(rows, columns=["id", "layer", "position", "rank", "expert"])


def test_the_best_assignment_is_of_all_experts_together():
    similarity = np.array([[0.9, 0.8], [0.85, 0.1]])
    assert match_experts(similarity).tolist() == [1, 0], "each one's own best would be the same"
    assert match_experts(np.array([[0.1, 0.2], [0.9, 0.3], [0.0, 0.8]])).tolist() == [-1, 0, 1]
    table = matches_table(5, "rows", similarity)
    assert table["similarity"].tolist() == [0.8, 0.85]
    assert table["same"].tolist() == [0.9, 0.1]
    assert table["average"].tolist() == pytest.approx([0.85, 0.475])
    assert table["moved"].all()


def test_experts_are_matched_by_their_tokens():
    first, second = [(0, 1), (0, 2), (1, 2), (0, 1)], [(3, 1), (3, 2), (1, 2), (3, 0)]
    table = matched_by_tokens(chosen(first), chosen(second), n_experts=4).set_index("expert")
    assert table.loc[0, ["match", "similarity"]].tolist() == [3, 1]
    assert table.loc[1, ["match", "similarity"]].tolist() == [1, pytest.approx(2 / np.sqrt(3 * 2))]
    assert table.loc[2, ["match", "similarity", "same"]].tolist() == [2, 1, 1]
    assert table.loc[3, "similarity"] == 0, "never selected"
    with pytest.raises(MoELensError, match="expected the same tokens"):
        matched_by_tokens(chosen(first), chosen(second[:3]), n_experts=4)


def test_a_signature_does_not_see_numbers_and_its_distance_is_wassersteins():
    rng = np.random.default_rng(0)
    first = {name: [tuple(rng.permutation(6)[:2]) for _ in range(40)] for name in "ab"}
    renamed = {name: [tuple((e + 1) % 6 for e in own) for own in tokens] for name, tokens in first.items()}
    tables = [{name: chosen(tokens) for name, tokens in part.items()} for part in (first, renamed)]
    table = signature_distance(*tables, n_experts=6).set_index("profile")
    assert table["distance"].to_numpy() == pytest.approx(0)
    assert (table["same"] > 0).all()
    assert (table["floor"] > 0).all()
    other = [tuple(rng.permutation(5)[:2]) for _ in range(40)]
    row = signature_distance({"a": tables[0]["a"]}, {"a": chosen(other)}, n_experts=6).set_index("profile")
    rates = [np.bincount(np.ravel(tokens), minlength=6) / 40 for tokens in (first["a"], other)]
    assert row.loc["specialisation", "distance"] == pytest.approx(wasserstein_distance(*rates))
    assert row.loc["specialisation", "same"] == pytest.approx(np.abs(rates[0] - rates[1]).mean())


def test_collaboration_is_who_is_selected_with_whom_the_most_frequent_first():
    together = {"a": chosen([(0, 1), (0, 1), (0, 1), (2, 3)])}
    apart = {"a": chosen([(0, 1), (0, 2), (0, 3), (2, 3)])}
    row = signature_distance(together, apart, n_experts=4).set_index("profile").loc["collaboration"]
    # of the first all are [1, 0, 0]; of the second 0: [1/3, 1/3, 1/3], 1: [1, 0, 0], 2 and 3: [1/2, 1/2, 0]
    assert row["distance"] == pytest.approx(((2 / 3 + 1 / 3 + 1 / 3) + 0 + 2 * (1 / 2 + 1 / 2)) / 3 / 4)
