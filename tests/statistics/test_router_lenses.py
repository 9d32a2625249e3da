"""How routers choose: margins, histograms and their Dirichlet fit, rows beside co-activation, groups of experts."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import entr
from scipy.stats import beta, cramervonmises, spearmanr
from test_expert_statistics import routed
from test_paths_and_contexts import ONE_OF_EACH
from test_routing_statistics import RECORDS, every_token

from moe_lens.errors import MoELensError
from moe_lens.routing import Routing
from moe_lens.statistics import (
    CoActivation,
    RouterHistograms,
    RouterMargins,
    expert_groups,
    router_affinity,
)
from moe_lens.statistics.pairs import pairs_table
from moe_lens.statistics.router_histograms import EDGES


def of_logits(logits: torch.Tensor, k: int = 2, ids=ONE_OF_EACH):
    """A record of one layer whose router gives these logits [batch, pos, expert] and selects the k highest."""
    indices = logits.topk(k, dim=-1).indices
    base = routed(indices.tolist(), ids, n_experts=logits.shape[-1])
    return replace(base, captured={"routing": {3: Routing(logits, indices, logits.softmax(-1).gather(-1, indices))}})


def drawn(alpha: list[float], *, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """Logits of probabilities drawn from a Dirichlet distribution, [ten texts, pos, expert]."""
    rng = np.random.default_rng(seed)
    return torch.tensor(np.log(rng.dirichlet(alpha, (10, tokens // 10)).clip(1e-30)))


def test_margins_by_hand():
    logits = torch.tensor([[[3.0, 1.0, 0.9, -1.0], [2.0, 2.0, 0.0, 0.0]]])
    row = RouterMargins().update(of_logits(logits, ids="a")).table().iloc[0]
    sds = logits[0].std(1, correction=0).double().numpy()
    assert row["margin"] == pytest.approx((0.1 + 2) / 2)
    assert row["margin_sd"] == pytest.approx((0.1 / sds[0] + 2 / sds[1]) / 2)
    assert row["close"] == 0.5, "0.1 is below a tenth of the sd of 1.4"
    assert row["tokens"] == 2
    with pytest.raises(MoELensError, match="selects all of its 4 experts"):
        RouterMargins().update(of_logits(logits, k=4, ids="a"))


def test_margins_of_parts_are_those_of_every_token():
    table = RouterMargins().update(RECORDS[0]).merge(RouterMargins().update(RECORDS[1])).table().set_index("layer")
    for layer in RECORDS[0].routing:
        found = []
        for part in RECORDS:
            for chosen, logits in every_token(part, layer):
                found.append(logits[chosen].min() - np.delete(logits, chosen).max())
        assert table.loc[layer, "margin"] == pytest.approx(np.mean(found), abs=1e-6)


def test_a_dirichlet_is_found_with_its_concentration_and_another_distribution_is_far_from_its_fit():
    row = RouterHistograms().update(of_logits(drawn([2, 1, 0.5, 0.5], tokens=4000))).table().iloc[0]
    assert row["concentration_low"] < 4 < row["concentration_high"]
    assert row["concentration"] == pytest.approx(4, rel=0.1)
    assert row["distance"] < 0.002
    turns = torch.eye(4)[torch.arange(4000) % 4].view(10, 400, 4) * 1.5
    far = RouterHistograms().update(of_logits(turns)).table().iloc[0]
    assert far["distance"] > 0.02, "two values only, of which no Beta distribution is"


def test_the_distance_is_cramer_and_von_mises_integral():
    logits = drawn([0.3, 0.7, 1, 2], tokens=300, seed=3).sqrt().nan_to_num(0.5) - drawn([1, 1, 1, 1], tokens=300)
    row = RouterHistograms().update(of_logits(logits)).table().iloc[0]
    own = logits.flatten(0, 1).softmax(-1).numpy()
    mean, s = own.mean(0), row["concentration"]
    assert s == pytest.approx((mean * (1 - mean)).sum() / own.var(0).sum() - 1)
    exact = [cramervonmises(own[:, i], beta(s * mean[i], s * (1 - mean[i])).cdf).statistic / len(own) for i in range(4)]
    assert row["distance"] == pytest.approx(np.mean(exact), abs=1e-3)


def test_histograms_count_every_probability_and_have_the_fits_share_beside():
    logits = drawn([1, 1, 1], tokens=2000)
    table = RouterHistograms().update(of_logits(logits)).histograms()
    own = logits.flatten(0, 1).softmax(-1).numpy()
    share = (entr(own).sum(1) / np.log(3)).clip(0, 1)
    for value, seen in (("each", own), ("largest", own.max(1)), ("entropy", share)):
        part = table[table["value"] == value]
        assert part["share"].to_numpy() == pytest.approx(np.histogram(seen, EDGES)[0] / seen.size)
        assert (part["share_low"] <= part["share"]).all()
    each = table[table["value"] == "each"]
    assert each["fitted"].sum() == pytest.approx(1)
    assert (each["share"] - each["fitted"]).abs().max() < 0.01
    alike = RouterHistograms().update(of_logits(torch.zeros(10, 4, 3)))
    assert alike.table()[["concentration", "distance"]].isna().all(axis=None), "nothing varies"


def in_pairs(seed: int, *, tokens: int = 60, loyal: float = 0.8) -> torch.Tensor:
    """Tokens [ten texts, pos, 2] that take experts 0 and 1, or 2 and 3, or 4 and 5, most of them."""
    rng = np.random.default_rng(seed)
    pair = rng.integers(0, 3, (10, tokens))
    experts = np.stack([2 * pair, 2 * pair + 1], -1)
    strays = rng.random((10, tokens)) > loyal
    experts[strays] = np.argsort(rng.random((strays.sum(), 6)), axis=1)[:, :2]
    return torch.tensor(experts)


def test_groups_are_found_and_hold_in_other_texts_and_those_of_noise_do_not():
    statistic = CoActivation().update(routed(in_pairs(0).tolist(), ONE_OF_EACH, n_experts=6))
    table = expert_groups(statistic)
    assert table.groupby("group")["expert"].agg(tuple).tolist() == [(0, 1), (2, 3), (4, 5)]
    row = table.iloc[0]
    # three equal groups: the share of edges inside, less that of a pair of ends: 1/3
    together = statistic.layer_sums()[3]["together"].sum(0).numpy() * (1 - np.eye(6))
    inside = sum(together[i : i + 2, i : i + 2].sum() for i in (0, 2, 4)) / together.sum()
    ends = together.sum(1).reshape(3, 2).sum(1) / together.sum()
    assert row["modularity"] == pytest.approx(inside - (ends**2).sum())
    assert row["held_out"] == pytest.approx(row["modularity"], abs=0.05)
    chosen = np.argsort(np.random.default_rng(1).random((10, 12, 16)), axis=-1)[..., :2]
    noise = expert_groups(CoActivation().update(routed(chosen.tolist(), ONE_OF_EACH, n_experts=16))).iloc[0]
    assert noise["modularity"] > 0.1, "the best groups of few tokens"
    assert noise["held_out"] < 0.05
    with pytest.raises(MoELensError, match="one expert alone"):
        expert_groups(CoActivation().update(routed([[[0], [1]]], "a")))


def test_rows_that_are_alike_and_selected_together_correlate_and_dealt_ones_do_not():
    statistic = CoActivation().update(routed(in_pairs(0).tolist(), ONE_OF_EACH, n_experts=6))
    rng = np.random.default_rng(0)
    own = np.repeat(rng.normal(size=(3, 8)), 2, axis=0) + 0.3 * rng.normal(size=(6, 8))

    def similarity(rows: np.ndarray) -> pd.DataFrame:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return pairs_table(3, {"similarity": unit @ unit.T})

    row = router_affinity(statistic, similarity(own)).iloc[0]
    pairs = statistic.table().merge(similarity(own), on=["layer", "expert", "other"])
    assert row["correlation"] == pytest.approx(spearmanr(pairs["probability"], pairs["similarity"]).statistic)
    assert row["correlation_low"] < row["correlation"] < row["correlation_high"]
    assert row["p_value"] < 0.02
    given = pairs.set_index(["expert", "other"])["probability"]
    assert row["nearest"] == pytest.approx(np.mean([given[i, i ^ 1] for i in range(6)]))
    assert row["average"] == pytest.approx(1 / 5), "k - 1 over the others"
    p_values = [
        router_affinity(statistic, similarity(own[rng.permutation(6)]), seed=seed).iloc[0]["p_value"]
        for seed in range(3)
    ]
    assert np.mean(p_values) > 0.1
