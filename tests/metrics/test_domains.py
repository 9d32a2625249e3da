"""What routing tells of where texts are from: mutual information by hand, and a null that deals whole texts."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from moe_lens.errors import MoELensError
from moe_lens.metrics.clusters_of_examples import routing_clusters
from moe_lens.metrics.information import domain_information


def texts(rates: dict[str, list[list[float]]], *, tokens: int = 8) -> pd.DataFrame:
    """Texts by domain, each with the share of its tokens that select each expert of one layer."""
    rows = [
        (domain, str(n), 1, expert, rate, tokens)
        for domain, own in rates.items()
        for n, text in enumerate(own)
        for expert, rate in enumerate(text)
    ]
    return pd.DataFrame(rows, columns=["domain", "id", "layer", "expert", "rate", "tokens"])


def test_information_by_hand():
    apart = domain_information(texts({"a": [[1, 0]] * 4, "b": [[0, 1]] * 12}), permutations=99).iloc[0]
    assert apart["information"] == pytest.approx(1), "each domain has an expert of its own, whatever their sizes"
    assert (apart["domains"], apart["examples"], apart["p_value"]) == (2, 16, 0.01)
    alike = domain_information(texts({"a": [[0.5, 0.5]] * 4, "b": [[0.5, 0.5]] * 4}), permutations=99).iloc[0]
    assert (alike["information"], alike["p_value"]) == (0, 1)
    mixed = domain_information(texts({"a": [[0.75, 0.25]] * 3, "b": [[0.25, 0.75]] * 3}), permutations=9).iloc[0]
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert mixed["information"] == pytest.approx(1 - entropy)
    assert mixed["excess"] == pytest.approx(mixed["information"] - mixed["chance"])


def test_texts_count_by_their_tokens():
    long, short = texts({"a": [[1, 0]], "b": [[0, 1]]}, tokens=3), texts({"a": [[0, 1]]}, tokens=1).assign(id="9")
    row = domain_information(pd.concat([long, short]), permutations=1).iloc[0]
    shares = np.array([[0.75, 0.25], [0, 1]])
    mean = shares.mean(0)
    expected = -(mean * np.log2(mean)).sum() + (0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) / 2
    assert row["information"] == pytest.approx(expected)


def test_chance_is_that_of_all_ways_to_deal_whole_texts():
    rng = np.random.default_rng(3)
    each = rng.dirichlet([1, 1, 1], 6)
    table = texts({"a": each[:3].tolist(), "b": each[3:].tolist()})
    row = domain_information(table, permutations=4000).iloc[0]
    every = []
    for first in combinations(range(6), 3):
        parts = {"a": each[list(first)].tolist(), "b": each[[n for n in range(6) if n not in first]].tolist()}
        every.append(domain_information(texts(parts), permutations=1).iloc[0]["information"])
    assert row["chance"] == pytest.approx(np.mean(every), rel=0.05)
    assert row["p_value"] == pytest.approx(np.mean(np.array(every) >= row["information"] - 1e-12), abs=0.03)


def test_texts_that_keep_to_one_expert_each_are_no_domains():
    """Of many tokens in few texts a null that dealt tokens would find information in all of these."""
    rng = np.random.default_rng(0)
    p_values = []
    for seed in range(20):
        own = np.eye(4)[rng.integers(0, 4, 12)].tolist()
        found = domain_information(texts({"a": own[:6], "b": own[6:]}, tokens=500), permutations=99, seed=seed)
        p_values.append(found["p_value"].iloc[0])
    assert np.mean(np.array(p_values) <= 0.05) <= 0.15
    assert np.mean(p_values) > 0.3


def test_clusters_of_routing_are_compared_with_domains():
    rng = np.random.default_rng(1)
    near = {"a": rng.dirichlet([9, 1, 1], 10), "b": rng.dirichlet([1, 9, 1], 10), "c": rng.dirichlet([1, 1, 9], 10)}
    table = routing_clusters(texts({name: own.tolist() for name, own in near.items()}), permutations=99)
    assert table["layers"].tolist() == ["all", "1"]
    assert (table["nmi"] > 0.9).all()
    assert (table["p_value"] == 0.01).all()
    halves = texts({"a": [[1, 0]] * 2 + [[0, 1]] * 2, "b": [[1, 0]] * 2 + [[0, 1]] * 4})
    row = routing_clusters(halves, permutations=99).iloc[0]
    clusters, labels = [0, 0, 1, 1, 0, 0, 1, 1, 1, 1], [0] * 4 + [1] * 6
    assert row["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters))
    assert row["ari"] == pytest.approx(adjusted_rand_score(labels, clusters))
    assert row["p_value"] > 0.3
    same = routing_clusters(texts({"a": [[1, 0]] * 3, "b": [[1, 0]] * 3}), permutations=9).iloc[0]
    assert (same["clusters"], same["nmi"]) == (1, 0)


@pytest.mark.parametrize("measure", [domain_information, routing_clusters])
def test_one_domain_tells_nothing_apart(measure):
    with pytest.raises(MoELensError, match="two data sets or more, to be told apart; got a alone"):
        measure(texts({"a": [[1, 0]]}))
